"""Feature networks: loading, checking, preprocessing.

A *feature network* maps each image to D numbers in float32. It preprocesses images itself, as its ``preprocessing``
records, after the preprocessing of the set (:mod:`lpl.evaluation.images`). Images are square, and networks see all of
them: a processor that would resize an image and crop its centre resizes the whole image to the crop's size instead.

Its *fingerprint* is a hash of name, configuration, preprocessing, weights and the libraries' versions; features are
cached by it (:mod:`lpl.evaluation.cache`). The output of a user's own module does not follow from its weights alone:
its features are cached only if it has an attribute ``fingerprint``, a string that its author changes with the module.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from lpl.autoencoders import exact_precision
from lpl.config.choices import CLIP_SCORE, SET_METRICS
from lpl.tools.trust import check_weights
from lpl.tools.words import first_line


INCEPTION = "inception"
INCEPTION_NEEDS = {"torch_fidelity": "torch-fidelity", "torchvision": "torchvision"}  # module -> package
LIBRARIES = ("torch", "transformers", "pillow")  # whose versions features depend on
UNPOOLED = ("data2vec-vision", "ijepa", "vit_mae")  # image models of transformers without a pooled output
NO_NETWORK = (OSError, ValueError, ImportError)  # raised by transformers for a network that it cannot load


@runtime_checkable
class FeatureNetwork(Protocol):
    """Maps images to features."""

    name: str
    preprocessing: dict[str, Any]

    @property
    def fingerprint(self) -> str | None:
        """See the head of this module; None: features are not cached."""
        ...

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, D), float32 on the CPU."""
        ...


@runtime_checkable
class TextImageNetwork(FeatureNetwork, Protocol):
    """Maps captions into the same space too, such as CLIP."""

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """(B, D), float32 on the CPU."""
        ...


# Loading -------------------------------------------------------------------------------------------------------------


def load_network(
    name: str | nn.Module,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
    flag: str = "--features",
) -> FeatureNetwork:
    """Load a network in float32 and evaluation mode.

    Args:
        name: one of

            - a folder or Hub id of a transformers image model with its image processor: DINOv2 and similar models give
              the pooled output, CLIP and SigLIP the projected one (a :class:`TextImageNetwork`);
            - ``inception``: the network of published FIDs, which torchmetrics downloads at its first use; needs
              torch-fidelity and torchvision;
            - ``package.module:function``, where ``function()`` returns your own ``nn.Module``, which maps images,
              uint8 (B, 3, H, W), to (B, D);
            - such a module itself, which is set to evaluation mode and moved to the device.
        cache_dir: for the downloads of transformers.
        flag: the flag that names the network, for messages.

    Raises:
        ValueError: if there is no such network, or it is of another kind.
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
    """Refuse a network that :func:`load_network` cannot load, without reading its weights.

    Args:
        flag: the flag that names the network, for messages.
        text: whether it has to map captions as well.

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
            f"{flag} {name}: it should be package.module:function, but cannot be imported ({first_line(error)})"
        ) from error


def _check_transformers(name: str, cache_dir: str | None, flag: str, text: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
        model_class = MODEL_MAPPING.get(type(config), None)
    except NO_NETWORK as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise ValueError(
                f"{flag} {name}: it is not in the cache, and the Hub cannot be reached; give a folder, or run this "
                "once with access to the Hub"
            ) from error
        raise ValueError(
            f"{flag} {name}: there is no such network, or it needs code of its own, which is not run; give a folder, "
            f"a Hub id or package.module:function ({first_line(error)})"
        ) from error
    if config.model_type in UNPOOLED:
        raise ValueError(
            f"{flag} {name}: a {config.model_type} has no features of the image as a whole; give a DINOv2, CLIP or "
            "the like"
        )
    if Path(name).is_dir():  # on the Hub, transformers finds converted weights itself
        check_weights(f"{flag} {name}", name, [""], library="transformers")
    if text and not hasattr(model_class, "get_text_features"):
        raise ValueError(f"{flag} {name}: a {config.model_type} does not understand captions; give a CLIP or SigLIP")
    if not hasattr(model_class, "get_image_features") and (
        getattr(model_class, "main_input_name", None) != "pixel_values"
    ):
        raise ValueError(f"{flag} {name}: a {config.model_type} is no image model; give a DINOv2, CLIP or the like")


def _load_transformers(name: str, device: str | torch.device, cache_dir: str | None, flag: str) -> TransformersNetwork:
    try:
        # PIL even if torchvision is installed, whose resizing gives other pixels
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
    """False if the weights lack the pooler, as those of many ViTs do; missing layers would be random.

    Raises:
        ValueError: if they lack other layers.
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
    fingerprint = " ".join(metadata.version(name) for name in ("torchmetrics", "torch-fidelity"))
    return ModuleNetwork(INCEPTION, metric.inception, device, {"resize": 299, "antialias": False}, fingerprint)


def wanted_networks(
    metrics: Sequence[str], features: Sequence[str], clip: str, flags: str = "--"
) -> dict[str, tuple[str, bool]]:
    """The networks that the metrics need: name -> the flag that names it, and whether it has to map captions.

    Args:
        flags: prefix of the program's flags.
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
    """Load all networks and try them on an image.

    Raises:
        ValueError: if one cannot be loaded, or fails.
    """
    networks = {name: load_network(name, device, cache_dir, flag) for name, (flag, _) in wanted.items()}
    for name, network in networks.items():
        try_out(network, image, wanted[name][0])
    return networks


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make ``torch.load`` read tensors only, whatever its arguments: these weights exist as a pickle only."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses both together
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update(before)


# Networks ------------------------------------------------------------------------------------------------------------


def try_out(network: FeatureNetwork, image: Image.Image, flag: str = "--features") -> None:
    """Refuse a network that fails on an image, before the others are drawn.

    Raises:
        ValueError: with the network's error.
    """
    try:
        network.features([image])
    except Exception as error:  # a user's own module may raise anything
        raise ValueError(
            f"{flag} {network.name}: it fails on an image of {image.width} x {image.height} pixels: "
            f"{first_line(error)}"
        ) from error


class _Network:
    """The common part of all networks."""

    def __init__(
        self, name: str, module: nn.Module, device: str | torch.device, preprocessing: dict[str, Any] | None = None
    ) -> None:
        self.name, self.device = name, torch.device(device)
        self.module = module.to(self.device).eval()
        self.preprocessing = preprocessing or {}

    @property
    def fingerprint(self) -> str | None:
        """sha256 over name, configuration, preprocessing, weights and the libraries' versions."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        versions = [metadata.version(name) for name in LIBRARIES]
        parts = [self.name, versions, repr(getattr(self.module, "config", None)), self.preprocessing]
        found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for key, tensor in self.module.state_dict().items():
            if isinstance(tensor, Tensor):  # a user's module may keep other types there
                found.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images -> (B, D), float32 on the CPU."""
        with torch.no_grad(), exact_precision(self.device):
            features = self._embed(self._pixels(images).to(self.device))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.name}: for {len(images)} images it returns {shape} instead of (B, D)")
        return features.float().cpu()

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The module's input, (B, 3, H, W)."""
        raise NotImplementedError

    def _embed(self, pixels: Tensor) -> Any:
        raise NotImplementedError


