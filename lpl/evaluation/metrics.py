"""How far generated images are from real ones, as numbers that follow from features.

*Features* are one row per image, (N, D), of a network (:mod:`lpl.evaluation.networks`); a number belongs to its
network and to the images' preprocessing, and compares with no other. Libraries compute, here is what they are told:

- ``fid``: the Fréchet distance of the two Gaussians that have the features' means and covariances (Heusel et al.,
  2017), by torchmetrics in float64. It is 0 or more; the fewer samples, the further above its limit.
- ``kid``: the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al., 2018), by
  torchmetrics. It has no bias, so that it may fall below 0.
- ``precision``, ``recall`` (Kynkäänniemi et al., 2019), ``density``, ``coverage`` (Naeem et al., 2020), by prdc. Each
  sample has a ball around it that reaches to its k-th *neighbour*. Precision is the share of generated samples in some
  real sample's ball, recall of real ones in some generated sample's; density counts the real balls that a generated
  sample is in, divided by k; coverage is the share of real balls that hold a generated sample.
- ``clip_score``: 100 max(0, cosine) of the CLIP features of an image and its caption, averaged (Hessel et al., 2021,
  with 100 in the place of their 2.5).

An *interval* is the value plus and minus 1.96 standard deviations of what resamples of both sets give, cut to the
values that are possible. The quantiles of the resamples would not do: a sample drawn with replacement has duplicates,
for which a Fréchet distance comes out larger and balls smaller, so that they may all lie on one side of the value.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import torch
from prdc import compute_prdc
from sklearn.metrics.pairwise import polynomial_kernel
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm.auto import tqdm

from lpl.evaluation import METRICS, NEIGHBOUR_METRICS, SET_METRICS


SMALLER_IS_BETTER = ("fid", "kid")
RANGES = {
    "fid": (0.0, math.inf),
    "kid": (-math.inf, math.inf),
    **dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0)),
    "density": (0.0, math.inf),
    "clip_score": (0.0, 100.0),
}
KID_SUBSET = 1000  # samples of each set at a time
KID_SUBSETS = 100
SPREAD = 1.96  # standard deviations that hold 95% of a Gaussian
SAMPLES_PER_FEATURE = 10  # our measure of enough for a Fréchet distance
ENOUGH_FOR_NEIGHBOURS = 1000  # our measure
ENOUGH_FOR_MEANS = 100  # our measure
ROWS = 4096  # of the kernel's matrix at a time


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval, None where nothing was resampled."""

    value: float
    low: float | None = None
    high: float | None = None


def compare(
    generated: np.ndarray,
    reference: np.ndarray,
    metrics: Sequence[str] = SET_METRICS,
    bootstrap: int = 0,
    seed: int = 0,
    neighbours: int = 5,
    progress: bool = False,
) -> dict[str, Estimate]:
    """The metrics of two sets of features.

    Args:
        generated: (N, D).
        reference: (M, D).
        metrics: of SET_METRICS.
        bootstrap: resamples for the intervals, or 0 for none.
        seed: of the resamples, and of KID's subsets where a set has more than 1000 samples or the sets differ in size.
        neighbours: k of :data:`NEIGHBOUR_METRICS`, whose distances take 8 N M bytes several times over.
        progress: show a bar over the resamples.

    Returns:
        metric -> estimate, in the order of ``metrics``.

    Raises:
        ValueError: for unknown metrics, features that are not as above, not finite or too few, and one resample.
    """
    _check_metrics(metrics)
    _check_bootstrap(bootstrap)
    generated, reference = _checked_features(generated, reference)
    _check_counts(metrics, len(generated), len(reference), neighbours)
    values = _values(generated, reference, metrics, neighbours)
    if "kid" in metrics:
        values["kid"] = kid(generated, reference, seed)
    deviations = _deviations(generated, reference, metrics, bootstrap, seed, neighbours, progress) if bootstrap else {}
    return {metric: _estimate(metric, values[metric], deviations.get(metric)) for metric in metrics}


def _check_metrics(metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in SET_METRICS]:
        why = " (clip_score compares images with captions: clip_score())" if "clip_score" in unknown else ""
        raise ValueError(f"metrics {', '.join(unknown)}: of two sets there are {', '.join(SET_METRICS)}{why}")


