"""LoRA that a run is given: the one that it starts from, and one that is active in training only.

``--lora_init`` is trained further: rank, alpha and layers are those of the file. ``--training_adapter`` is frozen: it
is active in training, off in evaluation mode (samples, validation, metrics), and no part of checkpoints and results.
Distilled models are trained so: the adapter undoes the distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lpl.autoencoders import skeleton, without_weights
from lpl.config import Config
from lpl.config.groups import Lora
from lpl.families import Family
from lpl.families.description import Description
from lpl.families.fit import component_class
from lpl.families.lora_files import Adapter, read_lora
from lpl.training.adapters import ADAPTER


FROZEN = "training_adapter"  # peft's name of the other adapter


def with_adapters(config: Config, description: Description) -> Config:
    """The configuration with rank, alpha and kind of the LoRA that the run starts from; checks both.

    Raises:
        ValueError: if one cannot be read or does not fit, or flags say something else than it.
    """
    lora, model = config.lora, config.model
    if not lora.lora or (lora.lora_init is None and lora.training_adapter is None):
        return config
    models = _skeletons(config, description)
    if lora.training_adapter is not None:
        _of_denoiser(lora.training_adapter, description.family, models, model.cache_dir)
    if lora.lora_init is None:
        return config
    found = read_lora("lora_init", lora.lora_init, description.family, models, model.cache_dir)
    trained = {description.family.denoiser_name}
    trained |= set(description.family.trainable_text_encoders if model.train_text_encoder else ())
    what = f"--lora_init {lora.lora_init}"
    if lost := [name for name in found if name not in trained]:
        raise ValueError(
            f"{what}: it has adapters of {' and '.join(lost)}, which this run would lose; add --train_text_encoder, "
            "with --text_encoder_lr 0 to keep them as they are"
        )
    first = found.get(description.family.denoiser_name) or next(iter(found.values()))
    said = {"rank": first.rank, "lora_alpha": first.alpha, "use_dora": first.dora, "use_rslora": first.rslora}
    for name, value in said.items():
        if name in config.given and getattr(lora, name) not in (None, value):
            raise ValueError(
                f"--{name} {getattr(lora, name)}: the LoRA of {what} has {value}, and training goes on with that; "
                "leave the flag out"
            )
    return config.changed(**said)


def _skeletons(config: Config, description: Description) -> dict[str, nn.Module]:
    """Denoiser and text encoders without memory for their weights."""
    model = config.model
    models: dict[str, nn.Module] = {description.family.denoiser_name: skeleton(description.denoiser)}
    for name in description.family.text_encoder_names:
        if name in description.absent:
            continue
        kind = component_class(description.index[name])
        where = {"revision": model.revision, "cache_dir": model.cache_dir}
        with torch.device("meta"):
            models[name] = kind(kind.config_class.from_pretrained(model.pipeline, subfolder=name, **where))
    return models


def _of_denoiser(source: str, family: type[Family], models: Mapping[str, nn.Module], cache_dir: str | None) -> Adapter:
    found = read_lora("training_adapter", source, family, models, cache_dir)
    if list(found) != [family.denoiser_name]:
        raise ValueError(
            f"--training_adapter {source}: it adapts {' and '.join(found)}; give one of the {family.denoiser_name} "
            "alone"
        )
    return found[family.denoiser_name]


class Adapters(NamedTuple):
    """The LoRA that a run is given.

    Args:
        initial: those that it starts from, by component.
        frozen: of the denoiser, active in training only.
        whole: False: their shapes alone count.
    """

    initial: Mapping[str, Adapter] = {}
    frozen: Adapter | None = None
    whole: bool = True


def shapes_of(config: Config, description: Description) -> Adapters:
    """The adapters for an estimate, whose models have no weights."""
    lora = config.lora
    if not lora.lora or (lora.lora_init is None and lora.training_adapter is None):
        return Adapters(whole=False)
    given = _given(description.family, lora, _skeletons(config, description), config.model.cache_dir)
    return given._replace(whole=False)


def given_adapters(family: Family, lora: Lora, cache_dir: str | None) -> Adapters:
    """The adapters to start from, by component, and the one that is active in training only.

    Args:
        family: its models have no adapters yet.
    """
    models: dict[str, Any] = {family.denoiser_name: without_weights(family.denoiser)}  # quantised: other shapes
    encoders = ((name, getattr(family.pipeline, name)) for name in family.text_encoder_names)
    models |= {name: encoder for name, encoder in encoders if encoder is not None}
    return _given(type(family), lora, models, cache_dir)


def _given(family: type[Family], lora: Lora, models: Mapping[str, nn.Module], cache_dir: str | None) -> Adapters:
    initial = read_lora("lora_init", lora.lora_init, family, models, cache_dir) if lora.lora_init else {}
    frozen = _of_denoiser(lora.training_adapter, family, models, cache_dir) if lora.training_adapter else None
    return Adapters(initial, frozen)


def freeze(model: nn.Module) -> None:
    """Keep the adapter that is active in training only out of the training."""
    for name, parameter in model.named_parameters():
        if f".{FROZEN}." in name:
            parameter.requires_grad_(False)


def switch(model: nn.Module, training: bool) -> None:
    """Turn the adapter that is active in training only on or off."""
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.set_adapter([ADAPTER, FROZEN] if training else [ADAPTER])
    freeze(model)
