"""The size and the digest of each image of a data set, kept in an index on disk, so that a file is opened once.

A file is known by its *stamp*: length, time of its last change (``mtime``), time of its last change of any kind
(``ctime``, which no program can set), and inode. A file of the same name with another stamp is read anew. A file that
has changed within the last ``RACY`` seconds could change again under the same stamp; it is read, and not indexed.
Images that a data set holds as bytes are known by their row and by the data set's fingerprint and files.

A *size* is that of the upright image, (height, width); (0, 0) stands for an image that cannot be opened. A *digest* is
the sha256 of the file; "" for one that cannot be read, and ``NONE`` where a row has none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm.auto import tqdm

from lpl.config.groups import Data
from lpl.data.formats import FORMATS
from lpl.data.reading import open_image
from lpl.tools.files import write_whole


logger = logging.getLogger(__name__)

READERS = 8  # threads, since files may lie on a network disk
PART = 4096  # images between two looks at the clock
OF_A_THREAD = 64  # images that a thread looks at, at a time
SAVED_EVERY = 60.0  # seconds between two writes of the index, which a killed run continues from
RACY = 2.0  # seconds; coarser than the clock of any file system
TURNED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # EXIF's tag
OF_A_TURNED_PNG = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # what may hold the orientation
NONE = "none"


def cache_root(data: Data) -> Path:
    """--data_cache_dir, or its default."""
    return Path(data.data_cache_dir or Path(HF_HOME, "lpl"))


class Entry(NamedTuple):
    """What the index holds of an image; the stamp is four zeros for an image that has no file."""

    name: str  # the file's path; of bytes, the data set's fingerprint and the row
    length: int
    mtime: int  # nanoseconds
    ctime: int
    inode: int
    height: int
    width: int
    digest: str | None  # None: not computed yet

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        return self.length, self.mtime, self.ctime, self.inode


@dataclass(frozen=True)
class Catalogue:
    """What is known of the images of a data set, by row.

    Args:
        sizes: height and width, (N, 2).
        digests: empty unless they were asked for.
    """

    sizes: np.ndarray
    digests: Sequence[str]

    @classmethod
    def of(
        cls, dataset: Dataset, column: str, folders: Sequence[str], root: str | Path, *, digests: bool = False
    ) -> Catalogue:
        """Read the images that the index does not know, and index them. One process at a time should call this.

        Args:
            column: of the images, undecoded.
            folders: where the data set's files may lie, see :func:`lpl.data.source.data_folders`.
            root: folder of the index, which may serve several data sets and runs.
        """
        origin = _origin(dataset, column)
        index = Path(root, "images", f"{_index_of(dataset, column, origin, folders)}.parquet")
        known, fresh, saved = _read(index), {}, time.monotonic()
        found: list[Entry] = []
        with (
            ThreadPoolExecutor(READERS) as readers,
            tqdm(desc="reading sizes", total=len(dataset), delay=2, leave=False, unit=" images") as progress,
        ):
            for part in _parts(_images(dataset, column, origin), PART):
                entries_of = partial(_entries, known=known, folders=folders, digests=digests)
                for entry, trusted in chain.from_iterable(readers.map(entries_of, _parts(iter(part), OF_A_THREAD))):
                    found.append(entry)
                    if trusted and known.get(entry.name) is not entry:
                        fresh[entry.name] = entry
                progress.update(len(part))
                if fresh and time.monotonic() - saved > SAVED_EVERY:
                    known, fresh, saved = _write(index, known, fresh), {}, time.monotonic()
        if fresh:
            _write(index, known, fresh)
        sizes = np.array([(entry.height, entry.width) for entry in found], dtype=np.int32).reshape(-1, 2)
        return cls(sizes, [entry.digest or "" for entry in found] if digests else ())


# Images --------------------------------------------------------------------------------------------------------------


def digest_of(image: Mapping[str, Any] | None) -> str:
    """The digest of an undecoded image as it is now.

    Raises:
        OSError: if it cannot be read.
    """
    if image is not None and image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).hexdigest()
    if image is None or image["path"] is None:
        return NONE
    with fsspec.open(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def _images(dataset: Dataset, column: str, origin: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the undecoded image of each row; bytes are not copied."""
    table = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format("arrow")
    row = 0
    for batch in cast(Iterator[pyarrow.Table], table.iter(1000)):
        images = batch[column].combine_chunks()
        contents = images.field("bytes")
        held = map(all, zip(images.is_valid().to_pylist(), contents.is_valid().to_pylist()))
        for place, (path, holds) in enumerate(zip(images.field("path").to_pylist(), held)):
            content = contents[place] if holds else None
            yield (f"{origin}/{row}" if holds else path or ""), {"bytes": content, "path": path}
            row += 1


