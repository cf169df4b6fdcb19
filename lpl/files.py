"""Files appear whole or not at all: they are written beside their place and moved there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a file beside `path`, then move it there: nobody ever sees half of it. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text`, as UTF-8, whole or not at all."""
    return write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
