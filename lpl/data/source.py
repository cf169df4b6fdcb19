"""Loads a data set: its image and caption column, checked, and the part held out for the validation loss.

Images stay undecoded; :class:`lpl.data.dataset.TrainingImages` opens each one when a batch needs it.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets.config
import pandas
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.packaged_modules.folder_based_builder import folder_based_builder
from huggingface_hub.constants import HF_HUB_CACHE

from lpl.config.groups import Data, Part, naming
from lpl.data import masks
from lpl.data.captioned import folder_dataset
from lpl.data.captions import caption_columns, columns_of, report_instance_prompt
from lpl.data.catalogue import cache_root
from lpl.data.folder import Contents, suffix
from lpl.data.mixture import Mixture, is_mixture, joined, parts_of, without_marks
from lpl.data.places import as_read, saved_splits, with_column_of_json, with_paths_of_images
from lpl.tools.words import close_match, first_line


logger = logging.getLogger(__name__)


IMAGE_COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture")  # usual names
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "prompts", "txt", "description", "sentence")
LABEL_COLUMNS = ("label", "labels", "class", "class_label")
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}  # suffixes that --streaming reads -> load_dataset's builders
# "NA" or "None" in a metadata.csv is a word; by default, pandas takes it for an empty cell.
folder_based_builder.pd = SimpleNamespace(  # type: ignore[attr-defined]
    read_csv=partial(pandas.read_csv, keep_default_na=False, na_values=[""])
)
SHOWN = 20  # class names in a message
HELD_OUT = {"test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev"}  # names of such splits


def load_training_images(
    data: Data, seed: int, cache_dir: str | None, num_classes: int | None = None, classes: Sequence[str] = ()
) -> tuple[Dataset, Dataset | None]:
    """Loads the training data and the held-out data for the validation loss (None if the flags ask for none).

    Args:
        seed: draws the --max_train_samples.
        num_classes: of a class-conditional family, whose captions are class labels.
        classes: names by label that the run to resume was trained with; they keep their labels.

    Raises:
        ValueError: if there is nothing to train on, or a column is missing or of the wrong type.
    """
    dataset, held_out = _whole(data, "train_split", seed, cache_dir, num_classes, classes), None
    dataset = _subset(dataset, data.max_train_samples, seed)
    if data.holds_out_splits:
        names = class_names(dataset, data)
        held_out = without_marks(_whole(data, "validation_split", seed, cache_dir, num_classes, names))
    elif data.validation_every_nth is not None:
        every_nth = range(0, len(dataset), data.validation_every_nth)
        held_out = without_marks(dataset.select(every_nth))
        dataset = dataset.select(sorted(set(range(len(dataset))) - set(every_nth)))
        if len(dataset) == 0:
            raise ValueError(f"--validation_every_nth {data.validation_every_nth}: nothing is left to train on")
    if Mixture.of(dataset) is None:  # in which each data set has its own
        report_instance_prompt(dataset, data)
    if held_out is not None:
        held_out = held_out.select(range(min(data.num_validation_samples, len(held_out))))
    return dataset, held_out


def _whole(
    data: Data, flag: str, seed: int, cache_dir: str | None, num_classes: int | None, classes: Sequence[str]
) -> Dataset:
    """The split that ``flag`` names of each data set that has it, joined if there are several."""
    parts = [part for part in parts_of(data, num_classes is not None) if getattr(part.data, flag) is not None]
    if data.datasets is None and not is_mixture(parts):
        return cast(Dataset, load_split(parts[0].data, getattr(parts[0].data, flag), cache_dir, num_classes, classes))
    loaded = []
    for part in parts:
        with naming(part, parts):
            split = getattr(part.data, flag)
            found = cast(Dataset, load_split(part.data, split, cache_dir, num_classes, masks_needed=False))
        if data.datasets is not None and flag == "train_split":
            found = _subset(found, part.data.max_train_samples, seed)
        loaded.append(found)
    if data.mask_column is not None and not any(data.mask_column in dataset.column_names for dataset in loaded):
        _check_masks(loaded[0], data.mask_column, _named(parts[0].data))
    if num_classes is not None:
        loaded = _with_common_labels(parts, loaded, classes, num_classes)
    return joined(parts, loaded, data)


def _with_common_labels(
    parts: Sequence[Part], loaded: Sequence[Dataset], classes: Sequence[str], num_classes: int
) -> list[Dataset]:
    """Gives a class one label in all data sets, by its name: that of the first one, or of the run to resume.

    Raises:
        ValueError: if only some have names, or there are more classes than the model has.
    """
    names = [class_names(dataset, part.data) for part, dataset in zip(parts, loaded)]
    if not any(names) and not classes:
        return list(loaded)
    if not all(names):
        unnamed = parts[names.index([])].name
        raise ValueError(
            f"data set {unnamed!r}: its class labels are numbers without names, and those of another data set have "
            "names; give all of them names, or none"
        )
    merged = list(dict.fromkeys([*classes, *(name for of_one in names for name in of_one)]))
    if len(merged) > num_classes:
        raise ValueError(
            f"the data sets have {len(merged)} classes together, and the model has {num_classes}: {_some(merged)}"
        )
    return [_relabelled(dataset, part.data.caption_column, merged) for part, dataset in zip(parts, loaded)]


def _subset(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """A random subset of ``count`` rows at most; None: all of them, in order."""
    return dataset if count is None else dataset.shuffle(seed=seed).select(range(min(count, len(dataset))))


def load_split(
    data: Data,
    split: str,
    cache_dir: str | None,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
    masks_needed: bool = True,
) -> Dataset | IterableDataset:
    """Loads the image and caption column of a split, images undecoded; with --streaming as an ``IterableDataset``.

    Args:
        masks_needed: whether there must be a --mask_column; of several data sets, some may be without.

    Raises:
        ValueError: if it cannot be loaded, or a column is missing or of the wrong type.
    """
    where = _named(data)
    data = as_read(data, num_classes is not None)
    dataset = _opened(data, split, cache_dir, num_classes is not None)
    if data.caption_per_line and (data.dataset_name or data.streaming or Contents.of(data.folder).metadata):
        logger.warning("%s: --caption_per_line has no effect, since captions do not come from text files", where)
    for column in caption_columns(data.caption_column, dataset.column_names or []):
        dataset = with_column_of_json(dataset, column)
    columns = columns_of(data, dataset.column_names or [])
    if columns and num_classes is None:
        dataset = _with_texts(dataset, columns, data.instance_prompt)
    check_columns(dataset, data.image_column, data.caption_column if columns else None, where, num_classes)
    pictures = [data.image_column]
    if data.mask_column is not None and (masks_needed or data.mask_column in (dataset.column_names or ())):
        _check_masks(dataset, data.mask_column, where)
        pictures.append(data.mask_column)
    elif (
        data.mask_column is None
        and masks.COLUMN in (dataset.column_names or ())
        and not data.dataset_name
        and not data.streaming
    ):
        logger.warning("%s: its loss masks have no effect without --mask_column %s", where, masks.COLUMN)
    dataset = dataset.select_columns([*pictures, *columns])
    if num_classes is not None and classes:
        dataset = _with_labels_of(dataset, data.caption_column, classes, num_classes, where)
    if isinstance(dataset, IterableDataset):
        return dataset
    for column in pictures:
        dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def load_images(data: Data, split: str, cache_dir: str | None) -> Dataset:
    """Loads the image column of a split alone, undecoded; there need be no captions.

    Raises:
        ValueError: if it cannot be loaded, or has no images.
    """
    data = as_read(data, class_conditional=True)  # which needs no captions either
    dataset = _opened(data, split, cache_dir, class_conditional=False)
    assert isinstance(dataset, Dataset), "nothing is streamed"
    check_columns(dataset, data.image_column, None, _named(data))
    return dataset.select_columns([data.image_column]).cast_column(data.image_column, ImageFeature(decode=False))


def _named(data: Data) -> str:
    """The flag that names the data set and its value, for messages."""
    return f"--dataset_name {data.dataset_name}" if data.dataset_name else f"--train_data_dir {data.train_data_dir}"


def _opened(data: Data, split: str, cache_dir: str | None, class_conditional: bool) -> Dataset | IterableDataset:
    try:
        dataset = _loaded(data, split, cache_dir, class_conditional)
    except Exception as error:  # the library raises a dozen kinds; each means that there is nothing to train on
        _check_split(data, split, _named(data))
        why = first_line(error.__cause__ or error)
        raise ValueError(f"{_named(data)}: the data set cannot be loaded: {why}") from error
    for column in filter(None, (data.image_column, data.mask_column)):
        if _holds_bytes(dataset, column):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return with_paths_of_images(dataset, data)


def _loaded(data: Data, split: str, cache_dir: str | None, class_conditional: bool) -> Dataset | IterableDataset:
    options: dict[str, Any] = {"split": split, "cache_dir": cache_dir, "streaming": data.streaming}
    if data.dataset_name and saved_splits(data.dataset_name):
        dataset = _saved(data, split)
    elif data.dataset_name:
        unread = Contents.of(data.dataset_name).unread if os.path.isdir(data.dataset_name) else {}
        for place, why in unread.items():
            logger.warning("--dataset_name %s: %s is not read (%s)", data.dataset_name, place, why)
        dataset = load_dataset(data.dataset_name, data.dataset_config_name, data_dir=data.train_data_dir, **options)
    elif data.streaming:
        kind, shards = shard_files(data.folder)
        files = [glob.escape(str(shard)) for shard in shards]
        # All files under one name: by default, the library takes "test" in a file's name for a split.
        dataset = load_dataset(kind, data_files={"train": files}, **options)
    else:
        captions = data.caption_column, class_conditional, data.instance_prompt, cache_root(data) / "texts"
        return folder_dataset(data.folder, *captions, data.caption_per_line, data.mask_data_dir)
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False)
    assert isinstance(dataset, Dataset)  # with a split, it is no dictionary of splits
    return dataset


def _saved(data: Data, split: str) -> Dataset:
    assert data.dataset_name is not None
    if data.streaming:
        raise ValueError("save_to_disk wrote this folder, which is read without --streaming; leave the flag out")
    found = load_from_disk(data.dataset_name)
    return found[split] if isinstance(found, DatasetDict) else found


def _check_split(data: Data, split: str, where: str) -> None:
    """Refuses a split that the data set does not have, if its splits can be told."""
    splits = saved_splits(data.dataset_name) if data.dataset_name else []
    with suppress(Exception):  # of the library, for whatever else is wrong with the data set
        splits = splits or get_dataset_split_names(
            str(data.dataset_name), data.dataset_config_name, data_dir=data.train_data_dir
        )
    if splits and split.partition("[")[0] not in splits:
        flag = "--train_split" if split == data.train_split else "--validation_split"
        raise ValueError(f"{where}: there is no split {split!r} ({flag}); its splits are {', '.join(splits)}")


def _holds_bytes(dataset: Dataset | IterableDataset, column: str) -> bool:
    """Whether a column holds image files as other programs than the library write them to parquet."""
    feature = (dataset.features or {}).get(column)
    value = feature.get("bytes") if isinstance(feature, dict) else feature
    return value in (Value("binary"), Value("large_binary"))  # the latter is what polars writes


def check_columns(
    dataset: Dataset | IterableDataset,
    image_column: str,
    caption_column: str | None,
    where: str,
    num_classes: int | None = None,
) -> None:
    """Refuses a data set that is empty, lacks a named column, or has a column of the wrong type.

    Args:
        caption_column: --caption_column; None: no captions are needed.
        where: the flag that names the data set and its value, for messages.

    Raises:
        ValueError: with the available columns, and the flag to change.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{where}: the data set has no images")
    columns = dataset.column_names or []
    captions = [] if caption_column is None else [caption_column]  # of class labels there is one column
    if caption_column is not None and num_classes is None:
        captions = list(caption_columns(caption_column, columns))
    for flag, column in (("--image_column", image_column), *(("--caption_column", name) for name in captions)):
        if column not in columns:
            hint = _other_column(flag, column, [name for name in columns if name not in captions], num_classes)
            hint = hint or _folder_hint(dataset, flag, column, num_classes)
            raise ValueError(
                f"{where}: there is no column {column!r} ({flag}); its columns are {', '.join(columns)}{hint}"
            )
    if not isinstance(_feature(dataset, image_column), ImageFeature):
        raise ValueError(f"{where}: column {image_column!r} (--image_column) holds no images")
    for column in captions:
        if num_classes is None:
            _check_captions(dataset, column, where)
        else:
            _check_labels(dataset, column, where, num_classes)


