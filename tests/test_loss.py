"""LatentPerceptualLoss against a slow second implementation (reference_loss.py), against numbers worked out by hand,
and against what a caller may rely on: per sample, gradient to the estimate only, the VAE left as it was."""

import copy
import itertools
import math
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import forced_features, hook_count, latents_as_features, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import decoder_features, reference_loss, reference_mask, reference_variant_loss
from tiny import seeded, tiny_vae

from lpl import LatentPerceptualLoss
from lpl.features import _frozen_convolution
from lpl.loss import unshared


RTOL = 1e-6  # float64 throughout; the depth weights and the masks leave no larger gap
VAES = {}


def vae_of(kind="sd", **overrides):
    """A float64 VAE, built once per configuration. Tests that change one take a copy."""
    key = (kind, *overrides.items())
    if key not in VAES:
        VAES[key] = tiny_vae(kind, torch.float64, **overrides).requires_grad_(False)
    return VAES[key]


def plain_vae(**overrides):
    """Scale 1 and no post-quant conv: the decoder's input is the latents themselves."""
    return copy.deepcopy(vae_of("sd", scaling_factor=1.0, use_post_quant_conv=False, **overrides))


def assert_equal_to_reference(vae, predicted, latents, **options):
    value = LatentPerceptualLoss(vae, **options)(predicted, latents)
    expected = reference_loss(vae, predicted, latents, **options)
    assert value.shape == (len(latents),) and value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=RTOL, atol=0)


# --- equality with the reference -------------------------------------------------------------------------------------


def test_the_spikes_of_these_tests_are_masked():
    """Otherwise comparing masked with unmasked losses would prove nothing."""
    predicted, _ = pair(vae_of())
    features = decoder_features(vae_of(), predicted)
    for name in ("mid", "up_0", "up_1", "up_2"):
        mask = reference_mask(features[name])
        assert 0.7 < mask.double().mean() < 1, name


@pytest.mark.parametrize("normalization", ["shared", "separate", "none"])
@pytest.mark.parametrize("depth_weighting", ["inverse", "exponential", "uniform", (0.5, 0.0, 2.0, 1.25)])
def test_every_option(normalization, depth_weighting):
    predicted, latents = pair(vae_of())
    for mask_outliers, distance in itertools.product((True, False), ("l2", "l1")):
        assert_equal_to_reference(
            vae_of(),
            predicted,
            latents,
            normalization=normalization,
            depth_weighting=depth_weighting,
            mask_outliers=mask_outliers,
            distance=distance,
        )


@pytest.mark.parametrize("kind", ["sd", "sd3", "asymmetric", "standardised", "dc"])
@pytest.mark.parametrize("blocks", [None, ("up_0",), ("up_0", "up_2"), ("up_2",)])
def test_every_vae_and_choice_of_blocks(kind, blocks):
    predicted, latents = pair(vae_of(kind), height=4, width=6, seed=3)
    assert_equal_to_reference(vae_of(kind), predicted, latents, blocks=blocks)


def test_latents_mean_and_std():
    vae = vae_of("sd", latents_mean=(0.5, -1.0, 0.0, 2.0), latents_std=(2.0, 1.0, 0.5, 3.0))
    assert_equal_to_reference(vae, *pair(vae))


def test_detached_statistics_change_no_value():
    for normalization in ("shared", "separate"):
        assert_equal_to_reference(vae_of(), *pair(vae_of()), detach_statistics=True, normalization=normalization)


def test_a_decoder_of_four_levels():
    vae = vae_of("sd", block_out_channels=(4, 4, 8, 8))
    assert_equal_to_reference(vae, *pair(vae))


def test_maps_on_which_both_kernels_act():
    vae = copy.deepcopy(vae_of("sd", block_out_channels=(4, 4, 4), norm_num_groups=2))
    predicted, latents = pair(vae, batch=1, height=44, width=43)

    def spiked(features):
        features = features.clone()
        features[..., 20, 30] += 1e4  # alone: dropped by the dilation
        features[:, 1:, 100:104, 50:53] -= 1e4
        features[:, 2:, :3, 160:] += 1e4
        return features

    with forced_features(vae, up_2=spiked):
        assert not reference_mask(decoder_features(vae, predicted)["up_2"])[0, :3].all()
        assert_equal_to_reference(vae, predicted, latents, blocks=("up_2",))


def test_order_of_the_names_does_not_matter():
    predicted, latents = pair(vae_of())
    forwards, backwards = (
        LatentPerceptualLoss(vae_of(), blocks=names) for names in (("mid", "up_1"), ("up_1", "mid"))
    )
    torch.testing.assert_close(forwards(predicted, latents), backwards(predicted, latents))


