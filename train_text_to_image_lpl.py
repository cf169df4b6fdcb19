#!/usr/bin/env python
"""Fine-tune a latent diffusion model on captioned images with the latent perceptual loss (LPL).

    accelerate launch train_text_to_image_lpl.py --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES

Read from top to bottom: configuration -> data -> models -> optimizer -> resume -> loop -> save -> push. The method is
:class:`Losses` and :func:`optimizer_step` below :func:`train`, over ``lpl/``: objectives in ``lpl/objectives.py``
(Table 1), the loss in ``lpl/loss.py`` (Eq. 2), its gate in ``lpl/gate.py``, its weight in ``lpl/weighting.py``
(Eq. 3). ``--lpl_weight 0`` is the plain diffusion baseline and never runs the decoder.
"""

from __future__ import annotations

from lpl.config import command_line
from lpl.tools.console import hush_libraries


# Flags come first: a wrong one is refused before the libraries are imported, which takes seconds.
CONFIG = command_line.parse() if __name__ == "__main__" else None
if CONFIG is not None and not CONFIG.validation.verbose:
    hush_libraries()

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from lpl import LatentPerceptualLoss, evaluation
from lpl.autoencoders import downscaling_factor
from lpl.config import Config, held_out
from lpl.config.groups import Diffusion, Lpl
from lpl.config.sizes import parse_sizes
from lpl.data.bad_samples import BadSamples
from lpl.data.dataset import Batch, TrainingImages, real_images
from lpl.data.folder import listed_once
from lpl.data.loader import training_batches
from lpl.diagnosis.dry_run import DryRun
from lpl.diagnosis.estimate import Method
from lpl.diagnosis.failures import Status, explained
from lpl.diagnosis.for_gpu import print_estimate
from lpl.diagnosis.plan import Plan
from lpl.families import Family
from lpl.families.derived import with_derived
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolve, with_decoder_dtype
from lpl.gate import random_window, rows_inside, sigma_threshold_at, subset
from lpl.gradients import noise_level
from lpl.masking import LossMask, pooled_mean
from lpl.objectives import Objective, dream_shift
from lpl.publishing import hub
from lpl.publishing.card import write_model_card
from lpl.publishing.licence import base_licence
from lpl.publishing.lora_metadata import LoraMetadata
from lpl.publishing.publication import Publication
from lpl.publishing.run_card import RunCard
from lpl.student import StudentLoss, difference
from lpl.tools import layout
from lpl.tools.pictures import loss_curves
from lpl.tools.process import leave_after
from lpl.training.average import MovingAverage
from lpl.training.base_model import check_base
from lpl.training.caching import with_caches
from lpl.training.checkpoints import TrainingState
from lpl.training.earlier import set_earlier_aside
from lpl.training.given_lora import with_adapters
from lpl.training.log import Log
from lpl.training.losses import BatchLosses, clean_latents, lpl_weight, perceptual_loss, student_of
from lpl.training.memory import offload_vaes
from lpl.training.parts import unwrapped
from lpl.training.pauses import Pauses
from lpl.training.preemption import EXIT_CODE, Preemption
from lpl.training.preflight import check_captions, preflight
from lpl.training.provenance import start_recipe, update_recipe
from lpl.training.result import Result
from lpl.training.sampling import draws_of
from lpl.training.sharding import Sharding
from lpl.training.skipped_steps import SkippedSteps
from lpl.training.speed import check_model, speed_up
from lpl.training.start import (
    Length,
    Run,
    Stage,
    finish,
    load_weights,
    open_images,
    order_of,
    place_models,
    run_errors,
    start_accelerator,
    start_or_resume,
    trained_parts,
)
from lpl.training.updates import Updates, prepare
from lpl.training.validation import HeldOutLosses, Samples, Validation
from lpl.weighting import LplWeight


logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).name


def main() -> None:
    config = CONFIG or command_line.parse()
    with explained(SCRIPT, config) as status:  # an error that ends the run is explained in words
        train(config, status)


