"""Loss masks: pooled to any map, in LPL, its student and its corrections, in float64."""

import pytest
import torch
from helpers import pair
from reference_loss import decoder_features, reference_mask
from tiny import tiny_vae

from lpl import LatentPerceptualLoss, outlier_mask
from lpl.footprint import footprint
from lpl.masking import LossMask
from lpl.student import Student, StudentLoss, difference
from lpl.terms import block_term


FACTOR = 4  # of the tiny VAE
OPTIONS = [
    {},
    {"distance": "l1"},
    {"normalization": "separate"},
    {"normalization": "none", "mask_outliers": False},
    {"variant": "reference"},
]


@pytest.fixture(scope="module")
def vae():
    return tiny_vae("sd", torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def latents(vae):
    """Prediction and target, (2, 4, 6, 8)."""
    return pair(vae, height=6, width=8)


def masks(value, **options):
    return LossMask(torch.full((2, 1, 6 * FACTOR, 8 * FACTOR), float(value), dtype=torch.float64), **options)


def left_half():
    mask = masks(0)
    mask.pixels[..., : 4 * FACTOR] = 1
    return mask


def with_gradient(loss, predicted, latents, **options):
    predicted = predicted.clone().requires_grad_()
    value = loss(predicted, latents, **options)
    return value.detach(), torch.autograd.grad(value.sum(), predicted)[0]


# Pooling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 5), (6, 8), (24, 32), (48, 64)])
def test_pooling_keeps_the_mean_and_ones(size):
    mask = LossMask(torch.rand(2, 1, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert mask.pooled(size).shape == (2, 1, *size)
    if 64 % size[1] == 0:
        assert torch.allclose(mask.pooled(size).mean((1, 2, 3)), mask.pixels.mean((1, 2, 3)))
    assert (LossMask(torch.ones(1, 1, 48, 64)).pooled(size) == 1).all()


def test_a_position_covered_by_half_is_not_in_the_region():
    mask = LossMask(torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]]).view(1, 1, 2, 4))
    assert mask.region((1, 2)).flatten().tolist() == [False, True]
    assert mask.pooled((1, 2)).flatten().tolist() == [0.5, 0.75]


def test_the_masks_of_a_window_are_those_of_its_pixels():
    mask = LossMask(torch.arange(48.0 * 64).view(1, 1, 48, 64))
    part = mask.within((2, 3, 4, 2), (12, 16)).pixels
    assert torch.equal(part, mask.pixels[..., 8:24, 12:20])


# LPL -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("window", [None, (2, 4, 4, 4)])
def test_a_white_mask_changes_no_bit(options, share, window, vae, latents):
    loss = LatentPerceptualLoss(vae, **options)
    value, gradient = with_gradient(loss, *latents, window=window)
    masked, masked_gradient = with_gradient(loss, *latents, window=window, mask=masks(1, unmasked_weight=share))
    assert torch.equal(masked, value) and torch.equal(masked_gradient, gradient)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_black_mask_leaves_the_share_of_unmasked_weight(options, vae, latents):
    loss = LatentPerceptualLoss(vae, **options)
    value, gradient = with_gradient(loss, *latents)
    none, no_gradient = with_gradient(loss, *latents, mask=masks(0))
    assert not none.any() and not no_gradient.any()
    part, part_of_gradient = with_gradient(loss, *latents, mask=masks(0, unmasked_weight=0.3))
    assert torch.allclose(part, 0.3 * value) and torch.allclose(part_of_gradient, 0.3 * gradient)


