"""``python -m lpl.evaluate``: see :mod:`lpl.evaluation.command`."""

from lpl.evaluation.command import main


if __name__ == "__main__":
    main()
