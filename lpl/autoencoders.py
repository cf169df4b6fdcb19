"""What differs between VAE classes: how latents are scaled, how they are decoded, and where the decoder's blocks are.

Vocabulary. *Scaled* latents are those the denoiser is trained on, ``(encode(pixels) - shift) * scale``, with
``latents_mean`` and ``latents_std`` where the VAE's config has them, in the shape in which the denoiser takes them
(AutoencoderKLFlux2's in patches); ``vae.decode`` takes *raw* ones. An image is one frame where there is a time axis.

Blocks are counted in the order in which the decoder runs: ``mid``, ``up_0``, ``up_1``, ... ; ``rgb`` stands for
decoded pixels. A block ends with its upsampling, as ``up_blocks`` do; only AutoencoderTiny's begin with it, so that
``mid`` is all that works at the latents' resolution. AutoencoderDC has no mid block. Any other module can be named by
its path in the VAE, "decoder.up_blocks.1.resnets.0", and so can those of a decoder of another make.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import diffusers
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCosmos,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLKVAE,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    AutoencoderTiny,
    AutoModel,
    VQModel,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import HunyuanImageUpsample
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from lpl.objectives import at_least_float32


RGB = "rgb"
SUPPORTED = tuple(
    kind.__name__
    for kind in (
        AutoencoderKL,
        AsymmetricAutoencoderKL,
        AutoencoderTiny,
        VQModel,
        AutoencoderDC,
        AutoencoderKLCosmos,
        AutoencoderKLFlux2,
        AutoencoderKLHunyuanImage,
        AutoencoderKLHunyuanImageRefiner,
        AutoencoderKLKVAE,
        AutoencoderKLQwenImage,
        AutoencoderKLQwenImage21,
        AutoencoderKLTemporalDecoder,
        AutoencoderKLWan,
    )
)
# Where a class's configuration has the widths of its encoder's levels; a key of its own comes before the common one,
# which AsymmetricAutoencoderKL has only sometimes.
_ENCODER_WIDTHS = (
    "down_block_out_channels",
    "encoder_block_out_channels",
    "block_out_channels",
    "dim_mult",
    "ch_mult",
)
_LATENT_CHANNELS = ("vq_embed_dim", "latent_channels", "z_dim", "z_channels")


def _first_of(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None:
        raise ValueError(
            f"the configuration of {config.get('_class_name')} has none of {', '.join(keys)}; use another VAE"
        )
    return found


# --- blocks ----------------------------------------------------------------------------------------------------------


def decoder_levels(vae: nn.Module) -> dict[str, list[nn.Module]]:
    """The decoder's blocks, in the order in which they run, each as the modules that run one after the other.

    A block's features are what the last of them returns. Empty for a decoder of another make.
    """
    decoder = getattr(vae, "decoder", None)
    mid: list[nn.Module] = []
    if isinstance(vae, AutoencoderTiny):  # one list; its last convolution makes the pixels
        mid, *ups = _cut_at_upsampling(decoder.layers[:-1], behind=False)
    elif isinstance(vae, AutoencoderKLKVAE):  # containers, kept from the image's side
        mid = [decoder.mid.block_1, decoder.mid.block_2]
        ups = [[*up.block, *([up.upsample] if hasattr(up, "upsample") else [])] for up in reversed(decoder.up)]
    elif isinstance(vae, AutoencoderDC):  # kept from the image's side; some models have nothing at full resolution
        ups = [[block] for block in reversed(decoder.up_blocks) if len(block)]
    elif hasattr(decoder, "mid_block") and hasattr(decoder, "up_blocks"):
        mid = [decoder.mid_block]
        flat = isinstance(vae, AutoencoderKLHunyuanImage)
        ups = _cut_at_upsampling(decoder.up_blocks, behind=True) if flat else [[block] for block in decoder.up_blocks]
    else:
        return {}
    return {**({"mid": mid} if mid else {}), **{f"up_{i}": up for i, up in enumerate(ups)}}


def _cut_at_upsampling(modules: Sequence[nn.Module], behind: bool) -> list[list[nn.Module]]:
    """A flat list of modules in parts, each with its upsampling as the last module or, else, as the first."""
    places = [i + behind for i, module in enumerate(modules) if isinstance(module, nn.Upsample | HunyuanImageUpsample)]
    return [list(modules)[start:end] for start, end in pairwise([0, *places, len(modules)])]


def decoder_blocks(vae: nn.Module, blocks: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in the order in which they run: modules that return the features.

    Args:
        blocks: those to select, see :func:`select_blocks`; None = every one. "rgb" is no module: ``("rgb",)`` gives
            an empty dictionary.

    Raises:
        ValueError: for names and paths that the VAE has not, and for None with a decoder of another make.
    """
    known = {name: parts[-1] for name, parts in decoder_levels(vae).items()}
    paths = {
        path: module
        for path, module in vae.named_modules()
        if path not in ("", "decoder")
        and not path.startswith("encoder")
        and type(module).forward is not nn.Module.forward  # a mere list of modules
    }
    if blocks is None and not known:
        raise ValueError(
            f"the decoder of {type(vae).__name__} has no blocks that are known here; supported are "
            f"{', '.join(SUPPORTED)}; for another, name modules by their path in --lpl_blocks, such as "
            f"{', '.join(_like('decoder', paths))}"
        )
    names = select_blocks(blocks, tuple(known), paths)
    return {name: known[name] if name in known else paths[name] for name in names if name != RGB}


