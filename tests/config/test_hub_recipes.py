"""Recipes of strangers on the Hub: they say the numbers of a training, and nothing of this machine."""

import os
import warnings

import pytest
import yaml
from hub_server import HubServer, Repository
from huggingface_hub import constants
from huggingface_hub.errors import RevisionNotFoundError
from trainer import ROOT

from lpl.config import Config, hub_recipes, recipes
from lpl.config.command_line import build_parser, parse, recipe
from lpl.config.foreign import FOREIGN
from lpl.publishing import public_recipe


TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that nobody is logged in to, and an empty cache."""
    with HubServer(token=TOKEN) as server:
        server.connect(monkeypatch, tmp_path)
        yield server


def published(hub, text, repository="user/run", **settings):
    """A repository with that recipe."""
    content = text if isinstance(text, bytes | str) else yaml.safe_dump(text)
    hub.repos[repository] = Repository(**settings)
    hub.repos[repository].files["recipe.yaml"] = content if isinstance(content, bytes) else content.encode()
    return repository


def rerun(*words, images=None, config="user/run"):
    """What a stranger's command means; the data is given where the recipe has none."""
    data = [] if images is None else ["--train_data_dir", images]
    return parse([str(word) for word in ("--config", config, *data, *words)])


def refused(capsys, *words, **options):
    with pytest.raises(SystemExit) as error:
        rerun(*words, **options)
    message = capsys.readouterr().err.rpartition("error: ")[2]
    assert error.value.code == 2 and message.count("\n") == 1 and message.startswith("--"), message
    assert TOKEN not in message
    return message


BASE = {"pretrained_model_name_or_path": "user/model", "dataset_name": "user/pictures", "max_train_steps": 3}


def test_a_recipe_of_the_hub_is_all_that_is_needed(hub):
    published(hub, BASE | {"seed": 7, "lpl_blocks": ["mid", "up_0"], "measured": {"num_processes": 4}})
    args = rerun()
    assert (args.model.pretrained_model_name_or_path, args.data.dataset_name) == ("user/model", "user/pictures")
    assert (args.optimization.seed, args.lpl.lpl_blocks, args.optimization.max_train_steps) == (7, ("mid", "up_0"), 3)
    assert args.rerun_of == {"num_processes": 4} and "rerun_of" not in recipe(args)
    assert args.given == {"config", *BASE, "seed", "lpl_blocks"}
    assert rerun("--seed", "8").optimization.seed == 8 and rerun("--without", "seed").optimization.seed is None


def test_it_may_be_of_an_earlier_commit(hub):
    published(hub, BASE | {"seed": 1})
    commit = hub.repos["user/run"].at().sha
    hub.repos["user/run"].files["recipe.yaml"] = yaml.safe_dump(BASE | {"seed": 2}).encode()
    assert (
        rerun().optimization.seed,
        rerun(config=f"user/run@{commit}").optimization.seed,
        rerun(config="user/run@main").optimization.seed,
    ) == (2, 1, 2)


