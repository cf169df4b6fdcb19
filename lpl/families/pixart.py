"""PixArt alpha and Sigma: a transformer with cross-attention to a T5; epsilon with a learned variance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, captions, latents
from lpl.families.tokens import Tokens, with_tokens


def in_lower_case(captions: Sequence[str]) -> list[str]:
    """What encode_prompt gives the tokenizer for captions."""
    return [caption.lower().strip() for caption in captions]


class PixArtSigma(Family):
    name = "pixart-sigma"
    pipeline_class = PixArtSigmaPipeline
    sequence_length, max_sequence_length = 300, 512
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return in_lower_case

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        pipeline = with_tokens(self.pipeline, tokens, device)
        embeddings, mask, _, _ = pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=False,
            max_sequence_length=self.tokens,
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}  # (B, tokens, dim), (B, tokens)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        output = denoiser(
            noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_attention_mask=conditions["encoder_attention_mask"],
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]]  # the learned variance follows

    def sampling_arguments(self) -> dict[str, Any]:
        # As in training: captions are not rewritten, and images have the requested size.
        return super().sampling_arguments() | {"clean_caption": False, "use_resolution_binning": False}

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("pixart-ms-sigma-xl-2" if cls is PixArtSigma else cls.name, cls.name)

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        return [*latents(transformer, configs["vae"], variance=True), *captions(transformer, width)]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule("proj_out")]


class PixArtAlpha(PixArtSigma):
    """Models made for 1024 px are conditioned on the image's size too."""

    name = "pixart-alpha"
    pipeline_class = PixArtAlphaPipeline
    sequence_length = 120

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Conditions:
        conditions = super().conditions(batch, device)
        if self.pipeline.transformer.config.sample_size != 128:  # the pipeline's own rule
            return conditions
        size = batch["target_size"].to(device, non_blocking=True).float()  # (B, 2)
        sizes = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}  # (B, 2), (B, 1)
        dtype = conditions["encoder_hidden_states"].dtype
        return conditions | {name: value.to(dtype) for name, value in sizes.items()}
