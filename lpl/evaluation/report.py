"""What was found of images, for people: warnings, a table, pictures, a model card's metadata, evaluation.json."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from lpl.config.choices import CLIP_SCORE, METRICS, NEIGHBOUR_METRICS
from lpl.evaluation import metrics as measures
from lpl.evaluation.figures import metric_curves, paired_grid, spectrum_figure, zoomed_crops
from lpl.evaluation.images import ImageSet
from lpl.evaluation.metrics import SMALLER_IS_BETTER
from lpl.evaluation.networks import INCEPTION
from lpl.evaluation.results import HALVES, REAL, Reference, State
from lpl.publishing import card
from lpl.tools import privacy as public
from lpl.tools.files import write_text
from lpl.tools.pictures import save_figure, save_picture


COLUMNS, CROP_COLUMNS = 6, 4  # of samples.png and crops.png
ENERGY = "high-frequency energy"
TITLES = {"fid": "Fréchet distance", "kid": "kernel distance", CLIP_SCORE: "CLIPScore"}  # of metrics, else their names
INCEPTION_TITLES = {"fid": "FID", "kid": "KID"}
SETTINGS = ("metrics", "seed", "bootstrap", "nearest_k", "prompts_file")  # that are written down
SAMPLING = ("num_inference_steps", "guidance_scale", "max_sequence_length", "dtype")  # of a drawn state, in tables
LIBRARIES = ("torchmetrics", "scikit-learn", "scipy", "numpy", "pillow")  # beside those of lpl.hub


def all_warnings(results: Sequence[Mapping[str, Any]], reference: int) -> dict[str, list[str]]:
    """What has to be known to read the numbers: samples that are too small, or not alike; each with its details."""
    of_metrics: dict[str, list[str]] = {}  # what is said -> of which
    for result in results:
        for name, metrics in result["metrics"].items():
            for metric in metrics:
                for words in measures.warnings_for(metric, result["images"], reference, result["dims"][name]):
                    _, _, said = words.partition(": ")
                    of_metrics.setdefault(said, []).append(metric)
    found = {}
    if of_metrics:
        few = ", ".join(dict.fromkeys(metric for metrics in of_metrics.values() for metric in metrics))
        found[f"there are few images for {few}"] = [
            f"{', '.join(dict.fromkeys(metrics))}: {said}" for said, metrics in of_metrics.items()
        ]
    counts = {result["images"] for result in results}
    if len(counts) > 1:
        numbers = ", ".join(map(str, sorted(counts)))
        found[f"the sources have {numbers} images, and the Fréchet distance falls with their number"] = [
            "compare equal numbers, by --num_images"
        ]
    for name in SAMPLING:
        values = dict.fromkeys(result["drawn"].get(name) for result in results if result["drawn"])
        if len(values) > 1:
            found[f"the sources are sampled with unequal {name}: {', '.join(map(str, values))}"] = [f"give --{name}"]
    return found


# The pictures --------------------------------------------------------------------------------------------------------


def in_columns(images: ImageSet, captions: Sequence[str]) -> dict[int, int]:
    """Column -> number of the image that stands there: the one of that number where it bears the column's caption,
    else the first that does, if any. Images without captions stand in their own order."""
    own = images.captions
    if own is None:
        return {column: column for column in range(min(len(captions), len(images)))}
    first = {caption: number for number, caption in reversed(list(enumerate(own)))}
    return {
        column: column if own[column : column + 1] == [caption] else first[caption]
        for column, caption in enumerate(captions)
        if caption in first
    }


def draw_samples(shown: Sequence[State], reference: ImageSet, folder: Path) -> None:
    """samples.png and crops.png: columns of which all rows have an image. A source that would leave no column is left
    out; where no real images bear the captions, some others are shown."""
    captions = next((state.images.captions for state in shown if state.images.captions), None)
    captions = captions or [""] * min(len(state.images) for state in shown)
    columns, rows = list(range(len(captions))), {}
    for name, images in [*((state.name, state.images) for state in shown), (REAL, reference)]:
        numbers = in_columns(images, captions)
        alike = [column for column in columns if column in numbers]
        if alike and (images is not reference or images.captions):
            columns, rows[name] = alike, (images, numbers)
    columns = columns[:COLUMNS]
    pictures = {name: [images[numbers[column]] for column in columns] for name, (images, numbers) in rows.items()}
    if REAL not in pictures:
        places = [number * len(reference) // len(columns) for number in range(len(columns))]
        pictures[f"some {REAL}"] = [reference[place] for place in places]
    headings = [captions[column] for column in columns]
    save_picture(paired_grid(pictures, headings), folder / "samples.png")
    parts = {name: row[:CROP_COLUMNS] for name, row in pictures.items()}
    save_picture(zoomed_crops(parts, headings[:CROP_COLUMNS], apart=list(parts)[-1]), folder / "crops.png")


def draw_curves(evaluation: Mapping[str, Any], folder: Path) -> None:
    """curves.png, if there is a series."""
    counts = [result["label"] for result in evaluation["results"] if result["step"] is not None]
    if not any(counts.count(label) > 1 for label in counts):
        return
    names = short_names(evaluation)
    better: dict[str, str] = {}

    def panels(found: Mapping[str, Any]) -> dict[str, Any]:
        panels = {}
        for network, metrics in found.items():
            for metric, estimate in metrics.items():
                name = title(metric, network) + (f", {names[network]}" if len(names) > 1 else "")
                panels[name], better[name] = estimate, "lower" if metric in SMALLER_IS_BETTER else "higher"
        return panels

    lines = [
        {
            "label": result["label"],
            "step": result["step"],
            "metrics": panels(result["metrics"]) | {ENERGY: result["high_frequency_energy"]},
        }
        for result in evaluation["results"]
    ]
    real = evaluation["reference"]
    lines.append({"label": REAL, "step": None, "metrics": {ENERGY: real["high_frequency_energy"]}})
    lines.append({"label": HALVES, "step": None, "metrics": panels(real["halves"])})
    save_figure(metric_curves(lines, better, REAL), folder / "curves.png")


# The table -----------------------------------------------------------------------------------------------------------


def title(metric: str, network: str) -> str:
    """What a metric is called through a network: only Inception's is FID.

    >>> title("fid", "inception"), title("fid", "facebook/dinov2-base")
    ('FID', 'Fréchet distance')
    """
    titles = TITLES | INCEPTION_TITLES if network == INCEPTION else TITLES
    return titles.get(metric, metric)


def short_names(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What the networks are called in tables: the last part of the name, or all of it where two would be called alike.
    A resumed run may have results of networks that it no longer uses.

    >>> short_names({"networks": {"org/dinov2": {}, "org/clip": {}, "other/dinov2": {}}})
    {'org/dinov2': 'org/dinov2', 'org/clip': 'clip', 'other/dinov2': 'other/dinov2'}
    """
    earlier = (name for result in evaluation.get("results", ()) for name in result["metrics"])
    last = {name: name.rstrip("/").rpartition("/")[2] for name in (*evaluation["networks"], *earlier)}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of words, the heading first: one per state and network, then differences, then real images."""
    results, reference, names = evaluation["results"], evaluation["reference"], short_names(evaluation)
    used = [metric for metric in METRICS if any(metric in found for r in results for found in r["metrics"].values())]
    alone = {network for result in results for network in result["metrics"]} == {INCEPTION}
    arrows = {name: "↓" if name in SMALLER_IS_BETTER else "↑" for name in used}
    headings = [f"{title(name, INCEPTION if alone else '')} {arrow}" for name, arrow in arrows.items()]
    rows = [["source", "step", "images", "features", *headings, ENERGY]]

    def add(label: str, step: int | None, images: int, energy: float | None, found: Mapping[str, Any], sign: str = ""):
        for number, (network, metrics) in enumerate((found or {"": {}}).items()):
            cells = [shown_estimate(metrics[name], sign) if name in metrics else "" for name in used]
            words = "" if number or energy is None else f"{energy:.4f}"
            features = names.get(network, "")
            rows.append([label, "" if step is None else str(step), str(images), features, *cells, words])

    for result in results:
        energy = result["high_frequency_energy"]
        add(result["label"], result["step"], result["images"], energy, result["metrics"])
    for result in results:
        if difference := result["differences"]:
            label = f"{result['label']} minus {difference['to']}"
            add(label, result["step"], result["images"], None, difference["metrics"], "+")
    add(REAL, None, reference["images"], reference["high_frequency_energy"], {})
    if any(reference["halves"].values()):
        add(HALVES, None, reference["images"] // 2, None, reference["halves"])
    return rows


def shown_estimate(estimate: Mapping[str, float | None], sign: str = "") -> str:
    """The value and, where there is one, its spread.

    >>> shown_estimate({"value": 12.3456, "spread": None})
    '12.35'
    >>> shown_estimate({"value": 0.00123456, "spread": 0.000123}, "+")
    '+0.001235 ± 0.00012'
    """
    spread = "" if estimate["spread"] is None else f" ± {estimate['spread']:.2g}"
    return f"{estimate['value']:{sign}.4g}{spread}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows)


def markdown(evaluation: Mapping[str, Any]) -> str:
    """evaluation.md."""
    lines = ["# Evaluation", "", markdown_table(evaluation), "", *notes(evaluation)]
    for words, details in evaluation["warnings"].items():
        lines += [f"- Warning: {words}:", *(f"  - {detail}" for detail in details)]
    return "\n".join([*lines, "", f"```bash\n{evaluation['command']}\n```", ""])


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What the table does not say, a line of Markdown each."""
    reference, settings = evaluation["reference"], evaluation["settings"]
    preprocessing = reference["preprocessing"]
    found = [
        f"Reference: {reference['images']} images at {preprocessing['resolution']} px (central square, "
        f"{preprocessing['interpolation']}){_enlarged(reference)}.",
        "Fréchet and kernel distances through a network other than Inception do not compare to published FID and KID.",
    ]
    if any(reference["halves"].values()):
        found.append(
            f"{HALVES.capitalize()}: one half against the other shows what no difference looks like, at half as many "
            "images; of all of them the Fréchet distance would be about half as large."
        )
    found.append(f"{ENERGY.capitalize()}: share of the energy above half of the Nyquist frequency.")
    for result in evaluation["results"]:
        drawn = {name: (result["drawn"] or {}).get(name) for name in SAMPLING}
        said = ", ".join(f"{name} {value}" for name, value in drawn.items() if value is not None)
        found += [f"{result['label']}: {said or 'a folder'}{_enlarged(result)}."]
    if settings["bootstrap"]:
        found.append(
            f"±: spread under resampling at this number of images, a standard deviation over {settings['bootstrap']} "
            "resamples; no interval around the distance to infinitely many. Differences are resampled in pairs."
        )
    return [f"- {note}" for note in dict.fromkeys(found)]


