"""FLUX.2: a flow transformer over latents that are patches already, with three layers of a language model.

That is a Qwen3 in [klein] and a Mistral 3 in [dev].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.families import flux
from lpl.families.architecture import Architecture
from lpl.families.base import TIMESTEPS, Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import ADDED_QKV, QKV, LoraLayout, Table, by_table
from lpl.families.single_file import State, by_layers, with_scales
from lpl.families.tokens import Tokens, chat_texts, on_device
from lpl.objectives import FlowMatching


# Layers by their names in the original model
ORIGINAL: Table = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "img_attn.norm.query_norm": ("attn.norm_q",),
            "img_attn.norm.key_norm": ("attn.norm_k",),
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_attn.qkv": ADDED_QKV,
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_attn.norm.query_norm": ("attn.norm_added_q",),
            "txt_attn.norm.key_norm": ("attn.norm_added_k",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {
            "linear1": ("attn.to_qkv_mlp_proj",),
            "linear2": ("attn.to_out",),
            "norm.query_norm": ("attn.norm_q",),
            "norm.key_norm": ("attn.norm_k",),
        },
    ),
    "": (
        "",
        {
            "img_in": ("x_embedder",),
            "txt_in": ("context_embedder",),
            "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
            "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
            "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
            "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
            "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
            "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
            "single_stream_modulation.lin": ("single_stream_modulation.linear",),
            "final_layer.adaLN_modulation.1": ("norm_out.linear",),
            "final_layer.linear": ("proj_out",),
        },
    ),
}


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one."""
    return with_scales(flux.NORMS, by_layers(partial(by_table, ORIGINAL), config, state))


class _Flux2(Family):
    """What both have in common."""

    original_state = staticmethod(transformer_state)
    vaes = ("AutoencoderKLFlux2",)  # the pipeline takes the latents' mean and deviation from its batch norm
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 512, 512
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "attn.to_qkv_mlp_proj"),
    )
    lora_layout = LoraLayout({"transformer": "lora_unet"}, partial(by_table, ORIGINAL), swapped=True)
    layers: ClassVar[tuple[int, ...]]  # of the language model, whose outputs the transformer gets side by side

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which copies tokens to the device itself, and lets the model predict the next word."""
        found = on_device((tokens or self.tokenize(captions))["tokenizer"], device)
        encoder = self.pipeline.text_encoder
        hidden = encoder.model(**found, output_hidden_states=True, use_cache=False).hidden_states
        return {"encoder_hidden_states": torch.cat([hidden[layer] for layer in self.layers], 2)}  # (B, tokens, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        count, _, rows, columns = noisy_latents.shape
        tokens, device = conditions["encoder_hidden_states"].shape[1], noisy_latents.device
        output = denoiser(
            hidden_states=noisy_latents.flatten(2).mT,  # (B, rows * columns, C)
            timestep=timesteps.to(noisy_latents.dtype) / TIMESTEPS,
            guidance=self.guidance(noisy_latents),
            txt_ids=_positions(1, 1, 1, tokens, device=device).expand(count, -1, -1),
            img_ids=_positions(1, rows, columns, 1, device=device).expand(count, -1, -1),
            **conditions,
            return_dict=False,
        )[0]
        return output.mT.unflatten(2, (rows, columns))

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(
            "Flux.2-dev" if cls.name == "flux2" else cls.name, cls.name, "https://github.com/black-forest-labs/flux2"
        )

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        layers = len(cls.layers)
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "joint_attention_dim", layers * width, f"{layers} times the width of the text encoder"),
            needs(transformer, "attention_head_dim", sum(transformer["axes_dims_rope"]), "sum of its axes_dims_rope"),
        ]

    @classmethod
    def lora_modules(cls, configs: Configs) -> tuple[str, ...]:
        """Those of both kinds of blocks; in one kind, what is called to_out is no layer but a list of them."""
        blocks = range(configs["transformer"]["num_single_layers"])
        return *cls.lora_targets, *(f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        return 64 * downscaling_factor(configs["vae"])  # the pipeline's default

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        """The modulations are those of all blocks."""
        return [*modulations(denoiser, Flux2Modulation, AdaLayerNormContinuous), denoiser.get_submodule("proj_out")]


class Flux2Klein(_Flux2):
    name = "flux2-klein"
    pipeline_class = Flux2KleinPipeline
    layers = inspect.signature(Flux2KleinPipeline.encode_prompt).parameters["text_encoder_out_layers"].default

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(chat_texts, self.pipeline.tokenizer, enable_thinking=False)


@dataclass(frozen=True)
class TokenizeMessages:
    """Captions -> tokens, as ``encode_prompt`` does by a processor, which calls its tokenizer itself.

    Args:
        processor: of texts and images.
        length: how many tokens are made.
        system: the message before each caption.
    """

    processor: Any
    length: int | None
    system: str

    def __call__(self, captions: Sequence[str]) -> Tokens:
        found = self.found(
            captions, return_tensors="pt", padding="max_length", truncation=True, max_length=self.length
        )
        return {"tokenizer": {name: found[name] for name in ("input_ids", "attention_mask")}}

    def found(self, captions: Sequence[str], **options: Any) -> Mapping[str, Any]:
        """What the processor makes of them.

        Args:
            options: of its tokenizer.
        """
        messages = format_input(list(captions), self.system)
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=True, **options
        )


class Flux2(_Flux2):
    name = "flux2"
    pipeline_class = Flux2Pipeline
    layers = inspect.signature(Flux2Pipeline.encode_prompt).parameters["text_encoder_out_layers"].default

    @property
    def tokenize(self) -> TokenizeMessages:
        return TokenizeMessages(self.pipeline.tokenizer, self.tokens, self.pipeline.system_message)

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """With the system message, which counts too."""
        return [len(self.tokenize.found([caption])["input_ids"][0]) for caption in captions], self.tokens or 0


def _positions(*sizes: int, device: torch.device) -> Tensor:
    """Each place of a grid, in reading order, (places, sizes)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
