"""Whatever can be checked about the flags before anything is loaded, and the defaults that depend on the pipeline.

Two rounds: :func:`check_arguments` needs nothing but the command line, :func:`check_pipeline` the pipeline's small
configuration files too. Each refusal is one sentence: what was given, what is accepted, which flag to change. What was
given and does nothing is warned of. ``args.given`` holds the names of the flags that were really given.
"""

from __future__ import annotations

import importlib.util
import math
import os
import reprlib
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import nn

from lpl import lora
from lpl.autoencoders import RGB, SUPPORTED, decoder_blocks, downscaling_factor, latent_channels, skeleton
from lpl.bad_samples import parse_limit
from lpl.checkpoints import find_resumable
from lpl.data import first_line, image_files, shard_files
from lpl.evaluation import CLIP_SCORE, METRICS, MOST_BY_DEFAULT, NEAREST_K, SET_METRICS, check_libraries
from lpl.families import FAMILIES, Family, find_family
from lpl.loss import check_options
from lpl.objectives import (
    OBJECTIVES,
    DiffusionObjective,
    Epsilon,
    FlowMatching,
    get_objective,
    is_flow,
    own_objective,
    training_scheduler,
)
from lpl.outliers import MASK_DEFAULTS, MASK_RANGES
from lpl.trust import check_components, check_weights
from lpl.weighting import parse_weight


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# VAEs that the families' pipelines can sample with; LPL looks through more
PIPELINE_VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "VQModel", "AutoencoderDC")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio")
OPTIMIZERS = ("AdamW", "prodigy")


def warn(message: str) -> None:
    """A warning that names the flag, not a line of this file."""
    warnings.warn(message, stacklevel=3)


def warn_of_idle_flags(args: Namespace, has_effect: Mapping[str, Any]) -> None:
    """Say so where a flag is given that does nothing in this run; ``has_effect`` by the flag's name."""
    for name, effective in has_effect.items():
        if name in args.given and not effective:
            warn(f"--{name} has no effect in this run")


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def has_gpu() -> bool:
    """Whether accelerate will run on one."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


# The command line alone ----------------------------------------------------------------------------------------------

POSITIVE = [
    "resolution",
    "max_train_samples",
    "shuffle_buffer_size",
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "lr_num_cycles",
    "validation_epochs",
    "validation_steps",
    "eval_steps",
    "eval_num_images",
    "eval_batch_size",
    "validation_inference_steps",
    "num_validation_images",
    "num_validation_samples",
    "logging_steps",
    "lpl_measuring_steps",
    "lpl_every",
    "lpl_max_samples",
    "lpl_crop",
    "lpl_chunk_size",
    "max_sequence_length",
    "learning_rate",
    "text_encoder_lr",
    "adam_epsilon",
    "snr_gamma",
    "logit_std",
    "lpl_sigma_threshold",
    "rank",
    "lora_alpha",
    "timestep_bias_multiplier",
    "timestep_bias_end",
    "lpl_t_threshold",
]
NOT_NEGATIVE = [
    "lpl_num_blocks",
    "lpl_threshold_base_resolution",
    "lpl_start_step",
    "lpl_ramp_steps",
    "dataloader_num_workers",
    "dataloader_timeout",
    "lr_warmup_steps",
    "input_perturbation",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
    "max_grad_norm",
    "max_skipped_steps",
    "seed",
    "guidance_scale",
    "dream_detail_preservation",
    "timestep_bias_begin",
    "lpl_start",
]
SHARES = ["ema_decay", "proportion_empty_prompts"]
BELOW_ONE = ["adam_beta1", "adam_beta2", "prodigy_beta3", "lora_dropout"]
MOST = {"lpl_num_blocks": 100, "num_validation_images": 10_000, "max_train_steps": 10_000_000}  # lists are that long
RULES = (
    (POSITIVE, lambda value: 0 < value < math.inf, "more than 0"),
    (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more"),
    (SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
    (BELOW_ONE, lambda value: 0 <= value < 1, "0 or more and less than 1"),
    (["timestep_bias_portion"], lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    *(([f"lpl_outlier_{name}"], *accepted) for name, accepted in MASK_RANGES.items()),
    (["validation_every_nth"], lambda value: value >= 2, "2 or more"),
    *(([name], lambda value, most=most: value <= most, f"at most {most:,}") for name, most in MOST.items()),
)


def check_ranges(args: Namespace) -> None:
    """Refuse numbers that are out of their range.

    Raises:
        ValueError: with the flag, its value, and what is accepted.
    """
    for names, accepted, words in RULES:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not accepted(value):
                finite = "" if math.isfinite(value) else "a finite number, "
                raise ValueError(f"--{name} {value}: it must be {finite}{words}")


def check_arguments(args: Namespace) -> None:
    """Whatever the command line alone tells to be wrong.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    for name in PLACES:
        _check_place(name, getattr(args, name))
    _check_sources(args)
    _check_lora(args)
    _check_lpl(args)
    _check_optimizer(args)
    _check_machine(args)
    _check_validation(args)
    _check_evaluation(args)
    _check_output(args)
    if args.timestep_bias_begin >= args.timestep_bias_end:
        raise ValueError(
            f"--timestep_bias_begin {args.timestep_bias_begin}: it must be less than --timestep_bias_end, "
            f"which is {args.timestep_bias_end}"
        )
    from_folder = Path(args.pretrained_model_name_or_path).is_dir()
    warn_of_idle_flags(
        args,
        {
            "revision": not from_folder,
            "non_ema_revision": not from_folder,
            "ema_decay": args.use_ema,
            "offload_ema": args.use_ema,
            "foreach_ema": args.use_ema,
            "lr_power": args.lr_scheduler == "polynomial",
            "lr_num_cycles": args.lr_scheduler == "cosine_with_restarts",
            "lr_warmup_steps": args.lr_scheduler != "constant" or args.lr_warmup_steps == 0,
            "dream_detail_preservation": args.dream_training,
            "timestep_bias_multiplier": args.timestep_bias_strategy != "none",
            "timestep_bias_portion": args.timestep_bias_strategy in ("earlier", "later"),
            "timestep_bias_begin": args.timestep_bias_strategy == "range",
            "timestep_bias_end": args.timestep_bias_strategy == "range",
        },
    )


