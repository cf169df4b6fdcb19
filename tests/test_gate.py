"""Which samples, parts and steps have LPL: exactly those inside the threshold, and every choice equally likely."""

import math
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch

from lpl.gate import (
    SMALLEST_CROP,
    accepted_crops,
    has_lpl,
    is_inside,
    ramp,
    random_window,
    rows_inside,
    sigma_threshold_at,
    subset,
)


# Samples ------------------------------------------------------------------------------------------------------------


def test_rows_inside_the_threshold():
    sigma = torch.tensor([0.1, math.inf, math.nan, 3.0, 3.1], dtype=torch.float64)
    assert rows_inside(sigma, 3.0).tolist() == [0, 3]


def test_the_gate_is_a_mask_of_the_batch():
    sigma = torch.tensor([0.1, math.inf, math.nan, 3.0, 3.1], dtype=torch.float64)
    assert is_inside(sigma, 3.0).tolist() == [True, False, False, True, False]
    assert rows_inside(sigma[1:3], 3.0).tolist() == []


@pytest.mark.parametrize(
    "height, width, base, expected",
    [(256, 256, 256, 3.0), (512, 512, 256, 6.0), (256, 1024, 256, 6.0), (512, 512, 512, 3.0), (64, 64, 0, 3.0)],
)
def test_the_threshold_scales_with_the_side(height, width, base, expected):
    """Sec. 4.1; of an image that is not square, with the square root of its area."""
    assert sigma_threshold_at(3.0, height, width, base) == expected == sigma_threshold_at(3.0, width, height, base)


def test_every_subset_is_as_likely_as_any_other():
    """Every order of a batch's random numbers once: each pair of the four rows inside wins equally often."""
    rows = torch.tensor([0, 2, 3, 5])
    drawn = Counter(
        tuple(subset(rows, torch.tensor(numbers), 2).tolist())
        for numbers in permutations((0.1, 0.3, 0.4, 0.6, 0.8, 0.9))
    )
    assert set(drawn) == set(combinations(rows.tolist(), 2)) and set(drawn.values()) == {math.factorial(6) // 6}


@pytest.mark.parametrize("size", [4, 9, None])
def test_a_subset_of_all_is_all(size):
    rows = torch.tensor([0, 2, 3, 5])
    assert subset(rows, torch.tensor([0.9, 0.1, 0.3, 0.8, 0.0, 0.2]), size).tolist() == [0, 2, 3, 5]


# Parts of the images


@pytest.mark.parametrize(
    "height, width, factor, sides",
    [(32, 32, 4, [16, 32]), (96, 96, 4, [16, 24, 32, 48, 96]), (64, 96, 8, [32]), (16, 32, 8, []), (8, 8, 4, [])],
)
def test_crops_are_tiles_of_whole_positions(height, width, factor, sides):
    assert accepted_crops(height, width, factor) == sides
    assert all(side % factor == 0 and side >= SMALLEST_CROP * factor for side in sides)


@pytest.mark.parametrize("height, width", [(12, 12), (8, 12), (12, 4)])
def test_tiles_cover_the_latents_and_are_equally_likely(height, width):
    count = height * width // 16
    numbers = [(number + 0.5) / (100 * count) for number in range(100 * count)]
    drawn = Counter(random_window(height, width, 4, torch.tensor(number)) for number in numbers)
    assert set(drawn.values()) == {100}
    covered = torch.zeros(height, width)
    for top, left, *size in drawn:
        assert size == [4, 4]
        covered[top : top + 4, left : left + 4] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("count", range(1, 33))
def test_the_largest_random_number_is_the_last_tile(count):
    assert random_window(count, count, 1, torch.tensor(1 - 2**-24)) == (count - 1, count - 1, 1, 1)


# Steps


@pytest.mark.parametrize(
    "start, steps, factors",
    [
        (0, 0, [1, 1, 1, 1, 1]),
        (3, 0, [0, 0, 0, 1, 1]),
        (0, 4, [0.25, 0.5, 0.75, 1, 1]),
        (1, 2, [0, 0.5, 1, 1, 1]),
    ],
)
def test_ramp(start, steps, factors):
    assert [ramp(step, start, steps) for step in range(5)] == factors


@pytest.mark.parametrize(
    "start, every, steps", [(0, 1, [0, 1, 2, 3, 4, 5, 6]), (2, 1, [2, 3, 4, 5, 6]), (1, 3, [1, 4])]
)
def test_steps_with_lpl(start, every, steps):
    assert [step for step in range(7) if has_lpl(step, start, every)] == steps


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_step_at_n_times_the_weight_sums_up_to_the_same(every):
    """Over n steps, wherever they begin after the start."""
    for first in range(5, 12):
        total = sum(every * has_lpl(step, 5, every) for step in range(first, first + every))
        assert total == every
