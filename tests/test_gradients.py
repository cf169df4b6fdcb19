"""The gradients of both terms at the model's output: compared, and LPL's without what conflicts, in float64."""

from argparse import Namespace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_vae
from torch.nn import functional as F

import train_text_to_image_lpl as script
from lpl import LatentPerceptualLoss
from lpl.config.groups import Diffusion, Lpl
from lpl.gradients import NOISE_LEVELS, conflict, contrast, cosine, noise_level, summed_by_level
from lpl.objectives import get_objective, training_scheduler
from lpl.training.losses import clean_latents


THRESHOLD = 3.0
SIGMAS = [0.05, 0.2, 0.4, 1.2, 2.5, 2.9, 50.0, 0.9]  # all but one are inside
LEVELS = [0, 1, 2, 3, 4, 4, 4, 3]
OUTSIDE = 6


class Given(torch.nn.Module):
    """A model with a given output, the same for any part of the batch that starts at `first`."""

    def __init__(self, output, first=0):
        super().__init__()
        self.output = output[first:].clone().requires_grad_()

    def conditions(self, batch, device):
        return None

    def forward(self, noisy_latents, timesteps, conditions):
        return self.output[: len(noisy_latents)]


class Case:
    """A batch, a model's output, and both gradients there, (B, C, h, w), by Table 1 in float64."""

    def __init__(self, name):
        self.vae = tiny_vae("sd").requires_grad_(False)
        self.objective = get_objective(name, training_scheduler(name, DDIMScheduler(beta_schedule="scaled_linear")))
        noise = torch.randn(2, len(SIGMAS), 4, 8, 8, generator=torch.Generator().manual_seed(0))
        sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
        flow = name == "flow_matching"
        known = self.objective.sigma(torch.arange(1000))
        timestep = 1000 * sigmas / (1 + sigmas) if flow else (known[:, None] - sigmas).abs().argmin(0)
        self.batch = {
            "pixels": torch.rand(len(SIGMAS), 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1,
            "noise": noise[0],
            "posterior_noise": torch.zeros_like(noise[0]),
            "timestep": timestep,
            "lpl_choice": torch.rand(len(SIGMAS), 2),
        }
        latents, eps = clean_latents(self.vae, self.batch).double(), noise[0].double()
        sigma = (timestep / (1000 - timestep) if flow else known[timestep]).view(-1, 1, 1, 1)
        a = 1 / (1 + sigma) if flow else (1 + sigma**2) ** -0.5
        b, target = sigma * a, eps - latents if flow else eps
        self.output = (target + 0.4 * noise[1]).float()
        output = self.output.double().requires_grad_()
        estimate = a * latents + b * eps - b * output
        if not flow:
            estimate = estimate / a
        inside = sigma.flatten() <= THRESHOLD
        lpl = LatentPerceptualLoss(tiny_vae("sd", torch.float64))(estimate[inside], latents[inside])
        (self.of_lpl,) = torch.autograd.grad(lpl.sum(), output, retain_graph=True)
        (self.of_diffusion,) = torch.autograd.grad((output - target).square().sum(), output)
        centred = (estimate - estimate.mean((2, 3), keepdim=True)).detach()
        self.pulls = F.cosine_similarity(self.of_lpl.flatten(1), centred.flatten(1))  # z0_hat falls with the output
        self.cosines = F.cosine_similarity(self.of_lpl.flatten(1), self.of_diffusion.flatten(1))
        self.conflicts = self.cosines < 0
        assert 2 < self.conflicts.sum() < len(SIGMAS) - 2

    def losses(self, part=slice(None), **flags):
        """Both terms of a part of the batch, with their gradients compared, and the model."""
        flags = Lpl(lpl_threshold_base_resolution=0, lpl_sigma_threshold=THRESHOLD, **flags)
        vae = Namespace(vae=self.vae)
        losses = script.Losses(vae, self.objective, LatentPerceptualLoss(self.vae), flags, Diffusion())
        model = Given(self.output, part.start or 0)
        found = losses(model, {name: value[part] for name, value in self.batch.items()}, True)
        found.compare_gradients(flags.lpl_project_conflicts)
        return found, model


@pytest.fixture(scope="module", params=["epsilon", "flow_matching"])
def case(request):
    return Case(request.param)


def test_cosines_by_two_gradients_in_float64(case):
    found, _ = case.losses()
    assert found.inside == len(SIGMAS) - 1 and found.levels.tolist() == LEVELS
    assert found.cosines[OUTSIDE].isnan()
    assert torch.allclose(found.cosines.nan_to_num().double(), case.cosines, atol=1e-4)


def test_pulls_by_the_estimates_in_float64(case):
    found, _ = case.losses()
    assert found.pulls[OUTSIDE].isnan()
    assert torch.allclose(found.pulls.nan_to_num().double(), case.pulls, atol=1e-4) and case.pulls.abs().max() > 0.01


@pytest.mark.parametrize("detach", [False, True])
def test_the_statistics_pull_towards_contrast(case, detach):
    """Without their gradient, LPL is lower for smoother estimates."""
    estimates, latents = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    lpl = LatentPerceptualLoss(case.vae, detach_statistics=detach)
    (gradient,) = torch.autograd.grad(lpl(estimates.requires_grad_(), latents).sum(), estimates)
    (up,) = torch.autograd.grad(contrast(estimates), estimates)
    assert ((-cosine(gradient, up) > 0) != detach).all()


def test_only_samples_that_lpl_was_computed_on_have_a_cosine(case):
    found, _ = case.losses(lpl_max_samples=3)
    seen = found.cosines.isfinite()
    assert seen.nonzero().flatten().tolist() == found.by_row[0].tolist() and found.rows == 3
    assert torch.allclose(found.cosines[seen].double(), case.cosines[seen], atol=1e-4)


def test_projection_removes_what_conflicts_and_nothing_else(case):
    (plain, model), (projected, other) = case.losses(), case.losses(lpl_project_conflicts=True)
    assert torch.equal(projected.lpl, plain.lpl) and torch.equal(projected.errors, plain.errors)
    assert torch.equal(projected.cosines.nan_to_num(), plain.cosines.nan_to_num())
    (before,), (after,) = (
        torch.autograd.grad(0.3 * terms.lpl, of.output) for terms, of in ((plain, model), (projected, other))
    )
    left = cosine(after.double(), case.of_diffusion)
    assert left[case.conflicts].abs().max() < 1e-4
    assert torch.equal(after[~case.conflicts], before[~case.conflicts])
    exact = case.of_lpl - conflict(case.of_lpl, case.of_diffusion)
    assert torch.allclose(after.double(), 0.3 / len(SIGMAS) * exact, atol=1e-4 * before.abs().max().item())


def test_parts_of_a_batch_give_the_sums_of_the_whole(case):
    """Micro-batches, or processes."""
    whole, first, second = (
        summed_by_level(found.cosines, found.levels)
        for found, _ in map(case.losses, (slice(None), slice(0, 3), slice(3, None)))
    )
    assert whole[1].tolist() == [1, 1, 1, 2, 2] and torch.allclose(first + second, whole, atol=1e-5)


def test_each_level_ends_at_a_share_of_the_threshold():
    ends = torch.tensor(NOISE_LEVELS[1:], dtype=torch.float64)
    assert noise_level(ends, 1.0).tolist() == noise_level(11.9 * ends, 12.0).tolist() == [0, 1, 2, 3, 4]
    assert noise_level(12.1 * ends, 12.0).tolist() == [1, 2, 3, 4, 4]
