"""Images from pipelines and runs: the same ones whatever the batches, from the weights that are meant, drawn once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from trainer import same, train, weights

from lpl.evaluation import generation
from lpl.evaluation.generation import find_models, generate, image_path, load_model
from lpl.training import lora


FAMILIES = ("sd", "sdxl", "sd3", "pixart_alpha", "pixart_sigma", "dit", "flux", "sana")
SMALL = {"resolution": 32, "steps": 2, "guidance": 3.0, "device": "cpu", "progress": False}
RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "lpl_weight": 0}


def pixels(folder):
    """All images of a folder, (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(Path(folder).glob("*.png"))]).astype(int)


def files(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def run_folder(sd_pipeline, image_folder, tmp_path_factory):
    """A full fine-tuning with a moving average, finished."""
    return train(sd_pipeline, image_folder, tmp_path_factory.mktemp("run"), use_ema=True, ema_decay=0.5, **RUN)


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generation, "load_model", load)


# What is drawn


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_prompt_and_seed_alone(name, request, tmp_path):
    pipeline = str(request.getfixturevalue(f"{name}_pipeline"))
    prompts = [1, 207, 1] if name == "dit" else ["a cat", "a much longer caption, of a dog", "a cat"]
    together = pixels(generate(pipeline, prompts, [5, 6, 7], tmp_path / "together", batch_size=3, **SMALL))
    alone = pixels(generate(pipeline, prompts, [5, 6, 7], tmp_path / "alone", batch_size=1, **SMALL))
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together - alone).max() <= 2  # of 255: sums of another length round otherwise
    other = pixels(generate(pipeline, [prompts[1], prompts[1]], [5, 7], tmp_path / "other", **SMALL))
    assert np.abs(other[0] - together[0]).max() > 2  # another prompt
    assert np.abs(together[2] - together[0]).max() > 20  # another seed


def test_it_is_the_pipelines_own_image(sd_pipeline, tmp_path):
    folder = generate(str(sd_pipeline), ["a cat"], [3], tmp_path / "drawn", **SMALL)
    pipeline = DiffusionPipeline.from_pretrained(sd_pipeline)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    image = pipeline("a cat", generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert np.abs(pixels(folder)[0] - np.asarray(image).astype(int)).max() <= 1


def test_the_folder_is_a_data_set(dit_pipeline, sd_pipeline, tmp_path):
    folder = generate(str(sd_pipeline), ["eine Öse", "a dog"], [0, 1], tmp_path / "sd", **SMALL)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"file_name": "000000.png", "text": "eine Öse", "seed": 0}
    folder = generate(str(dit_pipeline), [1, 5], [0, 1], tmp_path / "dit", **SMALL)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(line["label"], line["text"]) for line in lines] == [(1, "goldfish"), (5, "5")]


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


@pytest.mark.parametrize("name", ("sd3", "sana"))
def test_half_precision_leaves_the_vae_in_float32(name, request, tmp_path):
    pipeline = str(request.getfixturevalue(f"{name}_pipeline"))
    family = load_model(find_models(pipeline)[0], dtype="bfloat16")
    assert family.denoiser.dtype == torch.bfloat16 and family.vae.dtype == torch.float32
    assert all(encoder.dtype == torch.bfloat16 for encoder in family.text_encoders)
    exact = pixels(generate(pipeline, ["a cat"], [0], tmp_path / "exact", **SMALL))
    half = pixels(generate(pipeline, ["a cat"], [0], tmp_path / "half", dtype="bfloat16", **SMALL))
    assert np.abs(half - exact).max() > 0 and np.abs(half - exact).mean() < 10


# What is there already


