"""Checkpoints that a run resumes from.

``checkpoint-N`` holds the trained parts in diffusers' layout, their moving average in ``ema/`` likewise, the
optimizer, the position in the learning-rate schedule, the scaler of fp16, LPL's weight, each process's random state
(dropout), and where the run stands (:class:`Progress`). Of the data the step is enough: samples and their random
numbers follow from seed, epoch and place (:mod:`lpl.data.dataset`). So a resumed run equals an uninterrupted one.

A checkpoint is written under another name and then renamed, so ``checkpoint-N`` is always whole; before one is deleted
it is renamed. Whenever a run is killed, the next one finds the last whole checkpoint. Checkpoints that an earlier run
left beyond the step where a run starts are renamed to ``earlier-checkpoint-N``, so that all ``checkpoint-N`` are of
one run and the highest number is the latest.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from lpl.config.choices import ENDLESS_SCHEDULERS
from lpl.config.config import FLAGS
from lpl.config.data_sets import as_word
from lpl.config.flag import LENGTH, REFUSED, SILENT
from lpl.config.recipes import read_entries, take_measured
from lpl.config.rules import is_path
from lpl.data.fingerprint import other_data
from lpl.tools import layout
from lpl.tools.files import (
    UNFINISHED,
    free_place,
    load_state,
    put_back,
    remove_halves,
    removed,
    save_state,
    settle,
    write_text,
)
from lpl.tools.machine import is_full
from lpl.tools.words import counted, first_line
from lpl.training.average import MovingAverage, averaged, gathered, load_average, save_average
from lpl.training.parts import TrainedParts
from lpl.training.updates import Updates
from lpl.weighting import LplWeight


logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: finished optimizer steps.
        seed: key of the run's random numbers.
        looked: whether the validation that is due after this step is done.
        log: sums of the log since its last entry, see :meth:`lpl.training.log.Log.state`.
        stream: where each process reads a streamed data set, see :class:`lpl.data.streaming.StreamedBatches`.
        skipped: skipped steps so far, see :class:`lpl.training.skipped_steps.SkippedSteps`.
        classes: of a class-conditional family, the names of the data's classes by label, if they have names.
    """

    step: int
    seed: int
    looked: bool = False
    log: list[list[float]] = field(default_factory=list)
    stream: list[list[int]] = field(default_factory=list)
    skipped: int = 0
    classes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        write_text(folder / layout.PROGRESS, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Progress:
        return cls(**json.loads((folder / layout.PROGRESS).read_text()))


@dataclass
class TrainingState:
    """All that a checkpoint holds besides where the run stands, as safetensors and JSON; nothing is pickled."""

    accelerator: Accelerator
    trained: TrainedParts
    average: MovingAverage | None
    updates: Updates
    lpl_weight: LplWeight

    def check(self) -> None:
        """Called by every process.

        Raises:
            FloatingPointError: where a weight is not finite.
        """
        if broken := self.trained.not_finite():
            raise FloatingPointError(f"the weights of {broken} are not finite any more and are not saved")

    def gathered(self) -> AbstractContextManager[None]:
        """Within, the main process can save what is trained. Called by every process."""
        return gathered(self.average, self.trained, self.accelerator.is_main_process)

    def random(self) -> list[dict[str, torch.Tensor | None]]:
        """The global random state of each process, which dropout draws from. Every process calls it."""
        device = self.accelerator.device
        mine = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        return gather_object([mine])

    def save(self, folder: Path, random: list[dict[str, torch.Tensor | None]], updates: dict[str, Any]) -> None:
        """Called by the main process alone: the others may be on machines that do not see the folder, and only one has
        to make room if the disk is full."""
        self.trained.save(folder)
        if self.average is not None:
            save_average(self.average, self.trained, folder)
        elif self.trained.averaging is not None:  # for those who publish or measure it; a resumed run needs it not
            with averaged(None, self.trained):
                self.trained.save(folder / layout.EMA)
        state = {"updates": updates, "lpl_weight": self.lpl_weight.state_dict()}
        save_state(state, folder / layout.STATE)
        for process, its_random in enumerate(random):
            save_state(its_random, folder / layout.RANDOM_STATE.format(process))

    def load(self, folder: Path) -> None:
        """Resume from there. Called by every process.

        Raises:
            ValueError: where the checkpoint is damaged, or of something else than what is trained.
        """
        try:
            self._load(folder)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"--resume_from_checkpoint {folder.name}: {first_line(error)}") from error

    def _load(self, folder: Path) -> None:
        state = load_state(folder / layout.STATE)
        if self.average is not None and not load_average(self.average, self.trained, folder):
            logger.warning(
                "--use_ema: the checkpoint has no moving average, so it starts from the checkpoint's weights"
            )
        self.trained.load(folder)
        self.updates.load_state_dict(state["updates"])
        self.lpl_weight.load_state_dict(state["lpl_weight"])
        random_file = folder / layout.RANDOM_STATE.format(self.accelerator.process_index)
        if random_file.is_file():  # else there were fewer processes
            random = load_state(random_file)
            torch.set_rng_state(random["cpu"])
            if random["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(random["cuda"], self.accelerator.device)


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = _numbered(output_dir)
    if broken := [path for path in found if not is_whole(path)]:
        names = ", ".join(sorted(path.name for path in broken))
        logger.warning("%s: %s is not a whole checkpoint and is ignored", output_dir, names)
    return [path for path in found if path not in broken]


def _numbered(output_dir: str | Path) -> list[Path]:
    """The folders named like a checkpoint, whole or not, oldest first."""
    found = (
        path
        for path in Path(output_dir).glob(f"{layout.CHECKPOINT_PREFIX}*")
        if path.name.removeprefix(layout.CHECKPOINT_PREFIX).isdigit()
    )
    return sorted(found, key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(layout.CHECKPOINT_PREFIX))


def is_whole(folder: Path) -> bool:
    """Whether a folder records where a run stands and none of its tensors are truncated; reads headers only."""
    try:
        Progress.load(folder)
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt"):  # compares the file's size with what its header says
                pass
    except (OSError, ValueError, TypeError, SafetensorError):
        return False
    return True


def set_aside(output_dir: str | Path, step: int) -> bool:
    """Rename the checkpoints beyond the step where a run starts, so that they are not taken for its own. On the main
    process.

    Returns:
        Whether there were any.
    """
    later = [path for path in _numbered(output_dir) if _number(path) > step]
    if later:
        places = [path.rename(free_place(path.with_name(f"earlier-{path.name}"))) for path in later]
        moved = ", ".join(f"{path.name} to {place.name}" for path, place in zip(later, places))
        logger.warning(
            f"--output_dir {output_dir}: this run starts at step {step}, so checkpoints of an earlier run beyond it "
            f"are renamed: {moved}; --resume_from_checkpoint accepts these names too"
        )
    return bool(later)


def tidy(output_dir: str | Path) -> None:
    """After a run was killed: move what was whole to its place, and remove the rest. On the main process, before it
    looks for a checkpoint. The result is the earlier one or the new one, never a mix."""
    for hidden in Path(output_dir).glob(f".{layout.CHECKPOINT_PREFIX}*"):
        folder = hidden.with_name(hidden.name.removeprefix(".").rpartition(".")[0])
        if hidden.name.endswith(UNFINISHED) and is_whole(hidden) and not folder.exists():
            hidden.rename(folder)
        else:
            shutil.rmtree(hidden, ignore_errors=True)
    put_back(output_dir)
    remove_halves(output_dir)


def find_resumable(output_dir: str, name: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names: a folder, "latest", or "hub", which is downloaded by now.

    Returns:
        None to start afresh.

    Raises:
        ValueError: where a named folder is no checkpoint.
    """
    if name is None:
        return None
    if name in ("latest", "hub"):
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            logger.warning(
                f"--resume_from_checkpoint {name}: {output_dir} has no checkpoint yet, training starts afresh"
            )
        return checkpoints[-1] if checkpoints else None
    place = Path(name) if Path(name).is_dir() else Path(output_dir, name)
    if not is_whole(place):
        there = ", ".join(path.name for path in find_checkpoints(output_dir)) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {name}: {place} is no whole checkpoint; give one, or latest (whole ones in "
            f"{output_dir}: {there})"
        )
    return place


def recipe_of(resumable: Path) -> dict[str, Any]:
    """The recipe beside a checkpoint; empty if there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    file = resumable.resolve().parent / layout.RECIPE
    if not file.is_file():
        return {}
    try:
        return read_entries(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume_from_checkpoint {resumable.name}: {file} cannot be read ({first_line(error)}); repair it, or "
            "delete it to resume without a comparison of the flags and the data"
        ) from error


def check_data(resumable: Path, now: Mapping[str, Any]) -> None:
    """Report that the data is not that of the run to resume.

    Args:
        now: :func:`lpl.data.fingerprint.data_facts` of this run.
    """
    earlier = take_measured(recipe_of(resumable)).get("data") or {}
    if difference := other_data(earlier, now):
        shifted = earlier.get("images") != now.get("images")
        logger.warning(
            f"the data is not that of the run to resume ({difference}); the run goes on with what there is now"
            + ("; some images come twice or not at all in this epoch" if shifted else "")
        )


def check_recipe(resumable: Path, values: Mapping[str, Any], processes: int, base: str | None = None) -> None:
    """Report the flags that the command changes of the run that it resumes, as each flag's ``on_resume`` says.

    Args:
        values: the flags, as ``recipe.yaml`` has them.
        processes: of this run; a recipe records the number among what its run has measured.
        base: identity of this run's base model, likewise.

    Raises:
        ValueError: for a flag that cannot change, since the checkpoint is of something else.
    """
    earlier = recipe_of(resumable)
    schedule = values.get("lr_scheduler")
    endless = schedule in ENDLESS_SCHEDULERS or is_path(schedule)  # a class knows nothing of the run's length
    for name in sorted(values.keys() & earlier.keys()):
        rule = FLAGS[name].on_resume
        if values[name] == earlier[name] or rule is SILENT or (rule is LENGTH and endless):
            continue
        change = f"--{name} {_said(values[name])}: the run to resume has {_said(earlier[name])}"
        if rule is REFUSED:
            raise ValueError(
                f"{change}, and its checkpoints cannot be resumed otherwise; start another run, or change it back"
            )
        logger.warning("%s; the new value holds from here on", change)
    measured = take_measured(earlier)
    for difference in (*_other_base(measured, earlier, values, base), *_other_processes(measured, values, processes)):
        logger.warning(difference)


def _other_base(
    measured: Mapping[str, Any], earlier: Mapping[str, Any], values: Mapping[str, Any], base: str | None
) -> Iterator[str]:
    """Another base model at the same place; another place is named among the flags."""
    name, before = "pretrained_model_name_or_path", measured.get("base")
    if before and base and before != base and values.get(name) == earlier.get(name):
        yield (
            f"--{name} {values.get(name)}: this is not the base model that the run to resume began with (it was "
            f"{before} and is {base}); the new one holds from here on"
        )


def _other_processes(measured: Mapping[str, Any], values: Mapping[str, Any], processes: int) -> Iterator[str]:
    """What another number of processes, or of images per step, leads to."""
    if (before := measured.get("num_processes", processes)) != processes:
        yield (
            f"this run has {counted(processes, 'process')} and the run to resume had {before}; the log's sums since "
            "its last entry and dropout's random state start anew"
        )
    images = processes * values["train_batch_size"] * values["gradient_accumulation_steps"]
    if (before := measured.get("global_batch", images)) != images:
        yield (
            f"a step takes {images} images now and took {before} in the run to resume, so the position in the data "
            "shifts: some images come twice or not at all in this epoch"
        )


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(as_word, value)) if isinstance(value, list) else str(value)


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return Path(output_dir, f"{layout.CHECKPOINT_PREFIX}{step}")


def save_checkpoint(state: TrainingState, output_dir: str | Path, progress: Progress, total_limit: int | None) -> Path:
    """Write ``checkpoint-STEP`` whole, then delete the oldest ones above the limit. Called by every process; the main
    one writes.

    If the disk is full, the oldest ones above the limit are deleted first, as long as one is left, and the checkpoint
    is written again.

    Raises:
        OSError: where there is no room for it.
        FloatingPointError: where a weight is not finite.
    """
    accelerator, folder = state.accelerator, checkpoint_path(output_dir, progress.step)
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    state.check()
    random, updates = state.random(), state.updates.state_dict()
    with state.gathered():
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            spare = _above_limit(output_dir, folder, total_limit, keep=1)
            _save_with_room(lambda: state.save(unfinished, random, updates), folder, spare)
            settle(unfinished)
            progress.save(unfinished)  # last: with it the checkpoint is whole
            with removed(folder):
                unfinished.rename(folder)
            _drop(_above_limit(output_dir, folder, total_limit))
    accelerator.wait_for_everyone()
    return folder


def _save_with_room(save: Callable[[], None], folder: Path, spare: list[Path]) -> None:
    """Save; if the disk is full, delete the spare checkpoints and save again."""
    try:
        save()
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        if not spare:
            raise OSError(errno.ENOSPC, getattr(error, "strerror", None) or str(error), str(folder)) from error
        logger.warning(
            f"the disk is full: {', '.join(path.name for path in spare)} is deleted to make room for {folder.name}"
        )
        _drop(spare)
        _save_with_room(save, folder, spare=[])


def _above_limit(output_dir: str | Path, new: Path, total_limit: int | None, keep: int = 0) -> list[Path]:
    """The oldest checkpoints that are too many beside a new one, so that at least ``keep`` of them stay."""
    if total_limit is None:
        return []
    others = [path for path in find_checkpoints(output_dir) if path != new]
    many = min(len(others) + 1 - total_limit, len(others) - keep)
    return others[: max(0, many)]


def _drop(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        with removed(path):
            pass
