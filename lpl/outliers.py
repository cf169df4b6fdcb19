"""The mask that excludes the decoder's outliers from the loss (Sec. 3.2, Sec. 8, Alg. 1).

Some decoders have small patches whose activations are orders of magnitude larger than the rest of the map. They are
found per sample and channel, on a map of H x W positions, and masked with a margin around them. ``True`` = keep.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


# Kernels are given for the full-resolution feature map of an image of this side, in pixels.
BASE_RESOLUTION = 256
CACHED_POSITIONS = 2**19  # float32 positions that fit into a CPU core's cache


@torch.no_grad()
def outlier_mask(
    features: Tensor,
    quantile: float = 0.02,
    margin: float = 2.0,
    dilation: float = 3,
    erosion: float = 5,
    stride: int = 1,
) -> Tensor:
    """The positions of a feature map that are no outliers (Alg. 1).

    Args:
        features: (B, C, H, W), any floating dtype; compared in float32.
        quantile: q_lo is the quantile at this share, q_hi the one at 1 minus this share.
        margin: standard deviations beyond those quantiles up to which a value is kept.
        dilation: kernel that grows the kept region, which removes isolated false positives.
        erosion: kernel that shrinks it again, which grows the remaining outliers. Both kernels are given for a 256 px
            image's full-resolution map and scale with the map (Sec. 4.1).
        stride: compute the quantiles from every n-th position; cheaper, and nearly exact.

    Returns:
        bool, (B, C, H, W), True = keep.

    One 3 x 3 patch of a 256 px map is an outlier; it is masked with one position more on each side of its centre:

    >>> features = torch.linspace(-1, 1, 65536).view(1, 1, 256, 256).clone()
    >>> features[..., 100:103, 30:33] = 100.0
    >>> (~outlier_mask(features)).nonzero().aminmax(dim=0)[1].tolist()
    [0, 0, 103, 33]
    """
    scale = math.sqrt(features.shape[-2] * features.shape[-1]) / BASE_RESOLUTION
    dilation, erosion = (math.ceil(kernel * scale - 1e-9) for kernel in (dilation, erosion))
    # Even kernels become odd as in Alg. 1 for 2: the dilation's by rounding down, the erosion's by rounding up.
    kernels = dilation - (dilation + 1) % 2, erosion | 1
    if features.device.type != "cpu":
        return morphology(within_bounds(features, quantile, margin, stride), *kernels)
    return _mask_by_parts(features, quantile, margin, stride, *kernels)


def _mask_by_parts(
    features: Tensor, quantile: float, margin: float, stride: int, dilation: int, erosion: int
) -> Tensor:
    """:func:`outlier_mask` on a CPU: in parts that fit into its cache, with morphology only where it has an effect."""
    mask = torch.ones(features.shape, dtype=torch.bool)
    maps, kept = features.flatten(0, 1), mask.flatten(0, 1)  # (B C, H, W)
    height, width = maps.shape[1:]
    size, reach = max(1, CACHED_POSITIONS // (height * width)), (dilation + 1) // 2
    # Fewer dropped positions do not survive the dilation, not even in a corner
    fewest = min(reach, height) * min(reach, width)
    for start in range(0, len(maps), size):
        within = within_bounds(maps[None, start : start + size], quantile, margin, stride)[0]
        dropped = height * width - np.count_nonzero(within.flatten(1).numpy(), axis=1)
        rows = [row for row, count in enumerate(dropped) if count >= fewest]
        if rows:
            kept[[start + row for row in rows]] = morphology(within[None, rows], dilation, erosion)[0]
    return mask


@torch.no_grad()
def within_bounds(features: Tensor, quantile: float = 0.02, margin: float = 2.0, stride: int = 1) -> Tensor:
    """Strictly between q_lo - margin std and q_hi + margin std of each map, (B, C, H, W) -> bool (Alg. 1)."""
    flat = features.flatten(2).float()  # (B, C, N)
    count = flat.shape[-1]
    if count == 1:
        return torch.ones_like(features, dtype=torch.bool)
    low, high = _quantiles(flat[..., ::stride], quantile)  # (B, C, 1) each
    centred = flat - flat.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(count - 1)
    constant = flat.amin(-1, keepdim=True) == flat.amax(-1, keepdim=True)  # whose std may be above 0 by rounding
    keep = ((flat > low - margin * std) & (flat < high + margin * std)) | constant
    return keep.view(features.shape)


def _quantiles(flat: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """q_lo and q_hi: the values of rank floor(q N) and floor((1 - q) N), at least 1, (B, C, N) -> two of (B, C, 1)."""
    low, high = (_rank(share, flat.shape[-1]) for share in (quantile, 1 - quantile))
    if flat.device.type != "cpu":
        return flat.kthvalue(low, dim=-1, keepdim=True).values, flat.kthvalue(high, dim=-1, keepdim=True).values
    # NumPy selects many times faster than torch, and two ranks one by one faster than at once.
    values = np.array(flat.numpy())
    values.partition(high - 1, axis=-1)
    upper = torch.from_numpy(values[..., high - 1 : high].copy())
    values = values[..., :high]
    values.partition(low - 1, axis=-1)
    return torch.from_numpy(values[..., low - 1 : low].copy()), upper


def _rank(share: float, count: int) -> int:
    """floor(share * count), at least 1; the tolerance corrects products that rounding puts below an integer."""
    return max(1, math.floor(share * count + 1e-9 * count))


def morphology(keep: Tensor, dilation: int, erosion: int) -> Tensor:
    """Dilate, then erode the kept region, bool, (B, C, H, W) (Alg. 1).

    Kernels are odd, 1 = none; positions beyond the border do not count. A square kernel is applied as a row and a
    column; comparing shifted copies of bools is many times faster than pooling.
    """
    return _spread(~_spread(keep, dilation), erosion).logical_not_()


def _spread(region: Tensor, kernel: int) -> Tensor:
    """Grow a region, bool, (B, C, H, W), by half a kernel on each side."""
    for axis in (-2, -1):
        grown, size = region.clone(), region.shape[axis]
        for shift in range(1, min(kernel // 2, size - 1) + 1):
            for there, here in ((0, shift), (shift, 0)):
                grown.narrow(axis, here, size - shift).logical_or_(region.narrow(axis, there, size - shift))
        region = grown
    return region
