"""HunyuanImage 2.1: a flow transformer over latents of 32 x 32 pixels, with a Qwen2.5-VL and, for text that the image
is to show, a ByT5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HunyuanImagePipeline
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageAdaNorm
from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.autoencoders import downscaling_factor
from lpl.families.base import Conditions, Configs, Family, modulations
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import JOINT
from lpl.families.qwen_image import filled_in
from lpl.families.tokens import Tokenize, Tokens, lengths_of, on_device
from lpl.objectives import FlowMatching


LAYER = -3  # of the language model, whose output the transformer gets


@dataclass(frozen=True)
class TokenizeQuoted(Tokenize):
    """The second tokenizer gets what is in quotes, which the image is to show; of other captions its mask is zero."""

    def _encoded(self, name: str, texts: list[str]) -> dict[str, Tensor]:
        if name == "tokenizer":
            return super()._encoded(name, texts)
        quoted = [extract_glyph_text(text) or "" for text in texts]  # the template around a caption has no quotes
        found = super()._encoded(name, quoted)
        there = torch.tensor([[bool(text)] for text in quoted])
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"] * there}


class HunyuanImage(Family):
    name = "hunyuan-image"
    pipeline_class = HunyuanImagePipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    of_bytes = ("tokenizer_2",)
    vaes = ("AutoencoderKLHunyuanImage",)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 1000, 1000
    guidance_argument = "distilled_guidance_scale"
    guides_by_prompt = True  # it has a guider for prompts with text in quotes, and one for others
    lora_targets = JOINT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.tokens:
            self.pipeline.tokenizer_max_length = self.tokens  # its call takes no length

    @classmethod
    def idle_components(cls) -> list[str]:
        return []  # the optional ones guide

    def token_lengths(self) -> dict[str, int | None]:
        return {
            "tokenizer": self.pipeline.tokenizer_max_length + self._instruction,
            "tokenizer_2": self.pipeline.tokenizer_2_max_length,
        }

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(filled_in, self.pipeline.prompt_template_encode)

    @property
    def tokenize(self) -> Callable[[Sequence[Any]], Tokens]:
        lengths = self.token_lengths()
        return TokenizeQuoted({name: getattr(self.pipeline, name) for name in lengths}, lengths, self.texts)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which computes logits, and has what is in quotes one after the other."""
        tokens = tokens or self.tokenize(captions)
        first, second = tokens["tokenizer"], tokens["tokenizer_2"]
        lengths = tuple(length - self._instruction for length in lengths_of(first["attention_mask"]))
        shown = lengths_of(second["attention_mask"])
        first, second = on_device(first, device), on_device(second, device)
        hidden = self.pipeline.text_encoder.model(**first, output_hidden_states=True, use_cache=False).hidden_states
        ids, mask = second["input_ids"], second["attention_mask"]
        seen = F.pad(mask[:, 1:], (1, 0), value=1)  # attention to nothing would be no number
        quoted = self.pipeline.text_encoder_2(input_ids=ids, attention_mask=seen.float())[0]
        return {
            "encoder_hidden_states": hidden[LAYER][:, self._instruction :],  # (B, tokens, dim)
            "encoder_attention_mask": first["attention_mask"][:, self._instruction :],
            "encoder_hidden_states_2": quoted * mask[:, :1, None],  # (B, tokens, dim), zeros without quotes
            "encoder_attention_mask_2": mask,
            "lengths": lengths,
            "lengths_2": shown,
        }

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Tokens that no caption of the batch has are left out, which changes no answer. A transformer for two times
        (MeanFlow) gives the velocity at one where both are the same."""
        own: Any = self.denoiser
        if own.gradient_checkpointing:
            own._gradient_checkpointing_func = _checkpointed
        timesteps, guidance = timesteps.to(noisy_latents.dtype), self.guidance(noisy_latents)
        ends = {"": max(conditions["lengths"]), "_2": max(conditions["lengths_2"])}
        text = {
            name: conditions[name][:, :end]
            for number, end in ends.items()
            for name in (f"encoder_hidden_states{number}", f"encoder_attention_mask{number}")
        }
        with _in_given_order(own):
            return denoiser(
                hidden_states=noisy_latents,
                timestep=timesteps,
                timestep_r=timesteps if own.config.use_meanflow else None,
                guidance=None if guidance is None else 1000 * guidance,
                **text,
                return_dict=False,
            )[0]

    def without_values(self, conditions: Conditions) -> Conditions:
        count, second = conditions["encoder_attention_mask_2"].shape
        return super().without_values(conditions) | {"lengths_2": (second,) * count}

    def sampling_arguments(self) -> dict[str, Any]:
        return {}

    @classmethod
    def guides_itself(cls, configs: Configs) -> bool:
        return not cls.takes_guidance(configs)

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        return 64 * downscaling_factor(configs["vae"])  # the pipeline's default

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        return 2 * downscaling_factor(configs["vae"])  # as the pipeline demands

    @classmethod
    def distilled(cls, index: Mapping[str, Any], configs: Configs) -> str | None:
        return "by its use_meanflow" if configs["transformer"].get("use_meanflow") else None

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, vae = configs["transformer"], configs["vae"]
        first, second = (configs[name]["hidden_size"] for name in cls.text_encoder_names)
        return [
            *latents(transformer, vae),
            needs(transformer, "text_embed_dim", first, "width of text_encoder"),
            needs(transformer, "text_embed_2_dim", second, "width of text_encoder_2"),
            needs(transformer, "attention_head_dim", sum(transformer["rope_axes_dim"]), "sum of its rope_axes_dim"),
        ]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        kinds = (HunyuanImageAdaNorm, AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
        return [*modulations(denoiser, *kinds), denoiser.get_submodule("proj_out")]


def _checkpointed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    """As diffusers' gradient checkpointing, which takes no arguments by name, as the transformer gives them."""
    return checkpoint(block, *inputs, use_reentrant=False, **options)


@contextmanager
def _in_given_order(transformer: Any) -> Iterator[None]:
    """Within, the second encoder's tokens follow the first's. The transformer would order them by their masks, which
    waits for the device; attention does not see an order of text."""
    second: list[Tensor] = []

    def take(module: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = dict(options)
        second.append(rest.pop("encoder_hidden_states_2"))
        masks = [rest.pop(f"encoder_attention_mask{number}") for number in ("", "_2")]
        return inputs, rest | {"encoder_attention_mask": torch.cat(masks, 1)}

    def own_mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, timesteps, mask = inputs
        return hidden, timesteps, mask[:, : hidden.shape[1]]

    def append(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output, transformer.context_embedder_2(second.pop())], 1)

    handles = (
        transformer.register_forward_pre_hook(take, with_kwargs=True),
        transformer.context_embedder.register_forward_pre_hook(own_mask),
        transformer.context_embedder.register_forward_hook(append),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
