"""The command line: a bad one gets one sentence and loads nothing; defaults are diffusers'; every flag has a help."""

import importlib.util
import json
import shutil

import pytest
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from trainer import arguments, parsed, run

from lpl.arguments import EMA_DECAY, EMA_DECAY_WITH_LPL, build_parser


# FLAGS.md: `train_text_to_image.py` decides, then the other scripts from left to right.
DIFFUSERS_DEFAULTS = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "adam_weight_decay": 0.01,
    "allow_tf32": False,
    "cache_dir": None,
    "caption_column": "text",
    "center_crop": False,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "dataloader_num_workers": 0,
    "dataset_config_name": None,
    "dataset_name": None,
    "foreach_ema": False,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "hub_model_id": None,
    "hub_token": None,
    "image_column": "image",
    "image_interpolation_mode": "lanczos",
    "input_perturbation": 0,
    "learning_rate": 1e-4,
    "logging_dir": "logs",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "max_grad_norm": 1.0,
    "max_sequence_length": 77,
    "max_train_samples": None,
    "max_train_steps": None,
    "mixed_precision": None,
    "mode_scale": 1.29,
    "noise_offset": 0,
    "num_train_epochs": 100,
    "num_validation_images": 4,
    "offload_ema": False,
    "output_dir": "sd-model-finetuned",
    "prediction_type": None,
    "pretrained_model_name_or_path": None,
    "proportion_empty_prompts": 0,
    "push_to_hub": False,
    "random_flip": False,
    "report_to": "tensorboard",
    "resume_from_checkpoint": None,
    "revision": None,
    "scale_lr": False,
    "seed": None,
    "snr_gamma": None,
    "tracker_project_name": "text2image-fine-tune",
    "train_batch_size": 16,
    "train_data_dir": None,
    "use_8bit_adam": False,
    "use_ema": False,
    "validation_epochs": 5,
    "validation_prompt": None,
    "validation_prompts": None,
    "variant": None,
}
OWN_DEFAULTS = {  # SPEC.md
    "precondition_outputs": 0,
    "lpl_weight": "auto:0.2",
    "lpl_blocks": None,
    "lpl_sigma_threshold": 3.0,
    "lpl_threshold_base_resolution": 256,
    "lpl_normalization": "shared",
    "lpl_detach_statistics": False,
    "lpl_depth_weighting": ["inverse"],
    "lpl_no_outlier_mask": False,
    "lpl_distance": "l2",
    "lpl_variant": "paper",
    "lpl_start_step": 0,
    "lpl_ramp_steps": 0,
    "lpl_gradient_checkpointing": False,
    "lpl_vae_dtype": "float32",
    "lpl_vae_name_or_path": None,
}
DATA_SET = {"train_data_dir": None, "dataset_name": "someone/something"}


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing may load weights, nor a data set."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights or data were loaded before the command was refused")

    for loader in (DiffusionPipeline, ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", loaded)
    monkeypatch.setattr("lpl.data.load_dataset", loaded)


def refusal(capsys, words):
    """What the script says to a command that it refuses: one sentence."""
    with pytest.raises(SystemExit) as error:
        run(words)
    code = error.value.code
    message = capsys.readouterr().err.rpartition("error: ")[2] if code == 2 else str(code).partition("error: ")[2]
    assert code != 0 and message and "Traceback" not in message
    assert "\n" not in message.strip()
    return message


def cases(*rows):
    return [pytest.param(flags, words, id=" ".join(f"{k}={v}" for k, v in flags.items())) for flags, words in rows]


ALONE = cases(  # wrong whatever the pipeline: what is given, what the sentence must name
    ({"pretrained_model_name_or_path": None}, ["--pretrained_model_name_or_path"]),
    ({"pretrained_model_name_or_path": "no/where"}, ["--pretrained_model_name_or_path no/where", "model_index.json"]),
    ({"train_data_dir": "nowhere"}, ["--train_data_dir", "nowhere", "no such folder"]),
    ({"train_data_dir": None}, ["--dataset_name", "--train_data_dir", "neither"]),
    ({"dataset_name": "a/b"}, ["--dataset_name", "--train_data_dir", "both"]),
    ({"dataset_config_name": "de"}, ["--dataset_config_name", "--dataset_name"]),
    ({"output_dir": __file__}, ["--output_dir", __file__]),
    ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "latest"]),
    ({"prediction_type": "noise"}, ["--prediction_type", "noise", "epsilon", "flow_matching"]),
    ({"lr_scheduler": "sine"}, ["--lr_scheduler", "sine", "cosine"]),
    ({"image_interpolation_mode": "cubic"}, ["--image_interpolation_mode", "cubic", "bicubic"]),
    ({"weighting_scheme": "uniform"}, ["--weighting_scheme", "uniform", "logit_normal"]),
    ({"report_to": "mlflow"}, ["--report_to", "mlflow", "tensorboard", "wandb", "none"]),
    ({"mixed_precision": "fp8"}, ["--mixed_precision", "fp8", "bf16"]),
    ({"mixed_precision": "fp16"}, ["--mixed_precision", "fp16", "bf16"]),
    ({"lpl_vae_dtype": "float16"}, ["--lpl_vae_dtype", "float16", "bf16"]),
    ({"lpl_weight": "auto:2"}, ["--lpl_weight", "auto:2", "auto:0.2"]),
    ({"lpl_weight": "-1"}, ["--lpl_weight", "-1"]),
    ({"lpl_weight": "much"}, ["--lpl_weight", "much"]),
    ({"lpl_normalization": "batch"}, ["--lpl_normalization", "batch", "separate"]),
    ({"lpl_distance": "huber"}, ["--lpl_distance", "huber", "l1"]),
    ({"lpl_variant": "mine"}, ["--lpl_variant", "mine", "reference"]),
    ({"lpl_depth_weighting": ["quadratic"]}, ["--lpl_depth_weighting quadratic", "inverse", "one number per block"]),
    ({"lpl_depth_weighting": [1, 2], "lpl_blocks": ["mid"]}, ["--lpl_depth_weighting", "1 finite", "[1.0, 2.0]"]),
    ({"lpl_depth_weighting": [1, "nan", 1, 1]}, ["--lpl_depth_weighting", "nan", "finite"]),
    ({"lpl_variant": "reference", "lpl_distance": "l1"}, ["--lpl_variant reference", "--lpl_variant paper"]),
    ({"lpl_normalization": "none", "lpl_detach_statistics": True}, ["--lpl_detach_statistics", "no effect"]),
    ({"lpl_weight": 0, "lpl_distance": "l1"}, ["--lpl_weight 0", "--lpl_distance", "no effect"]),
    ({"ema_decay": 0.9}, ["--ema_decay", "--use_ema"]),
    ({"hub_model_id": "a/b"}, ["--hub_model_id", "--push_to_hub"]),
    ({"validation_prompt": "a", "validation_prompts": ["b"]}, ["--validation_prompt ", "--validation_prompts"]),
    ({"train_batch_size": 0}, ["--train_batch_size 0", "more than 0"]),
    ({"learning_rate": "nan"}, ["--learning_rate nan", "more than 0"]),
    ({"learning_rate": "fast"}, ["--learning_rate", "fast"]),
    ({"lr_warmup_steps": -1}, ["--lr_warmup_steps -1", "0 or more"]),
    ({"proportion_empty_prompts": 1.5}, ["--proportion_empty_prompts 1.5", "between 0 and 1"]),
    ({"adam_beta1": 1.0}, ["--adam_beta1 1.0", "less than 1"]),
    ({"lr_scheduler": "piecewise_constant"}, ["--lr_scheduler", "piecewise_constant", "cosine"]),
    ({"lpl_blocks": ["rgb"], "lpl_variant": "reference"}, ["--lpl_variant reference", "rgb", "--lpl_blocks"]),
    ({"lpl_vae_name_or_path": "no/where"}, ["--lpl_vae_name_or_path no/where"]),
)
WITH_SD = cases(
    ({"lpl_blocks": ["up_9"]}, ["--lpl_blocks up_9", "mid, up_0, up_1, up_2", "rgb"]),
    ({"lpl_blocks": ["mid", "mid"]}, ["--lpl_blocks mid mid", "once"]),
    ({"lpl_blocks": ["rgb", "mid"]}, ["--lpl_blocks rgb mid", "alone"]),
    ({"lpl_depth_weighting": [1, 2, 3]}, ["--lpl_depth_weighting", "4 finite"]),
    ({"resolution": 30}, ["--resolution 30", "multiples of 4", "28 or 32"]),
    ({"resolution": 2}, ["--resolution 2", "multiples of 4"]),
    ({"precondition_outputs": 1}, ["--precondition_outputs", "flow_matching", "epsilon"]),
    ({"weighting_scheme": "mode"}, ["--weighting_scheme", "flow_matching", "--snr_gamma"]),
)
WITH_SD3 = cases(
    ({"resolution": 36}, ["--resolution 36", "multiples of 8", "32 or 40"]),
    ({"resolution": 264}, ["--resolution 264", "256 at most"]),
    ({"max_sequence_length": 600}, ["--max_sequence_length 600", "512 at most"]),
    ({"snr_gamma": 5}, ["--snr_gamma", "flow_matching", "--weighting_scheme"]),
)


