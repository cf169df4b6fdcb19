"""TODO: what is here."""

from __future__ import annotations

import glob
import logging
import os
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub.constants import HF_HUB_CACHE

from lpl.data.reading import image_files
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)


SHARDS = {".parquet": "parquet", ".tar": "webdataset"}  # what --streaming reads from a folder


def load_training_images(args: Any, num_classes: int | None = None) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is held out for the validation loss (None: nothing is).

    Args:
        num_classes: of a class-conditional family, whose captions are class labels.

    Raises:
        ValueError: where there is nothing to train on, or a column is missing or of the wrong kind.
    """
    dataset, held_out = load_split(args, "train", num_classes), None
    if args.max_train_samples is not None:
        dataset = dataset.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(dataset))))
    if args.validation_split is not None:
        held_out = load_split(args, args.validation_split, num_classes)
    elif args.validation_every_nth is not None:
        every_nth = range(0, len(dataset), args.validation_every_nth)
        held_out = dataset.select(every_nth)
        dataset = dataset.select(sorted(set(range(len(dataset))) - set(every_nth)))
        if len(dataset) == 0:
            raise ValueError(f"--validation_every_nth {args.validation_every_nth}: nothing is left to train on")
    if held_out is not None:
        held_out = held_out.select(range(min(args.num_validation_samples, len(held_out))))
    return dataset, held_out


def load_split(args: Any, split: str, num_classes: int | None) -> Dataset | IterableDataset:
    """Image and caption column of a split; with --streaming its rows are read when they are needed, and not decoded.

    Raises:
        ValueError: where it cannot be loaded, or a column is missing or of the wrong kind.
    """
    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    options = {"split": split, "cache_dir": args.cache_dir, "streaming": args.streaming}
    try:
        if not args.dataset_name:
            kind, files = "imagefolder", [os.path.join(glob.escape(args.train_data_dir), "**")]
            if args.streaming:
                kind, shards = shard_files(args.train_data_dir)
                files = [glob.escape(str(shard)) for shard in shards]
            # All files under one name: left to itself, the library takes "test" in a file's name for a split.
            dataset = load_dataset(kind, data_files={"train": files}, **options)
        else:
            dataset = load_dataset(
                args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, **options
            )
        if args.streaming:
            dataset = dataset.decode(False)
    except Exception as error:  # the library raises a dozen kinds; each means that there is nothing to train on
        why = first_line(error.__cause__ or error)
        raise ValueError(f"{where}: the data set cannot be loaded: {why}") from error
    check_columns(dataset, args.image_column, args.caption_column, where, num_classes)
    dataset = dataset.select_columns([args.image_column, args.caption_column])
    if args.streaming:
        return dataset
    dataset = dataset.cast_column(args.image_column, ImageFeature(decode=False))  # TrainingImages opens them itself
    if args.dataset_name:
        return dataset
    if (left := len(image_files(args.train_data_dir)) - len(dataset)) > 0:
        logger.warning("%s: %d images are left out, since no metadata file names them", where, left)
    return dataset


def check_columns(
    dataset: Dataset | IterableDataset,
    image_column: str,
    caption_column: str,
    where: str,
    num_classes: int | None = None,
) -> None:
    """Refuse a data set that is empty, lacks the named columns, or has something else in them.

    Raises:
        ValueError: with the columns that there are, and the flag to change.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{where}: the data set has no images")
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"{where}: there is no column {column!r} ({flag}); its columns are "
                f"{', '.join(dataset.column_names)}{_folder_hint(dataset, caption_column, num_classes)}"
            )
    if not isinstance(dataset.features[image_column], ImageFeature):
        raise ValueError(f"{where}: column {image_column!r} (--image_column) holds no images")
    if num_classes is None:
        _check_captions(dataset, caption_column, where)
    else:
        _check_labels(dataset, caption_column, where, num_classes)


def _folder_hint(dataset: Dataset | IterableDataset, caption_column: str, num_classes: int | None) -> str:
    if "imagefolder" not in str(dataset.info.builder_name):
        return ""
    if num_classes is not None:
        return "; a folder of images takes its class labels from its sub-folders' names, or from a metadata.jsonl"
    return (
        "; a folder of images takes its captions from a metadata.jsonl with the keys file_name and " + caption_column
    )


def _check_captions(dataset: Dataset | IterableDataset, column: str, where: str) -> None:
    feature = dataset.features[column]
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)  # of a list's entries, or of the value itself
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold strings or lists of strings, "
            f"but its first value is {next(iter(dataset[column]), None)!r}"
        )


def _check_labels(dataset: Dataset | IterableDataset, column: str, where: str, num_classes: int) -> None:
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold class labels, numbers from 0 on, "
            f"but its first value is {next(iter(dataset[column]), None)!r}"
        )
    if isinstance(dataset, IterableDataset):  # each is looked at when its image is
        return
    labels = [label for label in dataset[column] if label is not None]
    if not labels or min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(
            f"{where}: the class labels in column {column!r} (--caption_column) must be from 0 to {num_classes - 1}, "
            f"the classes of this model, but they go from {min(labels, default=None)} to {max(labels, default=None)}"
        )


def class_names(dataset: Dataset | IterableDataset, column: str) -> dict[int, str]:
    """The names of the classes by label, where the data set has them."""
    return dict(enumerate(getattr(dataset.features[column], "names", None) or []))


def data_folders(args: Any) -> list[str]:
    """Where the files of a data set may lie: in its folder; of one on the Hub, there, or in what was downloaded."""
    if not args.dataset_name:
        return [args.train_data_dir] if args.train_data_dir else []
    downloads = os.path.join(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "downloads")
    own = (f"hf://datasets/{args.dataset_name}", args.dataset_name, args.train_data_dir)
    return [folder for folder in (*own, HF_HUB_CACHE, downloads) if folder]


def shard_files(folder: str) -> tuple[str, list[Path]]:
    """The kind of the shards in a folder and the folders below, as load_dataset names it, and their files in order.

    Raises:
        ValueError: where there are none, or of both kinds.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in SHARDS)
    kinds = {SHARDS[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ValueError(
            f"--train_data_dir {folder}: --streaming reads a folder of .parquet files or one of .tar files "
            f"(WebDataset), and this one has {'both' if kinds else 'neither'}"
            + ("" if kinds else "; a folder of images is read without --streaming")
        )
    return kinds.pop(), files
