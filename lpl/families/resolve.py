"""Completes a configuration from the pipeline's description, or refuses it.

Flags that default to None get the family's or the pipeline's value. Afterwards nothing in the configuration changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key

from lpl.autoencoders import RGB, SUPPORTED, decoder_blocks, downscaling_factor, skeleton
from lpl.config import Config
from lpl.config.checks import check_loss_options, warn_idle, warn_of_idle_flags
from lpl.config.choices import ALL_LINEAR
from lpl.config.groups import Data
from lpl.config.prompts import NEGATIVE, own_settings, size_of
from lpl.config.sizes import AUTO, default_step, parse_sizes, sides_of
from lpl.families import FAMILIES, Family
from lpl.families.description import Description, check_vae_dtype, other_vae_config
from lpl.families.lora_files import ADAPTABLE
from lpl.families.single_file import check_layers
from lpl.gate import SMALLEST_CROP, accepted_crops
from lpl.loss import LatentPerceptualLoss
from lpl.objectives import OBJECTIVES, DiffusionObjective, Epsilon, FlowMatching, is_flow, own_objective
from lpl.student import Student, check_configuration
from lpl.tools.words import first_line, warn


OF_TEXTS = (  # flags that have no meaning for class labels
    *("caption_per_line", "instance_prompt", "caption_prefix", "caption_suffix", "trigger_word"),
    *("shuffle_tags", "tag_dropout"),
    *("cache_text_embeddings", "tag_separator", "keep_tags", "keep_tags_separator", "text_encoder_dropout"),
)
FEW_STEPS = ("turbo", "schnell", "lightning", "flash", "lcm", "dmd2")  # in names of models that sample in a few steps
DISTILLED_STEPS = 8  # default of --validation_inference_steps for them


def resolve(config: Config, description: Description) -> Config:
    """Check the flags against the pipeline and fill in the defaults that depend on it.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    config = _with_distillation(config, description)
    config = _with_objective(config, description)
    config = _with_timesteps(config, description)
    config = _with_captions(config, description)
    config = _with_text_encoders(config, description)
    config = _with_sizes(config, description)
    _check_prompts(config, description)
    config = _with_lora_targets(config, description)
    config = _with_sigma_threshold(config, description)
    if config.lpl.enabled or config.data.holds_out:
        _check_features(config, description)
    _check_crop(config, description)
    _check_single_file(config, description)
    if "guidance_scale" in config.given and not description.family.takes_guidance(description.parts):
        warn_idle("guidance_scale")
    if config.validation.validation_guidance_scale is not None and description.family.guides_itself(description.parts):
        warn_idle("validation_guidance_scale")
    warn_of_idle_flags(config)
    return config


def with_decoder_dtype(config: Config, mixed_precision: str) -> Config:
    """Fill in --lpl_vae_dtype auto, which depends on the run's mixed precision; not if no decoder is needed.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``, which accelerate's configuration may say.
    """
    if not (config.lpl.enabled or config.data.holds_out):
        return config
    return config.changed(lpl_vae_dtype=config.lpl.decoder_dtype(mixed_precision))


def _with_distillation(config: Config, description: Description) -> Config:
    """Warn of a model that samples in a few steps, by what its files say or else by its name; its samples are drawn
    in a few, without guidance."""
    path, family, validation = str(config.model.pretrained_model_name_or_path), description.family, config.validation
    names = [word for word in FEW_STEPS if word in Path(path).name.lower()]
    by_name = f"by its name ({names[0]})" if names else None
    why = family.distilled(description.index, description.parts) or by_name
    if not why or config.model.from_scratch:
        return config
    if config.lora.training_adapter is None:
        warn(
            f"--pretrained_model_name_or_path {path}: {why}, the model is distilled to sample in a few steps without "
            "guidance, which this training undoes; train the model that it was made from, or a LoRA with a "
            "--training_adapter"
        )
    if "validation_inference_steps" not in config.given:
        config = config.changed(validation_inference_steps=DISTILLED_STEPS)
    told = family.takes_guidance(description.parts) or family.guides_itself(description.parts)
    if validation.validation_guidance_scale is None and not told and not family.class_conditional:
        config = config.changed(validation_guidance_scale=family.no_guidance)
    return config


