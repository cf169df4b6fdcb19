"""Sana: a linear-attention flow transformer on the strongly compressed latents of an AutoencoderDC, with a Gemma 2."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, latents


SIDE_MULTIPLE = 32  # in pixels; the pipeline requires it, whatever the autoencoder is

# The pipeline's default instruction to Gemma, which precedes each caption.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(Family):
    name = "sana"
    pipeline_class = SanaPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    sequence_length = 300
    no_float16 = ("text_encoder",)

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        """As the pipeline does by default: captions follow the instruction, the empty caption of guidance does not."""
        numbers: list[int] = []
        encoded: list[tuple[Tensor, Tensor]] = []  # (N, tokens, dim), (N, tokens)
        for instruction, group in (
            (INSTRUCTION, [number for number, caption in enumerate(captions) if caption]),
            (None, [number for number, caption in enumerate(captions) if not caption]),
        ):
            if group:
                numbers += group
                encoded.append(self._encode([captions[number] for number in group], instruction, device))
        order = torch.tensor(numbers).argsort().to(device)
        embeddings, mask = (torch.cat(parts)[order] for parts in zip(*encoded, strict=True))
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def _encode(
        self, captions: list[str], instruction: list[str] | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        return self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=False,
            max_sequence_length=self.tokens,
            complex_human_instruction=instruction,
        )[:2]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        timesteps = timesteps * self.pipeline.transformer.config.timestep_scale
        output = denoiser(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]
        return output[:, : noisy_latents.shape[1]]

    def sampling_arguments(self) -> dict[str, Any]:
        # As in training: captions are not rewritten, and images have the requested size.
        return super().sampling_arguments() | {"clean_caption": False, "use_resolution_binning": False}

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        return [
            *latents(transformer, configs["vae"]),
            Relation("caption_channels", transformer["caption_channels"], (width,), "width of the text encoder"),
            Relation("cross_attention_dim", transformer["cross_attention_dim"], (own,), "width of its own attention"),
        ]

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        return math.lcm(SIDE_MULTIPLE, super().resolution_multiple(configs))

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule("proj_out")]