@pytest.mark.parametrize("kind, levels", [("sd", (8, 16, 16)), ("sd", (4, 4, 8, 8)), ("sd3", (8, 16, 16))])
def test_variant_reference(kind, levels):
    vae = vae_of(kind, block_out_channels=levels)
    predicted, latents = pair(vae, height=4, width=5, seed=7)
    value = LatentPerceptualLoss(vae, variant="reference")(predicted, latents)
    torch.testing.assert_close(value, reference_variant_loss(vae, predicted, latents), rtol=RTOL, atol=0)


def test_rgb_compares_decoded_pixels():
    vae = vae_of("sd3")
    predicted, latents = pair(vae)
    options = {"normalization": "none", "mask_outliers": False, "depth_weighting": "uniform"}
    value = LatentPerceptualLoss(vae, blocks=("rgb",), **options)(predicted, latents)
    images = [vae.decode(z / 1.5305 + 0.0609).sample for z in (predicted, latents)]
    torch.testing.assert_close(value, (images[0] - images[1]).square().mean((1, 2, 3)), rtol=RTOL, atol=0)


def test_rgb_with_the_defaults():
    assert_equal_to_reference(vae_of(), *pair(vae_of()), blocks=("rgb",))


# --- by hand ---------------------------------------------------------------------------------------------------------


def hand_pair():
    """Two channels of 2 x 2. The prediction's variances are 1 and 4; the squared differences average 3 and 8."""
    predicted = torch.tensor([[[0.0, 2.0], [0.0, 2.0]], [[1.0, 5.0], [5.0, 1.0]]], dtype=torch.float64)
    error = torch.tensor([[[1.0, -1.0], [3.0, 1.0]], [[4.0, 0.0], [0.0, -4.0]]], dtype=torch.float64)
    return predicted[None], (predicted + error)[None]


HAND_E = 1e-4 * (1 + 4) / 2


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (3 / (1 + HAND_E) + 8 / (4 + HAND_E)) / 2),
        ({"detach_statistics": True}, (3 / (1 + HAND_E) + 8 / (4 + HAND_E)) / 2),
        ({"normalization": "none"}, (3 + 8) / 2),
        ({"normalization": "none", "distance": "l1"}, (1.5 + 2) / 2),
        ({"distance": "l1"}, (1.5 / math.sqrt(1 + HAND_E) + 2 / math.sqrt(4 + HAND_E)) / 2),
        ({"normalization": "none", "depth_weighting": "exponential"}, (3 + 8) / 2 / 2),
        ({"normalization": "none", "depth_weighting": [10.0]}, (3 + 8) / 2 * 10),
    ],
)
def test_by_hand(options, expected):
    vae = plain_vae(latent_channels=2)
    with latents_as_features(vae, "mid"):
        value = LatentPerceptualLoss(vae, blocks=("mid",), **options)(*hand_pair())
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weighting, weight", [("inverse", 0.5), ("exponential", 0.25), ("uniform", 1), ([3.0], 3)])
def test_depth_weight_by_hand_without_the_first_block(weighting, weight):
    """up_0 doubles the map, so r_1 / r = 1/2 although the mid block was not selected."""
    vae = plain_vae(latent_channels=2)
    with latents_as_features(vae, "up_0", lambda latents: F.interpolate(latents, scale_factor=2)):
        loss = LatentPerceptualLoss(vae, blocks=("up_0",), normalization="none", depth_weighting=weighting)
        value = loss(*hand_pair())
    assert value.item() == pytest.approx((3 + 8) / 2 * weight, rel=1e-9)


def test_separate_ignores_an_affine_change_but_shared_does_not():
    vae = plain_vae(latent_channels=2)
    predicted, _ = hand_pair()
    with latents_as_features(vae, "mid"):
        separate, shared = (
            LatentPerceptualLoss(vae, blocks=("mid",), normalization=name)(predicted, 3 * predicted + 1)
            for name in ("separate", "shared")
        )
    assert separate.item() < 1e-12 < 1 < shared.item()


def test_equal_latents_cost_nothing():
    _, latents = pair(vae_of())
    for options in ({}, {"normalization": "separate"}, {"normalization": "none"}, {"variant": "reference"}):
        assert (LatentPerceptualLoss(vae_of(), **options)(latents, latents) == 0).all()


# --- per sample ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalization": "separate"}, {"variant": "reference"}])
def test_samples_do_not_see_each_other(options):
    vae = vae_of()
    predicted, latents = pair(vae, batch=3)
    loss = LatentPerceptualLoss(vae, **options)
    together = loss(predicted, latents)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], loss(predicted[i : i + 1], latents[i : i + 1]))
    predicted, latents = predicted.clone(), latents.clone()
    predicted[1] *= 50
    latents[1] = 0
    changed = loss(predicted, latents)
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]])
    assert not torch.isclose(changed[1], together[1])


