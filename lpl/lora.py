"""Low-rank adapters (LoRA) on frozen models, by peft, and the files that hold them.

Vocabulary. An *adapted* component is one of the pipeline's, "unet", "transformer", "text_encoder", ..., that carries
LoRA. Where diffusers' pipeline loads LoRA (``load_lora_weights``) all adapters are in one file that it reads, with
rank and alpha in the file's metadata: without them alpha would silently become the rank. PixArt's and DiT's pipelines
load none; there each adapted component has a folder of peft's, ``transformer_lora/``.

*Other programs* are ComfyUI, kohya's sd-scripts, Forge and what else reads kohya's layout. They know nothing of that
metadata: beside the factors ``lora_down`` (A) and ``lora_up`` (B) of a weight lies its ``alpha``, and what they add is
alpha / rank * B @ A. They find a weight by its name in the *original* model, the one that diffusers' was converted
from, with "_" for "."; of Stable Diffusion 1 and 2 all know diffusers' names too, of SDXL sd-scripts does not.
Originals of transformers *stack* what diffusers has apart, as queries, keys and values, as the rows of one weight.

Invariants. The adapters' weights are float32 whatever the base is in, in all files; the base needs no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel


FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names in peft's own files
OTHERS_SUFFIX = "_comfyui.safetensors"  # of the file for other programs, after the run's name
ADAPTER = "default"  # peft's name of the one that is trained
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
    states = {
        name: {_lost_prefix(model) + key: value for key, value in _adapter(model).items()}
        for name, model in models.items()
    }
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
        saved = {key.removeprefix(_lost_prefix(model)): value for key, value in saved.items()}
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
    return model.peft_config[ADAPTER]


def _peft_folder(folder: str | Path, name: str) -> Path:
    return Path(folder, f"{name}_lora")


def _lost_prefix(model: nn.Module) -> str:
    """What transformers 5 left out of the names in ``CLIPTextModel``; files keep it, since all others expect it."""
    return "text_model." if isinstance(model, CLIPTextModel) and not hasattr(model, "text_model") else ""


# --- other programs --------------------------------------------------------------------------------------------------


def save_for_other_programs(
    pipeline_class: type[DiffusionPipeline], folder: str | Path, models: Mapping[str, nn.Module], name: str
) -> Path | None:
    """Write the adapters of the components once more, as other programs read them: one file with the run's name.

    The file has no metadata, from which some programs conclude that a LoRA is of Stable Diffusion 1.

    DoRA's length m of each row is written as ``dora_scale``, (out, 1), for m (W + s B A) / |W + s B A|, as DoRA and
    LyCORIS have it. ComfyUI, as of August 2026, divides by |W| instead, which is close while the LoRA is small;
    sd-scripts, and diffusers in this layout, leave m out.

    Returns:
        The file; None where the pipeline's LoRA has no layout that other programs share.
    """
    if pipeline_class not in _LAYOUTS:
        return None
    layout = _LAYOUTS[pipeline_class]
    tensors = {}
    for component, model in models.items():
        adapted = [key for key, module in model.named_modules() if isinstance(module, LoraLayer)]
        if component in TEXT_ENCODERS:
            originals = {_lost_prefix(model) + key: (key,) for key in adapted}
        else:
            originals = layout.originals(model, adapted)
        for original, names in originals.items():
            key = f"{layout.prefixes[component]}_{original.replace('.', '_')}"
            tensors |= {f"{key}.{kind}": tensor for kind, tensor in _stacked(model, names).items()}
    path = Path(folder, name + OTHERS_SUFFIX)
    save_file(tensors, path)
    return path


def _stacked(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """One adapter for the layers of those names as the rows of one weight; some, not all, may have none themselves.

    Each keeps its own factors: A are stacked, (n r, in), B are the blocks on a diagonal, (sum of out, n r).
    """
    layers = [model.get_submodule(name) for name in names]
    adapted = [layer for layer in layers if isinstance(layer, LoraLayer)]
    down, up = adapted[0].lora_A[ADAPTER].weight, adapted[0].lora_B[ADAPTER].weight
    if len(layers) > 1:
        down = torch.cat([layer.lora_A[ADAPTER].weight for layer in adapted])
        up = torch.block_diag(
            *(
                layer.lora_B[ADAPTER].weight if isinstance(layer, LoraLayer) else down.new_zeros(layer.out_features, 0)
                for layer in layers
            )
        )
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": _in_order(model, names[0], up),
        # By peft's scale, which is alpha / sqrt(rank) in rank-stabilised LoRA, and by the rank that others see.
        "alpha": torch.tensor(adapted[0].scaling[ADAPTER] * len(down), dtype=down.dtype),
    }
    if ADAPTER in adapted[0].lora_magnitude_vector:  # DoRA
        magnitudes = torch.cat([_magnitudes(layer) for layer in layers])
        tensors["dora_scale"] = _in_order(model, names[0], magnitudes.reshape(-1, *[1] * (down.ndim - 1)))
    return {kind: tensor.detach().cpu().contiguous() for kind, tensor in tensors.items()}


def _magnitudes(layer: nn.Module) -> Tensor:
    """DoRA's length of each row, (out,): a layer without an adapter keeps what it has."""
    if isinstance(layer, LoraLayer):
        return layer.lora_magnitude_vector[ADAPTER].weight.flatten()
    return dequantize_module_weight(layer).float().norm(dim=1)


