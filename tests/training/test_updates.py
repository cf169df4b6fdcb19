"""An optimizer step follows the schedule and goes on from a checkpoint; one that is not finite changes nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainer import reset_accelerate

from lpl.config.groups import Optimization
from lpl.tools.files import load_state, save_state
from lpl.training.updates import make_optimizer


OPTIMIZERS = [
    *("adamw", "8bit", "prodigy", "torch.optim:AdamW", "torch.optim:AdamW fused=true", "torch.optim:Adafactor"),
    *("torch.optim:Muon adjust_lr_fn=match_rms_adamw", "torch.optim:SGD momentum=0.9", "bitsandbytes.optim:Lion8bit"),
    *("bitsandbytes.optim:PagedAdamW8bit", "schedulefree:AdamWScheduleFree", "schedulefree:SGDScheduleFree"),
]


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
        *(tensor.clone() for tensor in [*weights.weights(), *state, *updates.average.shadow_params, updates.count]),
        updates.average.count.clone(),
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
    assert made.count == 2 and made.average.count == 2
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


@pytest.mark.parametrize("given, steps", [(0, 0), (0.0, 0), (0.1, 21), (0.999, 200), (1, 1), (500, 500), (7.0, 7)])
def test_a_warm_up_is_a_number_of_steps_or_a_share_of_the_run(given, steps):
    assert Optimization(lr_warmup_steps=given).warmup_steps(201 if given == 0.1 else 200) == steps


@pytest.mark.parametrize("flags", [{"use_8bit_adam": True}, {"optimizer": "bitsandbytes.optim:Lion8bit"}], ids=str)
def test_states_in_8_bits_lie_in_memory_as_they_are_saved(flags):
    """On a GPU their kernels take numbers as they lie, and make the weights contiguous in the first step."""
    pytest.importorskip("bitsandbytes")
    model = nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last)
    trained = SimpleNamespace(denoiser=model, text_encoders=[], parameters_of=lambda part: list(part.parameters()))
    optimizer = make_optimizer(Optimization(**flags), trained, 1)
    model(torch.randn(1, 32, 8, 8)).sum().backward()
    optimizer.step()
    weight = model.weight
    assert weight.is_contiguous() and optimizer.state[weight]["state1"].is_contiguous()
