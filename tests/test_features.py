"""Hooked decoder features against the decoder's modules called by hand."""

import pytest
import torch
from diffusers import AutoencoderDC
from helpers import block, hook_count, random_latents
from reference_loss import decoder_features
from tiny import VAE_CONFIGS, tiny_vae

from lpl import DecoderFeatureExtractor, LatentPerceptualLoss
from lpl.autoencoders import decoder_blocks


EVERY = ["mid", "up_0", "up_1", "up_2"]
EVERY_DC = EVERY[1:]  # AutoencoderDC has no mid block


@pytest.fixture(params=list(VAE_CONFIGS))
def vae(request):
    return tiny_vae(request.param, torch.float64)


def every(vae):
    return EVERY_DC if isinstance(vae, AutoencoderDC) else EVERY


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_equal_to_the_modules_called_by_hand(vae):
    latents = random_latents(vae, height=4, width=6)
    extractor = DecoderFeatureExtractor(vae)
    features, expected = extractor(latents), decoder_features(vae, latents)
    assert list(extractor.block_names) == list(features) == every(vae)
    for name in every(vae):
        torch.testing.assert_close(features[name], expected[name], rtol=1e-10, atol=1e-10)
    sizes = [(4, 6), (8, 12), (16, 24)]
    sizes += [] if isinstance(vae, AutoencoderDC) else sizes[-1:]
    assert [tuple(maps.shape[-2:]) for maps in features.values()] == sizes


def test_scaling_and_shift_are_undone():
    """Through the VAE's own `decode`, so that the hand-written path above is not the only witness."""
    vae = tiny_vae("sd3", torch.float64)
    latents = random_latents(vae)
    expected = vae.decode(latents / 1.5305 + 0.0609).sample
    torch.testing.assert_close(DecoderFeatureExtractor(vae, blocks=("rgb",))(latents)["rgb"], expected)


def test_latents_mean_and_std_are_undone():
    mean, std = (0.5, -1.0, 0.0, 2.0), (2.0, 1.0, 0.5, 3.0)
    vae = tiny_vae("sd", torch.float64, latents_mean=mean, latents_std=std)
    latents = random_latents(vae)
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(1, 4, 1, 1) for values in (mean, std))
    expected = vae.decode(latents * std / 0.18215 + mean).sample
    torch.testing.assert_close(DecoderFeatureExtractor(vae, blocks=("rgb",))(latents)["rgb"], expected)


@pytest.mark.parametrize("kind", ["sd", "asymmetric"])
def test_post_quant_conv_is_applied(kind):
    vae = tiny_vae(kind, torch.float64)
    latents, extractor = random_latents(vae), DecoderFeatureExtractor(vae, blocks=("mid",))
    before = extractor(latents)["mid"]
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(2)
    assert not torch.allclose(extractor(latents)["mid"], before, rtol=1e-3)


@pytest.mark.parametrize("last", range(-3, 0))
def test_decoding_stops_after_the_last_block_asked_for(vae, last):
    calls = [count_calls(block(vae, name)) for name in every(vae)]
    head = count_calls(vae.decoder.conv_out)
    features = DecoderFeatureExtractor(vae, blocks=(every(vae)[last],))(random_latents(vae))
    assert list(features) == [every(vae)[last]]
    left_out = -1 - last
    assert [len(seen) for seen in calls] == [1] * (len(calls) - left_out) + [0] * left_out
    assert not head


def test_a_subset_of_blocks(vae):
    latents, subset = random_latents(vae), [every(vae)[0], "up_1"]
    extractor = DecoderFeatureExtractor(vae, blocks=subset)
    features, expected = extractor(latents), decoder_features(vae, latents)
    assert list(extractor.block_names) == list(features) == subset
    for name, maps in features.items():
        torch.testing.assert_close(maps, expected[name], rtol=1e-10, atol=1e-10)


