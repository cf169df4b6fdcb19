"""Low-rank adapters (LoRA) on frozen models, by peft, and the files that hold them.

Vocabulary. An *adapted* component ("unet", "transformer", "text_encoder", ...) is one that carries LoRA. If the
pipeline's class loads LoRA (``load_lora_weights``), one file in its format holds all adapters, with rank and alpha in
the metadata: without them alpha would silently become the rank. The pipelines of PixArt and DiT load none; there each
adapted component has a folder in peft's format, ``transformer_lora/``.

*Other programs* are ComfyUI, kohya's sd-scripts, Forge and others that read kohya's format. They ignore that metadata:
each weight has the factors ``lora_down`` (A) and ``lora_up`` (B) and an ``alpha``, and they add alpha / rank * B @ A.
They find a weight by its name in the original model (:mod:`lpl.families.lora_layout`), with "_" for ".". All know
diffusers' names of Stable Diffusion 1 and 2 too; sd-scripts does not know those of SDXL.

Invariants. The adapters' weights are float32 in memory and in all files, whatever the base is in; the base needs no
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpl.config.choices import LORA
from lpl.config.groups import Lora
from lpl.families.lora_files import PEFT_FILE, PEFT_PREFIX, Adapter, lost_prefix
from lpl.families.lora_layout import LoraLayout
from lpl.tools import layout
from lpl.training.adapters import ADAPTER, adapter_config, kind_of, save_lycoris


FILE = layout.LORA
OTHERS_SUFFIX = layout.OTHERS_SUFFIX
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(model: nn.Module, targets: Sequence[str], lora: Lora, denoiser: bool = False) -> None:
    """Add a float32 adapter to a model in place. It changes no output yet; nothing else keeps a gradient.

    Args:
        targets: names, or ends of names, of the modules to adapt; "all-linear": every linear layer.
        denoiser: for which alone are DoRA, which diffusers would load wrongly into text encoders, and patterns.
    """
    if not denoiser:
        lora = replace(lora, use_dora=False, lora_rank_pattern=None, lora_alpha_pattern=None)
    model.requires_grad_(False)
    inject_adapter_in_model(adapter_config(targets, lora), model)
    cast_training_params(model)


def continue_lora(model: nn.Module, adapter: Adapter, lora: Lora, whole: bool = True) -> None:
    """Add an adapter that was trained before; nothing else keeps a gradient.

    Args:
        whole: with its weights.
    """
    model.requires_grad_(False)
    adapter.inject(model, ADAPTER, lora.lora_dropout, whole)
    cast_training_params(model)


def in_one_file(pipeline_class: type[DiffusionPipeline], adapter: str = LORA) -> bool:
    """Whether the pipeline's class loads that kind of adapter."""
    return adapter == LORA and hasattr(pipeline_class, "save_lora_weights")


def save_lora(pipeline_class: type[DiffusionPipeline], folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """Write the adapters of the components, given by name, into a folder."""
    states = {
        name: {lost_prefix(model) + key: value for key, value in _adapter(model).items()}
        for name, model in models.items()
    }
    if in_one_file(pipeline_class, kind_of(models)):
        layers = {f"{name}_lora_layers": state for name, state in states.items()}
        # Without dropout: diffusers leaves the adapters that it loads in training mode and would apply it.
        configs = {name: _config(model).to_dict() | {"lora_dropout": 0.0} for name, model in models.items()}
        metadata = {f"{name}_lora_adapter_metadata": config for name, config in configs.items()}
        loader: Any = pipeline_class  # not every class of pipelines has the method
        loader.save_lora_weights(folder, weight_name=FILE, **layers, **metadata)
        return
    for name, model in models.items():
        place = peft_folder(folder, name)
        place.mkdir(parents=True, exist_ok=True)
        _config(model).save_pretrained(str(place))
        save_file({PEFT_PREFIX + key: value for key, value in states[name].items()}, place / PEFT_FILE)


def load_lora(pipeline_class: type[DiffusionPipeline], folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """Read what :func:`save_lora` wrote into models with adapters of the same shapes.

    Raises:
        ValueError: if the adapters in the file have another rank or are on other modules.
    """
    for name, model in models.items():
        if in_one_file(pipeline_class, kind_of(models)):
            saved, prefix = load_file(Path(folder, FILE)), f"{name}."
        else:
            saved, prefix = load_file(peft_folder(folder, name) / PEFT_FILE), PEFT_PREFIX
        saved = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        saved = {key.removeprefix(lost_prefix(model)): value for key, value in saved.items()}
        own = _adapter(model)
        if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in saved.items()}:
            raise ValueError(
                f"the LoRA in {folder} has another rank, or is on other modules, than this run trains; give the "
                "base model, --rank and --lora_target_modules that it was trained with"
            )
        set_peft_model_state_dict(model, saved)


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(model).items()}


