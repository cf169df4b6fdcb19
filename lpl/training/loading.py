"""Loads a family's pipeline as a run needs it: which parts in which precision, from where, or with fresh weights; and
saves what came of it.

Precisions. What is trained whole is in float32 (master weights); what is frozen or carries LoRA is in the run's mixed
precision; the VAE is always in float32, since in half precision some make NaNs and black images.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers import AutoModel
from diffusers.models import normalization
from torch import nn

from lpl.config.groups import Model
from lpl.families import Family
from lpl.families.description import Description
from lpl.training.average import MovingAverage


def load_family(args: Namespace, configs: Description, dtype: torch.dtype) -> Family:
    """The pipeline that ``args`` name.

    Args:
        dtype: of the mixed precision.

    Raises:
        OSError, ValueError: where weights cannot be loaded.
    """
    family = configs.family
    frozen = dict.fromkeys(family.text_encoder_names, dtype)
    if dtype == torch.float16:
        frozen |= dict.fromkeys(family.no_float16, torch.bfloat16)
    if args.train_text_encoder and not args.lora.lora:
        frozen |= dict.fromkeys(family.trainable_text_encoders, torch.float32)
    if args.lora.lora:
        frozen[family.denoiser_name] = dtype
    components = replaced_components(args.model)
    if args.from_scratch:
        components[family.denoiser_name] = fresh_denoiser(configs)
    elif args.non_ema_revision or args.quantize_base:
        trained_in = dtype if args.lora.lora else torch.float32
        components[family.denoiser_name] = load_denoiser(
            args.model, args.quantize_base, configs, trained_in, args.non_ema_revision
        )
    source = pipeline_source(args.model, configs) | dict(family.left_out) | components
    return family.load(
        args.pretrained_model_name_or_path,
        {"default": torch.float32, **frozen},
        max_sequence_length=args.max_sequence_length,
        guidance_scale=args.guidance_scale,
        **source,
    )


def pipeline_source(model: Model, configs: Description) -> dict[str, Any]:
    """What ``from_pretrained`` is told about where a pipeline is, and which components it lacks."""
    where = {"revision": model.revision, "variant": model.variant, "cache_dir": model.cache_dir}
    return {"use_safetensors": True, **where, **configs.absent}


def replaced_components(model: Model) -> dict[str, nn.Module]:
    """The frozen components that do not come from the pipeline itself."""
    path = model.pretrained_vae_model_name_or_path
    source = {"dtype": torch.float32, "cache_dir": model.cache_dir, "use_safetensors": True}
    return {"vae": AutoModel.from_pretrained(path, **source)} if path else {}


def fresh_denoiser(configs: Description) -> nn.Module:
    """The denoiser of the pipeline's configuration with random weights, for --from_scratch."""
    config = configs.family.untrained_config(configs.denoiser)
    denoiser = _denoiser_class(configs).from_config(config)
    _start_as_identity(denoiser)
    return denoiser


def _start_as_identity(denoiser: nn.Module) -> None:
    """Zero the output, and what modulates the blocks of DiT, SD3 and Flux, which then pass on what they are given:
    adaLN-Zero of the DiT paper (Peebles & Xie, Sec. 3.2). All else begins as diffusers has it."""
    modulations = (
        normalization.AdaLayerNormZero,
        normalization.AdaLayerNormZeroSingle,
        normalization.SD35AdaLayerNormZeroX,
        normalization.AdaLayerNormContinuous,
    )
    zeroed = [module.linear for module in denoiser.modules() if isinstance(module, modulations)]
    zeroed += [getattr(denoiser, name) for name in ("proj_out", "proj_out_1", "proj_out_2") if hasattr(denoiser, name)]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def average_from_revision(ema: MovingAverage, args: Namespace, configs: Description) -> None:
    """Let the moving average go on from the weights of --revision, while those of --non_ema_revision are trained."""
    denoiser = load_denoiser(args.model, args.quantize_base, configs, torch.float32)
    for shadow, weight in zip(ema.shadow_params, denoiser.parameters()):  # text encoders come behind
        shadow.copy_(weight.detach())


def load_denoiser(
    model: Model, quantize_base: str | None, configs: Description, dtype: torch.dtype, revision: str | None = None
) -> nn.Module:
    """The denoiser alone, of another revision than the pipeline's, or with weights of 8 or 4 bits (QLoRA)."""
    options: dict[str, Any] = {}
    if quantize_base == "8bit":
        options["quantization_config"] = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    elif quantize_base == "4bit":
        options["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    denoiser = _denoiser_class(configs).from_pretrained(
        model.pretrained_model_name_or_path,
        subfolder=configs.family.denoiser_name,
        revision=revision or model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
        dtype=dtype,
        use_safetensors=True,
        **options,
    )
    if options:
        _answer_in(denoiser, dtype)
    return denoiser


def _answer_in(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast what enters quantised layers, as autocast does for others but not for them: they answer in the precision
    that they are asked in, so that behind each normalisation all activations would be float32."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in denoiser.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))


def _denoiser_class(configs: Description) -> type[nn.Module]:
    return getattr(diffusers, configs.denoiser["_class_name"])


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of whatever is not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
