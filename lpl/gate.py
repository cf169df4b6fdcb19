"""The gate of LPL: the samples, parts of images, and steps that it applies to (Eq. 2, Sec. 4.1, Sec. 4.3).

A sample is *inside* if its noise-to-signal ratio sigma_t is finite and at most the threshold tau. All decisions are
made on the CPU, from numbers drawn there, so that no step waits for the device to know which rows to decode.
"""

from __future__ import annotations

import math

from torch import Tensor


SMALLEST_CROP = 4  # latent positions; fewer give no usable variance


# Samples -------------------------------------------------------------------------------------------------------------


def sigma_threshold_at(threshold: float, height: int, width: int, base_resolution: int) -> float:
    """tau for images of height x width pixels: given at ``base_resolution``, scaled with the side (Sec. 4.1).

    >>> sigma_threshold_at(3.0, 1024, 1024, 256)
    12.0
    >>> sigma_threshold_at(3.0, 1024, 1024, 0)  # 0 = do not scale
    3.0
    """
    return threshold * math.sqrt(height * width) / base_resolution if base_resolution else threshold


def is_inside(sigma: Tensor, threshold: float) -> Tensor:
    """Whether LPL applies to each sample: sigma_t finite and at most tau, (B,) -> bool, (B,) (Eq. 2)."""
    return sigma.isfinite() & (sigma <= threshold)


def rows_inside(sigma: Tensor, threshold: float) -> Tensor:
    """Indices of the samples that LPL applies to, (B,) -> (n,) (Eq. 2)."""
    return is_inside(sigma, threshold).nonzero().flatten()


def subset(rows: Tensor, choice: Tensor, size: int | None) -> Tensor:
    """A uniformly random subset of at most ``size`` rows, (n,) -> (m,); None = all.

    Args:
        choice: uniform random numbers, one per sample of the batch, (B,); the rows with the smallest are chosen.
    """
    return rows[choice[rows].argsort()[:size].sort().values]


# Parts of the images -------------------------------------------------------------------------------------------------


def accepted_crops(height: int, width: int, factor: int) -> list[int]:
    """The accepted sides, in pixels, of the square crops that LPL compares.

    A side is a whole number of latent positions, ``factor`` pixels each, at least SMALLEST_CROP of them. It divides
    height and width, so that the tiles cover the image.
    """
    sides = range(SMALLEST_CROP * factor, min(height, width) + 1, factor)
    return [side for side in sides if height % side == 0 and width % side == 0]


def random_window(height: int, width: int, part: int, choice: Tensor) -> tuple[int, int, int, int]:
    """A uniformly random tile of latents of height x width positions: (top, left, height, width).

    The tiles cover the latents. Where these do not divide into tiles, neighbours overlap.

    Args:
        part: the tile's side in latent positions; a shorter side of the latents is taken whole.
        choice: a uniform random number in [0, 1), ().

    >>> import torch
    >>> random_window(8, 8, 2, torch.tensor(0.4))  # the 7th of 16
    (2, 4, 2, 2)
    >>> random_window(6, 3, 4, torch.tensor(0.9))  # the last of 2
    (2, 0, 4, 3)
    """
    rows, columns = math.ceil(height / part), math.ceil(width / part)
    row, column = divmod(int(float(choice) * rows * columns), columns)
    high, wide = min(part, height), min(part, width)
    return _start(row, rows, height - high), _start(column, columns, width - wide), high, wide


def _start(number: int, count: int, last: int) -> int:
    """Where one of ``count`` evenly spaced tiles begins, of which the last begins at ``last``."""
    return round(number * last / (count - 1)) if count > 1 else 0


# Steps ---------------------------------------------------------------------------------------------------------------


def ramp(step: int, start_step: int, ramp_steps: int) -> float:
    """The factor on w at an optimizer step, counted from 0: 0 before the start, then linear up to 1 (Sec. 4.3).

    >>> [ramp(step, 2, 2) for step in range(5)], ramp(0, 0, 0)
    ([0.0, 0.0, 0.5, 1.0, 1.0], 1.0)
    """
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / ramp_steps) if ramp_steps else 1.0


def has_lpl(step: int, start_step: int, every: int) -> bool:
    """Whether an optimizer step, counted from 0, has LPL: every n-th step from the start on.

    >>> [step for step in range(8) if has_lpl(step, 1, 3)]
    [1, 4, 7]
    """
    return step >= start_step and (step - start_step) % every == 0