def test_gradient_of_a_sample_reaches_only_that_sample():
    predicted, latents = pair(vae_of(), batch=3)
    predicted.requires_grad_()
    LatentPerceptualLoss(vae_of())(predicted, latents)[1].backward()
    assert predicted.grad[1].abs().sum() > 0 and not predicted.grad[[0, 2]].any()


# --- the same number, decoded otherwise ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "reference"}, {"normalization": "separate", "distance": "l1"}])
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_chunks_change_nothing(options, chunk_size):
    predicted, latents = pair(vae_of(), batch=3)
    whole, chunked = (LatentPerceptualLoss(vae_of(), chunk_size=size, **options) for size in (None, chunk_size))
    torch.testing.assert_close(chunked(predicted, latents), whole(predicted, latents))
    torch.testing.assert_close(gradient(chunked, predicted, latents), gradient(whole, predicted, latents))
    for kind in ("terms", "kept"):
        torch.testing.assert_close(getattr(chunked.last, kind), getattr(whole.last, kind))


@pytest.mark.parametrize("margin", [0, 1, 3])
@pytest.mark.parametrize("window", [(0, 0, 4, 4), (2, 1, 3, 5), (5, 4, 3, 4), (0, 0, 8, 8)])
def test_a_window_of_features_that_are_local(window, margin, monkeypatch):
    """The decoder is the identity here: the loss in the window is that of the window cut out, at whatever margin."""
    monkeypatch.setattr("lpl.loss.MARGIN", margin)
    vae = plain_vae(latent_channels=2)
    predicted, latents = pair(vae, height=8, width=8)
    top, left, height, width = window
    part = (..., slice(top, top + height), slice(left, left + width))
    with latents_as_features(vae, "up_0", lambda z: F.interpolate(z, scale_factor=2)):
        loss = LatentPerceptualLoss(vae, blocks=("up_0",), mask_outliers=False)
        value = loss(predicted, latents, window)
        torch.testing.assert_close(value, loss(predicted[part], latents[part]))
        inside = torch.zeros_like(predicted)
        inside[part] = gradient(loss, predicted[part].clone(), latents[part])
        torch.testing.assert_close(gradient(partial(loss, window=window), predicted, latents), inside)


def test_a_window_with_everything_around_it():
    """With the whole image as its margin, a window sees the features that the whole image has there."""
    vae = vae_of()
    predicted, latents = pair(vae, height=6, width=6)
    loss = LatentPerceptualLoss(vae, blocks=("up_1",), normalization="none", mask_outliers=False)
    windows = [(top, left, 2, 3) for top in (0, 2, 4) for left in (0, 3)]
    tiles = torch.stack([loss(predicted, latents, window) for window in windows])
    torch.testing.assert_close(tiles.mean(0), loss(predicted, latents))
    assert not torch.isclose(tiles, tiles.mean(0)).any()
    gradients = sum(gradient(partial(loss, window=window), predicted, latents) for window in windows)
    torch.testing.assert_close(gradients / 6, gradient(loss, predicted, latents))


def test_masks_in_a_window_are_those_of_the_whole_resolution():
    """Kernels follow the image, not the part of it that is looked at."""
    seen = []
    vae = plain_vae(latent_channels=2)
    mask = mock.patch("lpl.loss.outlier_mask", lambda maps, **given: seen.append(given) or torch.ones_like(maps) > 0)
    with mask, latents_as_features(vae, "mid"):
        loss = LatentPerceptualLoss(vae, blocks=("mid",), outliers={"erosion": 7})
        loss(*pair(vae, height=12, width=12), (0, 0, 6, 6))
        loss(*pair(vae, height=12, width=12))
    assert (seen[0]["dilation"], seen[0]["erosion"]) == (6, 14) and seen[1] == {"erosion": 7}


@pytest.mark.parametrize("window", [(-1, 0, 2, 2), (0, 0, 0, 2), (3, 0, 2, 2), (0, 4, 1, 2)])
def test_a_window_outside_is_refused(window):
    with pytest.raises(ValueError, match="4 x 5"):
        LatentPerceptualLoss(vae_of())(*pair(vae_of(), height=4, width=5), window)


def test_the_masks_parameters():
    predicted, latents = pair(vae_of(), height=16, width=16)
    outliers = {"quantile": 0.1, "margin": 0.5, "dilation": 9, "erosion": 25, "stride": 1}
    value = LatentPerceptualLoss(vae_of(), blocks=("up_1",), outliers=outliers)(predicted, latents)
    given = {name: value for name, value in outliers.items() if name != "stride"}
    with mock.patch("reference_loss.reference_mask", partial(reference_mask, **given)):
        expected = reference_loss(vae_of(), predicted, latents, blocks=("up_1",))
    torch.testing.assert_close(value, expected, rtol=RTOL, atol=0)
    assert not torch.isclose(value, LatentPerceptualLoss(vae_of(), blocks=("up_1",))(predicted, latents)).any()


