"""Files of a run: they appear whole or not at all, and what is read from them is data, never code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


UNFINISHED, REMOVED = ".unfinished", ".removed"  # endings of what is on its way; such names begin with a dot


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a file beside `path`, then move it there: nobody ever sees half of it, not even where the
    machine goes down. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text`, as UTF-8, whole or not at all."""
    return write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, of JSON; one that a crash cut short ends them."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # it may end within a character
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return found


def lines(entries: list[dict[str, Any]]) -> str:
    """What :func:`entries` reads."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def visible_files(folder: Path, place: Path) -> Iterator[Path]:
    """A file, or those in a folder and below it; without hidden ones, which are on their way."""
    paths = sorted(place.rglob("*")) if place.is_dir() else [place]
    for path in paths:
        within = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in within.parts):
            yield within


def sync(folder: Path) -> None:
    """Have the disk hold what was written into a folder, so that it outlives the machine too."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not every system and network disk does that
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """Within, nothing bears that name; behind, the file or folder that did so is deleted, once the disk holds what
    has been put in its place."""
    hidden = path.with_name(f".{path.name}{REMOVED}")
    _delete(hidden)
    if path.exists():
        path.rename(hidden)
    yield
    _sync(path.parent)
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def filled_whole(folder: str | os.PathLike) -> Iterator[Path]:
    """Within, an empty folder to fill; behind, all that is in it has taken its place in ``folder``, one by one, the
    index of a pipeline last. What fails or is killed before leaves everything as it was."""
    folder = Path(folder)
    unfinished = folder / f".result{UNFINISHED}"
    _delete(unfinished)
    unfinished.mkdir(parents=True)
    yield unfinished
    sync(unfinished)
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == "model_index.json"):
        with removed(folder / entry.name):
            entry.rename(folder / entry.name)
    unfinished.rmdir()


def put_back(folder: str | os.PathLike) -> None:
    """After a kill within :func:`filled_whole`: what was to be replaced is back where nothing had replaced it yet."""
    for hidden in Path(folder).glob(f".*{REMOVED}"):
        place = hidden.with_name(hidden.name.removeprefix(".").removesuffix(REMOVED))
        if place.exists():
            _delete(hidden)
        else:
            hidden.rename(place)
    _delete(Path(folder, f".result{UNFINISHED}"))


def remove_halves(folder: str | os.PathLike) -> None:
    """After a kill within :func:`write_whole`, in a folder or one in it: what it had not moved to its place yet."""
    for depth in ("", "*/"):
        for half in Path(folder).glob(f"{depth}.*.[0-9]*.tmp"):
            half.unlink(missing_ok=True)


def save_state(state: Any, path: str | os.PathLike) -> Path:
    """Write a state dict, nested as optimizers have it: its tensors as safetensors, all else as JSON in the header.

    A tensor that is in it several times is written once.

    Raises:
        TypeError: for anything but dicts, lists, tuples, tensors, strings, numbers, bools and None.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(id(value), str(len(names)))
            tensors[name] = value.detach().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[described(key), described(entry)] for key, entry in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [described(entry) for entry in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} is no part of a state")

    structure = json.dumps(described(state))
    return write_whole(path, lambda unfinished: save_file(tensors, unfinished, {"structure": structure}))


def load_state(path: str | os.PathLike) -> Any:
    """Read what :func:`save_state` wrote, with all tensors on the CPU."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        structure = json.loads(file.metadata()["structure"])

    def built(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "tensor":
                return tensors[content]
            case "dict":
                return {built(key): built(entry) for key, entry in content}
            case "list":
                return [built(entry) for entry in content]
        return tuple(built(entry) for entry in content)

    return built(structure)
