"""Flags that need less memory: a table, in the order in which the advice lists them.

A row applies at some *stages*, and only where its flags are not in use and go with all the others. The first rows keep
the numbers of the run, later ones train something else. No row predicts bytes: ``--dry_run`` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lpl.autoencoders import decoder_parts, downscaling_factor
from lpl.config.config import FLAGS
from lpl.config.groups import REFUSED
from lpl.diagnosis.status import Stage, Status
from lpl.gate import accepted_crops
from lpl.tools.machine import has_gpu, missing


Value = Callable[[Status], Any]  # of a flag
STEPS = frozenset({Stage.STEP, Stage.LPL_STEP})
LPL_STEPS = frozenset({Stage.LPL_STEP})
LOADED = frozenset(Stage) - {Stage.READING, Stage.LOADING}
FROM_LOADING = frozenset(Stage) - {Stage.READING}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        flags: new values by name, or what computes them; False leaves the flag out.
        stages: at which the flags need less memory.
        applies: whether the flags are not in use and go with all the others.
        effect: what they save, and what that costs.
    """

    flags: Mapping[str, Any | Value]
    stages: frozenset[Stage]
    applies: Callable[[Status], bool]
    effect: str

    def remedy(self, status: Status) -> Remedy:
        values = {name: value(status) if callable(value) else value for name, value in self.flags.items()}
        refused = any(FLAGS[name].on_resume is REFUSED for name in values)
        return Remedy(" ".join(_typed(name, value) for name, value in values.items()), self.effect, refused)


@dataclass(frozen=True)
class Remedy:
    """Flags as typed, what they save and cost, and whether no checkpoint can be resumed under them."""

    flags: str
    effect: str
    new_run_only: bool


def remedies(status: Status, device: torch.device | None = None) -> list[Remedy]:
    """The flags that need less memory than the run does now.

    Args:
        device: the one that is short of memory; None: the device that the run trains on.
    """
    device = status.device if device is None else device
    rows = [*(ON_DEVICE if device.type == status.device.type else ()), *(ON_HOST if device.type == "cpu" else ())]
    return [row.remedy(status) for row in rows if status.stage in row.stages and row.applies(status)]


def _typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"without --{name}"
    return f"--{name} {value}"


# Values --------------------------------------------------------------------------------------------------------------


def _parts(status: Status) -> int:
    """The smallest number of equal parts that a batch can be divided into."""
    batch = status.config.optimization.train_batch_size
    return next((count for count in range(2, batch + 1) if batch % count == 0), 1)


def _decoded_at_once(status: Status) -> int:
    """Samples that LPL decodes at a time."""
    config, batch = status.config, status.config.optimization.train_batch_size
    most = config.lpl.lpl_max_samples if status.stage is Stage.LPL_STEP else None  # held-out losses take all samples
    return min(batch, config.lpl.lpl_chunk_size or batch, most or batch)


def _smaller_crop(status: Status) -> int | None:
    """The largest part of the images that is smaller than the one LPL sees now."""
    (height, width), trained = status.config.data.size, status.trained
    now = status.config.lpl.lpl_crop or min(height, width)
    sides = accepted_crops(height, width, downscaling_factor(trained.family.vae.config)) if trained else []
    return max((side for side in sides if side < now), default=None)


# Conditions ----------------------------------------------------------------------------------------------------------


def _decoder_has_parts(status: Status) -> bool:
    """Whether the decoder that LPL looks through can be checkpointed part by part."""
    if status.trained is None or status.config.lpl.lpl_vae_name_or_path is not None:
        return False  # another VAE is not known here
    try:
        return bool(decoder_parts(status.trained.family.vae))
    except ValueError:
        return False


def _offloads_ema(status: Status) -> bool:
    return status.config.optimization.use_ema and status.config.optimization.offload_ema


def _ema_on_gpu(status: Status) -> bool:
    return status.config.optimization.use_ema and not _offloads_ema(status) and status.device.type != "cpu"


def _bf16_saves(status: Status) -> bool:
    """Activations and frozen weights; while loading or saving only the latter."""
    if status.mixed_precision != "no" or not (status.device.type == "cpu" or torch.cuda.is_bf16_supported()):
        return False
    if status.trained is None or status.stage not in (Stage.LOADING, Stage.SAVING):
        return True
    trained = set(map(id, status.trained.weights()))
    modules = [*status.trained.parts.values(), *status.trained.family.text_encoders]
    frozen = [p for module in modules for p in module.parameters() if id(p) not in trained]
    return any(p.dtype == torch.float32 for p in frozen)


