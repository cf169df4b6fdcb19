"""How far generated images are from real ones, as numbers that follow from features.

*Features* are one row per image, (N, D), of a network (:mod:`lpl.evaluation.networks`); a number belongs to its
network and to the images' preprocessing, and compares with no other. Libraries compute, here is what they are told:

- ``fid``: the Fréchet distance of the two Gaussians that have the features' means and covariances (Heusel et al.,
  2017), by torchmetrics in float64. It is 0 or more; the fewer samples, the further above its limit.
- ``kid``: the squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (Binkowski et al., 2018), by
  torchmetrics. It has no bias, so that it may fall below 0.
- ``precision``, ``recall`` (Kynkäänniemi et al., 2019), ``density``, ``coverage`` (Naeem et al., 2020), from distances
  that scikit-learn computes a part at a time. Each sample has a ball around it that reaches to its k-th nearest
  neighbour. Precision is the share of generated samples in some real sample's ball, recall of real ones in some
  generated sample's; density counts the real balls that a generated sample is in, divided by k; coverage is the share
  of real balls that hold a generated sample.
- ``clip_score``: 100 max(0, cosine) of the CLIP features of an image and its caption, averaged (Hessel et al., 2021,
  with 100 in the place of their 2.5).

A *spread* is the standard deviation of a number under resampling of both sets, with replacement, at the number of
images that there are: how far it moves with the choice of the images. It is no interval around the limit for many
images, of whose distance it knows nothing: a Fréchet distance is above it by far more than its spread where N is about
10 D. What no difference looks like, the two halves of the reference show (:func:`halves`). Two models that drew from
the same seeds have a difference whose spread is that of resamples in *pairs*, and smaller than that of either.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from lpl.config.choices import CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.evaluation import NEAREST_K


SMALLER_IS_BETTER = ("fid", "kid")
KID_SUBSET = 1000  # samples of each set at a time
KID_SUBSETS = 100
SAMPLES_PER_FEATURE = 10  # our measure of enough for a Fréchet distance
ENOUGH_FOR_NEIGHBOURS = 1000  # our measure
ENOUGH_FOR_MEANS = 100  # our measure
ROWS = 4096  # of the kernel's matrix at a time
WORKING_MEMORY = 256  # MiB of distances at a time


@dataclass(frozen=True)
class Estimate:
    """A number, and the same number of resamples of the images, if any."""

    value: float
    resampled: tuple[float, ...] = ()

    @property
    def spread(self) -> float | None:
        """Standard deviation over the resamples; None where there are none."""
        return float(np.std(self.resampled, ddof=1)) if self.resampled else None

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, resample by resample: of sets that were resampled alike."""
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
) -> dict[str, Estimate]:
    """The metrics of two sets of features.

    Args:
        generated: (N, D).
        reference: (M, D).
        metrics: of SET_METRICS.
        bootstrap: resamples for the spread, or 0 for none. Sets of the same N and M are resampled alike.
        seed: of the resamples, and of KID's subsets where a set has more than 1000 samples or the sets differ in size.
        nearest_k: k of :data:`NEIGHBOUR_METRICS`. In resamples the balls keep their size, of which a sample that is
            drawn twice would make nothing.
        progress: show a bar over the resamples.

    Returns:
        metric -> estimate, in the order of ``metrics``.

    Raises:
        ValueError: for unknown metrics, features that are not as above, not finite or too few, and one resample.
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
        resampled = tuple(resampled_kid(generated, reference, *times).tolist()) if bootstrap else ()
        found["kid"] = Estimate(kid(generated, reference, seed), resampled)
    if any(metric in NEIGHBOUR_METRICS for metric in metrics):
        once = [np.vstack([np.ones(one.shape[1]), one]) for one in times]
        for metric, values in neighbour_metrics(generated, reference, nearest_k, *once).items():
            found[metric] = Estimate(float(values[0]), tuple(values[1:].tolist()))
    return {metric: found[metric] for metric in metrics}


def halves(
    reference: np.ndarray, metrics: Sequence[str], nearest_k: int = NEAREST_K, seed: int = 0
) -> dict[str, Estimate]:
    """The metrics of one random half of real images against the other: what no difference looks like, at half as many
    images. Nothing where a half is too small."""
    middle = len(reference) // 2
    if middle < fewest(metrics, nearest_k):
        return {}
    order = np.random.default_rng(seed).permutation(len(reference))
    return compare(reference[order[:middle]], reference[order[middle:]], metrics, seed=seed, nearest_k=nearest_k)


def _check_metrics(metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in SET_METRICS]:
        why = " (clip_score compares images with captions: clip_score())" if CLIP_SCORE in unknown else ""
        raise ValueError(f"metrics {', '.join(unknown)}: of two sets there are {', '.join(SET_METRICS)}{why}")


def check_bootstrap(bootstrap: int) -> None:
    """Refuse a number of resamples that gives no spread."""
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"--bootstrap {bootstrap}: it must be 2 or more, such as 100, or 0 for no resamples")


def _checked_features(*sets: np.ndarray) -> list[np.ndarray]:
    """Both in float64, laid out as torch takes them."""
    shapes = [np.shape(features) for features in sets]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features of shapes {shapes[0]} and {shapes[1]}: both must be (samples, D) with the same D")
    if not all(np.isfinite(features).all() for features in sets):
        raise ValueError("some features are not finite: the network fails on these images")
    return [np.ascontiguousarray(features, dtype=np.float64) for features in sets]


def fewest(metrics: Sequence[str], nearest_k: int) -> int:
    """How many images of each side the metrics need at least."""
    return nearest_k + 2 if any(metric in NEIGHBOUR_METRICS for metric in metrics) else 2


def check_counts(metrics: Sequence[str], generated: int, reference: int, nearest_k: int, flags: str = "--") -> None:
    """Refuse sets that are too small.

    Args:
        metrics: of METRICS; ``clip_score`` compares no sets, and has no part in it.
        flags: how the names of this program's flags begin.

    Raises:
        ValueError: with how many it takes, and the flags to change.
    """
    if nearest_k < 1:
        raise ValueError(f"--nearest_k {nearest_k}: it must be 1 or more")
    metrics = [metric for metric in metrics if metric in SET_METRICS]
    if metrics and min(generated, reference) < (least := fewest(metrics, nearest_k)):
        raise ValueError(
            f"{generated} generated and {reference} reference images: {', '.join(metrics)} need {least} of each at "
            f"least; give more images ({flags}num_images) or fewer {flags}metrics"
        )


def frechet_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of the means m, n and covariances S, T (divided by N - 1) of the features.

    Rounding leaves it a little below 0 where the sets are alike; that is given as 0.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_given(generated.shape[1]), sync_on_compute=False)
    return max(0.0, float(_torchmetrics(metric, generated, reference)))


def kid(generated: np.ndarray, reference: np.ndarray, seed: int = 0) -> float:
    """The mean over subsets of min(1000, N, M) samples; just one where it is all there is."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET, len(generated), len(reference))
    subsets = 1 if len(generated) == len(reference) == size else KID_SUBSETS
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, which may be training
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


