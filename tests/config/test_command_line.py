"""The command line: every flag of diffusers' scripts with its type and default, a help of its own, and recipes."""

import math
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from trainer import ROOT, arguments, parsed, resolved

from lpl import training_scheduler
from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL
from lpl.config.command_line import build_parser, parse, recipe
from lpl.config.flag import boolean
from lpl.config.foreign import FOREIGN
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
        "dataloader_num_workers": 0,
        "gradient_accumulation_steps": 1,
        "local_rank": -1,
        "lpl_num_blocks": 4,
        "lpl_start": 0,
        "lpl_t_threshold": 200,
        "lr_num_cycles": 1,
        "lr_warmup_steps": 500,
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
    "lpl_vae_dtype": "float32",
    "lpl_vae_name_or_path": None,
    "lpl_measuring_steps": 50,
    "lpl_every": 1,
    "lpl_max_samples": None,
    "lpl_crop": None,
    "lpl_chunk_size": None,
    "lpl_outlier_quantile": 0.02,
    "lpl_outlier_margin": 2.0,
    "lpl_outlier_dilation": 3,
    "lpl_outlier_erosion": 5,
    "lpl_outlier_stride": 1,
    "max_bad_samples": None,
    "max_skipped_steps": 100,
    "streaming": False,
    "shuffle_buffer_size": 1000,
    "dataloader_timeout": 600.0,
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
    "lora": False,
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "use_dora": False,
    "use_rslora": False,
    "quantize_base": None,
    "from_scratch": False,
    "guidance_scale": 3.5,
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
    """What the program says to a command line that it ends on."""
    with pytest.raises(SystemExit) as error:
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


def test_help_shows_defaults_that_are_in_force():
    text = " ".join(build_parser().format_help().split())
    assert "--lpl_ramp_steps int steps over which its weight then grows to its full value (default: 0)" in text
    assert "--lpl_depth_weighting str [str ...] one of inverse, exponential, uniform, or one number" in text
    assert "(default: inverse)" in text and "(default: None)" not in text and "(default: False)" not in text
    assert "--lpl_t_threshold int taken for the --lpl_sigma_threshold of that timestep --lpl_norm_type" in text


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


# Flags of other scripts ----------------------------------------------------------------------------------------------

REFERENCE = {"lpl_norm_type": "shared", "lpl_pow_law": True, "lpl_remove_outliers": True}


