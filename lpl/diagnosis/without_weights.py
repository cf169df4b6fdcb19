"""Models of a run without data: built from their configurations, with a tokenizer and a GPU that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import BatchEncoding

from lpl.config import Config
from lpl.diagnosis.counting import GPU
from lpl.families import Family
from lpl.families.description import Description
from lpl.families.fit import component_class
from lpl.tools.machine import DTYPES, SHORT
from lpl.tools.trust import components_in
from lpl.training.loading import denoiser_class, precisions
from lpl.training.parts import TrainedParts
from lpl.training.sharding import Sharding


TOKENS = 77  # of a caption, where the flags do not say: CLIP's


class Tokenizer:
    """Gives captions of the longest length; stands for a tokenizer, whose vocabulary need not be there."""

    padding_side = "right"
    eos_token = ""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, text: Any, *args: Any, max_length: int | None = None, **kwargs: Any) -> BatchEncoding:
        shape = 1 if isinstance(text, str) else len(text), max_length or self.model_max_length
        return BatchEncoding({name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")})

    def encode(self, text: str) -> list[int]:
        """About a token for four letters."""
        return [0] * (len(text) // 4)

    def tokenize(self, text: str) -> list[str]:
        return []

    def apply_chat_template(self, messages: Any, *, tokenize: bool = True, **kwargs: Any) -> Any:
        return self(messages, **kwargs) if tokenize else ""

    def batch_decode(self, ids: Any, *args: Any, **kwargs: Any) -> list[str]:
        return [""] * len(ids)


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Models that are made within have that precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def model_without_weights(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model from its configuration, all of it in one precision, as ``from_pretrained`` loads it."""
    with _made_in(dtype):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for module in model.modules():
        saved = {name for name in module._buffers if name not in module._non_persistent_buffers_set}
        for kept, names in ((module._parameters, set(module._parameters)), (module._buffers, saved)):
            for name in names:
                value = kept[name]
                if value is not None and value.is_floating_point() and value.dtype != dtype:
                    lowered = value.detach().to(dtype)
                    kept[name] = nn.Parameter(lowered) if isinstance(value, nn.Parameter) else lowered
    return model


def family_without_weights(config: Config, description: Description, mixed_precision: str) -> Family:
    """The pipeline that the flags name, from its configurations; within :class:`Counting`.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
    """
    model, family = config.model, description.family
    dtypes = precisions(model, config.lora, family, weight_dtype_of(mixed_precision))
    denoiser = family.untrained_config(description.denoiser) if model.from_scratch else description.denoiser
    trained_in = dtypes.get(family.denoiser_name, torch.float32)
    components: dict[str, Any] = {
        **description.absent,
        "vae": model_without_weights(
            getattr(diffusers, description.vae["_class_name"]), description.vae, torch.float32
        ),
        family.denoiser_name: model_without_weights(denoiser_class(description), denoiser, trained_in),
        "scheduler": description.scheduler,
    }
    where = {"revision": model.revision, "cache_dir": model.cache_dir}
    for name in family.text_encoder_names:
        if name in description.absent:
            continue
        kind = component_class(description.index[name])
        settings = kind.config_class.from_pretrained(model.pipeline, subfolder=name, **where)
        components[name] = model_without_weights(kind, settings, dtypes[name])
        length = getattr(settings.get_text_config(), "max_position_embeddings", None) or model.max_sequence_length
        components[name.replace("text_encoder", "tokenizer")] = Tokenizer(length or TOKENS)
    needed, options = family.pipeline_class._get_signature_keys(family.pipeline_class)
    flags = {name: description.index[name] for name in options if name in description.index}
    flags = {name: value for name, value in flags.items() if name not in components_in(description.index)}
    flags |= {name: False for name in options if name == "requires_safety_checker"}
    pipeline = family.pipeline_class(**{name: components.get(name) for name in needed}, **flags)
    made: Any = family(pipeline, model.max_sequence_length, model.guidance_scale)
    plain = made.predict
    made.predict = lambda *inputs: plain(*inputs[:-1], made.without_values(inputs[-1]))
    return made


def weight_dtype_of(mixed_precision: str) -> torch.dtype:
    return DTYPES[SHORT.get(mixed_precision, "float32")]


class OneGpu:
    """Does what accelerate does for a step, for a GPU that is not there.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        processes: GPUs; with several, each holds a copy of the gradients in the buckets that they are exchanged in.
    """

    device = GPU
    scaler = None
    sharding: Sharding | None = None
    gradient_accumulation_steps = 1  # further micro-batches are computed from this one

    def __init__(self, mixed_precision: str, processes: int = 1) -> None:
        self.mixed_precision, self.num_processes = mixed_precision, processes
        self.state, self.parallelism_config = SimpleNamespace(), os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG")
        self._buckets: list[Tensor] = []

    def prepare(self, trained: TrainedParts, optimizer: Any) -> tuple[nn.Module, Any]:
        """What is trained, under autocast and with outputs in float32; and its optimizer."""
        plain, optimizer.optimizer = trained.forward, optimizer

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.autocast():
                output = plain(*args, **kwargs)
            return output if self.mixed_precision == "no" else convert_outputs_to_fp32(lambda: output)()

        trained.forward = forward  # type: ignore[method-assign]
        if self.num_processes > 1:
            self._buckets = [torch.empty_like(parameter) for parameter in trained.weights()]
        return trained, optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=weight_dtype_of(self.mixed_precision))

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self) -> None:
        pass

    def reduce(self, numbers: Tensor, how: str) -> Tensor:
        return numbers
