"""TODO: what is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from lpl.inspection.figures import percent
from lpl.inspection.measure import ERRORS, MARGINS, METHODS, SCALES, STRIDE, Inspector


NEGLIGIBLE = 0.01  # relative change of a block's term that is not worth a mask; our choice


# What follows from it ------------------------------------------------------------------------------------------------


def summary(inspector: Inspector) -> dict[str, Any]:
    """All numbers, over the images, for ``inspect.json``."""
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
        "balance": balance_summary(inspector.names, terms, inspector.depth_weights, inspector.args.lpl_blocks),
        "interpolation": interpolation_summary([found["interpolation"] for found in inspector.found]),
    }


def relative(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """values / reference - 1; where nothing differs at all, both are 0 and nothing has changed."""
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
    """Which settings of the masks these features ask for, by three rules, the first that holds.

    1. If masks leave every block's term the same but for NEGLIGIBLE (1%), they are not worth their time.
    2. A block should not lose more than the 2 * ``quantile`` that lie outside the quantiles, or the masks take
       ordinary features too: take the smallest larger margin of MARGINS that keeps the rest, or leave out the block.
    3. Else the settings are right.

    Outliers that cover more of a map than ``quantile`` at one end are seen neither by the masks nor by these rules.

    Returns:
        "flags" to give, maybe none, and "why".
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
    """The blocks' terms, (errors, blocks), and the depth weights that make them alike."""
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
    """Depth weights, the first block's 1, that give all blocks the same geometric mean over the errors.

    The geometric mean counts every error alike, while the arithmetic one would be that of the largest. A block whose
    term is 0 gets 0.

    >>> balancing_weights(np.array([[1.0, 2.0, 0.0], [4.0, 32.0, 0.0]]))
    [1.0, 0.25, 0.0]
    """
    alive = (terms > 0).all(0)
    means = np.exp(np.log(np.where(alive, terms, 1.0)).mean(0))
    first = means[alive][0] if alive.any() else 1.0
    return [float(f"{first / mean:.3g}") if good else 0.0 for mean, good in zip(means, alive)]


def interpolation_summary(found: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, Any]:
    """Mean errors by method and scale, and which share of all pairs of one image's degraded latents the error in the
    latent puts in the order of the error in pixels, and of LPL."""
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
    """Share of all pairs that both put in the same order.

    >>> round(ordered_alike([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]), 3)
    0.667
    """
    pairs = list(combinations(zip(values, others), 2))
    return sum((a - b) * (c - d) > 0 for (a, c), (b, d) in pairs) / len(pairs)


COLUMNS = ("block", "maps", "masked", "Gaussian", "any masked", "peak", "kept", "stride", "change")


def report(numbers: Mapping[str, Any]) -> str:
    """What is worth reading at once."""
    outliers, balance = numbers["outliers"], numbers["balance"]
    advice, alike = outliers["advice"], numbers["interpolation"]["ordered_as_latent"]
    rows = [COLUMNS]
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in rows]
    by_default = " ".join(f"{weight:g}" for weight in balance["depth_weights"]["inverse"].values())
    return "\n".join(
        [
            "masked, and of Gaussian maps as smooth; maps with any masked; largest value of all and of the kept, in",
            f"deviations; decided otherwise at stride {STRIDE}; what masks change of the block's term",
            *table,
            f"masks: {advice['flags'] or 'nothing to change'}; {advice['why']}",
            f"balanced terms: {balance['flags']}; the default is {by_default}",
            "interpolated latents: of all pairs, the error in the latent has the order of that in pixels for "
            f"{alike['pixel_mse']:.0%}, of LPL for {alike['lpl']:.0%}",
        ]
    )
