"""The log of a run: the progress bar, ``metrics.jsonl``, and the trackers.

Numbers are summed on the device and fetched at logging steps only, so that no other step waits for them. Each covers
the steps since the last entry:

* ``loss``, ``diffusion_loss``: means.
* ``lpl``: mean over the steps with LPL (with --lpl_every not all), unweighted; ``lpl/mid``, ``lpl/up_0``, ... are the
  blocks' parts of it, depth weights included; ``kept/mid``, ... are the shares of positions that the masks keep.
* ``lpl_weight``: w of the last step; ``lpl_share``: w LPL / (L_diffusion + w LPL), in expectation.
* ``lpl_gradient_share``: |w dLPL/dD| / (|w dLPL/dD| + |dL_diffusion/dD|), norms of the gradient at the model's output
  over a whole optimizer step, the last one with LPL.
* ``lpl_gradient_cosine``: mean cosine of these two gradients over the samples that LPL was computed on, before any
  projection; ``lpl_gradient_cosine/0.1_to_0.25``, ...: over those whose sigma is such a share of the threshold.
* ``lpl_pull``: mean pull of the gradient that LPL has in the step (:mod:`lpl.gradients`), before any projection.
* ``inside``: share of samples below the sigma threshold; ``images_per_second``: of all processes together.

A number that was not measured since the last entry is left out. Time within :meth:`Log.paused` does not count.

A held-out validation has an entry of its own, with ``validation_loss`` and ``validation_lpl``. With --debug_loss,
``sample_losses.jsonl`` has the diffusion loss of each sample of each step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from lpl.config.groups import Output, Validation
from lpl.gradients import LEVEL_NAMES, summed_by_level
from lpl.student import FAITHFUL, PULLS_OF, relative_pull
from lpl.tools import layout
from lpl.tools.files import entries, lines, number_entries, write_text
from lpl.training.losses import BatchLosses
from lpl.training.start import Length, Run


logger = logging.getLogger(__name__)


class Log:
    """The log of one run, continued after a resume.

    Entries of steps later than the run's, from a run that was cut short, are dropped; so is the validation after its
    step, unless the checkpoint says that it was done.

    Args:
        lpl_every: every how many optimizer steps LPL is on.
        blocks: names of the decoder blocks that LPL compares, or of the student's depths.
        student: a student takes LPL's place.
    """

    def __init__(
        self,
        run: Run,
        length: Length,
        validation: Validation,
        output: Output,
        lpl_every: int = 1,
        blocks: Sequence[str] = (),
        student: bool = False,
    ) -> None:
        self.student = student
        self.accelerator, self.length, self.lpl_every, self.blocks = run.accelerator, length, lpl_every, blocks
        self.every = (validation.logging_steps, output.checkpointing_steps)
        self.debug_loss = validation.debug_loss
        self.path, self.samples_path = run.folder / layout.LOG, run.folder / layout.SAMPLE_LOSSES
        self._sums: dict[str, Tensor] = {}  # on the device
        self._reset()
        self._samples: list[tuple[int, Tensor, Tensor]] = []  # step, index, and on the device the loss, both (B,)
        if run.is_main:
            self._continue(run.step, run.progress.looked)
        flags = {name: _plain(value) for name, value in run.recipe.items()}
        self.accelerator.init_trackers(validation.tracker_project_name, flags)
        self.first_step = self._last_step = run.step
        self._since = time.perf_counter()
        self._weight = torch.zeros(())  # w of the last step
        self._bar: tqdm | None = None
        self._resume(run.progress.log)

    def _continue(self, first_step: int, validated: bool) -> None:
        """Drop the entries of a run that was cut short."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.samples_path):
            if path is self.path or path.is_file():
                kept = [record for record in entries(path) if first_step and record["step"] <= first_step]
                if path is self.path and not validated:
                    kept = [record for record in kept if record["step"] < first_step or "lr" in record]
                write_text(path, lines(kept))

    def is_due(self, step: int) -> bool:
        """Whether an entry follows a step: every --logging_steps, with each checkpoint, and at the end."""
        return step == self.length.max_steps or any(step % steps == 0 for steps in self.every)

    def start_bar(self) -> None:
        """Show the progress bar."""
        total, shown = self.length.max_steps, self.accelerator.is_main_process
        self._bar = tqdm(total=total, initial=self.first_step, disable=not shown, desc="steps", delay=0, mininterval=1)

    def close_bar(self, step: int) -> None:
        """The bar's end, after a step."""
        self._advance(step)
        if self._bar is not None:
            self._bar.close()

    def _advance(self, step: int) -> None:
        """Show that the steps up to this one are under way: the device may be behind."""
        if self._bar is not None:
            self._bar.update(max(step - self._bar.n, 0))

    def observe(self, step: int, batch: Mapping[str, Any], losses: BatchLosses, total: Tensor, weight: Tensor) -> None:
        """Record one micro-batch, before its backward pass.

        Args:
            step: the optimizer step that it belongs to, counted from 1.
            total, weight: L_total and w of Eq. 3, both ().
        """
        terms = torch.stack([total, losses.diffusion_loss, losses.lpl, weight * losses.lpl]).detach()
        counts = torch.ones_like(terms[:2])
        if not losses.with_lpl:
            counts[1:].zero_()  # counts[1] = 0 would be a copy that waits
        finite = terms.isfinite().all()
        self._sums["losses"] += _where(finite, torch.cat([terms, counts]))
        self._count += 1
        self._advance(step - 1)
        self._weight = weight
        self._inside += losses.inside / len(losses.errors)
        self._rows += losses.rows
        if losses.by_block is not None:
            parts, kept = losses.by_block
            self._sums["by_block"] += torch.stack([_where(finite, parts), kept])
        if losses.cosines is not None and losses.levels is not None:
            self._sums["cosines"] += summed_by_level(losses.cosines, losses.levels)
        if losses.pulls is not None:
            known = losses.pulls.isfinite()
            self._sums["pulls"] += torch.stack([_where(known, losses.pulls).sum(), known.sum()])
        if losses.squares is not None and any(map(self.is_due, range(step, step + self.lpl_every))):
            squares = torch.stack([weight.square(), torch.ones_like(weight)]) * losses.squares
            self._sums["squares"] += _where(squares.isfinite().all(), squares)  # an entry comes before the next LPL
            self._seen = True
        if losses.fidelity is not None:
            fidelity = losses.fidelity.summed()
            self._sums["fidelity"] += fidelity
            self._sums["student_pulls"] += fidelity[2:]
        if self.debug_loss:
            self._samples.append((step, batch["index"], losses.errors.detach()))

    def write(self, step: int, lr: float) -> None:
        """Log the means since the last call, and show them in the progress bar."""
        # Waits for the device, so that the time is true
        sums = cast(Tensor, self.accelerator.reduce(self._summed(), "mean")).cpu()
        now = time.perf_counter()
        record = {"lpl_weight": float(self._weight)} | self._means(self._apart(sums[:-2]), *sums[-2:].tolist())
        speed = (step - self._last_step) * self.length.global_batch / (now - self._since)
        record |= {"lr": lr, "images_per_second": speed}
        self._reset()
        if "student_pull" in record:
            self._sums["student_pulls"].zero_()
        if "student_cosine" in record:
            self._check_student(step, **{name: value for name, value in record.items() if name.startswith("student_")})
        self._append(step, record)
        self._write_samples()
        self._last_step, self._since = step, time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix(_shown(record), refresh=False)
        self._advance(step)

    def _check_student(
        self, step: int, student_cosine: float, student_error: float, student_pull: float | None = None
    ) -> None:
        """Warn of a student that is not faithful."""
        weak = student_pull is not None and student_pull < FAITHFUL
        if weak or student_cosine < FAITHFUL or student_error > 1.0:
            pull = "" if student_pull is None else f" and {student_pull:.2f} of its pull towards contrast"
            logger.warning(
                f"--lpl_student: at step {step} its gradient has a cosine of {student_cosine:.2f} with LPL's, a "
                f"relative error of {student_error:.2f}{pull}; with a cosine or pull below {FAITHFUL}, or an error "
                "above 1, it does not fit these images or this denoiser: make one from them by python -m "
                "lpl.distill, or correct it more often (--lpl_correct_every)"
            )

    def _means(self, tensors: Mapping[str, Tensor], inside: float, rows: float) -> dict[str, float]:
        """The numbers of an entry from sums over its micro-batches, means over the processes."""
        sums = {name: value.tolist() for name, value in tensors.items()}
        loss, diffusion_loss, lpl, weighted, count, with_lpl = sums["losses"]
        record: dict[str, float] = {}
        if count:  # else no loss was finite
            diffusion_loss /= count
            record |= {"loss": loss / count, "diffusion_loss": diffusion_loss}
        if with_lpl:
            lpl, weighted = lpl / with_lpl, weighted / with_lpl
            total = diffusion_loss + weighted
            record |= {"lpl": lpl, "lpl_share": weighted / total if total else 0.0}
        if self._seen:
            norms = [math.sqrt(square) for square in sums["squares"]]  # of LPL and of the diffusion loss
            record["lpl_gradient_share"] = norms[0] / sum(norms) if any(norms) else 0.0
        cosines, counts = sums["cosines"]
        if sum(counts):
            record["lpl_gradient_cosine"] = sum(cosines) / sum(counts)
            found = zip(LEVEL_NAMES, cosines, counts, strict=True)
            record |= {f"lpl_gradient_cosine/{name}": total / number for name, total, number in found if number}
        pull, pulled = sums["pulls"]
        if pulled:
            record["lpl_pull"] = pull / pulled
        if rows:
            parts, kept = sums["by_block"]
            record |= {f"lpl/{name}": part / max(with_lpl, 1) for name, part in zip(self.blocks, parts, strict=True)}
            if not self.student:  # which looks everywhere
                record |= {f"kept/{name}": share / rows for name, share in zip(self.blocks, kept, strict=True)}
        cosine, error, *_, corrected = sums["fidelity"]
        if corrected:
            record |= {"student_cosine": cosine / corrected, "student_error": math.sqrt(error / corrected)}
            *pulls, pulled_on = sums["student_pulls"]
            enough = pulled_on * self.accelerator.num_processes >= PULLS_OF
            if enough and (pull := relative_pull(*pulls)) is not None:
                record["student_pull"] = pull
        return record | {"inside": inside / self._count}

    def state(self) -> list[list[float]]:
        """The sums since the last entry, a list for each process. Every process calls it; waits for the device."""
        sums, host = self._flat(), [self._count, self._rows, self._inside, self._seen]
        exact = torch.float32 if sums.device.type == "mps" else torch.float64
        mine = torch.cat([sums.to(exact), torch.tensor(host, dtype=exact, device=sums.device)])
        self._write_samples()
        rows = cast(Tensor, self.accelerator.gather(mine[None])).tolist()
        return [[self._last_step, time.perf_counter() - self._since, *row] for row in rows]

    def _resume(self, state: list[list[float]]) -> None:
        """Continue from what :meth:`state` returned; with another number of processes or blocks, from zero."""
        device = self.accelerator.device
        if len(state) != self.accelerator.num_processes or len(state[0]) != 2 + len(self._flat()) + 4:
            return
        step, seconds, *sums, count, rows, inside, seen = state[self.accelerator.process_index]
        self._last_step = int(step)
        self._sums = self._apart(torch.tensor(sums, device=device))
        self._count, self._rows = int(count), int(rows)
        self._inside, self._seen = inside, bool(seen)
        self._since -= seconds

    def _reset(self) -> None:
        """Set all sums to zero."""
        zeros = partial(torch.zeros, device=self.accelerator.device)
        self._sums = {  # in the order that checkpoints have
            "losses": zeros(6),  # of the micro-batches with finite ones: four losses, their number, that with LPL
            "squares": zeros(2),  # of the gradients of LPL and of the diffusion loss
            "cosines": zeros(2, len(LEVEL_NAMES)),  # as of summed_by_level
            "pulls": zeros(2),  # their sum and number
            "fidelity": zeros(6),  # of the samples that a student was corrected on, as of Fidelity.summed
            "student_pulls": self._sums.get("student_pulls", zeros(4)),  # since the last entry that has one
            "by_block": zeros(2, len(self.blocks)),  # as in BatchLosses
        }
        self._count = self._rows = 0  # micro-batches, and samples that LPL has seen
        self._inside, self._seen = 0.0, False

    def _summed(self) -> Tensor:
        """All sums of this process as one vector; those of the host come last."""
        return torch.cat([self._flat(), torch.tensor([self._inside, self._rows], device=self.accelerator.device)])

    def _flat(self) -> Tensor:
        """The sums of this process on its device as one vector."""
        return torch.cat([value.flatten() for value in self._sums.values()])

    def _apart(self, flat: Tensor) -> dict[str, Tensor]:
        """The sums by name again."""
        parts = flat.split([value.numel() for value in self._sums.values()])
        return {name: part.view_as(self._sums[name]) for name, part in zip(self._sums, parts, strict=True)}

    def validation(self, step: int, numbers: Mapping[str, float]) -> None:
        """An entry of its own for what a validation has measured after a step."""
        self._append(step, dict(numbers))
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items())
        logger.info(f"after step {step}: {shown}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the time does not count for the images per second."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # the steps up to here do count
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def has_lpl(self) -> bool:
        """Whether an entry so far has LPL in its loss."""
        return any(record.get("lpl_share", 0) > 0 for record in self.records())

    def records(self) -> list[dict[str, Any]]:
        """Every entry so far; a line that a crash cut short ends them."""
        return number_entries(self.path)

    def _append(self, step: int, record: dict[str, float]) -> None:
        self.accelerator.log(record, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(lines([{"step": step} | record]))

    def _write_samples(self) -> None:
        if not self._samples:
            return
        rows = cast(Tensor, self.accelerator.gather(torch.cat([_rows(*sample) for sample in self._samples]))).tolist()
        self._samples.clear()
        if self.accelerator.is_main_process:
            losses = [{"step": int(step), "image": int(index), "loss": loss} for step, index, loss in rows]
            with self.samples_path.open("a") as file:
                file.write(lines(sorted(losses, key=lambda entry: entry["step"])))  # processes come one by one


def _shown(record: Mapping[str, float]) -> dict[str, str]:
    """An entry as the progress bar shows it."""
    return {
        "loss": f"{record['loss']:.4f}" if "loss" in record else "not finite",
        **({"lpl": f"{record['lpl']:.4f}", "share": f"{record['lpl_share']:.0%}"} if "lpl" in record else {}),
        "lr": f"{record['lr']:.1e}",
        "img/s": f"{record['images_per_second']:.3g}",
    }


def _rows(step: int, index: Tensor, errors: Tensor) -> Tensor:
    """Step, index in the data set and loss of samples, (B, 3), on the device of the losses."""
    exact = torch.float32 if errors.device.type == "mps" else torch.float64  # for an index of any size
    index = index.to(errors.device, exact)
    return torch.stack([torch.full_like(index, step), index, errors.to(exact)], 1)


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
                import wandb  # pyright: ignore[reportMissingImports]

                tracker.log({"validation": wandb.Image(str(path))}, step=step)
            case "trackio":
                import trackio  # pyright: ignore[reportMissingImports]

                tracker.log({"validation": trackio.Image(str(path))}, step=step)
            case "comet_ml":
                tracker.writer.log_image(str(path), name="validation", step=step)


def _plain(value: Any) -> Any:
    """TensorBoard takes numbers and strings only."""
    return value if isinstance(value, bool | int | float | str) else str(value)
