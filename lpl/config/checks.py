"""Checks of the command line, and of whether the places that it names exist: invalid values, contradicting flags.

Each refusal is one sentence: what was given, what is accepted, which flag to change. A flag that is given and has no
effect is warned of. Checks that need a folder's content, the machine or the pipeline come later
(:mod:`lpl.training.preflight`, :mod:`lpl.families.resolve`, :mod:`lpl.evaluation.training`).
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from lpl.config import rules
from lpl.config.choices import (
    ADAPTER_NAMES,
    FP8,
    GPUS,
    INIT_LORA_WEIGHTS,
    LORA,
    MASK_COLUMN,
    METRICS,
    OFT,
    TRACKERS,
)
from lpl.config.config import FLAGS, Config
from lpl.config.data_sets import MOST_REPEATS, OF_ONE, OWN, PLACES, Entry, name_of, place_of
from lpl.config.flag import flags_of, kind_of
from lpl.config.foreign import FOREIGN
from lpl.config.groups import Data, Lora, Lpl, Model, naming
from lpl.config.prompts import check_entries, text_of
from lpl.config.sizes import AUTO
from lpl.options import check_options, parse_weight
from lpl.tools.layout import CHECKPOINT_PREFIX, INDEX, PEFT_SUFFIX
from lpl.tools.layout import LORA as LORA_FILE
from lpl.tools.places import lies_within
from lpl.tools.privacy import HUB_ID
from lpl.tools.single_files import single_file, why_no_file
from lpl.tools.words import close_match, has_word, warn, why_no_folder


MAY_BE_FILES = (
    *("config", "pretrained_model_name_or_path", "denoiser_model_name_or_path"),
    *("lora_init", "merge_lora", "training_adapter", "validation_prompts_file"),
)


def check_words(config: Config) -> None:
    """Run all checks that need the command line only.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    _check_places(config)
    _check_data_sets(config.data)
    _check_sources(config)
    _check_sizes(config)
    _check_streaming(config)
    check_entries(config.validation.validation_prompts or ())
    _check_captions(config)
    _check_caches(config)
    _check_masks(config)
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
    _check_places(config)
    _check_data_sets(config.data)
    _check_parts(config.data)
    _check_sizes(config)
    _check_captions(config)
    _check_masks(config)


def warn_of_idle_flags(config: Config) -> None:
    """Warn of given flags that have no effect in this run; needs a complete configuration."""
    values = config.values()
    for name in sorted(config.given):
        used = FLAGS[name].used
        if used is not None and not used(values):
            warn_idle(name)


def warn_idle(name: str) -> None:
    warn(f"--{name} has no effect in this run")


def _check_places(config: Config) -> None:
    for name, value in config.values().items():
        if FLAGS[name].path:
            for place in value if isinstance(value, tuple) else (value,):
                _check_place(name, place)


