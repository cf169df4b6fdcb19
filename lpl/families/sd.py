"""Stable Diffusion 1.x and 2.x: a UNet with one CLIP text encoder; epsilon or v_prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lpl.families.architecture import DIFFUSERS, Architecture
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, cross_attention, latents
from lpl.families.lora_layout import LoraLayout, own_names
from lpl.families.sdxl import unet_state
from lpl.families.single_file import Component, autoencoder, clip, open_clip
from lpl.families.tokens import Tokens, with_tokens
from lpl.objectives import VPrediction


WIDTH_OF_SECOND = 1024  # of the embeddings of Stable Diffusion 2's text encoder; those of 1 have 768


def is_second(configs: Configs) -> bool:
    """Whether a pipeline is Stable Diffusion 2, whose text encoder is OpenCLIP's."""
    return configs["unet"].get("cross_attention_dim") == WIDTH_OF_SECOND


class StableDiffusion(Family):
    name = "stable-diffusion"
    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    trainable_text_encoders = ("text_encoder",)
    lora_layout = LoraLayout({"unet": "lora_unet", "text_encoder": "lora_te"}, own_names)

    @classmethod
    def left_out(cls) -> dict[str, Any]:
        """The safety checker would blacken samples."""
        return super().left_out() | {"requires_safety_checker": False}

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.pipeline.tokenizer.model_max_length}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        pipeline = with_tokens(self.pipeline, tokens, device)
        embeddings, _ = pipeline.encode_prompt(list(captions), device, 1, False)
        return {"encoder_hidden_states": embeddings}  # (B, tokens, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(noisy_latents, timesteps, **conditions, return_dict=False)[0]

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        unet, width = configs["unet"], configs["text_encoder"]["hidden_size"]
        return [*latents(unet, configs["vae"]), *cross_attention(unet, width, "width of the text encoder")]

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        second, predicts_v = is_second(configs), prediction_type == VPrediction.name
        kind = ("v2-768-v" if predicts_v else "v2-512") if second else "v1"
        version = f"sd_v{1 + second}{'_v' * predicts_v}"
        return Architecture(f"stable-diffusion-{kind}", version, DIFFUSERS, second=second)

    @classmethod
    def single_file(cls, configs: Configs) -> tuple[Component, ...]:
        encoder = Component("text_encoder", "cond_stage_model.transformer.", clip)
        if is_second(configs):
            encoder = Component("text_encoder", "cond_stage_model.model.", open_clip)
        return (
            Component("unet", "model.diffusion_model.", unet_state),
            Component("vae", "first_stage_model.", autoencoder),
            encoder,
        )

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 512  # as in diffusers' scripts, also for models that were made for 768
