"""TODO: what is here."""

from __future__ import annotations

import logging
import math
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from lpl.publishing import hub
from lpl.tools.files import visible_files
from lpl.training.checkpoints import PREFIX


logger = logging.getLogger(__name__)


SNAPSHOTS = ".uploads"  # in the output folder
FIRST_WAIT = 1.0  # seconds after which a failed upload is tried again; they double
LAST_TRIES, LAST_SECONDS = 6, 900.0  # after the training is over
LOOK = 0.1  # seconds between two looks at what is uploaded
GRACE = 20.0  # seconds for uploads where a run is interrupted; Slurm kills after 30


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
        for name in visible_files(earlier.folder, earlier.folder):
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
