"""The sizes are those of real optimizers and files, and what a disk has no room for is refused or warned of."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from trainer import train

from lpl.config.groups import Optimization, Output
from lpl.diagnosis import needs
from lpl.diagnosis.needs import (
    DiskNeeds,
    NoRoom,
    bytes_of,
    check_disk,
    checkpoint_bytes,
    optimizer_bytes,
    result_bytes,
)
from lpl.training import checkpoints
from lpl.training.updates import make_optimizer


MIB = 2**20


# Sizes ---------------------------------------------------------------------------------------------------------------


def state_bytes(optimizer):
    """Of the tensors that an optimizer has, each counted once."""
    tensors = [x for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor)]
    return bytes_of({tensor.data_ptr(): tensor for tensor in tensors}.values())


OPTIMIZERS = {
    "AdamW": {},
    "8bit": {"use_8bit_adam": True},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "lr_warmup_steps": None},
    "prodigy without momentum": {"optimizer": "prodigy", "learning_rate": 1.0, "adam_beta1": 0.0},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("flags", [{}, {"rank": 16}])
def test_an_optimizers_state_is_as_large_as_the_real_one(kind, flags, status):
    run = status(**OPTIMIZERS[kind] | flags)
    trained = run.trained.weights()
    extra = nn.Parameter(torch.randn(300, 100))  # whose last block of 8-bit state is not full
    with torch.no_grad():
        for parameter in trained:  # LoRA's zeros, of which Prodigy keeps no copy
            parameter += 1e-3
    optimizer = make_optimizer(run.config.optimization, run.trained, 1)
    optimizer.add_param_group({"params": [extra]})
    for parameter in (*trained, extra):
        parameter.grad = torch.ones_like(parameter)
    assert state_bytes(optimizer) == 0
    optimizer.step()
    assert optimizer_bytes((*trained, extra), run.config.optimization) == state_bytes(optimizer)


def test_8_bits_begin_where_they_do_in_the_real_one():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    optimization = Optimization(use_8bit_adam=True)
    for count in (1, needs.SMALLEST_8BIT - 1, needs.SMALLEST_8BIT, needs.SMALLEST_8BIT + 1, 100 * 256 + 255):
        parameter = nn.Parameter(torch.zeros(count))
        parameter.grad = torch.ones(count)
        optimizer = bitsandbytes.optim.AdamW8bit([parameter])
        optimizer.step()
        assert optimizer_bytes([parameter], optimization) == state_bytes(optimizer), count


def size_of(folder, pattern):
    return sum(file.stat().st_size for file in Path(folder).glob(pattern) if file.is_file())


@pytest.mark.parametrize("flags", [{}, {"use_ema": True}, {"rank": 64, "use_ema": True}, {"use_8bit_adam": True}])
def test_sizes_are_those_of_the_files(flags, status, sd_pipeline, image_folder, tmp_path):
    written = train(
        sd_pipeline, image_folder, tmp_path / "run", max_train_steps=1, lpl_weight=0, checkpointing_steps=1, **flags
    )
    run = status(lpl_weight=0, **flags)
    # The rest of a file are names and shapes, which count for something in models as small as these.
    optimization = run.config.optimization
    estimate = checkpoint_bytes(run.trained, optimization)
    assert 0.6 * size_of(written / "checkpoint-1", "**/*") < estimate < size_of(written / "checkpoint-1", "**/*")
    of_ema = estimate - checkpoint_bytes(run.trained, replace(optimization, use_ema=False))
    ema = size_of(written / "checkpoint-1", "ema/**/*.safetensors")
    assert 0.7 * ema <= of_ema <= ema and (ema > 0) is flags.get("use_ema", False)
    result = size_of(written, "*.safetensors" if flags.get("rank") else "[tuv]*/*.safetensors")
    assert 0.6 * result < result_bytes(run.trained) < result


# Disk ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, done, every, limit, there, written, kept, bytes",
    [
        (10, 0, 3, None, 0, 3, 3, 3 * 10 + 5),
        (9, 0, 3, None, 0, 3, 3, 3 * 10 + 5),
        (9, 0, 3, None, 4, 3, 3, 3 * 10 + 5),
        (10, 0, 3, 1, 0, 3, 1, 2 * 10),  # the old one goes when the new one is whole
        (10, 0, 3, 2, 0, 3, 2, 3 * 10),
        (10, 0, 3, 5, 0, 3, 3, 3 * 10 + 5),
        (10, 6, 3, None, 2, 1, 1, 1 * 10 + 5),
        (10, 6, 3, 2, 2, 1, 1, 1 * 10),  # one comes, one goes
        (10, 6, 3, 1, 2, 1, 1, 1 * 10),
        (2, 0, 3, 1, 0, 0, 0, 5),
        (5, 6, 3, None, 2, 0, 0, 5),
    ],
)
def test_what_a_run_needs_on_the_disk(steps, done, every, limit, there, written, kept, bytes, monkeypatch):
    """Checkpoints of 10, and a result of 3 that takes 5 to write."""
    monkeypatch.setattr(needs, "checkpoint_bytes", lambda trained, optimization: 10)
    monkeypatch.setattr(needs, "result_bytes", lambda trained: 3)
    monkeypatch.setattr(needs, "_saved_bytes", lambda trained: 2)
    output, trained = Output(checkpointing_steps=every, checkpoints_total_limit=limit), SimpleNamespace(lora=False)
    disk = DiskNeeds.of(trained, Optimization(), output, steps, done, there)
    assert (disk.written, disk.kept, disk.bytes) == (written, kept, bytes)
    for strategy, uploads in (("end", 0), ("every_save", 3), ("checkpoint", 3 + 2 * 10)):
        pushed = replace(output, push_to_hub=True, hub_strategy=strategy)
        assert DiskNeeds.of(trained, Optimization(), pushed, steps, done, there).bytes == bytes + uploads


def test_what_does_not_fit_is_refused_or_warned_of():
    disk = DiskNeeds(result=30 * MIB, writing=50 * MIB, checkpoint=100 * MIB, written=4, limit=None)
    assert disk.refusal(49 * MIB).startswith("the result needs about 50.0 MiB while it is written, and 49.0 MiB are")
    assert disk.refusal(99 * MIB).startswith("a checkpoint needs about 100.0 MiB")
    assert disk.refusal(100 * MIB) is None
    said = disk.warning(449 * MIB)
    assert said.startswith("the result and 4 checkpoints of 100.0 MiB need about 450.0 MiB, and 449.0 MiB are free; ")
    assert disk.warning(450 * MIB) is None
    fits = int(re.search(r"--checkpoints_total_limit to (\d+) at most", said)[1])
    assert fits == 3 and disk.bytes_with(fits) <= 449 * MIB < disk.bytes_with(fits + 1)
    assert "--checkpoints_total_limit" not in disk.warning(150 * MIB)  # two are there for a moment with any
    assert DiskNeeds(30, 50, 100, written=0, limit=None).refusal(60) is None  # there will be none


def test_checkpoints_that_are_there_count(status, tmp_path, monkeypatch):
    run = status(checkpointing_steps=1, max_train_steps=10, checkpoints_total_limit=2)
    groups = run.config.optimization, run.config.output
    free = DiskNeeds.of(run.trained, *groups, 10, 0, there=2).bytes
    monkeypatch.setattr(needs, "free_space", lambda folder: free)
    assert check_disk(run.trained, *groups, 10, 0) is not None
    for step in (1, 2):
        checkpoints.checkpoint_path(tmp_path / "out", step).mkdir(parents=True)
        checkpoints.Progress(step, seed=0).save(checkpoints.checkpoint_path(tmp_path / "out", step))
    assert check_disk(run.trained, *groups, 10, 0) is None


def test_a_run_without_room_does_not_begin(sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "free_space", lambda folder: 1000)
    monkeypatch.setattr(UNet2DConditionModel, "forward", None)  # no step is taken
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run")
    said = left.value.code
    assert said.startswith(
        f"train_text_to_image_lpl.py: error: --output_dir {tmp_path / 'run'}: the result needs about"
    )
    assert "1000 bytes are free" in said and "\n" not in said
    assert issubclass(NoRoom, ValueError)
