"""Stable Diffusion XL: a UNet with two CLIP encoders, conditioned on the image's size and crop too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lpl.families.architecture import STABILITY, Architecture
from lpl.families.base import Conditions, Configs, Family
from lpl.families.fit import Relation, cross_attention, latents, needs
from lpl.families.lora_layout import TWO_ENCODERS, LoraLayout, Originals
from lpl.families.single_file import Component, State, autoencoder, by_layers, clip, open_clip
from lpl.families.tokens import Tokens, with_tokens


# Our layers in the original UNet; those of blocks and their layers are numbered by _block_places.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_originals(unet: nn.Module, names: Iterable[str]) -> Originals:
    """The original UNet's names of our layers."""
    places = UNET | _block_places(unet)

    def original(name: str) -> str:
        start = next((place for place in places if f"{name}.".startswith(f"{place}.")), "")
        rest = name[len(start) :].removeprefix(".")
        return ".".join(filter(None, (places.get(start), RESNET.get(rest, rest))))

    return {original(name): (name,) for name in names}


def unet_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a UNet by the names of the original one."""
    return by_layers(unet_originals, config, state)


def _block_places(unet: Any) -> dict[str, str]:
    """Our blocks in the original UNet, which numbers the layers of each side consecutively."""
    places, count = {}, 1  # input block 0 is conv_in
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            places[f"down_blocks.{index}.resnets.{layer}"] = f"input_blocks.{count}.0"
            places[f"down_blocks.{index}.attentions.{layer}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            places[f"down_blocks.{index}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for index, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            places[f"up_blocks.{index}.resnets.{layer}"] = f"output_blocks.{count}.0"
            places[f"up_blocks.{index}.attentions.{layer}"] = f"output_blocks.{count}.1"
            count += 1
        before = 2 if hasattr(block, "attentions") else 1  # the resnet and, if the block has any, the attention
        places[f"up_blocks.{index}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{before}.conv"
    return places


class StableDiffusionXL(Family):
    name = "stable-diffusion-xl"
    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    trainable_text_encoders = ("text_encoder", "text_encoder_2")
    lora_layout = LoraLayout({"unet": "lora_unet", **TWO_ENCODERS}, unet_originals)

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Conditions:
        conditions = super().conditions(batch, device)
        names = ("original_size", "crop_top_left", "target_size")
        sizes = [batch[name].to(device, non_blocking=True) for name in names]  # (B, 2) each
        time_ids = torch.cat(sizes, dim=1).float()  # bfloat16 would round 1333 to 1336
        return conditions | {"time_ids": time_ids}  # (B, 6)

    def token_lengths(self) -> dict[str, int | None]:
        return {name: getattr(self.pipeline, name).model_max_length for name in ("tokenizer", "tokenizer_2")}

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        pipeline = with_tokens(self.pipeline, tokens, device)
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}  # (B, tokens, dim), (B, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        added = {name: conditions[name] for name in ("text_embeds", "time_ids")}
        embeddings = conditions["encoder_hidden_states"]
        return denoiser(noisy_latents, timesteps, embeddings, added_cond_kwargs=added, return_dict=False)[0]

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", STABILITY)

    @classmethod
    def single_file(cls, configs: Configs) -> tuple[Component, ...]:
        return (
            Component("unet", "model.diffusion_model.", unet_state),
            Component("vae", "first_stage_model.", autoencoder),
            Component("text_encoder", "conditioner.embedders.0.transformer.", clip),
            Component("text_encoder_2", "conditioner.embedders.1.model.", open_clip),
        )

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        unet, first, second = configs["unet"], configs["text_encoder"], configs["text_encoder_2"]
        width = first["hidden_size"] + second["hidden_size"]
        added = 6 * unet["addition_time_embed_dim"] + second["projection_dim"]  # 6: original size, crop, target size
        why = "6 of its addition_time_embed_dim, and the projection of text_encoder_2"
        return [
            *latents(unet, configs["vae"]),
            *cross_attention(unet, width, "width of both text encoders"),
            needs(unet, "projection_class_embeddings_input_dim", added, why),
        ]
