"""Folders in folders, without a library: the command line is checked before any is imported."""

from __future__ import annotations

import os
from pathlib import Path


def lies_within(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder or lies below it, symbolic links resolved; neither has to exist."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
