"""Reads LoRA of any origin: diffusers', peft's, kohya's, and what this trainer has saved.

Every layer of a LoRA has its own rank, alpha and, with DoRA, lengths. :class:`Adapter` holds them by the names of the
model's layers, in float32; it can be trained on (:meth:`Adapter.inject`) or merged (:meth:`Adapter.merge`).

Kohya's names are read by the family's own layout (:mod:`lpl.families.lora_layout`), which keeps alphas and lengths;
those that it does not know, and every other layout, by diffusers' ``lora_state_dict``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from lpl.families.base import Family
from lpl.families.checkpoint_files import local_file
from lpl.families.lora_layout import LoraLayout, own_names
from lpl.tools import layout
from lpl.tools.privacy import HubFile, hub_file, is_hub_id
from lpl.tools.single_files import PICKLES
from lpl.tools.words import first_line


PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of the names in peft's own files
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WRONG_BASE = "it is of another base model"


class Layer(NamedTuple):
    """The adapter of a layer: alpha / rank * B A is added to its weight.

    Args:
        down: A, (r, in, ...).
        up: B, (out, r, ...).
        magnitude: DoRA's length of each row, (out,); None: it is no DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class Adapter:
    """The LoRA of one model, by the names of its layers."""

    layers: Mapping[str, Layer]
    rslora: bool = False  # scaled by alpha / sqrt(rank)

    @property
    def rank(self) -> int:
        """Of most layers."""
        return Counter(layer.rank for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """Of most layers."""
        return Counter(layer.alpha for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def dora(self) -> bool:
        return any(layer.magnitude is not None for layer in self.layers.values())

    def inject(self, model: nn.Module, name: str, dropout: float = 0.0, whole: bool = True) -> None:
        """Add the adapter to a model in place, under that name, in float32.

        Args:
            whole: with its weights; an estimate needs the shapes only.
        """
        targets = list(self.layers)
        others = (layer for layer, module in model.named_modules() if isinstance(module, ADAPTABLE))
        beyond = any(other.endswith(f".{target}") for other in others for target in targets if other != target)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes fractions too
            lora_dropout=dropout,
            target_modules="|".join(map(re.escape, targets)) if beyond else targets,
            rank_pattern={f"^{key}": layer.rank for key, layer in self.layers.items() if layer.rank != self.rank},
            alpha_pattern={f"^{key}": layer.alpha for key, layer in self.layers.items() if layer.alpha != self.alpha},
            use_dora=self.dora,
            use_rslora=self.rslora,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of the trained adapter
            inject_adapter_in_model(config, model, adapter_name=name)
        for key, weight in model.named_parameters():
            if f".{name}." in key and weight.dtype in (torch.float16, torch.bfloat16):
                weight.data = weight.data.float()
        if whole:
            set_peft_model_state_dict(model, self._state(), adapter_name=name)

    def _state(self) -> dict[str, Tensor]:
        """The tensors under peft's names."""
        state = {}
        for name, layer in self.layers.items():
            state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
            if layer.magnitude is not None:
                state[f"{name}.lora_magnitude_vector"] = layer.magnitude
        return state

    @torch.no_grad()
    def merge(self, model: nn.Module, strength: float) -> None:
        """Add ``strength`` times the adapter to the weights, computed in float32 and rounded once."""
        for name, layer in self.layers.items():
            weight = model.get_submodule(name).get_parameter("weight")
            before = weight.float()
            scale = layer.alpha / (math.sqrt(layer.rank) if self.rslora else layer.rank)
            added = scale * (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(weight.shape)
            if layer.magnitude is not None:
                whole = before + added
                lengths = (layer.magnitude / whole.flatten(1).norm(dim=1)).reshape(-1, *[1] * (weight.ndim - 1))
                added = lengths * whole - before
            weight.copy_(before + strength * added)


# Files ---------------------------------------------------------------------------------------------------------------


def lora_files(source: str, cache_dir: str | None = None) -> list[Path]:
    """The files of a LoRA on this machine: one, or peft's of each component; those of the Hub are downloaded.

    Raises:
        ValueError: if there is none, with what is accepted.
    """
    if Path(source).suffix in PICKLES:
        raise ValueError("this is a pickle, which can run any code when it is read; give a .safetensors file")
    if Path(source).is_file():
        return [Path(source)]
    if (place := hub_file(source)) is not None:
        if Path(place.file).name == PEFT_FILE:
            _download_config(place, cache_dir)
        return [local_file(source, None, cache_dir)]
    if Path(source).is_dir():
        return [Path(source, name) for name in _chosen(_names_in(Path(source)))]
    if not is_hub_id(source):
        raise ValueError("there is no such file or folder, and no repository on the Hub has such a name")
    return _downloaded(source, cache_dir)


def _download_config(place: HubFile, cache_dir: str | None) -> None:
    """Get the settings of a file of peft beside it, if they are there; :func:`_of_peft` refuses it without them."""
    name = str(Path(place.file).with_name(layout.PEFT_CONFIG))
    with suppress(HTTPError, OSError):
        hf_hub_download(place.repository, name, revision=place.revision, cache_dir=cache_dir)


def _downloaded(repository: str, cache_dir: str | None) -> list[Path]:
    try:
        try:
            names = HfApi().list_repo_files(repository)
        except (HTTPError, OSError) as error:  # no network
            try:
                there = Path(snapshot_download(repository, cache_dir=cache_dir, local_files_only=True))
            except (HTTPError, OSError):
                raise error from None
            return [there / name for name in _chosen(_names_in(there))]
        chosen = _chosen(names)
        beside = [config for name in chosen if (config := str(Path(name).with_name(layout.PEFT_CONFIG))) in names]
        files = {name: Path(hf_hub_download(repository, name, cache_dir=cache_dir)) for name in (*chosen, *beside)}
        return [files[name] for name in chosen]
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"there is no such folder, and it cannot be read on the Hub ({first_line(error)}); if the repository is "
            "gated or private, accept its licence on its page and run hf auth login"
        ) from error


def _names_in(folder: Path) -> list[str]:
    files = [*folder.glob("*.safetensors"), *folder.glob(f"*{layout.PEFT_SUFFIX}/{PEFT_FILE}")]
    return sorted(str(file.relative_to(folder)) for file in files)


def _chosen(names: Iterable[str]) -> list[str]:
    names = list(names)
    folders = sorted(name for name in names if name.endswith(f"{layout.PEFT_SUFFIX}/{PEFT_FILE}"))
    for known in (layout.LORA, PEFT_FILE):
        if known in names:
            return [known]
    if folders:
        return folders
    plain = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(plain) != 1:
        raise ValueError(
            f"there is no LoRA, a file {layout.LORA}, {PEFT_FILE} or a single .safetensors"
            if not plain
            else f"there are several files, {', '.join(plain[:3])} ...; give one of them"
        )
    return plain


# Adapters ------------------------------------------------------------------------------------------------------------


def read_lora(
    flag: str, source: str, family: type[Family], models: Mapping[str, nn.Module], cache_dir: str | None = None
) -> dict[str, Adapter]:
    """The LoRA's adapters by component.

    Args:
        flag: names it in errors.
        models: denoiser and text encoders by name; they may be on the meta device.

    Raises:
        ValueError: if it cannot be read, or does not fit the models.
    """
    try:
        found: dict[str, Adapter] = {}
        for file in lora_files(source, cache_dir):
            found |= _read(file, family, models)
        if not found:
            raise ValueError(f"{WRONG_BASE}, or no LoRA: nothing in it is of {' or '.join(models)}")
        return {name: _fitted(name, adapter, models[name]) for name, adapter in found.items()}
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"--{flag} {source}: {first_line(error)}") from error


def _read(file: Path, family: type[Family], models: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file.name} is no whole safetensors file ({first_line(error)})") from error
    if not any("lora" in name.removeprefix("lora_") for name in state):  # all names of sd-scripts begin so
        kinds = next((kind for kind in ("hada", "lokr", "oft") if any(f".{kind}_" in name for name in state)), None)
        raise ValueError(f"this is no LoRA but {kinds}, which is not read" if kinds else "this is no LoRA")
    if all(name.startswith(PEFT_PREFIX) for name in state):
        return _of_peft(file, state, family)
    kohya = _of_kohya(state, family, models) if any(name.startswith("lora_") for name in state) else None
    if kohya is not None:
        return kohya
    if any("dora_scale" in name for name in state):
        raise ValueError("this is a DoRA in a layout that is not known, and diffusers would read it as a LoRA")
    return _of_diffusers(file, family, models)


def _of_peft(file: Path, state: Mapping[str, Tensor], family: type[Family]) -> dict[str, Adapter]:
    folder = file.parent.name
    name = folder.removesuffix(layout.PEFT_SUFFIX) if folder.endswith(layout.PEFT_SUFFIX) else family.denoiser_name
    config = file.with_name(layout.PEFT_CONFIG)
    if not config.is_file():
        raise ValueError(f"{file.name} has no {config.name} beside it, which has its alpha")
    settings = json.loads(config.read_text(encoding="utf-8"))
    return {name: _adapter({key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}, settings)}


def _of_diffusers(file: Path, family: type[Family], models: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    loader: Any = family.pipeline_class
    if not hasattr(loader, "lora_state_dict"):
        raise ValueError(f"{loader.__name__} loads no LoRA of this layout; give one that peft has saved")
    options: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "return_lora_metadata": True}
    options["return_alphas"] = True  # without it, Flux's and Chroma's loaders keep them to themselves
    options["unet_config"] = SimpleNamespace(**dict(cast(Any, models[family.denoiser_name]).config))
    if family.denoiser_name == "transformer":
        del options["unet_config"]
    try:
        found = loader.lora_state_dict(str(file.parent), **options)
    except Exception as error:  # its converters raise half a dozen kinds
        raise ValueError(f"{WRONG_BASE}, or of a layout that diffusers does not know") from error
    state, metadata, alphas = found[0], found[-1], found[1] if len(found) == 3 else None
    adapters = {}
    for name in models:
        own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
        if not own:
            continue
        scales = {f"{name}.{key}": value for key, value in _of_component(alphas or {}, name).items()}
        marks = {_mark(key): torch.tensor(float(value)) for key, value in scales.items()}
        settings = _of_component(metadata or {}, name) or None
        adapters[name] = _adapter(_as_peft(own, name), settings, _as_peft(marks, name))
    if unknown := sorted(key for key in state if not key.startswith(tuple(f"{name}." for name in adapters))):
        raise ValueError(f"{WRONG_BASE}: it has {unknown[0]}")
    return adapters


def _of_component(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in entries.items() if key.startswith(f"{name}.")}


def _mark(alpha: str) -> str:
    """A name of diffusers' alphas as that of the factor that it belongs to."""
    name = alpha.removesuffix(".alpha")
    return name if name.endswith(".down.weight") else f"{name}.lora.down.weight"


def _as_peft(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    state = _of_component(state, name)
    if state and not any("lora_A" in key or "lora_B" in key for key in state):
        if name.startswith("text_encoder"):
            state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))
        else:
            state = convert_unet_state_dict_to_peft(state)
    return state


