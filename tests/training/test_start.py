"""A run starts at its beginning or at a checkpoint, with one seed, and knows its length."""

import pytest
import torch
from accelerate import Accelerator
from runs import run_of

from lpl.config import Config
from lpl.config.groups import Optimization
from lpl.training.checkpoints import Progress, checkpoint_path
from lpl.training.start import Length, start_or_resume


@pytest.fixture(autouse=True)
def same_base(monkeypatch):
    """tests/training/test_base_model.py has the checks of the base model."""
    monkeypatch.setattr("lpl.training.start.identity", lambda *_: None)


def start(folder, seed=None, **flags):
    """A run in that folder; nothing is downloaded."""
    config = Config().changed(output_dir=str(folder), seed=seed, **flags)
    return start_or_resume(config, Accelerator(), lambda output: pytest.fail("nothing is on the Hub"))


@pytest.fixture
def earlier(tmp_path):
    """The folder of a run with the seed 3."""
    for step in (9, 10):
        place = checkpoint_path(tmp_path, step)
        place.mkdir()
        Progress(step, seed=3, looked=True, skipped=2).save(place)
    return tmp_path


# Seed and checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, step", [("latest", 10), ("checkpoint-9", 9)])
def test_resuming_takes_the_seed_of_the_run(cpu, earlier, name, step):
    run = start(earlier, resume_from_checkpoint=name)
    assert (run.step, run.seed, run.resumed) == (step, 3, checkpoint_path(earlier, step))
    assert run.progress == Progress(step, 3, looked=True, skipped=2) and run.recipe["seed"] == 3
    assert torch.initial_seed() == 3


def test_another_seed_is_refused_on_resume(cpu, earlier):
    with pytest.raises(ValueError, match="--seed 4: the run to resume has the seed 3"):
        start(earlier, seed=4, resume_from_checkpoint="latest")


def test_a_seed_that_was_drawn_is_written_down(cpu, tmp_path):
    one, other = (start(tmp_path) for _ in range(2))
    for run in (one, other):
        assert run.progress == Progress(0, run.seed) and run.recipe["seed"] == run.seed and run.resumed is None
    assert one.seed != other.seed and torch.initial_seed() == other.seed


def test_starting_afresh_beside_older_checkpoints_is_said(cpu, earlier, caplog):
    run = start(earlier, seed=0)
    assert run.progress == Progress(0, 0) and run.resumed is None
    assert "checkpoint-10" in caplog.text and "--resume_from_checkpoint latest" in caplog.text


def test_machines_without_a_common_folder_are_refused(cpu, earlier, monkeypatch):
    monkeypatch.setattr("lpl.training.start.gather_object", lambda names: [*names, "none"])
    with pytest.raises(ValueError, match=r"--output_dir .*different checkpoints \(checkpoint-10, none\)"):
        start(earlier, resume_from_checkpoint="latest")


def test_a_download_comes_before_the_search_for_a_checkpoint(cpu, tmp_path):
    def download(output):
        place = checkpoint_path(output.output_dir, 7)
        place.mkdir()
        Progress(7, seed=3).save(place)

    config = Config().changed(output_dir=str(tmp_path), resume_from_checkpoint="hub")
    assert start_or_resume(config, Accelerator(), download).step == 7


def test_the_recipe_names_what_the_run_has_found_out(cpu, tmp_path):
    run = start(tmp_path, hub_model_id="mine")
    assert run.recipe["mixed_precision"] == run.mixed_precision == "no" and run.recipe["hub_model_id"] == "mine"
    run.repository = "user/mine"
    assert run.recipe["hub_model_id"] == "user/mine"


def test_a_step_is_counted_in_the_progress(cpu, tmp_path):
    run = run_of(Config().changed(output_dir=str(tmp_path), seed=5), step=4)
    run.step += 1
    assert (run.step, run.seed, run.progress.step) == (5, 5, 5)


# Length --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, images, processes, expected",
    [
        ({"max_train_steps": 7}, 100, 1, Length(4, 7, 25)),
        ({"num_train_epochs": 3}, 100, 1, Length(4, 75, 25)),
        ({"num_train_epochs": 3}, 101, 1, Length(4, 76, 26)),  # rounded up once, not in each epoch
        ({"num_train_epochs": 3}, 101, 2, Length(8, 38, 13)),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 3}, 100, 2, Length(24, 5, 5)),
        ({"max_train_steps": 7, "num_train_epochs": 3}, 100, 1, Length(4, 7, 25)),
        ({"max_train_steps": 7}, None, 2, Length(8, 7, 7)),  # a stream is one epoch
    ],
    ids=str,
)
def test_the_length_of_a_run(flags, images, processes, expected):
    assert Length.of(Optimization(train_batch_size=4, **flags), images, processes) == expected
