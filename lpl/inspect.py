"""Shows what the latent perceptual loss sees in a VAE and in your images, before you train with it.

    python -m lpl.inspect --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir inspected

Four pictures, and ``inspect.json`` with their numbers:

- ``features.png``: the decoder's feature maps, and what the masks leave out of them (Fig. 3).
- ``outliers.png``: how much is masked, how extreme it is, and where; :func:`outlier_advice` says what to set.
- ``balance.png``: each block's term of Eq. 2 for estimates that are off by so much, and the depth weights that would
  make the terms alike.
- ``interpolation.png``: latents made smaller and large again; what that costs in the latent, in the image, and in LPL
  (Sec. 7, Fig. 12).

There is no denoiser here. Features are those of the images' own latents, z0, at the posterior's mean, and in the place
of an estimate stands z0 + r * std(z0) * noise with noise ~ N(0, I) and *relative errors* r of ERRORS. *Masked* is what
an outlier mask leaves out; a *map* is one channel of one image. Images are taken one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lpl import arguments
from lpl.autoencoders import (
    RGB,
    SUPPORTED,
    decoder_blocks,
    downscaling_factor,
    encode,
    feature_vae,
    latent_channels,
    skeleton,
)
from lpl.checks import DTYPES, check_autoencoder, check_ranges, check_vae_dtype
from lpl.data import FORMATS, first_line, image_files, keyed_generator, to_rgb
from lpl.features import DecoderFeatureExtractor
from lpl.files import write_text
from lpl.inspect_figures import balance_figure, features_figure, interpolation_figure, outliers_figure, percent
from lpl.loss import DEPTH_WEIGHTINGS, LatentPerceptualLoss, depth_weight
from lpl.outliers import MASK_DEFAULTS, outlier_mask
from lpl.pictures import save_figure
from lpl.trust import check_components, check_weights


ERRORS = (0.05, 0.1, 0.2, 0.4, 0.8)  # r of the balance study
MARGINS = (1.0, 2.0, 4.0, 8.0)  # of the masks that are tried, beside the one that is set
STRIDE = 4  # of the masks that are compared with the exact ones
NEGLIGIBLE = 0.01  # relative change of a block's term that is not worth a mask; our choice
SCALES = (1.2, 1.5, 2.0, 3.0)  # s of Fig. 12
METHODS = {  # how the rows of Fig. 12 resize, and what
    "bilinear, in pixels": ("bilinear", "pixels"),
    "nearest, in the latent": ("nearest", "latent"),
    "bilinear, in the latent": ("bilinear", "latent"),
    "bicubic, in the latent": ("bicubic", "latent"),
}
STEPS = 1 + len(ERRORS) + len(METHODS) * len(SCALES)  # of the progress shown, per image
OUTLIER_SETTINGS = [name for name in MASK_DEFAULTS if name != "stride"]  # of outlier_mask, which are looked into
SHARED_FLAGS = (  # those that are as in the training script
    *("revision", "variant", "cache_dir", "lpl_blocks", "lpl_normalization", "lpl_distance", "lpl_vae_dtype"),
    *(f"lpl_outlier_{name}" for name in OUTLIER_SETTINGS),
)
LARGEST_DEFAULT_RESOLUTION = 512


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; names as in the training script."""
    parser = arguments.Parser(
        prog="python -m lpl.inspect",
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir FOLDER [flags]",
        description="Show what the latent perceptual loss sees in a VAE and in your images.",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a pipeline or a VAE: a folder or an id on the Hub")
    add("--images", nargs="+", required=True, help="image files, or folders of them")
    add("--num_images", type=int, default=4, help="images at most, evenly spread over those given")
    add("--resolution", type=int, help="side of the square that is cropped from them in pixels; default: the VAE's")
    add("--output_dir", required=True, help="where the pictures and inspect.json go")
    add("--device", help="e.g. cpu or cuda:1; default: a GPU if there is one")
    add("--seed", type=int, default=0, help="of the noise")
    arguments.add_flags(parser, SHARED_FLAGS)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the command line alone tells to be wrong, and fill in the device.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_ranges(args)
    if args.num_images < 1:
        raise ValueError(f"--num_images {args.num_images}: it must be 1 or more")
    if args.lpl_blocks == [RGB]:
        raise ValueError(f"--lpl_blocks {RGB}: pixels are no features; name decoder blocks")
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {first_line(error)}") from error
    if kind == "cuda" and not gpu:
        raise ValueError(f"--device {args.device}: this machine has no GPU that PyTorch can use; give cpu")
    try:
        torch.zeros((), device=args.device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: PyTorch cannot compute on it here; give cpu") from error
    if kind == "cpu" and args.lpl_vae_dtype == "float16":
        raise ValueError("--lpl_vae_dtype float16 needs a GPU; use bfloat16 or float32")


def find_images(given: Sequence[str], most: int) -> list[Path]:
    """The files that are meant, sorted folder by folder, at most so many of them, evenly spread.

    Raises:
        ValueError: for a path that is neither, and a folder without images.
    """
    files: list[Path] = []
    for name in given:
        found = sorted(image_files(name)) if Path(name).is_dir() else [Path(name)] if Path(name).is_file() else []
        if not found:
            what = "the folder has no images" if Path(name).is_dir() else "there is no such file or folder"
            raise ValueError(f"--images {name}: {what}")
        files += found
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def find_vae(args: argparse.Namespace) -> tuple[str | None, Mapping[str, Any]]:
    """Where below the path the VAE is, and its configuration: a pipeline's component, or what stands there itself.

    Raises:
        ValueError: where there is none, or none that is supported.
    """
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        index = DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError):
        places = [None, "vae"]
    else:
        check_components(path, index)
        components = {name: entry[-1] for name, entry in index.items() if isinstance(entry, list | tuple)}
        places = [name for name, kind in components.items() if kind in SUPPORTED] or ["vae"]
    for place in places:
        try:  # this class knows the file's name, for any class
            config = AutoencoderKL.load_config(path, subfolder=place, **where)
        except (OSError, ValueError) as error:
            problem = first_line(error)
            continue
        what = f"--pretrained_model_name_or_path {path}"
        check_autoencoder(f"{what}: its VAE", config, SUPPORTED, args)
        check_weights(what, path, [place or ""], args.revision)
        return place, config
    raise ValueError(
        f"--pretrained_model_name_or_path {path}: neither a pipeline nor a VAE is found there ({problem})"
    )


def check_vae(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Refuse what does not fit the VAE's configuration, and fill in the resolution.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    decoder_blocks(skeleton(config), args.lpl_blocks)
    check_vae_dtype(args.lpl_vae_dtype, config)
    factor = downscaling_factor(config)
    if args.resolution is None:
        own = config.get("sample_size")
        own = own if isinstance(own, int) else LARGEST_DEFAULT_RESOLUTION
        args.resolution = max(2, min(own, LARGEST_DEFAULT_RESOLUTION) // factor) * factor
    if args.resolution % factor or args.resolution < 2 * factor:
        below = max(2, args.resolution // factor) * factor
        raise ValueError(
            f"--resolution {args.resolution}: this VAE takes multiples of {factor}, "
            f"such as {below} or {below + factor}"
        )


def read_image(file: Path, resolution: int) -> Image.Image:
    """The largest square in the middle, at that side.

    Raises:
        ValueError: where the file is no image.
    """
    try:
        image = to_rgb(Image.open(file, formats=FORMATS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--images {file}: it cannot be read ({first_line(error)})") from error
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


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


# What follows from it ------------------------------------------------------------------------------------------------


def summary(inspector: Inspector) -> dict[str, Any]:
    """All numbers, over the images, for ``inspect.json``."""
    blocks = {name: _block_summary(inspector, name) for name in inspector.names}
    terms, unmasked = (
        np.array([found[kind] for found in inspector.found]).mean(0)  # (errors, blocks)
        for kind in ("terms", "unmasked")
    )
    for name, change in zip(inspector.names, relative(terms, unmasked).T):
        blocks[name]["masks_change"] = change[np.abs(change).argmax()].item()
    return {
        "outliers": {
            "settings": inspector.settings,
            "stride": STRIDE,
            "negligible": NEGLIGIBLE,
            "blocks": blocks,
            "advice": outlier_advice(blocks, inspector.settings),
        },
        "balance": balance_summary(inspector.names, terms, inspector.depth_weights, inspector.args.lpl_blocks),
        "interpolation": interpolation_summary([found["interpolation"] for found in inspector.found]),
    }


def relative(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """values / reference - 1; where nothing differs at all, both are 0 and nothing has changed."""
    return np.divide(values, reference, out=np.ones_like(values), where=reference > 0) - 1


def _block_summary(inspector: Inspector, name: str) -> dict[str, Any]:
    found = [found["outliers"][name] for found in inspector.found]
    masked, peak, peak_kept = (
        torch.stack([image[kind] for image in found]).cpu() for kind in ("masked", "peak", "peak_kept")
    )  # (images, C) each
    margins = sorted({*MARGINS, inspector.settings["margin"]})
    by_margin = torch.stack([image["by_margin"] for image in found]).mean(0)
    mean = {kind: sum(image[kind] for image in found) / len(found) for kind in ("gaussian", "stride_differs")}
    return {
        "shape": inspector.shapes[name],
        "masked": masked.mean().item(),
        "masked_of_gaussian_maps": mean["gaussian"],
        "masked_by_margin": dict(zip(map(str, margins), by_margin.tolist())),
        "stride_differs": mean["stride_differs"],
        "maps_with_outliers": (masked > 0).float().mean().item(),
        "peak": peak.max().item(),
        "peak_kept": peak_kept.max().item(),
        "masked_by_channel": masked.mean(0).tolist(),
        "peak_by_channel": peak.amax(0).tolist(),
    }


def outlier_advice(blocks: Mapping[str, Mapping[str, Any]], settings: Mapping[str, float]) -> dict[str, str]:
    """Which settings of the masks these features ask for, by three rules, the first that holds.

    1. If masks leave every block's term the same but for NEGLIGIBLE (1%), they are not worth their time.
    2. A block should not lose more than the 2 * ``quantile`` that lie outside the quantiles, or the masks take
       ordinary features too: take the smallest larger margin of MARGINS that keeps the rest, or leave out the block.
    3. Else the settings are right.

    Outliers that cover more of a map than ``quantile`` at one end are seen neither by the masks nor by these rules.

    Returns:
        "flags" to give, maybe none, and "why".
    """
    quantile, margin = settings["quantile"], settings["margin"]
    change = max((abs(block["masks_change"]), name) for name, block in blocks.items())
    if change[0] < NEGLIGIBLE:
        return {
            "flags": "--lpl_no_outlier_mask",
            "why": f"they change no block's term by more than {percent(change[0])} ({change[1]}), "
            f"less than the {NEGLIGIBLE:.0%} taken as negligible here; this saves their time",
        }
    limit = 2 * quantile
    eaten = [name for name, block in blocks.items() if block["masked"] > limit]
    if eaten:
        larger = sorted(value for value in MARGINS if value > margin)
        enough = [
            value
            for value in larger
            if all(block["masked_by_margin"][str(value)] <= limit for block in blocks.values())
        ]
        rest = [name for name in blocks if name not in eaten]
        flags = f"--lpl_outlier_margin {enough[0]:g}" if enough else f"--lpl_blocks {' '.join(rest)}" if rest else ""
        return {
            "flags": flags,
            "why": f"more than {limit:.0%} of {', '.join(eaten)} is masked, more than the quantiles leave outside"
            + ("" if enough else f", even at a margin of {larger[-1]:g}" if larger else ""),
        }
    most = max((block["masked"], name) for name, block in blocks.items())
    return {
        "flags": "",
        "why": f"the settings mask {percent(most[0])} at most ({most[1]}), and change the term of {change[1]} by "
        f"{percent(change[0])}",
    }


def balance_summary(
    names: Sequence[str],
    terms: np.ndarray,
    depth_weights: Mapping[str, Sequence[float]],
    chosen: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The blocks' terms, (errors, blocks), and the depth weights that make them alike."""
    weights = balancing_weights(terms)
    return {
        "relative_errors": list(ERRORS),
        "terms": {name: column.tolist() for name, column in zip(names, terms.T)},
        "depth_weights": {kind: dict(zip(names, row)) for kind, row in depth_weights.items()}
        | {"balanced": dict(zip(names, weights))},
        "flags": (f"--lpl_blocks {' '.join(names)} " if chosen else "")
        + f"--lpl_depth_weighting {' '.join(f'{weight:g}' for weight in weights)}",
    }


def balancing_weights(terms: np.ndarray) -> list[float]:
    """Depth weights, the first block's 1, that give all blocks the same geometric mean over the errors.

    The geometric mean counts every error alike, while the arithmetic one would be that of the largest. A block whose
    term is 0 gets 0.

    >>> balancing_weights(np.array([[1.0, 2.0, 0.0], [4.0, 32.0, 0.0]]))
    [1.0, 0.25, 0.0]
    """
    alive = (terms > 0).all(0)
    means = np.exp(np.log(np.where(alive, terms, 1.0)).mean(0))
    first = means[alive][0] if alive.any() else 1.0
    return [float(f"{first / mean:.3g}") if good else 0.0 for mean, good in zip(means, alive)]


def interpolation_summary(found: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Mean errors by method and scale, and which share of all pairs of one image's degraded latents the error in the
    latent puts in the order of the error in pixels, and of LPL."""
    kinds = ("latent_mse", "pixel_mse", "lpl")
    methods = {
        label: {
            kind: np.mean([[point[kind] for point in image[label]] for image in found], 0).tolist() for kind in kinds
        }
        for label in METHODS
    }
    points = [{kind: [point[kind] for row in image.values() for point in row] for kind in kinds} for image in found]
    return {
        "scales": list(SCALES),
        "methods": methods,
        "ordered_as_latent": {
            kind: float(np.mean([ordered_alike(image[kind], image["latent_mse"]) for image in points]))
            for kind in ("pixel_mse", "lpl")
        },
    }


def ordered_alike(values: Sequence[float], others: Sequence[float]) -> float:
    """Share of all pairs that both put in the same order.

    >>> round(ordered_alike([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 3)
    0.667
    """
    pairs = list(combinations(zip(values, others), 2))
    return sum((a - b) * (c - d) > 0 for (a, c), (b, d) in pairs) / len(pairs)


COLUMNS = ("block", "maps", "masked", "Gaussian", "any masked", "peak", "kept", "stride", "change")


def report(numbers: Mapping[str, Any]) -> str:
    """What is worth reading at once."""
    outliers, balance = numbers["outliers"], numbers["balance"]
    advice, alike = outliers["advice"], numbers["interpolation"]["ordered_as_latent"]
    rows = [COLUMNS]
    for name, block in outliers["blocks"].items():
        shares = (block[kind] for kind in ("masked", "masked_of_gaussian_maps", "maps_with_outliers"))
        rows.append(
            (
                name,
                "x".join(map(str, block["shape"])),
                *map(percent, shares),
                *(f"{block[kind]:.1f}" for kind in ("peak", "peak_kept")),
                percent(block["stride_differs"]),
                f"{100 * block['masks_change']:+.2f}%",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
    by_default = " ".join(f"{weight:g}" for weight in balance["depth_weights"]["inverse"].values())
    return "\n".join(
        [
            "masked, and of Gaussian maps as smooth; maps with any masked; largest value of all and of the kept, in",
            f"deviations; decided otherwise at stride {STRIDE}; what masks change of the block's term",
            *table,
            f"masks: {advice['flags'] or 'nothing to change'}; {advice['why']}",
            f"balanced terms: {balance['flags']}; the default is {by_default}",
            "interpolated latents: of all pairs, the error in the latent has the order of that in pixels for "
            f"{alike['pixel_mse']:.0%}, of LPL for {alike['lpl']:.0%}",
        ]
    )


# All of it -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at the images through the VAE and write the pictures and the numbers, which are also returned.

    Raises:
        ValueError: for arguments that do not fit this machine, the VAE, or the images, before any weights are loaded.
    """
    check_arguments(args)
    files = find_images(args.images, args.num_images)
    place, config = find_vae(args)
    check_vae(args, config)
    images = [read_image(file, args.resolution) for file in files]
    options = {} if place is None else {"subfolder": place}
    vae = AutoModel.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        use_safetensors=True,
        **options,
    )
    vae = vae.requires_grad_(False).eval().to(args.device)
    inspector = Inspector(vae, feature_vae(vae, None, DTYPES[args.lpl_vae_dtype]), args)
    with tqdm(total=STEPS * len(images), desc="inspecting") as progress:
        for image in images:
            inspector.inspect(image, progress.update)
    numbers = {
        "vae": {"path": args.pretrained_model_name_or_path, "class": type(vae).__name__, "dtype": args.lpl_vae_dtype},
        "images": [str(file) for file in files],
        "resolution": args.resolution,
        "seed": args.seed,
        "loss": {"normalization": args.lpl_normalization, "distance": args.lpl_distance},
    } | summary(inspector)
    names = [file.name for file in files]
    folder = Path(args.output_dir)
    for name, figure in (
        ("features", features_figure(inspector, images, names)),
        ("outliers", outliers_figure(inspector, numbers["outliers"])),
        ("balance", balance_figure(numbers["balance"])),
        ("interpolation", interpolation_figure(inspector, images[0], names[0], numbers["interpolation"])),
    ):
        save_figure(figure, folder / f"{name}.png")
    text = json.dumps(numbers, indent=2)
    write_text(folder / "inspect.json", text + "\n")
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        numbers = run(args)
    except (OSError, ValueError) as error:  # the former where weights cannot be loaded, or pictures not written
        parser.error(str(error))
    print(report(numbers))
    print(f"pictures and numbers are in {args.output_dir}")


if __name__ == "__main__":
    main()
