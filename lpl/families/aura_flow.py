"""AuraFlow: a flow transformer, at first with two streams and then with one, with a UMT5."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AuraFlowPipeline
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowPreFinalBlock
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import TIMESTEPS, Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import JOINT, Table, by_table
from lpl.families.single_file import State, by_layers
from lpl.families.tokens import Tokens, on_device
from lpl.objectives import FlowMatching


# Layers by their names in the original model
ORIGINAL: Table = {
    "joint_transformer_blocks": (
        "double_layers",
        {
            **{
                f"{theirs}.{weight}": (f"{ours}.{layer}",)
                for theirs, ours in (("mlpX", "ff"), ("mlpC", "ff_context"))
                for weight, layer in (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
            },
            "modX.1": ("norm1.linear",),
            "modC.1": ("norm1_context.linear",),
            "attn.w2q": ("attn.to_q",),
            "attn.w2k": ("attn.to_k",),
            "attn.w2v": ("attn.to_v",),
            "attn.w2o": ("attn.to_out.0",),
            "attn.w1q": ("attn.add_q_proj",),
            "attn.w1k": ("attn.add_k_proj",),
            "attn.w1v": ("attn.add_v_proj",),
            "attn.w1o": ("attn.to_add_out",),
        },
    ),
    "single_transformer_blocks": (
        "single_layers",
        {
            "mlp.c_fc1": ("ff.linear_1",),
            "mlp.c_fc2": ("ff.linear_2",),
            "mlp.c_proj": ("ff.out_projection",),
            "modCX.1": ("norm1.linear",),
            "attn.w1q": ("attn.to_q",),
            "attn.w1k": ("attn.to_k",),
            "attn.w1v": ("attn.to_v",),
            "attn.w1o": ("attn.to_out.0",),
        },
    ),
    "": (
        "",
        {
            "t_embedder.mlp.0": ("time_step_proj.linear_1",),
            "t_embedder.mlp.2": ("time_step_proj.linear_2",),
            "cond_seq_linear": ("context_embedder",),
            "init_x_linear": ("pos_embed.proj",),
            "modF.1": ("norm_out.linear",),
            "final_linear": ("proj_out",),
        },
    ),
}
POSITIONS = "pos_embed.pos_embed"


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one; register_tokens is outside any layer."""
    found = by_layers(partial(by_table, ORIGINAL), config, state, "pos_embed|")
    return {"positional_encoding" if name == POSITIONS else name: tensor for name, tensor in found.items()}


class AuraFlow(Family):
    name = "auraflow"
    pipeline_class = AuraFlowPipeline
    original_state = staticmethod(transformer_state)
    objectives = (FlowMatching.name,)  # the pipeline calls a method of the scheduler that DDIM lacks
    sequence_length = 256
    lora_targets = JOINT

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which copies tokens to the device itself."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        embeddings = self.pipeline.text_encoder(**found)[0] * found["attention_mask"][..., None]
        return {"encoder_hidden_states": embeddings.to(self.pipeline.text_encoder.dtype)}  # (B, tokens, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        timesteps = (timesteps / TIMESTEPS).to(noisy_latents.dtype)
        return denoiser(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 1024  # what the pipeline draws, from the middle of the table of positions, whatever sample_size is

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("auraflow-v1", cls.name, "https://github.com/cloneofsimo/minRF")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "joint_attention_dim", width, "width of the text encoder"),
            needs(transformer, "caption_projection_dim", own, "width of its own attention"),
        ]

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        return 1, math.isqrt(configs["transformer"]["pos_embed_max_size"]) * cls.resolution_multiple(configs)

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [*modulations(denoiser, AdaLayerNormZero, AuraFlowPreFinalBlock), denoiser.get_submodule("proj_out")]
