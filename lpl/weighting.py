"""The weight of the latent perceptual loss in the total (Eq. 3), fixed or found from a share.

The paper's best weight is "roughly a fifth of the total loss" (Sec. 4.3); its number belongs to an unpublished
reduction, the share carries over. ``auto:0.2`` measures both terms' means over the first steps and sets w so that
``w LPL / (L_diffusion + w LPL) = 0.2``. No step is lost: each uses what the steps before it measured (the first one
trains on the diffusion loss alone); after ``measuring_steps`` w is fixed.

With ``--lpl_every`` n only every n-th step has LPL, at n w: both terms are measured on those steps, and w remains
LPL's factor, and the share its share, in the mean over n steps.

Invariants. Everything stays on the device, so that no step waits for a number; the mean is over all processes and
micro-batches of a step, so that w does not depend on how a batch is divided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpl.loss import LatentPerceptualLoss


logger = logging.getLogger(__name__)


SHARE_RANGE = (0.05, 0.5)  # outside, the run warns: the term does nothing, or drowns the diffusion loss


def parse_weight(text: str) -> tuple[float | None, float | None]:
    """``"auto:0.2"`` -> (None, 0.2), a share of the total loss; ``"3.0"`` -> (3.0, None), a weight.

    Raises:
        ValueError: for anything else, a share outside (0, 1), or a weight that is negative or not finite.

    >>> parse_weight("auto:0.2"), parse_weight("0")
    ((None, 0.2), (0.0, None))
    """
    kind, _, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind == "auto" and 0 < value < 1:
        return None, value
    if not kind and 0 <= value < float("inf"):
        return value, None
    raise ValueError(
        f"--lpl_weight {text}: accepted are auto:SHARE with a share between 0 and 1, such as auto:0.2, "
        "a weight of 0 or more, and 0 for no latent perceptual loss"
    )


@dataclass
class Terms:
    """Both terms of Eq. 3 for a micro-batch of B samples, and what is seen of them, on the device."""

    errors: Tensor  # (B,), the weighted diffusion loss of each sample
    lpl: Tensor  # (), averaged over the batch
    model_output: Tensor  # D, (B, C, h, w)
    inside: int  # samples inside the threshold
    with_lpl: bool  # whether the step has LPL, which is 0 even so where no sample is inside
    rows: int = 0  # samples that it was taken on
    by_block: Tensor | None = None  # (2, L): the parts of ``lpl``, and the kept shares summed over ``rows``
    by_row: tuple[Tensor, Tensor] | None = None  # places in the batch, and their LPL, both (rows,)

    def take(self, rows: Tensor, lpl: Tensor, share: float, lpl_loss: LatentPerceptualLoss) -> None:
        """What the loss has just given for some rows, both (n,), which stand for that share of the batch."""
        self.rows = len(lpl)
        self.by_row = rows, lpl.detach()
        self.lpl = share * lpl.mean()
        parts, kept = (
            torch.stack([of_block[name] for name in lpl_loss.block_names]).sum(1)
            for of_block in (lpl_loss.last.terms, lpl_loss.last.kept)
        )
        self.by_block = torch.stack([share / self.rows * parts, kept])

    @property
    def diffusion_loss(self) -> Tensor:
        return self.errors.mean()

    def not_finite(self) -> Tensor:
        """Which samples' diffusion loss, and LPL, is NaN or infinite, (B, 2)."""
        found = self.errors.detach().isfinite().logical_not()[:, None].repeat(1, 2)
        found[:, 1] = False
        if self.by_row is not None:
            rows, lpl = self.by_row
            found[rows, 1] = lpl.isfinite().logical_not()
        return found

    def gradients(self, weight: Tensor) -> Tensor:
        """|w dLPL/dD|^2 and |dL_diffusion/dD|^2, (2,); before the backward pass, whose graph is kept."""
        squares = []
        for term in (weight * self.lpl, self.diffusion_loss):
            squares.append(torch.zeros_like(self.lpl))
            if term.requires_grad:  # not so for LPL where no sample was inside
                (gradient,) = torch.autograd.grad(term, self.model_output, retain_graph=True)
                squares[-1] = gradient.square().sum()
        return torch.stack(squares)