def decoder_parts(vae: nn.Module) -> list[nn.Module]:
    """What the decoder's blocks run one after the other: resnets, attentions, upsamplers.

    Raises:
        ValueError: for a decoder of another make.
    """
    parts: list[nn.Module] = []
    for module in chain.from_iterable(decoder_levels(vae).values()):
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if isinstance(module, nn.Sequential) or lists:  # a block of parts
            for child in module.children():
                parts += child.children() if child in lists else [child]
        else:
            parts.append(module)
    if not parts:
        raise ValueError(
            f"--lpl_gradient_checkpointing: the decoder of {type(vae).__name__} has no parts that are known here; "
            "leave it out"
        )
    return parts


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The VAE of a configuration, as it stands in a file, without memory for its weights: to ask for its modules.

    Raises:
        ValueError: for a class that the installed diffusers has not.
    """
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no autoencoder of the class {name}")
    with torch.device("meta"):
        return kind.from_config(config)


def select_blocks(
    blocks: Sequence[str] | None, available: Sequence[str], paths: Collection[str] = ()
) -> tuple[str, ...]:
    """The blocks asked for, in the order in which the decoder runs them, then modules by path; None = every block.

    Args:
        available: names of the decoder's blocks, in the order in which they run.
        paths: those of the VAE's modules, which are accepted too.

    Raises:
        ValueError: for a name or path that the VAE has not, one given twice, none at all, or "rgb" beside others.
    """
    if blocks is None:
        return tuple(available)
    if isinstance(blocks, str):
        blocks = (blocks,)
    if list(blocks) == [RGB]:
        return (RGB,)
    unknown = [name for name in blocks if name not in available and name not in paths]
    if unknown or not blocks or len(set(blocks)) != len(blocks):
        known = f"this decoder's blocks are {', '.join(available)}, each once; " if available else ""
        wrong = str(unknown[0]) if unknown else ""
        near = get_close_matches(wrong, available, n=1)
        why = f"there is no {wrong}" + (f", did you mean {near[0]}? " if near else "; ") if wrong else ""
        why = f"{RGB} goes alone; " if wrong == RGB else why
        like = _like(wrong or "decoder", paths)
        modules = f"modules of the VAE can be named by their path, such as {', '.join(like)}; " if like else ""
        raise ValueError(
            f"--lpl_blocks {' '.join(map(str, blocks)) or '(none)'}: {why}{known}{modules}or {RGB} alone for the "
            "decoded pixels"
        )
    return tuple(name for name in available if name in blocks) + tuple(b for b in blocks if b not in available)


def _like(name: str, paths: Collection[str]) -> list[str]:
    """A few of the decoder's modules, those that come nearest to what was meant."""
    return get_close_matches(name, paths, n=4, cutoff=0)


# --- decoding --------------------------------------------------------------------------------------------------------


def _has_frames(config: Mapping[str, Any]) -> bool:
    """Whether the VAE takes (B, C, frames, H, W); its configuration tells by how much it compresses time."""
    return any(key.startswith(("temporal_", "temperal_")) for key in config)


def _decode_options(vae: nn.Module) -> dict[str, Any]:
    if isinstance(vae, VQModel):
        return {"force_not_quantize": True}
    return {"num_frames": 1} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}


def decode(vae: nn.Module, raw: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) -> pixels in [-1, 1], (B, 3, H, W), the way the pipelines go.

    A VQModel decodes the latents without quantising them, since all estimates nearby would look the same. Opacity,
    where there is one (AutoencoderKLQwenImage21), is left out.

    Raises:
        ValueError: for a VQModel that decodes indices into its codebook, not latents.
    """
    if vae.config.get("lookup_from_codebook"):
        raise ValueError("this VQModel looks its latents up in its codebook (lookup_from_codebook); LPL cannot use it")
    if not _has_frames(vae.config):
        return vae.decode(raw, return_dict=False, **_decode_options(vae))[0]
    handle = vae.decoder.register_forward_pre_hook(_without_cache, with_kwargs=True)
    try:
        return feature_map(vae.decode(raw.unsqueeze(2), return_dict=False)[0])[:, :3]
    finally:
        handle.remove()


def _without_cache(decoder: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A single frame needs none of what causal convolutions keep for the next, which are copies of their inputs."""
    return inputs, {name: value for name, value in options.items() if name != "feat_cache"}


