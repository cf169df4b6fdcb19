"""Writes results.json as the tables and figures of docs/results.md.

    python examples/study/report.py --study study

Each table replaces the text between its two marks in docs/results.md, and names the rows that have not been run. The
text between the tables is written by hand: check it when a new row has been run. The pictures need the study's folder.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL.Image import Image
from rows import ROW, ROWS, SETTINGS, Row
from run import IN_FLOAT32, given_time_of, key_of, recorded, speed_of  # which lets the package be found

from benchmarks import pages
from lpl.evaluation import Preprocessing, folder_images
from lpl.evaluation.figures import busiest_square, crop_side, paired_grid, zoomed_crops
from lpl.evaluation.report import markdown_rows
from lpl.evaluation.results import REAL
from lpl.tools.pictures import label_axes, save_figure, save_picture


HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
COLUMNS = {  # headings and formats
    "change": ("change of Fréchet", "{:+.1%}"),
    "texture_change": ("of textures", "{:+.1%}"),
    "kept": ("of LPL's gain in textures", "{:.0%}"),
    "fid": ("Fréchet ↓", "{:.2f}"),
    "texture": ("of textures ↓", "{:.2f}"),
    "recognised": ("recognised ↑", "{:.1%}"),
    "psnr": ("PSNR, dB ↑", "{:.2f}"),
    "validation_loss": ("diffusion loss ↓", "{:.4f}"),
    "validation_lpl": ("LPL ↓", "{:.4f}"),
    "lpl_share": ("LPL's share", "{:.1%}"),
    "steps": ("steps", "{:,.0f}"),
    "time": ("time of a step", "{:.2f}"),
}
SPECTRUM = {f"band_{number}": (f"to {number}/8", "{:.2f}") for number in range(1, 5)}  # cycles per pixel
TABLES = tuple(dict.fromkeys(row.table for row in ROWS.values()))
ONE_SETTING = ("weight", "statistics", "masks", "depth", "blocks", "threshold")  # tables
CHANGES = {"change": "Fréchet distance", "texture_change": "Fréchet distance of textures"}
SHOWN_ROWS = {"without LPL": "flow", "LPL, a fifth of the loss": "flow_lpl", "LPL, half of the loss": "share_50"}
FAR = 3  # times LPL's largest gain: what gains more is drawn there, with its number
SHOWN, ENLARGED = 10, 5  # images in a row of the pictures

Runs = Mapping[str, Mapping[str, Any]]  # seed -> column -> number


def compared(results: Mapping[str, Runs]) -> dict[str, dict[str, dict[str, Any]]]:
    """Adds change relative to the same seed without LPL in the same precision, time relative to steps without LPL on
    such a machine, and what cheaper rows keep of LPL's gain. Of each row, the runs of the precision that has more."""
    found = {name: {key: dict(run) for key, run in runs.items()} for name, runs in results.items()}
    for name, row in ((name, row) for name, row in ROWS.items() if name != row.without):
        runs, without = found.get(name, {}), found.get(row.without, {})
        for key in runs.keys() & without.keys():
            run, other = runs[key], without[key]
            run["change"] = run["fid"] / other["fid"] - 1
            run["texture_change"] = run["texture"] / other["texture"] - 1
            if (speed := speed_of(row.without, results, run["machine"])) is not None:
                run["time"] = speed / run["images_per_second"]
            lpl = found.get(f"{row.without}_lpl", {}).get(key)
            if row.cheap and lpl:
                run["kept"] = (other["texture"] - run["texture"]) / (other["texture"] - lpl["texture"])
    return {name: in_one_precision(runs) for name, runs in found.items()}


