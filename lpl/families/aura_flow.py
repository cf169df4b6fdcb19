"""AuraFlow: a flow transformer, at first with two streams and then with one, with a UMT5."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import AuraFlowPipeline
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowPreFinalBlock
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents
from lpl.families.tokens import Tokens, on_device
from lpl.objectives import FlowMatching


TIMESTEPS = 1000  # the pipeline divides by it, whatever the scheduler has


class AuraFlow(Family):
    name = "auraflow"
    pipeline_class = AuraFlowPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    objectives = (FlowMatching.name,)  # the pipeline calls a method of the scheduler that DDIM lacks
    sequence_length = 256
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    def encode_prompts(
        self, captions: Sequence[str], device: torch.device, tokens: Tokens | None = None
    ) -> Conditions:
        """As ``encode_prompt``, which copies tokens to the device itself."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        embeddings = self.pipeline.text_encoder(**found)[0] * found["attention_mask"][..., None]
        return {"encoder_hidden_states": embeddings.to(self.pipeline.text_encoder.dtype)}  # (B, tokens, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        timesteps = (timesteps / TIMESTEPS).to(noisy_latents.dtype)
        return denoiser(noisy_latents, timestep=timesteps, **conditions, return_dict=False)[0]

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("auraflow-v1", cls.name)

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["num_attention_heads"] * transformer["attention_head_dim"]
        return [
            *latents(transformer, configs["vae"]),
            Relation("joint_attention_dim", transformer["joint_attention_dim"], (width,), "width of the text encoder"),
            Relation(
                *("caption_projection_dim", transformer["caption_projection_dim"], (own,)),
                why="width of its own attention",
            ),
        ]

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        return 1, math.isqrt(configs["transformer"]["pos_embed_max_size"]) * cls.resolution_multiple(configs)

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [*modulations(denoiser, AdaLayerNormZero, AuraFlowPreFinalBlock), denoiser.get_submodule("proj_out")]
