"""The headers of safetensors files: names, shapes and dtypes of the tensors, and metadata, without the weights.

A file is the length of its header (8 bytes), the header in JSON, and the *content*: the bytes of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from lpl.tools.files import write_whole


ALIGNMENT = 8  # bytes; the content begins at a multiple
METADATA = "__metadata__"
CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def empty(shape: Iterable[int], code: str) -> Tensor:
    """A tensor without memory for its numbers, of a dtype by its code in a header."""
    return torch.empty(tuple(shape), dtype=CODES.get(str(code), torch.int8), device="meta")


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, :func:`empty`, and its metadata.

    Raises:
        OSError or SafetensorError: if the file is not whole.
    """
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        return {name: empty(part.get_shape(), part.get_dtype()) for name, part in slices.items()}, (
            file.metadata() or {}
        )


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits. Metadata does not change it."""
    with path.open("rb") as file:
        _header(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a file, beside its own, and leave its content as it is."""

    def write(target: Path) -> None:
        with path.open("rb") as source, target.open("wb") as out:
            header = _header(source)
            header[METADATA] = (header.get(METADATA) or {}) | dict(metadata)
            text = json.dumps(header, ensure_ascii=False).encode()
            text += b" " * (-len(text) % ALIGNMENT)
            out.write(struct.pack("<Q", len(text)) + text)
            shutil.copyfileobj(source, out, 2**24)

    write_whole(path, write)


def _header(file: BinaryIO) -> dict[str, Any]:
    """Reads the header, and leaves the file at the beginning of its content."""
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length))
