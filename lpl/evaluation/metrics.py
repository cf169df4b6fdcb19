"""Metrics of features: Fréchet and kernel distances, precision, recall, density, coverage, CLIPScore.

*Features* are one row per image, (N, D), of a network (:mod:`lpl.evaluation.networks`); a number compares only with
numbers of the same network and the same preprocessing of the images. Libraries compute:

- ``fid``: the Fréchet distance of two Gaussians with the features' means and covariances (Heusel et al., 2017), by
  torchmetrics in float64. It is 0 or more, and biased upwards: the fewer samples, the larger.
- ``kid``: the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al., 2018), by
  torchmetrics. It is unbiased, and may be negative. It takes the two sets to be independent; an image that is drawn
  from a real image's caption is not, so that where such *counterparts* are known, their pairs are left out.
- ``precision``, ``recall`` (Kynkäänniemi et al., 2019), ``density``, ``coverage`` (Naeem et al., 2020), from distances
  that scikit-learn computes in chunks. The ball of a sample reaches to its k-th nearest neighbour. Precision is the
  share of generated samples in the ball of a real sample, recall the share of real samples in the ball of a generated
  one; density is the mean number of real balls around a generated sample, divided by k; coverage is the share of real
  balls that contain a generated sample.
- ``clip_score``: 100 max(0, cosine) of the CLIP features of an image and its caption, averaged (Hessel et al., 2021,
  with 100 instead of their 2.5).

A *spread* is the standard deviation of a number when both sets are resampled with replacement, at their own sizes: how
much it depends on the choice of images. It is not a confidence interval of the limit for many images: at N of about
10 D a Fréchet distance exceeds that limit by far more than its spread. The two halves of the reference show the
numbers of equal distributions (:func:`halves`). For two models that drew from the same seeds, the difference is
resampled in *pairs*; its spread is smaller than that of either model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lpl.config.choices import CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.evaluation import NEAREST_K


if TYPE_CHECKING:
    from torchmetrics import Metric


SMALLER_IS_BETTER = ("fid", "kid")
KID_SUBSET = 1000  # samples of each set at a time
KID_SUBSETS = 100
SAMPLES_PER_FEATURE = 10  # our choice for a Fréchet distance
ENOUGH_FOR_NEIGHBOURS = 1000  # our choice
ENOUGH_FOR_MEANS = 100  # our choice
ROWS = 1024  # of the kernel's matrix at a time
WORKING_MEMORY = 256  # MiB of distances at a time


@dataclass(frozen=True)
class Estimate:
    """A metric's value, and its values on resamples of the images."""

    value: float
    resampled: tuple[float, ...] = ()

    @property
    def spread(self) -> float | None:
        """Standard deviation over the resamples; None without resamples."""
        return float(np.std(self.resampled, ddof=1)) if self.resampled else None

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, resample by resample; both must have the same resamples."""
        resampled = (mine - theirs for mine, theirs in zip(self.resampled, other.resampled, strict=True))
        return Estimate(self.value - other.value, tuple(resampled))


def compare(
    generated: np.ndarray,
    reference: np.ndarray,
    metrics: Sequence[str] = SET_METRICS,
    bootstrap: int = 0,
    seed: int = 0,
    nearest_k: int = NEAREST_K,
    progress: bool = False,
    counterparts: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """The metrics of two sets of features.

    Args:
        generated: (N, D).
        reference: (M, D).
        metrics: of SET_METRICS.
        bootstrap: resamples for the spread; 0: none. Sets of the same N and M get the same resamples.
        seed: of the resamples, and of KID's subsets if a set has more than 1000 samples or the sets differ in size.
        nearest_k: k of :data:`NEIGHBOUR_METRICS`. Resamples keep the balls of the full set: a sample drawn twice would
            be its own neighbour.
        progress: show a progress bar over the resamples.
        counterparts: the row of the reference whose caption each generated sample was drawn from, (N,); -1: none.
            KID leaves these pairs out.

    Returns:
        metric -> estimate, in the order of ``metrics``.

    Raises:
        ValueError: for unknown metrics, for features of another shape, not finite or too few, and for one resample.
    """
    _check_metrics(metrics)
    check_bootstrap(bootstrap)
    generated, reference = _checked_features(generated, reference)
    check_counts(metrics, len(generated), len(reference), nearest_k)
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(features), size=(bootstrap, len(features))) for features in (generated, reference)]
    times = [_times(drawn) for drawn in draws]
    found: dict[str, Estimate] = {}
    if "fid" in metrics:
        pairs = tqdm(zip(*draws), "resampling", bootstrap, leave=False, disable=not (progress and bootstrap))
        resampled = tuple(frechet_distance(generated[mine], reference[yours]) for mine, yours in pairs)
        found["fid"] = Estimate(frechet_distance(generated, reference), resampled)
    if "kid" in metrics:
        resampled = resampled_kid(generated, reference, *times, counterparts=counterparts) if bootstrap else ()
        found["kid"] = Estimate(kid(generated, reference, seed, counterparts), tuple(map(float, resampled)))
    if any(metric in NEIGHBOUR_METRICS for metric in metrics):
        once = [np.vstack([np.ones(one.shape[1]), one]) for one in times]
        for metric, values in neighbour_metrics(generated, reference, nearest_k, *once).items():
            found[metric] = Estimate(float(values[0]), tuple(values[1:].tolist()))
    return {metric: found[metric] for metric in metrics}


def halves(
    reference: np.ndarray, metrics: Sequence[str], nearest_k: int = NEAREST_K, seed: int = 0
) -> dict[str, Estimate]:
    """The metrics of one random half of the real images against the other: the numbers of equal distributions, at half
    as many images. Empty if a half is too small."""
    middle = len(reference) // 2
    if middle < fewest(metrics, nearest_k):
        return {}
    order = np.random.default_rng(seed).permutation(len(reference))
    return compare(reference[order[:middle]], reference[order[middle:]], metrics, seed=seed, nearest_k=nearest_k)


def _check_metrics(metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in SET_METRICS]:
        why = " (clip_score compares images with captions: clip_score())" if CLIP_SCORE in unknown else ""
        raise ValueError(f"metrics {', '.join(unknown)}: accepted are {', '.join(SET_METRICS)}{why}")


def check_bootstrap(bootstrap: int) -> None:
    """Refuse a number of resamples that gives no spread."""
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"--bootstrap {bootstrap}: it must be 2 or more, such as 100, or 0 for no resamples")


def _checked_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Both in float64, contiguous."""
    shapes = [np.shape(features) for features in sets]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features of shapes {shapes[0]} and {shapes[1]}: both must be (samples, D) with the same D")
    if not all(np.isfinite(features).all() for features in sets):
        raise ValueError("some features are not finite: the network fails on these images")
    return [np.ascontiguousarray(features, dtype=np.float64) for features in sets]


