"""What follows from the measurements: their summary for ``inspect.json``, and the flags that they suggest.

*Terms* are the blocks' terms of Eq. 2, (errors, blocks), without depth weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from lpl.inspection.measure import ERRORS, KINDS, MARGINS, METHODS, SCALES, STRIDE, Inspector
from lpl.tools.words import aligned, percent


NEGLIGIBLE = 0.01  # relative change of a block's term that does not justify masks; our choice


def summary(inspector: Inspector) -> dict[str, Any]:
    """All numbers over the images, for ``inspect.json``."""
    blocks = {name: _block_summary(inspector, name) for name in inspector.names}
    terms, unmasked = (
        np.array([found[kind] for found in inspector.found]).mean(0)  # (errors, blocks)
        for kind in ("terms", "unmasked")
    )
    for name, change in zip(inspector.names, relative(terms, unmasked).T):
        blocks[name]["masks_change"] = change[np.abs(change).argmax()].item()
    return {
        "outliers": {
            "settings": inspector.settings,
            "stride": STRIDE,
            "negligible": NEGLIGIBLE,
            "blocks": blocks,
            "advice": outlier_advice(blocks, inspector.settings),
        },
        "balance": balance_summary(inspector.names, terms, inspector.depth_weights, inspector.lpl.lpl_blocks),
        "interpolation": interpolation_summary([found["interpolation"] for found in inspector.found]),
        "errors": errors_summary([found["errors"] for found in inspector.found]),
    }


def relative(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """values / reference - 1; 0 where the reference is 0."""
    return np.divide(values, reference, out=np.ones_like(values), where=reference > 0) - 1


def _block_summary(inspector: Inspector, name: str) -> dict[str, Any]:
    found = [found["outliers"][name] for found in inspector.found]
    masked, peak, peak_kept = (
        torch.stack([image[kind] for image in found]).cpu() for kind in ("masked", "peak", "peak_kept")
    )  # (images, C) each
    margins = sorted({*MARGINS, inspector.settings["margin"]})
    by_margin = torch.stack([image["by_margin"] for image in found]).mean(0)
    mean = {kind: sum(image[kind] for image in found) / len(found) for kind in ("gaussian", "stride_differs")}
    return {
        "shape": inspector.shapes[name],
        "masked": masked.mean().item(),
        "masked_of_gaussian_maps": mean["gaussian"],
        "masked_by_margin": dict(zip(map(str, margins), by_margin.tolist())),
        "stride_differs": mean["stride_differs"],
        "maps_with_outliers": (masked > 0).float().mean().item(),
        "peak": peak.max().item(),
        "peak_kept": peak_kept.max().item(),
        "masked_by_channel": masked.mean(0).tolist(),
        "peak_by_channel": peak.amax(0).tolist(),
    }


def outlier_advice(blocks: Mapping[str, Mapping[str, Any]], settings: Mapping[str, float]) -> dict[str, str]:
    """Suggest settings of the masks for these features: the first of three rules that applies.

    1. If masks change every block's term by less than NEGLIGIBLE (1%), turn them off to save their time.
    2. If a block loses more than 2 * ``quantile``, the share outside the quantiles, its mask excludes ordinary
       features too: use the smallest larger margin of MARGINS that keeps them, or leave out the block.
    3. Otherwise keep the settings.

    Outliers that cover more of a map than ``quantile`` at one end escape both the masks and these rules.

    Returns:
        "flags" to set, possibly empty, and "why".
    """
    quantile, margin = settings["quantile"], settings["margin"]
    change = max((abs(block["masks_change"]), name) for name, block in blocks.items())
    if change[0] < NEGLIGIBLE:
        return {
            "flags": "--lpl_no_outlier_mask",
            "why": f"they change no block's term by more than {percent(change[0])} ({change[1]}), "
            f"less than the {NEGLIGIBLE:.0%} taken as negligible here; this saves their time",
        }
    limit = 2 * quantile
    eaten = [name for name, block in blocks.items() if block["masked"] > limit]
    if eaten:
        larger = sorted(value for value in MARGINS if value > margin)
        enough = [
            value
            for value in larger
            if all(block["masked_by_margin"][str(value)] <= limit for block in blocks.values())
        ]
        rest = [name for name in blocks if name not in eaten]
        flags = f"--lpl_outlier_margin {enough[0]:g}" if enough else f"--lpl_blocks {' '.join(rest)}" if rest else ""
        return {
            "flags": flags,
            "why": f"more than {limit:.0%} of {', '.join(eaten)} is masked, more than the quantiles leave outside"
            + ("" if enough else f", even at a margin of {larger[-1]:g}" if larger else ""),
        }
    most = max((block["masked"], name) for name, block in blocks.items())
    return {
        "flags": "",
        "why": f"the settings mask {percent(most[0])} at most ({most[1]}), and change the term of {change[1]} by "
        f"{percent(change[0])}",
    }


def balance_summary(
    names: Sequence[str],
    terms: np.ndarray,
    depth_weights: Mapping[str, Sequence[float]],
    chosen: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The blocks' terms, (errors, blocks), and the depth weights that equalise them."""
    weights = balancing_weights(terms)
    return {
        "relative_errors": list(ERRORS),
        "terms": {name: column.tolist() for name, column in zip(names, terms.T)},
        "depth_weights": {kind: dict(zip(names, row)) for kind, row in depth_weights.items()}
        | {"balanced": dict(zip(names, weights))},
        "flags": (f"--lpl_blocks {' '.join(names)} " if chosen else "")
        + f"--lpl_depth_weighting {' '.join(f'{weight:g}' for weight in weights)}",
    }