def train(config: Config, status: Status) -> None:
    if config.validation.for_gpu is not None:
        with run_errors(SCRIPT):
            print_estimate(config, Method(Losses, optimizer_step))
        return
    inputs = start(config, status)  # whatever can be refused is refused here, before any weights are loaded
    config, description, run = inputs.config, inputs.description, inputs.run
    accelerator = run.accelerator

    # Models: a frozen VAE and frozen text encoders around what is trained
    status.now(Stage.LOADING)
    with run_errors(SCRIPT):
        family = load_weights(config, description, accelerator)
        if not config.validation.dry_run:
            pictures = with_caches(config, description, family, accelerator, inputs.images, inputs.held_out_images)
            inputs = replace(inputs, images=pictures[0], held_out_images=pictures[1])
        images = inputs.images
        trained = status.trained = trained_parts(family, config)
        speed_up(trained, config, accelerator)
        average = place_models(trained, config, description, accelerator, Sharding.asked(accelerator))
        lpl_loss = None
        if config.lpl.enabled or inputs.held_out_images is not None:
            lpl_loss = perceptual_loss(
                family.vae,
                config.lpl,
                config.model.cache_dir,
                compile_for=config.optimization.compile_for,
                channels_last=config.optimization.channels_last,
            )
        student = student_of(config.lpl, lpl_loss, config.model.cache_dir)
        lpl_loss = offload_vaes(family.vae, lpl_loss, config.optimization, accelerator.device)
    losses = Losses(
        family=family,
        objective=images.objective,
        lpl_loss=lpl_loss,
        lpl=config.lpl,
        diffusion=config.diffusion,
        student=student,
        unmasked_weight=config.data.unmasked_weight,
    )
    weight = lpl_weight(config.lpl, accelerator.device)  # w of Eq. 3

    # Optimizer, data, and all that a checkpoint holds; the same command resumes where the checkpoint stands
    length = Length.of(config.optimization, images.length, accelerator.num_processes)
    model, updates = prepare(accelerator, trained, average, config.optimization, length.global_batch, length.max_steps)
    trained_on = images.largest() if config.validation.dry_run else images  # which need most time and memory
    order = order_of(trained_on, config.optimization, run)
    batches = training_batches(trained_on, order, family.tokenize)
    state = TrainingState(accelerator, trained, average, updates, weight)
    if run.resumed is not None:
        with run_errors(SCRIPT):
            state.load(run.resumed)  # behind the loader, which draws from the global random state that this restores
    plan = Plan(config, run, length, trained, images, updates.schedule)
    step = partial(optimizer_step, model=model, losses=losses, weight=weight, updates=updates)
    if config.validation.dry_run:
        status.in_step(run.step + 1, config.lpl.enabled)
        DryRun(plan, partial(step, number=run.step), batches, updates, weight).report()
        finish(accelerator)
        return

    # What watches the run, and what it leaves
    preemption = Preemption(accelerator)
    with run_errors(SCRIPT):
        set_earlier_aside(run, config.lora.lora)
    log = Log(run, length, config.validation, config.output, config.lpl.lpl_every, losses.blocks, student is not None)
    bad_samples = BadSamples(accelerator, images, run.folder, config.data.max_bad_samples, run.resumed is not None)
    skipped_steps = SkippedSteps(accelerator, config.optimization.max_skipped_steps, run.progress.skipped)
    validation = make_validation(plan, inputs, losses, average, log, preemption, status.now)
    describe = LoraMetadata(plan, description.parts, inputs.licence).add
    result = Result(
        run,
        describe,
        config.model,
        description,
        trained,
        average,
        scheduler=inputs.scheduler,
        classes=inputs.classes,
        single_file=config.output.save_single_file,
    )
    card = partial(make_card, plan, inputs, losses, log, validation)
    publication = make_publication(plan, result, card)
    pauses = Pauses(state, order, log, validation, config.output, publication and publication.checkpoint)
    start_recipe(config, run, images.dataset, plan.hardware, weight.facts() | {"max_steps": plan.max_steps})

    # The loop
    plan.announce()
    preemption.listen()
    if not run.progress.looked:
        validation.run(run)
    log.start_bar()
    while run.step < length.max_steps and not run.ending:
        with_lpl, measuring = weight.applies(run.step), weight.measuring
        status.in_step(run.step + 1, with_lpl)
        step(batches, with_lpl, number=run.step, observers=(log, skipped_steps, bad_samples))
        run.step += 1
        skipped_steps.end_step(run.step, updates.skipped)
        if measuring and not weight.measuring:
            weight.report()
            update_recipe(run, weight.facts())
        run.ending = preemption.asked()
        if run.ending or log.is_due(run.step) or validation.is_due(run.step):
            end_if_unhealthy(run, bad_samples, skipped_steps)  # what is saved below has to know of them
        if log.is_due(run.step):
            log.write(run.step, updates.learning_rate)
        if pauses.are_due(run):
            pauses.take(run)  # checkpoint, samples, validation losses, metrics; published as --hub_strategy says
    log.close_bar(run.step)
    if run.ending:
        end_early(run, preemption, publication)

    # Save: a pipeline that loads and samples by itself, or the LoRA that one loads; the EMA's weights with --use_ema
    status.now(Stage.SAVING, run.step)
    accelerator.wait_for_everyone()
    state.check()
    with state.gathered():
        if run.is_main:
            save(run, result, validation, log, weight, card)
    if publication is not None:
        publication.end(preemption.received_here)
    finish(accelerator)
    preemption.close()


