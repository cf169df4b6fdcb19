"""Bases of 8 or 4 bits for LoRA, by the packages that diffusers quantises with; fp8 needs none (:mod:`.memory`)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn


def quantization_config(base: str | None, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` takes for a --quantize_base; None where weights are loaded as they are.

    Args:
        dtype: of the computation.
    """
    package, _, kind = (base or "").rpartition(":")
    if package == "torchao":
        from torchao import quantization

        kinds = {"int8wo": "Int8WeightOnlyConfig", "float8wo": "Float8WeightOnlyConfig"}
        return diffusers.TorchAoConfig(getattr(quantization, kinds[kind])())
    if package == "quanto":
        return diffusers.QuantoConfig(kind)
    if kind == "8bit":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "4bit":
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def answer_in(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast the inputs of quantised layers, which autocast does not. Their output has the dtype of their input, so
    that all activations after a normalisation would be float32."""
    for module in denoiser.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
