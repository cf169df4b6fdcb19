"""HiDream-I1: a flow transformer with experts, two CLIP encoders, a T5 and all layers of a Llama 3.1.

Diffusers' experts give gradients in one of their two modes only, and wait for the GPU several times for each expert.
:class:`Experts` takes their place. As in diffusers, no auxiliary loss keeps their loads even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamImageOutEmbed,
    HiDreamImageSingleTransformerBlock,
    HiDreamImageTransformerBlock,
    MOEFeedForwardSwiGLU,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lpl.autoencoders import downscaling_factor
from lpl.families.architecture import Architecture
from lpl.families.base import PATCH, Conditions, Configs, InPatches, unpacked
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import LoraLayout, own_names
from lpl.families.tokens import Tokens, on_device
from lpl.objectives import FlowMatching


CLIP_TOKENS = 218  # that the pipeline gives the CLIP encoders at most


class Experts(MOEFeedForwardSwiGLU):
    """A feed-forward layer of which each token asks its own few experts, and all tokens the shared ones."""

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights, _ = self.gate(x)  # (tokens, k)
        expert = chosen.flatten()
        order = expert.argsort(stable=True)
        rows = x.flatten(0, 1).repeat_interleave(chosen.shape[1], 0)[order]  # of the first expert first
        parts = rows.split(rows_of_each(expert, len(self.experts)))
        answers = torch.cat([own(part) for own, part in zip(self.experts, parts, strict=True)])
        answers = answers[order.argsort()].unflatten(0, chosen.shape)  # (tokens, k, dim)
        routed = (answers * weights[..., None]).sum(1).to(x.dtype)
        return routed.view_as(x) + self.shared_experts(x)


def rows_of_each(expert: Tensor, count: int) -> list[int]:
    """How many rows each of ``count`` experts has, by the expert of each row, (rows,).

    It waits for the GPU. On one that is not there, experts have equal shares.
    """
    if isinstance(expert, FakeTensor):
        return [len(part) for part in torch.empty(len(expert), device="meta").tensor_split(count)]
    numbers = torch.arange(count, device=expert.device)
    return (expert == numbers[:, None]).sum(1).tolist()


class HiDream(InPatches):
    name = "hidream-i1"
    pipeline_class = HiDreamImagePipeline
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    objectives = (FlowMatching.name,)  # the pipeline gives the scheduler a shift, which DDIM does not take
    sequence_length = 128
    lora_targets = (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out"),
        *("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t", "attn1.to_out_t"),
    )
    lora_layout = LoraLayout({"transformer": "lora_unet"}, own_names)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.denoiser.modules():
            if type(module) is MOEFeedForwardSwiGLU:
                module.__class__ = Experts
                module.gate.alpha = 0.0  # the loss that diffusers computes in training and leaves unused

    def token_lengths(self) -> dict[str, int | None]:
        tokens, pipeline = self.tokens or 128, self.pipeline
        clip = min(tokens, CLIP_TOKENS)
        return {
            "tokenizer": clip,
            "tokenizer_2": clip,
            "tokenizer_3": min(tokens, pipeline.tokenizer_3.model_max_length),
            "tokenizer_4": min(tokens, pipeline.tokenizer_4.model_max_length),
        }

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which lets Llama predict the next word and keeps its attention."""
        found = {name: on_device(part, device) for name, part in (tokens or self.tokenize(captions)).items()}
        pipeline = self.pipeline
        clips = ((pipeline.text_encoder, "tokenizer"), (pipeline.text_encoder_2, "tokenizer_2"))
        llama = pipeline.text_encoder_4.model(**found["tokenizer_4"], output_hidden_states=True, use_cache=False)
        return {
            "pooled_embeds": torch.cat([clip(found[name]["input_ids"])[0] for clip, name in clips], 1),  # (B, dim)
            "encoder_hidden_states_t5": pipeline.text_encoder_3(**found["tokenizer_3"])[0],  # (B, tokens, dim)
            "encoder_hidden_states_llama3": torch.stack(llama.hidden_states[1:], 1),  # (B, layers, tokens, dim)
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's output is z0 - noise, in patches with their channels last. It would put them together only
        in eval mode, and read their sizes on the host; images that are no squares have patches without use behind."""
        rows, columns = (side // PATCH for side in noisy_latents.shape[2:])
        llama = conditions["encoder_hidden_states_llama3"].transpose(0, 1)
        own: Any = self.denoiser
        own.unpatchify = _as_they_are
        try:
            patches = denoiser(
                hidden_states=noisy_latents,
                timesteps=timesteps,
                **conditions | {"encoder_hidden_states_llama3": llama},
                return_dict=False,
            )[0]
        finally:
            del own.unpatchify
        patches = patches[:, : rows * columns].unflatten(2, (PATCH**2, -1)).mT.flatten(2)
        return -unpacked(patches, noisy_latents.shape)

    def call_arguments(self, prompt: str | int, height: int, width: int) -> dict[str, Any]:
        for name, value in self.attributes_for(height, width).items():
            setattr(self.pipeline, name, value)
        return super().call_arguments(prompt, height, width)

    def attributes_for(self, height: int, width: int) -> dict[str, Any]:
        """The pipeline draws as many pixels as a square of its default size has, whatever it is asked for."""
        return {"default_sample_size": math.ceil(math.sqrt(height * width) / self.pipeline.vae_scale_factor)}

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(cls.name, cls.name, "https://github.com/HiDream-ai/HiDream-I1")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer = configs["transformer"]
        axes = sum(transformer["axes_dims_rope"])
        blocks = transformer["num_layers"] + transformer["num_single_layers"]
        pooled = sum(configs[name]["projection_dim"] for name in ("text_encoder", "text_encoder_2"))
        return [
            *latents(transformer, configs["vae"]),
            *(
                Relation("caption_channels", channels, (configs[name]["hidden_size"],), f"width of {name}")
                for channels, name in zip(transformer["caption_channels"], ("text_encoder_3", "text_encoder_4"))
            ),
            needs(transformer, "text_emb_dim", pooled, "projections of both CLIP text encoders"),
            needs(transformer, "attention_head_dim", (axes, 2 * axes), "sum of its axes_dims_rope, or twice that"),
            Relation("number of llama_layers", len(transformer["llama_layers"]), (blocks,), "number of its blocks"),
        ]

    @classmethod
    def largest_area(cls, configs: Configs) -> int | None:
        return math.prod(configs["transformer"]["max_resolution"]) * downscaling_factor(configs["vae"]) ** 2

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        kinds = (HiDreamImageTransformerBlock, HiDreamImageSingleTransformerBlock, HiDreamImageOutEmbed)
        modulated = [module for module in denoiser.modules() if isinstance(module, kinds)]
        return [
            *(module.get_submodule("adaLN_modulation.1") for module in modulated),
            denoiser.get_submodule("final_layer.linear"),
        ]


def _as_they_are(patches: Tensor, *_: Any) -> Tensor:
    return patches
