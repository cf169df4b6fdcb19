from itertools import product

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group

from lpl.config.choices import METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.evaluation import NEAREST_K, Estimate, clip_score, compare, warnings_for
from lpl.evaluation.metrics import check_counts, fewest, frechet_distance, halves, kid


def gaussian(samples, dim, seed, mean=0.0, scale=1.0):
    return mean + scale * np.random.default_rng(seed).normal(size=(samples, dim))


def with_moments(samples, mean, covariance, seed=0):
    """Samples that have just this mean and this covariance (over N - 1)."""
    values = gaussian(samples, len(mean), seed)
    values -= values.mean(0)
    whitened = values @ np.linalg.inv(np.linalg.cholesky(np.cov(values.T))).T
    return mean + whitened @ np.linalg.cholesky(covariance).T


def random_covariance(dim, seed):
    factor = gaussian(2 * dim, dim, seed)
    return factor.T @ factor / dim


def values(estimates):
    return {metric: estimate.value for metric, estimate in estimates.items()}


def value(metric, generated, reference, **settings):
    return compare(generated, reference, [metric], **settings)[metric].value


@pytest.fixture(scope="module")
def sets():
    """Generated and reference features, of different counts."""
    return gaussian(90, 6, seed=1, mean=0.3, scale=0.9), gaussian(120, 6, seed=2)


# Fréchet distance


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_frechet_distance_of_spherical_gaussians(scale):
    """|m|^2 + D (1 - s)^2 for N(0, I) and N(m, s^2 I)."""
    mean = np.array([1.0, -2.0, 0.5, 0.0])
    expected = (mean**2).sum() + 4 * (1 - scale) ** 2
    one = with_moments(50, np.zeros(4), np.eye(4))
    other = with_moments(70, mean, scale**2 * np.eye(4), seed=1)
    assert value("fid", one, other) == pytest.approx(expected, rel=1e-9)
    sampled = value("fid", gaussian(20000, 4, 0), gaussian(20000, 4, 1, mean, scale))
    assert sampled == pytest.approx(expected, rel=0.03)


def test_frechet_distance_by_scipys_matrix_root():
    mean, other_mean = gaussian(2, 8, seed=0)
    covariance, other_covariance = random_covariance(8, 1), random_covariance(8, 2)
    root = sqrtm(covariance @ other_covariance).real
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other_covariance - 2 * root)
    one = with_moments(40, mean, covariance)
    other = with_moments(60, other_mean, other_covariance, seed=1)
    assert value("fid", one, other) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_features():
    one, other = gaussian(10, 30, 0), gaussian(12, 30, 1)
    singular = np.linalg.svd(_centred(one) @ _centred(other).T, compute_uv=False)  # tr (S T)^(1/2)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + (_centred(one) ** 2).sum() + (_centred(other) ** 2).sum()
    assert value("fid", one, other) == pytest.approx(expected - 2 * singular.sum(), rel=1e-6)


def _centred(features):
    return (features - features.mean(0)) / np.sqrt(len(features) - 1)


def test_frechet_distance_is_computed_in_float64():
    """In float32, sums of squares this far from 0 would lose the variance."""
    one, other = gaussian(100, 4, 0), gaussian(100, 4, 1)
    far = [(features + 1e4).astype(np.float32) for features in (one, other)]
    assert value("fid", *far) == pytest.approx(value("fid", one, other), rel=1e-2)


# Kernel distance


def plain_kid(generated, reference):
    """The definition, pair by pair."""

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(features):
        pairs = [(i, j) for i, j in product(range(len(features)), repeat=2) if i != j]
        return np.mean([kernel(features[i], features[j]) for i, j in pairs])

    return within(generated) + within(reference) - 2 * np.mean([kernel(x, y) for x in generated for y in reference])


def test_kid_is_its_definition():
    one, other = gaussian(15, 4, 0), gaussian(15, 4, 1, 0.5)
    assert value("kid", one, other) == pytest.approx(plain_kid(one, other), rel=1e-9)


def test_kid_of_unequal_sets_is_averaged_over_subsets():
    one, other = gaussian(30, 4, 0), gaussian(12, 4, 1, 1.0)
    full = plain_kid(one, other)
    found = value("kid", one, other)
    assert found == pytest.approx(full, rel=0.1) and found != pytest.approx(full, rel=1e-9)
    assert value("kid", one, other, seed=0) == found != value("kid", one, other, seed=1)


