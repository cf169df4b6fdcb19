"""How a process ends: with Python's messages and exit code, but without waiting for workers and threads."""

import multiprocessing
import os
import select
import signal
import sys
import threading
import time

import pytest
from torch.utils.data import DataLoader

from lpl.tools.process import SIGNALS, exit_code, leave, leave_after, leave_signals_alone, say


def until(condition, seconds=20):
    """Whether it holds before so much time is over."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def code_of(child):
    """What a process ends with, in 20 seconds; None: it does not."""
    status = []
    until(lambda: status.extend(given for pid, given in [os.waitpid(child, os.WNOHANG)] if pid) or status)
    return os.waitstatus_to_exitcode(status[0]) if status else None


# Signals


def test_a_loaders_workers_leave_signals_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        leave_signals_alone(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


def test_a_line_is_written_past_the_streams_lock(capfd):
    say("the run ends")
    assert capfd.readouterr().err == "\nthe run ends\n"


def test_children_end_with_the_process():
    """Though they ignore signals."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        multiprocessing.get_context("fork").Process(target=ignoring_signals).start()
        leave(7)
    os.close(writing)
    assert code_of(child) == 7
    assert select.select([reading], [], [], 20)[0] and os.read(reading, 1) == b""  # nobody has it open
    os.close(reading)


def ignoring_signals():
    leave_signals_alone(0)
    time.sleep(300)


# The exit


class Slow:
    """All but its first sample take very long."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return time.sleep(300 * index) or index


batches = []


def held_up(end):
    """A run that ends while one of its loader's processes reads, with a thread of an upload that was given up."""
    loader = DataLoader(Slow(), num_workers=1, persistent_workers=True, worker_init_fn=leave_signals_alone)
    batches.append(iter(loader))
    threading.Thread(target=time.sleep, args=(300,)).start()
    print(f"read {int(next(batches[0]))}")
    raise end


@pytest.mark.parametrize("end, code", [(SystemExit(75), 75), (KeyboardInterrupt(), 130)])
def test_nothing_holds_the_exit_up(end, code):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = os.fdopen(writing, "w")
            leave_after(lambda: held_up(end))
        finally:
            os._exit(99)
    os.close(writing)
    assert code_of(child) == code
    # The pipe ends with the last process that has it: the loader's is gone too, and what was said has arrived.
    assert select.select([reading], [], [], 20)[0] and os.read(reading, 100) == b"read 0\n"
    assert select.select([reading], [], [], 20)[0] and os.read(reading, 100) == b""
    os.close(reading)


@pytest.mark.parametrize(
    "end, code, said",
    [
        (None, 0, ""),
        (SystemExit(), 0, ""),
        (SystemExit(75), 75, ""),
        (SystemExit("why"), 1, "why\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_the_exit_code_is_pythons(end, code, said, capsys):
    assert exit_code(end) == code and capsys.readouterr().err == said


def test_an_error_nobody_knows_is_told_as_python_does(capsys):
    assert exit_code(ZeroDivisionError("a bug")) == 1 and "ZeroDivisionError: a bug" in capsys.readouterr().err
