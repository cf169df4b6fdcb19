"""Kolors: SDXL's UNet with a language model, ChatGLM3, whose class and tokenizer are diffusers' own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline  # diffusers' own name for it needs sentencepiece

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs
from lpl.families.fit import Relation, cross_attention, latents, needs
from lpl.families.sdxl import StableDiffusionXL
from lpl.families.single_file import Component
from lpl.families.tokens import Tokens, on_device


class Kolors(StableDiffusionXL):
    name = "kolors"
    pipeline_class = KolorsPipeline
    text_encoder_names = ("text_encoder",)
    trainable_text_encoders = ()
    packages = ("sentencepiece",)
    lora_layout = None

    def token_lengths(self) -> dict[str, int | None]:
        """The pipeline always draws with that many: it does not hand on the length that its call takes."""
        return {"tokenizer": inspect.signature(KolorsPipeline.encode_prompt).parameters["max_sequence_length"].default}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, with a mask for which the encoder need not wait for the device."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        ids, mask = found["input_ids"], found["attention_mask"]  # padded in front
        encoder = self.pipeline.text_encoder
        hidden = encoder(
            input_ids=ids,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            full_attention_mask=encoder.get_masks(ids, None, padding_mask=mask),
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        ).hidden_states  # (tokens, B, dim) each
        return {
            "encoder_hidden_states": hidden[-2].transpose(0, 1).contiguous(),  # (B, tokens, dim)
            "text_embeds": hidden[-1][-1],  # (B, dim)
        }

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(cls.name, cls.name)

    @classmethod
    def single_file(cls, configs: Configs) -> tuple[Component, ...]:
        return ()

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        unet, width = configs["unet"], configs["text_encoder"]["hidden_size"]
        added = 6 * unet["addition_time_embed_dim"] + width  # 6: original size, crop, target size
        why = "6 of its addition_time_embed_dim, and the width of the text encoder"
        return [
            *latents(unet, configs["vae"]),
            *cross_attention(unet, width, "width of the text encoder"),
            needs(unet, "projection_class_embeddings_input_dim", added, why),
        ]
