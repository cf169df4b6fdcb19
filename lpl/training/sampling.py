"""Images of the model in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lpl.autoencoders import exact_precision
from lpl.config.groups import Validation
from lpl.config.prompts import NEGATIVE, own_settings, size_of
from lpl.config.sizes import Size
from lpl.families import Family
from lpl.tools.words import pixels


@dataclass(frozen=True)
class Draw:
    """One validation sample.

    Args:
        number: of the prompt, counted from 0.
        prompt: caption; in a class-conditional family, a class label.
        name: heading in grids.
        size: height and width in pixels.
        own: whether the prompt has settings of its own.
        guidance: None: the pipeline's.
        negative: prompt to guide away from; None: the pipeline's, which is an empty one.
    """

    number: int
    prompt: str | int
    name: str
    size: Size
    seed: int
    steps: int
    own: bool = False
    guidance: float | None = None
    negative: str | None = None

    def settings(self) -> dict[str, Any]:
        """Arguments of a pipeline's call, besides the prompt, and the seed."""
        return {
            "height": self.size[0],
            "width": self.size[1],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            NEGATIVE: self.negative,
            "seed": self.seed,
        }


def draws_of(
    validation: Validation, prompts: Sequence[str | int], names: Sequence[str], sizes: Sequence[Size], seed: int
) -> list[Draw]:
    """The samples of --validation_prompts: all prompts at the first size, then at the next.

    A prompt with a size of its own is drawn at that only, among the first. The n-th prompt's seed is seed + n.

    Args:
        prompts: the same as the family takes them.
        names: of the prompts.
    """
    draws = []
    entries = validation.validation_prompts or ()
    for size in sizes:
        for number, (entry, prompt, name) in enumerate(zip(entries, prompts, names, strict=True)):
            own, own_size = own_settings(entry), size_of(entry, sizes[0])
            if own_size is not None and size != sizes[0]:
                continue
            draws.append(
                Draw(
                    number,
                    prompt,
                    _heading(name, size if len(sizes) > 1 else None, own, own_size),
                    own_size or size,
                    own.get("seed", seed + number),
                    own.get("num_inference_steps", validation.validation_inference_steps),
                    bool(own),
                    own.get("guidance_scale", validation.validation_guidance_scale),
                    own.get(NEGATIVE),
                )
            )
    return draws


def _heading(name: str, size: Size | None, own: dict[str, Any], own_size: Size | None) -> str:
    """A prompt with what distinguishes its sample.

    >>> _heading("a cat", None, {"seed": 3, "width": 64}, (32, 64))
    'a cat, 32 x 64 px, seed 3'
    """
    shown = own_size or size
    words = [name, *([pixels(*shown)] if shown else [])]
    named = {"seed": "seed", "guidance_scale": "guidance", "num_inference_steps": "steps"}
    return ", ".join([*words, *(f"{word} {own[key]:g}" for key, word in named.items() if key in own)])


@torch.no_grad()
def sample(
    family: Family,
    scheduler: Any,
    draws: Sequence[Draw],
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image per draw, which depends on no other.

    Args:
        stop: called before each image; True ends the sampling.
    """
    pipeline = family.pipeline
    pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with family.whole():
        for draw in draws:
            if stop():
                break
            with accelerator.autocast(), family.encoding_exactly(), decoding_exactly(family.vae):
                drawn = pipeline(
                    num_inference_steps=draw.steps,
                    generator=torch.Generator().manual_seed(draw.seed),
                    **({} if draw.guidance is None else {family.guidance_argument: draw.guidance}),
                    **family.call_arguments(draw.prompt, *draw.size)
                    | ({} if draw.negative is None else {NEGATIVE: draw.negative}),
                )
            images += family.images_of(drawn)
    return images


@contextmanager
def decoding_exactly(vae: Any) -> Iterator[None]:
    """Within, the VAE decodes in its own precision, also under autocast: in half precision some give black images."""
    decode = vae.decode

    def exactly(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with exact_precision(latents.device):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = exactly
    try:
        yield
    finally:
        del vae.decode
