"""What interrupts the training after a step: a checkpoint, a validation, and what is published of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lpl.config.groups import Output
from lpl.data.dataset import Batches
from lpl.data.streaming import StreamedBatches
from lpl.training.checkpoints import TrainingState, checkpoint_path, save_checkpoint
from lpl.training.log import Log
from lpl.training.start import Run
from lpl.training.validation import Validation


@dataclass
class Pauses:
    """Saves, validates and publishes where it is due; saves once more if the run ends early.

    Args:
        publish: given a checkpoint, its step and whether the run is ending; None: nothing is published.
    """

    state: TrainingState
    order: Batches | StreamedBatches
    log: Log
    validation: Validation
    output: Output
    publish: Callable[[Path, int, bool], None] | None = None

    def are_due(self, run: Run) -> bool:
        return run.ending or self._saves(run) or self.validation.is_due(run.step)

    def take(self, run: Run) -> None:
        """Do what is due; time does not count for the images per second. Called by every process."""
        with self.log.paused():
            run.progress.looked = False
            run.progress.log = self.log.state()
            run.progress.stream = self.order.positions(run.step * run.accelerator.gradient_accumulation_steps)
            saved = run.ending or self._saves(run)
            if saved:
                self._save(run)
            if not run.ending:
                self.validation.run(run)
            checkpoint = checkpoint_path(run.folder, run.step)
            if run.ending and not saved:
                self._save(run)
            elif saved and run.is_main:
                run.progress.save(checkpoint)  # that its validation is done
            if self.output.push_to_hub and self.output.hub_strategy != "end" and (saved or run.ending):
                with self.state.gathered():
                    if self.publish is not None:
                        self.publish(checkpoint, run.step, run.ending)

    def _saves(self, run: Run) -> bool:
        return run.step % self.output.checkpointing_steps == 0

    def _save(self, run: Run) -> None:
        save_checkpoint(self.state, run.folder, run.progress, self.output.checkpoints_total_limit)
