"""The mask that keeps the decoder's outliers out of the loss (Sec. 3.2, Sec. 8, Alg. 1).

Some decoders carry small patches whose activations are orders of magnitude above the rest of the map. They are found
per sample and channel on a feature map of H x W positions, and left out with a margin around them. ``True`` = keep.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


# Kernels are stated for the full-resolution feature map of an image of this side, in pixels.
BASE_RESOLUTION = 256
CACHED_POSITIONS = 2**19  # of float32 maps that a CPU core's cache holds


@torch.no_grad()
def outlier_mask(
    features: Tensor, quantile: float = 0.02, margin: float = 2.0, dilation: int = 3, erosion: int = 5
) -> Tensor:
    """Where a feature map is free of outliers (Alg. 1).

    Args:
        features: (B, C, H, W), any floating dtype; compared in float32.
        quantile: the share of positions at either end that the bounds are read off.
        margin: how many standard deviations beyond those quantiles a value is still kept.
        dilation: kernel that grows the kept region, which drops lone false positives.
        erosion: kernel that shrinks it again, which grows what is left of the outliers. Both kernels are stated for
            a 256 px image's full-resolution map and scaled with the map (Sec. 4.1).

    Returns:
        bool, (B, C, H, W), True = keep.
    """
    scale = math.sqrt(features.shape[-2] * features.shape[-1]) / BASE_RESOLUTION
    dilation, erosion = math.ceil(dilation * scale), math.ceil(erosion * scale)
    # Even kernels become odd as Alg. 1 has it for 2: down for the dilation, up for the erosion.
    kernels = dilation - (dilation + 1) % 2, erosion | 1
    if features.device.type != "cpu":
        return morphology(within_bounds(features, quantile, margin), *kernels)
    return _mask_by_parts(features, quantile, margin, *kernels)


def _mask_by_parts(features: Tensor, quantile: float, margin: float, dilation: int, erosion: int) -> Tensor:
    """The same on a CPU: in parts that its cache holds, and the morphology only for maps where it changes anything."""
    mask = torch.ones(features.shape, dtype=torch.bool)
    maps, kept = features.flatten(0, 1), mask.flatten(0, 1)  # (B C, H, W)
    height, width = maps.shape[1:]
    size, reach = max(1, CACHED_POSITIONS // (height * width)), (dilation + 1) // 2
    fewest = min(reach, height) * min(reach, width)  # no fewer dropped positions, in a corner, outlive the dilation
    for start in range(0, len(maps), size):
        within = within_bounds(maps[None, start : start + size], quantile, margin)[0]
        dropped = (height * width - within.sum((1, 2))).numpy()
        rows = [row for row, count in enumerate(dropped) if count >= fewest]
        if rows:
            kept[[start + row for row in rows]] = morphology(within[None, rows], dilation, erosion)[0]
    return mask


@torch.no_grad()
def within_bounds(features: Tensor, quantile: float = 0.02, margin: float = 2.0) -> Tensor:
    """Strictly between q_lo - margin std and q_hi + margin std of each map, (B, C, H, W) -> bool (Alg. 1)."""
    flat = features.flatten(2).float()  # (B, C, N)
    count = flat.shape[-1]
    if count == 1:
        return torch.ones_like(features, dtype=torch.bool)
    low, high = _order_statistics(flat, (_rank(quantile, count), _rank(1 - quantile, count)))  # (B, C, 1) each
    std = flat.std(dim=-1, keepdim=True)
    keep = ((flat > low - margin * std) & (flat < high + margin * std)) | (std == 0)
    return keep.view(features.shape)


def _order_statistics(flat: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The values of those ranks, from 1, in each row in ascending order, (B, C, N) -> two of (B, C, 1)."""
    if flat.device.type != "cpu":
        low, high = (flat.kthvalue(rank, dim=-1, keepdim=True).values for rank in ranks)
        return low, high
    rows = flat.flatten(0, 1).numpy()
    places = [rank - 1 for rank in ranks]

    def select(part: np.ndarray) -> np.ndarray:
        return np.partition(part, places, axis=-1)[:, places]  # one pass for both, several times as fast as kthvalue

    threads = torch.get_num_threads()
    found = np.concatenate(list(_pool(threads).map(select, np.array_split(rows, threads)))) if len(rows) else rows
    low, high = (torch.from_numpy(found[:, [column]].copy()).view(*flat.shape[:2], 1) for column in (0, 1))
    return low, high


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # NumPy selects without Python's lock


def _rank(share: float, count: int) -> int:
    """floor(share * count), at least 1; what rounding took from an integer is given back."""
    return max(1, math.floor(share * count + 1e-9 * count))


def morphology(keep: Tensor, dilation: int, erosion: int) -> Tensor:
    """Dilate, then erode the kept region, bool (B, C, H, W); odd kernels, 1 = none; nothing lies beyond the border."""
    keep = keep.float()
    if dilation > 1:
        keep = F.max_pool2d(keep, dilation, stride=1, padding=dilation // 2)
    if erosion > 1:
        keep = -F.max_pool2d(-keep, erosion, stride=1, padding=erosion // 2)
    return keep.bool()
