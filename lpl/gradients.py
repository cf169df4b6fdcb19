"""How the gradients of both terms of Eq. 3 at the model's output agree, sample by sample.

Vocabulary. The gradients are those of L_diffusion and of LPL with respect to D, (B, C, h, w). They *conflict* on a
sample where their inner product is negative: to first order, a step that lowers one term there raises the other. A
sample's *noise level* is the number of the range of NOISE_LEVELS that its sigma / tau lies in.

Invariants. Samples are compared one by one, so that no result depends on how a batch is divided. A positive factor on
a gradient, such as w, changes no cosine, and scales what conflicts. Nothing waits for a GPU.

LPL's *pull* is the cosine of the step that lowers it with the one that raises the contrast of z0_hat. With a trained
denoiser, a pull above 0 went with sharper images (docs/results.md). Estimates far off pull any loss downwards.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


NOISE_LEVELS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)  # ends of the ranges of sigma / tau; an upper end belongs to its range
LEVEL_NAMES = tuple(f"{low:g}_to_{high:g}" for low, high in pairwise(NOISE_LEVELS))


def noise_level(sigma: Tensor, threshold: float) -> Tensor:
    """The noise level of each sample, (B,) -> int64, (B,); outside the threshold the last one.

    >>> noise_level(torch.tensor([0.0, 0.3, 0.31, 3.0, torch.inf]), 3.0).tolist()
    [0, 1, 2, 4, 4]
    """
    return torch.bucketize(sigma / threshold, sigma.new_tensor(NOISE_LEVELS[1:-1]))


def cosine(gradient: Tensor, other: Tensor) -> Tensor:
    """The cosine of two gradients for each sample, two of (B, C, h, w) -> (B,); NaN where one is zero.

    >>> cosine(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[-4.0, -3.0], [0.0, 0.0]])).tolist()
    [-0.9599999785423279, nan]
    """
    gradient, other = gradient.flatten(1), other.flatten(1)
    return (gradient * other).sum(1) / (gradient.norm(dim=1) * other.norm(dim=1))


def centred(latents: Tensor) -> Tensor:
    """Latents less their channels' means, (B, C, h, w): the direction in which their contrast rises.

    >>> centred(torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]]])).flatten().tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    return latents - latents.mean((2, 3), keepdim=True)


def contrast(latents: Tensor) -> Tensor:
    """Half of the squares of the centred latents, summed, (B, C, h, w) -> ()."""
    return centred(latents).square().sum() / 2


def conflict(gradient: Tensor, other: Tensor) -> Tensor:
    """The part of a gradient that is opposite to another one, two of (B, C, h, w) -> (B, C, h, w).

    It is zero for samples without a conflict. What is left of a gradient without it is orthogonal to the other one, as
    in PCGrad (Yu et al. 2020), which treats both gradients so, at the parameters.

    >>> conflict(torch.tensor([[1.0, -3.0], [1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])).tolist()
    [[-1.0, -1.0], [0.0, 0.0]]
    """
    inner = (gradient * other).flatten(1).sum(1)  # (B,)
    along = torch.where(inner < 0, inner / other.square().flatten(1).sum(1), torch.zeros_like(inner))
    return along.view(-1, *[1] * (other.ndim - 1)) * other


def summed_by_level(cosines: Tensor, levels: Tensor) -> Tensor:
    """Sums of the cosines at each noise level, and their numbers, two of (B,) -> (2, levels); NaN counts as none.

    >>> summed_by_level(torch.tensor([0.5, 0.25, torch.nan]), torch.tensor([1, 1, 0])).tolist()
    [[0.0, 0.75, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0]]
    """
    known = cosines.isfinite()
    values = torch.stack([torch.where(known, cosines, torch.zeros_like(cosines)), known.to(cosines.dtype)])
    members = levels[:, None] == torch.arange(len(LEVEL_NAMES), device=levels.device)  # (B, levels)
    return (values[:, :, None] * members).sum(1)
