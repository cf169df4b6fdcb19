"""The runs of a comparison: their command lines, and how one is started, interrupted and resumed.

A *kind* of run is with LPL, without it for equal steps, or without it for equal time; each is run with every seed. All
share one recipe and one *launcher*, the words of a training command up to the script. A run is done when its folder
holds a result and no checkpoint: the checkpoints of a finished run are deleted.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl.config.recipes import read_entries, take_measured
from lpl.tools import layout
from lpl.tools.files import entries
from lpl.tools.process import SIGNALS
from lpl.tools.results import lora_entries, pipeline_entries
from lpl.training.checkpoints import find_checkpoints
from lpl.training.preemption import EXIT_CODE


WITHOUT, WITH, LONGER = "without", "with", "longer"
LABELS = {WITHOUT: "without LPL", WITH: "with LPL", LONGER: "without LPL, equal time"}
FIXED = ("data", "global_batch", "num_processes")  # facts in which the runs of a seed may not differ


@dataclass(frozen=True)
class Run:
    kind: str
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        return f"{LABELS[self.kind]}, seed {self.seed}"

    @property
    def has_result(self) -> bool:
        return bool(pipeline_entries(self.folder) or lora_entries(self.folder))

    @property
    def is_done(self) -> bool:
        return self.has_result and not find_checkpoints(self.folder)

    @property
    def steps(self) -> int:
        """Optimizer steps in the log."""
        return max(entry["step"] for entry in entries(self.folder / layout.LOG))

    @property
    def seconds(self) -> float:
        """Time of all optimizer steps, without validation and checkpoints."""
        return training_seconds(entries(self.folder / layout.LOG), self.facts["global_batch"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's recipe records besides its flags."""
        return take_measured(read_entries(self.folder / layout.RECIPE))

    @property
    def max_steps(self) -> int | None:
        """--max_train_steps of a run that has begun."""
        recipe = self.folder / layout.RECIPE
        return read_entries(recipe)["max_train_steps"] if recipe.is_file() else None

    def words(self, launcher: Sequence[str], recipe: Path, steps: int | None = None) -> list[str]:
        """The training command.

        Args:
            steps: --max_train_steps, if it is not the recipe's.
        """
        words = [*launcher, "--config", str(recipe), "--output_dir", str(self.folder), "--seed", str(self.seed)]
        words += [] if self.kind == WITH else ["--lpl_weight", "0"]
        words += [] if steps is None else ["--max_train_steps", str(steps)]
        return [*words, "--resume_from_checkpoint", "latest"]

    def finish(self) -> bool:
        """Delete the checkpoints of a run that has ended well, since they would be measured too; False without a
        result."""
        if not self.has_result:
            return False
        for checkpoint in find_checkpoints(self.folder):
            shutil.rmtree(checkpoint)
        return True


def training_seconds(log: Sequence[Mapping[str, Any]], global_batch: int) -> float:
    """Time of all optimizer steps by the speed in a run's log."""
    seconds, step = 0.0, 0
    for entry in log:
        if speed := entry.get("images_per_second"):
            seconds += global_batch * (entry["step"] - step) / speed
            step = entry["step"]
    return seconds


def steps_for_equal_time(runs: Sequence[Run]) -> int:
    """Steps without LPL that take as long as those with LPL; the mean over the seeds, of finished runs."""
    seconds = {kind: sum(run.seconds for run in runs if run.kind == kind) for kind in (WITH, WITHOUT)}
    return round(runs[0].steps * seconds[WITH] / seconds[WITHOUT])


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse to compare finished runs of a seed with unlike data or batches.

    Raises:
        ValueError: with both runs and what to delete.
    """
    first: dict[int, Run] = {}
    for run in runs:
        other = first.setdefault(run.seed, run)
        for name in FIXED:
            if run.facts.get(name) != other.facts.get(name):
                raise ValueError(
                    f"{run.folder} and {other.folder} had unlike {name.replace('_', ' ')}, so they do not compare; "
                    "delete one of them, and run the same command again"
                )


def call(words: Sequence[str]) -> int:
    """Run a command, and return its exit code; after a signal, that of an interrupted training.

    Signals are passed on to all its processes, which are waited for: accelerate's launcher passes none on, and leaves
    before the training has saved its checkpoint.
    """
    process = subprocess.Popen(words, process_group=0)
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        code = process.wait()
        while received and _is_there(process.pid):
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return EXIT_CODE if received else code


def _is_there(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