def _adapter(
    state: Mapping[str, Tensor], settings: Mapping[str, Any] | None, alphas: Mapping[str, Tensor] | None = None
) -> Adapter:
    """Args:
    state: under peft's names.
    settings: of peft's ``LoraConfig``, if they are known.
    alphas: by the name of A, if the file has them.
    """
    layers, used = {}, set()
    for key, down in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        magnitude = next(
            (m for m in (f"{name}.lora_magnitude_vector", f"{name}.lora_magnitude_vector.weight") if m in state), ""
        )
        alpha = float(len(down))
        if settings is not None:
            pattern = settings.get("alpha_pattern") or {}
            alpha = float(pattern.get(get_pattern_key(list(pattern), name), settings["lora_alpha"]))
        elif alphas and key in alphas:
            alpha = float(alphas[key])
        used |= {key, f"{name}.lora_B.weight", magnitude}
        layers[name] = Layer(
            down.float(),
            state[f"{name}.lora_B.weight"].float(),
            alpha,
            state[magnitude].float().flatten() if magnitude else None,
        )
    if lost := sorted(state.keys() - used):
        raise ValueError(f"it has {lost[0]}, which is not read")
    return Adapter(layers, bool(settings and settings.get("use_rslora")))


# Kohya's layout ------------------------------------------------------------------------------------------------------


