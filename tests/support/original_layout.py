"""Writes a tiny pipeline as one file in the layout of the original programs, the inverse of diffusers' conversion.

`single_file(pipeline, file, parts)` writes those of a pipeline's components that are in PARTS, with their weights bit
for bit; what the original programs stack (queries, keys and values) is stacked.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lpl.families.sdxl import RESNET, UNET, _block_places


NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}


def component(pipeline, name):
    """The tensors of a component by diffusers' names."""
    files = sorted(Path(pipeline, name).glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def unet(pipeline):
    folder = Path(pipeline, "unet")
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads((folder / "config.json").read_text()))
    places = UNET | {"conv_norm_out": "out.0"} | _block_places(model)
    found = {}
    for key, value in component(pipeline, "unet").items():
        name, _, kind = key.rpartition(".")
        start = next(place for place in places if f"{name}.".startswith(f"{place}."))
        rest = name[len(start) :].removeprefix(".")
        rest = (RESNET | NORMS).get(rest, rest) if "resnets" in start else rest
        found[".".join(filter(None, (places[start], rest, kind)))] = value
    return found


def vae(pipeline):
    levels = len(json.loads(Path(pipeline, "vae/config.json").read_text())["block_out_channels"])
    found = {}
    for key, value in component(pipeline, "vae").items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"to_([qkv])\.", r"\1.", key).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[key] = value
    return found


def clip(pipeline, name="text_encoder"):
    """OpenAI's layout, which is that of transformers 4."""
    tensors = component(pipeline, name)
    own = {key: value for key, value in tensors.items() if not key.startswith("text_projection")}
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in own.items()}


def open_clip(pipeline, name="text_encoder_2"):
    """OpenCLIP's layout, whose queries, keys and values are stacked."""
    tensors, found = component(pipeline, name), {}
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for key, value in tensors.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        elif key in names:
            found[names[key]] = value
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key):
            layer = f"text_model.encoder.layers.{match[1]}.self_attn"
            stacked = torch.cat([tensors[f"{layer}.{part}_proj.{match[2]}"] for part in "qkv"])
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = stacked
        elif "k_proj" not in key and "v_proj" not in key:
            key = key.replace("encoder.layers", "transformer.resblocks").replace("self_attn.out_proj", "attn.out_proj")
            key = key.replace("layer_norm1", "ln_1").replace("layer_norm2", "ln_2")
            found[key.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")] = value
    return found


def sd3(pipeline):
    """The MM-DiT of Stable Diffusion 3, without normalised queries and keys."""
    tensors, found = component(pipeline, "transformer"), {}
    layers = json.loads(Path(pipeline, "transformer/config.json").read_text())["num_layers"]

    def swapped(value):  # scale and shift
        return torch.cat(value.chunk(2)[::-1])

    for ours, theirs in {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }.items():
        found |= {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        found[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(tensors[f"norm_out.linear.{kind}"])
    found["pos_embed"] = tensors["pos_embed.pos_embed"]
    for layer in range(layers):
        ours, last = f"transformer_blocks.{layer}", layer == layers - 1
        for kind in ("weight", "bias"):
            get = lambda name: tensors[f"{ours}.{name}.{kind}"]  # noqa: B023, E731
            x, context = (f"joint_blocks.{layer}.{side}_block" for side in ("x", "context"))
            found[f"{x}.attn.qkv.{kind}"] = torch.cat([get(f"attn.to_{part}") for part in "qkv"])
            found[f"{context}.attn.qkv.{kind}"] = torch.cat([get(f"attn.add_{part}_proj") for part in "qkv"])
            found[f"{x}.attn.proj.{kind}"] = get("attn.to_out.0")
            found[f"{x}.mlp.fc1.{kind}"], found[f"{x}.mlp.fc2.{kind}"] = get("ff.net.0.proj"), get("ff.net.2")
            found[f"{x}.adaLN_modulation.1.{kind}"] = get("norm1.linear")
            modulation = get("norm1_context.linear")
            found[f"{context}.adaLN_modulation.1.{kind}"] = swapped(modulation) if last else modulation
            if not last:
                found[f"{context}.attn.proj.{kind}"] = get("attn.to_add_out")
                found[f"{context}.mlp.fc1.{kind}"] = get("ff_context.net.0.proj")
                found[f"{context}.mlp.fc2.{kind}"] = get("ff_context.net.2")
    return found


PARTS = {
    "unet": ("model.diffusion_model.", unet),
    "transformer": ("model.diffusion_model.", sd3),
    "vae": ("first_stage_model.", vae),
    "sd_text_encoder": ("cond_stage_model.transformer.", clip),
    "xl_text_encoder": ("conditioner.embedders.0.transformer.", clip),
    "xl_text_encoder_2": ("conditioner.embedders.1.model.", open_clip),
}


def single_file(pipeline, file, parts, dtype=None, extra=()):
    """Write parts of a pipeline into one file, in `dtype` or their own; `extra` are marker tensors."""
    tensors = {
        prefix + key: value
        for part in parts
        for prefix, read in [PARTS[part]]
        for key, value in read(pipeline).items()
    }
    if dtype is not None:
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    tensors |= {name: torch.zeros(()) for name in extra}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt"})
    return Path(file)
