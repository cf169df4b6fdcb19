"""Parts of a run, on tiny models or on none."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from runs import run_of
from torch import nn
from trainer import parsed, reset_accelerate

from lpl.config import Config
from lpl.config.groups import Optimization
from lpl.config.prompts import text_of
from lpl.families import Family
from lpl.training.average import MovingAverage
from lpl.training.checkpoints import TrainingState
from lpl.training.loading import load_family
from lpl.training.optimizers import optimizer_by_path
from lpl.training.parts import TrainedParts
from lpl.training.sampling import draws_of, sample
from lpl.training.updates import Updates
from lpl.training.validation import Samples


@pytest.fixture
def cpu(monkeypatch):
    """Accelerators start on the CPU, and know nothing of those of other tests."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()
    yield
    reset_accelerate()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def nothing(accelerator):
    """The state of a run without weights."""
    saves = {"not_finite": lambda: None, "save": lambda folder: None, "state_dict": dict}
    empty = SimpleNamespace(**saves, sharded=False, averaging=None)
    return TrainingState(accelerator, empty, None, empty, empty)


@pytest.fixture
def state(cpu):
    """One that has nothing to save."""
    return nothing(Accelerator())


# Optimizers ----------------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Two parameters, one of them large enough to be kept in 8 bits."""

    sharded = lora = False
    averaging: Any = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(64, 128))

    def weights(self):
        return [self.small, self.large]


@pytest.fixture
def updates(cpu):
    """`updates(kind, **changes)`: weights, and what moves them."""

    def make(kind="adamw", max_grad_norm=1.0, foreach=False):
        weights, accelerator = Weights(), Accelerator()
        groups = [{"params": [weights.small]}, {"params": [weights.large], "lr": 3e-3}]
        if kind == "prodigy":
            groups[1]["lr"] = 1.0  # it takes one for all
            optimizer = pytest.importorskip("prodigyopt").Prodigy(groups, lr=1.0)
        elif kind == "8bit":
            optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-2)
        elif ":" in kind:
            path, *arguments = kind.split()
            pytest.importorskip(path.partition(":")[0])
            optimization = Optimization(optimizer=path, optimizer_args=tuple(arguments))
            optimizer = optimizer_by_path(optimization, groups, {"lr": 1e-2})
        else:
            optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        optimizer = accelerator.prepare(optimizer)
        average = MovingAverage(weights.weights(), decay=0.9, foreach=foreach)
        return weights, Updates(accelerator, weights, optimizer, schedule, 20, average, max_grad_norm)

    return make


# Samples -------------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """A tiny model, and what it is sampled with."""

    config: Config
    family: Family
    trained: TrainedParts
    scheduler: Any

    def samples(self, *prompts, names=None):
        config = self.config
        return Samples(
            Path(config.output.output_dir, "samples"),
            self.family,
            self.scheduler,
            config.validation,
            config.optimization.seed,
            self.draws(*prompts, names=names),
        )

    def draws(self, *prompts, names=None):
        config = self.config
        asked = replace(config.validation, validation_prompts=prompts)
        texts = [text_of(prompt) for prompt in prompts]
        return draws_of(asked, texts, names or texts, (config.data.size,), config.optimization.seed)

    def draw(self, *prompts, step, average=None, names=None):
        """Samples that were drawn after a step."""
        samples = self.samples(*prompts, names=names)
        samples.draw(run_of(self.config, step), self.trained, average)
        return samples

    def images(self, *prompts):
        return sample(self.family, self.scheduler, self.draws(*prompts), Accelerator())


@pytest.fixture
def sampling(sd_pipeline, image_folder, tmp_path, cpu):
    config, description = parsed(sd_pipeline, image_folder, tmp_path)
    family = load_family(config.model, config.lora, description, torch.float32)
    return Sampling(config, family, TrainedParts(family, config.lora), description.scheduler)
