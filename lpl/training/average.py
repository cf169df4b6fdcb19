"""TODO: what is here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lpl.tools.files import write_text
from lpl.training.parts import TrainedParts


EMA_FOLDER, EMA_FILE = "ema", "ema.json"


class MovingAverage(EMAModel):
    """The exponential moving average of what is trained, as diffusers has it; whether a step counts may be known on
    the device only.

    Args:
        decay: it is reached slowly: after n steps it is at most (n + 1) / (n + 10).
        foreach: all parameters at once, which is faster and takes their memory a second time for a moment.
        offload: it waits in the CPU's memory from step to step.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], decay: float, foreach: bool = False, offload: bool = False
    ) -> None:
        super().__init__(parameters, decay=decay, foreach=foreach)
        self.device = parameters[0].device
        self.count = torch.zeros((), device=self.device)
        self.offload = offload
        if offload:
            self.to("cpu")

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], skipped: Tensor) -> None:
        """Move towards the parameters, unless ``skipped``, (), is 1."""
        self.count += 1 - skipped
        weight = (9 / (9 + self.count)).clamp(min=1 - self.decay)  # 1 - decay, without its cancellation
        weight = torch.where(self.count > 1, weight, torch.ones_like(weight)) * (1 - skipped)
        if self.offload:
            self.to(self.device)
        if self.foreach:
            steps = torch._foreach_sub(list(parameters), self.shadow_params)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(self.shadow_params, steps)
        else:
            for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
                shadow.lerp_(parameter, weight)
        if self.offload:
            self.to("cpu")  # blocking: a checkpoint may read it at once


@contextmanager
def averaged(ema: MovingAverage | None, trained: TrainedParts) -> Iterator[None]:
    """Within, the trained has the moving average's weights, if there is one."""
    if ema is None:
        yield
        return
    parameters = trained.weights()
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def save_ema(ema: MovingAverage, trained: TrainedParts, folder: str | Path) -> None:
    """Write the moving average as the trained's own weights are written, in ``ema/``."""
    with averaged(ema, trained):
        trained.save(Path(folder, EMA_FOLDER))
    write_text(Path(folder, EMA_FILE), json.dumps({"optimization_step": int(ema.count)}))


def load_ema(ema: MovingAverage, trained: TrainedParts, folder: str | Path) -> bool:
    """Read it again, through the trained's weights, which the caller loads afterwards. False where there is none."""
    found = Path(folder, EMA_FOLDER).is_dir()
    if found:
        trained.load(Path(folder, EMA_FOLDER))
        ema.count.fill_(json.loads(Path(folder, EMA_FILE).read_text())["optimization_step"])
    else:
        trained.load(folder)
    with torch.no_grad():
        for shadow, parameter in zip(ema.shadow_params, trained.weights(), strict=True):
            shadow.copy_(parameter)
    return found
