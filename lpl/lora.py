"""Low-rank adapters (LoRA) on frozen models, by peft, and the files that hold them.

Vocabulary. An *adapted* component is one of the pipeline's, "unet", "transformer", "text_encoder", ..., that carries
LoRA. Where diffusers' pipeline loads LoRA (``load_lora_weights``) all adapters are in one file that it reads, with
rank and alpha in the file's metadata: without them alpha would silently become the rank. PixArt's and DiT's pipelines
load none; there each adapted component has a folder of peft's, ``transformer_lora/``.

Invariants. The adapters' weights are float32 whatever the base is in; the base needs no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names in peft's own files
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(model: nn.Module, targets: Sequence[str], settings: Any, dora: bool = False) -> None:
    """Give a model a float32 adapter that changes nothing yet, in place; all else needs no gradient from then on.

    Args:
        targets: names, or ends of names, of the modules that are adapted.
        settings: the flags about LoRA.
        dora: decompose the weights (DoRA); not for text encoders, where diffusers would load it wrongly.
    """
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(targets),
        use_dora=dora,
        use_rslora=settings.use_rslora,
        init_lora_weights="gaussian",  # as diffusers' scripts have it; the second factor is zero
    )
    inject_adapter_in_model(config, model)
    cast_training_params(model)


def in_one_file(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether the pipeline loads LoRA by itself."""
    return hasattr(pipeline_class, "save_lora_weights")


def save_lora(pipeline_class: type[DiffusionPipeline], folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """Write the adapters of the components of those names into a folder."""
    states = {name: _adapter(model) for name, model in models.items()}
    if in_one_file(pipeline_class):
        layers = {f"{name}_lora_layers": state for name, state in states.items()}
        # Without the dropout: diffusers leaves the adapters that it loads in training mode, and would draw with it.
        configs = {name: _config(model).to_dict() | {"lora_dropout": 0.0} for name, model in models.items()}
        metadata = {f"{name}_lora_adapter_metadata": config for name, config in configs.items()}
        pipeline_class.save_lora_weights(folder, weight_name=FILE, **layers, **metadata)
        return
    for name, model in models.items():
        place = _peft_folder(folder, name)
        place.mkdir(parents=True, exist_ok=True)
        _config(model).save_pretrained(str(place))
        save_file({PEFT_PREFIX + key: value for key, value in states[name].items()}, place / PEFT_FILE)


def load_lora(pipeline_class: type[DiffusionPipeline], folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """Read what :func:`save_lora` wrote into models that have adapters of the same shapes.

    Raises:
        ValueError: where the file holds other adapters, of another rank or on other modules.
    """
    for name, model in models.items():
        if in_one_file(pipeline_class):
            saved, prefix = load_file(Path(folder, FILE)), f"{name}."
        else:
            saved, prefix = load_file(_peft_folder(folder, name) / PEFT_FILE), PEFT_PREFIX
        saved = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        own = _adapter(model)
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in saved.items()}:
            raise ValueError(
                f"the LoRA in {folder} is not of the rank, or not on the modules, that this run trains; give the "
                "--rank and --lora_target_modules that it was trained with"
            )
        set_peft_model_state_dict(model, saved)


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(model).items()}


def _config(model: nn.Module) -> LoraConfig:
    return model.peft_config["default"]


def _peft_folder(folder: str | Path, name: str) -> Path:
    return Path(folder, f"{name}_lora")
