"""All flags of the training script, their defaults, and whatever can be checked before anything is loaded.

Names, meanings and defaults are those of diffusers' training scripts wherever one of those has the flag. Checks come
in two rounds: :func:`check_arguments` needs nothing but the command line, :func:`check_pipeline` the pipeline's small
configuration files. Each refusal is one sentence: what was given, what is accepted, which flag to change.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline

from lpl.autoencoders import block_names, select_blocks
from lpl.checkpoints import find_resumable
from lpl.data import INTERPOLATION_MODES, first_line, local_folder_problem
from lpl.families import Family, find_family
from lpl.loss import DEPTH_WEIGHTINGS, DISTANCES, NORMALIZATIONS, VARIANTS, check_options
from lpl.objectives import OBJECTIVES, WEIGHTING_SCHEMES, FlowMatching, is_flow, own_objective
from lpl.weighting import parse_weight


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRACKERS = ("tensorboard", "wandb")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
EMA_DECAY, EMA_DECAY_WITH_LPL = 0.9999, 0.99975  # Sec. 4.3, "Impact on EMA"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (all flags: --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Fine-tune a latent diffusion model on captioned images with the latent perceptual loss.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", metavar="PATH", help="pipeline to fine-tune: a folder or an id on the Hub")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of the weight files, e.g. fp16")
    add("--cache_dir", help="where downloaded models and data sets are kept")
    add("--max_sequence_length", type=int, default=77, help="tokens of a caption that SD3's T5 is given")
    add(
        "--prediction_type",
        choices=tuple(OBJECTIVES),
        help="what the denoiser is trained to predict; default: what the pipeline was trained on",
    )

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="data set on the Hub, or a folder that load_dataset understands")
    add("--dataset_config_name", help="configuration of that data set")
    add("--train_data_dir", help="folder of images with a metadata.jsonl (file_name, text)")
    add("--image_column", default="image", help="column with the images")
    add("--caption_column", default="text", help="column with a caption, or a list of them to draw from")
    add("--max_train_samples", type=int, help="train on so many images at most, drawn by the seed")
    add("--resolution", type=int, help="side of the square training images in pixels; default: the family's")
    add("--center_crop", action="store_true", help="crop the centre instead of a random square")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="lanczos",
        help="how images are resized",
    )
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions that are left empty")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images; 0 = the main process")

    add = parser.add_argument_group("latent perceptual loss").add_argument
    add(
        "--lpl_weight",
        default="auto:0.2",
        help="auto:SHARE finds the weight that gives LPL that share of the loss; a number is the weight; 0 is off",
    )
    add("--lpl_measuring_steps", type=int, default=50, help="first steps with LPL, over which its share is measured")
    add("--lpl_blocks", nargs="+", help="decoder blocks to compare: mid up_0 up_1 ..., or rgb alone; default: all")
    add("--lpl_sigma_threshold", type=float, default=3.0, help="noise-to-signal ratio up to which LPL applies")
    add(
        "--lpl_threshold_base_resolution",
        type=int,
        default=256,
        help="resolution that the threshold is stated for; it grows with the side; 0 = use it as it is",
    )
    add("--lpl_normalization", choices=NORMALIZATIONS, default="shared", help="whose statistics standardise features")
    add("--lpl_detach_statistics", action="store_true", help="no gradient through those statistics")
    add(
        "--lpl_depth_weighting",
        nargs="+",
        default=["inverse"],
        help=f"one of {', '.join(DEPTH_WEIGHTINGS)}, or one number per block",
    )
    add("--lpl_no_outlier_mask", action="store_true", help="do not mask outliers of the decoder's features")
    add("--lpl_distance", choices=DISTANCES, default="l2", help="squared or absolute difference of features")
    add(
        "--lpl_variant", choices=VARIANTS, default="paper", help="reference: the numbers of the authors' released code"
    )
    add("--lpl_start_step", type=int, default=0, help="first optimizer step with LPL")
    add("--lpl_ramp_steps", type=int, default=0, help="steps over which its weight then grows to its full value")
    add(
        "--lpl_gradient_checkpointing", action="store_true", help="recompute decoder blocks in backward to save memory"
    )
    add(
        "--lpl_vae_dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="precision of the decoder that LPL looks through",
    )
    add(
        "--lpl_vae_name_or_path",
        help="another VAE with the same latent space to look through; default: the pipeline's",
    )

    add = parser.add_argument_group("diffusion loss").add_argument
    add("--snr_gamma", type=float, help="gamma of min-SNR weighting; 5.0 is its paper's; not for flow matching")
    add("--noise_offset", type=float, default=0.0, help="scale of a noise that is equal over a whole channel")
    add("--input_perturbation", type=float, default=0.0, help="scale of noise added to the denoiser's input only")
    add(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="flow matching: density of timesteps and weight of the loss; default: logit_normal",
    )
    add(
        "--precondition_outputs",
        type=int,
        choices=(0, 1),
        default=0,
        help="flow matching: 1 takes the error of the estimated clean latent instead of the velocity's",
    )
    add("--logit_mean", type=float, default=0.0, help="mean of the logit_normal density")
    add("--logit_std", type=float, default=1.0, help="standard deviation of the logit_normal density")
    add("--mode_scale", type=float, default=1.29, help="scale of the mode density")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=16, help="images per process and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps in all")
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warm-up")
    add("--scale_lr", action="store_true", help="multiply it by processes, micro-batches and batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up, for schedules that have one")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of the polynomial schedule")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of AdamW's second moment")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="norm that gradients are clipped to; 0 = no clipping")
    add("--use_ema", action="store_true", help="keep and save an exponential moving average of the weights")
    add("--ema_decay", type=float, help=f"its decay; default: {EMA_DECAY_WITH_LPL} with LPL, {EMA_DECAY} without")
    add("--foreach_ema", action="store_true", help="faster EMA by fused updates")
    add("--offload_ema", action="store_true", help="keep the EMA in the CPU's memory between updates")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's configuration")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")
    add("--gradient_checkpointing", action="store_true", help="recompute the denoiser's activations to save memory")
    add("--seed", type=int, help="seed of everything random; default: drawn and written down")

    add = parser.add_argument_group("validation and logging").add_argument
    add("--validation_prompt", help="prompt to sample --num_validation_images images of")
    add("--validation_prompts", nargs="+", help="prompts to sample an image of each")
    add("--num_validation_images", type=int, default=4, help="images of the --validation_prompt")
    add("--validation_epochs", type=int, default=5, help="sample every so many epochs")
    add("--validation_steps", type=int, help="sample every so many optimizer steps instead")
    add("--validation_inference_steps", type=int, default=25, help="sampling steps of validation images")
    add("--validation_guidance_scale", type=float, help="their guidance scale; default: the pipeline's")
    add("--report_to", default="tensorboard", help=f"{', '.join(TRACKERS)}, all or none")
    add("--tracker_project_name", default="text2image-fine-tune", help="project name in the tracker")
    add("--logging_dir", default="logs", help="the trackers' folder within --output_dir")
    add("--logging_steps", type=int, default=10, help="optimizer steps between two log entries")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="sd-model-finetuned", help="where checkpoints, samples and the pipeline go")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between two checkpoints")
    add("--checkpoints_total_limit", type=int, help="keep so many checkpoints")
    add("--resume_from_checkpoint", help='a checkpoint\'s folder, or "latest"')
    add("--push_to_hub", action="store_true", help="publish pipeline, samples and model card at the end")
    add("--hub_model_id", help="repository to publish to; default: the name of --output_dir")
    add("--hub_token", help="token for it; a login or the environment is safer")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked command line; ends the process with one sentence where it cannot be run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.given = {action.dest for action in parser._actions if getattr(args, action.dest, None) != action.default}
    args.lpl_depth_weighting = _depth_weighting(args.lpl_depth_weighting)
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    args.use_lpl = parse_weight(args.lpl_weight) != (0.0, None)
    if args.ema_decay is None:
        args.ema_decay = EMA_DECAY_WITH_LPL if args.use_lpl else EMA_DECAY
    if args.validation_prompts is None and args.validation_prompt is not None:
        args.validation_prompts = [args.validation_prompt] * args.num_validation_images
    return args


def _depth_weighting(words: Sequence[str]) -> str | list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return " ".join(words)


POSITIVE = [
    "resolution",
    "max_train_samples",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "lr_num_cycles",
    "validation_epochs",
    "validation_steps",
    "validation_inference_steps",
    "num_validation_images",
    "logging_steps",
    "lpl_measuring_steps",
    "max_sequence_length",
    "learning_rate",
    "adam_epsilon",
    "snr_gamma",
    "logit_std",
    "lpl_sigma_threshold",
]
NOT_NEGATIVE = [
    "lpl_threshold_base_resolution",
    "lpl_start_step",
    "lpl_ramp_steps",
    "dataloader_num_workers",
    "lr_warmup_steps",
    "noise_offset",
    "input_perturbation",
    "adam_weight_decay",
    "max_grad_norm",
    "seed",
]
SHARES = ["ema_decay", "proportion_empty_prompts"]
DECAYS = ["adam_beta1", "adam_beta2"]


def check_arguments(args: argparse.Namespace) -> None:
    """Whatever the command line alone tells to be wrong.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    _check_ranges(args)
    _check_sources(args)
    _check_lpl(args)
    _check_machine(args)
    if args.validation_prompt is not None and args.validation_prompts is not None:
        raise ValueError("--validation_prompt and --validation_prompts exclude one another; give one of them")
    if args.ema_decay is not None and not args.use_ema:
        raise ValueError("--ema_decay has no effect without --use_ema; add it or leave both out")
    if args.hub_model_id and not args.push_to_hub:
        raise ValueError("--hub_model_id has no effect without --push_to_hub; add it or leave both out")
    _warn_of_idle_flags(
        args,
        {
            "offload_ema": args.use_ema,
            "foreach_ema": args.use_ema,
            "hub_token": args.push_to_hub,
            "num_validation_images": args.validation_prompt is not None,
            "validation_steps": args.validation_prompt is not None or args.validation_prompts,
            "validation_epochs": args.validation_prompt is not None or args.validation_prompts,
            "lr_power": args.lr_scheduler == "polynomial",
            "lr_num_cycles": args.lr_scheduler == "cosine_with_restarts",
            "lr_warmup_steps": args.lr_scheduler != "constant",
            "lpl_start_step": args.max_train_steps is None or args.lpl_start_step < args.max_train_steps,
        },
    )
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    if Path(args.output_dir).resolve() == Path(args.pretrained_model_name_or_path).resolve():
        raise ValueError(f"--output_dir {args.output_dir}: this is the pipeline to start from; give another folder")
    if args.resume_from_checkpoint not in (None, "latest"):
        find_resumable(args.output_dir, args.resume_from_checkpoint)


