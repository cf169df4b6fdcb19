"""A bad command gets one sentence, with what to change, before anything is loaded; an idle flag gets a warning."""

import re
from contextlib import nullcontext

import pytest
from commands import cases, refusal, warned
from trainer import ROOT, arguments, run

from lpl.config.command_line import build_parser, parse
from lpl.config.config import FLAGS
from lpl.config.foreign import OTHERS
from lpl.config.place_checks import MAY_BE_FILES


# The script itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", cases(({"rank": 0}, "--rank 0"), ({"resolution": 30}, "--resolution 30")))
def test_the_script_ends_with_that_sentence(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    with pytest.raises(SystemExit) as error:
        run(arguments(sd_pipeline, image_folder, tmp_path, **flags))
    message = capsys.readouterr().err if error.value.code == 2 else str(error.value.code)
    assert "error: " in message and words in message and "Traceback" not in message


# Refusals ------------------------------------------------------------------------------------------------------------

ALONE = cases(  # wrong whatever the pipeline: what is given, what the sentence must name
    ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    ({"train_data_dir": "nowhere"}, ["--train_data_dir", "nowhere", "no such folder"]),
    ({"train_data_dir": None}, ["--dataset_name", "--train_data_dir", "neither"]),
    ({"dataset_config_name": "de"}, ["--dataset_config_name", "--dataset_name"]),
    ({"output_dir": __file__}, ["--output_dir", __file__]),
    ({"trigger_word": " "}, ["--trigger_word: it is empty"]),
    ({"shuffle_tags": True, "tag_separator": ""}, ["--tag_separator: it is empty"]),
    ({"keep_tags_separator": ""}, ["--keep_tags_separator: it is empty"]),
    ({"text_encoder_dropout": [0.1, 1.1]}, ["--text_encoder_dropout 1.1", "between 0 and 1"]),
    ({"text_encoder_dropout": "nan"}, ["--text_encoder_dropout nan", "between 0 and 1"]),
    ({"tag_dropout": 1.1}, ["--tag_dropout 1.1", "between 0 and 1"]),
    ({"prediction_type": "noise"}, ["--prediction_type", "noise", "epsilon", "flow_matching"]),
    ({"lr_scheduler": "sine"}, ["--lr_scheduler", "sine", "cosine"]),
    ({"lr_warmup_steps": 1.5}, ["--lr_warmup_steps 1.5", "a whole number, or a share below 1"]),
    ({"lr_warmup_steps": "inf"}, ["--lr_warmup_steps inf", "finite"]),
    ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
    ({"image_interpolation_mode": "cubic"}, ["--image_interpolation_mode", "cubic", "bicubic"]),
    ({"weighting_scheme": "uniform"}, ["--weighting_scheme", "uniform", "logit_normal"]),
    (
        {"report_to": "neptune"},
        ["--report_to", "neptune", "tensorboard", "wandb", "comet_ml", "trackio", "all", "none"],
    ),
    ({"mixed_precision": "fp8"}, ["--mixed_precision", "fp8", "bf16"]),
    ({"lpl_weight": "auto:2"}, ["--lpl_weight", "auto:2", "auto:0.2"]),
    ({"lpl_weight": "-1"}, ["--lpl_weight", "-1"]),
    ({"lpl_weight": "much"}, ["--lpl_weight", "much"]),
    ({"lpl_normalization": "batch"}, ["--lpl_normalization", "batch", "separate"]),
    ({"lpl_distance": "huber"}, ["--lpl_distance", "huber", "l1"]),
    ({"lpl_variant": "mine"}, ["--lpl_variant", "mine", "reference"]),
    ({"lpl_depth_weighting": ["quadratic"]}, ["--lpl_depth_weighting quadratic", "inverse", "one number per block"]),
    ({"lpl_depth_weighting": [1, 2], "lpl_blocks": ["mid"]}, ["--lpl_depth_weighting", "1 finite", "weighting 1 2:"]),
    ({"lpl_depth_weighting": [1, "nan", 1, 1]}, ["--lpl_depth_weighting", "nan", "finite"]),
    ({"lpl_depth_weighting": [0, 0, 0, 0]}, ["--lpl_depth_weighting 0 0 0 0", "not all 0"]),
    ({"lpl_variant": "reference", "lpl_distance": "l1"}, ["--lpl_variant reference", "--lpl_variant paper"]),
    ({"lpl_normalization": "none", "lpl_detach_statistics": True}, ["--lpl_detach_statistics", "no effect"]),
    ({"lpl_weight": 0, "lpl_distance": "l1"}, ["--lpl_weight 0", "--lpl_distance", "no effect"]),
    ({"lpl_weight": 0, "lpl_start": 0}, ["--lpl_weight 0", "--lpl_start_step", "no effect"]),
    ({"lpl_weight": 0, "lpl_t_threshold": 9}, ["--lpl_weight 0", "--lpl_t_threshold", "no effect"]),
    (
        {"lpl_weight": 0, "validation_every_nth": 2, "lpl_ramp_steps": 1},
        ["--lpl_weight 0", "--lpl_ramp_steps", "no effect"],
    ),
    ({"lpl_every": 0}, ["--lpl_every 0", "more than 0"]),
    ({"lpl_max_samples": 0}, ["--lpl_max_samples 0", "more than 0"]),
    ({"lpl_crop": 0}, ["--lpl_crop 0", "more than 0"]),
    ({"lpl_chunk_size": 0}, ["--lpl_chunk_size 0", "more than 0"]),
    ({"lpl_chunk_size": "all"}, ["--lpl_chunk_size", "'all'", "auto", "whole number"]),
    ({"lpl_outlier_quantile": 0.5}, ["--lpl_outlier_quantile 0.5", "less than 0.5"]),
    ({"lpl_outlier_quantile": 0}, ["--lpl_outlier_quantile 0.0", "more than 0"]),
    ({"lpl_outlier_margin": "inf"}, ["--lpl_outlier_margin inf", "finite", "0 or more"]),
    ({"lpl_outlier_dilation": 0}, ["--lpl_outlier_dilation 0", "from 1 to 63"]),
    ({"lpl_outlier_erosion": 0}, ["--lpl_outlier_erosion 0", "from 1 to 63"]),
    ({"lpl_outlier_stride": 0}, ["--lpl_outlier_stride 0", "from 1 to 8"]),
    ({"lpl_outlier_stride": 1000}, ["--lpl_outlier_stride 1000", "from 1 to 8"]),
    ({"lpl_sigma_threshold": "inf"}, ["--lpl_sigma_threshold inf", "a finite number"]),
    (
        {"lpl_variant": "reference", "lpl_outlier_stride": 4},
        ["--lpl_variant reference", "leave out --lpl_outlier_stride", "--lpl_variant paper"],
    ),
    ({"lpl_weight": 0, "lpl_every": 2}, ["--lpl_weight 0", "--lpl_every", "no effect"]),
    (
        {"lpl_weight": 0, "validation_every_nth": 2, "lpl_max_samples": 1},
        ["--lpl_weight 0", "--lpl_max_samples", "no effect"],
    ),
    ({"lpl_blocks": ["rgb"], "lpl_variant": "reference"}, ["--lpl_variant reference", "rgb", "--lpl_blocks"]),
    ({"validation_prompt": "a", "validation_prompts": ["b"]}, ["--validation_prompt ", "--validation_prompts"]),
    ({"validation_split": "test"}, ["--validation_split", "--dataset_name", "--validation_every_nth"]),
    (
        {"train_data_dir": None, "dataset_name": "a/b", "validation_split": "test", "validation_every_nth": 3},
        ["--validation_split", "--validation_every_nth", "exclude"],
    ),
    (
        {"train_data_dir": None, "dataset_name": "a/b", "validation_split": "train"},
        ["--validation_split train", "another split"],
    ),
    ({"train_split": "test"}, ["--train_split test", "--dataset_name"]),
    (
        {"train_data_dir": None, "dataset_name": "a/b", "train_split": "test", "validation_split": "test"},
        ["--validation_split test", "another split"],
    ),
    ({"train_data_dir": None, "dataset_name": __file__}, ["--dataset_name", "this is a file; give its folder"]),
    ({"validation_every_nth": 1}, ["--validation_every_nth 1", "2 or more"]),
    ({"num_validation_samples": 0}, ["--num_validation_samples 0", "more than 0"]),
    ({"train_batch_size": 0}, ["--train_batch_size 0", "more than 0"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan", "0 or more"]),
    ({"learning_rate": "1e300"}, ["--learning_rate 1e+300", "at most 10,000"]),
    ({"text_encoder_lr": "1e300", "train_text_encoder": True}, ["--text_encoder_lr 1e+300", "at most 10,000"]),
    ({"learning_rate": "fast"}, ["--learning_rate", "fast"]),
    ({"lr_warmup_steps": -1}, ["--lr_warmup_steps -1", "0 or more"]),
    ({"proportion_empty_prompts": 1.5}, ["--proportion_empty_prompts 1.5", "between 0 and 1"]),
    ({"adam_beta1": 1.0}, ["--adam_beta1 1.0", "less than 1"]),
    ({"rank": 0}, ["--rank 0", "more than 0"]),
    ({"rank": 4, "lora_alpha": 0}, ["--lora_alpha 0", "more than 0"]),
    ({"rank": 4, "lora_dropout": 1.0}, ["--lora_dropout 1.0", "less than 1"]),
    ({"lora_alpha": 8}, ["--lora_alpha", "--lora or --rank"]),
    ({"lora_dropout": 0.1}, ["--lora_dropout", "--lora or --rank"]),
    ({"lora_target_modules": ["to_q"]}, ["--lora_target_modules", "--lora or --rank"]),
    ({"use_dora": True}, ["--use_dora", "--lora or --rank"]),
    ({"use_rslora": True}, ["--use_rslora", "--lora or --rank"]),
    ({"quantize_base": "4bit"}, ["--quantize_base", "--lora or --rank"]),
    ({"group_offload": True, "gradient_checkpointing": True}, ["--group_offload", "--lora or --rank"]),
    ({"offload_frozen": True, "torch_compile": True}, ["--offload_frozen", "--torch_compile"]),
    (
        {"quantize_base": "fp8", "lora": True, "gradient_checkpointing": True, "torch_compile": True},
        ["--quantize_base fp8", "--torch_compile"],
    ),
    ({"activation_offload": True}, ["--activation_offload", "--gradient_checkpointing"]),
    ({"group_offload": True, "lora": True}, ["--group_offload", "--gradient_checkpointing"]),
    (
        {"group_offload": True, "lora": True, "gradient_checkpointing": True, "quantize_base": "8bit"},
        ["--group_offload", "--quantize_base 8bit", "one of them"],
    ),
    ({"decompose_factor": 4}, ["--decompose_factor", "--lora or --rank"]),
    ({"adapter": "loha", "decompose_factor": 0}, ["--decompose_factor 0", "-1 or more than 0"]),
    ({"adapter": "loha", "use_dora": True}, ["--use_dora is not for LoHa", "--adapter lora"]),
    ({"adapter": "lokr", "lora_dropout": 0.1}, ["--lora_dropout is not for LoKr"]),
    ({"adapter": "lokr", "init_lora_weights": "orthogonal"}, ["--init_lora_weights is not for LoKr"]),
    ({"adapter": "loha", "quantize_base": "8bit"}, ["--quantize_base is not for LoHa"]),
    ({"adapter": "loha", "train_text_encoder": True}, ["--adapter loha", "leave out --train_text_encoder"]),
    ({"adapter": "oft", "rank": 4}, ["--rank is not for OFT", "--oft_block_size"]),
    ({"adapter": "oft", "lora_rank_pattern": "to_q=2"}, ["--lora_rank_pattern is not for OFT"]),
    ({"adapter": "oft", "validation_lora_scales": 1}, ["--validation_lora_scales", "OFT has no strength"]),
    ({"adapter": "glora"}, ["--adapter", "glora", "loha"]),
    ({"adapter": "loha", "training_adapter": "a/b"}, ["--training_adapter goes with --adapter lora only"]),
    ({"rank": 4, "validation_lora_scales": "nan"}, ["--validation_lora_scales nan", "finite"]),
    ({"rank": 4, "init_lora_weights": "pissa_niter_4"}, ["--init_lora_weights pissa_niter_4", "base's weights"]),
    ({"rank": 4, "init_lora_weights": "eva"}, ["--init_lora_weights eva", "needs data", "gaussian"]),
    ({"rank": 3, "init_lora_weights": "orthogonal"}, ["--init_lora_weights orthogonal", "even ranks", "3"]),
    ({"rank": 4, "lora_rank_pattern": "to_q"}, ["--lora_rank_pattern", "'to_q'", "NAME=RANK"]),
    ({"rank": 4, "lora_rank_pattern": "to_q=0"}, ["--lora_rank_pattern", "NAME=RANK"]),
    ({"rank": 4, "lora_alpha_pattern": "to_q=inf"}, ["--lora_alpha_pattern", "NAME=ALPHA"]),
    ({"quantize_base": "2bit", "lora": True}, ["--quantize_base", "2bit", "8bit"]),
    ({"quantize_base": "fp8", "lora": True}, ["--quantize_base fp8", "--gradient_checkpointing"]),
    (
        {"quantize_base": "8bit", "lora": True, "train_text_encoder": True},
        ["--quantize_base", "--train_text_encoder", "one of them"],
    ),
    ({"from_scratch": True, "lora": True}, ["--from_scratch", "LoRA", "--lora"]),
    ({"from_scratch": True, "rank": 4}, ["--from_scratch", "LoRA", "--rank"]),
    ({"from_scratch": True, "non_ema_revision": "main"}, ["--from_scratch", "--non_ema_revision"]),
    ({"optimizer": "lion"}, ["--optimizer lion", "AdamW", "prodigy", "package.module:Class"]),
    ({"optimizer": "torch.optim:SGD", "use_8bit_adam": True}, ["--use_8bit_adam", "--optimizer torch.optim:SGD"]),
    ({"optimizer": "torch.optim:SGD", "optimizer_args": "lr=1"}, ["--optimizer_args lr", "--learning_rate"]),
    ({"optimizer": "torch.optim:SGD", "optimizer_args": "=1"}, ["--optimizer_args", "'=1'", "NAME=VALUE"]),
    ({"optimizer": "torch.optim:SGD", "optimizer_args": "eps=.inf"}, ["--optimizer_args", "finite number"]),
    ({"optimizer": "torch.optim:SGD", "optimizer_args": "betas=[0.9,nan]"}, ["--optimizer_args", "finite number"]),
    (
        {"optimizer_args": "weight_decay=0.1"},
        ["--optimizer_args weight_decay=0.1", "--optimizer AdamW", "--adam_*", "torch.optim:AdamW"],
    ),
    ({"optimizer": "torch.optim:SGD", "optimizer_args": "a={b: 1}"}, ["--optimizer_args", "NAME=VALUE"]),
    ({"optimizer": "prodigy", "use_8bit_adam": True}, ["--use_8bit_adam", "--optimizer prodigy"]),
    (
        {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 0.5, "train_text_encoder": True},
        ["--text_encoder_lr 0.5", "--optimizer prodigy", "one learning rate"],
    ),
    ({"prodigy_beta3": 1.0}, ["--prodigy_beta3 1.0", "less than 1"]),
    ({"timestep_bias_strategy": "middle"}, ["--timestep_bias_strategy", "middle", "earlier"]),
    ({"timestep_bias_multiplier": 0}, ["--timestep_bias_multiplier 0", "more than 0"]),
    ({"timestep_bias_portion": 0}, ["--timestep_bias_portion 0", "at most 1"]),
    ({"timestep_bias_portion": 1.5}, ["--timestep_bias_portion 1.5", "at most 1"]),
    (
        {"timestep_bias_strategy": "range", "timestep_bias_begin": 1000},
        ["--timestep_bias_begin 1000", "--timestep_bias_end", "1000"],
    ),
    (
        {"timestep_bias_strategy": "range", "timestep_bias_begin": 5, "timestep_bias_end": 4},
        ["--timestep_bias_begin 5", "--timestep_bias_end", "4"],
    ),
)


@pytest.mark.parametrize("flags, words", ALONE)
@pytest.mark.filterwarnings("ignore:.*--(prediction_type|learning_rate|lpl_start|lpl_num_blocks)")
def test_refused_by_words(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


def test_every_number_that_cannot_be_negative_is_checked(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    may_be = {
        "noise_offset",
        "input_perturbation",
        "logit_mean",
        "mode_scale",
        "lr_power",
        "validation_guidance_scale",
        "validation_lora_scales",
        "decompose_factor",
        "local_rank",
    }
    actions = build_parser()._actions
    numbers = {action.dest for action in actions if action.type in (int, float) and not action.choices}
    assert len(numbers) > 50
    for name in numbers - may_be:
        flags = {"use_ema": True, "rank": 4, name: -1}
        assert f"--{name} -1" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))


def test_the_pipeline_is_not_overwritten(sd_pipeline, image_folder, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, sd_pipeline))
    assert "--output_dir" in message and "another folder" in message


@pytest.mark.parametrize(
    "name, files, word",
    [
        ("lora", ["pytorch_lora_weights.safetensors"], "this is a LoRA"),
        ("peft", ["transformer_lora/adapter_config.json"], "this is a LoRA"),
        ("folder", ["notes.txt"], "this folder has no model_index.json"),
        ("model.safetensors", None, "this is no whole safetensors file"),
        ("model.ckpt", None, "this is a pickle"),
        ("model.gguf", None, "in 16 or 32 bits"),
        ("model.txt", None, "this is no checkpoint"),
        ("nowhere", [], "there is no such folder"),
    ],
)
def test_what_is_no_pipeline(name, files, word, image_folder, tmp_path, capsys, no_weights):
    place = tmp_path / name
    if files is None:
        place.write_bytes(b"weights")
    for file in files or ():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("{}")
    message = refusal(capsys, arguments(place, image_folder, tmp_path / "out"))
    assert f"--pretrained_model_name_or_path {place}: " in message and word in message and "hf auth" not in message


READ_FIRST = ("config", "validation_prompts_file")
PLACES = sorted(name for name, declared in FLAGS.items() if declared.path and name not in READ_FIRST)


@pytest.mark.parametrize("name", PLACES)
def test_an_empty_path_is_refused(name, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "o", **{name: ""}))
    assert message.startswith(f"--{name}: the path is empty")


@pytest.mark.parametrize("name", sorted({*PLACES} - {*MAY_BE_FILES}))
def test_a_file_where_a_folder_belongs(name, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    (tmp_path / "file.txt").touch()
    flags = {name: tmp_path / "file.txt"} | ({"train_data_dir": None} if name == "dataset_name" else {})
    paths = {
        "pretrained_model_name_or_path": sd_pipeline,
        "train_data_dir": image_folder,
        "output_dir": tmp_path / "o",
    }
    words = [word for flag, value in (paths | flags).items() if value for word in (f"--{flag}", str(value))]
    message = refusal(capsys, words)
    assert f"--{name} {tmp_path / 'file.txt'}: this is a file" in message


def test_a_stream_is_validated_after_the_training(sd_pipeline, tmp_path, capsys, no_weights):
    words = [
        "--pretrained_model_name_or_path",
        sd_pipeline,
        "--train_data_dir",
        tmp_path,
        "--validation_prompt",
        "cat",
    ]
    words += ["--streaming", "--max_train_steps", 1, "--report_to", "none"]
    assert "give --validation_steps" in refusal(capsys, words)
    assert parse(list(map(str, [*words, "--validation_epochs", 0]))).validation.validation_epochs == 0


@pytest.mark.parametrize("word, meant", [("--learning_rat", "learning_rate"), ("--ressolution=64", "resolution")])
def test_a_mistyped_flag_gets_the_right_one(word, meant, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    assert f"did you mean --{meant}?" in refusal(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), word])


@pytest.mark.parametrize("number", ["-1e-4", "-.5", "-2.E-3"])
def test_negative_numbers_are_numbers(number, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    words = [*arguments(sd_pipeline, image_folder, tmp_path), "--learning_rate", number]
    assert f"--learning_rate {float(number)}: it must be 0 or more" in refusal(capsys, words)


# Warnings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"prediction_type": "v_prediction"}, "--prediction_type v_prediction"),
        ({"allow_tf32": True}, "--allow_tf32"),
        ({"ema_decay": 0.9}, "--ema_decay"),
        ({"hub_model_id": "a/b"}, "--hub_model_id"),
        ({"use_dora": True, "lora": True, "train_text_encoder": True}, "--use_dora"),
        ({"offload_ema": True}, "--offload_ema"),
        ({"foreach_ema": True}, "--foreach_ema"),
        ({"hub_token": "hf_x"}, "--hub_token"),
        ({"num_validation_images": 2}, "--num_validation_images"),
        ({"num_validation_samples": 2}, "--num_validation_samples"),
        ({"validation_steps": 2}, "--validation_steps"),
        ({"validation_epochs": 2}, "--validation_epochs"),
        ({"mode_scale": 1.0}, "--mode_scale"),
        ({"logit_std": 2.0}, "--logit_std"),
        ({"lr_power": 2.0}, "--lr_power"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles"),
        ({"lr_warmup_steps": 2}, "--lr_warmup_steps"),
        ({"max_sequence_length": 128}, "--max_sequence_length"),
        ({"lpl_no_outlier_mask": True, "lpl_outlier_margin": 3.0}, "--lpl_outlier_margin"),
        ({"lpl_no_outlier_mask": True, "lpl_outlier_stride": 1}, "--lpl_outlier_stride"),
        ({"lpl_max_samples": 2}, "--lpl_max_samples"),  # --train_batch_size is 2
        ({"lpl_chunk_size": 2}, "--lpl_chunk_size"),
        ({"lpl_crop": 32}, "--lpl_crop"),
        ({"lpl_crop": 64, "resolution": "32,64"}, "--lpl_crop"),
        ({"dream_detail_preservation": 0.5}, "--dream_detail_preservation"),
        ({"timestep_bias_multiplier": 2.0}, "--timestep_bias_multiplier"),
        ({"timestep_bias_strategy": "range", "timestep_bias_portion": 0.5}, "--timestep_bias_portion"),
        ({"timestep_bias_strategy": "later", "timestep_bias_begin": 5}, "--timestep_bias_begin"),
        ({"timestep_bias_strategy": "earlier", "timestep_bias_end": 5}, "--timestep_bias_end"),
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr"),
        ({"adam_weight_decay_text_encoder": 0.1}, "--adam_weight_decay_text_encoder"),
        ({"guidance_scale": 2.0}, "--guidance_scale"),
        ({"prodigy_beta3": 0.9}, "--prodigy_beta3"),
        ({"keep_tags": 1}, "--keep_tags"),
        ({"keep_tags_separator": "|||", "keep_tags": 1}, "--keep_tags"),
        ({"tag_separator": ";"}, "--tag_separator"),
        ({"trigger_word": "sks", "validation_prompts": ["a dog", "sks dog", "cat"]}, "--validation_prompts: 'a dog'"),
        ({"prodigy_decouple": False}, "--prodigy_decouple"),
        ({"revision": "main"}, "--revision"),
        ({"non_ema_revision": "main"}, "--non_ema_revision"),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "--learning_rate 0.0001"),
        ({"optimizer": "prodigy", "learning_rate": 0.1}, "--learning_rate 0.1"),
    ],
)
def test_a_flag_without_effect_warns(flags, word, sd_pipeline, image_folder, tmp_path):
    flags = {name: "false" if value is False else value for name, value in flags.items()}
    said = warned(sd_pipeline, image_folder, tmp_path, **flags)
    assert len(said) == 1 and said[0].startswith(word)


