#!/usr/bin/env python
"""Fine-tune a latent diffusion model on captioned images with the latent perceptual loss (LPL).

    accelerate launch train_text_to_image_lpl.py --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES

Read from top to bottom: arguments -> data -> models -> optimizer -> resume -> loop -> save -> push. The method is in
``lpl/``: objectives in ``lpl/objectives.py`` (Table 1), the loss in ``lpl/loss.py`` (Eq. 2), its weight in
``lpl/weighting.py`` (Eq. 3). ``--lpl_weight 0`` is the plain diffusion baseline and never runs the decoder.
"""

from __future__ import annotations

import logging
import math
import secrets
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm

from lpl import LatentPerceptualLoss, get_objective, training_scheduler
from lpl.autoencoders import downscaling_factor, encode, feature_vae, latent_channels
from lpl.config.command_line import parse, recipe
from lpl.data.bad_samples import BadSamples
from lpl.data.dataset import TrainingImages, held_out_batches, real_images
from lpl.data.loader import training_batches
from lpl.data.source import class_names, load_training_images
from lpl.data.streaming import load_streamed_images, training_images
from lpl.diagnosis.dry_run import DryRun
from lpl.diagnosis.failures import Stage, Status, explained
from lpl.diagnosis.plan import Plan
from lpl.families import Family
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.gate import has_lpl, ramp, random_window, rows_inside, sigma_threshold_at, subset
from lpl.objectives import Objective, diffusion_weight, dream_shift, own_objective
from lpl.publishing import hub
from lpl.publishing.card import RunCard, write_model_card
from lpl.publishing.licence import base_licence
from lpl.publishing.publication import Publication
from lpl.tools.files import filled_whole
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import loss_curves
from lpl.tools.process import leave_after
from lpl.tools.words import first_line
from lpl.training import checkpoints
from lpl.training.average import MovingAverage, averaged
from lpl.training.loading import average_from_revision, load_family, weight_dtype
from lpl.training.log import Log
from lpl.training.losses import BatchLosses
from lpl.training.parts import TrainedParts
from lpl.training.preemption import EXIT_CODE, OTHERS_WAIT, Preemption
from lpl.training.preflight import check_captions, preflight
from lpl.training.provenance import compare_with, measured_facts, write_recipe
from lpl.training.result import save_result
from lpl.training.skipped_steps import SkippedSteps
from lpl.training.updates import Updates, make_optimizer
from lpl.training.validation import Validation
from lpl.weighting import SHARE_RANGE, LplWeight


logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).name


def main() -> None:
    warnings.formatwarning = lambda message, *_, **__: f"{SCRIPT}: warning: {message}\n"
    args = parse()
    with explained(SCRIPT, args) as status:
        train(args, status)


