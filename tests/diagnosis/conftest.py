"""Runs before their first step, and in the middle of one, on tiny pipelines."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from runs import run_of
from trainer import parsed, reset_accelerate

from lpl.diagnosis import remedies
from lpl.diagnosis.plan import Plan
from lpl.diagnosis.status import Stage, Status
from lpl.training import preflight
from lpl.training.loading import load_family
from lpl.training.parts import TrainedParts
from lpl.training.start import Length, open_images


def trained_parts(config, description, dtype=torch.float32):
    return TrainedParts(
        load_family(config.model, config.lora, description, dtype),
        config.lora,
        text_encoders=config.model.train_text_encoder,
        gradient_checkpointing=config.optimization.gradient_checkpointing,
    )


@pytest.fixture
def planned(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """`planned(**flags)` is the plan of that command on a tiny Stable Diffusion, or on another `pipeline`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset_accelerate()

    def make(pipeline=sd_pipeline, **flags):
        config, description = parsed(pipeline, image_folder, tmp_path / "out", **flags)
        optimization = config.optimization
        accelerator = Accelerator(mixed_precision=optimization.mixed_precision)
        trained = trained_parts(config, description)
        optimizer = torch.optim.AdamW(trained.weights(), lr=optimization.learning_rate)
        schedule = get_scheduler(
            optimization.lr_scheduler,
            optimizer,
            num_warmup_steps=optimization.warmup_steps(optimization.max_train_steps),
            num_training_steps=optimization.max_train_steps,
        )
        run = run_of(config, accelerator=accelerator)
        images, _ = open_images(config, description, run)
        return Plan(config, run, Length.of(optimization, images.length, 1), trained, images, schedule)

    yield make
    reset_accelerate()


@pytest.fixture
def status(sd_pipeline, image_folder, tmp_path):
    """`status(stage, step, **flags)`: a run with those flags at that stage; `machine` changes the accelerator."""

    def make(stage=Stage.LPL_STEP, step=3, pipeline=sd_pipeline, machine=None, **flags):
        config, description = parsed(pipeline, image_folder, tmp_path / "out", **flags)
        precision = config.optimization.mixed_precision or "no"
        dtype = torch.float32 if precision == "no" else torch.bfloat16
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), mixed_precision=precision, num_processes=1, is_main_process=True
        )
        vars(accelerator).update(machine or {})
        return Status(config, accelerator, trained_parts(config, description, dtype), stage, step)

    return make


@pytest.fixture
def with_gpu(monkeypatch):
    """Flags are accepted that need a GPU."""
    for module in (preflight, remedies):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
