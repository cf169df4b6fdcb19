"""A run that goes on from any of its checkpoints ends as the one that was never interrupted, bit for bit."""

import json
import shutil

import pytest
import torch
from commands import edited
from trainer import launch, metrics, same, train, validation_metrics, weights

from lpl.tools import layout
from lpl.tools.files import load_state


RUN = {
    "max_train_steps": 5,
    "checkpointing_steps": 1,
    "logging_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "lr_scheduler": "cosine",
    "lpl_measuring_steps": 4,
    "proportion_empty_prompts": 0.3,
    "random_flip": True,
    "seed": 3,
}
LORA = {"lora": True, "rank": 2, "lora_dropout": 0.3}
VARIANTS = {
    "several epochs": ("sd", {"train_batch_size": 7}),
    "accumulation": (
        "sd",
        {"gradient_accumulation_steps": 3, "offload_ema": True, "lpl_project_conflicts": True},
    ),
    "loader processes": ("sd", {"dataloader_num_workers": 2, "foreach_ema": True}),
    "bf16": ("sd", {"mixed_precision": "bf16", "lpl_every": 2, "lpl_start_step": 1}),
    "LoRA with dropout": ("sd", LORA),  # draws from the global random state
    "text encoders": ("sdxl", LORA | {"train_text_encoder": True}),
    "SD3, parts of images": ("sd3", {"lpl_crop": 16, "lpl_max_samples": 1, "validation_every_nth": 4}),
    "8 bits": ("sd", {"use_8bit_adam": True}),
    "schedule-free": (
        "sd",
        {"optimizer": "schedulefree:AdamWScheduleFree", "use_ema": None, "ema_decay": None, "validation_every_nth": 4}
        | {"validation_steps": 2, "validation_prompts": ["a cat", "a dog"]},
    ),
    "Muon": (
        "sd",
        {"optimizer": "torch.optim:Muon", "lr_scheduler": "torch.optim.lr_scheduler:StepLR"}
        | {"lr_scheduler_args": "step_size=2"},
    ),
    "prodigy": ("sd", {"optimizer": "prodigy", "learning_rate": 1.0}),
}


def everything(folder, step):
    """A checkpoint: weights, moving average, and every number and tensor of its state."""
    checkpoint = folder / f"checkpoint-{step}"
    states = [load_state(path) for path in sorted(checkpoint.glob("*.safetensors")) if "lora" not in path.name]
    return weights(checkpoint), list(flat(states)), (checkpoint / "progress.json").read_text().split('"log"')[0]


def flat(value):
    if isinstance(value, dict):
        value = [part for entry in value.items() for part in entry]
    if isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
    else:
        yield value


def assert_equal(folder, whole, step):
    (ours, our_state, our_place), (others, other_state, other_place) = (everything(x, step) for x in (folder, whole))
    assert same(ours, others) and our_place == other_place and len(our_state) == len(other_state)
    for one, other in zip(our_state, other_state, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert metrics(folder) == metrics(whole)


def interrupted(whole, step, folder):
    """What a run leaves that ends after a step, though its log is longer."""
    folder.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, folder)
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_going_on_changes_nothing(name, request, image_folder, tmp_path):
    family, flags = VARIANTS[name]
    if "use_8bit_adam" in flags:
        pytest.importorskip("bitsandbytes")
    if "optimizer" in flags:
        pytest.importorskip("prodigyopt" if flags["optimizer"] == "prodigy" else flags["optimizer"].split(":")[0])
    pipeline = request.getfixturevalue(f"{family}_pipeline")
    whole = train(pipeline, image_folder, tmp_path / "whole", **RUN | flags)
    folder = interrupted(whole, 3, tmp_path / "resumed")
    train(pipeline, image_folder, folder, **RUN | flags, resume_from_checkpoint="latest")
    assert_equal(folder, whole, 5)
    if name == "schedule-free":  # a checkpoint is in between; the result is the optimizer's average
        assert not same(weights(whole / "unet"), weights(whole / "checkpoint-5/unet"))
        assert same(weights(whole / "unet"), weights(folder / "unet"))
        assert same(weights(whole / "unet"), weights(whole / "checkpoint-5/ema/unet"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4])
