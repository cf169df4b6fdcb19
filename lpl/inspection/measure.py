"""Measures the latent perceptual loss on images' own latents: outlier masks, terms of Eq. 2, interpolated latents.

Vocabulary as in :mod:`lpl.inspection.command`. Functions measure one image, whose features and latents have a batch
dimension of 1; :class:`Inspector` collects the results of several images. Random numbers come from a generator per
image, keyed by the seed and the image's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lpl.autoencoders import RGB, downscaling_factor, encode, latent_channels
from lpl.config.groups import Lpl
from lpl.data.order import keyed_generator
from lpl.features import DecoderFeatureExtractor
from lpl.loss import LatentPerceptualLoss, depth_weight
from lpl.options import DEPTH_WEIGHTINGS, MASK_DEFAULTS
from lpl.outliers import outlier_mask


ERRORS = (0.05, 0.1, 0.2, 0.4, 0.8)  # r of the balance study
MARGINS = (1.0, 2.0, 4.0, 8.0)  # of the masks that are tried, besides the given one
STRIDE = 4  # of the masks that are compared with the exact ones
SCALES = (1.2, 1.5, 2.0, 3.0)  # s of Fig. 12
METHODS = {  # of the rows of Fig. 12: the interpolation, and what is resized
    "bilinear, in pixels": ("bilinear", "pixels"),
    "nearest, in the latent": ("nearest", "latent"),
    "bilinear, in the latent": ("bilinear", "latent"),
    "bicubic, in the latent": ("bicubic", "latent"),
}
ERROR = 0.2  # r of the errors of one size
SEARCH_STEPS = 12
KINDS = {"hidden by the decoder": -1, "random": 0, "amplified by the decoder": 1}  # and the direction of the search
STEPS = 1 + len(ERRORS) + len(METHODS) * len(SCALES) + 2 * SEARCH_STEPS + 1  # of the progress bar, per image
OUTLIER_SETTINGS = [name for name in MASK_DEFAULTS if name != "stride"]  # parameters of outlier_mask

Settings = Mapping[str, Any]  # of outlier_mask, by the parameter's name


# Masks ---------------------------------------------------------------------------------------------------------------


def outliers_of(features: Tensor, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    """The effect of the masks on one block's features of one image, (1, C, H, W).

    ``peak`` is a map's largest distance from the mean of its kept positions, in units of their standard deviation;
    ``peak_kept`` is the largest distance among the kept positions. ``gaussian`` is the masked share of Gaussian maps
    with the same power spectra (:func:`gaussian_like`).
    """
    keep = outlier_mask(features, **settings)
    peak, peak_kept = peaks(features, keep)
    masked = ~keep
    tried = [{**settings, "margin": margin} for margin in sorted({*MARGINS, settings["margin"]})]
    height, width = features.shape[2:]
    return {
        "masked": masked.float().mean((0, 2, 3)),  # (C,)
        "peak": peak,  # (C,)
        "peak_kept": peak_kept,  # (C,)
        "gaussian": share_masked(gaussian_like(features, generator), settings),
        "by_margin": torch.tensor([share_masked(features, changed) for changed in tried]),  # (margins,)
        "stride_differs": (outlier_mask(features, **settings, stride=STRIDE) != keep).float().mean().item(),
        # for the picture only, and small enough to be kept for each image
        "where": F.adaptive_avg_pool2d(masked.float().mean(1), (min(height, 128), min(width, 128)))[0],
    }


def peaks(features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance of each map from the mean of its kept positions, over all positions and over the kept ones.

    Distances are in standard deviations of the kept positions; a map without a kept spread has 0.
    (1, C, H, W) -> two of (C,).
    """
    maps, keep = features[0].flatten(1).float(), keep[0].flatten(1)  # (C, N)
    count = keep.sum(1, keepdim=True).clamp(min=1)
    distance = maps - (maps * keep).sum(1, keepdim=True) / count
    std = ((distance * keep).square().sum(1, keepdim=True) / count).sqrt()
    distance = (distance.abs() / std).nan_to_num(0, 0, 0)
    return distance.amax(1), (distance * keep).amax(1)


def share_masked(features: Tensor, settings: Settings) -> float:
    """The share of positions that the masks exclude."""
    return 1 - outlier_mask(features, **settings).count_nonzero().item() / features.numel()