def _in_order(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    """Rows in the original's order: this one norm of diffusers has scale and shift the other way round."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return torch.cat(rows.chunk(2)[::-1]) if isinstance(owner, AdaLayerNormContinuous) else rows


# --- names in the original models ------------------------------------------------------------------------------------

Originals = dict[str, tuple[str, ...]]  # an original's weight: the layers of ours that are its rows, from the top


def _as_they_are(model: nn.Module, names: Iterable[str]) -> Originals:
    return {name: (name,) for name in names}


_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _in_sdxl(unet: nn.Module, names: Iterable[str]) -> Originals:
    places = _UNET | _block_places(unet)

    def original(name: str) -> str:
        start = next((place for place in places if f"{name}.".startswith(f"{place}.")), "")
        rest = name[len(start) :].removeprefix(".")
        return ".".join(filter(None, (places.get(start), _RESNET.get(rest, rest))))

    return {original(name): (name,) for name in names}


def _block_places(unet: nn.Module) -> dict[str, str]:
    """Where the original UNet, which counts all layers of one side through, has those of our blocks."""
    places, count = {}, 1  # input block 0 is conv_in
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            places[f"down_blocks.{index}.resnets.{layer}"] = f"input_blocks.{count}.0"
            places[f"down_blocks.{index}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            places[f"down_blocks.{index}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for index, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            places[f"up_blocks.{index}.resnets.{layer}"] = f"output_blocks.{count}.0"
            places[f"up_blocks.{index}.attentions.{layer}"] = f"output_blocks.{count}.1"
            count += 1
        behind = 2 if hasattr(block, "attentions") else 1  # the resnet, and the attention where there is one
        places[f"up_blocks.{index}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{behind}.conv"
    return places


_QKV, _ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# Our blocks, "" for what is in none: the original's blocks, and its weights with the layers that are their rows.
_Table = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
_SD3: _Table = {
    "transformer_blocks": (
        "joint_blocks",
        {
            "x_block.attn.qkv": _QKV,
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": _ADDED_QKV,
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        },
    ),
    "": (
        "",
        {
            "x_embedder.proj": ("pos_embed.proj",),
            "context_embedder": ("context_embedder",),
            "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
            "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
            "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
            "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
            "final_layer.linear": ("proj_out",),
        },
    ),
}
_FLUX: _Table = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": _QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": _ADDED_QKV,
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {"linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
    ),
    "": (
        "",
        {
            "img_in": ("x_embedder",),
            "txt_in": ("context_embedder",),
            "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
            "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
            "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
            "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
            "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
            "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
            "final_layer.linear": ("proj_out",),
        },
    ),
}


def _by_table(table: _Table, model: nn.Module, names: Iterable[str]) -> Originals:
    originals: Originals = {}
    for name in names:
        found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)  # block, its number, the layer in it
        block, number, layer = found.groups() if found else ("", "", name)
        blocks, weights = table.get(block, (block, {}))
        ours, theirs = (f"{block}.{number}.", f"{blocks}.{number}.") if found else ("", "")
        own = (layer, (layer,))  # of what the original has not
        weight, layers = next((entry for entry in weights.items() if layer in entry[1]), own)
        originals[theirs + weight] = tuple(ours + layer for layer in layers)
    return originals


# --- layouts ---------------------------------------------------------------------------------------------------------

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class _Layout(NamedTuple):
    """How other programs name a family's components, and the layers of its denoiser that are adapted."""

    prefixes: Mapping[str, str]
    originals: Callable[[nn.Module, Iterable[str]], Originals]


_TWO_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_TRANSFORMER = {"transformer": "lora_unet", **_TWO_ENCODERS}
_LAYOUTS = {
    StableDiffusionPipeline: _Layout({"unet": "lora_unet", "text_encoder": "lora_te"}, _as_they_are),
    StableDiffusionXLPipeline: _Layout({"unet": "lora_unet", **_TWO_ENCODERS}, _in_sdxl),
    StableDiffusion3Pipeline: _Layout(_TRANSFORMER, partial(_by_table, _SD3)),
    FluxPipeline: _Layout(_TRANSFORMER, partial(_by_table, _FLUX)),
}
