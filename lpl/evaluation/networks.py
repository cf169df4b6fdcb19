"""Networks that turn images into features, and the features of whole sets, kept by content.

A *feature network* gives each image one row of D numbers in float32. It preprocesses images itself: what it does is in
its ``preprocessing``, and comes after the preprocessing of the set (:mod:`lpl.evaluation.images`). Images are square,
and networks see all of them: a processor that would resize them and cut out the middle makes them that small instead.

Its *fingerprint* is a hash of name, configuration, preprocessing, weights and the libraries' versions. The *key* of a
set's features is a hash of the fingerprint and of the images' digests in their order: nobody needs to say when kept
features are out of date. What a module of one's own computes does not follow from its weights: its features are kept
only where it has an attribute ``fingerprint``, a word that is changed whenever anything else is.

Where there are several processes, each computes every so-many-th image and all get all features; all of them have to
call :func:`set_features` then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from lpl.autoencoders import exact_precision
from lpl.config.choices import CLIP_SCORE, SET_METRICS
from lpl.evaluation.images import ImageSet
from lpl.evaluation.processes import everywhere, in_parts, processes, threaded
from lpl.tools.files import write_whole
from lpl.tools.trust import check_weights
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
INCEPTION = "inception"
INCEPTION_NEEDS = {"torch_fidelity": "torch-fidelity", "torchvision": "torchvision"}  # module -> package
CACHE = "LPL_CACHE"  # environment variable with the folder of kept features
LIBRARIES = ("torch", "transformers", "pillow")  # whose versions features depend on
NO_NETWORK = (OSError, ValueError, ImportError)  # what transformers raises for a network that it cannot load


@runtime_checkable
class FeatureNetwork(Protocol):
    """What maps images to features."""

    name: str
    fingerprint: str | None  # None: features are not kept
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
    name: str | nn.Module,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
    flag: str = "--features",
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
        flag: that names the network, for refusals.

    Raises:
        ValueError: where there is no such network, or it is of another kind.
    """
    if isinstance(name, nn.Module):
        return ModuleNetwork(type(name).__name__, name, device)
    check_network(name, cache_dir, flag)
    if name == INCEPTION:
        return _inception(device, flag)
    if _is_function(name):
        module = _function(name, flag)()
        if not isinstance(module, nn.Module):
            raise ValueError(f"{flag} {name}: it returns {type(module).__name__}, but should return an nn.Module")
        return ModuleNetwork(name, module, device)
    return _load_transformers(name, device, cache_dir, flag)


def check_network(name: str, cache_dir: str | None = None, flag: str = "--features", text: bool = False) -> None:
    """Refuse a network that :func:`load_network` cannot load, as far as that can be told without its weights.

    Args:
        flag: that names the network, for refusals.
        text: whether it has to understand captions as well.

    Raises:
        ValueError: with what is wrong.
    """
    if text and (name == INCEPTION or _is_function(name)):
        raise ValueError(f"{flag} {name}: captions need a CLIP or SigLIP of transformers")
    if name == INCEPTION:
        if lacking := [
            package for module, package in INCEPTION_NEEDS.items() if importlib.util.find_spec(module) is None
        ]:
            raise ValueError(
                f"{flag} {name}: it needs {' and '.join(lacking)}, which this environment lacks: "
                f"pip install {' '.join(lacking)}, or take another network, such as facebook/dinov2-base"
            )
    elif _is_function(name):
        _function(name, flag)
    else:
        _check_transformers(name, cache_dir, flag, text)


def _is_function(name: str) -> bool:
    return ":" in name and not Path(name).is_dir()  # no Hub id has a colon


def _function(name: str, flag: str) -> Callable[[], nn.Module]:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{flag} {name}: it should be package.module:function, and this cannot be imported ({first_line(error)})"
        ) from error


def _check_transformers(name: str, cache_dir: str | None, flag: str, text: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
        model_class = MODEL_MAPPING.get(type(config), None)
    except NO_NETWORK as error:
        raise ValueError(
            f"{flag} {name}: no network is found that needs no code of its own, which is not run; give a folder, a "
            f"Hub id or package.module:function ({first_line(error)})"
        ) from error
    if Path(name).is_dir():  # on the Hub, transformers finds converted weights by itself
        check_weights(f"{flag} {name}", name, [""], library="transformers")
    if text and not hasattr(model_class, "get_text_features"):
        raise ValueError(f"{flag} {name}: a {config.model_type} does not understand captions; give a CLIP or SigLIP")
    if not hasattr(model_class, "get_image_features") and (
        getattr(model_class, "main_input_name", None) != "pixel_values"
    ):
        raise ValueError(f"{flag} {name}: a {config.model_type} is no image model; give a DINOv2, CLIP or the like")


def _load_transformers(name: str, device: str | torch.device, cache_dir: str | None, flag: str) -> TransformersNetwork:
    try:
        # PIL, also where torchvision is installed, whose resizing gives other pixels
        source = {"cache_dir": cache_dir, "trust_remote_code": False}
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **source)
        model, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **source
        )
        pooled = _has_pooler(info["missing_keys"])
        if not hasattr(model, "get_text_features"):
            return TransformersNetwork(name, model, processor, device, pooled)
        return ClipNetwork(name, model, processor, device, AutoTokenizer.from_pretrained(name, **source))
    except NO_NETWORK as error:
        raise ValueError(f"{flag} {name}: it cannot be loaded: {first_line(error)}") from error


