"""All flags of the training script, their defaults, and what stands for a run: its flags resolved, and as words.

Names, meanings and defaults are those of diffusers' training scripts wherever one of those has the flag; where they
differ ``train_text_to_image.py`` decides. A default of None is often filled in later, from the pipeline
(:func:`lpl.checks.check_pipeline`). What is wrong about the flags is found in :mod:`lpl.checks`.

A *recipe* (``--config``, :mod:`lpl.recipes`) maps flags to values. The command line wins over it, it wins over the
defaults. :func:`recipe` gives the one that a run writes; given as ``--config`` it means the same flags again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from lpl.checks import (
    DTYPES,
    OPTIMIZERS,
    TRACKERS,
    PipelineConfigs,
    check_arguments,
    check_pipeline,
    check_ranges,
    holds_out,
    idle_without_lpl,
    loss_options,
    read_pipeline_configs,
    warn,
)
from lpl.evaluation import CLIP, METRICS, SET_METRICS
from lpl.loss import DEPTH_WEIGHTINGS, DISTANCES, NORMALIZATIONS, VARIANTS
from lpl.objectives import BIAS_STRATEGIES, OBJECTIVES, WEIGHTING_SCHEMES
from lpl.outliers import MASK_DEFAULTS
from lpl.recipes import close_match, read_recipe
from lpl.weighting import parse_weight


__all__ = [
    "DTYPES",
    "EMA_DECAY",
    "EMA_DECAY_WITH_LPL",
    "PipelineConfigs",
    "build_parser",
    "check_pipeline",
    "loss_options",
    "parse_arguments",
    "read_pipeline_configs",
    "recipe",
]

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
EMA_DECAY, EMA_DECAY_WITH_LPL = 0.9999, 0.99975  # Sec. 4.3, "Impact on EMA"
INTERPOLATION_MODES = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")  # torchvision's
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")  # as transformers' Trainer names them
RANK = 4  # of LoRA, as in diffusers' scripts
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


FOREIGN = ("ignored", "taken for")  # how the help of flags begins that are there for other scripts' command lines


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    source = ""  # where the words come from that are being parsed, if not from the command line

    def error(self, message: str) -> NoReturn:
        unknown, _, words = message.partition("unrecognized arguments: ")
        if words and not unknown:
            known = [action.dest for action in self._actions if not (action.help or "").startswith(FOREIGN)]
            message += close_match(words.split()[0].partition("=")[0], known, "--")
        message = " ".join(message.split())  # whatever was given
        self.exit(2, f"{self.prog}: error: {self.source}{message} (all flags: --help)\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # which Python before 3.13 takes for no value, silently
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)


class HelpFormatter(argparse.MetavarTypeHelpFormatter):
    """Shows each flag's type, and its default where there is one that counts."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return (action.type or str).__name__

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.nargs == 0 or default is None or action.dest in FROM_OTHER_SCRIPTS:
            return action.help
        words = " ".join(default) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {words.lower() if action.type is boolean else words})"


def boolean(word: str) -> bool:
    """A flag's value true or false, in words."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r}: accepted are true and false")
    return word.lower() == "true"


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; the name of the program is that of the running script unless given."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE (--train_data_dir | --dataset_name) DATA [flags]",
        description="Fine-tune a latent diffusion model on captioned images with the latent perceptual loss.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own takes -1e-4 for a flag
    for title, add_flags in GROUPS.items():
        group = parser.add_argument_group(title)
        group._negative_number_matcher = NEGATIVE_NUMBER
        add_flags(group.add_argument)
    return parser


def add_flags(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Give another program's parser those flags of the training script."""
    for action in _flags(build_parser()):
        if action.dest in names:
            parser._add_action(action)