def warn(message: str) -> None:
    """A warning that names the flag, not a line of this file."""
    warnings.warn(message, stacklevel=3)


def _warn_of_idle_flags(args: argparse.Namespace, has_effect: Mapping[str, Any]) -> None:
    """Say so where a flag is given that does nothing in this run; ``has_effect`` by the flag's name."""
    for name, effective in has_effect.items():
        if name in args.given and not effective:
            warn(f"--{name} has no effect in this run")


def _check_ranges(args: argparse.Namespace) -> None:
    rules = (
        (POSITIVE, lambda value: 0 < value < math.inf, "more than 0"),
        (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
        (SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (DECAYS, lambda value: 0 <= value < 1, "0 or more and less than 1"),
    )
    for names, accepted, words in rules:
        for name in names:
            value = getattr(args, name)
            if value is not None and not accepted(value):
                raise ValueError(f"--{name} {value}: it must be {words}")


def _check_sources(args: argparse.Namespace) -> None:
    if not args.pretrained_model_name_or_path:
        raise ValueError("--pretrained_model_name_or_path is missing: a folder with a pipeline, or its id on the Hub")
    if bool(args.dataset_name) == bool(args.train_data_dir):
        given = "both are given" if args.dataset_name else "neither is given"
        raise ValueError(f"one of --dataset_name and --train_data_dir is needed, but {given}")
    if args.dataset_config_name and not args.dataset_name:
        raise ValueError("--dataset_config_name has no effect without --dataset_name; leave it out")
    if args.train_data_dir and (problem := local_folder_problem(args.train_data_dir, args.caption_column)):
        raise ValueError(problem)


def _check_lpl(args: argparse.Namespace) -> None:
    weight, _ = parse_weight(args.lpl_weight)
    changed = sorted(name for name in args.given if name.startswith("lpl_") and name != "lpl_weight")
    if weight == 0 and changed:
        raise ValueError(f"--lpl_weight 0 turns the loss off, so --{changed[0]} has no effect; leave one of them out")
    check_options(*loss_options(args).values(), args.lpl_blocks)


def loss_options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are options of the loss, by its names, in the order of :func:`lpl.loss.check_options`."""
    return {
        "normalization": args.lpl_normalization,
        "detach_statistics": args.lpl_detach_statistics,
        "depth_weighting": args.lpl_depth_weighting,
        "mask_outliers": not args.lpl_no_outlier_mask,
        "distance": args.lpl_distance,
        "variant": args.lpl_variant,
    }


def _check_machine(args: argparse.Namespace) -> None:
    """What this machine and its packages can do."""
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    if args.report_to not in (*TRACKERS, "all", "none"):
        raise ValueError(f"--report_to {args.report_to}: accepted are {', '.join(TRACKERS)}, all and none")
    if args.report_to in TRACKERS and importlib.util.find_spec(args.report_to) is None:
        raise ValueError(f"--report_to {args.report_to}: pip install {args.report_to}, or choose --report_to none")
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    half = args.mixed_precision == "fp16" or args.lpl_vae_dtype == "float16"
    if half and not cuda:
        flag = "--mixed_precision fp16" if args.mixed_precision == "fp16" else "--lpl_vae_dtype float16"
        raise ValueError(f"{flag} needs a GPU, and this machine has none; use bf16 or full precision")
    if args.allow_tf32 and not cuda:
        warn("--allow_tf32 has no effect without a GPU")


@dataclass(frozen=True)
class PipelineConfigs:
    """The small configuration files of a pipeline, read before its weights."""

    family: type[Family]
    vae: Mapping[str, Any]
    denoiser: Mapping[str, Any]
    scheduler: Any  # a scheduler is its configuration
    absent: Mapping[str, None]  # components that this pipeline does without, such as SD3's T5


def read_pipeline_configs(args: argparse.Namespace) -> PipelineConfigs:
    """Family and configurations of --pretrained_model_name_or_path.

    Raises:
        ValueError: where it is no pipeline, or one of a family that is not supported.
    """
    path = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        index = DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: no pipeline is found there, neither a folder with a "
            f"model_index.json nor a repository on the Hub that can be reached ({first_line(error)}); if "
            "it is gated or private, accept its licence on its page and run hf auth login"
        ) from error
    family = find_family(index.get("_class_name"))
    components = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple)}
    absent = dict.fromkeys(name for name, entry in components.items() if tuple(entry) == (None, None))
    absent |= dict.fromkeys(name for name in family.optional_components if name not in components)
    library, scheduler_class = index.get("scheduler", (None, None))
    if library != "diffusers" or not hasattr(diffusers, scheduler_class):
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: this version of diffusers has no scheduler {scheduler_class}"
        )
    vae, denoiser, scheduler = (
        _component_config(path, name, **where) for name in ("vae", family.denoiser_name, "scheduler")
    )
    return PipelineConfigs(
        family=family,
        vae=vae,
        denoiser=denoiser,
        scheduler=getattr(diffusers, scheduler_class).from_config(scheduler),
        absent=absent,
    )


def _component_config(path: str, name: str, **where: str | None) -> Mapping[str, Any]:
    reader = DDIMScheduler if name == "scheduler" else AutoencoderKL  # each knows its file's name, for any class
    try:
        return reader.load_config(path, subfolder=name, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: the pipeline has no {name} whose configuration can be read"
        ) from error


def check_pipeline(args: argparse.Namespace, configs: PipelineConfigs) -> None:
    """Fill in the defaults that depend on the pipeline, and check the flags against it.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    own = own_objective(configs.scheduler)
    if args.prediction_type is None:
        args.prediction_type = own
    if args.prediction_type not in OBJECTIVES:
        raise ValueError(
            f"the pipeline's scheduler predicts {own!r}; give --prediction_type, one of {', '.join(OBJECTIVES)}"
        )
    if args.prediction_type != own:
        warn(
            f"--prediction_type {args.prediction_type}: the pipeline was trained on {own}, so it has to learn anew "
            "what its output means; expect a long training"
        )
    flow = args.prediction_type == FlowMatching.name
    if flow and args.snr_gamma is not None:
        raise ValueError(
            "--snr_gamma is for epsilon, v_prediction and sample; for flow_matching use --weighting_scheme"
        )
    if not flow and args.weighting_scheme is not None:
        raise ValueError(f"--weighting_scheme is for flow_matching; for {args.prediction_type} use --snr_gamma")
    args.weighting_scheme = args.weighting_scheme or ("logit_normal" if flow else "none")
    if flow and is_flow(configs.scheduler) and configs.scheduler.config.get("use_dynamic_shifting"):
        warn("the pipeline's flow shift depends on the image's size; training uses none")
    limit = configs.family.max_sequence_length
    _warn_of_idle_flags(
        args,
        {
            "max_sequence_length": limit is not None,
            "logit_mean": args.weighting_scheme == "logit_normal",
            "logit_std": args.weighting_scheme == "logit_normal",
            "mode_scale": args.weighting_scheme == "mode",
        },
    )
    if limit is not None and args.max_sequence_length > limit:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: this pipeline takes {limit} at most")
    if args.precondition_outputs and not flow:
        raise ValueError(f"--precondition_outputs is for flow_matching, not for {args.prediction_type}; leave it out")
    if (vae_class := configs.vae.get("_class_name")) != AutoencoderKL.__name__:
        raise ValueError(
            f"--pretrained_model_name_or_path: the pipeline's VAE is {vae_class}; supported: AutoencoderKL"
        )
    _check_resolution(args, configs)
    if args.use_lpl:
        names = select_blocks(args.lpl_blocks, block_names(_feature_vae_config(args, configs.vae)))
        check_options(*loss_options(args).values(), names)


def _feature_vae_config(args: argparse.Namespace, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the VAE that LPL looks through."""
    path = args.lpl_vae_name_or_path
    if path is None:
        return own
    try:
        config = AutoencoderKL.load_config(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--lpl_vae_name_or_path {path}: no autoencoder is found there") from error
    if config.get("latent_channels") != own["latent_channels"]:
        raise ValueError(
            f"--lpl_vae_name_or_path {path}: its latents have {config.get('latent_channels')} channels and the "
            f"pipeline's {own['latent_channels']}; it must have the same latent space"
        )
    return config


def _check_resolution(args: argparse.Namespace, configs: PipelineConfigs) -> None:
    family, parts = configs.family, {"vae": configs.vae, configs.family.denoiser_name: configs.denoiser}
    if args.resolution is None:
        args.resolution = family.default_resolution
    multiple, largest = family.resolution_multiple(parts), family.max_resolution(parts)
    if args.resolution % multiple:
        below = args.resolution // multiple * multiple
        raise ValueError(
            f"--resolution {args.resolution}: this pipeline takes multiples of {multiple}, "
            f"such as {below or multiple} or {below + multiple}"
        )
    if largest is not None and args.resolution > largest:
        raise ValueError(f"--resolution {args.resolution}: this pipeline takes {largest} at most")
