"""Reads a model that is one file, by diffusers' ``from_single_file``.

Vocabulary. A *checkpoint* is a ``.safetensors`` file in the layout of the original programs: the denoiser under
``model.diffusion_model.`` or, alone, without a prefix, often with VAE and text encoders beside it. Its *part* of a
component is the tensors with that component's prefix. The *header* has names, shapes and dtypes; a file is refused by
it, before anything is downloaded, loaded or converted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders import single_file_utils as diffusers_utils
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HTTPError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lpl.tools import headers
from lpl.tools.privacy import HubFile, hub_file
from lpl.tools.words import counted, first_line


Header = Mapping[str, Tensor]  # on the meta device
DENOISER = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
TEXT_ENCODERS = {
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
}
T5 = "text_encoders.t5xxl."
OTHERS = ("cond_stage_model.", "conditioner.", "text_encoders.", "model_ema.", *VAE)  # beside a denoiser
UNET = "input_blocks."  # begins the original UNet's names; diffusers reads them with a prefix only
DENOISERS = (  # begin names without a prefix of denoisers whose architecture diffusers may not find
    *("transformer_blocks.0.", "single_transformer_blocks.0.", "down_blocks.0.", UNET),
    *("txtfusion.", "layers.0.self_attention."),  # Krea 2, ERNIE-Image
)
LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".hada_w", ".lokr_w")
SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax")  # of quantised weights


# The file ------------------------------------------------------------------------------------------------------------


def read_header(source: str, revision: str | None, cache_dir: str | None) -> tuple[Header, Mapping[str, str]]:
    """Names, shapes and dtypes of a file's tensors, and its metadata; a file on the Hub is not downloaded for it.

    Raises:
        ValueError: if it cannot be read.
    """
    place = hub_file(source)
    local = source if place is None else _cached(place, revision, cache_dir)
    try:
        if local is not None:
            return headers.read_header(local)
        assert place is not None
        read = HfApi().parse_safetensors_file_metadata(
            place.repository, place.file, revision=place.revision or revision
        )
    except (HTTPError, OSError, ValueError, SafetensorError, SafetensorsParsingError) as error:
        raise ValueError(_why_unreadable(place, first_line(error))) from error
    return {name: headers.empty(part.shape, part.dtype) for name, part in read.tensors.items()}, read.metadata


def _why_unreadable(place: HubFile | None, error: str) -> str:
    if place is None:
        return f"this is no whole safetensors file, or a pointer of Git LFS ({error}); download it again"
    offline = " since HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""
    return (
        f"there is no such file here, and {place.file} in {place.repository} on the Hub cannot be reached{offline} "
        f"({error}); if the repository is gated or private, accept its licence on its page and run hf auth login"
    )


def _cached(place: HubFile, revision: str | None, cache_dir: str | None) -> str | None:
    found = try_to_load_from_cache(place.repository, place.file, cache_dir, place.revision or revision)
    return found if isinstance(found, str) else None


def local_file(source: str, revision: str | None, cache_dir: str | None) -> Path:
    """The file on this machine; one on the Hub is downloaded.

    Raises:
        ValueError: if it cannot be.
    """
    place = hub_file(source)
    if place is None:
        return Path(source)
    try:
        return Path(
            hf_hub_download(place.repository, place.file, revision=place.revision or revision, cache_dir=cache_dir)
        )
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(_why_unreadable(place, first_line(error))) from error


# What is in it -------------------------------------------------------------------------------------------------------


def why_no_checkpoint(header: Header) -> str | None:
    """Why a file of that header holds no denoiser that can be trained, and what to give instead; None if it does."""
    names = list(header)
    if any(mark in name for name in names for mark in LORA_MARKS):
        return (
            "this is a LoRA; give the model that it was trained on, and this by --lora_init to go on training it, or "
            "by --merge_lora"
        )
    if quantised := next((name for name in names if name.endswith(SCALES)), None):
        return f"its weights are quantised ({quantised}); give the file in 16 or 32 bits"
    if not any(tensor.is_floating_point() for tensor in header.values()):
        return "it has no weights in floating-point numbers; give the file in 16 or 32 bits"
    if not _part(names, (DENOISER,)):
        if all(name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", *VAE)) for name in names):
            return (
                "this is a VAE alone; give the file of the whole model, and this VAE, as a folder of diffusers, by "
                "--pretrained_vae_model_name_or_path"
            )
        if all(name.startswith(("text_model.", "text_projection.", "encoder.block.", "shared.")) for name in names):
            return "this is a text encoder alone; give the file of the whole model, or of its denoiser"
        if not is_denoiser(header):
            return "diffusers does not know this layout as that of a model; give a pipeline in its own layout"
    return None


def is_denoiser(header: Header) -> bool:
    """Whether names without a prefix are those of a denoiser, in the original layout or in diffusers' own."""
    return any(name.startswith(DENOISERS) for name in header) or model_type(header) not in (None, "v1")


