"""The files of a pipeline's components: whether those that a run needs are there, and copies of them.

A component is *listed* if ``model_index.json`` names its class; its files lie in a folder of its name. It is *idle* if
neither training nor sampling uses it (:meth:`Family.idle_components`). Idle ones may be absent; all others are needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from diffusers.utils import CONFIG_NAME
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from lpl.config.groups import Model
from lpl.families.base import Family
from lpl.tools.headers import read_header
from lpl.tools.layout import INDEX
from lpl.tools.privacy import HUB_ID
from lpl.tools.single_files import PICKLES
from lpl.tools.trust import listed_files
from lpl.tools.words import first_line, warn


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
NOT_MODELS = ("scheduler", "tokenizer", "feature_extractor", "guider", "ocr_guider")  # so begin names without weights
OTHERS_WEIGHTS = (*PICKLES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".flashpack", ".gguf", ".py")
MODEL_WEIGHTS = "diffusion_pytorch_model"  # beginning of the names of diffusers' weights
WEIGHTS = re.compile(r"\.safetensors(\.index(\.[\w-]+)?\.json)?$")


# Before anything is loaded -------------------------------------------------------------------------------------------


def lacking(model: Model, family: type[Family], listed: Iterable[str], unread: Iterable[str]) -> list[str]:
    """The idle components among those listed whose files are not there; warns of them.

    Args:
        unread: needed components whose weights come from elsewhere.

    Raises:
        ValueError: where files of a needed component are missing or damaged.
    """
    path, named, unread = model.pipeline, f"--pretrained_model_name_or_path {model.source}", set(unread)
    files, place = _files(model)
    idle, gone = family.idle_components(), []
    for name in listed if files else ():
        here = [file.name for file in files if file.parent == PurePosixPath(name)]
        missing = _missing(name, here, weights=name not in unread, vocabulary=name not in family.of_bytes)
        if missing and name in idle:
            gone.append(name)
        elif missing:
            raise ValueError(
                f"{named}: its model_index.json lists {name}, but {place} has {missing}; {_cure(path, name, family)}"
            )
        elif Path(path).is_dir() and name not in unread:
            other = model.denoiser_model_name_or_path if name == family.denoiser_name else None
            what = f"--denoiser_model_name_or_path {other}" if other else named
            _check_whole(what, path, name, weights(here, model.variant))
    if gone:
        warn(
            f"{model.source}: its model_index.json lists {' and '.join(gone)}, but {place} lacks the files; the "
            "pipeline works without, and so will the result"
        )
    return gone


def _files(model: Model) -> tuple[list[PurePosixPath], str]:
    """The files of a pipeline, and where they are; none if nobody can list them."""
    path = model.pipeline
    if Path(path).is_dir():
        return listed_files(path), "the folder"
    if files := listed_files(path, model.revision):
        return files, "the repository"
    cached = try_to_load_from_cache(path, INDEX, model.cache_dir, model.revision)
    return listed_files(str(Path(cached).parent)) if isinstance(cached, str) else [], "the Hub's cache"


def _missing(name: str, files: Sequence[str], weights: bool, vocabulary: bool) -> str | None:
    if not files:
        return "no files of it"
    if vocabulary and name.startswith("tokenizer") and not set(VOCABULARIES).intersection(files):
        return f"no vocabulary of it ({', '.join(VOCABULARIES)})"
    readable = (".safetensors", *PICKLES)  # pickles are refused with the way to convert them
    if weights and not name.startswith(NOT_MODELS) and not any(file.endswith(readable) for file in files):
        return "no weights of it"
    return None


def _cure(path: str, name: str, family: type[Family]) -> str:
    if not Path(path).is_dir():
        return "run once with a network (without HF_HUB_OFFLINE), or give a complete --revision"
    if name in family.optional_components:
        others = " and ".join(family.optional_components)
        return f"put it there, or write [null, null] for {others} in that file to train without them"
    return "put it there, or give a complete pipeline"


def _check_whole(what: str, path: str, name: str, files: Iterable[str]) -> None:
    """Reads the headers of safetensors, with which a file that is cut short does not agree."""
    for file in files:
        if file.endswith(".safetensors"):
            try:
                read_header(Path(path, name, file))
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{what}: {name}/{file} is damaged, or a pointer of Git LFS ({first_line(error)}); download it "
                    "again"
                ) from error


# Copies --------------------------------------------------------------------------------------------------------------


def weights(files: Sequence[str], variant: str | None) -> list[str]:
    """Those files of a component that hold the weights of a variant; without such, the plain ones.

    >>> weights(["config.json", "model.safetensors", "model.fp16.safetensors"], "fp16")
    ['model.fp16.safetensors']
    """
    found = [file for file in files if WEIGHTS.search(file)]
    return [file for file in found if variant and _variant(file) == variant] or [
        file for file in found if not _variant(file)
    ]


def the_weights(files: Sequence[str]) -> list[str]:
    """The files with the weights of a component: the plain ones, or those of its only variant.

    Raises:
        ValueError: if there are none, or those of several variants.

    >>> the_weights(["config.json", "model.fp16.safetensors"])
    ['model.fp16.safetensors']
    """
    found = [file for file in files if WEIGHTS.search(file)]
    variants = sorted({_variant(file) for file in found})
    if not found:
        raise ValueError("it has no weights, files that end in .safetensors")
    if variants[0] and variants[1:]:
        raise ValueError(f"it has no plain weights, but those of several variants ({', '.join(variants)}); keep one")
    return [file for file in weights(files, variants[0]) if not file.endswith("json")]


def _variant(file: str) -> str:
    """The variant in a name.

    >>> _variant("model.fp16-00001-of-00002.safetensors"), _variant("model.safetensors.index.fp16.json")
    ('fp16', 'fp16')
    """
    stem = re.sub(r"-\d+-of-\d+|\.safetensors|\.index|\.json$", "", file)
    return stem.partition(".")[2]


def copy_component(source: Path, target: Path, variant: str | None = None) -> None:
    """Copy a component as it was shipped: its configuration or vocabulary, and the weights that were loaded, which
    lose the variant in their names, so that they load without one."""
    names = sorted(path.name for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
    chosen = weights(names, variant)
    kept = [name for name in names if not name.endswith(OTHERS_WEIGHTS) and not WEIGHTS.search(name)]
    target.mkdir(parents=True)
    for name in (*kept, *chosen):
        plain = name.replace(f".{found}", "", 1) if name in chosen and (found := _variant(name)) else name
        if plain != name and name.endswith(".json"):
            (target / plain).write_text(_plain_index(source / name), encoding="utf-8")
        else:
            shutil.copyfile(source / name, target / plain)


def _plain_index(file: Path) -> str:
    """The index of weights in several files, whose names lose the variant."""
    content, variant = json.loads(file.read_text(encoding="utf-8")), _variant(file.name)
    places = content["weight_map"]
    content["weight_map"] = {name: place.replace(f".{variant}", "", 1) for name, place in places.items()}
    return json.dumps(content, indent=2) + "\n"


def model_folder(path: str, cache_dir: str | None) -> Path | None:
    """The folder of a single model of diffusers, or of its repository in the Hub's cache; None if it is elsewhere."""
    if Path(path, CONFIG_NAME).is_file():
        return Path(path)
    cached = try_to_load_from_cache(path, CONFIG_NAME, cache_dir) if HUB_ID.fullmatch(path) else None
    return Path(cached).parent if isinstance(cached, str) else None


def copy_model(source: Path, target: Path) -> None:
    """Copy a single model as it was shipped. Other files of its repository are left out."""
    target.mkdir(parents=True)
    names = [path.name for path in source.iterdir() if path.name.startswith(MODEL_WEIGHTS)]
    for name in (CONFIG_NAME, *weights(names, None)):
        shutil.copyfile(source / name, target / name)