def translated(pipeline, images, output_dir, **foreign):
    """args and the warnings, but for that of a missing --use_lpl, for a command line with the given flags."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args, _ = parsed(pipeline, images, output_dir, lpl_threshold_base_resolution=None, **foreign)
    assert not args.given & FOREIGN
    said = [text for warning in caught if "--" in (text := str(warning.message))]
    missing = [text for text in said if "--use_lpl is not given" in text]
    assert len(missing) == ("use_lpl" not in foreign and any(name.startswith("lpl_") for name in foreign))
    return args, [text for text in said if text not in missing]


@pytest.mark.parametrize(
    "foreign, ours",
    [
        ({"lpl_loss_type": "mse"}, {"lpl_distance": "l2"}),
        ({"lpl_loss_type": "l1"}, {"lpl_distance": "l1"}),
        ({"lpl_start": 1}, {"lpl_start_step": 1}),
        ({"lpl_num_blocks": 1}, {"lpl_blocks": ("mid", "up_0")}),
        ({"lpl_num_blocks": 2}, {"lpl_blocks": ("mid", "up_0", "up_1")}),
        (REFERENCE, {"lpl_variant": "reference"}),
        (REFERENCE | {"lpl_loss_type": "mse"}, {"lpl_variant": "reference", "lpl_distance": "l2"}),
    ],
)
def test_the_research_scripts_flags_in_ours(foreign, ours, sd_pipeline, image_folder, tmp_path):
    args, said = translated(sd_pipeline, image_folder, tmp_path, **foreign)
    assert {name: args.values()[name] for name in ours} == ours and set(ours) <= args.given
    assert len(said) == len(ours)
    for name, value in ours.items():
        words = " ".join(value) if isinstance(value, tuple) else value
        assert any(f"--{name} {words}" in text for text in said)
    assert all(any(f"--{name}" in text for text in said) for name in foreign)


@pytest.mark.parametrize("limit", [1, 200, 1000])
def test_the_research_scripts_threshold_lets_the_same_timesteps_in(limit, sd_pipeline, image_folder, tmp_path):
    args, said = translated(sd_pipeline, image_folder, tmp_path, lpl_t_threshold=limit)
    _, configs = parsed(sd_pipeline, image_folder, tmp_path)
    abar = configs.scheduler.alphas_cumprod.double()
    inside = ((1 - abar) / abar).sqrt() <= args.lpl.lpl_sigma_threshold
    assert torch.equal(inside, torch.arange(1000) < limit)
    assert args.lpl.lpl_threshold_base_resolution == 0
    assert len(said) == 1 and "--lpl_sigma_threshold" in said[0] and f"--lpl_t_threshold {limit}" in said[0]


def test_the_threshold_where_the_last_timestep_has_no_signal(sd_pipeline, image_folder, tmp_path):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    _, configs = parsed(sd_pipeline, image_folder, tmp_path)
    zero_snr = type(training_scheduler("epsilon", configs.scheduler)).from_config(
        configs.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    zero_snr.save_pretrained(pipeline / "scheduler")
    index = (pipeline / "model_index.json").read_text().replace("PNDMScheduler", "DDIMScheduler")
    (pipeline / "model_index.json").write_text(index)
    args, _ = translated(pipeline, image_folder, tmp_path / "out", lpl_t_threshold=1000)
    assert 0 < args.lpl.lpl_sigma_threshold < math.inf


@pytest.mark.parametrize(
    "foreign",
    [
        {"lpl_norm_type": "default"},
        {"lpl_norm_type": "batch", "lpl_pow_law": True, "lpl_remove_outliers": True},
        {"lpl_pow_law": True},
        {"lpl_norm_type": "shared", "lpl_remove_outliers": True},
        REFERENCE | {"lpl_loss_type": "l1"},
    ],
)
def test_other_combinations_have_no_counterpart(foreign, sd_pipeline, image_folder, tmp_path):
    args, said = translated(sd_pipeline, image_folder, tmp_path, **foreign)
    assert args.lpl.lpl_variant == "paper" and args.lpl.lpl_normalization == "shared"
    assert "no counterpart" in said[-1] and "--lpl_normalization shared" in said[-1] and "outlier masks" in said[-1]


@pytest.mark.parametrize(
    "name, value, serves",
    [
        ("enable_xformers_memory_efficient_attention", True, "PyTorch's own"),
        ("enable_npu_flash_attention", True, "PyTorch's own"),
        ("local_rank", 0, "launcher"),
        ("use_lpl", True, "--lpl_weight is 0"),
        ("lpl_scale", True, "--lpl_weight"),
    ],
)
def test_flags_without_meaning_warn(name, value, serves, sd_pipeline, image_folder, tmp_path):
    _, said = translated(sd_pipeline, image_folder, tmp_path, **{name: value})
    assert len(said) == 1 and f"--{name} has no effect" in said[0] and serves in said[0]


@pytest.mark.parametrize(
    "flags",
    [
        {"lpl_loss_type": "l1", "lpl_distance": "l2"},
        {"lpl_start": 1, "lpl_start_step": 0},
        {"lpl_num_blocks": 1, "lpl_blocks": "mid"},
        {"lpl_t_threshold": 200, "lpl_sigma_threshold": 1.0},
        {"lpl_t_threshold": 200, "lpl_threshold_base_resolution": 0},
        REFERENCE | {"lpl_variant": "paper"},
    ],
)
def test_a_contradiction_with_our_own_flag(flags, sd_pipeline, image_folder, tmp_path, capsys):
    words = arguments(sd_pipeline, image_folder, tmp_path, **{"lpl_threshold_base_resolution": None} | flags)
    message = said(capsys, words)
    assert "leave one of them out" in message and all(f"--{name}" in message for name in flags)


def test_the_same_said_twice_is_no_contradiction(sd_pipeline, image_folder, tmp_path):
    args, _ = translated(sd_pipeline, image_folder, tmp_path, lpl_loss_type="l1", lpl_distance="l1")
    assert args.lpl.lpl_distance == "l1"


def test_the_threshold_needs_betas(sd3_pipeline, image_folder, tmp_path):
    with pytest.raises(ValueError, match="--lpl_t_threshold 200.*flow_matching.*--lpl_sigma_threshold"):
        parsed(sd3_pipeline, image_folder, tmp_path, lpl_threshold_base_resolution=None, lpl_t_threshold=200)


# Each script's flags as its users write them; DATA and OUT are filled in.
COMMANDS = {
    "sd": (
        SD,
        "--use_ema --resolution=512 --center_crop --random_flip --train_batch_size=1 --gradient_accumulation_steps=4"
        " --gradient_checkpointing --max_train_steps=15000 --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler"
        " constant --lr_warmup_steps=0 --snr_gamma=5.0 --dream_training --dream_detail_preservation 0.5"
        " --noise_offset 0.1 --input_perturbation 0.1 --foreach_ema --offload_ema --non_ema_revision main"
        " --validation_prompts=a --validation_epochs 1 --mixed_precision=bf16 --report_to tensorboard"
        " --image_interpolation_mode nearest_exact --tracker_project_name t --checkpointing_steps 100",
        {"--non_ema_revision"},  # it is of the Hub, and the pipeline here is a folder
    ),
    "sd lora": (
        SD,
        "--caption_column=text --resolution=512 --random_flip --train_batch_size=1 --num_train_epochs=100"
        " --checkpointing_steps=5000 --learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0 --seed=42"
        " --rank=4 --validation_prompt=cute --num_validation_images=2 --checkpoints_total_limit 2 --local_rank=-1",
        {"--local_rank"},
    ),
    "sdxl": (
        SDXL,
        "--enable_xformers_memory_efficient_attention --resolution=512 --center_crop --random_flip"
        " --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4"
        " --gradient_checkpointing --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler"
        " constant --lr_warmup_steps=0 --validation_prompt=cute --validation_epochs 5 --timestep_bias_strategy later"
        " --timestep_bias_multiplier 2.0 --timestep_bias_portion 0.5 --use_ema --allow_tf32",
        {"--enable_xformers_memory_efficient_attention", "--allow_tf32"},
    ),
    "sdxl lora": (
        SDXL,
        "--dataloader_num_workers=8 --resolution=1024 --center_crop --random_flip --train_batch_size=1"
        " --train_text_encoder --rank 8 --debug_loss --num_train_epochs 2 --checkpointing_steps=500"
        " --learning_rate=1e-04 --lr_scheduler=constant --lr_warmup_steps=0 --mixed_precision=no --seed=42",
        set(),
    ),
    "sd3": (
        SD3,
        "--resolution=32 --train_batch_size=1 --gradient_accumulation_steps=4 --optimizer=prodigy --learning_rate=1.0"
        " --prodigy_beta3 0.9 --prodigy_decouple True --prodigy_use_bias_correction True --prodigy_safeguard_warmup"
        " False --lr_scheduler=constant --lr_warmup_steps=0 --weighting_scheme logit_normal --logit_mean 0.1"
        " --logit_std 1.2 --precondition_outputs 1 --max_sequence_length 77 --max_train_steps=500"
        " --train_text_encoder --adam_weight_decay_text_encoder 1e-3 --adam_weight_decay 1e-4 --seed=0"
        " --validation_prompt=dog --validation_epochs=25",
        set(),
    ),
    "lpl": (
        SDXL,
        "--use_lpl --lpl_weight=1.0 --lpl_loss_type=mse --lpl_norm_type=shared --lpl_pow_law --lpl_num_blocks=2"
        " --lpl_t_threshold=200 --lpl_scale --lpl_start=0 --lpl_remove_outliers --resolution=512"
        " --proportion_empty_prompts=0.1 --learning_rate=1e-06 --use_ema --max_train_steps 5000 --snr_gamma 5",
        {"--use_lpl", "--lpl_loss_type", "--lpl_norm_type", "--lpl_num_blocks", "--lpl_t_threshold", "--lpl_scale"}
        | {"--lpl_start"},
    ),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_a_command_line_of_each_script_of_diffusers(script, request, image_folder, tmp_path):
    pipeline, words, warned = COMMANDS[script]
    sources = f"--pretrained_model_name_or_path={request.getfixturevalue(pipeline)} --train_data_dir={image_folder}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args, _ = resolved([*sources.split(), f"--output_dir={tmp_path}", *words.split()])
    texts = [str(warning.message) for warning in caught if "--" in str(warning.message)]
    assert {text.split()[0] for text in texts} == warned
    assert args.data.resolution == int(words.partition("--resolution=")[2].split()[0])
    assert args.lora.lora is ("lora" in script) and args.lpl.enabled
    again = silently(resolved, ["--config", write(tmp_path, recipe(args))])[0] if not warned else None
    assert again is None or meaning(again) == meaning(args)


# Recipes ----------------------------------------------------------------------------------------------------------


def write(folder, entries):
    path = folder / "recipe.yaml"
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
    return str(path)


def meaning(args):
    """All that a run looks at."""
    return args.values() | {"config": None, "timestep_threshold": args.timestep_threshold}


ROUND_TRIPS = [
    (SD, {}),
    (SD, {"resolution": None, "lpl_weight": 0}),
    (SD, {"use_ema": True, "rank": 8, "use_dora": True, "lora_target_modules": ["to_q", "conv1"]}),
    (SD, {"lora": True, "lora_dropout": 0.1, "validation_prompt": "- a cat: 'x'", "num_validation_images": 2}),
    (SD, {"validation_prompts": ["a 'dog'", "7", "no"], "validation_steps": 5, "lr_scheduler": "cosine"}),
    (SD, {"lpl_depth_weighting": [1, 2, 3, 4.5], "train_text_encoder": True, "adam_epsilon": 3e-9}),
    (SD, {"lpl_t_threshold": 321, "lpl_threshold_base_resolution": None, "lpl_num_blocks": 2}),
    (SD, {"lpl_every": 4, "lpl_max_samples": 1, "lpl_crop": 16, "lpl_outlier_margin": 0.0, "lpl_outlier_erosion": 7}),
    (SD, {"timestep_bias_strategy": "range", "timestep_bias_begin": 3, "timestep_bias_multiplier": 0.5}),
    (SD, {"prediction_type": "flow_matching", "logit_mean": -0.25, "from_scratch": True}),
    (SD, {"optimizer": "PRODIGY", "learning_rate": 1.0, "prodigy_decouple": "false", "train_text_encoder": True}),
    (SD, {"train_data_dir": None, "dataset_name": "a/b", "validation_split": "test", "mixed_precision": "no"}),
    (SD3, {"train_text_encoder": True, "lora": True}),
    (SD3, {"weighting_scheme": "mode", "mode_scale": 1.0, "max_sequence_length": 128}),
    (SDXL, {"resolution": None, "snr_gamma": 5, "proportion_empty_prompts": 0.1}),
    ("pixart_alpha_pipeline", {}),
    ("pixart_sigma_pipeline", {"rank": 2}),
    ("flux_pipeline", {"guidance_scale": 1.0, "lora": True}),
    ("sana_pipeline", {}),
]


@pytest.mark.parametrize("pipeline, flags", ROUND_TRIPS)
@pytest.mark.filterwarnings("ignore:.*(is taken for|shift depends|--guidance_scale)")
def test_a_runs_own_recipe_means_the_same_again(pipeline, flags, request, image_folder, tmp_path):
    args, _ = parsed(request.getfixturevalue(pipeline), image_folder, tmp_path / "out", **flags)
    path = write(tmp_path, recipe(args))
    again, _ = silently_but_for_the_pipeline(resolved, ["--config", path])
    assert meaning(again) == meaning(args)
    assert recipe(again) == recipe(args)


def silently_but_for_the_pipeline(function, *args):
    """As `silently`, but a warning about the pipeline itself comes at every run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*--")
        warnings.filterwarnings("ignore", message=".*--guidance_scale")
        return function(*args)