@dataclass(frozen=True)
class Inputs:
    """What a run starts from, before any weights are loaded.

    Args:
        config: complete: every default is resolved.
        held_out_images: None: nothing is held out.
        prompts: validation prompts; of a class-conditional family, labels.
        classes: names of the classes by label; empty unless the family is class-conditional.
        scheduler: what is trained and sampled with.
        licence: of the base model, for the card.
    """

    config: Config
    description: Description
    run: Run
    images: TrainingImages
    held_out_images: TrainingImages | None
    prompts: Sequence[str | int]
    classes: Mapping[int, str]
    scheduler: Any
    licence: Mapping[str, Any]


@listed_once()
def start(config: Config, status: Status) -> Inputs:
    """Check everything that the flags, the pipeline's configurations and the data can show to be wrong."""
    evaluates, dry_run = config.evaluation.eval_steps is not None, config.validation.dry_run
    with command_line.usage_errors():
        preflight(config)
        if evaluates:
            evaluation.check_evaluation(config.evaluation, config.model)
    with run_errors(SCRIPT, hub.HubError):
        config = with_derived(config)
        description = read_pipeline(config.model, config.lpl.lpl_blocks)
        config = status.config = with_adapters(resolve(config, description), description)
        check_captions(config.data, description.family)
        check_model(config, description)
        if evaluates:
            evaluation.check_captions(config.evaluation, config.data, description.family)
        accelerator = status.accelerator = start_accelerator(config, description.family.idle_weights)
        config = status.config = with_decoder_dtype(config, accelerator.mixed_precision)
        run = start_or_resume(config, accelerator, hub.download_run)
        check_base(run.resumed, config, description)
        images, held_out_images = open_images(config, description, run)
        classes = description.class_names(images.class_names)
        prompts = description.prompts(config.validation.validation_prompts or (), classes)
        writes = run.is_main and not dry_run
        if writes and config.output.push_to_hub:
            run.repository = hub.prepare_repository(config.output, config.lora.lora)
            if run.resumed is None:
                hub.check_not_source(config, run.repository)
    return Inputs(
        config=config,
        description=description,
        run=run,
        images=images,
        held_out_images=held_out_images,
        prompts=prompts,
        classes=classes,
        scheduler=description.training_scheduler(config.model.objective),
        licence=base_licence(config.model, config.output.hub_token) if writes else {},  # may wait for the Hub
    )


# The method ----------------------------------------------------------------------------------------------------------


class Observer(Protocol):
    """Sees each micro-batch before its backward pass; ``total`` is L_total and ``weight`` is w, both ()."""

    def observe(self, step: int, batch: Batch, losses: BatchLosses, total: Tensor, weight: Tensor, /) -> None: ...