def _check_place(name: str, place: str | None) -> None:
    """Refuse an empty path, one that cannot be looked up (too long, or its folder may not be read), and a file."""
    if place == "":
        raise ValueError(f"--{name}: the path is empty; give one, or leave the flag out")
    try:
        file = not stat.S_ISDIR(os.stat(place or ".").st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass  # not a local path
    except OSError as error:
        raise ValueError(f"--{name} {reprlib.repr(place)}: {error.strerror}") from error
    else:
        if file and name not in MAY_BE_FILES:
            why = _why_no_data if name in ("train_data_dir", "dataset_name") else why_no_folder
            raise ValueError(f"--{name} {place}: {why(str(place))}")


def _check_data_sets(data: Data) -> None:
    """Refuse a list of data sets that cannot be meant, and flags that do not go with one."""
    if data.datasets is None:
        return
    for number, found in enumerate(data.datasets, 1):
        _check_entry(f"datasets, entry {number}", found)
    names = [name_of(found) for found in data.datasets if "name" in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"datasets: {twice[0]} is the name of two entries; give each its own")
    for name in PLACES:
        if getattr(data, name) != getattr(Data(), name):
            raise ValueError(
                f"--{name} is for one data set, and datasets lists several; write it into the list, or leave one of "
                "them out (of a recipe, by --without)"
            )
    if data.streaming:
        raise ValueError("--streaming reads one data set, and datasets lists several; leave out one of them")
    if data.validation_every_nth is not None and data.holds_out_splits:
        raise ValueError(
            "--validation_every_nth and validation_split of datasets exclude one another; leave one of them out"
        )


def _check_entry(where: str, found: Entry) -> None:
    declared = flags_of(Data)
    kinds = {name: kind_of(Data, name) for name in OF_ONE if name in declared} | OWN
    for name, value in found.items():
        if name not in kinds:
            hint = close_match(name, kinds) or f"; it takes {', '.join(kinds)}"
            beside = ", which goes beside the list" if name in declared else ""
            raise ValueError(f"{where}: there is no {reprlib.repr(name)}{beside}{'' if beside else hint}")
        kind = kinds[name]
        fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if not fits:
            words = {str: "a word, in quotes if it is a number", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{where}: {name} takes {words}, not {reprlib.repr(value)}")
        if name in declared:
            declared[name].check(f"datasets, {name}", value)
        if name in declared and declared[name].path:
            _check_place(name, os.path.expanduser(str(value)))
    if not place_of(found):
        raise ValueError(f"{where}: it names no data set; give it a train_data_dir or a dataset_name")
    if not 1 <= found.get("repeats", 1) <= MOST_REPEATS:
        raise ValueError(f"{where}: repeats {found['repeats']}: it must be from 1 to {MOST_REPEATS:,}")
    if not 0 <= found.get("loss_weight", 1) < math.inf:
        raise ValueError(f"{where}: loss_weight {found['loss_weight']}: it must be 0 or more")


def _check_sources(config: Config) -> None:
    model, data = config.model, config.data
    parse_limit(data.max_bad_samples)
    if not model.pretrained_model_name_or_path:
        raise ValueError("--pretrained_model_name_or_path is missing: a folder with a pipeline, or its id on the Hub")
    if why := why_no_pipeline(model.pretrained_model_name_or_path):
        raise ValueError(f"--pretrained_model_name_or_path {model.pretrained_model_name_or_path}: {why}")
    if config.validation.for_gpu is None or data.dataset_name or data.train_data_dir:
        _check_parts(data)
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


def _check_parts(data: Data) -> None:
    for part in data.parts:
        with naming(part, data.parts):
            _check_source(part.data)


def _check_source(data: Data) -> None:
    if not data.dataset_name and not data.train_data_dir:
        raise ValueError("--dataset_name or --train_data_dir is needed, but neither is given")
    if data.dataset_config_name and not data.dataset_name:
        raise ValueError("--dataset_config_name has no effect without --dataset_name; leave it out")
    if not data.dataset_name and (why := _why_no_data(data.folder)):
        raise ValueError(f"--train_data_dir {data.train_data_dir}: {why}")
    if data.mask_data_dir is not None and (data.dataset_name or data.streaming):
        raise ValueError(
            "--mask_data_dir has masks for a folder of images, --train_data_dir without --streaming; for other data, "
            "--mask_column names a column of masks"
        )
    if data.mask_data_dir is not None and (why := why_no_folder(data.mask_data_dir)):
        raise ValueError(f"--mask_data_dir {data.mask_data_dir}: {why}")
    if data.validation_split is not None and not data.dataset_name:
        raise ValueError(
            "--validation_split names a split of --dataset_name; with --train_data_dir use --validation_every_nth"
        )
    if data.train_split != "train" and not data.dataset_name:
        raise ValueError(
            f"--train_split {data.train_split} names a split of --dataset_name; --train_data_dir has none; give the "
            "sub-folder itself"
        )
    if data.validation_split == data.train_split:
        raise ValueError(f"--validation_split {data.validation_split}: that is what is trained on; name another split")


def _why_no_data(path: str) -> str | None:
    if Path(path).is_file() and Path(path).suffix.lower() in (".parquet", ".tar"):
        return "this is a file; put it into a folder, and give that with --streaming"
    return why_no_folder(path)


def why_no_pipeline(path: str) -> str | None:
    """Why a path is not a pipeline, and what to give instead; None if it may be one."""
    place = Path(path)
    if place.is_file():
        return why_no_file(path)
    if (place / "model_index.json").is_file():
        return None
    if (place / "pytorch_lora_weights.safetensors").is_file() or list(place.glob("*/adapter_config.json")):
        return "this is a LoRA; give the pipeline that it was trained on, and this by --lora_init to go on training it"
    try:
        if single_file(path) is not None:
            return None
    except ValueError as error:
        return str(error)
    if place.is_dir():
        return "this folder has no model_index.json, so it is no pipeline of diffusers"
    if not HUB_ID.fullmatch(path):
        return "there is no such folder, and no repository on the Hub has such a name"
    return None


def _check_sizes(config: Config) -> None:
    data = config.data
    several = "," in str(data.resolution)
    if data.streaming and (several or data.aspect_ratio_buckets):
        flag = "--aspect_ratio_buckets" if data.aspect_ratio_buckets else f"--resolution {data.resolution}"
        raise ValueError(
            f"{flag} needs the sizes of all images before the training, which --streaming does not know; leave one "
            "of them out"
        )
    if several and data.aspect_ratio_buckets not in (None, AUTO):
        raise ValueError(
            f"--resolution {data.resolution}: with several sides, sizes are made from each of them by "
            f"--aspect_ratio_buckets {AUTO}; or give one side, and all sizes in --aspect_ratio_buckets"
        )


def _check_caches(config: Config) -> None:
    data = config.data
    flags = ("cache_latents", data.cache_latents), ("cache_text_embeddings", data.cache_text_embeddings)
    for name in (name for name, on in flags if on):
        if data.streaming:
            raise ValueError(f"--{name} needs a data set of known length, and --streaming has none; leave one out")
    if data.cache_latents and not data.center_crop and data.crops_per_image is None:
        raise ValueError(
            "--cache_latents cannot keep a new random crop in every epoch; give --center_crop, or --crops_per_image N "
            "for N random crops of each image, each encoded once"
        )
    if not data.cache_text_embeddings:
        return
    if config.model.train_text_encoder:
        raise ValueError(
            "--cache_text_embeddings: --train_text_encoder changes the embeddings in every step; leave one of them out"
        )
    if data.shuffle_tags or data.tag_dropout:
        name = "shuffle_tags" if data.shuffle_tags else "tag_dropout"
        raise ValueError(
            f"--cache_text_embeddings: with --{name} a caption has too many forms to encode each; leave one of them "
            "out, or write some forms of each caption as a list"
        )


def _check_captions(config: Config) -> None:
    data = config.data
    for name, text in (
        ("trigger_word", data.trigger_word),
        ("tag_separator", data.tag_separator),
        ("keep_tags_separator", data.keep_tags_separator),
    ):
        if text == "" or (name == "trigger_word" and text is not None and not text.strip()):
            raise ValueError(f"--{name}: it is empty; give one, or leave the flag out")
    if wrong := [share for share in data.text_encoder_dropout or () if not 0 <= share <= 1]:
        raise ValueError(f"--text_encoder_dropout {wrong[0]}: it must be between 0 and 1")
    word, prompts = data.trigger_word, [text_of(entry) for entry in config.validation.validation_prompts or ()]
    if word and (without := [prompt for prompt in prompts if not has_word(prompt, word)]):
        warn(
            f"--validation_prompts: {reprlib.repr(without[0])} is without --trigger_word {word}, so its samples may "
            "not show what is learned"
        )


def _check_streaming(config: Config) -> None:
    """Refuse what needs the number of images, which --streaming knows only with --max_train_samples."""
    data = config.data
    if not data.streaming or data.max_train_samples is not None:
        return
    if config.optimization.max_train_steps is None:
        raise ValueError("--streaming: how many images an epoch has is not known; give --max_train_steps")
    every_epochs = config.validation.validation_steps is None and config.validation.validation_epochs > 0
    if rules.validates(config.values()) and every_epochs:
        raise ValueError(
            "--streaming: how many steps an epoch of --validation_epochs has is not known; give --validation_steps"
        )
    if 0 < (parse_limit(data.max_bad_samples) or 0) < 1:
        raise ValueError(
            f"--max_bad_samples {data.max_bad_samples}: how many images --streaming has is not known, so a share has "
            "no meaning; give a number"
        )


def _check_masks(config: Config) -> None:
    data = config.data
    if data.alpha_mask and data.mask_column is not None:
        raise ValueError(
            f"--alpha_mask takes the images' transparency for masks, and --mask_column {data.mask_column} other "
            "images; leave one of them out"
        )
    folder = next((part.data.mask_data_dir for part in data.parts if part.data.mask_data_dir is not None), None)
    if folder is not None and (data.alpha_mask or data.mask_column not in (None, MASK_COLUMN)):
        other = "--alpha_mask" if data.alpha_mask else f"--mask_column {data.mask_column}"
        raise ValueError(f"--mask_data_dir {folder} and {other} both say where the masks are; leave one of them out")
    if data.unmasked_weight == 1 and rules.masks_the_loss(config.values()):
        warn("--unmasked_weight 1 counts all pixels alike, so the masks have no effect; give less")


def parse_limit(text: str | None) -> float | None:
    """``"20"`` -> 20 samples, ``"0.01"`` -> 0.01, a share of the data set; None means no limit.

    Raises:
        ValueError: for anything else.

    >>> parse_limit("20"), parse_limit("0.01"), parse_limit("0")
    (20.0, 0.01, 0.0)
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 or (value >= 1 and value.is_integer())):
        raise ValueError(f"--max_bad_samples {text}: accepted are a number of samples, such as 20, or a share below 1")
    return value


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
    if 0 in (optimization.max_train_steps, optimization.num_train_epochs) and not optimization.max_train_steps:
        warn("--max_train_steps 0: nothing is trained; the result is what the run starts from")


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
    gpu_memory(config.validation.for_gpu)
    if not config.validation.dry_run:
        raise ValueError("--for_gpu estimates what a run would need and takes no step; add --dry_run")


def gpu_memory(text: str) -> int:
    """Bytes of a GPU that is given by its memory, or by its name.

    Raises:
        ValueError: with what is accepted.

    >>> gpu_memory("24GB") == 24 * 2**30, gpu_memory("RTX 4090") == 24564 * 2**20
    (True, True)
    """
    name = re.sub(r"[\s_]|(?<=[a-z])-", "", text.lower()).removeprefix("nvidia").removeprefix("geforce")
    if name in GPUS:
        return GPUS[name] * 2**20
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b)?", name)) and float(match[1]) > 0:
        return int(float(match[1]) * 2**30)
    raise ValueError(f"--for_gpu {text}: accepted are a GPU's memory, such as 24GB, and {', '.join(GPUS)}")


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
            *([folder.resolve().parent] if folder.name.startswith(CHECKPOINT_PREFIX) else []),
        )
        fresh = output.resume_from_checkpoint is None and _holds_a_run(Path(output.output_dir))
        if os.path.exists(place) and (beside or (fresh and lies_within(place, output.output_dir))):
            raise ValueError(
                f"--output_dir {output.output_dir}: --{name} {place} is in it, which this run would move aside or "
                "write over; give another folder"
            )


def _holds_a_run(folder: Path) -> bool:
    """Whether a run that starts afresh there moves anything aside."""
    return any(any(folder.glob(name)) for name in (INDEX, LORA_FILE, f"{CHECKPOINT_PREFIX}*", f"*{PEFT_SUFFIX}"))


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
