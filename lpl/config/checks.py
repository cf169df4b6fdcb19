"""Checks of the command line, and of whether the places that it names exist: invalid values, contradicting flags.

Each refusal is one sentence: what was given, what is accepted, which flag to change. A flag that is given and has no
effect is warned of. Checks that need a folder's content, the machine or the pipeline come later
(:mod:`lpl.training.preflight`, :mod:`lpl.families.resolve`, :mod:`lpl.evaluation.training`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lpl.config import rules
from lpl.config.choices import (
    ADAPTER_NAMES,
    FP8,
    GPUS,
    INIT_LORA_WEIGHTS,
    LORA,
    METRICS,
    OFT,
    TRACKERS,
)
from lpl.config.config import FLAGS, Config
from lpl.config.data_checks import (
    check_caches,
    check_captions,
    check_data_sets,
    check_masks,
    check_parts,
    check_sizes,
    check_streaming,
    parse_limit,
)
from lpl.config.flag import flags_of
from lpl.config.foreign import FOREIGN
from lpl.config.groups import Lora, Lpl, Model
from lpl.config.place_checks import check_places
from lpl.config.prompts import check_entries
from lpl.options import check_options, parse_weight
from lpl.tools import layout
from lpl.tools.places import lies_within
from lpl.tools.privacy import HUB_ID
from lpl.tools.single_files import single_file, why_no_file
from lpl.tools.words import warn


def check_words(config: Config) -> None:
    """Run all checks that need the command line only.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_places(config)
    check_data_sets(config.data)
    _check_sources(config)
    check_sizes(config)
    check_streaming(config)
    check_entries(config.validation.validation_prompts or ())
    check_captions(config)
    check_caches(config)
    check_masks(config)
    _check_lora(config)
    _check_memory(config)
    _check_lpl(config)
    _check_timesteps(config)
    _check_optimizer(config)
    _check_validation(config)
    _check_gpu(config)
    _check_evaluation(config)
    _check_output(config)
    _check_written(config)
    _warn_of_zeros(config)


