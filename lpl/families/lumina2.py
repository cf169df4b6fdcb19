"""Lumina-Image 2: a single-stream flow transformer over latents, which a Gemma 2's embeddings join."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers import Lumina2Pipeline
from diffusers.models.normalization import LuminaRMSNormZero
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family, modulations, tables_on_device
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import QKV, Table, by_table
from lpl.families.single_file import State, by_layers
from lpl.families.tokens import Tokens, lengths_of, on_device
from lpl.objectives import FlowMatching


# Layers by their names in the original model
LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": QKV,
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    "attention_norm2": ("norm2",),
    **{f"feed_forward.w{number}": (f"feed_forward.linear_{number}",) for number in (1, 2, 3)},
}
MODULATED = LAYERS | {"attention_norm1": ("norm1.norm",), "adaLN_modulation.1": ("norm1.linear",)}
ORIGINAL: Table = {
    "layers": ("layers", MODULATED),
    "noise_refiner": ("noise_refiner", MODULATED),
    "context_refiner": ("context_refiner", {**LAYERS, "attention_norm1": ("norm1",)}),
    "": (
        "",
        {
            "t_embedder.mlp.0": ("time_caption_embed.timestep_embedder.linear_1",),
            "t_embedder.mlp.2": ("time_caption_embed.timestep_embedder.linear_2",),
            "cap_embedder.0": ("time_caption_embed.caption_embedder.0",),
            "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear_1",),
            "final_layer.linear": ("norm_out.linear_2",),
        },
    ),
}
SAME = r"x_embedder|\w+\.\d+\.ffn_norm[12]"  # layers that have the same name there


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one."""
    return by_layers(partial(by_table, ORIGINAL), config, state, SAME)


def with_instruction(instruction: str, captions: Sequence[str]) -> list[str]:
    """What the pipeline gives the tokenizer; the empty caption, from which guidance starts, has no instruction."""
    return [f"{instruction} <Prompt Start> {caption}" if caption else "" for caption in captions]


@dataclass(frozen=True)
class Lengths:
    """Stands for the mask of captions, (B, tokens), where the transformer asks only how long they are.

    Args:
        lengths: of each caption, in tokens, on the host, so that nothing waits for the GPU.
        shape: of the mask.
    """

    lengths: Sequence[int]
    shape: tuple[int, int]

    def sum(self, dim: int) -> Self:
        return self

    def tolist(self) -> list[int]:
        return list(self.lengths)


class Lumina2(Family):
    name = "lumina-2"
    pipeline_class = Lumina2Pipeline
    original_state = staticmethod(transformer_state)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 256, 256
    no_float16 = ("text_encoder",)

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(with_instruction, self.pipeline.system_prompt)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which compares tokens on the device and so waits for it."""
        found = (tokens or self.tokenize(captions))["tokenizer"]
        lengths = lengths_of(found["attention_mask"])
        found = on_device(found, device)
        encoded = self.pipeline.text_encoder(**found, output_hidden_states=True, use_cache=False)
        return {
            "encoder_hidden_states": encoded.hidden_states[-2],  # (B, tokens, dim)
            "encoder_attention_mask": found["attention_mask"],
            "lengths": lengths,
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's time runs from noise, 0, to images, 1, and its output is z0 - noise."""
        mask = conditions["encoder_attention_mask"]
        positions: Any = self.denoiser.get_submodule("rope_embedder")
        positions.freqs_cis = tables_on_device(positions.freqs_cis, noisy_latents.device)
        lengths = Lengths(conditions["lengths"], tuple(mask.shape))
        handle = positions.register_forward_pre_hook(lambda _, inputs: (inputs[0], lengths))
        try:
            output = denoiser(
                hidden_states=noisy_latents,
                timestep=1 - timesteps / self.pipeline.scheduler.config.num_train_timesteps,
                encoder_hidden_states=conditions["encoder_hidden_states"],
                encoder_attention_mask=mask,
                return_dict=False,
            )[0]
        finally:
            handle.remove()
        return -output

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(
            cls.name, "lumina2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "networks.lora_lumina"
        )

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["num_attention_heads"] * sum(transformer["axes_dim_rope"])
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "cap_feat_dim", width, "width of the text encoder"),
            needs(transformer, "hidden_size", own, "its num_attention_heads times the sum of its axes_dim_rope"),
        ]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks of the captions alone are not modulated; they start as diffusers initialises them."""
        return [*modulations(denoiser, LuminaRMSNormZero), denoiser.get_submodule("norm_out.linear_2")]