def _with_objective(config: Config, description: Description) -> Config:
    own, family = own_objective(description.scheduler), description.family
    name = config.model.prediction_type
    _check_noise(description, name)
    if name is None:
        if own not in OBJECTIVES:
            raise ValueError(
                f"the pipeline's scheduler predicts {own!r}; give --prediction_type, one of "
                f"{', '.join(family.objectives)}"
            )
        name = own
    if name not in family.objectives:
        choice = "one of these" if len(family.objectives) > 1 else next(iter(family.objectives))
        raise ValueError(
            f"--prediction_type {name}: {family.pipeline_class.__name__} can only sample models trained on "
            f"{' or '.join(family.objectives)}; choose {choice}"
        )
    if name != own and not config.model.from_scratch:
        warn(
            f"--prediction_type {name}: the pipeline was trained on {own}, so it has to relearn what its output "
            "means; expect a long training"
        )
    if config.diffusion.dream_training and name != Epsilon.name:
        raise ValueError(f"--dream_training is for epsilon, not for {name}; leave it out")
    return config.changed(prediction_type=name)


def _check_noise(description: Description, name: str | None) -> None:
    """Refuse a scheduler without a noise schedule to train on; flow matching needs only the number of timesteps."""
    scheduler, family = description.scheduler, description.family
    if is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod"):
        return
    anew = FlowMatching.name in family.objectives and "num_train_timesteps" in scheduler.config
    if name == FlowMatching.name and anew:
        return
    name = type(scheduler).__name__
    raise ValueError(
        f"--pretrained_model_name_or_path: the pipeline's scheduler, {name}, has no betas, as in EDM and consistency "
        "models, which cannot be trained on here; choose a pipeline whose scheduler has betas or is one of flow "
        "matching" + (", or train this one anew by --prediction_type flow_matching" if anew else "")
    )


def _with_timesteps(config: Config, description: Description) -> Config:
    """The density of timesteps and the weight of the diffusion loss."""
    if config.model.prediction_type != FlowMatching.name:
        _check_diffusion(config, description.scheduler.config.num_train_timesteps)
        return config
    for name, given in (
        ("snr_gamma", config.diffusion.snr_gamma is not None),
        ("timestep_bias_strategy", config.diffusion.timestep_bias_strategy != "none"),
    ):
        if given:
            raise ValueError(
                f"--{name} is for epsilon, v_prediction and sample; for flow_matching use --weighting_scheme"
            )
    if is_flow(description.scheduler) and description.scheduler.config.get("use_dynamic_shifting"):
        warn("the pipeline's flow shift depends on the image's size; training uses none")
    return config.changed(weighting_scheme=config.diffusion.weighting_scheme or "logit_normal")


def _check_diffusion(config: Config, num_train_timesteps: int) -> None:
    diffusion, name = config.diffusion, config.model.prediction_type
    strategy, portion = diffusion.timestep_bias_strategy, diffusion.timestep_bias_portion
    if diffusion.weighting_scheme is not None:
        raise ValueError(f"--weighting_scheme is for flow_matching; for {name} use --snr_gamma")
    if diffusion.precondition_outputs:
        raise ValueError(f"--precondition_outputs is for flow_matching, not for {name}; leave it out")
    if strategy == "range" and diffusion.timestep_bias_end > num_train_timesteps:
        raise ValueError(
            f"--timestep_bias_end {diffusion.timestep_bias_end}: this pipeline has {num_train_timesteps} timesteps"
        )
    if strategy in ("earlier", "later") and portion * num_train_timesteps < 1:
        raise ValueError(
            f"--timestep_bias_portion {portion}: that is less than one of this pipeline's {num_train_timesteps} "
            "timesteps; give more"
        )


def _with_captions(config: Config, description: Description) -> Config:
    """The conditions of the denoiser, and the columns of the data."""
    family = description.family
    values: dict[str, Any] = {}
    if family.class_conditional and "caption_column" not in config.given:
        values["caption_column"] = "label"
    values["mask_column"] = config.data.column_of_masks
    if family.class_conditional and (given := [name for name in OF_TEXTS if name in config.given]):
        raise ValueError(f"--{given[0]} is for captions, and {family.name} is trained on class labels; leave it out")
    _check_encoder_dropout(config, description)
    if config.data.proportion_empty_prompts is None:
        values["proportion_empty_prompts"] = family.empty_share
    length, limit = config.model.max_sequence_length, family.max_sequence_length
    if family.sequence_length is None:
        if "max_sequence_length" in config.given:
            warn_idle("max_sequence_length")
        return config.changed(max_sequence_length=None, **values)
    length = family.sequence_length if length is None else length
    if limit is not None and length > limit:
        raise ValueError(f"--max_sequence_length {length}: this pipeline takes {limit} at most")
    return config.changed(max_sequence_length=length, **values)


