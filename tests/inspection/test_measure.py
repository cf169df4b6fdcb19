"""Measurements of one image at a time, against their definitions; helpers of the other tests of this room."""

import numpy as np
import pytest
import torch
from helpers import forced_features
from PIL import Image
from tiny import VAE_CONFIGS, seeded, tiny_vae

from lpl import DecoderFeatureExtractor, LatentPerceptualLoss, outlier_mask
from lpl.autoencoders import downscaling_factor
from lpl.config.groups import Lpl
from lpl.data.order import keyed_generator
from lpl.inspection.advice import summary
from lpl.inspection.measure import (
    ERROR,
    ERRORS,
    METHODS,
    SEARCH_STEPS,
    STEPS,
    Inspector,
    found_error,
    gaussian_like,
    peaks,
    perturbed,
    resized,
    share_masked,
    terms_of,
)


SETTINGS = {"quantile": 0.02, "margin": 2.0, "dilation": 3, "erosion": 5}


def inspected(vae, *, features=None, images=None, resolution=32, seed=0, **flags):
    """An inspector that has measured the images, under these flags of LPL."""
    inspector = Inspector(vae, features or vae, Lpl(**flags), seed)
    steps = []
    for image in images or [noise_image(resolution)]:
        inspector.inspect(image, lambda: steps.append(1))
    assert len(steps) == STEPS * len(inspector.found)
    return inspector


def noise_image(side=32, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), np.uint8)).resize((side, side))


def test_the_same_again_and_the_random_state_is_left_alone(sd_pipeline):
    vae, state = tiny_vae("sd"), torch.get_rng_state()
    one, other = inspected(vae), inspected(vae)
    assert torch.equal(torch.get_rng_state(), state)
    assert summary(one) == summary(other)
    assert summary(inspected(vae, seed=1))["balance"] != summary(one)["balance"]


@pytest.mark.parametrize("kind", VAE_CONFIGS)
def test_every_autoencoder_can_be_looked_at(kind):
    vae = tiny_vae(kind)
    inspector = inspected(vae, resolution=8 * downscaling_factor(vae.config))
    numbers = summary(inspector)
    features = DecoderFeatureExtractor(vae)(inspector.latents[0])
    blocks = numbers["outliers"]["blocks"]
    assert {name: block["shape"] for name, block in blocks.items()} == {
        name: list(maps.shape[1:]) for name, maps in features.items()
    }
    assert np.isfinite([*numbers["balance"]["terms"].values()]).all()
    assert all(np.min(method["lpl"]) > 0 for method in numbers["interpolation"]["methods"].values())
    assert vae.decoder.training is False and not any(p.grad is not None for p in vae.parameters())


def test_half_precision_is_of_the_decoder_only():
    vae, half = tiny_vae("sd"), tiny_vae("sd", dtype=torch.bfloat16)
    inspector = inspected(vae, features=half, lpl_vae_dtype="bfloat16")
    exact = inspected(vae)
    assert torch.equal(inspector.latents[0], exact.latents[0])
    one, other = (np.array(found.found[0]["terms"]) for found in (inspector, exact))
    assert not np.array_equal(one, other) and np.allclose(one, other, rtol=0.2)


def test_images_need_not_be_square():
    vae = tiny_vae("sd")
    inspector = inspected(vae, images=[noise_image(64).crop((0, 0, 32, 64))])
    assert inspector.latents[0].shape == (1, 4, 16, 8) and inspector.shapes["mid"][1:] == [16, 8]


# Outliers


def test_shares_are_those_of_the_masks():
    vae = tiny_vae("sd")
    images = [noise_image(seed=seed) for seed in (0, 1)]
    inspector = inspected(vae, lpl_outlier_margin=0.5, images=images)
    numbers = summary(inspector)["outliers"]
    features = [DecoderFeatureExtractor(vae)(latents) for latents in inspector.latents]
    settings = SETTINGS | {"margin": 0.5}
    for name, block in numbers["blocks"].items():
        masks = torch.stack([~outlier_mask(maps[name], **settings)[0] for maps in features])  # (images, C, H, W)
        assert block["shape"] == list(masks.shape[1:])
        assert block["masked_by_channel"] == pytest.approx(masks.float().mean((0, 2, 3)).tolist())
        assert block["masked"] == pytest.approx(masks.float().mean().item())
        assert block["maps_with_outliers"] == pytest.approx(masks.any(-1).any(-1).float().mean().item())
        strided = torch.stack([~outlier_mask(maps[name], **settings, stride=4)[0] for maps in features])
        assert block["stride_differs"] == pytest.approx((strided != masks).float().mean().item())
        wider = torch.stack([~outlier_mask(maps[name], **settings | {"margin": 1.0})[0] for maps in features])
        assert block["masked_by_margin"]["1.0"] == pytest.approx(wider.float().mean().item(), abs=1e-7)
        assert block["masked_by_margin"]["0.5"] == pytest.approx(block["masked"], abs=1e-6)
    assert max(block["masked"] for block in numbers["blocks"].values()) > 0  # else nothing was compared
    assert max(block["stride_differs"] for block in numbers["blocks"].values()) > 0


