"""The pictures of :mod:`lpl.inspect`: each ``*_figure`` function draws one and returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from lpl.inspection.measure import KINDS, Inspector
from lpl.outliers import outlier_mask
from lpl.tools.pictures import COLOURS, INK, label_axes, new_figure
from lpl.tools.words import percent


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


# Feature maps --------------------------------------------------------------------------------------------------------


def features_figure(inspector: Inspector, images: Sequence[Image.Image], names: Sequence[str]) -> Figure:
    """Feature maps by block, with and without their masks, of the image that loses most to them (Fig. 3).

    One row per block: the two channels with most masked positions (or, if none is masked, the largest peaks), and the
    channel whose peak is the median.
    """
    lost = [sum(block["masked"].mean().item() for block in found["outliers"].values()) for found in inspector.found]
    index = int(np.argmax(lost))
    features = inspector.features(inspector.latents[index].to(inspector.vae.device))
    figure = new_figure(11, 0.55 + 1.95 * len(features), w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.02)
    grid = figure.add_gridspec(len(features), 7, width_ratios=[1.25, *[1] * 6])
    for row, (name, maps) in enumerate(features.items()):
        channels, height, width = inspector.shapes[name]
        axes = _picture(figure.add_subplot(grid[row, 0]), images[index])
        axes.set_title(names[index] if row == 0 else "", fontsize=9, color=INK)
        axes.set_xlabel(f"{channels} maps, {height} x {width}", fontsize=9, color=INK)
        axes.set_ylabel(name.replace(".", ".\n"), fontsize=12 if len(name) < 9 else 8, fontweight="bold", color=INK)
        places = [figure.add_subplot(grid[row, column]) for column in range(1, 7)]
        keep = outlier_mask(maps, **inspector.settings)
        _shown_channels(places, maps[0], keep[0], inspector.found[index]["outliers"][name])
    figure.suptitle("Feature maps as they are, and where the masks keep them (red: left out)", fontsize=11)
    return figure


def _shown_channels(places: Sequence[Axes], maps: torch.Tensor, keep: torch.Tensor, found: Mapping[str, Any]) -> None:
    """Three channels of one block, two pictures each: as they are, and masked; ``maps`` and ``keep`` are (C, H, W)."""
    order = sorted(range(len(maps)), key=lambda c: (-found["masked"][c].item(), -found["peak"][c].item()))
    rest = order[2:] or order
    typical = sorted(rest, key=lambda c: found["peak"][c].item())[len(rest) // 2]
    first = "most masked" if found["masked"].any() else "largest peak"
    for place, (channel, heading) in enumerate(zip([*order[:2], typical], (first, "next", "typical"))):
        values, kept = maps[channel].float().cpu().numpy(), keep[channel].cpu().numpy()
        plain, masked = places[2 * place : 2 * place + 2]
        _feature_map(plain, values, np.ones_like(kept), f"{heading}: c = {channel}")
        _feature_map(
            masked, values, kept, f"{percent(1 - kept.mean())} masked", f"peak {found['peak'][channel]:.1f} std"
        )


def _picture(axes: Axes, image: Image.Image | np.ndarray) -> Axes:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _feature_map(axes: Axes, values: np.ndarray, kept: np.ndarray, title: str, below: str = "") -> None:
    """One map, (H, W): the grey scale spans the kept positions; the others are red."""
    low, high = (values[kept].min(), values[kept].max()) if kept.any() else (0, 1)
    axes.imshow(values, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    red = np.zeros((*kept.shape, 4))
    red[~kept] = (0.9, 0.1, 0.1, 1)
    axes.imshow(red, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=INK, pad=3)
    axes.set_xlabel(below, fontsize=8, color=INK, labelpad=2)


# Outliers ------------------------------------------------------------------------------------------------------------


def outliers_figure(inspector: Inspector, numbers: Mapping[str, Any]) -> Figure:
    """How much of each channel is masked, how extreme it is, what other settings would mask, and where."""
    figure = new_figure(11, 10, w_pad=0.1, h_pad=0.1)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.2, 1])
    (share, peak), (margin, cost) = parts[0].subplots(2, 2)
    _masked_by_channel(share, numbers["blocks"])
    _peak_by_channel(peak, numbers["blocks"])
    _masked_by_margin(margin, numbers["blocks"])
    _changes(cost, numbers)
    for axes in (share, peak, margin, cost):
        axes.legend(fontsize=8, frameon=False, markerscale=0.6)
    _where(parts[1], inspector, list(numbers["blocks"]))
    return figure


def _masked_by_channel(axes: Axes, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    _channels(axes, {name: [100 * value for value in block["masked_by_channel"]] for name, block in blocks.items()})
    mean = [100 * block["masked"] for block in blocks.values()]
    gaussian = [100 * block["masked_of_gaussian_maps"] for block in blocks.values()]
    axes.plot(range(len(blocks)), mean, "_", color=INK, markersize=26, markeredgewidth=2, label="mean")
    axes.plot(range(len(blocks)), gaussian, "x", color="#e02020", markersize=8, label="equally smooth Gaussian maps")
    _small_shares(axes)
    label_axes(axes, "Masked, by channel", "", "% of positions")


def _peak_by_channel(axes: Axes, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    _channels(axes, {name: block["peak_by_channel"] for name, block in blocks.items()})
    kept = [block["peak_kept"] for block in blocks.values()]
    axes.plot(range(len(blocks)), kept, "_", color=INK, markersize=26, markeredgewidth=2, label="largest kept")
    axes.set_yscale("log")
    plain_numbers(axes)
    label_axes(axes, "Largest value, by channel", "", "std of kept positions")


def _masked_by_margin(axes: Axes, blocks: Mapping[str, Mapping[str, Any]]) -> None:
    for (name, block), colour in zip(blocks.items(), COLOURS * 2):
        shares = [100 * share for share in block["masked_by_margin"].values()]
        axes.plot(shares, "o-", color=colour, label=name)
    margins = next(iter(blocks.values()))["masked_by_margin"]
    axes.set_xticks(range(len(margins)), [f"{float(value):g}" for value in margins])
    _small_shares(axes)
    label_axes(axes, "Masked, by margin", "margin, in std beyond the quantiles", "% of positions")


def _changes(axes: Axes, numbers: Mapping[str, Any]) -> None:
    """What masks change in a block's term, and what a stride changes in the masks."""
    blocks, negligible = numbers["blocks"], 100 * numbers["negligible"]
    places = np.arange(len(blocks))
    masks = [100 * abs(block["masks_change"]) for block in blocks.values()]
    stride = [100 * block["stride_differs"] for block in blocks.values()]
    axes.bar(places - 0.2, masks, 0.4, color=COLOURS[0], label="masks: change of a block's term")
    axes.bar(places + 0.2, stride, 0.4, color=COLOURS[1], label=f"stride {numbers['stride']}: positions that differ")
    axes.set_xticks(places, list(blocks))
    axes.axhline(negligible, color=INK, linewidth=0.8, linestyle=":", label="negligible")
    axes.set_ylim(0, 1.4 * max(*masks, *stride, negligible))  # room for the legend
    label_axes(axes, "Effect of other settings", "", "%")


