"""What the trainer asks of a model family; a new family is one more file in this folder and one line in its registry.

A family knows its diffusers pipeline, which component is the denoiser, what a batch conditions it on, how to call it,
and where LoRA goes. Everything else (objective, loss, data, saving) is the same for all families.

Vocabulary. *Conditions* are what the denoiser takes beside latents and timesteps. They are computed from a batch's
``caption`` (B strings; B class labels in a class-conditional family) and, if the family needs them, from
``original_size``, ``crop_top_left`` and ``target_size``, each (B, 2), height or top first, in pixels. A batch of the
loader has ``tokens`` too, made of its captions by :meth:`Family.tokenize`. Conditions are tensors, (B, ...), of one
shape for all captions; where a denoiser must know how many tokens each has, ``lengths`` are B integers on the host,
of the first tensor's second dimension. Those of another text encoder are ``lengths_2``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from lpl.autoencoders import downscaling_factor, exact_precision
from lpl.families.architecture import Architecture
from lpl.families.fit import Relation
from lpl.families.lora_layout import LoraLayout
from lpl.families.single_file import Component, State
from lpl.families.tokens import Tokenize, Tokens, conditions_on_device, of_text
from lpl.objectives import OBJECTIVES


Conditions = dict[str, Any]
Configs = Mapping[str, Mapping[str, Any]]  # of the VAE and of the denoiser, by the component's name
PATCH = 2  # side of a patch in latents, where no configuration has it: that of all published models
TIMESTEPS = 1000  # that some pipelines divide by, whatever the scheduler has


FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")  # of models of a few steps


class Family:
    """One loaded pipeline: frozen text encoders and VAE around the denoiser that is trained.

    Class attributes describe the family; an instance holds the components.

    Args:
        max_sequence_length: tokens of a caption, for families with a :attr:`sequence_length`.
        guidance_scale: what a denoiser that :meth:`takes_guidance` is given in training.
    """

    name: ClassVar[str]  # as in the model card's tags
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str] = "transformer"  # the pipeline's component that is trained
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_components: ClassVar[tuple[str, ...]] = ()  # a pipeline's index may lack them
    vaes: ClassVar[tuple[str, ...]] = (  # the pipeline can sample with these; LPL accepts more
        *("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "VQModel", "AutoencoderDC"),
    )
    packages: ClassVar[tuple[str, ...]] = ()  # that its tokenizers need, beside those that all families do
    of_bytes: ClassVar[tuple[str, ...]] = ()  # tokenizers that have no vocabulary
    no_float16: ClassVar[tuple[str, ...]] = ()  # text encoders that overflow in float16; they run in bfloat16
    objectives: ClassVar[tuple[str, ...]] = tuple(OBJECTIVES)  # those that the pipeline can sample
    num_classes: ClassVar[int | None] = None  # captions are class labels from 0; None: captions are text
    class_conditional: ClassVar[bool] = False  # follows from ``num_classes``
    empty_share: ClassVar[float] = 0.0  # default of --proportion_empty_prompts
    empty_text: ClassVar[str] = ""  # the caption that stands for none
    guidance_argument: ClassVar[str] = "guidance_scale"  # of the pipeline's call, which guides by it
    no_guidance: ClassVar[float] = 1.0  # the largest scale at which it does not
    guides_by_prompt: ClassVar[bool] = False  # whether all prompts of a batch decide on its guidance
    draws_videos: ClassVar[bool] = False  # whether the pipeline does, which then draws one frame here
    sequence_length: ClassVar[int | None] = None  # default of --max_sequence_length; None: it has no effect
    max_sequence_length: ClassVar[int | None] = None
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    lora_layout: ClassVar[LoraLayout | None] = None  # names in other programs; None: they do not read this family
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ()  # those that --train_text_encoder trains
    text_encoder_learning_rate: ClassVar[float | None] = None  # default of --text_encoder_lr; None: --learning_rate
    text_encoder_weight_decay: ClassVar[float | None] = None  # likewise
    sharded_layers: ClassVar[tuple[str, ...]] = ()  # classes that FSDP2 gathers one by one; empty: the model's
    # Converts a transformer's configuration and weights for a single file that holds it alone, which is how other
    # programs read it; see Component.convert.
    original_state: ClassVar[Callable[[Mapping[str, Any], State], State] | None] = None
    idle_weights: ClassVar[bool] = False  # whether weights of the denoiser take no part in its output

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.class_conditional = cls.num_classes is not None

    def __init__(
        self, pipeline: DiffusionPipeline, max_sequence_length: int | None = None, guidance_scale: float = 3.5
    ) -> None:
        self.pipeline: Any = pipeline  # each class of pipelines has attributes and methods of its own
        self.tokens, self.guidance_scale = max_sequence_length, guidance_scale
        self._released: dict[str, Callable[[], Any]] = {}
        self.released_bytes = 0
        for component in (self.vae, self.denoiser, *self.text_encoders):
            component.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        path: str,
        dtypes: Mapping[str, torch.dtype],
        *,
        max_sequence_length: int | None = None,
        guidance_scale: float = 3.5,
        **source: Any,
    ) -> Self:
        """Load a pipeline from a folder or from the Hub.

        Args:
            dtypes: of components by name; of all others as "default".
            source: ``revision``, ``variant`` and ``cache_dir`` of ``from_pretrained``, components that are already
                loaded, and None for absent ones.
        """
        pipeline = cls.pipeline_class.from_pretrained(path, dtype=dict(dtypes), **source)
        return cls(pipeline, max_sequence_length, guidance_scale)

    @classmethod
    def idle_components(cls) -> list[str]:
        """Components that diffusers' class can do without, and that neither training nor sampling uses."""
        optional, needed = cls.pipeline_class._optional_components, ("text_encoder", "tokenizer")
        return [name for name in optional if name != cls.denoiser_name and not name.startswith(needed)]

    @classmethod
    def left_out(cls) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that load no idle components."""
        return dict.fromkeys(cls.idle_components())

    @property
    def denoiser(self) -> ModelMixin:
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> ModelMixin:
        return self.pipeline.vae

    @property
    def folder(self) -> Path:
        """Where the pipeline was loaded from, on this machine."""
        return Path(self.pipeline.name_or_path)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that the pipeline has; SD3's T5 may be absent."""
        encoders = (getattr(self.pipeline, name) for name in self.text_encoder_names)
        return [encoder for encoder in encoders if encoder is not None]

    def release(self, load: Mapping[str, Callable[[], Any]]) -> None:
        """Free components that only sampling needs; ``load`` loads them for :meth:`whole`."""
        self._released = dict(load)
        weights = (weight for name in load for weight in getattr(self.pipeline, name).parameters())
        self.released_bytes = sum(weight.nbytes for weight in weights)
        for name in load:
            setattr(self.pipeline, name, None)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the components are there that were released; nothing is loaded twice if one is within another."""
        released, self._released = self._released, {}
        for name, load in released.items():
            setattr(self.pipeline, name, load())
        try:
            yield
        finally:
            for name in released:
                setattr(self.pipeline, name, None)
            self._released = released

    @contextmanager
    def encoding_exactly(self) -> Iterator[None]:
        """Within, frozen text encoders compute in their own precision, also under autocast: those that overflow in
        float16 would do so under its autocast, whatever their weights are in."""
        contexts, handles = list[AbstractContextManager[None]](), []

        def enter(*_: Any) -> None:
            contexts.append(exact_precision(self.vae.device))
            contexts[-1].__enter__()

        def leave(*_: Any) -> None:
            contexts.pop().__exit__(None, None, None)

        for encoder in self.text_encoders:
            if not any(weight.requires_grad for weight in encoder.parameters()):
                handles.append(encoder.register_forward_pre_hook(enter))
                handles.append(encoder.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # In training

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Conditions:
        """Everything :meth:`predict` needs of a batch, each (B, ...); no gradient unless text encoders are trained."""
        if "embeddings" in batch:  # of --cache_text_embeddings
            return conditions_on_device(batch["embeddings"], device)
        return self.encode_prompts(batch["caption"], device, batch.get("tokens"))

    def encode_prompts(self, captions: Sequence[str], device: torch.device, tokens: Tokens | None) -> Conditions:
        """The part of the conditions that comes from B captions.

        Args:
            tokens: of the captions, from :meth:`tokenize`, preferably in pinned memory; None: they are made here.
        """
        raise NotImplementedError

    @property
    def tokenize(self) -> Callable[[Sequence[Any]], Tokens]:
        """B captions -> their tokens. It holds no models, so that it can be sent to the loader's processes."""
        lengths = self.token_lengths()
        return Tokenize({name: getattr(self.pipeline, name) for name in lengths}, lengths, self.texts, self.empty_text)

    def token_lengths(self) -> dict[str, int | None]:
        """How many tokens ``encode_prompt`` asks each tokenizer for, by its name; those left out run in the step."""
        return {}

    @property
    def texts(self) -> Callable[[Sequence[str]], list[str]]:
        """B captions -> what ``encode_prompt`` gives the tokenizers. It holds no models either."""
        return list

    @property
    def _instruction(self) -> int:
        """Tokens of the pipeline's template before the caption, whose embeddings are dropped, if it has one."""
        return self.pipeline.prompt_template_encode_start_idx

    def caption_lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """Tokens of each caption, and how many of them the text encoder takes; of several, the one that takes most."""
        names = [name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names]
        found = {name: of_text(part) for name in names if (part := getattr(self.pipeline, name)) is not None}
        if not found or not captions:
            return [], 0
        lengths = self.token_lengths()
        limits = {
            name: lengths.get(name) or min(self.tokens or part.model_max_length, part.model_max_length)
            for name, part in found.items()
        }
        longest = max(limits, key=lambda name: limits[name])
        texts = self.texts(captions) if longest in lengths else list(captions)
        return list(map(len, found[longest](texts, verbose=False).input_ids)), limits[longest]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The denoiser's output D, (B, C, h, w), for z_t and (B,) timesteps; without a learned variance."""
        raise NotImplementedError

    def guidance(self, noisy_latents: Tensor) -> Tensor | None:
        """The guidance scale that a denoiser with an embedding of it is told, (B,); others take none."""
        if not self.denoiser.config.get("guidance_embeds"):
            return None
        size = (len(noisy_latents),)
        return torch.full(size, self.guidance_scale, dtype=torch.float32, device=noisy_latents.device)

    def without_values(self, conditions: Conditions) -> Conditions:
        """The same for tensors that have no values: as if each caption had as many tokens as there can be."""
        if "lengths" not in conditions:
            return conditions
        count, tokens = next(iter(conditions.values())).shape[:2]
        return conditions | {"lengths": (tokens,) * count}

    # In sampling

    def call_arguments(self, prompt: str | int, height: int, width: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a caption or class label, except steps and guidance."""
        return {"prompt": prompt, "height": height, "width": width} | self.sampling_arguments()

    def attributes_for(self, height: int, width: int) -> dict[str, Any]:
        """Attributes of the pipeline without which its call would not draw that size."""
        return {}

    @classmethod
    def takes_negative_prompts(cls) -> bool:
        """Whether what guides the pipeline guides away from a negative prompt; in a model that is distilled for
        guidance it is a number for the denoiser, beside ``true_cfg_scale``."""
        parameters = cls._call_parameters()
        other = {"true_cfg_scale"} - {cls.guidance_argument}
        return "negative_prompt" in parameters and not other & parameters.keys()

    @classmethod
    def guides_itself(cls, configs: Configs) -> bool:
        """Whether a component of the pipeline has the scale of guidance, which its call then takes in vain."""
        return False

    @classmethod
    def default_guidance(cls) -> float:
        """The pipeline's own scale of guidance."""
        return cls._call_parameters()[cls.guidance_argument].default

    @classmethod
    def _call_parameters(cls) -> Mapping[str, inspect.Parameter]:
        call: Any = cls.pipeline_class.__call__
        return inspect.signature(call).parameters

    def sampling_arguments(self) -> dict[str, Any]:
        """Arguments beyond prompt, size, steps and guidance that make the pipeline sample as in training."""
        return {"max_sequence_length": self.tokens} if self.sequence_length else {}

    @classmethod
    def images_of(cls, output: Any) -> list[Any]:
        """The images in what the pipeline returns."""
        return [frames[0] for frames in output.frames] if cls.draws_videos else output.images

    def loading_arguments(self) -> dict[str, None]:
        """Arguments of ``from_pretrained`` that load a pipeline like this one: the components that it lacks."""
        return {
            name: None
            for name in self.optional_components
            if getattr(self.pipeline, name) is None and name not in self._released
        }

    # From the configuration files, before anything is loaded

    @classmethod
    def why_refused(cls, index: Mapping[str, Any]) -> str | None:
        """Why a pipeline of the family's class cannot be trained here, by its index; None: it can."""
        return None

    @classmethod
    def relations(cls, configs: Configs) -> list[Relation]:
        """What the other components need the numbers of the denoiser's configuration to be.

        Args:
            configs: also the :data:`~lpl.families.fit.Widths` of the text encoders that the pipeline has.
        """
        raise NotImplementedError

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        """Side in pixels that the denoiser was made for."""
        return configs[cls.denoiser_name]["sample_size"] * downscaling_factor(configs["vae"])

    @classmethod
    def default_resolution(cls, configs: Configs) -> int:
        """Default of --resolution if the pipeline accepts it, else the default is :meth:`native_resolution`."""
        return cls.native_resolution(configs)

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        """Sides of images must be multiples of this many pixels."""
        return downscaling_factor(configs["vae"]) * configs[cls.denoiser_name].get("patch_size", 1)

    @classmethod
    def resolution_range(cls, configs: Configs) -> tuple[int, int | None]:
        """The smallest and the largest side in pixels; None: no limit."""
        return 1, None

    @classmethod
    def largest_area(cls, configs: Configs) -> int | None:
        """The most pixels of an image; None: no limit."""
        return None

    @classmethod
    def takes_guidance(cls, configs: Configs) -> bool:
        """Whether the denoiser takes a guidance scale in training."""
        return bool(configs[cls.denoiser_name].get("guidance_embeds"))

    @classmethod
    def distilled(cls, index: Mapping[str, Any], configs: Configs) -> str | None:
        """By what in its index and configurations a model is one that was distilled to sample in a few steps."""
        if index.get("is_distilled"):
            return "by its model_index.json (is_distilled)"
        scheduler = (index.get("scheduler") or (None, None))[1]
        return f"by its scheduler ({scheduler})" if scheduler in FEW_STEP_SCHEDULERS else None

    @classmethod
    def lora_modules(cls, configs: Configs) -> tuple[str, ...]:
        """Default of --lora_target_modules."""
        return cls.lora_targets

    @classmethod
    def empty_caption(cls, configs: Configs) -> str | int:
        """The caption that stands for none, in training and in classifier-free guidance."""
        return cls.empty_text

    @classmethod
    def class_names(cls, index: Mapping[str, Any]) -> dict[int, str]:
        """For a class-conditional family: the names of the classes in a pipeline's index, by label."""
        raise NotImplementedError

    @classmethod
    def class_label(cls, prompt: str | int, names: Mapping[int, str]) -> int:
        """For a class-conditional family: the label of a class given by name or number."""
        raise NotImplementedError

    # In files that other programs read

    @classmethod
    def architecture(cls, configs: Configs, prediction_type: str | None) -> Architecture:
        """How other programs name what a result is for; the family's own name where they have none."""
        return Architecture(cls.name, cls.name)

    @classmethod
    def single_file(cls, configs: Configs) -> tuple[Component, ...]:
        """What is in a single file with the original's names; empty: this trainer writes none."""
        return () if cls.original_state is None else (Component(cls.denoiser_name, "", cls.original_state),)

    # For --from_scratch

    @classmethod
    def untrained_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The denoiser's configuration: without a learned variance, which is never trained here."""
        return dict(config) | ({"out_channels": config["in_channels"]} if "out_channels" in config else {})

    @classmethod
    def identity_layers(cls, denoiser: nn.Module) -> list[nn.Module]:
        """Layers that start at zero: the output and the modulation of the blocks, which then pass on their input
        (adaLN-Zero, Peebles & Xie, Sec. 3.2). All others start as diffusers initialises them."""
        return []


class InPatches(Family):
    """A family whose denoiser takes latents in patches, of images of any size; no configuration has either."""

    @classmethod
    def native_resolution(cls, configs: Configs) -> int:
        return 128 * downscaling_factor(configs["vae"])  # the pipelines' default

    @classmethod
    def resolution_multiple(cls, configs: Configs) -> int:
        return PATCH * downscaling_factor(configs["vae"])


def modulations(denoiser: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """The linear layers of a transformer's adaptive normalisations of those classes."""
    return [module.get_submodule("linear") for module in denoiser.modules() if isinstance(module, kinds)]


def packed(noisy_latents: Tensor) -> Tensor:
    """Latents, (B, C, h, w), as patches in reading order, (B, h w / PATCH^2, C PATCH^2)."""
    return F.pixel_unshuffle(noisy_latents, PATCH).flatten(2).mT


def unpacked(patches: Tensor, size: Sequence[int]) -> Tensor:
    """Patches in reading order as latents of a size, (..., h, w)."""
    rows, columns = (side // PATCH for side in size[-2:])
    return F.pixel_shuffle(patches.mT.unflatten(2, (rows, columns)), PATCH)


def patch_positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Each patch's (0, row, column), in reading order, (rows * columns, 3)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device).float() for size in (1, rows, columns)))


def tables_on_device(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tables of the positions' angles, which the transformer would copy to the device in each step."""
    return [table.to(device) for table in tables]
