"""Makes one pipeline in diffusers' layout of what the flags name: a single file, another denoiser, merged LoRA.

Such a *derived* pipeline is a folder in the cache, made once; everything behind loads it like any other folder, so
that precision, quantisation, caches, samples and results need no case of their own. What the user has named stays in
``pretrained_model_name_or_path`` and goes into recipe and card; ``Model.folder`` is the derived one.

The folder's name is a digest of what it is made of: paths, sizes and times of the files (of the Hub: the commit),
strengths, and the version of diffusers. It is made under another name and renamed, so it is whole or absent. Files
that stay as they are become hard links where the disk allows it, and copies elsewhere. Weights keep the precision of
their file: bit for bit, and merged ones are rounded once.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import WeakFileLock
from torch import nn

from lpl.config import Config
from lpl.config.checks import warn_idle
from lpl.config.groups import Model
from lpl.families import Family, find_family
from lpl.families.checkpoint_files import (
    Header,
    component_names,
    default_config,
    load_component,
    local_file,
    model_type,
    read_header,
    why_no_checkpoint,
)
from lpl.families.components import NOT_MODELS, OTHERS_WEIGHTS, WEIGHTS, weights
from lpl.families.fit import component_class
from lpl.families.lora_files import Adapter, lora_files, lost_prefix, read_lora
from lpl.tools.files import settle, write_text
from lpl.tools.layout import INDEX, PEFT_CONFIG
from lpl.tools.privacy import hub_file
from lpl.tools.single_files import single_file, why_no_file
from lpl.tools.trust import check_components, components_in
from lpl.tools.words import first_line, warn


VERSION = 2  # of what is made here
PIPELINE, DENOISER = "--pretrained_model_name_or_path", "--denoiser_model_name_or_path"
ORIGIN = "origin.json"  # of a converted file: whose configuration it has, and which of its components
DENOISER_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
SMALL = ["*.json", "*/*.json", "*.txt", "*/*.txt", "*/*.model"]  # configurations and vocabularies
Components = Mapping[str, tuple[str, str]]  # library and class by name


def with_derived(config: Config, weights: bool = True) -> Config:
    """The configuration with the folder of the derived pipeline, if the flags make one."""
    return replace(config, model=derived(config.model, weights))


def derived(model: Model, weights: bool = True) -> Model:
    """The flags with the folder of the derived pipeline, which is made if it is not there; as they are without need.

    Args:
        weights: False: configurations are enough.

    Raises:
        ValueError: where a file is none that can be used, or does not fit.
    """
    if model.folder is not None or model.pretrained_model_name_or_path is None:
        return model
    with _naming(f"{PIPELINE} {model.source}"):
        file = single_file(model.source)
    if file is None and model.denoiser_model_name_or_path is None and not model.merge_lora:
        return model
    if file is not None and model.variant is not None:
        warn_idle("variant")
        model = replace(model, variant=None)
    parts = _parts(model, file, weights)
    if not weights:
        folder = Path(tempfile.mkdtemp(prefix="lpl-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _fill(folder, parts, model)
        return replace(model, folder=str(folder))
    root = Path(model.cache_dir or HF_HOME, "lpl", "pipelines")
    root.mkdir(parents=True, exist_ok=True)
    folder = root / _key(model, parts)
    with WeakFileLock(root / f".{folder.name}.lock"):
        if not (folder / INDEX).is_file():
            unfinished = root / f".{folder.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            warn(f"{_what(model, parts)}; this is done once, in {folder}")
            try:
                _fill(unfinished, parts, model)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            settle(unfinished)
            unfinished.rename(folder)
    return replace(model, folder=str(folder))


def origin(model: Model) -> tuple[str, list[str]] | None:
    """The pipeline that a single file has its configuration from, and the components that are that one's; None: the
    pipeline is no single file."""
    file = Path(model.folder or "", ORIGIN)
    if model.folder is None or not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["config"], found["components"]


@dataclass(frozen=True)
class _File:
    """A single file."""

    source: str  # a path, or an address on the Hub
    place: Path  # on this machine, once it is downloaded
    header: Header
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Merged:
    """A LoRA of --merge_lora."""

    source: str
    strength: float
    files: Sequence[Path]
    adapters: Mapping[str, Adapter]


@dataclass(frozen=True)
class _Parts:
    """What a derived pipeline is made of.

    Args:
        base: folder with configurations and all components that come from nowhere else.
        file: the pipeline; None: it is the base.
        denoiser: the other denoiser: a file or a folder; None: the pipeline's own.
        weights: whether they are needed.
    """

    base: Path
    base_name: str
    index: Mapping[str, Any]
    family: type[Family]
    file: _File | None
    denoiser: _File | Path | None
    loras: Sequence[_Merged]
    weights: bool

    @property
    def components(self) -> Components:
        return {
            name: (entry[0], entry[1]) for name, entry in components_in(self.index).items() if entry[0] is not None
        }

    def in_file(self, name: str) -> list[str]:
        """Names of the file's tensors of a component."""
        if self.file is None or name not in self.components or name.startswith(NOT_MODELS):
            return []
        return component_names(self.file.header, name, _kind(self.components[name]), self.family.denoiser_name)

    def from_base(self) -> list[str]:
        """Components with weights that the base gives."""
        mine = self.family.denoiser_name if self.denoiser is not None else None
        return [name for name in self.components if name != mine and _has_weights(name) and not self.in_file(name)]


