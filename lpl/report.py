"""What a run is about to do: a few lines at every start, and the whole report of ``--dry_run``, which writes nothing.

Vocabulary. A *part* is one of the pipeline's models: the denoiser, a text encoder, the VAE. A *cost* is time and
memory of one optimizer step, all its micro-batches included, measured by really taking a few. *Inside* are the samples
whose sigma is at most the threshold tau, those that LPL applies to.

Time is measured as the loop spends it: loading of images, forward, backward, clipping and the optimizer; an EMA's
update, samples and checkpoints are not in it. Memory with LPL is that of a step in which every sample is inside, since
sooner or later one comes.
"""

from __future__ import annotations

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lpl.arguments import loss_flags
from lpl.checkpoints import find_checkpoints
from lpl.data import Batch, TrainingImages
from lpl.ending import Doing, Stage
from lpl.limits import (
    DiskNeeds,
    check_disk,
    count_parameters,
    free_space,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
    size,
)
from lpl.objectives import FlowMatching, Objective, own_objective, training_scheduler
from lpl.optimizers import Updates
from lpl.trainee import Trainee
from lpl.weighting import SHARE_RANGE, LplWeight, Terms


logger = logging.getLogger(__name__)

FEW_INSIDE = 0.05  # share of the samples below the sigma threshold under which the run warns
MEASURED_STEPS = 5  # optimizer steps of each kind, after one that is not counted
DRAWS = 2000  # timesteps for the share of samples inside