def in_one_precision(runs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs of the precision that has more of them, bfloat16 where both have as many.

    >>> in_one_precision({"0-float32": {}, "1": {}, "0": {}}), in_one_precision({"0": {}, "0-float32": {}})
    ({'0': {}, '1': {}}, {'0': {}})
    """
    keys = [sorted(key for key in runs if key.endswith(IN_FLOAT32) == float32) for float32 in (False, True)]
    return {key: runs[key] for key in max(keys, key=len)}


def seeds(runs: Runs) -> str:
    """The seeds in words.

    >>> seeds({"0": {}, "1": {}}), seeds({"0-float32": {}})
    ('0, 1', '0, in float32')
    """
    words = ", ".join(key.removesuffix(IN_FLOAT32) for key in runs)
    return words + (", in float32" if any(key.endswith(IN_FLOAT32) for key in runs) else "")


def cell(form: str, values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds.

    >>> cell("{:.1f}", [1.0, 2.0]), cell("{:.1f}", [600.0, 600.0]), cell("{:.1f}", [])
    ('1.5 ± 0.7', '600.0', '')
    """
    if not values:
        return ""
    spread = f" ± {form.replace('+', '').format(stdev(values))}" if len(set(values)) > 1 else ""
    return form.format(mean(values)) + spread


def cells(runs: Runs, columns: Mapping[str, tuple[str, str]]) -> list[str]:
    return [cell(form, [run[name] for run in runs.values() if name in run]) for name, (_, form) in columns.items()]


def table(kind: str, found: Mapping[str, Runs]) -> str:
    """One of TABLES, and the command that runs its rows."""
    own = [name for name, row in ROWS.items() if row.table == kind or (row.cheap and kind == "cheap")]
    others = dict.fromkeys(name for row in own for name in (ROWS[row].without, f"{ROWS[row].without}_lpl"))
    names = [name for name in (*(name for name in others if name not in own), *own) if found.get(name)]
    shown = {name: column for name, column in COLUMNS.items() if kind == "cheap" or name != "kept"}
    lines = [["", *(heading for heading, _ in shown.values()), "seeds", "the paper", "row"]]
    for name in names:
        row = ROWS[name]
        label = row.label if row.table == kind or row.table not in ONE_SETTING else words(row)
        lines.append([label, *cells(found[name], shown), seeds(found[name]), row.paper, f"`{name}`"])
    columns = [column for place, column in enumerate(zip(*lines)) if place == 0 or any(column[1:])]
    parts = [markdown_rows(list(zip(*columns)))] if any(found.get(name) for name in own) else []
    if missing := [f"`{name}`" for name in own if not found.get(name)]:
        parts.append(f"Not run: {', '.join(missing)}.")
    return "\n\n".join([*parts, f"`python examples/study/run.py --rows {' '.join(own)}`"])


def spectrum_table(found: Mapping[str, Runs]) -> str:
    """Power relative to the real pictures', for all finished rows."""
    lines = [[f"`{name}`", *cells(found[name], SPECTRUM)] for name in ("floor", *ROWS) if found.get(name)]
    return markdown_rows([["cycles per pixel", *(heading for heading, _ in SPECTRUM.values())], *lines])


def filled(page: str, found: Mapping[str, Runs]) -> str:
    """The page with all blocks inserted.

    Raises:
        ValueError: where a mark is missing.
    """
    for mark, text in ({kind: table(kind, found) for kind in TABLES} | {"spectrum": spectrum_table(found)}).items():
        page = pages.filled(page, f"<!-- {mark} -->", f"<!-- end of {mark} -->", text)
    return page


def overview(found: Mapping[str, Runs], path: Path) -> None:
    """Both Fréchet distances of rows relative to the same seed and steps without LPL, a point for each seed, and the
    mean of several."""
    from matplotlib.figure import Figure

    equal = (name for name, row in ROWS.items() if given_time_of(row) is None)
    names = [name for name in equal if any("change" in run for run in found.get(name, {}).values())][::-1]
    figure = Figure(figsize=(10, 0.8 + 0.28 * len(names)), dpi=120, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), CHANGES.items()):
        for place, name in enumerate(names):
            values = [100 * run[key] for run in found[name].values() if key in run]
            axes.plot(values, [place] * len(values), "o", color=colour(name), markersize=5, alpha=0.6)
            if len(values) > 1:
                axes.plot([mean(values)], [place], "|", color=colour(name), markersize=16, markeredgewidth=2)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_yticks(range(len(names)), [words(ROWS[name]) for name in names])
        axes.axvline(0, color="#555753", linewidth=0.8, linestyle=":")
        label_axes(axes, title, "change in %, left is better", "")
    save_figure(figure, path)


