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
from runs import run_of
from trainer import parsed

from lpl.student import Fidelity
from lpl.training import log as logs
from lpl.training.log import Log, log_image
from lpl.training.losses import BatchLosses
from lpl.training.start import Length


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


class Bar:
    """A progress bar that keeps what it shows."""

    def __init__(self, total, initial, disable, desc, delay, mininterval):
        self.total, self.n, self.closed, self.postfix = total, initial, False, None

    def set_postfix(self, values, refresh):
        self.postfix = values

    def update(self, count):
        self.n += count

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were made."""
    made = []
    monkeypatch.setattr(logs, "tqdm", lambda **options: made.append(Bar(**options)) or made[-1])
    return made


def log_of(config, step, accelerator, length, looked=True):
    run = run_of(config, step, accelerator, looked=looked)
    return Log(run, length, config.validation, config.output, config.lpl.lpl_every, ("mid", "up_0"))


@pytest.fixture
def logging(sd_pipeline, image_folder, tmp_path, cpu):
    """`logging(first_step=0, **flags)` is a log of two blocks, with a tracker that keeps what it is told."""

    def start(first_step=0, last_step=100, global_batch=4, looked=True, **flags):
        config, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
        accelerator = Accelerator()
        tracker = Tracker("tracker")

        def init_trackers(project, configuration):
            accelerator.trackers = [tracker]
            tracker.store_init_configuration(configuration)

        accelerator.init_trackers = init_trackers
        log = log_of(config, first_step, accelerator, Length(global_batch, last_step, last_step), looked)
        log.tracker = tracker
        return log

    return start


def add(
    log,
    loss=1.0,
    diffusion_loss=0.75,
    lpl=0.5,
    inside=1,
    step=1,
    with_lpl=True,
    by_block=None,
    rows=1,
    size=2,
    grad=None,
    samples=None,
    cosines=(),
    levels=(),
    pulls=(),
    fidelity=None,
):
    """A micro-batch of `size` samples. `grad`: of both terms at the model's output, one number each. `samples`: their
    diffusion losses, by index in the data set. `cosines`: of the gradients, of samples at these noise levels."""
    samples = samples or dict.fromkeys(range(size), diffusion_loss)
    losses = BatchLosses(
        torch.tensor(list(samples.values())),
        torch.tensor(lpl),
        torch.zeros(2),
        inside,
        with_lpl,
        0 if by_block is None else rows,
        None if by_block is None else torch.tensor(by_block),
        levels=torch.tensor(levels, dtype=torch.long),
        fidelity=fidelity,
    )
    if with_lpl:
        losses.cosines, losses.squares = torch.tensor(cosines), torch.tensor(grad or (0.0, 0.0)).square()
        losses.pulls = torch.tensor(pulls)
    log.observe(step, {"index": torch.tensor(list(samples))}, losses, torch.tensor(loss), WEIGHT)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


WEIGHT = torch.tensor(0.5)


# Entries


def test_an_entry_holds_the_means_since_the_last_one(logging, clock, bars):
    log = logging()
    log.start_bar()
    add(log, 1.0, 0.8, 0.4, inside=1)
    add(log, 3.0, 2.2, 1.6, inside=2)
    clock.now += 2.0
    log.write(2, 1e-4)
    expected = {
        "step": 2,
        "loss": 2.0,
        "diffusion_loss": 1.5,
        "lpl": 1.0,
        "lpl_weight": 0.5,
        "lpl_share": 0.25,  # of the sums, not the mean of shares
        "lpl_gradient_share": 0.0,
        "inside": 0.75,
        "lr": 1e-4,
        "images_per_second": 4.0,  # 2 steps of 4 in 2 seconds
    }
    assert lines(log.path) == [pytest.approx(expected)] and log.records() == lines(log.path)
    (bar,) = bars
    assert bar.postfix == {"loss": "2.0000", "lpl": "1.0000", "share": "25%", "lr": "1.0e-04", "img/s": "4"}
    assert (bar.n, bar.total, bar.closed) == (2, 100, False)
    ((record, step),) = log.tracker.logged
    assert step == 2 and {"step": 2, **record} == pytest.approx(expected)
    add(log, 5.0)
    clock.now += 1.0
    log.write(3, 1e-4)
    assert lines(log.path)[1]["loss"] == 5.0 and lines(log.path)[1]["images_per_second"] == 4.0
    log.close_bar(4)
    assert bar.n == 4 and bar.closed


def test_nothing_is_fetched_between_entries(logging, monkeypatch):
    log = logging(debug_loss=True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("the step waits for the device"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the step waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("the step waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("the step waits for the device"))
    add(log, by_block=[[0.5, 0.0], [1.0, 0.9]], grad=(1.0, 2.0))


def test_what_is_added_carries_no_graph(logging):
    log = logging(debug_loss=True)
    loss = torch.tensor(1.0, requires_grad=True)
    log.observe(1, {"index": torch.tensor([3])}, BatchLosses(loss.expand(1), loss, loss, 1, True), loss, loss)
    assert not any(kept.requires_grad for kept in (*log._sums.values(), log._samples[0][-1]))


def test_a_loss_of_zero_has_no_share(logging):
    log = logging()
    add(log, 0.0, 0.0, 0.0)
    log.write(1, 1e-4)
    assert log.records()[0]["lpl_share"] == log.records()[0]["lpl_gradient_share"] == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_do_not_spoil_the_means(logging, value):
    log = logging()
    for loss in (1.0, value, 3.0):
        add(log, loss, by_block=[[loss, 0.0], [1.0, 1.0]], rows=1)
    log.write(1, 1e-4)
    (record,) = log.records()
    assert record["loss"] == record["lpl/mid"] == 2.0


def test_without_a_finite_loss_there_is_none_in_the_entry(logging, bars):
    log = logging()
    log.start_bar()
    add(log, float("nan"))
    log.write(1, 1e-4)
    assert bars[0].postfix["loss"] == "not finite"
    assert "loss" not in log.records()[0] and "inside" in log.records()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_file_stays_json_where_a_number_is_not_finite(logging, value):
    log = logging()
    log.validation(1, {"validation_loss": value, "lpl_share": value})
    json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(log.records()[0]["validation_loss"]) and not log.has_lpl()


# What is seen of LPL


def test_parts_of_blocks_are_over_the_steps_with_lpl_and_kept_shares_over_the_samples(logging):
    """The parts add up to LPL whatever was inside; what the masks keep counts only where there was a sample."""
    log = logging()
    add(log, lpl=3.0, by_block=[[1.0, 2.0], [1.5, 1.8]], rows=2)
    add(log, lpl=0.0, inside=0)
    add(log, lpl=1.5, by_block=[[0.5, 1.0], [0.5, 0.9]], rows=1)
    log.write(1, 1e-4)
    (record,) = log.records()
    seen = {name: value for name, value in record.items() if "/" in name}
    expected = {"lpl/mid": 0.5, "lpl/up_0": 1.0, "kept/mid": 2.0 / 3, "kept/up_0": 0.9}
    assert seen == pytest.approx(expected) and record["lpl"] == pytest.approx(1.5)
    add(log, by_block=[[1.0, 2.0], [1.0, 1.0]], rows=1)
    add(log, lpl=float("nan"), by_block=[[float("nan")] * 2, [0.5, 1.0]], rows=1)  # its masks count
    log.write(2, 1e-4)
    assert log.records()[-1]["kept/mid"] == 0.75
    add(log, lpl=0.0, inside=0)
    log.write(3, 1e-4)
    assert not [name for name in log.records()[-1] if "/" in name]


def test_a_students_pull_is_that_of_many_samples(logging):
    """Of 8 samples a step; the others are of each step."""
    log = logging()
    for step, pull in enumerate((0.0, 0.5, 1.0, 1.5, 0.5), 1):
        ones = torch.ones(8)
        add(log, step=step, fidelity=Fidelity(ones * step / 10, ones, pull * ones, ones, 2 * ones))
        log.write(step, 1e-4)
    found = [record.get("student_pull") for record in log.records()]
    assert found == [None, None, None, pytest.approx(0.75), None]  # then it begins again
    assert [record["student_cosine"] for record in log.records()] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_steps_without_lpl_count_for_the_diffusion_loss_only(logging):
    """--lpl_every: L_total is 1 + 4 * 0.5 * 2 on one step and 1 on three; in expectation LPL is a half of it."""
    log = logging(lpl_every=4, logging_steps=4)
    add(log, loss=5.0, diffusion_loss=1.0, lpl=2.0, by_block=[[2.0, 0.0], [1.0, 1.0]])
    for step in (2, 3, 4):
        add(log, loss=1.0, diffusion_loss=1.0, lpl=0.0, step=step, with_lpl=False)
    log.write(4, 1e-4)
    (record,) = log.records()
    assert (record["loss"], record["diffusion_loss"], record["lpl"], record["lpl/mid"]) == (2.0, 1.0, 2.0, 2.0)
    assert record["lpl_share"] == pytest.approx(0.5) and record["lpl_weight"] == 0.5


def test_an_entry_between_two_steps_with_lpl_has_nothing_of_it(logging, bars):
    log = logging(lpl_every=4)
    log.start_bar()
    add(log, step=2, with_lpl=False)
    log.write(2, 1e-4)
    (record,) = log.records()
    assert not {"lpl", "lpl_share", "lpl_gradient_share"} & set(record) and record["lpl_weight"] == 0.5
    assert not {"lpl", "share"} & set(bars[0].postfix)


def test_the_gradients_share_is_that_of_the_norms_over_the_whole_step(logging):
    """Two micro-batches: |w LPL'| is sqrt(0.25 (9 + 16)) = 2.5 and that of the diffusion loss sqrt(2.25 + 4) = 2.5."""
    log = logging()
    add(log, grad=(3.0, 1.5))
    add(log, grad=(4.0, 2.0))
    log.write(1, 1e-4)
    assert log.records()[0]["lpl_gradient_share"] == pytest.approx(0.5)
    add(log, step=2, grad=(3.0, 0.5))
    log.write(2, 1e-4)
    assert log.records()[1]["lpl_gradient_share"] == pytest.approx(0.75)


