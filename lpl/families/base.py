"""What the trainer asks of a model family; a new family is one more file in this folder and one line in its registry.

A family knows its diffusers pipeline, which component is the denoiser, how captions become conditions, and how the
denoiser is called. Everything else (objective, loss, data, saving) is the same for all families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor


Conditions = dict[str, Tensor]


class Family:
    """One pipeline, loaded: frozen text encoders and VAE around the denoiser that is trained.

    Class attributes say what the family is; an instance holds the components.
    """

    name: ClassVar[str]  # as on the model card's tags
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str]  # the pipeline's component that is trained
    text_encoder_names: ClassVar[tuple[str, ...]]
    optional_components: ClassVar[tuple[str, ...]] = ()  # what a pipeline's index may lack
    default_resolution: ClassVar[int]
    max_sequence_length: ClassVar[int | None] = None  # what --max_sequence_length may be; None: it has no effect

    def __init__(self, pipeline: DiffusionPipeline, max_sequence_length: int) -> None:
        self.pipeline = pipeline
        self.sequence_length = max_sequence_length
        for component in (self.vae, *self.text_encoders):
            component.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str, text_encoder_dtype: torch.dtype, max_sequence_length: int, **source: Any) -> Family:
        """From a pipeline's folder or id; the text encoders in the given dtype, the VAE and the denoiser in float32.

        Args:
            source: ``revision``, ``variant`` and ``cache_dir`` of ``from_pretrained``, and None for absent components.
        """
        dtypes = {"default": torch.float32, **dict.fromkeys(cls.text_encoder_names, text_encoder_dtype)}
        return cls(cls.pipeline_class.from_pretrained(path, dtype=dtypes, **source), max_sequence_length)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that the pipeline has; SD3's T5 may be absent."""
        encoders = (getattr(self.pipeline, name) for name in self.text_encoder_names)
        return [encoder for encoder in encoders if encoder is not None]

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        """Captions, B of them -> what :meth:`predict` needs of them, each (B, ...). Call without gradient."""
        raise NotImplementedError

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output D, (B, C, h, w), for z_t and (B,) timesteps."""
        raise NotImplementedError

    def sampling_arguments(self) -> dict[str, Any]:
        """What a call of the pipeline needs beyond prompt, size, steps and guidance to sample as in training."""
        return {}

    def loading_arguments(self) -> dict[str, None]:
        """What ``from_pretrained`` has to be told to load a pipeline like this one: the components that it lacks."""
        return {name: None for name in self.optional_components if getattr(self.pipeline, name) is None}

    @classmethod
    def resolution_multiple(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Images' sides must be multiples of this many pixels; ``configs`` holds those of VAE and denoiser."""
        return downscaling_factor(configs["vae"])

    @classmethod
    def max_resolution(cls, configs: Mapping[str, Mapping[str, Any]]) -> int | None:
        """The largest side in pixels, where the denoiser has one."""
        return None
