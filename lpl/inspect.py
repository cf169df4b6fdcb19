"""``python -m lpl.inspect``: see :mod:`lpl.inspection.command`."""

from lpl.inspection.command import main


if __name__ == "__main__":
    main()
