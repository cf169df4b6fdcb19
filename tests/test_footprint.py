"""The count of memory against sums by hand, and against what the loss does with it."""

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import MORE_VAE_CONFIGS, VAE_CONFIGS, tiny_vae
from torch import nn

from lpl import LatentPerceptualLoss, features
from lpl.autoencoders import latent_channels, without_weights
from lpl.footprint import footprint


KINDS = [*VAE_CONFIGS, *MORE_VAE_CONFIGS]
# Decoders whose norms are followed by an activation, both modules: not spatial norms (movq, kvae), nor F.silu (cosmos)
PAIRED = [kind for kind in KINDS if kind not in ("tiny", "dc", "movq", "cosmos", "kvae")]


def latents_of(vae, batch=3, side=4, **options):
    return torch.randn(batch, latent_channels(vae.config), side, side, generator=torch.manual_seed(0), **options)


def peak(vae, side=8, **options):
    """Bytes of a call for one sample."""
    loss = LatentPerceptualLoss(vae, **options)
    return loss._footprint((latent_channels(vae.config), side, side), torch.float32, True).peak


def test_the_peak_by_hand():
    given = torch.zeros(1000)

    def run():
        first = given + 1  # 4,000 bytes
        second = first.double()  # 8,000 more: the peak
        del first
        return second.view(10, 100)[0].float()  # 400, with 8,000

    found = footprint(run, [given])
    assert (found.peak, found.largest) == (12_000, 1000)


def test_what_a_backward_pass_keeps():
    given = torch.zeros(1000, requires_grad=True)
    assert footprint(lambda: (given * 2).sum(), [given]).peak == 4_004  # the product, and its sum
    assert footprint(lambda: given.exp().exp().sum(), [given]).peak == 8_004, "autograd keeps the first exponential"


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_activations_are_recomputed(kind, monkeypatch):
    """The numbers are the same, no convolution runs twice, and less is kept where the pair is known."""
    vae = tiny_vae(kind, torch.float64)
    latents = latents_of(vae, dtype=torch.float64)
    calls, results, peaks = [], [], []
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda *_: calls.append(1))
    for norms in (features.NORMS, ()):
        monkeypatch.setattr(features, "NORMS", norms)
        predicted = (latents + 0.3).requires_grad_()
        LatentPerceptualLoss(vae)(predicted, latents).sum().backward()
        results.append((predicted.grad, len(calls)))
        peaks.append(peak(vae))
        calls.clear()
    (ours, our_calls), (theirs, their_calls) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)  # the order of sums may differ
    assert torch.equal(ours, theirs) or kind not in ("sd", "sd3", "asymmetric")
    assert our_calls == their_calls > 0
    assert (peaks[0] < peaks[1]) is (kind in PAIRED), peaks


def test_a_norm_whose_output_a_hook_replaces():
    """What is recomputed would be another output."""
    vae = tiny_vae("sd", torch.float64)
    latents = latents_of(vae, dtype=torch.float64)
    vae.decoder.up_blocks[0].resnets[0].norm1.register_forward_hook(lambda module, inputs, output: output * 2)
    gradients = []
    for checkpointing in (False, True):
        predicted = (latents + 0.3).requires_grad_()
        LatentPerceptualLoss(vae, gradient_checkpointing=checkpointing)(predicted, latents).sum().backward()
        gradients.append(predicted.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=0)


# How many samples are decoded at a time ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_quick_bound_is_above_the_count(kind):
    vae = tiny_vae(kind)
    for side in (4, 16):
        assert peak(vae, side) < side**2 * LatentPerceptualLoss(vae)._most_per_position()


@pytest.mark.parametrize("fitting, expected", [(0.5, 1), (1.0, 1), (2.9, 2), (100, 3)])
def test_as_many_samples_as_fit(fitting, expected, monkeypatch):
    vae = tiny_vae("sd", torch.float64)
    latents = latents_of(vae, dtype=torch.float64)
    predicted, loss = latents + 0.3, LatentPerceptualLoss(vae)
    whole = loss(predicted, latents)
    one = loss._footprint(latents.shape[1:], latents.dtype, True).peak
    monkeypatch.setattr("lpl.loss.MEMORY", int(fitting * one))
    assert loss.samples_at_once(latents) == expected
    torch.testing.assert_close(loss(predicted, latents), whole, rtol=1e-12, atol=0)


def test_samples_in_a_chunk_need_no_more_than_counted():
    """The count of one sample, times their number, is no less than the count of several."""
    vae = without_weights(tiny_vae("sd"))
    loss, one = LatentPerceptualLoss(vae), peak(vae)
    predicted, latents = (torch.empty(5, 4, 8, 8, device="meta") for _ in range(2))
    run = footprint(
        lambda: loss._compare(predicted, latents, None, None, True), [predicted, latents, *vae.parameters()]
    )
    assert run.peak <= 5 * one


def test_a_chunk_size_is_kept_up_to_the_largest_tensor(monkeypatch):
    vae = tiny_vae("sd")
    latents, loss = latents_of(vae), LatentPerceptualLoss(vae, chunk_size=2)
    monkeypatch.setattr("lpl.loss.MEMORY", 1)
    assert loss.samples_at_once(latents) == 2
    largest = loss._footprint(latents.shape[1:], latents.dtype, True).largest
    monkeypatch.setattr("lpl.loss.LARGEST_TENSOR", 2 * largest - 1)
    assert loss.samples_at_once(latents) == 1


@pytest.fixture(scope="module")
def sdxl_vae():
    with torch.device("meta"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ).eval()


@pytest.mark.parametrize("side, chunk_size, expected", [(256, None, 2), (512, None, 1), (1024, None, 1), (1024, 8, 7)])
def test_the_decoder_of_sdxl(side, chunk_size, expected, sdxl_vae):
    """At 1024 px, the widest map of 8 samples would have 8 x 256 x 1024^2 = 2^31 elements."""
    latents = torch.empty(16, 4, side // 8, side // 8, device="meta")
    assert LatentPerceptualLoss(sdxl_vae, chunk_size=chunk_size).samples_at_once(latents) == expected


def test_a_window_is_counted_with_its_margin(monkeypatch):
    vae = tiny_vae("sd")
    latents, loss = latents_of(vae, side=64), LatentPerceptualLoss(vae)
    one = loss._footprint((4, 64, 64), torch.float32, True).peak
    monkeypatch.setattr("lpl.loss.MEMORY", one)
    assert loss.samples_at_once(latents) == 1
    assert loss.samples_at_once(latents, (0, 0, 16, 16)) == 3  # 24 x 24 positions of 64 x 64


class Reading(AutoencoderKL):
    """A decoder that reads a value, which tensors without numbers lack."""

    def decode(self, z, *args, **kwargs):
        assert float(z.detach().abs().amax()) >= 0
        return super().decode(z, *args, **kwargs)


def test_a_decoder_that_cannot_be_counted(monkeypatch):
    vae = Reading(**{name: value for name, value in tiny_vae("sd").config.items() if not name.startswith("_")}).eval()
    latents = latents_of(vae)
    monkeypatch.setattr("lpl.loss.MEMORY", 1)
    assert LatentPerceptualLoss(vae).samples_at_once(latents) == 1
    assert LatentPerceptualLoss(vae, chunk_size=2).samples_at_once(latents) == 2
    assert LatentPerceptualLoss(vae)(latents + 0.3, latents).shape == (3,)