def check_data(config: Config) -> None:
    """Run the checks of the data flags alone, for a program without a model.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_places(config)
    check_data_sets(config.data)
    check_parts(config.data)
    check_sizes(config)
    check_captions(config)
    check_masks(config)


def warn_of_idle_flags(config: Config) -> None:
    """Warn of given flags that have no effect in this run; needs a complete configuration."""
    values = config.values()
    for name in sorted(config.given):
        used = FLAGS[name].used
        if used is not None and not used(values):
            warn_idle(name)


def warn_idle(name: str) -> None:
    warn(f"--{name} has no effect in this run")


def _check_sources(config: Config) -> None:
    model, data = config.model, config.data
    parse_limit(data.max_bad_samples)
    if not model.pretrained_model_name_or_path:
        raise ValueError("--pretrained_model_name_or_path is missing: a folder with a pipeline, or its id on the Hub")
    if why := why_no_pipeline(model.pretrained_model_name_or_path):
        raise ValueError(f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}: {why}")
    if config.validation.for_gpu is None or data.dataset_name or data.train_data_dir:
        check_parts(data)
    _check_starting_points(model)
    if model.from_scratch and model.non_ema_revision:
        raise ValueError("--from_scratch loads no weights, so --non_ema_revision has no effect; leave one of them out")


def _check_starting_points(model: Model) -> None:
    """Refuse sources of weights that exclude one another."""
    others = {
        "denoiser_model_name_or_path": model.denoiser_model_name_or_path is not None,
        "merge_lora": bool(model.merge_lora),
    }
    for name in (name for name, given in others.items() if given):
        if model.from_scratch:
            raise ValueError(f"--from_scratch loads no weights, so --{name} has no effect; leave one of them out")
        if model.non_ema_revision:
            raise ValueError(f"--non_ema_revision is another denoiser than that of --{name}; leave one of them out")
    if model.non_ema_revision and single_file(model.source):
        raise ValueError("--non_ema_revision is of a pipeline on the Hub, and a single file has none; leave it out")
    if place := model.denoiser_model_name_or_path:
        why = why_no_file(place) if Path(place).is_file() else None
        if why is None and not os.path.exists(place) and not HUB_ID.fullmatch(place) and single_file(place) is None:
            why = "there is no such folder or file, and no repository on the Hub has such a name"
        if why:
            raise ValueError(f"--denoiser_model_name_or_path {place}: {why}")
    for source, strength in model.merged:
        if not math.isfinite(strength) or strength == 0:
            raise ValueError(f"--merge_lora {source}:{strength:g}: its strength must be a number other than 0")


def starting_points(model: Model, lora: Lora) -> list[tuple[str, str]]:
    """Flags and places of what a run starts from."""
    found = {
        "pretrained_model_name_or_path": model.source,
        "denoiser_model_name_or_path": model.denoiser_model_name_or_path,
        "lora_init": lora.lora_init,
        "training_adapter": lora.training_adapter,
    }
    merged = [("merge_lora", source) for source, _ in model.merged]
    return [*((name, place) for name, place in found.items() if place), *merged]


def why_no_pipeline(path: str) -> str | None:
    """Why a path is not a pipeline, and what to give instead; None if it may be one."""
    place = Path(path)
    if place.is_file():
        return why_no_file(path)
    if (place / layout.INDEX).is_file():
        return None
    if (place / "pytorch_lora_weights.safetensors").is_file() or list(place.glob("*/adapter_config.json")):
        return "this is a LoRA; give the pipeline that it was trained on, and this by --lora_init to go on training it"
    try:
        if single_file(path) is not None:
            return None
    except ValueError as error:
        return str(error)
    if place.is_dir():
        return f"this folder has no {layout.INDEX}, so it is no pipeline of diffusers"
    if not HUB_ID.fullmatch(path):
        return "there is no such folder, and no repository on the Hub has such a name"
    return None


def _check_lora(config: Config) -> None:
    lora = config.lora
    if not lora.lora:
        for name in flags_of(Lora):
            if name in config.given:
                raise ValueError(f"--{name} is for LoRA; add --lora or --rank, or leave it out")
    elif config.model.from_scratch:
        raise ValueError("--from_scratch trains every weight anew, which LoRA cannot; leave out --lora and --rank")
    if lora.lora_init is not None and lora.adapter != LORA:
        raise ValueError(f"--adapter {lora.adapter}: --lora_init is a LoRA, which is trained further; leave one out")
    for name, what in OF_THE_FILE.items():
        if lora.lora_init is not None and name in config.given:
            raise ValueError(f"--{name}: the {what} are those of --lora_init; leave one of them out")
    _check_adapter(config)
    if lora.use_dora and config.model.train_text_encoder:
        warn("--use_dora is for the denoiser; the text encoders get LoRA, since diffusers loads no DoRA there")
    if lora.quantize_base is not None and config.model.train_text_encoder:
        raise ValueError("--quantize_base goes without --train_text_encoder; leave one of them out")


def _check_memory(config: Config) -> None:
    """Refuse flags that would save no memory, or that exclude one another."""
    lora, optimization = config.lora, config.optimization
    checkpoints = optimization.gradient_checkpointing
    asked = {"--group_offload": lora.group_offload, f"--quantize_base {FP8}": lora.quantize_base == FP8}
    for flag in (flag for flag in asked if asked[flag] and not checkpoints):
        raise ValueError(
            f"{flag}: without --gradient_checkpointing the backward pass keeps all weights as they are used; add it, "
            "or leave the other out"
        )
    if optimization.activation_offload and not checkpoints:
        raise ValueError(
            "--activation_offload: without --gradient_checkpointing every activation would go to CPU memory and back, "
            "which takes longer than computing it again; add it, or leave the other out"
        )
    moves = {"--offload_frozen": optimization.offload_frozen, "--activation_offload": optimization.activation_offload}
    for flag in (flag for flag, used in (asked | moves).items() if used and optimization.torch_compile):
        raise ValueError(f"{flag} goes without --torch_compile, whose kernels hold on to the weights; leave one out")
    if lora.group_offload and lora.quantize_base not in (None, FP8):
        raise ValueError(
            f"--group_offload moves no weights of --quantize_base {lora.quantize_base}; leave one of them out, or use "
            f"--quantize_base {FP8}"
        )


OF_THE_FILE = {
    "lora_target_modules": "layers",
    "lora_rank_pattern": "ranks",
    "lora_alpha_pattern": "alphas",
    "init_lora_weights": "weights",
}
OF_LORA = ("use_dora", "use_rslora", "lora_dropout", "init_lora_weights", "quantize_base")
OF_RANKS = ("rank", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern")
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "mica")


def _check_adapter(config: Config) -> None:
    """Refuse what the kind of adapter does not have."""
    lora, name = config.lora, ADAPTER_NAMES[config.lora.adapter]
    for flag in (*(OF_LORA if lora.adapter != LORA else ()), *(OF_RANKS if lora.adapter == OFT else ())):
        if flag in config.given:
            instead = "; --oft_block_size says how much it can learn" if flag in OF_RANKS else ""
            raise ValueError(f"--{flag} is not for {name}{instead}; leave it out, or use --adapter {LORA}")
    if lora.adapter != LORA and config.model.train_text_encoder:
        raise ValueError(f"--adapter {lora.adapter} is for the denoiser alone; leave out --train_text_encoder")
    if lora.adapter != LORA and lora.training_adapter is not None:
        raise ValueError(f"--training_adapter goes with --adapter {LORA} only; leave it out")
    if lora.adapter == OFT and config.validation.validation_lora_scales is not None:
        raise ValueError(f"--validation_lora_scales: {name} has no strength to change; leave it out")
    if lora.init_lora_weights not in INIT_LORA_WEIGHTS:
        kind = lora.init_lora_weights
        why = "changes the base's weights, which a file of the LoRA alone does not hold; "
        why = why if kind.startswith(CHANGE_THE_BASE) else "needs data before the training; " if kind == "eva" else ""
        raise ValueError(f"--init_lora_weights {kind}: {why}accepted are {', '.join(INIT_LORA_WEIGHTS)}")
    if lora.init_lora_weights == "orthogonal":
        odd = [rank for rank in (lora.rank, *lora.ranks.values()) if rank is not None and rank % 2]
        if odd:
            raise ValueError(f"--init_lora_weights orthogonal needs even ranks, and one is {odd[0]}; give another")


def _check_lpl(config: Config) -> None:
    parse_weight(config.lpl.lpl_weight)
    given = config.given | ({"lpl_t_threshold"} if config.timestep_threshold is not None else set())
    if not config.lpl.enabled and (idle := idle_without_lpl(given, config.data.holds_out)):
        raise ValueError(f"--lpl_weight 0 turns the loss off, so --{idle[0]} has no effect; leave one of them out")
    if config.lpl.lpl_student is not None and config.lpl.lpl_crop is not None:
        raise ValueError("--lpl_student sees whole images at little cost, so leave --lpl_crop out")
    if config.lpl.lpl_student is not None:
        every, subset = config.lpl.lpl_correct_every, config.lpl.lpl_max_samples is not None
        if every == 1 and not subset:
            warn("--lpl_correct_every 1 computes LPL itself at every step; leave out --lpl_student, or give more")
        if every == 0 and subset:
            warn("--lpl_max_samples is for LPL's corrections, as a student sees all samples; add --lpl_correct_every")
    check_loss_options(config.lpl, config.lpl.lpl_blocks)


def check_loss_options(lpl: Lpl, blocks: Sequence[str] | None) -> None:
    """Refuse options of the loss that exclude each other.

    Args:
        blocks: the decoder's blocks; None if not known yet.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    options = lpl.loss_options()
    outliers = options.pop("outliers", {})
    options.pop("chunk_size", None)
    check_options(**options, blocks=blocks)
    if outliers and lpl.lpl_variant == "reference":
        raise ValueError(
            f"--lpl_variant reference has masks of its own; leave out --lpl_outlier_{next(iter(outliers))}, or use "
            "--lpl_variant paper"
        )