def fewest(metrics: Sequence[str], nearest_k: int) -> int:
    """The smallest number of images that the metrics need on each side."""
    return nearest_k + 2 if any(metric in NEIGHBOUR_METRICS for metric in metrics) else 2


def check_counts(metrics: Sequence[str], generated: int, reference: int, nearest_k: int, flags: str = "--") -> None:
    """Refuse sets that are too small.

    Args:
        metrics: of METRICS; ``clip_score`` is ignored, since it compares no sets.
        flags: prefix of the program's flags, for messages.

    Raises:
        ValueError: with the number that is needed, and the flags to change.
    """
    if nearest_k < 1:
        raise ValueError(f"--nearest_k {nearest_k}: it must be 1 or more")
    metrics = [metric for metric in metrics if metric in SET_METRICS]
    if metrics and min(generated, reference) < (least := fewest(metrics, nearest_k)):
        raise ValueError(
            f"{generated} generated and {reference} reference images: {', '.join(metrics)} need at least "
            f"{least} of each; give more images ({flags}num_images) or fewer {flags}metrics"
        )


def frechet_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of the means m, n and covariances S, T (divided by N - 1) of the features.

    Rounding can make it slightly negative for equal sets; it is clamped to 0.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(generated.shape[1]), sync_on_compute=False)
    return max(0.0, float(_torchmetrics(metric, generated, reference)))


