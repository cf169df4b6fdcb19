"""A folder of images with captions or class labels, and what else lies there.

Captions come from *metadata files*, ``metadata.jsonl``, ``.csv`` or ``.parquet``, in the folder or below it; their
``file_name`` is relative to them. Where there is none, they come from *text files*: ``cat.txt`` or ``cat.caption``
beside ``cat.png``, whose lines are one caption, or one each (--caption_per_line). Class labels come from a metadata
file, or from sub-folders' names.

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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets import Image as ImageFeature

from lpl.data import masks
from lpl.data.captions import caption_columns
from lpl.data.formats import SUFFIXES, not_read
from lpl.data.reading import lies_in
from lpl.data.texts import Content, contents_of
from lpl.tools.words import counted


logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column that names the images
TEXTS = (".caption", ".txt")  # the later one counts
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}
BUILDER = "imagefolder"  # the library's name for such data sets
NAMED = 3  # a sentence names at most this many files
Row = Mapping[str, Any]  # of a metadata file, by column


@dataclass(frozen=True)
class Contents:
    """What lies in a folder and below it.

    Args:
        folder: its absolute path.
        files: absolute paths, sorted.
        unread: what is not read, and why.
        odd: files that are links, pipes, or anything else than plain files.
    """

    folder: str
    files: list[str]
    unread: dict[str, str]
    odd: set[str]

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Contents:
        """Looks at names only. Within :func:`listed_once`, a folder is looked at once."""
        place, known = os.path.abspath(folder), {} if _listed is None else _listed
        if place not in known:
            known[place] = cls(place, [], {}, set())._filled()
        return known[place]

    def _filled(self) -> Contents:
        waiting = [self.folder]
        while waiting:
            waiting += self._add(waiting.pop())
        self.files.sort()
        return self

    def _add(self, parent: str) -> list[str]:
        """Adds the files of a folder, and returns its sub-folders."""
        folders = []
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not _is_folder(entry):
                        self._add_file(entry)
                    elif not _visible(entry.name):
                        continue
                    elif entry.is_symlink():
                        self.unread[entry.path] = f"a link to {os.path.realpath(entry.path)}"
                    else:
                        folders.append(entry.path)
        except OSError as error:
            self.unread[str(error.filename or parent)] = str(error.strerror)
        return folders

    def _add_file(self, entry: os.DirEntry[str]) -> None:
        path = entry.path
        if not path.isascii() and (printable := os.fsencode(path).decode(errors="backslashreplace")) != path:
            self.unread[printable] = "its name is not in UTF-8"
            return
        self.files.append(path)
        if not entry.is_file(follow_symlinks=False):
            self.odd.add(path)

    @cached_property
    def by_suffix(self) -> dict[str, list[str]]:
        """Files by their suffix in lower case, sorted."""
        found: dict[str, list[str]] = {}
        for file in self.files:
            found.setdefault(file[file.rfind(".") :], []).append(file)  # a million times: no os.path
        merged: dict[str, list[str]] = {}
        for kind, files in found.items():
            merged.setdefault(kind.lower() if kind[0] == "." and os.sep not in kind else "", []).extend(files)
        return {kind: sorted(files) for kind, files in merged.items()}

    @cached_property
    def images(self) -> list[str]:
        """Files that have the name of an image, and not that of a loss mask."""
        of_masks = set(self.masks.values())
        return [file for file in self._pictures if file not in of_masks] if of_masks else self._pictures

    @cached_property
    def masks(self) -> dict[str, str]:
        """Loss masks by the path of their image without suffix."""
        return masks.beside(self._pictures)

    def with_masks(self, folder: str) -> Contents:
        """With the loss masks of another folder instead of those beside the images.

        Raises:
            ValueError: if no image has a mask there.
        """
        inside = os.path.join(os.path.abspath(folder), "")
        others = replace(self, files=[file for file in self.files if not file.startswith(inside)])
        found = masks.in_folder(others.images, self.folder, Contents.of(folder)._pictures, folder)
        if not found:
            raise ValueError(
                f"--mask_data_dir {folder}: no mask there has the name of an image, such as "
                f"{os.path.splitext(os.path.basename(others.images[0]))[0]}.png"
                if others.images
                else ""
            )
        vars(others)["masks"] = {**others.masks, **found}
        return others

    @cached_property
    def _pictures(self) -> list[str]:
        return sorted(file for kind, files in self.by_suffix.items() if kind in SUFFIXES for file in files)

    @cached_property
    def metadata(self) -> list[str]:
        kinds = {suffix(name) for name in METADATA}
        files = [file for kind in kinds for file in self.by_suffix.get(kind, ())]
        return sorted(file for file in files if os.path.basename(file).lower() in METADATA)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Text files by the path without suffix."""
        return {file[: -len(kind)]: file for kind in TEXTS for file in self.by_suffix.get(kind, ())}

    @cached_property
    def captioned(self) -> list[str]:
        """Images with a text file beside them."""
        texts = self.texts
        return [file for file in self.images if file[: file.rfind(".")] in texts]

    @property
    def kinds(self) -> Counter[str]:
        """Numbers of files by suffix."""
        return Counter({kind: len(files) for kind, files in self.by_suffix.items()})

    @cached_property
    def known(self) -> set[str]:
        return set(self.files)

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
        if path not in self.known and not os.path.lexists(path):
            path = os.path.normpath(os.path.join(os.path.dirname(metadata), name.replace("\\", "/")))
            fitting = self._spellings.get(_spelling(path), [])
            path = fitting[0] if len(fitting) == 1 else path
        if "://" in name or not path.startswith(self.folder.rstrip(os.sep) + os.sep):
            raise ValueError(f"{metadata}: {FILE_NAME} {name!r} is not inside the directory {self.folder}")
        return path

    def without_images(self) -> str:
        """Why there is nothing to train on, and what to do."""
        kinds = self.kinds
        if left := self.left_out():
            return f"the folder has no images, but {'; '.join(left)}"
        if ".parquet" in kinds or ".arrow" in kinds:
            return "the folder has no images, but .parquet or .arrow files; give it as --dataset_name"
        found = ", ".join(f"{count} x {kind or 'no suffix'}" for kind, count in kinds.most_common(NAMED))
        return f"the folder has no images (it has {found or 'no files'})"

    def left_out(self) -> list[str]:
        """What is there, was perhaps meant, and is not read, with what to do."""
        found = [
            f"{os.path.relpath(place, self.folder)} is {why} and is not read; copy the folder itself there"
            if why.startswith("a link")
            else f"{os.path.relpath(place, self.folder)} cannot be read ({why})"
            for place, why in self.unread.items()
        ]
        if archives := sorted(file for kind in ARCHIVES for file in self.by_suffix.get(kind, ())):
            names = ", ".join(os.path.relpath(file, self.folder) for file in archives[:NAMED])
            found.append(
                f"{counted(len(archives), 'archive')} that must be unpacked first ({names}); .tar files of "
                "WebDataset are read by --streaming"
            )
        return found + not_read(self.kinds)


