"""Writes results: evaluation.json, warnings, a table, pictures, and text and metadata for a model card."""

from __future__ import annotations

import json
import shlex
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
from lpl.tools.files import write_text
from lpl.tools.layout import EVALUATION_FILE, EVALUATION_TABLE
from lpl.tools.pictures import save_figure, save_picture
from lpl.tools.privacy import without_secrets
from lpl.training.provenance import installed_versions


COLUMNS, CROP_COLUMNS = 6, 4  # of samples.png and crops.png
ENERGY = "high-frequency energy"
# Of metrics; others go by their names.
TITLES = {"fid": "Fréchet distance", "kid": "kernel distance", CLIP_SCORE: "CLIPScore"}
INCEPTION_TITLES = {"fid": "FID", "kid": "KID"}
RECORDED = ("metrics", "seed", "bootstrap", "nearest_k", "prompts_file")  # settings in evaluation.json
SAMPLING = ("num_inference_steps", "guidance_scale", "max_sequence_length", "dtype")  # of a drawn state, in tables
LIBRARIES = ("torchmetrics", "scikit-learn", "scipy", "numpy", "pillow")  # besides those of installed_versions


def all_warnings(results: Sequence[Mapping[str, Any]], reference: int) -> dict[str, list[str]]:
    """Warnings that are needed to read the numbers, each with its details: few images, or unlike sources."""
    of_metrics: dict[str, list[str]] = {}  # sentence -> metrics
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
    """Column -> number of its image: the same number if that image has the column's caption, else the first image that
    does, if any. Images without captions keep their order."""
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
    """samples.png and crops.png, with the columns that have an image in every row. A source that would leave no column
    is left out; if no real image has one of the captions, other real images are shown."""
    captions = next((state.pictures.captions for state in shown if state.pictures.captions), None)
    captions = captions or [""] * min(len(state.pictures) for state in shown)
    columns, rows = list(range(len(captions))), {}
    for name, images in [*((state.name, state.pictures) for state in shown), (REAL, reference)]:
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
    """curves.png, if the evaluation has a series; else none is left from an earlier one."""
    file = folder / "curves.png"
    counts = [result["label"] for result in evaluation["results"] if result["step"] is not None]
    if not any(counts.count(label) > 1 for label in counts):
        file.unlink(missing_ok=True)
        return
    names, real = short_names(evaluation), evaluation["reference"]
    lines = [
        {
            "label": result["label"],
            "step": result["step"],
            "metrics": _panels(result["metrics"], names) | {ENERGY: result["high_frequency_energy"]},
        }
        for result in evaluation["results"]
    ]
    lines.append({"label": REAL, "step": None, "metrics": {ENERGY: real["high_frequency_energy"]}})
    lines.append({"label": HALVES, "step": None, "metrics": _panels(real["halves"], names)})
    better = {
        _panel(metric, network, names): "lower" if metric in SMALLER_IS_BETTER else "higher"
        for found in (*(result["metrics"] for result in evaluation["results"]), real["halves"])
        for network, metrics in found.items()
        for metric in metrics
    }
    save_figure(metric_curves(lines, better, REAL), file)