def _has_pooler(missing: Iterable[str]) -> bool:
    """False where the weights lack the last layer, as those of many ViTs do; what is missing would be random.

    Raises:
        ValueError: where they lack anything else.
    """
    if others := sorted(key for key in missing if not key.startswith("pooler.")):
        raise ValueError(f"its weights lack {others[0]} and {len(others) - 1} more, which would be random")
    return not missing


def _inception(device: str | torch.device, flag: str) -> ModuleNetwork:
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:  # without antialiasing: the resizing to 299 pixels that published FIDs have
        with _tensors_only():
            metric = FrechetInceptionDistance(feature=2048, antialias=False)
    except (*NO_NETWORK, UnpicklingError) as error:
        raise ValueError(f"{flag} {INCEPTION}: it cannot be downloaded: {first_line(error)}") from error
    metric.inception.fingerprint = " ".join(metadata.version(name) for name in ("torchmetrics", "torch-fidelity"))
    return ModuleNetwork(INCEPTION, metric.inception, device, {"resize": 299, "antialias": False})


def wanted_networks(
    metrics: Sequence[str], features: Sequence[str], clip: str, flags: str = "--"
) -> dict[str, tuple[str, bool]]:
    """The networks that the metrics need: name -> the flag that names it, and whether it has to know captions.

    Args:
        flags: how the names of this program's flags begin.
    """
    of_sets = features if any(metric in SET_METRICS for metric in metrics) else ()
    of_captions = {clip: (f"{flags}clip", True)} if CLIP_SCORE in metrics else {}
    return dict.fromkeys(of_sets, (f"{flags}features", False)) | of_captions


def check_networks(wanted: Mapping[str, tuple[str, bool]], cache_dir: str | None = None) -> None:
    """:func:`check_network` of all."""
    for name, (flag, text) in wanted.items():
        check_network(name, cache_dir, flag, text)


def load_networks(
    wanted: Mapping[str, tuple[str, bool]], image: Image.Image, device: str | torch.device, cache_dir: str | None
) -> dict[str, FeatureNetwork]:
    """All of them, tried out on an image such as those to come.

    Raises:
        ValueError: where one cannot be loaded, or fails.
    """
    networks = {name: load_network(name, device, cache_dir, flag) for name, (flag, _) in wanted.items()}
    for name, network in networks.items():
        try_out(network, image, wanted[name][0])
    return networks


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Within, ``torch.load`` reads nothing but tensors, whatever it is told: these weights come as a pickle only."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # which torch refuses together
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


# Networks ------------------------------------------------------------------------------------------------------------


def try_out(network: FeatureNetwork, image: Image.Image, flag: str = "--features") -> None:
    """Refuse a network that fails on an image such as those to come, before they are drawn.

    Raises:
        ValueError: with what it says.
    """
    try:
        network.features([image])
    except Exception as error:  # a user's own module may raise anything
        raise ValueError(
            f"{flag} {network.name}: it fails on an image of {image.width} x {image.height} pixels: "
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
    def fingerprint(self) -> str | None:
        """sha256 over name, configuration, preprocessing, weights and the libraries' versions."""
        versions = [metadata.version(name) for name in LIBRARIES]
        said = [self.name, versions, repr(getattr(self.module, "config", None)), self.preprocessing]
        found = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
        for key, tensor in self.module.state_dict().items():
            if isinstance(tensor, Tensor):  # a module of one's own may keep other things there
                found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, D), float32 on the CPU."""
        with torch.no_grad(), exact_precision(self.device):
            features = self._embed(self._pixels(images).to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.name}: for {len(images)} images it gives {shape} instead of (B, D)")
        return features.float().cpu()

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """What the module is given, (B, 3, H, W)."""
        raise NotImplementedError

    def _embed(self, pixels: Tensor) -> Any:
        raise NotImplementedError


class ModuleNetwork(_Network):
    """A module that maps uint8 (B, 3, H, W) to (B, D)."""

    @cached_property
    def fingerprint(self) -> str | None:
        """sha256 over what the module says of itself, and the rest; None where it says nothing."""
        own = getattr(self.module, "fingerprint", None)
        return hashlib.sha256(f"{own} {super().fingerprint}".encode()).hexdigest() if own else None

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
        _see_all(processor)
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


def _see_all(processor: Any) -> None:
    """Make a processor that cuts out the middle resize the whole image instead, to the same number of pixels."""
    if getattr(processor, "do_center_crop", False):
        processor.size, processor.do_resize, processor.do_center_crop = processor.crop_size, True, False
    if getattr(processor, "crop_pct", None):
        processor.crop_pct = 1.0  # the share that ConvNeXt, ResNet and PoolFormer leave when they resize


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
    keep: bool = True,
) -> np.ndarray:
    """The features of all images, computed once and kept.

    Args:
        cache_dir: where features are kept; by default the environment's LPL_CACHE, or ``~/.cache/lpl/features``.
        progress: show a bar while images are embedded.
        keep: False: neither look for kept features nor keep them.

    Returns:
        (N, D) float32, the same in all processes.

    Raises:
        ValueError: where the network fails on the images.
    """
    main = processes().is_main_process
    path = None
    if keep and network.fingerprint is not None:
        digests = in_parts(len(images), lambda mine: threaded(images.digest, mine))
        path = cache_folder(cache_dir) / f"{features_key(network, digests)}.safetensors"
        kept = _read(path, len(images))
        if all(everywhere(kept is not None)):
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

    features = np.stack(in_parts(len(images), embed))
    if not np.isfinite(features).all():
        raise ValueError(f"{network.name}: some features of {images.name} are not finite")
    if path is not None and main:
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
