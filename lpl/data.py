"""Images and captions, and every random number of a training sample.

Whatever is random about a sample (crop, flip, caption, empty caption, posterior sample, noise, timestep) comes from
generators keyed by (seed, epoch, sample index). So a run is the same after a resume, with any number of loader
workers, and over one process or several.

The order of samples is one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Where a run
stands is one number, a position in that sequence; batches are always full and may span two epochs.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lpl.objectives import Objective, timestep_density


logger = logging.getLogger(__name__)

Batch = dict[str, Any]
INTERPOLATION_MODES = tuple(mode.name.lower() for mode in Image.Resampling)


class Stream(IntEnum):
    """What a generator is for. Each purpose has its own, so that a new draw in one does not move the others."""

    ORDER = 0
    AUGMENTATION = 1
    TIMESTEP = 2
    NOISE = 3


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that depends on the numbers given and nothing else."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_training_images(args: Any) -> Dataset:
    """The training split, with checked columns.

    Raises:
        ValueError: where there is nothing to train on, or a column is missing or of the wrong kind.
    """
    where = f"--train_data_dir {args.train_data_dir}" if args.train_data_dir else f"--dataset_name {args.dataset_name}"
    try:
        if args.train_data_dir:
            # All files under one name: left to itself, the library takes "test" in a file's name for a split.
            files = {"train": os.path.join(glob.escape(args.train_data_dir), "**")}
            dataset = load_dataset("imagefolder", data_files=files, split="train", cache_dir=args.cache_dir)
        else:
            dataset = load_dataset(
                args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir
            )
    except Exception as error:  # the library raises a dozen kinds; each means that there is nothing to train on
        raise ValueError(f"{where}: the data set cannot be loaded: {first_line(error)}") from error
    check_columns(dataset, args.image_column, args.caption_column, where)
    dataset = dataset.select_columns([args.image_column, args.caption_column])
    if args.train_data_dir and (left := len(image_files(args.train_data_dir)) - len(dataset)) > 0:
        logger.warning("%s: %d images are left out, since no metadata file names them", where, left)
    if args.max_train_samples is not None:
        dataset = dataset.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(dataset))))
    return dataset


def check_columns(dataset: Dataset, image_column: str, caption_column: str, where: str) -> None:
    """Refuse a data set that is empty, lacks the named columns, or has something else in them.

    Raises:
        ValueError: with the columns that there are, and the flag to change.
    """
    if len(dataset) == 0:
        raise ValueError(f"{where}: the data set has no images")
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            hint = (
                "; a folder of images takes its captions from a metadata.jsonl with the keys file_name and "
                f"{caption_column}"
                if "imagefolder" in str(dataset.info.builder_name)
                else ""
            )
            raise ValueError(
                f"{where}: there is no column {column!r} ({flag}); its columns are "
                f"{', '.join(dataset.column_names)}{hint}"
            )
    if not isinstance(dataset.features[image_column], ImageFeature):
        raise ValueError(f"{where}: column {image_column!r} (--image_column) holds no images")
    feature = dataset.features[caption_column]
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)  # of a list's entries, or of the value itself
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{where}: column {caption_column!r} (--caption_column) must hold strings or lists of strings, "
            f"but its first value is {dataset[caption_column][0]!r}"
        )


@dataclass
class TrainingImages:
    """``images[epoch, index] -> sample``: a map-style data set whose samples depend on (seed, epoch, index) only.

    Sample: ``pixels`` (3, R, R) in [-1, 1]; ``caption``; ``posterior_noise`` and ``noise`` (C, h, w); ``timestep`` ().
    """

    dataset: Dataset
    objective: Objective
    latent_shape: tuple[int, int, int]  # (C, h, w)
    args: Any  # the flags about data and timesteps

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        augmentation, noise = (
            keyed_generator(self.args.seed, epoch, index, stream) for stream in (Stream.AUGMENTATION, Stream.NOISE)
        )
        vertical, horizontal, flip, choice, drop = torch.rand(5, generator=augmentation).tolist()
        image, caption = self._readable(index, choice)
        if self.args.center_crop:
            vertical = horizontal = 0.5
        return {
            "pixels": self._pixels(image, vertical, horizontal, self.args.random_flip and flip < 0.5),
            "caption": "" if drop < self.args.proportion_empty_prompts else caption,
            "timestep": self.timestep(epoch, index),
            "posterior_noise": torch.randn(self.latent_shape, generator=noise),
            "noise": self._noise(noise),
            "input_noise": torch.randn(self.latent_shape, generator=noise) if self.args.input_perturbation else None,
        }

    def _readable(self, index: int, choice: float = 0.0) -> tuple[Image.Image, str]:
        """The image and its caption; where one cannot be read or lacks one, the next in the data set."""
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                row = self.dataset[candidate]
                return to_rgb(row[self.args.image_column]), choose_caption(row[self.args.caption_column], choice)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                logger.warning("image %d cannot be read and the next one is taken instead: %s", candidate, error)
        raise ValueError("--train_data_dir, --dataset_name: not one image of the data set can be read")

    def _pixels(self, image: Image.Image, vertical: float, horizontal: float, flip: bool) -> Tensor:
        """The shorter side to the resolution, a square cropped at those shares of the play -> (3, R, R) in [-1, 1]."""
        side = self.args.resolution
        scale = side / min(image.size)
        size = tuple(max(side, round(length * scale)) for length in image.size)
        image = image.resize(size, Image.Resampling[self.args.image_interpolation_mode.upper()])
        left, top = (
            int(share * (length - side + 1)) for share, length in zip((horizontal, vertical), size, strict=True)
        )
        image = image.crop((left, top, left + side, top + side))
        if flip:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def timestep(self, epoch: int, index: int) -> Tensor:
        """The timestep drawn for a sample in an epoch, ()."""
        args = self.args
        density = timestep_density(
            args.weighting_scheme,
            keyed_generator(args.seed, epoch, index, Stream.TIMESTEP),
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
        )
        return self.objective.sample_timesteps(density)[0]

    def _noise(self, generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.latent_shape, generator=generator)
        if self.args.noise_offset:  # the same shift over a whole channel: lets the model change the brightness
            noise += self.args.noise_offset * torch.randn(self.latent_shape[0], 1, 1, generator=generator)
        return noise


def to_rgb(image: Image.Image | None) -> Image.Image:
    """An image of any mode, turned upright, as 8-bit RGB.

    Raises:
        ValueError: where there is none.
    """
    if image is None:
        raise ValueError("there is no image in this row")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def choose_caption(caption: str | Sequence[str], choice: float) -> str:
    """One of several captions, by a number in [0, 1).

    Raises:
        ValueError: where it is neither a string nor a list of strings.
    """
    if isinstance(caption, list | tuple) and caption:
        caption = caption[int(choice * len(caption))]
    if not isinstance(caption, str):
        raise ValueError(f"a caption must be a string or a list of strings, but one is {caption!r} (--caption_column)")
    return caption


class KeyedBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process, from a position in the endless sequence on.

    Args:
        length: samples in the data set.
        batch_size: samples per batch and process.
        first_batch: batches that this process has already trained on.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, process_index: int, num_processes: int, first_batch: int
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.process_index, self.num_processes, self.first_batch = process_index, num_processes, first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.first_batch
        epoch, order = -1, torch.empty(0)
        while True:
            start = (batch * self.num_processes + self.process_index) * self.batch_size
            keys = []
            for position in range(start, start + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = torch.randperm(self.length, generator=keyed_generator(self.seed, epoch, Stream.ORDER))
                keys.append((epoch, int(order[position % self.length])))
            yield keys
            batch += 1


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples to a batch: tensors stacked, (B, ...), captions in a list; what is None stays None."""
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else None if first is None else values
    return batch