def test_a_class_conditional_recipe_means_the_same_again(dit_pipeline, class_folder, tmp_path):
    args, _ = parsed(dit_pipeline, class_folder, tmp_path / "out", validation_prompts=["1", "3"])
    again, _ = silently(resolved, ["--config", write(tmp_path, recipe(args))])
    assert meaning(again) == meaning(args) and args.data.caption_column == "label"


def test_what_a_recipe_holds(sd_pipeline, image_folder, tmp_path):
    words = arguments(sd_pipeline, image_folder, tmp_path, push_to_hub=True, hub_token="secret", dry_run=True)
    entries = recipe(resolved([*words, "--resume_from_checkpoint", "latest"])[0])
    left_out = {"config", "without", "dry_run", "resume_from_checkpoint", "hub_token", *FOREIGN}
    assert set(entries) == set(flags()) - left_out
    assert yaml.safe_load(yaml.safe_dump(entries)) == entries
    assert (entries["resolution"], entries["prediction_type"], entries["weighting_scheme"]) == (32, "epsilon", None)


def with_recipe(pipeline, images, folder, entries, *words):
    """Pipeline and data set on the command line, the rest in a recipe."""
    base = arguments(pipeline, images, folder / "out", **dict.fromkeys(("learning_rate", "resolution", "seed")))
    return resolved([*base, "--config", write(folder, entries), *words])[0]


