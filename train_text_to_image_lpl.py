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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
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
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from lpl import LatentPerceptualLoss, checkpoints, get_objective, hub, training_scheduler
from lpl.arguments import parse_arguments, recipe
from lpl.autoencoders import downscaling_factor, encode, feature_vae, latent_channels
from lpl.bad_samples import BadSamples
from lpl.checks import DTYPES, PipelineConfigs, check_pipeline, loss_options, read_pipeline_configs
from lpl.data import (
    HELD_OUT,
    KeyedBatches,
    TrainingImages,
    class_names,
    first_line,
    held_out_batches,
    load_training_images,
    real_images,
    training_batches,
)
from lpl.families import Family
from lpl.files import write_text
from lpl.loading import average_from_revision, load_family, pipeline_source, replaced_components
from lpl.logs import Log
from lpl.objectives import DiffusionObjective, Objective, expand, own_objective, sigma_threshold_at
from lpl.optimizers import make_optimizer
from lpl.pictures import loss_curves
from lpl.preemption import EXIT_CODE, Preemption
from lpl.report import DryRun, Plan
from lpl.trainee import Trainee, averaged
from lpl.validation import Validation
from lpl.weighting import SHARE_RANGE, LplWeight, Terms, has_lpl, ramp


logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).name


def main() -> None:
    # Arguments: everything that can be refused is refused here, before any weights are loaded.
    warnings.formatwarning = lambda message, *_, **__: f"{SCRIPT}: warning: {message}\n"
    args = parse_arguments()
    try:
        configs = read_pipeline_configs(args)
        check_pipeline(args, configs)
        accelerator = start_accelerator(args)
        with accelerator.main_process_first():
            if accelerator.is_main_process and not args.dry_run:
                checkpoints.tidy(args.output_dir)
            resumable = checkpoints.find_resumable(args.output_dir, args.resume_from_checkpoint)
        progress = start_or_resume(args, resumable)
        empty = configs.family.empty_caption(configs.parts)
        num_classes = empty if configs.family.class_conditional else None
        with accelerator.main_process_first():
            dataset, held_out = load_training_images(args, num_classes)
        prompts, data_classes, classes = args.validation_prompts or [], {}, {}
        if num_classes is not None:
            data_classes = class_names(dataset, args.caption_column)  # they come first, and before the model's
            classes = data_classes | configs.family.class_names(configs.index) | data_classes
            prompts = [configs.family.class_label(prompt, classes) for prompt in prompts]
        if resumable is not None:
            checkpoints.check_recipe(resumable, recipe(args))
        scheduler = configs.scheduler
        if args.prediction_type != own_objective(scheduler):
            scheduler = training_scheduler(args.prediction_type, scheduler)
        objective = get_objective(args.prediction_type, scheduler)
        side = args.resolution // downscaling_factor(configs.vae)
        images = TrainingImages(dataset, objective, (latent_channels(configs.vae), side, side), args, empty)
        images[0, 0]  # one image at least can be read
        if args.push_to_hub and not args.dry_run and accelerator.is_main_process:
            args.hub_model_id = hub.prepare_repository(args.hub_model_id, args.output_dir, args.hub_token)
    except (ValueError, hub.HubError) as error:
        sys.exit(f"{SCRIPT}: error: {error}")

    # Models: a frozen VAE and frozen text encoders around what is trained, which is in float32.
    device = accelerator.device
    try:
        family = load_family(args, configs, weight_dtype(accelerator))
    except (OSError, ValueError) as error:
        sys.exit(
            f"{SCRIPT}: error: --pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its weights "
            f"cannot be loaded; look at --variant and --revision ({first_line(error)})"
        )
    trainee = Trainee(family, args)
    for model in (family.vae, family.denoiser, *family.text_encoders):
        model.to(device)
    ema = None
    if args.use_ema:
        ema = EMAModel(trainee.trained(), decay=args.ema_decay, foreach=args.foreach_ema)
        if args.non_ema_revision and not args.lora:
            average_from_revision(ema, args, configs)

    # The loss looks through the decoder only where sigma is below the threshold (Sec. 3.2).
    lpl_loss, lpl_weight = None, LplWeight(args.lpl_weight, args.lpl_measuring_steps, device)
    if args.lpl or held_out is not None:
        lpl_loss = LatentPerceptualLoss(
            feature_vae(family.vae, args.lpl_vae_name_or_path, DTYPES[args.lpl_vae_dtype], args.cache_dir),
            blocks=args.lpl_blocks,
            gradient_checkpointing=args.lpl_gradient_checkpointing,
            **loss_options(args),
        )
    threshold = sigma_threshold_at(
        args.lpl_sigma_threshold, args.resolution, args.resolution, args.lpl_threshold_base_resolution
    )
    losses = Losses(family, objective, lpl_loss, threshold, args)

    # Data: batches in an order, and with random numbers, that depend on seed and position only.
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(images) / global_batch)
    max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(images) / global_batch)
    batches = training_batches(
        images,
        KeyedBatches(
            len(images),
            args.train_batch_size,
            args.seed,
            accelerator.process_index,
            accelerator.num_processes,
            first_batch=progress.step * args.gradient_accumulation_steps,
        ),
        args.dataloader_num_workers,
    )

    # Optimizer. The schedule counts optimizer steps, whatever the number of processes and micro-batches.
    optimizer = make_optimizer(args, trainee, global_batch)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=max_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    checkpoints.register(accelerator, trainee, ema)
    model, optimizer = accelerator.prepare(trainee, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, lpl_weight)

    # Resume: the same command goes on where the checkpoint stands.
    if resumable is not None:
        try:
            accelerator.load_state(str(resumable))
        except ValueError as error:
            sys.exit(f"{SCRIPT}: error: --resume_from_checkpoint {resumable.name}: {first_line(error)}")
        logger.info(f"resumed from {resumable}, {max(0, max_steps - progress.step)} of {max_steps} steps to go")
    if ema is not None:
        ema.decay = args.ema_decay  # a baseline goes on with LPL, and with LPL's decay
        ema.to("cpu" if args.offload_ema else device)

    plan = Plan(args, trainee, accelerator, images, objective, threshold, max_steps, global_batch, lr_scheduler)
    if args.dry_run:
        DryRun(plan, losses, model, optimizer, batches, lpl_weight).report()
        finish(accelerator)
        return

    real = None
    if prompts and accelerator.is_main_process:
        real = real_images(images, prompts)
    names = [classes.get(prompt, str(prompt)) for prompt in prompts]
    preemption = Preemption(accelerator)
    validation = Validation(family, scheduler, args, prompts, names, real, lambda: preemption.received is not None)
    log = Log(accelerator, args, progress.step, max_steps, global_batch, lpl_loss.block_names if lpl_loss else ())
    log.resume(progress.log)
    bad_samples = BadSamples(
        accelerator, dataset, args.image_column, args.output_dir, args.max_bad_samples, resumable is not None
    )
    evaluation = None
    if args.eval_steps is not None:
        from lpl.evaluation.training import TrainingEvaluation  # whose libraries others need not have

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
            validation.run(accelerator, trainee, ema, step)
            if held_out is not None and not preemption.asked_now():
                log.validation(step, losses_on(held_out, losses, trainee, ema, accelerator))
        if evaluation is not None and due(step, evaluate_every) and not preemption.asked_now():
            log.validation(step, evaluation.run(accelerator, trainee, ema, step))
        progress.looked = not preemption.asked_now()

    if held_out is not None:
        held_out = TrainingImages(held_out, objective, images.latent_shape, args, empty)
    if accelerator.is_main_process:
        write_recipe(args)
    plan.announce()
    preemption.listen()
    if not progress.looked:
        look(progress.step)
    stop, problem = not progress.looked, None
    bar = tqdm(total=max_steps, initial=progress.step, disable=not accelerator.is_main_process, desc="steps")
    while progress.step < max_steps and not stop:
        weight = lpl_weight.value * ramp(progress.step, args.lpl_start_step, args.lpl_ramp_steps)  # w of Eq. 3
        with_lpl = args.lpl and has_lpl(progress.step, args.lpl_start_step, args.lpl_every)
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
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(trainee.trained(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if args.debug_loss:
                    log.samples(progress.step + 1, batch["index"], terms.errors)

        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema is not None:
            update_ema(ema, trainee, device, args.offload_ema)
        progress.step += 1
        if with_lpl and lpl_weight.end_step(lambda sums: accelerator.reduce(sums, "mean")):
            report_share(lpl_weight)
            if accelerator.is_main_process:
                write_recipe(args, lpl_weight=float(lpl_weight.value), lpl_share=lpl_weight.measured_share())

        problem = bad_samples.write() if log.is_due(progress.step) else None
        stop = preemption.asked() or problem is not None
        save = stop or progress.step % args.checkpointing_steps == 0
        if log.is_due(progress.step):
            bar.set_postfix(log.write(progress.step, learning_rate, weight), refresh=False)
            bar.update(progress.step - bar.n)
        if save or due(progress.step, validate_every) or due(progress.step, evaluate_every):
            with log.paused():  # images per second are those of the training alone
                progress.looked, progress.log = False, log.state()
                if save:
                    checkpoints.save_checkpoint(accelerator, args.output_dir, progress, args.checkpoints_total_limit)
                if not stop:
                    look(progress.step)
                    stop = not progress.looked
                if stop and not save:
                    checkpoints.save_checkpoint(accelerator, args.output_dir, progress, args.checkpoints_total_limit)
                elif save and accelerator.is_main_process:
                    progress.save(checkpoints.place(args.output_dir, progress.step))
    bar.close()
    if stop:
        logger.info(f"the run ends after step {progress.step}; --resume_from_checkpoint latest goes on from there")
        preemption.close()
        finish(accelerator)
        sys.exit(f"{SCRIPT}: error: {problem}" if problem else EXIT_CODE)
    if lpl_weight.measuring and lpl_weight.steps:
        report_share(lpl_weight)

    # Save: a pipeline that loads and samples by itself, or the LoRA that one loads; with the EMA's weights if kept.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged(ema, trainee):
            save_result(args, configs, trainee, scheduler, classes)
        validation.before_after(progress.step)
        records = log.records()
        loss_curves(records, Path(args.output_dir, "loss_curves.png"))
        if args.lpl and not any(record.get("lpl_share", 0) > 0 for record in records):
            logger.warning(
                "no step was trained with LPL: no sample was inside the threshold, or the run was too short"
            )
        card = hub.describe(
            args,
            family,
            lpl_loss,
            records,
            progress.step,
            global_batch,
            threshold,
            f"{accelerator.num_processes} x {device_name(accelerator)}",
            accelerator.mixed_precision,
            weight_dtype(accelerator),
            prompts,
            data_classes,
            plan.what(),
        )
        card = replace(card, **evaluation.on_card()) if evaluation is not None else card
        hub.write_model_card(args.output_dir, card)
        logger.info(f"the {'LoRA' if args.lora else 'pipeline'}, its samples and its card are in {args.output_dir}")
        if args.push_to_hub and not preemption.received:
            url = hub.push_folder(args.output_dir, args.hub_model_id, args.hub_token)
            logger.info(f"published at {url}" if url else "nothing is published yet")
    preemption.close()
    finish(accelerator)


def finish(accelerator: Accelerator) -> None:
    """Close trackers and the process group."""
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

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], with_lpl: bool) -> Terms:
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
        conditions = trainee_of(model).conditions(batch, device)
        if args.dream_training:
            with torch.no_grad():
                shift = dream_shift(objective, model(noisy_latents, timesteps, conditions), noise, timesteps, args)
            noise = noise + shift
            noisy_latents = objective.add_noise(latents, input_noise + shift, timesteps)
        model_output = model(noisy_latents, timesteps, conditions).float()  # (B, C, h, w)

        # L_diffusion
        if args.precondition_outputs:  # SD3's alternative: the error of z0_hat instead
            error = objective.clean_latents(model_output, noisy_latents, timesteps) - latents
        else:
            error = model_output - objective.target(latents, noise, timesteps)
        errors = diffusion_weight(objective, timesteps, args) * error.square().flatten(1).mean(1)  # (B,)

        # LPL, averaged over the whole batch: rows above the threshold count as 0 (Eq. 2)
        terms = Terms(errors, torch.zeros((), device=device), model_output, len(inside), with_lpl)
        if len(rows):
            predicted_latents = objective.clean_latents(model_output[rows], noisy_latents[rows], timesteps[rows])
            window = None
            if args.lpl_crop is not None:
                side = latents.shape[-1]
                window = random_window(side, side * args.lpl_crop // args.resolution, batch["lpl_choice"][0, 1])
            lpl = self.lpl_loss(predicted_latents, latents[rows], window)  # (n,)
            share = 1.0 if args.lpl_variant == "reference" else len(inside) / len(latents)
            terms.take(lpl, share, self.lpl_loss)
        return terms


def report_share(lpl_weight: LplWeight) -> None:
    """What the first steps measured, and whether LPL's part in the loss makes sense."""
    share = lpl_weight.measured_share()
    logger.info(
        f"LPL weight {float(lpl_weight.value):.4g}: {share:.1%} of the total loss over its first {lpl_weight.steps} "
        "steps"
    )
    low, high = SHARE_RANGE
    if not low <= share <= high:
        logger.warning(
            f"LPL is {share:.1%} of the loss; the paper found a fifth best, and outside {low:.0%} to {high:.0%} it "
            "does next to nothing or drowns the diffusion loss; --lpl_weight auto:0.2 finds the weight for a fifth"
        )


def update_ema(ema: EMAModel, trainee: Trainee, device: torch.device, offload: bool) -> None:
    """One step of the moving average; with ``offload`` it waits in the CPU's memory for the next one."""
    if offload:
        ema.to(device)
    ema.step(trainee.trained())
    if offload:
        ema.to("cpu")  # blocking: a checkpoint may read it at once


def start_accelerator(args: Namespace) -> Accelerator:
    """Accelerate's state, with trackers for the flags that they can show."""
    accelerator = Accelerator(
        # The others wait while the main process samples, saves or prepares the data set.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),
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
    torch.backends.cuda.matmul.allow_tf32 |= args.allow_tf32
    return accelerator


def start_or_resume(args: Namespace, resumable: Path | None) -> checkpoints.Progress:
    """Where the run begins, and its seed: the checkpoint's, else the one given, else one drawn for all processes."""
    if resumable is None and (earlier := checkpoints.find_checkpoints(args.output_dir)):
        logger.warning(
            f"--output_dir {args.output_dir} has checkpoints of an earlier run, {earlier[-1].name} among them; this "
            "run starts afresh and leaves them there; to go on, add --resume_from_checkpoint latest"
        )
    if resumable is not None:
        progress = checkpoints.Progress.load(resumable)
        if args.seed not in (None, progress.seed):
            raise ValueError(f"--seed {args.seed}: the run to resume has the seed {progress.seed}; leave the flag out")
    else:
        drawn = broadcast_object_list([secrets.randbelow(2**31)])[0]
        progress = checkpoints.Progress(step=0, seed=drawn if args.seed is None else args.seed)
    args.seed = progress.seed
    set_seed(args.seed)
    return progress


def device_name(accelerator: Accelerator) -> str:
    return torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision of whatever is not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def write_recipe(args: Namespace, **measured: float) -> None:
    """Every flag of the run with its resolved value, for --config, and what the run has found out."""
    text = yaml.safe_dump(recipe(args) | ({"measured": measured} if measured else {}), sort_keys=True)
    write_text(Path(args.output_dir, "recipe.yaml"), text)


def save_result(
    args: Namespace, configs: PipelineConfigs, trainee: Trainee, scheduler: Any, classes: Mapping[int, str]
) -> None:
    """What the run was for: the pipeline with what was trained in it, or the LoRA."""
    changed = {"scheduler": scheduler} if scheduler is not configs.scheduler else {}
    if args.lora:
        trainee.save(args.output_dir)
        for name, component in changed.items():
            component.save_pretrained(Path(args.output_dir, name))
        return
    trainee.save(args.output_dir)  # first, so that nothing that follows can lose it
    # The frozen parts as they were shipped, not as this run cast them.
    components = changed | replaced_components(args, configs) | dict(trainee.parts)
    source = pipeline_source(args, configs) | components
    pipeline = configs.family.pipeline_class.from_pretrained(args.pretrained_model_name_or_path, **source)
    if classes:  # which the pipeline reads from its index, but would not write there
        pipeline.register_to_config(id2label={str(label): name for label, name in sorted(classes.items())})
    pipeline.save_pretrained(args.output_dir)


@torch.no_grad()
def losses_on(
    held_out: TrainingImages, losses: Losses, trainee: Trainee, ema: EMAModel | None, accelerator: Accelerator
) -> dict[str, float]:
    """Both terms on the held-out samples, unweighted, under the EMA's weights where there are any."""
    losses = replace(losses, args=Namespace(**vars(losses.args) | HELD_OUT))
    sums = torch.zeros(3, device=accelerator.device)
    trainee.eval()
    with averaged(ema, trainee):
        for batch in held_out_batches(
            held_out, losses.args.train_batch_size, accelerator.process_index, accelerator.num_processes
        ):
            terms = losses(trainee, batch, with_lpl=True)
            sums += torch.stack([terms.diffusion_loss, terms.lpl, torch.ones_like(terms.lpl)]) * len(terms.errors)
    trainee.train()
    diffusion_loss, lpl, count = accelerator.reduce(sums, "sum").tolist()
    return {"validation_loss": diffusion_loss / count, "validation_lpl": lpl / count}


def rows_inside(sigma: Tensor, threshold: float) -> Tensor:
    """Indices of the samples that LPL applies to: sigma_t finite and at most tau, (B,) -> (n,) (Eq. 2)."""
    return (sigma.isfinite() & (sigma <= threshold)).nonzero().flatten()


def subset(rows: Tensor, choice: Tensor, size: int | None) -> Tensor:
    """At most so many of the rows, (n,) -> (m,), each subset as likely as any other; None = all.

    Args:
        choice: a uniformly random number for each sample of the batch, (B,); the smallest win.
    """
    return rows[choice[rows].argsort()[:size].sort().values]


def random_window(side: int, part: int, choice: Tensor) -> tuple[int, int, int, int]:
    """One of the tiles with sides of ``part`` that latents with sides of ``side`` fall into, each as likely as any
    other: (top, left, height, width).

    Args:
        choice: a uniformly random number, ().

    >>> random_window(8, 2, torch.tensor(0.4))  # the 7th of 16
    (2, 4, 2, 2)
    """
    count = side // part
    row, column = divmod(int(float(choice) * count**2), count)
    return row * part, column * part, part, part


def diffusion_weight(objective: Objective, timesteps: Tensor, args: Namespace) -> Tensor | float:
    """The weight of each sample's diffusion loss, (B,); it weighs that term only."""
    if not isinstance(objective, DiffusionObjective):
        return objective.scheme_weight(timesteps, args.weighting_scheme or "none").float()
    return 1.0 if args.snr_gamma is None else objective.min_snr_weight(timesteps, args.snr_gamma).float()


def dream_shift(
    objective: Objective, model_output: Tensor, noise: Tensor, timesteps: Tensor, args: Namespace
) -> Tensor:
    """What DREAM adds to the noise, (B, C, h, w): the model's own error, times b_t^p (Zhou et al., Sec. 3)."""
    _, b = objective.coefficients(timesteps)
    scale = expand(b**args.dream_detail_preservation, noise)
    return scale * (noise - model_output.float())


def trainee_of(model: nn.Module) -> Trainee:
    """Without what accelerate has wrapped around it."""
    return getattr(model, "module", model)


if __name__ == "__main__":
    main()
