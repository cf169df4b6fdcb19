"""The kinds of adapters on a denoiser, by peft, and the files in which other programs read LoHa and LoKr.

Vocabulary. With W the weight of a layer and s = alpha / rank, the adapted layer has the weight

- LoRA: W + s B A, see :mod:`lpl.training.lora`;
- LoHa (FedPara): W + s (w1_a w1_b) * (w2_a w2_b), "*" element by element;
- LoKr: W + s kron(w1, w2), where w2, and with --decompose_both w1, is a product of two factors of that rank, unless
  it is so small that it is kept whole;
- OFT: W R, where R is block-diagonal and rotates the layer's inputs. It has no strength.

diffusers loads LoRA only: the others are in peft's format for every family, one folder for the denoiser.

*Other programs* (ComfyUI, and LyCORIS itself) read LoHa and LoKr by LyCORIS' names of the factors. They compute
alpha / rank by themselves from ``alpha`` and the shape of a factor, and take 1 for it where both factors of a LoKr are
whole. OFT has no such file: theirs rotates a layer's outputs, R W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from lpl.config.choices import ALL_LINEAR, LOHA, LOKR, LORA, OFT
from lpl.config.groups import Lora
from lpl.families.lora_layout import LoraLayout
from lpl.tools import layout as names


ADAPTER = "default"  # peft's name of the trained adapter


def adapter_config(targets: Sequence[str], lora: Lora) -> PeftConfig:
    """What peft makes of the flags, for a denoiser.

    Args:
        targets: names, or ends of names, of the modules to adapt; "all-linear": every linear layer.
    """
    modules = ALL_LINEAR if tuple(targets) == (ALL_LINEAR,) else list(targets)
    if lora.adapter == OFT:
        return OFTConfig(oft_block_size=lora.oft_block_size, target_modules=modules)
    assert lora.rank is not None and lora.lora_alpha is not None
    alpha: Any = lora.lora_alpha  # peft takes fractions too
    patterns = {"rank_pattern": lora.ranks, "alpha_pattern": lora.alphas}
    if lora.adapter == LOHA:
        return LoHaConfig(r=lora.rank, alpha=alpha, target_modules=modules, **patterns)
    if lora.adapter == LOKR:
        return LoKrConfig(
            r=lora.rank,
            alpha=alpha,
            target_modules=modules,
            decompose_both=lora.decompose_both,
            decompose_factor=lora.decompose_factor,
            **patterns,
        )
    init: Any = {"default": True}.get(lora.init_lora_weights, lora.init_lora_weights)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=init,
        **patterns,
    )


def kind_of(models: Mapping[str, nn.Module]) -> str:
    """The kind of the adapters of the components, given by name."""
    kinds: dict[type, str] = {LoHaConfig: LOHA, LoKrConfig: LOKR, OFTConfig: OFT}
    configs: list[Any] = [model.peft_config for model in models.values()]
    return next((kinds[type(config[ADAPTER])] for config in configs if type(config[ADAPTER]) in kinds), LORA)


@contextmanager
def scaled(models: Iterable[nn.Module], factor: float) -> Iterator[None]:
    """Within, the adapters of the models add ``factor`` times what they were trained to add; not OFT."""
    parts: list[Any] = [part for model in models for part in model.modules() if isinstance(part, BaseTunerLayer)]
    layers = [part for part in parts if ADAPTER in part.scaling]  # another adapter may be on more layers
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = factor * scale
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


# --- LoHa and LoKr for other programs --------------------------------------------------------------------------------


def save_lycoris(layout: LoraLayout | None, folder: str | Path, model: nn.Module, name: str) -> Path | None:
    """Write the LoHa or LoKr of a denoiser by the names that other programs know; OFT has none.

    Args:
        layout: of the family.
        name: of the run.

    Returns:
        The file; None if the programs have no names for these layers.
    """
    layers = {key: part for key, part in model.named_modules() if isinstance(part, LycorisLayer)}
    keys = _keys(layout, model, layers) if layout is not None else None
    if not keys:
        return None
    tensors: dict[str, Tensor] = {}
    for key, layer in layers.items():
        tensors |= {f"{keys[key]}.{kind}": tensor for kind, tensor in _parts(layer).items()}
    path = Path(folder, name + names.OTHERS_SUFFIX)
    save_file(tensors, path)
    return path


def _keys(layout: LoraLayout, model: nn.Module, layers: Iterable[str]) -> dict[str, str] | None:
    """The programs' names by ours; None where several layers, or rows in another order, are one weight for them."""
    if layout.own_prefix is not None:
        return {key: f"{layout.own_prefix}_{key.replace('.', '_')}" for key in layers}
    originals = layout.originals(model, layers)
    owners = (model.get_submodule(key.rpartition(".")[0]) for key in layers if layout.swapped)
    if any(len(rows) > 1 for rows in originals.values()) or any(isinstance(o, AdaLayerNormContinuous) for o in owners):
        return None
    prefix = next(start for part, start in layout.prefixes.items() if not part.startswith("text_encoder"))
    return {rows[0]: f"{prefix}_{key.replace('.', '_')}" for key, rows in originals.items()}


def _parts(layer: LycorisLayer) -> dict[str, Tensor]:
    """The factors of a layer, and the alpha from which the programs get its scale."""
    factors: dict[str, Tensor] = {
        kind: getattr(layer, kind)[ADAPTER].detach().cpu().contiguous()
        for kind in layer.adapter_layer_names
        if ADAPTER in getattr(layer, kind)
    }
    scale, rank = layer.scaling[ADAPTER], layer.r[ADAPTER]
    if {"lokr_w1", "lokr_w2"} <= factors.keys():  # whole: the programs take 1 for the scale
        factors["lokr_w1"] = scale * factors["lokr_w1"]
        scale = 1.0
    return factors | {"alpha": torch.tensor(scale * rank, dtype=torch.float32)}
