"""What a run publishes on the Hub, and when (--hub_strategy). Whatever the Hub does, the run goes on.

A *snapshot* is a folder with all that one commit brings, made beside the run's results: weights, which are only ever
replaced whole, as links, all else as copies. So the run goes on, appends to its log and drops old checkpoints while a
snapshot is on its way. It holds what was made for others only, and nothing in it names this machine.

``end``: result, samples, curves, log, recipe and card, once. ``every_save``: the same at each checkpoint, with the
weights of that checkpoint (the moving average's where one is kept). ``checkpoint``: also what a run is resumed from,
in ``last-checkpoint/``, for --resume_from_checkpoint hub. ``all_checkpoints``: each of these, in ``checkpoint-N/``.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from safetensors import SafetensorError
from tqdm.auto import tqdm

from lpl import hub
from lpl.card import RunCard, write_model_card
from lpl.logs import entries
from lpl.pictures import loss_curves
from lpl.public import is_hub_id
from lpl.recipes import publish_recipe
from lpl.trainee import EMA_FOLDER


logger = logging.getLogger(__name__)

SNAPSHOTS = ".uploads"  # in the output folder
CURVES = "loss_curves.png"
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds between two tries, which double
LAST_TRIES = 6  # after the training is over
LOOK = 0.1  # seconds between two looks at what is uploaded
GRACE = 60.0  # seconds for uploads where a run is interrupted
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
        yield from _files(folder, folder / name)
    yield from (path.relative_to(folder) for path in sorted(folder.glob("evaluation/*.png")))


def _files(folder: Path, place: Path) -> Iterator[Path]:
    """A file, or those in a folder and below it; without hidden ones, which are on their way."""
    paths = sorted(place.rglob("*")) if place.is_dir() else [place]
    for path in paths:
        within = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in within.parts):
            yield within


def take(source: Path, target: Path) -> None:
    """Put a file into a snapshot: weights as a link where that can be, else a copy that does not name this machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if source.suffix == ".json":
        target.write_text(_without_origin(source.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if source.suffix == ".safetensors":
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

    def checkpoint(self, checkpoint: Path, step: int) -> None:
        """Queue what there is after a checkpoint and the samples of its step; no upload is waited for."""
        if self.args.hub_strategy == "end":
            return
        try:
            taken = self._taken(checkpoint, step)
            self.uploads.add(Snapshot(taken, f"Step {step}", partial(_finish, card=self.card())))
        except (OSError, SafetensorError) as error:  # a disk that is full, most likely
            logger.warning("Nothing of step %d can be published: %s", step, error)

    def _taken(self, checkpoint: Path, step: int) -> Path:
        """All that the strategy wants of it."""
        snapshot = self.uploads.new(step)
        if self.complete and self.trained:
            weights = checkpoint / EMA_FOLDER if (checkpoint / EMA_FOLDER).is_dir() else checkpoint
            for name in self.trained:
                _take_all(weights / name, snapshot / name)
        else:
            made = snapshot.with_name("result")
            self.save(made)
            _take_all(made, snapshot)
            shutil.rmtree(made)
            self.complete = True
        _take_all(self.folder / "samples", snapshot / "samples")
        for name in published(self.folder):
            if name.parts[0] in ("metrics.jsonl", "evaluation"):
                take(self.folder / name, snapshot / name)
        publish_recipe(self.folder / "recipe.yaml", snapshot / "recipe.yaml", self.address)
        state = {"checkpoint": hub.LAST_CHECKPOINT, "all_checkpoints": checkpoint.name}.get(self.args.hub_strategy)
        if state:
            _take_all(checkpoint, snapshot / state)
        return snapshot

    def end(self, stop: Callable[[], bool]) -> None:
        """Publish the finished output folder, and wait for all uploads, unless ``stop`` says that there is no time."""
        snapshot = self.uploads.new()
        snapshot_of_result(self.folder, snapshot, self.address)
        self.uploads.add(Snapshot(snapshot, "End of training"))
        self.uploads.finish(stop)

    def interrupt(self) -> None:
        """The run ends before its time, and has a minute for what is queued; the resumed run uploads the rest."""
        if self.args.hub_strategy != "end":
            self.uploads.finish(lambda: False, GRACE)


def _take_all(source: Path, target: Path) -> None:
    """A folder's files, but the hidden ones."""
    for name in _files(source, source):
        take(source / name, target / name)


def _finish(folder: Path, card: RunCard) -> None:
    """What takes its time, and is made of the snapshot alone: the curves, and the card that shows them."""
    loss_curves(entries(folder / "metrics.jsonl"), folder / CURVES)
    write_model_card(folder, card)


# Uploads ------------------------------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    """One commit to be.

    Args:
        finish: what is still to be done to the folder.
    """

    folder: Path
    message: str
    finish: Callable[[Path], None] = lambda folder: None

    def take_in(self, earlier: Snapshot) -> None:
        """Bring what an earlier one would have brought, where this one does not."""
        for name in _files(earlier.folder, earlier.folder):
            outdated = name.parts[0] == hub.LAST_CHECKPOINT and (self.folder / hub.LAST_CHECKPOINT).is_dir()
            if not outdated and not (self.folder / name).exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (earlier.folder / name).rename(self.folder / name)
        shutil.rmtree(earlier.folder)


class Uploads:
    """Commits snapshots in their order, in a thread of its own.

    One is on its way and one waits at most: what comes meanwhile takes in what waits. One that fails is tried again,
    with what has come meanwhile, after a while that doubles, or that the Hub asks for; a few times more when the
    training is over.

    Args:
        folder: the run's output folder.
    """

    def __init__(self, folder: Path, repo_id: str, token: str | None, revision: str | None) -> None:
        self.folder, self.repo_id, self.token, self.revision = folder, repo_id, token, revision
        shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)  # of a run that was killed; it is all in this one's
        self.url, self.problem = "", ""  # of the page, after a commit; why there was none
        self._numbers = count()
        self._waiting: Snapshot | None = None
        self._busy, self._over = False, False
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def new(self, step: int | None = None) -> Path:
        """An empty folder for a snapshot."""
        folder = self.folder / SNAPSHOTS / f"{next(self._numbers)}{'' if step is None else f'-step-{step}'}"
        folder.mkdir(parents=True)
        return folder

    def add(self, snapshot: Snapshot) -> None:
        with self._changed:
            if self._waiting is not None:
                snapshot.take_in(self._waiting)
            self._waiting = snapshot
            self._changed.notify_all()

    def finish(self, stop: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until all is uploaded, or given up.

        Args:
            stop: asked all the while, whether to give up.
            seconds: to wait at most.

        Returns:
            Whether all is there; else a warning says what to do.
        """
        with self._changed:
            self._over = True
            self._changed.notify_all()
        pending = self._pending
        with tqdm(total=pending, desc="uploads", disable=not pending) as bar:
            for _ in count() if seconds is None else range(int(seconds / LOOK)):
                bar.update(pending - self._pending - bar.n)
                if not self._pending or stop():
                    break
                with self._changed:
                    self._changed.wait(LOOK)
        if self._pending or self.problem:
            logger.warning(
                "Not all is uploaded to %s (%s). It is all in %s; when the run is done, this uploads it: %s",
                *(self.repo_id, self.problem or "there was no time", self.folder, self._by_hand()),
            )
            return False
        shutil.rmtree(self.folder / SNAPSHOTS, ignore_errors=True)
        logger.info(f"published at {self.url}" if self.url else "nothing was to be published yet")
        return True

    @property
    def _pending(self) -> int:
        return self._busy + (self._waiting is not None)

    def _by_hand(self) -> str:
        where = ["--hub_revision", self.revision] if self.revision else []
        return shlex.join(["python", "-m", "lpl.publish", str(self.folder), "--hub_model_id", self.repo_id, *where])

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                snapshot, self._waiting, self._busy = self._waiting, None, True
            self._upload(snapshot)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _upload(self, snapshot: Snapshot) -> None:
        """Until it is there, or the run is over and a few tries more have failed."""
        wait, tries_left, over = FIRST_WAIT, LAST_TRIES, False
        while tries_left:
            if self._over and not over:
                wait, over = FIRST_WAIT, True
            tries_left -= over
            try:
                self._push(snapshot)
                return
            except Exception as error:  # a request raises dozens; the run must not see one of them
                said = hub.reason(error)
                if said != self.problem:
                    logger.warning("The upload to %s failed and will be tried again: %s", self.repo_id, said)
                self.problem = said
                pause = min(hub.retry_after(error) or wait, LONGEST_WAIT)
            with self._changed:
                if tries_left:
                    self._changed.wait_for(lambda: self._over and not over, pause)  # noqa: B023
                if self._waiting is not None:
                    self._waiting.take_in(snapshot)
                    snapshot, self._waiting = self._waiting, None
            wait *= 2

    def _push(self, snapshot: Snapshot) -> None:
        snapshot.finish(snapshot.folder)
        replaced = hub.LAST_CHECKPOINT if (snapshot.folder / hub.LAST_CHECKPOINT).is_dir() else None
        self.url = hub.push(snapshot.folder, self.repo_id, self.token, self.revision, snapshot.message, replaced)
        self.problem = ""
        shutil.rmtree(snapshot.folder)
