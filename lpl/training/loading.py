"""Loads a family's pipeline for a run: each component in its precision, from its source or with random weights.

Precisions. Components that are trained whole are in float32 (master weights); frozen ones, and those that carry LoRA,
are in the run's mixed precision. The VAE is always in float32: in half precision some produce NaN and black images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoModel
from safetensors import SafetensorError
from torch import nn

from lpl.config.groups import Lora, Model
from lpl.families import Family
from lpl.families.description import Description
from lpl.families.fit import component_class
from lpl.families.tokens import of_text
from lpl.tools.words import counted, first_line
from lpl.training.average import MovingAverage
from lpl.training.quantization import answer_in, quantization_config


@contextmanager
def loading_weights(what: str, hint: str = "") -> Iterator[None]:
    """Context in which weights that cannot be loaded are a ValueError that names their flag.

    Args:
        what: the flag and its value.
        hint: where to look.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if str(error).startswith("--"):  # it names a flag already
            raise
        raise ValueError(f"{what}: its weights cannot be loaded{hint} ({first_line(error)})") from error


def load_family(model: Model, lora: Lora, description: Description, dtype: torch.dtype) -> Family:
    """The pipeline that the flags name.

    Args:
        dtype: of the mixed precision.

    Raises:
        OSError, ValueError: if weights cannot be loaded.
    """
    family = description.family
    dtypes = precisions(model, lora, family, dtype)
    components = replaced_components(model)
    if model.from_scratch:
        components[family.denoiser_name] = fresh_denoiser(description)
    elif model.non_ema_revision or lora.quantize_base:
        trained_in = dtype if lora.lora else torch.float32
        components[family.denoiser_name] = load_denoiser(
            model, lora.quantize_base, description, trained_in, model.non_ema_revision
        )
    folder = pipeline_folder(model, description, components, whole=not lora.lora)
    for name in family.text_encoder_names:
        if name not in description.absent:
            components[name] = load_text_encoder(folder, name, description, dtypes[name], model.variant)
    loaded = family.load(
        folder,
        dtypes,
        max_sequence_length=model.max_sequence_length,
        guidance_scale=model.guidance_scale,
        **pipeline_source(model, description) | family.left_out() | components,
    )
    for name in family.text_encoder_names:
        _refuse_tokens(name, loaded)
    for name in ("vae", family.denoiser_name):  # diffusers leaves them without memory
        _refuse_missing(name, [n for n, p in getattr(loaded.pipeline, name).named_parameters() if p.is_meta])
    return loaded


