"""What a program shows besides its own lines: warnings in one line each, and little of what its libraries say.

Libraries say at every start which packages they miss, and draw a bar for each file that they load. None of it is of
the user's run, so it is left out unless --verbose is given. Everything else that a library says is shown: errors,
warnings of weights and data, and a bar where something takes long, such as a download.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings


# Loggers that warn of packages that could be installed
OF_PACKAGES = ("transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops")
# Beginnings of warnings for those who call the libraries, of no category of their own; the second one comes where a
# recipe has more loader processes than a machine has cores
OF_CALLS = ("The `?local_dir_use_symlinks", "This DataLoader will create")
BARS_AFTER = 10  # seconds


def hush_libraries() -> None:
    """Leave out what libraries say of themselves; to be called before they are imported."""
    os.environ.setdefault("TQDM_DELAY", str(BARS_AFTER))
    os.environ.setdefault("HF_HUB_DISABLE_SYMLINKS_WARNING", "1")
    for name in OF_PACKAGES:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):  # for those who call the libraries
        warnings.simplefilter("ignore", category)
    for message in OF_CALLS:
        warnings.filterwarnings("ignore", message)


class AboveBars(logging.Handler):
    """Writes each line to stderr, above a progress bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm  # behind hush_libraries, whose delay it reads

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # a terminal that is gone does not end a run, as with logging's own handlers
            self.handleError(record)