def _enlarged(found: Mapping[str, Any]) -> str:
    return f"; {found['enlarged']} are enlarged, which blurs them" if found["enlarged"] else ""


def markdown_table(evaluation: Mapping[str, Any]) -> str:
    heading, *rows = [[word.replace("|", r"\|") for word in row] for row in table(evaluation)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def model_index(evaluation: Mapping[str, Any], model_name: str, dataset_name: str) -> list[EvalResult]:
    """What the model card's metadata says of a model: the numbers of its last state.

    Args:
        evaluation: the content of evaluation.json.
        model_name: the label of the source that the card is for.
        dataset_name: of the reference.

    Raises:
        ValueError: where no source has that label.
    """
    found = [result for result in evaluation["results"] if result["label"] == model_name]
    if not found:
        labels = ", ".join(dict.fromkeys(result["label"] for result in evaluation["results"]))
        raise ValueError(f"no result is labelled {model_name!r}; there are {labels}")
    result, settings, reference, names = (
        found[-1],
        evaluation["settings"],
        evaluation["reference"],
        short_names(evaluation),
    )
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="imagefolder",
            dataset_name=dataset_name,
            dataset_config=dataset_name,  # without it, a card gives all results of one type to one data set
            metric_type=title(metric, network).lower().replace("é", "e").replace(" ", "_"),
            metric_name=f"{title(metric, network)} ({names[network]})",
            metric_value=estimate["value"],
            metric_args={
                "features": names[network],
                "generated_images": result["images"],
                "reference_images": reference["images"],
                **{name: result["drawn"][name] for name in SAMPLING if name in (result["drawn"] or {})},
                **reference["preprocessing"],
                **({} if estimate["spread"] is None else {"spread_under_resampling": estimate["spread"]}),
                **({"nearest_k": settings["nearest_k"]} if metric in NEIGHBOUR_METRICS else {}),
            },
        )
        for network, metrics in result["metrics"].items()
        for metric, estimate in metrics.items()
    ]