PLACES = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "lpl_vae_name_or_path", "dataset_name"),
    *("train_data_dir", "eval_data_dir", "cache_dir", "output_dir", "logging_dir", "resume_from_checkpoint"),
)


def _check_place(name: str, place: str | None) -> None:
    """Refuse one at which nothing can be, not even be looked for: a name that is too long, a forbidden folder."""
    try:
        os.stat(place or ".")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass  # it is no file
    except OSError as error:
        raise ValueError(f"--{name} {reprlib.repr(place)}: {error.strerror}") from error


def _check_sources(args: Namespace) -> None:
    parse_limit(args.max_bad_samples)
    if not args.pretrained_model_name_or_path:
        raise ValueError("--pretrained_model_name_or_path is missing: a folder with a pipeline, or its id on the Hub")
    if not args.dataset_name and not args.train_data_dir:
        raise ValueError("--dataset_name or --train_data_dir is needed, but neither is given")
    if args.dataset_config_name and not args.dataset_name:
        raise ValueError("--dataset_config_name has no effect without --dataset_name; leave it out")
    if not args.dataset_name and not Path(args.train_data_dir).is_dir():
        raise ValueError(f"--train_data_dir {args.train_data_dir}: there is no such folder")
    if args.streaming:
        _check_streaming(args)
    elif not args.dataset_name and not image_files(args.train_data_dir):
        raise ValueError(f"--train_data_dir {args.train_data_dir}: the folder has no images")
    warn_of_idle_flags(args, {"shuffle_buffer_size": args.streaming and args.max_train_samples is None})
    if args.from_scratch and args.non_ema_revision:
        raise ValueError("--from_scratch loads no weights, so --non_ema_revision has no effect; leave one of them out")


def _check_streaming(args: Namespace) -> None:
    """What needs the number of images, which only --max_train_samples tells."""
    if not args.dataset_name:
        shard_files(args.train_data_dir)
    if args.max_train_samples is not None:
        return
    if args.max_train_steps is None:
        raise ValueError("--streaming: how many images an epoch has is not known; give --max_train_steps")
    validated = args.validation_prompt is not None or args.validation_prompts or holds_out(args)
    if validated and args.validation_steps is None:
        raise ValueError(
            "--streaming: how many steps an epoch of --validation_epochs has is not known; give --validation_steps"
        )
    if 0 < (parse_limit(args.max_bad_samples) or 0) < 1:
        raise ValueError(
            f"--max_bad_samples {args.max_bad_samples}: how many images --streaming has is not known, so a share has "
            "no meaning; give a number"
        )


LORA_OPTIONS = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora", "quantize_base")


