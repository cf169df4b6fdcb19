"""The pictures of :mod:`lpl.inspect`: each function draws one of them and returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lpl.outliers import outlier_mask
from lpl.tools.pictures import INK, label_axes


if TYPE_CHECKING:
    from lpl.inspect import Inspector
COLOURS = ("#3465a4", "#c4601d", "#4a8a3c", "#75507b", "#b03060", "#2a8a8a", "#8a6d1d", "#555753")


def features_figure(inspector: Inspector, images: Sequence[Image.Image], names: Sequence[str]) -> Any:
    """Feature maps by block, as they are and under their masks, of the image that loses most to them (Fig. 3).

    A line per block: the two channels with most masked positions (or, where none is, the largest peaks), and the
    typical one, whose peak is the median.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state

    lost = [sum(block["masked"].mean().item() for block in found["outliers"].values()) for found in inspector.found]
    index = int(np.argmax(lost))
    features = inspector.features(inspector.latents[index].to(inspector.args.device))
    figure = Figure(figsize=(11, 0.55 + 1.95 * len(features)), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.02)
    grid = figure.add_gridspec(len(features), 7, width_ratios=[1.25, *[1] * 6])
    for row, (name, maps) in enumerate(features.items()):
        found = inspector.found[index]["outliers"][name]
        channels, height, width = inspector.shapes[name]
        axes = _picture(figure.add_subplot(grid[row, 0]), images[index])
        axes.set_title(names[index] if row == 0 else "", fontsize=9, color=INK)
        axes.set_xlabel(f"{channels} maps, {height} x {width}", fontsize=9, color=INK)
        axes.set_ylabel(name.replace(".", ".\n"), fontsize=12 if len(name) < 9 else 8, fontweight="bold", color=INK)
        keep = outlier_mask(maps, **inspector.settings)
        order = sorted(range(channels), key=lambda c: (-found["masked"][c].item(), -found["peak"][c].item()))
        rest = order[2:] or order
        typical = sorted(rest, key=lambda c: found["peak"][c].item())[len(rest) // 2]
        first = "most masked" if found["masked"].any() else "largest peak"
        for place, (channel, heading) in enumerate(zip([*order[:2], typical], (first, "next", "typical"))):
            values, kept = maps[0, channel].float().cpu().numpy(), keep[0, channel].cpu().numpy()
            _feature_map(
                figure.add_subplot(grid[row, 1 + 2 * place]), values, np.ones_like(kept), f"{heading}: c = {channel}"
            )
            _feature_map(
                figure.add_subplot(grid[row, 2 + 2 * place]),
                values,
                kept,
                f"{percent(1 - kept.mean())} masked",
                f"peak {found['peak'][channel]:.1f} std",
            )
    figure.suptitle("Feature maps as they are, and where the masks keep them (red: left out)", fontsize=11)
    return figure


def _picture(axes: Any, image: Any) -> Any:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _feature_map(axes: Any, values: np.ndarray, kept: np.ndarray, title: str, below: str = "") -> None:
    """(H, W), its greys spread over what is kept; red over the rest."""
    low, high = (values[kept].min(), values[kept].max()) if kept.any() else (0, 1)
    axes.imshow(values, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    red = np.zeros((*kept.shape, 4))
    red[~kept] = (0.9, 0.1, 0.1, 1)
    axes.imshow(red, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=INK, pad=3)
    axes.set_xlabel(below, fontsize=8, color=INK, labelpad=2)


def outliers_figure(inspector: Inspector, numbers: Mapping[str, Any]) -> Any:
    """How much of each channel is masked, how extreme it is, what other settings would mask, and where."""
    from matplotlib.figure import Figure

    blocks, names = numbers["blocks"], list(numbers["blocks"])
    figure = Figure(figsize=(11, 10), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2, 1])
    (share, peak), (margin, cost) = top.subplots(2, 2)
    _channels(share, [[100 * value for value in block["masked_by_channel"]] for block in blocks.values()], names)
    mean = [100 * block["masked"] for block in blocks.values()]
    gaussian = [100 * block["masked_of_gaussian_maps"] for block in blocks.values()]
    share.plot(range(len(names)), mean, "_", color=INK, markersize=26, markeredgewidth=2, label="mean")
    share.plot(range(len(names)), gaussian, "x", color="#e02020", markersize=8, label="Gaussian maps as smooth")
    _small_shares(share)
    label_axes(share, "Masked, by channel", "", "% of positions")
    _channels(peak, [block["peak_by_channel"] for block in blocks.values()], names)
    peak.plot(
        range(len(names)),
        [block["peak_kept"] for block in blocks.values()],
        "_",
        color=INK,
        markersize=26,
        markeredgewidth=2,
        label="largest that is kept",
    )
    peak.set_yscale("log")
    plain_numbers(peak)
    label_axes(peak, "Largest value, by channel", "", "std of what is kept")
    for name, colour in zip(names, COLOURS * 2):
        by_margin = blocks[name]["masked_by_margin"]
        margin.plot([100 * share for share in by_margin.values()], "o-", color=colour, label=name)
    margin.set_xticks(range(len(by_margin)), [f"{float(value):g}" for value in by_margin])
    _small_shares(margin)
    label_axes(margin, "Masked, by margin", "margin, in std beyond the quantiles", "% of positions")
    places = np.arange(len(names))
    cost.bar(places - 0.2, [100 * abs(b["masks_change"]) for b in blocks.values()], 0.4, color=COLOURS[0],
             label="masks: a block's term")  # fmt: skip
    cost.bar(places + 0.2, [100 * b["stride_differs"] for b in blocks.values()], 0.4, color=COLOURS[1],
             label=f"stride {numbers['stride']}: positions decided otherwise")  # fmt: skip
    cost.set_xticks(places, names)
    cost.axhline(100 * numbers["negligible"], color=INK, linewidth=0.8, linestyle=":", label="taken as negligible")
    highest = max(bar.get_height() for bar in cost.patches)
    cost.set_ylim(0, 1.4 * max(highest, 100 * numbers["negligible"]))  # room for the legend
    label_axes(cost, "What other settings change", "", "%")
    for axes in (share, peak, margin, cost):
        axes.legend(fontsize=8, frameon=False, markerscale=0.6)
    lines = bottom.subplots(1, len(names), squeeze=False)[0]
    for name, axes in zip(names, lines):
        maps = torch.stack([found["outliers"][name]["where"] for found in inspector.found]).mean(0)
        largest = 100 * maps.max().item() or 1.0
        shown = axes.imshow(100 * maps.cpu().numpy(), cmap="magma", vmin=0, vmax=largest, interpolation="nearest")
        bar = bottom.colorbar(shown, ax=axes, location="bottom", shrink=0.9, aspect=15)
        bar.ax.locator_params(nbins=4)
        bar.ax.tick_params(labelsize=8)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9, color=INK)
    bottom.suptitle(
        "Where: % of channels masked, mean of the images", fontsize=11, fontweight="bold", x=0.01, ha="left"
    )
    return figure