def optimizer_step(
    batches: Iterator[Batch],
    with_lpl: bool,
    *,
    number: int,
    model: nn.Module,
    losses: Losses,
    weight: LplWeight,
    updates: Updates,
    observers: Sequence[Observer] = (),
) -> int:
    """One step on L_total = L_diffusion + w LPL (Eq. 3); it changes nothing if a gradient is not finite.

    Args:
        number: of the step, counted from 0.

    Returns:
        How many samples were inside the threshold.
    """
    accelerator, inside = updates.accelerator, 0
    w, correction = weight.at(number), weight.correction(number)  # from the steps before this one
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(model):
            found = losses(model, batch, with_lpl, correction)
            if with_lpl:
                found.compare_gradients(project=losses.lpl.lpl_project_conflicts)
                weight.observe(found.diffusion_loss, found.lpl)
            total = found.diffusion_loss + weight.every * w * found.lpl  # LPL on every n-th step counts n-fold there
            for observer in observers:
                observer.observe(number + 1, batch, found, total, w)
            accelerator.backward(total)
        inside += found.inside
    updates.step()  # weights, schedule and moving average
    if with_lpl:
        weight.end_step(updates.mean)
    return inside


@dataclass(frozen=True)
class Losses:
    """Both terms of Eq. 3 for a batch: the method, line by line.

    With --lpl_max_samples LPL looks at a random subset of the samples inside the threshold and counts it for all of
    them, the same in expectation; with --lpl_crop at a random part of their images, which is nearly so (docs/cost.md).
    A student sees all of them, and only its corrections the subset.

    Loss masks weigh the positions of both terms (``lpl/masking.py``).
    """

    family: Family
    objective: Objective
    lpl_loss: LatentPerceptualLoss | None
    lpl: Lpl
    diffusion: Diffusion
    student: StudentLoss | None = None
    unmasked_weight: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch, with_lpl: bool, correction: int = 0) -> BatchLosses:
        family, objective, diffusion, device = self.family, self.objective, self.diffusion, self.family.vae.device
        # Timesteps and gate are known on the CPU: the step never waits to learn which rows to decode.
        sigma, threshold = objective.sigma(batch["timestep"]), self.threshold(*self.size(batch))
        inside, levels = rows_inside(sigma, threshold), noise_level(sigma, threshold)
        chosen = subset(inside, batch["lpl_choice"][:, 0], self.lpl.lpl_max_samples) if with_lpl else inside[:0]
        noise, timesteps, rows = (x.to(device, non_blocking=True) for x in (batch["noise"], batch["timestep"], chosen))
        mask = self.mask(batch, device)
        # z0, z_t and D
        latents = clean_latents(family.vae, batch)  # scaled (B, C, h, w)
        input_noise = noise
        if diffusion.input_perturbation:
            input_noise = noise + diffusion.input_perturbation * batch["input_noise"].to(device, non_blocking=True)
        noisy_latents = objective.add_noise(latents, input_noise, timesteps)  # (B, C, h, w)
        conditions = unwrapped(model).conditions(batch, device)
        if diffusion.dream_training:
            with torch.no_grad():
                output = model(noisy_latents, timesteps, conditions)
                shift = dream_shift(objective, output, noise, timesteps, diffusion.dream_detail_preservation)
            noise = noise + shift
            noisy_latents = objective.add_noise(latents, input_noise + shift, timesteps)
        model_output = model(noisy_latents, timesteps, conditions).float()  # (B, C, h, w)

        # L_diffusion
        if diffusion.precondition_outputs:  # SD3's alternative: the error of z0_hat instead
            error = objective.clean_latents(model_output, noisy_latents, timesteps) - latents
        else:
            error = model_output - objective.target(latents, noise, timesteps)
        loss_weight = objective.weight(timesteps, diffusion.weighting_scheme, diffusion.snr_gamma)
        errors = loss_weight * pooled_mean(error.square(), mask)  # (B,)
        weights = batch.get("loss_weight")  # of each sample's data set; None: all 1
        if weights is not None:
            weights = weights.to(device, non_blocking=True)  # (B,)
            errors = weights * errors

        # LPL, averaged over the whole batch: rows outside the threshold count as 0 (Eq. 2)
        no_lpl, levels = torch.zeros((), device=device), levels.to(device, non_blocking=True)
        found = BatchLosses(errors, no_lpl, model_output, len(inside), with_lpl, weights=weights, levels=levels)
        if len(rows):
            assert self.lpl_loss is not None
            seen = rows if self.student is None else inside.to(device, non_blocking=True)
            predicted_latents = objective.clean_latents(model_output[seen], noisy_latents[seen], timesteps[seen])
            found.estimates = predicted_latents
            share = 1.0 if self.lpl.lpl_variant == "reference" else len(inside) / len(latents)
            if self.student is None:
                window = self.window(batch, *latents.shape[-2:])
                lpl = self.lpl_loss(predicted_latents, latents[seen], window, mask and mask.rows(seen))  # (n,)
                found.take(seen, lpl, share, self.lpl_loss)  # share * their mean: they stand for all inside
                return found

            # The student on all inside, and n (LPL - S) on the rows: together LPL in expectation
            value = self.student(predicted_latents, latents[seen], mask and mask.rows(seen))
            found.take(seen, value, share, self.student)
            if correction:
                places = torch.searchsorted(inside, chosen).to(device, non_blocking=True)  # of the rows in ``seen``
                exact = self.lpl_loss(predicted_latents[places], latents[rows], mask=mask and mask.rows(rows))
                off, found.fidelity = difference(value, exact, predicted_latents, places)
                found.correct(rows, off, share * correction)
        return found

    @property
    def decoder_blocks(self) -> Sequence[str]:
        """Names of the decoder blocks that LPL compares, or whose student reproduces it."""
        return self.lpl_loss.block_names if self.lpl_loss is not None else ()

    @property
    def blocks(self) -> Sequence[str]:
        """Names of the parts of LPL in the log: decoder blocks, or the student's depths."""
        return self.student.block_names if self.student is not None else self.decoder_blocks

    def threshold(self, height: int, width: int) -> float:
        """tau for images of that size in pixels."""
        return sigma_threshold_at(self.lpl.lpl_sigma_threshold, height, width, self.lpl.lpl_threshold_base_resolution)

    def size(self, batch: Batch) -> tuple[int, int]:
        """Height and width of a batch's images in pixels."""
        factor = downscaling_factor(self.family.vae.config)
        height, width = batch["noise"].shape[-2:]
        return factor * height, factor * width

    def mask(self, batch: Batch, device: torch.device) -> LossMask | None:
        """The loss masks of the batch; None: there are none."""
        pixels = batch.get("mask")
        return None if pixels is None else LossMask(pixels.to(device, non_blocking=True), self.unmasked_weight)

    def window(self, batch: Batch, height: int, width: int) -> tuple[int, int, int, int] | None:
        """The part of the latents, height x width, that LPL looks at; None: all of them."""
        if self.lpl.lpl_crop is None:
            return None
        side = self.lpl.lpl_crop // downscaling_factor(self.family.vae.config)
        return random_window(height, width, side, batch["lpl_choice"][0, 1])