def test_kid_leaves_counterparts_out():
    """Images drawn from the captions of real ones: of equal distributions, with correlated pairs."""
    found, biased = [], []
    for seed in range(20):
        reference = gaussian(30, 16, seed)
        noise = gaussian(30, 16, seed + 100)
        generated = np.random.default_rng(seed).permutation((reference + 0.3 * noise) / np.sqrt(1 + 0.3**2))
        places = np.random.default_rng(seed).permutation(30)
        found.append(value("kid", generated, reference, counterparts=places))
        biased.append(value("kid", generated, reference))
    assert max(biased) < -0.2 and abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(20) < 0.01


def test_counterparts_are_left_out_of_resamples_as_often_as_they_are_in_them():
    one, other, places = gaussian(12, 4, 0), gaussian(9, 4, 1), np.array([3, 3, 0, -1, -1, 8, 7, 6, 5, 4, 2, 1])
    found = compare(one, other, ["kid"], bootstrap=2, counterparts=places)["kid"].resampled[0]
    rng = np.random.default_rng(0)
    mine, yours = (rng.integers(count, size=(2, count))[0] for count in (12, 9))

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    across = np.mean([kernel(one[i], other[j]) for i in mine for j in yours if places[i] != j])
    whole = compare(one, other, ["kid"], bootstrap=2)["kid"].resampled[0]
    plain = np.mean([kernel(one[i], other[j]) for i in mine for j in yours])
    assert found == pytest.approx(whole + 2 * plain - 2 * across)


def test_kid_takes_subsets_of_1000(monkeypatch):
    monkeypatch.setattr("lpl.evaluation.metrics.KID_SUBSET", 20)
    one, other = gaussian(60, 4, 0), gaussian(60, 4, 1, 1.0)
    found = kid(one, other)
    assert found == pytest.approx(plain_kid(one, other), rel=0.1) and found != pytest.approx(plain_kid(one, other))


def test_kid_leaves_the_random_state_alone(monkeypatch):
    """Also that of GPUs, where a model may be in training."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    seeded = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    kid(gaussian(30, 4, 0), gaussian(20, 4, 1))
    assert torch.rand(1) == expected and not seeded


def test_kid_has_no_bias():
    """Of one distribution with itself it is 0 on average, and so often negative, however few samples."""
    found = [value("kid", gaussian(20, 4, seed), gaussian(20, 4, 1000 + seed)) for seed in range(150)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(150)
    assert np.mean(np.array(found) < 0) > 0.3


# Neighbours


def radii(features, nearest_k):
    return np.sort(cdist(features, features), 1)[:, nearest_k]  # the 0th is the sample itself


def plain_neighbour_metrics(distance, generated_radii, reference_radii, nearest_k):
    """The definitions, from all distances (N, M) and the balls' sizes (N,) and (M,)."""
    in_real = distance < reference_radii
    return {
        "precision": in_real.any(1).mean(),
        "recall": (distance < generated_radii[:, None]).any(0).mean(),
        "density": in_real.sum() / (nearest_k * len(distance)),
        "coverage": in_real.any(0).mean(),
    }


@pytest.mark.parametrize("nearest_k", [1, 3, 5])
def test_neighbour_metrics_by_brute_force(sets, nearest_k):
    expected = plain_neighbour_metrics(cdist(*sets), *(radii(features, nearest_k) for features in sets), nearest_k)
    assert values(compare(*sets, NEIGHBOUR_METRICS, nearest_k=nearest_k)) == pytest.approx(expected)
    assert len(set(expected.values())) == 4


@pytest.mark.parametrize("nearest_k", [1, 5])
def test_neighbour_metrics_are_those_of_the_authors_library(sets, nearest_k):
    prdc = pytest.importorskip("prdc")
    generated, reference = sets
    expected = prdc.compute_prdc(real_features=reference, fake_features=generated, nearest_k=nearest_k)
    assert values(compare(generated, reference, NEIGHBOUR_METRICS, nearest_k=nearest_k)) == pytest.approx(expected)


