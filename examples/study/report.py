"""Gathers what run.py has measured into results.json, the tables of docs/results.md, and its pictures.

    PYTHONPATH=. python examples/study/report.py

Each table takes the place of what stands between its two marks in docs/results.md. Rows that were not run say so.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean, median, stdev

from rows import ROW, ROWS

from lpl.evaluation import Preprocessing, folder_images, log_power_spectrum
from lpl.evaluation.figures import paired_grid, spectrum_figure, zoomed_crops
from lpl.pictures import label_axes, save_figure, save_picture


HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
NETWORK = "examples.study.features:load"
COLUMNS = {  # of the tables: heading and format
    "fid": ("Fréchet ↓", "{:.2f}"),
    "kid": ("KID ↓", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "density": ("density", "{:.3f}"),
    "coverage": ("coverage ↑", "{:.3f}"),
    "energy": ("high frequencies", "{:.4f}"),
    "lpl_share": ("LPL's share", "{:.0%}"),
    "time": ("time of a step", "{:.2f}"),
}
TABLES = ("objective", "weight", "statistics", "masks", "depth", "blocks", "threshold", "time")
WITHOUT, WITH = "flow", "flow_lpl"  # what every other table is compared with
SHOWN = 10  # images in a row of the pictures


def read_run(folder: Path) -> dict[str, float]:
    """What one seed of a row has given."""
    evaluation = json.loads((folder / "evaluation/evaluation.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (result,) = evaluation["results"]
    shares = [record["lpl_share"] for record in records if record.get("lpl_share")]
    return {
        **{name: estimate["value"] for name, estimate in result["metrics"][NETWORK].items()},
        "energy": result["high_frequency_energy"],
        "images": result["images"],
        "steps": records[-1]["step"],
        "images_per_second": median(record["images_per_second"] for record in records),
        "lpl_weight": records[-1]["lpl_weight"],
        **({"lpl_share": mean(shares)} if shares else {}),
    }


def gather(study: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> seed -> numbers, of all that is there; a step's time is relative to the same seed without LPL."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ROWS:
        for folder in sorted((study / "rows" / name).glob("*/")):
            if (folder / "evaluation/evaluation.json").is_file():
                found.setdefault(name, {})[folder.name] = read_run(folder)
    for name, seeds in found.items():
        plain = found.get(
            {"flow_matching": "flow", "epsilon": "epsilon", "v_prediction": "v"}[ROWS[name].objective], {}
        )
        for seed, numbers in seeds.items():
            if seed in plain:
                numbers["time"] = plain[seed]["images_per_second"] / numbers["images_per_second"]
    return found


def cell(name: str, values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    form = COLUMNS[name][1]
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 and name not in ("lpl_share", "time") else ""
    return form.format(mean(values)) + spread


def table(kind: str, found: dict[str, dict[str, dict[str, float]]]) -> str:
    names = [name for name, row in ROWS.items() if row.table == kind]
    if kind != "objective":
        names = [WITHOUT, WITH, *names]
    lines = [["", *(heading for heading, _ in COLUMNS.values()), "seeds", "the paper", "row"]]
    for name in names:
        seeds = list(found.get(name, {}).values())
        columns = [cell(column, [run[column] for run in seeds if column in run]) for column in COLUMNS]
        label = {WITHOUT: "without LPL", WITH: "LPL, all defaults"}.get(name) if kind != "objective" else None
        if not seeds:
            columns[0] = "not run"
        lines.append([label or ROWS[name].label, *columns, str(len(seeds) or ""), ROWS[name].paper, f"`{name}`"])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def overview(found: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """The Fréchet distance of each row, a point for each seed."""
    from matplotlib.figure import Figure

    names = [name for name in ROWS if name in found]
    figure = Figure(figsize=(8, 0.6 + 0.28 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(reversed(names)):
        values = [run["fid"] for run in found[name].values()]
        colour = "#555753" if ROWS[name].flags.get("lpl_weight") == "0" else "#c4601d"
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.6)
        axes.plot([mean(values)], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names)), [ROWS[name].label for name in reversed(names)])
    if WITHOUT in found:
        level = mean(run["fid"] for run in found[WITHOUT].values())
        axes.axvline(level, color="#555753", linewidth=0.8, linestyle=":")
    label_axes(axes, "Fréchet distance on the study's features, by seed (lower is better)", "", "")
    save_figure(figure, path)


def pictures(study: Path, folder: Path) -> None:
    """The same seeds without LPL and with it, enlarged parts of them, and their spectra."""
    preprocessing = Preprocessing(64)
    sets = {
        label: folder_images(next((study / "rows" / name / "0/evaluation/images").glob("*/")), preprocessing)
        for label, name in (("without LPL", WITHOUT), ("with LPL", WITH))
    }
    real = folder_images(study / "data/reference/train", preprocessing)
    captions = sets["without LPL"].captions[:SHOWN]
    rows = {label: [images[number] for number in range(SHOWN)] for label, images in sets.items()}
    same = {"real images": [real[real.captions.index(caption)] for caption in captions]}
    save_picture(paired_grid(rows | same, captions), folder / "study_samples.png")
    save_picture(zoomed_crops(rows, captions), folder / "study_crops.png")
    spectra = {label: log_power_spectrum(images) for label, images in {**sets, "real images": real}.items()}
    save_figure(spectrum_figure(spectra, "real images"), folder / "study_spectrum.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"))
    args = parser.parse_args()
    found = gather(args.study)
    (HERE / "results.json").write_text(json.dumps({"settings": ROW, "rows": found}, indent=1) + "\n")
    page = DOCS / "results.md"
    text = page.read_text(encoding="utf-8")
    for kind in TABLES:
        marks = f"<!-- {kind} -->", f"<!-- end of {kind} -->"
        pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no {marks[0]} ... {marks[1]}")
        text = pattern.sub(lambda _, kind=kind, marks=marks: f"{marks[0]}\n{table(kind, found)}\n{marks[1]}", text)
    page.write_text(text, encoding="utf-8")
    overview(found, DOCS / "study_rows.png")
    if all(list((args.study / "rows" / name / "0/evaluation/images").glob("*/")) for name in (WITHOUT, WITH)):
        pictures(args.study, DOCS)


if __name__ == "__main__":
    main()