def precisions(model: Model, lora: Lora, family: type[Family], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The precision of each component by name; of all others as "default".

    Args:
        dtype: of the mixed precision.
    """
    dtypes = {"default": torch.float32, **dict.fromkeys(family.text_encoder_names, dtype)}
    if dtype == torch.float16:
        dtypes |= dict.fromkeys(family.no_float16, torch.bfloat16)
    if lora.lora:
        dtypes[family.denoiser_name] = dtype
    elif model.train_text_encoder:
        dtypes |= dict.fromkeys(family.trainable_text_encoders, torch.float32)
    return dtypes


def load_text_encoder(
    folder: str, name: str, description: Description, dtype: torch.dtype, variant: str | None
) -> nn.Module:
    """A text encoder, refused where its file lacks weights, which transformers would draw at random.

    Raises:
        OSError, ValueError: if it cannot be loaded whole.
    """
    model, found = component_class(description.index[name]).from_pretrained(
        folder,
        subfolder=name,
        variant=variant,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are reported instead
        output_loading_info=True,
    )
    for key, here, needed in sorted(found["mismatched_keys"]):
        raise ValueError(f"{name}: {key} is {tuple(here)} in its file and {tuple(needed)} by its configuration")
    _refuse_missing(name, sorted(found["missing_keys"]))
    return model


def _refuse_tokens(name: str, family: Family) -> None:
    """Refuse a tokenizer with more tokens than its encoder has embeddings."""
    encoder, tokenizer = (
        getattr(family.pipeline, part, None) for part in (name, name.replace("text_encoder", "tokenizer"))
    )
    if encoder is None or tokenizer is None:
        return
    size = encoder.config.get_text_config().vocab_size
    if (count := len(of_text(tokenizer))) > size:
        raise ValueError(f"{name}: it has embeddings of {size} tokens, and its tokenizer has {count} tokens")


def _refuse_missing(name: str, missing: Sequence[str]) -> None:
    if missing:
        raise ValueError(
            f"{name}: its files lack {counted(len(missing), 'weight')} that it needs, such as {missing[0]}"
        )


def pipeline_folder(model: Model, description: Description, replaced: Iterable[str], whole: bool) -> str:
    """The pipeline's folder on this machine; one of the Hub is downloaded.

    Args:
        replaced: components that come from elsewhere.
        whole: with the idle components, which a saved pipeline needs.
    """
    if Path(model.pipeline).is_dir():
        return model.pipeline
    without = dict.fromkeys(replaced) | ({} if whole else description.family.left_out())
    pipeline_class: Any = description.family.pipeline_class
    return str(pipeline_class.download(model.pipeline, **pipeline_source(model, description) | without))


def pipeline_source(model: Model, description: Description) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: where the pipeline is, and which components it lacks."""
    where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    return {"use_safetensors": True, **where, **description.absent}


def replaced_components(model: Model) -> dict[str, nn.Module]:
    """The frozen components that come from elsewhere than the pipeline."""
    path = model.pretrained_vae_model_name_or_path
    if not path:
        return {}
    with loading_weights(f"--pretrained_vae_model_name_or_path {path}"):
        source = {"dtype": torch.float32, "cache_dir": model.cache_dir, "use_safetensors": True}
        return {"vae": cast(nn.Module, AutoModel.from_pretrained(path, **source))}


def fresh_denoiser(description: Description) -> nn.Module:
    """The pipeline's denoiser with random weights, for --from_scratch."""
    family = description.family
    denoiser = denoiser_class(description).from_config(family.untrained_config(description.denoiser))
    start_as_identity(family, denoiser)
    return denoiser


def start_as_identity(family: type[Family], denoiser: nn.Module) -> None:
    """Zero the layers that :meth:`Family.identity_layers` lists."""
    for layer in family.identity_layers(denoiser):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def average_from_revision(average: MovingAverage, model: Model, description: Description) -> None:
    """Continue the moving average from the weights of --revision, while those of --non_ema_revision are trained."""
    denoiser = load_denoiser(model, None, description, torch.float32)
    for shadow, weight in zip(average.shadow_params, denoiser.parameters()):  # those of text encoders follow
        shadow.copy_(weight.detach())


def load_denoiser(
    model: Model, quantize_base: str | None, description: Description, dtype: torch.dtype, revision: str | None = None
) -> nn.Module:
    """The denoiser alone, from another revision than the pipeline, or with weights of 8 or 4 bits (QLoRA).

    Args:
        quantize_base: of --quantize_base, or None.
        revision: defaults to --revision.
    """
    quantized = quantization_config(quantize_base, dtype)
    denoiser = denoiser_class(description).from_pretrained(
        model.pipeline,
        subfolder=description.family.denoiser_name,
        revision=revision or model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
        dtype=dtype,
        use_safetensors=True,
        **({} if quantized is None else {"quantization_config": quantized}),
    )
    if quantized is not None:
        answer_in(denoiser, dtype)
    return denoiser


def denoiser_class(description: Description) -> Any:
    """A class of diffusers that is a ModelMixin and a ConfigMixin."""
    return getattr(diffusers, description.denoiser["_class_name"])


def weight_dtype(mixed_precision: str | None) -> torch.dtype:
    """The precision of everything that is not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)