def _check_encoder_dropout(config: Config, description: Description) -> None:
    shares, family = config.data.text_encoder_dropout, description.family
    if shares is None:
        return
    if family.token_lengths is Family.token_lengths:  # its tokens are not made for each text encoder
        raise ValueError(
            f"--text_encoder_dropout: {family.name} has one text encoder only, so --proportion_empty_prompts does the "
            "same; give that instead"
        )
    encoders = [name for name in family.text_encoder_names if name not in description.absent]
    if len(shares) != len(encoders):
        raise ValueError(
            f"--text_encoder_dropout {' '.join(map(str, shares))}: this pipeline has {len(encoders)}, "
            f"{', '.join(encoders)}; give a probability for each, in this order"
        )


def _with_text_encoders(config: Config, description: Description) -> Config:
    family, optimization = description.family, config.optimization
    if not config.model.train_text_encoder:
        return config.changed(text_encoder_lr=None, adam_weight_decay_text_encoder=None)
    if not family.trainable_text_encoders:
        others = ", ".join(other.name for other in FAMILIES if other.trainable_text_encoders)
        raise ValueError(
            f"--train_text_encoder: text encoders of {family.name} cannot be trained, only those of {others}; leave "
            "it out"
        )
    rate, decay = optimization.text_encoder_lr, optimization.adam_weight_decay_text_encoder
    if rate is None:
        own = None if optimization.optimizer == "prodigy" else family.text_encoder_learning_rate
        rate = optimization.learning_rate if own is None else own
    if decay is None:
        own = family.text_encoder_weight_decay
        decay = optimization.adam_weight_decay if own is None else own
    return config.changed(text_encoder_lr=rate, adam_weight_decay_text_encoder=decay)


def _with_sizes(config: Config, description: Description) -> Config:
    """The sizes of training images and of samples, which the pipeline must accept."""
    data, multiple = config.data, description.family.resolution_multiple(description.parts)
    side = resolved_resolution(data, description)
    values: dict[str, Any] = {"resolution": side}
    if data.aspect_ratio_buckets == AUTO:
        step = data.bucket_step or default_step(sides_of(side)[0], multiple)
        if step % multiple:
            raise ValueError(f"--bucket_step {step}: this pipeline takes sides that are multiples of {multiple}")
        values["bucket_step"] = step
    config = config.changed(**values)
    given = (
        (config.data.aspect_ratio_buckets, "aspect_ratio_buckets"),
        (config.validation.validation_sizes, "validation_sizes"),
    )
    for text, name in given:
        made = config.data.buckets if text == AUTO else () if text is None else (parse_sizes(text),)
        for height, width in chain(*made):
            _check_size(f"--{name}, {height} x {width}", height, width, description)
    return config


def _check_prompts(config: Config, description: Description) -> None:
    """Sizes and negative prompts of --validation_prompts, which the pipeline must accept."""
    family, general = description.family, config.validation.validation_guidance_scale
    for number, entry in enumerate(config.validation.validation_prompts or (), 1):
        where, own = f"validation_prompts, prompt {number}", own_settings(entry)
        height, width = size_of(entry, config.data.size) or config.data.size
        for name, side in (("height", height), ("width", width)):
            if name in own:
                _check_side(f"{where}, {name} {side}", side, description)
        if "guidance_scale" in own and family.guides_itself(description.parts):
            warn(f"{where}: its guidance_scale has no effect; the pipeline's guider has one")
        _check_area(f"{where}, {height} x {width}", height, width, description)
        if NEGATIVE not in own:
            continue
        if not family.takes_negative_prompts():
            raise ValueError(f"{where}: {family.name} takes no {NEGATIVE}; leave it out")
        guidance = own.get("guidance_scale", family.default_guidance() if general is None else general)
        if guidance <= family.no_guidance:
            warn(
                f"{where}: with guidance_scale {guidance:g} its {NEGATIVE} has no effect; give more than "
                f"{family.no_guidance:g}"
            )


