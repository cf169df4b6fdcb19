"""Flags that need less memory, as an ordered table.

A row applies at some *stages*, and only where its flags are not in use and go with all the others. The first rows keep
the numbers of the run, but for bf16, which most runs have; the last ones train something else. No row predicts bytes:
``--dry_run`` measures them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from lpl.autoencoders import decoder_parts, downscaling_factor
from lpl.config.choices import FP8, LORA
from lpl.config.config import FLAGS
from lpl.config.flag import REFUSED
from lpl.data.loader import worker_count
from lpl.diagnosis.status import Stage, Status
from lpl.gate import accepted_crops
from lpl.tools.machine import has_gpu, missing


STEPS, LPL = frozenset({Stage.STEP, Stage.LPL_STEP}), frozenset({Stage.LPL_STEP})
LOSSES, EVALUATION = frozenset({Stage.LOSSES}), frozenset({Stage.EVALUATION})
MODELS = frozenset(Stage) - {Stage.READING}  # from loading them on
LOADED = MODELS - {Stage.LOADING}


class Remedy(NamedTuple):
    """A row of the table: flags as typed, when they help, and what they save and cost."""

    flags: str
    stages: frozenset[Stage]
    applies: bool  # they are not in use, and go with all the other flags
    effect: str

    @property
    def new_run_only(self) -> bool:
        """Whether no checkpoint can be resumed under these flags."""
        return any(FLAGS[name].on_resume is REFUSED for name in re.findall(r"--(\w+)", self.flags))


def remedies(status: Status, device: torch.device | None = None) -> list[Remedy]:
    """The rows that apply to what the run is doing.

    Args:
        device: the one that is out of memory; None: the one that the run trains on.
    """
    device = status.device if device is None else device
    if status.stage is Stage.READING:
        return []
    rows = [*_activations(status), *_weights(status)] if device.type == status.device.type else []
    rows += _host(status) if device.type == "cpu" else []
    return [row for row in rows if status.stage in row.stages and row.applies]


# The table -----------------------------------------------------------------------------------------------------------
# fmt: off


def _activations(status: Status) -> list[Remedy]:
    config, optimization, lpl = status.config, status.config.optimization, status.config.lpl
    batch, drawn = optimization.train_batch_size, config.evaluation.eval_batch_size
    parts = next((count for count in range(2, batch + 1) if batch % count == 0), 1)
    smaller = f"--train_batch_size {batch // parts} " \
              f"--gradient_accumulation_steps {parts * optimization.gradient_accumulation_steps}"
    decoded = _decoded_at_once(status)
    return [
        Remedy("--gradient_checkpointing", STEPS, not optimization.gradient_checkpointing,
               "most activations of what is trained; a step takes about a third longer"),
        Remedy("--mixed_precision bf16", MODELS, _bf16_saves(status),
               "half of the frozen weights and of most activations, for copies of what is trained"),
        Remedy(smaller, STEPS | LOSSES, batch > 1,
               "activations, in proportion to the batch; as many images per step"),
        Remedy(f"--eval_batch_size {drawn // 2}", EVALUATION, drawn > 1,
               "half of what generating images needs"),
        Remedy("--lpl_gradient_checkpointing", LPL, not lpl.lpl_gradient_checkpointing and _has_parts(status),
               "most activations of LPL's decoder, which takes longer"),
        Remedy("--lpl_chunk_size 1", LPL | LOSSES, decoded > 1,
               f"activations of LPL's decoder, which sees up to {decoded} samples at a time now"),
        Remedy(f"--lpl_max_samples {decoded // 2}", LPL, decoded > 1,
               "half of the activations of LPL's decoder; LPL stays the same in expectation"),
    ]


def _weights(status: Status) -> list[Remedy]:
    config, lora, optimization = status.config, status.config.lora, status.config.optimization
    text_encoders, crop = config.model.train_text_encoder, _smaller_crop(status)
    ema_on_gpu = optimization.use_ema and not optimization.offload_ema and status.device.type != "cpu"
    bits = _is_imagined(status) or not missing("bitsandbytes")
    adam = optimization.optimizer == "AdamW" and not optimization.use_8bit_adam and bits
    has_state = status.stage in STEPS or status.step > 0
    gpu = has_gpu() or status.device.type == "cuda"
    packs = lora.lora and lora.adapter == LORA and not text_encoders and gpu and bits and lora.quantize_base != "4bit"
    packs = packs and not lora.group_offload
    sharded = status.trained is not None and status.trained.sharded
    moves = status.device.type != "cpu" and not optimization.torch_compile and not sharded
    checkpoints, plain = optimization.gradient_checkpointing, lora.quantize_base in (None, FP8)
    casts = lora.lora and lora.adapter == LORA and not text_encoders and lora.quantize_base is None and checkpoints \
        and not optimization.torch_compile and not sharded and status.mixed_precision != "no"
    # What training needs while the models are loaded: float32 instead of half precision, and the EMA
    trains = status.stage is not Stage.LOADING or optimization.use_ema or \
        (status.mixed_precision != "no" and not lora.lora)
    return [
        Remedy("--offload_ema", LOADED, ema_on_gpu,  # which is made on the device and then leaves it
               "the EMA on the device; it is copied there and back in each step"),
        Remedy("--offload_frozen", MODELS, moves and not optimization.offload_frozen,
               "frozen text encoders and the VAE; each step copies what of them it runs to the GPU"),
        Remedy("--activation_offload", STEPS, moves and checkpoints and not optimization.activation_offload,
               "the inputs of the denoiser's blocks, which are copied to the CPU and back"),
        Remedy("--group_offload", MODELS, moves and checkpoints and lora.lora and not lora.group_offload and plain,
               "all of the frozen denoiser but a block; each step copies it to the GPU twice"),
        Remedy("--use_8bit_adam", LOADED, adam and has_state,
               "three quarters of the optimizer's state"),
        Remedy("--quantize_base fp8", MODELS, casts,
               "nearly half of the frozen denoiser's weights"),
        Remedy("--quantize_base 4bit", MODELS, packs,
               "most of the frozen denoiser's weights"),
        Remedy(f"--lpl_crop {crop}", LPL, crop is not None,
               "activations of LPL's decoder, in proportion to the area; a different LPL (docs/cost.md)"),
        Remedy("without --train_text_encoder", MODELS, text_encoders and trains,
               "gradients, optimizer state, EMA and activations of the text encoders"),
        Remedy("--lora", MODELS, not lora.lora and not config.model.from_scratch and trains,
               "most of the gradients, the optimizer's state and the EMA; trains adapters only"),
    ]


def _host(status: Status) -> list[Remedy]:
    workers, optimization = worker_count(status.config.data), status.config.optimization
    ema_on_host = optimization.use_ema and optimization.offload_ema and status.device.type != "cpu"
    return [
        Remedy(f"--dataloader_num_workers {workers // 2}", LOADED, workers > 0,
               "processes that load images, and the batches that they hold"),
        Remedy("without --offload_ema", LOADED, ema_on_host,
               "the EMA, which then stays on the device"),
    ]


# fmt: on
# What a row depends on -----------------------------------------------------------------------------------------------


def _is_imagined(status: Status) -> bool:
    """Whether the GPU is one of --for_gpu, on a machine without any; it has what requirements.txt lists."""
    return status.device.type == "cuda" and not torch.cuda.is_available()


def _decoded_at_once(status: Status) -> int:
    """Samples that LPL decodes at a time; the held-out losses take all samples of a batch."""
    lpl, batch = status.config.lpl, status.config.optimization.train_batch_size
    most = lpl.lpl_max_samples if status.stage is Stage.LPL_STEP else None
    return min(batch, lpl.lpl_chunk_size or batch, most or batch)


def _smaller_crop(status: Status) -> int | None:
    """The largest part of the images that is smaller than the one LPL sees now."""
    if status.trained is None:
        return None
    height, width = status.config.data.size
    present = status.config.lpl.lpl_crop or min(height, width)
    sides = accepted_crops(height, width, downscaling_factor(status.trained.family.pipeline.vae.config))
    return max((side for side in sides if side < present), default=None)


def _has_parts(status: Status) -> bool:
    """Whether the decoder that LPL looks through can be checkpointed part by part; not known of another VAE."""
    if status.trained is None or status.config.lpl.lpl_vae_name_or_path is not None:
        return False
    try:
        return bool(decoder_parts(status.trained.family.vae))
    except ValueError:
        return False


def _bf16_saves(status: Status) -> bool:
    """Whether bf16 saves memory: activations in a step and in sampling, else frozen weights only."""
    supported = status.device.type == "cpu" or _is_imagined(status) or torch.cuda.is_bf16_supported()
    if status.mixed_precision != "no" or not supported:
        return False
    if status.trained is None or status.stage not in (Stage.LOADING, Stage.SAVING):
        return True
    trained = set(map(id, status.trained.weights()))
    modules = [*status.trained.parts.values(), *status.trained.family.text_encoders]
    frozen = [weight for module in modules for weight in module.parameters() if id(weight) not in trained]
    return any(weight.dtype == torch.float32 for weight in frozen)
