"""Stable Diffusion 3 and 3.5: a multimodal transformer (MM-DiT) with two CLIP encoders and an optional T5; flow."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import ADDED_QKV, JOINT, QKV, TRANSFORMER, LoraLayout, Table, by_table
from lpl.families.single_file import Component, State, autoencoder, by_layers
from lpl.families.tokens import Tokens, with_tokens


# Layers by their names in the original model
ORIGINAL: Table = {
    "transformer_blocks": (
        "joint_blocks",
        {
            "x_block.attn.qkv": QKV,
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn.ln_q": ("attn.norm_q",),
            "x_block.attn.ln_k": ("attn.norm_k",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.attn2.ln_q": ("attn2.norm_q",),
            "x_block.attn2.ln_k": ("attn2.norm_k",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": ADDED_QKV,
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.attn.ln_q": ("attn.norm_added_q",),
            "context_block.attn.ln_k": ("attn.norm_added_k",),
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


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one."""
    found = by_layers(partial(by_table, ORIGINAL), config, state, "context_embedder|pos_embed")
    return {"pos_embed" if name == "pos_embed.pos_embed" else name: tensor for name, tensor in found.items()}


class StableDiffusion3(Family):
    name = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_components = ("text_encoder_3", "tokenizer_3")
    sequence_length, max_sequence_length = 77, 512
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    text_encoder_learning_rate, text_encoder_weight_decay = 5e-6, 1e-3  # as in diffusers' script
    lora_targets = JOINT
    lora_layout = LoraLayout(TRANSFORMER, partial(by_table, ORIGINAL), "lycoris", swapped=True)

    def token_lengths(self) -> dict[str, int | None]:
        clip = self.pipeline.tokenizer_max_length
        lengths = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": self.tokens}
        return {name: length for name, length in lengths.items() if getattr(self.pipeline, name) is not None}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        pipeline = with_tokens(self.pipeline, tokens, device)
        captions = list(captions)
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(hidden_states=noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, clips = configs["transformer"], [configs["text_encoder"], configs["text_encoder_2"]]
        own = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        width, pooled = (sum(clip[name] for clip in clips) for name in ("hidden_size", "projection_dim"))
        relations = [
            *latents(transformer, configs["vae"]),
            # The pipeline pads both CLIPs' embeddings to this width; where it is less, it would cut them.
            needs(transformer, "joint_attention_dim", range(width, sys.maxsize), "width of both CLIP text encoders"),
            needs(transformer, "pooled_projection_dim", pooled, "projections of both CLIP text encoders"),
            needs(transformer, "caption_projection_dim", own, "width of its own attention"),
        ]
        if t5 := configs.get("text_encoder_3"):
            relations.append(needs(transformer, "joint_attention_dim", t5["hidden_size"], "width of text_encoder_3"))
        return relations

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        transformer, kind = configs["transformer"], "3-medium"
        if transformer.get("qk_norm"):  # only 3.5 has it, and only its medium attends twice
            kind = "3.5-medium" if transformer.get("dual_attention_layers") else "3.5-large"
        version, network = kind.replace(".", "-"), "networks.lora_sd3"
        return Architecture(f"stable-diffusion-v{kind}", version, "https://github.com/Stability-AI/sd3-ref", network)

    @classmethod
    def single_file(cls, configs: Configs) -> tuple[Component, ...]:
        """As the files of 3.5, without text encoders, which other programs load from files of their own."""
        return (
            Component("transformer", "model.diffusion_model.", transformer_state),
            Component("vae", "first_stage_model.", autoencoder),
        )

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 512  # as in diffusers' script; the large ones were made for 1024

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        return 1, configs["transformer"]["pos_embed_max_size"] * cls.resolution_multiple(configs)

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        kinds = (AdaLayerNormZero, SD35AdaLayerNormZeroX, AdaLayerNormContinuous)
        return [*modulations(denoiser, *kinds), denoiser.get_submodule("proj_out")]
