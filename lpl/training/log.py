"""What a run tells while it runs: the progress bar's numbers, ``metrics.jsonl``, and the trackers.

Numbers are summed on the device and fetched at logging steps only, so that no other step waits for them. Each is over
the steps since the last entry:

* ``loss``, ``diffusion_loss``: their means.
* ``lpl``: its mean over the steps with LPL (with --lpl_every not all), unweighted; ``lpl/mid``, ``lpl/up_0``, ... are
  the blocks' parts of it, depth weights included, and ``kept/mid``, ... the shares that the masks keep of them.
* ``lpl_weight``: w, as the last step had it; ``lpl_share``: w LPL / (L_diffusion + w LPL), in expectation.
* ``lpl_gradient_share``: |w dLPL/dD| / (|w dLPL/dD| + |dL_diffusion/dD|), norms of the gradient at the model's output
  over a whole optimizer step, the last one with LPL.
* ``inside``: the share of samples below the sigma threshold; ``images_per_second``: of all processes together.

What was not measured since the last entry is not in it. What happens within :meth:`Log.paused` does not count as time;
all else between two entries does.

A held-out validation has an entry of its own, with ``validation_loss`` and ``validation_lpl``. ``sample_losses.jsonl``
has the diffusion loss of each sample of each step, where --debug_loss asks for it.
"""

from __future__ import annotations

import logging
import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lpl.config.command_line import recipe
from lpl.tools.files import entries, lines, write_text
from lpl.training.losses import BatchLosses


logger = logging.getLogger(__name__)


