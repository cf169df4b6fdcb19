"""``python -m lpl.publish``: see :mod:`lpl.publishing.command`."""

from lpl.publishing.command import main


if __name__ == "__main__":
    main()
