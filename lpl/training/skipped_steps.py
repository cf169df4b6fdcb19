"""Steps that changed nothing because a loss or a gradient was NaN or infinite: counted, reported, and limited.

:class:`lpl.training.updates.Updates` updates nothing in such a step. Its samples are kept on the device and reported
at the next logging step, so that no other step waits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from lpl.tools.words import counted
from lpl.training.losses import BatchLosses


logger = logging.getLogger(__name__)
NAMED = 8  # samples of a step that are named
DIVERGED = 4  # so many skipped steps of a report, if they are half of it, are no accident
TERMS = ("diffusion loss", "LPL")


class SkippedSteps:
    """The skipped steps of a run, over all its processes.

    Args:
        limit: --max_skipped_steps.
        count: skipped steps before a resume.
    """

    def __init__(self, accelerator: Accelerator, limit: int, count: int = 0) -> None:
        self.accelerator, self.limit, self.count = accelerator, limit, count
        # step, index, timestep; on the device, which terms are not finite
        self._samples: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._steps: list[tuple[int, Tensor]] = []  # step; on the device, whether it was skipped

    def observe(self, step: int, batch: Mapping[str, Any], losses: BatchLosses, *_: Tensor) -> None:
        """Record one micro-batch of an optimizer step, counted from 1."""
        self._samples.append((step, batch["index"], batch["timestep"], losses.not_finite()))

    def end_step(self, step: int, skipped: Tensor) -> None:
        """Record whether the step was skipped, 1 or 0, ()."""
        self._steps.append((step, skipped.clone()))

    def write(self) -> str | None:
        """Report the steps skipped since the last call; waits for the device. All processes call it at the same steps.

        Returns:
            Why the run has to end, if there are more than the limit; the same in every process.
        """
        numbers = [step for step, _ in self._steps]
        flags = torch.stack([skipped for _, skipped in self._steps]).tolist() if numbers else []
        skipped = [step for step, flag in zip(numbers, flags, strict=True) if flag]
        samples, self._samples, self._steps = self._samples, [], []
        if not skipped:
            return None
        mine = [found for found in map(_found, samples) if found[0] in skipped]
        causes: dict[int, list[str]] = {step: [] for step in skipped}
        for step, names in gather_object(mine):
            causes[step] += names
        if self.accelerator.scaler is not None:  # fp16 finds the scale of its loss by gradients that overflow
            skipped = [step for step in skipped if causes[step] or self.accelerator.scaler.get_scale() < 1]
            if not skipped:
                return None
        self.count += len(skipped)
        for step in skipped[:NAMED]:
            names = causes[step]
            rest = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
            logger.warning(f"step {step} changed nothing: {', '.join(names[:NAMED]) or 'a gradient'}{rest} not finite")
        diverged = len(skipped) >= max(DIVERGED, len(numbers) / 2)
        logger.warning(
            f"{len(skipped)} of the last {counted(len(numbers), 'step')} changed nothing, {self.count} of at most "
            f"{self.limit} (--max_skipped_steps) so far"
            + ("; the weights have probably diverged, lower --learning_rate" if diverged else "")
        )
        if self.count <= self.limit:
            return None
        return (
            f"--max_skipped_steps {self.limit}: {counted(self.count, 'step')} had a loss or a gradient that is not "
            "finite, and changed nothing; lower --learning_rate, look at the samples named above, or try "
            "--mixed_precision no; to go on from here, raise the limit"
        )


def _found(sample: tuple[int, Tensor, Tensor, Tensor]) -> tuple[int, list[str]]:
    """The step, and its samples whose terms are not finite, in words."""
    step, index, timestep, flags = sample
    return step, [
        f"{TERMS[term]} of image {int(index[row])} at timestep {float(timestep[row]):g}"
        for row, term in flags.nonzero().tolist()
    ]
