"""Text files beside images, whose lines are one caption, or one each (--caption_per_line).

A million captions in a million files take minutes to read, and seconds from one file: those of a large folder are kept
in an index (:mod:`lpl.data.index`) in the cache folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow

from lpl.data.folder import Contents
from lpl.data.index import Index, in_threads, name_of
from lpl.data.reading import lies_in
from lpl.tools.words import decoded


WORTH = 10_000  # files; fewer are read faster than it is worth an index
LARGEST = 2**14  # bytes; larger files are not kept
Content = bytes | OSError  # of a file, or why it cannot be read
Caption = str | list[str] | None


def text_captions(
    contents: Contents, cache: str | os.PathLike[str] | None = None, per_line: bool = False
) -> list[tuple[Caption, str]]:
    """For each image the caption beside it, or None and why there is none.

    Args:
        cache: folder for the index of a large folder's text files.
        per_line: the caption is a list of the file's lines, and not all of them joined.
    """
    texts = contents.texts
    files = [texts.get(image[: image.rfind(".")]) for image in contents.images]
    inside = [
        file for file in dict.fromkeys(files) if file and (file not in contents.odd or _leads_in(file, contents))
    ]
    found = dict(zip(inside, contents_of(inside, contents.folder, cache)))
    return [
        (None, "without a text file of the same name") if file is None else _caption(file, found.get(file), per_line)
        for file in files
    ]


def _leads_in(file: str, contents: Contents) -> bool:
    """Whether a link leads to a plain file in the folder; a pipe would block."""
    return os.path.isfile(file) and lies_in(file, contents.folder)


def _caption(file: str, content: Content | None, per_line: bool) -> tuple[Caption, str]:
    """The caption in a text file, without superfluous space, or None and why there is none."""
    if content is None:
        return None, "with a link out of the folder"
    if isinstance(content, OSError):
        return None, "with a text file that cannot be read"
    try:
        text = decoded(content)
    except ValueError:
        return None, "with a text file that is not in UTF-8"
    caption = [line for part in text.splitlines() if (line := _squeezed(part))] if per_line else _squeezed(text)
    return caption or None, "with an empty text file"


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def read_text(file: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark, as Windows writes it.

    Raises:
        ValueError: for another encoding.
    """
    try:
        return decoded(Path(file).read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is {error}") from None


# Their bytes ---------------------------------------------------------------------------------------------------------


def contents_of(files: Sequence[str], folder: str, cache: str | os.PathLike[str] | None) -> list[Content]:
    """The bytes of each file.

    Args:
        files: paths of plain files in ``folder`` or below it, each once.
        folder: absolute.
        cache: folder for the index; None: there is none.
    """
    if cache is None or len(files) < WORTH:
        return list(chain.from_iterable(in_threads(_contents, files)))
    names = pyarrow.array([file[len(folder) :] for file in files], pyarrow.large_string())
    place = Path(cache, name_of(os.path.realpath(folder)))
    index = Index(place, names, files, {"content": pyarrow.large_binary()})
    places, rows = index.known()
    found = np.full(len(files), None, object)
    found[places] = rows["content"].to_numpy()
    unread = np.setdiff1d(np.arange(len(files)), places, assume_unique=True)
    read = list(chain.from_iterable(in_threads(_contents, [files[int(place)] for place in unread])))
    found[unread] = read
    kept = unread[[_can_be_kept(content, size) for content, size in zip(read, index.stamps[unread, 0])]]
    with suppress(OSError):  # a disk that is full, or another's folder: it is read again next time
        index.add(kept, {"content": found[kept]})
    return cast(list[Content], found.tolist())


def _contents(files: Sequence[str]) -> list[Content]:
    return [_content(file) for file in files]


def _content(file: str) -> Content:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.readall()
    except OSError as error:
        return error


def _can_be_kept(content: Content, size: int) -> bool:
    return not isinstance(content, OSError) and len(content) == size <= LARGEST