def _check_masks(dataset: Dataset | IterableDataset, column: str, where: str) -> None:
    columns = dataset.column_names or []
    if column not in columns:
        hint = close_match(column, columns, "--mask_column ")
        if "imagefolder" in str(dataset.info.builder_name):
            hint = f"; beside cat.png, cat{masks.ENDINGS[0]} or cat{masks.ENDINGS[1]} is its mask, in the column mask"
        raise ValueError(
            f"{where}: there is no column {column!r} (--mask_column); its columns are {', '.join(columns)}{hint}"
        )
    if not isinstance(_feature(dataset, column), ImageFeature):
        raise ValueError(f"{where}: column {column!r} (--mask_column) holds no images")


def _feature(dataset: Dataset | IterableDataset, column: str) -> Any:
    """The feature type of a column, one of the library's dozen."""
    assert dataset.features is not None
    return dataset.features[column]


def _other_column(flag: str, column: str, columns: Sequence[str], num_classes: int | None) -> str:
    """Suggests the column that was meant, a close name or a usual one."""
    usual = IMAGE_COLUMNS if flag == "--image_column" else CAPTION_COLUMNS if num_classes is None else LABEL_COLUMNS
    likely = [name for name in columns if name.lower() in usual]
    close = close_match(column, [name for name in columns if name not in likely], f"{flag} ")
    return f"; did you mean {flag} {likely[0]}?" if likely else close


