"""What is trained, as one module: the denoiser and, with --train_text_encoder, text encoders; whole or by LoRA.

It is one module so that accelerate wraps, accumulates and synchronises one. It saves and loads itself in the layout
that diffusers' pipelines read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lpl.autoencoders import exact_precision
from lpl.config.groups import Lora
from lpl.families import Conditions, Family
from lpl.training import sharding
from lpl.training.given_lora import FROZEN, Adapters, given_adapters, switch
from lpl.training.lora import TEXT_ENCODER_TARGETS, add_lora, continue_lora, load_lora, save_lora


# What families make conditions of, see lpl.families.base
CONDITIONING = ("caption", "tokens", "original_size", "crop_top_left", "target_size")


class TrainedParts(nn.Module):
    """The parts of a pipeline that are trained, and how they are called in a step.

    Args:
        text_encoders: train the text encoders too.
        cache_dir: for LoRA of the Hub.
        adapters: those that the flags name; None: they are read.
    """

    def __init__(
        self,
        family: Family,
        lora: Lora,
        *,
        text_encoders: bool = False,
        gradient_checkpointing: bool = False,
        cache_dir: str | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        self._family, self.lora = (family,), lora.lora  # in a tuple: its frozen parts are no parts of this module
        names = [family.denoiser_name, *(family.trainable_text_encoders if text_encoders else ())]
        self.parts = nn.ModuleDict({name: getattr(family.pipeline, name) for name in names})
        initial, frozen, whole = given_adapters(family, lora, cache_dir) if adapters is None else adapters
        self.has_frozen_adapter = frozen is not None
        for name, part in self.parts.items():
            if name in initial:
                continue_lora(part, initial[name], lora, whole)
            elif lora.lora and part is family.denoiser:
                add_lora(part, lora.lora_target_modules or family.lora_targets, lora, denoiser=True)
            elif lora.lora:
                add_lora(part, TEXT_ENCODER_TARGETS, lora)
            else:
                part.requires_grad_(True)
            if gradient_checkpointing:
                _checkpoint_gradients(part)
        if frozen is not None:
            frozen.inject(self.denoiser, FROZEN, whole=whole)
        # What is saved instead of sharded parts, and instead of their average: see lpl.training.average.gathered.
        self.copies: dict[str, Any] | None = None
        self.averages: dict[str, Any] | None = None
        self.averaging: Any = None  # an optimizer that averages the weights by itself, see lpl.training.optimizers
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Also turns the adapter that is active in training only on or off."""
        super().train(mode)
        sharding.reshard(self)
        if self.has_frozen_adapter:
            switch(self.denoiser, mode)
        return self

    @property
    def family(self) -> Family:
        return self._family[0]

    @property
    def models(self) -> dict[str, Any]:
        """The trained parts by name, models of diffusers or transformers; while sharded ones are saved, copies."""
        return dict(self.parts.items()) if self.copies is None else self.copies

    @property
    def sharded(self) -> bool:
        """Whether each call needs every process."""
        return sharding.is_sharded(self.denoiser)

    def copied(self, keep: bool) -> dict[str, Any]:
        """Plain models with the present weights, in CPU memory. Called by every process; ``keep`` on one of them."""
        sharding.reshard(self)
        return {name: sharding.plain_copy(part, keep) for name, part in self.parts.items()}

    @property
    def denoiser(self) -> nn.Module:
        return self.parts[self.family.denoiser_name]

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [part for name, part in self.parts.items() if name != self.family.denoiser_name]

    def parameters_of(self, *parts: nn.Module) -> list[nn.Parameter]:
        """The trained parameters of some parts."""
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def weights(self) -> list[nn.Parameter]:
        """All parameters that the optimizer updates, always in the same order."""
        return self.parameters_of(*self.parts.values())

    @torch.no_grad()
    def not_finite(self) -> str:
        """Names of the parts in which a trained weight is NaN or infinite, if any; waits for the device."""
        sharding.reshard(self)
        finite = {
            name: sharding.everywhere(
                torch.stack([weight.isfinite().all() for weight in sharding.local(self.parameters_of(part))]).all(),
                self.sharded,
            )
            for name, part in self.parts.items()
        }
        return " and ".join(name for name, good in finite.items() if not good)

    def conditions(self, batch: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
        """What :meth:`forward` takes besides latents and timesteps: the outputs of frozen text encoders, computed once
        for all calls, or what they are made of where text encoders are trained and have to run inside.

        All of it is on the device: DDP would copy the whole batch there, and wait for each copy.
        """
        if self.text_encoders:
            return {name: _moved(batch[name], device) for name in CONDITIONING if name in batch}
        with torch.no_grad(), exact_precision(device):
            return self.family.conditions(batch, device)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditions: Conditions | Mapping[str, Any]) -> Tensor:
        """D, (B, C, h, w), in the denoiser's precision."""
        if self.text_encoders:
            with self.family.encoding_exactly():  # those that are not trained, such as a T5
                conditions = self.family.conditions(conditions, noisy_latents.device)
        return self.family.predict(self.denoiser, noisy_latents, timesteps, cast(Conditions, conditions))

    def save(self, folder: str | Path) -> None:
        """Write the trained parts: whole models as ``unet/`` and the like, or the adapters."""
        if self.lora:
            save_lora(self.family.pipeline_class, folder, self.models)
        else:
            for name, part in self.models.items():
                part.save_pretrained(Path(folder, name))

    def load(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: for adapters that are not of the same rank and modules, or models of other layers.
            OSError: where a part is missing.
        """
        if self.lora:
            load_lora(self.family.pipeline_class, folder, self.models)
        else:
            for name, part in self.models.items():
                kind = sharding.plain_class(part)
                saved = kind.from_pretrained(Path(folder, name), dtype=part.dtype, use_safetensors=True)
                try:
                    sharding.load(part, saved.state_dict())
                except RuntimeError as error:
                    raise ValueError(
                        f"the {name} in {folder} has other layers than that of this base model"
                    ) from error


def _moved(value: Any, device: torch.device) -> Any:
    """A nest of dicts with its tensors on the device."""
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _checkpoint_gradients(part: Any) -> None:
    if hasattr(part, "enable_gradient_checkpointing"):  # diffusers
        part.enable_gradient_checkpointing()
    else:  # transformers
        part.gradient_checkpointing_enable()


def unwrapped(model: nn.Module) -> TrainedParts:
    """The module without what accelerate has wrapped around it."""
    return cast(TrainedParts, getattr(model, "module", model))
