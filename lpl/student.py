"""A student of the decoder: a small network at the latents' resolution that stands in for LPL (SPEC, "A student").

Vocabulary. f is the student, f_k its features at depth k, projected; z0 and z0_hat are scaled latents, (B, C, h, w).

    S_b = sum_k mean_c a_kc mean_hw (f_k(z0_hat) - f_k(z0))^2 / (var_kc + e)

var is the variance of f_k(z0_hat) over positions; a_kc are positive and learnt, e is as in ``lpl/terms.py``. Features
are normalised as the loss's own are: this is for "shared". The gradient through var pulls every prediction towards
more contrast, as LPL's does, which sharpens; without it, a student has too little of that pull, for all samples alike.

It is trained (``lpl/distillation``) so that S and its gradient with respect to z0_hat reproduce LPL and its gradient,
for one VAE and one configuration of the loss, which its own configuration records.

*Corrections* add n times the difference of the two gradients on every n-th step (:func:`difference`). For fixed
parameters the mean gradient over n steps is then that of LPL, whatever f is; the variance that this adds is n - 1
times the squared relative error of the student's gradient.

Invariants. One value per sample, in float32. The gradient is formed in the forward pass, as LPL's is, so that the
denoiser's backward pass keeps nothing of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from lpl.autoencoders import exact_precision, latent_channels
from lpl.gradients import centred
from lpl.loss import Formed, LatentPerceptualLoss, Measured
from lpl.masking import LossMask
from lpl.objectives import at_least_float32


GROUPS = 8  # of the group norms
PROBED = 4  # values of each of the decoder's parameters that identify it
FAITHFUL = 0.8  # mean cosine, and pull, below which a run warns
PULLS_OF = 32  # samples that a pull is measured on; on a few it is mostly noise
PULLS = 0.02  # least LPL's pull towards contrast, relative to the largest possible one, for a ratio to be meaningful
FORM = 2  # of S; 1 did not normalise features
FLAGS = {"mask_outliers": "--lpl_no_outlier_mask", "outliers": "--lpl_outlier_*"}  # of options; else --lpl_NAME
SAME_DECODER = 0.02  # largest relative difference of two probes; half precision is within 0.001


class Student(ModelMixin, ConfigMixin):
    """f: residual blocks of 3 x 3 convolutions at the latents' resolution, and a 1 x 1 projection at each depth.

    ``student(latents)`` gives the projected features of each depth, depth + 1 maps of (B, width, h, w); the first is
    before the first block. It saves and loads as diffusers' models do.

    Args:
        latent_channels: C.
        width: channels of the blocks, a multiple of GROUPS.
        depth: number of residual blocks; each sees 2 positions further on every side.
        loss: :attr:`LatentPerceptualLoss.options` of the loss that it reproduces.
        decoder: :func:`probe` of the VAE.
        resolution: side in pixels of the images that it was made from; LPL's statistics are over whole images.
        fidelity: what was measured on held-out images.
        form: FORM.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        width: int = 96,
        depth: int = 4,
        loss: Mapping[str, Any] | None = None,
        decoder: Mapping[str, list[float]] | None = None,
        resolution: int | None = None,
        fidelity: Mapping[str, Any] | None = None,
        form: int = FORM,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.projections = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(depth + 1))
        self.log_weights = nn.Parameter(torch.zeros(depth + 1, width))  # log a
        options = loss or {}
        own = options.get("variant") == "reference"  # which normalises by the target's norm, without gradient
        self.normalization = "none" if own else options.get("normalization", "shared")
        self.absolute = options.get("distance") == "l1"
        self.detach_statistics = options.get("detach_statistics", False)

    def forward(self, latents: Tensor) -> list[Tensor]:
        x = self.stem(latents)
        found = [self.projections[0](x)]
        for block, projection in zip(self.blocks, self.projections[1:]):
            x = block(x)
            found.append(projection(x))
        return found

    def terms(self, predicted_latents: Tensor, latents: Tensor, mask: LossMask | None = None) -> Tensor:
        """The parts of S by depth, (depth + 1, B); masks as in :mod:`lpl.masking`."""
        maps = list(zip(self(predicted_latents), self(latents)))
        everywhere = torch.ones_like(latents[:, :1])
        if mask is None:
            return self._terms(maps, everywhere)
        masked = self._terms(maps, mask.region(latents.shape[-2:]).to(latents.dtype))
        if not mask.unmasked_weight:
            return masked
        return masked + mask.unmasked_weight * (self._terms(maps, everywhere) - masked)

    def _terms(self, maps: Sequence[tuple[Tensor, Tensor]], keep: Tensor) -> Tensor:
        distances = (self._distance(x, y, keep) for x, y in maps)
        return torch.stack([(a * distance).mean(1) for a, distance in zip(self.log_weights.exp(), distances)])

    def _distance(self, x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        """Mean difference of prediction and target where kept, squared or absolute, normalised, (B, width).

        Fewer than 2 positions have no variance, and give 0, as in LPL.
        """
        if self.normalization == "separate":
            x, y = (
                (z - mean) / (v.detach() if self.detach_statistics else v).sqrt()
                for z, (mean, v) in ((z, _moments(z, keep)) for z in (x, y))
            )
        difference = x - y
        distance = _mean(difference.abs() if self.absolute else difference.square(), keep)
        if self.normalization == "shared":
            variance = _moments(x, keep)[1]
            variance = variance.detach() if self.detach_statistics else variance
            distance = distance / (variance.sqrt() if self.absolute else variance)
        return distance[:, :, 0, 0]


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """Over the kept positions, (B, width, h, w) and (B, 1, h, w) -> (B, width, 1, 1); 0 if there are none."""
    return (values * keep).sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True).clamp(min=1)


