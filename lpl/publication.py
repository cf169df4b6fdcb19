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
import math
import os
import shlex
import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from lpl import hub
from lpl.card import RunCard, write_model_card
from lpl.checkpoints import PREFIX
from lpl.logs import entries
from lpl.pictures import loss_curves
from lpl.public import is_hub_id
from lpl.recipes import publish_recipe
from lpl.trainee import EMA_FOLDER


logger = logging.getLogger(__name__)

SNAPSHOTS = ".uploads"  # in the output folder
CURVES = "loss_curves.png"
FIRST_WAIT = 1.0  # seconds after which a failed upload is tried again; they double
LAST_TRIES, LAST_SECONDS = 6, 900.0  # after the training is over
LOOK = 0.1  # seconds between two looks at what is uploaded
GRACE = 20.0  # seconds for uploads where a run is interrupted; Slurm kills after 30
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
        shutil.rmtree(earlier.folder, ignore_errors=True)


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
        self.done = 0  # commits
        self._numbers = count()
        self._waiting: Snapshot | None = None
        self._busy, self._over = False, False
        self._changed = threading.Condition()
        disable_progress_bars()  # they would be drawn over the training's
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it tells each of its tries
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def new(self, step: int | None = None) -> Path:
        """An empty folder for a snapshot."""
        folder = self.folder / SNAPSHOTS / f"{next(self._numbers)}{'' if step is None else f'-step-{step}'}"
        folder.mkdir(parents=True)
        return folder

    def add(self, snapshot: Snapshot) -> None:
        with self._changed:
            if self._waiting is not None:
                self._drop_states(self._waiting.folder)
                snapshot.take_in(self._waiting)
            self._waiting = snapshot
            self._changed.notify_all()

    def _drop_states(self, waiting: Path) -> None:
        """Of checkpoints that --checkpoints_total_limit has dropped meanwhile; their links would fill the disk."""
        for state in waiting.glob(f"{PREFIX}*"):
            if not (self.folder / state.name).exists():
                logger.warning("%s is gone before it could be uploaded, and is left out", state.name)
                shutil.rmtree(state, ignore_errors=True)

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
        pending, done = self._pending, self.done
        if pending and self.problem:
            logger.info("the Hub is waited for, a quarter of an hour at most; Ctrl-C leaves the rest to lpl.publish")
        enable_progress_bars()  # the client shows bytes
        with tqdm(total=pending, desc="uploads", disable=not pending, mininterval=5) as bar:
            for _ in count() if seconds is None else range(int(seconds / LOOK)):
                bar.update(min(pending, self.done - done) - bar.n)
                if not self._pending or stop():
                    break
                with self._changed:
                    self._changed.wait(LOOK)
        if self._pending or self.problem:
            logger.warning(
                "Not all is uploaded to %s (%s). All is in %s; of a run that is done this uploads the result: %s",
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
            try:
                self._upload(snapshot)
            except BaseException as error:  # of the client's own machinery; whoever waits must not wait for ever
                self.problem = hub.reason(error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _upload(self, snapshot: Snapshot) -> None:
        """Until it is there, or the run is over and a few tries more have failed."""
        wait, tries_left, over, deadline = FIRST_WAIT, LAST_TRIES, False, math.inf
        while tries_left > 0 and time.monotonic() < deadline:
            if self._over and not over:
                wait, over, deadline = FIRST_WAIT, True, time.monotonic() + LAST_SECONDS
            tries_left -= over
            try:
                self._push(snapshot)
                return
            except Exception as error:  # a request raises dozens; the run must not see one of them
                said = hub.reason(error)
                if said != self.problem:
                    logger.warning("The upload to %s failed and will be tried again: %s", self.repo_id, said)
                self.problem = said
                pause = hub.pause(error, wait)
                if over and hub.is_refused(error):
                    tries_left = 0
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
        self.problem, self.done = "", self.done + 1
        shutil.rmtree(snapshot.folder, ignore_errors=True)