def _folder_hint(dataset: Dataset | IterableDataset, flag: str, column: str, num_classes: int | None) -> str:
    if "imagefolder" not in str(dataset.info.builder_name):
        return ""
    if flag == "--image_column":
        return "; a metadata file names its images in the column file_name"
    if num_classes is not None:
        return (
            "; a folder of images takes its class labels from its sub-folders' names if all images lie at one "
            "depth, or from a metadata.jsonl"
        )
    return (
        f"; a folder of images takes its captions from a metadata.jsonl with the keys file_name and {column}, "
        "or, as --train_data_dir, from .txt files with the images' names; --instance_prompt gives all the same one"
    )


def _with_texts(
    dataset: Dataset | IterableDataset, columns: Sequence[str], instance_prompt: str | None
) -> Dataset | IterableDataset:
    """Caption columns without any value, which have no type, become texts, unless there is no caption at all."""
    types = dataset.features or {}
    empty = [name for name in columns if getattr(types.get(name), "dtype", None) == "null"]
    if instance_prompt is None and len(empty) == len(columns):
        return dataset
    for name in empty:
        dataset = dataset.cast_column(name, Value("string"))
    return dataset


def _check_captions(dataset: Dataset | IterableDataset, column: str, where: str) -> None:
    feature = _feature(dataset, column)
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)  # of a list's entries, or of the value itself
    if kind not in ("string", "large_string"):
        keys = [key for key in feature if key in CAPTION_COLUMNS] if isinstance(feature, dict) else []
        hint = f"; did you mean --caption_column {column}.{keys[0]}?" if keys else ""
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold strings or lists of strings, "
            f"but its first value is {next(iter(dataset[column]), None)!r}{hint}"
        )


