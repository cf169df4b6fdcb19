"""What the trainer asks of a model family; a new family is one more file in this folder and one line in its registry.

A family knows its diffusers pipeline, which component is the denoiser, what a batch conditions it on, how it is
called, and where LoRA goes. Everything else (objective, loss, data, saving) is the same for all families.

Vocabulary. *Conditions* are what the denoiser is given beside latents and timesteps. They are made of a batch's
``caption`` (B strings; B class labels in a class-conditional family) and, where the family wants it, of
``original_size``, ``crop_top_left`` and ``target_size``, each (B, 2), height or top first, in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor
from lpl.objectives import OBJECTIVES


Conditions = dict[str, Tensor]
Configs = Mapping[str, Mapping[str, Any]]  # of the VAE and of the denoiser, by the component's name


class Family:
    """One pipeline, loaded: frozen text encoders and VAE around the denoiser that is trained.

    Class attributes say what the family is; an instance holds the components.

    Args:
        settings: the flags; a family looks at ``max_sequence_length`` and ``guidance_scale``.
    """

    name: ClassVar[str]  # as on the model card's tags
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str]  # the pipeline's component that is trained
    text_encoder_names: ClassVar[tuple[str, ...]]
    optional_components: ClassVar[tuple[str, ...]] = ()  # what a pipeline's index may lack
    vaes: ClassVar[tuple[str, ...]] = (  # that its pipeline can sample with; LPL looks through more
        *("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "VQModel", "AutoencoderDC"),
    )
    left_out: ClassVar[Mapping[str, Any]] = {}  # what training does without, as ``from_pretrained`` is told
    no_float16: ClassVar[tuple[str, ...]] = ()  # text encoders that overflow in it, and are taken in bfloat16
    objectives: ClassVar[tuple[str, ...]] = tuple(OBJECTIVES)  # those that its pipeline can sample
    num_classes: ClassVar[int | None] = None  # TODO(house): replaces class_conditional
    class_conditional: ClassVar[bool] = False  # captions are class labels, numbers from 0
    empty_share: ClassVar[float] = 0.0  # default of --proportion_empty_prompts
    sequence_length: ClassVar[int | None] = None  # default of --max_sequence_length; None: it has no effect
    max_sequence_length: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ()  # those that --train_text_encoder trains
    text_encoder_learning_rate: ClassVar[float | None] = None  # default of --text_encoder_lr; None: --learning_rate
    text_encoder_weight_decay: ClassVar[float | None] = None  # likewise

    def __init__(self, pipeline: DiffusionPipeline, settings: Any) -> None:
        self.pipeline, self.settings = pipeline, settings
        for component in (self.vae, self.denoiser, *self.text_encoders):
            component.requires_grad_(False).eval()

    @classmethod
    def load(cls, path: str, settings: Any, dtypes: Mapping[str, torch.dtype], **source: Any) -> Family:
        """From a pipeline's folder or id.

        Args:
            dtypes: of components by name, and of those not named as "default".
            source: ``revision``, ``variant`` and ``cache_dir`` of ``from_pretrained``, components that are loaded
                already, and None for absent ones.
        """
        return cls(cls.pipeline_class.from_pretrained(path, dtype=dict(dtypes), **source), settings)

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

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Conditions:
        """What :meth:`predict` needs of a batch, each (B, ...). Without gradient unless text encoders are trained."""
        return self.encode_prompts(batch["caption"], device)

    def encode_prompts(self, captions: Sequence[str], device: torch.device) -> Conditions:
        """The part of the conditions that comes from B captions."""
        raise NotImplementedError

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output D, (B, C, h, w), for z_t and (B,) timesteps; without a learned variance's half."""
        raise NotImplementedError

    def call_arguments(self, prompt: str | int, resolution: int) -> dict[str, Any]:
        """How the pipeline is called to draw what a caption (or class label) says, beside steps and guidance."""
        return {"prompt": prompt, "height": resolution, "width": resolution} | self.sampling_arguments()

    def sampling_arguments(self) -> dict[str, Any]:
        """What a call of the pipeline needs beyond prompt, size, steps and guidance to sample as in training."""
        return {"max_sequence_length": self.settings.max_sequence_length} if self.sequence_length else {}

    def loading_arguments(self) -> dict[str, None]:
        """What ``from_pretrained`` has to be told to load a pipeline like this one: the components that it lacks."""
        return {name: None for name in self.optional_components if getattr(self.pipeline, name) is None}

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        """Side in pixels that the denoiser was made for."""
        return configs[cls.denoiser_name]["sample_size"] * downscaling_factor(configs["vae"])

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        """Default of --resolution, where the pipeline takes it; else it is :meth:`native_resolution`."""
        return cls.native_resolution(configs)

    @classmethod
    def takes_guidance(cls, configs: Configs) -> bool:
        """Whether the denoiser is told a guidance scale in training."""
        return False

    @classmethod
    def class_names(cls, index: Mapping[str, Any]) -> dict[int, str]:
        """Of a class-conditional family: the classes' names in a pipeline's index, by label."""
        raise NotImplementedError

    @classmethod
    def class_label(cls, prompt: str | int, names: Mapping[int, str]) -> int:
        """Of a class-conditional family: the label that a class's name or number stands for."""
        raise NotImplementedError

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        """Images' sides must be multiples of this many pixels."""
        return downscaling_factor(configs["vae"]) * configs[cls.denoiser_name].get("patch_size", 1)

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        """The smallest and the largest side in pixels; None: no limit."""
        return 1, None

    @classmethod
    def empty_caption(cls, configs: Configs) -> str | int:
        """What stands for no caption, in training and for classifier-free guidance."""
        return ""

    @classmethod
    def untrained_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The denoiser's configuration for --from_scratch: without a learned variance, which nothing here trains."""
        return dict(config) | {"out_channels": config["in_channels"]}
