"""What a run can run out of, memory and disk: how much it needs, how much there is, and which errors say so.

Vocabulary. The *result* is what a run leaves in the end: a pipeline, or LoRA. *Full* is a disk that takes no more of a
file. Sizes are in bytes, and are those of this run's models, read off their shapes; the rest of a file are names.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lpl.tools.machine import free_space
from lpl.tools.words import size
from lpl.training.checkpoints import find_checkpoints
from lpl.training.lora import in_one_file
from lpl.training.parts import TrainedParts


# Sizes ---------------------------------------------------------------------------------------------------------------

BLOCK_8BIT, SMALLEST_8BIT, TABLES_8BIT = 256, 4096, 2 * 256 * 4  # of bitsandbytes' AdamW


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


def result_bytes(trained: TrainedParts) -> int:
    """What the result takes on the disk, about: LoRA alone, where it has one file once more for other programs, or the
    pipeline with its diffusers models in float32."""
    if trained.lora:
        return bytes_of(trained.weights()) * (2 if in_one_file(trained.family.pipeline_class) else 1)
    encoders = [p for encoder in trained.family.text_encoders for p in encoder.parameters()]
    others = [trained.denoiser, trained.family.vae]
    return sum(4 * count_parameters(model, trained_only=False) for model in others) + bytes_of(encoders)


def checkpoint_bytes(trained: TrainedParts, args: Namespace) -> int:
    """One checkpoint: what is trained, its EMA likewise, and the optimizer's state."""
    return _saved_bytes(trained) * (2 if args.use_ema else 1) + optimizer_bytes(trained.weights(), args)


def _saved_bytes(trained: TrainedParts) -> int:
    """The trained parts as :meth:`lpl.trained.TrainedParts.save` writes them."""
    return bytes_of(trained.weights() if trained.lora else trained.parts.parameters())


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
    def of(cls, trained: TrainedParts, args: Namespace, max_steps: int, steps_done: int, there: int = 0) -> DiskNeeds:
        result, every, uploads = result_bytes(trained), args.checkpointing_steps, 0
        if args.push_to_hub and args.hub_strategy != "end":  # one is on its way, and one waits
            states = args.hub_strategy in ("checkpoint", "all_checkpoints")
            uploads = result + 2 * states * checkpoint_bytes(trained, args)
        return cls(
            result,
            result if trained.lora else result + _saved_bytes(trained),
            checkpoint_bytes(trained, args),
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


def check_disk(trained: TrainedParts, args: Namespace, max_steps: int, steps_done: int) -> str | None:
    """What will not fit on the disk in the course of a run, in words; before its first step.

    Raises:
        NoRoom: where not even the result, or one checkpoint, does.
    """
    needs = DiskNeeds.of(trained, args, max_steps, steps_done, len(find_checkpoints(args.output_dir)))
    free = free_space(args.output_dir)
    if refusal := needs.refusal(free):
        raise NoRoom(f"--output_dir {args.output_dir}: {refusal}")
    return needs.warning(free)
