"""Writes the results of run.py and floor.py to results.json, and to the tables and figures of docs/results.md.

    PYTHONPATH=. python examples/study/report.py

Each table replaces the text between its two marks in docs/results.md. Rows without results are marked "not run". The
text between the tables is written by hand: check it when a new row has been run.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image
from rows import BASE, ROW, ROWS, SETTINGS, without

from lpl.comparison.runs import training_seconds
from lpl.evaluation import ImageSet, Preprocessing, folder_images
from lpl.evaluation.figures import paired_grid, spectrum_figure, zoomed_crops
from lpl.evaluation.report import markdown_rows
from lpl.evaluation.results import REAL
from lpl.tools.pictures import label_axes, save_figure, save_picture


HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
NETWORK = "examples.study.features:load"
METRICS = {  # headings and formats of the tables' columns
    "fid": ("Fréchet ↓", "{:.2f}"),
    "kid": ("KID ↓", "{:.4f}"),
    "precision": ("precision ↑", "{:.3f}"),
    "recall": ("recall ↑", "{:.3f}"),
    "density": ("density ↑", "{:.3f}"),
    "coverage": ("coverage ↑", "{:.3f}"),
    "energy": ("high frequencies", "{:.4f}"),
}
COLUMNS = {
    "change": ("change of Fréchet", "{:+.1%}"),
    **METRICS,
    "lpl_share": ("LPL's share", "{:.1%}"),
    "steps": ("steps", "{:,.0f}"),
    "seconds": ("training, s", "{:.0f}"),
    "time": ("time of a step", "{:.2f}"),
}
TIMES = ("seconds", "time")
CHEAP_COLUMNS = {"change": COLUMNS["change"], "kept": ("of LPL's gain", "{:.0%}"), **COLUMNS}
BANDS = {"band_1": (0, 1 / 8), "band_2": (1 / 8, 1 / 4), "band_3": (1 / 4, 3 / 8), "band_4": (3 / 8, 1 / 2)}
SPECTRUM = {band: (f"{low:g} to {high:g}", "{:.2f}") for band, (low, high) in BANDS.items()}  # cycles per pixel
TABLES = ("objective", "weight", "statistics", "masks", "depth", "blocks", "threshold", "time", "cheap")
WHOLE = ("objective", "cheap")  # tables with rows without LPL of their own
WITHOUT, WITH = "flow", "flow_lpl"  # what every other table is compared with
PAIRS = ((WITHOUT, WITH), ("v", "v_lpl"), ("epsilon", "epsilon_lpl"))  # the first one with images is shown
SETS = {  # of floor.py
    "reference": "the reference",
    "training": "crops of the training part",
    "gaussian": "two samples of one Gaussian",
    "reconstructions": "the reference through the autoencoder",
}
HEADLINE = ("flow_lpl", "epsilon_lpl", "v_lpl", "flow_longer")  # the rows of README's picture
SHOWN = 10  # images in a row of the pictures

Runs = Mapping[str, Mapping[str, float]]  # seed -> column -> number


# Results -------------------------------------------------------------------------------------------------------------


def read_evaluation(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluation of a run, and its last result: that of the trained model."""
    evaluation = json.loads((folder / "evaluation/evaluation.json").read_text())
    return evaluation, evaluation["results"][-1]


