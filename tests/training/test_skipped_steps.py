"""A step whose loss or gradient is NaN or infinite changes nothing, is named, and does not last for ever."""

import gc
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import debug_launcher
from diffusers import UNet2DConditionModel
from trainer import metrics, same, script, train, weights

from lpl.data.bad_samples import BadSamples
from lpl.training.checkpoints import Progress
from lpl.training.preemption import Preemption
from lpl.training.skipped_steps import SkippedSteps
from lpl.training.updates import Updates


def spoilt(monkeypatch, *calls, value=math.nan, term="errors"):
    """Those micro-batches, counted from 0, have a sample whose loss is not finite."""
    original, count = script.Losses.__call__, iter(range(10**6))

    def call(self, model, batch, with_lpl, correction=0):
        terms = original(self, model, batch, with_lpl, correction)
        if next(count) in calls:
            if term == "errors":
                terms.errors = terms.errors * torch.tensor([1.0, value])
            else:
                terms.lpl = terms.lpl * value
                terms.by_row = torch.tensor([0]), torch.tensor([value])
        return terms

    monkeypatch.setattr(script.Losses, "__call__", call)


FLAGS = {
    "train_batch_size": 2,
    "max_train_steps": 4,
    "use_ema": True,
    "ema_decay": 0.5,
    "logging_steps": 2,
    "checkpointing_steps": 1,
    "lpl_sigma_threshold": 1000,
    "seed": 1,
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("term, said", [("errors", "diffusion loss of image"), ("lpl", "LPL of image")])
def test_such_a_step_is_named_and_leaves_no_trace(
    sd_pipeline, image_folder, tmp_path, monkeypatch, caplog, term, said, accumulation
):
    spoilt(monkeypatch, 2 * accumulation, term=term)  # the third step
    with caplog.at_level(logging.WARNING):
        train(sd_pipeline, image_folder, tmp_path, **FLAGS, gradient_accumulation_steps=accumulation)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert f"step 3 changed nothing: {said}" in text and "at timestep" in text
    assert "1 of the last 1 step changed nothing, 1 of at most 100 (--max_skipped_steps) so far" in text
    assert "diverged" not in text
    assert "| Steps | 4, of which 1 changed nothing (" in (tmp_path / "README.md").read_text()
    for part in ("unet", "ema/unet"):
        second, third, fourth = (weights(tmp_path / f"checkpoint-{step}" / part) for step in (2, 3, 4))
        assert same(second, third) and not same(third, fourth)
        assert all(tensor.isfinite().all() for tensor in fourth.values())
    assert all(math.isfinite(value) for record in metrics(tmp_path) for value in record.values())


def test_too_many_of_them_end_the_run(sd_pipeline, image_folder, tmp_path, monkeypatch, capsys):
    spoilt(monkeypatch, *range(1, 10**4))
    flags = FLAGS | {"max_train_steps": 10, "checkpointing_steps": 10}
    with pytest.raises(SystemExit) as end:
        train(sd_pipeline, image_folder, tmp_path, **flags, max_skipped_steps=2)
    assert "--max_skipped_steps 2: 3 steps" in str(end.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "checkpoint-4/unet").values())


