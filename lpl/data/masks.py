"""Loss masks of images: which parts are trained on (:mod:`lpl.masking`).

A *mask* is an image in grey of 8 bits, white = train here, as large as its image; it is resized if it is not, with a
warning. It is the transparency of the image (--alpha_mask), or another image in the same row (--mask_column). In a
folder of images the files ``NAME-masklabel.png`` (OneTrainer's) and ``NAME.mask.png`` beside an image NAME are the
column ``mask`` and no images; so are the files of --mask_data_dir, with the images' names.

A row without a mask is trained on everywhere. A mask that cannot be read costs the sample, as an image does, and so
does one that is black everywhere, unless --unmasked_weight is above 0: there is nothing to learn from it. A crop of a
usable mask may still be black, and then counts as 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from lpl.config.choices import MASK_COLUMN
from lpl.config.groups import Data
from lpl.config.sizes import Size
from lpl.data.reading import Picture, cropped, open_image, read_picture, to_rgb


logger = logging.getLogger(__name__)

COLUMN = MASK_COLUMN
ENDINGS = ("-masklabel.png", ".mask.png")  # of their files' names, behind that of the image


def beside(images: Iterable[str]) -> dict[str, str]:
    """The masks among files with the names of images: {NAME without its suffix: mask}."""
    files = list(images)
    likely = [file for file in files if file.lower().endswith(ENDINGS)]
    names = {os.path.splitext(file)[0] for file in files} if likely else set()
    found = {}
    for file in likely:
        for ending in ENDINGS:
            if file.lower().endswith(ending) and file[: -len(ending)] in names:
                found[file[: -len(ending)]] = file
    return found


def in_folder(images: Iterable[str], top: str, pictures: Iterable[str], folder: str) -> dict[str, str]:
    """The masks that lie in a folder of their own, as :func:`beside` returns them.

    A mask has its image's name, whatever its suffix, and lies in the sub-folder of ``folder`` that the image has in
    ``top``, or in ``folder`` itself.
    """
    by_name = {os.path.splitext(os.path.relpath(file, folder))[0]: file for file in pictures}
    found = {}
    for name in (os.path.splitext(file)[0] for file in images):
        places = os.path.relpath(name, top), os.path.basename(name)
        if mask := next((by_name[place] for place in places if place in by_name), None):
            found[name] = mask
    return found


def of_images(images: Iterable[str | None], masks: Mapping[str, str]) -> list[str | None]:
    """The mask beside each image; None where there is none."""
    return [None if file is None else masks.get(os.path.splitext(file)[0]) for file in images]


def picture_in(row: Mapping[str, Any], data: Data, folders: Sequence[str], size: Size | None = None) -> Picture:
    """The image of a row; if the flags ask for masks, in RGBX, whose fourth channel is its mask.

    Args:
        size: height and width of the crop that the image is read for, see :func:`lpl.data.reading.read_picture`; an
            image with a mask is always read at its full size.

    Raises:
        ValueError, OSError: if one of them cannot be read, or the mask is black everywhere.
    """
    if data.masks is None:
        return read_picture(row[data.image_column], folders, size, data.image_interpolation_mode)
    image, mask = _image_and_mask(open_image(row[data.image_column], folders), row, data, folders)
    return Picture.of(Image.merge("RGBX", (*image.split(), mask)))  # that of RGBA would weigh the other channels


def _image_and_mask(
    image: Image.Image | None, row: Mapping[str, Any], data: Data, folders: Sequence[str]
) -> tuple[Image.Image, Image.Image]:
    """An image in RGB, and its mask, grey, from the image as it was opened."""
    if data.mask_column is None:
        image, mask = _without_transparency(image)
        image = to_rgb(image)
    else:
        image, mask = to_rgb(image), _opened(row[data.mask_column], folders)
    if mask is None:
        return image, Image.new("L", image.size, 255)
    if mask.size != image.size:
        _warn_of_size(data.mask_column)
        mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    if data.unmasked_weight == 0 and mask.getextrema() == (0, 0):
        raise ValueError("its mask is black everywhere, so there is nothing to train on")
    return image, mask


def _opened(mask: Any, folders: Sequence[str]) -> Image.Image | None:
    try:
        found = open_image(mask, folders)
        return None if found is None else to_rgb(found).convert("L")
    except TimeoutError:  # of --dataloader_timeout
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"its mask: {error}") from error


def _without_transparency(image: Image.Image | None) -> tuple[Image.Image | None, Image.Image | None]:
    """An image with the colours that lie below its transparency, upright, and its opacity, None if it has none."""
    if image is None or not image.has_transparency_data:
        return image, None
    image = ImageOps.exif_transpose(image)
    with_opacity = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return with_opacity.convert("RGB"), with_opacity.getchannel("A")


@cache  # once per process
def _warn_of_size(column: str | None) -> None:
    logger.warning("--mask_column %s: a mask has another size than its image; such masks are resized", column)


def cropped_with(
    picture: Picture, size: Size, shares: tuple[float, float], flip: bool, interpolation: str
) -> tuple[Tensor, tuple[int, int], dict[str, Tensor]]:
    """:func:`lpl.data.reading.cropped` of an image and its mask: both have one geometry.

    Returns:
        pixels (3, H, W) in [-1, 1]; the crop's top and left; and ``mask`` (1, H, W) in [0, 1], if there is one.
    """
    found, place = cropped(picture, size, shares, flip, interpolation)
    return found[:3], place, {"mask": (found[3:] + 1) / 2} if len(found) > 3 else {}
