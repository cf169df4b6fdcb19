"""Both terms of Eq. 3 for one micro-batch, and what the log and the health checks see of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from lpl.autoencoders import encode, feature_vae, sampled_latents
from lpl.config.groups import Lpl
from lpl.gradients import conflict, contrast, cosine
from lpl.loss import Formed, LatentPerceptualLoss
from lpl.student import Fidelity, StudentLoss, load_student
from lpl.tools.machine import DTYPES
from lpl.training.loading import loading_weights
from lpl.training.speed import lay_out
from lpl.weighting import LplWeight


@dataclass
class BatchLosses:
    """Both terms of Eq. 3 for a micro-batch of B samples, on the device."""

    errors: Tensor  # (B,), the diffusion loss of each sample, times both its weights
    lpl: Tensor  # (), averaged over the batch
    model_output: Tensor  # D, (B, C, h, w)
    inside: int  # samples inside the threshold
    with_lpl: bool  # whether the step has LPL; it is 0 even then if no sample is inside
    rows: int = 0  # samples that LPL was computed on
    by_block: Tensor | None = None  # (2, L): the parts of ``lpl``, and the kept shares summed over ``rows``
    by_row: tuple[Tensor, Tensor] | None = None  # places in the batch, and their LPL, both (rows,)
    corrected: tuple[Tensor, Tensor] | None = None  # places in the batch, and LPL less the student's value there
    fidelity: Fidelity | None = None  # of a student, on the samples that it was corrected on
    weights: Tensor | None = None  # (B,), of each sample for both terms, ``errors`` has it already; None: all 1
    levels: Tensor | None = None  # (B,), noise level of each sample (lpl/gradients.py)
    estimates: Tensor | None = None  # z0_hat of the rows that LPL was computed on, (rows, C, h, w)
    # Of both terms' gradients at D, once compared: (B,), NaN where one is zero; and |dLPL/dD|^2, |dL_diffusion/dD|^2
    cosines: Tensor | None = None
    pulls: Tensor | None = None  # LPL's, (B,), NaN where it has no gradient
    squares: Tensor | None = None

    def take(self, rows: Tensor, lpl: Tensor, share: float, lpl_loss: LatentPerceptualLoss | StudentLoss) -> None:
        """Record LPL of some rows, both (n,), which stand for that share of the batch."""
        self.rows = len(lpl)
        lpl = self._weighted(lpl, rows)
        self.by_row = rows, lpl.detach()
        self.lpl = share * lpl.mean()
        parts, kept = (
            torch.stack([of_block[name] for name in lpl_loss.block_names])  # (L, n)
            for of_block in (lpl_loss.last.terms, lpl_loss.last.kept)
        )
        self.by_block = torch.stack([share / self.rows * self._weighted(parts, rows).sum(1), kept.sum(1)])

    def correct(self, rows: Tensor, difference: Tensor, factor: float) -> None:
        """Add a factor times the mean difference of LPL and a student on some rows, both (n,)."""
        difference = self._weighted(difference, rows)
        self.lpl = self.lpl + factor * difference.mean()
        self.corrected = rows, difference.detach()

    def _weighted(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values of some rows, (..., n), times the rows' weights."""
        return values if self.weights is None else self.weights[rows] * values

    @property
    def diffusion_loss(self) -> Tensor:
        return self.errors.mean()

    def not_finite(self) -> Tensor:
        """Whether each sample's diffusion loss, and its LPL, is NaN or infinite, (B, 2)."""
        found = self.errors.detach().isfinite().logical_not()[:, None].repeat(1, 2)
        found[:, 1] = False
        for rows, values in filter(None, (self.by_row, self.corrected)):
            found[rows, 1] |= values.isfinite().logical_not()
        return found

    def compare_gradients(self, project: bool = False) -> None:
        """Compare both terms' gradients at D, before the backward pass, whose graph is kept.

        Args:
            project: take what conflicts with the diffusion loss's gradient out of LPL's; LPL's value stays.
        """
        of_lpl, of_diffusion = self._gradient(self.lpl), self._gradient(self.diffusion_loss)
        self.cosines = cosine(of_lpl, of_diffusion)
        if self.estimates is not None:
            self.pulls = -cosine(of_lpl, self._gradient(contrast(self.estimates)))
        if project:
            opposed = conflict(of_lpl, of_diffusion)
            of_lpl = of_lpl - opposed
            self.lpl = self.lpl + Formed.apply(self.model_output, torch.zeros_like(self.errors), -opposed).sum()
        self.squares = torch.stack([of_lpl.square().sum(), of_diffusion.square().sum()])

    def _gradient(self, term: Tensor) -> Tensor:
        """The gradient of a term, (), at D."""
        if not term.requires_grad:  # LPL where no sample was inside
            return torch.zeros_like(self.model_output)
        return torch.autograd.grad(term, self.model_output, retain_graph=True)[0]


