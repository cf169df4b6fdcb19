"""A folder of images with captions or class labels, and what else lies there.

Captions come from *metadata files*, ``metadata.jsonl``, ``.csv`` or ``.parquet``, in the folder or below it; their
``file_name`` is relative to them. Where there is none, they come from *text files*: ``cat.txt`` or ``cat.caption``
beside ``cat.png``, whose lines are one caption. Class labels come from a metadata file, or from sub-folders' names.

Hidden files and folders, and those whose name begins with two underscores, are skipped. Linked sub-folders are not
followed, since they may lead anywhere; they are named instead.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets import Image as ImageFeature

from lpl.data.formats import SUFFIXES, not_read
from lpl.data.reading import lies_in
from lpl.tools.words import counted


logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column that names the images
TEXTS = (".txt", ".caption")
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}
BUILDER = "imagefolder"  # the library's name for such data sets
READERS = 8  # threads, since files may lie on a network disk
NAMED = 3  # a sentence names at most this many files
Row = Mapping[str, Any]  # of a metadata file, by column


@dataclass(frozen=True)
class Contents:
    """What lies in a folder and below it.

    Args:
        folder: its absolute path.
        files: absolute paths, sorted.
        unread: what is not read, and why.
    """

    folder: str
    files: list[str]
    unread: dict[str, str]

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Contents:
        """Looks at names only."""
        place, files, unread = os.path.abspath(folder), [], {}
        walk = os.walk(place, onerror=lambda error: unread.update({str(error.filename): str(error.strerror)}))
        for parent, folders, names in walk:
            folders[:] = [name for name in folders if _visible(name)]
            for path in (os.path.join(parent, name) for name in names if not name.startswith(".")):
                printable = os.fsencode(path).decode(errors="backslashreplace")
                if printable == path:
                    files.append(path)
                else:
                    unread[printable] = "its name is not in UTF-8"
            for path in (os.path.join(parent, name) for name in folders):
                if os.path.islink(path):
                    unread[path] = f"a link to {os.path.realpath(path)}"
        return cls(place, sorted(files), unread)

    @cached_property
    def images(self) -> list[str]:
        """Files that have the name of an image."""
        return [file for file in self.files if suffix(file) in SUFFIXES]

    @cached_property
    def metadata(self) -> list[str]:
        return [file for file in self.files if os.path.basename(file).lower() in METADATA]

    @cached_property
    def texts(self) -> dict[str, str]:
        """Text files by the path without suffix."""
        files = [file for file in self.files if suffix(file) in TEXTS]
        return {os.path.splitext(file)[0]: file for file in files}

    @property
    def captioned(self) -> list[str]:
        """Images with a text file beside them."""
        return [file for file in self.images if os.path.splitext(file)[0] in self.texts]

    @cached_property
    def _spellings(self) -> dict[str, list[str]]:
        spellings: dict[str, list[str]] = {}
        for file in self.files:
            spellings.setdefault(_spelling(file), []).append(file)
        return spellings

    def named(self, name: str, metadata: str) -> str:
        r"""The path of the file that a metadata file names.

        A name with ``\`` for ``/``, in other case, or in another Unicode form means the only file that it fits.

        Raises:
            ValueError: if it leads out of the folder.
        """
        path = os.path.normpath(os.path.join(os.path.dirname(metadata), name))
        if not os.path.lexists(path):
            path = os.path.normpath(os.path.join(os.path.dirname(metadata), name.replace("\\", "/")))
            fitting = self._spellings.get(_spelling(path), [])
            path = fitting[0] if len(fitting) == 1 else path
        if "://" in name or not path.startswith(self.folder.rstrip(os.sep) + os.sep):
            raise ValueError(f"{metadata}: {FILE_NAME} {name!r} is not inside the directory {self.folder}")
        return path

    def without_images(self) -> str:
        """Why there is nothing to train on, and what to do."""
        kinds = Counter(suffix(file) or "no suffix" for file in self.files)
        if left := self.left_out():
            return f"the folder has no images, but {'; '.join(left)}"
        if ".parquet" in kinds or ".arrow" in kinds:
            return "the folder has no images, but .parquet or .arrow files; give it as --dataset_name"
        found = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(NAMED))
        return f"the folder has no images (it has {found or 'no files'})"

    def left_out(self) -> list[str]:
        """What is there, was perhaps meant, and is not read, with what to do."""
        found = [
            f"{os.path.relpath(place, self.folder)} is {why} and is not read; copy the folder itself there"
            if why.startswith("a link")
            else f"{os.path.relpath(place, self.folder)} cannot be read ({why})"
            for place, why in self.unread.items()
        ]
        if archives := [file for file in self.files if suffix(file) in ARCHIVES]:
            names = ", ".join(os.path.relpath(file, self.folder) for file in archives[:NAMED])
            found.append(
                f"{counted(len(archives), 'archive')} that must be unpacked first ({names}); .tar files of "
                "WebDataset are read by --streaming"
            )
        return found + not_read(Counter(map(suffix, self.files)))


def suffix(file: str | os.PathLike[str]) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(file)[1].lower()


def _visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _spelling(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Files in a folder and below it that have the name of an image."""
    root = os.path.abspath(folder)
    return [Path(folder, os.path.relpath(file, root)) for file in Contents.of(folder).images]


