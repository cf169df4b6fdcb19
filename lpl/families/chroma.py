"""Chroma: Flux' transformer without guidance and pooled text; a small network makes the modulations of all blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ChromaPipeline
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.families import flux
from lpl.families.architecture import Architecture
from lpl.families.base import PATCH, TIMESTEPS, Conditions, Configs, InPatches, packed, patch_positions, unpacked
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import TRANSFORMER, LoraLayout, Table, by_table
from lpl.families.single_file import State, by_layers, with_scales
from lpl.families.tokens import Tokens, with_tokens
from lpl.objectives import FlowMatching


# Layers by their names in the original model
ORIGINAL: Table = {
    **flux.ORIGINAL,
    "": (
        "",
        {
            **flux.ORIGINAL[""][1],
            **{
                f"distilled_guidance_layer.layers.{number}.{theirs}": (
                    f"distilled_guidance_layer.layers.{number}.{ours}",
                )
                for number in range(5)  # of all published models
                for theirs, ours in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
            },
        },
    ),
}
# Layers that have the same name there
SAME = r"distilled_guidance_layer\.(in_proj|out_proj|norms\.\d+)"


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one."""
    found = by_layers(partial(by_table, ORIGINAL), config, state, SAME)
    return with_scales(rf"{flux.NORMS}|\.norms\.\d+", found)


class Chroma(InPatches):
    name = "chroma"
    pipeline_class = ChromaPipeline
    original_state = staticmethod(transformer_state)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 512, 512
    lora_targets = flux.Flux.lora_targets
    lora_layout = LoraLayout(TRANSFORMER, partial(by_table, ORIGINAL))

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which also makes positions on the CPU. The mask is one token longer than a caption."""
        embeddings, mask = with_tokens(self.pipeline, tokens, device)._get_t5_prompt_embeds(
            list(captions), device=device, max_sequence_length=self.tokens
        )
        return {"encoder_hidden_states": embeddings, "mask": mask}  # (B, tokens, dim), (B, tokens)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        rows, columns = (side // PATCH for side in noisy_latents.shape[2:])
        embeddings, mask = conditions["encoder_hidden_states"], conditions["mask"]
        mask = torch.cat([mask, mask.new_ones(len(mask), rows * columns)], 1)
        own: Any = self.denoiser
        if own.gradient_checkpointing:
            own._gradient_checkpointing_func = partial(_checkpointed, mask)
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            encoder_hidden_states=embeddings,
            txt_ids=noisy_latents.new_zeros(embeddings.shape[1], 3),  # text has no position
            img_ids=patch_positions(rows, columns, noisy_latents.device).to(noisy_latents.dtype),
            attention_mask=mask,
            return_dict=False,
        )[0]
        return unpacked(output, noisy_latents.shape)

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(cls.name, "chroma", "https://huggingface.co/lodestones/Chroma", "networks.lora_flux")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        return [
            *latents(transformer, configs["vae"], PATCH),
            needs(transformer, "joint_attention_dim", width, "width of the text encoder"),
            needs(transformer, "attention_head_dim", sum(transformer["axes_dims_rope"]), "sum of its axes_dims_rope"),
        ]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        return [denoiser.get_submodule(name) for name in ("distilled_guidance_layer.out_proj", "proj_out")]


def _checkpointed(mask: Tensor, block: nn.Module, *inputs: Any) -> Any:
    """As diffusers' gradient checkpointing, by which single blocks lose the mask."""
    if isinstance(block, ChromaSingleTransformerBlock):
        inputs = (*inputs, mask)
    return checkpoint(block, *inputs, use_reentrant=False)