def test_what_a_call_has_measured():
    predicted, latents = pair(vae_of(), batch=3)
    loss = LatentPerceptualLoss(vae_of(), blocks=("mid", "up_2"))
    value = loss(predicted.requires_grad_(), latents)
    assert list(loss.last.terms) == list(loss.last.kept) == ["mid", "up_2"]
    torch.testing.assert_close(sum(loss.last.terms.values()), value.detach())
    features = decoder_features(vae_of(), predicted.detach())
    for name, kept in loss.last.kept.items():
        torch.testing.assert_close(kept, reference_mask(features[name]).double().mean((1, 2, 3)))
    assert not any(x.requires_grad for x in (*loss.last.terms.values(), *loss.last.kept.values()))
    loss(predicted[:0], latents[:0])
    assert not loss.last.terms and not loss.last.kept


def test_options_tell_losses_apart_and_not_how_they_were_written():
    """Depth weights go with the blocks, in whichever order both are given."""
    predicted, latents = pair(vae_of())
    one, same, other = (
        LatentPerceptualLoss(vae_of(), blocks=blocks, depth_weighting=weights)
        for blocks, weights in (
            (("mid", "up_0"), (1.0, 5.0)),
            (("up_0", "mid"), (5.0, 1.0)),
            (("up_0", "mid"), (1.0, 5.0)),
        )
    )
    assert one.options == same.options != other.options
    assert torch.equal(one(predicted, latents), same(predicted, latents))
    assert not torch.allclose(one(predicted, latents), other(predicted, latents))


def test_one_block_as_a_string():
    predicted, latents = pair(vae_of())
    one, many = (LatentPerceptualLoss(vae_of(), blocks=name, depth_weighting=[2.0]) for name in ("mid", ("mid",)))
    assert torch.equal(one(predicted, latents), many(predicted, latents))


@pytest.mark.parametrize("where", ["all", "decoder", "block"])
def test_a_compiled_vae(where):
    """Compiled code does not notice hooks that come after it; the pass is run as it stands."""
    vae = copy.deepcopy(vae_of())
    predicted, latents = pair(vae)
    expected = gradient(LatentPerceptualLoss(vae), predicted, latents)
    if where == "all":
        vae.decode = torch.compile(vae.decode, backend="eager")
    elif where == "decoder":
        vae.decoder = torch.compile(vae.decoder, backend="eager")
    else:
        vae.decoder.up_blocks[0].compile(backend="eager")
    vae.decode(latents)
    torch.testing.assert_close(gradient(LatentPerceptualLoss(vae), predicted, latents), expected)


def test_named_modules_that_return_one_tensor():
    """The gradient takes the place of the target's features; these must not be another block's too."""
    features = torch.arange(4.0)
    alone = unshared({"a": features, "b": features, "c": features.view(2, 2).mT, "d": features[2:]})
    assert alone["d"].data_ptr() != features[2:].data_ptr()
    assert alone["a"].data_ptr() != alone["b"].data_ptr() and alone["c"].is_contiguous()
    assert torch.equal(alone["b"], features) and torch.equal(alone["c"], features.view(2, 2).mT)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradient(loss, predicted, latents):
    predicted = predicted.clone().requires_grad_()
    (out,) = torch.autograd.grad(loss(predicted, latents).sum(), predicted)
    return out


def finite_differences(vae, predicted, latents, step=1e-5, **options):
    """d reference_loss / d predicted; masks and e (and detached statistics) are held at their values."""
    out = torch.zeros_like(predicted)
    for index in itertools.product(*map(range, predicted.shape)):
        shifted = torch.zeros_like(predicted)
        shifted[index] = step
        up, down = (
            reference_loss(vae, predicted + sign * shifted, latents, constants_from=predicted, **options).sum()
            for sign in (1, -1)
        )
        out[index] = (up - down) / (2 * step)
    return out


