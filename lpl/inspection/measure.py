"""TODO: what is here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from lpl.autoencoders import RGB, downscaling_factor, encode, latent_channels
from lpl.data.order import keyed_generator
from lpl.features import DecoderFeatureExtractor
from lpl.loss import LatentPerceptualLoss, depth_weight
from lpl.options import DEPTH_WEIGHTINGS, MASK_DEFAULTS
from lpl.outliers import outlier_mask


ERRORS = (0.05, 0.1, 0.2, 0.4, 0.8)  # r of the balance study
MARGINS = (1.0, 2.0, 4.0, 8.0)  # of the masks that are tried, beside the one that is set
STRIDE = 4  # of the masks that are compared with the exact ones
SCALES = (1.2, 1.5, 2.0, 3.0)  # s of Fig. 12
METHODS = {  # how the rows of Fig. 12 resize, and what
    "bilinear, in pixels": ("bilinear", "pixels"),
    "nearest, in the latent": ("nearest", "latent"),
    "bilinear, in the latent": ("bilinear", "latent"),
    "bicubic, in the latent": ("bicubic", "latent"),
}
STEPS = 1 + len(ERRORS) + len(METHODS) * len(SCALES)  # of the progress shown, per image
OUTLIER_SETTINGS = [name for name in MASK_DEFAULTS if name != "stride"]  # of outlier_mask, which are looked into


# What is measured, image by image ------------------------------------------------------------------------------------


def outliers_of(features: Tensor, settings: Mapping[str, float], generator: torch.Generator) -> dict[str, Any]:
    """What the masks do to one block's features of one image, (1, C, H, W).

    ``peak`` is a map's largest distance from the mean of its kept positions, in units of their standard deviation:
    what the loss would have to deal with; ``peak_kept`` the largest that the mask lets through. ``gaussian`` is the
    share masked of Gaussian maps that are as smooth as these (:func:`gaussian_like`).
    """
    keep = outlier_mask(features, **settings)
    peak, peak_kept = peaks(features, keep)
    masked = ~keep
    tried = {margin: settings | {"margin": margin} for margin in sorted({*MARGINS, settings["margin"]})}
    return {
        "masked": masked.float().mean((0, 2, 3)),  # (C,)
        "peak": peak,  # (C,)
        "peak_kept": peak_kept,  # (C,)
        "gaussian": share_masked(gaussian_like(features, generator), settings),
        "by_margin": torch.tensor([share_masked(features, changed) for changed in tried.values()]),
        "stride_differs": (outlier_mask(features, **settings, stride=STRIDE) != keep).float().mean().item(),
        # drawn only, and small enough to be kept for each image
        "where": F.adaptive_avg_pool2d(masked.float().mean(1), [min(side, 128) for side in features.shape[2:]])[0],
    }


def peaks(features: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance of each map from its kept positions' mean, of all and of the kept ones, in their deviations.

    (1, C, H, W) -> two of (C,); a map without a kept spread has 0.
    """
    maps, keep = features[0].flatten(1).float(), keep[0].flatten(1)  # (C, N)
    count = keep.sum(1, keepdim=True).clamp(min=1)
    distance = maps - (maps * keep).sum(1, keepdim=True) / count
    std = ((distance * keep).square().sum(1, keepdim=True) / count).sqrt()
    distance = (distance.abs() / std).nan_to_num(0, 0, 0)
    return distance.amax(1), (distance * keep).amax(1)


def share_masked(features: Tensor, settings: Mapping[str, float]) -> float:
    return 1 - outlier_mask(features, **settings).count_nonzero().item() / features.numel()


