"""Flags of other scripts: those of the research script are translated, the others ignored with a warning."""

import math
import shutil
import warnings

import pytest
import torch
from trainer import arguments, parsed, resolved

from lpl import training_scheduler
from lpl.config.command_line import recipe
from lpl.config.foreign import FOREIGN
from tests.config.test_command_line import SD, SD3, SDXL, said, silently
from tests.config.test_recipes import meaning, write


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


@pytest.mark.parametrize(
    "name, content",
    [
        ("data.toml", "[general]\nshuffle_caption = true\n"),
        ("multidatabackend.json", '[{"id": "a", "type": "local"}]'),
        ("train_lora.yaml", "job: extension\nconfig: {name: a}\n"),
    ],
)
def test_files_of_other_trainers_are_told_from_recipes(name, content, sd_pipeline, image_folder, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", config=str(tmp_path / name))
    assert "files of other trainers are not read: docs/data-from-others.md" in said(capsys, words)