def kid(generated: np.ndarray, reference: np.ndarray, seed: int = 0, counterparts: np.ndarray | None = None) -> float:
    """The mean over subsets of min(1000, N, M) samples; a single subset if it holds all samples of both sets. With
    counterparts, which torchmetrics does not know, over all samples."""
    from torchmetrics.image.kid import KernelInceptionDistance

    if counterparts is not None:
        once = (np.ones((1, len(features))) for features in (generated, reference))
        return float(resampled_kid(generated, reference, *once, counterparts=counterparts)[0])
    size = min(KID_SUBSET, len(generated), len(reference))
    subsets = 1 if len(generated) == len(reference) == size else KID_SUBSETS
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, which may be training
        metric = KernelInceptionDistance(
            feature=_Given(generated.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        mean, _ = _torchmetrics(metric, generated, reference)
    return float(mean)


def _torchmetrics(metric: Metric, generated: np.ndarray, reference: np.ndarray) -> Any:
    """The metric in this process alone (sync_on_compute=False): every process has all features."""
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return metric.compute()


class _Given(nn.Identity):
    """Replaces the metric's network: its inputs are features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim


def neighbour_metrics(
    generated: np.ndarray,
    reference: np.ndarray,
    nearest_k: int,
    generated_times: np.ndarray,
    reference_times: np.ndarray,
) -> dict[str, np.ndarray]:
    """Precision, recall, density and coverage of several resamples; distances are computed once for all of them.

    Args:
        generated_times: how often each generated sample is in each resample, (R, N); a row of ones is the set itself.
        reference_times: the same for the reference, (R, M).

    Returns:
        metric -> (R,).
    """
    from sklearn.metrics import pairwise_distances_chunked

    (resamples, n), m = generated_times.shape, len(reference)
    reach, generated_reach = _reaches(reference, nearest_k), _reaches(generated, nearest_k)
    balls = np.zeros((resamples, n))  # real balls around each generated sample
    covered, recalled = np.zeros(resamples), np.zeros(resamples)
    start = 0
    for distances in pairwise_distances_chunked(reference, generated, working_memory=WORKING_MEMORY):
        part = slice(start, start := start + len(distances))
        times = reference_times[:, part]
        in_real = (distances < reach[part, None]).astype(float)  # (rows, N)
        in_generated = (distances < generated_reach).astype(float)
        balls += times @ in_real
        covered += (times * (generated_times @ in_real.T > 0)).sum(1)
        recalled += (times * (generated_times @ in_generated.T > 0)).sum(1)
    return {
        "precision": (generated_times * (balls > 0)).sum(1) / n,
        "recall": recalled / m,
        "density": (generated_times * balls).sum(1) / (nearest_k * n),
        "coverage": covered / m,
    }


def _reaches(features: np.ndarray, nearest_k: int) -> np.ndarray:
    """Each sample's distance to its k-th nearest neighbour in its own set, (N,); the 0th is the sample itself."""
    from sklearn.metrics import pairwise_distances_chunked

    parts = pairwise_distances_chunked(
        features,
        reduce_func=lambda distances, _: np.partition(distances, nearest_k, axis=1)[:, nearest_k],
        working_memory=WORKING_MEMORY,
    )
    return np.concatenate(list(parts))


def _times(draws: np.ndarray) -> np.ndarray:
    """How often each of N samples is in each resample, (R, N)."""
    samples = draws.shape[1]
    return np.array([np.bincount(draw, minlength=samples) for draw in draws], dtype=float).reshape(-1, samples)


def resampled_kid(
    generated: np.ndarray,
    reference: np.ndarray,
    generated_times: np.ndarray,
    reference_times: np.ndarray,
    counterparts: np.ndarray | None = None,
) -> np.ndarray:
    """KID of resamples, (R,), over all their samples instead of subsets; arguments as in :func:`neighbour_metrics` and
    :func:`compare`.

    A resample only changes how often each sample counts, so that the kernel is computed once for all of them.
    """
    within = 0.0
    for features, times in ((generated, generated_times), (reference, reference_times)):
        itself = times @ ((features**2).mean(1) + 1) ** 3  # pairs of a sample with itself
        within += (_kernel_sums(features, features, times, times) - itself) / (len(features) * (len(features) - 1))
    across = _kernel_sums(generated, reference, generated_times, reference_times)
    pairs = np.full(len(across), float(len(generated) * len(reference)))
    if counterparts is not None:
        drawn = np.flatnonzero(counterparts >= 0)
        of = counterparts[drawn]
        times = generated_times[:, drawn] * reference_times[:, of]
        across -= times @ ((generated[drawn] * reference[of]).mean(1) + 1) ** 3
        pairs -= times.sum(1)
    return within - 2 * across / pairs


def _kernel_sums(one: np.ndarray, other: np.ndarray, one_times: np.ndarray, other_times: np.ndarray) -> np.ndarray:
    """The kernel summed over all pairs, weighted by how often their samples count, (R,)."""
    from sklearn.metrics.pairwise import polynomial_kernel

    sums = np.zeros(len(one_times))
    for start in range(0, len(one), ROWS):
        part = slice(start, start + ROWS)
        sums += ((one_times[:, part] @ polynomial_kernel(one[part], other)) * other_times).sum(1)  # (x . y / D + 1)^3
    return sums


def clip_score(image_features: np.ndarray, text_features: np.ndarray, bootstrap: int = 0, seed: int = 0) -> Estimate:
    """CLIPScore, how well images match their captions: 100 max(0, cosine), averaged.

    Args:
        image_features: (N, D).
        text_features: of each image's caption, (N, D), from the same network.
        bootstrap: resamples of the pairs for the spread; 0: none.

    Raises:
        ValueError: for features of another shape, not finite or none, and for one resample.
    """
    check_bootstrap(bootstrap)
    images, texts = _checked_features(image_features, text_features)
    if len(images) != len(texts) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images and {len(texts)} captions: clip_score needs one caption for each image"
        )
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    scores = 100 * np.maximum(0, (images * texts).sum(1) / np.maximum(lengths, np.finfo(float).tiny))
    draws = np.random.default_rng(seed).integers(len(scores), size=(bootstrap, len(scores)))
    return Estimate(float(scores.mean()), tuple(scores[draws].mean(1).tolist()))


# Enough samples ------------------------------------------------------------------------------------------------------


def warnings_for(metric: str, generated: int, reference: int, dim: int) -> list[str]:
    """Warnings of a metric on few samples: one sentence for each set that is too small.

    Args:
        metric: of METRICS.
        generated: number of generated samples, N.
        reference: number of reference samples, M; ignored for ``clip_score``.
        dim: the features' dimension, D.

    Raises:
        ValueError: for an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: it must be one of {', '.join(METRICS)}")
    enough = _enough(metric, dim)
    sets = {"generated": generated} if metric == CLIP_SCORE else {"generated": generated, "reference": reference}
    return [
        f"{metric}: {count} {name} images are few{_consequence(metric, count, dim)}; {enough} would do"
        for name, count in sets.items()
        if count < enough
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
            f"their covariance has at most rank {count - 1}"
            if count <= dim
            else f"their covariance has an error of the order of sqrt({dim}/{count})"
        )
        return f" for {dim} features: {rank}, and the distance is too large"
    if metric == "kid":
        return f": KID is usually that of {KID_SUBSET}; it is less certain, but unbiased"
    if metric in NEIGHBOUR_METRICS:
        return ": neighbours are far apart, and the value compares only with values of as many images"
    return ": their mean is uncertain"