def _model(add: Callable[..., Any]) -> None:
    add("--pretrained_model_name_or_path", help="pipeline to fine-tune: a folder or an id on the Hub")
    add("--revision", help="branch, tag or commit of the pipeline on the Hub")
    add("--variant", help="variant of the weight files, e.g. fp16")
    add("--non_ema_revision", help="revision with the denoiser's weights that are no moving average, to start from")
    add("--pretrained_vae_model_name_or_path", help="another VAE to encode and decode with")
    add("--cache_dir", help="where downloaded models and data sets are kept")
    add("--from_scratch", action="store_true", help="start the denoiser from random weights, not from the pipeline's")
    add("--train_text_encoder", action="store_true", help="train the CLIP text encoders too, at --text_encoder_lr")
    add(
        "--max_sequence_length",
        type=int,
        help="tokens of a caption that a T5 or Gemma is given; default: the family's",
    )
    add("--guidance_scale", type=float, default=3.5, help="guidance that Flux's denoiser is told in training")
    add(
        "--prediction_type",
        choices=tuple(OBJECTIVES),
        help="what the denoiser is trained to predict; default: what the pipeline was trained on",
    )


def _lora(add: Callable[..., Any]) -> None:
    add("--lora", action="store_true", help="train low-rank adapters (LoRA) instead of all weights")
    add("--rank", type=int, help=f"their rank; given, it means --lora; default: {RANK}")
    add("--lora_alpha", type=float, help="their scale, divided by the rank; default: the rank")
    add("--lora_dropout", type=float, default=0.0, help="share of their inputs that is dropped")
    add("--lora_target_modules", nargs="+", help="names of the denoiser's modules that get one; default: the family's")
    add("--use_dora", action="store_true", help="DoRA: adapt direction and magnitude of the weights apart")
    add("--use_rslora", action="store_true", help="rank-stabilised LoRA: divide alpha by the rank's square root")
    add("--quantize_base", choices=("8bit", "4bit"), help="keep the frozen denoiser in so many bits; needs a GPU")


def _data(add: Callable[..., Any]) -> None:
    add("--dataset_name", help="data set on the Hub, or a folder that load_dataset understands")
    add("--dataset_config_name", help="configuration of that data set")
    add(
        "--train_data_dir", help="folder of images with a metadata.jsonl (file_name, text), or with a folder per class"
    )
    add(
        "--streaming",
        action="store_true",
        help="read the data while training; --train_data_dir is a folder of .parquet or .tar (WebDataset) files then",
    )
    add("--shuffle_buffer_size", type=int, default=1000, help="images that --streaming shuffles at a time")
    add("--image_column", default="image", help="column with the images")
    add("--caption_column", default="text", help="column with a caption or several; with DiT class labels, from label")
    add("--max_train_samples", type=int, help="train on so many images at most, drawn by the seed, or the first ones")
    add("--max_bad_samples", help="unreadable samples to bear: a number, or a share below 1; default: any number")
    add("--validation_split", help="split of --dataset_name for the validation loss, which is not trained on")
    add("--validation_every_nth", type=int, help="keep every so many-th image for the validation loss instead")
    add("--num_validation_samples", type=int, default=64, help="images at most that the validation loss is taken on")
    add("--resolution", type=int, help="side of the square training images in pixels; default: the family's")
    add("--center_crop", action="store_true", help="crop the centre instead of a random square")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add(
        "--image_interpolation_mode",
        choices=INTERPOLATION_MODES,
        default="lanczos",
        help="how images are resized",
    )
    add("--proportion_empty_prompts", type=float, help="share of captions that are left empty; default: the family's")
    add("--dataloader_num_workers", type=int, default=0, help="processes that load images; 0 = the main process")
    add(
        "--dataloader_timeout",
        type=float,
        default=600.0,
        help="seconds after which a file that is still being read counts as a bad sample; 0 = wait for ever",
    )


