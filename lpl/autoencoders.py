"""What differs between VAE classes: how latents are scaled, and where the decoder's blocks are.

Vocabulary. *Scaled* latents are those the denoiser is trained on, ``(encode(pixels) - shift) * scale``, with
``latents_mean`` and ``latents_std`` where the VAE's config has them; ``vae.decode`` takes *raw* ones. Blocks are
counted in the order in which the decoder runs: ``mid``, ``up_0``, ``up_1``, ... ; ``rgb`` stands for decoded pixels.
The first block works at the latents' own resolution. AutoencoderDC has no mid block, so there it is ``up_0``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoModel
from torch import Tensor, nn

from lpl.objectives import at_least_float32


RGB = "rgb"
SUPPORTED = tuple(kind.__name__ for kind in (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderDC))
# Where a class's configuration has the widths of its levels; a key of its own comes before the common one, which
# AsymmetricAutoencoderKL has only sometimes.
_ENCODER_WIDTHS = ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels")
_DECODER_WIDTHS = ("up_block_out_channels", "decoder_block_out_channels", "block_out_channels")
_DECODER_LAYERS = "decoder_layers_per_block"  # AutoencoderDC's


def _first_of(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next(config[key] for key in keys if key in config)


def block_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the decoder blocks, from the VAE's configuration alone."""
    levels = len(_first_of(config, _DECODER_WIDTHS))
    if _DECODER_LAYERS in config:  # no mid block; some of its models have nothing at full resolution
        return tuple(f"up_{i}" for i in range(sum(layers > 0 for layers in config[_DECODER_LAYERS])))
    return ("mid", *(f"up_{i}" for i in range(levels)))


def decoder_blocks(vae: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in the order in which they run.

    Raises:
        ValueError: for an autoencoder of another make.
    """
    decoder = getattr(vae, "decoder", None)
    if isinstance(vae, AutoencoderDC):  # kept from the image's side, run from the latents'
        modules = [block for block in reversed(decoder.up_blocks) if len(block)]
    elif hasattr(decoder, "mid_block") and hasattr(decoder, "up_blocks"):
        modules = [decoder.mid_block, *decoder.up_blocks]
    else:
        raise ValueError(
            f"the decoder of {type(vae).__name__} has no blocks that are known here; supported are "
            f"{', '.join(SUPPORTED)}, and autoencoders with such a decoder"
        )
    return dict(zip(block_names(vae.config), modules, strict=True))


def select_blocks(blocks: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    """The blocks asked for, in the order in which the decoder runs them; None = every one.

    Raises:
        ValueError: for a name that the decoder has not, one given twice, none at all, or "rgb" beside others.
    """
    if blocks is None:
        return tuple(available)
    if isinstance(blocks, str):
        blocks = (blocks,)
    if list(blocks) == [RGB]:
        return (RGB,)
    unknown = [name for name in blocks if name not in available]
    if unknown or not blocks or len(set(blocks)) != len(blocks):
        raise ValueError(
            f"--lpl_blocks {' '.join(map(str, blocks)) or '(none)'}: this decoder's blocks are "
            f"{', '.join(available)}, each once; or {RGB} alone for the decoded pixels"
        )
    return tuple(name for name in available if name in blocks)


def downscaling_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent position along a side."""
    return 2 ** (len(_first_of(config, _ENCODER_WIDTHS)) - 1)


def _affine(vae: nn.Module, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale with ``scaled = (raw - shift) * scale``; per channel, (1, C, 1, 1), where the config says so."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(config[key], device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        return mean, scale / std
    return config.get("shift_factor") or 0.0, scale


def unscale(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents -> raw latents, (B, C, h, w)."""
    shift, scale = _affine(vae, latents)
    return latents / scale + shift


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
    """Images to the latents that the denoiser is trained on: pixels [-1, 1] (B, 3, H, W) -> scaled (B, C, h, w).

    Args:
        posterior_noise: N(0, I), (B, C, h, w); the sample of the posterior is its mean + std * posterior_noise. An
            AutoencoderDC has no posterior, and none is added.
    """
    with exact_precision(pixels.device):
        encoded = vae.encode(pixels.to(vae.dtype))
    if isinstance(vae, AutoencoderDC):
        raw = at_least_float32(encoded.latent)
    else:
        mean, std = at_least_float32(encoded.latent_dist.mean), at_least_float32(encoded.latent_dist.std)
        raw = mean + std * posterior_noise
    shift, scale = _affine(vae, raw)
    return (raw - shift) * scale


def feature_vae(
    vae: nn.Module, name_or_path: str | None, dtype: torch.dtype, cache_dir: str | None = None
) -> nn.Module:
    """The VAE whose decoder the loss looks through: the pipeline's own, or a frozen copy or another in ``dtype``."""
    if name_or_path is None:
        return vae if vae.dtype == dtype else deepcopy(vae).to(dtype)
    other = AutoModel.from_pretrained(name_or_path, dtype=dtype, cache_dir=cache_dir)
    return other.requires_grad_(False).eval().to(vae.device)


def exact_precision(device: torch.device) -> torch.autocast:
    """The VAE computes in its own dtype, also where the caller's step runs under autocast."""
    return torch.autocast(device.type, enabled=False)