class ModuleNetwork(_Network):
    """A module that maps uint8 (B, 3, H, W) to (B, D).

    Args:
        own_fingerprint: defaults to the module's attribute ``fingerprint``.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        device: str | torch.device,
        preprocessing: dict[str, Any] | None = None,
        own_fingerprint: str | None = None,
    ) -> None:
        super().__init__(name, module, device, preprocessing)
        self.own_fingerprint = own_fingerprint or getattr(module, "fingerprint", None)

    @property
    def fingerprint(self) -> str | None:
        """sha256 over the module's own fingerprint and the rest; None without its own."""
        own = self.own_fingerprint
        return hashlib.sha256(f"{own} {self._hash}".encode()).hexdigest() if own else None

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _embed(self, pixels: Tensor) -> Any:
        return self.module(pixels)


class TransformersNetwork(_Network):
    """An image model of transformers with its own image processor.

    Args:
        pooled: whether its weights have the pooler; otherwise the features are the class token.
    """

    def __init__(
        self, name: str, module: PreTrainedModel, processor: Any, device: str | torch.device, pooled: bool = True
    ) -> None:
        if not pooled:
            module.pooler = nn.Identity()  # random weights would change the fingerprint
        _see_all(processor)
        super().__init__(name, module, device, {**processor.to_dict(), "pooled": pooled})
        self.processor, self.pooled = processor, pooled

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    def _embed(self, pixels: Tensor) -> Any:
        if hasattr(self.module, "get_image_features"):
            return _projected(cast(Any, self.module).get_image_features(pixel_values=pixels))
        output = self.module(pixel_values=pixels)
        return output.pooler_output.flatten(1) if self.pooled else output.last_hidden_state[:, 0]


class ClipNetwork(TransformersNetwork):
    """A model that maps images and captions into one space. Captions are truncated to its maximum length."""

    def __init__(
        self, name: str, module: PreTrainedModel, processor: Any, device: str | torch.device, tokenizer: Any
    ) -> None:
        super().__init__(name, module, processor, device)
        self.tokenizer, self.length = tokenizer, module.config.text_config.max_position_embeddings

    def text_features(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """(B, D), float32 on the CPU."""
        parts = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        return torch.cat([self._embed_text(list(part)) for part in parts])

    def _embed_text(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(  # all to the same length: SigLIP was trained on no other
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        with torch.no_grad(), exact_precision(self.device):
            output = cast(Any, self.module).get_text_features(**tokens.to(self.device))
            return _projected(output).float().cpu()


def _see_all(processor: Any) -> None:
    """Make a processor that crops the centre resize the whole image instead, to the same number of pixels."""
    if getattr(processor, "do_center_crop", False):
        processor.size, processor.do_resize, processor.do_center_crop = processor.crop_size, True, False
    if getattr(processor, "crop_pct", None):
        processor.crop_pct = 1.0  # the share of the image that ConvNeXt, ResNet and PoolFormer keep


def _projected(output: Any) -> Any:
    """(B, D); some versions of transformers wrap it."""
    return output if isinstance(output, Tensor) else output.pooler_output