def test_the_5th_neighbour_is_the_default(sets):
    assert NEAREST_K == 5
    assert compare(*sets, NEIGHBOUR_METRICS) == compare(*sets, NEIGHBOUR_METRICS, nearest_k=5)
    assert compare(*sets, NEIGHBOUR_METRICS) != compare(*sets, NEIGHBOUR_METRICS, nearest_k=4)


def test_distances_a_part_at_a_time_give_the_same(sets, monkeypatch):
    from sklearn.metrics import pairwise_distances_chunked

    parts = []

    def counted(*args, **settings):
        for part in pairwise_distances_chunked(*args, **settings):
            parts.append(len(part))
            yield part

    monkeypatch.setattr("sklearn.metrics.pairwise_distances_chunked", counted)
    whole = compare(*sets, NEIGHBOUR_METRICS, bootstrap=5)
    assert parts == [120, 90, 120]
    monkeypatch.setattr("lpl.evaluation.metrics.WORKING_MEMORY", 0.01)  # MiB, of 13 rows or fewer
    found = compare(*sets, NEIGHBOUR_METRICS, bootstrap=5)
    assert max(parts[3:]) < 20 and sum(parts[3:]) == 330
    for metric, estimate in found.items():
        np.testing.assert_allclose(
            [estimate.value, *estimate.resampled], [whole[metric].value, *whole[metric].resampled], rtol=1e-12
        )


def test_precision_and_recall_tell_missing_modes_from_wrong_ones():
    """Half of the modes: precise, but recalling half. Real ones and as many wrong ones: the other way round."""
    mode, other = gaussian(200, 4, 0), gaussian(200, 4, 1, mean=50.0)
    both = np.concatenate([gaussian(100, 4, 2), gaussian(100, 4, 3, mean=50.0)])
    found = compare(mode, both, NEIGHBOUR_METRICS)
    assert found["precision"].value > 0.9 and found["recall"].value == pytest.approx(0.5, abs=0.05)
    assert found["coverage"].value == pytest.approx(0.5, abs=0.05)
    found = compare(np.concatenate([mode, other]), gaussian(200, 4, 2), NEIGHBOUR_METRICS)
    assert found["precision"].value == pytest.approx(0.5, abs=0.05) and found["recall"].value > 0.9


def test_nothing_is_printed(sets, capsys, recwarn):
    compare(*sets, bootstrap=2)
    halves(sets[0], SET_METRICS)
    assert capsys.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "buffer" in str(warning.message)]


# All of them


def test_all_metrics_come_in_the_order_asked_for(sets):
    found = compare(*sets)
    assert tuple(found) == SET_METRICS == METRICS[:-1]
    assert all(isinstance(estimate, Estimate) for estimate in found.values())
    assert all(estimate.resampled == () and estimate.spread is None for estimate in found.values())
    assert list(compare(*sets, ["recall", "fid"])) == ["recall", "fid"]
    assert compare(*sets, ["recall", "fid"])["fid"] == found["fid"]


def test_the_order_of_samples_and_rotations_do_not_matter(sets):
    equal = sets[0], sets[1][:90]  # of equal counts: KID draws no subsets
    expected = {metric: pytest.approx(estimate.value, rel=1e-6) for metric, estimate in compare(*equal).items()}
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(features) for features in equal]
    rotated = [features @ ortho_group.rvs(6, random_state=0) for features in equal]
    for changed in (shuffled, rotated):
        assert values(compare(*changed)) == expected


def test_shifting_both_sets_matters_only_to_the_kernel(sets):
    moved = compare(*(features + 2 for features in sets))
    for metric, estimate in compare(*sets).items():
        assert (moved[metric].value == pytest.approx(estimate.value, rel=1e-6)) == (metric != "kid"), metric