def model_type(header: Header) -> str | None:
    """Diffusers' own name of the architecture; None if it is not known."""
    try:
        found = diffusers_utils.infer_diffusers_model_type(header)
    except (UnboundLocalError, KeyError, IndexError, ValueError):  # of a model of another size
        return None
    return found if found != "v1" or f"{DENOISER}{UNET}0.0.weight" in header else None


def default_config(header: Header) -> str | None:
    """The pipeline on the Hub whose configuration diffusers takes for a file of that header; None if it knows none."""
    name = model_type(header)
    return (
        None
        if name is None
        else diffusers_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[name]["pretrained_model_name_or_path"]
    )


def component_names(header: Header, name: str, kind: type, denoiser: str) -> list[str]:
    """The names of the tensors that are a component's part; empty if the file lacks it.

    Args:
        name: of the component; ``denoiser`` is that of the denoiser.
        kind: its class.
    """
    if name == denoiser:
        return _part(header, (DENOISER,)) or [other for other in header if not other.startswith(OTHERS)]
    if name == "vae" and hasattr(kind, "from_single_file"):
        return _part(header, VAE)
    if kind.__name__ == "T5EncoderModel":
        return _part(header, (T5,))
    return _part(header, TEXT_ENCODERS.get(name, ())) if kind.__name__.startswith("CLIPText") else []


def _part(names: Any, prefixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if prefixes and name.startswith(prefixes)]


# Loading -------------------------------------------------------------------------------------------------------------


def load_component(file: Path, header: Header, names: list[str], kind: Any, config: Path, subfolder: str) -> nn.Module:
    """A component in the precision of the file, on the CPU.

    Args:
        names: :func:`component_names`.
        config: folder of the pipeline whose configuration it gets.

    Raises:
        ValueError: if the file's part does not fit the configuration.
    """
    dtype = _precision(header[name].dtype for name in names)
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in names}
    if names[0].startswith(DENOISER) and not any(name.startswith(f"{DENOISER}{UNET}") for name in names):
        tensors = {name.removeprefix(DENOISER): tensor for name, tensor in tensors.items()}
    elif any(name.startswith(UNET) for name in names):
        tensors = {DENOISER + name: tensor for name, tensor in tensors.items()}
    source: dict[str, Any] = {"config": str(config), "subfolder": subfolder, "torch_dtype": dtype}
    for part in ("loaders.single_file_utils", "models.modeling_utils"):
        logging.getLogger(f"diffusers.{part}").setLevel(logging.ERROR)  # they speak of casts that change nothing
    try:
        if hasattr(kind, "from_single_file"):
            model = kind.from_single_file(tensors, local_files_only=True, **source)
        elif kind.__name__ == "T5EncoderModel":
            model = diffusers_utils.create_diffusers_t5_model_from_checkpoint(kind, tensors, **source)
        else:
            model = diffusers_utils.create_diffusers_clip_model_from_ldm(kind, tensors, **source)
    except NotImplementedError as error:  # torch cannot move what has no data
        raise ValueError(
            f"it lacks weights of the {subfolder} that {config} has; give the configuration of its own architecture "
            "by --single_file_config"
        ) from error
    except (diffusers_utils.SingleFileComponentError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"its {subfolder} does not fit the configuration of {config} ({first_line(error)}); give that of its own "
            "architecture by --single_file_config"
        ) from error
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(
            f"it lacks {counted(len(missing), 'weight')} of the {subfolder} that {config} has, such as {missing[0]}; "
            "give the configuration of its own architecture by --single_file_config"
        )
    return cast(nn.Module, model)


def _precision(dtypes: Iterator[torch.dtype]) -> torch.dtype:
    """The one that holds all of them exactly; bfloat16 holds both kinds of 8 bits."""
    found = {dtype for dtype in dtypes if dtype.is_floating_point}
    found = {torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in found}
    return found.pop() if len(found) == 1 and torch.float64 not in found else torch.float32