def idle_without_lpl(names: Iterable[str], measured: bool) -> list[str]:
    """The flags that have no effect without LPL in the training loss.

    Args:
        measured: whether the validation loss still computes LPL.
    """
    options = {name for name in flags_of(Lpl) if name != "lpl_weight"} | {n for n in FOREIGN if n.startswith("lpl_")}
    training = {name for name, declared in flags_of(Lpl).items() if declared.training_only} | {"lpl_start"}
    return sorted(name for name in names if name in options and (not measured or name in training))


def _check_timesteps(config: Config) -> None:
    begin, end = config.diffusion.timestep_bias_begin, config.diffusion.timestep_bias_end
    if config.diffusion.timestep_bias_strategy == "range" and begin >= end:
        raise ValueError(f"--timestep_bias_begin {begin}: it must be less than --timestep_bias_end, which is {end}")


def _check_optimizer(config: Config) -> None:
    optimization = config.optimization
    if optimization.use_8bit_adam and rules.is_path(optimization.optimizer):
        raise ValueError(
            f"--use_8bit_adam is another optimizer than --optimizer {optimization.optimizer}; leave one of them out"
        )
    if optimization.optimizer_args and not rules.is_path(optimization.optimizer):
        raise ValueError(
            f"--optimizer_args {' '.join(optimization.optimizer_args)}: --optimizer {optimization.optimizer} has "
            "flags of its own, --adam_* and --prodigy_*; give these, or a class such as --optimizer torch.optim:AdamW"
        )
    for flag in ("optimizer", "lr_scheduler"):
        names = [word.partition("=")[0] for word in getattr(optimization, f"{flag}_args") or ()]
        if taken := [name for name in names if name in ("lr", "params", "optimizer") or names.count(name) > 1]:
            why = "the learning rate is --learning_rate" if taken[0] == "lr" else "leave it out, or give it once"
            raise ValueError(f"--{flag}_args {taken[0]}: {why}")
    if optimization.optimizer != "prodigy":
        return
    if optimization.use_8bit_adam:
        raise ValueError("--use_8bit_adam is another optimizer than --optimizer prodigy; leave one of them out")
    if optimization.text_encoder_lr not in (None, optimization.learning_rate):
        raise ValueError(
            f"--text_encoder_lr {optimization.text_encoder_lr}: --optimizer prodigy has one learning rate for all; "
            "leave it out"
        )
    if optimization.learning_rate == 0:
        raise ValueError(
            "--learning_rate 0: --optimizer prodigy takes a factor above 0 on its step size; 1.0 is usual"
        )
    if optimization.learning_rate <= 0.1:
        warn(
            f"--learning_rate {optimization.learning_rate} is small for --optimizer prodigy, which finds the step "
            "size by itself and takes this as a factor on it; 1.0 is usual"
        )