def neighbour_metrics(
    generated: np.ndarray,
    reference: np.ndarray,
    nearest_k: int,
    generated_times: np.ndarray,
    reference_times: np.ndarray,
) -> dict[str, np.ndarray]:
    """Precision, recall, density and coverage of several resamples at once; distances are computed once for all.

    Args:
        generated_times: how often each generated sample is in each resample, (R, N); ones are the set itself.
        reference_times: likewise, (R, M).

    Returns:
        metric -> (R,).
    """
    from sklearn.metrics import pairwise_distances_chunked

    (resamples, n), m = generated_times.shape, len(reference)
    reach, generated_reach = _reaches(reference, nearest_k), _reaches(generated, nearest_k)
    balls = np.zeros((resamples, n))  # real ones that each generated sample is in
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
    """Each sample's distance to its k-th nearest neighbour in its own set, (N,); the sample itself is the 0th."""
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
    generated: np.ndarray, reference: np.ndarray, generated_times: np.ndarray, reference_times: np.ndarray
) -> np.ndarray:
    """KID of resamples, over all their samples at once instead of subsets, (R,); arguments as above.

    A resample only changes how often each sample counts, so that the kernel is computed once for all of them.
    """
    within = 0.0
    for features, times in ((generated, generated_times), (reference, reference_times)):
        itself = times @ ((features**2).mean(1) + 1) ** 3  # pairs of a sample and itself
        within += (_kernel_sums(features, features, times, times) - itself) / (len(features) * (len(features) - 1))
    across = _kernel_sums(generated, reference, generated_times, reference_times) / (len(generated) * len(reference))
    return within - 2 * across


def _kernel_sums(one: np.ndarray, other: np.ndarray, one_times: np.ndarray, other_times: np.ndarray) -> np.ndarray:
    """The kernel summed over all pairs, each as often as its two samples count, (resamples,)."""
    from sklearn.metrics.pairwise import polynomial_kernel

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
        bootstrap: resamples of the pairs for the spread, or 0 for none.

    Raises:
        ValueError: for features that are not as above, not finite, or none; and one resample.
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
