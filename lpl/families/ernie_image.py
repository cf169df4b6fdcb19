"""ERNIE-Image: a single-stream flow transformer over the latents of Flux.2's VAE, with a Ministral 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ErnieImagePipeline
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import LoraLayout, own_names
from lpl.families.single_file import own_state
from lpl.families.tokens import Tokens, in_front, lengths_of, on_device
from lpl.objectives import FlowMatching


class ErnieImage(Family):
    name = "ernie-image"
    pipeline_class = ErnieImagePipeline
    original_state = staticmethod(own_state)
    optional_components = ("pe", "pe_tokenizer")  # a language model that rewrites prompts
    vaes = ("AutoencoderKLFlux2",)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 512, 2048
    lora_targets = (
        *("self_attention.to_q", "self_attention.to_k", "self_attention.to_v", "self_attention.to_out.0"),
        *("mlp.gate_proj", "mlp.up_proj", "mlp.linear_fc2"),
    )
    lora_layout = LoraLayout({"transformer": "lora_unet"}, own_names)

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """All captions at once; ``encode_prompt`` has one after the other, without padding."""
        found = (tokens or self.tokenize(captions))["tokenizer"]
        lengths = lengths_of(found["attention_mask"])
        found = on_device(found, device)
        ids, mask = found["input_ids"], found["attention_mask"]
        encoded = self.pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return {
            "text_bth": in_front(encoded.hidden_states[-2], mask),  # (B, tokens, dim)
            "text_lens": mask.sum(1),  # (B,)
            "lengths": lengths,
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            text_bth=conditions["text_bth"][:, : max(conditions["lengths"])],
            text_lens=conditions["text_lens"],
            return_dict=False,
        )[0]

    def sampling_arguments(self) -> dict[str, Any]:
        return {"use_pe": False}  # as in training: captions are not rewritten, and may have any length

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["num_attention_heads"] * sum(transformer["rope_axes_dim"])
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "text_in_dim", width, "width of the text encoder"),
            needs(transformer, "hidden_size", own, "its num_attention_heads times the sum of its rope_axes_dim"),
        ]

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        return 64 * downscaling_factor(configs["vae"])  # the pipeline's default

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        own: Any = denoiser
        return [own.adaLN_modulation[-1], own.final_linear]