def _has_other_adam(status: Status) -> bool:
    """Whether the optimizer is AdamW in 32 bits, and has a state at this stage."""
    optimization = status.config.optimization
    has_state = status.stage in STEPS or status.step > 0
    can = optimization.optimizer == "AdamW" and not missing("bitsandbytes")
    return can and not optimization.use_8bit_adam and has_state


def _can_quantize(status: Status) -> bool:
    config = status.config
    can = config.lora.lora and not config.model.train_text_encoder and has_gpu() and not missing("bitsandbytes")
    return can and config.lora.quantize_base != "4bit"


def _training_less_saves(status: Status) -> bool:
    """While the models are loaded, only float32 in place of a half precision, and the EMA, are due to training."""
    config = status.config
    in_float32 = status.mixed_precision != "no" and not config.lora.lora
    return status.stage is not Stage.LOADING or config.optimization.use_ema or in_float32


# The table -----------------------------------------------------------------------------------------------------------

ON_DEVICE = (
    Row(
        {"gradient_checkpointing": True},
        STEPS,
        lambda status: not status.config.optimization.gradient_checkpointing,
        "most activations of what is trained; a step takes about a third longer",
    ),
    Row(
        {
            "train_batch_size": lambda status: status.config.optimization.train_batch_size // _parts(status),
            "gradient_accumulation_steps": lambda status: (
                status.config.optimization.gradient_accumulation_steps * _parts(status)
            ),
        },
        STEPS | {Stage.LOSSES},
        lambda status: status.config.optimization.train_batch_size > 1,
        "activations, in proportion to the batch; a step has as many images",
    ),
    Row(
        {"eval_batch_size": lambda status: status.config.evaluation.eval_batch_size // 2},
        frozenset({Stage.EVALUATION}),
        lambda status: status.config.evaluation.eval_batch_size > 1,
        "half of the memory for generating images",
    ),
    Row(
        {"lpl_gradient_checkpointing": True},
        LPL_STEPS,
        lambda status: not status.config.lpl.lpl_gradient_checkpointing and _decoder_has_parts(status),
        "most activations of LPL's decoder, which takes longer",
    ),
    Row(
        {"lpl_chunk_size": 1},
        LPL_STEPS | {Stage.LOSSES},
        lambda status: _decoded_at_once(status) > 1,
        "activations of LPL's decoder, which sees one sample at a time",
    ),
    Row(
        {"lpl_max_samples": lambda status: _decoded_at_once(status) // 2},
        LPL_STEPS,
        lambda status: _decoded_at_once(status) > 1,
        "half of the activations of LPL's decoder; LPL stays the same in expectation",
    ),
    Row(
        {"lpl_crop": _smaller_crop},
        LPL_STEPS,
        lambda status: _smaller_crop(status) is not None,
        "activations of LPL's decoder, in proportion to the area; LPL is another one (docs/lpl.md)",
    ),
    Row(
        {"offload_ema": True},
        LOADED,  # the EMA is made on the device and leaves it then
        _ema_on_gpu,
        "the EMA on the device; it is copied there and back in each step",
    ),
    Row(
        {"mixed_precision": "bf16"},
        FROM_LOADING,
        _bf16_saves,
        "half of the frozen weights and about half of the activations; adds half-precision copies of trained weights",
    ),
    Row({"use_8bit_adam": True}, LOADED, _has_other_adam, "three quarters of the optimizer's state"),
    Row({"quantize_base": "4bit"}, FROM_LOADING, _can_quantize, "most of the frozen denoiser's weights"),
    Row(
        {"train_text_encoder": False},
        FROM_LOADING,
        lambda status: status.config.model.train_text_encoder and _training_less_saves(status),
        "gradients, optimizer state, EMA and activations of the text encoders",
    ),
    Row(
        {"lora": True},
        FROM_LOADING,
        lambda status: (
            not status.config.lora.lora and not status.config.model.from_scratch and _training_less_saves(status)
        ),
        "most of the gradients, the optimizer's state and the EMA; trains adapters",
    ),
)

ON_HOST = (
    Row(
        {"dataloader_num_workers": lambda status: status.config.data.dataloader_num_workers // 2},
        LOADED,
        lambda status: status.config.data.dataloader_num_workers > 0,
        "processes that load images, and the batches that they hold",
    ),
    Row(
        {"offload_ema": False},
        LOADED,
        lambda status: _offloads_ema(status) and status.device.type != "cpu",
        "the EMA, which is on the device then",
    ),
)