def _warn_of_zeros(config: Config) -> None:
    """Zeros that are accepted and that leave something out which a user may miss."""
    diffusion, optimization = config.diffusion, config.optimization
    if diffusion.snr_gamma == 0:
        warn("--snr_gamma 0 weighs the diffusion loss by 0; for the plain loss leave it out")
    if optimization.learning_rate == 0:
        warn("--learning_rate 0: the denoiser is not trained")
    length = "num_train_epochs" if optimization.max_train_steps is None else "max_train_steps"
    if getattr(optimization, length) == 0:
        warn(f"--{length} 0: nothing is trained; the result is what the run starts from")


def _check_validation(config: Config) -> None:
    data, reported = config.data, config.validation.report_to
    if data.validation_split is not None and data.validation_every_nth is not None:
        raise ValueError("--validation_split and --validation_every_nth exclude one another; give one of them")
    if wrong := [scale for scale in config.validation.validation_lora_scales or () if not math.isfinite(scale)]:
        raise ValueError(f"--validation_lora_scales {wrong[0]}: it must be finite")
    if reported not in (*TRACKERS, "all", "none"):
        raise ValueError(f"--report_to {reported}: accepted are {', '.join(TRACKERS)}, all and none")


def _check_gpu(config: Config) -> None:
    if config.validation.for_gpu is None:
        return
    gpus(config.validation.for_gpu)
    if not config.validation.dry_run:
        raise ValueError("--for_gpu estimates what a run would need and takes no step; add --dry_run")


