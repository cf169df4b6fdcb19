"""Optimizers and schedules by the path of their class: what is accepted, and what they train."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lpl.config.groups import Optimization
from lpl.diagnosis.needs import optimizer_bytes
from lpl.training.average import averaged
from lpl.training.optimizers import (
    MatricesApart,
    Trial,
    check_optimizer,
    factors,
    name_of,
    optimizer_by_path,
    tried,
)


SCHEDULE = "torch.optim.lr_scheduler:"


def of(optimizer="AdamW", *arguments, **flags):
    return Optimization(optimizer=optimizer, optimizer_args=arguments or None, **flags)


def scheduled(name, *arguments, **flags):
    return Optimization(lr_scheduler=SCHEDULE + name, lr_scheduler_args=arguments or None, **flags)


@pytest.mark.parametrize(
    "optimization, said",
    [
        (of("no_such_package.optim:Lion"), "--optimizer no_such_package.optim:Lion: it needs no_such_package: pip "),
        (of("torch.no_such:Adam"), "--optimizer torch.no_such:Adam: No module named 'torch.no_such'; accepted is"),
        (of("torch.optim:NoSuch"), "cannot be imported (module 'torch.optim' has no attribute 'NoSuch'); accepted is"),
        (of("torch.nn:Linear"), "--optimizer torch.nn:Linear: this is no class of torch.optim.optimizer.Optimizer"),
        (of(":Adam"), "--optimizer :Adam: it cannot be imported"),
        (of("torch.optim:LBFGS"), "--optimizer torch.optim:LBFGS: it computes the loss several times a step"),
        (of("torch.optim:SparseAdam"), "--optimizer torch.optim:SparseAdam: its step fails here"),
        (
            of("torch.optim:Adam", "beta=0.9"),
            "--optimizer_args beta=0.9: --optimizer torch.optim:Adam cannot be made (Adam.__init__() got an "
            "unexpected keyword argument 'beta'); accepted is betas, eps, weight_decay, amsgrad",
        ),
        (of("torch.optim:Adam", "eps=-1"), "--optimizer_args eps=-1: --optimizer torch.optim:Adam cannot be made"),
        (
            of("torch.optim:AdamW", "weight_decay=1e200"),
            "--optimizer_args weight_decay=1e200: --optimizer torch.optim:AdamW makes a weight of 1 infinite or NaN",
        ),
        (scheduled("ReduceLROnPlateau"), f"--lr_scheduler {SCHEDULE}ReduceLROnPlateau: it follows a metric"),
        (scheduled("StepLR"), f"--lr_scheduler_args (none): --lr_scheduler {SCHEDULE}StepLR cannot be made"),
        (scheduled("StepLR", "stepsize=3"), "accepted is step_size, gamma"),
        (scheduled("LambdaLR"), f"--lr_scheduler {SCHEDULE}LambdaLR: its lr_lambda takes objects or functions, which"),
        (scheduled("MultiplicativeLR"), "its lr_lambda takes objects or functions"),
        (scheduled("SequentialLR", "milestones=[2]"), "its schedulers takes objects or functions"),
        (scheduled("ChainedScheduler"), "its schedulers takes objects or functions"),
        (Optimization(lr_scheduler="torch.optim:Adam"), "--lr_scheduler torch.optim:Adam: this is no class of"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_flag(optimization, said):
    with pytest.raises(ValueError) as error:
        check_optimizer(optimization)
    assert said in str(error.value)


def test_an_average_of_averages_is_refused():
    pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="--use_ema: --optimizer schedulefree:AdamWScheduleFree averages by itself"):
        check_optimizer(of("schedulefree:AdamWScheduleFree", use_ema=True))


def test_flags_of_adamw_are_not_those_of_others():
    with pytest.warns(
        UserWarning, match="--adam_beta1 has no effect on --optimizer torch.optim:SGD; see --optimizer_"
    ):
        check_optimizer(of("torch.optim:SGD"), ["adam_beta1", "learning_rate"])
    check_optimizer(of("torch.optim:Muon"), ["adam_beta1"])  # no warning: AdamW has the other weights


def test_one_step_shows_what_a_class_is():
    assert tried(of("torch.optim:SGD")) == Trial(matrices_only=False, averages=False, share=0.0)
    assert tried(of("torch.optim:SGD", "momentum=0.9")).share == 1.0
    assert tried(of("torch.optim:Muon")) == Trial(matrices_only=True, averages=False, share=1.0)
    assert tried(of("torch.optim:Adafactor")).share < 0.1


def test_the_state_is_estimated_from_that_step():
    weights = [torch.empty(300, 200), torch.empty(200)]
    assert optimizer_bytes(weights, of("torch.optim:Muon")) == 4 * (300 * 200 + 2 * 200)
    assert optimizer_bytes(weights, of("torch.optim:RMSprop")) == pytest.approx(4 * (300 * 200 + 200), rel=1e-3)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(2, 2, 3), nn.Linear(4, 5)


def test_matrices_alone_go_to_muon():
    model = Conv()
    groups = [
        {"params": list(model.convolution.parameters())},
        {"params": list(model.linear.parameters()), "lr": 0.3, "weight_decay": 0.5},
    ]
    adam = {"lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.2, "eps": 1e-4}
    made = optimizer_by_path(of("torch.optim:Muon", "momentum=0.5"), groups, adam)
    assert isinstance(made, MatricesApart) and name_of(made) == "Muon for matrices, AdamW for the rest"
    found = [(sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in made.param_groups]
    assert found == [(20, 0.3, 0.1), (36 + 2, 0.1, 0.2), (5, 0.3, 0.5)]
    assert made.param_groups[0]["momentum"] == 0.5 and made.param_groups[1]["betas"] == (0.5, 0.6)
    only = optimizer_by_path(of("torch.optim:Muon"), [{"params": [model.linear.weight]}], adam)
    assert type(only) is torch.optim.Muon
    with pytest.raises(ValueError, match="it trains matrices only, and there is none"):
        optimizer_by_path(of("torch.optim:Muon"), [{"params": [model.linear.bias]}], adam)


def test_an_average_of_the_optimizer_is_seen_within_and_leaves_no_trace(updates):
    pytest.importorskip("schedulefree")
    weights, made = updates("schedulefree:AdamWScheduleFree")
    trained = SimpleNamespace(copies=None, averaging=weights.averaging, weights=weights.weights)
    for _ in range(5):
        for parameter in weights.weights():
            parameter.grad = torch.randn_like(parameter)
        made.step()
    before = [weight.detach().clone() for weight in weights.weights()]
    state = [made.optimizer.state[weight]["z"] for weight in weights.weights()]
    with averaged(None, trained):  # x = y + (1 - 1/beta) (z - y)
        seen = [weight.detach().clone() for weight in weights.weights()]
        with pytest.raises(Exception, match="train mode"):
            made.optimizer.optimizer.step()
    for x, y, z in zip(seen, before, state, strict=True):
        torch.testing.assert_close(x, y + (1 - 1 / 0.9) * (z - y))
        assert not torch.equal(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, weights.weights(), strict=True))


def test_a_schedule_is_read_as_factors():
    assert factors(scheduled("StepLR", "step_size=2", "gamma=0.5"), 4) == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert factors(scheduled("LinearLR", "start_factor=0.5", "total_iters=2"), 3) == [0.5, 0.75, 1.0, 1.0]
    cosine = scheduled("CosineAnnealingLR", "T_max=4", "eta_min=1e-5", learning_rate=1e-3)
    assert factors(cosine, 4) == pytest.approx([1.0, 0.855, 0.505, 0.155, 0.01], abs=1e-3)  # down to 1e-5
    cycle = ("max_lr=1e-2", "total_steps=4", "cycle_momentum=false")
    cycle = scheduled("OneCycleLR", *cycle, learning_rate=1e-2)
    assert factors(cycle, 4)[:4] == pytest.approx([0.04, 0.812, 0.283, 4e-6], abs=1e-3)
    with pytest.raises(
        ValueError, match="OneCycleLR: it ends after 4 steps, and the run has 6; change --lr_scheduler"
    ):
        factors(cycle, 6)


@pytest.mark.parametrize(
    "optimization, said",
    [
        (scheduled("StepLR", "step_size=1", "gamma=-1"), "StepLR gives step 2 the learning rate -0.0001; it must"),
        (scheduled("StepLR", "step_size=1", "gamma=.nan"), "StepLR gives step 2 the learning rate nan"),
        (scheduled("ExponentialLR", "gamma=1e200"), "--lr_scheduler_args gamma=1e200: --lr_scheduler torch.opt"),
        (scheduled("StepLR", "step_size=0"), "--lr_scheduler_args step_size=0: --lr_scheduler torch.optim.lr_sched"),
    ],
)
def test_a_schedule_without_usable_learning_rates_is_refused(optimization, said):
    with pytest.raises(ValueError) as error:
        factors(optimization, 4)
    assert said in str(error.value)


def test_a_schedule_may_end_at_zero_with_rounding():
    for start in (0.1, 0.3, 0.7, 1.0):
        table = factors(scheduled("LinearLR", f"start_factor={start}", "end_factor=0", "total_iters=7"), 9)
        assert table[-1] == pytest.approx(0, abs=1e-12)
