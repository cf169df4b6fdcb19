"""Training objectives: the target of the denoiser, and the estimate of z0 from its output (Table 1, Sec. 3.3).

Vocabulary. ``latents`` is z0, ``noise`` is eps ~ N(0, I), ``noisy_latents`` is ``z_t = a_t z0 + b_t eps``, all
(B, C, h, w); ``timesteps`` is (B,); ``sigma = b_t / a_t`` is the noise-to-signal ratio, (B,).

=============== =============== =============== ============================== ===========================
objective       a_t             b_t             target of the denoiser D       estimate of z0 from D
=============== =============== =============== ============================== ===========================
epsilon         1/sqrt(1+s^2)   s/sqrt(1+s^2)   eps                            sqrt(1+s^2) z_t - s D
v_prediction    the same        the same        a eps - b z0                   a z_t - b D
sample          the same        the same        z0                             D
flow_matching   1 - t           t               eps - z0 (the velocity)        z_t - t D
=============== =============== =============== ============================== ===========================

The paper's row for Flow-OT, (x_t - t D) / (1 - t), holds for a D that predicts the noise; the flow models trained here
predict the velocity.

Invariants. Computations are in float32 (float64 for float64 latents), whatever the precision of the model's output: a
division by a small ``a_t`` in half precision destroys the estimate. Only :func:`expand` broadcasts ``(B,)``
coefficients over ``(B, C, h, w)``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from lpl.options import BIAS_STRATEGIES, WEIGHTING_SCHEMES


# The betas of Stable Diffusion, and of Sec. 4.1, for a model without betas.
SCALED_LINEAR_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def expand(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, (B,) -> (B, 1, 1, 1), with the rank and dtype of ``like``, (B, C, h, w).

    Raises:
        ValueError: if ``values`` is not (B,), which would broadcast over columns instead of samples.
    """
    if values.ndim != 1 or values.shape[0] != like.shape[0]:
        raise ValueError(
            f"one value per sample is needed, shape ({like.shape[0]},), but the shape is {tuple(values.shape)} "
            f"for latents of shape {tuple(like.shape)}"
        )
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _precise(device: torch.device) -> torch.dtype:
    """float64 if the device supports it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(x: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; return float32 and float64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Objective:
    """Base class of the objectives. ``timesteps`` are the inputs of the denoiser.

    Args:
        scheduler: a diffusers scheduler with the noise schedule.

    Raises:
        ValueError: if the objective is not defined on the scheduler's noise schedule.
    """

    name: ClassVar[str]

    def __init__(self, scheduler: Any) -> None:
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, (B,) -> two of (B,), float64."""
        raise NotImplementedError

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = a_t z0 + b_t eps, (B, C, h, w) (Table 1)."""
        latents, noise = at_least_float32(latents), at_least_float32(noise)
        a, b = (expand(c, latents) for c in self.coefficients(timesteps))
        return a * latents + b * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of D, (B, C, h, w) (Table 1)."""
        raise NotImplementedError

    def clean_latents(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        """The estimate of z0, (B, C, h, w), from D and z_t (Table 1)."""
        raise NotImplementedError

    def sigma(self, timesteps: Tensor) -> Tensor:
        """The noise-to-signal ratio b_t / a_t, (B,), float64; infinite where a_t is 0."""
        a, b = self.coefficients(timesteps)
        return b / a

    def sample_timesteps(self, uniform: Tensor, weights: Tensor | None = None) -> Tensor:
        """Uniform numbers in [0, 1), (B,) -> timesteps of the training schedule, (B,).

        Args:
            weights: relative frequency of each timestep (:func:`timestep_weights`).

        Raises:
            ValueError: for weights if timesteps are continuous.
        """
        raise NotImplementedError

    def weight(self, timesteps: Tensor, weighting_scheme: str | None, snr_gamma: float | None) -> Tensor | float:
        """The weight of each sample's diffusion loss, (B,), or 1.0 for all; LPL is not weighted by it."""
        raise NotImplementedError


class DiffusionObjective(Objective):
    """The variance-preserving objectives: a_t^2 = abar_t, b_t^2 = 1 - abar_t, integer timesteps (DDPM)."""

    def __init__(self, scheduler: Any) -> None:
        if is_flow(scheduler) or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"the objective {self.name!r} needs a scheduler with betas, but the pipeline has "
                f"{type(scheduler).__name__}, which has none; use --prediction_type flow_matching, "
                f"or lpl.training_scheduler({self.name!r}, scheduler)"
            )
        super().__init__(scheduler)
        self._alphas_cumprod = {torch.device("cpu"): scheduler.alphas_cumprod.double().cpu()}

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        device = timesteps.device
        if device not in self._alphas_cumprod:
            self._alphas_cumprod[device] = self._alphas_cumprod[torch.device("cpu")].to(device, _precise(device))
        alphas_cumprod = self._alphas_cumprod[device][timesteps.long()]  # (B,)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def sample_timesteps(self, uniform: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            timesteps = (uniform * self.num_train_timesteps).long()
        else:  # inverse transform sampling
            cumulative = weights.double().cumsum(0)  # (num_train_timesteps,)
            timesteps = torch.searchsorted(cumulative, uniform.double() * cumulative[-1], right=True)
        return timesteps.clamp(max=self.num_train_timesteps - 1)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """The weight of the diffusion loss, (B,), with the signal-to-noise ratio clamped to gamma (Min-SNR, Sec. 3.4).

        min(SNR, gamma) for an error in z0; divided by SNR for an error in eps, by SNR + 1 for one in v.
        """
        raise NotImplementedError

    def weight(self, timesteps: Tensor, weighting_scheme: str | None, snr_gamma: float | None) -> Tensor | float:
        return 1.0 if snr_gamma is None else self.min_snr_weight(timesteps, snr_gamma).float()


