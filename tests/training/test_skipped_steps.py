"""A step whose loss or gradient is NaN or infinite changes nothing, is named, and does not last for ever."""

import gc
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from torch import nn
from trainer import metrics, reset_accelerate, same, script, train, weights

from lpl.data.bad_samples import BadSamples
from lpl.training import updates as optimizers
from lpl.training.average import MovingAverage
from lpl.training.checkpoints import Progress
from lpl.training.preemption import Preemption
from lpl.training.updates import Updates


OPTIMIZERS = ["adamw", "8bit", "prodigy"]


class Weights(nn.Module):
    """Two parameters, one of them large enough to be kept in 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(64, 128))

    def weights(self):
        return [self.small, self.large]


@pytest.fixture
def updates(monkeypatch):
    """`updates(kind, **changes)`: weights, and what moves them."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()

    def make(kind="adamw", max_grad_norm=1.0, foreach=False):
        weights, accelerator = Weights(), Accelerator()
        groups = [{"params": [weights.small]}, {"params": [weights.large], "lr": 3e-3}]
        if kind == "prodigy":
            groups[1]["lr"] = 1.0  # it takes one for all
            optimizer = pytest.importorskip("prodigyopt").Prodigy(groups, lr=1.0)
        elif kind == "8bit":
            optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        optimizer = accelerator.prepare(optimizer)
        ema = MovingAverage(weights.weights(), decay=0.9, foreach=foreach)
        return weights, Updates(accelerator, weights, optimizer, schedule, 20, ema, max_grad_norm)

    yield make
    reset_accelerate()


def take(weights, updates, gradients):
    """Steps with those gradients, each a number that all of them are times a fixed direction."""
    for step, value in enumerate(gradients):
        for parameter in weights.weights():
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step if value else 99))
            parameter.grad = direction if value is None else direction * value
        updates.step()


def everything(weights, updates):
    """All that a step changes."""
    state = [x for values in updates.optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    groups = [value for group in updates.optimizer.param_groups for key, value in group.items() if key != "params"]
    return [
        *(tensor.clone() for tensor in [*weights.weights(), *state, *updates.ema.shadow_params, updates.count]),
        updates.ema.count.clone(),
        *(value.clone() if isinstance(value, torch.Tensor) else value for value in groups),
    ]


def equal(one, other):
    assert len(one) == len(other)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_nothing(updates, kind, max_grad_norm, value):
    weights, made = updates(kind, max_grad_norm)
    take(weights, made, [1.0, 1.0])
    before = everything(weights, made)
    for parameter in weights.weights():
        parameter.grad = torch.ones_like(parameter)
    weights.large.grad[3, 4] = value
    made.step()
    assert made.skipped == 1
    after = everything(weights, made)
    # The learning rate is already that of the next step.
    numbers = [index for index, entry in enumerate(before) if isinstance(entry, torch.Tensor) and entry.numel() > 1]
    assert numbers and all(torch.equal(before[index], after[index]) for index in numbers)
    assert made.count == 2 and made.ema.count == 2
    take(weights, made, [1.0])
    assert made.skipped == 0 and made.count == 3 and not equal(everything(weights, made), after)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_with_such_steps_is_the_run_without_them(updates, kind, foreach):
    """Bit for bit, whenever they come: weights, optimizer, schedule and average."""
    weights, clean = updates(kind, foreach=foreach)
    for step in range(4):
        for parameter in weights.weights():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        clean.step()
    expected = everything(weights, clean)
    weights, spoilt = updates(kind, foreach=foreach)
    for step in range(4):
        for bad in (True, True, False) if step in (0, 2) else (False,):
            for parameter in weights.weights():
                parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0 + step)
            spoilt.step()
    assert equal(everything(weights, spoilt), expected)


def test_the_learning_rate_follows_the_schedule(updates):
    weights, made = updates()
    rates = []
    for _ in range(3):
        take(weights, made, [1.0])
        rates.append([float(group["lr"]) for group in made.optimizer.param_groups])
    assert rates == [pytest.approx([1e-2 / (1 + step), 3e-3 / (1 + step)]) for step in range(3)]
    assert made.learning_rate == rates[-1][0]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_saved_goes_on(updates, kind, tmp_path):
    from lpl.tools.files import load_state, save_state

    weights, made = updates(kind)
    take(weights, made, [1.0, 1.0])
    save_state(made.state_dict(), tmp_path / "state.safetensors")
    kept = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    take(weights, made, [1.0, 1.0])
    expected = [tensor.detach().clone() for tensor in weights.weights()]
    reset_accelerate()
    weights, made = updates(kind)
    weights.load_state_dict(kept)
    made.load_state_dict(load_state(tmp_path / "state.safetensors"))
    take(weights, made, [1.0, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(weights.weights(), expected, strict=True)) and made.count == 4


def test_the_average_is_that_of_diffusers(updates):
    from diffusers.training_utils import EMAModel

    weights, made = updates()
    theirs = EMAModel(weights.weights(), decay=0.9)
    for _ in range(15):
        take(weights, made, [1.0])
        theirs.step(weights.weights())
    for ours, other in zip(made.ema.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


# A run


def spoilt(monkeypatch, *calls, value=math.nan, term="errors"):
    """Those micro-batches, counted from 0, have a sample whose loss is not finite."""
    original, count = script.Losses.__call__, iter(range(10**6))

    def call(self, model, batch, with_lpl):
        terms = original(self, model, batch, with_lpl)
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
    assert "1 steps changed nothing so far, of at most 100 (--max_skipped_steps)" in text
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
    """Also those between two entries of the log, where a look or a signal saves the run."""
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


def test_weights_that_are_not_finite_are_never_saved(sd_pipeline, image_folder, tmp_path, monkeypatch):
    original = optimizers.Updates.step

    def step(self):
        original(self)
        self.parameters[0].data.fill_(math.nan)

    monkeypatch.setattr(optimizers.Updates, "step", step)
    with pytest.raises((FloatingPointError, SystemExit), match="not finite any more"):
        train(sd_pipeline, image_folder, tmp_path, **FLAGS)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_loss_scale_that_is_still_sought_is_no_fault(caplog):
    """fp16 skips steps whose gradients overflow, until the scale of its loss is low enough."""
    from lpl.training.skipped_steps import SkippedSteps

    scale = SimpleNamespace(get_scale=lambda: scale.value, value=2.0**14)
    steps = SkippedSteps(SimpleNamespace(num_processes=1, scaler=scale), 0)
    steps.end_step(1, torch.tensor(1.0))
    assert steps.write() is None and not caplog.records and steps.count == 0
    scale.value = 0.5
    steps.end_step(2, torch.tensor(1.0))
    assert "--max_skipped_steps 0: 1 steps" in steps.write() and "step 2 changed nothing: a gradient" in caplog.text


def test_weights_of_a_pipeline_that_are_not_finite_are_refused(sd_pipeline, image_folder, tmp_path):
    import shutil

    from diffusers import UNet2DConditionModel

    broken = shutil.copytree(sd_pipeline, tmp_path / "broken")
    unet = UNet2DConditionModel.from_pretrained(broken / "unet")
    next(unet.parameters()).data[0] = math.nan
    unet.save_pretrained(broken / "unet")
    with pytest.raises(SystemExit, match="weights of unet are not finite"):
        train(broken, image_folder, tmp_path / "run", **FLAGS)
