"""Options of the loss and the objectives: names, defaults, ranges. Imports neither torch nor diffusers.

The command line is checked against them before any library is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any


NORMALIZATIONS = ("shared", "separate", "none")
DEPTH_WEIGHTINGS = ("inverse", "exponential", "uniform")
DISTANCES = ("l2", "l1")
VARIANTS = ("paper", "reference")
OBJECTIVE_NAMES = ("epsilon", "v_prediction", "sample", "flow_matching")
WEIGHTING_SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
BIAS_STRATEGIES = ("earlier", "later", "range", "none")
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"

LARGEST_KERNEL = 63  # a quarter of the side that kernels are given for
LARGEST_STRIDE = 8  # beyond it, a mid block's map of 16 x 16 positions has no 2% quantile
MASK_DEFAULTS: Mapping[str, float] = {"quantile": 0.02, "margin": 2.0, "dilation": 3, "erosion": 5, "stride": 1}
MASK_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # the check, and its description
    "quantile": (lambda value: 0 < value < 0.5, "more than 0 and less than 0.5"),
    "margin": (lambda value: 0 <= value < math.inf, "0 or more"),
    "dilation": (lambda value: 1 <= value <= LARGEST_KERNEL, f"from 1 to {LARGEST_KERNEL}"),
    "erosion": (lambda value: 1 <= value <= LARGEST_KERNEL, f"from 1 to {LARGEST_KERNEL}"),
    "stride": (lambda value: value in range(1, LARGEST_STRIDE + 1), f"a whole number from 1 to {LARGEST_STRIDE}"),
}


def check_options(
    normalization: str,
    detach_statistics: bool,
    depth_weighting: str | Sequence[float],
    mask_outliers: bool,
    distance: str,
    variant: str,
    blocks: Sequence[str] | None,
) -> None:
    """Refuse loss options that are unknown or mutually exclusive; needs no model.

    Args:
        blocks: the selected blocks; None = not known yet.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    for flag, value, accepted in (
        ("--lpl_normalization", normalization, NORMALIZATIONS),
        ("--lpl_distance", distance, DISTANCES),
        ("--lpl_variant", variant, VARIANTS),
    ):
        if value not in accepted:
            raise ValueError(f"{flag} {value}: accepted are {', '.join(accepted)}")
    if isinstance(depth_weighting, str):
        if depth_weighting not in DEPTH_WEIGHTINGS:
            raise ValueError(
                f"--lpl_depth_weighting {depth_weighting}: accepted are {', '.join(DEPTH_WEIGHTINGS)}, "
                "or one number per block"
            )
    elif (
        len(depth_weighting) != len(blocks or depth_weighting)
        or not all(0 <= weight < math.inf for weight in depth_weighting)
        or not any(depth_weighting)
    ):
        raise ValueError(
            f"--lpl_depth_weighting {' '.join(f'{weight:g}' for weight in depth_weighting)}: "
            f"{len(blocks or depth_weighting)} finite numbers of 0 or more are needed, not all 0, one per selected "
            "block in the order of --lpl_blocks"
        )
    if normalization == "none" and detach_statistics:
        raise ValueError("--lpl_detach_statistics has no effect with --lpl_normalization none; leave one out")
    if variant == "reference":
        if others := [name for name in blocks or () if not re.fullmatch(r"mid|up_\d+", name)]:
            raise ValueError(
                f"--lpl_variant reference compares whole decoder blocks; leave {' '.join(others)} out of --lpl_blocks"
            )
        given = {
            "normalization": normalization != "shared",
            "detach_statistics": detach_statistics,
            "depth_weighting": depth_weighting != "inverse",
            "mask_outliers": not mask_outliers,
            "distance": distance != "l2",
        }
        if any(given.values()):
            raise ValueError(
                f"--lpl_variant reference excludes {', '.join(name for name in given if given[name])}: it fixes "
                "all options of the loss; leave them out, or use --lpl_variant paper"
            )


def check_mask_and_chunks(
    outliers: Mapping[str, float], mask_outliers: bool, variant: str, chunk_size: int | None
) -> None:
    """Refuse mask parameters that are unknown, out of range or without effect, and an invalid chunk size.

    Raises:
        ValueError: with what was given and what is accepted.
    """
    if unknown := [name for name in outliers if name not in MASK_DEFAULTS]:
        raise ValueError(f"outliers: {', '.join(unknown)} is not among {', '.join(MASK_DEFAULTS)}")
    for name, value in outliers.items():
        accepted, words = MASK_RANGES[name]
        if not accepted(value):
            raise ValueError(f"outliers: {name} {value}: it must be {words}")
    if outliers and (not mask_outliers or variant == "reference"):
        raise ValueError("outliers has no effect without mask_outliers, or with the variant reference; leave it out")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size}: it must be 1 or more, or None for as many as the memory allows")


def parse_weight(text: str) -> tuple[float | None, float | None]:
    """``"auto:0.2"`` -> (None, 0.2), a share of the total loss; ``"3.0"`` -> (3.0, None), a weight.

    Raises:
        ValueError: for any other text, a share outside (0, 1), or a weight that is negative or not finite.

    >>> parse_weight("auto:0.2"), parse_weight("0")
    ((None, 0.2), (0.0, None))
    """
    kind, _, number = text.rpartition(":")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if kind == "auto" and 0 < value < 1:
        return None, value
    if not kind and 0 <= value < float("inf"):
        return value, None
    raise ValueError(
        f"--lpl_weight {text}: accepted are auto:SHARE with a share between 0 and 1, such as auto:0.2, "
        "a weight of 0 or more, and 0 for no latent perceptual loss"
    )
