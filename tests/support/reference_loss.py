"""The loss of SPEC.md written a second time: slow, with loops over single numbers, in float64.

Nothing of `lpl` is used. Features come from the decoder's modules, called by hand one after the other. The paper's
symbols: `target` is phi_l (from z0), `predicted` is phi_hat_l (from z0_hat), `keep` is rho_l.
"""

import math
from fractions import Fraction

import torch
from diffusers import AutoencoderDC


# --- features --------------------------------------------------------------------------------------------------------


def unscale(vae, latents):
    """Scaled latents -> what the decoder takes; undoes `(z - shift) * scale`, or `(z - mean) / std * scale`."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(list(values), dtype=latents.dtype).reshape(1, -1, 1, 1) for values in (mean, std))
        return latents * std / config.scaling_factor + mean
    return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)


@torch.no_grad()
def decoder_features(vae, latents):
    """Scaled latents -> {"mid": ..., "up_0": ..., ..., "rgb": ...}, in the order in which the blocks run."""
    dtype = next(vae.parameters()).dtype
    hidden = unscale(vae, latents.detach().to(dtype))
    if getattr(vae, "post_quant_conv", None) is not None:
        hidden = vae.post_quant_conv(hidden)
    decoder = vae.decoder
    if isinstance(vae, AutoencoderDC):
        return _dc_features(decoder, hidden)
    hidden = decoder.conv_in(hidden)
    features = {}
    hidden = features["mid"] = decoder.mid_block(hidden)
    for index, block in enumerate(decoder.up_blocks):
        hidden = features[f"up_{index}"] = block(hidden)
    features["rgb"] = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden)))
    return features


def _dc_features(decoder, hidden):
    """AutoencoderDC: a shortcut around the first convolution, no mid block, the last of the blocks runs first."""
    hidden = decoder.conv_in(hidden) + hidden.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    features = {}
    for index in range(len(decoder.up_blocks)):
        hidden = features[f"up_{index}"] = decoder.up_blocks[-1 - index](hidden)
    hidden = decoder.norm_out(hidden.movedim(1, -1)).movedim(-1, 1)
    features["rgb"] = decoder.conv_out(decoder.conv_act(hidden))
    return features


# --- outliers (Sec. 3.2, Alg. 1) -------------------------------------------------------------------------------------


def scaled_kernel(kernel, height, width, even):
    """ceil(kernel * sqrt(H W) / 256) in exact arithmetic, an even one made odd by going `even` ("up" or "down")."""
    size = 1
    while (256 * size) ** 2 < kernel**2 * height * width:
        size += 1
    if size % 2 == 0:
        size += 1 if even == "up" else -1
    return size


def neighbours(grid, y, x, kernel):
    """The values in the kernel x kernel window around (y, x) that lie inside the map."""
    height, width, reach = len(grid), len(grid[0]), kernel // 2
    for row in range(max(0, y - reach), min(height, y + reach + 1)):
        for column in range(max(0, x - reach), min(width, x + reach + 1)):
            yield grid[row][column]


def morphology(keep, kernel, rule):
    """`rule` any: a position is kept where any neighbour is (dilation); all: where all are (erosion)."""
    if kernel == 1:
        return keep
    return [[rule(neighbours(keep, y, x, kernel)) for x in range(len(keep[0]))] for y in range(len(keep))]


def map_mask(grid, quantile=0.02, margin=2.0, dilation=3, erosion=5, scale_kernels=True):
    """One channel of one sample (a list of rows) -> rows of True = keep."""
    height, width = len(grid), len(grid[0])
    ranked = sorted(value for row in grid for value in row)
    count = len(ranked)
    if ranked[0] == ranked[-1]:  # also N = 1
        return [[True] * width for _ in range(height)]
    q = Fraction(str(quantile))
    low = ranked[max(1, math.floor(q * count)) - 1]
    high = ranked[max(1, math.floor((1 - q) * count)) - 1]
    mean = math.fsum(ranked) / count
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ranked) / (count - 1))
    keep = [[low - margin * std < value < high + margin * std for value in row] for row in grid]
    if scale_kernels:
        dilation = scaled_kernel(dilation, height, width, even="down")
        erosion = scaled_kernel(erosion, height, width, even="up")
    return morphology(morphology(keep, dilation, any), erosion, all)


def reference_mask(features, **options):
    """(B, C, H, W) features -> bool tensor of that shape, True = keep; values are looked at in float32."""
    grids = features.detach().float().tolist()
    return torch.tensor([[map_mask(grid, **options) for grid in sample] for sample in grids])


# --- the loss (Eq. 2) ------------------------------------------------------------------------------------------------


def kept_values(grid, keep):
    return [value for row, flags in zip(grid, keep) for value, flag in zip(row, flags) if flag]


def mean_and_variance(values):
    """Mean and biased variance; those of nothing are 0."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / len(values)


def sample_statistics(sample, masks):
    """One sample (a list of channels) -> [(mean, variance)] over the kept positions, and the block's e."""
    statistics = [mean_and_variance(kept_values(grid, keep)) for grid, keep in zip(sample, masks)]
    e = 1e-4 * math.fsum(variance for _, variance in statistics) / len(statistics) + 1e-12
    return statistics, e