def _parts(images: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while part := list(islice(images, size)):
        yield part


def _entries(images: list[tuple[str, dict[str, Any]]], **options: Any) -> list[tuple[Entry, bool]]:
    return [_entry(image, **options) for image in images]


def _entry(
    named: tuple[str, dict[str, Any]], known: dict[str, Entry], folders: Sequence[str], digests: bool
) -> tuple[Entry, bool]:
    """The entry of an image, and whether the index may keep it."""
    name, image = named
    stamp = (0, 0, 0, 0) if image["bytes"] is not None else _stamp(image["path"])
    entry = known.get(name)
    if stamp and entry and entry.stamp == stamp and not (digests and entry.digest is None):
        return entry, True
    begun = time.time()
    size, digest = _looked_at(image, folders, digests)
    entry = Entry(name, *(stamp or (0, 0, 0, 0)), *size, digest)
    if image["bytes"] is not None:
        return entry, True
    settled = stamp is not None and max(stamp[1:3]) / 1e9 < begun - RACY
    return entry, settled and _stamp(image["path"]) == stamp  # it has not changed while it was read


def _stamp(path: str | None) -> tuple[int, int, int, int] | None:
    """None: there is no such local file."""
    if path is None or "://" in path:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _looked_at(image: dict[str, Any], folders: Sequence[str], digests: bool) -> tuple[tuple[int, int], str | None]:
    content = image["bytes"]
    if content is None and image["path"] is None:
        return (0, 0), NONE if digests else None
    try:
        if content is not None:
            content = content.as_buffer()
            opened = Image.open(cast(IO[bytes], pyarrow.BufferReader(content)), formats=FORMATS)
        else:
            opened = open_image(image, folders)
            assert opened is not None
        with opened:
            size = upright_size(opened)
        return size, digest_of({"bytes": content, "path": image["path"]}) if digests else None
    except Exception:  # broken files raise a dozen kinds; the run itself says which it is
        return (0, 0), "" if digests else None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image with its EXIF orientation applied; does not decode it.

    A PNG whose EXIF follows its pixels is taken as it lies.
    """
    width, height = image.size
    bare = image.format == "PNG" and not OF_A_TURNED_PNG & image.info.keys()
    if image.format == "TIFF" or bare:  # PIL has turned a TIFF
        return height, width
    turned = image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


# The index -----------------------------------------------------------------------------------------------------------


def _origin(dataset: Dataset, column: str) -> str:
    """What decides the bytes that a data set holds; images in files change without it."""
    files = [(file["filename"], _stamp(file["filename"])) for file in dataset.cache_files]
    return hashlib.sha256(repr((dataset._fingerprint, column, files)).encode()).hexdigest()[:32]


def _index_of(dataset: Dataset, column: str, origin: str, folders: Sequence[str]) -> str:
    """The name of the index: of the folders of a data set whose images are files, or of the data set itself."""
    _, first = next(_images(dataset.select(range(min(1, len(dataset)))), column, origin), ("", {}))
    if first.get("bytes") is not None or not folders:
        return origin
    return hashlib.sha256(repr([os.path.realpath(folder) for folder in folders]).encode()).hexdigest()[:32]


def _read(index: Path) -> dict[str, Entry]:
    """The entries of an index; none if there is none, or if it is damaged or of another version."""
    try:
        columns = pyarrow.parquet.read_table(index, columns=list(Entry._fields)).to_pydict()
    except (OSError, ValueError, KeyError, pyarrow.ArrowException):
        return {}
    return {values[0]: Entry(*values) for values in zip(*columns.values())}


def _write(index: Path, known: dict[str, Entry], fresh: dict[str, Entry]) -> dict[str, Entry]:
    """Write both parts, and return them."""
    entries = known | fresh
    table = pyarrow.table(dict(zip(Entry._fields, map(list, zip(*entries.values())))))
    try:
        write_whole(index, lambda unfinished: pyarrow.parquet.write_table(table, unfinished))
    except OSError as error:
        logger.warning("the index of images %s cannot be written (%s); they are read again next time", index, error)
    return entries