def _lpl(add: Callable[..., Any]) -> None:
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
    add(
        "--lpl_outlier_quantile",
        type=float,
        default=MASK_DEFAULTS["quantile"],
        help="masks: share of a map's positions at either end that its bounds are read off",
    )
    add(
        "--lpl_outlier_margin",
        type=float,
        default=MASK_DEFAULTS["margin"],
        help="masks: standard deviations beyond those bounds that are still kept",
    )
    add(
        "--lpl_outlier_dilation",
        type=int,
        default=MASK_DEFAULTS["dilation"],
        help="masks: kernel at 256 px that drops lone false positives; it grows with the side, as does the next",
    )
    add(
        "--lpl_outlier_erosion",
        type=int,
        default=MASK_DEFAULTS["erosion"],
        help="masks: kernel at 256 px that then grows the outliers found",
    )
    add(
        "--lpl_outlier_stride",
        type=int,
        default=MASK_DEFAULTS["stride"],
        help="masks: read the bounds off every so many-th position; more is faster and a little less exact",
    )
    add("--lpl_distance", choices=DISTANCES, default="l2", help="squared or absolute difference of features")
    add(
        "--lpl_variant", choices=VARIANTS, default="paper", help="reference: the numbers of the authors' released code"
    )
    add("--lpl_start_step", type=int, default=0, help="first optimizer step with LPL")
    add("--lpl_ramp_steps", type=int, default=0, help="steps over which its weight then grows to its full value")
    add("--lpl_every", type=int, default=1, help="LPL on every so many-th step only, with so many times the weight")
    add(
        "--lpl_max_samples",
        type=int,
        help="LPL on so many samples of a micro-batch at most, drawn from those inside the threshold, for all of them",
    )
    add("--lpl_crop", type=int, help="LPL on a random part of the images with sides of so many pixels")
    add("--lpl_chunk_size", type=int, help="samples that LPL decodes at a time, to save memory; default: all")
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


def _diffusion(add: Callable[..., Any]) -> None:
    add("--snr_gamma", type=float, help="gamma of min-SNR weighting; 5.0 is its paper's; not for flow matching")
    add("--noise_offset", type=float, default=0.0, help="scale of a noise that is equal over a whole channel")
    add("--input_perturbation", type=float, default=0.0, help="scale of noise added to the denoiser's input only")
    add("--dream_training", action="store_true", help="DREAM: correct the training pair by the model's own error")
    add("--dream_detail_preservation", type=float, default=1.0, help="DREAM's p: larger keeps more detail")
    add(
        "--timestep_bias_strategy",
        choices=BIAS_STRATEGIES,
        default="none",
        help="timesteps to draw more often: the earlier (less noisy) ones, the later ones, or a range",
    )
    add("--timestep_bias_multiplier", type=float, default=1.0, help="how much more often those are drawn")
    add("--timestep_bias_begin", type=int, default=0, help="first timestep of the range")
    add("--timestep_bias_end", type=int, default=1000, help="timestep before which the range ends")
    add("--timestep_bias_portion", type=float, default=0.25, help="share of the timesteps that is earlier, or later")
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


