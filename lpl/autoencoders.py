"""The differences between VAE classes: how they scale latents, how they decode, and the decoder's blocks (Eq. 1).

Vocabulary. *Scaled* latents z0 are those the denoiser is trained on, ``(encode(pixels) - shift) * scale``, with
``latents_mean`` and ``latents_std`` if the VAE's config has them, in the denoiser's shape (AutoencoderKLFlux2's in
patches); ``vae.decode`` takes *raw* latents. For a VAE with a time axis, an image is one frame.

Blocks are numbered in the order in which the decoder runs: ``mid``, ``up_0``, ``up_1``, ...; ``rgb`` stands for the
decoded pixels. A block ends with its upsampling, as ``up_blocks`` do; AutoencoderTiny's begin with it, so that ``mid``
is everything at the latents' resolution. AutoencoderDC has no mid block. Any other module, also of an unsupported
decoder, can be named by its path in the VAE, e.g. "decoder.up_blocks.1.resnets.0".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from inspect import signature
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
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
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
# Keys of a configuration with the widths of the encoder's levels; class-specific keys come before the common one,
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
    """The value of the first key that is set.

    Raises:
        ValueError: if none is.
    """
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None:
        raise ValueError(
            f"the configuration of {config.get('_class_name')} has none of {', '.join(keys)}; use another VAE"
        )
    return found


# --- blocks ----------------------------------------------------------------------------------------------------------


def decoder_levels(vae: ModelMixin) -> dict[str, list[nn.Module]]:
    """The decoder's blocks in running order, each as a list of modules in running order.

    A block's features are the output of its last module. Empty for an unsupported decoder.
    """
    decoder: Any = getattr(vae, "decoder", None)
    mid: list[nn.Module] = []
    if isinstance(vae, AutoencoderTiny):  # a flat list; its last convolution returns the pixels
        mid, *ups = _cut_at_upsampling(decoder.layers[:-1], behind=False)
    elif isinstance(vae, AutoencoderKLKVAE):  # containers, stored in reverse order
        mid = [decoder.mid.block_1, decoder.mid.block_2]
        ups = [[*up.block, *([up.upsample] if hasattr(up, "upsample") else [])] for up in reversed(decoder.up)]
    elif isinstance(vae, AutoencoderDC):  # stored in reverse order; some models have no block at full resolution
        ups = [[block] for block in reversed(decoder.up_blocks) if len(block)]
    elif hasattr(decoder, "mid_block") and hasattr(decoder, "up_blocks"):
        mid = [decoder.mid_block]
        flat = isinstance(vae, AutoencoderKLHunyuanImage)
        ups = _cut_at_upsampling(decoder.up_blocks, behind=True) if flat else [[block] for block in decoder.up_blocks]
    else:
        return {}
    return {**({"mid": mid} if mid else {}), **{f"up_{i}": up for i, up in enumerate(ups)}}


def _cut_at_upsampling(modules: Sequence[nn.Module], behind: bool) -> list[list[nn.Module]]:
    """Split a flat list of modules behind (or before) each upsampling."""
    places = [i + behind for i, module in enumerate(modules) if isinstance(module, nn.Upsample | HunyuanImageUpsample)]
    return [list(modules)[start:end] for start, end in pairwise([0, *places, len(modules)])]


def decoder_blocks(vae: ModelMixin, blocks: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """{name: module that returns the block's features}, in running order.

    Args:
        blocks: the selection, see :func:`select_blocks`; None = all. "rgb" is no module: ``("rgb",)`` returns an empty
            dictionary.

    Raises:
        ValueError: for names and paths that the VAE lacks, and for None with an unsupported decoder.
    """
    known = {name: parts[-1] for name, parts in decoder_levels(vae).items()}
    paths = {
        path: module
        for path, module in vae.named_modules()
        if path not in ("", "decoder")
        and not path.startswith("encoder")
        and type(module).forward is not nn.Module.forward  # excludes lists of modules
    }
    if blocks is None and not known:
        raise ValueError(
            f"the decoder of {type(vae).__name__} has no known blocks; supported are "
            f"{', '.join(SUPPORTED)}; for another, name modules by their path in --lpl_blocks, such as "
            f"{', '.join(_like('decoder', paths))}"
        )
    names = select_blocks(blocks, tuple(known), paths)
    return {name: known[name] if name in known else paths[name] for name in names if name != RGB}


def decoder_parts(vae: ModelMixin) -> list[nn.Module]:
    """The parts of the decoder's blocks in running order: resnets, attentions, upsamplers.

    Raises:
        ValueError: for an unsupported decoder.
    """
    parts: list[nn.Module] = []
    for module in chain.from_iterable(decoder_levels(vae).values()):
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if isinstance(module, nn.Sequential) or lists:  # a block with parts
            for child in module.children():
                parts += child.children() if child in lists else [child]
        else:
            parts.append(module)
    if not parts:
        raise ValueError(
            f"--lpl_gradient_checkpointing: the decoder of {type(vae).__name__} has no known parts; leave it out"
        )
    return parts


def skeleton(config: Mapping[str, Any]) -> ModelMixin:
    """The VAE, or another model of diffusers, of a configuration, without memory for its weights, on the meta device.

    Raises:
        ValueError: for a class that the installed diffusers lacks.
    """
    name = config.get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no model of the class {name}")
    with torch.device("meta"):
        return kind.from_config(config)


def without_weights(vae: ModelMixin) -> ModelMixin:
    """A copy of a VAE in its dtype on the meta device: no memory for its weights, no hooks."""
    known = signature(type(vae)).parameters  # ``from_config`` warns of the rest
    with torch.device("meta"):
        copied = type(vae)(**{name: value for name, value in vae.config.items() if name in known})
    nn.Module.to(copied, "meta", vae.dtype)  # diffusers' own ``to`` warns
    return copied.eval()


def select_blocks(
    blocks: Sequence[str] | None, available: Sequence[str], paths: Collection[str] = ()
) -> tuple[str, ...]:
    """The selected blocks in the decoder's running order, then modules by path; None = all blocks.

    Args:
        available: names of the decoder's blocks, in running order.
        paths: paths of the VAE's modules, which are accepted too.

    Raises:
        ValueError: for an unknown or repeated name, an empty selection, or "rgb" with other names.
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
    """The module paths closest to a name."""
    return get_close_matches(name, paths, n=4, cutoff=0)


# --- decoding --------------------------------------------------------------------------------------------------------


def _has_frames(config: Mapping[str, Any]) -> bool:
    """Whether the VAE takes (B, C, frames, H, W), by the keys of its temporal compression."""
    return any(key.startswith(("temporal_", "temperal_")) for key in config)


def _decode_options(vae: ModelMixin) -> dict[str, Any]:
    """Arguments of ``vae.decode`` that its class needs."""
    if isinstance(vae, VQModel):
        return {"force_not_quantize": True}
    return {"num_frames": 1} if isinstance(vae, AutoencoderKLTemporalDecoder) else {}


def decode(vae: ModelMixin, raw: Tensor) -> Tensor:
    """Raw latents, (B, C, h, w) -> pixels [-1, 1], (B, 3, H, W), as the pipelines decode.

    A VQModel decodes without quantising, since quantised estimates would equal their neighbours. An alpha channel
    (AutoencoderKLQwenImage21) is dropped.

    Raises:
        ValueError: for a VQModel that decodes indices of its codebook instead of latents.
    """
    if vae.config.get("lookup_from_codebook"):
        raise ValueError("this VQModel decodes indices of its codebook (lookup_from_codebook); LPL cannot use it")
    if not _has_frames(vae.config):
        return vae.decode(raw, return_dict=False, **_decode_options(vae))[0]
    handle = vae.decoder.register_forward_pre_hook(_without_cache, with_kwargs=True)
    try:
        return feature_map(vae.decode(raw.unsqueeze(2), return_dict=False)[0])[:, :3]
    finally:
        handle.remove()


def _without_cache(decoder: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Drop the cache of causal convolutions: copies of their inputs for the next frame, which a single frame lacks."""
    return inputs, {name: value for name, value in options.items() if name != "feat_cache"}


def feature_map(output: Any) -> Tensor:
    """A module's output as (B, C, H, W): the first of a tuple, without the time axis of a single frame.

    Raises:
        ValueError: if the output is no such map.
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
    """Pixels per position of the scaled latents, along a side."""
    if ratio := config.get("spatial_compression_ratio"):
        return ratio
    return 2 ** (len(_first_of(config, _ENCODER_WIDTHS)) - 1) * _side(config.get("patch_size"))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the scaled latents."""
    return _first_of(config, _LATENT_CHANNELS) * _latent_patch(config) ** 2


def _side(patch: int | Sequence[int] | None) -> int:
    return patch[0] if isinstance(patch, Sequence) else patch or 1


def _latent_patch(config: Mapping[str, Any]) -> int:
    """Raw positions per scaled position, along a side; AutoencoderKLFlux2's batch norm is on patches."""
    return _side(config["patch_size"]) if "batch_norm_eps" in config else 1


def _affine(vae: ModelMixin, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Shift and scale of ``scaled = (raw - shift) * scale``; (1, C, 1, 1) if the VAE has them per channel."""
    config = vae.config
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var + config["batch_norm_eps"]).sqrt()
        return vae.bn.running_mean.to(like).view(1, -1, 1, 1), 1 / std.to(like).view(1, -1, 1, 1)
    scale = config.get("scaling_factor") or 1.0
    if config.get("norm_type") == "spatial":  # a MoVQ, whose latents Kandinsky's pipelines do not scale
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
    """A tensor on the device, copied once, since each copy waits for the GPU."""
    return torch.tensor(values, device=device, dtype=dtype)


def unscale(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Scaled latents, (B, C, h, w) -> raw latents of the same shape; AutoencoderKLFlux2: (B, C / 4, 2h, 2w)."""
    shift, scale = _affine(vae, latents)
    return F.pixel_shuffle(latents / scale + shift, _latent_patch(vae.config))


def encode(vae: ModelMixin, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
    """Pixels [-1, 1], (B, 3, H, W) -> scaled latents z0, (B, C, h, w).

    Args:
        posterior_noise: N(0, I), (B, C, h, w); the sample of the posterior is mean + std * posterior_noise. Without a
            posterior (AutoencoderDC, AutoencoderTiny, VQModel, AutoencoderKLCosmos) it is not used.
    """
    return sampled_latents(vae, *posterior(vae, pixels), posterior_noise)


@torch.no_grad()
def posterior(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pixels [-1, 1], (B, 3, H, W) -> mean and std of the raw latents, (B, C, h, w) each in the layout of scaled ones.

    The std is None for a VAE without a posterior.
    """
    pixels = pixels.to(vae.dtype)
    if 4 in (vae.config.get("in_channels"), vae.config.get("input_channels")):  # the fourth is alpha
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)
    if _has_frames(vae.config):
        pixels = pixels.unsqueeze(2)
    elif pixels.device.type == "cpu":  # avoids conversions in every convolution
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    with exact_precision(pixels.device):
        encoded = vae.encode(pixels, return_dict=False)[0]
    raw = encoded if isinstance(encoded, Tensor) else encoded.mode()  # the mode of the posterior is its mean
    patch = _latent_patch(vae.config)
    raw = F.pixel_unshuffle(at_least_float32(feature_map(raw)), patch)
    if not isinstance(encoded, DiagonalGaussianDistribution):
        return raw, None
    return raw, F.pixel_unshuffle(at_least_float32(feature_map(encoded.std)), patch)


def sampled_latents(vae: ModelMixin, mean: Tensor, std: Tensor | None, posterior_noise: Tensor) -> Tensor:
    """A sample of the posterior as scaled latents z0, (B, C, h, w); arguments as :func:`posterior` returns them."""
    raw = mean if std is None else mean + std * posterior_noise
    shift, scale = _affine(vae, raw)
    return (raw - shift) * scale


def drop_encoder(vae: Any) -> None:
    """Free the encoder. An empty module stays: some classes look through it when they decode."""
    if hasattr(vae, "encoder"):
        vae.encoder = nn.Identity()


def feature_vae(
    vae: ModelMixin, name_or_path: str | None, dtype: torch.dtype, cache_dir: str | None = None
) -> ModelMixin:
    """The VAE whose decoder gives the features: the pipeline's own, a frozen copy in ``dtype``, or another VAE."""
    if name_or_path is None:  # a copy has no encoder
        if vae.dtype == dtype:
            return vae
        decoder: Any = deepcopy(vae, {id(getattr(vae, "encoder", None)): nn.Identity()})
        nn.Module.to(decoder, dtype)  # diffusers' own ``to`` warns
        return decoder
    other = AutoModel.from_pretrained(name_or_path, dtype=dtype, cache_dir=cache_dir, use_safetensors=True)
    return other.requires_grad_(False).eval().to(vae.device)


@contextmanager
def exact_precision(device: torch.device) -> Iterator[None]:
    """Context in which the VAE computes in its own dtype, also under the caller's autocast.

    A float32 VAE's convolutions may use TF32 on GPUs that have it, whatever the process allows elsewhere: their inputs
    are rounded to 10 bits, as in float16, and sums are float32. The environment variable NVIDIA_TF32_OVERRIDE=0
    excludes it.
    """
    convolutions = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"
    try:
        with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
            yield
    finally:
        convolutions.fp32_precision = before
