"""Ends a run at a signal: after the step, with a checkpoint and an exit code that a scheduler understands.

SIGTERM (the machine is preempted), SIGINT (Ctrl-C) and SIGUSR1 (a Slurm job's time runs out) ask a run to end. The
first signal is recorded, and all processes end after the same step. A second signal ends the process at once, and so
does the time LONGEST after the first. EXIT_CODE, EX_TEMPFAIL of sysexits.h, asks a scheduler to run the command again.

The main thread may be waiting in a library, for a device or another process, where no Python handler runs. A thread,
to which the interpreter writes each signal at once, does what must happen even then.

Processes agree over Gloo while the next step is computed already, so that no step waits: with several processes the
run ends one step later.
"""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import distributed

from lpl.tools.process import SIGNALS, leave, say


EXIT_CODE = 75
LONGEST = 15 * 60.0  # seconds from the first signal to the end: two steps of minutes, a checkpoint, and its upload
OTHERS_WAIT = timedelta(hours=12)  # of processes with one another: one samples, saves or prepares, the others wait
CLOSED = b"\0"  # no signal has that number


class Preemption:
    """Records signals between :meth:`listen` and :meth:`close`, instead of letting them end the process.

    Only the main thread can do so; elsewhere signals keep their handlers.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.received: signal.Signals | None = None
        several = accelerator.num_processes > 1
        self._group = distributed.new_group(backend="gloo", timeout=OTHERS_WAIT) if several else None
        self._flag = torch.zeros(1)
        self._travelling: distributed.Work | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pipe, self._pipe_before = -1, -1  # where the interpreter writes signals, and where it did before

    def listen(self) -> None:
        """Record signals from here on."""
        if threading.current_thread() is not threading.main_thread():
            return
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Restore the earlier handlers."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        signal.set_wakeup_fd(self._pipe_before)
        os.write(self._pipe, CLOSED)
        os.close(self._pipe)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def _watch(self, reading: int) -> None:
        """Announce what the first signal does, bound the time it takes, and leave at the second one."""
        bound = None
        while (byte := os.read(reading, 1)) != CLOSED:
            number = byte[0]
            if number not in SIGNALS:  # another one that Python handles
                continue
            if bound is not None:
                leave(128 + number)
            bound = threading.Timer(LONGEST, too_long)
            bound.daemon = True
            bound.start()
            name, minutes = signal.Signals(number).name, f"{LONGEST / 60:g} minutes"
            say(
                f"{name}: the run saves a checkpoint after this step and ends, after {minutes} at most; again: at once"
            )
        os.close(reading)
        if bound is not None:
            bound.cancel()

    def received_here(self) -> bool:
        """Whether this process has received a signal; the others may not have."""
        return self.received is not None

    def asked(self) -> bool:
        """Whether the run ends here; the same in every process. Every process calls it after each step."""
        if self._group is None:
            return self.received_here()
        agreed = self._arrived()
        self._send()
        return agreed

    def asked_now(self) -> bool:
        """The same at this very moment, within longer work; the processes wait for one another."""
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


def too_long() -> NoReturn:
    """Leave a run that was asked to end and hangs."""
    say(
        f"the run has not ended {LONGEST / 60:g} minutes after it was asked to, and is left as it is; the last "
        "checkpoint is whole: --resume_from_checkpoint latest goes on from there"
    )
    leave(EXIT_CODE)
