"""Flux: a flow transformer over 2 x 2 patches of latents, with a T5 and the pooled output of a CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import (
    PATCH,
    TIMESTEPS,
    Conditions,
    Configs,
    InPatches,
    modulations,
    packed,
    patch_positions,
    unpacked,
)
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import ADDED_QKV, JOINT, QKV, TRANSFORMER, LoraLayout, Table, by_table
from lpl.families.single_file import State, by_layers, with_scales
from lpl.families.tokens import Tokens, with_tokens
from lpl.objectives import FlowMatching


NORMS = "query_norm|key_norm"  # whose weights the original calls scale

# Layers by their names in the original model
ORIGINAL: Table = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "img_attn.norm.query_norm": ("attn.norm_q",),
            "img_attn.norm.key_norm": ("attn.norm_k",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ADDED_QKV,
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_attn.norm.query_norm": ("attn.norm_added_q",),
            "txt_attn.norm.key_norm": ("attn.norm_added_k",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": (*QKV, "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
            "norm.query_norm": ("attn.norm_q",),
            "norm.key_norm": ("attn.norm_k",),
        },
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


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one."""
    return with_scales(NORMS, by_layers(partial(by_table, ORIGINAL), config, state))


class Flux(InPatches):
    name = "flux"
    pipeline_class = FluxPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    original_state = staticmethod(transformer_state)
    # The pipeline passes sigmas and a shift for the image's size to the scheduler. DDIM takes neither, so a model
    # trained on epsilon, v_prediction or sample could not be sampled.
    objectives = (FlowMatching.name,)
    sequence_length, max_sequence_length = 512, 512
    trainable_text_encoders = ("text_encoder",)
    lora_targets = (
        *JOINT,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    lora_layout = LoraLayout(TRANSFORMER, partial(by_table, ORIGINAL), "lycoris", swapped=True)

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.pipeline.tokenizer_max_length, "tokenizer_2": self.tokens}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        pipeline = with_tokens(self.pipeline, tokens, device)
        embeddings, pooled, _ = pipeline.encode_prompt(list(captions), device=device, max_sequence_length=self.tokens)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        rows, columns = (side // PATCH for side in noisy_latents.shape[2:])
        tokens = conditions["encoder_hidden_states"].shape[1]
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            guidance=self.guidance(noisy_latents),
            txt_ids=noisy_latents.new_zeros(tokens, 3),  # text has no position
            img_ids=patch_positions(rows, columns, noisy_latents.device).to(noisy_latents.dtype),
            **conditions,
            return_dict=False,
        )[0]
        return unpacked(output, noisy_latents.shape)

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, clip, t5 = configs["transformer"], configs["text_encoder"], configs["text_encoder_2"]
        return [
            *latents(transformer, configs["vae"], PATCH),
            needs(transformer, "pooled_projection_dim", clip["hidden_size"], "width of text_encoder"),
            needs(transformer, "joint_attention_dim", t5["hidden_size"], "width of text_encoder_2"),
            needs(transformer, "attention_head_dim", sum(transformer["axes_dims_rope"]), "sum of its axes_dims_rope"),
        ]

    @classmethod
    def distilled(cls, index: Mapping[str, Any], configs: Configs) -> str | None:
        return None if cls.takes_guidance(configs) else "by its guidance_embeds (false, as in FLUX.1 [schnell])"

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        name = "flux-1-dev" if cls.takes_guidance(configs) else "flux-1-schnell"
        return Architecture(name, "flux1", "https://github.com/black-forest-labs/flux", "networks.lora_flux")

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        kinds = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
        return [*modulations(denoiser, *kinds), denoiser.get_submodule("proj_out")]