def _optimization(add: Callable[..., Any]) -> None:
    add("--train_batch_size", type=int, default=16, help="images per process and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--num_train_epochs", type=int, default=100, help="passes over the data, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps in all")
    add("--learning_rate", type=float, default=1e-4, help="learning rate after warm-up")
    add("--text_encoder_lr", type=float, help="that of the text encoders; default: the family's, or the same")
    add("--scale_lr", action="store_true", help="multiply both by processes, micro-batches and batch size")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up, for schedules that have one")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of the polynomial schedule")
    add("--optimizer", default=OPTIMIZERS[0], help=f"{' or '.join(OPTIMIZERS)}")
    add("--use_8bit_adam", action="store_true", help="8-bit AdamW of bitsandbytes")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment, also Prodigy's")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment, also Prodigy's")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay, also Prodigy's")
    add("--adam_weight_decay_text_encoder", type=float, help="that of the text encoders; default: as for their rate")
    add("--adam_epsilon", type=float, default=1e-8, help="what keeps the division by the second moment finite")
    add("--prodigy_beta3", type=float, help="decay of Prodigy's step size; default: the root of --adam_beta2")
    add("--prodigy_decouple", type=boolean, default=True, help="Prodigy: weight decay as in AdamW")
    add("--prodigy_use_bias_correction", type=boolean, default=True, help="Prodigy: Adam's bias correction")
    add(
        "--prodigy_safeguard_warmup",
        type=boolean,
        default=True,
        help="Prodigy: keep the warm-up out of its estimate of the step size",
    )
    add("--max_grad_norm", type=float, default=1.0, help="norm that gradients are clipped to; 0 = no clipping")
    add(
        "--max_skipped_steps",
        type=int,
        default=100,
        help="steps to bear that change nothing, since a loss or a gradient is NaN or infinite",
    )
    add("--use_ema", action="store_true", help="keep and save an exponential moving average of the weights")
    add("--ema_decay", type=float, help=f"its decay; default: {EMA_DECAY_WITH_LPL} with LPL, {EMA_DECAY} without")
    add("--foreach_ema", action="store_true", help="faster EMA by fused updates")
    add("--offload_ema", action="store_true", help="keep the EMA in the CPU's memory between updates")
    add(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="of computation; default: as accelerate is configured",
    )
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward to save memory")
    add("--seed", type=int, help="seed of everything random; default: drawn and written down")


def _logging(add: Callable[..., Any]) -> None:
    add("--dry_run", action="store_true", help="show what would be done, its memory and time, and stop")
    add("--validation_prompt", help="prompt to sample --num_validation_images images of; with DiT a class")
    add("--validation_prompts", nargs="+", help="prompts to sample an image of each")
    add("--num_validation_images", type=int, default=4, help="images of the --validation_prompt")
    add("--validation_epochs", type=int, default=5, help="sample and take the validation loss every so many epochs")
    add("--validation_steps", type=int, help="do so every so many optimizer steps instead")
    add("--validation_inference_steps", type=int, default=25, help="sampling steps of validation images")
    add("--validation_guidance_scale", type=float, help="their guidance scale; default: the pipeline's")
    add("--report_to", default="tensorboard", help=f"{', '.join(TRACKERS)}, all or none")
    add("--tracker_project_name", default="text2image-fine-tune", help="project name in the tracker")
    add("--logging_dir", default="logs", help="the trackers' folder within --output_dir")
    add("--logging_steps", type=int, default=10, help="optimizer steps between two log entries")
    add("--debug_loss", action="store_true", help="log every image's own diffusion loss")


def _evaluation(add: Callable[..., Any]) -> None:
    add("--eval_steps", type=int, help="compare drawn with real images every so many optimizer steps; default: never")
    add("--eval_data_dir", help="folder of the real images, best of ones that are not trained on, with their captions")
    add("--eval_metrics", nargs="+", default=list(SET_METRICS), help=f"out of {', '.join(METRICS)}")
    add(
        "--eval_features",
        nargs="+",
        default=["facebook/dinov2-base"],
        help="networks to compare them through, as for python -m lpl.evaluate",
    )
    add("--eval_clip", default=CLIP, help="network of clip_score")
    add("--eval_num_images", type=int, help="images to draw; default: as many as there are real ones")
    add("--eval_batch_size", type=int, default=8, help="images that are drawn at a time")


