"""``python -m lpl.export``: see :mod:`lpl.publishing.export`."""

from lpl.tools.console import hush_libraries


if __name__ == "__main__":
    hush_libraries()

from lpl.publishing.export import main


if __name__ == "__main__":
    main()