class LplWeight:
    """w of Eq. 3.

    Args:
        text: ``--lpl_weight``.
        measuring_steps: optimizer steps with LPL over which both terms are measured; those without do not count.
    """

    def __init__(self, text: str, measuring_steps: int, device: torch.device) -> None:
        self.text = text
        fixed, self.share = parse_weight(text)
        self.measuring_steps = measuring_steps
        self.steps = 0
        self._step_sums = torch.zeros(2, device=device)  # diffusion loss and LPL within the current step
        self._micro_batches = 0  # in it
        self._sums = torch.zeros(2, device=device)  # the same over all measured steps
        self.value: Tensor = torch.full((), 0.0 if fixed is None else fixed, device=device)

    @property
    def measuring(self) -> bool:
        return self.steps < self.measuring_steps

    def observe(self, diffusion_loss: Tensor, lpl: Tensor) -> None:
        """The unweighted means of one micro-batch, two of ()."""
        if self.measuring:
            self._micro_batches += 1
            terms = torch.stack([diffusion_loss, lpl]).detach()
            self._step_sums += torch.where(terms.isfinite().all(), terms, torch.zeros_like(terms))

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> bool:
        """After an optimizer step; ``reduce`` is the mean over processes. True where the measuring ends with it.

        Where no sample was inside the threshold in all that time there is no weight yet, and the measuring goes on.
        """
        if not self.measuring:
            return False
        self._sums += reduce(self._step_sums / self._micro_batches)
        self._step_sums.zero_()
        self._micro_batches = 0
        self.steps += 1
        if self.share is not None:
            diffusion_loss, lpl = self._sums
            ratio = self.share / (1 - self.share) * diffusion_loss / lpl
            self.value = torch.where(lpl > 0, ratio, torch.zeros_like(ratio))
        if not self.measuring and not bool(self._sums[1] > 0):
            logger.warning("no sample was inside the sigma threshold yet, so the weight of LPL is measured on")
            self.measuring_steps *= 2
        return not self.measuring

    def measured_share(self) -> float:
        """LPL's share of the total loss over the measured steps under the present weight; waits for the device."""
        diffusion_loss, lpl = self._sums.tolist()
        weighted = float(self.value) * lpl
        return weighted / max(diffusion_loss + weighted, 1e-12)

    def facts(self) -> dict[str, float]:
        """What the first steps measured, for the recipe; nothing before they are over."""
        if self.measuring or not self.steps:
            return {}
        return {"lpl_weight": float(self.value), "lpl_share": self.measured_share()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "steps": self.steps,
            "measuring_steps": self.measuring_steps,
            "sums": self._sums.clone(),
            "value": self.value.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was measured counts for the setting that it was measured for; another one starts anew."""
        if state["text"] != self.text:
            logger.warning("--lpl_weight was %s in the checkpoint and is %s from here on", state["text"], self.text)
            return
        self.steps, self.measuring_steps = state["steps"], state["measuring_steps"]
        self._sums = state["sums"].to(self._sums.device)
        self.value = state["value"].to(self._sums.device)


def ramp(step: int, start_step: int, ramp_steps: int) -> float:
    """The factor on w at an optimizer step, counted from 0: 0 before the start, then linearly up to 1.

    >>> [ramp(step, 2, 2) for step in range(5)], ramp(0, 0, 0)
    ([0.0, 0.0, 0.5, 1.0, 1.0], 1.0)
    """
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / ramp_steps) if ramp_steps else 1.0


def has_lpl(step: int, start_step: int, every: int) -> bool:
    """Whether an optimizer step, counted from 0, is one of those with LPL: every n-th from the start on.

    >>> [step for step in range(8) if has_lpl(step, 1, 3)]
    [1, 4, 7]
    """
    return step >= start_step and (step - start_step) % every == 0