def train(args: Namespace, status: Status) -> None:
    # Arguments: everything that can be refused is refused here, before any weights are loaded.
    try:
        preflight(args)
        configs = read_pipeline(args.model, args.lpl.lpl_blocks)
        args = resolve(args, configs)
        check_captions(args.data, configs.family)
        if args.eval_steps is not None:
            from lpl.evaluation.training import check_evaluation  # whose libraries others need not have

            check_evaluation(args, configs.family)
        accelerator = start_accelerator(args)
        args = status.args = args.changed(mixed_precision=accelerator.mixed_precision)
        with accelerator.main_process_first():
            if accelerator.is_main_process and not args.dry_run:
                checkpoints.tidy(args.output_dir)
                if args.resume_from_checkpoint == "hub":
                    hub.download_run(args.output)
            resumable = checkpoints.find_resumable(args.output_dir, args.resume_from_checkpoint)
        progress = start_or_resume(args, resumable)
        args = status.args = args.changed(seed=progress.seed)
        empty = configs.family.empty_caption(configs.parts)
        num_classes = empty if configs.family.class_conditional else None
        with accelerator.main_process_first():
            load = load_streamed_images if args.streaming else load_training_images
            dataset, held_out = load(args, num_classes)
        prompts, data_classes, classes = args.validation_prompts or [], {}, {}
        if num_classes is not None:
            data_classes = class_names(dataset, args.caption_column)  # they come first, and before the model's
            classes = data_classes | configs.family.class_names(configs.index) | data_classes
            prompts = [configs.family.class_label(prompt, classes) for prompt in prompts]
        if resumable is not None:
            checkpoints.check_recipe(resumable, recipe(args), accelerator.num_processes)
        scheduler = configs.scheduler
        if args.prediction_type != own_objective(scheduler):
            scheduler = training_scheduler(args.prediction_type, scheduler)
        objective = get_objective(args.prediction_type, scheduler)
        side = args.resolution // downscaling_factor(configs.vae)
        images = training_images(dataset, objective, (latent_channels(configs.vae), side, side), args, empty)
        images.check()
        if args.push_to_hub and not args.dry_run and accelerator.is_main_process:
            args = status.args = args.changed(hub_model_id=hub.prepare_repository(args.output))
        licence = {}
        if accelerator.is_main_process and not args.dry_run:
            licence = base_licence(args.pretrained_model_name_or_path, args.revision, args.hub_token, args.cache_dir)
    except (ValueError, hub.HubError) as error:
        sys.exit(f"{SCRIPT}: error: {error}")

    # Models: a frozen VAE and frozen text encoders around what is trained, which is in float32.
    device, status.accelerator, status.stage = accelerator.device, accelerator, Stage.LOADING
    try:
        family = load_family(args, configs, weight_dtype(accelerator))
    except (OSError, ValueError) as error:
        sys.exit(
            f"{SCRIPT}: error: --pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its weights "
            f"cannot be loaded; look at --variant and --revision ({first_line(error)})"
        )
    trained = status.trained = TrainedParts(family, args)
    for model in (family.vae, family.denoiser, *family.text_encoders):
        model.to(device)
    if broken := trained.not_finite():
        sys.exit(
            f"{SCRIPT}: error: --pretrained_model_name_or_path {args.pretrained_model_name_or_path}: the weights of "
            f"{broken} are not finite"
        )
    ema = None
    if args.use_ema:
        ema = MovingAverage(trained.weights(), args.ema_decay, args.foreach_ema, args.offload_ema)
        if args.non_ema_revision and not args.lora.lora:
            average_from_revision(ema, args, configs)

    # The loss looks through the decoder only where sigma is below the threshold (Sec. 3.2).
    lpl_loss, lpl_weight = None, LplWeight(args.lpl_weight, args.lpl_measuring_steps, device)
    if args.lpl.enabled or held_out is not None:
        lpl_loss = LatentPerceptualLoss(
            feature_vae(family.vae, args.lpl_vae_name_or_path, DTYPES[args.lpl_vae_dtype], args.cache_dir),
            blocks=args.lpl_blocks,
            gradient_checkpointing=args.lpl_gradient_checkpointing,
            **args.lpl.loss_options(),
        )
    threshold = sigma_threshold_at(
        args.lpl_sigma_threshold, args.resolution, args.resolution, args.lpl_threshold_base_resolution
    )
    losses = Losses(family, objective, lpl_loss, threshold, args)

    # Data: batches in an order, and with random numbers, that depend on seed and position only.
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * images.length / global_batch)
    steps_per_epoch = math.ceil(images.length / global_batch) if images.length else max_steps
    order = images.batches(
        accelerator.process_index,
        accelerator.num_processes,
        progress.step * args.gradient_accumulation_steps,
        progress.stream,
    )
    batches = training_batches(images, order, args.dataloader_num_workers)

    # Optimizer. The schedule counts optimizer steps, whatever the number of processes and micro-batches.
    optimizer = make_optimizer(args, trained, global_batch)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    model, optimizer = accelerator.prepare(trained, optimizer)
    updates = Updates(accelerator, trained, optimizer, schedule, max_steps, ema, args.max_grad_norm)
    state = checkpoints.TrainingState(accelerator, trained, ema, updates, lpl_weight)

    # Resume: the same command goes on where the checkpoint stands.
    if resumable is not None:
        try:
            state.load(resumable)
        except (OSError, ValueError, SafetensorError) as error:
            sys.exit(f"{SCRIPT}: error: --resume_from_checkpoint {resumable.name}: {first_line(error)}")
        logger.info(f"resumed from {resumable}, {max(0, max_steps - progress.step)} of {max_steps} steps to go")

    plan = Plan(
        args, trained, accelerator, images, objective, threshold, max_steps, progress.step, global_batch, schedule
    )
    if args.dry_run:
        status.now(Stage.LPL_STEP if args.lpl.enabled else Stage.STEP, progress.step + 1)
        DryRun(plan, losses, model, updates, batches, lpl_weight).report()
        finish(accelerator)
        return

    real = None
    if prompts and accelerator.is_main_process:
        real = real_images(images, prompts)
    names = [classes.get(prompt, str(prompt)) for prompt in prompts]
    preemption = Preemption(accelerator)
    validation = Validation(family, scheduler, args, prompts, names, real, lambda: preemption.received is not None)
    if accelerator.is_main_process:
        checkpoints.set_aside(args.output_dir, progress.step)
    blocks = lpl_loss.block_names if lpl_loss else ()
    log = Log(accelerator, args, progress.step, max_steps, global_batch, blocks, progress.looked)
    log.resume(progress.log)
    bad_samples = BadSamples(accelerator, images, args.output_dir, args.max_bad_samples, resumable is not None)
    skipped_steps = SkippedSteps(accelerator, args.max_skipped_steps, progress.skipped)
    evaluation = None
    if args.eval_steps is not None:
        from lpl.evaluation.training import TrainingEvaluation

        try:
            evaluation = TrainingEvaluation(family, scheduler, args, classes, preemption)
        except ValueError as error:
            sys.exit(f"{SCRIPT}: error: {error}")
        evaluation.resume(progress.step)
    validate_every = args.validation_steps or args.validation_epochs * steps_per_epoch
    evaluate_every = args.eval_steps or max_steps

    def due(step: int, every: int) -> bool:
        return step % every == 0 or step == max_steps

    def look(step: int) -> None:
        """Samples, held-out losses and metrics, where they are due after a step; given up where the run is to end."""
        if due(step, validate_every):
            status.now(Stage.SAMPLES, step)
            validation.run(accelerator, trained, ema, step)
            if held_out is not None and not preemption.asked_now():
                status.now(Stage.LOSSES, step)
                log.validation(step, losses_on(held_out, losses, trained, ema, accelerator))
        if evaluation is not None and due(step, evaluate_every) and not preemption.asked_now():
            status.now(Stage.EVALUATION, step)
            log.validation(step, evaluation.run(accelerator, trained, ema, step))
        progress.looked = not preemption.asked_now()

    if held_out is not None:
        held_out = TrainingImages(held_out, objective, images.latent_shape, args, empty)
    facts: dict[str, Any] = {}
    if accelerator.is_main_process:
        facts = measured_facts(args, dataset, accelerator.num_processes, plan.hardware) | lpl_weight.facts()
        for difference in compare_with(args.rerun_of, facts, args.train_batch_size):
            logger.warning(difference)
        write_recipe(args, facts)

    def save_to(folder: Path) -> None:
        """The result with the present weights, the moving average's if there is one."""
        with averaged(ema, trained):
            save_result(folder, args, configs, trained, scheduler, classes)

    def card() -> RunCard:
        """What the model card says at this moment."""
        results = evaluation.on_card() if evaluation is not None else ((), "")
        plan.run = SimpleNamespace(  # TODO(house): lpl.training.start.Run
            accelerator=accelerator,
            seed=progress.seed,
            step=progress.step,
            mixed_precision=accelerator.mixed_precision,
            repository=args.hub_model_id if args.push_to_hub else None,
            recipe=recipe(args),
        )
        return RunCard.of(
            plan,
            blocks=blocks,
            records=log.records(),
            prompts=prompts,
            classes=data_classes,
            facts=facts,
            licence=licence,
            results=results,
        )

    publication = None
    if args.push_to_hub and accelerator.is_main_process:
        publication = Publication(
            args.output, args.hub_model_id, save_to, () if args.lora.lora else tuple(trained.parts), card
        )
    plan.announce()
    preemption.listen()
    if not progress.looked:
        look(progress.step)
    stop, problem = not progress.looked, ""
    bar = tqdm(total=max_steps, initial=progress.step, disable=not accelerator.is_main_process, desc="steps")
    while progress.step < max_steps and not stop:
        weight = lpl_weight.value * ramp(progress.step, args.lpl_start_step, args.lpl_ramp_steps)  # w of Eq. 3
        with_lpl = args.lpl.enabled and has_lpl(progress.step, args.lpl_start_step, args.lpl_every)
        status.now(Stage.LPL_STEP if with_lpl else Stage.STEP, progress.step + 1)
        for _ in range(args.gradient_accumulation_steps):
            batch = next(batches)
            bad_samples.add(batch["bad"])
            with accelerator.accumulate(model):
                terms = losses(model, batch, with_lpl)
                if with_lpl:
                    lpl_weight.observe(terms.diffusion_loss, terms.lpl)

                # L_total = L_diffusion + w LPL (Eq. 3); what only every n-th step has counts n-fold there
                loss = terms.diffusion_loss + args.lpl_every * weight * terms.lpl
                log.add(progress.step + 1, loss, weight, terms)
                skipped_steps.add(progress.step + 1, batch, terms)
                accelerator.backward(loss)
                if args.debug_loss:
                    log.samples(progress.step + 1, batch["index"], terms.errors)
        updates.step()  # weights, schedule and moving average; nothing where a gradient is not finite
        progress.step += 1
        skipped_steps.end_step(progress.step, updates.skipped)
        if with_lpl and lpl_weight.end_step(lambda sums: accelerator.reduce(sums, "mean")):
            report_share(lpl_weight)
            if accelerator.is_main_process:
                facts |= lpl_weight.facts()
                write_recipe(args, facts)

        stop = preemption.asked()
        looks = due(progress.step, validate_every) or due(progress.step, evaluate_every)
        if stop or looks or log.is_due(progress.step):  # what may be saved now has to know of them
            problem = "; ".join(filter(None, [bad_samples.write(), skipped_steps.write()]))
        stop = stop or bool(problem)
        save = stop or progress.step % args.checkpointing_steps == 0
        if log.is_due(progress.step):
            bar.set_postfix(log.write(progress.step, updates.learning_rate, weight), refresh=False)
            bar.update(progress.step - bar.n)
        if save or looks:
            with log.paused():  # images per second are those of the training alone
                progress.looked, progress.log, progress.skipped = False, log.state(), skipped_steps.count
                progress.stream = order.positions(progress.step * args.gradient_accumulation_steps)
                if save:
                    checkpoints.save_checkpoint(state, args.output_dir, progress, args.checkpoints_total_limit)
                if not stop:
                    look(progress.step)
                    stop = not progress.looked
                if stop and not save:
                    checkpoints.save_checkpoint(state, args.output_dir, progress, args.checkpoints_total_limit)
                elif save and accelerator.is_main_process:
                    progress.save(checkpoints.checkpoint_path(args.output_dir, progress.step))
                if publication is not None and (save or stop):
                    publication.checkpoint(
                        checkpoints.checkpoint_path(args.output_dir, progress.step), progress.step, stop
                    )
    bar.close()
    if stop:
        logger.info(f"the run ends after step {progress.step}; --resume_from_checkpoint latest goes on from there")
        if publication is not None:
            publication.interrupt()
        finish(accelerator)
        preemption.close()
        sys.exit(f"{SCRIPT}: error: {problem}" if problem else EXIT_CODE)
    if lpl_weight.measuring and lpl_weight.steps:
        report_share(lpl_weight)

    # Save: a pipeline that loads and samples by itself, or the LoRA that one loads; with the EMA's weights if kept.
    status.now(Stage.SAVING, progress.step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged(ema, trained), filled_whole(args.output_dir) as folder:
            trained.save(folder)  # first, so that nothing that follows can lose it
        with filled_whole(args.output_dir) as folder:
            save_to(folder)
        validation.before_after(progress.step)
        loss_curves(log.records(), Path(args.output_dir, "loss_curves.png"))
        if args.lpl.enabled and not any(record.get("lpl_share", 0) > 0 for record in log.records()):
            logger.warning(
                "no step was trained with LPL: no sample was inside the threshold, or the run was too short"
            )
        write_model_card(args.output_dir, card())
        logger.info(
            f"the {'LoRA' if args.lora.lora else 'pipeline'}, its samples and its card are in {args.output_dir}"
        )
        if publication is not None:
            publication.end(lambda: preemption.received is not None)
    finish(accelerator)
    preemption.close()


def finish(accelerator: Accelerator) -> None:
    """Close trackers and the process group, when all are done: launchers end those that stay behind the first."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # Gloo's thread needs the interpreter once more, to drop the last barrier. A process that tears its group down
    # before that, as happens when main() is left, would wait for that thread for ever.
    time.sleep(0.2 if accelerator.num_processes > 1 else 0)


@dataclass
class Losses:
    """Both terms of Eq. 3 for a batch: the method, line by line.

    With --lpl_max_samples LPL looks at a random subset of the samples inside the threshold and counts it for all of
    them, the same in expectation; with --lpl_crop at a random part of their images, which is nearly so (docs/lpl.md).
    """

    family: Family
    objective: Objective
    lpl_loss: LatentPerceptualLoss | None
    threshold: float  # tau at this resolution
    args: Namespace

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], with_lpl: bool) -> BatchLosses:
        family, objective, args, device = self.family, self.objective, self.args, self.family.vae.device
        # Timesteps and gate are known on the CPU: the step never waits to learn which rows to decode.
        inside = rows_inside(objective.sigma(batch["timestep"]), self.threshold)
        chosen = subset(inside, batch["lpl_choice"][:, 0], args.lpl_max_samples) if with_lpl else inside[:0]
        pixels, noise, posterior_noise, timesteps, rows = (
            x.to(device, non_blocking=True)
            for x in (batch["pixels"], batch["noise"], batch["posterior_noise"], batch["timestep"], chosen)
        )
        # z0, z_t and D
        latents = encode(family.vae, pixels, posterior_noise)  # pixels [-1, 1] -> scaled (B, C, h, w)
        input_noise = noise
        if args.input_perturbation:
            input_noise = noise + args.input_perturbation * batch["input_noise"].to(device, non_blocking=True)
        noisy_latents = objective.add_noise(latents, input_noise, timesteps)  # (B, C, h, w)
        conditions = unwrapped(model).conditions(batch, device)
        if args.dream_training:
            with torch.no_grad():
                shift = dream_shift(
                    objective,
                    model(noisy_latents, timesteps, conditions),
                    noise,
                    timesteps,
                    args.dream_detail_preservation,
                )
            noise = noise + shift
            noisy_latents = objective.add_noise(latents, input_noise + shift, timesteps)
        model_output = model(noisy_latents, timesteps, conditions).float()  # (B, C, h, w)

        # L_diffusion
        if args.precondition_outputs:  # SD3's alternative: the error of z0_hat instead
            error = objective.clean_latents(model_output, noisy_latents, timesteps) - latents
        else:
            error = model_output - objective.target(latents, noise, timesteps)
        errors = diffusion_weight(
            objective, timesteps, weighting_scheme=args.weighting_scheme, snr_gamma=args.snr_gamma
        ) * error.square().flatten(1).mean(1)  # (B,)

        # LPL, averaged over the whole batch: rows above the threshold count as 0 (Eq. 2)
        terms = BatchLosses(errors, torch.zeros((), device=device), model_output, len(inside), with_lpl)
        if len(rows):
            predicted_latents = objective.clean_latents(model_output[rows], noisy_latents[rows], timesteps[rows])
            window = None
            if args.lpl_crop is not None:
                side = latents.shape[-1]
                window = random_window(side, side, side * args.lpl_crop // args.resolution, batch["lpl_choice"][0, 1])
            lpl = self.lpl_loss(predicted_latents, latents[rows], window)  # (n,)
            share = 1.0 if args.lpl_variant == "reference" else len(inside) / len(latents)
            terms.take(rows, lpl, share, self.lpl_loss)
        return terms


def report_share(lpl_weight: LplWeight) -> None:
    """What the first steps measured, and whether LPL's part in the loss makes sense."""
    share = lpl_weight.measured_share()
    logger.info(
        f"LPL weight {float(lpl_weight.value):.4g}: with it, LPL would have been {share:.1%} of the total loss "
        f"over its first {lpl_weight.steps} steps"
    )
    low, high = SHARE_RANGE
    if not low <= share <= high:
        logger.warning(
            f"LPL is {share:.1%} of the loss; the paper found a fifth best, and outside {low:.0%} to {high:.0%} it "
            "does next to nothing or drowns the diffusion loss; --lpl_weight auto:0.2 finds the weight for a fifth"
        )


def start_accelerator(args: Namespace) -> Accelerator:
    """Accelerate's state, with trackers for the flags that they can show."""
    accelerator = Accelerator(
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=OTHERS_WAIT),
            # A text encoder's last layers may be computed for nothing: SDXL takes the ones before.
            DistributedDataParallelKwargs(find_unused_parameters=args.train_text_encoder),
        ],
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" or args.dry_run else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if accelerator.is_main_process else logging.ERROR,
    )
    for library in ("accelerate", "httpx", "httpx2"):  # they tell every file that they touch
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)  # they tell every caption that they cut
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} (in accelerate's configuration) is not supported; launch "
            "with --multi_gpu, and save memory by --gradient_checkpointing, --use_8bit_adam and --offload_ema"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 (in accelerate's configuration) needs a GPU; give --mixed_precision bf16 or no")
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"{accelerator.mixed_precision} (in accelerate's configuration) is not supported; give --mixed_precision"
        )
    torch.backends.cuda.matmul.allow_tf32 |= args.allow_tf32
    return accelerator


def start_or_resume(args: Namespace, resumable: Path | None) -> checkpoints.Progress:
    """Where the run begins, and its seed: the checkpoint's, else the one given, else one drawn for all processes."""
    if resumable is None and (earlier := checkpoints.find_checkpoints(args.output_dir)):
        logger.warning(
            f"--output_dir {args.output_dir} has checkpoints of an earlier run, {earlier[-1].name} among them; this "
            "run starts afresh, and moves them aside when it begins; to go on, add --resume_from_checkpoint latest"
        )
    if resumable is not None:
        progress = checkpoints.Progress.load(resumable)
        if args.seed not in (None, progress.seed):
            raise ValueError(f"--seed {args.seed}: the run to resume has the seed {progress.seed}; leave the flag out")
    else:
        drawn = broadcast_object_list([secrets.randbelow(2**31)])[0]
        progress = checkpoints.Progress(step=0, seed=drawn if args.seed is None else args.seed)
    set_seed(progress.seed)
    return progress


@torch.no_grad()
def losses_on(
    held_out: TrainingImages,
    losses: Losses,
    trained: TrainedParts,
    ema: MovingAverage | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Both terms on the held-out samples, unweighted, under the EMA's weights where there are any."""
    losses = replace(losses, args=losses.args.held_out())
    sums = torch.zeros(3, device=accelerator.device)
    trained.eval()
    with averaged(ema, trained):
        for batch in held_out_batches(
            held_out, losses.args.train_batch_size, accelerator.process_index, accelerator.num_processes
        ):
            terms = losses(trained, batch, with_lpl=True)
            sums += torch.stack([terms.diffusion_loss, terms.lpl, torch.ones_like(terms.lpl)]) * len(terms.errors)
    trained.train()
    diffusion_loss, lpl, count = accelerator.reduce(sums, "sum").tolist()
    return {"validation_loss": diffusion_loss / count, "validation_lpl": lpl / count}


def unwrapped(model: nn.Module) -> TrainedParts:
    """Without what accelerate has wrapped around it."""
    return getattr(model, "module", model)


if __name__ == "__main__":
    leave_after(main)
