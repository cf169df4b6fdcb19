"""The disk space that a run needs: its checkpoints and its *result*, a pipeline or a LoRA.

Sizes are in bytes, from the shapes of the run's own models; names and headers of files are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lpl.config.groups import Optimization, Output
from lpl.config.rules import is_path
from lpl.tools.machine import free_space
from lpl.tools.words import size
from lpl.training.checkpoints import find_checkpoints
from lpl.training.lora import in_one_file
from lpl.training.optimizers import bytes_by_path
from lpl.training.parts import TrainedParts


# Sizes ---------------------------------------------------------------------------------------------------------------

BLOCK_8BIT, SMALLEST_8BIT, TABLES_8BIT = 256, 4096, 2 * 256 * 4  # of bitsandbytes' AdamW


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_parameters(part: nn.Module, trained_only: bool = True) -> int:
    """The number of parameters; two that are packed in a byte count as two."""
    count: int = part.num_parameters(only_trainable=trained_only)  # type: ignore[operator]
    return count


def models_of(trained: TrainedParts) -> dict[str, nn.Module]:
    """The pipeline's models by name, the trained ones first."""
    family = trained.family
    names = [*trained.parts, family.denoiser_name, *family.text_encoder_names, "vae"]
    models = {name: getattr(family.pipeline, name) for name in names}
    return {name: model for name, model in models.items() if model is not None}


def optimizer_bytes(parameters: Iterable[Tensor], optimization: Optimization) -> int:
    """The optimizer's state for some parameters, from its first step on."""
    parameters = list(parameters)
    if optimization.optimizer == "prodigy":  # the initial weights, a sum of gradients, and one or two moments
        return (3 + (optimization.adam_beta1 > 0)) * bytes_of(parameters)
    if is_path(optimization.optimizer):
        return bytes_by_path(parameters, optimization)
    if optimization.optimizer != "AdamW":
        raise ValueError(f"the state of {optimization.optimizer} is not known")
    if not optimization.use_8bit_adam:
        return 2 * bytes_of(parameters) + 4 * len(parameters)
    counts = [parameter.numel() for parameter in parameters]
    small = sum(count for count in counts if count < SMALLEST_8BIT)  # which stay in float32
    large = [count for count in counts if count >= SMALLEST_8BIT]
    scales = sum(math.ceil(count / BLOCK_8BIT) for count in large)
    return 2 * (4 * small + sum(large) + 4 * scales) + (TABLES_8BIT if large else 0)


def result_bytes(trained: TrainedParts) -> int:
    """The approximate size of the result: the LoRA, twice where other programs get a file of their own, or the
    pipeline with its diffusers models in float32."""
    if trained.lora:
        return bytes_of(trained.weights()) * (2 if in_one_file(trained.family.pipeline_class) else 1)
    encoders = [p for encoder in trained.family.text_encoders for p in encoder.parameters()]
    others = [trained.denoiser, trained.family.vae]
    whole = sum(4 * count_parameters(model, trained_only=False) for model in others)
    return whole + bytes_of(encoders) + trained.family.released_bytes


def checkpoint_bytes(trained: TrainedParts, optimization: Optimization) -> int:
    """One checkpoint: the trained parts, their EMA, and the optimizer's state."""
    has_average = optimization.use_ema or trained.averaging is not None
    return _saved_bytes(trained) * (1 + has_average) + optimizer_bytes(trained.weights(), optimization)


def _saved_bytes(trained: TrainedParts) -> int:
    """The trained parts as :meth:`TrainedParts.save` writes them."""
    return bytes_of(trained.weights() if trained.lora else trained.parts.parameters())


@dataclass(frozen=True)
class DiskNeeds:
    """What a run writes to the disk, besides samples and logs.

    Args:
        result: bytes of the result.
        writing: bytes while the result is written: the trained parts are saved separately first.
        checkpoint: bytes of one checkpoint.
        written: checkpoints that the run writes.
        limit: checkpoints that are kept; None: all.
        there: existing checkpoints, which count towards the limit.
        uploads: bytes of uploads to the Hub during the run.
    """

    result: int
    writing: int
    checkpoint: int
    written: int
    limit: int | None
    there: int = 0
    uploads: int = 0

    @classmethod
    def of(
        cls,
        trained: TrainedParts,
        optimization: Optimization,
        output: Output,
        max_steps: int,
        steps_done: int,
        there: int = 0,
    ) -> DiskNeeds:
        result, checkpoint = result_bytes(trained), checkpoint_bytes(trained, optimization)
        every, uploads = output.checkpointing_steps, 0
        if output.push_to_hub and output.hub_strategy != "end":  # one is being uploaded, and one waits
            states = output.hub_strategy in ("checkpoint", "all_checkpoints")
            uploads = result + 2 * states * checkpoint
        return cls(
            result,
            result if trained.lora else result + _saved_bytes(trained),
            checkpoint,
            max(0, max_steps // every - steps_done // every),
            output.checkpoints_total_limit,
            there,
            uploads,
        )

    @property
    def kept(self) -> int:
        """Of those that are written."""
        return min(self.written, self.limit or self.written)

    def bytes_with(self, limit: int | None) -> int:
        """The most bytes in addition to the present ones, if that many checkpoints were kept. An old checkpoint is
        deleted once the new one is complete."""
        most = stay = self.written
        if limit and self.written:
            most, stay = min(self.written, max(1, limit + 1 - self.there)), min(self.written, limit - self.there)
        return max(most * self.checkpoint, stay * self.checkpoint + self.writing) + self.uploads

    @property
    def bytes(self) -> int:
        return self.bytes_with(self.limit)

    def refusal(self, free: int) -> str | None:
        """Why the run cannot begin, and which flags to change."""
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
        """What will not fit in the course of the run, and which flags to change."""
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
    """The disk has no room for the run."""


def check_disk(
    trained: TrainedParts, optimization: Optimization, output: Output, max_steps: int, steps_done: int
) -> str | None:
    """What will not fit on the disk in the course of a run; called before its first step.

    Raises:
        NoRoom: where the result, or one checkpoint, does not fit.
    """
    there = len(find_checkpoints(output.output_dir))
    needs = DiskNeeds.of(trained, optimization, output, max_steps, steps_done, there)
    free = free_space(output.output_dir)
    if refusal := needs.refusal(free):
        raise NoRoom(f"--output_dir {output.output_dir}: {refusal}")
    return needs.warning(free)