def _check_bootstrap(bootstrap: int) -> None:
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"--bootstrap {bootstrap}: give 0 for no intervals, or 2 resamples at least (100 serve)")


def _checked_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Both in float64."""
    shapes = [np.shape(features) for features in sets]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features of shapes {shapes[0]} and {shapes[1]}: both must be (samples, D) with the same D")
    if not all(np.isfinite(features).all() for features in sets):
        raise ValueError("some features are not finite: the network fails on these images")
    return [np.asarray(features, dtype=np.float64) for features in sets]


def _check_counts(metrics: Sequence[str], generated: int, reference: int, neighbours: int) -> None:
    near = any(metric in NEIGHBOUR_METRICS for metric in metrics)
    if near and neighbours < 1:
        raise ValueError(f"neighbours = {neighbours}: {', '.join(NEIGHBOUR_METRICS)} need 1 at least")
    least = neighbours + 2 if near else 2
    if min(generated, reference) < least:
        raise ValueError(
            f"{generated} generated and {reference} reference images: {', '.join(metrics)} need {least} of each at "
            "least; give more images (--num_images) or fewer --metrics"
        )


def _estimate(metric: str, value: float, deviation: float | None) -> Estimate:
    if deviation is None:
        return Estimate(value)
    least, most = RANGES[metric]
    return Estimate(value, max(least, value - SPREAD * deviation), min(most, value + SPREAD * deviation))


def _values(generated: np.ndarray, reference: np.ndarray, metrics: Sequence[str], neighbours: int) -> dict[str, float]:
    """Those of the metrics that draw no random numbers: all but KID."""
    values = {"fid": frechet_distance(generated, reference)} if "fid" in metrics else {}
    if any(metric in NEIGHBOUR_METRICS for metric in metrics):
        values |= neighbour_metrics(generated, reference, neighbours)
    return values


def frechet_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of the means m, n and covariances S, T (divided by N - 1) of the features.

    Rounding leaves it a little below 0 where the sets are alike; that is given as 0.
    """
    metric = FrechetInceptionDistance(feature=_given(generated.shape[1]), sync_on_compute=False)
    return max(0.0, float(_torchmetrics(metric, generated, reference)))


def kid(generated: np.ndarray, reference: np.ndarray, seed: int = 0) -> float:
    """The mean over subsets of min(1000, N, M) samples; just one where it is all there is."""
    size = min(KID_SUBSET, len(generated), len(reference))
    subsets = 1 if len(generated) == len(reference) == size else KID_SUBSETS
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_given(generated.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        mean, _ = _torchmetrics(metric, generated, reference)
    return float(mean)


def _torchmetrics(metric: nn.Module, generated: np.ndarray, reference: np.ndarray):
    """Of this process alone (sync_on_compute=False): where there are several, each has all features."""
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return metric.compute()


def _given(dim: int) -> nn.Module:
    """In the place of a network: what it is given are features already."""
    network = nn.Identity()
    network.num_features = dim
    return network


def neighbour_metrics(generated: np.ndarray, reference: np.ndarray, neighbours: int) -> dict[str, float]:
    """Precision, recall, density and coverage."""
    with redirect_stdout(io.StringIO()):  # it prints the counts
        values = compute_prdc(reference, generated, nearest_k=neighbours)
    return {metric: float(values[metric]) for metric in NEIGHBOUR_METRICS}


# How certain they are ------------------------------------------------------------------------------------------------


def _deviations(
    generated: np.ndarray,
    reference: np.ndarray,
    metrics: Sequence[str],
    bootstrap: int,
    seed: int,
    neighbours: int,
    progress: bool,
) -> dict[str, float]:
    """Standard deviation of each metric over resamples of both sets."""
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(features), size=(bootstrap, len(features))) for features in (generated, reference)]
    found = [
        _values(generated[mine], reference[yours], metrics, neighbours)
        for mine, yours in tqdm(zip(*draws), "resampling", bootstrap, leave=False, disable=not progress)
    ]
    deviations = {metric: float(np.std([values[metric] for values in found], ddof=1)) for metric in found[0]}
    if "kid" in metrics:
        deviations["kid"] = float(resampled_kid(generated, reference, *draws).std(ddof=1))
    return deviations


