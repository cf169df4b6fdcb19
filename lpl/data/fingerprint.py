"""The fingerprint of what is trained on: the same on any machine, another one where the data is another.

A data set that is here: the number of its samples, all captions, and the bytes of the images' files, all in their
order. Of more than ``IMAGES`` images only so many are read, evenly spaced with the first and the last among them: then
a file in between that is exchanged for another one, under the same caption, may stay unseen. Names and folders do not
count, nor does how the data is loaded: a folder of images and parquet files with the same bytes, captions and order
have one fingerprint, and have two where one of them has its images encoded anew or in another order.

A streamed data set, which nobody has read yet: the number and the names of its shards, its columns, and the first
``FIRST_ROWS`` rows of the first shard. What changes behind them, in shards of the same names, stays unseen. It never
has the fingerprint of the same data loaded without --streaming.

Files are read, not decoded: one that is no image counts with its bytes, one that cannot be read or lies outside of the
data set's folders counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import fsspec
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from lpl.data.reading import LARGEST_FILE, lies_in


IMAGES = 512  # whose files are read
FIRST_ROWS = 16  # of a streamed data set
READERS = 8  # threads: a file on a network disk is waited for
PART = 2**20  # bytes that are read at a time
MISSING = "missing"  # stands for the digest of a file that cannot be read


def fingerprint(
    dataset: Dataset | IterableDataset, image_column: str, caption_column: str, folders: Sequence[str] = ()
) -> str:
    """``sha256:`` and 64 hex digits.

    Args:
        folders: where the files of the data set may lie, see :func:`lpl.data.data_folders`; images that are in the
            data set itself need none.
    """
    parts = _streamed if isinstance(dataset, IterableDataset) else _loaded
    digest = hashlib.sha256()
    for part in parts(dataset, image_column, caption_column, folders):  # a line of JSON each, so that none runs into
        digest.update(json.dumps(part, default=str).encode() + b"\n")  # the next
    return f"sha256:{digest.hexdigest()}"


def _loaded(dataset: Dataset, image_column: str, caption_column: str, folders: Sequence[str]) -> Iterator[Any]:
    yield "loaded", len(dataset)
    for batch in dataset.select_columns([caption_column]).iter(1000):
        yield from batch[caption_column]
    images = dataset.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))

    def digest(place: int) -> str:
        try:
            return image_digest(images[place][image_column], folders)
        except Exception:  # of the data set's library, for a broken file of its own
            return MISSING

    with ThreadPoolExecutor(READERS) as readers:
        yield from readers.map(digest, spaced(len(dataset), IMAGES))


def _streamed(dataset: IterableDataset, image_column: str, caption_column: str, folders: Sequence[str]) -> Iterator:
    yield "streamed", dataset.num_shards, dataset.column_names
    yield [os.path.basename(path) for path in shard_paths(dataset)]
    try:
        for row in islice(dataset.decode(False).shard(dataset.num_shards, 0), FIRST_ROWS):
            yield row[caption_column], image_digest(row[image_column], folders)
    except Exception:  # a broken shard, or a network that is gone
        yield MISSING


def spaced(length: int, count: int) -> list[int]:
    """At most so many places, evenly spaced from the first to the last.

    >>> spaced(3, 5), spaced(9, 5)
    ([0, 1, 2], [0, 2, 4, 6, 8])
    """
    if length <= count:
        return list(range(length))
    return [place * (length - 1) // (count - 1) for place in range(count)]


def image_digest(image: Mapping[str, Any] | None, folders: Sequence[str]) -> str:
    """sha256 of an image's file, in hex; what a data set holds of it is its bytes or its path."""
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is not None:
        return hashlib.sha256(content).hexdigest()
    if path is None or not any(lies_in(path, str(folder)) for folder in folders):
        return MISSING
    try:
        return _file_digest(path)
    except Exception:  # as many kinds as there are places where a file may lie
        return MISSING


def _file_digest(path: str) -> str:
    if "://" not in path and not os.path.isfile(path):  # a pipe would be waited for
        return MISSING
    digest = hashlib.sha256()
    with fsspec.open(path) if "://" in path else open(path, "rb") as file:
        for _ in range(LARGEST_FILE // PART):
            if not (part := file.read(PART)):
                break
            digest.update(part)
    return digest.hexdigest()


def shard_paths(dataset: IterableDataset) -> list[str]:
    """The files of a streamed data set, in order; none where its library does not tell.

    It has no public way to ask: they are what its innermost iterable is called with.
    """
    rows = getattr(dataset, "_ex_iterable", None)
    while hasattr(rows, "ex_iterable"):
        rows = rows.ex_iterable
    for value in (getattr(rows, "kwargs", None) or {}).values():
        if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
            return value
    return []