def _where(part: SubFigure, inspector: Inspector, names: Sequence[str]) -> None:
    """Where each block is masked, as the mean over channels and images."""
    panels: Any = part.subplots(1, len(names), squeeze=False)
    for name, axes in zip(names, panels[0]):
        maps = torch.stack([found["outliers"][name]["where"] for found in inspector.found]).mean(0)
        largest = 100 * maps.max().item() or 1.0
        shown = axes.imshow(100 * maps.cpu().numpy(), cmap="magma", vmin=0, vmax=largest, interpolation="nearest")
        bar = part.colorbar(shown, ax=axes, location="bottom", shrink=0.9, aspect=15)
        bar.ax.locator_params(nbins=4)
        bar.ax.tick_params(labelsize=8)
        axes.set(xticks=[], yticks=[])
        axes.set_title(name, fontsize=9, color=INK)
    part.suptitle("Where: % of channels masked, mean of the images", fontsize=11, fontweight="bold", x=0.01, ha="left")


def _small_shares(axes: Axes) -> None:
    """A scale for percentages that may be 0: linear up to 0.01, logarithmic beyond."""
    top = 2 * max(0.01, axes.get_ylim()[1])
    axes.set_yscale("symlog", linthresh=0.01)
    ticks = [0, 0.01, 0.1, 1, 10, 100]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-0.003, top)