def _moments(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and variance plus e, of each channel over the kept positions; infinite for fewer than 2."""
    mean = _mean(x, keep)
    variance = _mean((x - mean).square(), keep)
    variance = variance + 1e-4 * variance.detach().mean(1, keepdim=True) + 1e-12
    return mean, torch.where(keep.sum((2, 3), keepdim=True) < 2, torch.inf, variance)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions):
            y = convolution(F.silu(norm(y)))
        return x + y


class StudentLoss:
    """``loss_fn(predicted_latents, latents) -> (B,)``, in place of :class:`LatentPerceptualLoss`.

    After a call, ``last`` holds the parts of each depth.
    """

    def __init__(self, student: Student) -> None:
        self.student = student.requires_grad_(False).eval()
        self.block_names = tuple(f"student_{depth}" for depth in range(len(student.projections)))
        self.last = Measured()

    def __call__(self, predicted_latents: Tensor, latents: Tensor, mask: LossMask | None = None) -> Tensor:
        """Scaled latents, two of (B, C, h, w) -> S_b, (B,); only the prediction receives a gradient."""
        wanted = torch.is_grad_enabled() and predicted_latents.requires_grad
        predicted = at_least_float32(predicted_latents.detach()).requires_grad_(wanted)
        with exact_precision(latents.device), torch.set_grad_enabled(wanted):
            terms = self.student.terms(predicted, at_least_float32(latents.detach()), mask)
        value = terms.detach().sum(0)
        self.last = Measured(
            dict(zip(self.block_names, terms.detach())), dict.fromkeys(self.block_names, torch.ones_like(value))
        )
        if not wanted:
            return value
        with exact_precision(latents.device):
            (gradient,) = torch.autograd.grad(terms.sum(), predicted)
        return Formed.apply(predicted_latents, value, gradient)


# Corrections ---------------------------------------------------------------------------------------------------------


class Fidelity(NamedTuple):
    """How well the student's gradient at z0_hat reproduces LPL's, per sample, (B,) each."""

    cosine: Tensor
    relative_error: Tensor  # |g_S - g_LPL| / |g_LPL|
    pull: Tensor  # of g_S towards more contrast: -<g_S, z0_hat - its means over positions>
    exact_pull: Tensor  # of g_LPL
    largest_pull: Tensor  # of a gradient as long as g_LPL

    def summed(self) -> Tensor:
        """Sums over the samples with a gradient: cosine, squared relative error, the pulls, and 1 for each; (6,)."""
        known = self.relative_error.isfinite()
        cosine, error, *pulls = self
        found = torch.stack([cosine, error.square(), *pulls, known.to(cosine.dtype)])
        return torch.where(known, found, torch.zeros_like(found)).sum(1)


def difference(value: Tensor, exact: Tensor, predicted_latents: Tensor, rows: Tensor) -> tuple[Tensor, Fidelity]:
    """LPL - S of some rows, (m,), and the student's fidelity there.

    Added n-fold on every n-th step, it corrects the student.

    Args:
        value: S of all rows, (B,).
        exact: LPL of those rows, (m,), computed on ``predicted_latents[rows]``.
        predicted_latents: what both have gradients at, (B, C, h, w).
    """
    ours, theirs = (
        torch.autograd.grad(term.sum(), predicted_latents, retain_graph=True)[0][rows] for term in (value, exact)
    )
    return exact - value[rows], fidelity(ours, theirs, predicted_latents[rows])


def fidelity(gradient: Tensor, exact: Tensor, predicted_latents: Tensor) -> Fidelity:
    """Compare two gradients with respect to the predicted latents, (B, C, h, w) each."""
    ours, theirs = gradient.flatten(1), exact.flatten(1)
    contrast = centred(predicted_latents.detach()).flatten(1)
    return Fidelity(
        cosine=F.cosine_similarity(ours, theirs, dim=1),
        relative_error=(ours - theirs).norm(dim=1) / theirs.norm(dim=1),
        pull=-(ours * contrast).sum(1),
        exact_pull=-(theirs * contrast).sum(1),
        largest_pull=theirs.norm(dim=1) * contrast.norm(dim=1),
    )


def relative_pull(pull: float, exact: float, largest: float) -> float | None:
    """The student's pull over LPL's, of sums over samples; None where LPL hardly pulls.

    >>> relative_pull(0.9, 1.0, 10.0), relative_pull(0.9, 0.1, 10.0), relative_pull(0.9, -1.0, 10.0)
    (0.9, None, None)
    """
    return pull / exact if exact > PULLS * largest else None


# Whose student it is -------------------------------------------------------------------------------------------------


def probe(vae: nn.Module) -> dict[str, list[float]]:
    """A few values of each parameter of the decoder, which tell it from another, whatever the precision."""
    decoder = getattr(vae, "decoder", vae)
    return {name: value.detach().flatten()[:PROBED].float().tolist() for name, value in decoder.named_parameters()}


def check_configuration(what: str, config: Mapping[str, Any], loss: LatentPerceptualLoss) -> None:
    """Refuse a student of another latent space, or another configuration of the loss; needs no weights.

    Args:
        what: the flag and its value.
        config: the student's.
        loss: the run's; its VAE may be without weights.

    Raises:
        ValueError: with what differs.
    """
    channels, made_for = latent_channels(loss.vae.config), config.get("loss")
    if config.get("_class_name") != Student.__name__ or not isinstance(made_for, Mapping):
        raise ValueError(f"{what}: it is no student; make one by python -m lpl.distill")
    if config.get("form") != FORM:
        raise ValueError(f"{what}: it is of an earlier version; make one by python -m lpl.distill")
    if config["latent_channels"] != channels:
        raise ValueError(
            f"{what}: it takes latents of {config['latent_channels']} channels, and this VAE's have {channels}"
        )
    for name, value in loss.options.items():
        if made_for.get(name) != value:
            flag = FLAGS.get(name, f"--lpl_{name}")
            raise ValueError(
                f"{what}: it was made for {name} {made_for.get(name)} of the loss, and the run has {value}; change "
                f"{flag}, or make a student for it by python -m lpl.distill"
            )


def check_decoder(what: str, config: Mapping[str, Any], vae: nn.Module) -> None:
    """Refuse a student of another VAE's decoder.

    Raises:
        ValueError: saying so.
    """
    made_for, own = dict(config.get("decoder") or {}), probe(vae)
    ours, theirs = (
        torch.tensor([x for name in sorted(own) for x in values.get(name, ())]) for values in (own, made_for)
    )
    if len(ours) != len(theirs) or (ours - theirs).norm() > SAME_DECODER * ours.norm():
        raise ValueError(f"{what}: it is the student of another VAE's decoder; make one by python -m lpl.distill")


def load_student(path: str, loss: LatentPerceptualLoss, cache_dir: str | None = None) -> StudentLoss:
    """A student from a folder or the Hub, in float32, on the device of the loss's decoder.

    Raises:
        OSError, ValueError: if it cannot be loaded, or is none for this loss.
    """
    config: Any = Student.load_config(path, cache_dir=cache_dir)
    check_configuration(f"--lpl_student {path}", config, loss)
    student = Student.from_pretrained(path, cache_dir=cache_dir, use_safetensors=True)
    check_decoder(f"--lpl_student {path}", student.config, loss.vae)
    nn.Module.to(student, loss.vae.device)
    return StudentLoss(student)