Rows = list[tuple[str, str]]


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
    trainee: Trainee
    accelerator: Accelerator
    images: TrainingImages
    objective: Objective
    threshold: float
    max_steps: int
    steps_done: int
    global_batch: int
    schedule: LambdaLR

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
        args, inside = self.args, self.share_inside() if self.args.lpl else 0.0
        logger.info(f"{self.count()} images, {self.max_steps} steps of {self.global_batch}{self.epochs(': ')}")
        logger.info(f"training {self.what()}, in {self.precision_of(self.trainee.trained())}{self.autocast()}")
        logger.info(
            f"objective {args.prediction_type}, {args.resolution} px, seed {args.seed}, results in {args.output_dir}"
        )
        if args.lpl:
            logger.info(
                f"LPL with weight {args.lpl_weight} where sigma <= {self.threshold:g}: {inside:.0%} of the samples "
                f"are inside{f'; {looked_at}' if (looked_at := self.looked_at()) else ''}"
            )
            for warning in self.warnings():
                logger.warning(warning)
        if self.accelerator.is_main_process and (
            lacking := check_disk(self.trainee, args, self.max_steps, self.steps_done)
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
        args, count = self.args, sum(map(count_parameters, self.trainee.parts.values()))
        names = list(self.trainee.parts)  # the denoiser is the first
        if args.from_scratch:
            names[0] += " from scratch"
        if not args.lora:
            return f"all of {' and '.join(names)}, {_count(count)} parameters"
        kind = f"{'rank-stabilised ' if args.use_rslora else ''}{'DoRA' if args.use_dora else 'LoRA'}"
        if args.use_dora and names[1:]:
            names[1] = f"LoRA on {names[1]}"
        over = f" over weights of {args.quantize_base.replace('bit', ' bits')}" if args.quantize_base else ""
        return (
            f"{kind} of rank {args.rank} and alpha {args.lora_alpha:g} on {' and '.join(names)}{over}, "
            f"{_count(count)} parameters"
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
        own = self.trainee.family.pipeline.scheduler
        if own_objective(own) == self.args.prediction_type:
            return f"{type(own).__name__}, the pipeline's own"
        made = training_scheduler(self.args.prediction_type, own)
        return f"{type(made).__name__}, in place of the pipeline's {type(own).__name__}"


@dataclass(frozen=True)
class Cost:
    """What one optimizer step takes."""

    seconds: float
    memory: int | None  # the peak in bytes; None: cannot be measured here
    inside: float = 0.0  # share of the samples inside in the steps that were timed


@dataclass
class DryRun:
    """Takes a few real steps with and without LPL, and prints what the run would do; writes no file.

    The steps change the weights in memory, so nothing can follow. With several processes each of them takes the steps
    and the main one prints.
    """

    plan: Plan
    losses: Callable[[nn.Module, Batch, bool], Terms]
    model: nn.Module
    updates: Updates
    batches: Iterator[Batch]
    lpl_weight: LplWeight

    def report(self) -> None:
        """Measure, and print it on the main process."""
        args = self.plan.args
        logger.info(f"dry run: {MEASURED_STEPS + 1} steps of each kind are taken, and nothing is written")
        if self.lpl_weight.measuring:
            self.lpl_weight.measuring_steps = self.lpl_weight.steps + MEASURED_STEPS
        plain = self._measured(with_lpl=False)
        with_lpl = self._measured(with_lpl=True) if args.lpl and plain else None
        if self.plan.accelerator.is_main_process:
            print(self._text(plain, with_lpl), flush=True)

    # Measuring

    def _measured(self, with_lpl: bool) -> Cost | None:
        """The cost of a step, or None where it needs more memory than there is."""
        device = self.plan.accelerator.device
        can_measure = reset_peak_memory(device)
        try:
            self._step(with_lpl, warm_up=True)
            _wait_for(device)
            start = time.perf_counter()
            inside = sum(self._step(with_lpl) for _ in range(MEASURED_STEPS))
            _wait_for(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.plan.accelerator.num_processes > 1:
                raise  # the others would wait for this one's gradients
            return None
        seconds = (time.perf_counter() - start) / MEASURED_STEPS
        samples = MEASURED_STEPS * self.plan.args.gradient_accumulation_steps * self.plan.args.train_batch_size
        return Cost(seconds, peak_memory(device) if can_measure else None, inside / samples)

    def _step(self, with_lpl: bool, warm_up: bool = False) -> int:
        """One optimizer step as the training loop takes it; how many of its samples were inside.

        With ``warm_up`` all samples have no noise, so that all are inside and LPL needs the most memory that it can.
        """
        args, accelerator = self.plan.args, self.plan.accelerator
        count = 0
        for _ in range(args.gradient_accumulation_steps):
            batch = next(self.batches)
            if warm_up:
                batch = batch | {"timestep": torch.zeros_like(batch["timestep"])}
            with accelerator.accumulate(self.model):
                terms = self.losses(self.model, batch, with_lpl)
                if with_lpl and not warm_up:
                    self.lpl_weight.observe(terms.diffusion_loss, terms.lpl)
                accelerator.backward(terms.diffusion_loss + args.lpl_every * self.lpl_weight.value * terms.lpl)
            count += terms.inside
        self.updates.step()
        if with_lpl and not warm_up:
            self.lpl_weight.end_step(lambda sums: accelerator.reduce(sums, "mean"))
        return count

    # Telling

    def _text(self, plain: Cost | None, with_lpl: Cost | None) -> str:
        args, warnings = self.plan.args, []
        sections = {
            "What is trained": self._trained(),
            "Objective": self._objective(),
            "Latent perceptual loss": self._lpl(with_lpl, warnings) if args.lpl else [("weight", "0: it is off")],
            f"One step, mean of {MEASURED_STEPS}, {_device_name(self.plan.accelerator)}": self._cost(
                plain, with_lpl, warnings
            ),
            "The run": self._run(with_lpl if args.lpl else plain, plain),
            "Results": self._results(warnings),
        }
        if warnings:
            sections["Look at this first"] = [("warning", warning) for warning in warnings]
        return f"Dry run: nothing was written.\n\n{table(sections)}"

    def _trained(self) -> Rows:
        plan, args = self.plan, self.plan.args
        trained = set(map(id, plan.trainee.trained()))
        rows = []
        for name, part in _parts(plan.trainee).items():
            of_part, count = count_parameters(part), count_parameters(part, trained_only=False)
            frozen = [parameter for parameter in part.parameters() if id(parameter) not in trained]
            how = "frozen" if not of_part else f"LoRA of rank {args.rank}" if args.lora else "whole"
            precision = [f"trained in {plan.precision_of(plan.trainee.parameters_of(part))}"] if of_part else []
            precision += [f"frozen in {_quantized(args, part, plan) or plan.precision_of(frozen)}"] if frozen else []
            share = f"{_count(of_part)} of {_count(count)}" if of_part else _count(count)
            rows.append((name, f"{how}, {share} parameters, {', '.join(precision)}"))
        rows.append(
            ("autocast", "none" if plan.accelerator.mixed_precision == "no" else plan.accelerator.mixed_precision)
        )
        rows.append(("optimizer", _optimizer_name(self.updates.optimizer)))
        groups = ("learning rate", "of text encoders")
        return rows + list(zip(groups, plan.learning_rates(), strict=False))

    def _objective(self) -> Rows:
        plan = self.plan
        return [("objective", plan.args.prediction_type), ("scheduler in results", plan.saved_scheduler())]

    def _lpl(self, cost: Cost | None, warnings: list[str]) -> Rows:
        plan, args = self.plan, self.plan.args
        inside = plan.share_inside()
        warnings += plan.warnings()
        return [
            ("threshold", f"sigma <= {plan.threshold:g} : {plan.timesteps_inside()}"),
            ("samples inside", f"{inside:.1%} of {DRAWS} timesteps drawn as in training"),
            *([("looked at", plan.looked_at())] if plan.looked_at() else []),
            ("weight", self._weight(cost, warnings)),
            ("options", loss_flags(args) or "the paper's"),
            ("decoder", f"in {args.lpl_vae_dtype}, of {args.lpl_vae_name_or_path or 'the pipeline itself'}"),
        ]

    def _weight(self, cost: Cost | None, warnings: list[str]) -> str:
        """The weight of Eq. 3 and LPL's share of the loss under it."""
        setting, weight = self.plan.args.lpl_weight, float(self.lpl_weight.value)
        share = self.lpl_weight.measured_share()
        if cost is None or not share:
            return f"{setting}; not measured: {'no sample was inside' if cost else 'out of memory'}"
        low, high = SHARE_RANGE
        if not low <= share <= high:
            warnings.append(
                f"LPL would be {share:.1%} of the loss; outside {low:.0%} to {high:.0%} it does next to nothing or "
                "drowns the diffusion loss; --lpl_weight auto:0.2 finds the weight for a fifth"
            )
        number = f"{weight:.4g}" if self.lpl_weight.share is None else f"{setting}, which is {weight:.4g}"
        return f"{number}: {share:.1%} of the total loss, measured over {self.lpl_weight.steps} steps"

    def _cost(self, plain: Cost | None, with_lpl: Cost | None, warnings: list[str]) -> Rows:
        if plain is None or (self.plan.args.lpl and with_lpl is None):
            stage, plan = Stage.LPL_STEP if plain else Stage.STEP, self.plan
            remedies = Doing(plan.args, plan.accelerator, plan.trainee, stage, plan.steps_done + 1).remedies()
            flags = "; ".join(f"{remedy.flags} ({remedy})" for remedy in remedies)
            words = f"a step {'with' if plain else 'without'} LPL needs more memory than there is"
            warnings.append(f"{words}; what saves memory: {flags}" if flags else words)
        rows = [("without LPL", _cost(plain))]
        if self.plan.args.lpl and plain:
            rows.append(("with LPL", _cost(with_lpl)))
        if with_lpl and plain and not with_lpl.inside:
            rows.append(("LPL costs", "not told: no timed sample was inside; give a larger --train_batch_size"))
        elif with_lpl and plain:
            memory = ""
            if plain.memory and with_lpl.memory:
                memory = f", {with_lpl.memory / plain.memory:.2f} x the peak memory"
            every = self.plan.args.lpl_every
            ratio = 1 + (with_lpl.seconds / plain.seconds - 1) / every
            average = f" on average over {every} steps" if every > 1 else ""
            rows.append(("LPL costs", f"{ratio:.2f} x the time{average}{memory}"))
            rows.append(("", f"({with_lpl.inside:.0%} of the timed samples were inside; memory: all of a batch)"))
        return rows

    def _run(self, cost: Cost | None, plain: Cost | None) -> Rows:
        plan, args = self.plan, self.plan.args
        rows = [
            ("images", f"{plan.count()} at {args.resolution} px"),
            ("samples per step", _composed(args, plan.global_batch, plan.accelerator.num_processes)),
            ("steps", f"{plan.max_steps}{plan.epochs(', which is ')}; {plan.steps_to_go} to go"),
        ]
        if args.lpl and args.lpl_start_step:
            ramp = f", growing over {args.lpl_ramp_steps} steps" if args.lpl_ramp_steps else ""
            rows.append(("LPL", f"from step {args.lpl_start_step + 1} on{ramp}"))
        if cost and plain:
            seconds = whole_run_seconds(plan, plain.seconds, cost.seconds)
            rows.append(("time", f"about {duration(seconds)}, samples, checkpoints and EMA not counted"))
        return [*rows, ("validation", _validation(plan)), ("seed", str(args.seed))]

    def _results(self, warnings: list[str]) -> Rows:
        plan, args = self.plan, self.plan.args
        there = len(find_checkpoints(args.output_dir))
        needs = DiskNeeds.of(plan.trainee, args, plan.max_steps, plan.steps_done, there)
        free = free_space(args.output_dir)
        if lacking := needs.refusal(free) or needs.warning(free):
            warnings.append(lacking)
        hub = f", published as {args.hub_model_id or Path(args.output_dir).name}" if args.push_to_hub else ""
        return [
            ("folder", f"{args.output_dir}{hub}"),
            (
                "checkpoints",
                f"{needs.written}, every {args.checkpointing_steps} steps, {needs.kept} kept; "
                f"{size(needs.checkpoint)} each",
            ),
            ("in the end", f"{'LoRA' if args.lora else 'pipeline'} of about {size(needs.result)}"),
            ("disk", f"about {size(needs.bytes)} needed (weights, EMA, optimizer), {size(free)} free"),
        ]


# Counting -----------------------------------------------------------------------------------------------------------


def _inside(sigma: Tensor, threshold: float) -> Tensor:
    return sigma.isfinite() & (sigma <= threshold)


def _parts(trainee: Trainee) -> dict[str, nn.Module]:
    """The pipeline's models by name, the trained ones first."""
    family = trainee.family
    names = [*trainee.parts, family.denoiser_name, *family.text_encoder_names, "vae"]
    parts = {name: getattr(family.pipeline, name) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def whole_run_seconds(plan: Plan, without_lpl: float, with_lpl: float) -> float:
    """Seconds for the steps to go: those before --lpl_start_step are plain, and so are those between --lpl_every."""
    every, start = plan.args.lpl_every, plan.args.lpl_start_step if plan.args.lpl else plan.max_steps
    first, last = (math.ceil(max(0, step - start) / every) for step in (plan.steps_done, plan.max_steps))
    count = max(0, last - first)
    return (plan.steps_to_go - count) * without_lpl + count * with_lpl


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Words --------------------------------------------------------------------------------------------------------------


def table(sections: Mapping[str, Rows]) -> str:
    """Titles, and under each its rows with aligned values."""
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    blocks = []
    for title, rows in sections.items():
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))
    return "\n\n".join(blocks)


def _quantized(args: Namespace, part: nn.Module, plan: Plan) -> str:
    is_quantized = args.quantize_base and part is plan.trainee.denoiser
    return args.quantize_base.replace("bit", " bits") if is_quantized else ""


def _optimizer_name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # without what accelerate has wrapped around it


def _device_name(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"on {torch.cuda.get_device_name()}"
    return f"on the {accelerator.device.type.upper()}; memory is that of the whole process"


def _composed(args: Namespace, global_batch: int, processes: int) -> str:
    counts = (
        (args.train_batch_size, "in a batch"),
        (processes, "process" if processes == 1 else "processes"),
        (args.gradient_accumulation_steps, "accumulated"),
    )
    return f"{global_batch} = {' x '.join(f'{count} {word}' for count, word in counts)}"


def _validation(plan: Plan) -> str:
    args = plan.args
    held_out = args.validation_split is not None or args.validation_every_nth is not None
    number = len(args.validation_prompts or [])
    what = [f"{number} sample{'s' if number > 1 else ''}"] if number else []
    what += ["the losses on what is held out"] if held_out else []
    if not what:
        return "none"
    every = args.validation_steps or args.validation_epochs * math.ceil(plan.images.length / plan.global_batch)
    return f"{' and '.join(what)}, before, every {every} steps and at the end"


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "out of memory"
    return f"{cost.seconds:.3g} s, peak memory {'not measured' if cost.memory is None else size(cost.memory)}"


def _count(number: int) -> str:
    """1234567 -> 1.23M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return str(number)


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they have."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