def _kind(entry: tuple[str, str]) -> Any:
    return component_class(entry) or type(None)


def _has_weights(name: str) -> bool:
    return not name.startswith(NOT_MODELS)


# Finding the parts ---------------------------------------------------------------------------------------------------


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Context in which a ValueError begins with the flag and its value."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("--"):
            raise
        raise ValueError(f"{what}: {error}") from error


def _parts(model: Model, path: str | None, weights: bool) -> _Parts:
    """Look at everything before anything large is downloaded."""
    what = f"{PIPELINE} {model.source}"
    file = denoiser = None
    with _naming(what):
        if path is not None:
            file = _looked_at(path, model, model.revision)
            config = _config_of(model, file.header)
        else:
            config = model.source
    if model.denoiser_model_name_or_path is not None:
        denoiser = _found_denoiser(model)
    what_base = what if path is None else f"--single_file_config {config}"
    with _naming(what_base):
        revision = None if path is not None else model.revision
        base = Path(config) if Path(config).is_dir() else _snapshot(config, SMALL, model.cache_dir, revision)
        if not (base / INDEX).is_file():
            raise ValueError(
                f"it has no {INDEX}; diffusers takes the file for {file and model_type(file.header)}, which is no "
                "pipeline that can be trained"
                if path is not None
                else f"this has no {INDEX}, so it is no pipeline of diffusers"
            )
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        family = find_family(index.get("_class_name"), what_base)
        check_components(what_base, index)
    if file is not None:  # nobody misses its safety checker
        index |= {name: [None, None] for name in family.idle_components() if name in index}
    parts = _Parts(base, config, index, family, file, denoiser, (), weights)
    parts = replace(parts, loras=[_read_lora(source, strength, parts, model) for source, strength in model.merged])
    if not weights:
        return parts
    parts = replace(parts, **_downloaded(parts, model, path))
    lacking = [name for name in parts.from_base() if not list((parts.base / name).glob("*.safetensors"))]
    if file is not None and lacking:
        raise ValueError(
            f"{what}: it has no {' and '.join(lacking)}, and there are no weights of it in {config}; give a whole "
            "pipeline by --single_file_config"
        )
    return parts


def _read_lora(source: str, strength: float, parts: _Parts, model: Model) -> _Merged:
    """Read a LoRA, and compare it with the configurations."""
    with _naming(f"--merge_lora {source}"):
        files = lora_files(source, model.cache_dir)
    name = parts.family.denoiser_name
    own = parts.denoiser if isinstance(parts.denoiser, Path) else parts.base / name
    folders = {name: own} | {n: parts.base / n for n in parts.family.text_encoder_names if n in parts.components}
    shapes = {n: _empty(folder, parts.components[n]) for n, folder in folders.items() if folder.is_dir()}
    adapters = read_lora("merge_lora", source, parts.family, shapes, model.cache_dir)
    return _Merged(source, strength, files, adapters)


def _looked_at(path: str, model: Model, revision: str | None) -> _File:
    if hub_file(path) is None and (why := why_no_file(path)):
        raise ValueError(why)
    header, metadata = read_header(path, revision, model.cache_dir)
    if why := why_no_checkpoint(header):
        raise ValueError(why)
    return _File(path, Path(path), header, metadata)


def _config_of(model: Model, header: Header) -> str:
    if model.single_file_config is not None:
        return model.single_file_config
    if (found := default_config(header)) is None:
        raise ValueError(
            "diffusers does not know its architecture; give a pipeline of the same one by --single_file_config"
        )
    return found


