"""Files of a run: written atomically, durable after a crash, and read as data, never as code."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lpl.tools.layout import INDEX, LOCK


READY = ".result.ready"  # a result that is whole, and takes the place of the earlier one
UNFINISHED, REMOVED = ".unfinished", ".removed"  # suffixes of temporary names, which begin with a dot
HELD: dict[Path, int] = {}  # folders that this process holds -> their locks, open until it ends


def check_writable(
    what: str, folder: str | os.PathLike, folders: Iterable[str] = (), files: Iterable[str] = ()
) -> None:
    """Refuse a folder that cannot be made or written to; nothing is left there.

    Args:
        what: the flag and its value.
        folders, files: names in it that are written to, whether they exist or not.

    Raises:
        ValueError: with the place, and why.
    """
    for place in (Path(folder), *(Path(folder, name) for name in folders)):
        place = Path(os.path.abspath(place))
        there = next(path for path in (place, *place.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ValueError(f"{what}: {there} is no folder; give a folder that can be written to")
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise ValueError(
                f"{what}: {there} cannot be written to ({error.strerror}); give a folder that can"
            ) from error
    if blocked := next((name for name in files if Path(folder, name).is_dir()), None):
        raise ValueError(
            f"{what}: {blocked} is a folder there, and a file of that name is written; give another folder"
        )


def hold(what: str, folder: str | os.PathLike) -> None:
    """Keep other processes out of a folder until this one ends, however it ends; the folder is made.

    The lock is not passed on to processes that this one forks. Where the file system has no locks, and where the file
    is another user's, nobody is kept out.

    Args:
        what: the flag and its value.

    Raises:
        ValueError: another process holds it.
    """
    place = Path(folder).resolve()
    if place in HELD:
        return
    place.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(place / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError:
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        raise ValueError(
            f"{what}: another run writes to this folder now; wait for its end or stop it, or give another folder "
            f"(if its machine has crashed and the file system has not noticed, remove {place / LOCK})"
        ) from error
    HELD[place] = lock


def write_whole(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Write a file atomically: ``write`` fills a temporary file, which then replaces ``path``.

    Readers never see half a file, not even after a crash of the machine. Creates the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        _permit(unfinished, _usual_mode(path.parent))
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write text atomically, as UTF-8."""
    return write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON Lines log, up to the first line that a crash cut short."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a crash may cut a character
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return found


def number_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a log of numbers; null, which was not finite, is NaN."""
    return [{name: math.nan if value is None else value for name, value in entry.items()} for entry in entries(path)]


def lines(entries: list[dict[str, Any]]) -> str:
    """The text of a JSON Lines log, the inverse of :func:`entries`; JSON has no NaN and no infinity: they are null."""
    return "".join(json.dumps(_with_null(entry), ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)


def _with_null(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }


def visible_files(folder: Path, place: Path) -> Iterator[Path]:
    """The file ``place``, or the files below the folder ``place``, relative to ``folder``.

    Hidden files and folders are temporary and are skipped.
    """
    paths = sorted(place.rglob("*")) if place.is_dir() else [place]
    for path in paths:
        within = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in within.parts):
            yield within


def settle(folder: Path) -> None:
    """Give the files of a folder that was just filled the umask's permissions, and flush all to the disk (fsync), so
    that they survive a crash of the machine."""
    mode = _usual_mode(folder)
    for path in (*folder.rglob("*"), folder):
        _permit(path, mode)
        _sync(path)


def _usual_mode(folder: Path) -> int:
    """The permissions of a new file there, as the umask says."""
    probe = folder / f".mode.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def _permit(path: Path, mode: int) -> None:
    """Give a file the usual permissions: safetensors writes files that only their owner can read.

    A hard link is left as it is: the file is somebody else's too.
    """
    found = path.stat()
    if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) != mode:
        with suppress(OSError):  # some disks have no permissions
            path.chmod(mode)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # unsupported by some systems and network disks
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """Context in which ``path`` does not exist; afterwards the old file or folder is deleted.

    It is deleted only once its replacement is on the disk.
    """
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
    """Context with an empty folder; its entries then replace those of ``folder`` one by one, a pipeline's index last.

    A failure or kill inside the context leaves ``folder`` unchanged; after a later kill, :func:`put_back` goes on.
    """
    folder = Path(folder)
    put_back(folder)
    unfinished = folder / f".result{UNFINISHED}"
    unfinished.mkdir(parents=True)
    yield unfinished
    settle(unfinished)
    _replace_by(unfinished.rename(folder / READY), folder)


def _replace_by(ready: Path, folder: Path) -> None:
    """Move the entries of a folder into another one, in place of those there."""
    for entry in sorted(ready.iterdir(), key=lambda path: path.name == INDEX):
        with removed(folder / entry.name):
            entry.rename(folder / entry.name)
    ready.rmdir()


def put_back(folder: str | os.PathLike) -> None:
    """Repair a folder after a kill in :func:`filled_whole`: all entries are the old ones, or all the new ones."""
    for hidden in Path(folder).glob(f".*{REMOVED}"):
        place = hidden.with_name(hidden.name.removeprefix(".").removesuffix(REMOVED))
        if place.exists():
            _delete(hidden)
        else:
            hidden.rename(place)
    _delete(Path(folder, f".result{UNFINISHED}"))
    if (ready := Path(folder, READY)).is_dir():
        _replace_by(ready, Path(folder))


def free_place(place: Path) -> Path:
    """The same path, with a number behind it if that is taken."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in count(2))
    return next(path for path in chain([place], numbered) if not path.exists())


def remove_halves(folder: str | os.PathLike) -> None:
    """Delete the temporary files of :func:`write_whole` after a kill, in a folder and its direct subfolders."""
    for depth in ("", "*/"):
        for half in Path(folder).glob(f"{depth}.*.[0-9]*.tmp"):
            half.unlink(missing_ok=True)


def save_state(state: Any, path: str | os.PathLike) -> Path:
    """Write a nested state dict: its tensors as safetensors, everything else as JSON in the header.

    A tensor that occurs several times is written once.

    Raises:
        TypeError: if it holds anything but dicts, lists, tuples, tensors, strings, numbers, bools and None.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(id(value), str(len(names)))
            value = value.detach()  # one of --channels_last is laid out anew where there is room for that
            tensors[name] = value if value.is_contiguous() else value.cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[described(key), described(entry)] for key, entry in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [described(entry) for entry in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a {type(value).__name__} cannot be part of a state")

    structure = json.dumps(described(state))
    return write_whole(path, lambda unfinished: save_file(tensors, unfinished, {"structure": structure}))


def load_state(path: str | os.PathLike) -> Any:
    """Read a file of :func:`save_state`, with all tensors on the CPU."""
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
