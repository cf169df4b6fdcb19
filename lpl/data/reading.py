"""Reads one image, safely, and crops it to its training size.

Data sets come from strangers: a path may point outside the data set's folder, and a file may unpack to any size.
Images are opened in the formats of ``formats.py``, from the data set's own folders only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from lpl.data.formats import FORMATS
from lpl.tools.pictures import on_white


# torchvision's names, as in diffusers' scripts -> PIL's filters
RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}
# A text or colour profile of over 1 MiB would cost the image; the limit for all texts of an image stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
LARGEST_FILE = 2**30  # bytes read of a file in an archive, which may unpack to any size
PART = 2**20  # bytes of a file read at a time for its digest
# Formats that say which value is white, if there are more than 8 bits; None: of no file
DEEP = ("TIFF", "PNG", "PPM", "JPEG2000", "HEIF", None)
ACCEPTED = "save it with 8 or 16 bits, or as floating-point numbers from 0 to 1"
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two
# Formats whose decoder leaves out detail that is not needed. The embedded thumbnail that a HEIC file may offer instead
# is another picture, of unknown quality.
REDUCIBLE = ("JPEG", "MPO")
# An image is decoded at this many times its size in training or more, and then resized. Its pixels differ from those
# of the whole image by 0.2 to 0.4 of what lanczos and bicubic differ by; decoding takes a fraction of the time.
MARGIN = 2
MIRRORED, UPSIDE_DOWN, ON_ITS_SIDE = {2, 3, 6, 7}, {3, 4, 7, 8}, {5, 6, 7, 8}  # values of EXIF's orientation
LONGEST = 8  # an image whose aspect ratio exceeds the crop's by more than this is cropped before it is resized


@dataclass(frozen=True)
class Picture:
    """An image to crop, perhaps decoded at a reduced size.

    Args:
        image: RGB and upright.
        width, height: of the whole image at its full size, in pixels.
        box: left, top, right and bottom of the whole image within ``image``, in its pixels. Sides that cannot be
            divided are rounded up when they are reduced, so that it may end within a pixel.
    """

    image: Image.Image
    width: int
    height: int
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """An image at its full size."""
        return cls(image, *image.size, (0, 0, *image.size))

    def mirrored(self) -> Picture:
        left, top, right, bottom = self.box
        box = self.image.width - right, top, self.image.width - left, bottom
        return replace(self, image=ImageOps.mirror(self.image), box=box)

    def part(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """A box in pixels of the full size, in pixels of ``image``."""
        x, y, end, low = self.box
        across, down = (end - x) / self.width, (low - y) / self.height
        return x + left * across, y + top * down, min(x + right * across, end), min(y + bottom * down, low)


def read_picture(
    image: Mapping[str, Any] | Image.Image | None,
    folders: Sequence[str],
    size: tuple[int, int] | None = None,
    interpolation: str = "lanczos",
) -> Picture:
    """Opens an image of a data set, and decodes it.

    Args:
        size: height and width of the crop that it is opened for, at a reduced size if its format can; None: at its
            full size.

    Raises:
        ValueError, OSError: as :func:`open_image` and :func:`to_rgb` do.
    """
    opened = open_image(image, folders)
    if opened is None or opened is image or opened.format not in REDUCIBLE:
        return Picture.of(to_rgb(opened))
    if size is None or interpolation.startswith("nearest"):  # which takes the image's own pixels
        return Picture.of(to_rgb(opened))
    (width, height), turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1)
    right, bottom = reduced(opened, (size[1], size[0]) if turned in ON_ITS_SIDE else size)
    rgb = to_rgb(opened)
    if turned in ON_ITS_SIDE:
        width, height, right, bottom = height, width, bottom, right
    left = rgb.width - right if turned in MIRRORED else 0
    top = rgb.height - bottom if turned in UPSIDE_DOWN else 0
    return Picture(rgb, width, height, (left, top, left + right, top + bottom))


def reduced(image: Image.Image, size: tuple[int, int]) -> tuple[float, float]:
    """Has a JPEG that is not decoded yet decoded at a half, a quarter or an eighth of its size, if that is enough.

    Args:
        size: height and width that it is resized to cover, before it is turned upright.

    Returns:
        width and height of the image within what will be decoded.
    """
    width, height = _covering(*image.size, size)
    drafted = image.draft(None, (MARGIN * width, MARGIN * height))
    return drafted[1][2:] if drafted else image.size


def _covering(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image resized to cover ``size``, (height, width)."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


def open_image(image: Mapping[str, Any] | Image.Image | None, folders: Sequence[str]) -> Image.Image | None:
    """Opens an undecoded image of a data set, ``{"bytes": ..., "path": ...}``; returns any other value unchanged.

    Args:
        folders: folders that the path may lie in, symbolic links resolved.

    Raises:
        ValueError: if the path lies elsewhere.
        OSError: if the file is missing or no image.
    """
    if not isinstance(image, Mapping):
        return image
    if image["bytes"] is not None:
        return _opened_bytes(image["bytes"])
    path = image["path"]
    if path is None:
        return None
    if not any(lies_in(path, str(folder)) for folder in folders):
        raise ValueError(f"{why_outside(path)}; copy it there")
    if "://" not in path:
        return Image.open(path, formats=FORMATS)
    with fsspec.open(path) as file:
        return _opened_bytes(cast(IO[bytes], file).read(LARGEST_FILE))


def _opened_bytes(content: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # in whose message is an address in memory
        raise UnidentifiedImageError(f"cannot identify image file in {len(content):,} bytes") from None


def file_digest(path: str) -> str:
    """sha256 in hex of a file, perhaps in an archive; of a larger one, of its first LARGEST_FILE bytes.

    Raises:
        OSError: if it cannot be read; fsspec's storages raise others.
    """
    digest = hashlib.sha256()
    with fsspec.open(path) if "://" in path else open(path, "rb") as file:
        for _ in range(LARGEST_FILE // PART):
            if not (part := cast(IO[bytes], file).read(PART)):
                break
            digest.update(part)
    return digest.hexdigest()


def why_outside(path: str) -> str:
    """That a file does not lie in the data set's folder, and whether a link leads out of it."""
    place = os.path.realpath(path)
    if "://" in path or place == os.path.abspath(path):
        return f"{path} is not in the data set's folder"
    return f"{path} is a link to {place}, which is not in the data set's folder"


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it. A file in a zip archive lies where the archive does.

    The links of a snapshot in the Hub's cache lead to ``blobs`` beside ``snapshots``, which counts as within it.
    """
    kind, _, rest = path.partition("://")
    if kind == "zip":
        path = rest.partition("::")[2]
    if "::" in path:
        return False
    if "://" in path:
        return "://" in folder and ".." not in path and path.startswith((f"{folder}/", f"{folder}@"))
    if "://" in folder:
        return False
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    repositories = (parent.parent for parent in root.parents if parent.name == "snapshots")
    blobs = (repository / "blobs" for repository in repositories if "--" in repository.name)
    return any(place.is_relative_to(allowed) for allowed in (root, *blobs))


def to_rgb(image: Image.Image | None) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, upright, with a white background.

    Of 16 bits and of 12 the upper 8 are taken. Floating-point numbers must be from 0, black, to 1, white. Integers of
    32 bits and signed ones have no white that everybody agrees on, and are refused, as are formats of instruments.

    Raises:
        ValueError: if there is no image, or it is not known which value is white.
    """
    if image is None:
        raise ValueError("there is no image in this row")
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError(f"its pixels are signed integers; {ACCEPTED}")
    upright = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        if image.format not in DEEP or (image.format == "TIFF" and image.mode == "I"):
            raise ValueError(f"which value is white is not known ({image.format}, mode {image.mode}); {ACCEPTED}")
        bits = tags.get(BITS, (16,))[0]
        upright = _in_8_bits(upright, 1.0 if image.mode == "F" else 2.0**bits - 1)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # PIL inverts 8 bits and fewer only
            upright = ImageOps.invert(upright)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        upright = ImageCms.profileToProfile(upright, *profiles, outputMode="RGB") or upright
    return on_white(upright)