def gpus(text: str) -> tuple[int | None, int]:
    """How many GPUs, if the text says so, and the bytes of one, which is given by its memory or its name.

    Raises:
        ValueError: with what is accepted.

    >>> gpus("24GB") == (None, 24 * 2**30), gpus("8 x RTX 4090") == (8, 24564 * 2**20)
    (True, True)
    """
    count, one = re.fullmatch(r"(?:([1-9]\d*)\s*x\s*)?(.*)", text.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    name = re.sub(r"[\s_]|(?<=[a-z])-", "", one).removeprefix("nvidia").removeprefix("geforce")
    several = int(count) if count else None
    if name in GPUS:
        return several, GPUS[name] * 2**20
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b)?", name)) and float(match[1]) > 0:
        return several, int(float(match[1]) * 2**30)
    raise ValueError(
        f"--for_gpu {text}: accepted are a GPU's memory, such as 24GB, and {', '.join(GPUS)}, each also with a number "
        "of GPUs, such as 8x24GB"
    )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if evaluation.eval_steps is None:
        return
    if evaluation.eval_data_dir is None:
        raise ValueError("--eval_steps compares with real images: give their folder by --eval_data_dir")
    if unknown := [name for name in evaluation.eval_metrics if name not in METRICS]:
        raise ValueError(f"--eval_metrics {' '.join(unknown)}: accepted are {', '.join(METRICS)}")


def _check_output(config: Config) -> None:
    output, pipeline = config.output, config.model.pipeline
    resumed = output.resume_from_checkpoint == "hub"
    if resumed and not output.push_to_hub and output.hub_model_id is None:
        raise ValueError("--resume_from_checkpoint hub: say by --hub_model_id in which repository the checkpoint is")
    if output.hub_token is not None and rules.uses_a_token(config.values()):
        warn(
            "--hub_token: the list of processes and the shell's history show it; `hf auth login` or HF_TOKEN are safer"
        )
    if Path(output.output_dir).resolve() == Path(pipeline).resolve():
        raise ValueError(f"--output_dir {output.output_dir}: this is the pipeline to start from; give another folder")
    for name, place in starting_points(config.model, config.lora):
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        beside = Path(output.output_dir).resolve() in (
            folder.resolve(),
            *([folder.resolve().parent] if folder.name.startswith(layout.CHECKPOINT_PREFIX) else []),
        )
        fresh = output.resume_from_checkpoint is None and _holds_a_run(Path(output.output_dir))
        if os.path.exists(place) and (beside or (fresh and lies_within(place, output.output_dir))):
            raise ValueError(
                f"--output_dir {output.output_dir}: --{name} {place} is in it, which this run would move aside or "
                "write over; give another folder"
            )


def _holds_a_run(folder: Path) -> bool:
    """Whether a run that starts afresh there moves anything aside."""
    names = layout.INDEX, layout.LORA, f"{layout.CHECKPOINT_PREFIX}*", f"*{layout.PEFT_SUFFIX}"
    return any(any(folder.glob(name)) for name in names)


def _check_written(config: Config) -> None:
    """Refuse to write where the data is read: pictures of a run would be training images at its next start."""
    data, output, evaluation = config.data, config.output, config.evaluation
    real = None if evaluation.eval_steps is None else evaluation.eval_data_dir
    trained = [part.data.dataset_name or part.data.train_data_dir for part in data.parts]
    read = [("dataset_name" if part.data.dataset_name else "train_data_dir") for part in data.parts]
    sources = [*zip(read, trained), ("eval_data_dir", real)]
    written = {
        "output_dir": output.output_dir,
        "cache_dir": config.model.cache_dir,
        "data_cache_dir": data.data_cache_dir,
        "logging_dir": os.path.join(output.output_dir, config.validation.logging_dir),
        "report_to": None,
    }
    if config.validation.report_to in ("wandb", "all"):  # which keeps the logged pictures in the working directory
        written["report_to"] = os.path.join(os.environ.get("WANDB_DIR") or ".", "wandb")
    for source, folder in sources:
        if folder is None or not os.path.isdir(folder):
            continue
        for name, place in written.items():
            check_outside(f"--{name}", place, f"--{source}", folder)
    folders = [folder for folder in trained if folder and os.path.isdir(folder)]
    if real and any(lies_within(real, folder) or lies_within(folder, real) for folder in folders):
        warn("--eval_data_dir: its images are trained on too, so the metrics look better than they are")


def check_outside(flag: str, place: str | None, source: str, folder: str) -> None:
    """Refuse a place that a program writes to within a folder whose images it reads.

    Raises:
        ValueError: with both flags.
    """
    if place is not None and lies_within(place, folder):
        raise ValueError(
            f"{flag} {place}: it lies in {source} {folder}, where the next start would take what is written for data; "
            "give a folder outside"
        )
