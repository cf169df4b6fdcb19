"""Recipes of files: what a run writes stands for the same flags again; what people write is read or refused."""

import warnings

import pytest
import yaml
from trainer import ROOT, arguments, parsed, resolved

from lpl.config.command_line import recipe
from lpl.config.foreign import FOREIGN
from tests.config.test_command_line import SD, SD3, SDXL, flags, said, silently


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
    left_out = {"config", "without", "dry_run", "for_gpu", "verbose", "resume_from_checkpoint", "hub_token", *FOREIGN}
    left_out.add("validation_prompts_file")  # the prompts are in the recipe themselves
    assert set(entries) == set(flags()) - left_out
    assert yaml.safe_load(yaml.safe_dump(entries)) == entries
    assert (entries["resolution"], entries["prediction_type"], entries["weighting_scheme"]) == (32, "epsilon", None)


def with_recipe(pipeline, images, folder, entries, *words):
    """Pipeline and data set on the command line, the rest in a recipe."""
    base = arguments(pipeline, images, folder / "out", **dict.fromkeys(("learning_rate", "resolution", "seed")))
    return resolved([*base, "--config", write(folder, entries), *words])[0]


def test_a_former_default_counts_as_not_given(sd_pipeline, image_folder, tmp_path):
    """A baseline's recipe of an earlier version records the decoder's precision, which has no effect there."""
    base = ["--pretrained_model_name_or_path", sd_pipeline, "--train_data_dir", image_folder, "--config"]
    config, _ = resolved([*base, write(tmp_path, {"lpl_weight": 0, "lpl_vae_dtype": "float32"})])
    assert config.lpl.lpl_vae_dtype == "float32" and "lpl_vae_dtype" not in config.given
    with pytest.raises(SystemExit):
        resolved([*base, write(tmp_path, {"lpl_weight": 0, "lpl_vae_dtype": "bfloat16"})])


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
        ("lpl_chunk_size: 2", "lpl_chunk_size", 2),
        ("lpl_chunk_size: auto", "lpl_chunk_size", None),
        ("lpl_chunk_size: null", "lpl_chunk_size", None),  # what earlier versions record
        ("lpl_vae_dtype: float32", "lpl_vae_dtype", "float32"),
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
        (
            "optimizer: torch.optim:SGD\noptimizer_args: {momentum: 0.9, nesterov: true, weight_decay: 1.0e-8}",
            "optimizer_args",
            ("momentum=0.9", "nesterov=true", "weight_decay=1e-08"),
        ),
        ("optimizer: torch.optim:Adam\noptimizer_args: ['betas=[0.9, 0.9]']", "optimizer_args", ("betas=[0.9, 0.9]",)),
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
        ("learning_rate: 1.0e-4\nlearning_rate: 1.0e-5", ["learning_rate twice"]),
    ],
)
def test_recipes_that_are_refused(text, words, sd_pipeline, image_folder, tmp_path, capsys):
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), "--config", write(tmp_path, text)])
    assert all(word in message for word in words), message
    assert message.startswith("--config ")


def test_a_recipe_that_is_not_there(sd_pipeline, image_folder, tmp_path, capsys):
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), "--config", "no/where.yaml"])
    assert "--config no/where.yaml" in message and "No such file" in message


def test_a_recipe_may_be_meant_that_is_shipped(sd_pipeline, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = said(capsys, [*arguments(sd_pipeline, image_folder, tmp_path), "--config", "sdxl_lora"])
    assert "did you mean examples/recipes/sdxl_lora.yaml?" in message


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
