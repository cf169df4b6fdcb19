"""Wan: a flow transformer over 2 x 2 patches of a video's latents, with a UMT5. Here each video is one frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import LoraLayout, Table, by_table
from lpl.families.tokens import Tokens, on_device
from lpl.objectives import FlowMatching


SIDES = 16  # the pipeline takes multiples of it, whatever the VAE

# Layers by their names in the original model
ORIGINAL: Table = {
    "blocks": (
        "blocks",
        {
            **{f"self_attn.{name}": (f"attn1.to_{name}",) for name in "qkv"},
            "self_attn.o": ("attn1.to_out.0",),
            **{f"cross_attn.{name}": (f"attn2.to_{name}",) for name in "qkv"},
            "cross_attn.o": ("attn2.to_out.0",),
            "ffn.0": ("ffn.net.0.proj",),
            "ffn.2": ("ffn.net.2",),
        },
    ),
    "": (
        "",
        {
            "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
            "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
            "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
            "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
            "time_projection.1": ("condition_embedder.time_proj",),
            "head.head": ("proj_out",),
        },
    ),
}


def cleaned(captions: Sequence[str]) -> list[str]:
    return [prompt_clean(caption) for caption in captions]


class Wan(Family):
    name = "wan"
    pipeline_class = WanPipeline
    vaes = ("AutoencoderKLWan",)
    objectives = (FlowMatching.name,)  # the pipeline reads the scheduler's sigmas, which DDIM lacks
    draws_videos = True
    sequence_length = 512
    lora_targets = (*("to_q", "to_k", "to_v", "to_out.0"), *("ffn.net.0.proj", "ffn.net.2"))
    lora_layout = LoraLayout({"transformer": "lora_unet"}, partial(by_table, ORIGINAL))

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return cleaned

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which cuts the embeddings by lengths that are on the device."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        embeddings = self.pipeline.text_encoder(**found).last_hidden_state
        return {  # (B, tokens, dim)
            "encoder_hidden_states": embeddings.masked_fill(found["attention_mask"][..., None] == 0, 0)
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Where the pipeline gives each patch a timestep (``expand_timesteps``), those of one frame are equal."""
        output = denoiser(
            hidden_states=noisy_latents.unsqueeze(2), timestep=timesteps, **conditions, return_dict=False
        )[0]
        return output.squeeze(2)

    def sampling_arguments(self) -> dict[str, Any]:
        return super().sampling_arguments() | {"num_frames": 1, "output_type": "pil"}

    @classmethod
    def why_refused(cls, index: Mapping[str, Any]) -> str | None:
        if tuple(index.get("transformer_2") or (None, None)) == (None, None) and not index.get("boundary_ratio"):
            return None
        return (
            "it has a transformer for high noise and another one for low noise, of which this trainer would train one "
            "only; give a Wan with one transformer, such as Wan 2.1 or Wan 2.2 TI2V-5B"
        )

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("wan2.1", "wan2.1", "https://github.com/Wan-Video/Wan2.1")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "text_dim", width, "width of the text encoder"),
        ]

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        return 640  # about as many pixels as the pipeline's default, 480 x 832

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        patch = configs["transformer"]["patch_size"][-1]
        return math.lcm(SIDES, downscaling_factor(configs["vae"]) * patch)

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        """The gates of the blocks are no layers; they start as diffusers initialises them."""
        return [denoiser.get_submodule("proj_out")]
