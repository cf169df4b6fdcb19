"""Qwen-Image: a flow transformer (MM-DiT) over 2 x 2 patches of latents, with a Qwen2.5-VL as text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from lpl.autoencoders import latent_channels
from lpl.families.architecture import Architecture
from lpl.families.base import PATCH, TIMESTEPS, Conditions, Configs, InPatches, packed, unpacked
from lpl.families.fit import Relation, needs
from lpl.families.lora_layout import JOINT, LoraLayout, own_names
from lpl.families.single_file import own_state
from lpl.families.tokens import Tokens, in_front, lengths_of, on_device
from lpl.objectives import FlowMatching


def filled_in(template: str, captions: Sequence[str]) -> list[str]:
    return [template.format(caption) for caption in captions]


class QwenImage(InPatches):
    name = "qwen-image"
    pipeline_class = QwenImagePipeline
    original_state = staticmethod(own_state)
    vaes = ("AutoencoderKLQwenImage",)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    empty_text = " "  # as the model's authors write it
    sequence_length, max_sequence_length = 512, 1024
    guidance_argument = "true_cfg_scale"
    idle_weights = True  # of the last block's text stream
    lora_targets = JOINT
    lora_layout = LoraLayout({"transformer": "lora_unet"}, own_names, "lycoris")

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": (self.tokens or self.pipeline.tokenizer_max_length) + self._instruction}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(filled_in, self.pipeline.prompt_template_encode)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which waits for the device to select each caption's tokens, and computes logits."""
        found = (tokens or self.tokenize(captions))["tokenizer"]
        lengths = tuple(length - self._instruction for length in lengths_of(found["attention_mask"]))
        found = on_device(found, device)
        ids, mask = found["input_ids"], found["attention_mask"]
        hidden = self.pipeline.text_encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        embeddings, there = (in_front(value, mask)[:, self._instruction :] for value in (hidden, mask[..., None]))
        return {
            "encoder_hidden_states": embeddings,  # (B, tokens, dim)
            "encoder_hidden_states_mask": there.squeeze(2),  # (B, tokens)
            "lengths": lengths,
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        lengths, (rows, columns) = conditions["lengths"], (side // PATCH for side in noisy_latents.shape[2:])
        longest = max(lengths)
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            guidance=self.guidance(noisy_latents),
            encoder_hidden_states=conditions["encoder_hidden_states"][:, :longest],
            encoder_hidden_states_mask=(
                conditions["encoder_hidden_states_mask"][:, :longest] if min(lengths) < longest else None
            ),
            img_shapes=[[(1, rows, columns)]] * len(noisy_latents),
            return_dict=False,
        )[0]
        return unpacked(output, noisy_latents.shape)

    def sampling_arguments(self) -> dict[str, Any]:
        return super().sampling_arguments() | {"negative_prompt": " "}  # without one, the pipeline does not guide

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(cls.name, cls.name, "https://github.com/QwenLM/Qwen-Image")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, channels = configs["transformer"], latent_channels(configs["vae"])
        width = configs["text_encoder"]["hidden_size"]
        why = f"channels of the VAE's latents in patches of {PATCH} x {PATCH}"
        return [
            needs(transformer, "in_channels", channels * PATCH**2, why),
            needs(transformer, "out_channels", channels, "channels of the VAE's latents"),
            needs(transformer, "joint_attention_dim", width, "width of text_encoder"),
            needs(transformer, "attention_head_dim", sum(transformer["axes_dims_rope"]), "sum of its axes_dims_rope"),
        ]

    @classmethod
    def untrained_config(cls, config: Any) -> dict[str, Any]:
        return dict(config)

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        own: Any = denoiser
        blocks = own.transformer_blocks
        modulation = [layer for block in blocks for layer in (block.img_mod[1], block.txt_mod[1])]
        return [*modulation, own.norm_out.linear, own.proj_out]
