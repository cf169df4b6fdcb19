"""The command line: every flag of diffusers' scripts with its type and default, and a help of its own."""

import importlib
import os
import sys
import warnings

import pytest
from trainer import ROOT, arguments, parsed, resolved

from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL
from lpl.config.command_line import build_parser, parse
from lpl.config.config import FLAGS as DECLARED
from lpl.config.flag import boolean, number
from lpl.config.prompts import prompt
from lpl.config.rules import schedule
from lpl.config.sizes import resolutions
from lpl.data.reading import RESAMPLING
from lpl.families import FAMILIES


HELP = ROOT / "docs" / "help.txt"

# FLAGS.md: by type, the default; `train_text_to_image.py` decides, then the other scripts from left to right.
FLAGS = {
    float: {
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-08,
        "adam_weight_decay": 0.01,
        "adam_weight_decay_text_encoder": 0.001,
        "dream_detail_preservation": 1.0,
        "input_perturbation": 0,
        "learning_rate": 0.0001,
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "lr_power": 1.0,
        "max_grad_norm": 1.0,
        "mode_scale": 1.29,
        "noise_offset": 0,
        "prodigy_beta3": None,
        "proportion_empty_prompts": 0,
        "snr_gamma": None,
        "text_encoder_lr": 5e-06,
        "timestep_bias_multiplier": 1.0,
        "timestep_bias_portion": 0.25,
    },
    int: {
        "checkpointing_steps": 500,
        "checkpoints_total_limit": None,
        "dataloader_num_workers": None,  # by the machine's cores
        "gradient_accumulation_steps": 1,
        "local_rank": -1,
        "lpl_num_blocks": 4,
        "lpl_start": 0,
        "lpl_t_threshold": 200,
        "lr_num_cycles": 1,
        "max_sequence_length": 77,
        "max_train_samples": None,
        "max_train_steps": None,
        "num_train_epochs": 100,
        "num_validation_images": 4,
        "precondition_outputs": 0,  # SPEC.md: 0, not 1
        "rank": 4,
        "resolution": 512,
        "seed": None,
        "timestep_bias_begin": 0,
        "timestep_bias_end": 1000,
        "train_batch_size": 16,
        "validation_epochs": 5,
    },
    number: {"lr_warmup_steps": 500},
    None: {  # words
        "cache_dir": None,
        "caption_column": "text",
        "dataset_config_name": None,
        "dataset_name": None,
        "hub_model_id": None,
        "hub_token": None,
        "image_column": "image",
        "image_interpolation_mode": "lanczos",
        "logging_dir": "logs",
        "lpl_loss_type": "mse",
        "lpl_norm_type": "default",
        "lpl_weight": "auto:0.2",  # SPEC.md: a number is taken literally
        "lr_scheduler": "constant",
        "mixed_precision": None,
        "non_ema_revision": None,
        "optimizer": "AdamW",
        "output_dir": "sd-model-finetuned",
        "prediction_type": None,
        "pretrained_model_name_or_path": None,
        "pretrained_vae_model_name_or_path": None,
        "report_to": "tensorboard",
        "resume_from_checkpoint": None,
        "revision": None,
        "timestep_bias_strategy": "none",
        "tracker_project_name": "text2image-fine-tune",
        "train_data_dir": None,
        "validation_prompt": None,
        "validation_prompts": None,
        "variant": None,
        "weighting_scheme": "logit_normal",
    },
    boolean: {"prodigy_decouple": True, "prodigy_safeguard_warmup": True, "prodigy_use_bias_correction": True},
    True: dict.fromkeys(  # flags without a value
        (
            *("allow_tf32", "center_crop", "debug_loss", "dream_training", "enable_npu_flash_attention"),
            *("enable_xformers_memory_efficient_attention", "foreach_ema", "gradient_checkpointing", "lpl_pow_law"),
            *("lpl_remove_outliers", "lpl_scale", "offload_ema", "push_to_hub", "random_flip", "scale_lr"),
            *("train_text_encoder", "use_8bit_adam", "use_ema", "use_lpl"),
        ),
        False,
    ),
}
# None in the parser: these follow the pipeline or another flag.
RESOLVED_LATER = {
    "adam_weight_decay_text_encoder",
    "max_sequence_length",
    "proportion_empty_prompts",
    "rank",
    "resolution",
    "text_encoder_lr",
    "weighting_scheme",
}
OWN = {  # SPEC.md, and what this project adds
    "lpl_blocks": None,
    "lpl_sigma_threshold": 3.0,
    "lpl_threshold_base_resolution": 256,
    "lpl_normalization": "shared",
    "lpl_detach_statistics": False,
    "lpl_depth_weighting": "inverse",
    "lpl_no_outlier_mask": False,
    "lpl_distance": "l2",
    "lpl_variant": "paper",
    "lpl_start_step": 0,
    "lpl_ramp_steps": 0,
    "lpl_gradient_checkpointing": False,
    "lpl_vae_dtype": "auto",
    "lpl_vae_name_or_path": None,
    "lpl_measuring_steps": 50,
    "lpl_every": 1,
    "lpl_max_samples": None,
    "lpl_student": None,
    "lpl_correct_every": 0,
    "lpl_crop": None,
    "lpl_project_conflicts": False,
    "lpl_chunk_size": None,
    "aspect_ratio_buckets": None,
    "bucket_step": None,
    "bucket_upscale": False,
    "data_cache_dir": None,
    "crops_per_image": None,
    "cache_latents": False,
    "cache_text_embeddings": False,
    "validation_sizes": None,
    "validation_prompts_file": None,
    "attention_backend": None,
    "channels_last": False,
    "torch_compile": False,
    "optimizer_args": None,
    "lr_scheduler_args": None,
    "adapter": "lora",
    "decompose_both": False,
    "decompose_factor": -1,
    "oft_block_size": 32,
    "init_lora_weights": "gaussian",
    "lora_rank_pattern": None,
    "lora_alpha_pattern": None,
    "validation_lora_scales": None,
    "lpl_outlier_quantile": 0.02,
    "lpl_outlier_margin": 2.0,
    "lpl_outlier_dilation": 3,
    "lpl_outlier_erosion": 5,
    "lpl_outlier_stride": 1,
    "mask_column": None,
    "mask_data_dir": None,
    "alpha_mask": False,
    "unmasked_weight": 0.0,
    "max_bad_samples": None,
    "max_skipped_steps": 100,
    "datasets": None,
    "streaming": False,
    "shuffle_buffer_size": 1000,
    "dataloader_timeout": 600.0,
    "save_single_file": None,
    "hub_private_repo": False,
    "hub_revision": None,
    "hub_strategy": "end",
    "eval_steps": None,
    "eval_data_dir": None,
    "eval_metrics": ["fid", "kid", "precision", "recall", "density", "coverage"],
    "eval_features": ["facebook/dinov2-base"],
    "eval_clip": "openai/clip-vit-base-patch32",
    "eval_num_images": None,
    "eval_batch_size": 8,
    "config": None,
    "without": None,
    "dry_run": False,
    "for_gpu": None,
    "verbose": False,
    "single_file_config": None,
    "denoiser_model_name_or_path": None,
    "merge_lora": None,
    "lora": False,
    "lora_init": None,
    "training_adapter": None,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "use_dora": False,
    "use_rslora": False,
    "quantize_base": None,
    "group_offload": False,
    "offload_frozen": False,
    "activation_offload": False,
    "from_scratch": False,
    "guidance_scale": 3.5,
    "caption_per_line": False,
    "instance_prompt": None,
    "caption_prefix": None,
    "caption_suffix": None,
    "trigger_word": None,
    "shuffle_tags": False,
    "tag_dropout": 0.0,
    "tag_separator": ",",
    "keep_tags": 0,
    "keep_tags_separator": None,
    "text_encoder_dropout": None,
    "train_split": "train",
    "validation_split": None,
    "validation_every_nth": None,
    "num_validation_samples": 64,
    "ema_decay": None,
    "logging_steps": 10,
    "validation_guidance_scale": None,
    "validation_inference_steps": 25,
    "validation_steps": None,
}


