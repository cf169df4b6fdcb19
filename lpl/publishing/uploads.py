"""Commits the snapshots of a run, one after the other, in a thread of its own.

A *snapshot* is a folder with everything that one commit brings. At most one is on its way and one waits: a later
snapshot takes in the one that waits. A failed upload is tried again, together with later snapshots, after a wait that
doubles or that the Hub asks for. Once the training is over, the number of tries is limited.
"""

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

from lpl.config.groups import Output
from lpl.publishing import hub
from lpl.tools import layout
from lpl.tools.files import visible_files


logger = logging.getLogger(__name__)
FIRST_WAIT = 1.0  # seconds before a failed upload is tried again; they double
LAST_TRIES, LAST_SECONDS = 6, 900.0  # limits once the training is over
INTERVAL = 0.1  # seconds between two checks of what is uploaded
GRACE = 20.0  # seconds for uploads when a run is interrupted; Slurm kills after 30


@dataclass
class Snapshot:
    """A commit to be made.

    Args:
        finish: what remains to be done to the folder.
    """

    folder: Path
    message: str
    finish: Callable[[Path], None] = lambda folder: None

    def take_in(self, earlier: Snapshot) -> None:
        """Move the files of an earlier snapshot here, except those that this one has."""
        has_state = (self.folder / layout.LAST_CHECKPOINT).is_dir()
        for name in visible_files(earlier.folder, earlier.folder):
            outdated = has_state and name.parts[0] == layout.LAST_CHECKPOINT
            if not outdated and not (self.folder / name).exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (earlier.folder / name).rename(self.folder / name)
        shutil.rmtree(earlier.folder, ignore_errors=True)


def upload(output: Output, repository: str, message: str, fill: Callable[[Path], object]) -> str:
    """Upload in one commit what ``fill`` puts into a folder; returns the page's address.

    Raises:
        hub.HubError: with the reason.
    """
    uploads = Uploads(output, repository)
    try:
        snapshot = uploads.new()
        fill(snapshot)
        uploads.add(Snapshot(snapshot, message))
        if not uploads.wait():
            raise hub.HubError(f"the upload to {repository} failed ({uploads.problem}); run the same command again.")
        return uploads.url
    finally:
        uploads.remove()


