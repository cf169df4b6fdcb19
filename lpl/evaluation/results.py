"""Measures sets of images against a reference and their captions.

A *state* is where a set of images comes from: a folder, a pipeline, or one step of a training. A *result* is what is
measured of it: its *set metrics* compare its images with the *reference*, real images, through one feature network
each; CLIPScore compares them with their captions. *Differences* are to the first of the shown states, if both drew
from the same seeds. An *evaluation*, the content of evaluation.json, is the results and everything needed to read
them; :mod:`lpl.evaluation.report` writes it.

Each process computes a part of the features and spectra (:class:`Reference`, :func:`measure`); the main process
computes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from lpl.config.choices import CLIP, CLIP_SCORE, SET_METRICS
from lpl.data.folder import image_files
from lpl.evaluation import NEAREST_K
from lpl.evaluation import metrics as measures
from lpl.evaluation.cache import set_features
from lpl.evaluation.images import ImageSet
from lpl.evaluation.metrics import Estimate
from lpl.evaluation.networks import FeatureNetwork, TextImageNetwork
from lpl.evaluation.processes import processes
from lpl.evaluation.sources import Model
from lpl.evaluation.spectrum import Spectrum, spectrum_of
from lpl.families import Family


REAL, HALVES = "real images", "real images, half and half"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Args:
        reference: the folder of the real images, as the user gave it.
        metrics: of METRICS.
        features: names of the feature networks of the set metrics.
        clip: name of the network of CLIPScore.
        batch_size: images embedded at a time.
        cache_dir: features are kept in its folder ``features``; None: in the default folder of ``set_features``.
        bootstrap: resamples for the spread of each number; 0: none.
        seed: of resamples, of KID's subsets and of the reference's halves.
        nearest_k: of the neighbour metrics.
        prompts_file: recorded only.
        words: the command line, recorded only.
    """

    reference: str
    metrics: Sequence[str] = SET_METRICS
    features: Sequence[str] = ()
    clip: str = CLIP
    batch_size: int = 8
    cache_dir: str | None = None
    bootstrap: int = 0
    seed: int = 0
    nearest_k: int = NEAREST_K
    prompts_file: str | None = None
    words: Sequence[str] = ()

    @property
    def set_metrics(self) -> list[str]:
        return [name for name in self.metrics if name in SET_METRICS]


@dataclass(eq=False)
class State:
    """Where a set of images comes from, and the images once they are read or drawn."""

    label: str  # of the source
    source: str  # as the user gave it
    step: int | None = None  # of a training
    images: ImageSet | None = None
    drawn: Mapping[str, Any] | None = None  # the settings that the images were drawn with
    model: Model | None = None  # what draws them; None: a folder, or a model in training
    spectrum: Spectrum | None = None  # set by :func:`measure`

    @property
    def name(self) -> str:
        """The label, with the step of a run."""
        return self.label if self.step is None else f"{self.label}, step {self.step}"

    @property
    def pictures(self) -> ImageSet:
        """The images, which must have been read or drawn."""
        assert self.images is not None
        return self.images

    @property
    def power(self) -> Spectrum:
        """The spectrum, which must have been measured."""
        assert self.spectrum is not None
        return self.spectrum


# Prompts -------------------------------------------------------------------------------------------------------------


def prompts_of(
    reference: ImageSet, folder: str, family: type[Family], names: Mapping[int, str], flag: str, seed: int = 0
) -> list[str] | list[int]:
    """Prompts that ask a model for images like the reference's: its captions, shuffled.

    For a class-conditional family, class labels: from the captions, else from the reference's sub-folders, else all.

    Args:
        folder: of the reference.
        names: of the classes, by label.
        flag: the flag that names the folder, for messages.

    Raises:
        ValueError: if the reference has no captions, or if they are no classes.
    """
    where = f"{flag} {folder}"
    pool: list[Any] = list(reference.captions or ())
    if family.class_conditional:
        assert family.num_classes is not None
        pool = class_labels(family, pool, names, where) if pool else _folder_labels(folder, names)
        pool = pool or list(range(family.num_classes))
    elif not pool:
        raise ValueError(f"{where}: it has no captions to draw from; put a metadata.jsonl beside the images")
    return [pool[index] for index in np.random.default_rng(seed).permutation(len(pool))]


def class_labels(family: type[Family], words: Sequence[str], names: Mapping[int, str], where: str) -> list[int]:
    """The labels of classes that are given by name or number.

    Raises:
        ValueError: for a word that is neither.
    """
    try:
        return [family.class_label(word, names) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('--validation_prompts ')}") from error


def _folder_labels(folder: str, names: Mapping[int, str]) -> list[int]:
    """Each image's class, by its sub-folder: the model's class of that name or, if the model lacks one of the names,
    the sub-folder's index, as in training. Empty without sub-folders."""
    parents = [file.parent.name for file in sorted(image_files(folder)) if file.parent != Path(folder)]
    classes = sorted(set(parents))
    if len(classes) < 2:
        return []
    known = {name: label for label, all_ in names.items() for name in (all_, *map(str.strip, all_.split(",")))}
    places = known if set(classes) <= known.keys() else {name: place for place, name in enumerate(classes)}
    return [places[parent] for parent in parents]


# Measuring -----------------------------------------------------------------------------------------------------------