def _check_lora(args: Namespace) -> None:
    if not args.lora and args.rank is None:
        for name in LORA_OPTIONS:
            if name in args.given:
                raise ValueError(f"--{name} is for LoRA; add --lora or --rank, or leave it out")
    elif args.from_scratch:
        raise ValueError("--from_scratch trains every weight anew, which LoRA cannot; leave out --lora and --rank")
    if args.use_dora and args.train_text_encoder:
        warn("--use_dora is for the denoiser; the text encoders get LoRA, since diffusers loads no DoRA there")
    if args.quantize_base is None:
        return
    if args.train_text_encoder:
        raise ValueError("--quantize_base goes without --train_text_encoder; leave one of them out")
    if missing("bitsandbytes"):
        raise ValueError("--quantize_base needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    if not has_gpu():
        raise ValueError(f"--quantize_base {args.quantize_base} needs a GPU, and this machine has none; leave it out")


def _check_lpl(args: Namespace) -> None:
    weight, _ = parse_weight(args.lpl_weight)
    if weight == 0 and (idle := idle_without_lpl(args.given, holds_out(args))):
        raise ValueError(f"--lpl_weight 0 turns the loss off, so --{idle[0]} has no effect; leave one of them out")
    _check_loss_options(args, args.lpl_blocks)
    masks = not args.lpl_no_outlier_mask
    warn_of_idle_flags(
        args,
        {f"lpl_outlier_{name}": masks for name in MASK_DEFAULTS}
        | {
            "lpl_max_samples": (args.lpl_max_samples or 0) < args.train_batch_size,
            "lpl_chunk_size": (args.lpl_chunk_size or 0) < args.train_batch_size,
        },
    )


def _check_loss_options(args: Namespace, blocks: Sequence[str] | None) -> None:
    options = loss_options(args)
    outliers = options.pop("outliers", {})
    options.pop("chunk_size", None)
    check_options(**options, blocks=blocks)
    if outliers and args.lpl_variant == "reference":
        raise ValueError(
            f"--lpl_variant reference has masks of its own; leave out --lpl_outlier_{next(iter(outliers))}, or use "
            "--lpl_variant paper"
        )


def idle_without_lpl(names: Iterable[str], measured: bool) -> list[str]:
    """Those flags that do nothing where LPL is not trained on.

    Args:
        measured: whether a validation loss takes LPL all the same.
    """
    training = (
        *("lpl_measuring_steps", "lpl_start_step", "lpl_ramp_steps", "lpl_gradient_checkpointing", "lpl_start"),
        *("lpl_every", "lpl_max_samples", "lpl_crop"),
    )
    flags = (name for name in names if name.startswith("lpl_") and name != "lpl_weight")
    return sorted(name for name in flags if not measured or name in training)


def holds_out(args: Namespace) -> bool:
    """Whether a part of the data is for the validation loss only."""
    return args.validation_split is not None or args.validation_every_nth is not None


def loss_options(args: Namespace) -> dict[str, Any]:
    """The flags that are options of the loss, by its names; of masks and memory only what is not the default."""
    outliers = {name: getattr(args, f"lpl_outlier_{name}") for name in MASK_DEFAULTS}
    if args.lpl_no_outlier_mask:
        outliers.clear()
    outliers = {name: value for name, value in outliers.items() if value != MASK_DEFAULTS[name]}
    cost = {"outliers": outliers, "chunk_size": args.lpl_chunk_size}
    return {
        "normalization": args.lpl_normalization,
        "detach_statistics": args.lpl_detach_statistics,
        "depth_weighting": args.lpl_depth_weighting,
        "mask_outliers": not args.lpl_no_outlier_mask,
        "distance": args.lpl_distance,
        "variant": args.lpl_variant,
    } | {name: value for name, value in cost.items() if value}


def _check_optimizer(args: Namespace) -> None:
    if args.optimizer.lower() not in (name.lower() for name in OPTIMIZERS):
        raise ValueError(f"--optimizer {args.optimizer}: accepted are {' and '.join(OPTIMIZERS)}")
    if args.use_8bit_adam and missing("bitsandbytes"):
        raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave the flag out")
    prodigy = args.optimizer.lower() == "prodigy"
    if prodigy:
        _check_prodigy(args)
    options = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")
    warn_of_idle_flags(args, dict.fromkeys(options, prodigy))


def _check_prodigy(args: Namespace) -> None:
    if args.use_8bit_adam:
        raise ValueError("--use_8bit_adam is another optimizer than --optimizer prodigy; leave one of them out")
    if missing("prodigyopt"):
        raise ValueError("--optimizer prodigy needs prodigyopt: pip install prodigyopt, or leave the flag out")
    if args.text_encoder_lr not in (None, args.learning_rate):
        raise ValueError(
            f"--text_encoder_lr {args.text_encoder_lr}: --optimizer prodigy has one learning rate for all; "
            "leave it out"
        )
    if args.learning_rate <= 0.1:
        warn(
            f"--learning_rate {args.learning_rate} is small for --optimizer prodigy, which finds the step size by "
            "itself and takes this as a factor on it; 1.0 is usual"
        )


def _check_machine(args: Namespace) -> None:
    """What this machine and its packages can do."""
    if args.report_to not in (*TRACKERS, "all", "none"):
        raise ValueError(f"--report_to {args.report_to}: accepted are {', '.join(TRACKERS)}, all and none")
    if args.report_to in TRACKERS and missing(args.report_to):
        raise ValueError(f"--report_to {args.report_to}: pip install {args.report_to}, or choose --report_to none")
    half = args.mixed_precision == "fp16" or args.lpl_vae_dtype == "float16"
    if half and not has_gpu():
        flag, others = (
            ("--mixed_precision fp16", "bf16 or no")
            if args.mixed_precision == "fp16"
            else ("--lpl_vae_dtype float16", "bfloat16 or float32")
        )
        raise ValueError(f"{flag} needs a GPU, and this machine has none; use {others}")
    if args.allow_tf32 and not has_gpu():
        warn("--allow_tf32 has no effect without a GPU")


def _check_validation(args: Namespace) -> None:
    if args.validation_prompt is not None and args.validation_prompts is not None:
        raise ValueError("--validation_prompt and --validation_prompts exclude one another; give one of them")
    if args.validation_split is not None and args.validation_every_nth is not None:
        raise ValueError("--validation_split and --validation_every_nth exclude one another; give one of them")
    if args.validation_split is not None and not args.dataset_name:
        raise ValueError(
            "--validation_split names a split of --dataset_name; with --train_data_dir use --validation_every_nth"
        )
    if args.validation_split == "train":
        raise ValueError("--validation_split train: that is what is trained on; name another split")
    samples = args.validation_prompt is not None or bool(args.validation_prompts)
    warn_of_idle_flags(
        args,
        {
            "num_validation_images": args.validation_prompt is not None,
            "num_validation_samples": holds_out(args),
            "validation_steps": samples or holds_out(args),
            "validation_epochs": samples or holds_out(args),
        },
    )


EVAL_FLAGS = ("eval_data_dir", "eval_metrics", "eval_features", "eval_clip", "eval_num_images", "eval_batch_size")


def _check_evaluation(args: Namespace) -> None:
    warn_of_idle_flags(args, dict.fromkeys(EVAL_FLAGS, args.eval_steps is not None))
    if args.eval_steps is None:
        return
    if args.eval_data_dir is None:
        raise ValueError("--eval_steps compares with real images: give their folder by --eval_data_dir")
    if not image_files(args.eval_data_dir):
        raise ValueError(f"--eval_data_dir {args.eval_data_dir}: there is no such folder, or it has no images")
    if unknown := [name for name in args.eval_metrics if name not in METRICS]:
        raise ValueError(f"--eval_metrics {' '.join(unknown)}: accepted are {', '.join(METRICS)}")
    check_libraries("--eval_steps")
    from lpl.evaluation.metrics import check_counts
    from lpl.evaluation.networks import check_networks, wanted_networks

    warn_of_idle_flags(
        args,
        {
            "eval_features": any(name in SET_METRICS for name in args.eval_metrics),
            "eval_clip": CLIP_SCORE in args.eval_metrics,
        },
    )
    real = len(image_files(args.eval_data_dir))
    drawn = args.eval_num_images or min(real, MOST_BY_DEFAULT)
    check_counts(args.eval_metrics, drawn, real, NEAREST_K, "--eval_")
    check_networks(wanted_networks(args.eval_metrics, args.eval_features, args.eval_clip, "--eval_"), args.cache_dir)


def _check_output(args: Namespace) -> None:
    from lpl.recipes import hub_source  # which imports this module

    pushed, resumed = args.push_to_hub, args.resume_from_checkpoint == "hub"
    read = args.config is not None and hub_source(args.config)
    warn_of_idle_flags(
        args,
        dict.fromkeys(["hub_private_repo", "hub_strategy"], pushed)
        | dict.fromkeys(["hub_model_id", "hub_revision"], pushed or resumed)
        | {"hub_token": pushed or resumed or read},
    )
    if resumed and not pushed and args.hub_model_id is None:
        raise ValueError("--resume_from_checkpoint hub: say by --hub_model_id in which repository the checkpoint is")
    if args.hub_token is not None and (pushed or resumed or read):
        warn(
            "--hub_token: the list of processes and the shell's history show it; `hf auth login` or HF_TOKEN are safer"
        )
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    if Path(args.output_dir).resolve() == Path(args.pretrained_model_name_or_path).resolve():
        raise ValueError(f"--output_dir {args.output_dir}: this is the pipeline to start from; give another folder")
    if args.resume_from_checkpoint not in (None, "latest", "hub"):
        find_resumable(args.output_dir, args.resume_from_checkpoint)


# The pipeline's configuration ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PipelineConfigs:
    """The small configuration files of a pipeline, read before its weights."""

    family: type[Family]
    index: Mapping[str, Any]  # model_index.json
    vae: Mapping[str, Any]  # of the VAE that is used
    denoiser: Mapping[str, Any]
    scheduler: Any  # a scheduler is its configuration
    absent: Mapping[str, None]  # components that this pipeline does without, such as SD3's T5

    @property
    def parts(self) -> dict[str, Mapping[str, Any]]:
        """As families take them, by the component's name."""
        return {"vae": self.vae, self.family.denoiser_name: self.denoiser}


def read_pipeline_configs(args: Namespace) -> PipelineConfigs:
    """Family and configurations of --pretrained_model_name_or_path.

    Raises:
        ValueError: where it is no pipeline, or one of a family or with a VAE that is not supported.
    """
    path = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        index = DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: {_why_no_pipeline(path, first_line(error))}"
        ) from error
    family = find_family(index.get("_class_name"))
    check_components(path, index)
    components = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple)}
    absent = dict.fromkeys(name for name, entry in components.items() if tuple(entry) == (None, None))
    absent |= dict.fromkeys(name for name in family.optional_components if name not in components)
    library, scheduler_class = components.get("scheduler", (None, None))
    if library != "diffusers" or not _is_class(scheduler_class, SchedulerMixin):
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: this version of diffusers has no scheduler {scheduler_class}"
        )
    vae, denoiser, scheduler = (
        _component_config(path, name, **where) for name in ("vae", family.denoiser_name, "scheduler")
    )
    if not _is_class(denoiser.get("_class_name"), ModelMixin):
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: this version of diffusers has no model "
            f"{denoiser.get('_class_name')}, which its {family.denoiser_name} is"
        )
    unread = {*absent, *(["vae"] if args.pretrained_vae_model_name_or_path else [])}
    unread |= {family.denoiser_name} if args.from_scratch else set()
    folders = (name for name in components if name not in unread)
    check_weights(f"--pretrained_model_name_or_path {path}", path, folders, args.revision)
    return PipelineConfigs(
        family=family,
        index=index,
        vae=_used_vae_config(args, vae),
        denoiser=denoiser,
        scheduler=getattr(diffusers, scheduler_class).from_config(scheduler),
        absent=absent,
    )