def training_batches(images: TrainingImages, batches: KeyedBatches, num_workers: int) -> Iterator[Batch]:
    """Endless batches on the CPU, in pinned memory where there is a GPU to send them to."""
    return iter(
        DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )
    )


def real_images(images: TrainingImages, captions: Sequence[str]) -> list[Image.Image] | None:
    """For each caption a training image that bears it, centre-cropped; None unless every caption has one."""
    caption_column = list(images.dataset[images.args.caption_column])
    if not set(captions) <= {caption for caption in caption_column if isinstance(caption, str)}:
        return None
    found = []
    for number, caption in enumerate(captions):
        matches = [index for index, text in enumerate(caption_column) if text == caption]
        image, _ = images._readable(matches[number % len(matches)])
        found.append(ImageOps.fit(image, (images.args.resolution,) * 2, Image.Resampling.LANCZOS))
    return found


def image_files(folder: str) -> list[Path]:
    """Files in a folder, and the folders below, whose name is an image's."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [file for file in Path(folder).rglob("*") if file.suffix.lower() in suffixes]


def local_folder_problem(folder: str, caption_column: str) -> str | None:
    """Why a --train_data_dir cannot be trained on, in words, or None; looks at names only."""
    path = Path(folder)
    if not path.is_dir():
        return f"--train_data_dir {folder}: there is no such folder"
    if not image_files(folder):
        return f"--train_data_dir {folder}: the folder has no images"
    if not any(file.suffix in (".jsonl", ".csv", ".parquet") for file in path.rglob("metadata.*")):
        return (
            f"--train_data_dir {folder}: there are no captions; put a metadata.jsonl beside the images, a line each, "
            f'such as {{"file_name": "cat.png", "{caption_column}": "a photo of a cat"}}'
        )
    return None
