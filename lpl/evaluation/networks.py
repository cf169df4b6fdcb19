"""Networks that turn images into features, and the features of whole sets, kept by content.

A *feature network* gives each image one row of D numbers in float32. It preprocesses images itself: what it does is in
its ``preprocessing``, and comes after the preprocessing of the set (:mod:`lpl.evaluation.images`). Its *fingerprint*
is a hash of all that its features depend on, weights included. The *key* of a set's features is a hash of the
fingerprint and of the images' digests in their order: nobody needs to say when kept features are out of date.

Where there are several processes, each computes every so-many-th image and all get all features; all of them have to
call :func:`set_features` then.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from lpl.autoencoders import exact_precision
from lpl.data import first_line
from lpl.evaluation.images import ImageSet, threaded
from lpl.files import write_whole


logger = logging.getLogger(__name__)

INCEPTION = "inception"
INCEPTION_NEEDS = {"torch_fidelity": "torch-fidelity", "torchvision": "torchvision"}  # module -> package
CACHE = "LPL_CACHE"  # environment variable with the folder of kept features
NO_NETWORK = (OSError, ValueError, ImportError)  # what transformers raises for a network that it cannot load


@runtime_checkable
class FeatureNetwork(Protocol):
    """What maps images to features."""

    name: str
    fingerprint: str
    dim: int
    preprocessing: dict[str, Any]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, D), float32 on the CPU."""