@pytest.mark.parametrize("mask_outliers", [True, False])
def test_half_a_mask_against_a_direct_computation(mask_outliers, vae, latents):
    """The mean over the kept positions on the left, standardised by their variance."""
    predicted, target = (decoder_features(vae, z) for z in latents)
    expected = torch.zeros(2, dtype=torch.float64)
    predicted.pop("rgb")
    for name, phi_hat in predicted.items():
        keep = reference_mask(phi_hat) if mask_outliers else torch.ones_like(phi_hat, dtype=torch.bool)
        keep[..., phi_hat.shape[-1] // 2 :] = False
        count = keep.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (phi_hat * keep).sum((2, 3), keepdim=True) / count
        variance = ((phi_hat - mean).square() * keep).sum((2, 3), keepdim=True) / count
        variance = variance + 1e-4 * variance.mean(1, keepdim=True) + 1e-12
        terms = (phi_hat - target[name]).square() * keep / variance / count * (count >= 2)
        relative_side = (phi_hat.shape[-1] / predicted["mid"].shape[-1]) ** -1
        expected += relative_side * terms.sum((2, 3)).mean(1)
    loss = LatentPerceptualLoss(vae, mask_outliers=mask_outliers)
    assert torch.allclose(loss(*latents, mask=left_half()), expected, rtol=1e-6)
    assert max(share.max() for share in loss.last.kept.values()) <= 0.5
    whole = loss(*latents)
    mixed = loss(*latents, mask=left_half()._replace(unmasked_weight=0.2))
    assert torch.allclose(mixed, 0.8 * expected + 0.2 * whole, rtol=1e-6)


@pytest.mark.parametrize("normalization", ["shared", "separate", "none"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_the_gradient_of_a_masked_term(normalization, distance):
    """Finite differences inside the region, and exactly 0 outside."""
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 2, 3, 4, 6, dtype=torch.float64, generator=generator)
    region = torch.rand(2, 1, 4, 6, generator=generator) > 0.4

    def term(x, y):
        return block_term(x, y, None, normalization, distance, region=region)[0]

    gradient = target.clone()
    term(predicted, gradient)
    gradient /= 2.0**16
    assert not gradient[~region.expand_as(gradient)].any() and gradient[region.expand_as(gradient)].all()
    direction = torch.randn(predicted.shape, dtype=torch.float64, generator=generator)
    ahead, behind = (term(predicted + step * direction, target.clone()).sum() for step in (1e-6, -1e-6))
    assert torch.allclose((gradient * direction).sum(), (ahead - behind) / 2e-6, rtol=1e-3)  # e has no gradient


def test_each_sample_has_its_own_mask_whatever_the_chunks(vae, latents):
    mask = left_half()
    mask.pixels[1] = 1
    together, apart = (LatentPerceptualLoss(vae, chunk_size=size)(*latents, mask=mask) for size in (2, 1))
    loss = LatentPerceptualLoss(vae)
    assert torch.equal(together, apart)
    assert torch.equal(together[0], loss(*latents, mask=left_half())[0])
    assert torch.equal(together[1], loss(*latents)[1])


def test_a_window_takes_its_part_of_the_mask(vae, latents):
    loss, window = LatentPerceptualLoss(vae), (0, 0, 4, 4)
    assert torch.equal(loss(*latents, window=window, mask=left_half()), loss(*latents, window=window))
    assert not loss(*latents, window=(0, 4, 4, 4), mask=left_half()).any()


def test_a_mask_of_another_batch_is_refused(vae, latents):
    with pytest.raises(ValueError, match="the mask must be"):
        LatentPerceptualLoss(vae)(*latents, mask=left_half().rows(slice(1)))


def test_a_region_takes_bytes_and_no_copy_of_the_features():
    predicted, target = torch.zeros(2, 1, 4, 64, 64, device="meta")
    region = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="meta")
    given = [predicted, target, region]
    without, masked = (
        footprint(lambda r=r: block_term(predicted, target, outlier_mask, region=r), given) for r in (None, region)
    )
    assert without.peak <= masked.peak <= without.peak + 3 * predicted.numel()


# The student ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return StudentLoss(Student(4, width=16, depth=2).double())


def test_the_student_under_masks(student, latents):
    value, gradient = with_gradient(student, *latents)
    for share in (0.0, 0.3):
        white = with_gradient(student, *latents, mask=masks(1, unmasked_weight=share))
        assert torch.equal(white[0], value) and torch.allclose(white[1], gradient, rtol=1e-12)
        black = with_gradient(student, *latents, mask=masks(0, unmasked_weight=share))
        assert torch.allclose(black[0], share * value) and torch.allclose(black[1], share * gradient)
    left = [(x[..., :4], y[..., :4]) for x, y in zip(*(student.student(z) for z in latents))]
    expected = sum(
        ((x - y).square().mean((2, 3)) / (v + 1e-4 * v.mean(1, keepdim=True))).mean(1)
        for (x, y), v in ((pair, pair[0].var((2, 3), correction=0)) for pair in left)
    )
    assert torch.allclose(student(*latents, mask=left_half()), expected)
    assert torch.allclose(sum(student.last.terms.values()), expected)


@pytest.mark.parametrize("positions", [0, 1, 2])
def test_the_student_under_a_tiny_mask(positions, student, latents):
    """Fewer than two positions have no variance; nothing explodes."""
    mask = torch.zeros_like(masks(0).pixels)
    side = mask.shape[-1] // latents[0].shape[-1]
    mask[..., :side, : positions * side] = 1
    value, gradient = with_gradient(student, *latents, mask=LossMask(mask))
    assert torch.equal(value > 0, torch.full_like(value, positions == 2, dtype=torch.bool))
    assert gradient.isfinite().all() and bool(gradient.any()) == (positions == 2)


def test_corrections_under_a_mask(student, vae, latents):
    loss, mask = LatentPerceptualLoss(vae), left_half()
    predicted, target = latents[0].clone().requires_grad_(), latents[1]
    value, exact = (each(predicted, target, mask=mask) for each in (student, loss))
    correction, _ = difference(value, exact, predicted, torch.arange(len(value)))
    assert torch.allclose(value + correction, exact)
