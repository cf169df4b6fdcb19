"""TODO: what is here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn


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
