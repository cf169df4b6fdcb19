"""Machine, packages and folders are checked before anything is loaded."""

import importlib.util
import shutil

import pytest
from commands import cases, refusal, warned
from trainer import arguments, parsed

from lpl.data.source import held_out_names


HERE = cases(
    ({"resume_from_checkpoint": "checkpoint-7"}, ["--resume_from_checkpoint", "checkpoint-7", "latest"]),
    ({"mixed_precision": "fp16"}, ["--mixed_precision", "fp16", "bf16"]),
    ({"lpl_vae_dtype": "float16"}, ["--lpl_vae_dtype", "float16", "bfloat16"]),
    ({"quantize_base": "4bit", "lora": True}, ["--quantize_base 4bit", "GPU"]),
)


@pytest.mark.parametrize("flags, words", HERE)
def test_refused_here(flags, words, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, image_folder, tmp_path, **flags))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "package, flags",
    [
        ("bitsandbytes", {"use_8bit_adam": True}),
        ("bitsandbytes", {"quantize_base": "4bit", "lora": True}),
        ("torchao", {"quantize_base": "torchao:int8wo", "lora": True}),
        ("optimum", {"quantize_base": "quanto:int4", "lora": True}),
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


@pytest.mark.parametrize(
    "flags",
    [
        {"allow_tf32": True},
        {"offload_frozen": True},
        {"activation_offload": True, "gradient_checkpointing": True},
        {"group_offload": True, "rank": 4, "gradient_checkpointing": True},
    ],
)
def test_what_only_a_gpu_does(flags, sd_pipeline, image_folder, tmp_path):
    (words,) = warned(sd_pipeline, image_folder, tmp_path, **flags)
    assert words == f"--{next(iter(flags))} has no effect without a GPU"


@pytest.mark.parametrize("flags", [{"quantize_base": "4bit", "rank": 4}, {"mixed_precision": "fp16"}])
def test_what_a_gpu_allows(flags, sd_pipeline, image_folder, tmp_path, gpu):
    assert warned(sd_pipeline, image_folder, tmp_path, **flags, allow_tf32=True) == []


def test_a_data_folder_without_images_or_captions(sd_pipeline, tmp_path, capsys, no_weights):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert "has no images" in refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out"))
    (folder / "a.PNG").write_bytes(b"")
    message = refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out", caption_column="prompt"))
    assert "metadata.jsonl" in message and '"prompt"' in message and str(folder) in message


def test_a_folder_without_captions_takes_an_instance_prompt(sd_pipeline, dit_pipeline, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(b"")
    words = arguments(sd_pipeline, tmp_path / "data", tmp_path / "out")
    assert "--instance_prompt" in refusal(capsys, words)
    config, _ = parsed(sd_pipeline, tmp_path / "data", tmp_path / "out", instance_prompt="a photo of sks dog")
    assert config.data.instance_prompt == "a photo of sks dog"


def test_no_images_is_said_before_the_pipeline_is_looked_for(tmp_path, capsys):
    assert "no images" in refusal(capsys, arguments("no/where", tmp_path, tmp_path.with_name("out")))


def test_class_labels_come_from_folders_or_a_file(dit_pipeline, class_folder, image_folder, tmp_path, capsys):
    for flags, column in (({}, "label"), ({"caption_column": "text"}, "text")):
        config, _ = parsed(dit_pipeline, class_folder, tmp_path / "out", **flags)
        assert config.data.caption_column == column
    parsed(dit_pipeline, image_folder, tmp_path / "out")  # its metadata.jsonl may have labels
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(b"")
    message = refusal(capsys, arguments(dit_pipeline, flat, tmp_path / "out"))
    assert all(word in message for word in (str(flat), "class labels", "sub-folder", '"label"'))


def test_a_folder_of_classes_has_no_captions(sd_pipeline, class_folder, tmp_path, capsys, no_weights):
    message = refusal(capsys, arguments(sd_pipeline, class_folder, tmp_path / "out"))
    assert "no captions" in message and '"text"' in message


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "link", "run/samples", "run/README.md"])
def test_an_output_folder_that_cannot_be_written(place, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "run/README.md" if place.endswith("md") else tmp_path / "run").mkdir(parents=True)
    if place == "run/samples":
        (tmp_path / place).write_text("")
    folder = tmp_path / ("run" if place.startswith("run") else place)
    before = sorted(tmp_path.rglob("*"))
    message = refusal(capsys, arguments(sd_pipeline, image_folder, folder))
    assert message.startswith(f"--output_dir {folder}: ") and "give a" in message
    assert sorted(tmp_path.rglob("*")) == before


# What is trained on without being meant ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders, said",
    [
        (["train", "test", "validation"], ["test and validation"]),
        (["", "Val"], ["Val"]),
        (["images/a", "images/dev"], ["dev"]),
        (["train", "more"], []),
        (["test"], []),  # the user's own choice
        (["testimony", "values"], []),
    ],
    ids=str,
)
def test_folders_that_are_named_like_splits(folders, said, sd_pipeline, image_folder, tmp_path):
    for folder in folders:
        shutil.copytree(image_folder, tmp_path / "data" / folder, dirs_exist_ok=True)
    words = warned(sd_pipeline, tmp_path / "data", tmp_path / "out")
    assert [word for word in words if "everything in it is trained on" in word] == words and len(words) == len(said)
    assert all(name in word for name, word in zip(said, words, strict=True))


def test_shards_that_are_named_like_splits(tmp_path):
    names = [f"{split}-00000-of-00001.parquet" for split in ("train", "test")]
    assert held_out_names(tmp_path, [tmp_path / name for name in names]) == ["test"]


def test_an_output_folder_is_no_class(dit_pipeline, class_folder, tmp_path, capsys, no_weights):
    shutil.copytree(class_folder, tmp_path / "data")
    (tmp_path / "data/run/samples").mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / "data/run" / name).touch()
    message = refusal(capsys, arguments(dit_pipeline, tmp_path / "data", tmp_path / "out"))
    assert f"{tmp_path}/data/run is the output folder of a run" in message