def _is_class(name: Any, base: type) -> bool:
    """Whether diffusers has a class of that name and kind."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, base)


def _why_no_pipeline(path: str, error: str) -> str:
    """What stands where a pipeline was looked for, and what to give instead."""
    place = Path(path)
    if place.is_file():
        return (
            "this is a file; load it with the pipeline's from_single_file, save_pretrained that, and give its folder"
        )
    if (place / lora.FILE).is_file() or list(place.glob("*/adapter_config.json")):
        return "this is a LoRA; give the pipeline that it was trained on"
    if place.is_dir():
        return "this folder has no model_index.json, so it is no pipeline of diffusers"
    if place.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        return "there is no such folder, and no repository on the Hub has such a name"
    offline = " since HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else ""
    return (
        f"there is no such folder, and no such repository on the Hub with a model_index.json can be reached{offline} "
        f"({error}); if it is gated or private, accept its licence on its page and run hf auth login"
    )


def _component_config(path: str, name: str, **where: str | None) -> Mapping[str, Any]:
    reader = DDIMScheduler if name == "scheduler" else AutoencoderKL  # each knows its file's name, for any class
    try:
        return reader.load_config(path, subfolder=name, **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_model_name_or_path {path}: the pipeline has no {name} whose configuration can be read"
        ) from error


def _used_vae_config(args: Namespace, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pipeline's own, or that of --pretrained_vae_model_name_or_path."""
    if args.pretrained_vae_model_name_or_path is None:
        check_autoencoder("--pretrained_model_name_or_path: the pipeline's VAE", own, PIPELINE_VAES, args)
        return own
    return _other_vae_config("pretrained_vae_model_name_or_path", args, own)