def difference(predicted, target, own, other, normalization):
    """phi_hat' - phi' at one position; `own` and `other` are (mean, variance, e) of prediction and target."""
    if normalization == "none":
        return predicted - target
    mean, variance, e = own
    if normalization == "shared":
        return (predicted - target) / math.sqrt(variance + e)
    assert normalization == "separate"
    other_mean, other_variance, other_e = other
    return (predicted - mean) / math.sqrt(variance + e) - (target - other_mean) / math.sqrt(other_variance + other_e)


def block_loss(predicted, target, masks, statistics, e, normalization="shared", distance="l2"):
    """One block of one sample: mean over channels of the mean over kept positions. No depth weight."""
    target_statistics, target_e = sample_statistics(target, masks)
    total = 0.0
    for channel, keep in enumerate(masks):
        values, wanted = kept_values(predicted[channel], keep), kept_values(target[channel], keep)
        if normalization != "none" and len(values) < 2:
            continue
        own, other = (*statistics[channel], e), (*target_statistics[channel], target_e)
        differences = [difference(v, w, own, other, normalization) for v, w in zip(values, wanted)]
        terms = [d * d if distance == "l2" else abs(d) for d in differences]
        total += math.fsum(terms) / max(1, len(terms))
    return total / len(masks)


def depth_weights(features, blocks, depth_weighting):
    sides = {name: math.sqrt(maps.shape[-2] * maps.shape[-1]) for name, maps in features.items()}
    first = sides[next(iter(features))]
    if depth_weighting == "inverse":
        return [first / sides[name] for name in blocks]
    if depth_weighting == "exponential":
        return [2 ** (-sides[name] / first) for name in blocks]
    if depth_weighting == "uniform":
        return [1.0 for _ in blocks]
    assert len(depth_weighting) == len(blocks)
    return list(depth_weighting)


def every_block(features):
    return [name for name in features if name != "rgb"]


def reference_loss(
    vae,
    predicted_latents,
    latents,
    blocks=None,
    normalization="shared",
    detach_statistics=False,
    depth_weighting="inverse",
    mask_outliers=True,
    distance="l2",
    constants_from=None,
):
    """Eq. 2 per sample, a float64 tensor (B,).

    `constants_from` serves finite differences: what carries no gradient (masks, e, and with `detach_statistics` the
    predicted features' mean and variance) is then taken from these latents instead of `predicted_latents`.
    """
    predicted, target = decoder_features(vae, predicted_latents), decoder_features(vae, latents)
    constants = predicted if constants_from is None else decoder_features(vae, constants_from)
    blocks = every_block(predicted) if blocks is None else list(blocks)
    losses = [0.0] * len(latents)
    for name, weight in zip(blocks, depth_weights(predicted, blocks, depth_weighting)):
        keep = reference_mask(constants[name]) if mask_outliers else torch.ones_like(constants[name], dtype=torch.bool)
        keep = keep.tolist()
        ours, theirs, frozen = (maps[name].double().tolist() for maps in (predicted, target, constants))
        for b in range(len(losses)):
            statistics, e = sample_statistics(frozen[b], keep[b])
            if not detach_statistics:
                statistics, _ = sample_statistics(ours[b], keep[b])
            losses[b] += weight * block_loss(ours[b], theirs[b], keep[b], statistics, e, normalization, distance)
    return torch.tensor(losses, dtype=torch.float64)


def reference_variant_loss(vae, predicted_latents, latents):
    """`variant="reference"` per sample: masks and the normalising norm come from the target's features."""
    predicted, target = decoder_features(vae, predicted_latents), decoder_features(vae, latents)
    blocks = every_block(predicted)
    losses = [0.0] * len(latents)
    for level, name in enumerate(blocks):
        if level < 2:
            keep = torch.ones_like(target[name], dtype=torch.bool).tolist()
        else:
            dilation, erosion = (1, 3) if level == 2 else (3, 5)
            keep = reference_mask(target[name], dilation=dilation, erosion=erosion, scale_kernels=False).tolist()
        for b, (ours, theirs) in enumerate(zip(predicted[name].double().tolist(), target[name].double().tolist())):
            losses[b] += 2.0 ** -min(level, 3) * _reference_block(ours, theirs, keep[b]) / len(blocks)
    return torch.tensor(losses, dtype=torch.float64)


def _reference_block(predicted, target, masks):
    channels, height, width = len(target), len(target[0]), len(target[0][0])
    sums, counts = [0.0] * channels, [0] * channels
    for y in range(height):
        for x in range(width):
            kept = [target[c][y][x] if masks[c][y][x] else 0.0 for c in range(channels)]
            norm = math.sqrt(math.fsum(value * value for value in kept)) + 1e-6
            for c in range(channels):
                if masks[c][y][x]:
                    sums[c] += (predicted[c][y][x] / norm - kept[c] / norm) ** 2
                    counts[c] += 1
    return math.fsum(total / max(1, count) for total, count in zip(sums, counts)) / channels
