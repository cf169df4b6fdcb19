"""How this process ends, and what it says when nothing else can speak."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn


def leave_after(main: Callable[[], None]) -> NoReturn:
    """Run it, and end the process with what Python would say and its exit code, but without Python's waiting.

    That would be for a loader's processes, which heed no signal, and for threads, such as those of an upload that was
    given up.
    """
    end = None
    try:
        main()
    except (Exception, SystemExit) as error:
        end = error  # and with it all that main() holds: a loader that is let go waits for its processes
    code = exit_code(end)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def exit_code(end: BaseException | None) -> int:
    """That of a process which ends by an exception, said on standard error where Python does."""
    if end is None:
        return 0
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
        return 1
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def say(words: str) -> None:
    """A line on standard error, whatever the main thread is doing with that."""
    os.write(2, f"\n{words}\n".encode())


def leave(code: int) -> NoReturn:
    """End this process at once, and those that it has started, such as a loader's, which heed no other signal."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch raises an error of its own
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def leave_signals_alone(worker: int) -> None:
    """For a loader's worker process: a signal is for the whole group, but the worker is needed until the step ends."""
    signal.set_wakeup_fd(-1)  # that is the main process's
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
