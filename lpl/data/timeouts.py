"""Gives up reads that do not finish, or names the file if a read cannot be interrupted.

A timer interrupts Python code that waits (:func:`at_most`); this costs the sample. It cannot interrupt code that hangs
outside of Python, as on a lost network disk. The loader's workers therefore record what they read (:class:`Readings`),
and the main process, which waits for them, raises an error that names the file (:func:`watched`). Without workers,
nothing detects such a hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import get_worker_info


Batch = TypeVar("Batch")
PATIENCE = 2  # a read that takes longer than this many timeouts has not noticed its timer
STARTING = 60.0  # seconds that workers may take before their first read
FLAG = "--dataloader_timeout"
GONE = "is gone, in the middle of a batch"


class TookTooLong(TimeoutError):
    """A timer has interrupted a read."""


class HungLoader(RuntimeError):
    """The loader yields no more batches; the message says why, and what to do."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupts the body after ``seconds``; 0 means never.

    This needs the main thread of a process and a system with interval timers; elsewhere it has no effect. A timer that
    is already running continues afterwards.

    Raises:
        TookTooLong: in the body.
    """
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TookTooLong(f"took longer than {seconds:g} s ({FLAG})")

    handler = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    # Again every second, since an exception raised in a finalizer is lost.
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)  # None: a handler not set by Python
        if due:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, due - (time.monotonic() - start)), interval)


class Readings:
    """What each worker of a loader is reading and since when, in memory shared with the main process.

    Args:
        workers: of the loader; with 0 nothing is recorded.
    """

    def __init__(self, workers: int = 0) -> None:
        # process id, place in the data set, and the monotonic clock's seconds, negative between two reads
        self._table = torch.zeros(workers, 3, dtype=torch.float64).share_memory_()

    @contextmanager
    def noted(self, place: int) -> Iterator[None]:
        """Records that this process reads the sample at ``place`` within the body."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        row = self._table[worker.id]
        row[0], row[1], row[2] = os.getpid(), place, time.monotonic()
        try:
            yield
        finally:
            row[2] = -time.monotonic()

    def running(self) -> dict[int, float]:
        """Places of the samples being read, and seconds since their reads began."""
        now = time.monotonic()
        return {int(place): now - since for _, place, since in self._table.tolist() if since > 0}

    def idle(self) -> float:
        """Seconds since a worker last began or ended a read."""
        return time.monotonic() - float(self._table[:, 2].abs().max())

    def ended(self) -> set[int]:
        """Numbers of the workers' processes that have begun to read, and are gone."""
        alive = {child.pid for child in multiprocessing.active_children()}
        return {int(number) for number in self._table[:, 0] if number} - alive

    def kill(self) -> None:
        """Kills the workers, which ignore other signals."""
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error of its own
        processes = {int(number) for number in self._table[:, 0]}
        for child in multiprocessing.active_children():
            if child.pid in processes:
                child.kill()
                child.join(PATIENCE)
        signal.signal(signal.SIGCHLD, before)


def watched(
    batches: Iterator[Batch], readings: Readings, seconds: float, name: Callable[[int], str]
) -> Iterator[Batch]:
    """Yields the batches of a loader that has this timeout.

    Args:
        name: returns the name of the sample at a place.

    Raises:
        RuntimeError: if a worker is gone; torch says so too, but not where it is missed while it hands over a batch.
        HungLoader: if a read has not been interrupted by its own timeout, or if no batch comes though nothing is read.
    """
    waited = 0.0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            if not (ended := readings.ended()):  # it is another file or connection
                raise
            numbers = ", ".join(map(str, sorted(ended)))
            raise RuntimeError(f"DataLoader worker (pid {numbers}) {GONE}") from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            waited += seconds
            hung = [place for place, duration in readings.running().items() if duration >= PATIENCE * seconds]
            if not hung and min(waited, readings.idle()) < max(PATIENCE * seconds, STARTING):
                continue  # slow files, one after the other
            readings.kill()
            if hung:
                problem = (
                    f"{', '.join(map(name, hung))} took longer than {FLAG} {seconds:g} to read and cannot be "
                    "interrupted; remove it from the data, or repair the disk that it is on"
                )
            else:
                problem = (
                    f"no batch came for {waited:g} s, though no file is being read; use fewer --dataloader_num_workers"
                )
            raise HungLoader(problem) from error
        waited = 0.0
        yield batch
