"""The data set of a folder of images: their paths with captions or class labels, and loss masks.

Captions come from *metadata files* (:mod:`lpl.data.metadata`) in the folder or below it. Where there is none, they
come from *text files* (:mod:`lpl.data.texts`) beside the images. Class labels come from a metadata file, or from
sub-folders' names.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets import Image as ImageFeature

from lpl.config.groups import Data
from lpl.data import masks
from lpl.data.captions import caption_columns
from lpl.data.folder import FILE_NAME, Contents
from lpl.data.metadata import described
from lpl.data.texts import Caption, text_captions
from lpl.tools.words import counted


logger = logging.getLogger(__name__)

BUILDER = "imagefolder"  # the library's name for such data sets


def folder_dataset(
    folder: str,
    caption_column: str,
    class_conditional: bool,
    instance_prompt: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    per_line: bool = False,
    mask_folder: str | None = None,
) -> Dataset:
    """The images of a folder in the column ``image``, undecoded, with captions or class labels, and loss masks if any.

    Columns of a metadata file that are neither images nor named by ``caption_column`` are left empty.

    Args:
        instance_prompt: stands for missing captions; None: nothing does.
        cache: see :func:`text_captions`.
        per_line: each line of a text file is a caption; the column then holds lists.
        mask_folder: has loss masks with the names of the images, see :func:`lpl.data.masks.in_folder`.

    Raises:
        ValueError: if a metadata file cannot be read, or names nothing that is there.
    """
    contents = Contents.of(folder)
    if mask_folder is not None:
        contents = contents.with_masks(mask_folder)
    for problem in contents.left_out():
        logger.warning("--train_data_dir %s: %s", folder, problem)
    info = DatasetInfo(builder_name=BUILDER)
    if contents.metadata:
        columns = _from_metadata(contents, caption_column, class_conditional)
        if contents.masks and "image" in columns and masks.COLUMN not in columns:
            columns[masks.COLUMN] = _Files(masks.of_images(columns["image"], contents.masks))
        images = [name for name, values in columns.items() if isinstance(values, _Files)]
        dataset = Dataset.from_dict({name: list(values) for name, values in columns.items()}, info=info)
        for name in images:
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        return dataset
    features = Features({"image": ImageFeature(decode=False)})
    columns: dict[str, Any] = {"image": contents.images}
    if contents.masks:
        features[masks.COLUMN] = ImageFeature(decode=False)
        columns[masks.COLUMN] = masks.of_images(contents.images, contents.masks)
    if class_conditional:
        labels = [os.path.basename(os.path.dirname(file)) for file in contents.images]
        if len(set(labels)) > 1 and len({file.count(os.sep) for file in contents.images}) == 1:
            features["label"] = ClassLabel(names=sorted(set(labels)))
            columns["label"] = labels
        return Dataset.from_dict(columns, features, DatasetInfo(features=features, builder_name=BUILDER))
    if contents.captioned:
        texts = text_captions(contents, cache, per_line)
        _warn_of_missing_texts(contents, texts, instance_prompt)
        if caption_column != Data.caption_column:
            logger.warning("%s: captions come from text files, not from --caption_column %s", folder, caption_column)
        if any(caption for caption, _ in texts):
            columns = {next(iter(caption_columns(caption_column, ()))): [caption for caption, _ in texts]} | columns
    dataset = Dataset.from_dict(columns, info=info)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    return dataset


class _Files(list):
    """Paths of images."""


def _from_metadata(contents: Contents, caption_column: str, class_conditional: bool) -> dict[str, Any]:
    rows = list(described(contents))
    if not rows:
        raise ValueError(f"{contents.metadata[0]} has no rows")
    named = list(dict.fromkeys(column for _, _, row in rows for column in row))
    if not any(column.endswith(FILE_NAME) for column in named):
        raise ValueError(
            f"{contents.metadata[0]}: its columns are {', '.join(named)}, but the one with the images' names must be "
            f"{FILE_NAME}"
        )
    columns: dict[str, Any] = {}
    wanted = [caption_column] if class_conditional else list(caption_columns(caption_column, named))
    for column in named:
        values = [row.get(column) for _, _, row in rows]
        if column == FILE_NAME or column.endswith(f"_{FILE_NAME}"):
            name = column[: -len(f"_{FILE_NAME}")] or "image"
            files = (contents.named(value, file) if value else None for (file, _, _), value in zip(rows, values))
            columns[name] = _Files(files)
        elif column not in columns:
            columns[column] = values if column in wanted else [None] * len(rows)
    for column in wanted:
        kinds = {type(value): value for value in columns.get(column, []) if value is not None}
        if len(kinds) > 1:
            values = " and ".join(map(repr, kinds.values()))
            raise ValueError(f"column {column!r} (--caption_column) has values of several kinds, such as {values}")
    labels = columns.get(caption_column, [])
    if class_conditional and labels and all(map(_is_label, labels)):
        columns[caption_column] = list(map(int, labels))
    _warn_of_files(contents, [file for values in columns.values() if isinstance(values, _Files) for file in values])
    return columns


def _is_label(value: Any) -> bool:
    """Whether a value of a csv file is a class label."""
    return isinstance(value, str) and value.strip().removeprefix("-").isdecimal()


def _warn_of_files(contents: Contents, files: Sequence[str | None]) -> None:
    known = contents.known
    missing = [file for file in files if file is not None and file not in known and not os.path.exists(file)]
    if files and len(missing) == len(files):
        raise ValueError(
            f"none of the {len(files)} files that {contents.metadata[0]} names is there, {missing[0]} for example; "
            f"{FILE_NAME} is a path from the metadata file to the image, with its suffix"
        )
    if missing:
        logger.warning(
            "%s: %d of %d rows name a file that is not there, %s for example; other rows replace them",
            *(contents.metadata[0], len(missing), len(files), missing[0]),
        )
    if left := len(set(contents.images) - set(files)):
        logger.warning(
            "--train_data_dir %s: %s left out, since no metadata file names them",
            *(contents.folder, f"{counted(left, 'image')} {'is' if left == 1 else 'are'}"),
        )


def _warn_of_missing_texts(
    contents: Contents, captions: Sequence[tuple[Caption, str]], instance_prompt: str | None
) -> None:
    causes: dict[str, list[str]] = {}
    for image, (caption, why) in zip(contents.images, captions):
        if caption is None:
            causes.setdefault(why, []).append(image)
    lacking = sum(map(len, causes.values()))
    found = ", ".join(
        f"{len(images)} {cause} ({os.path.relpath(images[0], contents.folder)})" for cause, images in causes.items()
    )
    if lacking == len(captions) and instance_prompt is None:
        raise ValueError(f"no image has a caption: {found}")
    if lacking:
        logger.warning(
            "--train_data_dir %s: %d of %d images have no caption: %s; %s",
            *(contents.folder, lacking, len(captions), found),
            "other images replace them" if instance_prompt is None else "they get --instance_prompt",
        )