def words(row: Row) -> str:
    """A row's label, after what it changes if it changes one setting of LPL."""
    return f"{row.table}: {row.label}" if row.table in ONE_SETTING else row.label


def gain_for_time(found: Mapping[str, Runs], path: Path, plain: str = "flow") -> None:
    """Change of both Fréchet distances in % over the training's time, relative to training without LPL; of LPL, and of
    what costs less. Means over seeds."""
    from matplotlib.figure import Figure

    cheap = (name for name, row in ROWS.items() if row.cheap and row.without == plain)
    names = [name for name in (f"{plain}_lpl", *cheap) if found.get(name)]
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 2), CHANGES.items()):
        axes.axhline(0, color="#555753", linewidth=0.8, linestyle=":")
        points = {}
        for name in names:
            if runs := [run for run in found[name].values() if {key, "time"} <= run.keys()]:
                time = mean(run["time"] * run["steps"] / int(str(ROW["max_train_steps"])) for run in runs)
                points[name] = time, 100 * mean(run[key] for run in runs)
        changes = [change for name, (_, change) in points.items() if ROWS[name].flags["lpl_weight"] != "0"]
        lowest = FAR * min(changes, default=0)
        for (name, (time, change)), marker in zip(points.items(), itertools.cycle("osD^vPX*<>")):
            label = words(ROWS[name]).removeprefix(f"{ROWS[plain].label}, ")
            axes.plot([time], [max(change, lowest)], marker, color=colour(name), label=label, alpha=0.8)
            if change < lowest:  # beyond the picture
                axes.annotate(
                    f"{change:.0f} ↓", (time, lowest), xytext=(0, 8), textcoords="offset points", ha="center"
                )
        axes.set_xlim(left=0)
        label_axes(axes, title, "time of the training, without LPL: 1", "change in %, lower is better")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def colour(name: str) -> str:
    return "#555753" if ROWS[name].flags["lpl_weight"] == "0" else "#c4601d"


def pictures(study: Path, folder: Path) -> None:
    """The first seed's images of SHOWN_ROWS and the real ones; and enlarged, where the real ones have most detail.

    Raises:
        ValueError: where a row has not been measured in the study's folder.
    """
    seed, preprocessing = key_of(0), Preprocessing(int(str(SETTINGS["resolution"])))
    real = folder_images(study / "reference_toned", preprocessing)
    rows, captions = dict[str, list[Image]](), list[str]()
    for label, name in SHOWN_ROWS.items():
        place = next((study / "measured" / name / seed).glob("images/*/metadata.jsonl"), None)
        if place is None:
            raise ValueError(f"{study} has no images of {name}, {seed}: run it first, --rows {name} --seeds 0")
        place = place.parent
        drawn = folder_images(place, preprocessing)
        rows[label], captions = [drawn[number] for number in range(SHOWN)], list(drawn.captions or ())[:SHOWN]
    rows[REAL] = [real[list(real.captions or ()).index(caption)] for caption in captions]
    corners = [busiest_square(image, crop_side(image)) for image in rows[REAL]]
    save_picture(paired_grid(rows, captions), folder / "study_samples.png")
    few = {label: images[:ENLARGED] for label, images in rows.items()}
    save_picture(zoomed_crops(few, captions[:ENLARGED], corners=corners[:ENLARGED]), folder / "study_crops.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="the study's folder, for pictures")
    args = parser.parse_args()
    found, page = compared(recorded()), DOCS / "results.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    overview(found, DOCS / "study_rows.png")
    gain_for_time(found, DOCS / "study_cost.png")
    if args.study:
        pictures(args.study, DOCS)


if __name__ == "__main__":
    main()