def test_the_order_is_defaults_recipe_command_line(sd_pipeline, image_folder, tmp_path):
    entries = {"learning_rate": 1.0, "resolution": 64, "lpl_blocks": ["mid", "up_0"]}
    args = with_recipe(sd_pipeline, image_folder, tmp_path, entries, "--learning_rate", "2", "--lpl_blocks", "up_1")
    values = args.values()
    names = ("learning_rate", "resolution", "lpl_blocks", "snr_gamma")
    assert [values[name] for name in names] == [2.0, 64, ("up_1",), None]
    assert {"learning_rate", "resolution"} <= args.given


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),  # to YAML that is a string
        ("learning_rate: 1", "learning_rate", 1.0),
        ("logit_mean: -1e-7\nprediction_type: flow_matching\nfrom_scratch: true", "logit_mean", -1e-7),
        ("lpl_weight: 1", "lpl_weight", "1"),
        ("lpl_weight: auto:0.3", "lpl_weight", "auto:0.3"),
        ("mixed_precision: no", "mixed_precision", "no"),  # to YAML that is false
        ("random_flip: true", "random_flip", True),
        ("random_flip: false", "random_flip", False),
        ("random_flip:", "random_flip", False),
        ("snr_gamma: null", "snr_gamma", None),
        ("validation_prompts: a cat", "validation_prompts", ("a cat",)),
        ("validation_prompts: [--cat, 12]", "validation_prompts", ("--cat", "12")),
        ("lpl_depth_weighting: [1, 0.5, 2, 0]", "lpl_depth_weighting", (1.0, 0.5, 2.0, 0.0)),
        ("lpl_depth_weighting: uniform", "lpl_depth_weighting", "uniform"),
        ("optimizer: Prodigy\nlearning_rate: 1.0\nprodigy_decouple: false", "prodigy_decouple", False),
        ("tracker_project_name: --x", "tracker_project_name", "--x"),
        ("measured: {lpl_weight: 0.3}\nseed: 3", "seed", 3),
        ("resume_from_checkpoint: latest", "resume_from_checkpoint", "latest"),
    ],
)
def test_recipes_as_people_write_them(text, name, value, sd_pipeline, image_folder, tmp_path):
    got = with_recipe(sd_pipeline, image_folder, tmp_path, text).values()[name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1.0", ["'learning_rat'", "did you mean learning_rate?"]),
        ("learning-rate: 1.0", ["'learning-rate'", "learning_rate?"]),
        ("1: 2", ["there is no flag 1"]),
        ("zzzzz: 2", ["there is no flag 'zzzzz'"]),
        ("config: other.yaml", ["there is no flag 'config'"]),
        ("hub_token: hf_x", ["hub_token", "hf auth login"]),
        ("learning_rate: fast", ["learning_rate", "'fast'"]),
        ("train_batch_size: 2.5", ["train_batch_size", "'2.5'"]),
        ("lr_scheduler: sine", ["lr_scheduler", "'sine'", "cosine"]),
        ("logging_epochs: 3\nsnr_gamma: 0", ["no flag 'logging_epochs'", "did you mean"]),
        ("learning_rate: {a: 1}", ["learning_rate", "plain value", "dict"]),
        ("learning_rate: [1, 2]", ["learning_rate", "not a list"]),
        ("lpl_blocks: []", ["lpl_blocks", "empty list"]),
        ("lpl_blocks: [[mid]]", ["lpl_blocks", "plain value", "list"]),
        ("random_flip: 1", ["random_flip", "true or false", "1"]),
        ("random_flip: 'true'", ["random_flip", "true or false", "'true'"]),
        ("snr_gamma: true", ["snr_gamma", "not true", "quotes"]),
        ("revision: 2024-01-01", ["revision", "date", "quotes"]),
        ("prodigy_decouple: 1", ["prodigy_decouple", "true and false"]),
        ("- a\n- b", ["must map flags to values"]),
        ("", ["must map flags to values"]),
        ("a: [", ["cannot be read", "while parsing"]),
    ],
)
def test_recipes_that_are_refused(text, words, sd_pipeline, image_folder, tmp_path, capsys):
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), "--config", write(tmp_path, text)])
    assert all(word in message for word in words), message
    assert message.startswith("--config ")