class Uploads:
    """The uploads to one repository.

    Args:
        repository: full id, ``user/name``.
    """

    def __init__(self, output: Output, repository: str) -> None:
        self.folder, self.repository = Path(output.output_dir), repository
        self.token, self.revision = output.hub_token, output.hub_revision
        self.url, self.problem = "", ""  # the page, after a commit; why the last try failed
        self.done = 0  # commits
        self._numbers = count()
        self._waiting: Snapshot | None = None
        self._busy, self._over = False, False
        self._changed = threading.Condition()
        self.remove()  # what a killed run left is all in this run's snapshots
        disable_progress_bars()  # they would be drawn over the training's
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it logs each of its tries
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def new(self, step: int | None = None) -> Path:
        """An empty folder for a snapshot."""
        name = f"{next(self._numbers)}{'' if step is None else f'-step-{step}'}"
        folder = self.folder / layout.UPLOADS / name
        folder.mkdir(parents=True)
        return folder

    def add(self, snapshot: Snapshot) -> None:
        """Queue a snapshot."""
        with self._changed:
            if self._waiting is not None:
                self._drop_states(self._waiting.folder)
                snapshot.take_in(self._waiting)
            self._waiting = snapshot
            self._changed.notify_all()

    def remove(self) -> None:
        """Delete all snapshots."""
        shutil.rmtree(self.folder / layout.UPLOADS, ignore_errors=True)

    def _drop_states(self, waiting: Path) -> None:
        """Drop checkpoints that --checkpoints_total_limit has deleted meanwhile; their links would fill the disk."""
        for state in waiting.glob(f"{layout.CHECKPOINT_PREFIX}*"):
            if not (self.folder / state.name).exists():
                logger.warning("%s was deleted before it could be uploaded, and is left out", state.name)
                shutil.rmtree(state, ignore_errors=True)

    def wait(self, stop: Callable[[], bool] = lambda: False, seconds: float | None = None) -> bool:
        """Wait until everything is uploaded or given up; the number of tries is limited from here on.

        Args:
            stop: asked all the time whether to give up.
            seconds: longest wait.

        Returns:
            Whether everything is uploaded; otherwise ``problem`` has the reason.
        """
        with self._changed:
            self._over = True
            self._changed.notify_all()
        pending, done = self._pending, self.done
        if pending and self.problem:
            logger.info("waiting for the Hub, at most a quarter of an hour; Ctrl-C leaves the rest to lpl.publish")
        enable_progress_bars()  # the client shows bytes
        with tqdm(total=pending, desc="uploads", disable=not pending, mininterval=5) as bar:
            for _ in count() if seconds is None else range(int(seconds / INTERVAL)):
                bar.update(min(pending, self.done - done) - bar.n)
                if not self._pending or stop():
                    break
                with self._changed:
                    self._changed.wait(INTERVAL)
        if self._pending and not self.problem:
            self.problem = "there was no time"
        return not self.problem

    def finish(self, stop: Callable[[], bool], seconds: float | None = None) -> bool:
        """:meth:`wait`, and report how it ended; the warning of a failure names the command that publishes later."""
        if not self.wait(stop, seconds):
            logger.warning(
                "Not everything is uploaded to %s (%s). All results are in %s. After a finished run, this command "
                "uploads the result: %s",
                *(self.repository, self.problem, self.folder, self._by_hand()),
            )
            return False
        self.remove()
        logger.info(f"published at {self.url}" if self.url else "nothing to publish yet")
        return True

    @property
    def _pending(self) -> int:
        return self._busy + (self._waiting is not None)

    def _by_hand(self) -> str:
        branch = ["--hub_revision", self.revision] if self.revision else []
        words = ["python", "-m", "lpl.publish", str(self.folder), "--hub_model_id", self.repository, *branch]
        return shlex.join(words)

    # The thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                snapshot, self._waiting, self._busy = self._waiting, None, True
            assert snapshot is not None
            try:
                self._upload(snapshot)
            except BaseException as error:  # from the client's own machinery; nobody may wait for ever
                self.problem = hub.reason(error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _upload(self, snapshot: Snapshot) -> None:
        """Try until the snapshot is uploaded, or until the tries after the training are used up."""
        wait, tries_left, over, deadline = FIRST_WAIT, LAST_TRIES, False, math.inf
        while tries_left > 0 and time.monotonic() < deadline:
            if self._over and not over:
                wait, over, deadline = FIRST_WAIT, True, time.monotonic() + LAST_SECONDS
            tries_left -= over
            try:
                self._push(snapshot)
                return
            except Exception as error:  # a request raises dozens; the run must not see any
                if self._over and hub.is_refused(error):
                    tries_left = 0
                self._report(hub.reason(error), again=tries_left > 0)
                pause = hub.pause(error, wait)
            with self._changed:
                if tries_left:
                    self._changed.wait_for(lambda: self._over and not over, pause)  # noqa: B023
                if self._waiting is not None:
                    self._waiting.take_in(snapshot)
                    snapshot, self._waiting = self._waiting, None
            wait *= 2

    def _report(self, problem: str, again: bool) -> None:
        """Warn once of a problem that lasts."""
        if problem != self.problem and again:
            logger.warning("The upload to %s failed and will be tried again: %s", self.repository, problem)
        self.problem = problem

    def _push(self, snapshot: Snapshot) -> None:
        snapshot.finish(snapshot.folder)
        replaced = layout.LAST_CHECKPOINT if (snapshot.folder / layout.LAST_CHECKPOINT).is_dir() else None
        self.url = hub.push(snapshot.folder, self.repository, self.token, self.revision, snapshot.message, replaced)
        self.problem, self.done = "", self.done + 1
        shutil.rmtree(snapshot.folder, ignore_errors=True)
