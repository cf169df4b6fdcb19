"""What this machine has: packages, devices, disk and memory; and which errors mean that disk or memory ran out.

Sizes are in bytes.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import time
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError

from lpl.tools.words import first_line, size


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of flags and of accelerate


def missing(package: str) -> bool:
    """Whether a package is not installed."""
    parent = package.rpartition(".")[0]
    return (bool(parent) and missing(parent)) or importlib.util.find_spec(package) is None


def has_gpu() -> bool:
    """Whether accelerate will use a GPU."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def usable_device(name: str | None) -> torch.device:
    """The device that ``--device`` names; None = a GPU if there is one, else the CPU.

    Raises:
        ValueError: if PyTorch cannot compute on it.
    """
    gpu = torch.cuda.is_available()
    name = name or ("cuda" if gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {first_line(error)}") from error
    if device.type == "cuda" and not gpu:
        raise ValueError(f"--device {name}: this machine has no GPU that PyTorch can use; give cpu")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"--device {name}: PyTorch cannot compute on it here; give cpu") from error
    return device


def slowness_of_bfloat16(size: int = 512) -> float:
    """How many times as long as in float32 this machine's CPU takes for a product of matrices in bfloat16.

    About 0.5 where it computes in bfloat16, and up to 20 where it only emulates it.
    """
    fastest = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix, seconds = torch.ones(size, size, dtype=dtype), []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds.append(time.perf_counter() - start)
        fastest.append(min(seconds))
    return fastest[0] / fastest[1]


# Disk ----------------------------------------------------------------------------------------------------------------


def free_space(folder: str | Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, the quota, or the largest size of a file


def is_full(error: BaseException) -> bool:
    """Whether a file could not be written because the disk, the quota or the file was full."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {number})" in str(error) for number in FULL)
    return isinstance(error, OSError) and error.errno in FULL


# Memory --------------------------------------------------------------------------------------------------------------

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> bool:
    """Restart the measurement of the peak; False if this device does not support it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5")  # Linux: the peak resident size of this process, see proc(5)
    except OSError:
        return False
    return device.type == "cpu"


def peak_memory(device: torch.device) -> int | None:
    """The largest memory in use, in bytes: of tensors on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def memory_in_words(device: torch.device) -> str:
    """One line on a device's memory and its use."""
    if device.type == "cuda":
        name, (free, total) = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
    else:
        name, total, others = "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    peak = peak_memory(device)
    words = [f"{name} has {size(total)}"]
    words += [f"this run's process had {size(peak)} at most"] if peak is not None else []
    words += [f"{size(others)} are taken by other programs"] if others > total / 20 else []  # CUDA itself needs some
    return ", ".join(words)


OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine ran out of memory, whichever library raises."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def wanted_memory(error: BaseException) -> str:
    """The size of the failed allocation as the end of a sentence; empty if the error does not name it."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if not found:
        return ""
    return f"; {size(float(found[1])) if found[2] == 'bytes' else f'{found[1]} {found[2]}'} more were asked for"