def resolved_resolution(data: Data, description: Description) -> int | str:
    """--resolution, or the family's default side of images in pixels.

    Raises:
        ValueError: if the pipeline does not accept it.
    """
    family, parts, resolution = description.family, description.parts, data.resolution
    if resolution is None and data.aspect_ratio_buckets not in (None, AUTO):
        sizes, multiple = parse_sizes(data.aspect_ratio_buckets), family.resolution_multiple(parts)
        area = max(height * width for height, width in sizes)  # samples are drawn at the square of that many pixels
        resolution = max(1, round(math.sqrt(area) / multiple)) * multiple
    if resolution is None:
        resolution, (_, largest) = family.default_resolution(parts), family.resolution_range(parts)
        if largest is not None and resolution > largest:  # a small model of a family of larger ones
            resolution = family.native_resolution(parts)
    for side in sides_of(resolution):
        _check_size(f"--resolution {side}", side, side, description)
    return resolution


def _check_size(what: str, height: int, width: int, description: Description) -> None:
    """Refuse a size in pixels that the pipeline does not accept; ``what`` is the flag and its value."""
    for side in (height, width):
        _check_side(what, side, description)
    _check_area(what, height, width, description)


def _check_area(what: str, height: int, width: int, description: Description) -> None:
    most = description.family.largest_area(description.parts)
    if most is not None and height * width > most:
        side = math.isqrt(most)
        raise ValueError(f"{what}: this pipeline takes {most:,} pixels at most, such as {side} x {side}")


def _check_side(what: str, side: int, description: Description) -> None:
    """Refuse a side in pixels that the pipeline does not accept; ``what`` is the flag and its value."""
    family, parts = description.family, description.parts
    multiple, (smallest, largest) = family.resolution_multiple(parts), family.resolution_range(parts)
    if side % multiple:
        below = side // multiple * multiple
        raise ValueError(
            f"{what}: this pipeline takes multiples of {multiple}, such as {below or multiple} or {below + multiple}"
        )
    if largest is not None and side > largest:
        raise ValueError(f"{what}: this pipeline takes {largest} at most")
    if side < smallest:
        raise ValueError(f"{what}: this pipeline takes {smallest} at least")


def _with_lora_targets(config: Config, description: Description) -> Config:
    """The family's modules, or those of the flag, which must exist and be of a kind that LoRA adapts."""
    if not config.lora.lora:
        return config
    if config.lora.lora_init is not None:  # which says them
        return config
    own_targets = config.lora.lora_target_modules
    if own_targets is None:
        config = config.changed(lora_target_modules=description.family.lora_modules(description.parts))
    if own_targets in (None, (ALL_LINEAR,)) and not (config.lora.ranks or config.lora.alphas):
        return config
    layers: list[str] = []
    others: list[str] = []
    for name, module in skeleton(description.denoiser).named_modules():
        (layers if isinstance(module, ADAPTABLE) else others).append(name)
    _check_patterns(config, layers)
    for target in own_targets if own_targets not in (None, (ALL_LINEAR,)) else ():
        if not _matching(target, layers) or _matching(target, others):
            raise ValueError(
                f"--lora_target_modules {target}: {description.family.denoiser_name} has no linear layers or "
                f"convolutions of that name; it has, for example, {', '.join(_short_names(layers))}"
            )
    return config


def _check_patterns(config: Config, layers: Sequence[str]) -> None:
    """Refuse a pattern that is of no adapted module; peft would ignore it."""
    targets = config.lora.lora_target_modules or ()
    adapted = layers if targets == (ALL_LINEAR,) else [name for t in targets for name in _matching(t, layers)]
    for flag, patterns in (("lora_rank_pattern", config.lora.ranks), ("lora_alpha_pattern", config.lora.alphas)):
        for pattern in patterns:
            try:
                found = any(get_pattern_key([pattern], name) == pattern for name in adapted)
            except re.error as error:
                raise ValueError(f"--{flag} {pattern}: it is no regular expression ({error})") from error
            if not found:
                raise ValueError(
                    f"--{flag} {pattern}: no adapted module has that name; it names, for example, "
                    f"{', '.join(_short_names(adapted))}"
                )