def balancing_weights(terms: np.ndarray) -> list[float]:
    """Depth weights, relative to the first block's, that give all blocks the same geometric mean over the errors.

    The geometric mean weighs all errors equally; the largest would dominate the arithmetic mean. A block whose term
    is 0 gets 0.

    >>> balancing_weights(np.array([[1.0, 2.0, 0.0], [4.0, 32.0, 0.0]]))
    [1.0, 0.25, 0.0]
    """
    alive = np.asarray((terms > 0).all(0))  # (blocks,)
    means = np.exp(np.log(np.where(alive, terms, 1.0)).mean(0))
    first = means[alive][0] if alive.any() else 1.0
    return [float(f"{first / mean:.3g}") if good else 0.0 for mean, good in zip(means, alive)]


def errors_summary(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over the images, by kind of error."""
    return {
        kind: {name: np.mean([image[kind][name] for image in found]).item() for name in found[0][kind]}
        for kind in KINDS
    }


def interpolation_summary(found: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Mean errors by method and scale, and how often two errors agree on the order of two degraded latents.

    ``ordered_as_latent`` is the share of pairs of one image's degraded latents that the error in pixels, or LPL, puts
    in the same order as the error in the latent does.
    """
    kinds = ("latent_mse", "pixel_mse", "lpl")
    methods = {
        label: {
            kind: np.mean([[point[kind] for point in image[label]] for image in found], 0).tolist() for kind in kinds
        }
        for label in METHODS
    }
    points = [{kind: [point[kind] for row in image.values() for point in row] for kind in kinds} for image in found]
    return {
        "scales": list(SCALES),
        "methods": methods,
        "ordered_as_latent": {
            kind: float(np.mean([ordered_alike(image[kind], image["latent_mse"]) for image in points]))
            for kind in ("pixel_mse", "lpl")
        },
    }


def ordered_alike(values: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs that both sequences put in the same order.

    >>> round(ordered_alike([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 3)
    0.667
    """
    pairs = list(combinations(zip(values, others), 2))
    return sum((a - b) * (c - d) > 0 for (a, c), (b, d) in pairs) / len(pairs)


COLUMNS = ("block", "maps", "masked", "Gaussian", "any masked", "peak", "kept", "stride", "change")


def report(numbers: Mapping[str, Any]) -> str:
    """The summary that the command prints."""
    outliers, balance = numbers["outliers"], numbers["balance"]
    advice, alike = outliers["advice"], numbers["interpolation"]["ordered_as_latent"]
    rows: list[Sequence[str]] = [COLUMNS]
    for name, block in outliers["blocks"].items():
        shares = (block[kind] for kind in ("masked", "masked_of_gaussian_maps", "maps_with_outliers"))
        rows.append(
            (
                name,
                "x".join(map(str, block["shape"])),
                *map(percent, shares),
                *(f"{block[kind]:.1f}" for kind in ("peak", "peak_kept")),
                percent(block["stride_differs"]),
                f"{100 * block['masks_change']:+.2f}%",
            )
        )
    by_default = " ".join(f"{weight:g}" for weight in balance["depth_weights"]["inverse"].values())
    return "\n".join(
        [
            "masked: share of positions, and of equally smooth Gaussian maps; share of maps with any masked position;",
            "peak, kept: largest value of all and of kept positions, in standard deviations; stride: positions that",
            f"stride {STRIDE} decides differently; change: of the block's term by the masks",
            *aligned(rows),
            f"masks: {advice['flags'] or 'nothing to change'}; {advice['why']}",
            f"balanced terms: {balance['flags']}; the default is {by_default}",
            "interpolated latents: the error in the latent orders pairs as the error in pixels does for "
            f"{alike['pixel_mse']:.0%}, as LPL does for {alike['lpl']:.0%}",
        ]
    )
