"""Validation samples: the same prompts and seeds every time, labelled rows, and a training that does not notice."""

import random
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run_of
from tiny import PICTURES
from trainer import metrics, same, train, weights

from lpl.training import validation
from lpl.training.average import MovingAverage
from tests.training.test_sampling import pixels


# The first two captions of the data set, so that there are real images to show beside.
PROMPTS = [f"{PICTURES[name]}, crop {number}" for number, name in enumerate(("astronaut", "chelsea"))]
SAMPLED = {"validation_prompts": PROMPTS, "validation_steps": 1}
FLAGS = {"lpl_weight": 0.1, "use_ema": True, "train_batch_size": 1}


@pytest.fixture(scope="module")
def trained(sd_pipeline, image_folder, tmp_path_factory):
    """Two steps with samples before, between and after; the folder, and each grid's rows and captions."""
    grids = []

    def recorded(rows, captions, tile=None):
        images = {label: [np.asarray(image) for image in row] for label, row in rows.items()}
        grids.append((list(rows), list(captions), images))
        return labelled_grid(rows, captions, tile)

    labelled_grid = validation.labelled_grid
    output_dir = tmp_path_factory.mktemp("validated")
    with mock.patch.object(validation, "labelled_grid", recorded):
        train(sd_pipeline, image_folder, output_dir, **FLAGS, **SAMPLED, checkpointing_steps=2)
    return output_dir, grids


def test_training_does_not_notice_validation(trained, sd_pipeline, image_folder, tmp_path):
    without = train(sd_pipeline, image_folder, tmp_path, **FLAGS)
    names = ("step", "loss", "diffusion_loss", "lpl", "lpl_weight", "inside", "lr")  # all but the speed
    assert metrics(without, *names) == metrics(trained[0], *names)
    assert same(weights(without / "unet"), weights(trained[0] / "unet"))
    assert not (without / "samples").exists()


def test_files(trained):
    folder = trained[0] / "samples"
    states = ["step-000000", "step-000001", "step-000001-ema", "step-000002", "step-000002-ema"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == states
    assert all(
        sorted(path.name for path in (folder / state).glob("*.png")) == ["00.png", "01.png"] for state in states
    )
    grids = ["before_after", "checkpoints", "step-000000", "step-000001", "step-000002"]
    assert sorted(path.stem for path in folder.glob("*.png")) == grids
    assert all(Image.open(path).size == (32, 32) for path in folder.glob("*/*.png"))


def test_rows_of_the_grids(trained):
    assert [rows for rows, _, _ in trained[1]] == [
        ["before training", "real images"],
        ["before training", "step 1", "step 1, EMA", "real images"],
        ["before training", "step 2", "step 2, EMA", "real images"],
        ["before training", "after", "real images"],
    ]
    assert all(captions == PROMPTS for _, captions, _ in trained[1])


def test_rows_hold_what_they_say(trained, image_folder):
    (_, _, first), _, (_, _, last), (_, _, before_after) = trained[1]
    assert (
        pixels(last["before training"]) == pixels(first["before training"]) == pixels(before_after["before training"])
    )
    assert pixels(before_after["after"]) == pixels(last["step 2, EMA"])  # the weights that are saved
    assert len(set(pixels([*last["before training"], *last["step 2"], *last["step 2, EMA"]]))) == 6
    saved = [np.asarray(Image.open(path)) for path in sorted((trained[0] / "samples/step-000002").glob("*.png"))]
    assert pixels(saved) == pixels(last["step 2"])
    source = Image.open(image_folder / "000-astronaut.png")
    assert np.abs(np.asarray(source.resize((32, 32)), float) - last["real images"][0]).mean() < 8


def test_a_resumed_run_keeps_the_row_before_training(trained, sd_pipeline, image_folder, tmp_path):
    resumed = shutil.copytree(trained[0], tmp_path / "run")
    train(sd_pipeline, image_folder, resumed, **FLAGS, **SAMPLED, max_train_steps=3, resume_from_checkpoint="latest")
    kept = [
        {path.name: path.read_bytes() for path in (folder / "samples" / "step-000000").iterdir()}
        for folder in (trained[0], resumed)
    ]
    assert kept[0] == kept[1] and (resumed / "samples" / "step-000003.png").is_file()


@pytest.mark.parametrize(
    "prompts, change, rows",
    [
        (["a cat", "a dog"], {}, ["before training", "step 1"]),
        (["a cat"], {}, ["step 1"]),  # nothing to compare with
        (["a cup", "a dog"], {}, ["step 1"]),
        (["a cat", "a dog"], {"validation_inference_steps": 3}, ["step 1"]),
    ],
)
def test_samples_before_training_are_shown_beside_those_of_the_same_settings(
    sampling, monkeypatch, prompts, change, rows
):
    sampling.draw("a cat", "a dog", step=0)
    resumed = replace(sampling, config=sampling.config.changed(**change))
    grids = []
    monkeypatch.setattr(
        validation, "labelled_grid", lambda rows, captions: grids.append(list(rows)) or Image.new("L", (1, 1))
    )
    resumed.draw(*prompts, step=1)
    assert grids == [rows]


def test_names_stand_over_the_columns(sampling, monkeypatch):
    captions = []
    monkeypatch.setattr(
        validation, "labelled_grid", lambda rows, names: captions.extend(names) or Image.new("L", (1, 1))
    )
    sampling.draw("a cat", "a dog", names=["cats", "dogs"], step=1)
    assert captions == ["cats", "dogs"]


def test_the_model_and_the_random_state_are_left_as_they_were(sampling):
    modes = []
    for part in (sampling.family.denoiser, *sampling.family.text_encoders):
        part.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    weights_before = {name: value.clone() for name, value in sampling.trained.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sampling.draw("a cat", step=1)
    assert modes and not any(modes)
    assert sampling.trained.training and sampling.family.denoiser.training
    assert not any(encoder.training for encoder in sampling.family.text_encoders)  # they are frozen
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert same(weights_before, sampling.trained.state_dict())
    assert all(p.grad is None and p.requires_grad for p in sampling.trained.parameters())


def test_without_prompts_nothing_is_sampled(sampling):
    idle = sampling.samples()
    assert idle.draw(run_of(sampling.config), sampling.trained, None) is None and idle.before_after(1) is None
    assert not idle.folder.exists()


def test_samples_of_an_earlier_run_with_prompts_are_no_ones_without(sampling):
    sampling.draw("a cat", step=1)
    idle = sampling.samples()
    assert idle.checkpoints(1) is None and idle.before_after(1) is None


def test_samples_of_an_earlier_run_are_not_taken_for_this_ones(sampling):
    for prompts, average in (
        (["a cat", "a dog"], MovingAverage(sampling.trained.weights(), decay=0.9999)),
        (["a cat"], None),
    ):
        for step in range(2):
            of_run = sampling.draw(*prompts, step=step, average=average)
    assert {path.name for path in of_run.folder.iterdir() if path.is_dir()} == {"step-000000", "step-000001"}
    assert [path.name for path in of_run.folder.glob("*/*.png")] == ["00.png", "00.png"]
