"""Sets of images that are compared: all of them square, of one size, preprocessed in one way.

A *set* is a sequence of images, read and preprocessed when they are asked for, so that a large one fits in memory. Its
*digests* name the pixels that the networks see. *Captions* belong to the images one by one, or are not there at all.

Preprocessing moves every metric: a set resized with another filter is another set, whose Fréchet distance to the first
is not zero. Both sides of a comparison go through the same :class:`Preprocessing`, which is recorded with the result.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from lpl.data import RESAMPLING, choose_caption, first_line, image_files, to_rgb


logger = logging.getLogger(__name__)

CROPS = ("center", "none")
METADATA = "metadata.jsonl"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files
NAMED = 5  # files that a warning names at most


@dataclass(frozen=True)
class Preprocessing:
    """Makes any image an RGB square.

    Args:
        resolution: the square's side in pixels.
        crop: "center" cuts the largest square out of the middle; "none" squeezes the whole image into the square.
        interpolation: the filter of the resizing, one of :data:`lpl.data.RESAMPLING`. An image that has the right
            size already is left as it is.

    Raises:
        ValueError: for a value that is none of these.
    """

    resolution: int
    crop: str = "center"
    interpolation: str = "lanczos"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"--resolution {self.resolution}: it must be at least 1 pixel")
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: it must be one of {', '.join(CROPS)}")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation {self.interpolation!r}: it must be one of {', '.join(RESAMPLING)}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB, resolution x resolution pixels; turned upright, transparent parts on white."""
        image = to_rgb(image)
        if self.crop == "center":
            image = _central_square(image)
        return image.resize((self.resolution, self.resolution), RESAMPLING[self.interpolation])


def _central_square(image: Image.Image) -> Image.Image:
    """The largest square in the middle, at whole pixels: half a pixel's shift would blur what is not resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class ImageSet(Sequence[Image.Image]):
    """Images under one preprocessing.

    Args:
        name: what the set is called in tables and pictures.
        sources: files, or images of any size and mode.
        captions: one for each image, or None.
        digests: of the preprocessed images where they are known; the others are computed when asked for.

    Raises:
        ValueError: where there are not as many captions as images.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path | Image.Image],
        preprocessing: Preprocessing,
        captions: Sequence[str] | None = None,
        digests: Mapping[int, str] | None = None,
    ) -> None:
        if captions is not None and len(captions) != len(sources):
            raise ValueError(f"{name}: {len(captions)} captions for {len(sources)} images; give one for each")
        self.name, self.preprocessing = name, preprocessing
        self.captions = None if captions is None else list(captions)
        self._sources, self._digests = list(sources), dict(digests or {})

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Image.Image:
        """The preprocessed image, (resolution, resolution) RGB."""
        source = self._sources[index]
        if isinstance(source, Image.Image):
            return self.preprocessing(source)
        with Image.open(source) as image:
            return self.preprocessing(image)

    def digest(self, index: int) -> str:
        """Names what the networks see of an image: sha256 of its preprocessed pixels and their shape."""
        if index not in self._digests:
            self._digests[index] = pixel_digest(self[index])
        return self._digests[index]

    def select(self, indices: Iterable[int]) -> ImageSet:
        """The set of these images, in this order."""
        indices = [range(len(self))[index] for index in indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices]
        known = {new: self._digests[old] for new, old in enumerate(indices) if old in self._digests}
        return ImageSet(self.name, [self._sources[index] for index in indices], self.preprocessing, captions, known)


def pixel_digest(image: Image.Image) -> str:
    """sha256 over size, mode and pixels."""
    return hashlib.sha256(f"{image.size} {image.mode} ".encode() + image.tobytes()).hexdigest()


def listed_images(
    images: Sequence[Image.Image], name: str, preprocessing: Preprocessing, captions: Sequence[str] | None = None
) -> ImageSet:
    """A set of images that are in memory.

    Raises:
        ValueError: where there is no image, or not as many captions as images.
    """
    if len(images) == 0:
        raise ValueError(f"{name}: there are no images")
    return ImageSet(name, images, preprocessing, captions)


def folder_images(
    folder: str | Path, preprocessing: Preprocessing, caption_column: str = "text", progress: bool = True
) -> ImageSet:
    """The images in a folder and the folders below it, sorted by path.

    Where the folder has a ``metadata.jsonl``, its lines, ``{"file_name": ..., "text": ...}``, say which images belong
    to the set and what their captions are; of several captions of one image the first is taken. Folders below only
    hold images, they are no classes. Every file is read once here, so that unreadable ones are known; they are left
    out with one warning.

    Args:
        caption_column: where the captions are in ``metadata.jsonl``.

    Raises:
        ValueError: where there is no such folder, no readable image in it, or ``metadata.jsonl`` is not as above.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images")
    captions = _read_metadata(folder / METADATA, caption_column)
    files = sorted(image_files(str(folder)))
    if captions is not None:
        _warn_of_unlisted(folder, [file for file in files if file not in captions])
        files = sorted(captions)
    found = ImageSet(folder.name or str(folder), files, preprocessing)
    broken = _broken(found, progress)
    if broken:
        _warn_of_broken(folder, {files[index]: why for index, why in broken.items()})
    kept = [index for index in range(len(files)) if index not in broken]
    if not kept:
        raise ValueError(f"{folder}: there is no readable image in this folder")
    readable = found.select(kept)
    if captions is not None and None not in captions.values():
        readable.captions = [captions[files[index]] for index in kept]
    return readable


def _broken(images: ImageSet, progress: bool) -> dict[int, str]:
    """Read all images; which cannot be read, and why."""

    def reason(index: int) -> str | None:
        try:
            images.digest(index)
        except UNREADABLE as error:
            return first_line(error)
        return None

    reasons = threaded(reason, range(len(images)), f"reading {images.name}" if progress else None)
    return {index: why for index, why in enumerate(reasons) if why is not None}


def threaded(function: Callable, items: Sequence, title: str | None = None) -> list:
    """``[function(item) for item in items]`` in threads, since PIL lets others work; a bar with ``title``, if any."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(function, items), title, len(items), leave=False, disable=title is None))


def _warn_of_broken(folder: Path, broken: Mapping[Path, str]) -> None:
    names = [f"{file.relative_to(folder)} ({why})" for file, why in list(broken.items())[:NAMED]]
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    logger.warning(
        "%s: %d images are left out, since they cannot be read: %s%s", folder, len(broken), ", ".join(names), more
    )


def _warn_of_unlisted(folder: Path, unlisted: Sequence[Path]) -> None:
    if unlisted:
        logger.warning("%s: %d images are left out, since %s does not name them", folder, len(unlisted), METADATA)


def _read_metadata(path: Path, caption_column: str) -> dict[Path, str | None] | None:
    """File -> caption; a caption is None where the line has none. None without such a file."""
    if not path.is_file():
        return None
    captions: dict[Path, str | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file, caption = path.parent / row["file_name"], row.get(caption_column)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f'{path}, line {number}: it should be {{"file_name": ..., ...}}') from error
        label = isinstance(caption, int)  # of a class-conditional data set
        captions[file] = str(caption) if label else caption if caption is None else choose_caption(caption, 0.0)
    if lacking := sum(caption is None for caption in captions.values()):
        logger.warning(
            "%s: %d of %d lines have no %r, so the captions are not used",
            *(path, lacking, len(captions), caption_column),
        )
    return captions