def read_run(folder: Path) -> dict[str, float]:
    """The results of one seed of a row."""
    evaluation, result = read_evaluation(folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [record["lpl_share"] for record in records if record.get("lpl_share")]
    speeds = [record["images_per_second"] for record in records]
    return {
        **{name: estimate["value"] for name, estimate in result["metrics"][NETWORK].items()},
        "energy": result["high_frequency_energy"],
        **bands(*(spectra(evaluation)[name] for name in (drawn_name(evaluation), REAL))),
        "images": result["images"],
        "steps": records[-1]["step"],
        "seconds": training_seconds(records, SETTINGS["train_batch_size"]),
        "images_per_second": max(speeds),  # other jobs disturb the others
        "lpl_weight": records[-1]["lpl_weight"],
        **({"lpl_share": mean(shares)} if shares else {}),
    }


def spectra(evaluation: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frequencies (K,) and log10 of the power (K,), by name."""
    frequencies = np.array(evaluation["spectrum"]["frequencies"])
    return {name: (frequencies, np.array(power)) for name, power in evaluation["spectrum"]["log_power"].items()}


def drawn_name(evaluation: Mapping[str, Any]) -> str:
    """The name of the last spectrum that is not of real images."""
    return [name for name in evaluation["spectrum"]["log_power"] if name != REAL][-1]


def bands(spectrum: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Power relative to the real images' (geometric mean over the frequencies of each of BANDS)."""
    frequencies, difference = spectrum[0], spectrum[1] - real[1]
    inside = {band: (frequencies > low) & (frequencies <= high) for band, (low, high) in BANDS.items()}
    return {band: float(10 ** difference[places].mean()) for band, places in inside.items()}


def gather(study: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> seed -> numbers, for all finished runs; change and time are relative to the same seed without LPL."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ROWS:
        for folder in sorted((study / "rows" / name).glob("*/")):
            if (folder / "evaluation/evaluation.json").is_file():
                found.setdefault(name, {})[folder.name] = read_run(folder)
    for name, seeds in found.items():
        other = without(ROWS[name])
        for seed in seeds.keys() & found.get(other, {}).keys() if name != other else ():
            numbers, plain = seeds[seed], found[other][seed]
            numbers["change"] = numbers["fid"] / plain["fid"] - 1
            numbers["time"] = plain["images_per_second"] / numbers["images_per_second"]
    for name in (name for name in found if ROWS[name].table == "cheap"):
        plain = without(ROWS[name])
        lpl = plain.removesuffix("plain") + "lpl"
        for seed in set.intersection(*(set(found.get(row, {})) for row in (name, plain, lpl))):
            fid, best, least = (found[row][seed]["fid"] for row in (name, lpl, plain))
            if name not in (plain, lpl):
                found[name][seed]["kept"] = (least - fid) / (least - best)
    return found


def with_earlier(found: Mapping[str, Runs]) -> dict[str, Runs]:
    """Adds the results of other study folders from results.json, in which rows of one objective and seed were compared
    in the same way."""
    file = HERE / "results.json"
    earlier = json.loads(file.read_text())["rows"] if file.is_file() else {}
    names = [name for name in ROWS if name in found or name in earlier]
    return {name: dict(sorted((earlier.get(name, {}) | found.get(name, {})).items())) for name in names}


def gather_floor(study: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Set -> seed -> numbers, from floor.py."""
    sets = read_floor(study)["sets"]
    real = floor_spectrum(sets["reference"]["0"])
    return {
        name: {
            seed: {key: value for key, value in numbers.items() if key != "spectrum"}
            | (bands(floor_spectrum(numbers), real) if "spectrum" in numbers else {})
            for seed, numbers in seeds.items()
        }
        for name, seeds in sets.items()
    }


def read_floor(study: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: where floor.py has not been run.
    """
    file = study / "checks/floor.json"
    if not file.is_file():
        raise ValueError(f"{file} is not there: run examples/study/floor.py --study {study} first")
    return json.loads(file.read_text())


def floor_spectrum(numbers: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(numbers["spectrum"]["frequencies"]), np.array(numbers["spectrum"]["log_power"])


def gather_settings(study: Path) -> dict[str, Any]:
    """The conditions of training and measurement: flags, sampling, libraries, hardware."""
    evaluations = [
        read_evaluation(file.parents[1])
        for name in ROWS
        for file in sorted((study / "rows" / name).glob("*/evaluation/evaluation.json"))
    ]
    sampling = ("num_inference_steps", "guidance_scale", "resolution", "dtype")
    return {
        "settings": SETTINGS,
        "base": BASE,
        "row": ROW,
        "sampling": {name: one_of(result["drawn"][name] for _, result in evaluations) for name in sampling},
        "versions": {
            name: one_of(evaluation["versions"][name] for evaluation, _ in evaluations)
            for name in ("torch", "diffusers", "torchmetrics", "scikit-learn")
        },
        "hardware": read_floor(study)["hardware"],
    }


def one_of(values: Iterable[Any]) -> Any:
    """The common value, or the list of different values."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else different


# Tables --------------------------------------------------------------------------------------------------------------


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
    own = [name for name, row in ROWS.items() if row.table == kind]
    names = own if kind in WHOLE else [WITHOUT, WITH, *own]
    columns = CHEAP_COLUMNS if kind == "cheap" else COLUMNS
    lines = [["", *(heading for heading, _ in columns.values()), "seeds", "the paper", "row"]]
    for name in names:
        runs = found.get(name, {})
        label = {WITHOUT: "without LPL", WITH: "LPL, all defaults"}.get(name) if kind not in WHOLE else None
        shown = {key: column for key, column in columns.items() if ROWS[name].timed or key not in TIMES}
        here = dict(zip(shown, cells(runs, shown), strict=True)) if runs else {"change": "not run"}
        numbers = [here.get(key, "") for key in columns]
        lines.append([label or ROWS[name].label, *numbers, ", ".join(runs), ROWS[name].paper, f"`{name}`"])
    return f"{markdown_rows(lines)}\n\n`python examples/study/run.py --rows {' '.join(own)} --seeds 0 1 2`"


def floor_table(found: Mapping[str, Runs], floor: Mapping[str, Runs]) -> str:
    """Real images, the autoencoder alone, and the two rows."""
    labelled = {SETS[name]: floor[name] for name in SETS}
    labelled |= {ROWS[name].label: found[name] for name in (WITHOUT, WITH) if name in found}
    heading = ["", *(heading for heading, _ in METRICS.values())]
    return markdown_rows([heading, *([label, *cells(runs, METRICS)] for label, runs in labelled.items())])


def spectrum_table(found: Mapping[str, Runs], floor: Mapping[str, Runs]) -> str:
    """Power relative to the reference, for all finished rows."""
    labelled = {SETS[name]: floor[name] for name in ("training", "reconstructions")}
    labelled |= {f"`{name}`": found[name] for name in ROWS if name in found}
    heading = ["cycles per pixel", *(heading for heading, _ in SPECTRUM.values())]
    return markdown_rows([heading, *([label, *cells(runs, SPECTRUM)] for label, runs in labelled.items())])


def settings_line(settings: Mapping[str, Any]) -> str:
    sampling, versions = settings["sampling"], settings["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{settings['hardware']}; {libraries}; {sampling['num_inference_steps']} sampling steps, guidance "
        f"{sampling['guidance_scale']:g}. All flags are in [results.json](../examples/study/results.json)."
    )


def blocks(results: Mapping[str, Any]) -> dict[str, str]:
    """Mark -> text at that mark in docs/results.md."""
    found, floor = results["rows"], results["floor"]
    return {
        "settings": settings_line(results["settings"]),
        **{kind: table(kind, found) for kind in TABLES},
        "floor": floor_table(found, floor),
        "spectrum": spectrum_table(found, floor),
    }


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with all blocks inserted.

    Raises:
        ValueError: where a mark is missing.
    """
    for mark, text in blocks(results).items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no {begin} ... {end}")
        page = pattern.sub(lambda _, new=f"{begin}\n{text}\n{end}": new, page)
    return page


# Pictures ------------------------------------------------------------------------------------------------------------


def overview(found: Mapping[str, Runs], path: Path, rows: Iterable[str] = tuple(ROWS)) -> None:
    """Fréchet distances of rows relative to the same objective and seed without LPL, a point for each seed."""
    from matplotlib.figure import Figure

    values = {name: [run["change"] for run in runs.values() if "change" in run] for name, runs in found.items()}
    names = [name for name in reversed(ROWS) if name in rows and values.get(name)]
    figure = Figure(figsize=(8, 0.8 + 0.28 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        colour = "#555753" if ROWS[name].flags.get("lpl_weight") == "0" else "#c4601d"
        axes.plot(values[name], [place] * len(values[name]), "o", color=colour, markersize=5, alpha=0.6)
        axes.plot([mean(values[name])], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_yticks(range(len(names)), [ROWS[name].label for name in names])
    axes.axvline(0, color="#555753", linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_formatter("{x:+.0%}")
    label_axes(axes, "Change of the Fréchet distance, by seed (left is better)", "", "")
    save_figure(figure, path)


def measured_images(folder: Path) -> Path:
    """The images that a run's evaluation is about; drawn under other settings there may be others beside them.

    Raises:
        ValueError: where they are not there.
    """
    evaluation, result = read_evaluation(folder)
    drawn = result["drawn"] | {
        "seeds": [evaluation["settings"]["seed"] + number for number in range(result["images"])]
    }
    for file in sorted((folder / "evaluation/images").glob("*/settings.json")):
        settings = json.loads(file.read_text())
        if all(settings.get(name) == value for name, value in drawn.items()):
            return file.parent
    raise ValueError(f"{folder}: the images that were measured are not in evaluation/images")


def pictures(study: Path, found: Mapping[str, Runs], folder: Path) -> None:
    """The first seed's images without LPL and with it, and enlarged parts of them; of flow matching all seeds'
    spectra."""
    preprocessing = Preprocessing(SETTINGS["resolution"])
    there = [pair for pair in PAIRS if all(name in found for name in pair)]
    if not there:
        return
    names = dict(zip(("without LPL", "with LPL"), there[0], strict=True))
    without, with_lpl = there[0]
    seed = min(found[without].keys() & found[with_lpl].keys())
    sets = {
        label: folder_images(measured_images(study / "rows" / name / seed), preprocessing)
        for label, name in names.items()
    }
    real = folder_images(study / "data/reference/train", preprocessing)
    captions = sets["without LPL"].captions[:SHOWN]
    rows = {label: [images[number] for number in range(SHOWN)] for label, images in sets.items()}
    save_picture(paired_grid(rows | {REAL: of_the_same(captions, real)}, captions), folder / "study_samples.png")
    save_picture(zoomed_crops(rows, captions), folder / "study_crops.png")
    if (without, with_lpl) != (WITHOUT, WITH):
        return
    sets = read_floor(study)["sets"]
    shown = {label: mean_spectrum(study, name, found[name]) for label, name in names.items()}
    shown |= {"the autoencoder alone": floor_spectrum(sets["reconstructions"]["0"])}
    save_figure(
        spectrum_figure(shown | {REAL: floor_spectrum(sets["reference"]["0"])}, REAL), folder / "study_spectrum.png"
    )


def of_the_same(captions: Sequence[str], real: ImageSet) -> list[Image.Image]:
    """For each caption a real image with that caption, a different one each time."""
    places: dict[str, list[int]] = {}
    for place, caption in reversed(list(enumerate(real.captions))):
        places.setdefault(caption, []).append(place)
    return [real[places[caption].pop()] for caption in captions]


def mean_spectrum(study: Path, name: str, seeds: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The mean spectrum over the seeds of a row."""
    evaluations = [read_evaluation(study / "rows" / name / seed)[0] for seed in seeds]
    found = [spectra(evaluation)[drawn_name(evaluation)] for evaluation in evaluations]
    return found[0][0], np.mean([power for _, power in found], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"))
    parser.add_argument(
        "--add", action="store_true", help="add rows only: of a study of another autoencoder, with a floor of its own"
    )
    args = parser.parse_args()
    found = with_earlier(gather(args.study))
    if args.add:
        results = json.loads((HERE / "results.json").read_text()) | {"rows": found}
    else:
        results = {"settings": gather_settings(args.study), "floor": gather_floor(args.study), "rows": found}
    page = DOCS / "results.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    overview(found, DOCS / "study_rows.png")
    overview(found, DOCS / "study_headline.png", HEADLINE)
    if not args.add:
        pictures(args.study, gather(args.study), DOCS)


if __name__ == "__main__":
    main()
