"""Flux: a flow transformer over 2 x 2 patches of latents, with a T5 and a CLIP whose pooled output alone is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.families.base import Conditions, Configs, Family
from lpl.objectives import FlowMatching


PATCH = 2  # latent positions along a side of what the transformer takes for one; no configuration has it
TIMESTEPS = 1000  # the pipeline divides by it whatever the scheduler has, and the transformer multiplies


class Flux(Family):
    name = "flux"
    pipeline_class = FluxPipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    # Its pipeline hands the scheduler sigmas of its own and the shift that goes with the image's size, which DDIM
    # does not take: what was trained on epsilon, v_prediction or sample could not be sampled.
    objectives = (FlowMatching.name,)
    sequence_length, max_sequence_length = 512, 512
    trainable_text_encoders = ("text_encoder",)
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=device, max_sequence_length=self.max_length
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        rows, columns = (side // PATCH for side in noisy_latents.shape[2:])
        tokens = conditions["encoder_hidden_states"].shape[1]
        output = denoiser(
            hidden_states=F.pixel_unshuffle(noisy_latents, PATCH).flatten(2).mT,  # (B, rows * columns, 4 C)
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            guidance=self._guidance(noisy_latents),
            txt_ids=noisy_latents.new_zeros(tokens, 3),  # text has no place
            img_ids=_places(rows, columns).to(noisy_latents),
            **conditions,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(output.mT.unflatten(2, (rows, columns)), PATCH)

    def _guidance(self, noisy_latents: Tensor) -> Tensor | None:
        """The guidance that a distilled model is told, (B,); others are told none."""
        if not self.denoiser.config.guidance_embeds:
            return None
        scale = self.guidance_scale
        return torch.full((len(noisy_latents),), scale, dtype=torch.float32, device=noisy_latents.device)

    @classmethod
    def takes_guidance(cls, configs: Configs) -> bool:
        return bool(configs[cls.denoiser_name].get("guidance_embeds"))

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 128 * downscaling_factor(configs["vae"])  # the pipeline's default

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        return PATCH * downscaling_factor(configs["vae"])


def _places(rows: int, columns: int) -> Tensor:
    """Each patch's (0, row, column), in reading order, (rows * columns, 3)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
