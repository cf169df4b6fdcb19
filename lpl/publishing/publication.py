"""What a run publishes on the Hub, and when (--hub_strategy). Whatever the Hub does, the run goes on.

A *snapshot* is a folder with all that one commit brings, made beside the run's results: weights and pictures, which
are only ever replaced whole, as links, all else as copies. So the run goes on, appends to its log and drops old
checkpoints while a snapshot is on its way. It holds what was made for others only, and nothing in it names this
machine.

``end``: result, samples, curves, log, recipe and card, once. ``every_save``: the same at each checkpoint, with the
weights of that checkpoint (the moving average's where one is kept). ``checkpoint``: also what a run is resumed from,
in ``last-checkpoint/``, for --resume_from_checkpoint hub. ``all_checkpoints``: each of these, in ``checkpoint-N/``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lpl.publishing import hub
from lpl.publishing.card import RunCard, write_model_card
from lpl.publishing.public_recipe import publish_recipe
from lpl.publishing.uploads import GRACE, Snapshot, Uploads
from lpl.tools.files import entries, visible_files
from lpl.tools.pictures import loss_curves
from lpl.tools.privacy import is_hub_id
from lpl.training.average import EMA_FOLDER


logger = logging.getLogger(__name__)
CURVES = "loss_curves.png"
NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # where a configuration was loaded from


# What is published --------------------------------------------------------------------------------------------------


def published(folder: Path) -> Iterator[Path]:
    """The files of a run's output folder that are for others, as paths within it: the result, samples, pictures, log
    and card. Not the recipe, which may name this machine."""
    names = ["metrics.jsonl", CURVES, "README.md", "model_index.json", "samples", "scheduler"]
    if (index := folder / "model_index.json").is_file():
        names += [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    names += [path.name for pattern in ("*.safetensors", "*_lora") for path in folder.glob(pattern)]
    for name in dict.fromkeys(names):
        yield from visible_files(folder, folder / name)
    yield from (path.relative_to(folder) for path in sorted(folder.glob("evaluation/*.png")))


def take(source: Path, target: Path) -> None:
    """Put a file into a snapshot: weights and pictures as links where that can be, all else as a copy, which does not
    name this machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix == ".json":
        target.write_text(_without_origin(source.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if source.suffix in (".safetensors", ".png"):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one that has no links
            pass
    shutil.copyfile(source, target)


def _without_origin(text: str) -> str:
    """A configuration without the local folder that it was loaded from."""
    content = json.loads(text)
    local = [name for name in NAMES if isinstance(content, dict) and not is_hub_id(str(content.get(name) or "a/b"))]
    if not local:
        return text
    return json.dumps({name: value for name, value in content.items() if name not in local}, indent=2) + "\n"


def snapshot_of_result(folder: Path, snapshot: Path, address: str) -> None:
    """All of a finished run's output folder that is for others, who find it there by that address."""
    for name in published(folder):
        take(folder / name, snapshot / name)
    if (folder / "recipe.yaml").is_file():
        publish_recipe(folder / "recipe.yaml", snapshot / "recipe.yaml", address)


# When ---------------------------------------------------------------------------------------------------------------


class Publication:
    """A run's uploads, on its main process.

    Args:
        args: the flags; ``hub_model_id`` is the repository's full id.
        save: writes the result with the present weights (the moving average's where one is kept) into a folder.
        trained: names of the parts that are trained whole; none with LoRA.
        card: what the model card says now.
    """

    def __init__(
        self, args: Namespace, save: Callable[[Path], None], trained: tuple[str, ...], card: Callable[[], RunCard]
    ) -> None:
        self.args, self.save, self.trained, self.card = args, save, trained, card
        self.folder = Path(args.output_dir)
        self.address = hub.address(args.hub_model_id, args.hub_revision)
        self.uploads = Uploads(self.folder, args.hub_model_id, args.hub_token, args.hub_revision)
        self.complete = False  # whether a snapshot has had all of the result

    def checkpoint(self, checkpoint: Path, step: int, interrupted: bool = False) -> None:
        """Queue what there is after a checkpoint and the samples of its step; no upload is waited for.

        Args:
            interrupted: the run is to end now, and there is no time for parts that are not trained.
        """
        if self.args.hub_strategy == "end":
            return
        snapshot = self.uploads.new(step)
        whole = not (self.trained and (self.complete or interrupted))
        try:
            self._fill(snapshot, checkpoint, whole)
            self.uploads.add(Snapshot(snapshot, f"Step {step}", partial(_finish, card=self.card())))
            self.complete |= whole
        except Exception as error:  # a disk that is full, most likely; the run goes on
            logger.warning("Nothing of step %d can be published: %s", step, error)
            shutil.rmtree(snapshot, ignore_errors=True)

    def _fill(self, snapshot: Path, checkpoint: Path, whole: bool) -> None:
        """All that the strategy wants of a checkpoint; ``whole``: the parts that are not trained, too."""
        if not whole:
            weights = checkpoint / EMA_FOLDER if (checkpoint / EMA_FOLDER).is_dir() else checkpoint
            for name in self.trained:
                _take_all(weights / name, snapshot / name)
        else:
            made = snapshot.with_name("result")
            self.save(made)
            _take_all(made, snapshot)
            shutil.rmtree(made)
        _take_all(self.folder / "samples", snapshot / "samples")
        for path in (self.folder / "metrics.jsonl", *sorted(self.folder.glob("evaluation/*.png"))):
            take(path, snapshot / path.relative_to(self.folder))
        publish_recipe(self.folder / "recipe.yaml", snapshot / "recipe.yaml", self.address)
        state = {"checkpoint": hub.LAST_CHECKPOINT, "all_checkpoints": checkpoint.name}.get(self.args.hub_strategy)
        if state:
            _take_all(checkpoint, snapshot / state)

    def end(self, stop: Callable[[], bool]) -> None:
        """Publish the finished output folder, and wait for all uploads, unless ``stop`` says that there is no time."""
        try:
            snapshot = self.uploads.new()
            snapshot_of_result(self.folder, snapshot, self.address)
            self.uploads.add(Snapshot(snapshot, "End of training"))
        except Exception as error:  # a disk that is full, most likely
            self.uploads.problem = str(error)
        self.uploads.finish(stop)

    def interrupt(self) -> None:
        """The run ends before its time, and has a minute for what is queued; the resumed run uploads the rest."""
        if self.args.hub_strategy != "end":
            self.uploads.finish(lambda: False, GRACE)


def _take_all(source: Path, target: Path) -> None:
    """A folder's files, but the hidden ones."""
    for name in visible_files(source, source):
        take(source / name, target / name)


def _finish(folder: Path, card: RunCard) -> None:
    """What takes its time, and is made of the snapshot alone: the curves, and the card that shows them."""
    loss_curves(entries(folder / "metrics.jsonl"), folder / CURVES)
    write_model_card(folder, card)