def _output(add: Callable[..., Any]) -> None:
    add(
        "--config",
        help="recipe: a YAML file of flags and values, such as a run's recipe.yaml, or a repository on the Hub that "
        "has one (user/repo or user/repo@revision); flags given here win",
    )
    add("--without", nargs="+", help="flags of the recipe to leave out, e.g. one that it turns on")
    add("--output_dir", default="sd-model-finetuned", help="where checkpoints, samples and the pipeline go")
    add("--checkpointing_steps", type=int, default=500, help="optimizer steps between two checkpoints")
    add("--checkpoints_total_limit", type=int, help="keep so many checkpoints")
    add(
        "--resume_from_checkpoint",
        help='a checkpoint\'s folder, "latest", or "hub": the last one that --hub_strategy checkpoint has pushed',
    )
    add("--push_to_hub", action="store_true", help="publish the result with samples, curves, recipe and model card")
    add("--hub_model_id", help="repository to publish to; default: the name of --output_dir")
    add("--hub_token", help="token for it; a login or the environment is safer")
    add("--hub_private_repo", action="store_true", help="make the repository a private one where it is new")
    add("--hub_revision", help="branch to publish to, made where there is none; default: main")
    add(
        "--hub_strategy",
        choices=HUB_STRATEGIES,
        default="end",
        help="when to publish: at the end; weights and samples with each checkpoint (every_save), and the state to "
        "resume from, the last one (checkpoint) or all (all_checkpoints)",
    )


def _others(add: Callable[..., Any]) -> None:
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="ignored: PyTorch's own serves")
    add("--enable_npu_flash_attention", action="store_true", help="ignored likewise")
    add("--local_rank", type=int, default=-1, help="ignored: the launcher's environment tells it")
    add("--use_lpl", action="store_true", help="ignored: LPL is on unless --lpl_weight is 0")
    add("--lpl_scale", action="store_true", help="ignored: --lpl_weight and the sigma threshold weigh LPL")
    add("--lpl_loss_type", choices=("mse", "l1"), default="mse", help="taken for --lpl_distance l2 or l1")
    add("--lpl_start", type=int, default=0, help="taken for --lpl_start_step")
    add("--lpl_num_blocks", type=int, default=4, help="N is taken for --lpl_blocks mid up_0 ... up_(N-1)")
    add("--lpl_t_threshold", type=int, default=200, help="taken for the --lpl_sigma_threshold of that timestep")
    add(
        "--lpl_norm_type",
        choices=("default", "shared", "batch"),
        default="default",
        help="shared, with the two flags below: taken for --lpl_variant reference; else ignored",
    )
    add("--lpl_pow_law", action="store_true", help="see --lpl_norm_type")
    add("--lpl_remove_outliers", action="store_true", help="see --lpl_norm_type too")


GROUPS = {
    "model": _model,
    "LoRA": _lora,
    "data": _data,
    "latent perceptual loss": _lpl,
    "diffusion loss": _diffusion,
    "optimization": _optimization,
    "validation and logging": _logging,
    "evaluation": _evaluation,
    "output and recipes": _output,
    "accepted from other scripts": _others,
}

# Those that do nothing here, and what serves instead.
IGNORED = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is always used",
    "enable_npu_flash_attention": "PyTorch's own attention is always used",
    "local_rank": "each process learns its number from the launcher's environment",
    "use_lpl": "LPL is on unless --lpl_weight is 0",
    "lpl_scale": "LPL is weighted by --lpl_weight and applies below --lpl_sigma_threshold",
}
TRANSLATED = (
    *("lpl_loss_type", "lpl_start", "lpl_num_blocks", "lpl_t_threshold"),
    *("lpl_norm_type", "lpl_pow_law", "lpl_remove_outliers"),
)
FROM_OTHER_SCRIPTS = (*IGNORED, *TRANSLATED)
# What a recipe does not say: where it is itself, how a run is started, and secrets.
NOT_IN_RECIPES = ("help", "config", "without", "dry_run", "resume_from_checkpoint", "hub_token", *FROM_OTHER_SCRIPTS)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked command line; ends the process with one sentence where it cannot be run.

    Beside the flags it has ``given``, the names of those that were given, by words or by a recipe that says something
    else than the default, ``rerun_of``, what that recipe has measured, and ``lpl``, whether LPL is trained on.
    """
    parser = build_parser()
    try:
        args = _read(parser, sys.argv[1:] if argv is None else argv)
        args.lpl_depth_weighting = _depth_weighting(args.lpl_depth_weighting)
        check_ranges(args)
        _translate(args)
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    if argv is None and args.hub_token:  # trackers upload the command line
        sys.argv = [word.replace(args.hub_token, "hf_...") for word in sys.argv]
    _resolve(args)
    return args


def _resolve(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags."""
    args.optimizer = next(name for name in OPTIMIZERS if name.lower() == args.optimizer.lower())
    args.lpl = parse_weight(args.lpl_weight) != (0.0, None)
    if args.use_ema and args.ema_decay is None:
        args.ema_decay = EMA_DECAY_WITH_LPL if args.lpl else EMA_DECAY
    args.lora = args.lora or args.rank is not None
    if args.lora:
        args.rank = args.rank or RANK
        args.lora_alpha = args.lora_alpha or float(args.rank)
    if args.validation_prompt is not None:
        args.validation_prompts = [args.validation_prompt] * args.num_validation_images


