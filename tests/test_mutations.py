"""The tests must be able to fail: each mutation of the package makes the test that guards it fail.

A mutation replaces one function of `lpl` (or of the VAE, where `lpl` relies on it) by a faulty one. The checks are the
other modules' own tests, called here directly.
"""

from contextlib import nullcontext

import pytest
import test_features
import test_loss
import test_objectives
import test_outliers
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from helpers import pair
from tiny import tiny_vae

import lpl.features
import lpl.loss
import lpl.objectives
import lpl.outliers
from lpl.features import DecoderFeatureExtractor
from lpl.loss import LatentPerceptualLoss
from lpl.objectives import Epsilon, FlowMatching, VPrediction


true_mask = lpl.outliers.outlier_mask
true_morphology = lpl.outliers.morphology
true_unscale = lpl.features.unscale
true_depth_weight = lpl.loss.depth_weight
true_statistics = LatentPerceptualLoss._statistics
true_block_loss = LatentPerceptualLoss.block_loss


# --- checks: tests of the other modules, on the fewest cases that guard the mutated line -----------------------------


def compare(kind="sd", **options):
    vae = test_loss.vae_of(kind)
    test_loss.assert_equal_to_reference(vae, *pair(vae), **options)


def flow_identity():
    test_objectives.test_clean_latents_inverts_the_target("flow_matching")


def gradients(detach_statistics):
    test_loss.test_gradient_equals_finite_differences_of_the_reference("shared", detach_statistics, "l2")


def values(name):
    test_objectives.test_values_per_sample(name)


def hand_kernels():
    test_outliers.test_kernels_follow_the_map(256, 3, 5)


# --- faults ----------------------------------------------------------------------------------------------------------


def decode_without_post_quant_conv(self, z, return_dict=True):
    return DecoderOutput(sample=self.decoder(z))


def shift_forgotten(vae, latents):
    return latents / vae.config.scaling_factor


def scaled_the_wrong_way(vae, latents):
    return latents * vae.config.scaling_factor


def hooks_left_behind(self, features):
    for module in self._modules.values():
        module.register_forward_hook(lambda *_: None)
    return nullcontext()


def unbiased_variance(self, features, mask, kept):
    mean, variance = true_statistics(self, features, mask, kept)
    return mean, variance * kept / (kept - 1).clamp(min=1)


def unmasked_statistics(self, features, mask, kept):
    ones = torch.ones_like(mask)
    return true_statistics(self, features, ones, ones.sum((2, 3), keepdim=True))


def statistics_without_e(self, features, mask, kept):
    mean = lpl.loss.masked_mean(features, mask, kept)
    return mean, lpl.loss.masked_mean((features - mean).square(), mask, kept) + 1e-12


def statistics_never_detached(self, features, mask, kept):
    mean = lpl.loss.masked_mean(features, mask, kept)
    variance = lpl.loss.masked_mean((features - mean).square(), mask, kept)
    return mean, variance + 1e-4 * variance.detach().mean(1, keepdim=True) + 1e-12


def statistics_always_detached(self, features, mask, kept):
    return true_statistics(self, features.detach(), mask, kept)


def target_and_prediction_swapped(self, predicted, target):
    return true_block_loss(self, target, predicted)


def mean_over_the_batch(self, predicted, target):
    value = true_block_loss(self, predicted, target)
    return value.mean().expand_as(value)


def mean_over_all_positions(x, mask, kept):
    return (x * mask).mean((2, 3), keepdim=True)


def wrong_sign(self, model_output, noisy_latents, timesteps):
    return noisy_latents + self.coefficients(timesteps)[1].reshape(-1, 1, 1, 1) * model_output


def noise_formula(self, model_output, noisy_latents, timesteps):
    """The paper's row for Flow-OT, right only for a denoiser that predicts the noise."""
    a, b = (c.reshape(-1, 1, 1, 1) for c in self.coefficients(timesteps))
    return (noisy_latents - b * model_output) / a


def along_the_columns(values, like):
    return values.to(like.dtype)