# What follows a step -------------------------------------------------------------------------------------------------


def make_validation(
    plan: Plan,
    inputs: Inputs,
    losses: Losses,
    average: MovingAverage | None,
    log: Log,
    preemption: Preemption,
    now: Callable[[Stage, int], None],
) -> Validation:
    """Samples of the prompts, the losses on what is held out, and the metrics of --eval_steps."""
    config, run, family, validation = plan.config, plan.run, plan.trained.family, plan.config.validation
    prompts, classes, held_out_images = inputs.prompts, inputs.classes, inputs.held_out_images
    sizes = parse_sizes(validation.validation_sizes) if validation.validation_sizes else (config.data.size,)
    names = [classes.get(prompt, str(prompt)) if isinstance(prompt, int) else prompt for prompt in prompts]
    draws = draws_of(validation, prompts, names, sizes, run.seed)
    shown = [(draw.number, draw.size) for draw in draws]
    samples = Samples(
        folder=run.folder / layout.SAMPLES,
        family=family,
        scheduler=inputs.scheduler,
        validation=validation,
        seed=run.seed,
        draws=draws,
        scales=(validation.validation_lora_scales or ()) if config.lora.lora else (),
        real=real_images(plan.images, prompts, shown) if prompts and run.is_main else None,
        stop=preemption.asked_now if plan.trained.sharded else preemption.received_here,
    )
    held_out_losses = metrics = None
    if held_out_images is not None:
        plain = replace(losses, lpl=held_out(losses.lpl), diffusion=held_out(losses.diffusion), student=None)
        held_out_losses = HeldOutLosses(held_out_images, plain, config.optimization.train_batch_size)
    if config.evaluation.eval_steps is not None:
        settings = config.evaluation, config.data, validation, config.output, config.model
        with run_errors(SCRIPT):
            metrics = evaluation.TrainingEvaluation(
                family, inputs.scheduler, *settings, classes, preemption, command_line.words_of(config)
            )
        metrics.resume(run.step)
    return Validation(
        samples=samples,
        held_out=held_out_losses,
        metrics=metrics,
        every=plan.validation_steps,
        metrics_every=config.evaluation.eval_steps or plan.max_steps,
        max_steps=plan.max_steps,
        trained=plan.trained,
        average=average,
        log=log,
        preemption=preemption,
        now=now,
    )