def test_a_recipe_that_is_not_there(sd_pipeline, image_folder, tmp_path, capsys):
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), "--config", "no/where.yaml"])
    assert "--config no/where.yaml" in message and "No such file" in message


def test_flags_of_a_recipe_can_be_left_out(sd_pipeline, image_folder, tmp_path):
    entries = {"use_ema": True, "ema_decay": 0.5, "snr_gamma": 5.0, "random_flip": True}
    words = ["--without", "use_ema", "ema_decay", "snr_gamma"]
    args = with_recipe(sd_pipeline, image_folder, tmp_path, entries, *words)
    names = ("use_ema", "ema_decay", "snr_gamma", "random_flip")
    assert [args.values()[name] for name in names] == [False, None, None, True]


def test_leaving_out_what_is_not_there(sd_pipeline, image_folder, tmp_path, capsys):
    words = arguments(sd_pipeline, image_folder, tmp_path)
    path = write(tmp_path, {"use_ema": True})
    assert "did you mean use_ema?" in said(capsys, [*words, "--config", path, "--without", "use_emma"])
    assert "--config" in said(capsys, [*words, "--without", "use_ema"])


def test_defaults_in_a_recipe_are_not_given(sd_pipeline, image_folder, tmp_path):
    """Each would be refused, or warned of, on the command line."""
    entries = {"lpl_weight": 0, "lpl_distance": "l2", "lr_power": 1.0, "offload_ema": False, "lora_dropout": 0.0}
    entries |= {"mode_scale": 1.29, "num_validation_images": 4, "timestep_bias_end": 1000, "validation_epochs": 5}
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_weight=0)
    del words[words.index("--lpl_weight") : words.index("--lpl_weight") + 2]
    args, _ = silently(resolved, [*words, "--config", write(tmp_path, entries)])
    assert not args.lpl.enabled and not args.given & (set(entries) - {"lpl_weight"})


