"""Training samples and batches, and every random number in them.

A sample is known by its *key*, (epoch, index); the index is an *item* of the epoch, which is a row of the data set
unless rows are repeated (:mod:`lpl.data.mixture`) or trained at several sizes (:mod:`lpl.data.buckets`). Crop, flip,
caption, empty caption, posterior sample, noise, timestep, and the samples and window that LPL uses are drawn from
generators keyed by (seed, epoch, index, stream). So a run is the same after a resume, with any number of loader
workers, and on one process or several.

Sizes are (height, width) in pixels. :meth:`TrainingImages.size_of` alone decides the size of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lpl.config import held_out
from lpl.config.groups import Data, Diffusion
from lpl.config.sizes import Size
from lpl.data.buckets import BucketBatches, Items
from lpl.data.cache import CachedEmbeddings, CachedLatents, CachedPicture, Crop
from lpl.data.captions import Captions, caption_rows, columns_of
from lpl.data.masks import cropped_with, picture_in
from lpl.data.mixture import Mixture
from lpl.data.order import KeyedBatches, Stream, keyed_generator
from lpl.data.reading import Picture, place_of
from lpl.data.source import class_names, data_folders
from lpl.data.timeouts import Readings, TookTooLong, at_most
from lpl.objectives import Objective, timestep_density, timestep_weights
from lpl.tools.words import first_line


Sample = dict[str, Any]
Batch = dict[str, Any]
Row = dict[str, Any]  # of a data set, by column
Batches = KeyedBatches | BucketBatches
Candidates = Iterable[tuple[int, Callable[[], Row]]]  # indices, and functions that read their rows


class LatentSpace(NamedTuple):
    """The shape of a VAE's latents."""

    channels: int
    factor: int  # pixels per latent position, along each side

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image.

        >>> LatentSpace(4, 8).shape(256, 512)
        (4, 32, 64)
        """
        return self.channels, height // self.factor, width // self.factor


class Draws(NamedTuple):
    """What is drawn of a sample's image and caption.

    Args:
        shares: vertical and horizontal position of the crop, in [0, 1).
        flip: whether the image is mirrored.
        choice: of the caption, in [0, 1).
        drop: the caption is dropped if --proportion_empty_prompts is above this.
    """

    shares: tuple[float, float]
    flip: bool
    choice: float
    drop: float


def _uniform(*key: int) -> list[float]:
    return torch.rand(5, generator=keyed_generator(*key, Stream.AUGMENTATION)).tolist()


@dataclass
class TrainingImages(TorchDataset[Sample]):
    """A map-style data set, ``images[epoch, index] -> sample``, whose samples depend on (seed, epoch, index) only.

    A sample holds ``pixels`` (3, H, W) in [-1, 1]; ``caption``, a string or a class label; ``original_size``,
    ``target_size`` and ``crop_top_left``, (2,), height or top first, in pixels, the crop's place in the resized and
    mirrored image; ``posterior_noise``, ``noise`` and ``input_noise`` (C, h, w), the last None without
    --input_perturbation; ``timestep`` (); ``lpl_choice`` (2,), uniform in [0, 1), which selects LPL's samples and
    window; ``index``; ``bad``, rows and reasons of the unreadable samples that this one replaces; with
    --text_encoder_dropout ``dropped`` (E,), whether each text encoder gets the empty caption instead; with
    --alpha_mask or --mask_column ``mask`` (1, H, W) in [0, 1], 1 = train here; ``loss_weight`` (), if some data set's
    is not 1.

    Args:
        empty_caption: stands for a dropped caption; an integer if captions are class labels from 0 to below it.
        cache_dir: where downloaded data sets are kept.
        items: the images and their sizes; None: each image is trained at ``data.size``.
        latents: of the images; then a sample holds ``posterior``, mean and std (C, h, w), in place of ``pixels``.
        embeddings: of the captions; then a sample holds ``embeddings``, the conditions of its caption.
        readings: files that the loader's workers are reading.
        given_up: reasons of samples that took too long, by row.
    """

    dataset: Dataset
    objective: Objective
    space: LatentSpace
    data: Data
    diffusion: Diffusion
    seed: int
    empty_caption: str | int = ""
    cache_dir: str | None = None
    items: Items | None = None
    latents: CachedLatents | None = None
    embeddings: CachedEmbeddings | None = None
    readings: Readings = field(default_factory=Readings)
    given_up: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        if self.items is not None:
            return len(self.items)
        return len(self.dataset) + (0 if self.mixture is None else len(self.mixture.further))

    @property
    def length(self) -> int | None:
        """Items per epoch; None if unknown."""
        return len(self)

    @property
    def rows(self) -> int | None:
        """Rows of the data set; None if unknown."""
        return len(self.dataset)

    @cached_property
    def mixture(self) -> Mixture | None:
        """What is known of each row, if there are several data sets or repeats."""
        return Mixture.of(self.dataset)

    def row_of(self, index: int) -> int:
        """The row of an item."""
        if self.items is not None:
            return int(self.items.rows[index])
        return index if self.mixture is None else self.mixture.row_of(index)

    @property
    def class_names(self) -> dict[int, str]:
        """Class names by label; empty if the data set has none."""
        return dict(enumerate(class_names(self.dataset, self.data)))

    def size_of(self, index: int) -> tuple[int, int]:
        """Height and width that a sample is trained at."""
        return self.data.size if self.items is None else self.items.size(index)

    def largest(self) -> TrainingImages:
        """Only the samples of the largest size."""
        return self if self.items is None else replace(self, items=self.items.largest())

    def batches(
        self,
        batch_size: int,
        process_index: int,
        num_processes: int,
        first_batch: int,
        positions: Sequence[list[int]] = (),
    ) -> Batches:
        """The order of one process. ``positions`` are for :class:`lpl.data.streaming.StreamedImages` only."""
        place = batch_size, self.seed, process_index, num_processes, first_batch
        return KeyedBatches(len(self), *place) if self.items is None else BucketBatches(self.items, *place)

    def check(self) -> None:
        """Reads an image.

        Raises:
            ValueError: if no image can be read.
        """
        self[0, 0]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        return self.sample(epoch, index, self.candidates(self.row_of(index)))

    def candidates(self, row: int) -> Candidates:
        """A row, then those that replace it if it cannot be read: the next ones, in order, of its data set first."""
        count, mixture = len(self.dataset), self.mixture
        for own in (True,) if mixture is None else (True, False):
            for candidate in range(row, row + count):
                candidate %= count
                if mixture is None or (mixture.part[candidate] == mixture.part[row]) == own:
                    yield candidate, partial(self._read, candidate)

    def _read(self, row: int) -> Row:
        """What is needed of a row: all of it, or only the captions if the images are cached."""
        return self.dataset[row] if self.latents is None else self._texts[row]

    @cached_property
    def _texts(self) -> Sequence[Row]:
        """The columns of the captions."""
        columns = columns_of(self.data, self.dataset.column_names)
        if not columns:  # without a column a data set would have no rows
            return [{}] * len(self.dataset)
        return cast(Sequence[Row], self.dataset.select_columns(columns))

    def draws(self, epoch: int, index: int) -> Draws:
        """What is drawn of a sample's image and caption."""
        key = self.seed, epoch, index
        vertical, horizontal, flip, choice, drop = _uniform(*key)
        if self.data.center_crop or self.data.crops_per_image:
            vertical, horizontal = self.kept_shares(epoch, index)
        return Draws((vertical, horizontal), self.data.random_flip and flip < 0.5, choice, drop)

    def kept_shares(self, epoch: int, index: int) -> tuple[float, float]:
        """The position of a crop that comes again: the same in all runs, which may share a cache."""
        if self.data.center_crop:
            return 0.5, 0.5
        assert self.data.crops_per_image is not None
        vertical, horizontal, *_ = _uniform(0, epoch % self.data.crops_per_image, index)
        return vertical, horizontal

    def sample(self, epoch: int, index: int, candidates: Candidates) -> Sample:
        """The first readable candidate, with the size of ``index`` and the random numbers of (seed, epoch, index)."""
        noise, lpl = (keyed_generator(self.seed, epoch, index, stream) for stream in (Stream.NOISE, Stream.LPL))
        draws, size = self.draws(epoch, index), self.size_of(index)
        picture, caption, bad = self.readable(candidates, draws.choice, (epoch, index), size)
        shape = self.space.shape(*size)
        of_image, crop_top_left = self._of_image(picture, size, draws)
        sample = {
            "index": torch.tensor(index),
            "bad": bad,
            "caption": self.empty_caption if draws.drop < (self.data.proportion_empty_prompts or 0.0) else caption,
            "original_size": torch.tensor([picture.height, picture.width]),
            "crop_top_left": torch.tensor(crop_top_left),
            "target_size": torch.tensor(size),
            "timestep": self.timestep(epoch, index),
            "posterior_noise": torch.randn(shape, generator=noise),
            "noise": self._noise(shape, noise),
            "input_noise": torch.randn(shape, generator=noise) if self.diffusion.input_perturbation else None,
            "lpl_choice": torch.rand(2, generator=lpl),
            **of_image,
        }
        if (shares := self.data.text_encoder_dropout) is not None:
            encoders = keyed_generator(self.seed, epoch, index, Stream.TEXT_ENCODERS)
            sample["dropped"] = torch.rand(len(shares), generator=encoders) < torch.tensor(shares)
        if self.mixture is not None and self.mixture.weighted:
            sample["loss_weight"] = torch.tensor(self.mixture.loss_weights[self.row_of(index)], dtype=torch.float32)
        if self.embeddings is not None:
            sample["embeddings"] = self.embeddings.conditions(sample["caption"], sample.get("dropped"))
        return sample

    def _of_image(
        self, picture: Picture | CachedPicture, size: Size, draws: Draws
    ) -> tuple[dict[str, Any], tuple[int, int]]:
        """What a sample holds of its image, pixels or their posterior, and the loss mask; and the crop's place."""
        if isinstance(picture, CachedPicture):
            assert self.latents is not None
            place = place_of(picture.height, picture.width, size, draws.shares)
            return self.latents.sample(picture.row, Crop(size, place, draws.flip)), place
        interpolation = self.data.image_interpolation_mode
        pixels, place, masked = cropped_with(picture, size, draws.shares, draws.flip, interpolation)
        return {"pixels": pixels, **masked}, place

    def readable(
        self,
        candidates: Candidates,
        choice: float = 0.0,
        key: tuple[int, int] | None = None,
        size: Size | None = None,
    ) -> tuple[Picture | CachedPicture, str | int, list[tuple[int, str]]]:
        """Reads the first candidate with a readable image and a caption.

        Args:
            choice: draws one of a list of captions, in [0, 1).
            key: (epoch, index), which decides what else is drawn of a caption; None: nothing is.
            size: height and width of the crop that the image is read for; None: it is read at its full size.

        Returns:
            picture, caption, and places and reasons of the candidates before it.
        """
        bad: list[tuple[int, str]] = []
        for candidate, read in candidates:
            if candidate in self.given_up:
                bad.append((candidate, self.given_up[candidate]))
                continue
            try:
                with self.readings.noted(candidate), at_most(self.data.dataloader_timeout):
                    row = read()
                    caption = self.caption(row, choice, key)
                    if self.latents is not None:
                        return self.latents.picture(candidate), caption, bad
                    return picture_in(row, self.data, self._folders, size), caption, bad
            except Exception as error:  # broken files raise a dozen kinds, in PIL and in the data set's library
                bad.append((candidate, first_line(error)))
                if isinstance(error, TookTooLong):  # this process does not wait for it again
                    self.given_up[candidate] = first_line(error)
        names = ", ".join(part.data.dataset_name or part.data.folder for part in self.data.parts)
        raise ValueError(f"{names}: no image of the data set can be read (the first: {bad[0][1]})")

    @cached_property
    def captions(self) -> Captions:
        return Captions.of(self.data)

    def caption(self, row: Mapping[str, Any], choice: float = 0.0, key: tuple[int, int] | None = None) -> str | int:
        """The caption of a row, or its class label; see :meth:`readable`.

        Raises:
            ValueError: if it has none.
        """
        if (label := self._label(row)) is not None:
            return label
        drawn = keyed_generator(self.seed, *key, Stream.CAPTION) if key is not None and self.captions.drawn else None
        return self.captions.caption(row, choice, drawn)

    def _label(self, row: Mapping[str, Any]) -> int | None:
        """The class label of a row; None if captions are texts."""
        return row.get(self.data.caption_column) if isinstance(self.empty_caption, int) else None

    def captions_at(self, places: Sequence[int] | None = None) -> Iterator[Sequence[str | int]]:
        """Yields the captions that each row can get, with their tags in order; reads no image. None: of all rows."""
        dataset = self.dataset if places is None else self.dataset.select(places)
        for row in caption_rows(dataset, columns_of(self.data, dataset.column_names)):
            label = self._label(row)
            yield self.captions.in_order(row) if label is None else [label]

    def file_names(self, places: Sequence[int]) -> dict[int, str | None]:
        """Names of the samples' files by row, None where unknown; of several data sets with theirs. Reads no file."""
        undecoded = self.dataset.cast_column(self.data.image_column, ImageFeature(decode=False))
        paths = {place: (undecoded[place][self.data.image_column] or {}).get("path") for place in places}
        names = {place: Path(path).name if path else None for place, path in paths.items()}
        if (mixture := self.mixture) is None:
            return names
        return {place: f"{mixture.name_of(place)}: {name or f'row {place}'}" for place, name in names.items()}

    def name(self, place: int) -> str:
        """A sample's file name, if known, and its row."""
        file = self.file_names([place])[place]
        return f"{file or 'the sample'} (number {place} of the data set)"

    @cached_property
    def _folders(self) -> list[str]:
        return data_folders(self.data, self.cache_dir)

    def timestep(self, epoch: int, index: int) -> Tensor:
        """The timestep of a sample in an epoch, ()."""
        density = timestep_density(
            self.diffusion.weighting_scheme or "none",
            keyed_generator(self.seed, epoch, index, Stream.TIMESTEP),
            logit_mean=self.diffusion.logit_mean,
            logit_std=self.diffusion.logit_std,
            mode_scale=self.diffusion.mode_scale,
        )
        return self.objective.sample_timesteps(density, self._timestep_weights)[0]

    @cached_property
    def _timestep_weights(self) -> Tensor | None:
        return timestep_weights(
            self.diffusion.timestep_bias_strategy,
            self.objective.num_train_timesteps,
            multiplier=self.diffusion.timestep_bias_multiplier,
            begin=self.diffusion.timestep_bias_begin,
            end=self.diffusion.timestep_bias_end,
            portion=self.diffusion.timestep_bias_portion,
        )

    def _noise(self, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        noise = torch.randn(shape, generator=generator)  # (C, h, w)
        if self.diffusion.noise_offset:  # one shift per channel, by which the model learns to change the brightness
            noise += self.diffusion.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
        return noise


def collate(samples: list[Sample], tokenize: Callable[..., dict[str, Any]] | None = None) -> Batch:
    """Stacks tensors, (B, ...), and lists all other values; a value of None stays None.

    ``bad`` becomes one list for the whole batch.

    Args:
        tokenize: makes the batch's ``tokens`` of its captions, and of what is ``dropped`` if anything may be.
    """
    batch: Batch = {"bad": [found for sample in samples for found in sample.pop("bad")]}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = _stacked(values) if isinstance(first, Tensor | dict) else None if first is None else values
    if tokenize is not None and "embeddings" not in batch:
        batch["tokens"] = tokenize(batch["caption"], *([batch["dropped"]] if "dropped" in batch else []))
    return batch


def _stacked(values: list[Any]) -> Any:
    """Tensors, or dictionaries of tensors, of samples as those of a batch."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def fixed(images: TrainingImages) -> TrainingImages:
    """Images for the held-out losses: nothing about their samples is random, nor depends on the run's seed."""
    return replace(images, data=held_out(images.data), diffusion=held_out(images.diffusion), seed=0)


def held_out_batches(images: TrainingImages, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
    """Yields samples ``first``, ``first + stride``, ... once, the same at every call and in every run.

    Sample n of N is taken at the (n + 1/2) / N quantile of the timesteps, so that all noise levels take part, and two
    runs of the same objective can be compared number by number.
    """
    alike = fixed(images)
    count = len(images)
    # Neighbours in a data set are often alike; a stride without a common factor with N spreads their timesteps.
    spread = next(step for step in range(max(1, round(count * 0.618)), count + 1) if math.gcd(step, count) == 1)
    mine = sorted(range(first, count, stride), key=images.size_of)
    for _, numbers in groupby(mine, images.size_of):
        while some := list(islice(numbers, batch_size)):
            samples = []
            for number in some:
                quantile = torch.tensor([(number * spread % count + 0.5) / count])
                samples.append(alike[0, number] | {"timestep": images.objective.sample_timesteps(quantile)[0]})
            yield collate(samples)


def real_images(
    images: TrainingImages, captions: Sequence[str | int], shown: Sequence[tuple[int, Size]]
) -> list[Image.Image] | None:
    """Training images that bear the captions.

    Args:
        shown: for each, the number of its caption, and the size to crop its centre to.

    None if a caption has no image, or the data is streamed.
    """
    if images.rows is None:
        return None
    places: dict[str | int, list[int]] = {caption: [] for caption in captions}
    for index, own in enumerate(images.captions_at()):
        for caption in places.keys() & set(own):
            places[caption].append(index)
    if not all(places.values()):
        return None
    found, whole = [], replace(images, latents=None)
    for number, caption in enumerate(captions):
        index = places[caption][number % len(places[caption])]
        picture, *_ = whole.readable(whole.candidates(index))
        assert isinstance(picture, Picture)
        found.append(picture.image.convert("RGB"))
    return [
        ImageOps.fit(found[number], (width, height), Image.Resampling.LANCZOS) for number, (height, width) in shown
    ]
