"""The two pictures of a run: a grid of samples and the curves of its losses; and what all figures share.

A *tile* is the square, ``tile`` pixels on a side, into which an image is fitted with its aspect ratio kept. A *row* of
the grid is one state of the model (before, after, real images), a *column* is one caption. A *record* is one entry of
the training log: a dict with "step" and any of "diffusion_loss", "lpl", "lpl_share", "lr", or, for held-out samples,
"validation_loss" and "validation_lpl". Missing keys are not drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lpl.tools.files import write_whole


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SMALLEST_TILE, LARGEST_TILE = 128, 1024  # pixels
INK, PAPER = "#222222", "#ffffff"
COLOURS = ("#3465a4", "#c4601d", "#4a8a3c", "#75507b", "#b03060", "#2a8a8a", "#8a6d1d", "#555753")
WIDE_SCRIPTS = 0x2E80  # from this code point on: Chinese, Japanese and Korean, which DejaVu lacks
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc")


def save_picture(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write an image as PNG, atomically."""
    return write_whole(path, lambda unfinished: image.save(unfinished, format="PNG"))


# The grid of samples ------------------------------------------------------------------------------------------------


def labelled_grid(
    rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], tile: int | None = None
) -> Image.Image:
    """Draw images in labelled rows under captioned columns.

    Args:
        rows: {label: images of any mode, size and shape}; a short row ends in empty cells.
        captions: one per column, in any script.
        tile: the longer side of each image in pixels. None = the longest side of all images, at most 1024; images
            below 128 px are enlarged by an integer factor, so that their pixels stay sharp squares.

    Returns:
        RGB image on white.

    Raises:
        ValueError: if there is no image, or a row has more images than there are captions.
    """
    images = [image for row in rows.values() for image in row]
    if not images:
        raise ValueError("a grid needs at least one image, but every row is empty")
    if (columns := max(map(len, rows.values()))) > len(captions):
        raise ValueError(
            f"a row has {columns} images, but there are {len(captions)} captions: give one for each column"
        )
    tile = tile or _natural_tile(images)
    size = _font_size(tile)
    fitted = {label: [_fit(image, tile) for image in row] for label, row in rows.items()}
    cell = max(6 * size, *(image.width for row in fitted.values() for image in row))
    width, beside = int(0.95 * cell), max(tile // 2, 7 * size)
    lines = [[text_image("", size, 0), *(text_image(caption, size, width) for caption in captions[:columns])]]
    lines += [[text_image(label, size, beside, align="right"), *row] for label, row in fitted.items()]
    return _lay_out(lines, gap=max(8, tile // 24))


def _lay_out(lines: list[list[Image.Image]], gap: int) -> Image.Image:
    """Paste lines of images: captions (line 0) above their column, labels (column 0) right-aligned at their row."""
    widest = max(image.width for line in lines for image in line[1:])
    widths = [max(line[0].width for line in lines), *[widest] * (max(map(len, lines)) - 1)]
    heights = [max(image.height for image in line) for line in lines]
    lefts, tops = _starts(widths, gap), _starts(heights, gap)
    canvas = Image.new("RGB", (lefts[-1], tops[-1]), PAPER)
    for i, line in enumerate(lines):
        for j, image in enumerate(line):
            x, y = widths[j] - image.width, heights[i] - image.height  # spare room
            canvas.paste(image, (lefts[j] + (x // 2 if j else x), tops[i] + (y // 2 if i else y)))
    return canvas


def _starts(sizes: list[int], gap: int) -> list[int]:
    """The start of each item, and the end of the canvas; empty items take no gap."""
    starts = [gap]
    for size in sizes:
        starts.append(starts[-1] + (size + gap if size else 0))
    return starts


def _natural_tile(images: list[Image.Image]) -> int:
    """The longest side of all images in pixels; if small, times the integer that brings it to 128 px."""
    longest = max(max(image.size) for image in images)
    return min(longest * math.ceil(SMALLEST_TILE / longest), LARGEST_TILE)


def _fit(image: Image.Image, tile: int) -> Image.Image:
    """Resize the longer side to ``tile`` pixels: nearest for integer enlargements, interpolated otherwise."""
    scale = tile / max(image.size)
    if scale > 1:
        resample = Image.Resampling.NEAREST if scale.is_integer() else Image.Resampling.BICUBIC
    else:
        resample = Image.Resampling.LANCZOS
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = on_white(image)
    return image if image.size == (width, height) else image.resize((width, height), resample)


def on_white(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparent parts become white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # of TIFF, which PIL converts to LA only
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")


def text_image(
    text: str,
    size: int,
    width: int,
    align: str = "center",
    lines: int = 6,
    colours: tuple[str, str] = (INK, PAPER),
) -> Image.Image:
    """Draw text in at most ``lines`` lines of ``width`` pixels, then an ellipsis; empty text is 0 x 0 pixels.

    Args:
        colours: of the text, and of what is behind it.
    """
    text = " ".join(str(text).encode(errors="replace").decode().split())
    font = _font(size, wide=any(ord(letter) >= WIDE_SCRIPTS for letter in text))
    broken = _break(text, font, width)
    if len(broken) > lines:
        broken = [*broken[: lines - 1], _shorten(broken[lines - 1], font, width)]
    image = Image.new("RGB", _extent(broken, font, size), colours[1])
    if broken:
        draw = ImageDraw.Draw(image)
        draw.multiline_text((0, 0), "\n".join(broken), colours[0], font, spacing=_spacing(size), align=align)
    return image


def _font_size(tile: int) -> int:
    """Font size beside a tile; it grows more slowly than the tile: 14 px at 128, 19 px at 256, 35 px at 1024."""
    return max(12, round(3 + math.sqrt(tile)))


@lru_cache(maxsize=16)
def _font(size: int, wide: bool) -> Font:
    """DejaVu, which comes with matplotlib, since Pillow's own font lacks accents; ``wide`` prefers a CJK font."""
    import matplotlib

    names = [*(WIDE_FONTS if wide else ()), str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))]
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _spacing(size: int) -> int:
    return round(size / 5)  # pixels between lines


def _extent(lines: list[str], font: Font, size: int) -> tuple[int, int]:
    """(width, height) of the drawn lines in pixels."""
    if not lines:
        return 0, 0
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    _, _, right, bottom = probe.multiline_textbbox((0, 0), "\n".join(lines), font, spacing=_spacing(size))
    return math.ceil(right), math.ceil(bottom)


def _break(text: str, font: Font, width: int) -> list[str]:
    """Fill lines word by word; words wider than a line, and scripts without spaces, break between letters."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _shorten(line: str, font: Font, width: int) -> str:
    """Drop words, then letters, until the rest fits with an ellipsis."""
    while line and font.getlength(line + "…") > width:
        line = line.rsplit(" ", 1)[0] if " " in line else line[:-1]
    return line + "…"


# The curves of the losses -------------------------------------------------------------------------------------------


Curve = tuple[np.ndarray, np.ndarray]  # steps (N,) ascending, values (N,)


class Panel(NamedTuple):
    """One quantity of the training log, and how it is drawn."""

    key: str
    title: str
    unit: str
    colour: str
    scale: float = 1.0
    smoothed: bool = True
    held_out: str | None = None  # the key of the same quantity on held-out samples


PANELS = (
    Panel("diffusion_loss", "Diffusion loss", "mean squared error", "#3465a4", held_out="validation_loss"),
    Panel("lpl", "Latent perceptual loss", "LPL, before its weight", "#c4601d", held_out="validation_lpl"),
    Panel("lpl_share", "LPL's share of the loss", "% of the total loss", "#4a8a3c", scale=100.0),
    Panel("lr", "Learning rate", "learning rate", "#75507b", smoothed=False),
)


def loss_curves(records: Sequence[Mapping[str, float]], path: str | os.PathLike) -> Path | None:
    """Draw diffusion loss, LPL, LPL's share and learning rate over the optimizer step, and write the figure as PNG.

    Each panel shows its values as a thin line, their running mean as a thick line, and the values of held-out samples
    as a dotted line; panels without values are omitted. Records may come in any order and repeat a step, as those of
    a resumed run do: the last one counts.

    Returns:
        ``path``, or None if there is nothing to draw; then no file is written.
    """
    curves = {panel: (_curve(records, panel.key, panel.scale), _curve(records, panel.held_out)) for panel in PANELS}
    curves = {panel: pair for panel, pair in curves.items() if any(len(steps) for steps, _ in pair)}
    if not curves:
        return None
    columns = 1 if len(curves) == 1 else 2
    lines = math.ceil(len(curves) / columns)
    figure = new_figure(5.5 * columns, 3.2 * lines, dpi=120, w_pad=0.12, h_pad=0.12)
    for index, (panel, pair) in enumerate(curves.items(), start=1):
        _draw_panel(figure.add_subplot(lines, columns, index), panel, *pair)
    return save_figure(figure, path)


def new_figure(width: float, height: float, dpi: int = 100, **pads: float) -> Figure:
    """A figure of width x height inches with constrained layout; ``pads`` are those of matplotlib's layout engine."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, no backend to choose

    figure = Figure(figsize=(width, height), dpi=dpi)
    figure.set_layout_engine("constrained", **pads)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Write a figure as PNG, atomically."""
    return write_whole(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def label_axes(axes: Axes, title: str, horizontal: str, vertical: str) -> None:
    """Set title and labels in the style of all panels."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(horizontal, fontsize=9)
    axes.set_ylabel(vertical, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(records: Sequence[Mapping[str, float]], key: str | None, scale: float = 1.0) -> Curve:
    """Ascending steps (N,), and the key's finite values (N,) at them."""
    points: dict[int, float] = {}
    for record in records:
        step, value = record.get("step"), record.get(key or "")
        if step is not None and value is not None and math.isfinite(value):
            points[int(step)] = scale * float(value)
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _running_mean(values: np.ndarray) -> np.ndarray:
    """(N,) -> (N,): mean over a window of about a tenth of the run; spikes are clipped to the drawn range."""
    low, high = _reach(values)
    total = np.concatenate([[0.0], np.cumsum(values.clip(low, high))])
    at, half = np.arange(len(values)), max(1, len(values) // 20)
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _reach(values: np.ndarray) -> tuple[float, float]:
    """(lowest, highest) value to show: all of (N,), except rare spikes that would flatten the rest."""
    low, high = np.quantile(values, [0.01, 0.99])
    return max(values.min(), low - (high - low) / 4), min(values.max(), high + (high - low) / 4)


def _draw_panel(axes: Axes, panel: Panel, training: Curve, held_out: Curve) -> None:
    """One quantity over the optimizer step."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    steps, values = training
    if panel.smoothed and len(values) > 4:
        axes.plot(steps, values, color=panel.colour, linewidth=0.7, alpha=0.35)
        axes.plot(steps, _running_mean(values), color=panel.colour, linewidth=2.0, label="training")
        _frame(axes, *(part for part in (values, held_out[1]) if len(part)))
    else:
        if len(values):
            single = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=panel.colour, linewidth=2.0, marker=single, label="training")
        shown = np.concatenate([values, held_out[1]])
        axes.set_ylim(min(0, 1.1 * shown.min()), 1.1 * shown.max() or None)
    if len(held_out[0]):
        axes.plot(*held_out, color=INK, linewidth=1.2, linestyle=":", marker="o", markersize=4, label="validation")
        axes.legend(fontsize=9, frameon=False)
    if panel.key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    if len({*steps, *held_out[0]}) == 1:
        step = max([*steps, *held_out[0]])
        axes.set_xlim(step - 1, step + 1)
    label_axes(axes, panel.title, "optimizer step", panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _frame(axes: Axes, *curves: np.ndarray) -> None:
    """Set the vertical range to show every curve, on a log scale if it spans decades."""
    lowest, highest = zip(*map(_reach, curves), strict=True)
    low, high = min(lowest), max(highest)
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _short(value: float, _position: int) -> str:
    """A small number on an axis: 2e-5 instead of 0.00002."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