@pytest.mark.parametrize("detach_statistics", [False, True])
@pytest.mark.parametrize("normalization", ["shared", "separate"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_gradient_equals_finite_differences_of_the_reference(normalization, detach_statistics, distance):
    vae = vae_of("sd", block_out_channels=(4, 4), norm_num_groups=2)
    predicted, latents = pair(vae, batch=1, height=2, width=2)
    options = {"normalization": normalization, "detach_statistics": detach_statistics, "distance": distance}
    ours = gradient(LatentPerceptualLoss(vae, **options), predicted, latents)
    expected = finite_differences(vae, predicted, latents, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("detach_statistics", [False, True])
def test_no_gradient_through_e(detach_statistics):
    """A channel 1e-3 as strong as the others lives off e, so a gradient through e would show."""
    vae = plain_vae(latent_channels=2)
    predicted, target = (z * torch.tensor([1.0, 1e-3])[:, None, None] for z in hand_pair())
    with latents_as_features(vae, "mid"):
        options = {"blocks": ("mid",), "detach_statistics": detach_statistics}
        ours = gradient(LatentPerceptualLoss(vae, **options), predicted, target)
    e = 1e-4 * (1 + 4e-6) / 2 + 1e-12
    x = predicted.clone().requires_grad_()
    variance = x.var((-2, -1), correction=0, keepdim=True)
    variance = variance.detach() if detach_statistics else variance
    ((x - target).square() / (variance + e)).mean().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "none", "mask_outliers": False},
        {"normalization": "none"},
        {"normalization": "none", "distance": "l1"},
        {"variant": "reference"},
        {"gradient_checkpointing": True, "normalization": "none"},
        {"chunk_size": 1, "window": (0, 1, 2, 1), "normalization": "none"},
        {},
        {"distance": "l1"},
        {"normalization": "separate"},
    ],
    ids=str,
)
def test_gradcheck(options):
    """Through the statistics too: e, which has no gradient, is too small to show at this tolerance."""
    vae = vae_of("sd", block_out_channels=(4, 4), norm_num_groups=2)
    predicted, latents = pair(vae, batch=2, height=2, width=2)
    window = options.get("window")
    loss = LatentPerceptualLoss(vae, **{name: value for name, value in options.items() if name != "window"})
    rtol = 1e-4 if options.get("normalization") == "none" or "variant" in options else 2e-3
    assert torch.autograd.gradcheck(
        lambda x: loss(x, latents, window), predicted.requires_grad_(), atol=1e-4, rtol=rtol, eps=1e-6
    )


def test_gradient_to_the_first_argument_only():
    predicted, latents = (z.requires_grad_() for z in pair(vae_of()))
    LatentPerceptualLoss(vae_of())(predicted, latents).sum().backward()
    assert predicted.grad.abs().sum() > 0 and latents.grad is None


