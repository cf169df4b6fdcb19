"""A bad command gets one sentence, with what to change, before anything is loaded; an idle flag gets a warning."""

import importlib.util
import json
import shutil
import warnings
from contextlib import nullcontext

import diffusers
import pytest
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from lpl.arguments import check_pipeline, read_pipeline
from peft import LoraConfig, inject_adapter_in_model
from tiny import tiny_vae
from trainer import arguments, parsed, run

from lpl.config import checks
from lpl.config.command_line import build_parser, parse
from lpl.families import FAMILIES


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing may load weights, nor a data set."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights or data were loaded before the command was refused")

    for loader in (DiffusionPipeline, ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", loaded)
    monkeypatch.setattr("lpl.data.source.load_dataset", loaded)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(checks, "has_gpu", lambda: True)


def refusal(capsys, words):
    """What is said to a command that is refused: one sentence."""
    with pytest.raises((SystemExit, ValueError)) as error:
        args = parse(words)
        check_pipeline(args, read_pipeline(args))
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        message = capsys.readouterr().err.rpartition("error: ")[2]
    else:
        message = str(error.value)
    assert message and "\n" not in message.strip()
    return message


def warned(pipeline, images, output_dir, /, **flags):
    """The warnings of an accepted command that name a flag."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parsed(pipeline, images, output_dir, **flags)
    return [text for warning in caught if "--" in (text := str(warning.message))]


def cases(*rows):
    return [pytest.param(flags, words, id=" ".join(f"{k}={v}" for k, v in flags.items())) for flags, words in rows]


def edited(source, target, part, **changes):
    """A copy of a pipeline with another configuration of a part, or another index (part None)."""
    shutil.copytree(source, target)
    name = {None: "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(part, f"{part}/config.json")
    config = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(config | changes))
    return target


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
    ({"pretrained_model_name_or_path": "no/where"}, ["--pretrained_model_name_or_path no/where", "model_index.json"]),
    ({"train_data_dir": "nowhere"}, ["--train_data_dir", "nowhere", "no such folder"]),
    ({"train_data_dir": None}, ["--dataset_name", "--train_data_dir", "neither"]),
    ({"dataset_config_name": "de"}, ["--dataset_config_name", "--dataset_name"]),
    ({"output_dir": __file__}, ["--output_dir", __file__]),
    ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "latest"]),
    ({"prediction_type": "noise"}, ["--prediction_type", "noise", "epsilon", "flow_matching"]),
    ({"lr_scheduler": "sine"}, ["--lr_scheduler", "sine", "cosine"]),
    ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
    ({"image_interpolation_mode": "cubic"}, ["--image_interpolation_mode", "cubic", "bicubic"]),
    ({"weighting_scheme": "uniform"}, ["--weighting_scheme", "uniform", "logit_normal"]),
    ({"report_to": "mlflow"}, ["--report_to", "mlflow", "tensorboard", "wandb", "comet_ml", "trackio", "all", "none"]),
    ({"mixed_precision": "fp8"}, ["--mixed_precision", "fp8", "bf16"]),
    ({"mixed_precision": "fp16"}, ["--mixed_precision", "fp16", "bf16"]),
    ({"lpl_vae_dtype": "float16"}, ["--lpl_vae_dtype", "float16", "bfloat16"]),
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
    ({"lpl_vae_name_or_path": "no/where"}, ["--lpl_vae_name_or_path no/where"]),
    ({"pretrained_vae_model_name_or_path": "no/where"}, ["--pretrained_vae_model_name_or_path no/where"]),
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
    ({"validation_every_nth": 1}, ["--validation_every_nth 1", "2 or more"]),
    ({"num_validation_samples": 0}, ["--num_validation_samples 0", "more than 0"]),
    ({"train_batch_size": 0}, ["--train_batch_size 0", "more than 0"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan", "more than 0"]),
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
    ({"quantize_base": "2bit", "lora": True}, ["--quantize_base", "2bit", "8bit"]),
    ({"quantize_base": "4bit", "lora": True}, ["--quantize_base 4bit", "GPU"]),
    (
        {"quantize_base": "8bit", "lora": True, "train_text_encoder": True},
        ["--quantize_base", "--train_text_encoder", "one of them"],
    ),
    ({"from_scratch": True, "lora": True}, ["--from_scratch", "LoRA", "--lora"]),
    ({"from_scratch": True, "rank": 4}, ["--from_scratch", "LoRA", "--rank"]),
    ({"from_scratch": True, "non_ema_revision": "main"}, ["--from_scratch", "--non_ema_revision"]),
    ({"optimizer": "lion"}, ["--optimizer lion", "AdamW", "prodigy"]),
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
    ({"timestep_bias_begin": 1000}, ["--timestep_bias_begin 1000", "--timestep_bias_end", "1000"]),
    ({"timestep_bias_begin": 5, "timestep_bias_end": 4}, ["--timestep_bias_begin 5", "--timestep_bias_end", "4"]),
)
WITH_SD = cases(
    ({"lpl_blocks": ["up_9"]}, ["--lpl_blocks up_9", "no up_9, did you mean up_2?", "mid, up_0, up_1, up_2", "rgb"]),
    ({"lpl_num_blocks": 9}, ["--lpl_blocks", "up_8", "mid, up_0, up_1, up_2"]),
    ({"lpl_blocks": ["mid", "mid"]}, ["--lpl_blocks mid mid", "once"]),
    ({"lpl_blocks": ["rgb", "mid"]}, ["--lpl_blocks rgb mid", "rgb goes alone"]),
    ({"lpl_depth_weighting": [1, 2, 3]}, ["--lpl_depth_weighting", "4 finite"]),
    (
        {"lpl_weight": 0, "validation_every_nth": 2, "lpl_blocks": ["up_9"]},
        ["--lpl_blocks up_9", "mid, up_0, up_1, up_2"],
    ),
    ({"lpl_crop": 6}, ["--lpl_crop 6", "--resolution 32", "are 16, 32:", "4 pixels"]),
    ({"lpl_crop": 24}, ["--lpl_crop 24", "are 16, 32:"]),  # whole positions, but 32 px are no multiple
    ({"lpl_crop": 64}, ["--lpl_crop 64", "are 16, 32:"]),
    ({"lpl_crop": 8, "resolution": 96}, ["--lpl_crop 8", "--resolution 96", "are 16, 24, 32, 48, 96:"]),
    ({"resolution": 30}, ["--resolution 30", "multiples of 4", "28 or 32"]),
    ({"resolution": 2}, ["--resolution 2", "multiples of 4"]),
    ({"precondition_outputs": 1}, ["--precondition_outputs", "flow_matching", "epsilon"]),
    ({"weighting_scheme": "mode"}, ["--weighting_scheme", "flow_matching", "--snr_gamma"]),
    (
        {"prediction_type": "v_prediction", "dream_training": True},
        ["--dream_training", "epsilon", "v_prediction"],
    ),
    ({"prediction_type": "flow_matching", "dream_training": True}, ["--dream_training", "epsilon", "flow_matching"]),
    (
        {"prediction_type": "flow_matching", "timestep_bias_strategy": "later"},
        ["--timestep_bias_strategy", "flow_matching", "--weighting_scheme"],
    ),
    (
        {"timestep_bias_strategy": "range", "timestep_bias_end": 1001},
        ["--timestep_bias_end 1001", "1000 timesteps"],
    ),
    (
        {"timestep_bias_strategy": "later", "timestep_bias_portion": 1e-4},
        ["--timestep_bias_portion 0.0001", "1000 timesteps"],
    ),
    (
        {"lora": True, "lora_target_modules": ["to_q", "to_z"]},
        ["--lora_target_modules to_z", "unet", "for example", "to_k", "to_out.0"],
    ),
)
WITH_SD3 = cases(
    ({"resolution": 36}, ["--resolution 36", "multiples of 8", "32 or 40"]),
    ({"resolution": 264}, ["--resolution 264", "256 at most"]),
    ({"max_sequence_length": 600}, ["--max_sequence_length 600", "512 at most"]),
    ({"snr_gamma": 5}, ["--snr_gamma", "flow_matching", "--weighting_scheme"]),
    ({"timestep_bias_strategy": "later"}, ["--timestep_bias_strategy", "flow_matching", "--weighting_scheme"]),
    ({"dream_training": True}, ["--dream_training", "epsilon", "flow_matching"]),
    ({"lora": True, "lora_target_modules": ["conv_in"]}, ["--lora_target_modules conv_in", "transformer", "to_q"]),
)


@pytest.mark.parametrize("flags, words", ALONE + WITH_SD)
@pytest.mark.filterwarnings("ignore:.*--(prediction_type|learning_rate|lpl_start|lpl_num_blocks)")
def test_refused_with_sd(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("flags, words", WITH_SD3)
def test_refused_with_sd3(flags, words, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd3_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "package, flags",
    [
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("bitsandbytes", {"quantize_base": "4bit", "lora": True}),
        ("wandb", {"report_to": "wandb"}),
        ("comet_ml", {"report_to": "comet_ml"}),
        ("trackio", {"report_to": "trackio"}),
        ("prodigyopt", {"optimizer": "prodigy"}),
    ],
)
def test_a_package_that_is_missing(
    package, flags, sd_pipeline, image_folder, tmp_path, capsys, monkeypatch, no_weights, gpu
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert f"pip install {package}" in message and f"--{next(iter(flags))}" in message


@pytest.mark.parametrize("flags", [{"quantize_base": "4bit", "rank": 4}, {"mixed_precision": "fp16"}])
def test_what_a_gpu_allows(flags, sd_pipeline, image_folder, tmp_path, gpu):
    assert warned(sd_pipeline, image_folder, tmp_path, **flags, allow_tf32=True) == []


def test_every_number_that_cannot_be_negative_is_checked(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    may_be = {"noise_offset", "logit_mean", "mode_scale", "lr_power", "validation_guidance_scale", "local_rank"}
    actions = build_parser()._actions
    numbers = {action.dest for action in actions if action.type in (int, float) and not action.choices}
    assert len(numbers) > 50
    for name in numbers - may_be:
        flags = {"use_ema": True, "rank": 4, name: -1}
        assert f"--{name} -1" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))


def test_the_pipeline_is_not_overwritten(sd_pipeline, image_folder, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, sd_pipeline))
    assert "--output_dir" in message and "another folder" in message


# The pipeline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, files, word",
    [
        ("lora", ["pytorch_lora_weights.safetensors"], "this is a LoRA"),
        ("peft", ["transformer_lora/adapter_config.json"], "this is a LoRA"),
        ("folder", ["notes.txt"], "this folder has no model_index.json"),
        ("model.safetensors", None, "from_single_file"),
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


@pytest.mark.parametrize("word, meant", [("--learning_rat", "learning_rate"), ("--ressolution=64", "resolution")])
def test_a_mistyped_flag_gets_the_right_one(word, meant, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    assert f"did you mean --{meant}?" in refusal(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), word])


@pytest.mark.parametrize("number", ["-1e-4", "-.5", "-2.E-3"])
def test_negative_numbers_are_numbers(number, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    words = [*arguments(sd_pipeline, image_folder, tmp_path), "--learning_rate", number]
    assert f"--learning_rate {float(number)}: it must be more than 0" in refusal(capsys, words)


def test_a_small_sd3_has_its_own_default_resolution(sd3_pipeline, image_folder, tmp_path):
    assert parsed(sd3_pipeline, image_folder, tmp_path, resolution=None)[0].resolution == 32


def test_an_unknown_family(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    kandinsky = edited(sd_pipeline, tmp_path / "pipeline", None, _class_name="KandinskyPipeline")
    message = refusal(capsys, arguments(kandinsky, image_folder, tmp_path / "out"))
    supported = [family.pipeline_class.__name__ for family in FAMILIES]
    assert all(word in message for word in ("--pretrained_model_name_or_path", "KandinskyPipeline", *supported))


def test_an_unknown_scheduler(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, scheduler=["diffusers", "MyScheduler"])
    assert "MyScheduler" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))


def test_a_pipeline_trained_on_an_unknown_objective(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "scheduler", prediction_type="score")
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "'score'" in message and "--prediction_type" in message and "v_prediction" in message


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_an_incomplete_pipeline(part, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    shutil.rmtree(pipeline / part)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert part in message and "--pretrained_model_name_or_path" in message


def test_what_is_read_of_a_pipeline(sd_pipeline, sd3_without_t5, image_folder, tmp_path):
    _, sd = parsed(sd_pipeline, image_folder, tmp_path)
    assert sd.family.name == "stable-diffusion" and sd.index["_class_name"] == "StableDiffusionPipeline"
    assert sd.parts == {"vae": sd.vae, "unet": sd.denoiser} and sd.denoiser["_class_name"] == "UNet2DConditionModel"
    _, sd3 = parsed(sd3_without_t5, image_folder, tmp_path)
    assert {"text_encoder_3", "tokenizer_3"} <= set(sd3.absent) and "text_encoder" not in sd3.absent


def test_an_objective_that_the_pipeline_cannot_sample(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    family = next(family for family in FAMILIES if family.name == "stable-diffusion")
    monkeypatch.setattr(family, "objectives", ("epsilon", "v_prediction"))
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, prediction_type="sample"))
    words = ("--prediction_type sample", "StableDiffusionPipeline can only sample", "epsilon or v_prediction")
    assert all(word in message for word in words)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_familys_objectives(name, request, image_folder, class_folder, tmp_path, capsys):
    family, images, pipeline = of_family(name, request, image_folder, class_folder)
    for objective in ("epsilon", "v_prediction", "sample", "flow_matching"):
        flags = {"prediction_type": objective, "from_scratch": True}
        if objective in family.objectives:
            assert parsed(pipeline, images, tmp_path, **flags)[0].prediction_type == objective
        else:
            message = refusal(capsys, arguments(pipeline, images, tmp_path, **flags))
            assert f"{family.pipeline_class.__name__} can only sample" in message


def of_family(name, request, image_folder, class_folder):
    """The family of that name, images that it can be trained on, and its tiny pipeline."""
    family = next(family for family in FAMILIES if family.name == name)
    fixtures = {"stable-diffusion": "sd_pipeline", "stable-diffusion-xl": "sdxl_pipeline"}
    fixtures |= {"stable-diffusion-3": "sd3_pipeline"}
    pipeline = request.getfixturevalue(fixtures.get(name, f"{name.replace('-', '_')}_pipeline"))
    return family, class_folder if family.class_conditional else image_folder, pipeline


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_familys_defaults_are_accepted(name, request, image_folder, class_folder, tmp_path):
    family, images, pipeline = of_family(name, request, image_folder, class_folder)
    trained = bool(family.trainable_text_encoders)
    args, configs = parsed(pipeline, images, tmp_path, lora=True, train_text_encoder=trained)
    assert (args.text_encoder_lr is not None) is (args.adam_weight_decay_text_encoder is not None) is trained
    assert args.proportion_empty_prompts == family.empty_share
    assert args.max_sequence_length == family.sequence_length
    # The family's own LoRA targets are there.
    parsed(pipeline, images, tmp_path, lora=True, lora_target_modules=args.lora_target_modules)
    default = family.default_resolution(configs.parts)
    assert default % family.resolution_multiple(configs.parts) == 0


def test_text_encoders_that_are_not_trained(dit_pipeline, class_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(dit_pipeline, class_folder, tmp_path, train_text_encoder=True))
    assert all(word in message for word in ("--train_text_encoder", "dit", "stable-diffusion-xl"))


def test_sd3_at_its_default_resolution(sd3_pipeline, image_folder, tmp_path):
    pipeline = edited(sd3_pipeline, tmp_path / "pipeline", "transformer", pos_embed_max_size=64)
    assert parsed(pipeline, image_folder, tmp_path, resolution=None)[0].resolution == 512


def test_a_pipeline_of_one_size(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    family = next(family for family in FAMILIES if family.name == "stable-diffusion")
    monkeypatch.setattr(family, "resolution_range", classmethod(lambda cls, configs: (32, 32)))
    parsed(sd_pipeline, image_folder, tmp_path, resolution=32)
    assert "32 at least" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, resolution=28))
    assert "32 at most" in refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, resolution=36))


TARGETS = ("to_q", "to_out.0", "conv1", "proj_in", "mid_block.attentions.0", "to_out", "norm1", "0", "z", "to_")


@pytest.mark.parametrize("target", TARGETS)
def test_lora_targets_are_those_that_peft_takes(target, sd_pipeline, image_folder, tmp_path, capsys):
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd_pipeline, subfolder="unet")
    flags = {"rank": 1, "lora_target_modules": [target]}
    try:
        inject_adapter_in_model(LoraConfig(r=1, target_modules=[target]), unet)
    except ValueError:
        message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
        assert f"--lora_target_modules {target}:" in message
    else:
        assert parsed(sd_pipeline, image_folder, tmp_path, **flags)[0].lora_target_modules == [target]


# Autoencoders --------------------------------------------------------------------------------------------------------


OF_FACTOR_2 = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def test_an_autoencoder_of_another_make(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "vae", _class_name="ConsistencyDecoderVAE")
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "the pipeline's VAE" in message and "ConsistencyDecoderVAE" in message and "AutoencoderKL" in message
    for flag in ("lpl_vae_name_or_path", "pretrained_vae_model_name_or_path"):
        words = arguments(sd_pipeline, image_folder, tmp_path / "out", **{flag: pipeline / "vae"})
        message = refusal(capsys, words)
        assert f"--{flag}" in message and "ConsistencyDecoderVAE" in message


@pytest.mark.parametrize("where", ["pipeline", "lpl_vae_name_or_path"])
def test_modules_of_an_autoencoder_of_another_make_are_named_by_path(
    where, sd_pipeline, image_folder, tmp_path, capsys, monkeypatch, no_weights
):
    monkeypatch.setattr(checks, "SUPPORTED", ())
    monkeypatch.setattr(checks, "PIPELINE_VAES", ())
    if where != "pipeline":
        monkeypatch.setattr(checks, "_used_vae_config", lambda args, own: own)
    flags = {} if where == "pipeline" else {where: sd_pipeline / "vae"}
    words = arguments(sd_pipeline, image_folder, tmp_path, **flags)
    assert "path in --lpl_blocks" in refusal(capsys, words)
    parsed(sd_pipeline, image_folder, tmp_path, **flags, lpl_blocks=["decoder.mid_block", "decoder.up_blocks.0"])
    message = refusal(capsys, [*words, "--lpl_blocks", "decoder.mid_blok"])
    assert "--lpl_blocks decoder.mid_blok" in message and "decoder.mid_block" in message


@pytest.mark.parametrize("kind", ["asymmetric", "tiny", "dc", "hunyuan", "wan", "temporal"])
def test_vaes_of_other_classes_with_the_same_latent_space(kind, sd_pipeline, image_folder, tmp_path, capsys):
    """LPL looks through any of them; the pipeline must also be able to sample."""
    vae = tiny_vae(kind)
    vae.save_config(tmp_path / "vae")
    parsed(sd_pipeline, image_folder, tmp_path / "out", lpl_vae_name_or_path=tmp_path / "vae")
    flags = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", **flags)
    if type(vae).__name__ in checks.PIPELINE_VAES:
        parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
    else:
        assert "--pretrained_vae_model_name_or_path" in refusal(capsys, words)


@pytest.mark.parametrize("kind", ["vq", "flux2"])
def test_vaes_of_other_classes_with_other_latents(kind, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    tiny_vae(kind).save_config(tmp_path / "vae")
    words = arguments(sd_pipeline, image_folder, tmp_path / "out", lpl_vae_name_or_path=tmp_path / "vae")
    assert "same latent space" in refusal(capsys, words)


@pytest.mark.parametrize("flag", ["lpl_vae_name_or_path", "pretrained_vae_model_name_or_path"])
def test_a_vae_with_another_latent_space(flag, sd_pipeline, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    words = arguments(sd_pipeline, image_folder, tmp_path, **{flag: sd3_pipeline / "vae"})
    message = refusal(capsys, words)
    assert all(word in message for word in (f"--{flag}", "16 channels", "4"))


def test_a_vae_with_latents_of_another_size(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    """Their channels alone would fit; with --pretrained_vae_model_name_or_path it is the only VAE there is."""
    other = edited(sd_pipeline, tmp_path / "other", "vae", **OF_FACTOR_2) / "vae"
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, lpl_vae_name_or_path=other))
    assert all(word in message for word in ("--lpl_vae_name_or_path", "2 pixels", "pipeline's 4", "latent space"))
    flags = {"pretrained_vae_model_name_or_path": other, "lpl_vae_name_or_path": other}
    parsed(sd_pipeline, image_folder, tmp_path, **flags)


def test_another_vae_counts_instead_of_the_pipelines_own(sd_pipeline, image_folder, tmp_path):
    """The pipeline's own would be refused, and the other one's factor is 2."""
    other = edited(sd_pipeline, tmp_path / "other", "vae", **OF_FACTOR_2) / "vae"
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", "vae", _class_name="ConsistencyDecoderVAE")
    flags = {"pretrained_vae_model_name_or_path": other, "resolution": 30, "lpl_blocks": ["up_1"]}
    _, configs = parsed(pipeline, image_folder, tmp_path / "out", **flags)
    assert configs.vae["block_out_channels"] == [8, 16]
    with pytest.raises(ValueError, match="--lpl_blocks up_2"):
        parsed(pipeline, image_folder, tmp_path / "out", **flags | {"lpl_blocks": ["up_2"]})


@pytest.mark.parametrize("where", ["pipeline", "lpl_vae_name_or_path"])
def test_a_vae_that_overflows_in_float16(where, sd_pipeline, image_folder, tmp_path, capsys, gpu):
    robust = edited(sd_pipeline, tmp_path / "robust", "vae", force_upcast=False)
    fragile = edited(sd_pipeline, tmp_path / "fragile", "vae", force_upcast=True)
    parsed(robust, image_folder, tmp_path / "out", lpl_vae_dtype="float16")
    parsed(fragile, image_folder, tmp_path / "out", lpl_vae_dtype="bfloat16")
    pipeline, flags = (fragile, {}) if where == "pipeline" else (robust, {where: fragile / "vae"})
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out", lpl_vae_dtype="float16", **flags))
    assert all(word in message for word in ("--lpl_vae_dtype float16", "force_upcast", "bfloat16"))


# Data ----------------------------------------------------------------------------------------------------------------


def test_a_data_folder_without_images_or_captions(sd_pipeline, tmp_path, capsys, no_weights):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert "has no images" in refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out"))
    (folder / "a.PNG").write_bytes(b"")
    message = refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out", caption_column="prompt"))
    assert "metadata.jsonl" in message and '"prompt"' in message and str(folder) in message


def test_no_images_is_said_before_the_pipeline_is_looked_for(tmp_path, capsys):
    assert "no images" in refusal(capsys, arguments("no/where", tmp_path, tmp_path / "out"))


def test_class_labels_come_from_folders_or_a_file(dit_pipeline, class_folder, image_folder, tmp_path, capsys):
    args, _ = parsed(dit_pipeline, class_folder, tmp_path / "out")
    assert args.caption_column == "label"
    assert parsed(dit_pipeline, class_folder, tmp_path / "out", caption_column="text")[0].caption_column == "text"
    parsed(dit_pipeline, image_folder, tmp_path / "out")  # its metadata.jsonl may have labels
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(b"")
    message = refusal(capsys, arguments(dit_pipeline, flat, tmp_path / "out"))
    assert all(word in message for word in (str(flat), "class labels", "sub-folder", '"label"'))


def test_a_folder_of_classes_has_no_captions(sd_pipeline, class_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, class_folder, tmp_path / "out"))
    assert "no captions" in message and '"text"' in message


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
        ({"dream_detail_preservation": 0.5}, "--dream_detail_preservation"),
        ({"timestep_bias_multiplier": 2.0}, "--timestep_bias_multiplier"),
        ({"timestep_bias_strategy": "range", "timestep_bias_portion": 0.5}, "--timestep_bias_portion"),
        ({"timestep_bias_strategy": "later", "timestep_bias_begin": 5}, "--timestep_bias_begin"),
        ({"timestep_bias_strategy": "earlier", "timestep_bias_end": 5}, "--timestep_bias_end"),
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr"),
        ({"adam_weight_decay_text_encoder": 0.1}, "--adam_weight_decay_text_encoder"),
        ({"guidance_scale": 2.0}, "--guidance_scale"),
        ({"prodigy_beta3": 0.9}, "--prodigy_beta3"),
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


def test_idle_flags_without_a_default_are_forgotten(sd_pipeline, image_folder, tmp_path):
    """So that the run's recipe does not bring the warning again."""
    flags = {"text_encoder_lr": 1e-5, "adam_weight_decay_text_encoder": 0.1, "max_sequence_length": 128}
    with pytest.warns(UserWarning, match="no effect"):
        args, _ = parsed(sd_pipeline, image_folder, tmp_path, **flags)
    assert {name: getattr(args, name) for name in flags} == dict.fromkeys(flags)


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
    ("sd_pipeline", {"lpl_variant": "reference", "lpl_every": 2, "lpl_max_samples": 1, "lpl_chunk_size": 1}),
    ("sd_pipeline", {"dry_run": True, "lora": True}),
    ("sd3_pipeline", {"max_sequence_length": 128, "logit_std": 2.0, "logit_mean": 0.5}),
    ("sd3_pipeline", {"weighting_scheme": "mode", "mode_scale": 1.0}),
    ("flux_pipeline", {"guidance_scale": 2.0}),
]


