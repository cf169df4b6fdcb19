"""Flags: optimizer, schedule, precision, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lpl.config import rules
from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL, LR_SCHEDULERS, OPTIMIZERS
from lpl.config.flag import (
    BELOW_ONE,
    FINITE,
    LENGTH,
    NOT_NEGATIVE,
    POSITIVE,
    REFUSED,
    SHARE,
    STEPS_OR_SHARE,
    at_most,
    flag,
    own_flag,
    silent_flag,
)


@dataclass(frozen=True)
class Optimization:
    """optimization"""

    train_batch_size: int = flag(16, "images per process in a micro-batch", range=POSITIVE)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", range=POSITIVE)
    num_train_epochs: int = flag(
        100, "number of passes over the data; --max_train_steps overrides it", range=NOT_NEGATIVE, on_resume=LENGTH
    )
    max_train_steps: int | None = flag(
        None,
        "total number of optimizer steps; overrides --num_train_epochs",
        range=(NOT_NEGATIVE, at_most(10_000_000)),
        on_resume=LENGTH,
    )
    learning_rate: float = flag(0.0001, "learning rate after warm-up", range=(NOT_NEGATIVE, at_most(10_000)))
    text_encoder_lr: float | None = flag(
        None,
        "learning rate of the text encoders; default: the family's, or --learning_rate",
        range=(NOT_NEGATIVE, at_most(10_000)),
        used=rules.when("train_text_encoder"),
    )
    scale_lr: bool = flag(
        False, "multiply the learning rates by the number of processes, the accumulation steps and the batch size"
    )
    lr_scheduler: str = flag(
        "constant",
        f"learning rate schedule: {', '.join(LR_SCHEDULERS)}, or another one as package:Class, such as "
        "torch.optim.lr_scheduler:StepLR",
        word=rules.schedule,
        code=True,
    )
    lr_scheduler_args: tuple[str, ...] | None = flag(
        None,
        "arguments of a --lr_scheduler package:Class, each NAME=VALUE; in --config as a mapping",
        word=rules.argument,
        used=rules.by_path("lr_scheduler"),
    )
    lr_warmup_steps: int | float = flag(
        500,
        "warm-up steps of the learning rate schedule; a number below 1 is a share of the run; the constant schedule "
        "has none",
        range=(NOT_NEGATIVE, STEPS_OR_SHARE),
        used=rules.warms_up,
    )
    lr_num_cycles: int = flag(
        1,
        "number of cycles of the cosine_with_restarts schedule",
        range=POSITIVE,
        used=rules.when("lr_scheduler", "cosine_with_restarts"),
    )
    lr_power: float = flag(
        1.0, "power of the polynomial schedule", range=FINITE, used=rules.when("lr_scheduler", "polynomial")
    )
    optimizer: str = flag(
        OPTIMIZERS[0],
        f"{', '.join(OPTIMIZERS)}, or another one as package:Class, such as torch.optim:Adafactor",
        on_resume=REFUSED,
        code=True,
    )
    optimizer_args: tuple[str, ...] | None = flag(
        None,
        "arguments of an --optimizer package:Class besides the learning rate, each NAME=VALUE, such as eps=1e-8 "
        "betas=[0.9,0.99]; in --config as a mapping",
        word=rules.argument,
        used=rules.by_path("optimizer"),
    )
    use_8bit_adam: bool = flag(False, "use the 8-bit AdamW of bitsandbytes", on_resume=REFUSED)
    adam_beta1: float = flag(0.9, "beta1 of AdamW and Prodigy", range=BELOW_ONE)
    adam_beta2: float = flag(0.999, "beta2 of AdamW and Prodigy", range=BELOW_ONE)
    adam_weight_decay: float = flag(0.01, "weight decay of AdamW and Prodigy", range=NOT_NEGATIVE)
    adam_weight_decay_text_encoder: float | None = flag(
        None,
        "weight decay of the text encoders; default: the family's, or --adam_weight_decay",
        range=NOT_NEGATIVE,
        used=rules.when("train_text_encoder"),
    )
    adam_epsilon: float = flag(1e-08, "epsilon of AdamW and Prodigy", range=POSITIVE)
    prodigy_beta3: float | None = flag(
        None,
        "Prodigy: beta3 of the step size estimate; default: the square root of --adam_beta2",
        range=BELOW_ONE,
        used=rules.when("optimizer", "prodigy"),
    )
    prodigy_decouple: bool = flag(
        True, "Prodigy: decoupled weight decay, as in AdamW", used=rules.when("optimizer", "prodigy")
    )
    prodigy_use_bias_correction: bool = flag(
        True, "Prodigy: Adam's bias correction", used=rules.when("optimizer", "prodigy")
    )
    prodigy_safeguard_warmup: bool = flag(
        True, "Prodigy: exclude the warm-up from the step size estimate", used=rules.when("optimizer", "prodigy")
    )
    max_grad_norm: float = flag(1.0, "maximum gradient norm, for clipping; 0 = no clipping", range=NOT_NEGATIVE)
    max_skipped_steps: int = flag(
        100,
        "stop the run after more skipped steps than this; a step with a NaN or infinite loss or gradient is skipped",
        range=NOT_NEGATIVE,
    )
    use_ema: bool = flag(False, "keep an exponential moving average (EMA) of the weights and save it as the result")
    ema_decay: float | None = flag(
        None,
        f"decay of the EMA; default: {EMA_DECAY_WITH_LPL} with LPL, {EMA_DECAY} without",
        range=SHARE,
        used=rules.when("use_ema"),
    )
    foreach_ema: bool = flag(
        False, "update the EMA with fused (foreach) operations, which is faster", used=rules.when("use_ema")
    )
    offload_ema: bool = flag(False, "keep the EMA in CPU memory between updates", used=rules.when("use_ema"))
    offload_frozen: bool = flag(
        False, "keep frozen text encoders and the VAE in CPU memory, and on the GPU only what runs of them"
    )
    mixed_precision: str | None = flag(
        None, "mixed precision of the computation; default: accelerate's configuration", choices=("no", "fp16", "bf16")
    )
    allow_tf32: bool = flag(False, "allow TF32 on Ampere and later GPUs")
    attention_backend: str | None = own_flag(
        None,
        "kernel of the denoiser's attention, as diffusers names them, such as flash, flash_hub or xformers; default: "
        "PyTorch's own",
    )
    channels_last: bool = flag(
        False, "keep two-dimensional convolutions of the denoiser and the VAE in channels-last memory format"
    )
    torch_compile: bool = flag(
        False, "compile the denoiser and LPL's decoder with torch.compile; the first steps take minutes"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute the denoiser's activations in the backward pass to save memory"
    )
    activation_offload: bool = flag(
        False, "keep the inputs of the denoiser's blocks in CPU memory; needs --gradient_checkpointing"
    )
    seed: int | None = silent_flag(
        None,
        "random seed; default: drawn at random and recorded in recipe.yaml",
        range=(NOT_NEGATIVE, at_most(2**32 - 1)),
    )

    @property
    def compile_for(self) -> int | None:
        """For how many samples at most LPL's decoder is compiled; None: it is not."""
        return self.train_batch_size if self.torch_compile else None

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """--optimizer_args by name."""
        return rules.arguments(self.optimizer_args)

    @property
    def scheduler_arguments(self) -> dict[str, Any]:
        """--lr_scheduler_args by name."""
        return rules.arguments(self.lr_scheduler_args)

    def warmup_steps(self, max_steps: int) -> int:
        """Warm-up steps of the schedule in a run of that length."""
        share = self.lr_warmup_steps
        return math.ceil(share * max_steps) if share < 1 else int(share)