def _found_denoiser(model: Model) -> _File | Path:
    """The other denoiser: a file, or a folder, of which the configuration is downloaded from the Hub."""
    source = model.denoiser_model_name_or_path
    assert source is not None
    with _naming(f"{DENOISER} {source}"):
        if (path := single_file(source)) is not None:
            return _looked_at(path, model, None)  # --revision is the pipeline's
        if Path(source).is_dir():
            if (Path(source) / INDEX).is_file():
                raise ValueError("this is a pipeline; give the folder of its unet or transformer")
            if not (Path(source) / "config.json").is_file():
                raise ValueError("this folder has no config.json; give that of a unet or transformer of diffusers")
            return Path(source)
        folder = _snapshot(source, ["config.json"], model.cache_dir)
        if not (folder / "config.json").is_file():
            raise ValueError("this repository has no config.json; give that of a unet or transformer of diffusers")
        return folder


def _snapshot(
    source: str,
    patterns: list[str],
    cache_dir: str | None,
    revision: str | None = None,
    ignored: list[str] | None = None,
) -> Path:
    where: dict[str, Any] = {"cache_dir": cache_dir, "revision": revision}
    try:
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=ignored, **where))
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no such folder, and it cannot be read on the Hub ({first_line(error)}); for a single file, "
            "give a folder with a pipeline of its architecture by --single_file_config; if the repository is gated or "
            "private, accept its licence on its page and run hf auth login"
        ) from error


def _downloaded(parts: _Parts, model: Model, path: str | None) -> dict[str, Any]:
    """The parts with their weights on this machine."""
    new: dict[str, Any] = {}
    for name in ("file", "denoiser"):
        part = getattr(parts, name)
        if isinstance(part, _File):
            revision = model.revision if name == "file" else None
            new[name] = replace(part, place=local_file(part.source, revision, model.cache_dir))
        elif part is not None and not Path(str(model.denoiser_model_name_or_path)).is_dir():
            with _naming(f"{DENOISER} {model.denoiser_model_name_or_path}"):
                new[name] = _snapshot(
                    str(model.denoiser_model_name_or_path), DENOISER_FILES, model.cache_dir, ignored=["*/*"]
                )
    if not Path(parts.base_name).is_dir() and parts.from_base():
        needed = parts.from_base()
        left = {name: None for name in parts.components if _has_weights(name) and name not in needed}
        loader: Any = DiffusionPipeline
        revision, variant = (model.revision, model.variant) if path is None else (None, None)
        where = {"revision": revision, "variant": variant, "cache_dir": model.cache_dir}
        with _naming(f"{PIPELINE} {model.source}"):
            try:
                new["base"] = Path(loader.download(parts.base_name, use_safetensors=True, **where, **left))
            except (HTTPError, OSError) as error:
                raise ValueError(
                    f"{' and '.join(needed)} of {parts.base_name} cannot be downloaded ({first_line(error)})"
                ) from error
    return new


# The folder ----------------------------------------------------------------------------------------------------------


def _key(model: Model, parts: _Parts) -> str:
    """The name of the folder: what it is made of."""
    made_of: list[Any] = [VERSION, diffusers.__version__, model.variant, parts.base_name, parts.index]
    made_of += _stamps(part.place for part in (parts.file, parts.denoiser) if isinstance(part, _File))
    for name in parts.components:
        folder, whole = parts.base / name, not parts.in_file(name)
        if name == parts.family.denoiser_name and parts.denoiser is not None:
            whole = isinstance(parts.denoiser, Path)
            folder = parts.denoiser if isinstance(parts.denoiser, Path) else folder
        made_of.append((name, _stamps(folder / file for file in _files(folder, model.variant, whole))))
    for lora in parts.loras:
        beside = [file.with_name(PEFT_CONFIG) for file in lora.files]
        made_of.append((lora.strength, _stamps([*lora.files, *(file for file in beside if file.is_file())])))
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]


def _stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    found = [Path(os.path.realpath(file)) for file in files]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _what(model: Model, parts: _Parts) -> str:
    """What is made, in words."""
    words = []
    if parts.file is not None:
        lacking = parts.from_base()
        rest = f", with {' and '.join(lacking)} of {parts.base_name}" if lacking else ""
        words.append(f"{model.source} is converted to a pipeline of diffusers{rest}")
    if parts.denoiser is not None:
        words.append(f"the {parts.family.denoiser_name} comes from {model.denoiser_model_name_or_path}")
    words += [f"{lora.source} is merged with strength {lora.strength:g}" for lora in parts.loras]
    return "; ".join(words)