def test_a_set_compared_with_itself():
    features = gaussian(50, 5, 0)
    found = values(compare(features, features))
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["fid"] >= 0
    assert [found[metric] for metric in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert found["kid"] < 0  # its pairs of a sample with itself count only across


def test_symmetries(sets):
    one, other = sets[0], sets[1][:90]
    there, back = compare(one, other), compare(other, one)
    for metric in ("fid", "kid"):
        assert there[metric].value == pytest.approx(back[metric].value)
    assert there["precision"].value == back["recall"].value != there["recall"].value


# Spreads


def pair(seed):
    return gaussian(150, 3, seed, mean=0.5), gaussian(150, 3, seed + 1000)


def test_a_spread_is_the_deviation_of_the_resamples():
    assert Estimate(5.0, (1.0, 2.0, 6.0)).spread == pytest.approx(np.sqrt(7))
    assert Estimate(5.0).spread is None


def test_spreads_are_those_of_fresh_samples():
    """A bootstrap deviation should be near to what fresh sets of the same kind give."""
    fresh = [values(compare(*pair(seed))) for seed in range(60)]
    for metric, estimate in compare(*pair(500), bootstrap=60).items():
        true = np.std([found[metric] for found in fresh], ddof=1)
        assert estimate.spread == pytest.approx(true, rel=0.6), metric


def test_resamples_are_the_same_again(sets):
    first = compare(*sets, bootstrap=10)
    assert compare(*sets, bootstrap=10) == first
    other = compare(*sets, bootstrap=10, seed=1)
    for metric, estimate in first.items():
        assert len(set(estimate.resampled)) > 5 and other[metric].resampled != estimate.resampled
        assert compare(*sets, [metric], bootstrap=10) == {metric: estimate}  # whatever else is asked for
    assert values(compare(*sets)) == values(first)


def drawn(bootstrap, *counts, seed=0):
    """The resamples that :func:`compare` draws of sets with these counts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(count, size=(bootstrap, count)) for count in counts]


def test_frechet_distances_of_resamples_are_those_of_the_resampled_features(sets):
    expected = [frechet_distance(sets[0][mine], sets[1][yours]) for mine, yours in zip(*drawn(4, 90, 120))]
    assert compare(*sets, ["fid"], bootstrap=4)["fid"].resampled == pytest.approx(expected)


def test_kid_of_resamples_is_kid_of_the_resampled_features(monkeypatch):
    """Over all samples at once, also where the sets differ in size."""
    monkeypatch.setattr("lpl.evaluation.metrics.ROWS", 7)
    one, other = gaussian(20, 4, 0), gaussian(16, 4, 1, 0.5)
    expected = [plain_kid(one[mine], other[yours]) for mine, yours in zip(*drawn(4, 20, 16))]
    assert compare(one, other, ["kid"], bootstrap=4)["kid"].resampled == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("nearest_k", [1, 4])
def test_balls_keep_their_size_in_resamples(sets, nearest_k):
    """A sample that is drawn twice has itself as its neighbour; a ball of size 0 would hold nothing."""
    found = compare(*sets, NEIGHBOUR_METRICS, bootstrap=6, nearest_k=nearest_k)
    distance, sizes = cdist(*sets), [radii(features, nearest_k) for features in sets]
    expected = [
        plain_neighbour_metrics(distance[np.ix_(mine, yours)], sizes[0][mine], sizes[1][yours], nearest_k)
        for mine, yours in zip(*drawn(6, 90, 120))
    ]
    for metric, estimate in found.items():
        assert estimate.resampled == pytest.approx([resample[metric] for resample in expected]), metric


# Differences


def test_a_difference_is_taken_resample_by_resample():
    difference = Estimate(5.0, (1.0, 4.0)) - Estimate(3.0, (2.0, 2.5))
    assert difference == Estimate(2.0, (-1.0, 1.5))
    assert (Estimate(5.0) - Estimate(3.0)) == Estimate(2.0) and (Estimate(5.0) - Estimate(3.0)).spread is None
    with pytest.raises(ValueError):
        Estimate(5.0, (1.0, 4.0)) - Estimate(3.0)


def test_sets_of_the_same_counts_are_resampled_in_pairs():
    """Of a set with itself all differences are 0, also through another network, whose rows are rotated here."""
    one, reference = pair(0)
    rotation = ortho_group.rvs(3, random_state=0)
    found = compare(one, reference, bootstrap=5)
    again = compare(one @ rotation, reference @ rotation, bootstrap=5)
    shuffled = compare(one[::-1], reference, bootstrap=5)
    for metric in ("fid", *NEIGHBOUR_METRICS):
        assert (found[metric] - again[metric]).resampled == pytest.approx([0] * 5, abs=1e-9)
        assert (found[metric] - shuffled[metric]).value == pytest.approx(0, abs=1e-9)  # a set has no order
        assert (found[metric] - shuffled[metric]).spread > 0.01 * found[
            metric
        ].spread  # but a pair is not one any more


def test_the_spread_of_a_difference_is_that_of_fresh_pairs():
    """Two models that draw alike from the same seeds differ by far less than either number moves."""

    def differing(seed):
        one, reference = pair(seed)
        return one, one + gaussian(150, 3, seed + 2000, mean=0.05, scale=0.05), reference

    def differences(one, other, reference, bootstrap=0):
        found, others = (compare(mine, reference, ["fid", "kid"], bootstrap) for mine in (other, one))
        return {metric: (found[metric] - others[metric], others[metric]) for metric in found}

    fresh = [differences(*differing(seed)) for seed in range(40)]
    for metric, (difference, own) in differences(*differing(500), bootstrap=60).items():
        true = np.std([found[metric][0].value for found in fresh], ddof=1)
        assert difference.spread == pytest.approx(true, rel=0.6), metric
        assert difference.spread < 0.5 * own.spread, metric


# What no difference looks like


def test_halves_are_compared_like_two_sets(sets):
    """Each image is in one of them, drawn by the seed."""
    found = halves(sets[1], SET_METRICS)
    order = np.random.default_rng(0).permutation(120)
    assert found == compare(sets[1][order[:60]], sets[1][order[60:]])
    assert halves(sets[1], SET_METRICS) == found != halves(sets[1], SET_METRICS, seed=1)
    assert list(halves(sets[1], ["recall", "fid"])) == ["recall", "fid"]
    assert halves(sets[1], ["recall"], nearest_k=1) != halves(sets[1], ["recall"])
    assert halves(sets[1], []) == {}


def test_halves_are_as_far_from_each_other_as_fresh_samples():
    """A set may be in any order, such as one kind after the other: halves are drawn at random."""
    sorted_set = np.sort(gaussian(400, 1, 0), 0) + gaussian(400, 4, 1, scale=0.1)

    def sample(seed):
        return gaussian(200, 1, seed) + gaussian(200, 4, seed + 1, scale=0.1)

    fresh = [frechet_distance(sample(seed), sample(seed + 2)) for seed in range(10, 410, 10)]
    found = halves(sorted_set, ["fid"])["fid"].value
    assert 0 < found < 1.5 * max(fresh) < 0.1 * frechet_distance(sorted_set[:200], sorted_set[200:])


@pytest.mark.parametrize(
    "metrics, nearest_k, count", [(["fid"], 5, 4), (["kid", "recall"], 5, 14), (["density"], 2, 8)]
)
def test_halves_that_are_too_small_give_nothing(metrics, nearest_k, count):
    assert fewest(metrics, nearest_k) == count // 2
    assert halves(gaussian(count - 1, 3, 0), metrics, nearest_k) == {}
    assert list(halves(gaussian(count, 3, 0), metrics, nearest_k)) == metrics
    assert list(halves(gaussian(count + 1, 3, 0), metrics, nearest_k)) == metrics  # one half has one more


# CLIPScore


def test_clip_score_is_100_times_the_positive_cosine():
    images = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 0.0]])
    texts = np.array([[5.0, 0.0], [1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert clip_score(images, texts).value == pytest.approx(100 * (1 + np.sqrt(0.5) + 0 + 0) / 4)
    assert clip_score(images, texts).spread is None


def test_clip_scores_spread_is_that_of_a_mean():
    images, texts = gaussian(400, 3, 0), gaussian(400, 3, 1)
    found = clip_score(images, texts, bootstrap=300)
    cosines = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    error = 100 * np.maximum(0, cosines).std() / 20
    assert found.spread == pytest.approx(error, rel=0.15) and len(found.resampled) == 300
    assert clip_score(images, texts, bootstrap=300) == found != clip_score(images, texts, bootstrap=300, seed=1)


def test_clip_scores_of_the_same_captions_are_resampled_in_pairs():
    images, texts = gaussian(50, 3, 0), gaussian(50, 3, 1)
    found = clip_score(images, texts, bootstrap=5)
    assert (found - clip_score(3 * images, texts, bootstrap=5)).resampled == pytest.approx([0] * 5, abs=1e-9)


# What is refused, and warned of


@pytest.mark.parametrize(
    "shapes, settings, message",
    [
        (((9, 3), (9, 3)), {"metrics": ["fid", "is"]}, "metrics is: .*fid, kid"),
        (((9, 3), (9, 3)), {"metrics": ["clip_score"]}, "captions"),
        (((9, 3), (9, 4)), {}, "same D"),
        (((9,), (9, 3)), {}, "same D"),
        (((6, 3), (9, 3)), {}, "need at least 7 of each.*--num_images"),
        (((9, 3), (1, 3)), {"metrics": ["fid"]}, "need at least 2 of each"),
        (((9, 3), (9, 3)), {"nearest_k": 0}, "--nearest_k 0: it must be 1 or more"),
        (((9, 3), (9, 3)), {"nearest_k": 8}, "need at least 10 of each"),
        (((9, 3), (9, 3)), {"bootstrap": 1}, "--bootstrap 1"),
        (((9, 3), (9, 3)), {"bootstrap": -5}, "--bootstrap -5"),
    ],
)
def test_what_cannot_be_compared_is_refused(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        compare(*(np.ones(shape) for shape in shapes), **settings)


def test_features_that_are_not_finite_are_refused():
    broken = gaussian(20, 3, 0)
    broken[4, 1] = np.nan
    for pair in ((broken, gaussian(20, 3, 1)), (gaussian(20, 3, 1), broken)):
        with pytest.raises(ValueError, match="not finite"):
            compare(*pair)


def test_counts_are_refused_by_the_flags_of_the_program():
    with pytest.raises(
        ValueError, match=r"^6 generated and 9 .* recall need at least 7 .*\(--num_images\) .* --metrics$"
    ):
        check_counts(["fid", "recall", "clip_score"], 6, 9, 5)
    with pytest.raises(ValueError, match=r"\(--eval_num_images\) or fewer --eval_metrics$"):
        check_counts(["kid"], 1, 9, 5, "--eval_")
    check_counts(["fid", "recall"], 7, 7, 5)
    check_counts(["fid", "kid"], 2, 2, 5)
    check_counts(["clip_score"], 1, 1, 5)  # which compares no sets


@pytest.mark.parametrize("bootstrap", [-1, 1])
def test_clip_score_refuses_resamples_without_a_spread(bootstrap):
    with pytest.raises(ValueError, match=f"--bootstrap {bootstrap}: it must be 2 or more"):
        clip_score(np.ones((3, 2)), np.ones((3, 2)), bootstrap)


@pytest.mark.parametrize("counts, message", [((3, 4), "3 images and 4 captions"), ((0, 0), "0 images")])
def test_clip_score_needs_pairs(counts, message):
    with pytest.raises(ValueError, match=message):
        clip_score(*(np.ones((count, 2)) for count in counts))


def test_the_smallest_sets_that_pass():
    assert set(compare(gaussian(7, 3, 0), gaussian(8, 3, 1))) == set(SET_METRICS)
    assert value("fid", gaussian(2, 3, 0), gaussian(2, 3, 1)) > 0


def test_warnings_name_what_would_do():
    assert warnings_for("fid", 640, 640, dim=64) == []
    (few,) = warnings_for("fid", 64, 640, dim=64)
    assert "rank 63" in few and "64 generated" in few and few.endswith("640 would do")
    (some,) = warnings_for("fid", 640, 639, dim=64)
    assert "rank" not in some and "639 reference" in some and some.endswith("640 would do")
    assert len(warnings_for("fid", 10, 10, dim=64)) == 2
    assert warnings_for("kid", 1000, 1000, dim=64) == [] and len(warnings_for("kid", 999, 1000, dim=64)) == 1
    for metric in NEIGHBOUR_METRICS:
        assert warnings_for(metric, 1000, 1000, dim=9999) == [] and len(warnings_for(metric, 1000, 10, dim=2)) == 1
    assert warnings_for("clip_score", 100, 0, dim=64) == [] and len(warnings_for("clip_score", 99, 0, dim=64)) == 1
    with pytest.raises(ValueError, match="must be one of fid"):
        warnings_for("ssim", 1, 1, 1)


def test_the_warned_bias_is_there():
    """Sets of one distribution: their Fréchet distance is 0, and what few samples give is far above."""
    few = np.mean([frechet_distance(gaussian(40, 16, seed), gaussian(40, 16, seed + 50)) for seed in range(10)])
    many = np.mean([frechet_distance(gaussian(640, 16, seed), gaussian(640, 16, seed + 50)) for seed in range(10)])
    assert few > 5 * many > 0