def _config(model: nn.Module) -> PeftConfig:
    return cast(dict[str, PeftConfig], model.peft_config)[ADAPTER]


def peft_folder(folder: str | Path, name: str) -> Path:
    return Path(folder, f"{name}{layout.PEFT_SUFFIX}")


# --- other programs --------------------------------------------------------------------------------------------------


def save_for_other_programs(
    layout: LoraLayout | None, folder: str | Path, models: Mapping[str, nn.Module], name: str
) -> Path | None:
    """Write the adapters of the components once more, for other programs: one file with the run's name.

    There is none of DoRA, m (W + s B A) / |W + s B A|. No file would be exact in all programs: LyCORIS and A1111
    compute this, ComfyUI divides by |W| instead, and sd-scripts, and diffusers in this format, ignore m.

    Args:
        layout: of the family.

    Returns:
        The file; None if the family has no layout, or a component has DoRA.
    """
    if kind_of(models) != LORA:
        return save_lycoris(layout, folder, next(iter(models.values())), name)
    if layout is None or any(cast(Any, _config(model)).use_dora for model in models.values()):
        return None
    tensors = {}
    for component, model in models.items():
        adapted = [key for key, module in model.named_modules() if _is_adapted(module)]
        if component.startswith("text_encoder"):
            originals = {lost_prefix(model) + key: (key,) for key in adapted}
        else:
            originals = layout.originals(model, adapted)
        for original, names in originals.items():
            key = f"{layout.prefixes[component]}_{original.replace('.', '_')}"
            tensors |= {f"{key}.{kind}": tensor for kind, tensor in _stacked(layout, model, names).items()}
    path = Path(folder, name + OTHERS_SUFFIX)
    save_file(tensors, path)
    return path


def _stacked(layout: LoraLayout, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """One adapter for the layers that are the rows of one weight; some of them, not all, may have no adapter.

    Each layer keeps its factors: the A are stacked, (n r, in); the B are the blocks on a diagonal, (sum of out, n r).
    """
    layers = [model.get_submodule(name) for name in names]
    adapted = [cast(LoraLayer, layer) for layer in layers if _is_adapted(layer)]
    down, up = _factors(adapted[0])
    if len(layers) > 1:
        down = torch.cat([_factors(layer)[0] for layer in adapted])
        scale = adapted[0].scaling[ADAPTER]  # of all; a LoRA that was started from may have others
        ups = (
            _factors(layer)[1] * (layer.scaling[ADAPTER] / scale)
            if isinstance(layer, LoraLayer) and _is_adapted(layer)
            else down.new_zeros(cast(nn.Linear, layer).out_features, 0)
            for layer in layers
        )
        up = torch.block_diag(*ups)
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": layout.in_order(model, names[0], up),
        # From peft's scale, which is alpha / sqrt(rank) in rank-stabilised LoRA, and the rank that others see.
        "alpha": torch.tensor(adapted[0].scaling[ADAPTER] * len(down), dtype=down.dtype),
    }
    return {kind: tensor.detach().cpu().contiguous() for kind, tensor in tensors.items()}


def _is_adapted(layer: nn.Module) -> bool:
    """Whether a layer has the trained adapter."""
    return isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A, (r, in, ...), and B, (out, r, ...)."""
    return layer.lora_A[ADAPTER].get_parameter("weight"), layer.lora_B[ADAPTER].get_parameter("weight")
