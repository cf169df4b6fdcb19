"""What has been found of files, kept in an index on disk, so that each file is read once.

A file is known by its name and its *stamp*: length, time of its last change (``mtime``), time of its last change of
any kind (``ctime``, which no program can set), both in nanoseconds, and inode. What was found holds while the stamp is
the same. Stamps are taken before the files are read, so a change behind that shows the next time. Since two changes
within one tick of a disk's clock look alike, what is found of a file that had just changed (``RACY``) is not kept, as
in git's index.

An *index* is a table of Arrow with a row per file, and the sha256 of these bytes behind it. One that is damaged, or of
other columns, is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.compute

from lpl.tools.files import write_whole


READERS = 8  # threads, since files may lie on a network disk
PART = 1024  # files that a thread takes at a time: to hand over one costs more than to look at it
RACY = 2 * 10**9  # nanoseconds: the coarsest clock of a disk, FAT's
DIGEST = hashlib.sha256().digest_size  # bytes behind the table
NAME, STAMP = "name", ("length", "mtime", "ctime", "inode")
NO_FILE, NOT_THERE = (0, 0, 0, 0), (-1, 0, 0, 0)  # stamps
Item = TypeVar("Item")
Result = TypeVar("Result")
compute: Any = pyarrow.compute  # whose functions are made at run time


def name_of(*parts: object) -> str:
    """The name of an index, which depends on all parts."""
    return f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.arrow"


class Index:
    """Files that are looked up, with their stamps as they are now, and what is known of them.

    Args:
        place: of the index on disk.
        names: of the files.
        files: their paths; None: what the name stands for never changes.
        found: names and types of what is found of a file.
    """

    def __init__(
        self, place: Path, names: pyarrow.Array, files: Sequence[str | None], found: Mapping[str, pyarrow.DataType]
    ) -> None:
        now = time.time_ns()
        self.place, self.names = place, names.cast(pyarrow.large_string())
        self.stamps = np.concatenate([np.empty((0, 4), np.int64), *in_threads(_stamps, files)])  # (N, 4)
        self.settled = (self.stamps[:, 0] >= 0) & (self.stamps[:, 1:3].max(1) < now - RACY)  # (N,)
        types = {NAME: pyarrow.large_string()} | dict.fromkeys(STAMP, pyarrow.int64()) | dict(found)
        self.table = _read(place, pyarrow.schema(types))

    def known(self) -> tuple[np.ndarray, pyarrow.Table]:
        """The places of files that are known and have not changed, (K,), and a row for each."""
        rows = compute.index_in(self.names, value_set=self.table[NAME].combine_chunks())
        there = np.flatnonzero(rows.is_valid().to_numpy(zero_copy_only=False))
        table = self.table.take(rows.drop_null())
        same = (np.stack([table[column].to_numpy() for column in STAMP], 1) == self.stamps[there]).all(1)
        return there[same], table.filter(pyarrow.array(same))

    def add(self, places: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
        """Keep what was found of the files at these places, of those that have not just changed.

        Raises:
            OSError: if the index cannot be written.
        """
        settled = self.settled[places]
        if not settled.any():
            return
        columns = [self.names.take(pyarrow.array(places)), *map(pyarrow.array, self.stamps[places].T.copy())]
        columns += [pyarrow.array(found[name], self.table.field(name).type) for name in found]
        fresh = pyarrow.table(columns, schema=self.table.schema).filter(pyarrow.array(settled))
        old = compute.is_in(self.table[NAME], value_set=fresh[NAME].combine_chunks())
        self.table = pyarrow.concat_tables([self.table.filter(compute.invert(old)), fresh])
        _write(self.place, self.table)


def in_threads(read: Callable[[Sequence[Item]], Result], items: Sequence[Item], size: int = PART) -> Iterator[Result]:
    """Yields ``read`` of each part of ``items``, in order."""
    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(read, [items[start : start + size] for start in range(0, len(items), size)])


def _stamps(files: Sequence[str | None]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(map(stamp_of, files)), np.int64, 4 * len(files)).reshape(-1, 4)


def stamp_of(file: str | None) -> tuple[int, int, int, int]:
    """The stamp of a file as it is now."""
    if file is None or "://" in file:
        return NO_FILE if file is None else NOT_THERE
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return NOT_THERE
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1)


def _read(place: Path, schema: pyarrow.Schema) -> pyarrow.Table:
    """An index; without rows if there is none, or if it is damaged or of other columns."""
    try:
        content = pyarrow.py_buffer(place.read_bytes())
        table, digest = content[:-DIGEST], content[-DIGEST:]
        if hashlib.sha256(table).digest() == digest.to_pybytes():
            found = pyarrow.ipc.open_file(table).read_all()
            if found.schema == schema:
                return found
    except (OSError, pyarrow.ArrowException):
        pass
    return schema.empty_table()


def _write(place: Path, table: pyarrow.Table) -> None:
    def write(unfinished: Path) -> None:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        with open(unfinished, "wb") as file:
            file.write(content)
            file.write(hashlib.sha256(content).digest())

    write_whole(place, write)
