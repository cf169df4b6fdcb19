"""Files whose reading does not end: given up after a time, or, where that cannot be, named.

A timer interrupts whatever Python code waits (:func:`at_most`); that costs the sample. It has no power over code that
hangs outside of Python, as on a network disk that is gone. A loader's processes therefore note what they read
(:class:`Readings`), and the main process, which waits for them, ends with an error that says what it is
(:func:`watched`). In a run without loader's processes nobody is left to find it.
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
PATIENCE = 2  # times the timeout: a reading that goes on for so long has not noticed its timer
STARTING = 60.0  # seconds that a loader's processes may take before they read anything
FLAG = "--dataloader_timeout"


class TookTooLong(TimeoutError):
    """A reading that its timer has interrupted."""


class HungLoader(RuntimeError):
    """A loader that will give no more batches; says why, and what to do."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Within, what takes longer is interrupted; 0: nothing is.

    Only a process's main thread can do so, on a system with interval timers; elsewhere everything takes its time. A
    timer that runs already goes on afterwards.

    Raises:
        TookTooLong: in the middle of whatever takes so long.
    """
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TookTooLong(f"took longer than {seconds:g} s ({FLAG})")

    handler = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    # Again every second: an exception that is raised in a finalizer is lost.
    due, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)  # None: one that Python does not know
        if due:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, due - (time.monotonic() - start)), interval)


class Readings:
    """What each of a loader's processes reads, and since when: in memory that they share with the main process.

    Args:
        processes: of the loader; 0: nothing is noted.
    """

    def __init__(self, processes: int = 0) -> None:
        # process id, place in the data set, and seconds of the system's clock, less than 0 between two readings
        self._table = torch.zeros(processes, 3, dtype=torch.float64).share_memory_()

    @contextmanager
    def noted(self, place: int) -> Iterator[None]:
        """Within, this process reads the sample at that place."""
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
        """Places of the samples that are being read, and seconds since then."""
        now = time.monotonic()
        return {int(place): now - since for _, place, since in self._table.tolist() if since > 0}

    def idle(self) -> float:
        """Seconds since one of the processes last began or ended a reading."""
        return time.monotonic() - float(self._table[:, 2].abs().max())

    def kill(self) -> None:
        """End the processes, which heed no signal but this."""
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch raises an error of its own
        processes = {int(number) for number in self._table[:, 0]}
        for child in multiprocessing.active_children():
            if child.pid in processes:
                child.kill()
                child.join(PATIENCE)
        signal.signal(signal.SIGCHLD, before)


def watched(
    batches: Iterator[Batch], readings: Readings, seconds: float, name: Callable[[int], str]
) -> Iterator[Batch]:
    """The batches of a loader that has this timeout, as long as they come.

    Args:
        name: what to call the sample at a place.

    Raises:
        HungLoader: where a reading goes on beyond its own timeout, or where no batch comes though nothing is read.
    """
    waited = 0.0
    while True:
        try:
            batch = next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            waited += seconds
            hung = [place for place, duration in readings.running().items() if duration >= PATIENCE * seconds]
            if not hung and min(waited, readings.idle()) < max(PATIENCE * seconds, STARTING):
                continue  # files that are slow, one after the other
            readings.kill()
            if hung:
                problem = (
                    f"the reading of {', '.join(map(name, hung))} does not end and cannot be interrupted; take it out "
                    f"of the data, or mend the disk that it is on ({FLAG} {seconds:g})"
                )
            else:
                problem = (
                    f"no batch came for {waited:g} s, though no file is being read; try fewer --dataloader_num_workers"
                )
            raise HungLoader(problem) from error
        waited = 0.0
        yield batch