def test_two_processes_go_on_from_any_step(step, sd_pipeline, image_folder, tmp_path):
    flags = RUN | LORA | {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    two = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "29617")
    whole = launch(sd_pipeline, image_folder, tmp_path / "whole", *two, **flags)
    assert (whole / "checkpoint-5" / layout.RANDOM_STATE.format(1)).is_file()  # the second one took part
    folder = interrupted(whole, step, tmp_path / "resumed")
    launch(sd_pipeline, image_folder, folder, *two, **flags, resume_from_checkpoint="latest")
    assert_equal(folder, whole, 5)


def test_a_validation_that_comes_again_is_logged_once(sd_pipeline, image_folder, tmp_path):
    """Killed after it, and before the checkpoint knew that it is done."""
    flags = {"max_train_steps": 3, "checkpointing_steps": 1, "validation_every_nth": 4, "validation_steps": 2}
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags)
    folder = interrupted(whole, 2, tmp_path / "resumed")
    progress = folder / "checkpoint-2/progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"looked": False}))
    train(sd_pipeline, image_folder, folder, **flags, resume_from_checkpoint="latest")
    assert validation_metrics(folder) == validation_metrics(whole) and metrics(folder) == metrics(whole)
    assert [step for step, *_ in validation_metrics(whole)] == [0, 2, 3]


def test_at_the_end_nothing_is_trained(sd_pipeline, image_folder, tmp_path):
    """A budget counts steps really taken: resuming at its end, or past it, leaves the weights as they are."""
    whole = train(sd_pipeline, image_folder, tmp_path, **RUN)
    before, entries = everything(whole, 5), metrics(whole)
    for steps in (5, 4):
        train(sd_pipeline, image_folder, whole, **RUN | {"max_train_steps": steps}, resume_from_checkpoint="latest")
        assert same(weights(whole / "unet"), weights(whole / "checkpoint-5/ema/unet"))
    assert same(everything(whole, 5)[0], before[0]) and metrics(whole) == entries


# Data that has changed since -----------------------------------------------------------------------------------------


def test_images_and_captions_that_changed_are_said(sd_pipeline, image_folder, tmp_path, caplog):
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(image_folder, data)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    flags = {"lpl_weight": 0, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
    said = {
        1: (lines, None),
        2: ([lines[0].replace('"text": "', '"text": "not '), *lines[1:]], "other images or captions"),
        3: (lines[1:], "7 images instead of 8"),
        4: (lines[1:], None),
    }
    for steps, (metadata, words) in said.items():
        caplog.clear()
        (data / "metadata.jsonl").write_text("\n".join(metadata))
        train(sd_pipeline, data, folder, **flags, max_train_steps=steps)
        found = [record.message for record in caplog.records if "is not that of the run to resume" in record.message]
        assert len(found) == (words is not None) and (words is None or words in found[0])


def test_a_class_that_is_added_moves_no_label(dit_pipeline, class_folder, tmp_path, caplog):
    data, flags = tmp_path / "data", {"lpl_weight": 0, "checkpointing_steps": 1}
    shutil.copytree(class_folder, data)
    (data / "cats").rename(tmp_path / "cats")
    folder = train(dit_pipeline, data, tmp_path / "run", **flags, max_train_steps=1)
    (tmp_path / "cats").rename(data / "cats")
    for steps in (2, 3):
        train(dit_pipeline, data, folder, **flags, max_train_steps=steps, resume_from_checkpoint="latest")
        names = json.loads((folder / "model_index.json").read_text())["id2label"]
        assert [names[label] for label in "012"] == ["cups", "rockets", "cats"]
    assert caplog.text.count("is not that of the run to resume (9 images instead of 6)") == 1
    assert "0 cups, 1 rockets, 2 cats" in caplog.text


def test_labels_that_the_pipeline_has_for_other_classes_are_said(dit_pipeline, class_folder, tmp_path, caplog):
    base = edited(dit_pipeline, tmp_path / "base", None, id2label={"7": "cats, kittens", "1": "cups"})
    train(base, class_folder, tmp_path / "run", lpl_weight=0, max_train_steps=1)
    assert "classes have other labels in the data than in the pipeline" in caplog.text
    assert "cats 0 (7)" in caplog.text and "cups" not in caplog.text.partition("in brackets")[2].split("\n")[0]