def feature_map(output: Any) -> Tensor:
    """What a module has returned as (B, C, H, W): a tuple's first, without the time axis of one frame.

    Raises:
        ValueError: where that is no map.
    """
    if isinstance(output, tuple | list):
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 5 and output.shape[2] == 1:
        output = output.squeeze(2)
    if not isinstance(output, Tensor) or output.ndim != 4:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"a module named in --lpl_blocks returns {found}, which is no map (B, C, H, W); name another")
    return output


# --- latents ---------------------------------------------------------------------------------------------------------


def downscaling_factor(config: Mapping[str, Any]) -> int:
    """Pixels per position of the scaled latents along a side."""
    if ratio := config.get("spatial_compression_ratio"):
        return ratio
    return 2 ** (len(_first_of(config, _ENCODER_WIDTHS)) - 1) * _side(config.get("patch_size"))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the scaled latents."""
    return _first_of(config, _LATENT_CHANNELS) * _latent_patch(config) ** 2


def _side(patch: int | Sequence[int] | None) -> int:
    return patch[0] if isinstance(patch, Sequence) else patch or 1


def _latent_patch(config: Mapping[str, Any]) -> int:
    """Raw latent positions per scaled one along a side; AutoencoderKLFlux2's batch norm is on patches of them."""
    return _side(config["patch_size"]) if "batch_norm_eps" in config else 1


def _affine(vae: nn.Module, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale with ``scaled = (raw - shift) * scale``; (1, C, 1, 1) where the VAE has them per channel."""
    config = vae.config
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var + config["batch_norm_eps"]).sqrt()
        return vae.bn.running_mean.to(like).view(1, -1, 1, 1), 1 / std.to(like).view(1, -1, 1, 1)
    scale = config.get("scaling_factor") or 1.0
    if config.get("norm_type") == "spatial":  # a MoVQ, whose latents Kandinsky's pipelines take as they are
        scale = 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (  # AutoencoderKLCosmos has one per channel and frame
            _on_device(tuple(config[key]), like.device, like.dtype).view(1, like.shape[1], -1, 1)[:, :, :1]
            for key in ("latents_mean", "latents_std")
        )
        return mean, scale / std
    return config.get("shift_factor") or 0.0, scale


@lru_cache
def _on_device(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Moved there once, since each time a GPU would be waited for."""
    return torch.tensor(values, device=device, dtype=dtype)


def unscale(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> raw ones, of that shape but for AutoencoderKLFlux2: (B, C / 4, 2h, 2w)."""
    shift, scale = _affine(vae, latents)
    return F.pixel_shuffle(latents / scale + shift, _latent_patch(vae.config))


@torch.no_grad()
def encode(vae: nn.Module, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
    """Images to the latents that the denoiser is trained on: pixels [-1, 1] (B, 3, H, W) -> scaled (B, C, h, w).

    Args:
        posterior_noise: N(0, I), (B, C, h, w); the sample of the posterior is its mean + std * posterior_noise. Where
            there is no posterior (AutoencoderDC, AutoencoderTiny, VQModel, AutoencoderKLCosmos) none is added.
    """
    pixels = pixels.to(vae.dtype)
    if 4 in (vae.config.get("in_channels"), vae.config.get("input_channels")):  # the fourth is opacity
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)
    if _has_frames(vae.config):
        pixels = pixels.unsqueeze(2)
    elif pixels.device.type == "cpu":  # its convolutions reorder everything else, there and back
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    with exact_precision(pixels.device):
        encoded = vae.encode(pixels, return_dict=False)[0]
    raw = encoded if isinstance(encoded, Tensor) else encoded.mode()  # a posterior's mode is its mean
    patch = _latent_patch(vae.config)
    raw = F.pixel_unshuffle(at_least_float32(feature_map(raw)), patch)
    if isinstance(encoded, DiagonalGaussianDistribution):
        raw = raw + F.pixel_unshuffle(at_least_float32(feature_map(encoded.std)), patch) * posterior_noise
    shift, scale = _affine(vae, raw)
    return (raw - shift) * scale


def feature_vae(
    vae: nn.Module, name_or_path: str | None, dtype: torch.dtype, cache_dir: str | None = None
) -> nn.Module:
    """The VAE whose decoder the loss looks through: the pipeline's own, or a frozen copy or another in ``dtype``."""
    if name_or_path is None:
        # a copy of the decoder, that is without the encoder
        return vae if vae.dtype == dtype else deepcopy(vae, {id(getattr(vae, "encoder", None)): None}).to(dtype)
    other = AutoModel.from_pretrained(name_or_path, dtype=dtype, cache_dir=cache_dir, use_safetensors=True)
    return other.requires_grad_(False).eval().to(vae.device)


def exact_precision(device: torch.device) -> torch.autocast:
    """The VAE computes in its own dtype, also where the caller's step runs under autocast."""
    return torch.autocast(device.type, enabled=False)