@pytest.mark.parametrize("flags", [{"lpl_correct_every": 1}, {"lpl_max_samples": 1}])
def test_what_makes_no_sense_with_a_student_warns(flags, sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lpl.families.resolve._check_student", lambda *_: None)
    (said,) = warned(sd_pipeline, image_folder, tmp_path, lpl_student="user/student", **flags)
    assert said.startswith(f"--{next(iter(flags))}")
    for useful in ({"lpl_correct_every": 8}, {"lpl_correct_every": 1, "lpl_max_samples": 1}):
        assert warned(sd_pipeline, image_folder, tmp_path, lpl_student="user/student", **useful) == []


EFFECTIVE = [
    ("sd_pipeline", {"use_ema": True, "foreach_ema": True, "offload_ema": True, "ema_decay": 0.9}),
    ("sd_pipeline", {"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_warmup_steps": 1}),
    ("sd_pipeline", {"lr_warmup_steps": 0}),  # which a constant schedule has
    ("sd_pipeline", {"validation_prompts": ["a"], "validation_steps": 2, "lpl_start_step": 1}),
    ("sd_pipeline", {"validation_every_nth": 2, "validation_steps": 2, "num_validation_samples": 2}),
    ("sd_pipeline", {"lora": True, "use_ema": True, "lora_dropout": 0.1, "lora_alpha": 2, "use_dora": True}),
    ("sd_pipeline", {"dream_training": True, "dream_detail_preservation": 0.5}),
    ("sd_pipeline", {"timestep_bias_strategy": "range", "timestep_bias_end": 5, "timestep_bias_multiplier": 2}),
    ("sd_pipeline", {"timestep_bias_strategy": "later", "timestep_bias_portion": 1}),
    ("sd_pipeline", {"train_text_encoder": True, "text_encoder_lr": 1e-5, "adam_weight_decay_text_encoder": 0.1}),
    ("sd_pipeline", {"from_scratch": True, "prediction_type": "flow_matching", "logit_mean": 0.5}),
    ("sd_pipeline", {"optimizer": "prodigy", "learning_rate": 1.0, "prodigy_beta3": 0.9, "use_ema": True}),
    ("sd_pipeline", {"lpl_weight": 0, "validation_every_nth": 2, "lpl_distance": "l1"}),
    ("sd_pipeline", {"lpl_weight": 0, "validation_every_nth": 2, "lpl_chunk_size": 1, "lpl_outlier_erosion": 7}),
    ("sd_pipeline", {"lpl_every": 2, "lpl_max_samples": 1, "lpl_crop": 16, "lpl_outlier_stride": 4}),
    ("sd_pipeline", {"lpl_crop": 32, "resolution": "32,64"}),
    ("sd_pipeline", {"lpl_variant": "reference", "lpl_every": 2, "lpl_max_samples": 1, "lpl_chunk_size": 1}),
    ("sd_pipeline", {"dry_run": True, "lora": True}),
    ("sd3_pipeline", {"max_sequence_length": 128, "logit_std": 2.0, "logit_mean": 0.5}),
    ("sd3_pipeline", {"weighting_scheme": "mode", "mode_scale": 1.0}),
    ("flux_pipeline", {"guidance_scale": 2.0}),
    ("flux_pipeline", {"text_encoder_dropout": [0, 1], "tag_dropout": 0.1, "keep_tags": 1, "tag_separator": ";"}),
    ("sd_pipeline", {"trigger_word": "sks", "validation_prompts": ["a sks dog"], "keep_tags_separator": "|"}),
    ("sd_pipeline", {"tag_separator": ";", "keep_tags_separator": "|", "instance_prompt": "a", "caption_suffix": "b"}),
]


@pytest.mark.parametrize("pipeline, flags", EFFECTIVE)
def test_flags_with_effect_do_not_warn(pipeline, flags, request, image_folder, tmp_path):
    assert warned(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags) == []


def test_the_hub_to_resume_from_has_to_be_named(sd_pipeline, image_folder, tmp_path, capsys):
    for flags, refused in (({}, True), ({"hub_model_id": "user/fox"}, False), ({"push_to_hub": True}, False)):
        words = arguments(sd_pipeline, image_folder, tmp_path, resume_from_checkpoint="hub", **flags)
        with pytest.raises(SystemExit) if refused else nullcontext():
            parse(words)
        assert ("say by --hub_model_id" in capsys.readouterr().err) == refused


# What is written where data is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["train_data_dir", "dataset_name", "eval_data_dir"])
@pytest.mark.parametrize(
    "flag, place", [("output_dir", "runs/x"), ("output_dir", ""), ("cache_dir", "cache"), ("logging_dir", "logs")]
)
def test_nothing_is_written_into_the_data(
    source, flag, place, sd_pipeline, image_folder, tmp_path, capsys, no_weights
):
    folder = tmp_path / "data"
    folder.symlink_to(image_folder)  # under another name
    flags = {source: folder, flag: image_folder / place}
    flags |= {"eval_steps": 1} if source == "eval_data_dir" else {}
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "out", **flags))
    assert message.startswith(f"--{flag} ") and "it lies in --" in message and "give a folder outside" in message


def test_pictures_of_wandb_are_not_written_into_the_data(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(image_folder)
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path / "out", report_to="wandb"))
    assert "--report_to ./wandb" in message and "--train_data_dir" in message


def test_real_images_that_are_trained_on_are_said(sd_pipeline, image_folder, tmp_path):
    said = warned(sd_pipeline, image_folder, tmp_path / "out", eval_data_dir=image_folder, eval_steps=1)
    assert any(words.startswith("--eval_data_dir: its images are trained on too") for words in said)


@pytest.mark.parametrize("name", OTHERS)
def test_flags_of_other_trainers_are_translated(name, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    """As docs/migrate.md has them; what does the same here exists."""
    said = refusal(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), f"--{name}", "1"])
    assert f"; here: {OTHERS[name] or 'there is no such thing'} (docs/migrate.md)" in said
    known = {f"--{action.dest}" for action in build_parser().flags}
    assert set(re.findall(r"--\w+", OTHERS[name] or "")) <= known and f"--{name}" not in known
    assert re.search(rf"\b{name}\b", (ROOT / "docs/migrate.md").read_text())