def _small_shares(axes: Any) -> None:
    """Percentages on a scale with room for 0: linear up to 0.01, logarithmic beyond."""
    top = 2 * max(0.01, axes.get_ylim()[1])
    axes.set_yscale("symlog", linthresh=0.01)
    ticks = [0, 0.01, 0.1, 1, 10, 100]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-0.003, top)


def _channels(axes: Any, values: Sequence[Sequence[float]], names: Sequence[str]) -> None:
    """A dot per channel, side by side, over the block's name."""
    for place, (row, colour) in enumerate(zip(values, COLOURS * 2)):
        across = place + 0.7 * (np.arange(len(row)) / max(1, len(row) - 1) - 0.5)
        axes.plot(across, row, ".", color=colour, markersize=5, alpha=0.6)
    axes.set_xticks(range(len(names)), names)


def balance_figure(numbers: Mapping[str, Any]) -> Any:
    """Each block's term over the error of the estimate, one panel per kind of depth weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    errors = numbers["relative_errors"]
    order = ("uniform", "inverse", "exponential", "balanced")
    for kind, axes in zip(order, panels):
        weights = numbers["depth_weights"][kind]
        for (name, terms), colour in zip(numbers["terms"].items(), COLOURS * 2):
            label = f"{weights[name]:.3g}  {name}"
            axes.plot(errors, [weights[name] * term for term in terms], "o-", color=colour, label=label, markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(errors, [f"{error:g}" for error in errors])
        axes.minorticks_off()
        label_axes(axes, f"{kind.capitalize()} depth weights", "", "term of LPL")
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel("error of the estimated latent, in its standard deviations", fontsize=9)
    return figure


def interpolation_figure(inspector: Inspector, image: Image.Image, name: str, numbers: Mapping[str, Any]) -> Any:
    """Decoded latents of the first image by method and scale, and the errors of all images (Fig. 12)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 11.6), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    grid = top.add_gridspec(
        len(numbers["methods"]), 1 + len(numbers["scales"]), width_ratios=[1.55, *[1] * len(numbers["scales"])]
    )
    for rows, picture, title in (
        (slice(0, 2), image, name),
        (slice(2, 4), inspector.decoded[None], "its latent, decoded"),
    ):
        axes = _picture(top.add_subplot(grid[rows, 0]), picture)
        axes.set_title(title, fontsize=10, color=INK)
    for row, (label, points) in enumerate(inspector.found[0]["interpolation"].items()):
        for column, (scale, point) in enumerate(zip(numbers["scales"], points)):
            axes = _picture(top.add_subplot(grid[row, 1 + column]), inspector.decoded[label, scale])
            axes.set_title(f"s = {scale:g}" if row == 0 else "", fontsize=10, color=INK)
            axes.set_xlabel(
                f"latent {point['latent_mse']:.2g}   LPL {point['lpl']:.2g}\n"
                f"pixels {_levels(point['pixel_mse']):.1f}/255",
                fontsize=9,
                color=INK,
            )
            if column == 0:
                axes.set_ylabel(label, fontsize=10, color=INK)
    _error_curves(bottom.subplots(1, 2, sharex=True), inspector, numbers)
    return figure