def test_the_gradients_share_is_that_of_the_last_step_with_lpl_before_an_entry(logging):
    """Entries after 5, 10 and 12; with LPL are the steps 1, 4, 7 and 10."""
    log = logging(lpl_every=3, logging_steps=5, checkpointing_steps=100, last_step=12)
    for step in range(1, 13):
        add(log, step=step, with_lpl=step % 3 == 1, grad=(2.0 * step, 1.0))
        if log.is_due(step):
            log.write(step, 1e-4)
    found = {record["step"]: record.get("lpl_gradient_share") for record in log.records()}
    assert found == {5: pytest.approx(4 / 5), 10: pytest.approx(10 / 11), 12: None}


def test_cosines_are_means_over_samples_by_noise_level(logging):
    """Of all steps with LPL since the last entry; a sample without a cosine counts nowhere."""
    log = logging()
    add(log, cosines=[0.5, -0.5, math.nan], levels=[4, 1, 1])
    add(log, step=2, cosines=[0.0], levels=[4])
    add(log, step=3, with_lpl=False)
    add(log, step=4, cosines=[math.nan], levels=[0])
    log.write(4, 1e-4)
    add(log, step=5, with_lpl=False)
    log.write(5, 1e-4)
    first, second = log.records()
    found = {name: value for name, value in first.items() if "cosine" in name}
    names = "lpl_gradient_cosine", "lpl_gradient_cosine/0.05_to_0.1", "lpl_gradient_cosine/0.5_to_1"
    assert found == dict(zip(names, (0.0, -0.5, 0.25))) and not any("cosine" in name for name in second)


