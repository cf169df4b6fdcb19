"""The fingerprint of the training data: the same on every machine, different for different data.

A loaded data set: the number of samples, all captions, and the bytes of the image files, in order. Of more than
``IMAGES`` images only ``IMAGES`` are read, evenly spaced from the first to the last; another file in between, under
the same caption, may go unnoticed. Names, folders and the way of loading do not count: a folder of images and parquet
files with the same bytes, captions and order have one fingerprint. Images encoded again, or in another order, change
it.

A streamed data set, not yet read: the number and names of its shards, its columns, and the first ``FIRST_ROWS`` rows
of the first shard. Changes behind those rows, in shards of the same names, go unnoticed. Its fingerprint always
differs from that of the same data loaded without --streaming.

Files are read, not decoded: a file that is no image counts with its bytes; one that cannot be read, or lies outside of
the data set's folders, counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from lpl.config.groups import Data
from lpl.data.captions import caption_rows, columns_of
from lpl.data.mixture import Mixture
from lpl.data.reading import file_digest, lies_in
from lpl.data.source import data_folders


IMAGES = 512  # files read
FIRST_ROWS = 16  # of a streamed data set
READERS = 8  # threads, since files may lie on a network disk
MISSING = "missing"  # stands for the digest of a file that cannot be read


def fingerprint(
    dataset: Dataset | IterableDataset,
    image_column: str,
    columns: Sequence[str],
    folders: Sequence[str] = (),
    mask_column: str | None = None,
) -> str:
    """Returns ``sha256:`` and 64 hex digits.

    Args:
        columns: of the captions, see :func:`lpl.data.captions.columns_of`.
        folders: where the data set's files may lie, see :func:`lpl.data.source.data_folders`; images embedded in the
            data set need none.
        mask_column: of the loss masks, which count as the images do.
    """
    pictures = [image_column] if mask_column is None else [image_column, mask_column]
    if isinstance(dataset, IterableDataset):
        parts = _streamed(dataset, pictures, columns, folders)
    else:
        parts = _loaded(dataset, pictures, columns, folders)
    digest, encode = hashlib.sha256(), json.JSONEncoder(default=str).encode
    for part in parts:  # a line of JSON each, so that parts cannot run into each other
        digest.update(encode(part).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def data_facts(dataset: Dataset | IterableDataset, data: Data, cache_dir: str | None) -> dict[str, Any]:
    """What a recipe records of the data: its fingerprint, and the numbers of images, and with repeats of samples."""
    folders, columns = data_folders(data, cache_dir), columns_of(data, dataset.column_names or [])
    facts: dict[str, Any] = {
        "fingerprint": fingerprint(dataset, data.image_column, columns, folders, data.mask_column)
    }
    if isinstance(dataset, Dataset):
        facts["images"], mixture = len(dataset), Mixture.of(dataset)
        if mixture is not None and len(mixture.further):
            facts["samples"] = len(mixture.rows)
    return facts


def other_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How data differs from that of a recipe; None if it does not, or if the recipe does not tell.

    Args:
        before, now: :func:`data_facts`; those of a recipe may be anything.
    """
    samples, were = (facts.get("samples", facts.get("images")) for facts in (now, before))
    if before.get("fingerprint") in (None, now["fingerprint"]):
        known = isinstance(were, int) and before.get("fingerprint") is not None
        return f"other repeats, {samples} samples an epoch instead of {were}" if known and samples != were else None
    count, images = before.get("images"), now.get("images")
    if isinstance(count, int) and 0 < count < 2**31 and images not in (None, count):
        return f"{images} images instead of {count}"
    return "other images or captions, or in another order"


def _loaded(
    dataset: Dataset, pictures: Sequence[str], columns: Sequence[str], folders: Sequence[str]
) -> Iterator[Any]:
    yield "loaded", len(dataset)
    for row in caption_rows(dataset, columns):
        yield _caption(row, columns)
    for column in pictures:
        images = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))
        with ThreadPoolExecutor(READERS) as readers:
            yield from readers.map(partial(_digest, images, column, folders), spaced(len(dataset), IMAGES))


def _digest(images: Dataset, column: str, folders: Sequence[str], place: int) -> str:
    try:
        return image_digest(images[place][column], folders)
    except Exception:  # of the data set's library, for a broken file of its own
        return MISSING


def _streamed(
    dataset: IterableDataset, pictures: Sequence[str], columns: Sequence[str], folders: Sequence[str]
) -> Iterator[Any]:
    yield "streamed", dataset.num_shards, dataset.column_names
    yield [os.path.basename(path) for path in shard_paths(dataset)]
    try:
        for row in islice(dataset.decode(False).shard(dataset.num_shards, 0), FIRST_ROWS):
            yield _caption(row, columns), *(image_digest(row[column], folders) for column in pictures)
    except Exception:  # a broken shard, or a network that is gone
        yield MISSING


def _caption(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """What a row has for a caption; of several columns a list."""
    return row[columns[0]] if len(columns) == 1 else [row[column] for column in columns]


def spaced(length: int, count: int) -> list[int]:
    """At most ``count`` places, evenly spaced from the first to the last.

    >>> spaced(3, 5), spaced(9, 5), spaced(9, 1)
    ([0, 1, 2], [0, 2, 4, 6, 8], [0])
    """
    if length <= count:
        return list(range(length))
    return [place * (length - 1) // max(count - 1, 1) for place in range(count)]


def image_digest(image: Mapping[str, Any] | None, folders: Sequence[str]) -> str:
    """sha256 of an image file in hex, given its bytes or its path."""
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is not None:
        return hashlib.sha256(content).hexdigest()
    if path is None or not any(lies_in(path, str(folder)) for folder in folders):
        return MISSING
    if "://" not in path and not os.path.isfile(path):  # reading a pipe would block
        return MISSING
    try:
        return file_digest(path)
    except Exception:  # each kind of storage raises its own
        return MISSING


def shard_paths(dataset: IterableDataset) -> list[str]:
    """The files of a streamed data set, in order; empty if unknown.

    The library has no public way to ask. The files are the arguments of its innermost iterable.
    """
    rows: Any = getattr(dataset, "_ex_iterable", None)
    while hasattr(rows, "ex_iterable"):
        rows = rows.ex_iterable
    for value in (getattr(rows, "kwargs", None) or {}).values():
        if isinstance(value, list) and value and all(isinstance(path, str) for path in value):
            return value
    return []
