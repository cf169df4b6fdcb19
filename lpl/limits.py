"""What a run can run out of, memory and disk: how much it needs, how much there is, and which errors say so.

Vocabulary. The *result* is what a run leaves in the end: a pipeline, or LoRA. *Full* is a disk that takes no more of a
file. Sizes are in bytes, and are those of this run's models, read off their shapes; the rest of a file are names.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lpl.checkpoints import find_checkpoints
from lpl.lora import in_one_file
from lpl.trainee import Trainee


# Sizes ---------------------------------------------------------------------------------------------------------------

BLOCK_8BIT, SMALLEST_8BIT, TABLES_8BIT = 256, 4096, 2 * 256 * 4  # of bitsandbytes' AdamW


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.1f} {unit}"
    return f"{count:.0f} bytes"


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_parameters(part: nn.Module, trained_only: bool = True) -> int:
    """How many numbers; those that are packed, two in a byte, count one by one."""
    return part.num_parameters(only_trainable=trained_only)


def optimizer_bytes(parameters: Iterable[Tensor], args: Namespace) -> int:
    """The state that the optimizer of these flags has of some parameters from its first step on."""
    parameters = list(parameters)
    if args.optimizer == "prodigy":  # where it began, a sum of gradients, and as many moments as it has
        return (3 + (args.adam_beta1 > 0)) * bytes_of(parameters)
    if not args.use_8bit_adam:
        return 2 * bytes_of(parameters) + 4 * len(parameters)
    counts = [parameter.numel() for parameter in parameters]
    small = sum(count for count in counts if count < SMALLEST_8BIT)  # which stay in float32
    large = [count for count in counts if count >= SMALLEST_8BIT]
    scales = sum(math.ceil(count / BLOCK_8BIT) for count in large)
    return 2 * (4 * small + sum(large) + 4 * scales) + (TABLES_8BIT if large else 0)


def result_bytes(trainee: Trainee) -> int:
    """What the result takes on the disk, about: LoRA alone, where it has one file once more for other programs, or the
    pipeline with its diffusers models in float32."""
    if trainee.lora:
        return bytes_of(trainee.trained()) * (2 if in_one_file(trainee.family.pipeline_class) else 1)
    encoders = [p for encoder in trainee.family.text_encoders for p in encoder.parameters()]
    others = [trainee.denoiser, trainee.family.vae]
    return sum(4 * count_parameters(model, trained_only=False) for model in others) + bytes_of(encoders)


def checkpoint_bytes(trainee: Trainee, args: Namespace) -> int:
    """One checkpoint: what is trained, its EMA likewise, and the optimizer's state."""
    return _saved_bytes(trainee) * (2 if args.use_ema else 1) + optimizer_bytes(trainee.trained(), args)


def _saved_bytes(trainee: Trainee) -> int:
    """The trained parts as :meth:`lpl.trainee.Trainee.save` writes them."""
    return bytes_of(trainee.trained() if trainee.lora else trainee.parts.parameters())


# Disk ----------------------------------------------------------------------------------------------------------------


def free_space(folder: str | Path) -> int:
    """Bytes that are free where a folder is or will be."""
    place = Path(folder).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@dataclass(frozen=True)
class DiskNeeds:
    """What a run is going to put on the disk, besides samples and logs.

    Args:
        result: bytes in the end.
        writing: bytes that it takes to get there: the trained parts are saved apart first.
        checkpoint: bytes of one.
        written: checkpoints that are going to be.
        limit: how many of them stay, None: all.
        there: those that are there already, which count.
        uploads: bytes of what is on its way to the Hub during the run.
    """

    result: int
    writing: int
    checkpoint: int
    written: int
    limit: int | None
    there: int = 0
    uploads: int = 0

    @classmethod
    def of(cls, trainee: Trainee, args: Namespace, max_steps: int, steps_done: int, there: int = 0) -> DiskNeeds:
        result, every, uploads = result_bytes(trainee), args.checkpointing_steps, 0
        if args.push_to_hub and args.hub_strategy != "end":  # one is on its way, and one waits
            states = args.hub_strategy in ("checkpoint", "all_checkpoints")
            uploads = result + 2 * states * checkpoint_bytes(trainee, args)
        return cls(
            result,
            result if trainee.lora else result + _saved_bytes(trainee),
            checkpoint_bytes(trainee, args),
            max(0, max_steps // every - steps_done // every),
            args.checkpoints_total_limit,
            there,
            uploads,
        )

    @property
    def kept(self) -> int:
        """Of those written."""
        return min(self.written, self.limit or self.written)

    def bytes_with(self, limit: int | None) -> int:
        """Bytes at the worst moment, more than now, if so many checkpoints stayed: the old one goes when the new one
        is whole."""
        most = stay = self.written
        if limit and self.written:
            most, stay = min(self.written, max(1, limit + 1 - self.there)), min(self.written, limit - self.there)
        return max(most * self.checkpoint, stay * self.checkpoint + self.writing) + self.uploads

    @property
    def bytes(self) -> int:
        return self.bytes_with(self.limit)

    def refusal(self, free: int) -> str | None:
        """Why the run cannot even begin, and which flags to change."""
        if self.writing > free:
            return (
                f"the result needs about {size(self.writing)} while it is written, and {size(free)} are free; make "
                "room, or give an --output_dir elsewhere"
            )
        if self.written and self.checkpoint > free:
            return (
                f"a checkpoint needs about {size(self.checkpoint)}, and {size(free)} are free; make room, or give an "
                "--output_dir elsewhere"
            )
        return None

    def warning(self, free: int) -> str | None:
        """What will not fit later, and which flags to change."""
        if self.bytes <= free:
            return None
        limits = [limit for limit in range(1, self.kept + 1) if self.bytes_with(limit) <= free]
        flags = "raise --checkpointing_steps, or give an --output_dir elsewhere"
        if limits:
            flags = f"set --checkpoints_total_limit to {limits[-1]} at most, {flags}"
        return (
            f"the result and {self.kept} checkpoints of {size(self.checkpoint)} need about {size(self.bytes)}, and "
            f"{size(free)} are free; {flags}"
        )


class NoRoom(ValueError):
    """A disk on which a run would have no place."""


def check_disk(trainee: Trainee, args: Namespace, max_steps: int, steps_done: int) -> str | None:
    """What will not fit on the disk in the course of a run, in words; before its first step.

    Raises:
        NoRoom: where not even the result, or one checkpoint, does.
    """
    needs = DiskNeeds.of(trainee, args, max_steps, steps_done, len(find_checkpoints(args.output_dir)))
    free = free_space(args.output_dir)
    if refusal := needs.refusal(free):
        raise NoRoom(f"--output_dir {args.output_dir}: {refusal}")
    return needs.warning(free)


# Memory --------------------------------------------------------------------------------------------------------------

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> bool:
    """Start to look for the peak anew; False where that cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5")  # Linux: the peak resident size of this process, see proc(5)
    except OSError:
        return False
    return device.type == "cpu"


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU; on a CPU what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def memory_in_words(device: torch.device) -> str:
    """What a device has, and what of it is taken."""
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
    """Of the device or of the machine, by whichever library it is found."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def wanted_memory(error: BaseException) -> str:
    """What could not be had, in words, if the error tells."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if not found:
        return ""
    return f"; {size(float(found[1])) if found[2] == 'bytes' else f'{found[1]} {found[2]}'} more were asked for"