@pytest.mark.parametrize("flags, words", ALONE + WITH_SD)
def test_refused_with_sd(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("flags, words", WITH_SD3)
def test_refused_with_sd3(flags, words, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd3_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


def test_a_vae_with_another_latent_space(sd_pipeline, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    words = arguments(sd_pipeline, image_folder, tmp_path, lpl_vae_name_or_path=sd3_pipeline / "vae")
    message = refusal(capsys, words)
    assert all(word in message for word in ("--lpl_vae_name_or_path", "16 channels", "4"))


@pytest.mark.parametrize(
    "package, flags", [("bitsandbytes", {"use_8bit_adam": True}), ("wandb", {"report_to": "wandb"})]
)
def test_a_package_that_is_missing(
    package, flags, sd_pipeline, image_folder, tmp_path, capsys, monkeypatch, no_weights
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert f"pip install {package}" in message and f"--{next(iter(flags))}" in message


def test_every_number_that_cannot_be_negative_is_checked(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    may_be = {"logit_mean", "mode_scale", "lr_power", "validation_guidance_scale"}
    actions = build_parser()._actions
    numbers = {action.dest for action in actions if action.type in (int, float) and not action.choices}
    accepted = set()
    for name in numbers - may_be:
        try:
            message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **{"use_ema": True, name: -1}))
            assert f"--{name} -1" in message
        except AssertionError as error:
            if "were loaded" not in str(error):
                raise
            accepted.add(name)
    assert not accepted


@pytest.mark.parametrize("word", ["--lpl_weigh", "--resume", "--train_batch"])
def test_abbreviations_are_refused(word, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), word, "1"])
    assert "unrecognized" in message and word in message


def folder_without(source, target, part):
    shutil.copytree(source, target)
    shutil.rmtree(target / part)
    return target


def reindexed(source, target, **changes):
    """A copy of a pipeline with another model_index.json."""
    shutil.copytree(source, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | changes))
    return target


