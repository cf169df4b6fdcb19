"""Metadata files of a folder of images: ``metadata.jsonl``, ``.csv`` or ``.parquet``, a row per image.

The column ``file_name`` names the image, relative to the metadata file.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet

from lpl.data.folder import FILE_NAME, Contents, suffix
from lpl.data.texts import read_text


Row = Mapping[str, Any]  # of a metadata file, by column


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
            for name in row:
                if name.endswith(FILE_NAME) and not isinstance(row[name], str | None):
                    raise ValueError(f"{file}, line {line}: {name} is {row[name]!r}, but must be a string")
            yield file, line, row


def _jsonl(file: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\ud" in line.lower():  # perhaps half of an emoji, of a text that was cut
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start : error.end])
            raise ValueError(f"{file}, line {number}: {half} is no whole character; remove it there") from None
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
