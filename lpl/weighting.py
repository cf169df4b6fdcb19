"""The weight w of the latent perceptual loss in the total loss (Eq. 3): fixed, or measured from a share.

The paper's best weight is "roughly a fifth of the total loss" (Sec. 4.3). Its number, 3.0, depends on an unpublished
reduction; the share does not. ``auto:0.2`` measures the means of both terms over the first steps and sets w so that
``w LPL / (L_diffusion + w LPL) = 0.2``. No step is lost: each step uses the measurement of the steps before it (the
first one trains on the diffusion loss alone). After ``measuring_steps`` w is fixed.

With ``--lpl_every`` n, every n-th step has LPL, at weight n w. Both terms are measured on those steps; w and the share
are those of the mean over n steps.

Invariants. All values stay on the device, so that no step waits for it. Means are over all processes and micro-batches
of a step, so that w does not depend on how a batch is divided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpl.gate import has_lpl, ramp
from lpl.options import parse_weight


logger = logging.getLogger(__name__)
SHARE_RANGE = (0.05, 0.5)  # outside, the run warns: LPL has no effect, or dominates the diffusion loss


class LplWeight:
    """w of Eq. 3.

    Args:
        text: ``--lpl_weight``.
        measuring_steps: number of optimizer steps with LPL over which both terms are measured.
        start_step, ramp_steps, every: which steps have LPL, and with how much of w, see :mod:`lpl.gate`.
        correct_every: with a student, n of its corrections; 0 = none.
        loss: what decides LPL's values, such as the flags that differ from the defaults.
    """

    def __init__(
        self,
        text: str,
        measuring_steps: int,
        device: torch.device,
        start_step: int = 0,
        ramp_steps: int = 0,
        every: int = 1,
        correct_every: int = 0,
        loss: str = "",
    ) -> None:
        self.text, self.loss = text, loss
        fixed, self.share = parse_weight(text)
        self.enabled = fixed != 0.0
        self.measuring_steps = measuring_steps
        self._times = 1  # that many times measuring_steps, since no sample was inside
        self.start_step, self.ramp_steps, self.every = start_step, ramp_steps, every
        self.correct_every = correct_every
        self.steps = 0
        self._step_sums = torch.zeros(2, device=device)  # diffusion loss and LPL of the current step, (2,)
        self._micro_batches = 0  # of the current step
        self._sums = torch.zeros(2, device=device)  # diffusion loss and LPL of all measured steps, (2,)
        self.value: Tensor = torch.full((), 0.0 if fixed is None else fixed, device=device)

    def applies(self, step: int) -> bool:
        """Whether an optimizer step, counted from 0, has LPL."""
        return self.enabled and has_lpl(step, self.start_step, self.every)

    def correction(self, step: int) -> int:
        """The factor on the difference between LPL and a student at an optimizer step with LPL, counted from 0.

        It is 1, which gives LPL itself, while w is measured for a share, since that is LPL's; then n on every n-th
        step with LPL, else 0.

        >>> weight = LplWeight("0.3", 1, torch.device("cpu"), every=2, correct_every=2)
        >>> [weight.correction(step) for step in range(0, 10, 2)]
        [2, 0, 2, 0, 2]
        """
        if self.measuring and self.share is not None:
            return 1
        number = (step - self.start_step) // self.every
        return self.correct_every if self.correct_every and number % self.correct_every == 0 else 0

    def at(self, step: int) -> Tensor:
        """w at an optimizer step, counted from 0, (); it grows from 0 over the ramp."""
        return self.value * ramp(step, self.start_step, self.ramp_steps)

    @property
    def measuring(self) -> bool:
        """Whether w is still being measured."""
        return self.steps < self._times * self.measuring_steps

    def observe(self, diffusion_loss: Tensor, lpl: Tensor) -> None:
        """Add the unweighted mean losses of one micro-batch, two of (); non-finite ones count as 0."""
        if self.measuring:
            self._micro_batches += 1
            terms = torch.stack([diffusion_loss, lpl]).detach()
            self._step_sums += torch.where(terms.isfinite().all(), terms, torch.zeros_like(terms))

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> bool:
        """Update w after an optimizer step (Eq. 3); returns whether the measurement ends with this step.

        If no sample was inside the threshold so far, w is still undefined and the measurement continues.

        Args:
            reduce: the mean over processes.
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
        if not self.measuring and not self.any_inside():
            logger.warning("no sample was inside the sigma threshold yet: the measurement of LPL's weight continues")
            self._times *= 2
        return not self.measuring

    def any_inside(self) -> bool:
        """Whether a sample was inside in the measured steps; waits for the device."""
        return bool(self._sums[1] > 0)

    def measured_share(self) -> float:
        """LPL's share of the total loss over the measured steps at the current weight; waits for the device."""
        diffusion_loss, lpl = self._sums.tolist()
        weighted = float(self.value) * lpl
        return weighted / max(diffusion_loss + weighted, 1e-12)

    def report(self) -> None:
        """Log what the first steps measured, and whether LPL's share of the loss makes sense."""
        logger.info(
            f"LPL weight {float(self.value):.4g}: with it, LPL would have been {self.measured_share():.1%} of the "
            f"total loss over its first {self.steps} steps"
        )
        if warning := self.share_warning():
            logger.warning(warning)

    def share_warning(self) -> str | None:
        """Why the measured share is too small or too large, and which flag to change; None: it is neither."""
        share, (low, high) = self.measured_share(), SHARE_RANGE
        if low <= share <= high:
            return None
        return (
            f"LPL is {share:.1%} of the loss; the paper found a fifth best, and outside {low:.0%} to {high:.0%} it "
            "does next to nothing or drowns the diffusion loss; --lpl_weight auto:0.2 finds the weight for a fifth"
        )

    def facts(self) -> dict[str, float]:
        """The measured weight and share, for the recipe; empty until the measurement has ended."""
        if self.measuring or not self.steps:
            return {}
        return {"lpl_weight": float(self.value), "lpl_share": self.measured_share()}

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "text": self.text,
            "loss": self.loss,
            "steps": self.steps,
            "times": self._times,
            "sums": self._sums.clone(),
            "value": self.value.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the measurement; it starts again if ``--lpl_weight`` has changed, or the loss that w is for."""
        if state["text"] != self.text:
            logger.warning("--lpl_weight was %s in the checkpoint and is %s from here on", state["text"], self.text)
            return
        if self.share is not None and state.get("loss", self.loss) != self.loss:
            logger.warning("--lpl_weight %s: it is measured again, since LPL is another one from here on", self.text)
            return
        self.steps, self._times = state["steps"], state.get("times", 1)
        self._sums = state["sums"].to(self._sums.device)
        self.value = state["value"].to(self._sums.device)
