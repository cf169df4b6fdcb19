"""Samples of the model in training, from the same prompts and seeds every time, so that grids compare.

``samples/step-000500/00.png`` ... are the images, ``samples/step-000500.png`` their grid: real images that bear the
same captions where the data set has them, the model before training, the model now, and its EMA where one is kept.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image

from lpl.families import Family
from lpl.tools.files import write_text
from lpl.tools.pictures import labelled_grid, save_picture
from lpl.training.average import MovingAverage, averaged
from lpl.training.log import log_image
from lpl.training.parts import TrainedParts
from lpl.training.sampling import sample


logger = logging.getLogger(__name__)


class Validation:
    """Samples ``prompts`` and keeps what it sampled.

    Args:
        scheduler: one that samples the objective in training.
        settings: the flags about validation.
        prompts: captions; class labels in a class-conditional family.
        names: what stands over the grid's columns.
        real: training images that bear the prompts, for the last row.
        stop: asked before each image; where it says so, no more are sampled, and there is no grid.
    """

    def __init__(
        self,
        family: Family,
        scheduler: Any,
        settings: Any,
        prompts: Sequence[str | int],
        names: Sequence[str],
        real: Sequence[Image.Image] | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.family, self.scheduler, self.settings, self.real, self.stop = family, scheduler, settings, real, stop
        self.prompts, self.names = list(prompts), list(names)
        self.folder = Path(settings.output_dir, "samples")

    def run(
        self, accelerator: Accelerator, trained: TrainedParts, ema: MovingAverage | None, step: int
    ) -> Path | None:
        """Sample the prompts with the present weights, save images and grid, and show them to the trackers.

        On the main process only; the others wait. Returns the grid's path.
        """
        grid = None
        if self.prompts and accelerator.is_main_process:
            name = f"step-{step:06d}"
            for stale in self.folder.glob(f"{name}*/"):  # of an earlier run in the same place
                shutil.rmtree(stale)
            logger.info(f"drawing {len(self.prompts)} samples{' before the training' if step == 0 else ''}")
            rows = {f"step {step}": self._sampled(accelerator, trained, name)}
            if ema is not None and step:
                with averaged(ema, trained):
                    rows[f"step {step}, EMA"] = self._sampled(accelerator, trained, f"{name}-ema")
            if not self.stop():
                grid = self._grid(rows if step else {"before training": rows[f"step {step}"]}, f"{name}.png")
                log_image(accelerator, grid, step)
        accelerator.wait_for_everyone()
        return grid

    def before_after(self, step: int) -> Path | None:
        """The final comparison: before, after the last step (the EMA where there is one), real images."""
        after = self._saved(f"step-{step:06d}-ema") or self._saved(f"step-{step:06d}")
        return self._grid({"after": after}, "before_after.png") if after else None

    def _grid(self, rows: dict[str, list[Image.Image]], name: str) -> Path:
        before = self._saved("step-000000")
        context = {"before training": before} if before else {}
        real = {"real images": list(self.real)} if self.real else {}
        return save_picture(labelled_grid(context | rows | real, self.names), self.folder / name)

    def _saved(self, name: str) -> list[Image.Image]:
        """The samples of a step, unless other settings made them: a resumed run may have changed its prompts."""
        folder = self.folder / name
        settings = folder / "settings.json"
        if not settings.is_file() or json.loads(settings.read_text()) != self._settings():
            return []
        return [Image.open(path).copy() for path in sorted(folder.glob("*.png"))]

    def _settings(self) -> dict[str, Any]:
        names = ("seed", "resolution", "validation_inference_steps", "validation_guidance_scale")
        return {"prompts": self.prompts} | {name: getattr(self.settings, name) for name in names}

    def _sampled(self, accelerator: Accelerator, trained: TrainedParts, name: str) -> list[Image.Image]:
        trained.eval()
        images = sample(self.family, self.scheduler, self.prompts, self.settings, accelerator, self.stop)
        trained.train()
        for number, image in enumerate(images):
            save_picture(image, self.folder / name / f"{number:02d}.png")
        if len(images) == len(self.prompts):
            write_text(self.folder / name / "settings.json", json.dumps(self._settings()))
        return images
