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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lpl.config.command_line import loss_words as loss_flags
from lpl.data.dataset import Batch
from lpl.diagnosis.failures import Stage, Status
from lpl.diagnosis.needs import DiskNeeds, count_parameters
from lpl.diagnosis.plan import DRAWS, Plan
from lpl.tools.machine import free_space, is_out_of_memory, peak_memory, reset_peak_memory
from lpl.tools.words import Rows, duration, short_count, size, table
from lpl.training.checkpoints import find_checkpoints
from lpl.training.losses import BatchLosses
from lpl.training.parts import TrainedParts
from lpl.training.updates import Updates
from lpl.weighting import SHARE_RANGE, LplWeight


logger = logging.getLogger(__name__)


MEASURED_STEPS = 5  # optimizer steps of each kind, after one that is not counted


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
    losses: Callable[[nn.Module, Batch, bool], BatchLosses]
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
        with_lpl = self._measured(with_lpl=True) if args.lpl.enabled and plain else None
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
            "Latent perceptual loss": self._lpl(with_lpl, warnings)
            if args.lpl.enabled
            else [("weight", "0: it is off")],
            f"One step, mean of {MEASURED_STEPS}, {_device_name(self.plan.accelerator)}": self._cost(
                plain, with_lpl, warnings
            ),
            "The run": self._run(with_lpl if args.lpl.enabled else plain, plain),
            "Results": self._results(warnings),
        }
        if warnings:
            sections["Look at this first"] = [("warning", warning) for warning in warnings]
        return f"Dry run: nothing was written.\n\n{table(sections)}"

    def _trained(self) -> Rows:
        plan, args = self.plan, self.plan.args
        trained = set(map(id, plan.trained.weights()))
        rows = []
        for name, part in _parts(plan.trained).items():
            of_part, count = count_parameters(part), count_parameters(part, trained_only=False)
            frozen = [parameter for parameter in part.parameters() if id(parameter) not in trained]
            how = "frozen" if not of_part else f"LoRA of rank {args.rank}" if args.lora.lora else "whole"
            precision = [f"trained in {plan.precision_of(plan.trained.parameters_of(part))}"] if of_part else []
            precision += [f"frozen in {_quantized(args, part, plan) or plan.precision_of(frozen)}"] if frozen else []
            share = f"{short_count(of_part)} of {short_count(count)}" if of_part else short_count(count)
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
        if plain is None or (self.plan.args.lpl.enabled and with_lpl is None):
            stage, plan = Stage.LPL_STEP if plain else Stage.STEP, self.plan
            remedies = Status(plan.args, plan.accelerator, plan.trained, stage, plan.steps_done + 1).remedies()
            flags = "; ".join(f"{remedy.flags} ({remedy})" for remedy in remedies)
            words = f"a step {'with' if plain else 'without'} LPL needs more memory than there is"
            warnings.append(f"{words}; what saves memory: {flags}" if flags else words)
        rows = [("without LPL", _cost(plain))]
        if self.plan.args.lpl.enabled and plain:
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
        if args.lpl.enabled and args.lpl_start_step:
            ramp = f", growing over {args.lpl_ramp_steps} steps" if args.lpl_ramp_steps else ""
            rows.append(("LPL", f"from step {args.lpl_start_step + 1} on{ramp}"))
        if cost and plain:
            seconds = whole_run_seconds(plan, plain.seconds, cost.seconds)
            rows.append(("time", f"about {duration(seconds)}, samples, checkpoints and EMA not counted"))
        return [*rows, ("validation", _validation(plan)), ("seed", str(args.seed))]

    def _results(self, warnings: list[str]) -> Rows:
        plan, args = self.plan, self.plan.args
        there = len(find_checkpoints(args.output_dir))
        needs = DiskNeeds.of(plan.trained, args, plan.max_steps, plan.steps_done, there)
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
            ("in the end", f"{'LoRA' if args.lora.lora else 'pipeline'} of about {size(needs.result)}"),
            ("disk", f"about {size(needs.bytes)} needed (weights, EMA, optimizer), {size(free)} free"),
        ]


def _parts(trained: TrainedParts) -> dict[str, nn.Module]:
    """The pipeline's models by name, the trained ones first."""
    family = trained.family
    names = [*trained.parts, family.denoiser_name, *family.text_encoder_names, "vae"]
    parts = {name: getattr(family.pipeline, name) for name in names}
    return {name: part for name, part in parts.items() if part is not None}


def whole_run_seconds(plan: Plan, without_lpl: float, with_lpl: float) -> float:
    """Seconds for the steps to go: those before --lpl_start_step are plain, and so are those between --lpl_every."""
    every, start = plan.args.lpl_every, plan.args.lpl_start_step if plan.args.lpl.enabled else plan.max_steps
    first, last = (math.ceil(max(0, step - start) / every) for step in (plan.steps_done, plan.max_steps))
    count = max(0, last - first)
    return (plan.steps_to_go - count) * without_lpl + count * with_lpl


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quantized(args: Namespace, part: nn.Module, plan: Plan) -> str:
    is_quantized = args.quantize_base and part is plan.trained.denoiser
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
