"""The bytes of many small text files: read by threads, and of a large folder kept in an index on disk.

A million captions in a million files take minutes to read, and seconds to read from one file. The *index* of a folder
is that file: a parquet table in the cache folder, with a row per text file: its name, its *state*, and its bytes. A
state is what the system says of a file: size, times of the last modification and of the last change of the inode in
nanoseconds, inode. A row holds while the state is the same. Since two changes within one tick of a disk's clock look
alike, a file that had just changed when its state was looked at is not kept, as in git's index (``RACY``).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from lpl.tools.files import write_whole


READERS = 8  # threads, since files may lie on a network disk
PART = 256  # files that a thread reads at a time
WORTH = 10_000  # files; fewer are read faster than it is worth an index
LARGEST = 2**14  # bytes; larger files are not kept
RACY = 2 * 10**9  # nanoseconds: the coarsest clock of a disk, FAT's
STATE = ("size", "mtime_ns", "ctime_ns", "inode")
Content = bytes | OSError  # of a file, or why it cannot be read
Result = TypeVar("Result")


def contents_of(files: Sequence[str], folder: str, cache: str | os.PathLike[str] | None) -> list[Content]:
    """The bytes of each file.

    Args:
        files: paths of plain files in ``folder`` or below it, each once.
        folder: absolute.
        cache: folder for the index; None: there is none.
    """
    if cache is None or len(files) < WORTH:
        return in_threads(_content, files)
    now = time.time_ns()
    index = Path(cache, f"{hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:32]}.parquet")
    names = pyarrow.array([file[len(folder) :] for file in files], pyarrow.large_string())
    states = np.array(in_threads(_state, files), np.int64)  # (N, 4), looked at before the file is read
    found = _kept(index, names, states)
    unread = [place for place, content in enumerate(found) if content is None]
    for place, content in zip(unread, in_threads(_content, [files[place] for place in unread])):
        found[place] = content
    contents = cast(list[Content], found)
    if any(_can_be_kept(contents[place], states[place], now) for place in unread):
        with suppress(OSError):  # a disk that is full, or another's folder: it is read again next time
            _write(index, names, states, [_can_be_kept(*row, now) for row in zip(contents, states)], contents)
    return contents


def in_threads(read: Callable[[str], Result], files: Sequence[str]) -> list[Result]:
    """``read`` of each file, in order. A thread takes many at a time: to hand over one costs more than to read it."""
    parts = [files[start : start + PART] for start in range(0, len(files), PART)]
    with ThreadPoolExecutor(READERS) as readers:
        return list(chain.from_iterable(readers.map(lambda part: [read(file) for file in part], parts)))


def _content(file: str) -> Content:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.readall()
    except OSError as error:
        return error


def _state(file: str) -> tuple[int, int, int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return -1, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1)


def _can_be_kept(content: Content, state: np.ndarray, now: int) -> bool:
    """Whether a later change of the file would change its state."""
    size, mtime, ctime, _ = state
    return not isinstance(content, OSError) and len(content) == size <= LARGEST and max(mtime, ctime) < now - RACY


def _kept(index: Path, names: pyarrow.Array, states: np.ndarray) -> list[Content | None]:
    """The bytes that an index has of files whose state is the same; None of the others."""
    try:
        table = pyarrow.parquet.read_table(index, page_checksum_verification=True)
        rows = pyarrow.compute.index_in(names, value_set=table["name"].combine_chunks())  # type: ignore[attr-defined]
        there = np.flatnonzero(~np.asarray(rows.is_null()))
        rows = rows.drop_null()
        before = np.stack([table[column].combine_chunks().take(rows).to_numpy() for column in STATE], 1)
        same = (before == states[there]).all(1)
        contents = table["content"].combine_chunks().take(rows.filter(pyarrow.array(same))).to_pylist()
    except Exception:  # no index, or a broken one, which raises a dozen kinds
        return [None] * len(names)
    found: list[Content | None] = [None] * len(names)
    for place, content in zip(there[same], contents):
        found[place] = content
    return found


def _write(
    index: Path, names: pyarrow.Array, states: np.ndarray, kept: Sequence[bool], contents: Sequence[Content]
) -> None:
    mask = pyarrow.array(kept)
    columns = {"name": names.filter(mask)}
    columns |= {column: pyarrow.array(values).filter(mask) for column, values in zip(STATE, states.T.copy())}
    kept_contents = [content for content, keep in zip(contents, kept) if keep]
    table = pyarrow.table(columns | {"content": pyarrow.array(kept_contents, pyarrow.large_binary())})
    index.parent.mkdir(parents=True, exist_ok=True)
    write_whole(index, lambda place: pyarrow.parquet.write_table(table, place, write_page_checksum=True))
