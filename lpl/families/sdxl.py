"""Stable Diffusion XL: a UNet with two CLIP encoders that is also told the image's size and crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lpl.families.base import Conditions, Family


class StableDiffusionXL(Family):
    name = "stable-diffusion-xl"
    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Conditions:
        conditions = self.encode_prompts(batch["caption"], device)
        sizes = [batch[name] for name in ("original_size", "crop_top_left", "target_size")]  # (B, 2) each
        time_ids = torch.cat(sizes, dim=1).to(device, torch.float32)  # bfloat16 would round 1333 to 1336
        return conditions | {"time_ids": time_ids}  # (B, 6)

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        embeddings = conditions["encoder_hidden_states"]
        return denoiser(noisy_latents, timesteps, embeddings, added_cond_kwargs=added, return_dict=False)[0]