def why_no_images(folder: str | os.PathLike[str]) -> str | None:
    """Why a place is no folder of images, and what to give instead; None: it is one."""
    if os.path.isdir(folder):
        contents = Contents.of(folder)
        return None if contents.images else contents.without_images()
    if os.path.isfile(folder):
        return "this is a file; give a folder of images"
    return "there is no such folder"


# Captions ------------------------------------------------------------------------------------------------------------


def folder_dataset(folder: str, caption_column: str, class_conditional: bool) -> Dataset:
    """The images of a folder in the column ``image``, undecoded, with captions or class labels.

    Columns of a metadata file that are neither images nor ``caption_column`` are left empty.

    Raises:
        ValueError: if a metadata file cannot be read, or names nothing that is there.
    """
    contents = Contents.of(folder)
    for problem in contents.left_out():
        logger.warning("--train_data_dir %s: %s", folder, problem)
    info = DatasetInfo(builder_name=BUILDER)
    if contents.metadata:
        columns = _from_metadata(contents, caption_column, class_conditional)
        images = [name for name, values in columns.items() if isinstance(values, _Files)]
        dataset = Dataset.from_dict({name: list(values) for name, values in columns.items()}, info=info)
        for name in images:
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
        return dataset
    features, columns = Features({"image": ImageFeature(decode=False)}), {"image": contents.images}
    if class_conditional:
        labels = [os.path.basename(os.path.dirname(file)) for file in contents.images]
        if len(set(labels)) > 1 and len({file.count(os.sep) for file in contents.images}) == 1:
            features["label"] = ClassLabel(names=sorted(set(labels)))
            columns["label"] = labels
        return Dataset.from_dict(columns, features, DatasetInfo(features=features, builder_name=BUILDER))
    if contents.captioned:
        captions = text_captions(contents)
        _warn_of_missing_texts(contents, captions)
        columns = {caption_column: captions} | columns
    return Dataset.from_dict(columns, info=info).cast_column("image", ImageFeature(decode=False))


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
    for column in named:
        values = [row.get(column) for _, _, row in rows]
        if column == FILE_NAME or column.endswith(f"_{FILE_NAME}"):
            name = column[: -len(f"_{FILE_NAME}")] or "image"
            files = (contents.named(value, file) if value else None for (file, _, _), value in zip(rows, values))
            columns[name] = _Files(files)
        elif column not in columns:
            columns[column] = values if column == caption_column else [None] * len(rows)
    labels = columns.get(caption_column, [])
    kinds = {type(label): label for label in labels if label is not None}
    if len(kinds) > 1:
        values = " and ".join(map(repr, kinds.values()))
        raise ValueError(f"column {caption_column!r} (--caption_column) has values of several kinds, such as {values}")
    if class_conditional and labels and all(map(_is_label, labels)):
        columns[caption_column] = list(map(int, labels))
    _warn_of_files(contents, [file for values in columns.values() if isinstance(values, _Files) for file in values])
    return columns