def on_card(evaluation: Mapping[str, Any], label: str) -> tuple[list[EvalResult], str]:
    """What a model card says of an evaluation: its metadata, and its text under a heading that names the reference.

    Args:
        label: of the source that the card is for.
    """
    name = Path(evaluation["reference"]["folder"]).resolve().name
    warned = [f"- Warning: {words}." for words in evaluation["warnings"]]
    lines = [
        f"### Against the real images of `{name}`",
        "",
        markdown_table(evaluation),
        "",
        *notes(evaluation),
        *warned,
    ]
    return model_index(evaluation, label, name), "\n".join(lines)


# All of it -----------------------------------------------------------------------------------------------------------


def summary(
    results: Sequence[Mapping[str, Any]], shown: Sequence[State], reference: Reference, settings: Namespace
) -> dict[str, Any]:
    """The evaluation, as JSON takes it.

    Args:
        shown: the states whose spectra are in it.
        settings: as of the reference, and ``reference``, ``prompts_file`` and ``words``, those of the command.
    """
    dims = {name: dim for result in results for name, dim in result["dims"].items()}
    return {
        "results": list(results),
        "reference": {
            "folder": settings.reference,
            "images": len(reference.images),
            "enlarged": reference.images.enlarged,
            "preprocessing": asdict(reference.images.preprocessing),
            "high_frequency_energy": reference.spectrum.high_frequency_energy,
            "halves": reference.halves,
        },
        "networks": {
            name: {"fingerprint": network.fingerprint, "dim": dims[name], "preprocessing": network.preprocessing}
            for name, network in reference.networks.items()
        },
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "spectrum": {
            "frequencies": reference.spectrum.frequencies.tolist(),
            "log_power": {state.name: state.spectrum.log_power.tolist() for state in shown}
            | {REAL: reference.spectrum.log_power.tolist()},
        },
        "warnings": all_warnings(results, len(reference.images)),
        "versions": card.installed_versions() | {name: metadata.version(name) for name in LIBRARIES},
        "command": command(settings.words),
    }


def command(words: Sequence[str]) -> str:
    """One line for a shell, without tokens and passwords."""
    return public.without_secrets(shlex.join(words))


def write_evaluation(
    evaluation: Mapping[str, Any], shown: Sequence[State], reference: ImageSet, folder: str | Path
) -> None:
    """evaluation.json, evaluation.md and the pictures, into a folder.

    Args:
        shown: the states whose images are in the pictures, those whose spectra are in the evaluation.
    """
    folder = Path(folder)
    write_text(folder / "evaluation.json", json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "evaluation.md", markdown(evaluation))
    frequencies, powers = (evaluation["spectrum"][name] for name in ("frequencies", "log_power"))
    spectra = {name: (np.array(frequencies), np.array(power)) for name, power in powers.items()}
    save_figure(spectrum_figure(spectra, REAL), folder / "spectrum.png")
    draw_samples(shown, reference, folder)
    draw_curves(evaluation, folder)
