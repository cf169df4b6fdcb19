"""Krea 2: a single-stream flow transformer over 2 x 2 patches of latents, with several layers of a Qwen3-VL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Krea2Pipeline
from torch import Tensor, nn

from lpl.families.base import PATCH, TIMESTEPS, Conditions, Configs, InPatches, packed, patch_positions, unpacked
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import LoraLayout, Originals
from lpl.families.single_file import State, by_layers, with_scales
from lpl.families.tokens import Tokenize, Tokens, on_device
from lpl.objectives import FlowMatching


# Ours and the original's, the more special ones first
NAMES = (
    (r"^img_in$", "first"),
    (r"^time_embed\.linear_1$", "tmlp.0"),
    (r"^time_embed\.linear_2$", "tmlp.2"),
    (r"^time_mod_proj$", "tproj.1"),
    (r"^txt_in\.norm$", "txtmlp.0"),
    (r"^txt_in\.linear_1$", "txtmlp.1"),
    (r"^txt_in\.linear_2$", "txtmlp.3"),
    (r"^final_layer\b", "last"),
    (r"^text_fusion\.", "txtfusion."),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn\.to_([qkv])$", r".attn.w\1"),
    (r"\.attn\.to_out\.0$", ".attn.wo"),
    (r"\.attn\.to_gate$", ".attn.gate"),
    (r"\.attn\.norm_([qk])$", r".attn.qknorm.\1norm"),
    (r"\.ff\.", ".mlp."),
    (r"\.norm1$", ".prenorm"),
    (r"\.norm2$", ".postnorm"),
)


def originals(model: nn.Module, names: Iterable[str]) -> Originals:
    """Layers by their names in the original model."""
    return {reduce(lambda name, pair: re.sub(*pair, name), NAMES, layer): (layer,) for layer in names}


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one; there, a block's modulations are one row."""
    found: State = {}
    for name, tensor in by_layers(originals, config, state).items():
        layer, _, kind = name.rpartition(".")
        if kind == "scale_shift_table" and layer == "last":
            name = "last.modulation.lin"
        elif kind == "scale_shift_table":
            name, tensor = f"{layer}.mod.lin", tensor.flatten()
        found[name] = tensor
    return with_scales(r"txtmlp\.0|norm", found)


def after(prefix: str, captions: Sequence[str]) -> list[str]:
    return [prefix + caption for caption in captions]


@dataclass(frozen=True)
class TokenizeWithSuffix(Tokenize):
    """The suffix follows the padding, as it did when the model was trained.

    Args:
        suffix: its tokens.
    """

    suffix: tuple[int, ...] = ()

    def _encoded(self, name: str, texts: list[str]) -> dict[str, Tensor]:
        found, length = super()._encoded(name, texts), len(self.suffix)
        suffix = torch.tensor(self.suffix).expand(len(texts), -1)
        return {
            "input_ids": torch.cat([found["input_ids"], suffix], 1),
            "attention_mask": F.pad(found["attention_mask"], (0, length), value=1),
        }


class Krea2(InPatches):
    name = "krea-2"
    pipeline_class = Krea2Pipeline
    original_state = staticmethod(transformer_state)
    vaes = ("AutoencoderKLQwenImage",)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 512, 512
    no_guidance = 0.0
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    lora_layout = LoraLayout({"transformer": "lora_unet"}, originals)

    def token_lengths(self) -> dict[str, int | None]:
        suffix = self.pipeline.prompt_template_encode_num_suffix_tokens
        return {"tokenizer": (self.tokens or 512) + self._instruction - suffix}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(after, self.pipeline.prompt_template_encode_prefix)

    @property
    def tokenize(self) -> Callable[[Sequence[str]], Tokens]:
        tokenizer = self.pipeline.tokenizer
        suffix = tuple(tokenizer.encode(self.pipeline.prompt_template_encode_suffix))
        return TokenizeWithSuffix({"tokenizer": tokenizer}, self.token_lengths(), self.texts, suffix=suffix)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which copies the suffix to the device in each step. Padding takes no positions."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        ids, mask = found["input_ids"], found["attention_mask"].bool()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        states = self.pipeline.text_encoder(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
        ).hidden_states
        chosen = torch.stack([states[layer] for layer in self.pipeline.text_encoder_select_layers], 2)
        return {
            "encoder_hidden_states": chosen[:, self._instruction :],  # (B, tokens, layers, dim)
            "encoder_attention_mask": mask[:, self._instruction :],  # (B, tokens)
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        rows, columns = (side // PATCH for side in noisy_latents.shape[2:])
        tokens = conditions["encoder_hidden_states"].shape[1]
        image = patch_positions(rows, columns, noisy_latents.device)
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            position_ids=torch.cat([image.new_zeros(tokens, 3), image]),  # text has no position
            **conditions,
            return_dict=False,
        )[0]
        return unpacked(output, noisy_latents.shape)

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        return [
            *latents(transformer, configs["vae"], PATCH),
            needs(transformer, "text_hidden_dim", width, "width of the text encoder"),
            needs(transformer, "attention_head_dim", sum(transformer["axes_dims_rope"]), "sum of its axes_dims_rope"),
        ]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        own: Any = denoiser
        return [own.time_mod_proj, own.final_layer.linear]