def flags():
    return {action.dest: action for action in build_parser()._actions if action.dest != "help"}


def silently(function, *args, **kwargs):
    """The result of a call that must not warn of any flag."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*(--|pipeline)")
        return function(*args, **kwargs)


def said(capsys, words):
    """What the program says to a command line that it ends on; what it warns of before is left out."""
    with pytest.raises(SystemExit) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parse([str(word) for word in words])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    return message.rpartition("error: ")[2]


# Names, types and defaults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in FLAGS for name in FLAGS[kind]])
def test_every_flag_of_diffusers_with_its_type_and_default(kind, name):
    action = flags()[name]
    assert action.default == (None if name in RESOLVED_LATER else FLAGS[kind][name])
    if kind is True:
        assert action.nargs == 0 and action.const is True
    else:
        kind = os.path.expanduser if name in DECLARED and DECLARED[name].path else kind
        kind = {"resolution": resolutions, "validation_prompts": prompt, "lr_scheduler": schedule}.get(
            name, kind
        )  # which take more, too
        assert action.type is kind and action.nargs == ("+" if name == "validation_prompts" else None)


def test_no_flag_is_unknown_to_these_lists():
    names = {name for group in FLAGS.values() for name in group}
    assert len(names) == 95 and not names & set(OWN)
    assert {name: action.default for name, action in flags().items() if name not in names} == OWN


SD, SDXL, SD3 = "sd_pipeline", "sdxl_pipeline", "sd3_pipeline"


@pytest.mark.parametrize(
    "pipeline, words, expected",
    [
        (SD, "", {"resolution": 512, "proportion_empty_prompts": 0.0, "weighting_scheme": None, "rank": None}),
        (SD, "--lora", {"rank": 4, "lora_alpha": 4.0, "lora": True}),
        (SD, "--train_text_encoder --learning_rate 0.01", {"text_encoder_lr": 0.01}),
        (SD, "--train_text_encoder --adam_weight_decay 0.3", {"adam_weight_decay_text_encoder": 0.3}),
        (SD, "", {"text_encoder_lr": None, "adam_weight_decay_text_encoder": None, "max_sequence_length": None}),
        (SDXL, "", {"resolution": 32, "proportion_empty_prompts": 0.0, "prediction_type": "epsilon"}),
        (SD3, "", {"max_sequence_length": 77, "weighting_scheme": "logit_normal", "proportion_empty_prompts": 0.0}),
        (SD3, "--train_text_encoder", {"text_encoder_lr": 5e-6, "adam_weight_decay_text_encoder": 1e-3}),
        (SD3, "--train_text_encoder --text_encoder_lr 1e-7", {"text_encoder_lr": 1e-7}),
    ],
)
def test_defaults_that_follow_the_pipeline(pipeline, words, expected, request, image_folder, tmp_path):
    source = request.getfixturevalue(pipeline)
    resolution = 32 if pipeline == SD3 else None  # the tiny one has no positions for its default, 512
    base = arguments(source, image_folder, tmp_path, learning_rate=None, resolution=resolution)
    args = silently(resolved, [*base, *words.split()])[0].values()
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    "name, sample_size, side", [("stable-diffusion", 64, 512), ("stable-diffusion-xl", 128, 1024)]
)
def test_default_resolutions_of_real_models(name, sample_size, side):
    family = next(family for family in FAMILIES if family.name == name)
    configs = {"vae": {"block_out_channels": [128, 256, 512, 512]}, "unet": {"sample_size": sample_size}}
    assert family.default_resolution(configs) == side


def test_interpolation_modes_are_torchvisions_and_can_be_done():
    modes = flags()["image_interpolation_mode"].choices
    assert set(modes) == {"nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"}
    assert set(modes) <= set(RESAMPLING) and RESAMPLING["nearest_exact"] == RESAMPLING["nearest"]


@pytest.mark.parametrize("word, value", [("true", True), ("True", True), ("false", False), ("False", False)])
def test_truth_in_words(word, value):
    assert build_parser().parse_args(["--prodigy_decouple", word]).prodigy_decouple is value


def test_other_words_are_no_truth(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--prodigy_decouple", "perhaps"])
    assert "--prodigy_decouple" in (message := capsys.readouterr().err) and "true and false" in message


@pytest.mark.parametrize("word, name", [("adamw", "AdamW"), ("ADAMW", "AdamW"), ("Prodigy", "prodigy")])
def test_optimizers_in_any_case(word, name, sd_pipeline, image_folder, tmp_path):
    assert (
        parsed(sd_pipeline, image_folder, tmp_path, optimizer=word, learning_rate=1.0)[0].optimization.optimizer
        == name
    )


@pytest.mark.parametrize("word", ["--lpl_weigh", "--resume", "--train_batch", "--conf"])
def test_abbreviations_are_refused(word, sd_pipeline, image_folder, tmp_path, capsys):
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), word, "1"])
    assert "unrecognized" in message and word in message


# Help -------------------------------------------------------------------------------------------------------------


def test_every_flag_has_a_help_text_of_its_own():
    actions = flags().values()
    texts = [action.help or "" for action in actions]
    assert all(len(text) > 5 and "\n" not in text for text in texts)
    assert len(set(texts)) == len(texts)
    assert all(action.option_strings == [f"--{action.dest}"] for action in actions)  # no second spelling


def test_the_help_that_is_committed(monkeypatch):
    """`COLUMNS=102 python train_text_to_image_lpl.py --help > docs/help.txt`."""
    monkeypatch.setenv("COLUMNS", "102")
    text = build_parser(prog="train_text_to_image_lpl.py").format_help()
    assert text.split() == HELP.read_text().split()
    assert all(f"--{name}" in text for name in flags())


COMMANDS = ("comparison", "data", "distillation", "evaluation", "inspection", "publishing")


@pytest.mark.parametrize("module", [*(f"{room}.command" for room in COMMANDS), "publishing.export"])
def test_every_command_has_a_help(module):
    parser = importlib.import_module(f"lpl.{module}").build_parser()
    text = parser.format_help()
    assert text.startswith("usage: ") and "--help" in text


def test_help_shows_defaults_that_are_in_force():
    text = " ".join(build_parser().format_help().split())
    assert "--logging_steps int write a log entry every N optimizer steps (default: 10)" in text
    assert (
        "--lpl_depth_weighting str [str ...] weights of the decoder blocks: inverse, exponential, uniform, or" in text
    )
    assert "(default: inverse)" in text and "(default: None)" not in text and "(default: False)" not in text
    assert "--lpl_start int sets --lpl_start_step --lpl_num_blocks" in text


# Values that follow other flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, decay",
    [
        ({"use_ema": True}, EMA_DECAY_WITH_LPL),
        ({"use_ema": True, "lpl_weight": 0}, EMA_DECAY),
        ({"ema_decay": 0.5, "use_ema": True}, 0.5),
        ({}, None),
    ],
)
def test_ema_decay_depends_on_lpl(flags, decay, sd_pipeline, image_folder, tmp_path):
    assert (EMA_DECAY_WITH_LPL, EMA_DECAY) == (0.99975, 0.9999)
    assert parsed(sd_pipeline, image_folder, tmp_path, **flags)[0].optimization.ema_decay == decay


@pytest.mark.parametrize(
    "weight, used", [("auto:0.2", True), ("0.1", True), ("1.0", True), ("0", False), ("0.0", False)]
)
def test_lpl_is_used_unless_its_weight_is_zero(weight, used, sd_pipeline, image_folder, tmp_path):
    flags = {"lpl_threshold_base_resolution": None, "lpl_weight": weight}
    args, _ = parsed(sd_pipeline, image_folder, tmp_path, **flags)
    assert args.lpl.enabled is used and args.lpl.lpl_weight == weight


@pytest.mark.parametrize(
    "flags, lora",
    [
        ({}, (False, None, None)),
        ({"lora": True}, (True, 4, 4.0)),
        ({"rank": 16}, (True, 16, 16.0)),
        ({"rank": 16, "lora": True, "lora_alpha": 3.5}, (True, 16, 3.5)),
    ],
)
def test_rank_means_lora(flags, lora, sd_pipeline, image_folder, tmp_path):
    args, configs = parsed(sd_pipeline, image_folder, tmp_path, **flags)
    assert (args.lora.lora, args.lora.rank, args.lora.lora_alpha) == lora
    assert args.lora.lora_target_modules == (configs.family.lora_targets if args.lora.lora else None)


def test_one_validation_prompt_stands_for_several_images(sd_pipeline, image_folder, tmp_path):
    args, _ = parsed(sd_pipeline, image_folder, tmp_path, validation_prompt="a cat", num_validation_images=3)
    assert args.validation.validation_prompts == ("a cat",) * 3


@pytest.mark.parametrize("words, meaning", [(["uniform"], "uniform"), ([1, 0.5, 0, 2], (1.0, 0.5, 0.0, 2.0))])
def test_depth_weights_are_a_name_or_numbers(words, meaning, sd_pipeline, image_folder, tmp_path):
    args, _ = parsed(sd_pipeline, image_folder, tmp_path, lpl_depth_weighting=words)
    assert args.lpl.lpl_depth_weighting == meaning


def test_given_flags_are_those_that_were_typed(sd_pipeline, image_folder, tmp_path):
    words = arguments(sd_pipeline, image_folder, tmp_path, learning_rate=1e-4, seed=None)
    assert resolved(words)[0].given == {word.removeprefix("--") for word in words if word.startswith("--")}


def test_the_token_is_not_left_where_trackers_look(sd_pipeline, image_folder, tmp_path, monkeypatch):
    token = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"
    for words in (["--hub_token", token], [f"--hub_token={token}"]):
        command = arguments(sd_pipeline, image_folder, tmp_path, push_to_hub=True)
        monkeypatch.setattr(sys, "argv", ["train.py", *command, *words])
        assert parse().output.hub_token == token
        assert token not in " ".join(sys.argv) and "hf_..." in " ".join(sys.argv)
