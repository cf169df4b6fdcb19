"""The runs of a comparison: their command lines, and how one is started, interrupted and resumed.

A *kind* of run is with LPL, without it for equal steps, or without it for equal time; each is run with every seed. All
share one recipe and one *launcher*, the words of a training command up to the script. A run is done when its folder
holds a result and no checkpoint: the checkpoints of a finished run are deleted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl.config.recipes import read_entries, take_measured
from lpl.tools import layout
from lpl.tools.files import number_entries
from lpl.tools.process import SIGNALS
from lpl.tools.results import lora_entries, pipeline_entries, training_seconds
from lpl.tools.words import warn
from lpl.training.checkpoints import find_checkpoints
from lpl.training.preemption import EXIT_CODE


WITHOUT, WITH, LONGER = "without", "with", "longer"
LABELS = {WITHOUT: "without LPL", WITH: "with LPL", LONGER: "without LPL, equal time"}
FIXED = ("data", "base", "commits", "global_batch", "num_processes")  # facts that the runs of a seed share
PRECISION = "mixed_precision"  # a flag, whose default is accelerate's
MACHINE = ("hardware", "libraries")  # facts in which they should not


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
        """Whether all of it is there; the card is written last."""
        result = pipeline_entries(self.folder) or lora_entries(self.folder)
        return bool(result) and (self.folder / layout.CARD).is_file()

    @property
    def is_done(self) -> bool:
        return self.has_result and not find_checkpoints(self.folder)

    @property
    def steps(self) -> int:
        """Optimizer steps in the log."""
        return max((entry["step"] for entry in number_entries(self.folder / layout.LOG)), default=0)

    @property
    def seconds(self) -> float:
        """Time of all optimizer steps, without validation and checkpoints."""
        return training_seconds(number_entries(self.folder / layout.LOG), self.facts["global_batch"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the run's recipe records besides its flags."""
        return take_measured(read_entries(self.folder / layout.RECIPE))

    @property
    def shared_facts(self) -> dict[str, Any]:
        """Facts that runs with and without LPL share."""
        commits = {name: at for name, at in self.facts.get("commits", {}).items() if not name.startswith("lpl_")}
        return self.facts | {"commits": commits, PRECISION: self.flag(PRECISION)}

    @property
    def max_steps(self) -> int | None:
        """--max_train_steps of a run that has begun."""
        return self.flag("max_train_steps")

    def flag(self, name: str) -> Any:
        """A flag's value in the recipe of a run that has begun."""
        recipe = self.folder / layout.RECIPE
        return read_entries(recipe)[name] if recipe.is_file() else None

    def words(self, launcher: Sequence[str], recipe: Path, steps: int | None = None) -> list[str]:
        """The training command, which resumes where there is a checkpoint.

        Args:
            steps: --max_train_steps, if it is not the recipe's.
        """
        words = [*launcher, "--config", str(recipe), "--output_dir", str(self.folder), "--seed", str(self.seed)]
        words += [] if self.kind == WITH else ["--lpl_weight", "0"]
        words += [] if steps is None else ["--max_train_steps", str(steps)]
        # A whole checkpoint that a kill left under another name counts: the run puts it in its place
        begun = any(self.folder.glob(f"*{layout.CHECKPOINT_PREFIX}*"))
        return [*words, *(["--resume_from_checkpoint", "latest"] if begun else [])]

    def finish(self) -> bool:
        """Delete the checkpoints of a run that has ended well, since they would be measured too; False without a
        result."""
        if not self.has_result:
            return False
        for checkpoint in find_checkpoints(self.folder):
            shutil.rmtree(checkpoint)
        return True


def steps_for_equal_time(runs: Sequence[Run]) -> int:
    """Steps without LPL that take as long as those with LPL; the mean over the seeds, of finished runs."""
    seconds = {kind: sum(run.seconds for run in runs if run.kind == kind) for kind in (WITH, WITHOUT)}
    return round(runs[0].steps * seconds[WITH] / seconds[WITHOUT])


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse to compare finished runs of a seed with unlike data, base, batches or precision; warn of unlike machines.

    Raises:
        ValueError: with both runs and what to delete.
    """
    first: dict[int, Run] = {}
    for run in runs:
        other = first.setdefault(run.seed, run)
        ours, others = run.shared_facts, other.shared_facts
        if name := next((name for name in (*FIXED, PRECISION) if ours.get(name) != others.get(name)), None):
            raise ValueError(
                f"{run.folder} and {other.folder} had unlike {name.replace('_', ' ')}, so they do not compare; "
                "delete one of them, and run the same command again"
            )
        if names := [name for name in MACHINE if run is runs[-1] and ours.get(name) != others.get(name)]:
            warn(f"{run.folder} and {other.folder} had unlike {' and '.join(names)}, which may tell in the result")


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds a folder for one comparison, and for the training that it runs, which may outlive it; gives the lock.

    Raises:
        ValueError: if the folder is held already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / layout.LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--output_dir {folder}: another comparison, or a training that it has left behind, still writes to "
                "it; wait for its end or stop it, or give another folder"
            ) from error
        yield file.fileno()


def call(words: Sequence[str], lock: int) -> int:
    """Run a command, and return its exit code; after a signal, that of an interrupted training.

    The command holds the lock until it ends, too.

    Signals are passed on to all its processes, which are waited for: accelerate's launcher passes none on, and leaves
    before the training has saved its checkpoint.
    """
    process = subprocess.Popen(words, process_group=0, pass_fds=[lock])
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, pass_on) for number in (*SIGNALS, signal.SIGHUP)}
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
    with suppress(ChildProcessError):  # the first process of a container is the parent of all that have lost theirs
        os.waitpid(-group, os.WNOHANG)
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
