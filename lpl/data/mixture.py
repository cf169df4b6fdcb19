"""Several data sets as one: rows of all of them, with repeats and loss weights.

A *row* is a place in the joined data set, an *item* one in an epoch: with repeats a row has several items. Items 0 to
N - 1 are the N rows, in order; the further ones are the repeats: all rows that come at least twice, those that come at
least three times, and so on. So items are rows where nothing is repeated. Random numbers belong to the item: the
repeats of an image are cropped, mirrored and noised each in its own way.

A joined data set has the columns :data:`NAME`, :data:`REPEATS` and :data:`LOSS_WEIGHT` besides image and caption.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset, Value, concatenate_datasets
from datasets import List as ListFeature

from lpl.config.groups import Data, Part
from lpl.data.captions import CAPTION_COLUMNS, caption_columns, caption_rows, texts_of
from lpl.data.folder import Contents
from lpl.tools.words import counted, distinct


NAME, REPEATS, LOSS_WEIGHT = OWN_COLUMNS = ("lpl_data_set", "lpl_repeats", "lpl_loss_weight")
# kohya's folders, "10_sks dog": repeats and the caption of images without one. No number of them has a leading zero or
# four digits: "01_cats" and "2024_summer" are names.
KOHYA = re.compile(r"([1-9]\d{0,2})_(.+)")


# The data sets -------------------------------------------------------------------------------------------------------


def parts_of(data: Data, class_conditional: bool) -> list[Part]:
    """The data sets that are trained on. A folder with kohya's sub-folders is one for each of them."""
    parts = data.parts
    return parts if class_conditional else [found for part in parts for found in _kohya_parts(part)]


def _kohya_parts(part: Part) -> list[Part]:
    if not (folders := kohya_folders(part.data)):
        return [part]
    masks = {folder: _masks_of(part.data.mask_data_dir, folder) for folder in folders}
    if not any(masks.values()):
        masks = dict.fromkeys(folders, part.data.mask_data_dir)  # which is refused, with the reason
    parts = []
    for folder in folders:
        name = os.path.basename(folder)
        repeats, prompt = KOHYA.fullmatch(name).groups()  # type: ignore[union-attr]
        own = part.data.instance_prompt
        values = {"train_data_dir": folder, "instance_prompt": prompt if own is None else own}
        values["mask_data_dir"] = masks[folder]
        parts.append(Part(name, replace(part.data, **values), part.repeats * int(repeats), part.loss_weight))
    return parts


def _masks_of(masks: str | None, folder: str) -> str | None:
    """Where the loss masks of one of kohya's folders are, a folder of its name or that of all; None: it has none."""
    if masks is None:
        return None
    places = os.path.join(masks, os.path.basename(folder)), masks
    return next((place for place in places if os.path.isdir(place) and Contents.of(folder).masks_in(place)), None)


def kohya_folders(data: Data) -> list[str]:
    """The sub-folders of a folder of images in kohya's layout; none if it has another."""
    if data.dataset_name or data.streaming or not data.train_data_dir:
        return []
    contents = Contents.of(data.train_data_dir)
    places = contents.image_folders
    if contents.folder in (*places, *map(os.path.dirname, contents.metadata)):
        return []
    folders = {os.path.relpath(place, contents.folder).split(os.sep)[0] for place in places}
    if not all(map(KOHYA.fullmatch, folders)):
        return []
    return [os.path.join(data.train_data_dir, name) for name in sorted(folders)]


def is_mixture(parts: Sequence[Part]) -> bool:
    """Whether data sets must be joined: there are several, or repeats, or weights."""
    return len(parts) > 1 or any(part.repeats != 1 or part.loss_weight != 1 for part in parts)


def joined(parts: Sequence[Part], loaded: Sequence[Dataset], data: Data) -> Dataset:
    """One data set of several, in order, with the column names of ``data``.

    If one of them has several caption columns, each keeps its own, and the column :data:`CAPTION_COLUMNS` names them.
    """
    names = distinct([part.name for part in parts])
    words = [part.data.caption_column for part in parts]
    apart = data.several_caption_columns
    renamed = [
        _renamed(
            dataset,
            {part.data.image_column: data.image_column}
            | ({} if apart else {part.data.caption_column: data.caption_column}),
        )
        for part, dataset in zip(parts, loaded)
    ]
    captions = [
        list(caption_columns(word, dataset.column_names)) if apart else [data.caption_column]
        for word, dataset in zip(words, renamed)
    ]
    lists = {
        name
        for name in {name for of_one in captions for name in of_one}
        if any(isinstance(_feature(dataset, name), ListFeature) for dataset in renamed)
    }
    marked = []
    for number, (part, dataset, columns) in enumerate(zip(parts, renamed, captions)):
        dataset = with_prompt(dataset, columns, part.data.instance_prompt)  # each data set's own
        for name in columns:
            dataset = _of_one_type(dataset, name, name in lists)
        values = {NAME: number, REPEATS: part.repeats, LOSS_WEIGHT: float(part.loss_weight)}
        features = {NAME: ClassLabel(names=names), REPEATS: Value("int32"), LOSS_WEIGHT: Value("float64")}
        if apart:
            values[CAPTION_COLUMNS], features[CAPTION_COLUMNS] = words[number], Value("string")
        for name, value in values.items():
            column = np.full(len(dataset), value)
            dataset = dataset.add_column(name, column, feature=features[name])  # type: ignore[arg-type]
        marked.append(dataset)
    return concatenate_datasets(marked)


