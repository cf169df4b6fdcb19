"""Whether a resumed run still has the base model that it started with, before any weights are loaded.

A checkpoint whose layers do not fit the base's denoiser is refused: it is of another model. A recipe records the
base's *identity*, a commit of the Hub or a fingerprint of a folder's files; another one on resume is warned of.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn

from lpl.autoencoders import skeleton
from lpl.config import Config
from lpl.config.groups import Model
from lpl.families.description import Description
from lpl.tools.headers import read_header
from lpl.tools.layout import INDEX
from lpl.tools.results import pipeline_entries
from lpl.training.lora import FILE, PEFT_FILE, PEFT_PREFIX, in_one_file, peft_folder


LARGE = 2**20  # bytes; of a larger file the beginning and the middle are read
Shapes = dict[str, tuple[int, ...]]


def identity(model: Model) -> str | None:
    """What the base model is; None if nobody can tell."""
    if model.pretrained_model_name_or_path is None:
        return None
    path = Path(model.pipeline)
    if not path.is_dir():
        index = try_to_load_from_cache(model.pipeline, INDEX, model.cache_dir, model.revision)
        return Path(index).parent.name if isinstance(index, str) else None
    kinds = (".safetensors",) if model.folder else (".json", ".txt", ".model", ".safetensors")
    digest = hashlib.sha256()  # of a derived pipeline, diffusers' version changes the other files
    entries = [path / name for name in pipeline_entries(path)]
    for file in (file for entry in entries for file in (sorted(entry.glob("*")) if entry.is_dir() else [entry])):
        if file.is_file() and file.suffix in kinds:
            digest.update(str(file.relative_to(path)).encode())
            digest.update(_some(file))
    return f"sha256:{digest.hexdigest()}"


def _some(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 2 * LARGE:
            return stream.read()
        beginning = stream.read(LARGE)
        stream.seek(size // 2)
        return str(size).encode() + beginning + stream.read(LARGE)


def check_base(resumed: Path | None, config: Config, description: Description) -> None:
    """Refuse a checkpoint that is not of the base's denoiser; None: the run starts afresh.

    Raises:
        ValueError: with the first layer that differs.
    """
    if resumed is None:
        return
    family, lora = description.family, config.lora.lora
    settings = family.untrained_config(description.denoiser) if config.model.from_scratch else description.denoiser
    denoiser = skeleton(settings)
    saved = _adapters(resumed, description, config.lora.adapter) if lora else _shapes(resumed / family.denoiser_name)
    found = _other_adapter(saved, denoiser) if lora else _other_weight(saved, denoiser)
    if found is not None:
        raise ValueError(
            f"--resume_from_checkpoint {resumed.name}: it is of another base model than "
            f"--pretrained_model_name_or_path {config.model.source}: {found}; give the pipeline that the run began "
            "with, or start another run"
        )


def _shapes(folder: Path, pattern: str = "*.safetensors") -> Shapes:
    """Shapes of all tensors in a folder's files, from their headers."""
    shapes: Shapes = {}
    for file in sorted(folder.glob(pattern)):
        tensors, _ = read_header(file)
        shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes


def _adapters(folder: Path, description: Description, adapter: str) -> Shapes:
    """Shapes of the denoiser's adapter, by the names of its layers."""
    name, one = description.family.denoiser_name, in_one_file(description.family.pipeline_class, adapter)
    shapes = _shapes(folder, FILE) if one else _shapes(peft_folder(folder, name), PEFT_FILE)
    prefix = f"{name}." if one else PEFT_PREFIX
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _other_weight(saved: Shapes, denoiser: nn.Module) -> str | None:
    own = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    for name in (name for name in own if saved.get(name) != own[name]):
        there = f"is {saved[name]} there" if name in saved else "is not there"
        return f"{name} {there}, and {own[name]} here"
    lost = saved.keys() - own.keys() - dict(denoiser.named_buffers()).keys()
    return f"{min(lost)} is not here" if lost else None


def _other_adapter(saved: Shapes, denoiser: nn.Module) -> str | None:
    """The first adapter that does not fit its layer: LoRA's A is (r, in, ...), B is (out, r, ...)."""
    if not saved:
        return "it has no adapter for this denoiser"
    own = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    for name, shape in saved.items():
        layer, kind = re.split(r"\.(?:lora|hada|lokr|oft)_", name, maxsplit=1)
        weight = own.get(f"{layer}.weight")
        fits = weight is not None and {"A": shape[1:] == weight[1:], "B": shape[:1] == weight[:1]}.get(kind[:1], True)
        if not fits:
            return f"the adapter of {layer} does not fit"
    return None
