"""What a pipeline's index lists and its folder, or the Hub's cache, lacks."""

import json
import shutil
import warnings

import pytest
from commands import edited, refusal
from diffusers import DiffusionPipeline
from hub_server import HubServer, Repository
from trainer import arguments, train

from lpl.families.components import copy_component
from lpl.training.result import Result


CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "gone, words",
    [
        ("tokenizer", "lists tokenizer, but the folder has no files"),
        ("tokenizer/tokenizer.json", "no vocabulary"),  # transformers would take an empty one
        ("text_encoder", "lists text_encoder"),
        ("text_encoder_3", "lists text_encoder_3, but the folder has no files of it; put it there, or write [null"),
        ("transformer/diffusion_pytorch_model.safetensors", "no weights"),
    ],
)
def test_what_a_run_needs_is_looked_for_first(gone, words, sd3_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd3_pipeline, tmp_path / "pipeline")
    shutil.rmtree(pipeline / gone) if (pipeline / gone).is_dir() else (pipeline / gone).unlink()
    assert words in refusal(capsys, arguments(pipeline, image_folder, tmp_path / "out"))


def test_damaged_weights_are_refused(sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    pipeline = shutil.copytree(sd_pipeline, tmp_path / "pipeline")
    (pipeline / "vae/diffusion_pytorch_model.safetensors").write_text(LFS)
    assert "vae/diffusion_pytorch_model.safetensors is damaged" in refusal(
        capsys, arguments(pipeline, image_folder, tmp_path / "out")
    )


def cached(pipeline, cache):
    """The pipeline as the Hub's cache holds it after a training, which fetches no safety checker."""
    repository = cache / "models--user--sd"
    shutil.copytree(pipeline, repository / "snapshots" / (40 * "a"))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(40 * "a")
    return "user/sd"


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_what_a_pipeline_can_do_without_is_absent_from_the_result(where, sd_pipeline, image_folder, tmp_path):
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, safety_checker=CHECKER)
    if where == "cache":
        pipeline = cached(pipeline, tmp_path / "hub")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = train(pipeline, image_folder, tmp_path / "out", cache_dir=tmp_path / "hub", max_train_steps=1)
    assert any(f"the {where}" in str(x.message) or "Hub's cache" in str(x.message) for x in caught)
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert DiffusionPipeline.from_pretrained(out).safety_checker is None


def test_what_only_the_result_needs_is_fetched_before_the_training(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """The Hub may be gone at the end, and main may have moved on."""
    pipeline = edited(sd_pipeline, tmp_path / "pipeline", None, safety_checker=CHECKER)
    shutil.copytree(pipeline / "vae", pipeline / "safety_checker")  # it is copied, and never loaded
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        files = (file for file in pipeline.rglob("*") if file.is_file())
        hub.repos["user/sd"] = Repository()
        hub.repos["user/sd"].files |= {str(file.relative_to(pipeline)): file.read_bytes() for file in files}
        write = Result.write

        def write_without_the_hub(result):
            hub.repos.clear()
            write(result)

        monkeypatch.setattr(Result, "write", write_without_the_hub)
        out = train("user/sd", image_folder, tmp_path / "out", max_train_steps=1, lpl_weight=0)
    name = "safety_checker/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (pipeline / name).read_bytes()


def test_copies_lose_the_variant(tmp_path):
    source = tmp_path / "text_encoder"
    source.mkdir()
    index = {"weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}
    for name in ("config.json", "model.fp16-00001-of-00002.safetensors", "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text("{}")
    (source / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    copy_component(source, tmp_path / "fp16", "fp16")
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in (tmp_path / "fp16").iterdir()) == names
    found = json.loads((tmp_path / "fp16/model.safetensors.index.json").read_text())
    assert found == {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    copy_component(source, tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]
