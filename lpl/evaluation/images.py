"""Sets of images to compare: square, of one size, with the same preprocessing.

A *set* is a sequence of images that are read and preprocessed on access, so that a large one fits in memory. Its
*digests* are hashes of the pixels that the networks see. All images have a *caption*, or none has.

Preprocessing changes every metric: a set resized with another filter has a positive Fréchet distance to itself. Both
sides of a comparison go through the same :class:`Preprocessing`, which is recorded with the result.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from PIL import Image

from lpl.data.captions import caption_columns, texts_of
from lpl.data.folder import FILE_NAME, Contents, image_files
from lpl.data.metadata import described
from lpl.data.reading import FORMATS, RESAMPLING, lies_in, to_rgb, why_outside
from lpl.data.texts import text_captions
from lpl.evaluation.processes import in_parts, threaded
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
METADATA = "metadata.jsonl"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files
NAMED = 5  # a warning names at most this many files


@dataclass(frozen=True)
class Preprocessing:
    """Crops the largest central square of an image and resizes it, in RGB.

    Args:
        resolution: the square's side in pixels.
        interpolation: the resizing filter, one of :data:`lpl.data.reading.RESAMPLING`. An image of the right size is
            not resampled.

    Raises:
        ValueError: for another value.
    """

    resolution: int
    interpolation: str = "lanczos"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise ValueError(f"--resolution {self.resolution}: it must be at least 1 pixel")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation {self.interpolation!r}: it must be one of {', '.join(RESAMPLING)}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB, resolution x resolution pixels; rotated by its EXIF orientation, transparent parts on white."""
        return _central_square(to_rgb(image)).resize(
            (self.resolution, self.resolution), RESAMPLING[self.interpolation]
        )


def _central_square(image: Image.Image) -> Image.Image:
    """The largest central square, at whole pixels: a shift by half a pixel would blur images that are not resized."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class ImageSet(Sequence[Image.Image]):
    """Images with one preprocessing.

    Args:
        name: of the set, in tables and pictures.
        sources: files, or images of any size and mode.
        captions: one for each image, or None.
        digests: known ones of the preprocessed images; others are computed on access.
        enlarged: images that are known to be smaller than the preprocessing's resolution.

    Raises:
        ValueError: if captions and images differ in number.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Path | Image.Image],
        preprocessing: Preprocessing,
        captions: Sequence[str] | None = None,
        digests: Mapping[int, str] | None = None,
        enlarged: Collection[int] = (),
    ) -> None:
        if captions is not None and len(captions) != len(sources):
            raise ValueError(f"{name}: {len(captions)} captions for {len(sources)} images; give one for each")
        self.name, self.preprocessing = name, preprocessing
        self.captions = None if captions is None else list(captions)
        self._sources, self._digests, self._enlarged = list(sources), dict(digests or {}), set(enlarged)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def enlarged(self) -> int:
        """How many images are known to be smaller than the preprocessing's resolution."""
        return len(self._enlarged)

    def __getitem__(self, index: int) -> Image.Image:  # type: ignore[override] (slices: select)
        """The preprocessed image, (resolution, resolution) RGB."""
        source = self._sources[index]
        if isinstance(source, Image.Image):
            return self.preprocessing(source)
        with Image.open(source, formats=FORMATS) as image:
            return self.preprocessing(image)

    def digest(self, index: int) -> str:
        """Identifies what the networks see of an image: sha256 of its preprocessed pixels and their shape."""
        if index not in self._digests:
            self._digests[index] = pixel_digest(self[index])
        return self._digests[index]

    def select(self, indices: Iterable[int]) -> ImageSet:
        """The set of these images, in this order."""
        indices = [range(len(self))[index] for index in indices]
        captions = None if self.captions is None else [self.captions[index] for index in indices]
        known = {new: self._digests[old] for new, old in enumerate(indices) if old in self._digests}
        enlarged = [new for new, old in enumerate(indices) if old in self._enlarged]
        sources = [self._sources[index] for index in indices]
        return ImageSet(self.name, sources, self.preprocessing, captions, known, enlarged)


def pixel_digest(image: Image.Image) -> str:
    """sha256 over size, mode and pixels."""
    return hashlib.sha256(f"{image.size} {image.mode} ".encode() + image.tobytes()).hexdigest()


def listed_images(
    images: Sequence[Image.Image], name: str, preprocessing: Preprocessing, captions: Sequence[str] | None = None
) -> ImageSet:
    """A set of images in memory.

    Raises:
        ValueError: without images, or if captions and images differ in number.
    """
    if len(images) == 0:
        raise ValueError(f"{name}: there are no images")
    return ImageSet(name, images, preprocessing, captions)


