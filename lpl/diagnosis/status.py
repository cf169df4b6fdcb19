"""What a run is doing: a *stage*, such as loading the models or taking a step with LPL."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from lpl.config import Config
from lpl.training.checkpoints import find_checkpoints
from lpl.training.parts import TrainedParts
from lpl.training.start import Stage


@dataclass
class Status:
    """What a run is doing, for the error that may end it.

    Args:
        accelerator, trained: as soon as they exist.
        step: the current optimizer step, or the last one.
        started: seconds of the clock.
    """

    config: Config
    accelerator: Accelerator | None = None
    trained: TrainedParts | None = None
    stage: Stage = Stage.READING
    step: int = 0
    started: float = field(default_factory=time.time)

    def now(self, stage: Stage, step: int = 0) -> None:
        """Set what the run is doing from here on."""
        self.stage, self.step = stage, step

    def in_step(self, step: int, with_lpl: bool) -> None:
        """Set that an optimizer step, counted from 1, is being taken."""
        self.now(Stage.LPL_STEP if with_lpl else Stage.STEP, step)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.accelerator is None else self.accelerator.device

    @property
    def mixed_precision(self) -> str:
        return "no" if self.accelerator is None else self.accelerator.mixed_precision

    @property
    def processes(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def words(self) -> str:
        """The stage in words."""
        return self.stage.value.format(self.step)

    def checkpoints(self) -> list[Path]:
        """The checkpoints of this run, and of the one that it resumes."""
        output = self.config.output
        found = find_checkpoints(output.output_dir)
        if output.resume_from_checkpoint is not None:
            return found
        return [path for path in found if path.stat().st_mtime >= self.started - 1]