def _depth_weighting(words: Sequence[str]) -> str | list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return " ".join(words)


# Recipes -------------------------------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag of a run, resolved, in YAML's types; as ``--config`` it stands for the same flags."""
    names = [action.dest for action in _flags(build_parser()) if action.dest not in NOT_IN_RECIPES]
    values = {name: getattr(args, name) for name in names}
    if args.validation_prompt is not None:
        values["validation_prompts"] = None  # they follow from it
    return values


def command_line(args: argparse.Namespace, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The words that stand for a run: every flag that is not at its default, wherever it came from."""
    values, words = recipe(args), []
    for action in _flags(build_parser()):
        value = values.get(action.dest) if wanted(action.dest) else None
        if value in (None, action.default) or [value] == action.default:
            continue
        listed = [] if action.nargs == 0 else value if isinstance(value, list) else [value]
        words += [action.option_strings[0], *map(str, listed)]
    return words


def loss_flags(args: argparse.Namespace) -> str:
    """Those of these words that make another latent perceptual loss than the default, as one line."""
    others = ("weight", "measuring_steps", "start_step", "ramp_steps", "sigma_threshold", "threshold_base_resolution")
    same = {f"lpl_{name}" for name in (*others, "gradient_checkpointing", "chunk_size", "vae_dtype")}
    return " ".join(command_line(args, lambda name: name.startswith("lpl_") and name not in same))


def _flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions


def _read(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Defaults, over them the recipe, over it the command line; ``given`` and ``rerun_of`` are set.

    Raises:
        ValueError: where the recipe cannot be read or says something impossible.
    """
    args = parser.parse_args(words)
    typed = given_flags(build_parser(), words)
    given, measured = set(typed), {}
    if args.config is None:
        if args.without:
            raise ValueError("--without leaves out flags of a recipe; give one with --config, or leave it out")
    else:
        source = {"token": args.hub_token, "cache_dir": args.cache_dir}
        values, measured = read_recipe(parser, args.config, args.without or (), typed, **source)
        given |= {
            action.dest
            for action in _flags(parser)
            if action.dest in values and (values[action.dest] != action.default or action.dest in FROM_OTHER_SCRIPTS)
        }
        parser.set_defaults(**values)
        args = parser.parse_args(words)
        if "lpl_weight" in typed and parse_weight(args.lpl_weight) == (0.0, None):
            given -= _forget_lpl(args, given - typed)
    args.given, args.rerun_of = given, measured
    return args


def given_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """The flags in the words of a command line that is known to be right; the parser loses its defaults."""
    for action in _flags(parser):
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(words)))


def _forget_lpl(args: argparse.Namespace, names: Collection[str]) -> set[str]:
    """For the baseline of a recipe with LPL: set to their defaults those flags that have no meaning without it."""
    idle = set(idle_without_lpl(names, holds_out(args)))
    for name in sorted(idle):
        setattr(args, name, build_parser().get_default(name))
        warn(f"--lpl_weight 0: {name} of the recipe has no effect and is left out")
    return idle


