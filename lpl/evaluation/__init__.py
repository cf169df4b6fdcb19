"""Measures images against real ones; ``python -m lpl.evaluate`` (command.py) and ``--eval_steps`` (training.py).

    network, preprocessing = load_network("facebook/dinov2-base"), Preprocessing(512)
    sets = [folder_images(folder, preprocessing) for folder in ("samples", "photographs")]
    compare(*(set_features(images, network) for images in sets))["fid"].value

Images: sources, generation, images. Numbers: networks, cache, metrics, spectrum, results. Files: report, figures.
The public names load their module on first use: training alone needs no torchmetrics, scipy or scikit-learn.
May import all rooms. A new metric is a function in metrics.py and its name in lpl.config.choices; tests/evaluation.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lpl.config.choices import METRICS, SET_METRICS


MOST_BY_DEFAULT = 10_000  # images to draw, as many as in the paper
NEAREST_K = 5  # of the neighbour metrics, as in the paper on density and coverage
LIBRARIES = {"torchmetrics": "torchmetrics", "scipy": "scipy", "sklearn": "scikit-learn"}  # module -> package

_PLACES = {
    "images": ("ImageSet", "Preprocessing", "folder_images", "listed_images"),
    "metrics": ("Estimate", "clip_score", "compare", "warnings_for"),
    "networks": ("FeatureNetwork", "TextImageNetwork", "load_network"),
    "cache": ("set_features",),
    "training": ("TrainingEvaluation", "check_captions", "check_evaluation"),
    "spectrum": ("high_frequency_energy", "log_power_spectrum", "spectrum_of"),
}
__all__ = ["METRICS", "SET_METRICS", *(name for names in _PLACES.values() for name in names)]


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def check_libraries(what: str) -> None:
    """Refuse to start without the libraries that compute the metrics.

    Raises:
        ValueError: with the command that installs them.
    """
    if absent := [package for module, package in LIBRARIES.items() if find_spec(module) is None]:
        raise ValueError(f"{what} needs {', '.join(absent)}: pip install {' '.join(absent)}")