def _panels(found: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Estimates by the title of their panel."""
    return {
        _panel(metric, network, names): estimate
        for network, metrics in found.items()
        for metric, estimate in metrics.items()
    }


def _panel(metric: str, network: str, names: Mapping[str, str]) -> str:
    """The title of a panel; names the network if there are several."""
    return title(metric, network) + (f", {names[network]}" if len(names) > 1 else "")


# The table -----------------------------------------------------------------------------------------------------------


def title(metric: str, network: str) -> str:
    """The name of a metric through a network; only that of Inception is FID.

    >>> title("fid", "inception"), title("fid", "facebook/dinov2-base")
    ('FID', 'Fréchet distance')
    """
    titles = TITLES | INCEPTION_TITLES if network == INCEPTION else TITLES
    return titles.get(metric, metric)


def short_names(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Names of the networks in tables: the last part of the name, or all of it if two end alike. A resumed run may
    have results of networks that it no longer uses.

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
    for result in results:
        start = [result["label"], _step(result), str(result["images"])]
        rows += _rows(start, result["metrics"], result["high_frequency_energy"], used, names)
    for result in results:
        if difference := result["differences"]:
            start = [f"{result['label']} minus {difference['to']}", _step(result), str(result["images"])]
            rows += _rows(start, difference["metrics"], None, used, names, "+")
    rows += _rows([REAL, "", str(reference["images"])], {}, reference["high_frequency_energy"], used, names)
    if any(reference["halves"].values()):
        rows += _rows([HALVES, "", str(reference["images"] // 2)], reference["halves"], None, used, names)
    return rows


def _step(result: Mapping[str, Any]) -> str:
    return "" if result["step"] is None else str(result["step"])


def _rows(
    start: list[str],
    found: Mapping[str, Any],
    energy: float | None,
    used: Sequence[str],
    names: Mapping[str, str],
    sign: str = "",
) -> list[list[str]]:
    """A row for each network, or one without metrics; the first one has the energy."""
    rows = []
    for number, (network, metrics) in enumerate((found or {"": {}}).items()):
        cells = [shown_estimate(metrics[name], sign) if name in metrics else "" for name in used]
        words = "" if number or energy is None else f"{energy:.4f}"
        rows.append([*start, names.get(network, ""), *cells, words])
    return rows


def shown_estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    """The value, with its spread if there is one.

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
    lines = ["# Evaluation", "", markdown_rows(table(evaluation)), "", *notes(evaluation)]
    for words, details in evaluation["warnings"].items():
        lines += [f"- Warning: {words}:", *(f"  - {detail}" for detail in details)]
    return "\n".join([*lines, "", f"```bash\n{evaluation['command']}\n```", ""])


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What the table leaves out, a line of Markdown each."""
    reference, settings = evaluation["reference"], evaluation["settings"]
    preprocessing = reference["preprocessing"]
    found = [
        f"Reference: {reference['images']} images at {preprocessing['resolution']} px (central square, "
        f"{preprocessing['interpolation']}){_enlarged(reference)}.",
        "Fréchet and kernel distances through a network other than Inception do not compare to published FID and KID.",
    ]
    if any(reference["halves"].values()):
        found.append(
            f"{HALVES.capitalize()}: one half against the other shows the numbers of equal distributions, at half as "
            "many images; at the full number the Fréchet distance would be about half as large."
        )
    found.append(f"{ENERGY.capitalize()}: share of the energy above half of the Nyquist frequency.")
    for result in evaluation["results"]:
        drawn = {name: (result["drawn"] or {}).get(name) for name in SAMPLING}
        said = ", ".join(f"{name} {value}" for name, value in drawn.items() if value is not None)
        found += [f"{result['label']}: {said or 'a folder'}{_enlarged(result)}."]
    if settings["bootstrap"]:
        found.append(
            f"±: spread under resampling at this number of images, a standard deviation over {settings['bootstrap']} "
            "resamples; not a confidence interval of the limit for many images. Differences are resampled in pairs."
        )
    return [f"- {note}" for note in dict.fromkeys(found)]


def _enlarged(found: Mapping[str, Any]) -> str:
    return f"; {found['enlarged']} are enlarged, which blurs them" if found["enlarged"] else ""


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the heading is the first row."""
    heading, *others = [[word.replace("|", r"\|") for word in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *others))


def model_index(evaluation: Mapping[str, Any], model_name: str, dataset_name: str) -> list[EvalResult]:
    """Metadata for the model card: the numbers of the model's last state.

    Args:
        evaluation: the content of evaluation.json.
        model_name: the label of the card's source.
        dataset_name: of the reference.

    Raises:
        ValueError: if no source has that label.
    """
    found = [result for result in evaluation["results"] if result["label"] == model_name]
    if not found:
        labels = ", ".join(dict.fromkeys(result["label"] for result in evaluation["results"]))
        raise ValueError(f"no result is labelled {model_name!r}; the labels are {labels}")
    result, names = found[-1], short_names(evaluation)
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="imagefolder",
            dataset_name=dataset_name,
            dataset_config=dataset_name,  # without it, a card merges all results of one type
            metric_type=title(metric, network).lower().replace("é", "e").replace(" ", "_"),
            metric_name=f"{title(metric, network)} ({names[network]})",
            metric_value=estimate["value"],
            metric_args={
                "features": names[network],
                "generated_images": result["images"],
                "reference_images": evaluation["reference"]["images"],
                **{name: result["drawn"][name] for name in SAMPLING if name in (result["drawn"] or {})},
                **evaluation["reference"]["preprocessing"],
                **({} if estimate["spread"] is None else {"spread_under_resampling": estimate["spread"]}),
                **({"nearest_k": evaluation["settings"]["nearest_k"]} if metric in NEIGHBOUR_METRICS else {}),
            },
        )
        for network, metrics in result["metrics"].items()
        for metric, estimate in metrics.items()
    ]


def on_card(evaluation: Mapping[str, Any], label: str) -> tuple[list[EvalResult], str]:
    """Metadata and text of an evaluation for a model card; the text's heading names the reference.

    Args:
        label: of the card's source.
    """
    name = Path(evaluation["reference"]["folder"]).resolve().name
    warned = [f"- Warning: {words}." for words in evaluation["warnings"]]
    lines = [
        f"### Against the real images of `{name}`",
        "",
        markdown_rows(table(evaluation)),
        "",
        *notes(evaluation),
        *warned,
    ]
    return model_index(evaluation, label, name), "\n".join(lines)


# The whole -----------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Mapping[str, Any]], shown: Sequence[State], reference: Reference) -> dict[str, Any]:
    """The evaluation, in types of JSON.

    Args:
        shown: the states whose spectra are in it.
    """
    settings = reference.settings
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
        "settings": {name: getattr(settings, name) for name in RECORDED} | {"metrics": list(settings.metrics)},
        "spectrum": {
            "frequencies": reference.spectrum.frequencies.tolist(),
            "log_power": {state.name: state.power.log_power.tolist() for state in shown}
            | {REAL: reference.spectrum.log_power.tolist()},
        },
        "warnings": all_warnings(results, len(reference.images)),
        "versions": installed_versions() | {name: metadata.version(name) for name in LIBRARIES},
        "command": command(settings.words),
    }


def command(words: Sequence[str]) -> str:
    """One line for a shell, without tokens and passwords."""
    return without_secrets(shlex.join(words))


def write_evaluation(
    evaluation: Mapping[str, Any], shown: Sequence[State], reference: ImageSet, folder: str | Path
) -> None:
    """Write evaluation.json, evaluation.md and the pictures into a folder.

    Args:
        shown: the states whose images are in the pictures; the same as those of :func:`summary`.
    """
    folder = Path(folder)
    write_text(folder / EVALUATION_FILE, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / EVALUATION_TABLE, markdown(evaluation))
    frequencies, powers = (evaluation["spectrum"][name] for name in ("frequencies", "log_power"))
    spectra = {name: (np.array(frequencies), np.array(power)) for name, power in powers.items()}
    save_figure(spectrum_figure(spectra, REAL), folder / "spectrum.png")
    draw_samples(shown, reference, folder)
    draw_curves(evaluation, folder)