def test_an_unknown_family(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    kandinsky = reindexed(sd_pipeline, tmp_path / "pipeline", _class_name="KandinskyPipeline")
    message = refusal(capsys, arguments(kandinsky, image_folder, tmp_path / "out"))
    supported = ("StableDiffusionPipeline", "StableDiffusion3Pipeline")
    assert all(word in message for word in ("--pretrained_model_name_or_path", "KandinskyPipeline", *supported))


def test_an_unknown_scheduler(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = reindexed(sd_pipeline, tmp_path / "pipeline", scheduler=["diffusers", "MyScheduler"])
    assert "MyScheduler" in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))


def test_a_pipeline_trained_on_an_unknown_objective(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    config = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "score"}))
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "'score'" in message and "--prediction_type" in message and "v_prediction" in message


@pytest.mark.parametrize("part", ["vae", "unet", "scheduler"])
def test_an_incomplete_pipeline(part, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = folder_without(sd_pipeline, tmp_path / "pipeline", part)
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert part in message and "--pretrained_model_name_or_path" in message


def test_a_data_folder_without_images_or_captions(sd_pipeline, tmp_path, capsys, no_weights):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert "has no images" in refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out"))
    (folder / "a.PNG").write_bytes(b"")
    message = refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out", caption_column="prompt"))
    assert "metadata.jsonl" in message and '"prompt"' in message and str(folder) in message


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"prediction_type": "v_prediction"}, "--prediction_type v_prediction"),
        ({"allow_tf32": True}, "--allow_tf32"),
        ({"offload_ema": True}, "--offload_ema"),
        ({"foreach_ema": True}, "--foreach_ema"),
        ({"hub_token": "hf_x"}, "--hub_token"),
        ({"num_validation_images": 2}, "--num_validation_images"),
        ({"validation_steps": 2}, "--validation_steps"),
        ({"mode_scale": 1.0}, "--mode_scale"),
        ({"logit_std": 2.0}, "--logit_std"),
        ({"lr_power": 2.0}, "--lr_power"),
        ({"lr_num_cycles": 2}, "--lr_num_cycles"),
        ({"max_sequence_length": 128}, "--max_sequence_length"),
        ({"lpl_start_step": 2}, "--lpl_start_step"),  # --max_train_steps is 2
    ],
)
def test_a_flag_without_effect_warns(flags, word, sd_pipeline, image_folder, tmp_path):
    with pytest.warns(UserWarning, match=word):
        parsed(sd_pipeline, image_folder, tmp_path, **flags)


