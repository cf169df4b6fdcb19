"""Which flag reads a local folder, and columns that have to be looked for: paths of images, keys of a json.

A folder may be given by either flag. ``--train_data_dir`` reads images with text files; ``--dataset_name`` reads what
the library of data sets does: folders of ``save_to_disk``, ``.parquet`` and ``.tar`` files. A folder of images has to
have captions, or class labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature

from lpl.config.groups import Data
from lpl.data.folder import Contents, suffix
from lpl.tools import layout


Rows = Dataset | IterableDataset
TABLES = (".parquet", ".tar")


def saved_splits(name: str) -> list[str]:
    """The splits of a folder that ``save_to_disk`` wrote; none if it did not."""
    if (index := Path(name, "dataset_dict.json")).is_file():
        with suppress(ValueError):  # it is of another program
            found = json.loads(index.read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get("splits"), list):
                return found["splits"]
    written = all(Path(name, file).is_file() for file in ("state.json", "dataset_info.json"))
    return ["train"] if written else []


def as_read(data: Data, class_conditional: bool = False) -> Data:
    """The same flags, with a local folder under the flag that reads it."""
    if data.dataset_name:
        images = not class_conditional and not data.streaming and _holds_plain_images(data)
        return replace(data, train_data_dir=data.dataset_name, dataset_name=None) if images else data
    folder = data.train_data_dir
    if folder and (saved_splits(folder) or (not data.streaming and _holds_tables(folder, class_conditional))):
        return replace(data, dataset_name=folder, train_data_dir=None)
    return data


def _holds_plain_images(data: Data) -> bool:
    """Whether --dataset_name is a folder of images without a metadata file, of which no split is asked for."""
    assert data.dataset_name is not None
    one_split = data.train_split == "train" and data.validation_split is None and not data.train_data_dir
    if not one_split or not os.path.isdir(data.dataset_name) or saved_splits(data.dataset_name):
        return False
    contents = Contents.of(data.dataset_name)
    tables = any(kind in contents.by_suffix for kind in (*TABLES, ".py", ".yaml"))
    return bool(contents.images) and not contents.metadata and not tables


def _holds_tables(folder: str, class_conditional: bool) -> bool:
    """Whether a folder has files for the library, and no images that anything else describes."""
    contents = Contents.of(folder)
    tables = any(kind in contents.by_suffix for kind in TABLES)
    described = contents.metadata or contents.captioned or (class_conditional and contents.images)
    return tables and not described


def with_column_of_json(dataset: Rows, column: str) -> Rows:
    """With a column ``json.caption`` for the key ``caption`` of the column ``json``, which WebDataset has."""
    parent, dot, key = column.partition(".")
    feature = (dataset.features or {}).get(parent)
    if not dot or column in (dataset.column_names or []) or not isinstance(feature, dict) or key not in feature:
        return dataset
    return _with_column(dataset, parent, column, lambda value: (value or {}).get(key), feature[key])


def with_paths_of_images(dataset: Rows, data: Data) -> Rows:
    """With images, if the column has paths as text: of a local folder, or of a data set on the Hub, from its top."""
    column, features = data.image_column, dataset.features or {}
    others = any(isinstance(feature, ImageFeature) for feature in features.values())
    if others or getattr(features.get(column), "dtype", None) not in ("string", "large_string"):
        return dataset
    root = data.dataset_name or data.folder
    top = root if os.path.isdir(root) else f"hf://datasets/{root}@main"
    return _with_column(dataset, column, column, partial(_under, top), ImageFeature(decode=False))


def _under(top: str, path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return {"bytes": None, "path": path if "://" in path else os.path.join(top, path)}


def _with_column(dataset: Rows, source: str, column: str, function: Callable[[Any], Any], feature: Any) -> Rows:
    """With a column that a function makes of another one."""
    if isinstance(dataset, IterableDataset):
        features = dataset.features.copy() if dataset.features else None
        if features is not None:
            features[column] = feature
        return dataset.map(lambda row: {column: function(row[source])}, features=features)
    values = [function(value) for value in dataset[source]]
    rest = dataset.remove_columns(column) if column == source else dataset
    return rest.add_column(column, values, feature=feature)  # type: ignore[arg-type]


def check_captions_of(data: Data, class_conditional: bool) -> None:
    """Refuse a folder of images without captions, or class labels; looks at names only.

    Args:
        data: one data set, see :func:`as_read`.

    Raises:
        ValueError: with an example of what is missing.
    """
    if data.dataset_name or data.streaming or (data.instance_prompt is not None and not class_conditional):
        return
    where, column, contents = f"--train_data_dir {data.train_data_dir}", data.caption_column, Contents.of(data.folder)
    if contents.metadata or (contents.captioned and not class_conditional):
        return
    if not class_conditional:
        raise ValueError(
            f"{where}: there are no captions{_other_metadata(contents)}; put a metadata.jsonl "
            f'beside the images, a line each, such as {{"file_name": "cat.png", "{column}": "a photo of a cat"}}, or '
            "beside each image a text file of its name, cat.txt; or give all the same caption by --instance_prompt; "
            "only DiT takes class folders"
        )
    recipes = [Path(file) for file in contents.files if file.endswith(os.sep + layout.RECIPE)]
    if runs := [file.parent for file in recipes if (file.parent / layout.LOG).is_file()]:
        raise ValueError(
            f"{where}: {runs[0]} is the output folder of a run, whose pictures would be a class; move it elsewhere"
        )
    if len(contents.image_folders) < 2:
        raise ValueError(
            f"{where}: there are no class labels; put each class's images into a sub-folder, or a "
            f'metadata.jsonl beside them, a line each, such as {{"file_name": "cat.png", "{column}": 0}}'
        )


def _other_metadata(contents: Contents) -> str:
    """Names a file that may hold the captions under another name."""
    files = [file for file in contents.files if suffix(file) in (".jsonl", ".json", ".csv", ".parquet", ".tsv")]
    return (
        f" ({os.path.basename(files[0])} is not read, since it is not called metadata.jsonl or .csv)" if files else ""
    )
