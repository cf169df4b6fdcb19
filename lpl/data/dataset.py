"""Images and captions, and every random number of a training sample.

Whatever is random about a sample (crop, flip, caption, empty caption, posterior sample, noise, timestep, whether and
where LPL looks at it) comes from generators keyed by (seed, epoch, sample index). So a run is the same after a resume,
with any number of loader workers, and over one process or several.

The order of samples is one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Where a run
stands is one number, a position in that sequence; batches are always full and may span two epochs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor

from lpl.data.order import KeyedBatches, Stream, keyed_generator
from lpl.data.reading import LONGEST, RESAMPLING, choose_caption, open_image, to_rgb
from lpl.data.source import data_folders
from lpl.data.timeouts import Readings, TookTooLong, at_most
from lpl.objectives import Objective, timestep_density, timestep_weights
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
Batch = dict[str, Any]
Row = dict[str, Any]  # of a data set, by column
Candidates = Iterable[tuple[int, Callable[[], Row]]]  # indices, and what reads their rows


@dataclass
class TrainingImages:
    """``images[epoch, index] -> sample``: a map-style data set whose samples depend on (seed, epoch, index) only.

    Sample: ``pixels`` (3, R, R) in [-1, 1]; ``caption``, a string or a class label; ``original_size``, ``target_size``
    and ``crop_top_left``, (2,), height or top first, in pixels, the crop's place in the resized and mirrored image;
    ``posterior_noise`` and ``noise`` (C, h, w); ``timestep`` (); ``lpl_choice`` (2,), uniform in [0, 1), by which
    LPL takes some of a batch's samples, and a part of its images.
    """

    dataset: Dataset
    objective: Objective
    latent_shape: tuple[int, int, int]  # (C, h, w)
    args: Any  # the flags about data and timesteps
    empty_caption: str | int = ""  # what stands for no caption
    readings: Readings = field(default_factory=Readings)  # of a loader's processes
    given_up: dict[int, str] = field(default_factory=dict)  # what took too long: why, by its place

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def length(self) -> int | None:
        """How many images an epoch has; None: nobody knows."""
        return len(self)

    def batches(
        self, process_index: int, num_processes: int, first_batch: int, positions: Sequence[list[int]] = ()
    ) -> KeyedBatches:
        """The order that one process trains in; for ``positions`` see :class:`lpl.streaming.StreamedBatches`."""
        size, seed = self.args.train_batch_size, self.args.seed
        return KeyedBatches(len(self), size, seed, process_index, num_processes, first_batch)

    def check(self) -> None:
        """Read an image.

        Raises:
            ValueError: where not one can be read.
        """
        self[0, 0]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        return self.sample(epoch, index, self.candidates(index))

    def candidates(self, index: int) -> Candidates:
        """The sample of an index, and behind it those that take its place where it cannot be read: the next ones."""
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            yield candidate, partial(self.dataset.__getitem__, candidate)

    def sample(self, epoch: int, index: int, candidates: Candidates) -> dict[str, Any]:
        """The first of the candidates that can be read, with the random numbers of (seed, epoch, index)."""
        augmentation, noise, lpl = (
            keyed_generator(self.args.seed, epoch, index, stream)
            for stream in (Stream.AUGMENTATION, Stream.NOISE, Stream.LPL)
        )
        vertical, horizontal, flip, choice, drop = torch.rand(5, generator=augmentation).tolist()
        image, caption, bad = self.readable(candidates, choice)
        if self.args.center_crop:
            vertical = horizontal = 0.5
        pixels, crop_top_left = self._pixels(image, vertical, horizontal, self.args.random_flip and flip < 0.5)
        return {
            "index": torch.tensor(index),
            "bad": bad,
            "pixels": pixels,
            "caption": self.empty_caption if drop < self.args.proportion_empty_prompts else caption,
            "original_size": torch.tensor([image.height, image.width]),
            "crop_top_left": torch.tensor(crop_top_left),
            "target_size": torch.tensor([self.args.resolution] * 2),
            "timestep": self.timestep(epoch, index),
            "posterior_noise": torch.randn(self.latent_shape, generator=noise),
            "noise": self._noise(noise),
            "input_noise": torch.randn(self.latent_shape, generator=noise) if self.args.input_perturbation else None,
            "lpl_choice": torch.rand(2, generator=lpl),
        }

    def readable(
        self, candidates: Candidates, choice: float = 0.0
    ) -> tuple[Image.Image, str | int, list[tuple[int, str]]]:
        """Image and caption of the first candidate that can be read and has one.

        Returns:
            image, caption, and the places and reasons of those that were passed over.
        """
        bad: list[tuple[int, str]] = []
        for candidate, read in candidates:
            if candidate in self.given_up:
                bad.append((candidate, self.given_up[candidate]))
                continue
            try:
                with self.readings.noted(candidate), at_most(self.args.dataloader_timeout):
                    row = read()
                    caption = row[self.args.caption_column]
                    if not isinstance(self.empty_caption, int) or caption is None:  # else it is a class label
                        caption = choose_caption(caption, choice)
                    return to_rgb(open_image(row[self.args.image_column], self._folders)), caption, bad
            except Exception as error:  # broken files raise a dozen kinds, in PIL and in the data set's library
                bad.append((candidate, first_line(error)))
                if isinstance(error, TookTooLong):  # this process does not wait for it again
                    self.given_up[candidate] = first_line(error)
        raise ValueError(
            f"--train_data_dir, --dataset_name: not one image of the data set can be read (the first: {bad[0][1]})"
        )

    def file_names(self, places: Sequence[int]) -> dict[int, str | None]:
        """The names of the samples' files by their place, where the data set knows them; no file is read."""
        undecoded = self.dataset.cast_column(self.args.image_column, ImageFeature(decode=False))
        paths = {place: (undecoded[place][self.args.image_column] or {}).get("path") for place in places}
        return {place: Path(path).name if path else None for place, path in paths.items()}

    def name(self, place: int) -> str:
        """A sample's file, where it has one, and its place in the data set."""
        file = self.file_names([place])[place]
        return f"{file or 'the sample'} (number {place} of the data set)"

    @cached_property
    def _folders(self) -> list[str]:
        return data_folders(self.args)

    def _pixels(
        self, image: Image.Image, vertical: float, horizontal: float, flip: bool
    ) -> tuple[Tensor, tuple[int, int]]:
        """The shorter side to the resolution, mirrored or not, a square cropped at those shares of the play.

        Returns:
            Pixels, (3, R, R) in [-1, 1], and the crop's top and left.
        """
        side = self.args.resolution
        scale = side / min(image.size)
        size = tuple(max(side, round(length * scale)) for length in image.size)
        left, top = (
            int(share * (length - side + 1)) for share, length in zip((horizontal, vertical), size, strict=True)
        )
        if max(image.size) > LONGEST * min(image.size):  # the whole of it would be huge at that scale
            image = ImageOps.mirror(image) if flip else image
            box = [start / scale for start in (left, top, left + side, top + side)]
            box = [min(end, length) for end, length in zip(box, (*image.size, *image.size))]
            image = image.resize((side, side), RESAMPLING[self.args.image_interpolation_mode], box=box)
        else:
            image = image.resize(size, RESAMPLING[self.args.image_interpolation_mode])
            image = ImageOps.mirror(image) if flip else image
            image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1, (top, left)

    def timestep(self, epoch: int, index: int) -> Tensor:
        """The timestep drawn for a sample in an epoch, ()."""
        args = self.args
        density = timestep_density(
            args.weighting_scheme or "none",
            keyed_generator(args.seed, epoch, index, Stream.TIMESTEP),
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
        )
        return self.objective.sample_timesteps(density, self._timestep_weights)[0]

    @cached_property
    def _timestep_weights(self) -> Tensor | None:
        args = self.args
        return timestep_weights(
            args.timestep_bias_strategy,
            self.objective.num_train_timesteps,
            multiplier=args.timestep_bias_multiplier,
            begin=args.timestep_bias_begin,
            end=args.timestep_bias_end,
            portion=args.timestep_bias_portion,
        )

    def _noise(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.latent_shape, generator=generator)
        if self.args.noise_offset:  # the same shift over a whole channel: lets the model change the brightness
            noise += self.args.noise_offset * torch.randn(self.latent_shape[0], 1, 1, generator=generator)
        return noise


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples to a batch: tensors stacked, (B, ...), captions in a list; what is None stays None.

    ``bad`` is one list: what the batch had to do without.
    """
    batch: Batch = {"bad": [found for sample in samples for found in sample.pop("bad")]}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else None if first is None else values
    return batch


def held_out_batches(images: TrainingImages, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
    """Every ``stride``-th of the samples once, the same at every call and in every run.

    The n-th of N samples is taken at the (n + 1/2) / N quantile of the timesteps, so that all noise levels have their
    part, and that two runs of the same objective can be compared number by number.
    """
    fixed = replace(images, args=images.args.held_out())
    count = len(images)
    # Neighbours in the data set are often alike; a stride that has no factor in common with N spreads their timesteps.
    spread = next(step for step in range(max(1, round(count * 0.618)), count + 1) if math.gcd(step, count) == 1)
    mine = range(first, count, stride)
    for start in range(0, len(mine), batch_size):
        samples = []
        for number in mine[start : start + batch_size]:
            quantile = torch.tensor([(number * spread % count + 0.5) / count])
            samples.append(fixed[0, number] | {"timestep": images.objective.sample_timesteps(quantile)[0]})
        yield collate(samples)


def real_images(images: TrainingImages, captions: Sequence[str | int]) -> list[Image.Image] | None:
    """For each caption a training image that bears it, centre-cropped; None unless every caption has one.

    Streamed images are not looked through.
    """
    if images.length is None:
        return None
    caption_column = list(images.dataset[images.args.caption_column])
    if not set(captions) <= {caption for caption in caption_column if isinstance(caption, str | int)}:
        return None
    found = []
    for number, caption in enumerate(captions):
        matches = [index for index, text in enumerate(caption_column) if text == caption]
        image, *_ = images.readable(images.candidates(matches[number % len(matches)]))
        found.append(ImageOps.fit(image, (images.args.resolution,) * 2, Image.Resampling.LANCZOS))
    return found
