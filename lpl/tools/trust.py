"""Loads data only: no weights are unpickled, and no code of a repository is run.

Diffusers and transformers run a repository's code only with ``trust_remote_code``, which is never set here. Weights
that exist as pickles only, and parts that need foreign code, are refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from lpl.tools.single_files import PICKLES


LIBRARIES = ("diffusers", "transformers", "stable_diffusion", "kolors")  # the last two are parts of diffusers


def components_in(index: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a ``model_index.json`` that are components: library and class. Lists of numbers are settings."""
    lists = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple)}
    return {name: entry for name, entry in lists.items() if not (entry and all(map(_is_number, entry)))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def check_components(what: str, index: Mapping[str, Any], modules: Iterable[str] = ()) -> None:
    """Refuse a pipeline with a component whose class belongs to neither diffusers nor transformers.

    Args:
        what: the flag and its value.
        index: the content of its ``model_index.json``.
        modules: entries that must be components.

    Raises:
        ValueError: with the component.
    """
    needed = {name: index[name] for name in modules if isinstance(index.get(name), list | tuple)}
    for name, entry in (components_in(index) | needed).items():
        match entry:
            case [None, None]:  # an optional component that this pipeline lacks
                continue
            case [library, str()] if library in LIBRARIES:
                continue
        raise ValueError(
            f"{what}: its {name} is {'.'.join(map(str, entry))}, which is no "
            "class of diffusers or transformers, and code of a repository is not run; give a pipeline without it"
        )


def check_weights(
    what: str, path: str, folders: Iterable[str], revision: str | None = None, library: str = "diffusers"
) -> None:
    """Refuse weights that exist as pickles only; passes if the Hub cannot list the repository's files.

    Args:
        what: the flag and its value.
        folders: folders of the repository, "" = its root.
        library: the library that can convert the weights.

    Raises:
        ValueError: with the file, and how to convert it.
    """
    files = listed_files(path, revision)
    for folder in folders:
        here = [file for file in files if file.parent == PurePosixPath(folder)]
        pickles = sorted(file for file in here if file.suffix in PICKLES)
        if pickles and not any(file.suffix == ".safetensors" for file in here):
            loader = "DiffusionPipeline" if folder else "AutoModel"
            target = path if Path(path).is_dir() else "converted"
            raise ValueError(
                f"{what}: there are no safetensors beside {pickles[0]}, a pickle, which can run any code when it is "
                f"read; if you trust it, convert it once with {library}.{loader}.from_pretrained({path!r})"
                f".save_pretrained({target!r}), and give that folder"
            )


def listed_files(path: str, revision: str | None = None) -> list[PurePosixPath]:
    """The files of a folder, or of a repository on the Hub; none if the Hub cannot list them."""
    if Path(path).is_dir():
        return [PurePosixPath(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()]
    try:
        return [PurePosixPath(file) for file in HfApi().list_repo_files(path, revision=revision)]
    except (HTTPError, OSError, ValueError):
        return []
