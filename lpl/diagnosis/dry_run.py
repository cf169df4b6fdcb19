"""The report of ``--dry_run``: what the run would do, and the time and memory of real steps. Writes nothing.

A *cost* is the time and memory of one optimizer step with all its micro-batches, measured on a few steps that the
training loop's own function takes. *Inside* are the samples whose sigma is at most the threshold tau: LPL applies to
those.

Time includes reading images, forward, backward, clipping, the optimizer and the EMA, but no samples or checkpoints.
Memory with LPL is that of a step in which every sample is inside, which sooner or later happens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from lpl.config.command_line import loss_words
from lpl.config.groups import Lpl
from lpl.data.command import command_of
from lpl.data.dataset import Batch
from lpl.diagnosis.needs import DiskNeeds, count_parameters, models_of
from lpl.diagnosis.plan import DRAWS, Plan
from lpl.diagnosis.remedies import remedies
from lpl.diagnosis.status import Stage, Status
from lpl.tools.machine import free_space, is_out_of_memory, peak_memory, reset_peak_memory
from lpl.tools.words import Rows, counted, duration, short_count, size, table
from lpl.training.checkpoints import find_checkpoints
from lpl.training.losses import BatchLosses
from lpl.training.optimizers import name_of
from lpl.training.updates import Updates
from lpl.weighting import LplWeight


logger = logging.getLogger(__name__)


NO_PULL = 0.01  # a pull below warns: separate statistics have 0.004 in the study, and gain nothing
MEASURED_STEPS = 5  # optimizer steps of each kind, after one that is not counted


class Step(Protocol):
    """Takes one optimizer step, and returns how many samples were inside."""

    def __call__(self, batches: Iterator[Batch], with_lpl: bool, /, *, observers: Sequence[Pulls] = ()) -> int: ...


@dataclass
class Pulls:
    """LPL's pull on each sample of the timed steps (:mod:`lpl.gradients`), an observer of them."""

    found: list[Tensor] = field(default_factory=list)

    def observe(self, step: int, batch: Batch, losses: BatchLosses, total: Tensor, weight: Tensor) -> None:
        if losses.pulls is not None:
            self.found.append(losses.pulls)

    def mean(self) -> tuple[float, float, int]:
        """Mean, its standard error, and the number of samples."""
        pulls = torch.cat(self.found).cpu() if self.found else torch.zeros(0)
        pulls = pulls[pulls.isfinite()]
        count = len(pulls)
        error = pulls.std().item() / math.sqrt(count) if count > 1 else math.inf
        return (pulls.mean().item() if count else 0.0), error, count


@dataclass(frozen=True)
class Cost:
    """The cost of one optimizer step."""

    seconds: float
    memory: int | None  # the peak in bytes; None: cannot be measured here
    inside: float = 0.0  # share of the timed samples that were inside


