"""What a run measures of the model in training: samples, the losses on held-out images, metrics.

``samples/step-000500/00.png`` ... are the samples after step 500, ``samples/step-000500.png`` their grid: the model
before training, the model now, its EMA with --use_ema, and real images with the same captions if the data set has
some. Prompts and seeds are the same every time, so that grids compare.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from lpl.config import groups
from lpl.config.sizes import Size
from lpl.data.dataset import Batch, TrainingImages, held_out_batches
from lpl.families import Family
from lpl.tools import layout
from lpl.tools.files import write_text
from lpl.tools.pictures import labelled_grid, save_picture
from lpl.tools.words import pixels
from lpl.training.average import MovingAverage, averaged
from lpl.training.log import Log, log_image
from lpl.training.losses import BatchLosses
from lpl.training.parts import TrainedParts
from lpl.training.preemption import Preemption
from lpl.training.sampling import sample
from lpl.training.start import Run, Stage


logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """What ``--eval_steps`` computes, see :class:`lpl.evaluation.training.TrainingEvaluation`."""

    def run(
        self, accelerator: Accelerator, trained: TrainedParts, average: MovingAverage | None, step: int
    ) -> dict[str, float]: ...

    def on_card(self) -> tuple[Sequence[Any], str]: ...


# All of it -----------------------------------------------------------------------------------------------------------


@dataclass
class Validation:
    """Computes what is due after a step, unless a signal asks the run to end.

    Args:
        held_out: of the validation loss; None: nothing is held out.
        metrics: None: there are none.
        every, metrics_every: optimizer steps between two validations, and two evaluations; both come after the last
            step, too.
        now: told what is being done, for the error that may end it.
    """

    samples: Samples
    held_out: HeldOutLosses | None
    metrics: Metrics | None
    every: int
    metrics_every: int
    max_steps: int
    trained: TrainedParts
    average: MovingAverage | None
    log: Log
    preemption: Preemption
    now: Callable[[Stage, int], None]

    def is_due(self, step: int) -> bool:
        return self._due(step, self.every) or self._due(step, self.metrics_every)

    def run(self, run: Run) -> None:
        """Compute what is due; the run is ending if a signal has interrupted it. Called by every process."""
        step = run.step
        if self._due(step, self.every):
            self.now(Stage.SAMPLES, step)
            self.samples.draw(run, self.trained, self.average)
            if self.held_out is not None and not self.preemption.asked_now():
                self.now(Stage.LOSSES, step)
                self.log.validation(step, self.held_out.compute(run, self.trained, self.average))
        if self.metrics is not None and self._due(step, self.metrics_every) and not self.preemption.asked_now():
            self.now(Stage.EVALUATION, step)
            self.log.validation(step, self.metrics.run(run.accelerator, self.trained, self.average, step))
        run.progress.looked = not self.preemption.asked_now()
        run.ending = run.ending or not run.progress.looked

    def _due(self, step: int, every: int) -> bool:
        return step == self.max_steps or step % every == 0


# Held-out losses -----------------------------------------------------------------------------------------------------


@dataclass
class HeldOutLosses:
    """Both terms on the held-out samples, unweighted, under the EMA's weights if there is one.

    Args:
        losses: the script's ``Losses``, with nothing random in it.
    """

    images: TrainingImages
    losses: Callable[[nn.Module, Batch, bool], BatchLosses]
    batch_size: int

    @torch.no_grad()
    def compute(self, run: Run, trained: TrainedParts, average: MovingAverage | None) -> dict[str, float]:
        """``validation_loss`` and, if a sample is inside, ``validation_lpl``; each process computes its part."""
        accelerator = run.accelerator
        sums = torch.zeros(3, device=accelerator.device)
        trained.eval()
        with averaged(average, trained):
            for batch in held_out_batches(
                self.images, self.batch_size, accelerator.process_index, accelerator.num_processes
            ):
                losses = self.losses(trained, batch, True)
                sums += torch.stack([losses.diffusion_loss, losses.lpl, torch.ones_like(losses.lpl)]) * len(
                    losses.errors
                )
        trained.train()
        diffusion_loss, lpl, count = cast(Tensor, accelerator.reduce(sums, "sum")).tolist()
        found = {"validation_loss": diffusion_loss / count}
        return found | ({"validation_lpl": lpl / count} if lpl else {})  # 0: no sample is inside


def at_sizes(names: Sequence[str], sizes: Sequence[Size]) -> list[str]:
    """The headings of samples: all names at the first size, then at the next."""
    if len(sizes) == 1:
        return list(names)
    return [f"{name}, {pixels(*size)}" for size in sizes for name in names]


# Samples -------------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Samples of ``prompts``, and their grids.

    Args:
        scheduler: one that samples the objective in training.
        sizes: height and width in pixels; every prompt is drawn at each of them.
        prompts: captions; class labels in a class-conditional family.
        names: headings of the grid's columns: of all prompts at the first size, then at the next.
        real: training images that bear the prompts, for the grid's last row, in the same order.
        stop: called before each image; True ends the sampling, and no grid is made.
    """

    folder: Path
    family: Family
    scheduler: Any
    validation: groups.Validation
    sizes: Sequence[Size]
    seed: int
    prompts: Sequence[str | int]
    names: Sequence[str]
    real: Sequence[Image.Image] | None = None
    stop: Callable[[], bool] = lambda: False

    def draw(self, run: Run, trained: TrainedParts, average: MovingAverage | None) -> Path | None:
        """Sample with the present weights, save images and grid, and show the grid to the trackers.

        On the main process; the others wait. Returns the grid's path.
        """
        grid = None
        if self.prompts and run.is_main:
            name = f"step-{run.step:06d}"
            for stale in self.folder.glob(f"{name}*/"):  # of an earlier run in the same folder
                shutil.rmtree(stale)
            count = len(self.prompts) * len(self.sizes)
            logger.info(f"drawing {count} samples{' before the training' if run.step == 0 else ''}")
            with self.family.whole():  # for all sizes, and both weights
                rows = {f"step {run.step}": self._sampled(run, trained, name)}
                if average is not None and run.step:
                    with averaged(average, trained):
                        rows[f"step {run.step}, EMA"] = self._sampled(run, trained, f"{name}-ema")
            if not self.stop():
                before = {"before training": rows[f"step {run.step}"]}
                grid = self._grid(rows if run.step else before, f"{name}.png")
                log_image(run.accelerator, grid, run.step)
        run.accelerator.wait_for_everyone()
        return grid

    def before_after(self, step: int) -> Path | None:
        """The final comparison: before training, after the last step (the EMA if there is one), real images."""
        after = self._saved(f"step-{step:06d}-ema") or self._saved(f"step-{step:06d}")
        return self._grid({"after": after}, Path(layout.BEFORE_AFTER).name) if after else None

    def _grid(self, rows: Mapping[str, list[Image.Image]], name: str) -> Path:
        before = self._saved("step-000000")
        context = {"before training": before} if before else {}
        real = {"real images": list(self.real)} if self.real else {}
        return save_picture(labelled_grid(context | dict(rows) | real, list(self.names)), self.folder / name)

    def _saved(self, name: str) -> list[Image.Image]:
        """The samples of a step, unless they were drawn with other settings: a resumed run may have other prompts."""
        folder = self.folder / name
        settings = folder / layout.SETTINGS
        if not settings.is_file() or json.loads(settings.read_text()) != self._settings():
            return []
        return [Image.open(path).copy() for path in sorted(folder.glob("*.png"))]

    def _settings(self) -> dict[str, Any]:
        """What decides the samples besides the weights."""
        return {
            "prompts": list(self.prompts),
            "seed": self.seed,
            "resolution": min(self.sizes[0]),
            "validation_inference_steps": self.validation.validation_inference_steps,
            "validation_guidance_scale": self.validation.validation_guidance_scale,
            **({"sizes": self.validation.validation_sizes} if self.validation.validation_sizes else {}),
        }

    def _sampled(self, run: Run, trained: TrainedParts, name: str) -> list[Image.Image]:
        trained.eval()
        images: list[Image.Image] = []
        for size in self.sizes:
            images += sample(
                self.family,
                self.scheduler,
                self.prompts,
                self.validation,
                size,
                self.seed,
                run.accelerator,
                self.stop,
            )
        trained.train()
        for number, image in enumerate(images):
            save_picture(image, self.folder / name / f"{number:02d}.png")
        if len(images) == len(self.prompts) * len(self.sizes):
            write_text(self.folder / name / layout.SETTINGS, json.dumps(self._settings()))
        return images
