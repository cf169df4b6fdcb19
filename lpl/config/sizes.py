"""Sizes of training images in words: ``--resolution 512,768`` and ``--aspect_ratio_buckets``.

A *size* is (height, width) in pixels. A *bucket* is a size that images of about its aspect ratio are trained at.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from math import ceil


Size = tuple[int, int]
AUTO = "auto"
LARGEST_STEP = 64  # pixels


def resolutions(word: str) -> int | str:
    """One side in pixels, or several with commas between them, ascending."""
    try:
        sides = sorted({int(part) for part in word.split(",")})
    except ValueError:
        sides = [0]
    if sides[0] < 1:
        raise ArgumentTypeError(f"{word!r}: accepted are a side in pixels, such as 512, or several, such as 512,768")
    return sides[0] if len(sides) == 1 else ",".join(map(str, sides))


def sides_of(resolution: int | str) -> tuple[int, ...]:
    """The sides that ``resolutions`` returned, ascending.

    >>> sides_of(512), sides_of("512,768")
    ((512,), (512, 768))
    """
    return tuple(map(int, str(resolution).split(",")))


def sizes(word: str) -> str:
    """``auto``, or :func:`some_sizes`."""
    return AUTO if word == AUTO else some_sizes(word)


def some_sizes(word: str) -> str:
    """Sizes as in diffusers' scripts, ``height,width;height,width;...``, without spaces and repetitions."""
    try:
        found = parse_sizes(word.strip(" ;"))
    except ValueError:
        found = ((0, 0),)
    if min(map(min, found)) < 1:
        raise ArgumentTypeError(
            f"{word!r}: accepted are sizes of the form HEIGHT,WIDTH;HEIGHT,WIDTH, such as 512,512;640,384"
        )
    return ";".join(f"{height},{width}" for height, width in found)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """
    >>> parse_sizes("512,512;640,384")
    ((512, 512), (640, 384))
    """
    pairs = (part.split(",") for part in text.split(";"))
    return tuple(dict.fromkeys((int(height), int(width)) for height, width in pairs))


def default_step(side: int, multiple: int) -> int:
    """The step of the sides of buckets: an eighth of the resolution, at most LARGEST_STEP, in whole ``multiple``."""
    return max(multiple, min(side // 8, LARGEST_STEP) // multiple * multiple)


def made_sizes(side: int, step: int) -> tuple[Size, ...]:
    """The sizes of ``auto``: multiples of the step, with the pixels of the square or just fewer, up to 4 to 1.

    >>> made_sizes(64, 32)
    ((32, 96), (32, 128), (64, 64), (96, 32), (128, 32))
    """
    lengths = range(step * max(1, ceil(side / 2 / step)), 2 * side + 1, step)
    pairs = [(length, side * side // length // step * step) for length in lengths]
    fitting = {(height, width) for height, width in pairs if 2 * width >= side and width >= step}
    largest: dict[float, Size] = {}
    for size in sorted(fitting | {(width, height) for height, width in fitting}, key=lambda size: size[0] * size[1]):
        largest[size[1] / size[0]] = size  # of one aspect ratio the largest
    return tuple(sorted(largest.values()))
