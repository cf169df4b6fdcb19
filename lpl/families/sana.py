"""Sana: a linear-attention flow transformer on the strongly compressed latents of an AutoencoderDC, with a Gemma 2."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, captions, latents
from lpl.families.pixart import in_lower_case
from lpl.families.tokens import Tokenize, Tokens, with_tokens


SIDE_MULTIPLE = 32  # in pixels; the pipeline requires it, whatever the autoencoder is

# The pipeline's default instruction to Gemma, which precedes each caption.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
PREFIX = "\n".join(INSTRUCTION)


def grouped(captions: Sequence[str]) -> tuple[list[int], list[int]]:
    """The numbers of the captions that follow the instruction, and of the empty ones, which do not."""
    numbers = range(len(captions))
    return [number for number in numbers if captions[number]], [number for number in numbers if not captions[number]]


def order_of(groups: tuple[list[int], list[int]]) -> Tensor:
    """Where each caption is in both groups together, (B,)."""
    return torch.tensor([*groups[0], *groups[1]]).argsort()


def instructed_texts(captions: Sequence[str]) -> list[str]:
    """What encode_prompt gives the tokenizer for captions with the instruction."""
    return [PREFIX + text for text in in_lower_case(captions)]


@dataclass(frozen=True)
class TokenizeGroups:
    """Captions -> tokens of both groups, and the order to put them in.

    Args:
        groups: for captions with the instruction, and without it.
    """

    groups: tuple[Tokenize, Tokenize]

    def __call__(self, captions: Sequence[str]) -> Tokens:
        groups = grouped(captions)
        tokens = [
            tokenize([captions[number] for number in group]) if group else None
            for tokenize, group in zip(self.groups, groups, strict=True)
        ]
        return {"order": order_of(groups), "groups": tokens}


class Sana(Family):
    name = "sana"
    pipeline_class = SanaPipeline
    sequence_length = 300
    no_float16 = ("text_encoder",)

    @property
    def tokenize(self) -> Callable[[Sequence[str]], Tokens]:
        tokenizer = self.pipeline.tokenizer
        tokenizer.padding_side = "right"  # as encode_prompt does
        instruction = len(tokenizer.encode(PREFIX))
        lengths = None if self.tokens is None else instruction + self.tokens - 2, self.tokens
        instructed, plain = (
            Tokenize({"tokenizer": tokenizer}, {"tokenizer": length}, texts)
            for length, texts in zip(lengths, (instructed_texts, in_lower_case), strict=True)
        )
        return TokenizeGroups((instructed, plain))

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As the pipeline does by default: captions follow the instruction, the empty caption of guidance does not."""
        groups = grouped(captions)
        tokens = tokens or {"order": order_of(groups), "groups": (None, None)}
        encoded = [
            self._encode([captions[number] for number in group], instruction, device, of_group)
            for group, instruction, of_group in zip(groups, (INSTRUCTION, None), tokens["groups"], strict=True)
            if group
        ]  # (N, tokens, dim), (N, tokens)
        order = tokens["order"].to(device, non_blocking=True)
        embeddings, mask = (torch.cat(parts)[order] for parts in zip(*encoded, strict=True))
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def _encode(
        self, captions: list[str], instruction: list[str] | None, device: torch.device, tokens: Tokens | None
    ) -> tuple[Tensor, Tensor]:
        return with_tokens(self.pipeline, tokens, device).encode_prompt(
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
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("nvidia-sana-1600", cls.name)

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        return [*latents(transformer, configs["vae"]), *captions(transformer, width)]

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        return math.lcm(SIDE_MULTIPLE, super().resolution_multiple(configs))

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule("proj_out")]