def test_processes_with_different_numbers_inside(logging):
    """The other one saw two samples where this one saw one: kept shares are means over samples, parts over batches."""
    log = logging()
    add(log, lpl=1.0, by_block=[[1.0, 0.0], [0.4, 1.0]], rows=1, grad=(3.0, 0.0), cosines=[0.9], levels=[2])
    ours = log._summed()
    log._reset()
    add(
        log,
        lpl=3.0,
        by_block=[[2.0, 1.0], [2.0, 1.4]],
        rows=2,
        inside=2,
        grad=(4.0, 2.5),
        cosines=[0.0, 0.3],
        levels=[2, 2],
    )
    log.accelerator.reduce = lambda theirs, kind: (ours + theirs) / 2
    log.write(1, 1e-4)
    record = log.records()[0]
    expected = {"lpl": 2.0, "lpl/mid": 1.5, "lpl/up_0": 0.5, "kept/mid": 0.8, "kept/up_0": 0.8, "inside": 0.75}
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert record["lpl_gradient_share"] == pytest.approx(0.5)  # 0.5 * 5 to 2.5
    assert record["lpl_gradient_cosine"] == record["lpl_gradient_cosine/0.1_to_0.25"] == pytest.approx(0.4)


def test_the_pull_is_a_mean_over_samples(logging):
    log = logging()
    add(log, pulls=[0.5, -0.25, math.nan])
    add(log, step=2, pulls=[0.5])
    log.write(2, 1e-4)
    add(log, step=3, with_lpl=False)
    log.write(3, 1e-4)
    first, second = log.records()
    assert first["lpl_pull"] == 0.25 and "lpl_pull" not in second


