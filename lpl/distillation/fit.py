"""Trains a student on pairs, and measures how faithful it is to LPL on held-out images.

The loss of a pair is the squared error of the student's gradient relative to LPL's,

    |g_S - g_LPL|^2 / |g_LPL|^2 + VALUE_SHARE (log S - log LPL)^2,

so that pairs count alike whatever their error's size; the gradient of the first term goes back twice through the
student. The batch of a step comes from a generator keyed by (seed, step): a resumed fit equals an uninterrupted one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lpl.data.order import keyed_generator
from lpl.distillation.pairs import Pairs
from lpl.student import Student, StudentLoss, fidelity, relative_pull
from lpl.tools.files import lines, load_state, save_state, write_text


VALUE_SHARE = 0.1
LARGEST_NORM = 1.0  # of the gradient, which is clipped
ROOM = 2 * 2**30  # bytes
BYTES = 150  # that the gradient of a gradient takes, for each position and channel of a block (counted)
BATCHES = 103  # a stream of random numbers, beside those of lpl.data.order
STATE, LOG = "fit.safetensors", "fit.jsonl"


@dataclass(frozen=True)
class Schedule:
    """How a student is trained.

    Args:
        every: steps between two measurements on the held-out pairs; a resumed fit continues from the last one.
        width, depth: of the student.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    every: int
    width: int
    depth: int

    def rate(self, step: int) -> float:
        """The learning rate of a step: a short warm-up, then a cosine to 0."""
        warm_up = max(1, self.steps // 20)
        return self.learning_rate * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Measurement:
    """The student on N pairs: how its gradient compares with LPL's, and both values."""

    cosine: Tensor
    relative_error: Tensor
    pull: Tensor
    exact_pull: Tensor
    largest_pull: Tensor
    value: Tensor  # S
    exact: Tensor  # LPL

    def summary(self) -> dict[str, float | None]:
        """Means, the student's pull relative to LPL's, and the correlation of the logarithms of the values."""
        logs = torch.stack([self.value, self.exact]).clamp(min=1e-12).log()
        return {
            "cosine": self.cosine.mean().item(),
            "relative_error": self.relative_error.square().mean().sqrt().item(),
            "pull": relative_pull(*(x.sum().item() for x in (self.pull, self.exact_pull, self.largest_pull))),
            "log_correlation": torch.corrcoef(logs)[0, 1].item() if logs.shape[1] > 1 else math.nan,
        }


def measure(student: Student, pairs: Pairs, batch_size: int, device: torch.device) -> Measurement:
    """Compare the student with LPL on some pairs."""
    loss, found = StudentLoss(student), []
    batch_size = min(batch_size, at_once(student, pairs))
    for start in range(0, len(pairs), batch_size):
        chosen = pairs.select(torch.arange(start, min(start + batch_size, len(pairs))))
        predicted = chosen.predicted.to(device).requires_grad_()
        value = loss(predicted, chosen.latents.to(device))
        (gradient,) = torch.autograd.grad(value.sum(), predicted)
        compared = fidelity(gradient.cpu(), chosen.gradient, chosen.predicted)
        found.append([*compared, value.detach().cpu(), chosen.value])
    student.requires_grad_(True).train()
    return Measurement(*(torch.cat(column) for column in zip(*found)))


def fit(
    student: Student,
    pairs: Pairs,
    held_out: Pairs,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> None:
    """Train the student; continues from the folder's state if there is one.

    Writes ``fit.jsonl``, the measurements by step, and the state.

    Raises:
        ValueError: if the state is of another schedule.
    """
    cast(nn.Module, student).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    step, log = _resume(student, optimizer, schedule, folder)
    if not log:
        _scale(student, pairs, schedule.batch_size, device)
    with tqdm(total=schedule.steps, initial=step, desc="student") as progress:
        while True:
            if step % schedule.every == 0 or step == schedule.steps:
                if not log or log[-1]["step"] < step:
                    log.append({"step": step} | measure(student, held_out, schedule.batch_size, device).summary())
                    write_text(folder / LOG, lines(log))
                    state = {
                        "step": step,
                        "schedule": asdict(schedule),
                        "student": student.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "log": log,
                    }
                    save_state(state, folder / STATE)
                progress.set_postfix(cosine=f"{log[-1]['cosine']:.3f}", error=f"{log[-1]['relative_error']:.3f}")
            if step >= schedule.steps:
                return
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            generator = keyed_generator(schedule.seed, step, 0, BATCHES)
            chosen = pairs.select(torch.randint(len(pairs), (schedule.batch_size,), generator=generator))
            backward(student, chosen, device)
            torch.nn.utils.clip_grad_norm_(student.parameters(), LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update()


def at_once(student: Student, pairs: Pairs) -> int:
    """As many pairs as take ROOM in :func:`backward`."""
    config: Any = student.config
    return max(1, ROOM // (BYTES * config.width * config.depth * pairs.latents[0, 0].numel()))


def backward(student: Student, pairs: Pairs, device: torch.device) -> None:
    """Add the gradient of the mean loss of some pairs, of which a part is in memory at a time."""
    for part in torch.arange(len(pairs)).split(at_once(student, pairs)):
        (len(part) / len(pairs) * _loss(student, pairs.select(part), device)).backward()


def _loss(student: Student, pairs: Pairs, device: torch.device) -> Tensor:
    """The mean loss of some pairs, ()."""
    predicted, latents, exact, value = (
        x.to(device) for x in (pairs.predicted, pairs.latents, pairs.gradient, pairs.value)
    )
    predicted.requires_grad_()
    ours = student.terms(predicted, latents).sum(0)  # S, (B,)
    (gradient,) = torch.autograd.grad(ours.sum(), predicted, create_graph=True)
    error = (gradient - exact).square().flatten(1).sum(1) / exact.square().flatten(1).sum(1)
    return (error + VALUE_SHARE * (ours / value).log().square()).mean()


@torch.no_grad()
def _scale(student: Student, pairs: Pairs, batch_size: int, device: torch.device) -> None:
    """Start where S is as large as LPL on average."""
    first = pairs.select(torch.arange(min(batch_size, len(pairs))))
    value = student.terms(first.predicted.to(device), first.latents.to(device)).sum(0).cpu()
    student.log_weights.add_((first.value / value).log().mean())


def _resume(
    student: Student, optimizer: torch.optim.Optimizer, schedule: Schedule, folder: Path
) -> tuple[int, list[dict[str, Any]]]:
    if not (folder / STATE).is_file():
        return 0, []
    state = load_state(folder / STATE)
    for name, value in asdict(schedule).items():
        if name != "every" and state["schedule"][name] != value:
            raise ValueError(
                f"--output_dir {folder}: it holds a student trained with --{name} {state['schedule'][name]}, and now "
                f"it is {value}; delete its {STATE} to train another one on the same pairs"
            )
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], list(state["log"])
