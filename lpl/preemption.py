"""Ends a run that is asked to stop, at the end of a step, with a checkpoint, and with an exit code that says so.

SIGTERM (a machine that is taken away), SIGINT (Ctrl-C) and SIGUSR1 (a Slurm job's time runs out) ask. The first one is
noted; all processes then agree at the end of the same step. A second one leaves at once. EXIT_CODE tells a scheduler
to run the same command again; it is sysexits.h's EX_TEMPFAIL.

Between processes a flag travels over Gloo while the next step is computed already, so that no step waits for it: where
there are several, the run ends one step later.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75


class Preemption:
    """Notes signals between :meth:`listen` and :meth:`close`, instead of their ending the process.

    Only the main thread can note signals; elsewhere they do as they did.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: signal.Signals | None = None
        several = accelerator.num_processes > 1
        self._group = distributed.new_group(backend="gloo") if several else None
        self._flag = torch.zeros(1)
        self._travelling: distributed.Work | None = None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Note signals from here on."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Let them do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        os.write(
            2,
            f"\n{self.received.name}: the run saves a checkpoint after this step and ends; again: at once\n".encode(),
        )

    def asked(self) -> bool:
        """Whether the run is to end here; the same answer in every process, which all have to ask after each step."""
        if self._group is None:
            return self.received is not None
        agreed = self._arrived()
        self._send()
        return agreed

    def asked_now(self) -> bool:
        """The same, of this very moment, in the middle of a longer work; the processes wait for one another."""
        agreed = self.asked()
        return agreed if self._group is None else self._arrived() or agreed

    def _send(self) -> None:
        self._flag = torch.tensor([float(self.received is not None)])
        self._travelling = distributed.all_reduce(
            self._flag, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def _arrived(self) -> bool:
        if self._travelling is None:
            return False
        self._travelling.wait()
        self._travelling = None
        return bool(self._flag.item())


def leave_signals_alone(worker: int) -> None:
    """For a loader's worker process: a signal is for the whole group, but the worker is needed until the step ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
