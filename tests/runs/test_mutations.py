"""The tests must be able to fail: each mutation of the package makes the test that guards it fail.

A mutation replaces one function of `lpl` (or of the VAE, where `lpl` relies on it) by a faulty one, or some words in
its source by others. The checks are the other modules' own tests, called here directly.
"""

import inspect
import textwrap
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from helpers import pair
from tiny import tiny_vae

import lpl.features
import lpl.loss
import lpl.objectives
import lpl.outliers
import lpl.terms
from lpl.features import DecoderFeatureExtractor
from lpl.loss import LatentPerceptualLoss
from lpl.objectives import Epsilon, FlowMatching, VPrediction
from tests import test_features, test_loss, test_objectives, test_outliers


true_mask = lpl.outliers.outlier_mask
true_morphology = lpl.outliers.morphology
true_unscale = lpl.features.unscale
true_depth_weight = lpl.loss.depth_weight
true_block_term = lpl.terms.block_term


# --- checks: tests of the other modules, on the fewest cases that guard the mutated line -----------------------------


def compare(kind="sd", **options):
    vae = test_loss.vae_of(kind)
    test_loss.assert_equal_to_reference(vae, *pair(vae), **options)


def flow_identity():
    test_objectives.test_clean_latents_inverts_the_target("flow_matching")


def gradients(detach_statistics):
    test_loss.test_gradient_equals_finite_differences_of_the_reference("shared", detach_statistics, "l2")


def separate_gradients(distance="l2"):
    test_loss.test_gradient_equals_finite_differences_of_the_reference("separate", False, distance)


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


def target_and_prediction_swapped(predicted, target, *args, **options):
    return true_block_term(target, predicted, *args, **options)


def mean_over_the_batch(*args, **options):
    value, kept = true_block_term(*args, **options)
    return value.mean().expand_as(value), kept


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
    "statistics of the target": (lpl.loss, "block_term", target_and_prediction_swapped, compare),
    "batch mean": (lpl.loss, "block_term", mean_over_the_batch, compare),
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


WORDS = {
    # statistics
    "unbiased variance": (
        lpl.terms._moments,
        "(_only(keep, x - mean)) / positions",
        "(_only(keep, x - mean)) / (positions - 1)",
        compare,
    ),
    "statistics of outliers too": (
        lpl.terms.block_term,
        "variance[part] = _moments(x, keep, kept[part])",
        "variance[part] = _moments(x, None, torch.full_like(kept[part], count))",
        compare,
    ),
    "outliers in the mean": (lpl.terms._moments, "_only(keep, x).sum", "x.sum", compare),
    "e forgotten": (lpl.terms.block_term, "1e-4 * v", "0 * v", compare),
    "e over the batch": (
        lpl.terms.block_term,
        "v.view(batch, channels).mean(1).repeat_interleave(channels)[:, None]",
        "v.mean()",
        compare,
    ),
    # values
    "mean over all positions": (
        lpl.terms.block_term,
        "total / (k * unit)",
        "total / (count * unit)",
        lambda: compare(normalization="none"),
    ),
    "outliers in the sum": (
        lpl.terms.block_term,
        "d = _only(keep, x - y)",
        "d = x - y",
        lambda: compare(normalization="none"),
    ),
    "one position kept": (
        lpl.terms.block_term,
        "kept >= 2",
        "kept >= 1",
        lambda: test_loss.test_a_map_of_one_pixel_contributes_nothing(),
    ),
    "absolute by the variance": (
        lpl.terms.block_term,
        "s.square() if squared else s",
        "s.square()",
        lambda: compare(distance="l1"),
    ),
    "sum over channels": (lpl.terms.block_term, "mean(1) * weight", "sum(1) * weight", compare),
    # gradients
    "statistics never detached": (
        lpl.terms.block_term,
        "if shared and not detach_statistics",
        "if shared",
        lambda: gradients(detach_statistics=True),
    ),
    "statistics always detached": (
        lpl.terms.block_term,
        "if shared and not detach_statistics",
        "if False",
        lambda: gradients(detach_statistics=False),
    ),
    "gradient half": (lpl.terms.block_term, "2.0 if squared else 1.0", "1.0", lambda: gradients(True)),
    "gradient of the other side": (
        lpl.terms.block_term,
        "gradient = d if",
        "gradient = -d if",
        lambda: gradients(True),
    ),
    "gradient unweighted": (
        lpl.terms.block_term,
        "(weight / channels * GRADIENT_SCALE)",
        "(GRADIENT_SCALE / channels)",
        lambda: gradients(True),
    ),
    "gradient not scaled back": (
        LatentPerceptualLoss._compare,
        "gradient / scale",
        "gradient",
        lambda: gradients(True),
    ),
    "all samples' gradients alike": (
        lpl.loss.Formed.backward,
        "outer.view(-1, 1, 1, 1)",
        "outer.mean()",
        lambda: test_loss.test_gradient_of_a_sample_reaches_only_that_sample(),
    ),
    "separate without its variance": (
        lpl.terms.block_term,
        "gradient - through_mean - x * through_variance",
        "gradient - through_mean",
        separate_gradients,
    ),
    "separate without its mean": (
        lpl.terms.block_term,
        "gradient - through_mean - x",
        "gradient - x",
        lambda: separate_gradients("l1"),
    ),
    "a convolution's stride": (
        lpl.features._FrozenConvolution.backward,
        "of.stride, of.padding, rest",
        "1, of.padding, rest",
        lambda: test_loss.test_a_frozen_convolution_has_its_gradient(),
    ),
    "a convolution's rest": (
        lpl.features._FrozenConvolution.backward,
        "size - reach for",
        "0 for",
        lambda: test_loss.test_a_frozen_convolution_has_its_gradient(),
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_other_words_are_noticed(name, monkeypatch):
    function, old, new, check = WORDS[name]
    function = inspect.unwrap(function)
    check()
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1
    namespace = dict(function.__globals__)
    exec(source.replace(old, new), namespace)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(namespace[function.__name__]).__code__)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_noticed(name, monkeypatch):
    owner, attribute, fault, check = MUTATIONS[name]
    check()  # the unharmed package passes
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check()
