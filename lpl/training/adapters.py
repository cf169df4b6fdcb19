"""Adapters of peft on a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


ADAPTER = "default"  # peft's name of the trained adapter


@contextmanager
def scaled(models: Iterable[nn.Module], factor: float) -> Iterator[None]:
    """Within, the adapters of the models add ``factor`` times what they were trained to add."""
    layers: list[Any] = [
        module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer)
    ]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = factor * scale
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale
