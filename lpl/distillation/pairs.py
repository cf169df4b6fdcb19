"""What a student learns from: pairs of z0 and an estimate z0_hat, with LPL and its gradient there.

The estimates are the denoiser's own (:class:`Predictions`), at timesteps drawn as in training from those inside the
threshold, or z0 with errors of several kinds and sizes (:class:`Errors`). Pair n is the same in every run: its random
numbers come from generators keyed by the seed and n. Pairs are written in shards, each whole or absent, so that an
interrupted preparation continues.

*Size* of an error is its root mean square relative to that of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from lpl.autoencoders import encode
from lpl.data.dataset import TrainingImages, collate
from lpl.data.order import keyed_generator
from lpl.gate import is_inside
from lpl.loss import LatentPerceptualLoss
from lpl.objectives import Objective
from lpl.tools.files import write_whole
from lpl.training.parts import TrainedParts


SHARD = 64  # pairs in a file
SMALLEST, LARGEST = 0.05, 0.5  # sizes of the errors that are made
DRAWS = 10_000  # of a timestep, until one is inside
HELD_OUT = 8  # every 8th image is kept for measuring the student
ERROR = 102  # a stream of random numbers, beside those of lpl.data.order
Estimates = tuple[Tensor, Tensor, Tensor]  # z0 and z0_hat, (n, C, h, w); sigma, (n,), NaN for errors that are made


@dataclass(frozen=True)
class Pairs:
    """N pairs, on the CPU."""

    latents: Tensor  # z0, (N, C, h, w)
    predicted: Tensor  # z0_hat, (N, C, h, w)
    value: Tensor  # LPL_b, (N,)
    gradient: Tensor  # of LPL_b with respect to z0_hat, (N, C, h, w)
    sigma: Tensor  # noise-to-signal ratio of the estimate, (N,)
    image: Tensor  # index of the image, (N,)

    def __len__(self) -> int:
        return len(self.value)

    @property
    def size(self) -> Tensor:
        """Of the error, (N,)."""
        error, latents = (
            (x.square().flatten(1).mean(1)).sqrt() for x in (self.predicted - self.latents, self.latents)
        )
        return error / latents

    def select(self, chosen: Tensor) -> Pairs:
        return Pairs(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    def split(self) -> tuple[Pairs, Pairs]:
        """Those to train on, and those of held-out images.

        Raises:
            ValueError: where no pair is of a held-out image.
        """
        held_out = is_held_out(self.image)
        if not held_out.any():
            raise ValueError(
                f"{len(self)} usable pairs, none of an image that is held out, which every {HELD_OUT}th is; give a "
                "larger --num_pairs"
            )
        return self.select(~held_out), self.select(held_out)

    def usable(self) -> Pairs:
        """Without pairs whose LPL or gradient is 0 or not finite, which have no direction to learn."""
        norm = self.gradient.flatten(1).norm(dim=1)
        return self.select((norm > 0) & norm.isfinite() & (self.value > 0) & self.value.isfinite())


def is_held_out(image: Any) -> Any:
    """Whether an image, or each of several, by index, is for measuring the student."""
    return image % HELD_OUT == HELD_OUT - 1


class Source(Protocol):
    """Makes the estimates of some pairs."""

    @property
    def images(self) -> TrainingImages: ...

    def __call__(self, numbers: Sequence[int]) -> Estimates: ...


@dataclass(frozen=True)
class Predictions:
    """The denoiser's own estimates of images' latents, inside the threshold.

    Args:
        threshold: tau.
        dtype: of the denoiser's computation.
    """

    images: TrainingImages
    model: TrainedParts
    threshold: float
    dtype: torch.dtype = torch.float32

    @property
    def vae(self) -> ModelMixin:
        return self.model.family.vae

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Estimates:
        objective, vae, device = self.images.objective, self.vae, self.vae.device
        keys = [divmod(number, len(self.images)) for number in numbers]
        batch = collate([self.images[key] | {"timestep": self._timestep(objective, *key)} for key in keys])
        timesteps, noise = batch["timestep"].to(device), batch["noise"].to(device)
        latents = encode(vae, batch["pixels"].to(device), batch["posterior_noise"].to(device))
        noisy_latents = objective.add_noise(latents, noise, timesteps)
        conditions = self.model.conditions(batch, device)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(noisy_latents, timesteps, conditions).float()
        return latents, objective.clean_latents(output, noisy_latents, timesteps), objective.sigma(batch["timestep"])

    def _timestep(self, objective: Objective, epoch: int, index: int) -> Tensor:
        """The first timestep inside the threshold of those that training would draw for the image, ()."""
        for again in range(DRAWS):
            timestep = self.images.timestep(epoch + 1_000_000 * again, index)
            if is_inside(objective.sigma(timestep[None]), self.threshold).item():
                return timestep
        raise ValueError(
            f"--lpl_sigma_threshold: of {DRAWS:,} timesteps drawn, none is inside; give a larger threshold"
        )


@dataclass(frozen=True)
class Errors:
    """Images' latents with errors of the kinds of KINDS, and of sizes between SMALLEST and LARGEST."""

    images: TrainingImages
    vae: ModelMixin

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Estimates:
        keys = [divmod(number, len(self.images)) for number in numbers]
        latents, predicted = self._latents(keys), []
        generators = [keyed_generator(self.images.seed, number, 0, ERROR) for number in numbers]
        kinds = [KINDS[int(torch.randint(len(KINDS), (), generator=generator))] for generator in generators]
        mixed = [key for key, kind in zip(keys, kinds) if kind is mixture]
        others = iter(self._latents([(epoch, self._other(index)) for epoch, index in mixed]) if mixed else ())
        for z0, kind, generator in zip(latents, kinds, generators):
            other = next(others) if kind is mixture else z0
            error = kind(z0.cpu(), other.cpu(), generator)
            size = SMALLEST * (LARGEST / SMALLEST) ** torch.rand((), generator=generator)
            rms = (z0.square().mean() / error.square().mean().clamp(min=1e-12)).sqrt().cpu()
            predicted.append(z0 + (size * rms * error).to(z0.device))
        return latents, torch.stack(predicted), torch.full((len(numbers),), math.nan)

    def _latents(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        samples, device = collate([self.images[key] for key in keys]), self.vae.device
        return encode(self.vae, samples["pixels"].to(device), samples["posterior_noise"].to(device))

    def _other(self, index: int) -> int:
        """The next image that is held out as this one is, or itself if it is the only one."""
        following = ((index + step) % len(self.images) for step in range(1, len(self.images) + 1))
        return next(other for other in following if is_held_out(other) == is_held_out(index))


# Kinds of errors: of a latent, (C, h, w), given another image's and a generator. Their size does not matter ----------


def gaussian(latents: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """White noise."""
    return torch.randn(latents.shape, generator=generator)


def smooth(latents: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of low frequencies."""
    return _blurred(torch.randn(latents.shape, generator=generator), generator)


def blur(latents: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """The latent's own detail is lost."""
    return _blurred(latents, generator) - latents


def low_rank(latents: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """The same map in every channel, up to a factor."""
    return torch.randn(len(latents), 1, 1, generator=generator) * torch.randn(
        1, *latents.shape[1:], generator=generator
    )


def mixture(latents: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """A part of another image."""
    return other - latents


KINDS: tuple[Callable[[Tensor, Tensor, torch.Generator], Tensor], ...] = (gaussian, smooth, blur, low_rank, mixture)


def _blurred(maps: Tensor, generator: torch.Generator) -> Tensor:
    factor = 2 ** int(torch.randint(1, 3, (), generator=generator))
    small = F.interpolate(maps[None], scale_factor=1 / factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size=maps.shape[-2:], mode="bilinear")[0]


# Preparation ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path, source: Source, loss: LatentPerceptualLoss, number: int, batch_size: int) -> Pairs:
    """Write the shards that a folder lacks, and read all of them."""
    shards = [range(start, min(start + SHARD, number)) for start in range(0, number, SHARD)]
    missing = [shard for shard in shards if not _place(folder, shard).is_file()]
    with tqdm(total=number, initial=number - sum(map(len, missing)), desc="pairs") as progress:
        for shard in missing:
            made = [
                _measured(source, loss, shard[start : start + batch_size])
                for start in range(0, len(shard), batch_size)
            ]
            whole = {name: torch.cat([part[name] for part in made]).contiguous() for name in made[0]}
            write_whole(_place(folder, shard), lambda path, whole=whole: save_file(whole, path))
            progress.update(len(shard))
    return Pairs(**_joined(load_file(_place(folder, shard)) for shard in shards))


def _place(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:07d}-{shard.stop:07d}.safetensors"


def _joined(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = list(parts)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _measured(source: Source, loss: LatentPerceptualLoss, numbers: Sequence[int]) -> dict[str, Tensor]:
    latents, predicted, sigma = source(numbers)
    predicted.requires_grad_()
    value = loss(predicted, latents)
    (gradient,) = torch.autograd.grad(value.sum(), predicted)
    image = torch.tensor([number % len(source.images) for number in numbers])
    found = {"latents": latents, "predicted": predicted.detach(), "value": value.detach(), "gradient": gradient}
    return {name: x.float().cpu() for name, x in found.items()} | {"sigma": sigma.float().cpu(), "image": image}