def _channels(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """One dot per channel, side by side, above the block's name."""
    for place, (row, colour) in enumerate(zip(values.values(), COLOURS * 2)):
        across = place + 0.7 * (np.arange(len(row)) / max(1, len(row) - 1) - 0.5)
        axes.plot(across, row, ".", color=colour, markersize=5, alpha=0.6)
    axes.set_xticks(range(len(values)), list(values))


# Balance -------------------------------------------------------------------------------------------------------------


def balance_figure(numbers: Mapping[str, Any]) -> Figure:
    """Each block's term over the error of the estimate, one panel per kind of depth weights."""
    figure = new_figure(11, 6.4, w_pad=0.1, h_pad=0.1)
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


# Interpolated latents ------------------------------------------------------------------------------------------------


def interpolation_figure(inspector: Inspector, image: Image.Image, name: str, numbers: Mapping[str, Any]) -> Figure:
    """Decoded latents of the first image by method and scale, and the errors of all images (Fig. 12)."""
    assert inspector.decoded is not None, "an image has been measured"
    figure = new_figure(10, 11.6, w_pad=0.03, h_pad=0.03)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    top, columns = parts[0], len(numbers["scales"])
    grid = top.add_gridspec(len(numbers["methods"]), 1 + columns, width_ratios=[1.55, *[1] * columns])
    for rows, picture, title in (
        (slice(0, 2), image, name),
        (slice(2, 4), inspector.decoded, "its latent, decoded"),
    ):
        axes = _picture(top.add_subplot(grid[rows, 0]), picture)
        axes.set_title(title, fontsize=10, color=INK)
    for row, (label, points) in enumerate(inspector.found[0]["interpolation"].items()):
        for column, (scale, point) in enumerate(zip(numbers["scales"], points)):
            axes = _picture(top.add_subplot(grid[row, 1 + column]), inspector.decoded_by[label, scale])
            axes.set_title(f"s = {scale:g}" if row == 0 else "", fontsize=10, color=INK)
            axes.set_xlabel(
                f"latent {point['latent_mse']:.2g}   LPL {point['lpl']:.2g}\n"
                f"pixels {_levels(point['pixel_mse']):.1f}/255",
                fontsize=9,
                color=INK,
            )
            if column == 0:
                axes.set_ylabel(label, fontsize=10, color=INK)
    _error_curves(parts[1].subplots(1, 2, sharex=True), inspector, numbers)
    return figure


def errors_figure(inspector: Inspector, names: Sequence[str]) -> Figure:
    """Decoded latents with errors of one size, a row for each image: the usual loss is the same, LPL is not."""
    rows = len(inspector.found)
    figure = new_figure(10, 0.4 + 2.95 * rows, w_pad=0.03, h_pad=0.03)
    panels: Any = figure.subplots(rows, 1 + len(KINDS), squeeze=False)
    for row, (found, pictures, name) in enumerate(zip(inspector.found, inspector.decoded_errors, names)):
        for column, (label, picture) in enumerate(zip(("no error", *KINDS), pictures)):
            axes = _picture(panels[row, column], picture)
            axes.set_title(label if row == 0 else "", fontsize=11, color=INK)
            words = name
            if column:
                point = found["errors"][label]
                words = f"error in the latent {point['latent_mse']:.2g}\nLPL {point['lpl']:.2f}"
            axes.set_xlabel(words, fontsize=11, color=INK)
    return figure


def _error_curves(panels: Sequence[Axes], inspector: Inspector, numbers: Mapping[str, Any]) -> None:
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


def plain_numbers(axes: Axes) -> None:
    """Label logarithmic axes at 1, 2, 5, 10, 20, 50, ..., and over many decades at powers of 10 only."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axes.get_xlim() if axis is axes.xaxis else axes.get_ylim()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=9))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())


def _levels(mse: float) -> float:
    """The root of a mean squared error of pixels in [-1, 1], in levels of 255."""
    return 127.5 * math.sqrt(mse)
