"""After a step: a checkpoint and a validation where they are due, and a checkpoint where the run ends early."""

import signal

import pytest
import torch
from runs import run_of
from trainer import parsed

from lpl.training.checkpoints import Progress, checkpoint_path, find_checkpoints
from lpl.training.log import Log
from lpl.training.pauses import Pauses
from lpl.training.preemption import Preemption
from lpl.training.start import Length
from lpl.training.validation import Samples, Validation


class Metrics:
    """A metric that keeps what is on the disk at its time; `then` is called in it."""

    def __init__(self, folder, then):
        self.folder, self.then, self.seen = folder, then, []

    def run(self, accelerator, trained, average, step):
        self.seen.append([(path.name, Progress.load(path).looked) for path in find_checkpoints(self.folder)])
        self.then()
        return {"fid": 1.0}


class Order:
    def positions(self, batch):
        return [[batch, 1]]


@pytest.fixture
def pausing(state, sd_pipeline, image_folder, tmp_path):
    """`pausing(step, **flags)`: a run of 10 steps after one of them, and its pauses; checkpoints come every 2nd step,
    metrics every 3rd. What is published is in `published`."""

    def make(step, then=lambda: None, **flags):
        published_at = {"push_to_hub": True, "hub_strategy": "checkpoint"}
        flags = {"checkpointing_steps": 2, "logging_steps": 100} | published_at | flags
        config, _ = parsed(sd_pipeline, image_folder, tmp_path / "out", **flags)
        run = run_of(config, step, state.accelerator, looked=True)  # as after an earlier validation
        length = Length(2, 10, 4)
        log = Log(run, length, config.validation, config.output)
        samples = Samples(run.folder / "samples", None, None, config.validation, ((32, 32),), 0, (), ())
        validation = Validation(
            samples=samples,
            held_out=None,
            metrics=Metrics(run.folder, then),
            every=100,
            metrics_every=3,
            max_steps=10,
            trained=None,
            average=None,
            log=log,
            preemption=Preemption(state.accelerator),
            now=lambda stage, step: None,
        )
        published = []
        pauses = Pauses(state, Order(), log, validation, config.output, lambda *given: published.append(given))
        pauses.published = published
        return run, pauses

    return make


def on_disk(run):
    """Steps of the checkpoints, and whether their validation is done."""
    return [(Progress.load(path).step, Progress.load(path).looked) for path in find_checkpoints(run.folder)]


def test_pauses_are_due_at_checkpoints_validations_and_the_end(pausing):
    run, pauses = pausing(0)
    due = []
    for run.step in range(1, 11):
        due += [run.step] if pauses.are_due(run) else []
    assert due == [2, 3, 4, 6, 8, 9, 10]
    run.step, run.ending = 5, True
    assert pauses.are_due(run)


def test_a_checkpoint_that_is_due_is_saved_and_then_marked_as_validated(pausing):
    run, pauses = pausing(6)
    pauses.take(run)
    assert pauses.validation.metrics.seen == [[("checkpoint-6", False)]]  # it is whole before the validation
    assert on_disk(run) == [(6, True)] and not run.ending
    assert pauses.published == [(checkpoint_path(run.folder, 6), 6, False)]
    assert [record["step"] for record in pauses.log.records()] == [6]


def test_where_nothing_is_validated_the_checkpoint_says_that_too(pausing):
    run, pauses = pausing(2)
    pauses.take(run)
    assert on_disk(run) == [(2, True)] and pauses.validation.metrics.seen == []


def test_a_validation_alone_saves_and_publishes_nothing(pausing):
    run, pauses = pausing(3)
    pauses.take(run)
    assert pauses.validation.metrics.seen == [[]]
    assert on_disk(run) == [] and pauses.published == [] and not run.ending


@pytest.mark.parametrize("step", [5, 6, 9])
def test_a_run_that_ends_early_saves_and_does_not_validate(pausing, step):
    run, pauses = pausing(step)
    run.ending = True
    pauses.take(run)
    assert on_disk(run) == [(step, False)] and pauses.validation.metrics.seen == []
    assert pauses.published == [(checkpoint_path(run.folder, step), step, True)]


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_during_a_validation_ends_the_run_with_a_checkpoint(pausing, step):
    def asked():
        pauses.validation.preemption.received = signal.SIGTERM

    run, pauses = pausing(step, then=asked)
    pauses.take(run)
    assert run.ending and on_disk(run) == [(step, False)]
    assert pauses.published == [(checkpoint_path(run.folder, step), step, True)]


def test_a_checkpoint_holds_all_that_the_run_goes_on_with(pausing):
    run, pauses = pausing(2)
    pauses.state.accelerator.gradient_accumulation_steps = 3
    pauses.log._sums["losses"] += torch.arange(6.0)
    expected = [row[2:] for row in pauses.log.state()]  # without the time
    pauses.take(run)
    progress = Progress.load(checkpoint_path(run.folder, 2))
    assert (progress.stream, progress.skipped) == ([[6, 1]], 0)
    assert [row[2:] for row in progress.log] == expected and progress.log[0][2:8] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_old_checkpoints_are_deleted(pausing):
    run, pauses = pausing(0, checkpoints_total_limit=2)
    for run.step in (2, 4, 6):
        pauses.take(run)
    assert on_disk(run) == [(4, True), (6, True)]
