"""What a source stands for: a pipeline, or the checkpoints and the result of a run, and what changes their images."""

# ruff: noqa: F401, F811 (fixtures of another file)

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainer import same, weights

from lpl.evaluation import sources
from lpl.evaluation.generation import load_model
from lpl.evaluation.sources import find_models
from tests.evaluation.test_generation import SMALL, drawn_by, pixels, run_folder


def test_defaults_are_the_runs_else_the_pipelines(sd_pipeline, run_folder):
    plain, *_ = find_models(str(sd_pipeline))
    settings = plain.sampled().settings("float32")
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["resolution"]) == (50, 7.5, 512)
    trained = find_models(str(run_folder))[-1].sampled().settings("float32")
    assert (trained["num_inference_steps"], trained["guidance_scale"], trained["resolution"]) == (2, 7.5, 32)
    given = plain.sampled(resolution=32, steps=7, guidance=1.5).settings("float32")
    assert (given["num_inference_steps"], given["guidance_scale"], given["resolution"]) == (7, 1.5, 32)
    with pytest.raises(ValueError, match="--resolution 31: this pipeline takes multiples of 4"):
        plain.sampled(resolution=31)


def test_trained_anew_at_the_same_place_is_another_model(sd_pipeline, tmp_path):
    copied = shutil.copytree(sd_pipeline, tmp_path / "sd")
    first = find_models(str(copied))[0].sampled(32).settings("float32")
    assert find_models(str(copied))[0].sampled(32).settings("float32") == first
    weight_file = next((copied / "unet").glob("*.safetensors"))
    weight_file.write_bytes(weight_file.read_bytes()[:-1] + b"\0")
    changed = find_models(str(copied))[0].sampled(32).settings("float32")
    assert {name for name in first if first[name] != changed[name]} == {"files"}


def test_another_vae_at_the_same_place_is_another_model(sd_pipeline, tmp_path):
    vae = shutil.copytree(Path(sd_pipeline) / "vae", tmp_path / "vae")
    flags = {"pretrained_vae_model_name_or_path": str(vae)}
    first = find_models(str(sd_pipeline), **flags)[0].sampled(32).settings("float32")
    weight_file = next(vae.glob("*.safetensors"))
    weight_file.write_bytes(weight_file.read_bytes()[:-1] + b"\0")
    changed = find_models(str(sd_pipeline), **flags)[0].sampled(32).settings("float32")
    assert first["vae"] == str(vae) and {name for name in first if first[name] != changed[name]} == {"files"}


def test_another_commit_of_a_repository_is_another_model(sd_pipeline, tmp_path):
    """As the Hub's cache holds it: the name stays, what it stands for changes."""
    repository = tmp_path / "models--user--pipeline"
    (repository / "refs").mkdir(parents=True)
    for commit in "ab":
        shutil.copytree(sd_pipeline, repository / "snapshots" / (40 * commit))

    def settings(commit):
        (repository / "refs/main").write_text(40 * commit)
        return find_models("user/pipeline", cache_dir=str(tmp_path))[0].sampled(32).settings("float32")

    first, second = settings("a"), settings("b")
    assert first["pipeline"] == "user/pipeline" and settings("a") == first
    assert {name for name in first if first[name] != second[name]} == {"files"}


def test_a_run_is_the_series_of_its_moving_averages_and_its_result(run_folder):
    models = find_models(str(run_folder), "mine")
    assert [model.step for model in models] == [2, 4]  # the last checkpoint is the result
    assert [model.name for model in models] == ["mine, step 2", "mine, step 4"]
    for model, place in zip(models, (run_folder / "checkpoint-2" / "ema" / "unet", run_folder / "unet")):
        saved, loaded = load_file(next(place.glob("*.safetensors"))), load_model(model).denoiser.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert not same(
        weights(run_folder / "checkpoint-2" / "unet"), weights(run_folder / "checkpoint-2" / "ema" / "unet")
    )


