"""What a run measures of the model in training: samples, the losses on held-out images, metrics.

``samples/step-000500/00.png`` ... are the samples after step 500, ``samples/step-000500.png`` their grid: the model
before training, the model now, its EMA with --use_ema, and real images with the same captions if the data set has
some. Prompts and seeds are the same every time, so that grids compare.

When the training ends, ``samples/checkpoints.png`` puts the steps side by side, and ``samples/lora_scales.png`` the
strengths of --validation_lora_scales, whose samples are in ``samples/lora-scale-0.5/`` ...
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from lpl.config import groups
from lpl.data.dataset import Batch, TrainingImages, held_out_batches
from lpl.families import Family
from lpl.tools import layout
from lpl.tools.files import write_text
from lpl.tools.pictures import labelled_grid, save_picture
from lpl.tools.words import counted
from lpl.training.adapters import scaled
from lpl.training.average import MovingAverage, averaged
from lpl.training.comparisons import compared, evenly
from lpl.training.log import Log, log_image
from lpl.training.losses import BatchLosses
from lpl.training.parts import TrainedParts
from lpl.training.preemption import Preemption
from lpl.training.sampling import Draw, sample
from lpl.training.sharding import in_step
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
            if step == self.max_steps and not self.preemption.asked_now():
                self.samples.draw_scales(run, self.trained, self.average)
            if self.held_out is not None and not self.preemption.asked_now():
                self.now(Stage.LOSSES, step)
                self.log.validation(step, self.held_out.compute(run, self.trained, self.average))
        if self.metrics is not None and self._due(step, self.metrics_every) and not self.preemption.asked_now():
            self.now(Stage.EVALUATION, step)
            if numbers := self.metrics.run(run.accelerator, self.trained, self.average, step):  # else it was aborted
                self.log.validation(step, numbers)
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
            batches = partial(held_out_batches, self.images, self.batch_size)
            mine = batches(accelerator.process_index, accelerator.num_processes)
            for batch, own in in_step(mine, lambda: next(batches()), accelerator, trained.sharded):
                losses = self.losses(trained, batch, True)
                count = len(losses.errors) if own else 0
                sums += torch.stack([losses.diffusion_loss, losses.lpl, torch.ones_like(losses.lpl)]) * count
        trained.train()
        diffusion_loss, lpl, count = cast(Tensor, accelerator.reduce(sums, "sum")).tolist()
        found = {"validation_loss": diffusion_loss / count}
        return found | ({"validation_lpl": lpl / count} if lpl else {})  # 0: no sample is inside


# Samples -------------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Samples of the validation prompts, and their grids.

    Args:
        scheduler: one that samples the objective in training.
        seed: of the run.
        draws: :func:`lpl.training.sampling.draws_of`.
        scales: --validation_lora_scales.
        real: training images that bear the prompts, for the grid's last row, in the same order.
        stop: called before each image; True ends the sampling, and no grid is made.
    """

    folder: Path
    family: Family
    scheduler: Any
    validation: groups.Validation
    seed: int
    draws: Sequence[Draw]
    scales: Sequence[float] = ()
    real: Sequence[Image.Image] | None = None
    stop: Callable[[], bool] = lambda: False

    def draw(self, run: Run, trained: TrainedParts, average: MovingAverage | None) -> Path | None:
        """Sample with the present weights, save images and grid, and show the grid to the trackers.

        On the main process, whose others wait, or sample with it if the model is sharded. Returns the grid's path.
        """
        grid = None
        if self.draws and (run.is_main or trained.sharded):
            name = f"step-{run.step:06d}"
            if run.is_main:
                self._clear(f"{name}*")
            logger.info(
                f"drawing {counted(len(self.draws), 'sample')}{' before the training' if run.step == 0 else ''}"
            )
            with self.family.whole():  # for all sizes, and both weights
                with averaged(None, trained):
                    rows = {f"step {run.step}": self._sampled(run, trained, name)}
                if average is not None and run.step:
                    with averaged(average, trained):
                        rows[f"step {run.step}, EMA"] = self._sampled(run, trained, f"{name}-ema")
            if not self.stop() and run.is_main:
                before = {"before training": rows[f"step {run.step}"]}
                grid = self._grid(rows if run.step else before, f"{name}.png")
                log_image(run.accelerator, grid, run.step)
        run.accelerator.wait_for_everyone()
        return grid

    def draw_scales(self, run: Run, trained: TrainedParts, average: MovingAverage | None) -> None:
        """Sample with the adapters that will be saved at each strength, and save images and grid.

        On the main process; the others wait, or sample with it.
        """
        place = self.folder / Path(layout.LORA_SCALES).name
        if run.is_main:  # a resumed run may no longer ask for them
            self._clear("lora-scale-*")
            place.unlink(missing_ok=True)
        if self.scales and self.draws and (run.is_main or trained.sharded):
            logger.info(f"drawing {counted(len(self.draws), 'sample')} at each strength of the LoRA")
            columns = {}
            with averaged(average, trained), self.family.whole():
                for scale in self.scales:
                    with scaled(trained.models.values(), scale):
                        columns[f"LoRA x {scale:g}"] = self._sampled(run, trained, f"lora-scale-{scale:g}")
            if not self.stop() and run.is_main:
                save_picture(compared(columns, self._names), place)
        run.accelerator.wait_for_everyone()

    def checkpoints(self, step: int) -> Path | None:
        """The samples of all steps up to this one side by side, the EMA's if there are any; of many, some steps.

        None, and no file, if there is nothing between those before and after the training.
        """
        place = self.folder / Path(layout.CHECKPOINTS).name
        place.unlink(missing_ok=True)
        names = [path.name for path in self.folder.glob("step-*/")]
        steps = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d+)", name)))
        steps = evenly([each for each in steps if each <= step and self._of_step(each)])
        if len(steps) < 3:
            return None
        columns = {f"step {each:,}" if each else "before training": self._saved(self._of_step(each)) for each in steps}
        return save_picture(compared(columns, self._names), place)

    @property
    def _names(self) -> list[str]:
        return [draw.name for draw in self.draws]

    def _of_step(self, step: int) -> str:
        """The folder of a step's samples, the EMA's if there are any; empty if there are none."""
        name = f"step-{step:06d}"
        return next((each for each in (f"{name}-ema", name) if self._has(each)), "")

    def _clear(self, names: str) -> None:
        """Remove samples of an earlier run in the same folder."""
        for stale in self.folder.glob(f"{names}/"):
            shutil.rmtree(stale)

    def before_after(self, step: int) -> Path | None:
        """The final comparison: before training, after the last step (the EMA if there is one), real images."""
        after = self._saved(self._of_step(step))
        return self._grid({"after": after}, Path(layout.BEFORE_AFTER).name) if after else None

    def _grid(self, rows: Mapping[str, list[Image.Image]], name: str) -> Path:
        before = self._saved("step-000000")
        context = {"before training": before} if before else {}
        real = {"real images": list(self.real)} if self.real else {}
        return save_picture(labelled_grid(context | dict(rows) | real, self._names), self.folder / name)

    def _saved(self, name: str) -> list[Image.Image]:
        """The samples of a step, unless they were drawn with other settings: a resumed run may have other prompts."""
        return [Image.open(path).copy() for path in _pictures(self.folder / name)] if self._has(name) else []

    def _has(self, name: str) -> bool:
        settings = self.folder / name / layout.SETTINGS
        if not name or not self.draws or not settings.is_file():
            return False
        return json.loads(settings.read_text()) == self._settings()

    def _settings(self) -> dict[str, Any]:
        """What decides the samples besides the weights."""
        own = any(draw.own for draw in self.draws)
        return {
            "prompts": list({draw.number: draw.prompt for draw in self.draws}.values()),
            "seed": self.seed,
            "resolution": min(self.draws[0].size),
            "validation_inference_steps": self.validation.validation_inference_steps,
            "validation_guidance_scale": self.validation.validation_guidance_scale,
            **({"sizes": self.validation.validation_sizes} if self.validation.validation_sizes else {}),
            **({"draws": [draw.settings() for draw in self.draws]} if own else {}),
        }

    def _sampled(self, run: Run, trained: TrainedParts, name: str) -> list[Image.Image]:
        trained.eval()
        images = sample(self.family, self.scheduler, self.draws, run.accelerator, self.stop)
        trained.train()
        if not run.is_main:
            return images
        for number, image in enumerate(images):
            save_picture(image, self.folder / name / f"{number:02d}.png")
        if len(images) == len(self.draws):
            write_text(self.folder / name / layout.SETTINGS, json.dumps(self._settings()))
        return images


def _pictures(folder: Path) -> list[Path]:
    """The images of a folder in the order of their numbers."""
    return sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
