"""Z-Image: a single-stream flow transformer over 2 x 2 patches of latents, which a Qwen3's embeddings join."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from lpl.families.architecture import Architecture
from lpl.families.base import TIMESTEPS, Conditions, Configs, InPatches, tables_on_device
from lpl.families.fit import Relation, latents, needs
from lpl.families.lora_layout import QKV, LoraLayout, Table, by_table
from lpl.families.single_file import State, by_layers
from lpl.families.tokens import Tokens, chat_texts, in_front, lengths_of, on_device
from lpl.objectives import FlowMatching


# Layers by their names in the original model
LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": tuple(name.replace("attn.", "attention.") for name in QKV),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}
BLOCKS = ("layers", "noise_refiner", "context_refiner")
ORIGINAL: Table = {name: (name, LAYERS) for name in BLOCKS} | {
    "": (
        "",
        {
            "x_embedder": ("all_x_embedder.2-1",),
            "final_layer.linear": ("all_final_layer.2-1.linear",),
            "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        },
    )
}
# Layers that have the same name there; those of padding are outside any layer
SAME = (
    rf"({'|'.join(BLOCKS)})\.\d+\.(attention_norm[12]|ffn_norm[12]|feed_forward\.w[123]|adaLN_modulation\.0)"
    r"|cap_embedder\.[01]|t_embedder\.mlp\.[02]|"
)


def transformer_state(config: Mapping[str, Any], state: State) -> State:
    """The weights of a transformer by the names of the original one, as ComfyUI has them."""
    return by_layers(partial(by_table, ORIGINAL), config, state, SAME)


class ZImage(InPatches):
    name = "z-image"
    pipeline_class = ZImagePipeline
    original_state = staticmethod(transformer_state)
    objectives = (FlowMatching.name,)  # the pipeline passes sigmas to the scheduler, which DDIM does not take
    sequence_length, max_sequence_length = 512, 512
    no_guidance = 0.0
    lora_targets = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    lora_layout = LoraLayout({"transformer": "lora_unet"}, partial(by_table, ORIGINAL))

    def token_lengths(self) -> dict[str, int | None]:
        return {"tokenizer": self.tokens}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        return partial(chat_texts, self.pipeline.tokenizer, enable_thinking=True)

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """As ``encode_prompt``, which selects each caption's tokens and waits for the device."""
        found = (tokens or self.tokenize(captions))["tokenizer"]
        lengths = lengths_of(found["attention_mask"])
        found = on_device(found, device)
        mask = found["attention_mask"].bool()
        encoded = self.pipeline.text_encoder(found["input_ids"], attention_mask=mask, output_hidden_states=True)
        return {"embeddings": in_front(encoded.hidden_states[-2], mask), "lengths": lengths}  # (B, tokens, dim)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The transformer's time runs from noise, 0, to images, 1, and its output is z0 - noise."""
        captions = [
            all_[:length] for all_, length in zip(conditions["embeddings"], conditions["lengths"], strict=True)
        ]
        positions: Any = cast(Any, self.denoiser).rope_embedder
        if positions.freqs_cis is None:
            tables = positions.precompute_freqs_cis(positions.axes_dims, positions.axes_lens, theta=positions.theta)
            positions.freqs_cis = tables_on_device(tables, noisy_latents.device)
        output = denoiser(
            list(noisy_latents.unsqueeze(2)), (TIMESTEPS - timesteps) / TIMESTEPS, captions, return_dict=False
        )[0]
        return -torch.stack(output).squeeze(2)

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        return Architecture(cls.name, cls.name, "https://github.com/Tongyi-MAI/Z-Image")

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        transformer, width = configs["transformer"], configs["text_encoder"]["hidden_size"]
        own = transformer["n_heads"] * sum(transformer["axes_dims"])
        return [
            *latents(transformer, configs["vae"]),
            needs(transformer, "cap_feat_dim", width, "width of the text encoder"),
            needs(transformer, "dim", own, "its n_heads times the sum of its axes_dims"),
        ]

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        """The blocks of the captions alone are not modulated; they start as diffusers initialises them."""
        own: Any = denoiser
        blocks = (*own.noise_refiner, *own.layers)
        return [
            *(block.adaLN_modulation[0] for block in blocks),
            *(last.linear for last in own.all_final_layer.values()),
        ]