def with_outliers_in(channel, strength):
    """A VAE whose last block answers hugely in one channel wherever a hidden feature of its is extreme."""
    vae = tiny_vae("sd")
    last = vae.decoder.up_blocks[-1].resnets[-1]
    with torch.no_grad():
        last.norm2.weight[0], last.norm2.bias[0] = 10.0, -24.0  # SiLU lets what is beyond 2.4 deviations through
        last.conv2.weight[:, 0] = last.conv2.weight[channel] = 0.0
        last.conv2.weight[channel, 0, 1, 1] = strength
    return vae


@pytest.mark.parametrize("channel", [2, 5])
def test_outliers_are_found_where_they_were_planted(channel):
    planted, plain = (
        summary(inspected(with_outliers_in(channel, strength)))["outliers"]["blocks"] for strength in (300, 0)
    )
    masked, peak = (np.array(planted["up_2"][f"{kind}_by_channel"]) for kind in ("masked", "peak"))
    assert masked.argmax() == peak.argmax() == channel and masked[channel] > 0.002
    assert peak[channel] > 5 * np.delete(peak, channel).max() and planted["up_2"]["peak"] == peak[channel]
    assert planted["up_2"]["peak_kept"] < peak[channel] / 5  # and the mask takes it
    assert abs(planted["up_2"]["masks_change"]) > abs(plain["up_2"]["masks_change"])
    untouched = np.delete(np.array(plain["up_2"]["masked_by_channel"]), channel)
    assert np.delete(masked, channel) == pytest.approx(untouched)
    for name in ("mid", "up_0", "up_1"):
        assert planted[name]["masked_by_channel"] == plain[name]["masked_by_channel"]


def test_peaks_by_hand():
    features = torch.tensor([-1.0, 1.0, -1.0, 1.0, 9.0, -3.0]).view(1, 1, 2, 3)
    keep = torch.tensor([True, True, True, True, False, True]).view(1, 1, 2, 3)
    # the kept ones: mean -0.6, variance 2.24
    peak, kept = peaks(features, keep)
    assert peak.item() == pytest.approx(9.6 / 2.24**0.5) and kept.item() == pytest.approx(2.4 / 2.24**0.5)
    assert peaks(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3) > 0)[0].tolist() == [0, 0]


def test_gaussian_maps_are_as_large_and_as_smooth_but_have_no_outliers():
    with seeded(0):
        features = torch.nn.functional.avg_pool2d(torch.randn(1, 4, 68, 68), 5, stride=1)
    features[..., 20:24, 30:34] += 30 * features.std()
    surrogate = gaussian_like(features, keyed_generator(0))
    assert torch.allclose(torch.fft.rfft2(surrogate).abs(), torch.fft.rfft2(features).abs(), rtol=1e-3, atol=1e-2)
    assert torch.allclose(surrogate.var((2, 3)), features.var((2, 3)), rtol=1e-3)
    settings = SETTINGS
    assert share_masked(features, settings) > 0.003 > 10 * share_masked(surrogate, settings)


def test_features_that_overflow_are_refused():
    vae = tiny_vae("sd")
    with forced_features(vae, up_1=lambda output: output / 0), pytest.raises(ValueError, match="up_1 are not finite"):
        inspected(vae)


# Terms


def test_terms_are_those_of_the_loss():
    vae = tiny_vae("sd")
    inspector = inspected(vae, lpl_normalization="none", lpl_distance="l1")
    latents = inspector.latents[0]
    generator = keyed_generator(0, 0)
    for maps in DecoderFeatureExtractor(vae)(latents).values():
        torch.randn(maps.shape, generator=generator)  # what the outliers' study has drawn
    for index, error in enumerate(ERRORS):
        predicted = latents + error * latents.std() * torch.randn(latents.shape, generator=generator)
        for kind, masks in (("terms", True), ("unmasked", False)):
            loss_fn = LatentPerceptualLoss(
                vae, normalization="none", distance="l1", depth_weighting="uniform", mask_outliers=masks
            )
            total = loss_fn(predicted, latents)
            assert sum(inspector.found[0][kind][index]) == pytest.approx(total.item(), rel=1e-5)