class Epsilon(DiffusionObjective):
    """D predicts the noise."""

    name = "epsilon"

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return at_least_float32(noise)

    def clean_latents(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        model_output, noisy_latents = at_least_float32(model_output), at_least_float32(noisy_latents)
        a, b = (expand(c, noisy_latents) for c in self.coefficients(timesteps))
        return (noisy_latents - b * model_output) / a

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        # min(SNR, gamma) / SNR, in a form that is 1 instead of 0/0 where a zero-terminal schedule has no signal
        return (gamma * self.sigma(timesteps) ** 2).clamp(max=1)


class VPrediction(DiffusionObjective):
    """D predicts v = a eps - b z0 (Salimans & Ho)."""

    name = "v_prediction"

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        latents, noise = at_least_float32(latents), at_least_float32(noise)
        a, b = (expand(c, latents) for c in self.coefficients(timesteps))
        return a * noise - b * latents

    def clean_latents(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        model_output, noisy_latents = at_least_float32(model_output), at_least_float32(noisy_latents)
        a, b = (expand(c, noisy_latents) for c in self.coefficients(timesteps))
        return a * noisy_latents - b * model_output

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        snr = self.sigma(timesteps) ** -2
        return snr.clamp(max=gamma) / (snr + 1)


class Sample(DiffusionObjective):
    """D predicts the clean latent z0."""

    name = "sample"

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return at_least_float32(latents)

    def clean_latents(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        return at_least_float32(model_output)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        return (self.sigma(timesteps) ** -2).clamp(max=gamma)


class FlowMatching(Objective):
    """D predicts the velocity eps - z0 of the straight path (Flow-OT); t = timesteps / num_train_timesteps."""

    name = "flow_matching"

    def __init__(self, scheduler: Any) -> None:
        if not is_flow(scheduler):
            raise ValueError(
                f"the objective 'flow_matching' needs a flow scheduler, but the pipeline has "
                f"{type(scheduler).__name__}; use --prediction_type epsilon, v_prediction or sample, "
                "or lpl.training_scheduler('flow_matching', scheduler)"
            )
        super().__init__(scheduler)
        config = scheduler.config
        # A dynamic shift depends on the image's size at sampling time; training ignores it, as in diffusers.
        shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift", 1.0))
        self.shift = float(shift or 1.0)

    def coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        t = timesteps.to(_precise(timesteps.device)) / self.num_train_timesteps
        return 1 - t, t

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return at_least_float32(noise) - at_least_float32(latents)

    def clean_latents(self, model_output: Tensor, noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        model_output, noisy_latents = at_least_float32(model_output), at_least_float32(noisy_latents)
        _, t = self.coefficients(timesteps)
        return noisy_latents - expand(t, noisy_latents) * model_output

    def sample_timesteps(self, uniform: Tensor, weights: Tensor | None = None) -> Tensor:
        """Continuous timesteps, shifted; ``uniform`` counts from the noisy end, as diffusers' density does."""
        if weights is not None:
            raise ValueError("--timestep_bias_strategy is not for flow_matching; use --weighting_scheme")
        t = 1 - uniform
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t * self.num_train_timesteps

    def weight(self, timesteps: Tensor, weighting_scheme: str | None, snr_gamma: float | None) -> Tensor | float:
        """That of ``--weighting_scheme`` (SD3, Sec. 3.1)."""
        _, t = self.coefficients(timesteps)
        t = t.clamp(min=1 / self.num_train_timesteps)
        return compute_loss_weighting_for_sd3(weighting_scheme or "none", t).float()


OBJECTIVES: dict[str, type[Objective]] = {c.name: c for c in (Epsilon, VPrediction, Sample, FlowMatching)}


def is_flow(scheduler: Any) -> bool:
    """Whether it is a flow scheduler: an Euler-type one, or a multistep solver with flow sigmas."""
    config = scheduler.config
    return (
        hasattr(scheduler, "scale_noise")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def own_objective(scheduler: Any) -> str:
    """The objective that a pipeline's model was trained on, by its scheduler's configuration."""
    return FlowMatching.name if is_flow(scheduler) else scheduler.config.get("prediction_type", Epsilon.name)


def get_objective(name: str, scheduler: Any) -> Objective:
    """The objective of that name on the scheduler's noise schedule.

    Raises:
        ValueError: for an unknown name, or a scheduler without the noise schedule that the objective needs.
    """
    return _objective_class(name)(scheduler)


def _objective_class(name: str) -> type[Objective]:
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; --prediction_type takes one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def training_scheduler(name: str, scheduler: Any) -> Any:
    """A scheduler for training and sampling with the objective, made from a pipeline's own scheduler.

    - epsilon, v_prediction, sample: DDIM with the model's betas; for a flow model, those of Stable Diffusion. Samples
      are not clipped, since latents may exceed [-1, 1], and the last step ends at z0.
    - flow_matching: the pipeline's scheduler if it is a flow scheduler, else a multistep solver with flow sigmas,
      which the pipelines of diffusion models accept.

    Raises:
        ValueError: for an unknown name.
    """
    if issubclass(_objective_class(name), FlowMatching):
        if is_flow(scheduler):
            return type(scheduler).from_config(scheduler.config)
        return DPMSolverMultistepScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            prediction_type="flow_prediction",
            steps_offset=1,  # required by Stable Diffusion's pipeline; unused by flow sigmas
            use_flow_sigmas=True,
        )
    settings: dict[str, Any] = {
        "prediction_type": name,
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
    }
    if is_flow(scheduler):
        steps = scheduler.config.num_train_timesteps
        return DDIMScheduler(num_train_timesteps=steps, timestep_spacing="trailing", **SCALED_LINEAR_BETAS, **settings)
    if scheduler.config.get("rescale_betas_zero_snr"):
        settings["timestep_spacing"] = "trailing"  # otherwise sampling skips the step without signal
    return DDIMScheduler.from_config(scheduler.config, **settings)


def timestep_density(
    weighting_scheme: str, generator: torch.Generator, *, logit_mean: float, logit_std: float, mode_scale: float
) -> Tensor:
    """A random number in [0, 1], (1,), from ``--weighting_scheme``'s density, for :meth:`Objective.sample_timesteps`.

    Raises:
        ValueError: for an unknown scheme, which diffusers would silently treat as uniform.
    """
    if weighting_scheme not in WEIGHTING_SCHEMES:
        raise ValueError(f"unknown --weighting_scheme {weighting_scheme!r}; accepted: {', '.join(WEIGHTING_SCHEMES)}")
    return compute_density_for_timestep_sampling(
        weighting_scheme, 1, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale, generator=generator
    )


def timestep_weights(
    strategy: str, num_train_timesteps: int, *, multiplier: float, begin: int, end: int, portion: float
) -> Tensor | None:
    """Relative frequency of each timestep under ``--timestep_bias_strategy``, (num_train_timesteps,); None = uniform.

    Timesteps with ``multiplier`` times the frequency of the others: the first (low-noise) ``portion`` for "earlier",
    the last ``portion`` for "later", those in [begin, end) for "range".

    Raises:
        ValueError: for an unknown strategy.

    >>> timestep_weights("earlier", 4, multiplier=2.0, begin=0, end=1000, portion=0.25).tolist()
    [2.0, 1.0, 1.0, 1.0]
    """
    if strategy not in BIAS_STRATEGIES:
        raise ValueError(f"unknown --timestep_bias_strategy {strategy!r}; accepted: {', '.join(BIAS_STRATEGIES)}")
    if strategy == "none":
        return None
    count = int(portion * num_train_timesteps)
    first, last = {
        "earlier": (0, count),
        "later": (num_train_timesteps - count, num_train_timesteps),
        "range": (begin, end),
    }[strategy]
    weights = torch.ones(num_train_timesteps, dtype=torch.float64)
    weights[first:last] *= multiplier
    return weights


def dream_shift(
    objective: Objective, model_output: Tensor, noise: Tensor, timesteps: Tensor, detail_preservation: float
) -> Tensor:
    """DREAM's addition to the noise, (B, C, h, w): the model's own error times b_t^p (Zhou et al., Sec. 3)."""
    _, b = objective.coefficients(timesteps)
    return expand(b**detail_preservation, noise) * (noise - model_output.float())