@pytest.mark.parametrize("kind", ["sd", "asymmetric", "dc"])
@pytest.mark.parametrize("options", [{}, {"variant": "reference"}, {"blocks": ("up_0", "up_1")}, {"blocks": ("rgb",)}])
def test_gradient_checkpointing_changes_nothing(options, kind):
    vae = vae_of(kind)
    predicted, latents = pair(vae)
    plain, saving = (LatentPerceptualLoss(vae, gradient_checkpointing=flag, **options) for flag in (False, True))
    assert torch.equal(plain(predicted, latents), saving(predicted, latents))
    expected = gradient(plain, predicted, latents)
    torch.testing.assert_close(gradient(saving, predicted, latents), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_vae_that_checkpoints_of_itself(gradient_checkpointing):
    """Hooks must not fire again when a block is recomputed, and the caller's setting stays."""
    vae = copy.deepcopy(vae_of())
    predicted, latents = pair(vae)
    expected = gradient(LatentPerceptualLoss(vae), predicted, latents)
    vae.enable_gradient_checkpointing()
    ours = gradient(LatentPerceptualLoss(vae, gradient_checkpointing=gradient_checkpointing), predicted, latents)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    assert vae.decoder.gradient_checkpointing


@pytest.mark.parametrize("kind", ["sd", "asymmetric", "dc"])
def test_gradient_checkpointing_saves_memory(kind):
    """With the squares of the latents' side, in which the terms' share shrinks."""
    vae = vae_of(kind, layers_per_block=3) if kind == "sd" else vae_of(kind)
    plain, saving = (
        LatentPerceptualLoss(vae, gradient_checkpointing=flag)._footprint((4, 16, 16), torch.float64, True).peak
        for flag in (False, True)
    )
    assert saving < 0.9 * plain


def test_features_that_the_decoder_overwrites_are_refused():
    vae = plain_vae()
    resnet = "decoder.up_blocks.0.resnets.0"
    vae.get_submodule(resnet).nonlinearity = torch.nn.SiLU(inplace=True)  # overwrites what its norms return
    LatentPerceptualLoss(vae, blocks=(f"{resnet}.conv1", "up_1"))(*pair(vae))
    with pytest.raises(ValueError, match=f"overwrites what {resnet}.norm1 returns"):
        LatentPerceptualLoss(vae, blocks=(f"{resnet}.norm1", "up_1"))(*pair(vae))


def test_without_gradient():
    predicted, latents = pair(vae_of())
    with torch.no_grad():
        value = LatentPerceptualLoss(vae_of())(predicted.requires_grad_(), latents)
    assert not value.requires_grad and value.isfinite().all()


def test_a_frozen_convolution_has_its_gradient():
    """Strides that leave a rest, dilation, groups and bias: as autograd has it."""
    with seeded(0):
        for size, options in [
            ((7, 9), {"kernel_size": 3, "padding": 1}),
            ((8, 9), {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}),
            ((11, 10), {"kernel_size": (3, 5), "stride": (2, 3), "padding": (0, 2), "dilation": (2, 1), "groups": 2}),
        ]:
            convolution = torch.nn.Conv2d(4, 6, **options).double()
            ours, theirs = (torch.randn(2, 4, *size).double().requires_grad_() for _ in range(2))
            theirs.data.copy_(ours.data)
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
                output = _frozen_convolution(convolution, ours)
            expected = convolution(theirs)
            assert torch.equal(output, expected) and not saved
            weights = torch.randn_like(output)
            (output * weights).sum().backward()
            (expected * weights).sum().backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
            assert convolution.weight.grad is not None  # theirs alone: ours gives none


# --- the caller's VAE ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("kind", ["sd", "dc"])
def test_the_vae_is_left_as_it_was(kind, requires_grad, training, variant, gradient_checkpointing):
    vae = tiny_vae(kind, dtype=torch.float32).train(training).requires_grad_(requires_grad)
    frozen = vae.decoder.conv_in.weight.requires_grad_(not requires_grad)  # a VAE that is half frozen stays so
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    attributes = {module: set(vars(module)) for module in vae.modules()}
    loss = LatentPerceptualLoss(vae, variant=variant, gradient_checkpointing=gradient_checkpointing)
    predicted, latents = pair(vae)
    value = loss(predicted.requires_grad_(), latents)
    assert all(p.requires_grad == ((p is frozen) != requires_grad) for p in vae.parameters())
    value.sum().backward()
    assert predicted.grad.abs().sum() > 0
    assert all(p.grad is None for p in vae.parameters()), "no parameter of the VAE gets a gradient"
    assert all(p.requires_grad == ((p is frozen) != requires_grad) for p in vae.parameters())
    assert all(module.training == training for module in vae.modules())
    assert vae.dtype == torch.float32 and hook_count(vae) == 0
    assert not any(getattr(module, "gradient_checkpointing", False) for module in vae.modules())
    assert {module: set(vars(module)) for module in vae.modules()} == attributes
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_the_loss_is_no_owner_of_the_vaes_parameters():
    """An optimizer over everything that the loss holds must not train the decoder, nor a checkpoint save it twice."""
    loss = LatentPerceptualLoss(tiny_vae("sd"))
    parameters = loss.parameters() if isinstance(loss, torch.nn.Module) else ()
    assert not list(parameters)


def test_no_hook_stays_after_an_exception():
    vae = tiny_vae("sd")
    predicted, latents = pair(vae)
    vae.decoder.up_blocks[0].forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        LatentPerceptualLoss(vae)(predicted, latents)
    assert hook_count(vae) == 0


@pytest.mark.parametrize("vae_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_float32_under_mixed_precision(vae_dtype, dtype):
    vae = tiny_vae("sd", vae_dtype)
    predicted, latents = (z.to(dtype) for z in pair(vae_of()))
    predicted.requires_grad_()
    value = LatentPerceptualLoss(vae)(predicted, latents)
    value.sum().backward()
    assert value.dtype == torch.float32 and value.isfinite().all()
    assert predicted.grad.dtype == dtype and predicted.grad.isfinite().all()
    expected = reference_loss(vae_of(), predicted.double(), latents.double())
    torch.testing.assert_close(value.double(), expected, rtol=0.3 if vae_dtype == torch.bfloat16 else 1e-3, atol=0)


def test_autocast_does_not_reach_the_decoder():
    vae = tiny_vae("sd")
    predicted, latents = pair(vae)
    loss = LatentPerceptualLoss(vae)
    outside = gradient(loss, predicted, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(predicted, latents)
        inside = gradient(loss, predicted, latents)
    torch.testing.assert_close(value, loss(predicted, latents), rtol=1e-5, atol=0)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slicing", "tiling"])
def test_slicing_and_tiling_are_refused(name):
    vae = tiny_vae("sd")
    predicted, latents = pair(vae)
    getattr(vae, f"enable_{name}")()
    with pytest.raises(ValueError, match=name):
        LatentPerceptualLoss(vae)(predicted, latents)


@pytest.mark.parametrize("name", ["slicing", "tiling"])
def test_slicing_and_tiling_are_refused_when_switched_on_later(name):
    vae = tiny_vae("sd")
    loss = LatentPerceptualLoss(vae)
    getattr(vae, f"enable_{name}")()
    with pytest.raises(ValueError, match=name):
        loss(*pair(vae))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"blocks": ("mid", "up_7")}, ("up_7", "mid", "up_0", "up_2")),
        ({"blocks": ("mid", "rgb")}, ("rgb",)),
        ({"blocks": ()}, ()),
        ({"normalization": "batch"}, ("batch", "shared", "separate", "none")),
        ({"depth_weighting": "linear"}, ("linear", "inverse", "exponential", "uniform")),
        ({"depth_weighting": (1.0, 2.0, 3.0)}, ("3", "4")),
        ({"depth_weighting": (1.0, 2.0), "blocks": ("mid",)}, ("2", "1")),
        ({"distance": "mse"}, ("mse", "l1", "l2")),
        ({"variant": "official"}, ("official", "paper", "reference")),
        ({"variant": "reference", "normalization": "none"}, ("reference", "normalization")),
        ({"variant": "reference", "detach_statistics": True}, ("reference", "detach_statistics")),
        ({"variant": "reference", "depth_weighting": "uniform"}, ("reference", "depth_weighting")),
        ({"variant": "reference", "mask_outliers": False}, ("reference", "mask_outliers")),
        ({"variant": "reference", "distance": "l1"}, ("reference", "distance")),
        ({"variant": "reference", "outliers": {"margin": 3.0}}, ("reference", "outliers")),
        ({"mask_outliers": False, "outliers": {"margin": 3.0}}, ("mask_outliers", "outliers")),
        ({"outliers": {"sigma": 3.0}}, ("sigma", "quantile", "margin")),
        ({"chunk_size": 0}, ("chunk_size 0", "1")),
    ],
)
def test_wrong_options_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as error:
        LatentPerceptualLoss(tiny_vae("sd"), **options)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "predicted, latents",
    [
        ((2, 4, 4, 4), (2, 4, 4, 5)),
        ((2, 4, 4, 4), (1, 4, 4, 4)),
        ((1, 4, 4, 4), (2, 4, 4, 4)),
        ((2, 8, 4, 4), (2, 4, 4, 4)),
        ((2, 16, 4, 4), (2, 16, 4, 4)),
        ((4, 4, 4), (4, 4, 4)),
        ((2, 4, 1, 4, 4), (2, 4, 1, 4, 4)),
    ],
)
def test_wrong_shapes_are_refused(predicted, latents):
    loss = LatentPerceptualLoss(tiny_vae("sd"))
    with pytest.raises(ValueError) as error:
        loss(torch.zeros(predicted), torch.zeros(latents))
    assert any(str(shape)[1:-1] in str(error.value) for shape in (predicted, latents)), "names what was given"


