"""What makes steps faster and changes their numbers by rounding only.

Attention goes through PyTorch's own kernel unless ``--attention_backend`` names another one of diffusers'
*dispatcher*, which some transformers call and others, and UNets, do not.

``--torch_compile`` compiles modules in place, so that no name of a weight changes: the denoiser's repeated blocks, one
by one, or all of it where its class names none; and the parts of LPL's decoder (:mod:`lpl.features`).

``--channels_last`` lays out the weights of convolutions in two dimensions with the channels last; their outputs
follow. A gradient and the optimizer's state have the strides of their weight. Files do not.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import nn

from lpl import features
from lpl.autoencoders import skeleton
from lpl.config import Config
from lpl.families.description import Description
from lpl.features import DecoderFeatureExtractor
from lpl.tools.machine import has_gpu, missing
from lpl.tools.words import close_match, first_line, warn
from lpl.training.loading import weight_dtype
from lpl.training.optimizers import of_bitsandbytes
from lpl.training.parts import TrainedParts


# Their kernels have no backward pass: a gradient would be lost without a word.
INFERENCE_ONLY = ("sage", "_sage")
BACKENDS = tuple(item.value for item in AttentionBackendName if not item.value.startswith(INFERENCE_ONLY))


def check_speed(config: Config) -> None:
    """Refuse what this machine or these packages cannot do; before anything is downloaded.

    Raises:
        ValueError: with the flag to change.
    """
    if (name := config.optimization.attention_backend) is not None:
        if name.startswith(INFERENCE_ONLY):
            raise ValueError(f"--attention_backend {name}: it has no backward pass; choose another, such as flash")
        if name not in BACKENDS:
            raise ValueError(
                f"--attention_backend {name}: accepted are {', '.join(BACKENDS)}{close_match(name, BACKENDS)}"
            )
        try:
            _check_attention_backend_requirements(AttentionBackendName(name))
        except RuntimeError as error:
            raise ValueError(f"--attention_backend {name}: {first_line(error)}") from error
    if config.optimization.torch_compile:
        compilers = os.environ.get("CXX", "g++"), "clang++"
        if has_gpu() and missing("triton"):
            raise ValueError("--torch_compile needs triton on a GPU: pip install triton, or leave the flag out")
        if not has_gpu() and not any(map(shutil.which, compilers)):
            raise ValueError("--torch_compile needs a C++ compiler, and there is no g++; leave the flag out")


def check_model(config: Config, description: Description) -> None:
    """Refuse what the denoiser's class cannot do; reads configurations only.

    Raises:
        ValueError: with the flag to change.
    """
    if (name := config.optimization.attention_backend) is not None:
        denoiser = skeleton(description.denoiser)
        if not dispatches(denoiser):
            raise ValueError(
                f"--attention_backend {name}: the attention of {type(denoiser).__name__} has PyTorch's own kernel and "
                "takes no other (docs/faster.md); leave the flag out"
            )
    if config.optimization.channels_last:
        denoiser, vae = skeleton(description.denoiser), skeleton(description.vae)
        if not convolutions(denoiser):
            effect = "changes the VAE only" if convolutions(vae) else "has no effect"
            warn(f"--channels_last {effect}: {type(denoiser).__name__} has no convolutions but those of patches")
        elif of_bitsandbytes(config.optimization) and not config.lora.lora:
            warn("--channels_last changes the VAE only: the optimizers of bitsandbytes take contiguous weights")
    if config.optimization.torch_compile and config.lpl.enabled and config.lpl.lpl_vae_name_or_path is None:
        DecoderFeatureExtractor(skeleton(description.vae), config.lpl.lpl_blocks, compile_for=1)


def dispatches(denoiser: nn.Module) -> bool:
    """Whether a model's attention goes through diffusers' dispatcher."""
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in denoiser.modules())


def speed_up(trained: TrainedParts, config: Config, accelerator: Accelerator) -> None:
    """Prepare the denoiser as the flags say; before the moving average and the optimizer see its weights.

    Raises:
        ValueError: where a kernel does not work on this device.
    """
    denoiser: Any = trained.denoiser
    if (name := config.optimization.attention_backend) is not None:
        try_backend(name, accelerator)
        denoiser.set_attention_backend(name)
    if config.optimization.channels_last:
        lay_out(denoiser)
        lay_out(trained.family.vae)
    if config.optimization.torch_compile:
        compiled(denoiser)


def convolutions(model: nn.Module) -> list[Any]:
    """Convolutions in two dimensions of a model; none if they only take patches apart, which is a matrix product."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    return found if any(module.kernel_size != module.stride for module in found) else []


def lay_out(model: Any) -> None:
    """Lay out a model's convolutions with the channels last, in place."""
    for module in convolutions(model):
        module.to(memory_format=torch.channels_last)


def compiled(denoiser: Any) -> None:
    """Compile a denoiser in place; nothing is compiled before its first call."""
    options = {"backend": features.BACKEND, "recompile_limit": features.RECOMPILE_LIMIT}
    with suppress(ValueError):  # there are no repeated blocks
        denoiser.compile_repeated_blocks(**options)
        return
    denoiser.compile(**options)


def try_backend(name: str, accelerator: Accelerator) -> None:
    """Refuse a kernel that fails on this device, or that gives no gradient.

    Raises:
        ValueError: with why.
    """
    dtype = weight_dtype(accelerator.mixed_precision)
    query = torch.ones(1, 128, 2, 64, device=accelerator.device, dtype=dtype, requires_grad=True)
    try:
        backend = AttentionBackendName(name)
        _maybe_download_kernel_for_backend(backend)
        dispatch_attention_fn(query, query, query, backend=backend).sum().backward()
    except Exception as error:  # each kernel has errors of its own
        raise ValueError(
            f"--attention_backend {name}: it cannot train here, with --mixed_precision {accelerator.mixed_precision} "
            f"({first_line(error)}); choose another"
        ) from error