_listed: dict[str, Contents] | None = None  # by path, within listed_once


@contextmanager
def listed_once() -> Iterator[None]:
    """Within, each folder is listed once, however often it is asked for; what changes there meanwhile is not seen."""
    global _listed
    _listed = {}
    try:
        yield
    finally:
        _listed = None


def suffix(file: str | os.PathLike[str]) -> str:
    """In lower case, with its dot."""
    return os.path.splitext(file)[1].lower()


def _visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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
        texts = text_lines(contents, cache)
        _warn_of_missing_texts(contents, texts, instance_prompt)
        if any(lines for lines, _ in texts):
            name = next(iter(caption_columns(caption_column, ())))
            columns = {name: [lines if per_line or not lines else " ".join(lines) for lines, _ in texts]} | columns
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


def text_captions(contents: Contents, cache: str | os.PathLike[str] | None = None) -> list[tuple[str | None, str]]:
    """For each image the caption beside it, all lines of the text file, or None and why there is none.

    Args:
        cache: folder for the index of a large folder's text files, see :mod:`lpl.data.texts`.
    """
    return [(" ".join(lines) if lines else None, why) for lines, why in text_lines(contents, cache)]


def text_lines(contents: Contents, cache: str | os.PathLike[str] | None = None) -> list[tuple[list[str] | None, str]]:
    """For each image the lines of the text file beside it, or None and why there are none; see
    :func:`text_captions`."""
    texts = contents.texts
    files = [texts.get(image[: image.rfind(".")]) for image in contents.images]
    inside = [
        file for file in dict.fromkeys(files) if file and (file not in contents.odd or _leads_in(file, contents))
    ]
    found = dict(zip(inside, contents_of(inside, contents.folder, cache)))
    return [
        (None, "without a text file of the same name") if file is None else _lines(file, found.get(file))
        for file in files
    ]


def _leads_in(file: str, contents: Contents) -> bool:
    """Whether a link leads to a plain file in the folder; a pipe would block."""
    return os.path.isfile(file) and lies_in(file, contents.folder)


def _lines(file: str, content: Content | None) -> tuple[list[str] | None, str]:
    """The lines of a text file, without empty ones, or None and why there are none."""
    if content is None:
        return None, "with a link out of the folder"
    if isinstance(content, OSError):
        return None, "with a text file that cannot be read"
    try:
        lines = (" ".join(line.split()) for line in decoded(content, file).splitlines())
        return list(filter(None, lines)) or None, "with an empty text file"
    except ValueError:
        return None, "with a text file that is not in UTF-8"


def _warn_of_missing_texts(
    contents: Contents, captions: Sequence[tuple[list[str] | None, str]], instance_prompt: str | None
) -> None:
    causes: dict[str, list[str]] = {}
    for image, (lines, why) in zip(contents.images, captions):
        if lines is None:
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


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark, as Windows writes it.

    Raises:
        ValueError: for another encoding.
    """
    return decoded(Path(file).read_bytes(), file)


def decoded(content: bytes, file: str | os.PathLike[str]) -> str:
    """The text of a file's bytes, see :func:`read_text`."""
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
