"""What a run tells while it runs: the progress bar's numbers, ``metrics.jsonl``, and the trackers.

Numbers are summed on the device and fetched at logging steps only, so that no other step waits for them.
``lpl_share`` is ``w LPL / L_total``, ``inside`` the share of samples below the sigma threshold, ``images_per_second``
that of all processes together, each over the steps since the last entry. What happens within :meth:`Log.paused` does
not count as time; all else between two entries does.

A held-out validation has an entry of its own, with ``validation_loss`` and ``validation_lpl``. ``sample_losses.jsonl``
has the diffusion loss of each sample of each step, where --debug_loss asks for it.
"""

from __future__ import annotations

import json
import logging
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lpl.arguments import recipe


logger = logging.getLogger(__name__)


class Log:
    """The log of one run, continued after a resume.

    Args:
        first_step: finished steps; entries of later ones, from a run that was cut short, are dropped.
        global_batch: images per optimizer step, over all processes and micro-batches.
    """

    def __init__(self, accelerator: Accelerator, args: Namespace, first_step: int, global_batch: int) -> None:
        self.accelerator, self.global_batch = accelerator, global_batch
        self.path = Path(args.output_dir, "metrics.jsonl")
        self.samples_path = self.path.with_name("sample_losses.jsonl")
        self._count, self._inside = 0, 0.0
        self._sums = torch.zeros(4, device=accelerator.device)
        self._samples: list[Tensor] = []  # (B, 3): step, index and loss, on the device
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.samples_path):
                if path is self.path or path.is_file():
                    kept = [record for record in _entries(path) if first_step and record["step"] <= first_step]
                    path.write_text(_lines(kept))
        accelerator.init_trackers(args.tracker_project_name, {k: _plain(v) for k, v in recipe(args).items()})
        self._last_step, self._since = first_step, time.perf_counter()

    def add(self, loss: Tensor, diffusion_loss: Tensor, lpl: Tensor, weighted_lpl: Tensor, inside: float) -> None:
        """One micro-batch: four means of (), still on the device, and the share of samples inside the threshold."""
        self._sums += torch.stack([loss, diffusion_loss, lpl, weighted_lpl]).detach()
        self._inside += inside
        self._count += 1

    def write(self, step: int, lr: float, lpl_weight: Tensor) -> dict[str, str]:
        """Log the means since the last call; returns them as the progress bar shows them."""
        means = self.accelerator.reduce(
            torch.cat([self._sums, self._sums.new_tensor([self._inside])]) / self._count, "mean"
        )
        loss, diffusion_loss, lpl, weighted, inside = means.tolist()  # waits for the device: the time is true
        now = time.perf_counter()
        record = {
            "loss": loss,
            "diffusion_loss": diffusion_loss,
            "lpl": lpl,
            "lpl_weight": float(lpl_weight),
            "lpl_share": weighted / loss if loss else 0.0,
            "inside": inside,
            "lr": lr,
            "images_per_second": (step - self._last_step) * self.global_batch / (now - self._since),
        }
        self._sums.zero_()
        self._count, self._inside = 0, 0.0
        self._append(step, record)
        self._write_samples()
        self._last_step, self._since = step, time.perf_counter()
        return {
            "loss": f"{loss:.4f}",
            "lpl": f"{lpl:.4f}",
            "share": f"{record['lpl_share']:.0%}",
            "lr": f"{lr:.1e}",
            "img/s": f"{record['images_per_second']:.3g}",
        }

    def validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """An entry of its own for what was measured on held-out samples after a step."""
        self._append(step, dict(numbers))
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())
        logger.info(f"after step {step}: {told}")

    def samples(self, step: int, index: Tensor, errors: Tensor) -> None:
        """The losses, (B,), of the samples of those places in the data set, (B,); written at the next entry."""
        exact = torch.float32 if errors.device.type == "mps" else torch.float64  # for an index of any size
        errors = errors.detach().to(exact)
        index = index.to(errors.device, exact)
        self._samples.append(torch.stack([torch.full_like(index, step), index, errors], 1))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the time does not count for the images per second."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # the steps up to here do count
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def records(self) -> list[dict[str, Any]]:
        """Every entry so far; a line that a crash cut short ends them."""
        return _entries(self.path)

    def _append(self, step: int, record: dict[str, float]) -> None:
        self.accelerator.log(record, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(_lines([{"step": step} | record]))

    def _write_samples(self) -> None:
        if not self._samples:
            return
        rows = self.accelerator.gather(torch.cat(self._samples)).tolist()
        self._samples.clear()
        if self.accelerator.is_main_process:
            entries = [{"step": int(step), "image": int(index), "loss": loss} for step, index, loss in rows]
            with self.samples_path.open("a") as file:
                file.write(_lines(sorted(entries, key=lambda entry: entry["step"])))  # processes come one by one


def _entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a crash cut short ends them."""
    entries = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


def _lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def log_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Show a picture to the trackers that are on."""
    for tracker in accelerator.trackers:
        match tracker.name:
            case "tensorboard":
                image = np.asarray(Image.open(path).convert("RGB"))
                tracker.writer.add_image("validation", image, step, dataformats="HWC")
            case "wandb":
                import wandb

                tracker.log({"validation": wandb.Image(str(path))}, step=step)
            case "trackio":
                import trackio

                tracker.log({"validation": trackio.Image(str(path))}, step=step)
            case "comet_ml":
                tracker.writer.log_image(str(path), name="validation", step=step)


def _plain(value: Any) -> Any:
    """TensorBoard takes numbers and strings only."""
    return value if isinstance(value, bool | int | float | str) else str(value)
