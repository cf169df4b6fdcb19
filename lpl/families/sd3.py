"""Stable Diffusion 3 and 3.5: a multimodal transformer (MM-DiT) with two CLIP encoders and an optional T5; flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.families.base import Conditions, Family


class StableDiffusion3(Family):
    name = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_components = ("text_encoder_3", "tokenizer_3")
    default_resolution = 512
    max_sequence_length = 512

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        captions = list(captions)
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(hidden_states=noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.sequence_length}

    @classmethod
    def resolution_multiple(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return downscaling_factor(configs["vae"]) * configs["transformer"]["patch_size"]

    @classmethod
    def max_resolution(cls, configs: Mapping[str, Mapping[str, Any]]) -> int | None:
        return configs["transformer"]["pos_embed_max_size"] * cls.resolution_multiple(configs)
