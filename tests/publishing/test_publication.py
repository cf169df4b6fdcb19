"""What a snapshot holds; tests/runs/test_published_runs.py has what runs publish and when."""

import json
import os
from pathlib import Path

import pytest

from lpl.config.groups import Output
from lpl.publishing import publication
from lpl.publishing.publication import published, snapshot_of_result, take


def write(folder: Path, **files: str) -> Path:
    """Files by their path, with "__" for "/" and "_" before the suffix for "."."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_st", ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_what_belongs_to_others_and_what_does_not(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    write(tmp_path, model_index_json=json.dumps(index), unet__weights_st="w", unet__config_json="{}")
    for name in ("checkpoint-5/unet/w.safetensors", "logs/x", "wandb/x", "cache/x", "notes.txt", ".uploads/0/x",
                 "samples/.a.png.1.tmp", "unet/.cache/x", "evaluation/images/a.png", "evaluation/evaluation.json",
                 "bad_samples.jsonl", "recipe.yaml"):  # fmt: skip
        write(tmp_path, **{name: "no"})
    wanted = ["README.md", "metrics.jsonl", "loss_curves.png", "samples/before_after.png", "evaluation/spectrum.png"]
    wanted.append("samples/step-000000/00.png")
    for name in wanted:
        write(tmp_path, **{name: "yes"})
    found = {str(path) for path in published(tmp_path)}
    assert found == {"model_index.json", "unet/weights.safetensors", "unet/config.json", *wanted}


def test_a_lora_is_its_files_and_a_new_scheduler(tmp_path):
    names = ["pytorch_lora_weights.safetensors", "transformer_lora/adapter_config.json", "scheduler/config.json"]
    for name in [*names, "README.md"]:
        write(tmp_path, **{name: "{}"})
    assert {str(path) for path in published(tmp_path)} == {*names, "README.md"}


def test_weights_are_links_that_outlive_their_checkpoint_and_the_rest_are_copies(tmp_path):
    write(tmp_path, run__w_st="weights", run__metrics_json="[1]")
    for name in ("w.safetensors", "metrics.json"):
        take(tmp_path / "run" / name, tmp_path / "snapshot" / name)
    assert os.path.samefile(tmp_path / "run/w.safetensors", tmp_path / "snapshot/w.safetensors")
    (tmp_path / "run/w.safetensors").unlink()
    (tmp_path / "run/metrics.json").write_text("[2]")
    assert (tmp_path / "snapshot/w.safetensors").read_text() == "weights"
    assert (tmp_path / "snapshot/metrics.json").read_text() == "[1]"


def test_weights_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, w_st="weights")
    take(tmp_path / "w.safetensors", tmp_path / "to/w.safetensors")
    assert (tmp_path / "to/w.safetensors").read_text() == "weights"


@pytest.mark.parametrize("name", publication.NAMES)
@pytest.mark.parametrize("origin, stays", [("someone/diffusion", True), ("/home/me/models/x", False), ("..", False)])
def test_configurations_forget_local_folders(name, origin, stays, tmp_path):
    content = {"_class_name": "A", name: origin, "size": 3}
    write(tmp_path, config_json=json.dumps(content))
    take(tmp_path / "config.json", tmp_path / "to/config.json")
    left = json.loads((tmp_path / "to/config.json").read_text())
    assert left == (content if stays else {"_class_name": "A", "size": 3})


def test_a_finished_folder_is_published_whole(tmp_path):
    folder = write(tmp_path / "run", model_index_json="{}", recipe_yaml="x", **{"README.md": "card"})
    (folder / "recipe.yaml").write_text("learning_rate: 0.001\noutput_dir: /home/me/run\ntrain_data_dir: /home/me/x\n")
    snapshot_of_result(folder, tmp_path / "snapshot", "user/fox")
    assert {path.name for path in (tmp_path / "snapshot").iterdir()} == {
        "model_index.json",
        "README.md",
        "recipe.yaml",
    }
    assert "/home/me" not in (tmp_path / "snapshot/recipe.yaml").read_text()


def test_a_result_that_cannot_be_saved_costs_its_own_snapshot_only(tmp_path, monkeypatch, caplog):
    def save(folder):
        (folder / "unet").mkdir(parents=True)  # raises where the last try has left something
        if not queued and not caplog.text:
            raise OSError("no space left")

    queued = []
    output = Output(output_dir=str(tmp_path), hub_strategy="every_save")
    publishing = publication.Publication(output, "user/fox", save, (), lambda: None)
    monkeypatch.setattr(publishing.uploads, "add", lambda snapshot: queued.append(snapshot.message))
    for name, content in (("recipe.yaml", "seed: 0\n"), ("metrics.jsonl", "")):
        (tmp_path / name).write_text(content)
    for step in (1, 2):
        publishing.checkpoint(tmp_path / "checkpoint-1", step)
    assert queued == ["Step 2"] and "Nothing of step 1 can be published: no space left" in caplog.text