def sigma_of_a_variance(self, timesteps):
    a, b = self.coefficients(timesteps)
    return (b / a).square()


def shifted_twice(self, timesteps):
    t = timesteps.double() / self.num_train_timesteps
    t = self.shift * t / (1 + (self.shift - 1) * t)
    return 1 - t, t


MUTATIONS = {
    # features
    "post_quant_conv skipped": (AutoencoderKL, "_decode", decode_without_post_quant_conv, compare),
    "shift forgotten": (lpl.features, "unscale", shift_forgotten, lambda: compare("sd3")),
    "scaled the wrong way": (lpl.features, "unscale", scaled_the_wrong_way, compare),
    "hooks left behind": (
        DecoderFeatureExtractor,
        "_hooks",
        hooks_left_behind,
        lambda: test_features.test_no_hook_stays(tiny_vae("sd", torch.float64)),
    ),
    # masks
    "mask inverted": (lpl.loss, "outlier_mask", lambda *a, **k: ~true_mask(*a, **k), compare),
    "mask of ones": (lpl.loss, "outlier_mask", lambda x, **k: torch.ones_like(x, dtype=torch.bool), compare),
    "kernels swapped": (
        lpl.outliers,
        "morphology",
        lambda keep, dilation, erosion: true_morphology(keep, erosion, dilation),
        hand_kernels,
    ),
    "dilation dropped": (
        lpl.outliers,
        "morphology",
        lambda keep, _, erosion: true_morphology(keep, 1, erosion),
        hand_kernels,
    ),
    "erosion dropped": (lpl.outliers, "morphology", lambda keep, d, _: true_morphology(keep, d, 1), hand_kernels),
    "kernels not scaled": (
        lpl.outliers,
        "BASE_RESOLUTION",
        32,
        lambda: test_outliers.test_kernels_follow_the_map(64, 1, 3),
    ),
    # the loss
    "depth weight dropped": (lpl.loss, "depth_weight", lambda *_: 1.0, compare),
    "depth weight inverted": (lpl.loss, "depth_weight", lambda *a: 1 / true_depth_weight(*a), compare),
    "unbiased variance": (LatentPerceptualLoss, "_statistics", unbiased_variance, compare),
    "statistics of outliers too": (LatentPerceptualLoss, "_statistics", unmasked_statistics, compare),
    "e forgotten": (LatentPerceptualLoss, "_statistics", statistics_without_e, compare),
    "statistics of the target": (LatentPerceptualLoss, "block_loss", target_and_prediction_swapped, compare),
    "batch mean": (LatentPerceptualLoss, "block_loss", mean_over_the_batch, compare),
    "mean over all positions": (
        lpl.loss,
        "masked_mean",
        mean_over_all_positions,
        lambda: compare(normalization="none"),
    ),
    "statistics never detached": (
        LatentPerceptualLoss,
        "_statistics",
        statistics_never_detached,
        lambda: gradients(detach_statistics=True),
    ),
    "statistics always detached": (
        LatentPerceptualLoss,
        "_statistics",
        statistics_always_detached,
        lambda: gradients(detach_statistics=False),
    ),
    # objectives
    "flow with a wrong sign": (FlowMatching, "clean_latents", wrong_sign, flow_identity),
    "flow by the paper's row for noise": (FlowMatching, "clean_latents", noise_formula, flow_identity),
    "flow shifted twice": (
        FlowMatching,
        "coefficients",
        shifted_twice,
        lambda: test_objectives.test_flow_takes_timesteps_as_they_are(3.0),
    ),
    "v with a wrong sign": (VPrediction, "target", FlowMatching.target, lambda: values("v_prediction")),
    "sigma squared": (Epsilon, "sigma", sigma_of_a_variance, lambda: values("epsilon")),
    "timesteps along the columns": (lpl.objectives, "expand", along_the_columns, lambda: values("epsilon")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    owner, attribute, fault, check = MUTATIONS[name]
    check()  # the unharmed package passes
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check()