def _is_label(value: Any) -> bool:
    """Whether a value of a csv file is a class label."""
    return isinstance(value, str) and value.strip().removeprefix("-").isdecimal()


def _warn_of_files(contents: Contents, files: Sequence[str | None]) -> None:
    known = set(contents.files)
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


def text_captions(contents: Contents) -> list[str | None]:
    """The caption beside each image; None where there is none (:func:`_text_beside`)."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda image: _text_beside(image, contents)[0], contents.images))


def _text_beside(image: str, contents: Contents) -> tuple[str | None, str]:
    """The caption beside an image, or None and why there is none."""
    file = contents.texts.get(os.path.splitext(image)[0])
    if file is None:
        return None, "without a text file of the same name"
    if not os.path.isfile(file) or not lies_in(file, contents.folder):  # a pipe would block
        return None, "with a link out of the folder"
    try:
        return " ".join(read_text(file).split()) or None, "with an empty text file"
    except ValueError:
        return None, "with a text file that is not in UTF-8"
    except OSError:
        return None, "with a text file that cannot be read"


def _warn_of_missing_texts(contents: Contents, captions: Sequence[str | None]) -> None:
    causes: dict[str, list[str]] = {}
    for image, caption in zip(contents.images, captions):
        if caption is None:
            causes.setdefault(_text_beside(image, contents)[1], []).append(image)
    lacking = sum(map(len, causes.values()))
    found = ", ".join(
        f"{len(images)} {cause} ({os.path.relpath(images[0], contents.folder)})" for cause, images in causes.items()
    )
    if lacking == len(captions):
        raise ValueError(f"no image has a caption: {found}")
    if lacking:
        logger.warning(
            "--train_data_dir %s: %d of %d images have no caption: %s; other images replace them",
            *(contents.folder, lacking, len(captions), found),
        )


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark, as Windows writes it.

    Raises:
        ValueError: for another encoding.
    """
    content = Path(file).read_bytes()
    try:
        return content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8; save it in that encoding ({error})") from None


# Metadata files ------------------------------------------------------------------------------------------------------


def described(contents: Contents) -> Iterator[tuple[str, int, Row]]:
    """Yields (metadata file, line, row) of all metadata files.

    Raises:
        ValueError: if a file cannot be read, or if their kinds differ.
    """
    if len({suffix(file) for file in contents.metadata}) > 1:
        names = " and ".join(os.path.relpath(file, contents.folder) for file in contents.metadata)
        raise ValueError(f"{contents.folder} has metadata files of several kinds, {names}; keep those of one kind")
    for file in contents.metadata:
        for line, row in READ[suffix(file)](file):
            if not isinstance(row.get(FILE_NAME), str | None):
                raise ValueError(f"{file}, line {line}: {FILE_NAME} is {row[FILE_NAME]!r}, but must be a string")
            yield file, line, row


def _jsonl(file: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f'{file}, line {number}: it should be {{"file_name": ..., ...}}, one such line per image')
        yield number, row


def _csv(file: str) -> Iterator[tuple[int, Row]]:
    """Words are taken as they are written: "NA" is a caption. An empty cell is none."""
    text = read_text(file)
    head = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        for row in filter(None, rows):
            if len(row) > len(names):
                raise ValueError(
                    f"{file}, line {rows.line_num}: it has {len(row)} cells, but there are {len(names)} columns; put "
                    'captions with commas between double quotes (")'
                )
            yield rows.line_num, dict.fromkeys(names) | {name: cell or None for name, cell in zip(names, row)}
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: {error}") from None


def _parquet(file: str) -> Iterator[tuple[int, Row]]:
    yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)


READ = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
