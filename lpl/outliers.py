"""The mask that keeps the decoder's outliers out of the loss (Sec. 3.2, Sec. 8, Alg. 1).

Some decoders carry small patches whose activations are orders of magnitude above the rest of the map. They are found
per sample and channel on a feature map of H x W positions, and left out with a margin around them. ``True`` = keep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


# Kernels are stated for the full-resolution feature map of an image of this side, in pixels.
BASE_RESOLUTION = 256


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
    return morphology(within_bounds(features, quantile, margin), dilation - (dilation + 1) % 2, erosion | 1)


@torch.no_grad()
def within_bounds(features: Tensor, quantile: float = 0.02, margin: float = 2.0) -> Tensor:
    """Strictly between q_lo - margin std and q_hi + margin std of each map, (B, C, H, W) -> bool (Alg. 1)."""
    flat = features.flatten(2).float()  # (B, C, N)
    count = flat.shape[-1]
    if count == 1:
        return torch.ones_like(features, dtype=torch.bool)
    low = flat.kthvalue(_rank(quantile, count), dim=-1, keepdim=True).values  # (B, C, 1)
    high = flat.kthvalue(_rank(1 - quantile, count), dim=-1, keepdim=True).values
    std = flat.std(dim=-1, keepdim=True)
    keep = ((flat > low - margin * std) & (flat < high + margin * std)) | (std == 0)
    return keep.view(features.shape)


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
