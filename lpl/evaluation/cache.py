"""Features of image sets, computed once and cached on disk.

The *key* of a set's features is a hash of the network's fingerprint and of the images' digests in their order, so that
cached features never go out of date. With n processes, each computes the features of every n-th image and all of them
get all features; every process has to call :func:`set_features`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from lpl.evaluation.images import ImageSet
from lpl.evaluation.networks import FeatureNetwork
from lpl.evaluation.processes import everywhere, in_parts, processes, threaded
from lpl.tools.files import write_whole


logger = logging.getLogger(__name__)
CACHE = "LPL_CACHE"  # environment variable with the folder of cached features


def set_features(
    images: ImageSet,
    network: FeatureNetwork,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    keep: bool = True,
) -> np.ndarray:
    """The features of all images, computed once and cached.

    Args:
        cache_dir: of the features; defaults to the environment's LPL_CACHE, or ``~/.cache/lpl/features``.
        progress: show a progress bar.
        keep: use the cache.

    Returns:
        (N, D) float32, the same in all processes.

    Raises:
        ValueError: if the network fails on the images.
    """
    main = processes().is_main_process
    path = None
    if keep and network.fingerprint is not None:
        digests = in_parts(len(images), lambda mine: threaded(images.digest, mine))
        path = cache_folder(cache_dir) / f"{features_key(network, digests)}.safetensors"
        kept = _read(path, len(images))
        if all(everywhere(kept is not None)) and kept is not None:
            return kept

    rows = in_parts(len(images), lambda mine: _embed(images, mine, network, batch_size, progress and main))
    features = np.stack(rows)
    if not np.isfinite(features).all():
        raise ValueError(f"{network.name}: some features of {images.name} are not finite")
    if path is not None and main:
        _write(path, features)
    return features


def _embed(
    images: ImageSet, mine: Sequence[int], network: FeatureNetwork, batch_size: int, progress: bool
) -> list[np.ndarray]:
    """Features of some of the images, (D,) each."""
    rows: list[np.ndarray] = []
    with tqdm(total=len(mine), desc=f"features of {images.name}", leave=False, disable=not progress) as bar:
        for start in range(0, len(mine), batch_size):
            batch = threaded(images.__getitem__, mine[start : start + batch_size])
            rows.extend(network.features(batch).numpy())
            bar.update(len(batch))
    return rows


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder of cached features."""
    return Path(given or os.environ.get(CACHE) or Path.home() / ".cache" / "lpl" / "features")


def features_key(network: FeatureNetwork, digests: Sequence[str]) -> str:
    """Key of the features of images with these digests, in this order."""
    assert network.fingerprint is not None
    return hashlib.sha256("\n".join([network.fingerprint, *digests]).encode()).hexdigest()


def _read(path: Path, count: int) -> np.ndarray | None:
    """Cached features; None if there are none, or the file is broken."""
    try:
        features = load_file(path)["features"]
    except (OSError, KeyError, SafetensorError):
        return None
    return features if features.ndim == 2 and len(features) == count else None


def _write(path: Path, features: np.ndarray) -> None:
    try:
        write_whole(path, lambda unfinished: save_file({"features": features}, unfinished))
    except (OSError, SafetensorError) as error:  # the features themselves are fine
        logger.warning("the features are not cached: %s (set %s to a writable folder)", error, CACHE)
