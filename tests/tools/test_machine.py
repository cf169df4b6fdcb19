"""What this machine has, and which errors say that it is short of memory."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from lpl.tools import machine
from lpl.tools.machine import (
    free_space,
    is_out_of_memory,
    memory_in_words,
    peak_memory,
    reset_peak_memory,
    slowness_of_bfloat16,
    wanted_memory,
)


MIB = 2**20


def test_the_slowness_is_that_of_the_fastest_products(monkeypatch):
    ticks = iter([0, 9, 10, 16, 20, 28, 30, 34, 40, 42, 50, 53])  # three of 6 s or more in bfloat16, of 2 s in float32
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert slowness_of_bfloat16(2) == 3


@pytest.mark.parametrize("value, used", [("true", False), ("1", False), ("yes", False), ("no", True), (None, True)])
def test_a_gpu_is_used_unless_accelerate_is_told_otherwise(value, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert machine.has_gpu() == used


def test_peak_memory_is_the_highest_since_the_reset():
    device = torch.device("cpu")
    if not reset_peak_memory(device):
        pytest.skip("the peak of this process cannot be reset here")
    before = peak_memory(device)
    much = torch.ones(64 * MIB)  # of 4 bytes
    del much
    with_much = peak_memory(device)
    assert with_much - before == pytest.approx(256 * MIB, rel=0.1)
    reset_peak_memory(device)
    assert peak_memory(device) - before < 64 * MIB


def too_much():
    torch.empty(2**46)


def far_too_much():
    bytearray(2**60)


@pytest.mark.parametrize("ask, wanted", [(too_much, "256.0 TiB more were asked for"), (far_too_much, "")])
def test_what_the_machine_really_has_not(ask, wanted):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        ask()
    assert is_out_of_memory(error.value) and wanted in wanted_memory(error.value)


@pytest.mark.parametrize(
    "error, is_one",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one
    assert wanted_memory(error) == ("; 2.50 GiB more were asked for" if "2.50" in str(error) else "")


def test_what_a_gpu_had(monkeypatch):
    device = torch.device("cuda")
    values = {"memory_reserved": 70 * 2**30, "max_memory_allocated": 66 * 2**30, "get_device_name": "H100"}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    words = "H100 has 80.0 GiB, this run's process had 66.0 GiB at most, 9.0 GiB are taken by other programs"
    assert memory_in_words(device) == words
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 80 * 2**30))
    assert "other programs" not in memory_in_words(device)


def test_free_space_is_that_of_the_place(tmp_path):
    there = shutil.disk_usage(tmp_path).free
    assert free_space(tmp_path / "a" / "b") == pytest.approx(there, rel=0.01)
    assert not (tmp_path / "a").exists()