@pytest.mark.parametrize("pipeline, flags", EFFECTIVE)
def test_flags_with_effect_do_not_warn(pipeline, flags, request, image_folder, tmp_path):
    assert warned(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags) == []


def test_a_flux_without_embedded_guidance(flux_pipeline, image_folder, tmp_path):
    schnell = edited(flux_pipeline, tmp_path / "schnell", "transformer", guidance_embeds=False)
    assert "--guidance_scale" in warned(schnell, image_folder, tmp_path / "out", guidance_scale=2.0)[0]


def test_prodigy_has_one_learning_rate(sd3_pipeline, image_folder, tmp_path):
    flags = {"optimizer": "prodigy", "learning_rate": 1.0, "train_text_encoder": True}
    assert parsed(sd3_pipeline, image_folder, tmp_path, **flags)[0].text_encoder_lr == 1.0
    assert parsed(sd3_pipeline, image_folder, tmp_path, **flags | {"optimizer": "AdamW"})[0].text_encoder_lr == 5e-6


def test_objectives_follow_the_pipeline(sd_pipeline, sd_v_pipeline, sd3_pipeline, image_folder, tmp_path):
    def resolved(pipeline, **flags):
        args, _ = parsed(pipeline, image_folder, tmp_path, **flags)
        return args.prediction_type, args.weighting_scheme

    assert resolved(sd_pipeline) == ("epsilon", None)
    assert resolved(sd_v_pipeline) == ("v_prediction", None)
    assert resolved(sd3_pipeline) == ("flow_matching", "logit_normal")
    with pytest.warns(UserWarning, match="trained on epsilon"):
        assert resolved(sd_pipeline, prediction_type="flow_matching") == ("flow_matching", "logit_normal")


def test_a_shift_that_depends_on_the_size(sd3_pipeline, image_folder, tmp_path):
    pipeline = edited(sd3_pipeline, tmp_path / "pipeline", "scheduler", use_dynamic_shifting=True)
    with pytest.warns(UserWarning, match="shift depends on the image's size"):
        parsed(pipeline, image_folder, tmp_path / "out")


def test_the_hub_to_resume_from_has_to_be_named(sd_pipeline, image_folder, tmp_path, capsys):
    for flags, refused in (({}, True), ({"hub_model_id": "user/fox"}, False), ({"push_to_hub": True}, False)):
        words = arguments(sd_pipeline, image_folder, tmp_path, resume_from_checkpoint="hub", **flags)
        with pytest.raises(SystemExit) if refused else nullcontext():
            parse(words)
        assert ("say by --hub_model_id" in capsys.readouterr().err) == refused
