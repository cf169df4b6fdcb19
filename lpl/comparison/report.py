"""Writes a comparison: comparison.md with verdict and tables, comparison.json, and comparison.png.

The *picture* shows the samples of the first seed for the first prompts, which nobody has chosen, each with the square
where the runs with and without LPL differ most, enlarged; below it a point for each measure and seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

from lpl.comparison.measures import Measure, agreement, as_json, percent, shown, verdict
from lpl.comparison.runs import LABELS, LONGER, WITH, WITHOUT, Run
from lpl.evaluation.figures import crop_side, most_different_square, zoomed_crops
from lpl.evaluation.images import ImageSet
from lpl.evaluation.report import in_columns, markdown_rows
from lpl.evaluation.results import REAL, State
from lpl.tools.files import write_text
from lpl.tools.pictures import COLOURS, INK, PAPER, label_axes, new_figure, save_picture
from lpl.tools.words import duration


PAGE, NUMBERS, PICTURE = "comparison.md", "comparison.json", "comparison.png"
SHOWN = 4  # columns of the picture
SAME_TIME = 0.1  # relative difference of two times that count as equal
BASES = {WITHOUT: "Equal steps", LONGER: "Equal time"}  # what the runs with LPL are compared with


@dataclass(frozen=True)
class Comparison:
    """What the page is about.

    Args:
        runs: all finished ones; kinds and seeds in their order.
        settings: name -> value, in words, of what all runs share.
        commands: that of the comparison, and those of the first seed's runs, in words.
    """

    runs: Sequence[Run]
    measures: Sequence[Measure]
    settings: Mapping[str, str]
    commands: Mapping[str, str]
    warnings: Sequence[str]

    @property
    def bases(self) -> list[str]:
        return [base for base in BASES if base in self.measures[0].values]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.kind == WITH]

    def of(self, kind: str) -> list[Run]:
        return [run for run in self.runs if run.kind == kind]

    @property
    def missed(self) -> str:
        """That equal time was missed, as on a busy machine; else empty."""
        seconds = {kind: mean(run.seconds for run in self.of(kind)) for kind in (WITH, LONGER) if self.of(kind)}
        if LONGER not in seconds or abs(seconds[LONGER] / seconds[WITH] - 1) <= SAME_TIME:
            return ""
        favours = "the run with LPL" if seconds[LONGER] < seconds[WITH] else "the run without LPL"
        return (
            f"equal time was missed, which favours {favours}: {_time(seconds[LONGER])} without LPL and "
            f"{_time(seconds[WITH])} with it; other programs may have kept the machine busy"
        )

    @property
    def all_warnings(self) -> list[str]:
        """Those of the evaluation, and one of a missed time."""
        return [*self.warnings, *([self.missed] if self.missed else [])]

    @property
    def verdicts(self) -> dict[str, str]:
        found = {BASES[base]: verdict(self.measures, base) for base in self.bases}
        if self.missed:
            found[BASES[LONGER]] += f" But {self.missed}."
        return found


# The page ------------------------------------------------------------------------------------------------------------


def write_comparison(comparison: Comparison, picture: Image.Image, folder: Path) -> None:
    write_text(folder / NUMBERS, json.dumps(numbers(comparison), indent=2, ensure_ascii=False) + "\n")
    save_picture(picture, folder / PICTURE)
    write_text(folder / PAGE, page(comparison))


def numbers(comparison: Comparison) -> dict[str, Any]:
    """The content of comparison.json."""
    return {
        "verdict": comparison.verdicts,
        "seeds": comparison.seeds,
        "runs": {
            kind: {
                "steps": [run.steps for run in comparison.of(kind)],
                "seconds": [run.seconds for run in comparison.of(kind)],
            }
            for kind in dict.fromkeys(run.kind for run in comparison.runs)
        },
        "measures": {
            BASES[base]: {measure.title: as_json(measure, base) for measure in comparison.measures}
            for base in comparison.bases
        },
        "settings": dict(comparison.settings),
        "warnings": comparison.all_warnings,
        "commands": dict(comparison.commands),
    }


def page(comparison: Comparison) -> str:
    """comparison.md."""
    seeds = ", ".join(map(str, comparison.seeds))
    lines = ["# The same training with and without LPL", ""]
    lines += [f"**{title}.** {words}\n" for title, words in comparison.verdicts.items()]
    lines += [f"![samples and measures]({PICTURE})", ""]
    for base in comparison.bases:
        lines += [f"## {BASES[base]}", "", markdown_rows(table(comparison, base)), ""]
    several = "; ±: standard deviation over the seeds" if len(comparison.seeds) > 1 else ""
    lines.append(f"- Difference: with LPL minus without, seed by seed (seeds {seeds}){several}.")
    lines += [f"- {name}: {value}" for name, value in comparison.settings.items()]
    lines += [f"- Warning: {words}." for words in comparison.all_warnings]
    for name, command in comparison.commands.items():
        lines += ["", f"{name}:", "", f"```bash\n{command}\n```"]
    return "\n".join([*lines, ""])


def table(comparison: Comparison, base: str) -> list[list[str]]:
    """Rows of words, the heading first."""
    rows = [["", LABELS[base], LABELS[WITH], "difference", "seeds"]]
    for measure in comparison.measures:
        changes = measure.changes(base)
        change = "" if changes is None else f" ({percent(changes)})"
        values = [shown(measure.values[kind]) for kind in (base, WITH)]
        rows.append([measure.name, *values, shown(measure.differences(base), "+") + change, agreement(measure, base)])
    kinds = [comparison.of(kind) for kind in (base, WITH)]
    steps = [mean(run.steps for run in runs) for runs in kinds]
    seconds = [mean(run.seconds for run in runs) for runs in kinds]
    rows.append(["training steps", *(f"{count:g}" for count in steps), "", ""])
    rows.append(["training time", *map(_time, seconds), f"{seconds[1] / seconds[0]:.2f} x", ""])
    return rows


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else duration(seconds)


# The picture ---------------------------------------------------------------------------------------------------------


def draw(comparison: Comparison, states: Sequence[State], real: ImageSet) -> Image.Image:
    """Samples above, measures below.

    Args:
        states: of all runs, with their images.
        real: the reference.
    """
    grid, panel = samples(comparison, states, real), measures_panel(comparison)
    panel = panel.resize((grid.width, round(panel.height * grid.width / panel.width)), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (grid.width, grid.height + panel.height), PAPER)
    both.paste(grid, (0, 0))
    both.paste(panel, (0, grid.height))
    return both


def samples(comparison: Comparison, states: Sequence[State], real: ImageSet) -> Image.Image:
    """The first prompts' images of the first seed's runs, and real images with the same captions, if all have one."""
    images = {state.label: state.pictures for state in states}
    first = [run for run in comparison.runs if run.seed == comparison.seeds[0]]
    drawn = images[first[0].label].captions or []
    captions = list(dict.fromkeys(drawn))[:SHOWN]
    places = [drawn.index(caption) for caption in captions]
    rows = {LABELS[run.kind]: [images[run.label][place] for place in places] for run in first}
    pairs = zip(rows[LABELS[WITHOUT]], rows[LABELS[WITH]])
    corners = [most_different_square(image, other, crop_side(image)) for image, other in pairs]
    numbers = in_columns(real, captions) if real.captions else {}
    apart = None
    if len(numbers) == len(captions):
        apart = REAL
        rows[apart] = [real[numbers[column]] for column in range(len(captions))]
    return zoomed_crops(rows, captions, apart, corners)


def measures_panel(comparison: Comparison) -> Image.Image:
    """A point for each measure and seed: how much better LPL made it."""
    judged = [measure for measure in comparison.measures if measure.better]
    rows = [measure for measure in judged if all(measure.changes(base) is not None for base in comparison.bases)]
    figure = new_figure(11, 0.8 + 0.3 * len(rows), dpi=150)
    axes = figure.subplots()
    widest = 0.01
    for number, base in enumerate(comparison.bases):
        shift = 0.16 * (number - (len(comparison.bases) - 1) / 2)
        for place, measure in enumerate(reversed(rows)):
            sign = 1 if measure.better == "higher" else -1
            gains = [sign * change for change in measure.changes(base) or ()]
            label = BASES[base].lower() if place == 0 else None
            axes.plot(gains, [place - shift] * len(gains), "o", color=COLOURS[number], alpha=0.6, label=label)
            widest = max(widest, *(1.1 * abs(gain) for gain in gains))
            axes.plot([mean(gains)], [place - shift], "|", color=COLOURS[number], markersize=14, markeredgewidth=2)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [measure.name for measure in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(-widest, widest)
    axes.xaxis.set_major_formatter("{x:+.0%}")
    label_axes(
        axes,
        "How much better with LPL than without (right: better; a point for each seed, a bar for the mean)",
        "",
        "",
    )
    if len(comparison.bases) > 1:
        axes.legend(fontsize=9, frameon=False, loc="lower right")
    file = BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