def test_they_are_counted_on_at_a_resume(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """Also those between two entries of the log, where a validation or a signal saves the run."""
    flags = FLAGS | {"logging_steps": 100, "checkpointing_steps": 100, "max_train_steps": 8, "max_skipped_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spoilt(patch, 0)
        asked, calls = Preemption.asked, iter(range(100))
        patch.setattr(Preemption, "asked", lambda self: asked(self) or next(calls) > 1)  # first before training
        train(sd_pipeline, image_folder, tmp_path, **flags)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert Progress.load(checkpoint).skipped == 1
    spoilt(monkeypatch, 1)
    with pytest.raises(SystemExit, match="--max_skipped_steps 1: 2 steps"):
        train(sd_pipeline, image_folder, tmp_path, **flags, resume_from_checkpoint="latest")


def test_a_checkpoint_that_knows_nothing_of_them_still_loads(tmp_path):
    (tmp_path / "progress.json").write_text('{"step": 3, "seed": 1, "looked": true, "log": [], "stream": []}')
    assert Progress.load(tmp_path).skipped == 0


def test_they_are_named_where_bad_samples_end_the_run(sd_pipeline, image_folder, tmp_path, monkeypatch, caplog):
    spoilt(monkeypatch, 0)
    monkeypatch.setattr(BadSamples, "write", lambda self: "too many bad samples")
    with pytest.raises(SystemExit, match="too many bad samples"):
        train(sd_pipeline, image_folder, tmp_path, **FLAGS | {"logging_steps": 1})
    assert "step 1 changed nothing" in caplog.text


def one_of_two(pipeline, images, folder):
    """A process of two; the loss of the second one is not finite in the third step."""
    rank, patch, skipped, step = torch.distributed.get_rank(), pytest.MonkeyPatch(), [], Updates.step
    if rank == 1:
        spoilt(patch, 2)
    patch.setattr(Updates, "step", lambda self: (step(self), skipped.append(int(self.skipped))))
    train(pipeline, images, folder, **FLAGS)
    folder.with_name(f"skipped-{rank}").write_text(str(skipped))


def test_two_processes_skip_together(sd_pipeline, image_folder, tmp_path):
    gc.collect()
    debug_launcher(one_of_two, args=(sd_pipeline, image_folder, tmp_path / "run"), num_processes=2)
    assert [(tmp_path / f"skipped-{rank}").read_text() for rank in range(2)] == ["[0, 0, 1, 0]"] * 2
    for part in ("unet", "ema/unet"):
        second, third, fourth = (weights(tmp_path / f"run/checkpoint-{step}" / part) for step in (2, 3, 4))
        assert same(second, third) and not same(third, fourth)


@pytest.mark.parametrize("every", [1, 100])  # a checkpoint, and the result
def test_weights_that_are_not_finite_are_never_saved(every, sd_pipeline, image_folder, tmp_path, monkeypatch):
    original = Updates.step

    def step(self):
        original(self)
        self.parameters[0].data.fill_(math.nan)

    monkeypatch.setattr(Updates, "step", step)
    with pytest.raises((FloatingPointError, SystemExit), match="not finite any more"):
        train(sd_pipeline, image_folder, tmp_path, **FLAGS | {"checkpointing_steps": every})
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "unet").exists()


def test_a_loss_scale_that_is_still_sought_is_no_fault(caplog):
    """fp16 skips steps whose gradients overflow, until the scale of its loss is low enough."""
    scale = SimpleNamespace(get_scale=lambda: scale.value, value=2.0**14)
    steps = SkippedSteps(SimpleNamespace(num_processes=1, scaler=scale), 0)
    steps.end_step(1, torch.tensor(1.0))
    assert steps.write() is None and not caplog.records and steps.count == 0
    scale.value = 0.5
    steps.end_step(2, torch.tensor(1.0))
    assert "--max_skipped_steps 0: 1 step had" in steps.write() and "step 2 changed nothing: a gradient" in caplog.text


def test_weights_of_a_pipeline_that_are_not_finite_are_refused(sd_pipeline, image_folder, tmp_path):
    broken = shutil.copytree(sd_pipeline, tmp_path / "broken")
    unet = UNet2DConditionModel.from_pretrained(broken / "unet")
    next(unet.parameters()).data[0] = math.nan
    unet.save_pretrained(broken / "unet")
    with pytest.raises(SystemExit, match="weights of unet are not finite"):
        train(broken, image_folder, tmp_path / "run", **FLAGS)


def test_many_skipped_steps_are_called_by_their_name(caplog):
    steps = SkippedSteps(SimpleNamespace(num_processes=1, scaler=None), 100)
    for report in ([1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 1, 0]):
        assert "diverged" not in caplog.text
        for step, skipped in enumerate(report):
            steps.end_step(step, torch.tensor(float(skipped)))
        assert steps.write() is None
    said = "4 of the last 6 steps changed nothing, 7 of at most 100 (--max_skipped_steps) so far; the weights have"
    assert said in caplog.text and "lower --learning_rate" in caplog.text