def resampled_kid(
    generated: np.ndarray, reference: np.ndarray, generated_draws: np.ndarray, reference_draws: np.ndarray
) -> np.ndarray:
    """KID of resamples, over all their samples at once instead of subsets.

    A resample only changes how often each sample counts, so that the kernel is computed once for all of them.

    Args:
        generated_draws: which samples are in which resample, (resamples, N).
        reference_draws: likewise, (resamples, M).

    Returns:
        (resamples,).
    """
    sets, counts = (generated, reference), []
    for features, draws in zip(sets, (generated_draws, reference_draws)):
        counts.append(np.stack([np.bincount(draw, minlength=len(features)) for draw in draws]).astype(float))
    within = 0.0
    for features, times in zip(sets, counts):
        itself = times @ ((features**2).mean(1) + 1) ** 3  # pairs of a sample and itself
        within += (_kernel_sums(features, features, times, times) - itself) / (len(features) * (len(features) - 1))
    across = _kernel_sums(*sets, *counts) / (len(generated) * len(reference))
    return within - 2 * across


def _kernel_sums(one: np.ndarray, other: np.ndarray, one_times: np.ndarray, other_times: np.ndarray) -> np.ndarray:
    """The kernel summed over all pairs, each as often as its two samples count, (resamples,)."""
    sums = np.zeros(len(one_times))
    for start in range(0, len(one), ROWS):
        part = slice(start, start + ROWS)
        sums += ((one_times[:, part] @ polynomial_kernel(one[part], other)) * other_times).sum(1)  # (x . y / D + 1)^3
    return sums


def clip_score(image_features: np.ndarray, text_features: np.ndarray, bootstrap: int = 0, seed: int = 0) -> Estimate:
    """How well images show what their captions say: 100 max(0, cosine), averaged.

    Args:
        image_features: (N, D).
        text_features: of each image's caption, (N, D), from the same network.
        bootstrap: resamples of the pairs for the interval, or 0 for none.

    Raises:
        ValueError: for features that are not as above, not finite, or none; and one resample.
    """
    _check_bootstrap(bootstrap)
    images, texts = _checked_features(image_features, text_features)
    if len(images) != len(texts) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images and {len(texts)} captions: clip_score needs one caption for each image"
        )
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    scores = 100 * np.maximum(0, (images * texts).sum(1) / np.maximum(lengths, np.finfo(float).tiny))
    if not bootstrap:
        return Estimate(float(scores.mean()))
    draws = np.random.default_rng(seed).integers(len(scores), size=(bootstrap, len(scores)))
    return _estimate("clip_score", float(scores.mean()), float(scores[draws].mean(1).std(ddof=1)))


# Whether there are enough samples ------------------------------------------------------------------------------------


def warnings_for(metric: str, generated: int, reference: int, dim: int) -> list[str]:
    """What to know of a metric where there are few samples: one sentence for each set that is too small.

    Args:
        metric: of METRICS.
        generated: how many samples, N.
        reference: how many, M; has no part in ``clip_score``.
        dim: the features' dimension, D.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: it must be one of {', '.join(METRICS)}")
    enough = _enough(metric, dim)
    sets: Mapping[str, tuple[int, str]] = {
        "generated": (generated, f"--num_images {enough} would do"),
        "reference": (reference, f"{enough} of them would do"),
    }
    return [
        f"{metric}: {count} {name} images are few{_consequence(metric, count, dim)}; {remedy}"
        for name, (count, remedy) in sets.items()
        if count < enough and (metric != "clip_score" or name == "generated")
    ]


def _enough(metric: str, dim: int) -> int:
    if metric == "fid":
        return SAMPLES_PER_FEATURE * dim
    if metric == "kid":
        return KID_SUBSET
    return ENOUGH_FOR_NEIGHBOURS if metric in NEIGHBOUR_METRICS else ENOUGH_FOR_MEANS


def _consequence(metric: str, count: int, dim: int) -> str:
    if metric == "fid":
        rank = (
            f"their covariance has rank {count - 1} at most"
            if count <= dim
            else f"their covariance is known with an error of the order of sqrt({dim}/{count})"
        )
        return f" for {dim} features: {rank}, and the distance comes out too large"
    if metric == "kid":
        return f": its subsets are smaller than the usual {KID_SUBSET}, and it is less certain, though without bias"
    if metric in NEIGHBOUR_METRICS:
        return ": neighbours are far apart, and the value compares only with those of as many images"
    return ": their mean is uncertain"
