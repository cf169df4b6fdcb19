"""How this process ends, and how it writes when the main thread may be blocked."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn


def leave_after(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit as Python does, with its messages and exit code, but without waiting.

    Python would wait for a loader's processes, which ignore signals, and for threads, e.g. of an abandoned upload.
    """
    end = None
    try:
        main()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        end = error  # keeps what main() holds alive: a loader waits for its processes when it is freed
    code = exit_code(end)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def settle_group(processes: int) -> None:
    """Wait until Gloo's thread has dropped the last barrier, for which it needs the interpreter once more.

    A process that tears its group down before, as happens when main() is left, aborts or waits for ever.
    """
    time.sleep(0.2 if processes > 1 else 0)


def exit_code(end: BaseException | None) -> int:
    """The exit code of a process that ends with this exception; prints to standard error what Python prints."""
    if end is None:
        return 0
    if isinstance(end, KeyboardInterrupt):  # before a run takes signals itself, or of a command that does not
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if not isinstance(end, SystemExit):
        sys.excepthook(type(end), end, end.__traceback__)
        return 1
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def say(words: str) -> None:
    """Write a line to standard error without its lock, which the main thread may hold."""
    os.write(2, f"\n{words}\n".encode())


def leave(code: int) -> NoReturn:
    """Exit at once and kill all child processes, e.g. a loader's, which ignore other signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def leave_signals_alone(worker: int) -> None:
    """For a loader's worker: ignore signals to the process group, since the worker is needed until the step ends."""
    signal.set_wakeup_fd(-1)  # it belongs to the main process
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