# Speed


def test_a_pause_is_not_counted(logging, clock):
    log = logging()
    add(log)
    clock.now += 1.0
    with log.paused():
        clock.now += 100.0
    clock.now += 1.0
    log.write(1, 1e-4)
    assert log.records()[0]["images_per_second"] == pytest.approx(2.0)


def test_a_resumed_run_counts_its_own_steps(logging, clock):
    log = logging(first_step=100)
    add(log)
    clock.now += 1.0
    log.write(101, 1e-4)
    assert log.records()[0]["images_per_second"] == pytest.approx(4.0)


# The file


def test_a_resumed_run_goes_on_where_the_checkpoint_stands(logging):
    log = logging(debug_loss=True)
    log.validation(0, {"validation_loss": 3.0})
    for step in (1, 2, 3):
        add(log, float(step), step=step, samples={step: float(step)})
        log.write(step, 1e-4)
        log.validation(step, {"validation_loss": 3.0 - step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash
    kept = log.records()
    assert len(kept) == 7
    resumed = logging(first_step=2)
    assert resumed.records() == lines(resumed.path) == kept[:5]
    assert [entry["step"] for entry in lines(resumed.samples_path)] == [1, 2]


def test_a_run_resumed_between_two_entries_writes_the_same(logging, clock):
    """Every sum is in the state, in its place."""
    log = logging()
    of_samples = {"cosines": [0.5, -0.25], "levels": [4, 1], "pulls": [0.75, 0.5]}
    add(log, 1.0, 0.8, 0.4, grad=(3.0, 2.0), by_block=[[0.1, 0.3], [0.9, 0.8]], **of_samples)
    state = log.state()
    resumed = logging(first_step=1)
    resumed._resume(state)
    for each in (log, resumed):
        add(each, 3.0, 2.2, 1.6, step=2, grad=(1.0, 2.0), cosines=[0.1], levels=[1], pulls=[0.1])
        clock.now += 1.0
        each.write(2, 1e-4)
        clock.now -= 1.0
    one, other = lines(log.path)
    assert one == other and one["loss"] == 2.0 and one["lpl_gradient_cosine/0.05_to_0.1"] == pytest.approx(-0.075)


def test_a_validation_that_comes_again_is_there_once(logging):
    """Killed behind it, but before the checkpoint knew of it; a training entry without a loss stays."""
    log = logging(debug_loss=True)
    for step, loss in ((1, 1.0), (2, float("nan"))):
        add(log, loss, step=step, samples={step: 1.0})
        log.write(step, 1e-4)
        log.validation(step, {"validation_loss": 3.0 - step})
    kept = log.records()
    assert logging(first_step=2).records() == kept
    resumed = logging(first_step=2, looked=False)
    assert resumed.records() == kept[:3] and len(lines(resumed.samples_path)) == 2


def test_a_new_run_begins_a_new_log(logging):
    log = logging(debug_loss=True)
    log.validation(0, {"validation_loss": 3.0})
    add(log, samples={0: 1.0})
    log.write(1, 1e-4)
    assert lines(log.samples_path)
    fresh = logging()
    assert fresh.records() == [] and fresh.samples_path.read_text() == ""


def test_validation_has_an_entry_of_its_own(logging):
    log = logging()
    log.validation(7, {"validation_loss": 0.5, "validation_lpl": 0.25})
    assert lines(log.path) == [{"step": 7, "validation_loss": 0.5, "validation_lpl": 0.25}]
    assert log.tracker.logged == [({"validation_loss": 0.5, "validation_lpl": 0.25}, 7)]


def test_losses_of_samples(logging):
    log = logging(debug_loss=True)
    add(log, samples={5: 0.5, 2**40 + 1: 0.25})
    add(log, samples={7: 1.5, 8: 1.25})
    add(log, step=2, samples={9: 2.0})
    assert not log.samples_path.exists()  # written with the next entry
    log.write(2, 1e-4)
    expected = [(1, 5, 0.5), (1, 2**40 + 1, 0.25), (1, 7, 1.5), (1, 8, 1.25), (2, 9, 2.0)]
    assert lines(log.samples_path) == [{"step": s, "image": i, "loss": e} for s, i, e in expected]
    add(log, step=3, samples={1: 1.0})
    log.write(3, 1e-4)
    assert len(lines(log.samples_path)) == 6  # the others once


def test_samples_of_several_processes_are_in_the_order_of_steps(logging):
    log = logging(debug_loss=True)
    for step in (1, 2):
        add(log, step=step, samples={step: 0.5})
    log.accelerator.gather = lambda rows: torch.cat([rows, rows + torch.tensor([0, 10, 0])])
    log.write(2, 1e-4)
    assert [(entry["step"], entry["image"]) for entry in lines(log.samples_path)] == [(1, 1), (1, 11), (2, 2), (2, 12)]


def test_without_debug_loss_there_is_no_file_of_samples(logging):
    log = logging()
    add(log)
    log.write(1, 1e-4)
    assert not log.samples_path.exists()


# Trackers


def test_trackers_are_given_the_flags_in_kinds_that_they_take_and_no_token(logging):
    log = logging(hub_token="secret", push_to_hub=True, validation_prompts=["a", "b"])
    (configuration,) = log.tracker.configurations
    assert configuration["seed"] == 0 and configuration["lpl_weight"] == "auto:0.2"
    assert all(isinstance(value, bool | int | float | str) for value in configuration.values())
    assert "secret" not in str(configuration) and "hub_token" not in configuration


def test_accelerates_own_tensorboard_takes_all_of_it(sd_pipeline, image_folder, tmp_path, cpu):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", validation_prompts=["a", "b"])
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    log = log_of(config, 0, accelerator, Length(4, 100, 100))
    add(log, by_block=[[0.5, 0.0], [1.0, 0.9]])
    log.write(1, 1e-4)
    log.validation(1, {"validation_loss": 0.5})
    Image.new("RGB", (8, 6), "teal").save(tmp_path / "grid.png")
    log_image(accelerator, tmp_path / "grid.png", 1)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / config.validation.tracker_project_name)).Reload()
    expected = {"loss", "lpl", "lpl/mid", "kept/up_0", "lpl_gradient_share", "images_per_second", "validation_loss"}
    assert expected <= set(events.Tags()["scalars"])
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
