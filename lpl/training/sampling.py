"""TODO: what is here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from lpl.autoencoders import exact_precision
from lpl.families import Family


@torch.no_grad()
def sample(
    family: Family,
    scheduler: Any,
    prompts: Sequence[str | int],
    settings: Any,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One image per prompt; the n-th from the seed's n-th successor, whatever the other prompts are.

    Args:
        stop: asked before each image, whether no more are wanted.
    """
    pipeline = family.pipeline
    pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    guidance = settings.validation_guidance_scale
    images = []
    for number, prompt in enumerate(prompts):
        if stop():
            break
        with accelerator.autocast(), decoding_exactly(family.vae):
            images += pipeline(
                num_inference_steps=settings.validation_inference_steps,
                generator=torch.Generator().manual_seed(settings.seed + number),
                **({} if guidance is None else {"guidance_scale": guidance}),
                **family.call_arguments(prompt, settings.resolution, settings.resolution),
            ).images
    return images


@contextmanager
def decoding_exactly(vae: nn.Module) -> Iterator[None]:
    """Within, the VAE decodes in its own precision, also under autocast: in half precision some make black images."""
    decode = vae.decode

    def exactly(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with exact_precision(latents.device):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = exactly
    try:
        yield
    finally:
        del vae.decode