def gaussian_like(features: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian maps with the power spectra of these, (B, C, H, W): as large and as smooth, but without outliers.

    Each frequency keeps its amplitude and gets the phase that it has in white noise.
    """
    features = features.float()
    white = torch.randn(features.shape, generator=generator).to(features.device)
    return torch.fft.irfft2(
        torch.fft.rfft2(features).abs() * torch.fft.rfft2(white).sgn(), s=tuple(features.shape[-2:])
    )


def perturbed(latents: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """An estimate of z0 that is off by ``error`` times the latent's own standard deviation, (1, C, h, w)."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return latents + error * latents.std() * noise


def terms_of(loss_fn: LatentPerceptualLoss, predicted: Tensor, latents: Tensor) -> list[float]:
    """Each block's term of Eq. 2, with the loss's depth weights, for one image."""
    loss_fn(predicted, latents)
    return [loss_fn.last.terms[name].item() for name in loss_fn.block_names]


def resized(images: Tensor, scale: float, mode: str) -> Tensor:
    """Made smaller by 1 / scale and large again, (1, C, H, W) (Fig. 12)."""
    size = images.shape[-2:]
    corners = {} if mode == "nearest" else {"align_corners": False}
    small = F.interpolate(images, [max(1, round(side / scale)) for side in size], mode=mode, **corners)
    return F.interpolate(small, size, mode=mode, **corners)


def as_image(pixels: Tensor) -> np.ndarray:
    """Pixels [-1, 1], (1, 3, H, W) -> (H, W, 3) of 8 bits."""
    return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy()


class Inspector:
    """Measures images one after the other; every number of theirs is a list with an entry per image.

    Args:
        vae: encodes, in float32.
        features: the VAE whose decoder is looked through; the same, or its copy in another precision.
    """

    def __init__(self, vae: nn.Module, features: nn.Module, args: argparse.Namespace) -> None:
        self.vae, self.args = vae, args
        self.settings = {name: getattr(args, f"lpl_outlier_{name}") for name in OUTLIER_SETTINGS}
        self.extractor = DecoderFeatureExtractor(features, args.lpl_blocks)
        self.rgb = DecoderFeatureExtractor(features, (RGB,))
        self.names = self.extractor.block_names
        options = {"normalization": args.lpl_normalization, "distance": args.lpl_distance}
        self.loss_fn = LatentPerceptualLoss(features, self.names, outliers=self.settings, **options)
        self.terms_fn = LatentPerceptualLoss(
            features, self.names, depth_weighting="uniform", outliers=self.settings, **options
        )
        self.unmasked_fn = LatentPerceptualLoss(
            features, self.names, depth_weighting="uniform", mask_outliers=False, **options
        )
        self.shapes: dict[str, list[int]] = {}
        self.depth_weights: dict[str, list[float]] = {}
        self.found: list[dict[str, Any]] = []
        self.latents: list[Tensor] = []
        self.decoded: dict[Any, np.ndarray] = {}  # of the first image's latents, by method and scale; None = intact

    @torch.no_grad()
    def inspect(self, image: Image.Image, step: Callable[[], Any] = lambda: None) -> None:
        """Carry out the three studies on one image; ``step`` is called STEPS times."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, R, R)
        pixels = pixels.to(self.args.device)
        latents = self.encode(pixels)
        generator = keyed_generator(self.args.seed, len(self.found))
        result: dict[str, Any] = {"outliers": self._outliers(latents, generator)}
        step()
        result |= self._terms(latents, generator, step)
        result["interpolation"] = self._interpolations(pixels, latents, step)
        self.found.append(result)
        self.latents.append(latents.cpu())

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents at the posterior's mean: pixels [-1, 1] (1, 3, H, W) -> (1, C, h, w)."""
        factor = downscaling_factor(self.vae.config)
        shape = (1, latent_channels(self.vae.config), *(side // factor for side in pixels.shape[-2:]))
        return encode(self.vae, pixels, torch.zeros(shape, device=pixels.device))

    def features(self, latents: Tensor) -> dict[str, Tensor]:
        """{block: (1, C_l, H_l, W_l)}.

        Raises:
            ValueError: where the decoder overflows.
        """
        features = self.extractor(latents)
        for name, maps in features.items():
            if not maps.isfinite().all():
                raise ValueError(
                    f"--lpl_vae_dtype {self.args.lpl_vae_dtype}: the features of {name} are not finite; use float32"
                )
        return features

    def _outliers(self, latents: Tensor, generator: torch.Generator) -> dict[str, dict[str, Any]]:
        features = self.features(latents)
        self.shapes = {name: list(maps.shape[1:]) for name, maps in features.items()}
        first = math.sqrt(math.prod(self.extractor.first_shape))
        sides = {name: math.sqrt(math.prod(self.shapes[name][1:])) / first for name in self.names}
        self.depth_weights = {
            kind: [depth_weight(kind, side, name) for name, side in sides.items()] for kind in DEPTH_WEIGHTINGS
        }
        return {name: outliers_of(features[name], self.settings, generator) for name in self.names}

    def _terms(self, latents: Tensor, generator: torch.Generator, step: Callable[[], Any]) -> dict[str, Any]:
        """The blocks' terms without depth weights, with masks and without, (errors, blocks)."""
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
        """The three errors for every method and scale (Fig. 12); of the first image, the decoded pictures are kept."""
        intact = self.decode(latents)
        decoded, errors = {None: intact}, {}
        for label, how in METHODS.items():
            errors[label] = []
            for scale in SCALES:
                changed = self.interpolate(pixels, latents, scale, *how)
                decoded[label, scale] = self.decode(changed)
                errors[label].append(
                    {
                        "latent_mse": (changed - latents).square().mean().item(),
                        "pixel_mse": (decoded[label, scale] - intact).square().mean().item(),
                        "lpl": self.loss_fn(changed, latents).item(),
                    }
                )
                step()
        if not self.decoded:
            self.decoded = {key: as_image(picture) for key, picture in decoded.items()}
        return errors

    def interpolate(self, pixels: Tensor, latents: Tensor, scale: float, mode: str, what: str) -> Tensor:
        """The latent of the resized image, or the resized latent, (1, C, h, w)."""
        return self.encode(resized(pixels, scale, mode)) if what == "pixels" else resized(latents, scale, mode)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels [-1, 1], (1, 3, H, W), float32."""
        return self.rgb(latents)[RGB].float().clamp(-1, 1)
