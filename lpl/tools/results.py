"""What a run's output folder tells: which entries are its result, those of a pipeline or of a LoRA, and how long its
steps took."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpl.tools import layout
from lpl.tools.trust import components_in


def pipeline_entries(folder: Path) -> list[str]:
    """A pipeline's index and the folders that it lists; empty if there is no index."""
    if not (folder / layout.INDEX).is_file():
        return []
    return [*(name for name in _listed(folder) if (folder / name).is_dir()), layout.INDEX]


def single_files(folder: Path) -> list[str]:
    """The pipeline as one file."""
    return sorted(path.name for path in folder.glob(f"*{layout.SINGLE_FILE}"))


def missing_components(folder: Path) -> list[str]:
    """Components that a pipeline's index lists and the folder has no files of."""
    if not (folder / layout.INDEX).is_file():
        return []
    return [name for name in _listed(folder) if not any((folder / name).glob("*"))]


def _listed(folder: Path) -> list[str]:
    try:
        content = json.loads((folder / layout.INDEX).read_text(encoding="utf-8"))
    except ValueError:  # it is no index
        return []
    return [name for name, entry in components_in(content).items() if entry != [None, None]]


def lora_entries(folder: Path) -> list[str]:
    """The files and folders of a LoRA: diffusers', peft's, and those for other programs."""
    patterns = (layout.LORA, f"*{layout.OTHERS_SUFFIX}", f"*{layout.PEFT_SUFFIX}/{layout.PEFT_CONFIG}")
    found = [path.relative_to(folder).parts[0] for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [*(path.name for path in sorted(folder.glob(f"*{layout.OTHERS_PREVIEW}"))), *found] if found else []


def last_samples(folder: Path, step: int) -> Path | None:
    """The folder of a run's last samples at a step or before, the moving average's if there are any."""
    found = []
    for path in folder.glob(f"{layout.SAMPLES}/*/{layout.SETTINGS}"):
        name = re.fullmatch(r"step-(\d+)(-ema)?", path.parent.name)
        if name and int(name[1]) <= step:  # later ones are of an earlier run in the same folder
            found.append((int(name[1]), name[2] or "", path.parent))
    return max(found)[-1] if found else None


def scheduler_entries(folder: Path) -> list[str]:
    """The scheduler beside a LoRA of another objective than its base's."""
    return ["scheduler"] if (folder / "scheduler").is_dir() else []


def check_one_kind(what: str, folder: Path) -> None:
    """Refuse a folder with a pipeline and a LoRA: its card can be of one of them only.

    Raises:
        ValueError: with what to move.
    """
    pipeline, lora = pipeline_entries(folder), lora_entries(folder)
    if pipeline and lora:
        raise ValueError(
            f"{what}: it holds a pipeline and a LoRA, and its card is of one of them; move the other's files away, "
            f"{' '.join(pipeline)} or {' '.join(lora)}"
        )


def training_seconds(records: Sequence[Mapping[str, Any]], batch: int) -> float:
    """Time of the optimizer steps alone, over all runs that wrote to a log, by the steps and speeds of its entries.

    Args:
        batch: samples per step.

    >>> training_seconds([{"step": 10, "images_per_second": 4.0}, {"step": 15, "images_per_second": 2.0}], 8)
    40.0
    """
    seconds, last_step = 0.0, 0
    for record in records:
        if speed := record.get("images_per_second"):
            seconds += (record["step"] - last_step) * batch / speed
            last_step = record["step"]
    return seconds