def _in_8_bits(image: Image.Image, white: float) -> Image.Image:
    """A grayscale image of larger numbers, from 0 to white, with 8 bits.

    Raises:
        ValueError: if a number lies outside.
    """
    numbers = np.asarray(image).astype(np.float64)
    low, high = numbers.min(), numbers.max()
    if not (low >= 0 and high <= white):  # also for NaN
        raise ValueError(f"its pixels go from {low:g} to {high:g} and not from 0 to {white:g}; {ACCEPTED}")
    levels = 255 * numbers + 0.5 if white == 1 else numbers * 256 / (white + 1)
    return Image.fromarray(levels.astype(np.uint8))


def place_of(height: int, width: int, size: tuple[int, int], shares: tuple[float, float]) -> tuple[int, int]:
    """The crop's top and left in an image of that height and width, resized to cover ``size``; see :func:`cropped`."""
    across, down = _covering(width, height, size)
    return int(shares[0] * (down - size[0] + 1)), int(shares[1] * (across - size[1] + 1))


def cropped(
    picture: Picture, size: tuple[int, int], shares: tuple[float, float], flip: bool, interpolation: str
) -> tuple[Tensor, tuple[int, int]]:
    """Resizes an image to cover ``size``, mirrors it if ``flip``, and crops it.

    Args:
        size: height and width of the crop in pixels.
        shares: vertical and horizontal position of the crop, in [0, 1), from the top and from the left.
        interpolation: a key of :data:`RESAMPLING`.

    Returns:
        pixels (3, H, W) in [-1, 1], and the crop's top and left in the resized and mirrored image.
    """
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    resized = _covering(picture.width, picture.height, size)
    top, left = place_of(picture.height, picture.width, size, shares)
    resampling = RESAMPLING[interpolation]
    aspects = picture.width * height, picture.height * width  # their ratio: the image's aspect ratio to the crop's
    if max(aspects) > LONGEST * min(aspects):  # the whole image would be huge at this scale
        picture = picture.mirrored() if flip else picture
        box = picture.part(left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        image = picture.image.resize((width, height), resampling, box=box)
    else:
        image = picture.image.resize(resized, resampling, box=picture.box)
        image = ImageOps.mirror(image) if flip else image
        image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)
