"""The log: means over the steps since the last entry, one file that a resumed run goes on with, and the trackers."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from trainer import parsed, reset_accelerate

from lpl import logs
from lpl.logs import Log, log_image


class Tracker:
    """What accelerate calls of a tracker, kept."""

    def __init__(self, name):
        self.name, self.logged, self.configurations = name, [], []
        self.writer = SimpleNamespace(
            add_image=lambda *args, **kwargs: self.logged.append((args, kwargs)),
            log_image=lambda *args, **kwargs: self.logged.append((args, kwargs)),
        )

    def log(self, values, step=None):
        self.logged.append((values, step))

    def store_init_configuration(self, values):
        self.configurations.append(values)


class Clock:
    """A time that passes when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    return clock


@pytest.fixture
def logging(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """`logging(first_step=0, **flags)` is a log with a tracker that keeps what it is told."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()

    def start(first_step=0, global_batch=4, **flags):
        args, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
        accelerator = Accelerator()
        tracker = Tracker("tracker")

        def init_trackers(project, configuration):
            accelerator.trackers = [tracker]
            tracker.store_init_configuration(configuration)

        accelerator.init_trackers = init_trackers
        log = Log(accelerator, args, first_step, global_batch)
        log.tracker = tracker
        return log

    yield start
    reset_accelerate()


def numbers(*values):
    return [torch.tensor(value) for value in values]


def add(log, loss=1.0, diffusion_loss=0.75, lpl=0.5, weighted_lpl=0.25, inside=0.5):
    log.add(*numbers(loss, diffusion_loss, lpl, weighted_lpl), inside)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


WEIGHT = torch.tensor(0.5)


# Entries


def test_an_entry_holds_the_means_since_the_last_one(logging, clock):
    log = logging()
    add(log, 1.0, 0.8, 0.4, 0.2, inside=0.5)
    add(log, 3.0, 2.2, 1.6, 0.8, inside=1.0)
    clock.now += 2.0
    shown = log.write(2, 1e-4, WEIGHT)
    expected = {
        "step": 2,
        "loss": 2.0,
        "diffusion_loss": 1.5,
        "lpl": 1.0,
        "lpl_weight": 0.5,
        "lpl_share": 0.25,  # of the sums, not the mean of shares
        "inside": 0.75,
        "lr": 1e-4,
        "images_per_second": 4.0,  # 2 steps of 4 in 2 seconds
    }
    assert lines(log.path) == [pytest.approx(expected)] and log.records() == lines(log.path)
    assert shown == {"loss": "2.0000", "lpl": "1.0000", "share": "25%", "lr": "1.0e-04", "img/s": "4"}
    ((record, step),) = log.tracker.logged
    assert step == 2 and {"step": 2, **record} == pytest.approx(expected)
    add(log, 5.0)
    clock.now += 1.0
    log.write(3, 1e-4, WEIGHT)
    assert lines(log.path)[1]["loss"] == 5.0 and lines(log.path)[1]["images_per_second"] == 4.0


def test_nothing_is_fetched_between_entries(logging, monkeypatch):
    log = logging()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the step waits for the device"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the step waits for the device"))
    add(log)
    log.samples(1, torch.tensor([3]), torch.tensor([0.5]))


def test_what_is_added_carries_no_graph(logging):
    log = logging()
    loss = torch.tensor(1.0, requires_grad=True)
    log.add(loss, loss, loss, loss, 1.0)
    log.samples(1, torch.tensor([3]), loss.expand(1))
    assert not log._sums.requires_grad and not log._samples[0].requires_grad


def test_a_loss_of_zero_has_no_share(logging):
    log = logging()
    add(log, 0.0, 0.0, 0.0, 0.0)
    log.write(1, 1e-4, WEIGHT)
    assert log.records()[0]["lpl_share"] == 0.0


def test_a_loss_that_is_not_finite_is_logged(logging):
    log = logging()
    add(log, float("nan"))
    log.write(1, 1e-4, WEIGHT)
    assert math.isnan(log.records()[0]["loss"])


# Speed


def test_a_pause_is_not_counted(logging, clock):
    log = logging()
    add(log)
    clock.now += 1.0
    with log.paused():
        clock.now += 100.0
    clock.now += 1.0
    log.write(1, 1e-4, WEIGHT)
    assert log.records()[0]["images_per_second"] == pytest.approx(2.0)


def test_a_resumed_run_counts_its_own_steps(logging, clock):
    log = logging(first_step=100)
    add(log)
    clock.now += 1.0
    log.write(101, 1e-4, WEIGHT)
    assert log.records()[0]["images_per_second"] == pytest.approx(4.0)


# The file


def test_a_resumed_run_goes_on_where_the_checkpoint_stands(logging):
    log = logging()
    log.validation(0, {"validation_loss": 3.0})
    for step in (1, 2, 3):
        add(log, float(step))
        log.samples(step, torch.tensor([step]), torch.tensor([float(step)]))
        log.write(step, 1e-4, WEIGHT)
        log.validation(step, {"validation_loss": 3.0 - step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash
    kept = log.records()
    assert len(kept) == 7
    resumed = logging(first_step=2)
    assert resumed.records() == lines(resumed.path) == kept[:5]
    assert [entry["step"] for entry in lines(resumed.samples_path)] == [1, 2]


def test_a_new_run_begins_a_new_log(logging):
    log = logging()
    log.validation(0, {"validation_loss": 3.0})
    add(log)
    log.samples(1, torch.tensor([0]), torch.tensor([1.0]))
    log.write(1, 1e-4, WEIGHT)
    fresh = logging()
    assert fresh.records() == [] and fresh.samples_path.read_text() == ""


def test_validation_has_an_entry_of_its_own(logging):
    log = logging()
    log.validation(7, {"validation_loss": 0.5, "validation_lpl": 0.25})
    assert lines(log.path) == [{"step": 7, "validation_loss": 0.5, "validation_lpl": 0.25}]
    assert log.tracker.logged == [({"validation_loss": 0.5, "validation_lpl": 0.25}, 7)]


def test_losses_of_samples(logging):
    log = logging()
    log.samples(1, torch.tensor([5, 2**40 + 1]), torch.tensor([0.5, 0.25]))
    log.samples(1, torch.tensor([7, 8]), torch.tensor([1.5, 1.25]))
    log.samples(2, torch.tensor([9]), torch.tensor([2.0]))
    assert not log.samples_path.exists()  # written with the next entry
    add(log)
    log.write(2, 1e-4, WEIGHT)
    expected = [(1, 5, 0.5), (1, 2**40 + 1, 0.25), (1, 7, 1.5), (1, 8, 1.25), (2, 9, 2.0)]
    assert lines(log.samples_path) == [{"step": s, "image": i, "loss": e} for s, i, e in expected]
    add(log)
    log.write(3, 1e-4, WEIGHT)
    assert len(lines(log.samples_path)) == 5  # once


def test_samples_of_several_processes_are_in_the_order_of_steps(logging):
    log = logging()
    for step in (1, 2):
        log.samples(step, torch.tensor([step]), torch.tensor([0.5]))
    log.accelerator.gather = lambda rows: torch.cat([rows, rows + torch.tensor([0, 10, 0])])
    add(log)
    log.write(2, 1e-4, WEIGHT)
    assert [(entry["step"], entry["image"]) for entry in lines(log.samples_path)] == [(1, 1), (1, 11), (2, 2), (2, 12)]


def test_without_debug_loss_there_is_no_file_of_samples(logging):
    log = logging()
    add(log)
    log.write(1, 1e-4, WEIGHT)
    assert not log.samples_path.exists()


# Trackers


def test_trackers_are_given_the_flags_in_kinds_that_they_take_and_no_token(logging):
    log = logging(hub_token="secret", push_to_hub=True, validation_prompts=["a", "b"])
    (configuration,) = log.tracker.configurations
    assert configuration["seed"] == 0 and configuration["lpl_weight"] == "auto:0.2"
    assert all(isinstance(value, bool | int | float | str) for value in configuration.values())
    assert "secret" not in str(configuration) and "hub_token" not in configuration


def test_accelerates_own_tensorboard_takes_all_of_it(sd_pipeline, image_folder, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    args, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", validation_prompts=["a", "b"])
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    log = Log(accelerator, args, 0, 4)
    add(log)
    log.write(1, 1e-4, WEIGHT)
    log.validation(1, {"validation_loss": 0.5})
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "grid.png")
    log_image(accelerator, tmp_path / "grid.png", 1)
    accelerator.end_training()
    reset_accelerate()
    events = EventAccumulator(str(tmp_path / args.tracker_project_name)).Reload()
    assert {"loss", "lpl", "images_per_second", "validation_loss"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(1, 0.5)]
    (image,) = events.Images("validation")
    assert (image.step, image.width, image.height) == (1, 8, 6)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGBA", (8, 6), "teal").save(tmp_path / "grid.png")
    return tmp_path / "grid.png"


def shown(name, picture):
    """What a tracker of that name is told about the picture."""
    tracker = Tracker(name)
    log_image(SimpleNamespace(trackers=[tracker]), picture, 7)
    return tracker.logged


def test_a_picture_for_tensorboard(picture):
    ((args, kwargs),) = shown("tensorboard", picture)
    assert (args[0], args[2], kwargs) == ("validation", 7, {"dataformats": "HWC"})
    assert args[1].shape == (6, 8, 3) and args[1].dtype == np.uint8


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_picture_for_trackers_with_a_class_for_it(picture, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(Image=lambda path: f"{name} has {path}"))
    assert shown(name, picture) == [({"validation": f"{name} has {picture}"}, 7)]


def test_a_picture_for_comet(picture):
    assert shown("comet_ml", picture) == [((str(picture),), {"name": "validation", "step": 7})]


def test_a_tracker_that_takes_no_pictures_is_left_alone(picture):
    assert shown("mlflow", picture) == []