def _check_labels(dataset: Dataset | IterableDataset, column: str, where: str, num_classes: int) -> None:
    feature = _feature(dataset, column)
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold class labels, numbers from 0 on, "
            f"but its first value is {next(iter(dataset[column]), None)!r}"
        )
    if isinstance(dataset, IterableDataset):  # StreamedImages checks each label when it reads the row
        return
    labels = [label for label in dataset[column] if label is not None]
    if not labels or min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(
            f"{where}: the class labels in column {column!r} (--caption_column) must be from 0 to {num_classes - 1}, "
            f"the classes of this model, but they go from {min(labels, default=None)} to {max(labels, default=None)}"
        )


def class_names(dataset: Dataset | IterableDataset, data: Data) -> list[str]:
    """Class names by label; empty if the data set has none."""
    return list(getattr((dataset.features or {}).get(data.caption_column), "names", None) or [])


def _with_labels_of(
    dataset: Dataset | IterableDataset, column: str, classes: Sequence[str], num_classes: int, where: str
) -> Dataset | IterableDataset:
    """Gives classes the labels that they had when the checkpoint was trained; new ones follow.

    Raises:
        ValueError: if a label has changed and cannot be changed back.
    """
    names = list(getattr(_feature(dataset, column), "names", None) or [])
    if names[: len(classes)] == list(classes):
        return dataset
    merged = [*classes, *(name for name in names if name not in classes)]
    if not names or isinstance(dataset, IterableDataset) or len(merged) > num_classes:
        raise ValueError(
            f"{where}: the checkpoint was trained with other class labels ({_some(classes)}) than the data has now "
            f"({_some(names) or 'numbers without names'}); restore the data, or start another run"
        )
    logger.warning("%s: the classes keep the labels that the checkpoint was trained with: %s", where, _some(merged))
    return _relabelled(dataset, column, merged)


