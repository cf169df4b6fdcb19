"""The pictures of an evaluation: spectra, samples side by side, enlarged crops, metrics over the training.

A *row* is the images of one state of a model, or real ones; a *column* is one prompt and seed, so that the images of a
column differ by the model alone. A *crop* is a small square of an image, enlarged by a whole number. Functions that
return a figure leave saving it to :func:`lpl.tools.pictures.save_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from lpl.tools.pictures import COLOURS, INK, PAPER, label_axes, labelled_grid, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRAME = "#e02020"  # around the crop
SMALLEST_SHOWN, LARGEST_SHOWN = 192, 512  # pixels of an image beside its crop
LARGEST_CROP = 128  # pixels of the image
CROP_SHARE = 4  # of the image's shorter side
Spectrum = tuple[np.ndarray, np.ndarray]  # frequencies in cycles per pixel (K,), log10 of the power (K,)


# Spectra -------------------------------------------------------------------------------------------------------------


def spectrum_figure(spectra: Mapping[str, Spectrum], reference: str) -> Figure:
    """Power spectra (Fig. 5), and below them their differences to the reference (Fig. 6).

    Args:
        spectra: by label, from :func:`lpl.evaluation.spectrum.log_power_spectrum`, for one image size.
        reference: the label of the real images.

    Raises:
        ValueError: if the reference is not among them, or the frequencies differ.
    """
    if reference not in spectra:
        raise ValueError(f"{reference!r} is none of the spectra: {', '.join(spectra)}")
    frequencies, real = spectra[reference]
    for label, (others, _) in spectra.items():
        if not np.array_equal(others, frequencies):
            raise ValueError(f"{label} and {reference} differ in frequencies: give spectra of images of one size")
    figure = new_figure(7, 7, dpi=120, h_pad=0.1)
    power, difference = figure.subplots(2, 1, sharex=True, height_ratios=[1.2, 1])
    generated = [label for label in spectra if label != reference]
    for label, colour in zip(generated, COLOURS * (1 + len(generated) // len(COLOURS))):
        power.plot(frequencies, spectra[label][1], color=colour, linewidth=1.6, label=label)
        difference.plot(frequencies, spectra[label][1] - real, color=colour, linewidth=1.6)
    power.plot(frequencies, real, color=INK, linewidth=1.6, linestyle="--", label=reference)
    difference.axhline(0, color=INK, linewidth=1.6, linestyle="--")
    label_axes(power, "Power spectrum", "", "log10 of the power")
    label_axes(difference, f"Difference to {reference}", "frequency in cycles per pixel (0.5: Nyquist)", "log10 ratio")
    power.legend(fontsize=9, frameon=False)
    return figure


# Samples -------------------------------------------------------------------------------------------------------------


def paired_grid(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """The same prompts and seeds in the same columns, a row for each model; real images may be the last row.

    Raises:
        ValueError: if rows and captions are not all of the same length.
    """
    lengths = {label: len(images) for label, images in rows.items()}
    if set(lengths.values()) != {len(captions)}:
        raise ValueError(f"{len(captions)} captions for rows of {lengths} images: pairs need one image in each cell")
    return labelled_grid(rows, captions)


def zoomed_crops(
    rows: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str],
    apart: str | None = None,
    corners: Sequence[tuple[int, int]] | None = None,
) -> Image.Image:
    """Each image with a framed square, and that square enlarged beside it.

    A column's square is the same in all rows.

    Args:
        apart: a row of unrelated images, each of which gets its own square.
        corners: left and top of each column's square; default: where the first row's image has the most local energy
            (:func:`busiest_square`); make the first row the baseline.

    Raises:
        ValueError: as for :func:`paired_grid`, and if the images of a column differ in size.
    """
    first = next(iter(rows.values()), [])
    corners = corners or [busiest_square(image, crop_side(image)) for image in first]
    for label, images in rows.items():
        for number, (image, other) in enumerate(zip(images, first)):
            if image.size != other.size:
                raise ValueError(f"{label}: image {number} has {image.size} pixels, the one above it {other.size}")
    pairs = {label: [_with_crop(*pair) for pair in zip(images, corners)] for label, images in rows.items()}
    if apart is not None:
        pairs[apart] = [_with_crop(image, busiest_square(image, crop_side(image))) for image in rows[apart]]
    lengths = {len(images) for images in rows.values()}
    if lengths != {len(captions)}:
        raise ValueError(f"{len(captions)} captions for rows of {lengths} images: each column needs one")
    tile = max(max(pair.size) for images in pairs.values() for pair in images)
    return labelled_grid(pairs, captions, tile)


def crop_side(image: Image.Image) -> int:
    """The side of the crop: a quarter of the image's, at most 128 pixels."""
    return max(1, min(min(image.size) // CROP_SHARE, LARGEST_CROP))


def busiest_square(image: Image.Image, side: int) -> tuple[int, int]:
    """Left and top of the square with the largest local energy, the mean squared gradient of the luminance."""
    across, down = np.gradient(np.asarray(image.convert("L"), np.float64), axis=(1, 0))
    return _largest_square(np.asarray(across**2 + down**2), side)


def most_different_square(image: Image.Image, other: Image.Image, side: int) -> tuple[int, int]:
    """Left and top of the square with the largest mean squared difference of the colours."""
    difference = np.asarray(image.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    return _largest_square((difference**2).mean(-1), side)


def _largest_square(values: np.ndarray, side: int) -> tuple[int, int]:
    """Left and top of the square with the largest mean of (height, width) values."""
    from scipy.ndimage import uniform_filter

    means = uniform_filter(values, size=side, mode="constant")
    # The filter's window around (y, x) begins at (y - side // 2, x - side // 2); only full windows count.
    begin, (height, width) = side // 2, values.shape
    inside = means[begin : begin + height - side + 1, begin : begin + width - side + 1]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return int(left), int(top)


def _with_crop(image: Image.Image, corner: tuple[int, int]) -> Image.Image:
    """The image with a frame around the square at that corner, and the enlarged square beside it."""
    image, side = image.convert("RGB"), crop_side(image)
    crop = image.crop((*corner, corner[0] + side, corner[1] + side))
    scale = _shown_scale(image)
    size = (round(image.width * scale), round(image.height * scale))
    shown = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    frame = [round(scale * value) for value in (*corner, corner[0] + side, corner[1] + side)]
    width = 2
    ImageDraw.Draw(shown).rectangle(
        (frame[0] - width, frame[1] - width, frame[2] + width - 1, frame[3] + width - 1), outline=FRAME, width=width
    )
    zoom = max(1, min(size) // side)
    crop = crop.resize((zoom * side, zoom * side), Image.Resampling.NEAREST)
    both = Image.new("RGB", (size[0] + 4 + crop.width, max(size[1], crop.height)), PAPER)
    both.paste(shown, (0, 0))
    both.paste(crop, (size[0] + 4, 0))
    return both


def _shown_scale(image: Image.Image) -> float:
    """Small images are enlarged by a whole number, large ones reduced."""
    return max(1, math.ceil(SMALLEST_SHOWN / max(image.size))) * min(1.0, LARGEST_SHOWN / max(image.size))


# Metrics over the training -------------------------------------------------------------------------------------------


def metric_curves(
    results: Sequence[Mapping[str, Any]], better: Mapping[str, str] | None = None, reference: str | None = None
) -> Figure:
    """A panel for each metric, from 0: a line over the steps with its spread shaded; a horizontal line for a result
    without a step.

    Args:
        results: mappings with "step" (None: not of a training), "metrics" (name -> value or {"value", "spread"}) and,
            for more than one line, "label".
        better: name of a metric -> "lower" or "higher", for its title.
        reference: the label of the real images, if they are among the results.

    Raises:
        ValueError: if no result has a step.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if all(result.get("step") is None for result in results):
        raise ValueError("curves need results with a step")
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    columns = min(2, len(names))
    lines = math.ceil(len(names) / columns)
    figure = new_figure(5.5 * columns, 3.2 * lines, dpi=120, w_pad=0.12, h_pad=0.12)
    labels = list(dict.fromkeys(result.get("label", "") for result in results))
    colours = dict(zip(labels, COLOURS * (1 + len(labels) // len(COLOURS)))) | {reference: INK}
    handles = {}
    for name, axes in zip(names, figure.subplots(lines, columns, squeeze=False).flat):
        for label in labels:
            found = [result for result in results if result.get("label", "") == label and name in result["metrics"]]
            points = [(result.get("step"), result["metrics"][name]) for result in found]
            _draw_metric(axes, label, points, colours[label])
        direction = f" ({better[name]} is better)" if better and name in better else ""
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)
        elif axes.dataLim.ymax <= 0:
            axes.set_ylim(top=0)
        label_axes(axes, name + direction, "optimizer step", "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    for axes in figure.axes[len(names) :]:
        axes.set_visible(False)
    if any(labels):
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _draw_metric(axes: Axes, label: str, points: Sequence[tuple[int | None, Any]], colour: str) -> None:
    """One line of a panel; ``points`` are (step, value or estimate)."""
    rows = []
    for step, value in points:
        value = value if isinstance(value, Mapping) else {"value": value, "spread": None}
        rows.append((step, value["value"], value["spread"] or 0))
    for _, value, spread in (row for row in rows if row[0] is None):
        axes.axhline(value, color=colour, linewidth=1.4, linestyle="--", label=label)
        if spread:
            axes.axhspan(value - spread, value + spread, color=colour, alpha=0.1, linewidth=0)
    if steps := sorted(row for row in rows if row[0] is not None):
        across, values, spreads = map(np.array, zip(*steps))
        axes.plot(across, values, "o-", color=colour, markersize=4, label=label)
        if spreads.any():
            axes.fill_between(across, values - spreads, values + spreads, color=colour, alpha=0.2, linewidth=0)
