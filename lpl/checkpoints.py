"""Checkpoints from which a run goes on: ``checkpoint-N`` holds what is trained in diffusers' layout, its moving
average in ``ema/`` likewise, the optimizer, the learning-rate schedule, LPL's weight, and where the run stands.

A checkpoint is written beside its place and then renamed, so that what bears the name is whole; one that goes is
renamed before it is deleted, so that nothing that bears the name is half there. Whenever a run is killed, the next one
finds the last whole checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from lpl.files import write_text
from lpl.trainee import Trainee, load_ema, save_ema


logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
UNFINISHED, REMOVED = ".unfinished", ".removed"  # endings of folders whose names begin with a dot


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: finished optimizer steps.
        seed: that its random numbers are keyed by.
        looked: whether the samples and metrics that are due after this step are there.
        log: sums of the log since its last entry, see :meth:`lpl.logs.Log.state`.
    """

    step: int
    seed: int
    looked: bool = False
    log: list[list[float]] = field(default_factory=list)

    FILE: ClassVar[str] = "progress.json"

    def save(self, folder: Path) -> None:
        write_text(folder / self.FILE, json.dumps(asdict(self)))

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
    if broken := [path.name for path in found if not (path / Progress.FILE).is_file()]:
        logger.warning("%s: %s is no whole checkpoint and is passed over", output_dir, ", ".join(sorted(broken)))
    whole = (path for path in found if path.name not in broken)
    return sorted(whole, key=lambda path: int(path.name.removeprefix(PREFIX)))


def tidy(output_dir: str | Path) -> None:
    """Put in place what was whole when a run was killed, and remove what was not; on the main process, before it looks
    for a checkpoint."""
    for hidden in Path(output_dir).glob(f".{PREFIX}*"):
        folder = hidden.with_name(hidden.name.removeprefix(".").rpartition(".")[0])
        if hidden.name.endswith(UNFINISHED) and (hidden / Progress.FILE).is_file() and not folder.exists():
            hidden.rename(folder)
        else:
            shutil.rmtree(hidden, ignore_errors=True)


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


# Flags whose change a checkpoint cannot go on under, and those whose change no number of the training sees.
NEVER_CHANGED = (
    "prediction_type",
    "lora",
    "use_dora",
    "use_rslora",
    "train_text_encoder",
    "optimizer",
    "use_8bit_adam",
)
WITHOUT_EFFECT = (
    *("max_train_steps", "num_train_epochs", "output_dir", "cache_dir", "dataloader_num_workers", "seed"),
    *("report_to", "tracker_project_name", "push_to_hub", "debug_loss", "num_validation_images"),
)
WITHOUT_EFFECT_BEGINNINGS = (
    *("validation_prompt", "validation_steps", "validation_epochs", "validation_inference", "validation_guidance"),
    *("eval_", "logging_", "checkpoint", "hub_"),
)


def check_recipe(resumable: Path, values: Mapping[str, Any]) -> None:
    """Name what the command changes of the run that it resumes.

    A change of objective, of what is trained or of the optimizer is refused, since the checkpoint is of something
    else; any other that moves numbers is allowed, with a warning; samples, logs and the like change without a word.

    Args:
        values: the flags, as ``recipe.yaml`` has them.

    Raises:
        ValueError: with the flag, what it was and what it is.
    """
    file = resumable.resolve().parent / "recipe.yaml"
    earlier = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    for name in sorted(values.keys() & (earlier or {}).keys()):
        if values[name] == earlier[name] or name in WITHOUT_EFFECT or name.startswith(WITHOUT_EFFECT_BEGINNINGS):
            continue
        change = f"--{name} {_said(values[name])}: the run to resume has {_said(earlier[name])}"
        if name in NEVER_CHANGED:
            raise ValueError(
                f"{change}, and its checkpoints cannot go on otherwise; start another run, or change it back"
            )
        logger.warning("%s; from here on the new value holds", change)


def _said(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def place(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return Path(output_dir, f"{PREFIX}{step}")


def save_checkpoint(accelerator: Accelerator, output_dir: str, progress: Progress, total_limit: int | None) -> Path:
    """Write ``checkpoint-STEP`` whole, then drop the oldest ones above the limit. Called by every process."""
    folder = place(output_dir, progress.step)
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress.save(unfinished)  # last: with it the checkpoint is whole
        with _removed(folder):
            unfinished.rename(folder)
        if total_limit is not None:
            others = [path for path in find_checkpoints(output_dir) if path != folder]
            for old in others[: max(0, len(others) + 1 - total_limit)]:
                with _removed(old):
                    pass
    accelerator.wait_for_everyone()
    return folder


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Within, nothing bears the folder's name; behind, what did so is deleted."""
    hidden = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        folder.rename(hidden)
    yield
    shutil.rmtree(hidden, ignore_errors=True)