def test_a_research_flag_in_a_recipe_counts_also_at_its_default(sd_pipeline, image_folder, tmp_path):
    base = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_threshold_base_resolution=None)
    with pytest.warns(UserWarning, match="--lpl_t_threshold 200 is taken for"):
        args, _ = resolved([*base, "--config", write(tmp_path, {"lpl_t_threshold": 200})])
    assert args.lpl.lpl_threshold_base_resolution == 0


def test_the_baseline_of_a_recipe_with_lpl(sd_pipeline, image_folder, tmp_path):
    base = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_weight=0)
    path = write(tmp_path, {"lpl_weight": "auto:0.3", "lpl_distance": "l1", "lpl_measuring_steps": 50})
    with pytest.warns(UserWarning, match="lpl_distance of the recipe has no effect"):
        args, _ = resolved([*base, "--config", path])
    assert not args.lpl.enabled and args.lpl.lpl_distance == "l2"


def test_the_baseline_keeps_the_loss_that_validation_measures(sd_pipeline, image_folder, tmp_path):
    base = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_weight=0, validation_every_nth=2)
    path = write(tmp_path, {"lpl_distance": "l1", "lpl_ramp_steps": 5})
    with pytest.warns(UserWarning, match="lpl_ramp_steps of the recipe has no effect"):
        args, _ = resolved([*base, "--config", path])
    assert args.lpl.lpl_distance == "l1" and args.lpl.lpl_ramp_steps == 0


def test_paths_in_a_recipe_are_relative_to_the_working_directory(sd_pipeline, image_folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(image_folder.parent)
    entries = {"train_data_dir": image_folder.name, "pretrained_model_name_or_path": str(sd_pipeline)}
    args, _ = resolved(["--config", write(tmp_path / "elsewhere", entries)])
    assert args.data.train_data_dir == image_folder.name


def test_the_token_is_not_left_where_trackers_look(sd_pipeline, image_folder, tmp_path, monkeypatch):
    token = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"
    for words in (["--hub_token", token], [f"--hub_token={token}"]):
        command = arguments(sd_pipeline, image_folder, tmp_path, push_to_hub=True)
        monkeypatch.setattr(sys, "argv", ["train.py", *command, *words])
        assert parse().output.hub_token == token
        assert token not in " ".join(sys.argv) and "hf_..." in " ".join(sys.argv)
