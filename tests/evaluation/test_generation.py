"""Images from pipelines and runs: the same ones whatever the batches, from the weights that are meant, drawn once."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_families import TINY
from trainer import train

from lpl.evaluation import generation
from lpl.evaluation.generation import generate, image_path, load_model
from lpl.evaluation.sources import find_models
from lpl.tools.layout import LORA


FAMILIES = [fixtures[0].removesuffix("_pipeline") for fixtures in TINY.values()]
FAINT = {"qwen_image", "flux2_klein", "flux2", "aura_flow"}  # tiny models whose captions change little
SMALL = {"resolution": 32, "steps": 2, "guidance": 3.0, "device": "cpu"}


def drawn_by(source, prompts, seeds, folder, *, resolution, steps, guidance, **options):
    model = find_models(source)[-1] if isinstance(source, str) else source
    return generate(model.sampled(resolution, steps, guidance), prompts, seeds, folder, **options)


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
    together = pixels(drawn_by(pipeline, prompts, [5, 6, 7], tmp_path / "together", batch_size=3, **SMALL))
    alone = pixels(drawn_by(pipeline, prompts, [5, 6, 7], tmp_path / "alone", batch_size=1, **SMALL))
    assert together.shape == (3, 32, 32, 3)
    assert np.abs(together - alone).max() <= 2  # of 255: sums of another length round otherwise
    other = pixels(drawn_by(pipeline, [prompts[1], prompts[1]], [5, 7], tmp_path / "other", **SMALL))
    assert np.abs(other[0] - alone[0]).max() > (0 if name in FAINT else 2)  # another prompt
    assert np.abs(together[2] - together[0]).max() > 20  # another seed


def test_it_is_the_pipelines_own_image(sd_pipeline, tmp_path):
    folder = drawn_by(str(sd_pipeline), ["a cat"], [3], tmp_path / "drawn", **SMALL)
    pipeline = DiffusionPipeline.from_pretrained(sd_pipeline)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32}
    image = pipeline("a cat", generator=torch.Generator().manual_seed(3), **settings).images[0]
    assert np.abs(pixels(folder)[0] - np.asarray(image).astype(int)).max() <= 1


def test_the_folder_is_a_data_set(dit_pipeline, sd_pipeline, tmp_path):
    folder = drawn_by(str(sd_pipeline), ["eine Öse", "a dog"], [0, 1], tmp_path / "sd", **SMALL)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"file_name": "000000.png", "text": "eine Öse", "seed": 0}
    folder = drawn_by(str(dit_pipeline), [1, 5], [0, 1], tmp_path / "dit", **SMALL)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(line["label"], line["text"]) for line in lines] == [(1, "goldfish"), (5, "5")]


@pytest.mark.parametrize("name", ("sd3", "sana"))
def test_half_precision_leaves_the_vae_in_float32(name, request, tmp_path):
    pipeline = str(request.getfixturevalue(f"{name}_pipeline"))
    family = load_model(find_models(pipeline)[0], dtype="bfloat16")
    assert family.denoiser.dtype == torch.bfloat16 and family.vae.dtype == torch.float32
    assert all(encoder.dtype == torch.bfloat16 for encoder in family.text_encoders)
    exact = pixels(drawn_by(pipeline, ["a cat"], [0], tmp_path / "exact", **SMALL))
    half = pixels(drawn_by(pipeline, ["a cat"], [0], tmp_path / "half", dtype="bfloat16", **SMALL))
    assert np.abs(half - exact).max() > 0 and np.abs(half - exact).mean() < 10


# What is there already


def test_images_that_are_there_are_kept(sd_pipeline, tmp_path, monkeypatch):
    folder, prompts = tmp_path / "drawn", ["a", "b", "c"]
    drawn_by(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    before, intact = pixels(folder), files(folder)
    image_path(folder, 1).unlink()
    drawn = []
    draw = generation.draw
    monkeypatch.setattr(
        generation, "draw", lambda family, prompts, *more: drawn.append(prompts) or draw(family, prompts, *more)
    )
    drawn_by(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    assert drawn == [["b"]] and np.abs(pixels(folder) - before).max() <= 2
    after = files(folder)
    assert all(after[name] == intact[name] for name in intact if name != "000001.png")


@pytest.mark.parametrize("damage", ["truncated", "no image", "another kind"])
def test_a_broken_image_is_drawn_anew(damage, sd_pipeline, tmp_path):
    """As a full disk or a pulled plug leaves it."""
    folder, prompts = tmp_path / "drawn", ["a", "b", "c"]
    drawn_by(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    before, intact = pixels(folder), files(folder)
    broken = image_path(folder, 1)
    if damage == "another kind":
        Image.open(broken).save(broken, format="JPEG")
    else:
        whole = broken.read_bytes()
        broken.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"no image")
    drawn_by(str(sd_pipeline), prompts, [0, 1, 2], folder, **SMALL)
    after = files(folder)
    assert np.abs(pixels(folder) - before).max() <= 2 and Image.open(broken).format == "PNG"
    assert all(after[name] == intact[name] for name in intact if name != broken.name)


def test_nothing_is_loaded_where_nothing_is_missing(sd_pipeline, tmp_path, request):
    drawn_by(str(sd_pipeline), ["a", "b"], [0, 1], tmp_path / "drawn", **SMALL)
    request.getfixturevalue("nothing_loads")
    drawn_by(str(sd_pipeline), ["a", "b"], [0, 1], tmp_path / "drawn", **SMALL)
    drawn_by(str(sd_pipeline), ["a"], [0], tmp_path / "drawn", **SMALL)  # fewer are there too
    assert len((tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()) == 2
    with pytest.raises(AssertionError, match="a model was loaded"):
        drawn_by(str(sd_pipeline), ["a", "b", "c"], [0, 1, 2], tmp_path / "drawn", **SMALL)


def test_other_settings_are_refused_and_nothing_is_touched(sd_pipeline, tmp_path, nothing_loads, request):
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="files that were not drawn here"):
        drawn_by(str(sd_pipeline), ["a"], [0], folder, **SMALL)
    (folder / "mine.txt").unlink()
    with pytest.raises(AssertionError):
        drawn_by(str(sd_pipeline), ["a"], [0], folder, **SMALL)
    before = files(folder)
    for changed, prompts, seeds in (
        ("num_inference_steps", ["a"], [0]),
        ("prompts", ["b"], [0]),
        ("seeds", ["a"], [1]),
    ):
        steps = {"steps": 3} if changed == "num_inference_steps" else {}
        with pytest.raises(ValueError, match=f"drawn with another {changed}; give another folder"):
            drawn_by(str(sd_pipeline), prompts, seeds, folder, **SMALL | steps)
    assert files(folder) == before


# Trained weights


def test_weights_that_there_are_not_are_told_of_by_their_flags(sd_pipeline, run_folder, tmp_path):
    (model,) = find_models(str(sd_pipeline), "mine", variant="fp32")
    with pytest.raises(ValueError, match="^--generated mine: its weights cannot be loaded; check --variant .*fp32"):
        load_model(model)
    empty = replace(find_models(str(run_folder))[0], weights=tmp_path)
    with pytest.raises(ValueError, match=f"^--generated .*: {tmp_path} holds neither trained parts nor a LoRA$"):
        load_model(empty)


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
        (file,) = [*place.glob(LORA), *place.glob("*_lora/*.safetensors")]
        saved = load_file(file)
        assert len(saved) == len(adapters) > 0
        for value in saved.values():
            assert any(value.shape == own.shape and torch.equal(value.to(own.dtype), own) for own in adapters)
        assert not any(module.training for part in parts for module in part.modules())
    drawn = pixels(drawn_by(models[-1], ["a cat"], [0], tmp_path / "drawn", **SMALL))
    base = pixels(drawn_by(str(pipeline), ["a cat"], [0], tmp_path / "base", **SMALL))
    assert np.abs(drawn - base).max() > 2


def test_another_objective_is_sampled_by_its_own_scheduler(sd_pipeline, image_folder, tmp_path):
    folder = train(
        *(sd_pipeline, image_folder, tmp_path / "v"),
        **RUN | {"prediction_type": "v_prediction", "rank": 2, "lpl_weight": 0},
    )
    for model in find_models(str(folder)):
        scheduler = load_model(model).pipeline.scheduler
        assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == "v_prediction"