def _of_kohya(
    state: Mapping[str, Tensor], family: type[Family], models: Mapping[str, nn.Module]
) -> dict[str, Adapter] | None:
    """None: the family's layout does not know all of its names."""
    if (layout := family.lora_layout) is None:
        return None
    own, places = layout._replace(swapped=False), {}
    for component, model in models.items():
        if (prefix := layout.prefixes.get(component)) is None:
            continue
        names = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
        if component.startswith("text_encoder"):
            known = [(own, {lost_prefix(model) + name: (name,) for name in names})]
        else:
            known = [(layout, layout.originals(model, names)), (own, own_names(model, names))]
        for source, originals in known:
            for original, ours in originals.items():
                places[f"{prefix}_{original.replace('.', '_')}"] = component, tuple(ours), source
    found = dict.fromkeys(key.partition(".")[0] for key in state)
    kinds = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    if not found.keys() <= places.keys() or not {key.partition(".")[2] for key in state} <= kinds:
        return None
    adapters: dict[str, dict[str, Layer]] = {}
    for key in found:
        component, names, source = places[key]
        adapters.setdefault(component, {}).update(_unstacked(key, state, models[component], names, source))
    return {component: Adapter(layers) for component, layers in adapters.items()}


def _unstacked(
    key: str, state: Mapping[str, Tensor], model: nn.Module, names: tuple[str, ...], layout: LoraLayout
) -> dict[str, Layer]:
    """The adapters of the layers whose weights are the rows of one, the inverse of how this trainer saves them."""
    down, up = state[f"{key}.lora_down.weight"].float(), state[f"{key}.lora_up.weight"].float()
    alpha = state.get(f"{key}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    sizes = [len(model.get_submodule(name).get_parameter("weight")) for name in names]
    if sum(sizes) != len(up):
        raise ValueError(f"{WRONG_BASE}: the adapter of {names[0]} does not fit")
    rows = layout.in_order(model, names[0], up).split(sizes)
    lengths = state.get(f"{key}.dora_scale")
    if lengths is not None and len(lengths) != len(up):
        raise ValueError("this is a DoRA with norms over the inputs, as LyCORIS has them, which are not read")
    magnitudes = (
        [None] * len(names)
        if lengths is None
        else layout.in_order(model, names[0], lengths.float().flatten()).split(sizes)
    )
    layers = {}
    for name, part, magnitude in zip(names, rows, magnitudes):
        used = torch.ones(len(down), dtype=torch.bool)
        if len(names) > 1 and up.any():  # else it has not been trained
            used = part.flatten(1).any(0)
            if not used.any():
                continue
        used = used if part.ndim == 2 else torch.ones_like(used)
        kept = down[used], part[:, used].contiguous()
        layers[name] = Layer(*kept, scale * int(used.sum()), magnitude)
    return layers


def lost_prefix(model: nn.Module) -> str:
    """The prefix that transformers 5 dropped from names in ``CLIPTextModel``; files keep it for all other readers."""
    return "text_model." if isinstance(model, CLIPTextModel) and not hasattr(model, "text_model") else ""


# Whether it fits -----------------------------------------------------------------------------------------------------


def _fitted(component: str, adapter: Adapter, model: nn.Module) -> Adapter:
    """With the names and shapes of the model's layers.

    Raises:
        ValueError: with the first layer that does not fit.
    """
    modules, layers = dict(model.named_modules()), {}
    for name, layer in adapter.layers.items():
        name = name.removeprefix(lost_prefix(model))
        module = modules.get(name)
        if not isinstance(module, ADAPTABLE):
            raise ValueError(f"{WRONG_BASE}: the {component} has no layer {name}")
        shape = module.get_parameter("weight").shape
        down, up = (
            factor.reshape(factor.shape + (1,) * (len(shape) - factor.ndim)) for factor in (layer.down, layer.up)
        )
        if len(shape) == 2:
            down, up = down.flatten(1), up.flatten(1)
        if len(down) != up.shape[1] or down.shape[1:] != shape[1:] or len(up) != shape[0]:
            raise ValueError(f"{WRONG_BASE}: the adapter of {name} does not fit")
        layers[name] = layer._replace(down=down, up=up)
    return Adapter(layers, adapter.rslora)
