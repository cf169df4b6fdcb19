"""Reads one image and its caption, safely, and crops the image to its training size.

Data sets come from strangers: a path may point outside the data set's folder, and a file may unpack to any size. PIL
opens images in the formats it decodes itself, from the data set's own folders only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lpl.tools.pictures import on_white
from lpl.tools.places import lies_within


# torchvision's names, as in diffusers' scripts -> PIL's filters
RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}
Image.init()  # registers all of PIL's formats
FORMATS = [kind for kind in Image.ID if kind != "EPS"]  # an EPS file is a program, which PIL runs in Ghostscript
LARGEST_FILE = 2**30  # bytes read of a file in an archive, which may unpack to any size
LONGEST = 8  # an image whose aspect ratio exceeds the crop's by more than this is cropped before it is resized


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
        return Image.open(BytesIO(image["bytes"]), formats=FORMATS)
    path = image["path"]
    if path is None:
        return None
    if not any(lies_in(path, str(folder)) for folder in folders):
        raise ValueError(f"{path} is not in the data set's folder; copy it there")
    if "://" not in path:
        return Image.open(path, formats=FORMATS)
    with fsspec.open(path) as file:
        return Image.open(BytesIO(cast(IO[bytes], file).read(LARGEST_FILE)), formats=FORMATS)


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it. A file in a zip archive lies where the archive does."""
    kind, _, rest = path.partition("://")
    if kind == "zip":
        path = rest.partition("::")[2]
    if "::" in path:
        return False
    if "://" in path:
        return "://" in folder and ".." not in path and path.startswith((f"{folder}/", f"{folder}@"))
    return "://" not in folder and lies_within(path, folder)


def to_rgb(image: Image.Image | None) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB, upright, with a white background.

    Raises:
        ValueError: if there is no image.
    """
    if image is None:
        raise ValueError("there is no image in this row")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return on_white(image)


def cropped(
    image: Image.Image, size: tuple[int, int], shares: tuple[float, float], flip: bool, interpolation: str
) -> tuple[Tensor, tuple[int, int]]:
    """Resizes an image to cover ``size``, mirrors it if ``flip``, and crops it.

    Args:
        image: RGB.
        size: height and width of the crop in pixels.
        shares: vertical and horizontal position of the crop, in [0, 1), from the top and from the left.
        interpolation: a key of :data:`RESAMPLING`.

    Returns:
        pixels (3, H, W) in [-1, 1], and the crop's top and left in the resized and mirrored image.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    top, left = int(shares[0] * (resized[1] - height + 1)), int(shares[1] * (resized[0] - width + 1))
    resampling = RESAMPLING[interpolation]
    aspects = image.width * height, image.height * width  # their ratio: the image's aspect ratio to the crop's
    if max(aspects) > LONGEST * min(aspects):  # the whole image would be huge at this scale
        image = ImageOps.mirror(image) if flip else image
        right, bottom = (min(end / scale, most) for end, most in zip((left + width, top + height), image.size))
        image = image.resize((width, height), resampling, box=(left / scale, top / scale, right, bottom))
    else:
        image = image.resize(resized, resampling)
        image = ImageOps.mirror(image) if flip else image
        image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)


def choose_caption(caption: object, choice: float) -> str:
    """Returns the caption, or one of a list of captions, chosen by a number in [0, 1).

    Raises:
        ValueError: if the caption is neither a string nor a list of strings.
    """
    if isinstance(caption, list | tuple) and caption:
        caption = caption[int(choice * len(caption))]
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a string or a list of strings, but one is {caption!r} (--caption_column)")
    return caption


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Files in a folder and below it that have the name of an image."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return [file for file in Path(folder).rglob("*") if file.suffix.lower() in suffixes]