class Log:
    """The log of one run, continued after a resume.

    Args:
        first_step: finished steps; entries of later ones, from a run that was cut short, are dropped.
        last_step: of the whole run.
        global_batch: images per optimizer step, over all processes and micro-batches.
        blocks: names of the decoder blocks that LPL compares.
        looked: whether the validation after ``first_step`` is done; else it comes again, and its entries are dropped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: Namespace,
        first_step: int,
        last_step: int,
        global_batch: int,
        blocks: Sequence[str] = (),
        looked: bool = True,
    ) -> None:
        self.accelerator, self.args, self.last_step = accelerator, args, last_step
        self.global_batch, self.blocks = global_batch, blocks
        self.path = Path(args.output_dir, "metrics.jsonl")
        self.samples_path = self.path.with_name("sample_losses.jsonl")
        self._reset()
        self._samples: list[Tensor] = []  # (B, 3): step, index and loss, on the device
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.path, self.samples_path):
                if path is self.path or path.is_file():
                    kept = [record for record in entries(path) if first_step and record["step"] <= first_step]
                    if path is self.path and not looked:
                        kept = [record for record in kept if record["step"] < first_step or "lr" in record]
                    write_text(path, lines(kept))
        accelerator.init_trackers(args.tracker_project_name, {k: _plain(v) for k, v in recipe(args).items()})
        self._last_step, self._since = first_step, time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether an entry follows a step: every --logging_steps, with each checkpoint, and at the end."""
        every = (self.args.logging_steps, self.args.checkpointing_steps)
        return step == self.last_step or any(step % steps == 0 for steps in every)

    def add(self, step: int, loss: Tensor, weight: Tensor, terms: BatchLosses) -> None:
        """One micro-batch, before its backward pass.

        Args:
            step: the optimizer step that it belongs to, counted from 1.
            loss, weight: what is trained on, and w, both ().
        """
        losses = torch.stack([loss, terms.diffusion_loss, terms.lpl, weight * terms.lpl]).detach()
        counts = torch.ones_like(losses[:2])
        counts[1] = float(terms.with_lpl)
        finite = losses.isfinite().all()
        self._sums += _where(finite, torch.cat([losses, counts]))
        self._count += 1
        self._inside += terms.inside / len(terms.errors)
        self._rows += terms.rows
        if terms.by_block is not None:
            self._by_block += _where(finite, terms.by_block)
        if terms.with_lpl and any(map(self.is_due, range(step, step + self.args.lpl_every))):
            gradients = terms.gradients(weight)  # an entry comes before the next step with LPL
            self._squares += _where(gradients.isfinite().all(), gradients)
            self._looked = True

    def write(self, step: int, lr: float, lpl_weight: Tensor) -> dict[str, str]:
        """Log the means since the last call; returns them as the progress bar shows them."""
        sums = self.accelerator.reduce(self._summed(), "mean").tolist()  # waits for the device: the time is true
        loss, diffusion_loss, lpl, weighted, count, with_lpl, of_lpl, of_diffusion, inside, rows, *by_block = sums
        now = time.perf_counter()
        record = {"lpl_weight": float(lpl_weight)}
        if count:  # else no loss was finite
            loss, diffusion_loss = loss / count, diffusion_loss / count
            record |= {"loss": loss, "diffusion_loss": diffusion_loss}
        if with_lpl or (count and self.args.lpl_every == 1):
            lpl, weighted = (value / max(with_lpl, 1) for value in (lpl, weighted))
            total = diffusion_loss + weighted
            record |= {"lpl": lpl, "lpl_share": weighted / total if total else 0.0}
        if self._looked:
            norms = math.sqrt(of_lpl), math.sqrt(of_diffusion)
            record["lpl_gradient_share"] = norms[0] / sum(norms) if any(norms) else 0.0
        if rows:
            parts, kept = by_block[: len(self.blocks)], by_block[len(self.blocks) :]
            record |= {f"lpl/{name}": part / max(with_lpl, 1) for name, part in zip(self.blocks, parts, strict=True)}
            record |= {f"kept/{name}": share / rows for name, share in zip(self.blocks, kept, strict=True)}
        speed = (step - self._last_step) * self.global_batch / (now - self._since)
        record |= {"inside": inside / self._count, "lr": lr, "images_per_second": speed}
        self._reset()
        self._append(step, record)
        self._write_samples()
        self._last_step, self._since = step, time.perf_counter()
        return {
            "loss": f"{loss:.4f}" if count else "not finite",
            **({"lpl": f"{lpl:.4f}", "share": f"{record['lpl_share']:.0%}"} if "lpl" in record else {}),
            "lr": f"{lr:.1e}",
            "img/s": f"{speed:.3g}",
        }

    def state(self) -> list[list[float]]:
        """What is summed since the last entry, a list for each process; all have to ask. Waits for the device."""
        sums = torch.cat([self._sums, self._squares, self._by_block.flatten()])
        host = [self._count, self._rows, self._inside, self._looked]
        exact = torch.float32 if sums.device.type == "mps" else torch.float64
        mine = torch.cat([sums.to(exact), torch.tensor(host, dtype=exact, device=sums.device)])
        self._write_samples()
        rows = self.accelerator.gather(mine[None]).tolist()
        return [[self._last_step, time.perf_counter() - self._since, *row] for row in rows]

    def resume(self, state: list[list[float]]) -> None:
        """Go on from what :meth:`state` gave; with another number of processes or blocks, from nothing."""
        device, blocks = self.accelerator.device, len(self.blocks)
        if len(state) != self.accelerator.num_processes or len(state[0]) != 14 + 2 * blocks:
            return
        self._last_step, seconds, *sums, count, rows, inside, looked = state[self.accelerator.process_index]
        self._sums, self._squares, by_block = torch.tensor(sums, device=device).split([6, 2, 2 * blocks])
        self._by_block = by_block.view(2, blocks)
        self._count, self._rows = int(count), int(rows)
        self._inside, self._looked = inside, bool(looked)
        self._since -= seconds

    def _reset(self) -> None:
        """Begin to sum anew."""
        device = self.accelerator.device
        # Of the micro-batches whose losses are finite: the losses, their number, and that of those with LPL.
        self._sums, self._squares = torch.zeros(6, device=device), torch.zeros(2, device=device)
        self._by_block = torch.zeros(2, len(self.blocks), device=device)  # as in BatchLosses
        self._count = self._rows = 0  # micro-batches, and samples that LPL looked at
        self._inside, self._looked = 0.0, False

    def _summed(self) -> Tensor:
        """What this process has found, as one vector."""
        host = self._sums.new_tensor([self._inside, self._rows])
        return torch.cat([self._sums, self._squares, host, self._by_block.flatten()])

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
        return entries(self.path)

    def _append(self, step: int, record: dict[str, float]) -> None:
        self.accelerator.log(record, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(lines([{"step": step} | record]))

    def _write_samples(self) -> None:
        if not self._samples:
            return
        rows = self.accelerator.gather(torch.cat(self._samples)).tolist()
        self._samples.clear()
        if self.accelerator.is_main_process:
            losses = [{"step": int(step), "image": int(index), "loss": loss} for step, index, loss in rows]
            with self.samples_path.open("a") as file:
                file.write(lines(sorted(losses, key=lambda entry: entry["step"])))  # processes come one by one


def _where(condition: Tensor, values: Tensor) -> Tensor:
    """The values, or zeros."""
    return torch.where(condition, values, torch.zeros_like(values))


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
