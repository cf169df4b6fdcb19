"""TODO: what is here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps

from lpl.tools.pictures import on_white


# torchvision's names, which diffusers' scripts take, and what PIL has for them
RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}
Image.init()  # lets PIL know all that it can read
FORMATS = [kind for kind in Image.ID if kind != "EPS"]  # that is a program, which PIL has Ghostscript run
LARGEST_FILE = 2**30  # bytes of one in an archive, which may unpack to any size
LONGEST = 8  # times its shorter side: an image beyond is cropped before it is resized


def open_image(image: Any, folders: Sequence[str]) -> Any:
    """An image as a data set holds it, ``{"bytes": ..., "path": ...}``, opened by PIL; any other value as it is.

    Args:
        folders: where a path may lead, links and all: a data set says what it likes, also of other people's files.

    Raises:
        ValueError: for a path that leads elsewhere.
        OSError: where it is no image, or not there.
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
        return Image.open(BytesIO(file.read(LARGEST_FILE)), formats=FORMATS)


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it; one in a zip archive lies where the archive does."""
    kind, _, rest = path.partition("://")
    if kind == "zip":
        path = rest.partition("::")[2]
    if "::" in path:
        return False
    if "://" in path:
        return "://" in folder and ".." not in path and path.startswith((f"{folder}/", f"{folder}@"))
    return "://" not in folder and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def to_rgb(image: Image.Image | None) -> Image.Image:
    """An image of any mode, turned upright, as 8-bit RGB; what is transparent becomes white.

    Raises:
        ValueError: where there is none.
    """
    if image is None:
        raise ValueError("there is no image in this row")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return on_white(image)


def choose_caption(caption: str | Sequence[str], choice: float) -> str:
    """One of several captions, by a number in [0, 1).

    Raises:
        ValueError: where it is neither a string nor a list of strings.
    """
    if isinstance(caption, list | tuple) and caption:
        caption = caption[int(choice * len(caption))]
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a string or a list of strings, but one is {caption!r} (--caption_column)")
    return caption


def image_files(folder: str) -> list[Path]:
    """Files in a folder, and the folders below, whose name is an image's."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return [file for file in Path(folder).rglob("*") if file.suffix.lower() in suffixes]