def test_flags_with_effect_do_not_warn(sd_pipeline, sd3_pipeline, image_folder, tmp_path, recwarn):
    flags = {"use_ema": True, "foreach_ema": True, "offload_ema": True, "ema_decay": 0.9, "lr_scheduler": "polynomial"}
    flags |= {"lr_power": 2.0, "lr_warmup_steps": 1, "validation_prompts": ["a"], "validation_steps": 2}
    parsed(sd_pipeline, image_folder, tmp_path, **flags, lpl_start_step=1)
    parsed(sd3_pipeline, image_folder, tmp_path, max_sequence_length=128, logit_std=2.0, logit_mean=0.5)
    parsed(sd3_pipeline, image_folder, tmp_path, weighting_scheme="mode", mode_scale=1.0)
    assert [str(warning.message) for warning in recwarn if "--" in str(warning.message)] == []


# Defaults and help --------------------------------------------------------------------------------------------------


def defaults():
    return {action.dest: action.default for action in build_parser()._actions if action.dest != "help"}


def test_defaults_are_those_of_diffusers_and_of_the_specification():
    ours, expected = defaults(), DIFFUSERS_DEFAULTS | OWN_DEFAULTS
    assert {name: ours[name] for name in expected} == expected
    assert set(ours) - set(expected) == {  # ours, or None where diffusers' value depends on the family
        "ema_decay",
        "logging_steps",
        "lpl_measuring_steps",
        "resolution",
        "validation_guidance_scale",
        "validation_inference_steps",
        "validation_steps",
        "weighting_scheme",
    }