def test_depth_weights_belong_to_their_blocks_whatever_the_order():
    """Modules named by path stand behind the named blocks, but may run before them."""
    blocks = ["up_2", "decoder.up_blocks.1.resnets.0"]
    vae = tiny_vae("sd")
    inspector = inspected(vae, lpl_blocks=tuple(blocks))
    weights = summary(inspector)["balance"]["depth_weights"]
    latents = inspector.latents[0]
    predicted = perturbed(latents, 0.1, keyed_generator(0))
    plain = terms_of(LatentPerceptualLoss(vae, blocks, depth_weighting="uniform"), predicted, latents)
    for kind in ("inverse", "exponential"):
        loss_fn = LatentPerceptualLoss(vae, blocks, depth_weighting=kind)
        weighted = terms_of(loss_fn, predicted, latents)
        expected = {name: term / whole for name, term, whole in zip(loss_fn.block_names, weighted, plain)}
        assert weights[kind] == pytest.approx(expected, rel=1e-5)


# Interpolation


@pytest.mark.parametrize("label", METHODS)
def test_a_scale_of_one_changes_nothing(label):
    vae = tiny_vae("sd")
    inspector = Inspector(vae, vae, Lpl())
    pixels = torch.rand(1, 3, 32, 32, generator=keyed_generator(1)) * 2 - 1
    latents = inspector.encode(pixels)
    changed = inspector.interpolate(pixels, latents, 1.0, *METHODS[label])
    assert torch.equal(changed, latents) and LatentPerceptualLoss(vae)(changed, latents).item() == 0


def test_errors_of_interpolated_latents_are_those_of_the_definitions():
    vae = tiny_vae("sd3")
    image = noise_image()
    inspector = inspected(vae, images=[image])
    numbers = summary(inspector)["interpolation"]
    latents = inspector.latents[0]
    with torch.no_grad():
        for label, mode in (("nearest, in the latent", "nearest"), ("bicubic, in the latent", "bicubic")):
            small = torch.nn.functional.interpolate(latents, (4, 4), mode=mode)
            changed = torch.nn.functional.interpolate(small, (8, 8), mode=mode)
            images = [
                vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample.clamp(-1, 1)
                for z in (latents, changed)
            ]
            found = {kind: values[numbers["scales"].index(2.0)] for kind, values in numbers["methods"][label].items()}
            assert found["latent_mse"] == pytest.approx((changed - latents).square().mean().item(), rel=1e-4)
            assert found["pixel_mse"] == pytest.approx((images[1] - images[0]).square().mean().item(), rel=1e-3)
            assert found["lpl"] == pytest.approx(LatentPerceptualLoss(vae)(changed, latents).item(), rel=1e-4)
    assert set(numbers["ordered_as_latent"]) == {"pixel_mse", "lpl"}


def test_pixels_are_resized_before_they_are_encoded():
    vae = tiny_vae("sd")
    inspector = Inspector(vae, vae, Lpl())
    pixels = torch.rand(1, 3, 32, 32, generator=keyed_generator(1)) * 2 - 1
    changed = inspector.interpolate(pixels, inspector.encode(pixels), 2.0, "bilinear", "pixels")
    assert torch.equal(changed, inspector.encode(resized(pixels, 2.0, "bilinear")))


# Errors of one size


def test_errors_of_one_size_change_the_image_less_and_more():
    inspector = inspected(tiny_vae("sd"), images=[noise_image()])
    hidden, random, amplified = summary(inspector)["errors"].values()
    expected = (ERROR * inspector.latents[0].std().item()) ** 2
    assert random["latent_mse"] == pytest.approx(expected, rel=0.2)  # noise, of few values
    for found in (hidden, amplified):
        assert found["latent_mse"] == pytest.approx(random["latent_mse"], rel=1e-4)
    assert hidden["pixel_mse"] < 0.8 * random["pixel_mse"] and amplified["pixel_mse"] > 1.2 * random["pixel_mse"]


@pytest.mark.parametrize("direction, found", [(1, (2.0, 0.0)), (-1, (0.0, 2.0))])
def test_the_search_finds_the_axes_of_a_linear_decoder(direction, found):
    """Which amplifies the first value threefold."""
    error = torch.tensor([1.2, 1.6])
    steps = []
    result = found_error(
        lambda z: z * torch.tensor([3.0, 1.0]), torch.zeros(2), error, direction, lambda: steps.append(0)
    )
    assert result.tolist() == pytest.approx(found, abs=0.2) and len(steps) == SEARCH_STEPS