def gaussian_like(features: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian maps with the power spectra of ``features``, (B, C, H, W): equally large and smooth, without outliers.

    Each frequency keeps its amplitude and takes its phase from white noise.
    """
    features = features.float()
    white = torch.randn(features.shape, generator=generator).to(features.device)
    return torch.fft.irfft2(
        torch.fft.rfft2(features).abs() * torch.fft.rfft2(white).sgn(), s=tuple(features.shape[-2:])
    )


# Latents -------------------------------------------------------------------------------------------------------------


def perturbed(latents: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """An estimate of z0 whose error is ``error`` times the latent's own standard deviation, (1, C, h, w)."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return latents + error * latents.std() * noise


def terms_of(loss_fn: LatentPerceptualLoss, predicted: Tensor, latents: Tensor) -> list[float]:
    """Each block's term of Eq. 2 for one image, with the loss's depth weights."""
    loss_fn(predicted, latents)
    return [loss_fn.last.terms[name].item() for name in loss_fn.block_names]


def resized(images: Tensor, scale: float, mode: str) -> Tensor:
    """Downscaled by 1 / scale and upscaled again, (1, C, H, W) (Fig. 12)."""
    height, width = images.shape[-2:]
    corners = None if mode == "nearest" else False
    smaller = [max(1, round(height / scale)), max(1, round(width / scale))]
    small = F.interpolate(images, smaller, mode=mode, align_corners=corners)
    return F.interpolate(small, [height, width], mode=mode, align_corners=corners)


def found_error(
    decode: Callable[[Tensor], Tensor], latents: Tensor, error: Tensor, direction: int, step: Callable[[], Any]
) -> Tensor:
    """An error of the same size that changes the decoded image more than the given one, or less, (1, C, h, w).

    SEARCH_STEPS steps along the gradient of the squared change of the pixels, on the sphere of that size.

    Args:
        decode: scaled latents -> pixels, differentiable.
        direction: 1 for more, -1 for less.
    """
    intact, size = decode(latents), error.norm()
    for number in range(SEARCH_STEPS):
        with torch.enable_grad():
            error.requires_grad_()
            change = (decode(latents + error) - intact).square().sum()
            (gradient,) = torch.autograd.grad(change, error)
        error = error.detach()
        gradient = gradient - (gradient * error).sum() / size.square() * error
        length = 0.3 * (1 - number / SEARCH_STEPS) * size  # it settles
        error = error + direction * length * gradient / gradient.norm().clamp(min=1e-12)
        error = error * (size / error.norm())
        step()
    return error


def as_image(pixels: Tensor) -> np.ndarray:
    """Pixels [-1, 1], (1, 3, H, W) -> uint8, (H, W, 3)."""
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy()


# All measurements ----------------------------------------------------------------------------------------------------


class Inspector:
    """Measures images one after the other, and collects the results in lists with one entry per image.

    Args:
        vae: encodes, in float32.
        features: the VAE whose decoder gives the features: ``vae`` itself, or a copy in another precision.
        lpl: the loss's options.
        seed: of the noise.
    """

    def __init__(self, vae: ModelMixin, features: ModelMixin, lpl: Lpl, seed: int = 0) -> None:
        self.vae, self.lpl, self.seed = vae, lpl, seed
        self.settings: dict[str, Any] = {name: getattr(lpl, f"lpl_outlier_{name}") for name in OUTLIER_SETTINGS}
        self.extractor = DecoderFeatureExtractor(features, lpl.lpl_blocks)
        self.rgb = DecoderFeatureExtractor(features, (RGB,), gradient_checkpointing=True)
        self.names = self.extractor.block_names
        options: dict[str, Any] = {"normalization": lpl.lpl_normalization, "distance": lpl.lpl_distance}
        masks: dict[str, Any] = {"outliers": self.settings}
        self.loss_fn = LatentPerceptualLoss(features, self.names, **masks, **options)
        options["depth_weighting"] = "uniform"
        self.terms_fn = LatentPerceptualLoss(features, self.names, **masks, **options)
        self.unmasked_fn = LatentPerceptualLoss(features, self.names, mask_outliers=False, **options)
        self.shapes: dict[str, list[int]] = {}
        self.depth_weights: dict[str, list[float]] = {}
        self.found: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []
        self.decoded_errors: list[list[np.ndarray]] = []  # decoded latents, intact and with an error of each kind
        # of the first image: its decoded latents, intact and by method and scale
        self.decoded: np.ndarray | None = None
        self.decoded_by: dict[tuple[str, float], np.ndarray] = {}

    @torch.no_grad()
    def inspect(self, image: Image.Image, step: Callable[[], Any] = lambda: None) -> None:
        """Take all measurements of one image; ``step`` is called STEPS times."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
        pixels = pixels.to(self.vae.device)
        latents = self.encode(pixels)
        generator = keyed_generator(self.seed, len(self.found))
        result: dict[str, Any] = {"outliers": self._outliers(latents, generator)}
        step()
        result |= self._terms(latents, generator, step)
        result["interpolation"] = self._interpolations(pixels, latents, step)
        result["errors"] = self._errors_of_one_size(latents, generator, step)
        self.found.append(result)
        self.latents.append(latents.cpu())

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [-1, 1], (1, 3, H, W) -> scaled latents at the posterior's mean, (1, C, h, w)."""
        factor = downscaling_factor(self.vae.config)
        shape = (1, latent_channels(self.vae.config), *(side // factor for side in pixels.shape[-2:]))
        return encode(self.vae, pixels, torch.zeros(shape, device=pixels.device))

    def features(self, latents: Tensor) -> dict[str, Tensor]:
        """Scaled latents, (1, C, h, w) -> {block: (1, C_l, H_l, W_l)}.

        Raises:
            ValueError: if the decoder overflows.
        """
        features = self.extractor(latents)
        for name, maps in features.items():
            if not maps.isfinite().all():
                raise ValueError(
                    f"--lpl_vae_dtype {self.lpl.decoder_dtype()}: the features of {name} are not finite; use float32"
                )
        return features

    def _outliers(self, latents: Tensor, generator: torch.Generator) -> dict[str, dict[str, Any]]:
        features = self.features(latents)
        self.shapes = {name: list(maps.shape[1:]) for name, maps in features.items()}
        assert self.extractor.first_shape is not None, "the decoder has run"
        first = math.sqrt(math.prod(self.extractor.first_shape))
        sides = {name: math.sqrt(math.prod(self.shapes[name][1:])) / first for name in self.names}
        self.depth_weights = {
            kind: [depth_weight(kind, side, name) for name, side in sides.items()] for kind in DEPTH_WEIGHTINGS
        }
        return {name: outliers_of(features[name], self.settings, generator) for name in self.names}

    def _terms(self, latents: Tensor, generator: torch.Generator, step: Callable[[], Any]) -> dict[str, Any]:
        """The blocks' terms without depth weights, with and without masks, (errors, blocks) each."""
        terms: dict[str, Any] = {"terms": [], "unmasked": []}
        for error in ERRORS:
            estimate = perturbed(latents, error, generator)
            terms["terms"].append(terms_of(self.terms_fn, estimate, latents))
            terms["unmasked"].append(terms_of(self.unmasked_fn, estimate, latents))
            step()
        return terms

    def _interpolations(
        self, pixels: Tensor, latents: Tensor, step: Callable[[], Any]
    ) -> dict[str, list[dict[str, float]]]:
        """The three errors by method and scale (Fig. 12); keeps the decoded pictures of the first image."""
        intact = self.decode(latents)
        errors: dict[str, list[dict[str, float]]] = {}
        for label, (mode, what) in METHODS.items():
            errors[label] = []
            for scale in SCALES:
                changed = self.interpolate(pixels, latents, scale, mode, what)
                decoded = self.decode(changed)
                errors[label].append(self._three_errors(changed, latents, decoded, intact))
                if self.decoded is None:
                    self.decoded_by[label, scale] = as_image(decoded)
                step()
        if self.decoded is None:
            self.decoded = as_image(intact)
        return errors

    def _errors_of_one_size(
        self, latents: Tensor, generator: torch.Generator, step: Callable[[], Any]
    ) -> dict[str, dict[str, float]]:
        """The three errors by kind; keeps the decoded pictures."""
        random, intact = perturbed(latents, ERROR, generator) - latents, self.decode(latents)
        pictures, errors = [as_image(intact)], dict[str, dict[str, float]]()
        for kind, direction in KINDS.items():
            error = random
            if direction:
                error = found_error(self._unclamped, latents, random.clone(), direction, step)
            changed = latents + error
            decoded = self.decode(changed)
            errors[kind] = self._three_errors(changed, latents, decoded, intact)
            pictures.append(as_image(decoded))
        step()
        self.decoded_errors.append(pictures)
        return errors

    def _three_errors(self, changed: Tensor, latents: Tensor, decoded: Tensor, intact: Tensor) -> dict[str, float]:
        return {
            "latent_mse": (changed - latents).square().mean().item(),
            "pixel_mse": (decoded - intact).square().mean().item(),
            "lpl": self.loss_fn(changed, latents).item(),
        }

    def interpolate(self, pixels: Tensor, latents: Tensor, scale: float, mode: str, what: str) -> Tensor:
        """The latents of the resized image, or the resized latents, (1, C, h, w)."""
        return self.encode(resized(pixels, scale, mode)) if what == "pixels" else resized(latents, scale, mode)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents, (1, C, h, w) -> pixels [-1, 1], (1, 3, H, W), float32."""
        return self._unclamped(latents).clamp(-1, 1)

    def _unclamped(self, latents: Tensor) -> Tensor:
        return self.rgb(latents)[RGB].float()