# Flags of diffusers' research script for LPL -------------------------------------------------------------------------


def _translate(args: argparse.Namespace) -> None:
    """Warn of flags that do nothing here, say those of the research script in ours, and forget them all.

    ``lpl_t_threshold``, where given, is left for :func:`lpl.checks.check_pipeline`, which knows the betas.

    Raises:
        ValueError: where one contradicts a flag of ours.
    """
    foreign = {name: vars(args).pop(name) for name in FROM_OTHER_SCRIPTS}
    foreign = {name: value for name, value in foreign.items() if name in args.given}
    args.given = args.given - set(foreign)
    for name in IGNORED:
        if name in foreign:
            warn(f"--{name} has no effect: {IGNORED[name]}")
    if "use_lpl" not in foreign and any(name.startswith("lpl_") for name in foreign):
        warn("LPL is on, though --use_lpl is not given; turn it off by --lpl_weight 0")
    if "lpl_loss_type" in foreign:
        kind = foreign["lpl_loss_type"]
        _take_for(args, f"--lpl_loss_type {kind}", "lpl_distance", {"mse": "l2", "l1": "l1"}[kind])
    if "lpl_start" in foreign:
        _take_for(args, f"--lpl_start {foreign['lpl_start']}", "lpl_start_step", foreign["lpl_start"])
    if "lpl_num_blocks" in foreign:
        count = foreign["lpl_num_blocks"]
        _take_for(args, f"--lpl_num_blocks {count}", "lpl_blocks", ["mid", *(f"up_{i}" for i in range(count))])
    if "lpl_t_threshold" in foreign:
        for name in ("lpl_sigma_threshold", "lpl_threshold_base_resolution"):
            if name in args.given:
                raise ValueError(f"--lpl_t_threshold and --{name} are two thresholds; leave one of them out")
        args.lpl_t_threshold = foreign["lpl_t_threshold"]
        args.given = args.given | {"lpl_t_threshold"}
    _translate_variant(args, foreign)


def _take_for(args: argparse.Namespace, words: str, name: str, value: Any) -> None:
    """Set a flag of ours to what a foreign one means."""
    ours = f"--{name} {' '.join(value) if isinstance(value, list) else value}"
    if name in args.given and getattr(args, name) != value:
        raise ValueError(
            f"{words} means {ours} here, which is not the --{name} that is given too; leave one of them out"
        )
    setattr(args, name, value)
    args.given = args.given | {name}
    warn(f"{words} is taken for {ours}")


def _translate_variant(args: argparse.Namespace, foreign: Mapping[str, Any]) -> None:
    """Normalisation, depth weights and masks of the research script, which its README gives as one set."""
    names = ("lpl_norm_type", "lpl_pow_law", "lpl_remove_outliers")
    words = " ".join(
        f"--{name}" + (f" {foreign[name]}" if name == names[0] else "") for name in names if name in foreign
    )
    if not words:
        return
    if len(words.split()) == 4 and foreign["lpl_norm_type"] == "shared" and args.lpl_distance == "l2":
        _take_for(args, words, "lpl_variant", "reference")
        return
    weighting = args.lpl_depth_weighting
    mask = "--lpl_no_outlier_mask" if args.lpl_no_outlier_mask else "outlier masks"
    used = f"--lpl_normalization {args.lpl_normalization}, --lpl_depth_weighting " + (
        weighting if isinstance(weighting, str) else " ".join(map(str, weighting))
    )
    if args.lpl_variant == "reference":
        used, mask = "--lpl_variant reference", "its masks"
    warn(
        f"{words} has no counterpart (only --lpl_norm_type shared --lpl_pow_law --lpl_remove_outliers together, with "
        f"squared differences, has one: --lpl_variant reference); this run uses {used} and {mask}"
    )
