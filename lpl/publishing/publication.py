"""What a run publishes on the Hub, and when (--hub_strategy). Whatever the Hub does, the run goes on.

A *snapshot* is a folder with everything that one commit brings, beside the run's results. Weights and pictures in it
are links, since they are only ever replaced whole; all other files are copies. So the run can append to its log and
delete old checkpoints while a snapshot is uploaded. It holds only what is meant for others, without paths of this
machine.

``end``: result, samples, curves, log, recipe and card, once. ``every_save``: the same at each checkpoint, with the
weights of that checkpoint (the moving average's with --use_ema). ``checkpoint``: also the state that a run is resumed
from, in ``last-checkpoint/``, for --resume_from_checkpoint hub. ``all_checkpoints``: all states, in ``checkpoint-N/``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lpl.config.groups import Output
from lpl.publishing import hub
from lpl.publishing.card import write_model_card
from lpl.publishing.public_recipe import publish_recipe
from lpl.publishing.run_card import RunCard
from lpl.publishing.uploads import GRACE, Snapshot, Uploads
from lpl.tools import layout
from lpl.tools.files import number_entries, visible_files
from lpl.tools.pictures import loss_curves
from lpl.tools.privacy import is_hub_id
from lpl.tools.results import lora_entries, pipeline_entries, scheduler_entries, single_files


logger = logging.getLogger(__name__)
NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # where a configuration was loaded from


# What is published --------------------------------------------------------------------------------------------------


def published(folder: Path) -> Iterator[Path]:
    """The files of a run's output folder that are meant for others, as paths within it: result, samples, pictures, log
    and card. The recipe is not among them, since it may hold paths of this machine."""
    names = [layout.LOG, layout.CURVES, layout.CARD, layout.SAMPLES]
    pipeline = pipeline_entries(folder)
    names += [*pipeline, *single_files(folder)] if pipeline else [*lora_entries(folder), *scheduler_entries(folder)]
    for name in dict.fromkeys(names):
        yield from visible_files(folder, folder / name)
    yield from _evaluation_pictures(folder)


def _evaluation_pictures(folder: Path) -> Iterator[Path]:
    yield from (path.relative_to(folder) for path in sorted(folder.glob(f"{layout.EVALUATION}/*.png")))


def take(source: Path, target: Path) -> None:
    """Put a file into a snapshot: weights and pictures as links if possible, other files as copies, and configurations
    without paths of this machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix == ".json":
        target.write_text(_without_origin(source.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if source.suffix in (".safetensors", ".png"):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copyfile(source, target)


def _without_origin(text: str) -> str:
    """The text of a configuration without the local folder that it was loaded from."""
    content = json.loads(text)
    local = [name for name in NAMES if isinstance(content, dict) and not is_hub_id(str(content.get(name) or "a/b"))]
    if not local:
        return text
    return json.dumps({name: value for name, value in content.items() if name not in local}, indent=2) + "\n"


def snapshot_of_result(folder: Path, snapshot: Path, address: str) -> None:
    """Fill a snapshot from the output folder of a finished run.

    Args:
        address: repository that the snapshot is for, as --config takes it.
    """
    for name in published(folder):
        take(folder / name, snapshot / name)
    if (folder / layout.RECIPE).is_file():
        publish_recipe(folder / layout.RECIPE, snapshot / layout.RECIPE, address)


def _take_all(source: Path, target: Path) -> None:
    """Put a folder's files into a snapshot, except hidden ones."""
    for name in visible_files(source, source):
        take(source / name, target / name)


def _finish(folder: Path, card: RunCard) -> None:
    """Make what takes time from the snapshot alone: the curves, and the card that shows them."""
    loss_curves(number_entries(folder / layout.LOG), folder / layout.CURVES)
    write_model_card(folder, card)


# When ---------------------------------------------------------------------------------------------------------------


class Publication:
    """A run's uploads, on its main process.

    Args:
        repository: full id, ``user/name``.
        save: writes the result with the present weights (the moving average's with --use_ema) into a folder.
        trained: names of the parts that are trained whole; none with LoRA.
        card: returns the present model card.
    """

    def __init__(
        self,
        output: Output,
        repository: str,
        save: Callable[[Path], None],
        trained: tuple[str, ...],
        card: Callable[[], RunCard],
    ) -> None:
        self.folder, self.strategy = Path(output.output_dir), output.hub_strategy
        self.save, self.trained, self.card = save, trained, card
        self.address = hub.address(repository, output.hub_revision)
        self.uploads = Uploads(output, repository)
        self.complete = False  # whether a snapshot has had the frozen parts, too

    def checkpoint(self, checkpoint: Path, step: int, interrupted: bool = False) -> None:
        """Queue a snapshot after a checkpoint and the samples of its step; waits for no upload.

        Args:
            interrupted: the run ends now, so there is no time for the frozen parts.
        """
        if self.strategy == "end":
            return
        snapshot = self.uploads.new(step)
        whole = not (self.trained and (self.complete or interrupted))
        try:
            self._fill(snapshot, checkpoint, whole)
            self.uploads.add(Snapshot(snapshot, f"Step {step}", partial(_finish, card=self.card())))
            self.complete |= whole
        except Exception as error:  # most likely a full disk; the run goes on
            logger.warning("Nothing of step %d can be published: %s", step, error)
            shutil.rmtree(snapshot, ignore_errors=True)

    def _fill(self, snapshot: Path, checkpoint: Path, whole: bool) -> None:
        """Fill a snapshot as the strategy asks for.

        Args:
            whole: with the frozen parts.
        """
        if whole:
            made = snapshot.with_name("result")
            try:
                self.save(made)
                _take_all(made, snapshot)
            finally:
                shutil.rmtree(made, ignore_errors=True)
        else:
            weights = checkpoint / layout.EMA if (checkpoint / layout.EMA).is_dir() else checkpoint
            for name in self.trained:
                _take_all(weights / name, snapshot / name)
        _take_all(self.folder / layout.SAMPLES, snapshot / layout.SAMPLES)
        for name in (layout.LOG, *_evaluation_pictures(self.folder)):
            take(self.folder / name, snapshot / name)
        publish_recipe(self.folder / layout.RECIPE, snapshot / layout.RECIPE, self.address)
        state = {"checkpoint": layout.LAST_CHECKPOINT, "all_checkpoints": checkpoint.name}.get(self.strategy)
        if state:
            _take_all(checkpoint, snapshot / state)

    def end(self, stop: Callable[[], bool]) -> None:
        """Publish the finished output folder, and wait for all uploads until ``stop`` returns True."""
        try:
            snapshot = self.uploads.new()
            snapshot_of_result(self.folder, snapshot, self.address)
            self.uploads.add(Snapshot(snapshot, "End of training"))
        except Exception as error:  # most likely a full disk
            self.uploads.problem = hub.reason(error)
        self.uploads.finish(stop)

    def interrupt(self) -> None:
        """Wait for the queued uploads for :data:`GRACE` seconds; the resumed run uploads the rest."""
        if self.strategy != "end":
            self.uploads.finish(lambda: False, GRACE)
