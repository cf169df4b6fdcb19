"""One file with a whole model in the layout of the original, which ComfyUI, Forge and other programs load.

The *original* model is the one that diffusers' was converted from; :mod:`lpl.families.lora_layout` has its names of
layers. Each family that has such a file lists its :class:`Component`: where a component's weights stand in the file,
and how they are named there. diffusers reads the files by ``Pipeline.from_single_file``; its converters are the
inverse of the functions here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lpl.autoencoders import skeleton
from lpl.families.lora_layout import Originals, in_order


if TYPE_CHECKING:
    from lpl.families.base import Family

Config = Mapping[str, Any]
State = dict[str, Tensor]  # of a model: weights by name


class Component(NamedTuple):
    """A component of a pipeline in a single file.

    Args:
        name: of the component.
        prefix: start of its weights' names in the file.
        convert: its configuration and its weights by diffusers' names -> by the original's. Raises ValueError for
            what the original does not have.
    """

    name: str
    prefix: str
    convert: Callable[[Config, State], State]


def components_of(family: type[Family], configs: Mapping[str, Config]) -> tuple[Component, ...]:
    """What is in the single file of a pipeline with these configurations of VAE and denoiser.

    Raises:
        ValueError: where this trainer writes none, or the VAE has no place in it.
    """
    components = family.single_file(configs)
    if not components:
        raise ValueError(
            f"a single file of {family.name} is not written by this trainer; diffusers takes the pipeline's folder"
        )
    if any(part.name == "vae" for part in components) and configs["vae"]["_class_name"] != "AutoencoderKL":
        raise ValueError(
            f"a single file of {family.name} holds an AutoencoderKL, and this VAE is of the class "
            f"{configs['vae']['_class_name']}"
        )
    return components


def check_layers(family: type[Family], configs: Mapping[str, Config]) -> None:
    """Refuse a denoiser or a VAE with layers that the original does not have, before there are weights.

    Raises:
        ValueError: as :func:`components_of`, and with the first such layer.
    """
    for name, _, convert in components_of(family, configs):
        if name in ("vae", family.denoiser_name):
            convert(configs[name], skeleton(configs[name]).state_dict())


# Denoisers -----------------------------------------------------------------------------------------------------------


def by_layers(
    originals: Callable[[nn.Module, Iterable[str]], Originals], config: Config, state: State, same: str | None = None
) -> State:
    """Weights of a denoiser under the original's names of its layers.

    Args:
        originals: as in :class:`~lpl.families.lora_layout.LoraLayout`.
        same: pattern of the layers that have the same name in the original; weights outside any layer have the layer
            "". None: there are none.

    Raises:
        ValueError: with the first layer that is neither renamed nor the same.
    """
    model = skeleton(config)
    kinds: dict[str, list[str]] = {}  # names of the parameters of each layer
    for name in state:
        layer, _, kind = name.rpartition(".")
        kinds.setdefault(layer, []).append(kind)
    found: State = {}
    for original, layers in originals(model, kinds).items():
        if layers == (original,) and (same is None or not re.fullmatch(same, original)):
            raise ValueError(f"the original has no layer like {original or kinds[''][0]}")
        for kind in kinds[layers[0]]:
            rows = [state[_weight(layer, kind)] for layer in layers]
            found[_weight(original, kind)] = in_order(model, layers[0], torch.cat(rows) if rows[1:] else rows[0])
    return found


def _weight(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def with_scales(norms: str, state: State) -> State:
    """An original's weights, where those of the norms are called scale.

    Args:
        norms: pattern of the ends of their names.
    """
    return {re.sub(rf"({norms})\.weight$", r"\1.scale", name): tensor for name, tensor in state.items()}


def own_state(config: Config, state: State) -> State:
    """Weights of a denoiser whose names in diffusers are the original's."""
    return dict(state)


# Autoencoders --------------------------------------------------------------------------------------------------------

AUTOENCODER = (  # diffusers' names and the original's, the more special ones first
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1.\2.block.\3"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.(to_q|query)\.", "mid.attn_1.q."),
    (r"mid_block\.attentions\.0\.(to_k|key)\.", "mid.attn_1.k."),
    (r"mid_block\.attentions\.0\.(to_v|value)\.", "mid.attn_1.v."),
    (r"mid_block\.attentions\.0\.(to_out\.0|proj_attn)\.", "mid.attn_1.proj_out."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
PROJECTION = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def autoencoder(config: Config, state: State) -> State:
    """Weights of an AutoencoderKL, whose original counts the blocks of the decoder from the other end."""
    if config["_class_name"] != "AutoencoderKL":
        raise ValueError(f"the original has an AutoencoderKL, and this VAE is an {config['_class_name']}")
    last, found = len(config["up_block_types"]) - 1, {}
    for name, tensor in state.items():
        original = re.sub(r"mid_block\.resnets\.(\d+)", lambda at: f"mid.block_{int(at[1]) + 1}", name)
        original = re.sub(r"(?<=up_blocks\.)\d+", lambda at: str(last - int(at[0])), original)
        for ours, theirs in AUTOENCODER:
            original = re.sub(ours, theirs, original)
        # Linear layers that are convolutions over 1 x 1 pixels
        found[original] = tensor.reshape(*tensor.shape[:2], 1, 1) if PROJECTION.search(original) else tensor
    return found


# Text encoders -------------------------------------------------------------------------------------------------------

OPEN_CLIP = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.", ".attn."),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
)


def clip(config: Config, state: State) -> State:
    """Weights of OpenAI's CLIP, whose names transformers has, up to version 4."""
    prefixes = ("text_model.", "text_projection.")
    whole = {name if name.startswith(prefixes) else f"text_model.{name}": tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in whole.items() if not name.endswith("position_ids")}


def open_clip(config: Config, state: State) -> State:
    """Weights of OpenCLIP: queries, keys and values are one weight, and the projection is transposed."""
    found: State = {}
    for name, tensor in clip(config, state).items():
        original = name
        for ours, theirs in OPEN_CLIP:
            original = original.replace(ours, theirs)
        found[original] = tensor
    for name in [name for name in found if ".attn.q_proj." in name]:
        block, _, kind = name.rpartition(".attn.q_proj.")
        rows = [found.pop(f"{block}.attn.{letter}_proj.{kind}") for letter in "qkv"]
        found[f"{block}.attn.in_proj_{kind}"] = torch.cat(rows)
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found
