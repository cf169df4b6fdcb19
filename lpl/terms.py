"""One block's term of Eq. 2 and its gradient with respect to the predicted features, both in closed form.

Vocabulary. ``predicted`` is phi_hat_l, ``target`` phi_l, (B, C, H, W); a *map* is one channel of one sample, N = H W
positions, of which its mask keeps K. mu and V are mean and biased variance of phi_hat over the kept positions, and
v = V + e. With d = phi_hat - phi over the kept positions, a map's value L and its gradient are

    shared, l2      L = sum d^2 / (K v)            dL = 2 / (K v) * (d - L (phi_hat - mu))
    shared, l1      L = sum |d| / (K sqrt(v))      dL = 1 / (K sqrt(v)) * (sign d - L / sqrt(v) * (phi_hat - mu))
    none, l2        L = sum d^2 / K                dL = 2 / K * d
    none, l1        L = sum |d| / K                dL = 1 / K * sign d

The terms in phi_hat - mu are the gradient through the statistics, absent with ``detach_statistics``. For
``separate``, d is the difference of two standardised maps, and the gradient passes through the standardisation.

Autograd would keep several copies of full-resolution features for the backward pass. Here the gradient is computed
together with the value, in the target's memory, and nothing else is kept. Maps are processed a few at a time, as many
as fit into a cache; those of the reference variant, whose norm is over channels, all at once.

Invariants. Maps are float32 (float64 for float64 features) whatever the decoder's precision. A non-finite value makes
the term of its own sample NaN, and no other. Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lpl.objectives import at_least_float32
from lpl.outliers import CACHED_POSITIONS, morphology, within_bounds


# Factor on the gradient, which keeps it in float16's range in the decoder; a power of two, so that no digit changes.
GRADIENT_SCALE = 2.0**16
POSITIONS_AT_ONCE = {"cpu": CACHED_POSITIONS}
POSITIONS_AT_ONCE_ON_GPU = 2**26  # enough maps for the quantiles to keep a GPU busy
VALUES_AT_ONCE_ON_GPU = 2**24  # likewise for sums, which need several copies of their part in float32

Mask = Callable[[Tensor], Tensor]  # (B, C, H, W) -> bool of that shape, True = keep


@torch.no_grad()
def block_term(
    predicted: Tensor,
    target: Tensor,
    mask: Mask | None = None,
    normalization: str = "shared",
    distance: str = "l2",
    detach_statistics: bool = False,
    weight: float = 1.0,
    form_gradient: bool = True,
    region: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One block's term and the share of positions that the masks keep, (B,) each (Eq. 2, Sec. 3.2).

    Args:
        predicted, target: features, (B, C, H, W). ``target`` must be contiguous; with ``form_gradient`` it is
            overwritten by GRADIENT_SCALE times the gradient with respect to ``predicted``.
        weight: omega_l.
        region: of a loss mask, bool, (B, 1, H, W); no other position is kept.

    By hand: two positions, both off by one. The prediction's variance is 1, so e = 1e-4, and L = 1 / (1 + e).

    >>> predicted, target = torch.tensor([[[[-1.0, 1.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    >>> term, kept = block_term(predicted, target)
    >>> round(term.item(), 4), kept.item()
    (0.9999, 1.0)

    The gradient is 2 / (K v) = 1 times d = -1, less L = 1 times (-1, 1):

    >>> [round(value, 3) + 0.0 for value in (target / GRADIENT_SCALE).flatten().tolist()]
    [0.0, -2.0]
    """
    assert target.is_contiguous(), "the gradient is written into it"
    (batch, channels), side = predicted.shape[:2], predicted.shape[2:]
    phi_hat, phi = (x.contiguous().view(batch * channels, -1) for x in (predicted, target))  # (B C, N)
    maps, count = phi_hat.shape
    dtype = torch.promote_types(phi_hat.dtype, torch.float32)
    shared, separate, squared = normalization == "shared", normalization == "separate", distance == "l2"

    # Masks and statistics
    masks: dict[int, Tensor] = {}  # by the index of a part's first map
    kept, mean, variance, target_mean, target_variance = (
        torch.full((maps, 1), value, dtype=dtype, device=phi.device) for value in (count, 0, 0, 0, 0)
    )
    for part in _parts(maps, count, phi.device):
        x = phi_hat[part].to(dtype)
        keep = None if mask is None else mask(x.view(1, -1, *side)).view(x.shape)
        if region is not None:
            inside = _rows_of(region, part, channels)
            keep = inside if keep is None else keep & inside
        if keep is not None:
            kept[part] = keep.sum(-1, keepdim=True).to(dtype)
            if x.device.type != "cpu" or not keep.all():  # keep.all() would wait for a GPU
                masks[part.start] = keep
        keep = masks.get(part.start)
        if shared or separate:
            mean[part], variance[part] = _moments(x, keep, kept[part])
        if separate:
            target_mean[part], target_variance[part] = _moments(phi[part].to(dtype), keep, kept[part])
    positions = kept.clamp(min=1)  # K
    spread, target_spread = (  # sqrt(v); e is relative to the block's mean variance, and has no gradient
        (v + 1e-4 * v.view(batch, channels).mean(1).repeat_interleave(channels)[:, None] + 1e-12).sqrt()
        for v in (variance, target_variance)
    )

    # Values and gradients
    # A single position has no variance
    counts = torch.ones_like(kept) if normalization == "none" else (kept >= 2).to(dtype)
    value = torch.empty_like(kept)
    for part, keep in _smaller_parts(_parts(maps, count, phi.device), masks, count, phi.device):
        x, y, mu, s, k = phi_hat[part].to(dtype), phi[part].to(dtype), mean[part], spread[part], positions[part]
        if separate:
            x = _only(keep, (x - mu) / s)
            y = (y - target_mean[part]) / target_spread[part]
        d = _only(keep, x - y)
        total = _sum_of_squares(d) if squared else torch.linalg.vector_norm(d, 1, dim=-1, keepdim=True)
        unit = 1.0 if not shared else s.square() if squared else s
        value[part] = average = total / (k * unit)
        if not form_gradient:
            continue
        gradient = d if squared else d.sign_()
        factor = (2.0 if squared else 1.0) / (k * unit)
        if shared and not detach_statistics:
            gradient.sub_(_only(keep, x - mu).mul_(average if squared else average / s))
        if separate:
            factor = factor / s
            if not detach_statistics:
                through_mean, through_variance = (z.sum(-1, keepdim=True) / k for z in (gradient, gradient * x))
                gradient = _only(keep, gradient - through_mean - x * through_variance)
        gradient.mul_(factor * counts[part] * (weight / channels * GRADIENT_SCALE))
        phi[part] = _within_range(gradient, phi.dtype)
    term = (value * counts).view(batch, channels).mean(1) * weight
    return term, kept.view(batch, channels).mean(1) / count