def _fill(folder: Path, parts: _Parts, model: Model) -> None:
    """Write a derived pipeline."""
    index, denoiser = dict(parts.index), parts.family.denoiser_name
    for name, entry in parts.components.items():
        kind = _kind(entry)
        if name == denoiser and parts.denoiser is not None:
            index[name] = ["diffusers", _write_denoiser(folder / name, parts, model, kind)]
        elif parts.weights and parts.file is not None and (names := parts.in_file(name)):
            with _naming(f"{PIPELINE} {model.source}"):
                made = load_component(parts.file.place, parts.file.header, names, kind, parts.base, name)
            _save(made, folder / name, model)
        elif (parts.base / name).is_dir():
            marks = {"v_pred", "ztsnr"} & (set(parts.file.header) if parts.file is not None else set())
            _link(parts.base / name, folder / name, model.variant, parts.weights, marks)
    if parts.weights and parts.loras:
        _merge(folder, parts, model)
    if parts.file is not None:
        origin = {"config": parts.base_name, "components": parts.from_base()}
        write_text(folder / ORIGIN, json.dumps(origin) + "\n")
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_denoiser(target: Path, parts: _Parts, model: Model, kind: Any) -> str:
    """Write the other denoiser; returns its class."""
    source = parts.denoiser
    if isinstance(source, Path):
        _link(source, target, model.variant, parts.weights)
        return str(json.loads((source / "config.json").read_text(encoding="utf-8"))["_class_name"])
    assert source is not None
    if not parts.weights:
        _link(parts.base / target.name, target, None, False)
        return kind.__name__
    with _naming(f"{DENOISER} {model.denoiser_model_name_or_path}"):
        names = component_names(source.header, target.name, kind, target.name)
        if not hasattr(kind, "from_single_file"):
            raise ValueError(f"diffusers reads no {kind.__name__} from a single file; give its folder")
        _save(load_component(source.place, source.header, names, kind, parts.base, target.name), target, model)
    return kind.__name__


def _save(model: nn.Module, target: Path, flags: Model) -> None:
    """Write a component under the names that --variant looks for, and that all versions of transformers read."""
    options: dict[str, Any] = {"variant": flags.variant}
    if prefix := lost_prefix(model):
        options["state_dict"] = {prefix + name: weight for name, weight in model.state_dict().items()}
    cast(Any, model).save_pretrained(target, **options)


def _link(source: Path, target: Path, variant: str | None, whole: bool, marks: Iterable[str] = ()) -> None:
    """Link or copy a component as it is: configuration or vocabulary, and the weights that are loaded."""
    target.mkdir(parents=True)
    for name in _files(source, variant, whole):
        _link_file(source / name, target / name)
    if marks and target.name == "scheduler":
        _mark_scheduler(target / "scheduler_config.json", set(marks))


def _files(folder: Path, variant: str | None, whole: bool) -> list[str]:
    """The files of a component that are taken; none if it has no folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    names = sorted(path.name for path in paths if path.is_file() and not path.name.startswith("."))
    chosen = weights(names, variant) if whole else []
    return [n for n in names if n in chosen or not (n.endswith(OTHERS_WEIGHTS) or WEIGHTS.search(n))]


def _link_file(source: Path, target: Path) -> None:
    source = Path(os.path.realpath(source))
    try:
        if source.suffix != ".safetensors":  # a copy is safe from edits
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _mark_scheduler(file: Path, marks: set[str]) -> None:
    """Take from a checkpoint what its marker tensors say: it predicts v, from zero terminal SNR on."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"prediction_type": "v_prediction"} if "v_pred" in marks else {}
    settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in marks else {}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _merge(folder: Path, parts: _Parts, model: Model) -> None:
    """Merge the LoRA into the components of a folder, one component at a time."""
    for name in parts.components:
        loras = [lora for lora in parts.loras if name in lora.adapters]
        if not loras:
            continue
        component = _loaded(folder / name, parts, model.variant)
        for lora in loras:
            lora.adapters[name].merge(component, lora.strength)
        shutil.rmtree(folder / name)
        _save(component, folder / name, model)


def _empty(folder: Path, entry: tuple[str, str]) -> nn.Module:
    """A component without memory for its weights."""
    kind = _class_in(folder, entry)
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))


def _class_in(folder: Path, entry: tuple[str, str]) -> Any:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return getattr(diffusers, settings.get("_class_name", ""), None) or _kind(entry)


def _loaded(folder: Path, parts: _Parts, variant: str | None) -> nn.Module:
    """A component in the precision of its files."""
    names = [path.name for path in folder.iterdir()]
    files = [folder / name for name in weights(names, variant) if name.endswith(".safetensors")]
    dtypes = {tensor.dtype for file in files for tensor in read_header(str(file), None, None)[0].values()}
    found = {dtype for dtype in dtypes if dtype.is_floating_point}
    dtype = found.pop() if len(found) == 1 else torch.float32
    suffix = {"variant": variant} if any(variant and f".{variant}" in file.name for file in files) else {}
    kind = _class_in(folder, parts.components[folder.name])
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **suffix)
