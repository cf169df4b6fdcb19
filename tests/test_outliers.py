"""The outlier mask (Sec. 3.2, Alg. 1) against a slow second implementation and against cases worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_loss import reference_mask, scaled_kernel
from tiny import seeded

import lpl.outliers
from lpl import outlier_mask


def heavy_tailed(*shape, seed=0):
    with seeded(seed):
        return torch.randn(*shape) ** 5


def smooth(height, width):
    """A map without outliers, values between -1 and 1."""
    y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 5, width)[None, :]
    return (torch.sin(y + x)).reshape(1, 1, height, width)


def masked_box(mask):
    """Rows and columns that the masked positions of a single map span, and whether they fill that box."""
    rows, columns = (~mask[0, 0]).nonzero(as_tuple=True)
    assert len(rows), "nothing is masked"
    box = (rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item())
    full = len(rows) == (box[1] - box[0] + 1) * (box[3] - box[2] + 1)
    return box, full


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    seed=st.integers(0, 10_000),
)
def test_equals_the_reference_on_small_maps(shape, seed):
    features = heavy_tailed(*shape, seed=seed)
    assert torch.equal(outlier_mask(features), reference_mask(features))


@pytest.mark.parametrize("shape", [(2, 70, 128, 128), (1, 3, 1, 60_000), (1, 3, 40_000, 1)])
@pytest.mark.parametrize("part", [2**15, 2**19])
def test_parts_and_maps_left_alone_change_nothing(shape, part, monkeypatch):
    """Against the plain way: kernels on every map, by the library's own selection; few and lone outliers too."""
    monkeypatch.setattr("lpl.outliers.CACHED_POSITIONS", part)
    features = heavy_tailed(*shape)
    features[:, 0] = features[:, 0].clamp(-1, 1)
    for count in range(shape[1] - 1):  # in a corner, so many extreme positions
        features[:, count + 1].clamp_(-1, 1).flatten(1)[:, : 2 * count + 2] = 50.0
    flat = features.flatten(2)
    count, std = flat.shape[-1], flat.std(-1, keepdim=True)
    low, high = (flat.kthvalue(max(1, int(share * count)), -1, keepdim=True).values for share in (0.02, 0.98))
    within = ((flat > low - 2 * std) & (flat < high + 2 * std)).view(shape)
    kernels = [scaled_kernel(kernel, *shape[2:], rounding) for kernel, rounding in ((3, "down"), (5, "up"))]
    expected = lpl.outliers.morphology(within, *kernels)
    assert torch.equal(outlier_mask(features), expected) and not expected.all()


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (1, 2, 50, 70), (1, 2, 90, 60), (1, 1, 110, 100), (1, 1, 40, 250)])
def test_equals_the_reference_on_larger_maps(shape):
    features = heavy_tailed(*shape)
    mask = outlier_mask(features)
    assert torch.equal(mask, reference_mask(features))
    assert 0.2 < mask.float().mean() < 1, "the comparison means something only where part is masked"


@pytest.mark.parametrize("shape", [(1, 1, 176, 172), (1, 1, 258, 250)])
def test_equals_the_reference_where_both_kernels_act(shape):
    blobs = torch.zeros(shape)
    with seeded(1):
        for y, x, size in torch.randint(0, shape[-1] - 6, (12, 3)).tolist():
            blobs[..., y : y + 1 + size % 6, x : x + 1 + size % 5] = 50.0 * (-1) ** size
        features = torch.randn(shape) + blobs
    mask = outlier_mask(features)
    assert torch.equal(mask, reference_mask(features))
    assert (~mask).sum() > 0 and not torch.equal(mask, outlier_mask(features, dilation=1))


@pytest.mark.parametrize(
    "options",
    [
        {"quantile": 0.1},
        {"margin": 0.5},
        {"quantile": 0.25, "margin": 0.1},
        {"dilation": 1},
        {"erosion": 1},
        {"dilation": 9, "erosion": 25},
    ],
)
def test_every_parameter_equals_the_reference(options):
    features = heavy_tailed(1, 2, 64, 48, seed=5)
    mask = outlier_mask(features, **options)
    assert torch.equal(mask, reference_mask(features, **options))