def test_images_that_are_there_are_kept(sd_pipeline, tmp_path, monkeypatch):
    folder, prompts = tmp_path / "drawn", ["a", "b", "c"]
    generate(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    before, intact = pixels(folder), files(folder)
    image_path(folder, 1).unlink()
    drawn = []
    draw = generation.draw
    monkeypatch.setattr(
        generation, "draw", lambda family, prompts, *more: drawn.append(prompts) or draw(family, prompts, *more)
    )
    generate(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    assert drawn == [["b"]] and np.abs(pixels(folder) - before).max() <= 2
    after = files(folder)
    assert all(after[name] == intact[name] for name in intact if name != "000001.png")


@pytest.mark.parametrize("damage", ["truncated", "no image", "another kind"])
def test_a_broken_image_is_drawn_anew(damage, sd_pipeline, tmp_path):
    """As a full disk or a pulled plug leaves it."""
    folder, prompts = tmp_path / "drawn", ["a", "b", "c"]
    generate(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    before, intact = pixels(folder), files(folder)
    broken = image_path(folder, 1)
    if damage == "another kind":
        Image.open(broken).save(broken, format="JPEG")
    else:
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"no image")
    generate(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    after = files(folder)
    assert np.abs(pixels(folder) - before).max() <= 2 and Image.open(broken).format == "PNG"
    assert all(after[name] == intact[name] for name in intact if name != broken.name)


def test_nothing_is_loaded_where_nothing_is_missing(sd_pipeline, tmp_path, request):
    generate(str(sd_pipeline), ["a", "b"], [0, 1], tmp_path / "drawn", **SMALL)
    request.getfixturevalue("nothing_loads")
    generate(str(sd_pipeline), ["a", "b"], [0, 1], tmp_path / "drawn", **SMALL)
    generate(str(sd_pipeline), ["a"], [0], tmp_path / "drawn", **SMALL)  # fewer are there too
    assert len((tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()) == 2
    with pytest.raises(AssertionError, match="a model was loaded"):
        generate(str(sd_pipeline), ["a", "b", "c"], [0, 1, 2], tmp_path / "drawn", **SMALL)


def test_other_settings_are_refused_and_nothing_is_touched(sd_pipeline, tmp_path, nothing_loads, request):
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that were not drawn here"):
        generate(str(sd_pipeline), ["a"], [0], folder, **SMALL)
    (folder / "mine.txt").unlink()
    with pytest.raises(AssertionError):
        generate(str(sd_pipeline), ["a"], [0], folder, **SMALL)
    before = files(folder)
    for changed, prompts, seeds in (
        ("num_inference_steps", ["a"], [0]),
        ("prompts", ["b"], [0]),
        ("seeds", ["a"], [1]),
    ):
        steps = {"steps": 3} if changed == "num_inference_steps" else {}
        with pytest.raises(ValueError, match=f"drawn with another {changed}; give another folder"):
            generate(str(sd_pipeline), prompts, seeds, folder, **SMALL | steps)
    assert files(folder) == before


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


# Runs


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


def test_a_run_that_is_not_finished_has_its_checkpoints_on_the_base_pipeline(run_folder, sd_pipeline, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder / "checkpoint-2", unfinished / "checkpoint-2")
    shutil.copy(run_folder / "recipe.yaml", unfinished)
    (model,) = find_models(str(unfinished))
    assert model.step == 2 and model.args.pretrained_model_name_or_path == str(sd_pipeline)
    drawn = generate(str(unfinished), ["a cat"], [0], tmp_path / "drawn", **SMALL)
    (one,) = find_models(str(run_folder / "checkpoint-2"))
    assert one.step == 2 and one.label == "checkpoint-2"
    alike = generate(one, ["a cat"], [0], tmp_path / "alike", **SMALL)
    assert np.array_equal(pixels(drawn), pixels(alike))


def test_a_moved_base_pipeline_is_named_by_its_flag(run_folder, sd_pipeline, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run_folder / "checkpoint-2", moved / "checkpoint-2")
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"pretrained_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(ValueError, match="say by this flag where it is now"):
        find_models(str(moved))
    assert find_models(str(moved), pretrained_model_name_or_path=str(sd_pipeline))[0].step == 2


def test_a_finished_run_needs_neither_its_base_pipeline_nor_its_name(run_folder, tmp_path):
    """A published recipe does not say what lay on a disk, and another version may have had other flags."""
    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text())
    del recipe["pretrained_model_name_or_path"]
    published = shutil.copytree(run_folder, tmp_path / "published", ignore=shutil.ignore_patterns("checkpoint-*"))
    (published / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"flag_of_tomorrow": 3}))
    (model,) = find_models(str(published))
    assert model.args.pretrained_model_name_or_path == str(published) and model.weights is None
    assert (model.step, model.args.resolution, model.args.validation_inference_steps) == (4, 32, 2)
    (published / "model_index.json").unlink()
    with pytest.raises(ValueError, match="none that the training script has written .*pretrained_model_name_or_path"):
        find_models(str(published))


def test_what_is_no_source_is_refused(tmp_path, image_folder):
    with pytest.raises(ValueError, match="^--generated .*no model_index.json"):
        find_models(str(image_folder))
    with pytest.raises(ValueError, match="^--generated .*there is no such folder"):
        find_models(str(tmp_path / "nowhere"))
    (tmp_path / "recipe.yaml").write_text("- a list")
    with pytest.raises(ValueError, match="its recipe.yaml is none that the training script has written"):
        find_models(str(tmp_path))


def test_weights_that_there_are_not_are_told_of_by_their_flags(sd_pipeline, run_folder, tmp_path):
    (model,) = find_models(str(sd_pipeline), "mine", variant="fp32")
    with pytest.raises(ValueError, match="^--generated mine: its weights cannot be loaded; look at --variant .*fp32"):
        load_model(model)
    empty = replace(find_models(str(run_folder))[0], weights=tmp_path)
    with pytest.raises(ValueError, match=f"^--generated .*: {tmp_path} holds neither trained parts nor a LoRA$"):
        load_model(empty)


def test_a_lora_without_its_run_is_refused(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert generation.is_model(str(tmp_path))  # and no folder of images, whatever samples lie there
    with pytest.raises(ValueError, match="this is a LoRA"):
        find_models(str(tmp_path))


def test_the_number_of_tokens_is_that_of_the_training(sd3_pipeline, sd_pipeline):
    assert find_models(str(sd3_pipeline))[0].sampled(32).settings("float32")["max_sequence_length"] == 77
    (model,) = find_models(str(sd3_pipeline), max_sequence_length=16)
    assert load_model(model).call_arguments("a cat", 32, 32)["max_sequence_length"] == 16
    with pytest.raises(ValueError, match="--max_sequence_length 513: .* takes 512 at most"):
        find_models(str(sd3_pipeline), max_sequence_length=513)
    with pytest.warns(UserWarning, match="--max_sequence_length has no effect"):
        assert find_models(str(sd_pipeline), max_sequence_length=16)[0].args.max_sequence_length is None


def test_a_run_without_anything_yet_is_refused(run_folder, tmp_path):
    shutil.copy(run_folder / "recipe.yaml", tmp_path)
    with pytest.raises(ValueError, match="neither a checkpoint nor a result yet"):
        find_models(str(tmp_path))


@pytest.mark.parametrize("name", ("sd", "pixart_sigma", "sd3"))
def test_lora_is_loaded_onto_the_base_pipeline(name, request, image_folder, tmp_path):
    pipeline = request.getfixturevalue(f"{name}_pipeline")
    text_encoders = {"train_text_encoder": True} if name == "sd" else {}
    folder = train(pipeline, image_folder, tmp_path / "lora", rank=2, learning_rate=0.1, **RUN, **text_encoders)
    models = find_models(str(folder))
    assert [model.step for model in models] == [2, 4]
    for model, place in zip(models, (folder / "checkpoint-2", folder)):
        family = load_model(model, dtype="bfloat16" if name == "sd3" else "float32")
        parts = (family.denoiser, *family.text_encoders)
        adapters = [value for part in parts for key, value in part.named_parameters() if "lora_" in key]
        (file,) = [*place.glob(lora.FILE), *place.glob("*_lora/*.safetensors")]
        saved = load_file(file)
        assert len(saved) == len(adapters) > 0
        for value in saved.values():
            assert any(value.shape == own.shape and torch.equal(value.to(own.dtype), own) for own in adapters)
        assert not any(module.training for part in parts for module in part.modules())
    drawn = pixels(generate(models[-1], ["a cat"], [0], tmp_path / "drawn", **SMALL))
    base = pixels(generate(str(pipeline), ["a cat"], [0], tmp_path / "base", **SMALL))
    assert np.abs(drawn - base).max() > 2


def test_another_objective_is_sampled_by_its_own_scheduler(sd_pipeline, image_folder, tmp_path):
    folder = train(
        *(sd_pipeline, image_folder, tmp_path / "v"),
        **RUN | {"prediction_type": "v_prediction", "rank": 2, "lpl_weight": 0},
    )
    for model in find_models(str(folder)):
        scheduler = load_model(model).pipeline.scheduler
        assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "v_prediction"
