"""Images of the model in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lpl.autoencoders import exact_precision
from lpl.config.groups import Validation
from lpl.families import Family


@torch.no_grad()
def sample(
    family: Family,
    scheduler: Any,
    prompts: Sequence[str | int],
    validation: Validation,
    size: tuple[int, int],
    seed: int,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image per prompt; the n-th is drawn from seed + n, whatever the other prompts are.

    Args:
        size: height and width in pixels.
        stop: called before each image; True ends the sampling.
    """
    pipeline = family.pipeline
    pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    guidance = validation.validation_guidance_scale
    images = []
    with family.whole():
        for number, prompt in enumerate(prompts):
            if stop():
                break
            with accelerator.autocast(), decoding_exactly(family.vae):
                images += pipeline(
                    num_inference_steps=validation.validation_inference_steps,
                    generator=torch.Generator().manual_seed(seed + number),
                    **({} if guidance is None else {family.guidance_argument: guidance}),
                    **family.call_arguments(prompt, *size),
                ).images
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
