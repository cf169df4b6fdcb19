"""What is found of images and how it is written: numbers, warnings, a table, pictures, a model card's metadata.

A *state* is where a set of images comes from: a folder, a pipeline, or one step of a training. A *result* is what is
found of it; its *set metrics* compare the images with the *reference*, real ones, through one feature network each,
CLIPScore compares them with their captions. An *evaluation* is the results and all that has to be known to read them:
the content of evaluation.json.

Two parts of the work are for several processes at once: features are computed in parts (:func:`measure`), all else by
the main process.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult
from PIL import Image

from lpl import hub
from lpl.data import image_files
from lpl.evaluation import CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.evaluation import metrics as measures
from lpl.evaluation.figures import metric_curves, paired_grid, spectrum_figure, zoomed_crops
from lpl.evaluation.generation import Model, processes
from lpl.evaluation.images import ImageSet
from lpl.evaluation.metrics import SMALLER_IS_BETTER
from lpl.evaluation.networks import INCEPTION, set_features
from lpl.evaluation.spectrum import high_frequency_energy, log_power_spectrum
from lpl.families import Family
from lpl.families.dit import NULL_CLASS
from lpl.files import write_text
from lpl.pictures import PAPER, save_figure, save_picture


COLUMNS, CROP_COLUMNS = 6, 4  # of samples.png and crops.png
REAL = "real images"
ENERGY = "high-frequency energy"
TITLES = {"fid": "Fréchet distance", "kid": "kernel distance", CLIP_SCORE: "CLIPScore"}  # of metrics, else their names
INCEPTION_TITLES = {"fid": "FID", "kid": "KID"}
SETTINGS = ("metrics", "seed", "bootstrap", "neighbours", "prompts")  # that are written down
SAMPLING = ("num_inference_steps", "guidance_scale", "max_sequence_length")  # of a drawn state, that tables name
LIBRARIES = ("torchmetrics", "prdc", "scipy", "numpy", "pillow")  # beside those of lpl.hub


@dataclass
class State:
    """Where a set of images comes from, and the images once they are there."""

    label: str  # of the source
    source: str  # as the user gave it
    step: int | None = None  # of a training
    images: ImageSet | None = None
    drawn: Mapping[str, Any] | None = None  # the settings that the images were drawn with
    model: Model | None = None  # what draws them; None: a folder, or a model in training

    @property
    def name(self) -> str:
        """The label, with the step where there is one."""
        return self.label if self.step is None else f"{self.label}, step {self.step}"


# What is drawn -------------------------------------------------------------------------------------------------------


def prompts_of(
    reference: ImageSet, folder: str, family: type[Family], names: Mapping[int, str], flag: str, seed: int = 0
) -> list[str] | list[int]:
    """What models are asked for to draw images like the reference's, shuffled, so that the first are of all kinds.

    Of a class-conditional family they are labels: of the captions, else of the reference's sub-folders, else all.

    Args:
        folder: of the reference.
        names: of the classes, by label.
        flag: that names the folder, for refusals.

    Raises:
        ValueError: where the reference has no captions, or they are no classes.
    """
    where = f"{flag} {folder}"
    pool: list[Any] = list(reference.captions or ())
    if family.class_conditional:
        pool = class_labels(family, pool, names, where) if pool else _folder_labels(folder, names)
        pool = pool or list(range(NULL_CLASS))
    elif not pool:
        raise ValueError(f"{where}: it has no captions to draw from; put a metadata.jsonl beside the images")
    return [pool[index] for index in np.random.default_rng(seed).permutation(len(pool))]


def class_labels(family: type[Family], words: Sequence[str], names: Mapping[int, str], where: str) -> list[int]:
    """The labels that classes' names or numbers stand for.

    Raises:
        ValueError: where one is neither.
    """
    try:
        return [family.class_label(word, names) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('--validation_prompts ')}") from error


def _folder_labels(folder: str, names: Mapping[int, str]) -> list[int]:
    """Each image's class, by its sub-folder: the class that the model knows by that name, or where it does not know
    them all, the sub-folder's place among all, as in training. None where there are no sub-folders."""
    parents = [file.parent.name for file in sorted(image_files(folder)) if file.parent != Path(folder)]
    classes = sorted(set(parents))
    if len(classes) < 2:
        return []
    known = {name: label for label, all_ in names.items() for name in (all_, *map(str.strip, all_.split(",")))}
    places = known if set(classes) <= known.keys() else {name: place for place, name in enumerate(classes)}
    return [places[parent] for parent in parents]


# What is measured ----------------------------------------------------------------------------------------------------