class Reference:
    """Real images with what is computed of them once: features, spectrum, the distance between their halves.

    Every process has to create one; only the main process gets the halves.

    Args:
        networks: loaded, by the names in ``settings``.
    """

    def __init__(self, images: ImageSet, networks: Mapping[str, FeatureNetwork], settings: Settings) -> None:
        self.images, self.networks, self.settings = images, networks, settings
        self.spectrum = spectrum_of(images, "spectrum of the reference")
        names = settings.features if settings.set_metrics else ()
        self.features = {name: self.embedded(images, name) for name in names}
        self.halves: dict[str, dict[str, Any]] = {}
        if processes().is_main_process:
            for name, features in self.features.items():
                found = measures.halves(features, settings.set_metrics, settings.nearest_k, settings.seed)
                self.halves[name] = _written(found)

    def embedded(self, images: ImageSet, name: str, keep: bool = True) -> np.ndarray:
        """Features of a set of images, (N, D), by one of the networks."""
        folder = None if self.settings.cache_dir is None else Path(self.settings.cache_dir, "features")
        return set_features(images, self.networks[name], self.settings.batch_size, folder, keep=keep)


def measure(states: Sequence[State], reference: Reference, keep: bool = True) -> list[dict[str, Any]]:
    """The results, in the order of the states; every process has to call this, only the main one gets numbers.

    Sets the states' spectra.

    Args:
        keep: whether the features of the states' images are kept on disk.
    """
    settings = reference.settings
    found: list[dict[str, dict[str, Estimate]]] = [{} for _ in states]
    dims: dict[str, int] = {}
    for name in reference.features:
        for state, estimates in zip(states, found):
            dims[name] = _compare(state, name, reference, estimates, keep)
    if CLIP_SCORE in settings.metrics:
        for state, estimates in zip(states, found):
            dims[settings.clip] = _score_captions(state, reference, estimates, keep)
    for state in states:
        state.spectrum = spectrum_of(state.pictures, f"spectrum of {state.name}")
    base = shown_states(states)[0]
    of_base = found[states.index(base)]
    return [
        {
            "label": state.label,
            "step": state.step,
            "source": state.source,
            "images": len(state.pictures),
            "enlarged": state.pictures.enlarged,
            "drawn": state.drawn,
            "dims": dims,
            "metrics": {name: _written(metrics) for name, metrics in estimates.items()},
            "high_frequency_energy": state.power.high_frequency_energy,
            "differences": _differences(base, estimates, of_base)
            if settings.bootstrap and same_seeds(state, base)
            else None,
        }
        for state, estimates in zip(states, found)
    ]


Estimates = dict[str, dict[str, Estimate]]  # by network and metric


def _compare(state: State, network: str, reference: Reference, estimates: Estimates, keep: bool) -> int:
    """Add the set metrics through one network, on the main process; returns the features' dimension."""
    settings = reference.settings
    features = reference.embedded(state.pictures, network, keep)
    if processes().is_main_process:
        estimates[network] = measures.compare(
            features,
            reference.features[network],
            settings.set_metrics,
            settings.bootstrap,
            settings.seed,
            settings.nearest_k,
            progress=True,
            counterparts=counterparts(state.pictures, reference.images),
        )
    return features.shape[1]


def counterparts(generated: ImageSet, reference: ImageSet) -> np.ndarray | None:
    """The real image whose caption each generated image has, (N,), or -1; None if no caption is shared.

    Generated images of one caption take the real images of that caption in turn.
    """
    places: dict[str, list[int]] = {}
    for place, caption in enumerate(reference.captions or ()):
        places.setdefault(caption, []).append(place)
    turns = {caption: cycle(found) for caption, found in places.items()}
    found = [next(turns[caption]) if caption in turns else -1 for caption in generated.captions or ()]
    return np.array(found) if any(place >= 0 for place in found) else None


def _score_captions(state: State, reference: Reference, estimates: Estimates, keep: bool) -> int:
    """Add CLIPScore, on the main process; returns the features' dimension."""
    settings = reference.settings
    features = reference.embedded(state.pictures, settings.clip, keep)
    if processes().is_main_process:
        clip, captions = reference.networks[settings.clip], state.pictures.captions
        assert isinstance(clip, TextImageNetwork) and captions is not None
        score = measures.clip_score(features, clip.text_features(captions).numpy(), settings.bootstrap, settings.seed)
        estimates.setdefault(settings.clip, {})[CLIP_SCORE] = score
    return features.shape[1]


def _written(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """As in evaluation.json."""
    return {metric: {"value": found.value, "spread": found.spread} for metric, found in estimates.items()}


def _differences(base: State, estimates: Estimates, to: Estimates) -> dict[str, Any]:
    """Estimates of a state minus those of the base."""
    differences = {
        name: _written({metric: estimate - to[name][metric] for metric, estimate in metrics.items()})
        for name, metrics in estimates.items()
    }
    return {"to": base.name, "metrics": differences}


def shown_states(states: Sequence[State]) -> list[State]:
    """The states in the pictures: the last of each source; for a single run also its first."""
    last = list({state.label: state for state in states}.values())
    return [states[0], states[-1]] if len(last) == 1 and len(states) > 1 else last


def same_seeds(state: State, other: State) -> bool:
    """Whether two states drew the same prompts from the same seeds."""
    drawn = state is not other and state.model is not None and other.model is not None
    return drawn and state.pictures.captions == other.pictures.captions
