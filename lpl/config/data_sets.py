"""Several data sets at once: the entries of ``datasets``, a list in a recipe, or JSON on the command line.

An *entry* maps the flags of :data:`OF_ONE`, and those of :data:`OWN`, to values. For a column that it does not name,
the flag beside the list holds.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any

from lpl.tools.privacy import is_local, shown


Entry = Mapping[str, Any]

# Flags that say what one data set is; the list stands in place of the first ones.
PLACES = ("dataset_name", "dataset_config_name", "train_data_dir", "train_split", "validation_split")
OF_ONE = (*PLACES, "image_column", "caption_column", "mask_data_dir", "max_train_samples", "instance_prompt")
FOLDERS = ("dataset_name", "train_data_dir", "mask_data_dir")  # of these that may be paths
OWN: dict[str, type] = {"name": str, "repeats": int, "loss_weight": float}  # keys that are no flags
MOST_REPEATS = 10_000


def entry(word: str) -> dict[str, Any]:
    """An entry from its JSON.

    Raises:
        ArgumentTypeError: if it is none.
    """
    try:
        found = json.loads(word)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f'{word!r}: each data set is a mapping, such as {{"train_data_dir": "cats"}}')
    return {key: value for key, value in found.items() if value is not None}


def as_word(value: Any) -> str:
    """A value as a word of the command line."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def place_of(found: Entry) -> str:
    """Where a data set is: its name on the Hub, or a folder."""
    return str(found.get("dataset_name") or found.get("train_data_dir") or "")


def public_entry(found: Entry) -> dict[str, Any]:
    """An entry without paths of this machine."""
    local = {name: shown(str(found[name])) for name in FOLDERS if name in found}
    return {**found, **local}


def name_of(found: Entry) -> str:
    """The name of an entry in messages: its own, or that of its place."""
    place = place_of(found)
    return str(found.get("name") or (os.path.basename(os.path.abspath(place)) if is_local(place) else place))