def _error_curves(panels: Sequence[Any], inspector: Inspector, numbers: Mapping[str, Any]) -> None:
    """Error in the image, and LPL, over the error in the latent: dots for images, lines for their mean."""
    for axes, kind, title, unit in (
        (panels[0], "pixel_mse", "Pixels", "error in pixels, RMS, levels of 255"),
        (panels[1], "lpl", "LPL", "LPL, default depth weights"),
    ):
        shown = _levels if kind == "pixel_mse" else float
        for (label, means), colour in zip(numbers["methods"].items(), COLOURS):
            points = [point for found in inspector.found for point in found["interpolation"][label]]
            across, up = ([point[name] for point in points] for name in ("latent_mse", kind))
            axes.plot(across, [*map(shown, up)], ".", color=colour, alpha=0.3, markersize=5)
            axes.plot(means["latent_mse"], [*map(shown, means[kind])], "o-", color=colour, label=label)
        alike = numbers["ordered_as_latent"][kind]
        label_axes(
            axes, f"{title}: {alike:.0%} of pairs in the latent error's order", "error in the latent, MSE", unit
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes)
    panels[0].legend(fontsize=8, frameon=False)


def plain_numbers(axes: Any) -> None:
    """1, 2, 5 and tenfold of them on logarithmic axes, written out; over many decades tenfold of 1 only."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axes.get_xlim() if axis is axes.xaxis else axes.get_ylim()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _levels(mse: float) -> float:
    """Root mean square of pixels in [-1, 1], in levels of 255."""
    return 127.5 * math.sqrt(mse)


def percent(share: float) -> str:
    """In words, with three digits.

    >>> percent(0.0), percent(0.00012), percent(0.0123), percent(0.5)
    ('0%', '0.012%', '1.23%', '50%')
    """
    return f"{100 * share:.3g}%" if share >= 1e-5 or share == 0 else "<0.001%"
