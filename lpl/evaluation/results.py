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

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpl.config.choices import CLIP_SCORE, SET_METRICS
from lpl.data.reading import image_files
from lpl.evaluation import metrics as measures
from lpl.evaluation.generation import Model
from lpl.evaluation.images import ImageSet
from lpl.evaluation.metrics import Estimate
from lpl.evaluation.networks import set_features
from lpl.evaluation.processes import processes
from lpl.evaluation.spectrum import Spectrum, spectrum_of
from lpl.families import Family


REAL, HALVES = "real images", "real images, half and half"


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
        pool = pool or list(range(family.num_classes))
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