def test_the_result_of_a_run_by_epochs_that_was_made_longer_is_not_its_newest_step(run_folder, tmp_path):
    longer = shutil.copytree(run_folder, tmp_path / "longer")
    recipe = yaml.safe_load((longer / "recipe.yaml").read_text())
    assert recipe["measured"]["max_steps"] == recipe["max_train_steps"] == 4
    for steps in (4, 8):
        recipe |= {"max_train_steps": None, "num_train_epochs": 2, "measured": {"max_steps": steps}}
        (longer / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        models = find_models(str(longer))
        assert [model.step for model in models] == [2, 4]
        assert (models[-1].weights is None) == (steps == 4)  # the result, or the checkpoint of that step


def test_a_run_that_is_not_finished_has_its_checkpoints_on_the_base_pipeline(run_folder, sd_pipeline, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder / "checkpoint-2", unfinished / "checkpoint-2")
    shutil.copy(run_folder / "recipe.yaml", unfinished)
    (model,) = find_models(str(unfinished))
    assert model.step == 2 and model.config.model.pretrained_model_name_or_path == str(sd_pipeline)
    drawn = drawn_by(str(unfinished), ["a cat"], [0], tmp_path / "drawn", **SMALL)
    (one,) = find_models(str(run_folder / "checkpoint-2"))
    assert one.step == 2 and one.label == "checkpoint-2"
    alike = drawn_by(one, ["a cat"], [0], tmp_path / "alike", **SMALL)
    assert np.array_equal(pixels(drawn), pixels(alike))


def test_a_checkpoint_that_is_not_whole_is_refused(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # cut short by a crash
    assert find_models(str(run))[-1].step == find_models(str(run_folder))[-1].step
    for file in (run / "checkpoint-2").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="checkpoint-2: this checkpoint is not whole"):
        find_models(str(run / "checkpoint-2"))


def test_a_moved_base_pipeline_is_named_by_its_flag(run_folder, sd_pipeline, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint-2", moved / "checkpoint-2")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"pretrained_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ValueError, match="if it has moved, give its place by this flag"):
        find_models(str(moved))
    assert find_models(str(moved), pretrained_model_name_or_path=str(sd_pipeline))[0].step == 2


def test_a_finished_run_needs_neither_its_base_pipeline_nor_its_name(run_folder, tmp_path):
    """A published recipe does not say what lay on a disk, and another version may have had other flags."""
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    del recipe["pretrained_model_name_or_path"]
    published = shutil.copytree(run_folder, tmp_path / "published", ignore=shutil.ignore_patterns("checkpoint-*"))
    (published / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"flag_of_tomorrow": 3}))
    (model,) = find_models(str(published))
    assert model.config.model.pretrained_model_name_or_path == str(published) and model.weights is None
    assert (model.step, model.config.data.resolution, model.config.validation.validation_inference_steps) == (4, 32, 2)
    (published / "model_index.json").unlink()
    with pytest.raises(ValueError, match="not written by the training script .*pretrained_model_name_or_path"):
        find_models(str(published))


def test_what_is_no_source_is_refused(tmp_path, image_folder):
    with pytest.raises(ValueError, match="^--generated .*no model_index.json"):
        find_models(str(image_folder))
    with pytest.raises(ValueError, match="^--generated .*there is no such folder"):
        find_models(str(tmp_path / "nowhere"))
    (tmp_path / "recipe.yaml").write_text("- a list")
    with pytest.raises(ValueError, match="its recipe.yaml was not written by the training script"):
        find_models(str(tmp_path))


def test_a_lora_without_its_run_is_refused(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert sources.is_model(str(tmp_path))  # and no folder of images, whatever samples lie there
    with pytest.raises(ValueError, match="this is a LoRA"):
        find_models(str(tmp_path))


def test_the_number_of_tokens_is_that_of_the_training(sd3_pipeline, sd_pipeline):
    assert find_models(str(sd3_pipeline))[0].sampled(32).settings("float32")["max_sequence_length"] == 77
    (model,) = find_models(str(sd3_pipeline), max_sequence_length=16)
    assert load_model(model).call_arguments("a cat", 32, 32)["max_sequence_length"] == 16
    with pytest.raises(ValueError, match="--max_sequence_length 513: .* takes at most 512"):
        find_models(str(sd3_pipeline), max_sequence_length=513)
    with pytest.warns(UserWarning, match="--max_sequence_length has no effect"):
        assert find_models(str(sd_pipeline), max_sequence_length=16)[0].config.model.max_sequence_length is None


def test_a_run_without_anything_yet_is_refused(run_folder, tmp_path):
    shutil.copy(run_folder / "recipe.yaml", tmp_path)
    with pytest.raises(ValueError, match="neither a checkpoint nor a result yet"):
        find_models(str(tmp_path))