@pytest.mark.parametrize("options", [{"quantile": 0.1}, {"margin": 0.5}, {"dilation": 25}, {"erosion": 25}])
def test_every_parameter_has_an_effect(options):
    features = heavy_tailed(1, 2, 64, 48, seed=5)
    assert not torch.equal(outlier_mask(features, **options), outlier_mask(features))


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, dilation, erosion",
    [(32, 1, 1), (64, 1, 3), (128, 1, 3), (160, 1, 5), (172, 3, 5), (256, 3, 5), (258, 3, 7), (512, 5, 11)],
)
def test_kernels_follow_the_map(side, dilation, erosion):
    """A blob of d x d outliers keeps only its centre after the dilation; the erosion grows that to e x e."""
    assert scaled_kernel(3, side, side, even="down") == dilation
    assert scaled_kernel(5, side, side, even="up") == erosion
    features = smooth(side, side)
    features[..., 9 : 9 + dilation, 14 : 14 + dilation] = 1e4
    box, full = masked_box(outlier_mask(features))
    y, x, reach = 9 + dilation // 2, 14 + dilation // 2, erosion // 2
    assert box == (y - reach, y + reach, x - reach, x + reach) and full


@pytest.mark.parametrize("sign", [1, -1])
def test_a_three_pixel_spike_at_256_px_masks_five_pixels(sign):
    features = smooth(256, 256)
    features[..., 100:103, 30:33] = sign * 1000
    box, full = masked_box(outlier_mask(features))
    assert box == (99, 103, 29, 33) and full


def test_a_lone_pixel_at_256_px_is_a_false_positive():
    features = smooth(256, 256)
    features[..., 100, 30] = 1000
    assert outlier_mask(features).all()


def test_no_growth_from_beyond_the_border():
    features = smooth(64, 64)
    features[..., 0, 0] = 1000
    box, full = masked_box(outlier_mask(features))
    assert box == (0, 1, 0, 1) and full


def test_a_map_without_outliers_is_kept():
    assert outlier_mask(smooth(64, 64)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4, 1e-6])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 3), (17, 23), (64, 64), (100, 300)])
def test_a_constant_map_is_kept(shape, value):
    assert outlier_mask(torch.full((1, 2, *shape), value)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 7), (5, 1), (3, 3)])
def test_maps_under_fifty_positions_do_not_crash(shape):
    mask = outlier_mask(heavy_tailed(2, 3, *shape))
    assert mask.shape == (2, 3, *shape)


def test_channels_and_samples_do_not_see_each_other():
    features = heavy_tailed(3, 4, 20, 30)
    mask = outlier_mask(features)
    for b in range(3):
        for c in range(4):
            alone = outlier_mask(features[b : b + 1, c : c + 1])
            assert torch.equal(alone[0, 0], mask[b, c])


# --- the tensor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_looked_at_in_float32(dtype):
    features = heavy_tailed(2, 3, 24, 20).clamp(-6e4, 6e4).to(dtype)
    mask = outlier_mask(features)
    assert mask.dtype == torch.bool and mask.shape == features.shape
    assert torch.equal(mask, outlier_mask(features.float())) and not mask.all()


def test_no_gradient_and_no_change_to_the_input():
    features = heavy_tailed(1, 2, 16, 16)
    given = features.clone().requires_grad_()
    mask = outlier_mask(given)
    assert not mask.requires_grad and torch.equal(given.detach(), features)


def test_memory_layout_does_not_matter():
    features = heavy_tailed(2, 4, 20, 12)
    assert torch.equal(outlier_mask(features.to(memory_format=torch.channels_last)), outlier_mask(features))
    assert torch.equal(outlier_mask(features.mT), outlier_mask(features).mT)