def folder_images(
    folder: str | Path, preprocessing: Preprocessing, caption_column: str = "text", progress: bool = True
) -> ImageSet:
    """The images in a folder and the folders below it, sorted by path.

    Captions come from metadata or text files, see :mod:`lpl.data.folder`; metadata files list the set's images; of
    several captions of an image the first is used, and of several columns the first that has one. Sub-folders are not
    classes. Every file is read once here, each process reading a part; unreadable files are left out with one
    warning, and another counts the images that are smaller than the resolution.

    Args:
        caption_column: the column of the captions in metadata files, or several, as for training.

    Raises:
        ValueError: if there is no such folder or no readable image in it, or for a broken metadata file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images")
    for problem in Contents.of(folder).left_out():
        logger.warning("%s: %s", folder, problem)
    captions = _read_captions(folder, caption_column)
    files = sorted(image_files(str(folder)))
    if captions is not None:
        _warn_of_unlisted(folder, [file for file in files if file not in captions])
        files = sorted(captions)
    title = f"reading {folder.name}" if progress else None
    read = in_parts(
        len(files),
        lambda mine: threaded(lambda index: _read(files[index], folder, preprocessing), mine, title),
    )
    if broken := {file: why for file, (why, _, _) in zip(files, read) if why is not None}:
        _warn_of_broken(folder, broken)
    kept = [index for index, (why, _, _) in enumerate(read) if why is None]
    if not kept:
        raise ValueError(f"{folder}: there is no readable image in this folder")
    known = {file: caption for file, caption in (captions or {}).items() if caption is not None}
    texts = [known[files[index]] for index in kept] if captions and len(known) == len(captions) else None
    found = ImageSet(
        folder.name or str(folder),
        [files[index] for index in kept],
        preprocessing,
        texts,
        {new: read[old][1] for new, old in enumerate(kept)},
        [new for new, old in enumerate(kept) if read[old][2]],
    )
    if found.enlarged:
        logger.warning(
            "%s: %d of %d images are smaller than %d pixels and are enlarged, which blurs them",
            *(folder, found.enlarged, len(found), preprocessing.resolution),
        )
    return found


def has_captions(folder: str | Path, caption_column: str = "text") -> bool:
    """Whether all images that a folder's metadata or text files describe have captions."""
    captions = _read_captions(Path(folder), caption_column)
    return bool(captions) and None not in captions.values()


def _read(file: Path, folder: Path, preprocessing: Preprocessing) -> tuple[str | None, str, bool]:
    """Why a file cannot be used, or None; its digest; whether it is smaller than the resolution."""
    try:
        if not lies_in(str(file), str(folder)):
            return f"{why_outside(str(file))}; copy it there", "", False
        with Image.open(file, formats=FORMATS) as image:
            return None, pixel_digest(preprocessing(image)), min(image.size) < preprocessing.resolution
    except UNREADABLE as error:
        return first_line(error), "", False


def _warn_of_broken(folder: Path, broken: Mapping[Path, str]) -> None:
    names = [f"{os.path.relpath(file, folder)} ({why})" for file, why in list(broken.items())[:NAMED]]
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    logger.warning(
        "%s: %d images are left out because they cannot be read: %s%s", folder, len(broken), ", ".join(names), more
    )


def _warn_of_unlisted(folder: Path, unlisted: Sequence[Path]) -> None:
    if unlisted:
        logger.warning("%s: %d images are left out because no metadata file lists them", folder, len(unlisted))


def _read_captions(folder: Path, caption_column: str) -> dict[Path, str | None] | None:
    """File -> caption, or None where there is none. None if neither metadata nor text files describe the folder."""
    contents = Contents.of(folder)
    if not contents.metadata:
        files = [Path(folder, os.path.relpath(file, contents.folder)) for file in contents.images]
        texts = text_captions(contents)
        return {file: cast(str | None, text) for file, (text, _) in zip(files, texts)} if contents.captioned else None
    captions: dict[Path, str | None] = {}
    for place, line, row in described(contents):
        if not (name := row.get(FILE_NAME)):
            raise ValueError(f'{place}, line {line}: it should be {{"file_name": ..., ...}}')
        try:
            file = os.path.relpath(contents.named(name, place), contents.folder)
        except ValueError:  # it leads out of the folder; who reads the file says so
            file = os.path.join(os.path.dirname(os.path.relpath(place, contents.folder)), name)
        label = row.get(caption_column)
        columns = [] if isinstance(label, int) else caption_columns(caption_column, row)  # or a class label
        texts = [text for name in columns for text in texts_of(row.get(name))]
        captions[Path(folder, file)] = str(label) if isinstance(label, int) else next(iter(texts), None)
    if lacking := sum(caption is None for caption in captions.values()):
        logger.warning(
            "%s: %d of %d lines have no %r, so the captions are not used",
            *(contents.metadata[0], lacking, len(captions), caption_column),
        )
    return captions
