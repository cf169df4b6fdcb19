"""The latent perceptual loss (Eq. 2): the distance of two latents in the features of the VAE's decoder.

Vocabulary. ``latents`` is z0 and ``predicted_latents`` its estimate z0_hat, both scaled, (B, C, h, w). ``target`` and
``predicted`` are their decoder features phi_l and phi_hat_l at one block, (B, C_l, H_l, W_l); ``mask`` is rho_l, True
= keep; ``depth_weight`` is omega_l.

Per sample b::

    LPL_b = sum_l omega_l * mean_c [ sum_hw rho * (phi' - phi_hat')^2 / max(1, sum_hw rho) ]

The decoder runs twice, up to the last compared block: on ``latents`` without gradient, then on ``predicted_latents``
with gradient. In the second pass, each block's term and its gradient in closed form (``lpl/terms.py``) are computed as
soon as its features exist; the decoder's backward pass follows immediately.

Invariants. One value per sample, independent of the other samples of the batch; the caller gates and reduces.
Differences and statistics are float32 (float64 for a float64 VAE). Only the prediction receives a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpl.autoencoders import decoder_levels, downscaling_factor, exact_precision, without_weights
from lpl.features import DecoderFeatureExtractor
from lpl.footprint import Footprint, footprint
from lpl.masking import LossMask
from lpl.objectives import at_least_float32
from lpl.options import MASK_DEFAULTS, check_mask_and_chunks, check_options
from lpl.outliers import outlier_mask
from lpl.terms import GRADIENT_SCALE, block_term, reference_block_term


MEMORY = 2 * 2**30  # bytes that one call may take for its samples together, unless one sample takes more
LARGEST_TENSOR = 2**31 - 1  # elements; operators of GPUs index larger ones wrongly or not at all
LARGEST_IN_FLOAT16 = 64.0  # of the gradients at the start of the decoder's backward pass, which sums them
MARGIN = 8  # latent positions decoded around a window, so that convolutions see its surroundings


class LatentPerceptualLoss:
    """``loss_fn(predicted_latents, latents) -> (B,)`` (Eq. 2).

    Args:
        vae: any supported diffusers autoencoder; used in its own dtype and left unchanged.
        blocks: decoder blocks to compare, e.g. ``("mid", "up_0")``; None = mid and every up block; ``("rgb",)`` =
            decoded pixels, the ablation of Sec. 4.3.
        normalization: "shared": both features standardised by the prediction's statistics; "separate": each by its
            own; "none" (Sec. 3.2, Sec. 4.3).
        detach_statistics: stop the gradient through those statistics; in Eq. 2 as written it flows.
        depth_weighting: omega_l by the side r_l of block l's map: "inverse" r_1 / r_l (Sec. 3.2's text), "exponential"
            2^(-r_l / r_1) (its formula as printed), "uniform", or one number per block.
        mask_outliers: exclude outliers of the predicted features (Sec. 8).
        distance: "l2", squared differences, or "l1", absolute ones.
        variant: "reference" gives the values of diffusers' LPL research project; it accepts no options of the loss
            but ``blocks`` and ``gradient_checkpointing``.
        gradient_checkpointing: recompute each resnet in the backward pass, to save memory.
        outliers: parameters of the masks, see :func:`outlier_mask`.
        compile_for: compile the decoder, see :class:`lpl.features.DecoderFeatureExtractor`.
        chunk_size: number of samples decoded at a time; fewer need less memory. None = as many as MEMORY allows (at
            least one), see :func:`lpl.footprint.footprint`. No tensor ever has 2^31 elements or more, unless that of a
            single sample has.

    After a call, ``last`` holds the measurements of each block (:class:`Measured`).

    Raises:
        ValueError: for options that are unknown or mutually exclusive, and for blocks that the decoder lacks.
    """

    def __init__(
        self,
        vae: ModelMixin,
        blocks: Sequence[str] | None = None,
        normalization: str = "shared",
        detach_statistics: bool = False,
        depth_weighting: str | Sequence[float] = "inverse",
        mask_outliers: bool = True,
        distance: str = "l2",
        variant: str = "paper",
        gradient_checkpointing: bool = False,
        outliers: Mapping[str, float] | None = None,
        chunk_size: int | None = None,
        compile_for: int | None = None,
    ) -> None:
        blocks = (blocks,) if isinstance(blocks, str) else blocks
        self.vae = vae
        self.extractor = DecoderFeatureExtractor(vae, blocks, gradient_checkpointing, compile_for)
        self.block_names = self.extractor.block_names
        check_options(
            normalization, detach_statistics, depth_weighting, mask_outliers, distance, variant, self.block_names
        )
        check_mask_and_chunks(outliers or {}, mask_outliers, variant, chunk_size)
        self.normalization = normalization
        self.detach_statistics = detach_statistics
        self.depth_weighting: str | dict[str, float]
        if isinstance(depth_weighting, str):
            self.depth_weighting = depth_weighting
        else:  # in the order of ``blocks``
            self.depth_weighting = dict(zip(blocks or self.block_names, depth_weighting))
        self.mask_outliers = mask_outliers
        self.distance = distance
        self.variant = variant
        self.outliers = dict(outliers or {})
        self.chunk_size = chunk_size
        self.last = Measured()
        self._footprints: dict[Any, Footprint | None] = {}  # of one sample, by what it depends on

    def __call__(
        self,
        predicted_latents: Tensor,
        latents: Tensor,
        window: tuple[int, int, int, int] | None = None,
        mask: LossMask | None = None,
    ) -> Tensor:
        """Scaled latents, two of (B, C, h, w) -> LPL_b, (B,) (Eq. 2).

        The gradient with respect to ``predicted_latents``, if required, is computed here; the backward pass only
        scales it. No activations of the decoder are kept until then.

        Args:
            window: (top, left, height, width) in latent positions: compare only this part of the image, and decode
                only it and MARGIN positions around it.
            mask: of the whole images, at their pixels: compare only where it is white, see :mod:`lpl.masking`.

        Raises:
            ValueError: if the shapes differ or are not (B, C, h, w), the window exceeds them, or there is not one mask
                per sample.
        """
        self._check_latents(predicted_latents, latents, window, mask)
        self.last = Measured()
        if len(latents) == 0:  # no sample was inside the threshold
            return at_least_float32(predicted_latents).flatten(1).sum(1)
        wanted = torch.is_grad_enabled() and predicted_latents.requires_grad
        size = self.samples_at_once(latents, window, wanted)
        if self.extractor.compile_for and size < len(latents):
            size = 2 ** (size.bit_length() - 1)  # which needs no padding
        if mask is not None and window is not None:
            mask = mask.within(window, latents.shape[-2:])
        starts = range(0, len(latents), size)
        masks = [mask and mask.rows(slice(start, start + size)) for start in starts]
        chunks = zip(predicted_latents.detach().split(size), latents.detach().split(size), masks)
        compared = [self._compare(*chunk, window, wanted) for chunk in chunks]
        values, gradients, measured = zip(*compared)
        self.last = Measured.joined(measured)
        value = torch.cat(values)
        return Formed.apply(predicted_latents, value, torch.cat(gradients)) if wanted else value

    @property
    def options(self) -> dict[str, Any]:
        """What decides the loss's values, as JSON can hold it."""
        weighting, blocks = self.depth_weighting, self.block_names
        return {
            "blocks": list(blocks),
            "normalization": self.normalization,
            "detach_statistics": self.detach_statistics,
            "depth_weighting": weighting if isinstance(weighting, str) else [weighting[name] for name in blocks],
            "mask_outliers": self.mask_outliers,
            "distance": self.distance,
            "variant": self.variant,
            "outliers": self.outliers,
        }

    def samples_at_once(
        self, latents: Tensor, window: tuple[int, int, int, int] | None = None, form_gradient: bool = True
    ) -> int:
        """How many samples are decoded at a time: ``chunk_size``, or as many as MEMORY allows; and LARGEST_TENSOR.

        Args:
            latents: scaled latents, (B, C, h, w).
            window: see ``__call__``.
            form_gradient: whether the gradient is computed, which takes most of the memory.
        """
        most = min(self.chunk_size or len(latents), len(latents))
        decoded = latents[with_margin(window, latents.shape[-2:])[0]].shape
        if most == 1 or most * math.prod(decoded[-2:]) * self._most_per_position() <= MEMORY:
            return most
        one = self._footprint(decoded[1:], latents.dtype, form_gradient)
        if one is None:
            return most if self.chunk_size else 1
        fitting = most if self.chunk_size else MEMORY // one.peak
        return max(1, min(most, fitting, LARGEST_TENSOR // one.largest))

    def _most_per_position(self) -> float:
        """Bytes per latent position that no call exceeds: as if each module kept two maps, the widest, in float64.

        Infinite for a VAE whose size of a position is not known.
        """
        modules = list(getattr(self.vae, "decoder", self.vae).modules())
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        widest = max((max(weight.shape[:2]) for weight in weights if weight.ndim > 3), default=1)
        try:
            return 16 * len(modules) * widest * downscaling_factor(self.vae.config) ** 2
        except ValueError:
            return math.inf

    def _footprint(self, shape: Sequence[int], dtype: torch.dtype, form_gradient: bool) -> Footprint | None:
        """The memory of a call for one sample, (C, h, w); None for a decoder that reads values, which meta lacks."""
        key = (*shape, dtype, form_gradient, self.vae.dtype)
        if key not in self._footprints:
            twin = copy(self)
            twin.vae = vae = without_weights(self.vae)
            twin.extractor = DecoderFeatureExtractor(vae, self.block_names, self.extractor.gradient_checkpointing)
            latents, predicted = (torch.empty(1, *shape, dtype=dtype, device="meta") for _ in range(2))
            given = [predicted, latents, *vae.parameters(), *vae.buffers()]
            self._footprints[key] = None
            with suppress(RuntimeError):
                run = partial(twin._compare, predicted, latents, None, None, form_gradient)
                self._footprints[key] = footprint(run, given)
        return self._footprints[key]

    def _compare(
        self,
        predicted_latents: Tensor,
        latents: Tensor,
        mask: LossMask | None,
        window: tuple[int, int, int, int] | None,
        wanted: bool,
    ) -> tuple[Tensor, Tensor | None, Measured]:
        """LPL_b, (B,), and its gradient, (B, C, h, w), for samples that are decoded together (Eq. 2).

        Args:
            mask: of the window.
        """
        decoded, inner = with_margin(window, latents.shape[-2:])
        with torch.no_grad():
            target = unshared(self.extractor(latents[decoded]))
        predicted_latents = at_least_float32(predicted_latents).requires_grad_(wanted)
        measured, seeds, gradients = Measured(), [], []

        def compare(name: str, predicted: Tensor) -> None:
            features = target.pop(name)
            measured.terms[name], measured.kept[name] = self._term(
                name, predicted.detach(), features, mask, inner, wanted
            )
            if wanted:
                gradients.append(features)  # overwritten by the gradient
                seeds.append(_Given.apply(predicted, [features]))

        with torch.set_grad_enabled(wanted):
            self.extractor.visit(predicted_latents[decoded], compare)
        value = torch.stack(list(measured.terms.values())).sum(0)
        if not wanted:
            return value, None, measured
        scale = into_range(gradients) * GRADIENT_SCALE
        gradients.clear()  # the backward pass frees them one by one
        with exact_precision(latents.device):
            (gradient,) = torch.autograd.grad(seeds, predicted_latents)
        return value, gradient / scale, measured

    def _term(
        self,
        name: str,
        predicted: Tensor,
        target: Tensor,
        mask: LossMask | None,
        inner: Window | None,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        """A block's weighted term and kept share, (B,) each (Eq. 2); ``target`` becomes the gradient if ``wanted``."""
        part, outliers, place = target, self.outliers, None
        assert self.extractor.first_shape is not None, "the decoder has run"
        relative_side = math.sqrt(math.prod(target.shape[-2:]) / math.prod(self.extractor.first_shape))  # r_l / r_1
        if inner is not None:  # the margin is decoded, but not compared
            place = inner.on(target.shape[-2:])
            predicted, part = predicted[place], target[place].clone(memory_format=torch.contiguous_format)
            settings = {**MASK_DEFAULTS, **outliers}
            outliers = settings | {kernel: settings[kernel] * inner.side for kernel in ("dilation", "erosion")}
        if self.variant == "reference":
            index = list(decoder_levels(self.vae)).index(name)
            term = partial(reference_block_term, index=index, weight=1 / len(self.block_names), form_gradient=wanted)
        else:
            term = partial(
                block_term,
                mask=partial(outlier_mask, **outliers) if self.mask_outliers else None,
                normalization=self.normalization,
                distance=self.distance,
                detach_statistics=self.detach_statistics,
                weight=depth_weight(self.depth_weighting, relative_side, name),
                form_gradient=wanted,
            )
        result = term(predicted, part) if mask is None else masked_term(term, predicted, part, mask)
        if place is not None and wanted:
            target.zero_()[place] = part
        return result

    def _check_latents(
        self,
        predicted_latents: Tensor,
        latents: Tensor,
        window: tuple[int, int, int, int] | None,
        mask: LossMask | None,
    ) -> None:
        self.extractor.check_latents(latents)
        if predicted_latents.shape != latents.shape:
            raise ValueError(
                "predicted_latents and latents must have one shape, but have "
                f"{tuple(predicted_latents.shape)} and {tuple(latents.shape)}"
            )
        if mask is not None and mask.pixels.shape[:2] != (len(latents), 1):
            raise ValueError(
                f"the mask must be (B, 1, H, W) with B = {len(latents)}, but is {tuple(mask.pixels.shape)}"
            )
        if window is not None:
            top, left, height, width = window
            rows, columns = latents.shape[-2:]
            if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
                raise ValueError(f"window {window} is not inside latents of {rows} x {columns} positions")


def masked_term(
    term: Callable[..., tuple[Tensor, Tensor]], predicted: Tensor, target: Tensor, mask: LossMask
) -> tuple[Tensor, Tensor]:
    """A block's term under a loss mask, and the share of positions that the outlier mask and it keep, (B,) each.

    Args:
        term: :func:`block_term` with its options; ``target`` becomes the gradient if it forms one.
    """
    region, share = mask.region(target.shape[-2:]), mask.unmasked_weight
    if share == 0:
        return term(predicted, target, region=region)
    of_whole = target.clone()
    whole, _ = term(predicted, of_whole)
    value, kept = term(predicted, target, region=region)
    target.lerp_(of_whole, share)
    return value.lerp(whole, share), kept


class _Given(torch.autograd.Function):
    """A scalar with a known gradient with respect to the features, in ``memory``; released when it is used."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, memory: list[Tensor]) -> Tensor:
        ctx.memory = memory
        return predicted.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.memory.pop(), None


class Formed(torch.autograd.Function):
    """A value, (B,), with a known gradient with respect to the latents, (B, C, h, w)."""

    @staticmethod
    def forward(ctx: Any, predicted_latents: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, outer: Tensor
    ) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.view(-1, 1, 1, 1), None, None


@dataclass
class Measured:
    """The measurements of one call by block, on the latents' device and without gradient, for the log."""

    terms: dict[str, Tensor] = field(default_factory=dict)  # {name: (B,)}, with the depth weight; they sum to LPL_b
    kept: dict[str, Tensor] = field(default_factory=dict)  # {name: (B,)}, the share of positions that the masks keep

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """The measurements of a batch from those of its chunks."""
        return cls(
            *(
                {name: torch.cat([found[name] for found in kind]) for name in kind[0]}
                for kind in ([part.terms for part in parts], [part.kept for part in parts])
            )
        )


@dataclass(frozen=True)
class Window:
    """A part of the decoded latents, in latent positions.

    ``decoded`` is (height, width) of the decoded latents; ``side`` is the whole image's side divided by the window's,
    since the masks' kernels scale with the whole image.
    """

    top: int
    left: int
    height: int
    width: int
    decoded: tuple[int, int]
    side: float

    def on(self, shape: Sequence[int]) -> tuple[Any, ...]:
        """The index of this part in a feature map of shape (..., H_l, W_l)."""
        rows, columns = (size // whole for size, whole in zip(shape, self.decoded))
        return (
            ...,
            slice(self.top * rows, (self.top + self.height) * rows),
            slice(self.left * columns, (self.left + self.width) * columns),
        )


def with_margin(
    window: tuple[int, int, int, int] | None, shape: Sequence[int]
) -> tuple[tuple[Any, ...], Window | None]:
    """The index of the latents to decode for a window, with MARGIN positions on each side, and the window in them."""
    if window is None:
        return (...,), None
    top, left, height, width = window
    first_row, first_column = max(0, top - MARGIN), max(0, left - MARGIN)
    last_row, last_column = min(shape[0], top + height + MARGIN), min(shape[1], left + width + MARGIN)
    decoded = last_row - first_row, last_column - first_column
    side = math.sqrt(math.prod(shape) / (height * width))
    inner = Window(top - first_row, left - first_column, height, width, decoded, side)
    return (..., slice(first_row, last_row), slice(first_column, last_column)), inner


def into_range(gradients: Sequence[Tensor]) -> Tensor | float:
    """Scale gradients down, in place, that would leave float16's range in the decoder's backward pass.

    Returns:
        The factor of each sample, (B, 1, 1, 1), a power of two.
    """
    if gradients[0].dtype != torch.float16:
        return 1.0
    largest = torch.stack([gradient.abs().amax((1, 2, 3), keepdim=True) for gradient in gradients]).amax(0).float()
    factor = torch.exp2(torch.log2(LARGEST_IN_FLOAT16 / largest).floor()).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return factor


def unshared(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous features in memory of their own, which a gradient can overwrite; modules may share a tensor."""
    seen: set[int] = set()
    for name, maps in features.items():
        memory = maps.untyped_storage()._cdata
        features[name] = maps.clone(memory_format=torch.contiguous_format) if memory in seen else maps.contiguous()
        seen.add(memory)
    return features


def depth_weight(weighting: str | Mapping[str, float], relative_side: float, name: str) -> float:
    """omega_l of a block whose map is ``relative_side`` = r_l / r_1 times as wide as the first block's (Sec. 3.2).

    >>> [depth_weight(kind, 4.0, "up_1") for kind in ("inverse", "exponential", "uniform", {"up_1": 0.2})]
    [0.25, 0.0625, 1.0, 0.2]
    """
    if not isinstance(weighting, str):
        return float(weighting[name])
    return {"inverse": 1 / relative_side, "exponential": 2**-relative_side, "uniform": 1.0}[weighting]