def _matching(target: str, names: Sequence[str]) -> list[str]:
    """The modules that peft adapts for the target."""
    return [name for name in names if name == target or name.endswith("." + target)]


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of the names, which suffice as targets; the 12 most common, in that order."""
    counts: dict[str, int] = {}
    for name in names:
        *rest, last = name.split(".")
        short = ".".join([*rest[-1:], last]) if last.isdigit() else last
        counts[short] = counts.get(short, 0) + 1
    return sorted(counts, key=lambda short: -counts[short])[:12]


def _with_sigma_threshold(config: Config, description: Description) -> Config:
    """Translate --lpl_t_threshold T (LPL where t < T) to the noise-to-signal ratio of the last timestep below T."""
    limit, name = config.timestep_threshold, config.model.prediction_type
    if limit is None:
        return config
    assert name is not None
    if name == FlowMatching.name:
        raise ValueError(
            f"--lpl_t_threshold {limit} is for epsilon, v_prediction and sample; for flow_matching use "
            "--lpl_sigma_threshold"
        )
    objective = description.objective(name)
    assert isinstance(objective, DiffusionObjective)
    sigma = objective.sigma(torch.arange(min(limit, objective.num_train_timesteps)))
    values: dict[str, Any] = {
        "lpl_sigma_threshold": float(sigma[sigma.isfinite()][-1]),
        "lpl_threshold_base_resolution": 0,
    }
    warn(
        f"--lpl_t_threshold {limit} is taken for --lpl_sigma_threshold {values['lpl_sigma_threshold']} "
        "--lpl_threshold_base_resolution 0"
    )
    return replace(config.changed(**values), given=config.given | set(values), timestep_threshold=None)


def _check_features(config: Config, description: Description) -> None:
    """Check the decoder whose features LPL compares, and the options of the loss for its blocks."""
    vae, path, blocks = description.vae, config.lpl.lpl_vae_name_or_path, config.lpl.lpl_blocks
    if path is not None:
        vae = other_vae_config("lpl_vae_name_or_path", path, config.model.cache_dir, vae, SUPPORTED, blocks)
        theirs, ours = downscaling_factor(vae), downscaling_factor(description.vae)
        if theirs != ours:
            raise ValueError(
                f"--lpl_vae_name_or_path {path}: a position of its latents is {theirs} pixels wide and one of the "
                f"pipeline's {ours}; it must have the same latent space"
            )
    check_vae_dtype(config.lpl.lpl_vae_dtype, vae)
    check_loss_options(config.lpl, tuple(decoder_blocks(skeleton(vae), blocks)) or (RGB,))
    if config.lpl.enabled and config.lpl.lpl_student is not None:
        _check_student(config, config.lpl.lpl_student, vae)


def _check_student(config: Config, path: str, vae: Mapping[str, Any]) -> None:
    try:
        student: Any = Student.load_config(path, cache_dir=config.model.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"--lpl_student {path}: there is no student ({first_line(error)})") from error
    loss = LatentPerceptualLoss(skeleton(vae), config.lpl.lpl_blocks, **config.lpl.loss_options())
    check_configuration(f"--lpl_student {path}", student, loss)
    made_at, side = student.get("resolution"), config.data.size[0]
    if made_at not in (None, side):
        warn(
            f"--lpl_student {path}: it was made from images of {made_at} px, and the run's have {side} px, where it "
            "may be another loss; --lpl_weight auto:0.2 and --lpl_correct_every log its fidelity"
        )


def _check_single_file(config: Config, description: Description) -> None:
    precision = config.output.save_single_file
    if precision is None or config.lora.lora:
        return
    try:
        check_layers(description.family, description.parts)
    except ValueError as error:
        raise ValueError(f"--save_single_file {precision}: {error}; leave the flag out") from error


def _check_crop(config: Config, description: Description) -> None:
    """--lpl_crop: the image must divide into tiles of whole latent positions."""
    side = config.lpl.lpl_crop
    if side is None:
        return
    height, width = config.data.size
    factor = downscaling_factor(description.vae)
    if not config.data.one_size:  # tiles overlap where the image does not divide into them
        if side % factor or side < SMALLEST_CROP * factor:
            raise ValueError(
                f"--lpl_crop {side}: accepted are multiples of {factor} pixels from {SMALLEST_CROP * factor} on"
            )
        return
    accepted = accepted_crops(height, width, factor)
    if side not in accepted:
        raise ValueError(
            f"--lpl_crop {side}: accepted at --resolution {config.data.resolution} are "
            f"{', '.join(map(str, accepted))}: {SMALLEST_CROP} or more latent positions of {factor} pixels, "
            "a divisor of the image's side"
        )
