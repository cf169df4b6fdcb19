"""TODO: what is here."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lpl.config import Config
from lpl.data.dataset import TrainingImages
from lpl.diagnosis.needs import check_disk, count_parameters
from lpl.objectives import FlowMatching, Objective, own_objective, training_scheduler
from lpl.tools.words import short_count
from lpl.training.parts import TrainedParts


logger = logging.getLogger(__name__)
FEW_INSIDE = 0.05  # share of the samples below the sigma threshold under which the run warns
DRAWS = 2000  # timesteps for the share of samples inside


@dataclass
class Plan:
    """Everything that is known about a run before its first step.

    Args:
        threshold: tau at this resolution.
        max_steps: optimizer steps of the whole run.
        steps_done: those that a run to resume has behind it.
        global_batch: samples per optimizer step, over all processes and micro-batches.
    """

    args: Namespace
    trained: TrainedParts
    accelerator: Accelerator
    images: TrainingImages
    objective: Objective
    threshold: float
    max_steps: int
    steps_done: int
    global_batch: int
    schedule: LambdaLR
    run: Any = None  # TODO(house): lpl.training.start.Run

    @property
    def config(self) -> Config:  # TODO(house): a field
        return self.args  # type: ignore[return-value]

    @property
    def hardware(self) -> str:
        """All processes' devices, such as "8 x NVIDIA H200"."""
        on_gpu = self.accelerator.device.type == "cuda"
        return f"{self.accelerator.num_processes} x {torch.cuda.get_device_name() if on_gpu else 'CPU'}"

    def announce(self) -> None:
        """What is about to happen, in a few lines of the log.

        Raises:
            NoRoom: where the disk has no place for what comes of it.
        """
        args, inside = self.args, self.share_inside() if self.args.lpl.enabled else 0.0
        logger.info(f"{self.count()} images, {self.max_steps} steps of {self.global_batch}{self.epochs(': ')}")
        logger.info(f"training {self.what()}, in {self.precision_of(self.trained.weights())}{self.autocast()}")
        logger.info(
            f"objective {args.prediction_type}, {args.resolution} px, seed {args.seed}, results in {args.output_dir}"
        )
        if args.lpl.enabled:
            logger.info(
                f"LPL with weight {args.lpl_weight} where sigma <= {self.threshold:g}: {inside:.0%} of the samples "
                f"are inside{f'; {looked_at}' if (looked_at := self.looked_at()) else ''}"
            )
            for warning in self.warnings():
                logger.warning(warning)
        if self.accelerator.is_main_process and (
            lacking := check_disk(self.trained, args, self.max_steps, self.steps_done)
        ):
            logger.warning(lacking)

    def warnings(self) -> list[str]:
        """Why LPL may do less than was meant."""
        args, found = self.args, []
        if (inside := self.share_inside()) < FEW_INSIDE:
            found.append(self.few_inside(inside))
        grown = args.lpl_start_step + args.lpl_ramp_steps
        if args.lpl_start_step >= self.max_steps:
            found.append(f"--lpl_start_step {args.lpl_start_step}: the run ends after {self.max_steps}, without LPL")
        elif grown > self.max_steps:
            reached = (self.max_steps - args.lpl_start_step) / args.lpl_ramp_steps
            found.append(
                f"--lpl_ramp_steps {args.lpl_ramp_steps}: the run ends where LPL has {reached:.0%} of its weight"
            )
        return found

    def count(self) -> str:
        """How many images there are."""
        return "streamed" if self.images.length is None else str(self.images.length)

    def epochs(self, before: str) -> str:
        """How often the run sees each, in words behind these; nothing where nobody knows."""
        length = self.images.length
        return f"{before}{self.max_steps * self.global_batch / length:.1f} epochs" if length else ""

    @property
    def steps_to_go(self) -> int:
        return max(0, self.max_steps - self.steps_done)

    def what(self) -> str:
        """What is trained, in words: parts, how, and how many parameters."""
        args, count = self.args, sum(map(count_parameters, self.trained.parts.values()))
        names = list(self.trained.parts)  # the denoiser is the first
        if args.from_scratch:
            names[0] += " from scratch"
        if not args.lora.lora:
            return f"all of {' and '.join(names)}, {short_count(count)} parameters"
        kind = f"{'rank-stabilised ' if args.use_rslora else ''}{'DoRA' if args.use_dora else 'LoRA'}"
        if args.use_dora and names[1:]:
            names[1] = f"LoRA on {names[1]}"
        over = f" over weights of {args.quantize_base.replace('bit', ' bits')}" if args.quantize_base else ""
        return (
            f"{kind} of rank {args.rank} and alpha {args.lora_alpha:g} on {' and '.join(names)}{over}, "
            f"{short_count(count)} parameters"
        )

    def autocast(self) -> str:
        precision = self.accelerator.mixed_precision
        return "" if precision == "no" else f" under {precision} autocast"

    @staticmethod
    def precision_of(parameters: Iterable[nn.Parameter]) -> str:
        """The names of their dtypes."""
        return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "nothing"

    def share_inside(self) -> float:
        """Share of the timesteps drawn in training at which LPL applies (Eq. 2): sigma finite and at most tau."""
        timesteps = torch.stack([self.images.timestep(0, index) for index in range(DRAWS)])
        return float(_inside(self.objective.sigma(timesteps), self.threshold).double().mean())

    def looked_at(self) -> str:
        """What of the steps, samples and images inside LPL looks at, in words; nothing where that is all."""
        args, words = self.args, []
        if args.lpl_every > 1:
            words.append(f"one step in {args.lpl_every}, at {args.lpl_every} times the weight")
        if args.lpl_max_samples is not None:
            words.append(f"at most {args.lpl_max_samples} of {args.train_batch_size} samples")
        if args.lpl_crop is not None:
            words.append(f"one of {(args.resolution // args.lpl_crop) ** 2} parts of {args.lpl_crop} px")
        return ", ".join(words)

    def few_inside(self, inside: float) -> str:
        return (
            f"LPL sees {inside:.1%} of the samples only; raise --lpl_sigma_threshold, which is scaled to this "
            "resolution unless --lpl_threshold_base_resolution is 0"
        )

    def timesteps_inside(self) -> str:
        """The threshold as a condition on the timestep; for flow t is the fraction of the way to the noise."""
        if isinstance(self.objective, FlowMatching):
            return f"t <= {self.threshold / (1 + self.threshold):.3f}"  # sigma = t / (1 - t)
        count = self.objective.num_train_timesteps
        inside = _inside(self.objective.sigma(torch.arange(count)), self.threshold).nonzero()
        return f"t <= {int(inside.max())} of {count}" if len(inside) else f"no timestep of {count}"

    def learning_rates(self) -> list[str]:
        """For each group of parameters its learning rate over the run; the schedule itself is not moved."""
        quarters = (self.max_steps * quarter // 4 for quarter in range(5))
        steps = sorted({min(step, self.max_steps - 1) for step in (0, self.args.lr_warmup_steps, *quarters)})
        curves = []
        for base, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True):
            rates = [f"{base * factor(step):.2g}" for step in steps]
            points = ", ".join(f"{rate} at step {step + 1}" for rate, step in zip(rates, steps, strict=True))
            curves.append(points if len(set(rates)) > 1 else f"{rates[0]} throughout")
        return curves

    def saved_scheduler(self) -> str:
        """The class of the scheduler that the result samples with."""
        own = self.trained.family.pipeline.scheduler
        if own_objective(own) == self.args.prediction_type:
            return f"{type(own).__name__}, the pipeline's own"
        made = training_scheduler(self.args.prediction_type, own)
        return f"{type(made).__name__}, in place of the pipeline's {type(own).__name__}"


# Counting -----------------------------------------------------------------------------------------------------------


def _inside(sigma: Tensor, threshold: float) -> Tensor:
    return sigma.isfinite() & (sigma <= threshold)
