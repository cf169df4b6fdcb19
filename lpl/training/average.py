"""The exponential moving average (EMA) of the trained weights, and its files in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from lpl.config.groups import Optimization
from lpl.tools import layout
from lpl.tools.files import write_text
from lpl.training.parts import TrainedParts
from lpl.training.sharding import local, reshard


class MovingAverage(EMAModel):
    """Diffusers' EMA, except that whether a step counts may be known on the device only.

    Args:
        decay: reached slowly: after n steps the decay is at most (n + 1) / (n + 10).
        foreach: update all parameters at once: faster, but needs their memory a second time for a moment.
        offload: keep the average in CPU memory between steps. On a GPU it is pinned, and each update copies it there
            and back on a stream of its own, a parameter at a time or, with ``foreach``, all at once. Neither the host
            nor the next step's forward and backward pass waits for that.
    """

    def __init__(
        self, parameters: Sequence[Tensor], decay: float, foreach: bool = False, offload: bool = False
    ) -> None:
        super().__init__(cast(Any, parameters), decay=decay, foreach=foreach)
        self.device = parameters[0].device
        self.count = torch.zeros((), device=self.device)
        self.offload = offload
        self._stream: torch.cuda.Stream | None = None
        self._weight = torch.ones((), device=self.device)  # kept until the stream has read it
        if offload:
            self.to("cpu")
            if self.device.type == "cuda":
                self.pin_memory()
                self._stream = torch.cuda.Stream(self.device)

    @classmethod
    def of(cls, trained: TrainedParts, optimization: Optimization) -> MovingAverage | None:
        """The average that --use_ema asks for."""
        if not optimization.use_ema:
            return None
        assert optimization.ema_decay is not None
        decay, foreach, offload = optimization.ema_decay, optimization.foreach_ema, optimization.offload_ema
        return cls(local(trained.weights()), decay, foreach, offload)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], skipped: Tensor) -> None:
        """Move towards the parameters, unless ``skipped``, (), is 1. They may not change before :meth:`wait`."""
        self.count += 1 - skipped
        weight = (9 / (9 + self.count)).clamp(min=1 - self.decay)  # 1 - decay, without its cancellation
        weight = torch.where(self.count > 1, weight, torch.ones_like(weight)) * (1 - skipped)
        if not self.offload:
            self._move(self.shadow_params, parameters, weight)
            return
        self._weight = weight
        with self._beside():
            at_once = len(parameters) if self.foreach else 1
            for first in range(0, len(parameters), at_once):
                part = slice(first, first + at_once)
                moved = [shadow.to(self.device, non_blocking=True) for shadow in self.shadow_params[part]]
                self._move(moved, parameters[part], weight)
                for shadow, value in zip(self.shadow_params[part], moved, strict=True):
                    shadow.copy_(value, non_blocking=True)

    def _move(self, shadows: Sequence[Tensor], parameters: Sequence[Tensor], weight: Tensor) -> None:
        if self.foreach:
            steps = torch._foreach_sub(list(parameters), list(shadows))
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(list(shadows), steps)
        else:
            for shadow, parameter in zip(shadows, parameters, strict=True):
                shadow.lerp_(parameter, weight)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Within, the device works on the stream of the copies, after all that it was given before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        """Let the device, not the host, wait for the copies: what follows may change the parameters."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def copy_to(self, parameters: Iterable[Any]) -> None:
        """Copy the average into the parameters; waits until it is whole."""
        if self._stream is not None:
            self._stream.synchronize()
        super().copy_to(parameters)


@contextmanager
def gathered(average: MovingAverage | None, trained: TrainedParts, keep: bool) -> Iterator[None]:
    """Within, sharded parts can be saved by one process, with its average, from copies in its CPU memory.

    Called by every process.

    Args:
        keep: whether this is the process that saves.
    """
    if not trained.sharded or trained.lora:  # each process has all that is saved
        yield
        return
    copies = averages = trained.copied(keep)
    if average is not None:
        with averaged(average, trained):
            averages = trained.copied(keep)
    trained.copies, trained.averages = copies, averages
    try:
        yield
    finally:
        trained.copies = trained.averages = None


@contextmanager
def averaged(average: MovingAverage | None, trained: TrainedParts) -> Iterator[None]:
    """Within, the trained parts have the moving average's weights, or those of an optimizer that averages by itself,
    if there are any."""
    if trained.copies is not None:
        before, trained.copies = trained.copies, trained.averages
        try:
            yield
        finally:
            trained.copies = before
        return
    if average is None:
        with _by_the_optimizer(trained):
            yield
        return
    reshard(trained)
    parameters: list[Any] = local(trained.weights())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        reshard(trained)
        average.restore(parameters)


@contextmanager
def _by_the_optimizer(trained: TrainedParts) -> Iterator[None]:
    """Within, the weights are what a schedule-free optimizer says; behind it they are what they were, bit for bit."""
    if trained.averaging is None:
        yield
        return
    weights = trained.weights()
    before = [weight.detach().cpu().clone() for weight in weights]
    trained.averaging.eval()
    try:
        yield
    finally:
        trained.averaging.train()
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


def save_average(average: MovingAverage, trained: TrainedParts, folder: str | Path) -> None:
    """Write the moving average into ``ema/``, as the trained weights are written."""
    with averaged(average, trained):
        trained.save(Path(folder, layout.EMA))
    write_text(Path(folder, layout.EMA_COUNT), json.dumps({"optimization_step": int(average.count)}))


def load_average(average: MovingAverage, trained: TrainedParts, folder: str | Path) -> bool:
    """Read the average through the trained weights, which the caller loads afterwards.

    Returns:
        Whether the checkpoint has one; else the average starts from the checkpoint's weights.
    """
    found = Path(folder, layout.EMA).is_dir()
    if found:
        trained.load(Path(folder, layout.EMA))
        average.count.fill_(json.loads(Path(folder, layout.EMA_COUNT).read_text())["optimization_step"])
    else:
        trained.load(folder)
    with torch.no_grad():
        for shadow, parameter in zip(average.shadow_params, local(trained.weights()), strict=True):
            shadow.copy_(parameter)
    return found