def test_it_is_kept_where_downloads_are(hub, tmp_path, monkeypatch):
    published(hub, BASE)
    rerun("--cache_dir", tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").rglob("recipe.yaml")) and not (tmp_path / "hub").exists()
    rerun()
    assert list((tmp_path / "hub").rglob("recipe.yaml"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert rerun().optimization.max_train_steps == 3


@pytest.mark.filterwarnings("ignore:--hub_token")
def test_private_ones_take_a_token(hub, capsys, monkeypatch):
    published(hub, BASE, private=True)
    message = refused(capsys)
    assert "--config user/run: there is no such file here, and no such repository" in message and "hf auth" in message
    assert rerun("--hub_token", TOKEN).optimization.max_train_steps == 3
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert rerun().optimization.max_train_steps == 3


def test_a_file_of_that_name_goes_first(hub, tmp_path, monkeypatch, capsys):
    published(hub, BASE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user/run").write_text(yaml.safe_dump(BASE | {"max_train_steps": 4, "output_dir": "mine"}))
    args = rerun()
    assert (args.optimization.max_train_steps, args.output.output_dir) == (4, "mine")
    for config in ("user/other.yaml", "user/run@../x", "user/run@", "a/b/c", "run", "./user/no", "../user"):
        assert "No such file" in refused(capsys, config=config) or "directory" in config
    assert not hub.requests


def test_what_is_wrong_is_said_in_a_sentence(hub, capsys, monkeypatch):
    published(hub, BASE, "user/gated", gated=True)
    published(hub, "a" * 1_000_001, "user/large")
    hub.repos["user/empty"] = Repository()
    said = "--config user/{}: {}"
    assert refused(capsys, config="user/none").startswith(said.format("none", "there is no such file here, and no"))
    assert refused(capsys, config="user/gated").startswith(said.format("gated", "the repository is gated; accept"))
    assert refused(capsys, config="user/empty").startswith(said.format("empty", "the repository has no recipe.yaml"))
    message = refused(capsys, config="user/large")
    assert message.startswith(said.format("large", "its recipe.yaml")) and "more than 1,000,000 bytes" in message
    assert not [request for request in hub.requests if request.startswith("GET") and "/large/" in request]
    message = refused(capsys, config="user/empty@nothing")
    assert message.startswith(said.format("empty@nothing", "the repository has no"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused(capsys, config="user/other")
    assert message.startswith(said.format("other", "there is no such file here, and the Hub cannot be reached ("))


def test_a_hub_that_is_gone(hub, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before it is asked again
    hub.stop()
    assert "the Hub cannot be reached (" in refused(capsys)


@pytest.mark.parametrize(
    "text, said",
    [
        ("- a", "must map flags to values"),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("use_ema: &a {b: *a}", "reference"),
        ("learning_rat: 1.0", "did you mean learning_rate?"),
        ("learning_rate: fast", "'fast'"),
        (f"hub_token: {TOKEN}", "does not belong in a file"),
        ("config: user/other", "there is no flag 'config'"),
        ("without: [seed]", "there is no flag 'without'"),
        ("rerun_of: {}", "there is no flag 'rerun_of'"),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_what_is_no_recipe_is_refused_there_too(text, said, hub, capsys):
    published(hub, text)
    message = refused(capsys)
    assert message.startswith("--config user/run: ") and said in message


HARMFUL = {  # what a stranger would like to say
    "output_dir": "../../etc",
    "logging_dir": "/root",
    "cache_dir": "/root/.cache",
    "data_cache_dir": "/root/.ssh",
    "report_to": "wandb",
    "tracker_project_name": "../../../root/.ssh",
    "push_to_hub": True,
    "hub_model_id": "stranger/stolen",
    "hub_private_repo": True,
    "hub_revision": "main",
    "hub_strategy": "every_save",
    "save_single_file": "fp16",
    "resume_from_checkpoint": "/root/checkpoint-1",
    "validation_prompts_file": "/root/.ssh/notes.txt",
    "attention_backend": "flash_hub",  # code of a repository
    "dry_run": True,
    "for_gpu": "24GB",
    "verbose": True,
    "eval_steps": 1,
    "eval_data_dir": "/root/pictures",
    "eval_clip": "stranger/clip",
    "eval_features": ["stranger/network"],
    "eval_metrics": ["fid"],
    "eval_num_images": 10**6,
    "eval_batch_size": 10**6,
}


def test_a_stranger_does_not_say_what_is_done_on_this_machine(hub):
    published(hub, BASE | HARMFUL)
    with pytest.warns(
        UserWarning,
        match="--config user/run: attention_backend, cache_dir, data_cache_dir, dry_run, .* are this machine's bus",
    ) as warned:
        args = rerun()
    assert all(name in str(warned[0].message) for name in HARMFUL)
    assert all(args.values()[name] == Config().values()[name] for name in HARMFUL)
    assert not args.given & set(HARMFUL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert rerun("--without", *HARMFUL).optimization.max_train_steps == 3


def test_the_command_line_says_it_still(hub, tmp_path):
    published(hub, BASE | HARMFUL)
    with pytest.warns(UserWarning) as warned:
        args = rerun("--output_dir", tmp_path / "run", "--report_to", "none")
    assert (args.output.output_dir, args.validation.report_to) == (str(tmp_path / "run"), "none")
    assert "output_dir" not in str(warned[0].message) and "report_to" not in str(warned[0].message)


@pytest.mark.parametrize(
    "name, value",
    [
        ("pretrained_model_name_or_path", "/root/model"),
        ("pretrained_model_name_or_path", "../model"),
        ("pretrained_model_name_or_path", "tests/.."),
        ("pretrained_vae_model_name_or_path", "~/vae"),
        ("pretrained_vae_model_name_or_path", "lpl/families"),  # a folder that is here
        ("pretrained_model_name_or_path", "/root/model.safetensors"),
        ("pretrained_model_name_or_path", "a/b/../../model.safetensors"),
        ("single_file_config", "/root/model"),
        ("denoiser_model_name_or_path", "../unet"),
        ("lora_init", "/root/lora.safetensors"),
        ("training_adapter", "lora.safetensors"),
        ("lpl_vae_name_or_path", "vae"),
        ("lpl_student", "student"),
        ("dataset_name", "/root"),
        ("dataset_name", "imagefolder"),
        ("dataset_name", "lpl/evaluation"),
        ("dataset_name", "http://127.0.0.1/x"),
        ("dataset_name", "hf://buckets/a/b"),
        ("train_data_dir", "/root"),
        ("train_data_dir", "pictures/../../.."),
        ("train_data_dir", "lpl"),
        ("train_data_dir", "~"),
        ("revision", "../../x"),
        ("revision", "/root"),
        ("non_ema_revision", "a/../b"),
        ("variant", "../x"),
        ("variant", "(a+)+$"),
    ],
)
def test_nothing_leads_to_files_of_this_machine(name, value, hub, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    published(hub, BASE | {name: value})
    message = refused(capsys)
    assert f"--config user/run: {name} is {os.path.expanduser(value)!r}, which is not on the Hub" in message
    assert f"--{name}" in message and f"--without {name}" in message


def test_lora_to_merge_are_all_on_the_hub(hub, capsys):
    published(hub, BASE | {"merge_lora": ["user/lora:0.5", "user/repo/style.safetensors"]})
    assert rerun().model.merged == [("user/lora", 0.5), ("user/repo/style.safetensors", 1.0)]
    published(hub, BASE | {"merge_lora": ["user/lora", "/root/lora.safetensors:0.5"]})
    assert "merge_lora is ['user/lora', '/root/lora.safetensors:0.5']" in refused(capsys)


def test_a_file_on_the_hub_is_public(hub):
    published(hub, BASE | {"pretrained_model_name_or_path": "user/repo/model.safetensors"})
    assert rerun().model.source == "user/repo/model.safetensors"


def test_a_folder_of_a_data_set_of_the_hub_is_one_of_its_own(hub, capsys, tmp_path):
    published(hub, BASE | {"train_data_dir": "pictures/2024"})
    assert rerun().data.train_data_dir == "pictures/2024"
    published(hub, {name: value for name, value in BASE.items() if name != "dataset_name"} | {"train_data_dir": "x/y"})
    assert "train_data_dir is 'x/y'" in refused(capsys)
    tmp_path.joinpath("a.png").write_bytes(b"")
    assert rerun(images=tmp_path).data.train_data_dir == str(tmp_path)


def test_code_is_refused_and_not_passed_over(hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    published(hub, BASE | {"eval_steps": 1, "eval_data_dir": "x", "eval_features": ["a/b", "stranger:network"]})
    message = refused(capsys)
    assert "eval_features has 'stranger:network'" in message and "--without eval_features" in message
    with pytest.warns(UserWarning, match="eval_steps"):
        assert rerun("--eval_features", "a/c").evaluation.eval_features == ("a/c",)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["optimizer", "lr_scheduler"])
def test_a_class_is_not_imported_because_a_stranger_names_it(name, hub, capsys, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    published(hub, BASE | {name: "stranger:Optimizer", f"{name}_args": {"eps": 1e-8}})
    message = refused(capsys)
    assert f"--config user/run: {name} has 'stranger:Optimizer'" in message and f"--without {name}" in message
    assert getattr(rerun(f"--{name}", "torch.optim:SGD").optimization, name) == "torch.optim:SGD"
    assert getattr(rerun("--without", name).optimization, f"{name}_args") is None
    assert not (tmp_path / "mark").exists()


def test_a_stranger_does_not_fill_this_machine_with_processes(hub, monkeypatch):
    published(hub, BASE | {"dataloader_num_workers": 100_000})
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.warns(UserWarning, match="dataloader_num_workers 100000 is taken for 3"):
        assert rerun().data.dataloader_num_workers == 3


# Flags that a stranger's recipe may set to anything, since all that they can do is another training.
NUMBERS = {
    *("from_scratch", "train_text_encoder", "max_sequence_length", "guidance_scale", "prediction_type"),
    *("lora", "rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora"),
    *("group_offload", "offload_frozen", "activation_offload"),
    *("quantize_base", "dataset_config_name", "streaming", "shuffle_buffer_size", "image_column"),
    *("mask_column", "alpha_mask", "unmasked_weight"),
    *("crops_per_image", "cache_latents", "cache_text_embeddings"),
    *("caption_column", "max_train_samples", "max_bad_samples", "train_split", "validation_split"),
    *("validation_every_nth", "num_validation_samples", "resolution", "center_crop", "random_flip"),
    *("aspect_ratio_buckets", "bucket_step", "bucket_upscale", "validation_sizes"),
    "validation_lora_scales",
    *("adapter", "decompose_both", "decompose_factor", "oft_block_size"),
    *("init_lora_weights", "lora_rank_pattern", "lora_alpha_pattern"),
    *("image_interpolation_mode", "proportion_empty_prompts", "dataloader_num_workers"),
    *("caption_per_line", "instance_prompt", "caption_prefix", "caption_suffix", "trigger_word"),
    *("shuffle_tags", "tag_dropout"),
    *("tag_separator", "keep_tags", "keep_tags_separator", "text_encoder_dropout"),
    *("dataloader_timeout", "snr_gamma", "noise_offset", "input_perturbation", "dream_training"),
    *("dream_detail_preservation", "timestep_bias_strategy", "timestep_bias_multiplier"),
    *("timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion", "weighting_scheme"),
    *("precondition_outputs", "logit_mean", "logit_std", "mode_scale", "train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "learning_rate"),
    *("text_encoder_lr", "scale_lr", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    *("lr_scheduler_args", "optimizer_args", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_weight_decay_text_encoder", "adam_epsilon", "prodigy_beta3", "prodigy_decouple"),
    *("prodigy_use_bias_correction", "prodigy_safeguard_warmup", "max_grad_norm", "max_skipped_steps"),
    *("use_ema", "ema_decay", "foreach_ema", "offload_ema", "mixed_precision", "allow_tf32", "torch_compile"),
    *("channels_last", "gradient_checkpointing", "seed", "validation_prompt", "validation_prompts"),
    *("num_validation_images", "validation_epochs", "validation_steps", "validation_inference_steps"),
    *("validation_guidance_scale", "logging_steps", "debug_loss", "checkpointing_steps"),
    "checkpoints_total_limit",
}
CODE = {"optimizer", "lr_scheduler"}  # only names that are known here


def test_somebody_has_thought_about_every_flag():
    """Whoever adds one decides whether a stranger may set it: here, or by `own` or `public` in its declaration."""
    names = {action.dest for action in build_parser()._actions} - {"help", "config", "without", "hub_token"}
    free = {name for name in names if not recipes.is_own(name) and name not in public_recipe.PLACES}
    free -= {name for name in free if name.startswith("lpl_")} | FOREIGN
    assert free == NUMBERS | CODE
    assert all(recipes.FLAGS[name].code for name in CODE)
    assert {name for name in names if recipes.is_own(name)} == set(HARMFUL)


def test_nothing_that_a_recipe_has_measured_is_a_flag(hub):
    published(hub, BASE | {"measured": {"output_dir": "/root", "seed": 3, "lpl_weight": 0.3}})
    args = rerun()
    assert (args.output.output_dir, args.optimization.seed, args.lpl.lpl_weight) == (
        "sd-model-finetuned",
        None,
        "auto:0.2",
    )
    for anything in ("a", [1], None, 3):
        published(hub, BASE | {"measured": anything})
        assert rerun().rerun_of == {}


def test_a_missing_revision_is_named():
    error = RevisionNotFoundError.__new__(RevisionNotFoundError)
    assert hub_recipes._why_not(error, "user/run", "v9") == "the repository has no revision v9"
