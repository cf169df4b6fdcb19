"""How other programs name the weights of a LoRA; each family that they read declares its own :class:`LoraLayout`.

Vocabulary. The *original* model is the one that diffusers' was converted from. Other programs find a weight by its
name there. Originals of transformers *stack* layers that diffusers keeps apart, such as queries, keys and values, as
the rows of one weight. :data:`Originals` maps each weight of the original to our layers that are its rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowPreFinalBlock
from torch import Tensor, nn


SWAPPED = (AdaLayerNormContinuous, AuraFlowPreFinalBlock)
Originals = dict[str, tuple[str, ...]]  # weight of the original -> our layers that are its rows, from the top

# Our block ("" for layers outside any block) -> the original's block, and its weights with the layers that are rows.
Table = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]


class LoraLayout(NamedTuple):
    """How other programs name a family's components and layers.

    Args:
        prefixes: start of a weight's name, by the component's name. Text encoders keep the names of their layers.
        originals: maps the denoiser and the names of its adapted layers to the weights of the original.
        own_prefix: start of diffusers' own names where ComfyUI finds LoHa and LoKr by them; None: by the original's.
        swapped: whether the original has the scale and the shift of diffusers' last norm in the other order.
    """

    prefixes: Mapping[str, str]
    originals: Callable[[nn.Module, Iterable[str]], Originals]
    own_prefix: str | None = None
    swapped: bool = False

    def in_order(self, model: nn.Module, name: str, rows: Tensor) -> Tensor:
        """Rows of a layer in the original's order, or of the original in ours."""
        return in_order(model, name, rows) if self.swapped else rows


TWO_ENCODERS = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # prefixes where there are several
TRANSFORMER = {"transformer": "lora_unet", **TWO_ENCODERS}

# Rows of one weight in every original with joint attention.
QKV, ADDED_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
JOINT = (*QKV, "attn.to_out.0", *ADDED_QKV, "attn.to_add_out")  # LoRA's targets in joint attention


def own_names(model: nn.Module, names: Iterable[str]) -> Originals:
    """Originals of a model whose names in diffusers every program knows."""
    return {name: (name,) for name in names}


def in_order(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    """Rows of a layer with scale and shift in the other order, if it is of a norm in which diffusers swaps them."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return torch.cat(rows.chunk(2)[::-1]) if isinstance(owner, SWAPPED) else rows


def by_table(table: Table, model: nn.Module, names: Iterable[str]) -> Originals:
    """Originals of a transformer. A layer that the table lacks keeps its name."""
    originals: Originals = {}
    for name in names:
        found = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)  # block, its number, the layer in it
        block, number, layer = found.groups() if found else ("", "", name)
        blocks, weights = table.get(block, (block, {}))
        ours, theirs = (f"{block}.{number}.", f"{blocks}.{number}.") if found else ("", "")
        unnamed = (layer, (layer,))
        weight, layers = next((entry for entry in weights.items() if layer in entry[1]), unnamed)
        originals[theirs + weight] = tuple(ours + layer for layer in layers)
    return originals
