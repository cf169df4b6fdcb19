"""What is found of images and how it is written: numbers, warnings, a table, pictures, a model card's metadata.

A *state* is where a set of images comes from: a folder, a pipeline, or one step of a training. A *result* is what is
found of it; its *set metrics* compare the images with the *reference*, real ones, through one feature network each,
CLIPScore compares them with their captions. Its *differences* are to the first of the states that are shown, where
both drew from the same seeds. An *evaluation* is the results and all that has to be known to read them: the content
of evaluation.json.

Features and spectra are computed by all processes, each a part (:class:`Reference`, :func:`measure`), all else by the
main process.
"""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from lpl import card, public
from lpl.data import image_files
from lpl.evaluation import CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.evaluation import metrics as measures
from lpl.evaluation.figures import metric_curves, paired_grid, spectrum_figure, zoomed_crops
from lpl.evaluation.generation import Model
from lpl.evaluation.images import ImageSet
from lpl.evaluation.metrics import SMALLER_IS_BETTER, Estimate
from lpl.evaluation.networks import INCEPTION, set_features
from lpl.evaluation.processes import processes
from lpl.evaluation.spectrum import Spectrum, spectrum_of
from lpl.families import Family
from lpl.families.dit import NULL_CLASS
from lpl.files import write_text
from lpl.pictures import save_figure, save_picture


COLUMNS, CROP_COLUMNS = 6, 4  # of samples.png and crops.png
REAL, HALVES = "real images", "real images, half and half"
ENERGY = "high-frequency energy"
TITLES = {"fid": "Fréchet distance", "kid": "kernel distance", CLIP_SCORE: "CLIPScore"}  # of metrics, else their names
INCEPTION_TITLES = {"fid": "FID", "kid": "KID"}
SETTINGS = ("metrics", "seed", "bootstrap", "nearest_k", "prompts_file")  # that are written down
SAMPLING = ("num_inference_steps", "guidance_scale", "max_sequence_length", "dtype")  # of a drawn state, in tables
LIBRARIES = ("torchmetrics", "scikit-learn", "scipy", "numpy", "pillow")  # beside those of lpl.hub


@dataclass(eq=False)
class State:
    """Where a set of images comes from, and the images once they are there."""

    label: str  # of the source
    source: str  # as the user gave it
    step: int | None = None  # of a training
    images: ImageSet | None = None
    drawn: Mapping[str, Any] | None = None  # the settings that the images were drawn with
    model: Model | None = None  # what draws them; None: a folder, or a model in training
    spectrum: Spectrum | None = None  # once it is measured

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


class Reference:
    """Real images, and what is computed of them once: features, spectrum, the distance between their halves.

    Every process has to make one; the main one alone gets the halves.

    Args:
        networks: loaded, by the names in ``settings``.
        settings: ``metrics``, ``features``, ``clip``, ``batch_size``, ``bootstrap``, ``seed``, ``nearest_k`` and
            ``cache_dir``, as the flags of lpl.evaluate have them.
    """

    def __init__(self, images: ImageSet, networks: Mapping[str, Any], settings: Namespace) -> None:
        self.images, self.networks, self.settings = images, networks, settings
        self.metrics = [name for name in settings.metrics if name in SET_METRICS]
        self.spectrum = spectrum_of(images, "spectrum of the reference")
        self.features = {name: self.embedded(images, name) for name in (settings.features if self.metrics else ())}
        self.halves = {}
        if processes().is_main_process:
            for name, features in self.features.items():
                found = measures.halves(features, self.metrics, settings.nearest_k, settings.seed)
                self.halves[name] = _written(found)

    def embedded(self, images: ImageSet, name: str, keep: bool = True) -> np.ndarray:
        """Features of any images, (N, D), through one of the networks."""
        folder = None if self.settings.cache_dir is None else Path(self.settings.cache_dir, "features")
        return set_features(images, self.networks[name], self.settings.batch_size, folder, keep=keep)


def measure(states: Sequence[State], reference: Reference, keep: bool = True) -> list[dict[str, Any]]:
    """The results, in the order of the states; every process has to call this, and only the main one gets numbers.

    Fills in the states' spectra.

    Args:
        keep: whether the features of the states' images are kept for another time.
    """
    settings, main = reference.settings, processes().is_main_process
    found: list[dict[str, dict[str, Estimate]]] = [{} for _ in states]
    dims: dict[str, int] = {}
    for name, real in reference.features.items():
        for state, estimates in zip(states, found):
            features = reference.embedded(state.images, name, keep)
            dims[name] = features.shape[1]
            if main:
                estimates[name] = measures.compare(
                    *(features, real, reference.metrics),
                    *(settings.bootstrap, settings.seed, settings.nearest_k),
                    progress=True,
                )
    if CLIP_SCORE in settings.metrics:
        clip = reference.networks[settings.clip]
        for state, estimates in zip(states, found):
            features = reference.embedded(state.images, settings.clip, keep)
            dims[settings.clip] = features.shape[1]
            if main:
                captions = clip.text_features(state.images.captions).numpy()
                score = measures.clip_score(features, captions, settings.bootstrap, settings.seed)
                estimates.setdefault(settings.clip, {})[CLIP_SCORE] = score
    for state in states:
        state.spectrum = spectrum_of(state.images, f"spectrum of {state.name}")
    base = shown_states(states)[0]
    return [
        {
            "label": state.label,
            "step": state.step,
            "source": state.source,
            "images": len(state.images),
            "enlarged": state.images.enlarged,
            "drawn": state.drawn,
            "dims": dims,
            "metrics": {name: _written(metrics) for name, metrics in estimates.items()},
            "high_frequency_energy": state.spectrum.high_frequency_energy,
            "differences": _differences(base, estimates, found[states.index(base)])
            if settings.bootstrap and same_seeds(state, base)
            else None,
        }
        for state, estimates in zip(states, found)
    ]


def _written(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """As JSON takes them."""
    return {metric: {"value": found.value, "spread": found.spread} for metric, found in estimates.items()}


def _differences(base: State, estimates: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, Any]:
    """Of one state's estimates to those of another, by network and metric."""
    differences = {
        name: _written({metric: estimate - to[name][metric] for metric, estimate in metrics.items()})
        for name, metrics in estimates.items()
    }
    return {"to": base.name, "metrics": differences}


def shown_states(states: Sequence[State]) -> list[State]:
    """Those in the pictures: the last of each source; of one run alone also the first."""
    last = list({state.label: state for state in states}.values())
    return [states[0], states[-1]] if len(last) == 1 and len(states) > 1 else last


def same_seeds(state: State, other: State) -> bool:
    """Whether two states drew the same prompts from the same seeds."""
    drawn = state is not other and state.model is not None and other.model is not None
    return drawn and state.images.captions == other.images.captions


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