def test_as_many_up_blocks_as_the_decoder_has():
    vae = tiny_vae("sd", block_out_channels=(4, 4, 8, 8))
    assert list(DecoderFeatureExtractor(vae).block_names) == [*EVERY, "up_3"]


def test_blocks_without_layers_are_no_blocks():
    """Some of AutoencoderDC's models have nothing at full resolution: the block before would be compared twice."""
    config = {"layers_per_block": (0, 1, 1), "block_types": "ResBlock"}
    vae = tiny_vae(
        "dc",
        torch.float64,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in config.items()},
    )
    latents = random_latents(vae)
    features = DecoderFeatureExtractor(vae)(latents)
    assert list(features) == list(decoder_blocks(vae)) == ["up_0", "up_1"]
    assert [tuple(maps.shape[-2:]) for maps in features.values()] == [(4, 4), (8, 8)]
    raw = latents / vae.config.scaling_factor
    torch.testing.assert_close(DecoderFeatureExtractor(vae, blocks=("rgb",))(latents)["rgb"], vae.decode(raw).sample)


def test_rgb_alone_is_the_decoded_image(vae):
    latents = random_latents(vae)
    features = DecoderFeatureExtractor(vae, blocks=("rgb",))(latents)
    assert list(features) == ["rgb"] and features["rgb"].shape == (2, 3, 16, 16)
    torch.testing.assert_close(features["rgb"], decoder_features(vae, latents)["rgb"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", [("rgb", "mid"), ("up_0", "rgb"), ("up_3",), ("encoder",), ("mid", "up_x"), ()])
def test_wrong_blocks_are_refused(blocks):
    with pytest.raises(ValueError) as error:
        DecoderFeatureExtractor(tiny_vae("sd"), blocks=blocks)
    if blocks:
        assert blocks[-1] in str(error.value), "says what was given"
        assert "mid" in str(error.value) and "up_2" in str(error.value), "says what is accepted"


@pytest.mark.parametrize("kind, channels", [("sd", 16), ("sd3", 4)])
def test_wrong_shapes_are_refused(kind, channels):
    extractor = DecoderFeatureExtractor(tiny_vae(kind))
    with pytest.raises(ValueError, match=str(channels)):
        extractor(torch.zeros(1, channels, 4, 4))
    with pytest.raises(ValueError):
        extractor(torch.zeros(16, 4, 4))


def test_empty_latents_of_another_vae_are_refused(vae):
    with pytest.raises(ValueError, match=r"\(0, 9, 3, 3\)"):
        LatentPerceptualLoss(vae)(torch.zeros(0, 9, 3, 3), torch.zeros(0, 9, 3, 3))


def test_no_hook_stays(vae):
    extractor = DecoderFeatureExtractor(vae)
    extractor(random_latents(vae))
    extractor(random_latents(vae))
    assert hook_count(vae) == 0


def test_no_hook_stays_after_an_exception(vae):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory, say")

    extractor, latents = DecoderFeatureExtractor(vae), random_latents(vae)
    vae.decoder.up_blocks[1].forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        extractor(latents)
    assert hook_count(vae) == 0
    del vae.decoder.up_blocks[1].forward
    assert list(extractor(latents)) == every(vae)


def test_hooks_of_others_stay(vae):
    calls = count_calls(block(vae, "up_0"))
    DecoderFeatureExtractor(vae)(random_latents(vae))
    assert calls and hook_count(vae) == 1


def test_gradient_reaches_the_latents(vae):
    latents = random_latents(vae).requires_grad_()
    features = DecoderFeatureExtractor(vae)(latents)
    for maps in features.values():
        (gradient,) = torch.autograd.grad(maps.square().sum(), latents, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_slicing_and_tiling_are_refused(switch):
    vae = tiny_vae("sd")
    getattr(vae, switch)()
    with pytest.raises(ValueError, match=switch.removeprefix("enable_")):
        DecoderFeatureExtractor(vae)(random_latents(vae))