@runtime_checkable
class TextImageNetwork(FeatureNetwork, Protocol):
    """What maps captions into the same space, such as CLIP."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """(B, D), float32 on the CPU."""


# Loading -------------------------------------------------------------------------------------------------------------


def load_network(
    name: str | nn.Module, device: str | torch.device = "cpu", cache_dir: str | None = None
) -> FeatureNetwork:
    """The network of that name, in float32 and evaluation mode.

    Args:
        name: one of

            - a folder or Hub id with an image model of transformers and its image processor: DINOv2 and its like give
              the pooled output, CLIP and SigLIP the projected one (a :class:`TextImageNetwork`);
            - ``inception``: the network of published FIDs, by torchmetrics, which downloads it at its first use; needs
              torch-fidelity and torchvision;
            - ``package.module:function``, where ``function()`` returns an ``nn.Module`` of your own that maps images,
              uint8 (B, 3, H, W), to (B, D);
            - such a module itself, which is put into evaluation mode and on the device.
        cache_dir: where transformers keeps its downloads.

    Raises:
        ValueError: where there is no such network, or it is of another kind.
    """
    if isinstance(name, nn.Module):
        return ModuleNetwork(type(name).__name__, name, device)
    check_network(name, cache_dir)
    if name == INCEPTION:
        return _inception(device)
    if _is_function(name):
        module = _function(name)()
        if not isinstance(module, nn.Module):
            raise ValueError(f"--features {name}: it returns {type(module).__name__}, but should return an nn.Module")
        return ModuleNetwork(name, module, device)
    return _load_transformers(name, device, cache_dir)


def check_network(name: str, cache_dir: str | None = None, text: bool = False) -> None:
    """Refuse a network that :func:`load_network` cannot load, as far as that can be told without its weights.

    Args:
        text: whether it has to understand captions as well.

    Raises:
        ValueError: with what is wrong.
    """
    if text and (name == INCEPTION or _is_function(name)):
        raise ValueError(f"--clip {name}: captions need a CLIP or SigLIP of transformers")
    if name == INCEPTION:
        if lacking := [
            package for module, package in INCEPTION_NEEDS.items() if importlib.util.find_spec(module) is None
        ]:
            raise ValueError(
                f"--features {name}: it needs {' and '.join(lacking)}, which this environment lacks: "
                f"pip install {' '.join(lacking)}, or take another network, such as facebook/dinov2-base"
            )
    elif _is_function(name):
        _function(name)
    else:
        _check_transformers(name, cache_dir, text)


def _is_function(name: str) -> bool:
    return ":" in name and not Path(name).is_dir()  # no Hub id has a colon


def _function(name: str) -> Callable[[], nn.Module]:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--features {name}: it should be package.module:function, and this cannot be imported "
            f"({first_line(error)})"
        ) from error


def _check_transformers(name: str, cache_dir: str | None, text: bool) -> None:
    flag = "--clip" if text else "--features"
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir)
        model_class = MODEL_MAPPING.get(type(config), None)
    except NO_NETWORK as error:
        raise ValueError(
            f"{flag} {name}: no network is found; give a folder, a Hub id or package.module:function "
            f"({first_line(error)})"
        ) from error
    if text and not hasattr(model_class, "get_text_features"):
        raise ValueError(f"{flag} {name}: a {config.model_type} does not understand captions; give a CLIP or SigLIP")
    if not hasattr(model_class, "get_image_features") and (
        getattr(model_class, "main_input_name", None) != "pixel_values"
    ):
        raise ValueError(f"{flag} {name}: a {config.model_type} is no image model; give a DINOv2, CLIP or the like")


def _load_transformers(name: str, device: str | torch.device, cache_dir: str | None) -> TransformersNetwork:
    try:
        # PIL, also where torchvision is installed, whose resizing gives other pixels
        processor = AutoImageProcessor.from_pretrained(name, cache_dir=cache_dir, backend="pil")
        model, info = AutoModel.from_pretrained(
            name, cache_dir=cache_dir, dtype=torch.float32, output_loading_info=True
        )
        pooled = _has_pooler(info["missing_keys"])
        if not hasattr(model, "get_text_features"):
            return TransformersNetwork(name, model, processor, device, pooled)
        return ClipNetwork(name, model, processor, device, AutoTokenizer.from_pretrained(name, cache_dir=cache_dir))
    except NO_NETWORK as error:
        raise ValueError(f"--features {name}: it cannot be loaded: {first_line(error)}") from error


def _has_pooler(missing: Iterable[str]) -> bool:
    """False where the weights lack the last layer, as those of many ViTs do; what is missing would be random.

    Raises:
        ValueError: where they lack anything else.
    """
    if others := sorted(key for key in missing if not key.startswith("pooler.")):
        raise ValueError(f"its weights lack {others[0]} and {len(others) - 1} more, which would be random")
    return not missing


def _inception(device: str | torch.device) -> ModuleNetwork:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:  # without antialiasing: the resizing to 299 pixels that published FIDs have
        metric = FrechetInceptionDistance(feature=2048, antialias=False)
    except NO_NETWORK as error:
        raise ValueError(f"--features {INCEPTION}: it cannot be downloaded: {first_line(error)}") from error
    return ModuleNetwork(INCEPTION, metric.inception, device, {"resize": 299, "antialias": False})


# Networks ------------------------------------------------------------------------------------------------------------


def try_out(network: FeatureNetwork, image: Image.Image) -> None:
    """Refuse a network that fails on an image such as those to come, before they are drawn.

    Raises:
        ValueError: with what it says.
    """
    try:
        network.features([image])
    except Exception as error:  # a user's own module may raise anything
        raise ValueError(
            f"--features {network.name}: it fails on an image of {image.width} x {image.height} pixels: "
            f"{first_line(error)}"
        ) from error


class _Network:
    """What networks have in common."""

    def __init__(
        self, name: str, module: nn.Module, device: str | torch.device, preprocessing: dict[str, Any] | None = None
    ) -> None:
        self.name, self.device = name, torch.device(device)
        self.module = module.to(self.device).eval()
        self.preprocessing = preprocessing or {}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over name, code, preprocessing and weights."""
        layers = re.sub(r" at 0x[0-9a-f]+", "", repr(self.module))  # addresses differ from run to run
        preprocessing = json.dumps(self.preprocessing, sort_keys=True, default=str)
        found = hashlib.sha256(json.dumps([self.name, *_sources(self.module), layers, preprocessing]).encode())
        for key, tensor in self.module.state_dict().items():
            if isinstance(tensor, Tensor):
                found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    @cached_property
    def dim(self) -> int:
        """D."""
        return self.features([Image.new("RGB", (64, 64))]).shape[1]

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, D), float32 on the CPU."""
        with torch.no_grad(), exact_precision(self.device):
            features = self._embed(self._pixels(images).to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"--features {self.name}: for {len(images)} images it gives {shape} instead of (B, D)")
        return features.float().cpu()

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """What the module is given, (B, 3, H, W)."""
        raise NotImplementedError

    def _embed(self, pixels: Tensor) -> Any:
        raise NotImplementedError


def _sources(module: nn.Module) -> list[str]:
    """The code of a module's classes, but for torch's own: weights alone do not say what is done with them."""
    classes = {type(part) for part in module.modules()}
    found = []
    for kind in classes:
        if not kind.__module__.startswith("torch."):
            try:
                found.append(inspect.getsource(kind))
            except (OSError, TypeError):  # typed in, not written in a file
                found.append(kind.__qualname__)
    return sorted(found)


class ModuleNetwork(_Network):
    """A module that maps uint8 (B, 3, H, W) to (B, D).

    Where it has no ``num_features``, D is found out on a picture of 64 x 64 pixels.
    """

    @cached_property
    def dim(self) -> int:
        """D."""
        given = getattr(self.module, "num_features", None)
        return given if isinstance(given, int) else super().dim

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _embed(self, pixels: Tensor) -> Any:
        return self.module(pixels)


class TransformersNetwork(_Network):
    """An image model of transformers behind its own image processor.

    Args:
        pooled: whether its weights have the layer of the pooled output; else the class token is taken.
    """

    def __init__(
        self, name: str, module: nn.Module, processor: Any, device: str | torch.device, pooled: bool = True
    ) -> None:
        if not pooled:
            module.pooler = nn.Identity()  # its random weights would make another fingerprint each time
        super().__init__(name, module, device, {**processor.to_dict(), "pooled": pooled})
        self.processor, self.pooled = processor, pooled

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    def _embed(self, pixels: Tensor) -> Any:
        if hasattr(self.module, "get_image_features"):
            return _projected(self.module.get_image_features(pixel_values=pixels))
        output = self.module(pixel_values=pixels)
        return output.pooler_output.flatten(1) if self.pooled else output.last_hidden_state[:, 0]


class ClipNetwork(TransformersNetwork):
    """A model that puts images and captions into one space. Captions are cut to the length that it knows."""

    def __init__(
        self, name: str, module: nn.Module, processor: Any, device: str | torch.device, tokenizer: Any
    ) -> None:
        super().__init__(name, module, processor, device)
        self.tokenizer = tokenizer

    def text_features(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D), float32 on the CPU."""
        parts = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        return torch.cat([self._embed_text(list(part)) for part in parts])

    def _embed_text(self, captions: list[str]) -> Tensor:
        length = self.module.config.text_config.max_position_embeddings
        tokens = self.tokenizer(  # all to the same length: SigLIP has learned no other
            captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.no_grad(), exact_precision(self.device):
            return _projected(self.module.get_text_features(**tokens.to(self.device))).float().cpu()


def _projected(output: Any) -> Any:
    """(B, D), which some versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


# Features of sets ----------------------------------------------------------------------------------------------------


def set_features(
    images: ImageSet,
    network: FeatureNetwork,
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """The features of all images, computed once and kept.

    Args:
        cache_dir: where features are kept; by default the environment's LPL_CACHE, or ``~/.cache/lpl/features``.
        progress: show a bar while images are embedded.

    Returns:
        (N, D) float32, the same in all processes.

    Raises:
        ValueError: where the network fails on the images.
    """
    state = _processes()
    main = state is None or state.is_main_process
    digests = _in_parts(state, len(images), lambda mine: threaded(images.digest, mine))
    path = cache_folder(cache_dir) / f"{features_key(network, digests)}.safetensors"
    kept = _read(path, len(images))
    if all(_everywhere(state, kept is not None)):
        return kept

    def embed(mine: Sequence[int]) -> list[np.ndarray]:
        bar = tqdm(total=len(mine), desc=f"features of {images.name}", leave=False, disable=not (progress and main))
        rows: list[np.ndarray] = []
        with bar:
            for start in range(0, len(mine), batch_size):
                batch = threaded(images.__getitem__, mine[start : start + batch_size])
                rows.extend(network.features(batch).numpy())
                bar.update(len(batch))
        return rows

    features = np.stack(_in_parts(state, len(images), embed))
    if not np.isfinite(features).all():
        raise ValueError(f"--features {network.name}: some features of {images.name} are not finite")
    if main:
        _write(path, features)
    return features


def cache_folder(given: str | Path | None = None) -> Path:
    """Where features are kept."""
    return Path(given or os.environ.get(CACHE) or Path.home() / ".cache" / "lpl" / "features")


def features_key(network: FeatureNetwork, digests: Sequence[str]) -> str:
    """Names the features of images with these digests, in this order."""
    return hashlib.sha256("\n".join([network.fingerprint, *digests]).encode()).hexdigest()


def _read(path: Path, count: int) -> np.ndarray | None:
    """Kept features; None where there are none, or the file is broken."""
    try:
        features = load_file(path)["features"]
    except (OSError, KeyError, SafetensorError):
        return None
    return features if features.ndim == 2 and len(features) == count else None


def _write(path: Path, features: np.ndarray) -> None:
    try:
        write_whole(path, lambda unfinished: save_file({"features": features}, unfinished))
    except OSError as error:  # they are there all the same
        logger.warning("the features are not kept: %s (set %s to a folder that can be written)", error, CACHE)


def _processes() -> PartialState | None:
    """The processes that share the work; None where there is one."""
    if not PartialState._shared_state and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    # Told nothing, it looks for GPUs only, and where there are none takes each process for the only one.
    state = PartialState(cpu=not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))
    return state if state.num_processes > 1 else None


def _everywhere(state: PartialState | None, value: Any) -> list[Any]:
    """Each process's value, in all of them."""
    return [value] if state is None else gather_object([value])


def _in_parts(state: PartialState | None, count: int, compute: Callable[[Sequence[int]], Sequence]) -> list:
    """One result for each of `count` indices; each process computes every so-many-th."""
    rank, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    results: list = [None] * count
    for start, part in enumerate(_everywhere(state, compute(range(rank, count, processes)))):
        results[start::processes] = part
    return results