@dataclass
class DryRun:
    """Takes a few steps without and with LPL, and prints what the run would do. Writes no file.

    The steps change the weights in memory, so no training can follow. With several processes each takes the steps, and
    the main one prints.

    Args:
        step: takes one optimizer step on the next batches, with LPL or without, seen by observers, and returns how
            many samples were inside.
    """

    plan: Plan
    step: Step
    batches: Iterator[Batch]
    updates: Updates
    weight: LplWeight
    pulls: Pulls = field(default_factory=Pulls)

    def report(self) -> None:
        """Measure the costs, and print the report on the main process."""
        logger.info(f"dry run: takes {MEASURED_STEPS + 1} steps of each kind and writes nothing")
        if self.weight.measuring or self.plan.config.lpl.lpl_student:
            self.weight.measuring_steps = self.weight.steps + MEASURED_STEPS
        self.weight.correct_every = 1  # with a student, LPL itself is timed first
        plain = self._measured(with_lpl=False)
        with_lpl = (
            self._measured(with_lpl=True, observers=(self.pulls,)) if self.plan.config.lpl.enabled and plain else None
        )
        student = None
        if with_lpl and self.plan.config.lpl.lpl_student:
            self.weight.correct_every = self.weight.measuring_steps = 0
            student = self._measured(with_lpl=True)
        if self.plan.run.accelerator.is_main_process:
            costs = plain, with_lpl, student
            print(Report(self.plan, self.updates, self.weight, *costs, self.pulls).text(), flush=True)

    def _measured(self, with_lpl: bool, observers: Sequence[Pulls] = ()) -> Cost | None:
        """The cost of a step, or None where it is out of memory."""
        accelerator, optimization = self.plan.run.accelerator, self.plan.config.optimization
        can_measure = reset_peak_memory(accelerator.device)
        try:
            self._warm_up(with_lpl)
            _wait_for(accelerator.device)
            start = time.perf_counter()
            inside = sum(self.step(self.batches, with_lpl, observers=observers) for _ in range(MEASURED_STEPS))
            _wait_for(accelerator.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or accelerator.num_processes > 1:
                raise  # the other processes would wait for this one's gradients
            return None
        seconds = (time.perf_counter() - start) / MEASURED_STEPS
        samples = MEASURED_STEPS * optimization.gradient_accumulation_steps * optimization.train_batch_size
        return Cost(seconds, peak_memory(accelerator.device) if can_measure else None, inside / samples)

    def _warm_up(self, with_lpl: bool) -> None:
        """A step without noise: all samples are inside, so that LPL needs the most memory it can.

        LPL's weight is not measured on it.
        """
        measured = self.weight.state_dict()
        self.step(map(_without_noise, self.batches), with_lpl)
        self.weight.load_state_dict(measured)


def _without_noise(batch: Batch) -> Batch:
    return batch | {"timestep": torch.zeros_like(batch["timestep"])}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Report:
    """What a dry run prints: titles, and under each its rows.

    Args:
        plain: cost of a step without LPL; None: out of memory.
        with_lpl: cost of a step with LPL; None: out of memory, or not measured.
        student: cost of a step with a student instead; None: likewise.
        pulls: LPL's, in the timed steps.
    """

    plan: Plan
    updates: Updates
    weight: LplWeight
    plain: Cost | None
    with_lpl: Cost | None
    student: Cost | None = None
    pulls: Pulls = field(default_factory=Pulls)

    def text(self) -> str:
        config = self.plan.config
        device = _device_name(self.plan.run.accelerator)
        sections: dict[str, Rows] = {
            "What is trained": self._trained(),
            "Objective": [
                ("objective", str(config.model.prediction_type)),
                ("scheduler in results", self.plan.saved_scheduler()),
            ],
            "Latent perceptual loss": self._lpl() if config.lpl.enabled else [("weight", "0: it is off")],
            f"One step, mean of {MEASURED_STEPS}, {device}": self._costs(),
            "The run": self._run(),
            "Results": self._results(),
        }
        if warnings := self._warnings():
            sections["Warnings"] = [("warning", warning) for warning in warnings]
        return f"Dry run: nothing was written.\n\n{table(sections)}"

    def _trained(self) -> Rows:
        plan, config = self.plan, self.plan.config
        trained = set(map(id, plan.trained.weights()))
        rows = []
        for name, part in models_of(plan.trained).items():
            of_part, count = count_parameters(part), count_parameters(part, trained_only=False)
            frozen = [parameter for parameter in part.parameters() if id(parameter) not in trained]
            how = "frozen" if not of_part else config.lora.words if config.lora.lora else "whole"
            bits = (config.lora.quantize_base or "") if part is plan.trained.denoiser else ""
            precision = [f"trained in {plan.precision_of(plan.trained.parameters_of(part))}"] if of_part else []
            rest = f"{'frozen ' if of_part else ''}in {bits.replace('bit', ' bits') or plan.precision_of(frozen)}"
            precision += [rest] if frozen else []
            share = f"{short_count(of_part)} of {short_count(count)}" if of_part else short_count(count)
            rows.append((name, f"{how}, {share} parameters, {', '.join(precision)}"))
        precision = plan.run.accelerator.mixed_precision
        optimizer = self.updates.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        rows += [("autocast", "none" if precision == "no" else precision), ("optimizer", name_of(optimizer))]
        return rows + list(zip(("learning rate", "of text encoders"), plan.learning_rates(), strict=False))

    def _lpl(self) -> Rows:
        plan, lpl = self.plan, self.plan.config.lpl
        precision = lpl.decoder_dtype(plan.run.mixed_precision)
        return [
            ("threshold", f"sigma <= {plan.threshold:g} : {plan.timesteps_inside()}"),
            ("samples inside", f"{plan.share_inside():.1%} of {DRAWS} timesteps drawn as in training"),
            *([("computed on", plan.applied_to())] if plan.applied_to() else []),
            ("weight", self._weight()),
            *([("pull", self._pull())] if self.pulls.mean()[2] else []),
            ("options", loss_words(plan.config) or "the paper's"),
            ("decoder", f"in {precision}, of {lpl.lpl_vae_name_or_path or 'the pipeline itself'}"),
        ]

    def _weight(self) -> str:
        """The weight of Eq. 3, and LPL's share of the loss under it."""
        setting, share = self.plan.config.lpl.lpl_weight, self._share()
        if not share:
            return f"{setting}; not measured: {'no sample was inside' if self.with_lpl else 'out of memory'}"
        value = float(self.weight.value)
        number = f"{value:.4g}" if self.weight.share is None else f"{setting}, which is {value:.4g}"
        return f"{number}: {share:.1%} of the total loss, measured over {counted(self.weight.steps, 'step')}"

    def _pull(self) -> str:
        """Whether lowering LPL raises the contrast of the estimates."""
        mean, error, count = self.pulls.mean()
        spread = f" ± {error:.3f}" if math.isfinite(error) else ""
        return f"{mean:+.3f}{spread} towards contrast, above 0 is good; cosine, mean of {counted(count, 'sample')}"

    def _pull_warning(self) -> str | None:
        mean, error, _ = self.pulls.mean()
        if mean + 2 * error >= NO_PULL:
            return None
        given, lpl = self.plan.config.lpl, Lpl()
        names = "lpl_variant", "lpl_normalization", "lpl_detach_statistics"
        changed = ", ".join(f"--{name}" for name in names if getattr(given, name) != getattr(lpl, name))
        way = f"leave out {changed}" if changed else "the denoiser may be too far from convergence for LPL"
        return (
            f"LPL does not pull towards contrast (its pull is below {NO_PULL}); in the study such losses made "
            f"images no sharper; {way}"
        )

    def _share(self) -> float:
        """LPL's measured share of the loss; 0 where it was not measured."""
        return self.weight.measured_share() if self.with_lpl else 0.0

    def _costs(self) -> Rows:
        plain, with_lpl, every = self.plain, self.with_lpl, self.plan.config.lpl.lpl_every
        rows = [("without LPL", cost_in_words(plain))]
        if self.plan.config.lpl.enabled and plain:
            rows.append(("with LPL", cost_in_words(with_lpl)))
            if self.plan.config.lpl.lpl_student:
                rows.append(("with the student", cost_in_words(self.student)))
        with_lpl = self._lpl_cost()
        if not with_lpl or not plain:
            return rows
        if not with_lpl.inside:
            return [*rows, ("LPL costs", "unknown: no timed sample was inside; give a larger --train_batch_size")]
        ratio = 1 + (with_lpl.seconds / plain.seconds - 1) / every
        average = f" on average over {every} steps" if every > 1 else ""
        if self.student and self.plan.config.lpl.lpl_correct_every:
            average += ", corrections included"
        memory = ""
        if plain.memory and with_lpl.memory:
            memory = f", {with_lpl.memory / plain.memory:.2f} x the peak memory"
        if count := round(self._measuring_steps()):
            given = self.plan.config.lpl.lpl_weight
            rows.append(("", f"(its first {counted(count, 'step')} compute LPL too, for --lpl_weight {given})"))
        return [
            *rows,
            ("the student costs" if self.student else "LPL costs", f"{ratio:.2f} x the time{average}{memory}"),
            ("", f"({with_lpl.inside:.0%} of the timed samples were inside; memory: all of a batch)"),
        ]

    def _run(self) -> Rows:
        plan, config = self.plan, self.plan.config
        masks = config.data.masks
        rows = [
            ("images", f"{plan.count()}{plan.repeated()} at {plan.sizes()}" + (f", {masks}" if masks else "")),
            *((f"of {name}", words) for name, words in plan.data_sets()),
            ("look at them", command_of(config, plan.run.seed, isinstance(plan.images.empty_caption, int))),
            ("samples per step", _batch_in_words(plan)),
            ("steps", f"{plan.max_steps}{plan.epochs(', which is ')}; {plan.steps_to_go} to go"),
        ]
        if config.lpl.enabled and config.lpl.lpl_start_step:
            ramp = f", ramped up over {config.lpl.lpl_ramp_steps} steps" if config.lpl.lpl_ramp_steps else ""
            rows.append(("LPL", f"from step {config.lpl.lpl_start_step + 1} on{ramp}"))
        cost = self._lpl_cost() if config.lpl.enabled else self.plain
        if cost and self.plain:
            seconds = whole_run_seconds(
                config.lpl, plan.run.step, plan.max_steps, without_lpl=self.plain.seconds, with_lpl=cost.seconds
            )
            seconds += self._measuring_steps() * ((self.with_lpl or cost).seconds - cost.seconds)
            rows.append(("time", f"about {duration(seconds)}, without samples and checkpoints"))
        return [*rows, ("validation", _validation_in_words(plan)), ("seed", str(plan.run.seed))]

    def _lpl_cost(self) -> Cost | None:
        """A step with LPL, or with the student and its share of the corrections, which need LPL's memory."""
        student, exact, every = self.student, self.with_lpl, self.plan.config.lpl.lpl_correct_every
        if student is None or exact is None or not every:
            return student or exact
        seconds = student.seconds + (exact.seconds - student.seconds) / every
        return replace(student, seconds=seconds, memory=exact.memory)

    def _measuring_steps(self) -> float:
        """How many steps of a run with a student still compute LPL itself, to measure its share."""
        lpl, step = self.plan.config.lpl, self.plan.run.step
        if self.student is None or self.weight.share is None:
            return 0
        end = min(self.plan.max_steps, lpl.lpl_start_step + lpl.lpl_measuring_steps * lpl.lpl_every)
        return max(0, end - max(step, lpl.lpl_start_step)) / lpl.lpl_every

    def _results(self) -> Rows:
        output, needs = self.plan.config.output, self._disk_needs()
        name = output.hub_model_id or self.plan.run.folder.name
        every, each = f"every {output.checkpointing_steps} steps", f"{size(needs.checkpoint)} each"
        return [
            ("folder", f"{output.output_dir}{f', published as {name}' if output.push_to_hub else ''}"),
            ("checkpoints", f"{needs.written}, {every}, {needs.kept} kept; {each}"),
            ("in the end", f"{'LoRA' if self.plan.config.lora.lora else 'pipeline'} of about {size(needs.result)}"),
            (
                "disk",
                f"about {size(needs.bytes)} needed (weights, EMA, optimizer), {size(free_space(output.output_dir))} "
                "free",
            ),
        ]

    def _disk_needs(self) -> DiskNeeds:
        plan, output = self.plan, self.plan.config.output
        there = len(find_checkpoints(output.output_dir))
        return DiskNeeds.of(plan.trained, plan.config.optimization, output, plan.max_steps, plan.run.step, there)

    def _warnings(self) -> list[str]:
        found: list[str | None] = [*self.plan.warnings(), self._caches()]
        found.append(self.weight.share_warning() if self.plan.config.lpl.enabled and self._share() else None)
        found += [self._pull_warning(), self._memory_warning()]
        needs, free = self._disk_needs(), free_space(self.plan.config.output.output_dir)
        found.append(needs.refusal(free) or needs.warning(free))
        return [warning for warning in found if warning]

    def _caches(self) -> str | None:
        """That the run's steps will be cheaper: a dry run writes nothing, so it fills no cache."""
        data = self.plan.config.data
        given = {"--cache_latents": data.cache_latents, "--cache_text_embeddings": data.cache_text_embeddings}
        if names := " and ".join(name for name, on in given.items() if on):
            return f"{names}: these steps were taken without them; those of the run need less time and memory"
        return None

    def _memory_warning(self) -> str | None:
        plan, run = self.plan, self.plan.run
        if self.plain and (self.with_lpl or not plan.config.lpl.enabled):
            return None
        stage = Stage.LPL_STEP if self.plain else Stage.STEP
        found = remedies(Status(plan.config, run.accelerator, plan.trained, stage, run.step + 1))
        flags = "; ".join(f"{remedy.flags} ({remedy.effect})" for remedy in found)
        words = f"a step {'with' if self.plain else 'without'} LPL is out of memory"
        return f"{words}; what saves memory: {flags}" if flags else words


# Words ---------------------------------------------------------------------------------------------------------------


def whole_run_seconds(lpl: Lpl, steps_done: int, max_steps: int, *, without_lpl: float, with_lpl: float) -> float:
    """Seconds of the remaining steps: plain before --lpl_start_step, and then with LPL every --lpl_every-th."""
    start = lpl.lpl_start_step if lpl.enabled else max_steps
    first, last = (math.ceil(max(0, step - start) / lpl.lpl_every) for step in (steps_done, max_steps))
    count = max(0, last - first)
    return (max(0, max_steps - steps_done) - count) * without_lpl + count * with_lpl


def cost_in_words(cost: Cost | None) -> str:
    if cost is None:
        return "out of memory"
    return f"{cost.seconds:.3g} s, peak memory {'not measured' if cost.memory is None else size(cost.memory)}"


def _device_name(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"on {torch.cuda.get_device_name()}"
    return f"on the {accelerator.device.type.upper()}; memory is that of the whole process"


def _batch_in_words(plan: Plan) -> str:
    optimization, processes = plan.config.optimization, counted(plan.run.accelerator.num_processes, "process")
    return (
        f"{plan.global_batch} = {optimization.train_batch_size} in a batch x {processes} x "
        f"{optimization.gradient_accumulation_steps} accumulated"
    )


def _validation_in_words(plan: Plan) -> str:
    number = len(plan.config.validation.validation_prompts or ())
    what = [counted(number, "sample")] if number else []
    what += ["the losses on held-out images"] if plan.config.data.holds_out else []
    return f"{' and '.join(what)}, before, every {plan.validation_steps} steps and at the end" if what else "none"
