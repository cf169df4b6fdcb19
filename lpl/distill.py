"""``python -m lpl.distill``: see :mod:`lpl.distillation.command`."""

import sys

from lpl.tools.console import hush_libraries


if __name__ == "__main__" and "--verbose" not in sys.argv:
    hush_libraries()

from lpl.distillation.command import main


if __name__ == "__main__":
    main()