def _other_vae_config(flag: str, args: Namespace, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the VAE that a flag names; its latents must fit where the VAE of the configuration ``own`` was."""
    path = getattr(args, flag)
    try:
        config = AutoencoderKL.load_config(path, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--{flag} {path}: no autoencoder is found there ({first_line(error)}); of a pipeline, give its folder vae"
        ) from error
    accepted = SUPPORTED if flag == "lpl_vae_name_or_path" else PIPELINE_VAES
    check_autoencoder(f"--{flag} {path}", config, accepted, args)
    check_weights(f"--{flag} {path}", path, [""])
    theirs, ours = latent_channels(config), latent_channels(own)
    if theirs != ours:
        raise ValueError(
            f"--{flag} {path}: its latents have {theirs} channels and the pipeline's {ours}; it must have the same "
            "latent space"
        )
    return config


def check_autoencoder(what: str, config: Mapping[str, Any], accepted: Sequence[str], args: Namespace) -> None:
    """One whose decoder's blocks are known, or another of diffusers whose modules are named in --lpl_blocks."""
    name = config.get("_class_name")
    if name not in accepted and not (args.lpl_blocks and _is_class(name, ModelMixin)):
        raise ValueError(
            f"{what} is of the class {name}; supported are {', '.join(accepted)}; of another of diffusers name "
            "modules by their path in --lpl_blocks"
        )
    if "auto_map" in config:
        raise ValueError(f"{what} brings code of its own (auto_map in its configuration), which is not run here")


def check_pipeline(args: Namespace, configs: PipelineConfigs) -> None:
    """Fill in the defaults that depend on the pipeline, and check the flags against it.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    _check_objective(args, configs)
    _check_timesteps(args, configs)
    _check_captions(args, configs)
    _check_reference(args, configs.family)
    _check_text_encoders(args, configs.family)
    check_resolution(args, configs)
    _check_lora_targets(args, configs)
    _translate_timestep_threshold(args, configs)
    if args.lpl or holds_out(args):
        _check_features(args, configs)
    _check_crop(args, downscaling_factor(configs.vae))
    warn_of_idle_flags(args, {"guidance_scale": configs.denoiser.get("guidance_embeds")})


def _check_objective(args: Namespace, configs: PipelineConfigs) -> None:
    own, family = own_objective(configs.scheduler), configs.family
    if args.prediction_type is None:
        if own not in OBJECTIVES:
            raise ValueError(
                f"the pipeline's scheduler predicts {own!r}; give --prediction_type, one of "
                f"{', '.join(family.objectives)}"
            )
        args.prediction_type = own
    if args.prediction_type not in family.objectives:
        raise ValueError(
            f"--prediction_type {args.prediction_type}: {family.pipeline_class.__name__} can only sample models that "
            f"were trained on {' or '.join(family.objectives)}; choose "
            f"{'one of these' if len(family.objectives) > 1 else family.objectives[0]}"
        )
    if args.prediction_type != own and not args.from_scratch:
        warn(
            f"--prediction_type {args.prediction_type}: the pipeline was trained on {own}, so it has to learn anew "
            "what its output means; expect a long training"
        )
    if args.dream_training and args.prediction_type != Epsilon.name:
        raise ValueError(f"--dream_training is for epsilon, not for {args.prediction_type}; leave it out")


def _check_timesteps(args: Namespace, configs: PipelineConfigs) -> None:
    """How timesteps are drawn, and what weighs the diffusion loss at each."""
    if args.prediction_type == FlowMatching.name:
        _check_flow(args, configs.scheduler)
    else:
        _check_diffusion(args, configs.scheduler.config.num_train_timesteps)
    warn_of_idle_flags(
        args,
        {
            "logit_mean": args.weighting_scheme == "logit_normal",
            "logit_std": args.weighting_scheme == "logit_normal",
            "mode_scale": args.weighting_scheme == "mode",
        },
    )


def _check_flow(args: Namespace, scheduler: Any) -> None:
    for name, given in (
        ("snr_gamma", args.snr_gamma is not None),
        ("timestep_bias_strategy", args.timestep_bias_strategy != "none"),
    ):
        if given:
            raise ValueError(
                f"--{name} is for epsilon, v_prediction and sample; for flow_matching use --weighting_scheme"
            )
    args.weighting_scheme = args.weighting_scheme or "logit_normal"
    if is_flow(scheduler) and scheduler.config.get("use_dynamic_shifting"):
        warn("the pipeline's flow shift depends on the image's size; training uses none")


def _check_diffusion(args: Namespace, num_train_timesteps: int) -> None:
    if args.weighting_scheme is not None:
        raise ValueError(f"--weighting_scheme is for flow_matching; for {args.prediction_type} use --snr_gamma")
    if args.precondition_outputs:
        raise ValueError(f"--precondition_outputs is for flow_matching, not for {args.prediction_type}; leave it out")
    if args.timestep_bias_strategy == "range" and args.timestep_bias_end > num_train_timesteps:
        raise ValueError(
            f"--timestep_bias_end {args.timestep_bias_end}: this pipeline has {num_train_timesteps} timesteps"
        )
    if args.timestep_bias_strategy in ("earlier", "later") and args.timestep_bias_portion * num_train_timesteps < 1:
        raise ValueError(
            f"--timestep_bias_portion {args.timestep_bias_portion}: of this pipeline's {num_train_timesteps} "
            "timesteps that is not one; give more"
        )


def _check_captions(args: Namespace, configs: PipelineConfigs) -> None:
    """What the denoiser is conditioned on, and whether a local data set has it."""
    family = configs.family
    if family.class_conditional and "caption_column" not in args.given:
        args.caption_column = "label"
    if not args.dataset_name and not args.streaming:
        _check_folder(args.train_data_dir, args.caption_column, family)
    if args.proportion_empty_prompts is None:
        args.proportion_empty_prompts = family.empty_share
    if family.sequence_length is None:
        warn_of_idle_flags(args, {"max_sequence_length": False})
        args.max_sequence_length = None
        return
    if args.max_sequence_length is None:
        args.max_sequence_length = family.sequence_length
    limit = family.max_sequence_length
    if limit is not None and args.max_sequence_length > limit:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: this pipeline takes {limit} at most")


def _check_reference(args: Namespace, family: type[Family]) -> None:
    """Looks at the captions only."""
    if args.eval_steps is None or family.class_conditional:
        return
    from lpl.evaluation.images import has_captions

    if not has_captions(args.eval_data_dir, args.caption_column):
        raise ValueError(
            f"--eval_data_dir {args.eval_data_dir}: it has no captions to draw from; put a metadata.jsonl beside the "
            f'images, a line each, such as {{"file_name": "cat.png", "{args.caption_column}": "a photo of a cat"}}'
        )


def _check_folder(folder: str, caption_column: str, family: type[Family]) -> None:
    """Looks at names only."""
    if any(file.suffix in (".jsonl", ".csv", ".parquet") for file in Path(folder).rglob("metadata.*")):
        return
    if not family.class_conditional:
        raise ValueError(
            f"--train_data_dir {folder}: there are no captions; put a metadata.jsonl beside the images, a line each, "
            f'such as {{"file_name": "cat.png", "{caption_column}": "a photo of a cat"}}; only DiT takes class folders'
        )
    if len({file.parent for file in image_files(folder)}) < 2:
        raise ValueError(
            f"--train_data_dir {folder}: there are no class labels; put each class's images into a sub-folder, or a "
            f'metadata.jsonl beside them, a line each, such as {{"file_name": "cat.png", "{caption_column}": 0}}'
        )


def _check_text_encoders(args: Namespace, family: type[Family]) -> None:
    if not args.train_text_encoder:
        warn_of_idle_flags(args, {"text_encoder_lr": False, "adam_weight_decay_text_encoder": False})
        args.text_encoder_lr = args.adam_weight_decay_text_encoder = None
        return
    if not family.trainable_text_encoders:
        others = ", ".join(other.name for other in FAMILIES if other.trainable_text_encoders)
        raise ValueError(
            f"--train_text_encoder: no text encoder of {family.name} is trained; that is for {others}; leave it out"
        )
    if args.text_encoder_lr is None:
        own = None if args.optimizer == "prodigy" else family.text_encoder_learning_rate
        args.text_encoder_lr = args.learning_rate if own is None else own
    if args.adam_weight_decay_text_encoder is None:
        own = family.text_encoder_weight_decay
        args.adam_weight_decay_text_encoder = args.adam_weight_decay if own is None else own


def check_resolution(args: Namespace, configs: PipelineConfigs) -> None:
    family, parts = configs.family, configs.parts
    multiple, (smallest, largest) = family.resolution_multiple(parts), family.resolution_range(parts)
    if args.resolution is None:
        args.resolution = family.default_resolution(parts)
        if largest is not None and args.resolution > largest:  # a small model of a family of larger ones
            args.resolution = Family.default_resolution.__func__(family, parts)
    if args.resolution % multiple:
        below = args.resolution // multiple * multiple
        raise ValueError(
            f"--resolution {args.resolution}: this pipeline takes multiples of {multiple}, "
            f"such as {below or multiple} or {below + multiple}"
        )
    if largest is not None and args.resolution > largest:
        raise ValueError(f"--resolution {args.resolution}: this pipeline takes {largest} at most")
    if args.resolution < smallest:
        raise ValueError(f"--resolution {args.resolution}: this pipeline takes {smallest} at least")


SMALLEST_CROP = 4  # latent positions; fewer have hardly a variance to standardise by


def _check_crop(args: Namespace, factor: int) -> None:
    """--lpl_crop: tiles of whole latent positions, ``factor`` pixels each, that cover the image."""
    if args.lpl_crop is None:
        return
    sides = range(SMALLEST_CROP * factor, args.resolution + 1, factor)
    accepted = [side for side in sides if args.resolution % side == 0]
    if args.lpl_crop not in accepted:
        raise ValueError(
            f"--lpl_crop {args.lpl_crop}: accepted at --resolution {args.resolution} are "
            f"{', '.join(map(str, accepted))}: {SMALLEST_CROP} or more latent positions of {factor} pixels, "
            "a divisor of the image's side"
        )
    warn_of_idle_flags(args, {"lpl_crop": args.lpl_crop < args.resolution})


ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _check_lora_targets(args: Namespace, configs: PipelineConfigs) -> None:
    """The family's own modules, unless others are named; those must be there and of a kind that LoRA adapts."""
    if not args.lora:
        return
    if args.lora_target_modules is None:
        args.lora_target_modules = list(configs.family.lora_targets)
        return
    with torch.device("meta"):  # the modules' names, without memory for their weights
        denoiser = getattr(diffusers, configs.denoiser["_class_name"]).from_config(configs.denoiser)
    layers, others = [], []
    for name, module in denoiser.named_modules():
        (layers if isinstance(module, ADAPTABLE) else others).append(name)
    for target in args.lora_target_modules:
        if not _matching(target, layers) or _matching(target, others):
            raise ValueError(
                f"--lora_target_modules {target}: {configs.family.denoiser_name} has no linear layers or convolutions "
                f"of that name; it has, for example, {', '.join(_short_names(layers))}"
            )


def _matching(target: str, names: Sequence[str]) -> list[str]:
    """The modules that peft takes for the target."""
    return [name for name in names if name == target or name.endswith("." + target)]


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of modules' names, which are enough to name them; the commonest first, a dozen at most."""
    counts: dict[str, int] = {}
    for name in names:
        *rest, last = name.split(".")
        short = ".".join([*rest[-1:], last]) if last.isdigit() else last
        counts[short] = counts.get(short, 0) + 1
    return sorted(counts, key=lambda short: -counts[short])[:12]


def _translate_timestep_threshold(args: Namespace, configs: PipelineConfigs) -> None:
    """--lpl_t_threshold T, whose gate is t < T, as the noise-to-signal ratio of the last timestep below T."""
    limit = vars(args).pop("lpl_t_threshold", None)
    if limit is None:
        return
    if args.prediction_type == FlowMatching.name:
        raise ValueError(
            f"--lpl_t_threshold {limit} counts the timesteps of epsilon, v_prediction and sample; for flow_matching "
            "use --lpl_sigma_threshold"
        )
    scheduler = training_scheduler(args.prediction_type, configs.scheduler)
    objective = get_objective(args.prediction_type, scheduler)
    assert isinstance(objective, DiffusionObjective)
    sigma = objective.sigma(torch.arange(min(limit, objective.num_train_timesteps)))
    args.lpl_sigma_threshold = float(sigma[sigma.isfinite()][-1])
    args.lpl_threshold_base_resolution = 0
    args.given = args.given - {"lpl_t_threshold"} | {"lpl_sigma_threshold", "lpl_threshold_base_resolution"}
    warn(
        f"--lpl_t_threshold {limit} is taken for --lpl_sigma_threshold {args.lpl_sigma_threshold} "
        "--lpl_threshold_base_resolution 0"
    )


def check_vae_dtype(dtype: str, vae: Mapping[str, Any]) -> None:
    """Refuse float16 for a VAE that says of itself that it overflows."""
    if dtype == "float16" and vae.get("force_upcast"):
        raise ValueError(
            "--lpl_vae_dtype float16: this VAE overflows in float16 (force_upcast in its configuration); "
            "use bfloat16 or float32"
        )


def _check_features(args: Namespace, configs: PipelineConfigs) -> None:
    """The decoder that LPL looks through."""
    vae = configs.vae
    if args.lpl_vae_name_or_path is not None:
        vae = _other_vae_config("lpl_vae_name_or_path", args, configs.vae)
        theirs, ours = downscaling_factor(vae), downscaling_factor(configs.vae)
        if theirs != ours:
            raise ValueError(
                f"--lpl_vae_name_or_path {args.lpl_vae_name_or_path}: a position of its latents is {theirs} pixels "
                f"wide and one of the pipeline's {ours}; it must have the same latent space"
            )
    check_vae_dtype(args.lpl_vae_dtype, vae)
    _check_loss_options(args, tuple(decoder_blocks(skeleton(vae), args.lpl_blocks)) or (RGB,))
