"""Options are refused before any model is loaded, in words that name the flag."""

import subprocess
import sys

import pytest

from lpl.options import (
    DEPTH_WEIGHTINGS,
    DISTANCES,
    LARGEST_KERNEL,
    LARGEST_STRIDE,
    MASK_DEFAULTS,
    MASK_RANGES,
    NORMALIZATIONS,
    VARIANTS,
    check_mask_and_chunks,
    check_options,
    parse_weight,
)


DEFAULTS = {
    "normalization": "shared",
    "detach_statistics": False,
    "depth_weighting": "inverse",
    "mask_outliers": True,
    "distance": "l2",
    "variant": "paper",
    "blocks": None,
}


def test_no_library_is_loaded():
    code = "import sys, lpl.options; print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# The loss


@pytest.mark.parametrize(
    "name, values",
    [
        ("normalization", NORMALIZATIONS),
        ("depth_weighting", (*DEPTH_WEIGHTINGS, (1.0, 0.0, 2.5))),
        ("distance", DISTANCES),
        ("variant", VARIANTS),
    ],
)
def test_accepted_options(name, values):
    for value in values:
        check_options(**DEFAULTS | {name: value})


@pytest.mark.parametrize(
    "options, words",
    [
        ({"normalization": "batch"}, "--lpl_normalization batch: accepted are shared, separate, none"),
        ({"distance": "mse"}, "--lpl_distance mse: accepted are l2, l1"),
        ({"variant": "official"}, "--lpl_variant official: accepted are paper, reference"),
        (
            {"depth_weighting": "linear"},
            "--lpl_depth_weighting linear: accepted are inverse, exponential, uniform, or",
        ),
        ({"depth_weighting": (1.0, 2.0), "blocks": ("mid",)}, "--lpl_depth_weighting 1 2: 1 finite numbers"),
        ({"depth_weighting": (0.0, 0.0)}, "not all 0"),
        ({"depth_weighting": (1.0, -1.0)}, "--lpl_depth_weighting 1 -1"),
        ({"depth_weighting": (1.0, float("inf"))}, "--lpl_depth_weighting 1 inf"),
        ({"normalization": "none", "detach_statistics": True}, "--lpl_detach_statistics has no effect"),
        ({"variant": "reference", "distance": "l1"}, "--lpl_variant reference excludes distance"),
        ({"variant": "reference", "blocks": ("mid", "rgb")}, "leave rgb out of --lpl_blocks"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(ValueError) as error:
        check_options(**DEFAULTS | options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name, accepted, refused",
    [
        ("quantile", (0.01, 0.49), (0.0, 0.5)),
        ("margin", (0.0, 100.0), (-0.1, float("inf"), float("nan"))),
        ("dilation", (1, LARGEST_KERNEL), (0, LARGEST_KERNEL + 1)),
        ("erosion", (1, LARGEST_KERNEL), (0, LARGEST_KERNEL + 1)),
        ("stride", (1, LARGEST_STRIDE), (0, LARGEST_STRIDE + 1)),
    ],
)
def test_ranges_of_masks(name, accepted, refused):
    assert set(MASK_RANGES) == set(MASK_DEFAULTS)
    for value in (MASK_DEFAULTS[name], *accepted):
        check_mask_and_chunks({name: value}, True, "paper", None)
    for value in refused:
        with pytest.raises(ValueError, match=f"outliers: {name} {value}: it must be {MASK_RANGES[name][1]}"):
            check_mask_and_chunks({name: value}, True, "paper", None)


# Its weight


@pytest.mark.parametrize(
    "text, parsed",
    [("auto:0.2", (None, 0.2)), ("3", (3.0, None)), ("0", (0.0, None)), ("1e-2", (0.01, None)), (".5", (0.5, None))],
)
def test_accepted_weights(text, parsed):
    assert parse_weight(text) == parsed


@pytest.mark.parametrize(
    "text", ["auto", "auto:", "auto:0", "auto:1", "auto:-0.2", "auto:nan", "share:0.2", "-1", "inf", "nan", "", "3 4"]
)
def test_refused_weights(text):
    with pytest.raises(ValueError) as error:
        parse_weight(text)
    assert f"--lpl_weight {text}:" in str(error.value) and "auto:0.2" in str(error.value)
