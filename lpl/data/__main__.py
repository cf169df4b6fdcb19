"""``python -m lpl.data``: see :mod:`lpl.data.command`."""

import sys

from lpl.tools.console import hush_libraries


if __name__ == "__main__" and "--verbose" not in sys.argv:
    hush_libraries()

from lpl.data.command import main
from lpl.tools.process import leave_after


if __name__ == "__main__":
    leave_after(main)