def test_every_flag_has_a_help_text_of_its_own():
    actions = [action for action in build_parser()._actions if action.dest != "help"]
    texts = [action.help or "" for action in actions]
    assert all(len(text) > 5 for text in texts)
    assert len(set(texts)) == len(texts)
    assert all(action.option_strings == [f"--{action.dest}"] for action in actions)  # no second spelling
    assert "--lpl_weight LPL_WEIGHT" in build_parser().format_help()  # a stray % in a help text would raise


def test_defaults_that_depend_on_the_pipeline(sd_pipeline, sd_v_pipeline, sd3_pipeline, image_folder, tmp_path):
    def resolved(pipeline, **flags):
        args, _ = parsed(pipeline, image_folder, tmp_path, **flags)
        return args.prediction_type, args.weighting_scheme, args.resolution

    assert resolved(sd_pipeline, resolution=None) == ("epsilon", "none", 512)
    assert resolved(sd_v_pipeline) == ("v_prediction", "none", 32)
    assert resolved(sd3_pipeline) == ("flow_matching", "logit_normal", 32)
    with pytest.warns(UserWarning, match="trained on epsilon"):
        assert resolved(sd_pipeline, prediction_type="flow_matching") == ("flow_matching", "logit_normal", 32)


def test_sd3_at_its_default_resolution(sd3_pipeline, image_folder, tmp_path):
    config = json.loads((sd3_pipeline / "transformer" / "config.json").read_text()) | {"pos_embed_max_size": 64}
    pipeline = shutil.copytree(sd3_pipeline, tmp_path / "pipeline")
    (pipeline / "transformer" / "config.json").write_text(json.dumps(config))
    assert parsed(pipeline, image_folder, tmp_path, resolution=None)[0].resolution == 512


def test_an_autoencoder_of_another_make(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    config = json.loads((pipeline / "vae" / "config.json").read_text()) | {"_class_name": "AutoencoderTiny"}
    (pipeline / "vae" / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))
    assert "AutoencoderTiny" in message and "AutoencoderKL" in message


@pytest.mark.parametrize(
    "flags, decay",
    [({}, EMA_DECAY_WITH_LPL), ({"lpl_weight": 0}, EMA_DECAY), ({"ema_decay": 0.5, "use_ema": True}, 0.5)],
)
def test_ema_decay_depends_on_lpl(flags, decay, sd_pipeline, image_folder, tmp_path):
    assert (EMA_DECAY_WITH_LPL, EMA_DECAY) == (0.99975, 0.9999)
    assert parsed(sd_pipeline, image_folder, tmp_path, **flags)[0].ema_decay == decay


@pytest.mark.parametrize("weight, used", [("auto:0.2", True), ("0.1", True), ("0", False), ("0.0", False)])
def test_lpl_is_used_unless_its_weight_is_zero(weight, used, sd_pipeline, image_folder, tmp_path):
    flags = {"lpl_threshold_base_resolution": None, "lpl_weight": weight}
    assert parsed(sd_pipeline, image_folder, tmp_path, **flags)[0].use_lpl is used


def test_one_validation_prompt_stands_for_several_images(sd_pipeline, image_folder, tmp_path):
    args, _ = parsed(sd_pipeline, image_folder, tmp_path, validation_prompt="a cat", num_validation_images=3)
    assert args.validation_prompts == ["a cat"] * 3


@pytest.mark.parametrize("words, meaning", [(["uniform"], "uniform"), ([1, 0.5, 0, 2], [1.0, 0.5, 0.0, 2.0])])
def test_depth_weights_are_a_name_or_numbers(words, meaning, sd_pipeline, image_folder, tmp_path):
    args, _ = parsed(sd_pipeline, image_folder, tmp_path, lpl_depth_weighting=words)
    assert args.lpl_depth_weighting == meaning


def test_the_pipeline_is_not_overwritten(sd_pipeline, image_folder, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, sd_pipeline))
    assert "--output_dir" in message and "another folder" in message