# --- degenerate features ---------------------------------------------------------------------------------------------

DEGENERATE = [
    {},
    {"normalization": "separate"},
    {"normalization": "none"},
    {"distance": "l1"},
    {"variant": "reference"},
]


def assert_finite(vae, predicted, latents, **options):
    predicted = predicted.clone().requires_grad_()
    value = LatentPerceptualLoss(vae, **options)(predicted, latents)
    value.sum().backward()
    assert value.isfinite().all() and predicted.grad.isfinite().all()
    return value.detach()


@pytest.mark.parametrize("options", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features(options, dtype):
    vae = tiny_vae("sd", dtype)
    with forced_features(vae, mid=lambda x: 0 * x + 0.1, up_1=lambda x: 0 * x):
        assert_finite(vae, *pair(vae), **options)


@pytest.mark.parametrize("options", DEGENERATE)
def test_equal_latents_have_finite_gradients(options):
    _, latents = pair(vae_of())
    assert_finite(vae_of(), latents, latents, **options)


@pytest.mark.parametrize("options", DEGENERATE)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 5)])
def test_tiny_maps(options, size):
    predicted, latents = pair(vae_of(), height=size[0], width=size[1])
    assert_finite(vae_of(), predicted, latents, **options)


def test_a_map_of_one_pixel_contributes_nothing():
    predicted, latents = pair(vae_of(), height=1, width=1)
    value = LatentPerceptualLoss(vae_of(), blocks=("mid",))(predicted, latents)
    assert (value == 0).all()
    assert_equal_to_reference(vae_of(), predicted, latents)


def test_a_dead_channel_cannot_dominate():
    """Dead in the prediction, alive in the target: weighed by e, not by 1 / 1e-12; and it counts in the mean."""
    vae = plain_vae(latent_channels=2)
    predicted, target = hand_pair()
    predicted[:, 1] = 7.0
    with latents_as_features(vae, "mid"):
        value = LatentPerceptualLoss(vae, blocks=("mid",))(predicted, target)
        same = LatentPerceptualLoss(vae, blocks=("mid",))(predicted, torch.cat([target[:, :1], predicted[:, 1:]], 1))
    e = 1e-4 * (1 + 0) / 2
    errors = (target[0, 1] - 7).square().mean().item()
    assert value.item() == pytest.approx((3 / (1 + e) + errors / e) / 2, rel=1e-6)
    assert same.item() == pytest.approx(3 / (1 + e) / 2, rel=1e-6)