def measure(
    states: Sequence[State], reference: ImageSet, networks: Mapping[str, Any], settings: Namespace
) -> list[dict[str, Any]]:
    """The results, in the order of the states; every process has to call this, and only the main one gets numbers.

    Args:
        networks: loaded, by the names in ``settings``.
        settings: ``metrics``, ``features``, ``clip``, ``batch_size``, ``bootstrap``, ``seed`` and ``neighbours``, as
            the flags of lpl.evaluate have them.
    """
    main = processes().is_main_process
    embedding = {"batch_size": settings.batch_size, "progress": main}
    results: list[dict[str, Any]] = [
        {
            "label": state.label,
            "step": state.step,
            "source": state.source,
            "images": len(state.images),
            "drawn": state.drawn,
            "metrics": {},
        }
        for state in states
    ]
    wanted = [name for name in settings.metrics if name in SET_METRICS]
    for name in settings.features if wanted else ():
        real = set_features(reference, networks[name], **embedding)
        for state, result in zip(states, results):
            features = set_features(state.images, networks[name], **embedding)
            if main:
                found = measures.compare(
                    features, real, wanted, settings.bootstrap, settings.seed, settings.neighbours, progress=True
                )
                result["metrics"][name] = {metric: asdict(estimate) for metric, estimate in found.items()}
    if CLIP_SCORE in settings.metrics:
        for state, result in zip(states, results):
            features = set_features(state.images, networks[settings.clip], **embedding)
            if main:
                captions = networks[settings.clip].text_features(state.images.captions).numpy()
                found = measures.clip_score(features, captions, settings.bootstrap, settings.seed)
                result["metrics"].setdefault(settings.clip, {})[CLIP_SCORE] = asdict(found)
    if main:
        for state, result in zip(states, results):
            result["high_frequency_energy"] = high_frequency_energy(state.images)
    return results


