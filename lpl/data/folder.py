"""What lies in a folder of images: images, loss masks, metadata files, text files, and what is not read.

*Metadata files* are called ``metadata.jsonl``, ``.csv`` or ``.parquet``; *text files* are ``cat.txt`` or
``cat.caption`` beside ``cat.png``. What is made of them is in ``captioned.py``.

Hidden files and folders, and those whose name begins with two underscores, are skipped. Linked sub-folders are not
followed, since they may lead anywhere; they are named instead.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lpl.data import masks
from lpl.data.formats import SUFFIXES, not_read
from lpl.tools.words import counted


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column that names the images
TEXTS = (".caption", ".txt")  # the later one counts
ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"}
NAMED = 3  # a sentence names at most this many files


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
                    if entry.is_file(follow_symlinks=False):
                        self._add_file(entry.path)
                    elif not _is_folder(entry):
                        self._add_file(entry.path)
                        self.odd.add(entry.path)
                    elif not _visible(entry.name):
                        continue
                    elif entry.is_symlink():
                        self.unread[entry.path] = f"a link to {os.path.realpath(entry.path)}"
                    else:
                        folders.append(entry.path)
        except OSError as error:
            self.unread[str(error.filename or parent)] = str(error.strerror)
        return folders

    def _add_file(self, path: str) -> None:
        if not path.isascii() and (printable := os.fsencode(path).decode(errors="backslashreplace")) != path:
            self.unread[printable] = "its name is not in UTF-8"
        else:
            self.files.append(path)

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
    def image_folders(self) -> list[str]:
        """The folders that images lie in, sorted."""
        return sorted(map(os.path.dirname, {file[: file.rfind(os.sep) + 1] for file in self.images}))

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
        found = others.masks_in(folder)
        if not others.images:
            raise ValueError(f"--mask_data_dir {folder}: the images lie in it; give a folder that has the masks only")
        if not found:
            name = os.path.splitext(os.path.basename(others.images[0]))[0]
            raise ValueError(f"--mask_data_dir {folder}: no mask there has the name of an image, such as {name}.png")
        vars(others)["masks"] = {**others.masks, **found}
        return others

    def masks_in(self, folder: str) -> dict[str, str]:
        """The loss masks of these images in another folder, by the path of their image without suffix."""
        return masks.in_folder(self.images, self.folder, Contents.of(folder)._pictures, folder)

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
