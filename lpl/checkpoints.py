"""Checkpoints from which a run goes on: ``checkpoint-N`` holds what is trained in diffusers' layout, its moving
average in ``ema/`` likewise, the optimizer, the learning-rate schedule, LPL's weight, and where the run stands.

A checkpoint is written beside its place and then renamed, so that what bears the name is whole.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from lpl.trainee import Trainee, load_ema, save_ema


logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"


@dataclass
class Progress:
    """Where a run stands: finished optimizer steps, and the seed that its random numbers are keyed by."""

    step: int
    seed: int

    FILE: ClassVar[str] = "progress.json"

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Progress:
        return cls(**json.loads((folder / cls.FILE).read_text()))


def register(accelerator: Accelerator, trainee: Trainee, ema: EMAModel | None) -> None:
    """Have accelerate save and load what is trained, and its moving average, in the layout of the result itself."""

    def save(models: Sequence[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            trainee.save(folder)
            if ema is not None:
                save_ema(ema, trainee, folder)
        weights.clear()  # nothing is left for accelerate to write

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()  # nothing is left for accelerate to read
        if ema is not None and not load_ema(ema, trainee, folder):
            logger.warning(
                "--use_ema: the checkpoint has no moving average, so it starts from the weights as they are"
            )
        trainee.load(folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def find_resumable(output_dir: str, name: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means: a folder, or "latest"; None = start afresh.

    Raises:
        ValueError: where a named folder is no checkpoint.
    """
    if name is None:
        return None
    if name == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            logger.warning(
                f"--resume_from_checkpoint latest: {output_dir} has no checkpoint yet, training starts afresh"
            )
        return checkpoints[-1] if checkpoints else None
    place = Path(name) if Path(name).is_dir() else Path(output_dir, name)
    if not (place / Progress.FILE).is_file():
        raise ValueError(
            f"--resume_from_checkpoint {name}: there is no checkpoint in that folder; give one, or latest"
        )
    return place


def save_checkpoint(accelerator: Accelerator, output_dir: str, progress: Progress, total_limit: int | None) -> Path:
    """Write ``checkpoint-STEP`` whole, then drop the oldest ones above the limit. Called by every process."""
    place = Path(output_dir, f"{PREFIX}{progress.step}")
    unfinished = Path(output_dir, f".{place.name}.unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress.save(unfinished)
        shutil.rmtree(place, ignore_errors=True)
        unfinished.rename(place)
        if total_limit is not None:
            others = [path for path in find_checkpoints(output_dir) if path != place]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return place