def _relabelled(dataset: Dataset, column: str, merged: Sequence[str]) -> Dataset:
    """With each class's place in ``merged`` as its label."""
    names = _feature(dataset, column).names
    places = {name: label for label, name in enumerate(merged)}
    labels = [None if label is None else places[names[label]] for label in dataset[column]]
    return dataset.remove_columns(column).add_column(column, labels, feature=ClassLabel(names=list(merged)))


def _some(names: Sequence[str]) -> str:
    """Names with their labels, at most SHOWN of them."""
    return ", ".join(f"{label} {name}" for label, name in enumerate(names[:SHOWN])) + ", ..." * (len(names) > SHOWN)


def data_folders(data: Data, cache_dir: str | None) -> list[str]:
    """Folders that a data set's files may lie in: its own; for a data set of the Hub also the download caches."""
    if data.datasets is not None:
        return list(dict.fromkeys(folder for part in data.parts for folder in data_folders(part.data, cache_dir)))
    if not data.dataset_name:
        return [folder for folder in (data.train_data_dir, data.mask_data_dir) if folder]
    downloads = os.path.join(cache_dir or datasets.config.HF_DATASETS_CACHE, "downloads")
    own = (f"hf://datasets/{data.dataset_name}", data.dataset_name, data.train_data_dir)
    return [folder for folder in (*own, HF_HUB_CACHE, downloads) if folder]


def shard_files(folder: str) -> tuple[str, list[Path]]:
    """Finds the shards in a folder and below it.

    Returns:
        the name of load_dataset's builder that reads them, and the files in order.

    Raises:
        ValueError: if there are none, or both kinds.
    """
    contents = Contents.of(folder)
    names = (file for file in contents.files if suffix(file) in SHARDS and file not in contents.metadata)
    files = sorted(Path(folder, os.path.relpath(name, contents.folder)) for name in names)
    kinds = {SHARDS[suffix(file)] for file in files}
    if len(kinds) != 1:
        links = [os.path.relpath(place, folder) for place, why in contents.unread.items()]
        raise ValueError(
            f"--train_data_dir {folder}: --streaming reads a folder of .parquet files or one of .tar files "
            f"(WebDataset), and this one has {'both' if kinds else 'neither'}"
            + ("" if kinds else "; a folder of images is read without --streaming")
            + (f"; the linked or closed sub-folder {links[0]} is not read" if links else "")
        )
    return kinds.pop(), files


def held_out_names(folder: str, files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Sub-folders named like a split that is not trained on, beside other files; also of shards the first word of the
    name, as in ``test-00000-of-00002.parquet``."""
    paths, shards = [os.fspath(file) for file in files], tuple(SHARDS)
    places = {(os.path.dirname(path), _first_word(path) if path.endswith(shards) else "") for path in paths}
    found = set()
    for parent, first in places:
        parts = (*Path(os.path.relpath(parent, folder)).parts, first)
        found.add(next((part for part in parts if part.lower() in HELD_OUT), ""))
    return sorted(found - {""}) if len(found) > 1 else []


def _first_word(path: str) -> str:
    return re.split(r"[-_.]", os.path.basename(path))[0]