def all_warnings(results: Sequence[Mapping[str, Any]], reference: int, networks: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the numbers: samples that are too small, or not alike."""
    of_metrics: dict[str, list[str]] = {}  # what is said -> of which
    for result in results:
        for name, metrics in result["metrics"].items():
            for metric in metrics:
                for words in measures.warnings_for(metric, result["images"], reference, networks[name].dim):
                    _, _, said = words.partition(": ")
                    of_metrics.setdefault(said, []).append(metric)
    found = [f"{', '.join(dict.fromkeys(metrics))}: {said}" for said, metrics in of_metrics.items()]
    counts = {result["images"] for result in results}
    if len(counts) > 1:
        found.append(
            f"the sources have {', '.join(map(str, sorted(counts)))} images, and the Fréchet distance falls with "
            "their number; compare equal numbers, by --num_images"
        )
    for name in ("num_inference_steps", "guidance_scale"):
        values = {result["drawn"][name] for result in results if result["drawn"]}
        if len(values) > 1:
            found.append(f"the sources are sampled with unequal {name}: {', '.join(map(str, values))}; give --{name}")
    return found


# The pictures --------------------------------------------------------------------------------------------------------


def in_columns(images: ImageSet, captions: Sequence[str]) -> list[int | None]:
    """Numbers of the images that stand in columns with those captions: the one of that number where it bears the
    caption, else the first that does; None where none does. Images without captions stand in their own order."""
    own = images.captions
    if own is None:
        return list(range(len(captions)))
    return [
        column if column < len(own) and own[column] == caption else own.index(caption) if caption in own else None
        for column, caption in enumerate(captions)
    ]


def draw_samples(shown: Sequence[State], reference: ImageSet, folder: Path) -> None:
    """samples.png and crops.png; a cell is empty where a source has no image with the column's caption, and a row left
    out where all are."""
    columns = min(COLUMNS, len(reference), *(len(state.images) for state in shown))
    captions = next((state.images.captions for state in shown if state.images.captions), None)
    headings = captions[:columns] if captions else [""] * columns
    rows, generated = {}, {state.name for state in shown}
    for name, images in [*((state.name, state.images) for state in shown), (REAL, reference)]:
        numbers = in_columns(images, headings) if captions else list(range(columns))
        if images is reference and (not captions or images.captions is None):
            name, numbers = f"some {REAL}", [column * len(images) // columns for column in range(columns)]
        if any(number is not None for number in numbers):
            empty = Image.new("RGB", (images.preprocessing.resolution,) * 2, PAPER)
            rows[name] = [empty if number is None else images[number] for number in numbers]
    save_picture(paired_grid(rows, headings), folder / "samples.png")
    enlarged = {name: row[:CROP_COLUMNS] for name, row in rows.items() if name in generated}  # real ones are elsewhere
    save_picture(zoomed_crops(enlarged, headings[:CROP_COLUMNS]), folder / "crops.png")


def draw_curves(evaluation: Mapping[str, Any], folder: Path) -> None:
    """curves.png, if there is a series."""
    counts = [result["label"] for result in evaluation["results"] if result["step"] is not None]
    if not any(counts.count(label) > 1 for label in counts):
        return
    several = len({name for result in evaluation["results"] for name in result["metrics"]}) > 1
    lines, better = [], {}
    for result in evaluation["results"]:
        shown = {}
        for network, metrics in result["metrics"].items():
            for metric, estimate in metrics.items():
                name = title(metric, network) + (f", {short(network)}" if several else "")
                shown[name], better[name] = estimate, "lower" if metric in SMALLER_IS_BETTER else "higher"
        shown[ENERGY] = result["high_frequency_energy"]
        lines.append({"label": result["label"], "step": result["step"], "metrics": shown})
    real = {ENERGY: evaluation["reference"]["high_frequency_energy"]}
    lines.append({"label": REAL, "step": None, "metrics": real})
    save_figure(metric_curves(lines, better, REAL), folder / "curves.png")


# The table -----------------------------------------------------------------------------------------------------------


def title(metric: str, network: str) -> str:
    """What a metric is called through a network: only Inception's is FID.

    >>> title("fid", "inception"), title("fid", "facebook/dinov2-base")
    ('FID', 'Fréchet distance')
    """
    titles = TITLES | INCEPTION_TITLES if network == INCEPTION else TITLES
    return titles.get(metric, metric)


def short(network: str) -> str:
    """The last part of a network's name."""
    return network.rstrip("/").rpartition("/")[2]


def table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Rows of words, the heading first: one per state and network."""
    results = evaluation["results"]
    used = [metric for metric in METRICS if any(metric in found for r in results for found in r["metrics"].values())]
    alone = {network for result in results for network in result["metrics"]} == {INCEPTION}
    arrows = {name: "↓" if name in SMALLER_IS_BETTER else "↑" for name in used}
    headings = [f"{title(name, INCEPTION if alone else '')} {arrow}" for name, arrow in arrows.items()]
    rows = [["source", "step", "images", "features", *headings, ENERGY]]
    for result in results:
        for number, (network, found) in enumerate((result["metrics"] or {"": {}}).items()):
            cells = [shown_estimate(found[name]) if name in found else "" for name in used]
            step = "" if result["step"] is None else str(result["step"])
            energy = "" if number else f"{result['high_frequency_energy']:.4f}"
            rows.append([result["label"], step, str(result["images"]), short(network), *cells, energy])
    reference = evaluation["reference"]
    energy = f"{reference['high_frequency_energy']:.4f}"
    return [*rows, [REAL, "", str(reference["images"]), "", *("" for _ in used), energy]]


def shown_estimate(estimate: Mapping[str, float | None]) -> str:
    """The value and, where there is one, its interval.

    >>> shown_estimate({"value": 12.3456, "low": None, "high": None})
    '12.35'
    >>> shown_estimate({"value": 0.00123456, "low": 0.0011, "high": 0.0014})
    '0.001235 [0.0011, 0.0014]'
    """
    words = f"{estimate['value']:.4g}"
    if estimate["low"] is None:
        return words
    return f"{words} [{estimate['low']:.3g}, {estimate['high']:.3g}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows)


def markdown(evaluation: Mapping[str, Any]) -> str:
    """evaluation.md."""
    reference, settings = evaluation["reference"], evaluation["settings"]
    preprocessing = reference["preprocessing"]
    notes = [
        f"Reference: {reference['images']} images at {preprocessing['resolution']} px "
        f"(crop {preprocessing['crop']}, {preprocessing['interpolation']}).",
        "Fréchet and kernel distances through a network other than Inception do not compare to published FID and KID.",
        f"{ENERGY.capitalize()}: share of the energy above half of the Nyquist frequency.",
    ]
    for result in evaluation["results"]:
        drawn = {name: (result["drawn"] or {}).get(name) for name in SAMPLING}
        said = ", ".join(f"{name} {value}" for name, value in drawn.items() if value is not None)
        notes += [f"{result['label']}: {said}."] if said else []
    notes = list(dict.fromkeys(notes))
    if settings["bootstrap"]:
        notes.append(f"In brackets: 95% intervals from {settings['bootstrap']} bootstrap resamples.")
    notes += [f"Warning: {words}." for words in evaluation["warnings"]]
    command = f"```bash\n{evaluation['command']}\n```"
    lines = ["# Evaluation", "", markdown_table(evaluation), "", *(f"- {note}" for note in notes), "", command, ""]
    return "\n".join(lines)


def markdown_table(evaluation: Mapping[str, Any]) -> str:
    heading, *rows = [[word.replace("|", r"\|") for word in row] for row in table(evaluation)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))


def model_index(evaluation: Mapping[str, Any], model_name: str, dataset_name: str) -> list[EvalResult]:
    """What the model card's metadata says of a model: the numbers of its last state.

    Args:
        evaluation: the content of evaluation.json.
        model_name: the label of the source that the card is for.
        dataset_name: of the reference, an id on the Hub or any name.

    Raises:
        ValueError: where no source has that label.
    """
    found = [result for result in evaluation["results"] if result["label"] == model_name]
    if not found:
        labels = ", ".join(dict.fromkeys(result["label"] for result in evaluation["results"]))
        raise ValueError(f"no result is labelled {model_name!r}; there are {labels}")
    result, settings = found[-1], evaluation["settings"]
    on_hub = bool(hub.HUB_ID.fullmatch(dataset_name))
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=dataset_name if on_hub else "imagefolder",
            dataset_name=dataset_name,
            metric_type=title(metric, network).lower().replace("é", "e").replace(" ", "_"),
            metric_name=f"{title(metric, network)} ({short(network)})",
            metric_value=estimate["value"],
            metric_args={
                "features": short(network),
                "generated_images": result["images"],
                "reference_images": evaluation["reference"]["images"],
                **{name: result["drawn"][name] for name in SAMPLING if name in (result["drawn"] or {})},
                **evaluation["reference"]["preprocessing"],
                **({} if estimate["low"] is None else {"interval": [estimate["low"], estimate["high"]]}),
                **({"neighbours": settings["neighbours"]} if metric in NEIGHBOUR_METRICS else {}),
            },
        )
        for network, metrics in result["metrics"].items()
        for metric, estimate in metrics.items()
    ]


# All of it -----------------------------------------------------------------------------------------------------------


def summary(
    results: Sequence[Mapping[str, Any]],
    shown: Sequence[State],
    reference: ImageSet,
    networks: Mapping[str, Any],
    settings: Namespace,
) -> dict[str, Any]:
    """The evaluation, as JSON takes it.

    Args:
        shown: the states whose spectra are in it.
        settings: as for :func:`measure`, and ``reference`` and ``prompts``; ``words`` are those of the command, if it
            is not this process's own.
    """
    spectra = {state.name: log_power_spectrum(state.images) for state in shown} | {REAL: log_power_spectrum(reference)}
    return {
        "results": list(results),
        "reference": {
            "folder": settings.reference,
            "images": len(reference),
            "preprocessing": asdict(reference.preprocessing),
            "high_frequency_energy": high_frequency_energy(reference),
        },
        "networks": {
            name: {"fingerprint": network.fingerprint, "dim": network.dim, "preprocessing": network.preprocessing}
            for name, network in networks.items()
        },
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "spectrum": {
            "frequencies": spectra[REAL][0].tolist(),
            "log_power": {name: power.tolist() for name, (_, power) in spectra.items()},
        },
        "warnings": all_warnings(results, len(reference), networks),
        "versions": hub.installed_versions() | {name: metadata.version(name) for name in LIBRARIES},
        "command": command(getattr(settings, "words", sys.argv)),
    }


def command(words: Sequence[str]) -> str:
    """One line for a shell, without tokens and passwords."""
    return hub.CREDENTIALS.sub("", hub.TOKEN.sub("hf_...", shlex.join(words)))


def write_evaluation(
    evaluation: Mapping[str, Any], shown: Sequence[State], reference: ImageSet, folder: str | Path
) -> None:
    """evaluation.json, evaluation.md and the pictures, into a folder.

    Args:
        shown: the states whose images are in the pictures, those whose spectra are in the evaluation.
    """
    folder = Path(folder)
    _write(folder / "evaluation.json", json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "evaluation.md", markdown(evaluation))
    frequencies, powers = (evaluation["spectrum"][name] for name in ("frequencies", "log_power"))
    spectra = {name: (np.array(frequencies), np.array(power)) for name, power in powers.items()}
    save_figure(spectrum_figure(spectra, REAL), folder / "spectrum.png")
    draw_samples(shown, reference, folder)
    draw_curves(evaluation, folder)


def _write(path: Path, text: str) -> None:
    write_text(path, text)