@pytest.mark.parametrize("options", DEGENERATE)
def test_a_dead_channel_is_finite(options):
    vae = copy.deepcopy(vae_of())
    dead = torch.ones(16, 1, 1, dtype=torch.float64)
    dead[3] = 0
    with forced_features(vae, mid=lambda x: x * dead, up_0=lambda x: x * dead):
        assert_finite(vae, *pair(vae), **options)


def test_a_dead_channel_in_float16():
    """The gradient of a difference over almost no variance is more than float16 holds."""
    vae = tiny_vae("sd", torch.float16)
    dead = torch.ones(16, 1, 1, dtype=torch.float16)
    dead[3] = 0
    with forced_features(vae, mid=lambda x: x * dead + (1 - dead) * x.mean().sign()):
        predicted, latents = pair(vae)
        assert_finite(vae, predicted, -20 * latents)


def centre_spike(features):
    """3 x 3 maps with one strong centre: a 3 x 3 erosion leaves nothing of them."""
    features = F.interpolate(features, size=(3, 3))
    spike = torch.zeros(3, 3, dtype=features.dtype)
    spike[1, 1] = 1e4
    return features + spike


def test_variant_reference_with_an_empty_mask():
    vae = copy.deepcopy(vae_of())
    predicted, latents = pair(vae)
    with forced_features(vae, up_1=centre_spike):
        target = decoder_features(vae, latents)["up_1"]
        assert not reference_mask(target, dilation=1, erosion=3, scale_kernels=False).any()
        value = assert_finite(vae, predicted, latents, variant="reference")
        torch.testing.assert_close(value, reference_variant_loss(vae, predicted, latents), rtol=RTOL, atol=0)


@pytest.mark.parametrize("options", DEGENERATE[:-1])
@pytest.mark.parametrize("kept", [0, 1])
def test_almost_empty_masks(options, kept, monkeypatch):
    """No real map loses all positions to Alg. 1, but the loss must not depend on that."""

    def almost_empty(features, **_):
        mask = torch.zeros_like(features, dtype=torch.bool)
        mask[..., :1, :kept] = True
        return mask

    monkeypatch.setattr("lpl.loss.outlier_mask", almost_empty)
    predicted, latents = pair(vae_of())
    value = assert_finite(vae_of(), predicted, latents, **options)
    if kept == 0 or options.get("normalization") != "none":
        assert (value == 0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    options=st.sampled_from(
        [*DEGENERATE, {"detach_statistics": True}, {"normalization": "separate", "distance": "l1"}]
    ),
    size=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    checkpointing=st.booleans(),
    spoilt=st.sampled_from([math.nan, math.inf, 1e30]),
    seed=st.integers(0, 99),
)
def test_a_spoilt_sample_does_not_reach_the_others(options, size, dtype, checkpointing, spoilt, seed):
    """Whatever the option, the shape and the precision: theirs are finite, and what they are without it."""
    vae = tiny_vae("sd", dtype)
    predicted, latents = pair(vae, batch=3, height=size[0], width=size[1], seed=seed)
    predicted[1, 0, 0, 0] = spoilt
    loss = LatentPerceptualLoss(vae, gradient_checkpointing=checkpointing, **options)
    both, alone = predicted[[0, 2]].requires_grad_(), predicted.requires_grad_()
    value, expected = loss(alone, latents), loss(both, latents[[0, 2]])
    gradients = torch.autograd.grad(value[[0, 2]].sum(), alone)[0], torch.autograd.grad(expected.sum(), both)[0]
    assert value[[0, 2]].isfinite().all() and gradients[0][[0, 2]].isfinite().all()
    tolerance = {"rtol": 0.1, "atol": 0.05} if dtype != torch.float32 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(value[[0, 2]], expected, **tolerance)
    torch.testing.assert_close(gradients[0][[0, 2]], gradients[1], **tolerance)
    assert spoilt == 1e30 or not value[1].isfinite(), "nor is it passed over in silence"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"variant": "reference"}, {"gradient_checkpointing": True}])
def test_the_gradient_survives_a_decoder_of_half_precision(dtype, options):
    """A map of 64 x 64 x 8: its gradient's numbers are too small for float16 as they are."""
    vae = tiny_vae("sd", torch.float32, block_out_channels=(8, 16))
    predicted, latents = pair(vae, height=32, width=32)
    expected = gradient(LatentPerceptualLoss(vae, **options), predicted, latents)
    ours = gradient(LatentPerceptualLoss(copy.deepcopy(vae).to(dtype), **options), predicted, latents)
    assert ours.dtype == torch.float32
    assert F.cosine_similarity(ours.flatten(), expected.flatten(), dim=0) > 0.98
    assert ours.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)