def clean_latents(vae: ModelMixin, batch: Mapping[str, Any]) -> Tensor:
    """z0 of a batch, scaled, (B, C, h, w): of its pixels, or of their cached posterior."""
    noise = batch["posterior_noise"].to(vae.device, non_blocking=True)
    if "posterior" in batch:
        cached = {name: value.to(vae.device, non_blocking=True) for name, value in batch["posterior"].items()}
        return sampled_latents(vae, cached["mean"], cached.get("std"), noise)
    return encode(vae, batch["pixels"].to(vae.device, non_blocking=True), noise)


def perceptual_loss(
    vae: ModelMixin,
    lpl: Lpl,
    cache_dir: str | None,
    compile_for: int | None = None,
    channels_last: bool = False,
) -> LatentPerceptualLoss:
    """The latent perceptual loss that the flags ask for, through the pipeline's VAE or --lpl_vae_name_or_path.

    Args:
        compile_for: see :class:`LatentPerceptualLoss`.
        channels_last: lay out the decoder's convolutions so.
    """
    with loading_weights(f"--lpl_vae_name_or_path {lpl.lpl_vae_name_or_path}"):
        decoder = feature_vae(vae, lpl.lpl_vae_name_or_path, DTYPES[lpl.decoder_dtype()], cache_dir)
    if channels_last:
        lay_out(decoder)
    return LatentPerceptualLoss(
        decoder,
        blocks=lpl.lpl_blocks,
        gradient_checkpointing=lpl.lpl_gradient_checkpointing,
        compile_for=compile_for,
        **lpl.loss_options(),
    )


def student_of(lpl: Lpl, lpl_loss: LatentPerceptualLoss | None, cache_dir: str | None) -> StudentLoss | None:
    """The student of --lpl_student; None: LPL is computed by the decoder, or not at all.

    Raises:
        ValueError: if it cannot be loaded, or is none for this VAE and loss.
    """
    if lpl.lpl_student is None or not lpl.enabled:
        return None
    assert lpl_loss is not None
    with loading_weights(f"--lpl_student {lpl.lpl_student}"):
        return load_student(lpl.lpl_student, lpl_loss, cache_dir)


def lpl_weight(lpl: Lpl, device: torch.device) -> LplWeight:
    """w of Eq. 3 as the flags ask for it."""
    decides = lpl.loss_options() | {"blocks": lpl.lpl_blocks, "chunk_size": None}
    if lpl.lpl_vae_name_or_path is not None:
        decides["vae"] = lpl.lpl_vae_name_or_path
    return LplWeight(
        lpl.lpl_weight,
        lpl.lpl_measuring_steps,
        device,
        start_step=lpl.lpl_start_step,
        ramp_steps=lpl.lpl_ramp_steps,
        every=lpl.lpl_every,
        correct_every=lpl.lpl_correct_every,
        loss=str(sorted(decides.items())),
    )