@torch.no_grad()
def reference_block_term(
    predicted: Tensor,
    target: Tensor,
    index: int,
    weight: float = 1.0,
    form_gradient: bool = True,
    region: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One block's term as in diffusers' LPL research project, with its depth weight; see :func:`block_term`.

    From the third block on, the mask is the *target's*, with kernels that do not scale with the resolution. Each
    position is divided by the norm of the target's channels there.

    Args:
        index: of the decoder's block, 0 = mid.
    """
    phi_hat, phi = at_least_float32(predicted), at_least_float32(target)
    if index < 2:
        mask = torch.ones_like(phi)
    else:
        dilation, erosion = (1, 3) if index == 2 else (3, 5)
        mask = morphology(within_bounds(phi), dilation, erosion).to(phi.dtype)
    if region is not None:
        mask = mask * region
    kept = mask.sum((2, 3), keepdim=True)  # (B, C, 1, 1)
    phi = mask * phi
    norm = phi.square().sum(1, keepdim=True).sqrt() + 1e-6  # (B, 1, H, W)
    difference = mask * (phi_hat - phi) / norm
    weight = weight * 2.0 ** -min(index, 3)
    value = difference.square().sum((2, 3), keepdim=True) / kept.clamp(min=1)
    if form_gradient:
        factor = 2.0 * weight / phi.shape[1] * GRADIENT_SCALE
        target.copy_(_within_range(difference / norm * (factor / kept.clamp(min=1)), target.dtype))
    return value.mean((1, 2, 3)) * weight, mask.mean((1, 2, 3))


def _rows_of(region: Tensor, part: slice, channels: int) -> Tensor:
    """The region of each map of a part, (B, 1, H, W) -> (maps, N); a map's sample is its number // channels."""
    samples = torch.arange(part.start, part.stop, device=region.device) // channels
    return region.flatten(1)[samples]


def _within_range(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp to float16's range, which the gradient of a nearly dead channel may exceed."""
    largest = torch.finfo(dtype).max
    return gradient.clamp_(-largest, largest) if dtype == torch.float16 else gradient


def _parts(maps: int, count: int, device: torch.device) -> Iterator[slice]:
    """Slices of maps that are processed together."""
    size = max(1, POSITIONS_AT_ONCE.get(device.type, POSITIONS_AT_ONCE_ON_GPU) // count)
    for start in range(0, maps, size):
        yield slice(start, min(start + size, maps))


def _smaller_parts(
    parts: Iterable[slice], masks: Mapping[int, Tensor], count: int, device: torch.device
) -> Iterator[tuple[slice, Tensor | None]]:
    """The same maps, fewer at a time on a GPU, and the mask of each part."""
    size = max(1, POSITIONS_AT_ONCE.get(device.type, VALUES_AT_ONCE_ON_GPU) // count)
    for part in parts:
        keep = masks.get(part.start)
        for start in range(part.start, part.stop, size):
            smaller = slice(start, min(start + size, part.stop))
            inside = slice(smaller.start - part.start, smaller.stop - part.start)
            yield smaller, None if keep is None else keep[inside]


def _only(keep: Tensor | None, x: Tensor) -> Tensor:
    """Set masked positions to 0; non-finite ones become NaN."""
    return x if keep is None else x * keep


def _moments(x: Tensor, keep: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each map's kept positions, (maps, N) -> two of (maps, 1); 0 if none is kept."""
    positions = kept.clamp(min=1)
    mean = _only(keep, x).sum(-1, keepdim=True) / positions
    return mean, _sum_of_squares(_only(keep, x - mean)) / positions


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
