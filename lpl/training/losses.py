"""TODO: what is here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpl.loss import LatentPerceptualLoss


@dataclass
class BatchLosses:
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