def make_card(plan: Plan, inputs: Inputs, losses: Losses, log: Log, validation: Validation) -> RunCard:
    """What the model card says at this moment."""
    return RunCard.of(
        plan,
        blocks=losses.decoder_blocks if plan.config.lpl.enabled else (),
        records=log.records(),
        prompts=inputs.prompts,
        example=validation.samples.draws[0].settings() if inputs.prompts else {},
        licence=inputs.licence,
        results=validation.metrics.on_card() if validation.metrics is not None else ((), ""),
    )


def make_publication(plan: Plan, result: Result, card: Callable[[], RunCard]) -> Publication | None:
    """The uploads of --push_to_hub; on the main process."""
    if plan.run.repository is None:
        return None
    whole = () if plan.trained.lora else tuple(plan.trained.parts)
    return Publication(plan.config.output, plan.run.repository, result.save, whole, card)


def end_if_unhealthy(run: Run, bad_samples: BadSamples, skipped_steps: SkippedSteps) -> None:
    """End the run where more samples or steps have failed than the flags allow; the same in every process."""
    run.problem = "; ".join(filter(None, [bad_samples.write(), skipped_steps.write()]))
    run.progress.skipped = skipped_steps.count
    run.ending = run.ending or bool(run.problem)


def end_early(run: Run, preemption: Preemption, publication: Publication | None) -> NoReturn:
    """Exit behind the last checkpoint: with the problem, or with the exit code that asks for a resume."""
    logger.info(f"the run ends after step {run.step}; --resume_from_checkpoint latest continues from there")
    if publication is not None:
        publication.interrupt()
    finish(run.accelerator)
    preemption.close()
    sys.exit(f"{SCRIPT}: error: {run.problem}" if run.problem else EXIT_CODE)


def save(
    run: Run, result: Result, validation: Validation, log: Log, weight: LplWeight, card: Callable[[], RunCard]
) -> None:
    """Write the result, its last pictures and its model card, and report on LPL if the run was short."""
    result.write()
    validation.samples.before_after(run.step)
    validation.samples.checkpoints(run.step)
    loss_curves(log.records(), run.folder / layout.CURVES)
    if weight.measuring and weight.steps:
        weight.report()
    if weight.enabled and not log.has_lpl() and run.step > weight.start_step:  # of shorter runs, the plan told
        logger.warning(
            "no step was trained with LPL: no sample was inside the threshold (raise --lpl_sigma_threshold), or the "
            "run was too short"
        )
    write_model_card(run.folder, card())
    logger.info(f"the {'LoRA' if result.trained.lora else 'pipeline'} and its card are in {run.folder}")


if __name__ == "__main__":
    leave_after(main)