def _renamed(dataset: Dataset, names: dict[str, str]) -> Dataset:
    changed = {old: new for old, new in names.items() if old != new and old in dataset.column_names}
    return dataset.rename_columns(changed) if changed else dataset


def _feature(dataset: Dataset, column: str) -> object:
    return dataset.features.get(column)


def with_prompt(dataset: Dataset, columns: Sequence[str], prompt: str | None) -> Dataset:
    """With a prompt, in the first of the columns, as the caption of images that have none; unchanged without one."""
    if prompt is None:
        return dataset
    column, there = columns[0], [name for name in columns if name in dataset.column_names]
    lacking = [not any(texts_of(value) for value in row.values()) for row in caption_rows(dataset, there)]
    if not any(lacking):
        return dataset
    captions = list(dataset[column]) if column in there else [None] * len(dataset)
    feature = dataset.features[column] if column in there else Value("string")
    missing = [prompt] if isinstance(feature, ListFeature) else prompt
    filled = [missing if lacks else caption for lacks, caption in zip(lacking, captions)]
    rest = dataset.remove_columns(column) if column in there else dataset
    return rest.add_column(column, filled, feature=feature)  # type: ignore[arg-type]


def _of_one_type(dataset: Dataset, column: str, several: bool) -> Dataset:
    """Captions as strings, or as lists of strings where another data set has such; class labels unchanged."""
    feature = _feature(dataset, column)
    if isinstance(feature, ListFeature):
        return dataset.cast_column(column, ListFeature(Value("string")))
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        return dataset
    if not several:
        return dataset.cast_column(column, Value("string"))
    lists = [caption if caption is None else [caption] for caption in dataset[column]]
    return dataset.remove_columns(column).add_column(column, lists, feature=ListFeature(Value("string")))  # type: ignore[arg-type]


def without_marks(dataset: Dataset) -> Dataset:
    """For the held-out part, in which every image comes once and counts alike."""
    return dataset.remove_columns([name for name in OWN_COLUMNS if name in dataset.column_names])


# Rows and items ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """What a joined data set says of its rows.

    Args:
        names: of the data sets.
        part: number of the data set of each row.
        repeats, loss_weights: of each row.
    """

    names: Sequence[str]
    part: np.ndarray  # (N,)
    repeats: np.ndarray  # (N,)
    loss_weights: np.ndarray  # (N,)
    further: np.ndarray  # rows of the items from N on

    @classmethod
    def of(cls, dataset: Dataset | IterableDataset) -> Mixture | None:
        """None: the data set is not joined."""
        if not isinstance(dataset, Dataset) or NAME not in dataset.column_names:
            return None
        marks = dataset.select_columns(list(OWN_COLUMNS)).with_format("numpy")[:]
        repeats = marks[REPEATS]
        rounds = [np.flatnonzero(repeats > times) for times in range(1, int(repeats.max()))]
        further = np.concatenate(rounds) if rounds else np.zeros(0, int)
        return cls(dataset.features[NAME].names, marks[NAME], repeats, marks[LOSS_WEIGHT], further)

    @property
    def rows(self) -> np.ndarray:
        """The row of each item."""
        return np.concatenate([np.arange(len(self.part)), self.further])

    def row_of(self, item: int) -> int:
        """The row of an item."""
        return item if item < len(self.part) else int(self.further[item - len(self.part)])

    @property
    def weighted(self) -> bool:
        """Whether some loss weight is not 1."""
        return bool((self.loss_weights != 1).any())

    def name_of(self, row: int) -> str:
        """The name of a row's data set."""
        return self.names[int(self.part[row])]

    def in_words(self) -> list[tuple[str, str]]:
        """Each data set and what is trained on of it."""
        listed = []
        for number, name in enumerate(self.names):
            rows = np.flatnonzero(self.part == number)
            words = counted(len(rows), "image")
            if len(rows):
                words += f" x {self.repeats[rows[0]]}" if self.repeats[rows[0]] != 1 else ""
                words += f", loss weight {self.loss_weights[rows[0]]:g}" if self.weighted else ""
            listed.append((name, words))
        return listed
