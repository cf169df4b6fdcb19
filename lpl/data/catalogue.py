"""The size and the digest of each image of a data set, kept in an index on disk, so that a file is opened once.

Images in files are known by their paths and stamps (:mod:`lpl.data.index`), those that a data set holds as bytes by
their row and by the data set's fingerprint and files.

A *size* is that of the upright image, (height, width); (0, 0) stands for an image that cannot be opened. A *digest* is
the sha256 of the file; "" for one that cannot be read, and ``NONE`` where a row has none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub.constants import HF_HOME
from PIL import Image
from tqdm.auto import tqdm

from lpl.config.groups import Data
from lpl.data.formats import FORMATS
from lpl.data.index import Index, compute, in_threads, name_of, stamp_of
from lpl.data.reading import file_digest, open_image


logger = logging.getLogger(__name__)

ROWS = 1000  # of a data set, taken together
PART = 4096  # images between two looks at the clock
OF_A_THREAD = 64  # images that a thread looks at, at a time
SAVED_EVERY = 60.0  # seconds between two writes of the index, which a killed run continues from
TURNED = {5, 6, 7, 8}  # EXIF orientations that swap height and width
ORIENTATION = 0x0112  # EXIF's tag
OF_A_TURNED_PNG = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # what may hold the orientation
NONE = "none"
FOUND = {"height": pyarrow.int32(), "width": pyarrow.int32(), "digest": pyarrow.string()}  # null: not computed yet


def cache_root(data: Data) -> Path:
    """--data_cache_dir, or its default."""
    return Path(data.data_cache_dir or Path(HF_HOME, "lpl"))


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
        images = dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format("arrow")
        origin = _origin(dataset, column)
        files = [file for part in _parts_of(images, column) for file in _files(part).to_pylist()]
        names = pyarrow.array([f"{origin}/{row}" if file is None else file for row, file in enumerate(files)])
        of_files = folders and any(file is not None for file in files)
        place = name_of(*map(os.path.realpath, folders)) if of_files else name_of(origin)
        index = Index(Path(root, "images", place), names, files, FOUND)
        known, rows = index.known()
        if digests:
            computed = rows["digest"].is_valid()
            known, rows = known[computed.to_numpy()], rows.filter(computed)
        sizes, found = np.zeros((len(files), 2), np.int32), np.full(len(files), None, object)
        sizes[known] = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], 1)
        found[known] = rows["digest"].to_numpy()
        unread = np.setdiff1d(np.arange(len(files)), known, assume_unique=True)
        looked_at = partial(_all_looked_at, folders=folders, digests=digests)
        fresh, saved = 0, time.monotonic()
        with tqdm(desc="reading sizes", total=len(unread), delay=2, leave=False, unit=" images") as progress:
            for end in range(PART, len(unread) + PART, PART):
                part = unread[end - PART : end]
                looked = in_threads(looked_at, list(_images(images, column, part.tolist())), OF_A_THREAD)
                for row, (size, digest) in zip(part, chain.from_iterable(looked)):
                    sizes[row], found[row] = size, digest
                progress.update(len(part))
                if end >= len(unread) or time.monotonic() - saved > SAVED_EVERY:
                    _keep(index, unread[fresh:end], sizes, found)
                    fresh, saved = end, time.monotonic()
        return cls(sizes, found.tolist() if digests else ())


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
    return file_digest(image["path"])


def _parts_of(images: Dataset, column: str) -> Iterator[pyarrow.StructArray]:
    """Yields ROWS undecoded images at a time; bytes are not copied."""
    for start in range(0, len(images), ROWS):
        yield images[start : start + ROWS][column].combine_chunks()


def _files(images: pyarrow.StructArray) -> pyarrow.StringArray:
    """The paths of images in files."""
    held = compute.struct_field(images, "bytes").is_valid()
    return compute.if_else(held, None, compute.struct_field(images, "path"))


def _images(images: Dataset, column: str, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the undecoded images of rows in order; bytes are not copied yet."""
    for start, group in groupby(rows, lambda row: row // ROWS * ROWS):
        part = images[start : start + ROWS][column].combine_chunks()
        contents, paths = (compute.struct_field(part, name) for name in ("bytes", "path"))
        for row in group:
            content = contents[row - start]
            yield {"bytes": content if content.is_valid else None, "path": paths[row - start].as_py()}


def _all_looked_at(
    images: Sequence[dict[str, Any]], folders: Sequence[str], digests: bool
) -> list[tuple[tuple[int, int], str | None]]:
    return [_looked_at(image, folders, digests) for image in images]


def _looked_at(image: dict[str, Any], folders: Sequence[str], digests: bool) -> tuple[tuple[int, int], str | None]:
    content = image["bytes"]
    if content is None and image["path"] is None:
        return (0, 0), NONE if digests else None
    try:
        if content is not None:
            content = content.as_py()
            opened = Image.open(BytesIO(content), formats=FORMATS)
        else:
            if "://" not in image["path"] and not os.path.isfile(image["path"]):
                raise FileNotFoundError(image["path"])  # a pipe would never end
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
    files = [(file["filename"], stamp_of(file["filename"])) for file in dataset.cache_files]
    return hashlib.sha256(repr((dataset._fingerprint, column, files)).encode()).hexdigest()[:32]


def _keep(index: Index, rows: np.ndarray, sizes: np.ndarray, digests: np.ndarray) -> None:
    height, width = sizes[rows].T
    try:
        index.add(rows, {"height": height.copy(), "width": width.copy(), "digest": digests[rows]})
    except OSError as error:
        logger.warning(
            "the index of images %s cannot be written (%s); they are read again next time", index.place, error
        )
