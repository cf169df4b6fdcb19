"""The latent perceptual loss (Eq. 2): how far two latents are apart as the VAE's decoder sees them.

Vocabulary. ``latents`` is z0 and ``predicted_latents`` its estimate z0_hat, both scaled, (B, C, h, w). ``target`` and
``predicted`` are their decoder features phi_l and phi_hat_l at one block, (B, C_l, H_l, W_l); ``mask`` is rho_l, True
= keep; ``depth_weight`` is omega_l.

Per sample b::

    LPL_b = sum_l omega_l * mean_c [ sum_hw rho * (phi' - phi_hat')^2 / max(1, sum_hw rho) ]

Invariants. One number per sample, independent of the batch's other samples; the caller gates and reduces. Differences
and statistics are float32 (float64 for a float64 VAE). The gradient reaches the prediction only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.autoencoders import RGB, block_names
from lpl.features import DecoderFeatureExtractor
from lpl.objectives import at_least_float32
from lpl.outliers import morphology, outlier_mask, within_bounds


NORMALIZATIONS = ("shared", "separate", "none")
DEPTH_WEIGHTINGS = ("inverse", "exponential", "uniform")
DISTANCES = ("l2", "l1")
VARIANTS = ("paper", "reference")


class LatentPerceptualLoss:
    """``loss_fn(predicted_latents, latents) -> (B,)`` (Eq. 2).

    Args:
        vae: any supported diffusers autoencoder; used as it is, in its own dtype, and left as it was.
        blocks: decoder blocks to compare, e.g. ``("mid", "up_0")``; None = mid and every up block; ``("rgb",)`` alone
            = decoded pixels, the ablation of Sec. 4.3.
        normalization: "shared": both sides standardised by the prediction's statistics; "separate": each by its own;
            "none" (Sec. 3.2, Sec. 4.3).
        detach_statistics: no gradient through those statistics. Eq. 2 as written has it flow.
        depth_weighting: omega_l by the side r_l of block l's map: "inverse" r_1 / r_l (Sec. 3.2's text), "exponential"
            2^(-r_l / r_1) (its formula as printed), "uniform", or one number per block.
        mask_outliers: leave out outliers of the predicted features (Sec. 8).
        distance: "l2", squared differences, or "l1", absolute ones.
        variant: "reference" gives the numbers of the authors' released code instead; no other option goes with it but
            ``blocks`` and ``gradient_checkpointing``.
        gradient_checkpointing: recompute each block in the backward pass, to save memory.

    Raises:
        ValueError: for options that are unknown or exclude one another, and blocks that the decoder has not.
    """

    def __init__(
        self,
        vae: nn.Module,
        blocks: Sequence[str] | None = None,
        normalization: str = "shared",
        detach_statistics: bool = False,
        depth_weighting: str | Sequence[float] = "inverse",
        mask_outliers: bool = True,
        distance: str = "l2",
        variant: str = "paper",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.vae = vae
        self.extractor = DecoderFeatureExtractor(vae, blocks, gradient_checkpointing)
        self.block_names = self.extractor.block_names
        check_options(
            normalization, detach_statistics, depth_weighting, mask_outliers, distance, variant, self.block_names
        )
        self.normalization = normalization
        self.detach_statistics = detach_statistics
        if not isinstance(depth_weighting, str):  # given in the order of ``blocks``, used in the decoder's
            by_name = dict(zip(blocks or self.block_names, depth_weighting))
            depth_weighting = [by_name[name] for name in self.block_names]
        self.depth_weighting = depth_weighting
        self.mask_outliers = mask_outliers
        self.distance = distance
        self.variant = variant
        self.gradient_checkpointing = gradient_checkpointing

    def __call__(self, predicted_latents: Tensor, latents: Tensor) -> Tensor:
        """LPL_b, (B,), for scaled latents, both (B, C, h, w) (Eq. 2).

        Raises:
            ValueError: where the two shapes differ or are not (B, C, h, w).
        """
        self._check_latents(predicted_latents, latents)
        if len(latents) == 0:  # no sample was inside the threshold
            return at_least_float32(predicted_latents).flatten(1).sum(1)
        with torch.no_grad():
            target = self.extractor(latents)
        predicted = self.extractor(predicted_latents)

        first_side = math.sqrt(
            latents.shape[-2] * latents.shape[-1]
        )  # r_1: the first block works on the latent's grid
        terms = []
        for index, name in enumerate(self.block_names):
            if self.variant == "reference":
                term = partial(reference_block_loss, index=self._depth(name))
                weight = 1 / len(self.block_names)
            else:
                term = self.block_loss
                side = math.sqrt(target[name].shape[-2] * target[name].shape[-1])  # r_l
                weight = depth_weight(self.depth_weighting, side / first_side, index)
            terms.append(weight * self._maybe_checkpoint(term, predicted[name], target[name]))  # (B,)
        return torch.stack(terms).sum(0)

    def block_loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """One block's term of Eq. 2 without its depth weight, (B, C, H, W) twice -> (B,)."""
        predicted, target = at_least_float32(predicted), at_least_float32(target)
        mask = outlier_mask(predicted) if self.mask_outliers else torch.ones_like(predicted, dtype=torch.bool)
        mask = mask.to(predicted.dtype)
        kept = mask.sum((2, 3), keepdim=True)  # (B, C, 1, 1)
        measure = torch.abs if self.distance == "l1" else torch.square

        if self.normalization == "separate":
            predicted, target = (self._standardise(x, mask, kept) for x in (predicted, target))
        distance = masked_mean(measure(target - predicted), mask, kept)
        if self.normalization == "shared":  # the means cancel: only the difference is divided by the deviation
            _, variance = self._statistics(predicted, mask, kept)
            distance = distance / (variance.sqrt() if self.distance == "l1" else variance)
        if self.normalization != "none":
            distance = distance * (kept >= 2)  # the variance of a single position says nothing
        return distance.mean(1).view(-1)  # (B, C, 1, 1) -> (B,)

    def _statistics(self, features: Tensor, mask: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance + e of the kept positions, (B, C, 1, 1) each.

        e = 1e-4 * mean over channels of the variance, without gradient, + 1e-12: relative to the block's scale, so
        that a dead channel cannot dominate.
        """
        if self.detach_statistics:
            features = features.detach()
        mean = masked_mean(features, mask, kept)
        variance = masked_mean((features - mean).square(), mask, kept)
        return mean, variance + (1e-4 * variance.detach().mean(1, keepdim=True) + 1e-12)

    def _standardise(self, features: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        mean, variance = self._statistics(features, mask, kept)
        return (features - mean) / variance.sqrt()

    def _maybe_checkpoint(self, term: partial | object, predicted: Tensor, target: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(term, predicted, target, use_reentrant=False)
        return term(predicted, target)

    def _depth(self, name: str) -> int:
        """The block's place in the whole decoder, 0 = mid."""
        return block_names(self.vae.config).index(name)

    def _check_latents(self, predicted_latents: Tensor, latents: Tensor) -> None:
        if predicted_latents.shape != latents.shape:
            raise ValueError(
                "predicted_latents and latents must have one shape, but have "
                f"{tuple(predicted_latents.shape)} and {tuple(latents.shape)}"
            )


def check_options(
    normalization: str,
    detach_statistics: bool,
    depth_weighting: str | Sequence[float],
    mask_outliers: bool,
    distance: str,
    variant: str,
    blocks: Sequence[str] | None,
) -> None:
    """Refuse loss options that are unknown or exclude one another, before any model is at hand.

    Args:
        blocks: the selected blocks; None where they are not known yet.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    for flag, value, accepted in (
        ("--lpl_normalization", normalization, NORMALIZATIONS),
        ("--lpl_distance", distance, DISTANCES),
        ("--lpl_variant", variant, VARIANTS),
    ):
        if value not in accepted:
            raise ValueError(f"{flag} {value}: accepted are {', '.join(accepted)}")
    if isinstance(depth_weighting, str):
        if depth_weighting not in DEPTH_WEIGHTINGS:
            raise ValueError(
                f"--lpl_depth_weighting {depth_weighting}: accepted are {', '.join(DEPTH_WEIGHTINGS)}, "
                "or one number per block"
            )
    elif len(depth_weighting) != len(blocks or depth_weighting) or not all(0 <= w < math.inf for w in depth_weighting):
        raise ValueError(
            f"--lpl_depth_weighting {list(depth_weighting)}: {len(blocks or depth_weighting)} finite numbers of 0 or "
            "more are needed, one per selected block"
        )
    if normalization == "none" and detach_statistics:
        raise ValueError("--lpl_detach_statistics has no effect with --lpl_normalization none; leave one out")
    if variant == "reference":
        if RGB in (blocks or ()):
            raise ValueError(
                f"--lpl_variant reference compares decoder blocks; choose others than {RGB} in --lpl_blocks"
            )
        given = {
            "normalization": normalization != "shared",
            "detach_statistics": detach_statistics,
            "depth_weighting": depth_weighting != "inverse",
            "mask_outliers": not mask_outliers,
            "distance": distance != "l2",
        }
        if any(given.values()):
            raise ValueError(
                f"--lpl_variant reference goes without {', '.join(name for name in given if given[name])}: it fixes "
                "all options of the loss; leave them out, or use --lpl_variant paper"
            )


def depth_weight(weighting: str | Sequence[float], relative_side: float, index: int) -> float:
    """omega_l for a block whose map is ``relative_side`` = r_l / r_1 times as wide as the first block's (Sec. 3.2).

    >>> depth_weight("inverse", 4.0, 2), depth_weight("exponential", 4.0, 2), depth_weight([1.0, 0.5, 0.2], 4.0, 2)
    (0.25, 0.0625, 0.2)
    """
    if not isinstance(weighting, str):
        return float(weighting[index])
    return {"inverse": 1 / relative_side, "exponential": 2**-relative_side, "uniform": 1.0}[weighting]


def masked_mean(x: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """Mean over the kept positions of each map, (B, C, H, W) -> (B, C, 1, 1); 0 where none is kept."""
    return (x * mask).sum((2, 3), keepdim=True) / kept.clamp(min=1)


def reference_block_loss(predicted: Tensor, target: Tensor, index: int) -> Tensor:
    """One block's term as in the authors' released code, with its own depth weight, (B, C, H, W) twice -> (B,).

    The mask is the *target's*, from the third block on, with kernels that do not follow the resolution; each position
    is divided by the norm of the target's channels there. ``index`` counts the decoder's blocks, 0 = mid.
    """
    predicted, target = at_least_float32(predicted), at_least_float32(target)
    if index < 2:
        mask = torch.ones_like(target)
    else:
        dilation, erosion = (1, 3) if index == 2 else (3, 5)
        mask = morphology(within_bounds(target), dilation, erosion).to(target.dtype)
    target = mask * target
    norm = target.square().sum(1, keepdim=True).sqrt() + 1e-6  # (B, 1, H, W)
    distance = masked_mean(((predicted - target) / norm).square(), mask, mask.sum((2, 3), keepdim=True))
    return 2.0 ** -min(index, 3) * distance.mean(1).view(-1)
