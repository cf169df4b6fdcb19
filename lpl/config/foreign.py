"""Flags of other scripts: some are ignored; those of diffusers' research script for LPL are translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lpl.config.config import Config
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, at_most, flag, flags_of
from lpl.tools.words import warn


@dataclass(frozen=True)
class Foreign:
    """accepted from other scripts"""

    enable_xformers_memory_efficient_attention: bool = flag(
        False, "ignored: PyTorch's attention is the default; see --attention_backend"
    )
    enable_npu_flash_attention: bool = flag(False, "ignored: --attention_backend _native_npu asks for that kernel")
    local_rank: int = flag(-1, "ignored: the launcher sets the rank in the environment")
    use_lpl: bool = flag(False, "ignored: LPL is on unless --lpl_weight is 0")
    lpl_scale: bool = flag(False, "ignored: see --lpl_weight and --lpl_sigma_threshold")
    lpl_loss_type: str = flag("mse", "mse sets --lpl_distance l2, l1 sets --lpl_distance l1", choices=("mse", "l1"))
    lpl_start: int = flag(0, "sets --lpl_start_step", range=NOT_NEGATIVE)
    lpl_num_blocks: int = flag(
        4,
        "N sets --lpl_blocks mid up_0 ... up_(N-1)",
        range=(NOT_NEGATIVE, at_most(100)),
    )
    lpl_t_threshold: int = flag(
        200, "sets --lpl_sigma_threshold to the noise-to-signal ratio of this timestep", range=POSITIVE
    )
    lpl_norm_type: str = flag(
        "default",
        "shared, with --lpl_pow_law and --lpl_remove_outliers, sets --lpl_variant reference; otherwise ignored",
        choices=("default", "shared", "batch"),
    )
    lpl_pow_law: bool = flag(False, "has an effect only with --lpl_norm_type shared and --lpl_remove_outliers")
    lpl_remove_outliers: bool = flag(False, "has an effect only with --lpl_norm_type shared and --lpl_pow_law")


FOREIGN = frozenset(flags_of(Foreign))
# Ignored flags, and what replaces them.
IGNORED = {
    "enable_xformers_memory_efficient_attention": "PyTorch's own is the default, --attention_backend xformers another",
    "enable_npu_flash_attention": "PyTorch's own is the default, --attention_backend takes another",
    "local_rank": "each process learns its number from the launcher's environment",
    "use_lpl": "LPL is on unless --lpl_weight is 0",
    "lpl_scale": "LPL is weighted by --lpl_weight and applies below --lpl_sigma_threshold",
}

# Flags of SimpleTuner, of kohya's scripts and of diffusers' for DreamBooth, as in docs/migrate.md, and what does the
# same here; None: nothing does.
OTHERS = {
    "lora_rank": "--rank",
    "network_dim": "--rank",
    "network_alpha": "--lora_alpha",
    "network_dropout": "--lora_dropout",
    "network_module": "--lora, or --adapter",
    "network_args": "--adapter with --decompose_factor, and --lora_rank_pattern",
    "lora_type": "--adapter",
    "lycoris_config": "--adapter with --decompose_factor",
    "network_weights": "--lora_init",
    "init_lora": "--lora_init",
    "base_weights": "--merge_lora",
    "base_weights_multiplier": "--merge_lora with FILE:STRENGTH",
    "assistant_lora_path": "--training_adapter",
    "pretrained_unet_model_name_or_path": "--denoiser_model_name_or_path",
    "pretrained_transformer_model_name_or_path": "--denoiser_model_name_or_path",
    "pretrained_text_encoder_4_name_or_path": "--pretrained_model_name_or_path, a folder that has it",
    "pretrained_tokenizer_4_name_or_path": "--pretrained_model_name_or_path, a folder that has it",
    "clip_l": "--single_file_config, a pipeline that has it",
    "t5xxl": "--single_file_config, a pipeline that has it",
    "model_type": "--lora, or nothing to train all weights",
    "model_family": "not needed, it is found from the pipeline",
    "base_model_precision": "--quantize_base",
    "fp8_base": "--quantize_base fp8",
    "enable_group_offload": "--group_offload",
    "blocks_to_swap": "--group_offload, which moves all blocks",
    "full_bf16": "--mixed_precision bf16",
    "no_half_vae": "not needed, the VAE runs in float32",
    "unet_lr": "--learning_rate",
    "optimizer_type": "--optimizer, also as package:Class, or --use_8bit_adam",
    "optimizer_config": "--optimizer_args",
    "lr_scheduler_type": "--lr_scheduler as package:Class",
    "max_train_epochs": "--num_train_epochs",
    "lr_scheduler_num_cycles": "--lr_num_cycles",
    "lr_scheduler_power": "--lr_power",
    "min_snr_gamma": "--snr_gamma",
    "ip_noise_gamma": "--input_perturbation",
    "caption_dropout_rate": "--proportion_empty_prompts",
    "caption_dropout_probability": "--proportion_empty_prompts",
    "caption_extension": "not needed, a .txt or .caption beside each image is read",
    "caption_strategy": "not needed for text files, each line of which is a caption with --caption_per_line; for an "
    "instance prompt, --instance_prompt",
    "data_backend_config": "--train_data_dir or --dataset_name; for several, datasets in a recipe for --config",
    "dataset_config": "--train_data_dir and --resolution; for several, datasets in a recipe for --config",
    "flip_aug": "--random_flip",
    "caption_separator": "--tag_separator",
    "caption_tag_dropout_rate": "--tag_dropout",
    "shuffle_caption": "--shuffle_tags",
    "keep_tokens": "--keep_tags",
    "keep_tokens_separator": "--keep_tags_separator",
    "instance_data_dir": "--train_data_dir",
    "masked_loss": "--mask_data_dir, --mask_column mask with NAME.mask.png beside NAME.png, or --alpha_mask",
    "conditioning_data_dir": "--mask_data_dir",
    "cache_latents_to_disk": "--cache_latents",
    "cache_text_encoder_outputs": "--cache_text_embeddings",
    "cache_text_encoder_outputs_to_disk": "--cache_text_embeddings",
    "enable_bucket": "--aspect_ratio_buckets auto",
    "bucket_reso_steps": "--bucket_step",
    "bucket_no_upscale": "not needed, images are enlarged by --bucket_upscale only",
    "min_bucket_reso": "--aspect_ratio_buckets with the sizes themselves",
    "max_bucket_reso": "--aspect_ratio_buckets with the sizes themselves",
    "random_crop": "not needed, crops are random without --center_crop",
    "aspect_bucket_alignment": "--bucket_step",
    "aspect_bucket_rounding": None,
    "with_prior_preservation": "an entry of datasets with a loss_weight, in a recipe for --config",
    "class_data_dir": "an entry of datasets with a loss_weight, in a recipe for --config",
    "class_prompt": "the captions of that entry of datasets, in a recipe for --config",
    "prior_loss_weight": "loss_weight of that entry of datasets, in a recipe for --config",
    "num_class_images": "max_train_samples of that entry of datasets, in a recipe for --config",
    "reg_data_dir": "an entry of datasets, in a recipe for --config",
    "repeats": "repeats of an entry of datasets, in a recipe for --config",
    "flow_schedule_shift": "not needed, the shift is that of the pipeline's scheduler",
    "save_every_n_steps": "--checkpointing_steps",
    "save_last_n_steps": "--checkpoints_total_limit",
    "checkpoint_step_interval": "--checkpointing_steps",
    "save_model_as": "--save_single_file fp16, or python -m lpl.export afterwards",
    "save_precision": "--save_single_file with that precision",
    "push_checkpoints_to_hub": "--hub_strategy every_save",
    "resume": "--resume_from_checkpoint latest",
    "sample_prompts": "--validation_prompts_file",
    "user_prompt_library": "--validation_prompts_file",
    "validation_negative_prompt": "negative_prompt of a prompt in a recipe or --validation_prompts_file",
    "validation_seed": "seed of a prompt in a recipe or --validation_prompts_file",
    "sample_every_n_steps": "--validation_steps",
    "validation_step_interval": "--validation_steps",
    "eval_dataset_id": "--validation_every_nth or --validation_split",
    "max_data_loader_n_workers": "--dataloader_num_workers",
    "config_file": "--config",
}


def translated(config: Config, foreign: Mapping[str, Any]) -> Config:
    """Warn of ignored flags, and translate those of the research script to the flags of this script.

    Args:
        foreign: the given flags of :class:`Foreign`.

    Raises:
        ValueError: if one contradicts a flag of this script.
    """
    for name in IGNORED:
        if name in foreign:
            warn(f"--{name} has no effect: {IGNORED[name]}")
    if "use_lpl" not in foreign and any(name.startswith("lpl_") for name in foreign):
        warn("LPL is on, though --use_lpl is not given; turn it off by --lpl_weight 0")
    if "lpl_loss_type" in foreign:
        kind = foreign["lpl_loss_type"]
        config = _taken_for(config, f"--lpl_loss_type {kind}", "lpl_distance", {"mse": "l2", "l1": "l1"}[kind])
    if "lpl_start" in foreign:
        config = _taken_for(config, f"--lpl_start {foreign['lpl_start']}", "lpl_start_step", foreign["lpl_start"])
    if "lpl_num_blocks" in foreign:
        count = foreign["lpl_num_blocks"]
        blocks = ("mid", *(f"up_{i}" for i in range(count)))
        config = _taken_for(config, f"--lpl_num_blocks {count}", "lpl_blocks", blocks)
    if "lpl_t_threshold" in foreign:
        for name in ("lpl_sigma_threshold", "lpl_threshold_base_resolution"):
            if name in config.given:
                raise ValueError(f"--lpl_t_threshold and --{name} are two thresholds; leave one of them out")
        config = replace(config, timestep_threshold=foreign["lpl_t_threshold"])
    return _variant_translated(config, foreign)


def _taken_for(config: Config, words: str, name: str, value: Any) -> Config:
    """Set a flag of this script to the value that a foreign flag stands for."""
    ours = f"--{name} {' '.join(value) if isinstance(value, tuple) else value}"
    if name in config.given and config.values()[name] != value:
        raise ValueError(
            f"{words} means {ours} here, which is not the --{name} that is given too; leave one of them out"
        )
    warn(f"{words} is taken for {ours}")
    return replace(config.changed(**{name: value}), given=config.given | {name})


def _variant_translated(config: Config, foreign: Mapping[str, Any]) -> Config:
    """Translate normalisation, depth weights and masks of the research script, which its README sets together."""
    names = ("lpl_norm_type", "lpl_pow_law", "lpl_remove_outliers")
    words = " ".join(
        f"--{name}" + (f" {foreign[name]}" if name == names[0] else "") for name in names if name in foreign
    )
    if not words:
        return config
    lpl = config.lpl
    if len(words.split()) == 4 and foreign["lpl_norm_type"] == "shared" and lpl.lpl_distance == "l2":
        return _taken_for(config, words, "lpl_variant", "reference")
    weighting = lpl.lpl_depth_weighting
    mask = "--lpl_no_outlier_mask" if lpl.lpl_no_outlier_mask else "outlier masks"
    used = f"--lpl_normalization {lpl.lpl_normalization}, --lpl_depth_weighting " + (
        weighting if isinstance(weighting, str) else " ".join(map(str, weighting))
    )
    if lpl.lpl_variant == "reference":
        used, mask = "--lpl_variant reference", "its masks"
    warn(
        f"{words} has no counterpart (only --lpl_norm_type shared --lpl_pow_law --lpl_remove_outliers together, with "
        f"squared differences, has one: --lpl_variant reference); this run uses {used} and {mask}"
    )
    return config
