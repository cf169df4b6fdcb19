"""Stable Diffusion 3 and 3.5: a multimodal transformer (MM-DiT) with two CLIP encoders and an optional T5; flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from lpl.families.base import Conditions, Configs, Family


class StableDiffusion3(Family):
    name = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_components = ("text_encoder_3", "tokenizer_3")
    sequence_length, max_sequence_length = 77, 512
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    text_encoder_learning_rate, text_encoder_weight_decay = 5e-6, 1e-3  # as in diffusers' script
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        captions = list(captions)
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_length,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(hidden_states=noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 512  # as in diffusers' script; the large ones were made for 1024

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        return 1, configs["transformer"]["pos_embed_max_size"] * cls.resolution_multiple(configs)
