"""Tensors on disk by key, whole or absent, memory-mapped: the files of the caches.

A *key* says what an entry was computed from (``cache.py``), so an entry never changes and never has to be looked at
again. Entries lie in *shards*, safetensors files that are written whole and then never changed. Several processes and
runs may add shards to one folder at a time; the worst that happens is that an entry is there twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpl.tools.files import write_whole


logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
OPEN = 512  # shards that a process keeps open
Entry = dict[str, Tensor]


def key_of(*parts: Any) -> str:
    """The key of what these values decide; they must be what JSON can hold.

    >>> key_of("image", [512, 512]) == key_of("image", (512, 512)) != key_of("image", [512, 513])
    True
    """
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class Store:
    """The entries in a folder, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: set[str] = set()
        self._place: dict[str, str] = {}  # the shard of each key
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:  # for the loader's processes; open files stay behind
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __getitem__(self, key: str) -> Entry:
        """The tensors of an entry.

        Raises:
            KeyError: if there is no such entry.
            ValueError: if its shard has disappeared or been damaged.
        """
        name = self._place[key]
        try:
            shard, parts = self._open(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"--data_cache_dir: {self.folder / name} has disappeared or been damaged ({error}); the same command "
                "makes what is missing anew, and --resume_from_checkpoint latest continues the run"
            ) from error
        return {part: shard.get_tensor(f"{key}/{part}") for part in parts[key]}

    def refresh(self) -> None:
        """Look for shards that other processes have added."""
        there = {name for name in _names(self.folder) if name.endswith(SUFFIX) and not name.startswith(".")}
        for name in sorted(there - self._shards):
            if keys := _keys(self.folder / name):  # a damaged one may be written anew by another process
                self._shards.add(name)
            for key in keys:
                self._place.setdefault(key, name)

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Add a shard.

        Raises:
            ValueError: if the disk is full, or the folder cannot be written to.
        """
        name = f"{key_of(sorted(entries))}{SUFFIX}"
        tensors = {f"{key}/{part}": t.contiguous() for key, entry in entries.items() for part, t in entry.items()}
        try:
            write_whole(self.folder / name, lambda unfinished: save_file(tensors, unfinished))
        except OSError as error:
            raise ValueError(
                f"--data_cache_dir: {self.folder} cannot be written to ({error.strerror or error}); make room, or "
                "give another folder; the same command goes on from here"
            ) from error
        self._shards.add(name)
        self._place |= dict.fromkeys(entries, name)

    def _open(self, name: str) -> tuple[Any, dict[str, list[str]]]:
        """A shard, and the parts of its entries by key."""
        if "_opened" not in vars(self):
            self._opened = lru_cache(OPEN)(_opened)
        return self._opened(self.folder / name)


def _opened(shard: Path) -> tuple[Any, dict[str, list[str]]]:
    file, parts = safe_open(shard, "pt"), {}
    for name in file.keys():  # noqa: SIM118, it is no dictionary
        key, _, part = name.partition("/")
        parts.setdefault(key, []).append(part)
    return file, parts


def _names(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return ()


def _keys(shard: Path) -> set[str]:
    """The keys of a shard; none if it is damaged."""
    try:
        with safe_open(shard, "pt") as file:
            return {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError) as error:
        logger.warning("--data_cache_dir: %s is damaged and not used (%s); delete it", shard, error)
        return set()
