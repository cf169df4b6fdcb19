"""Images and captions, and every random number of a training sample.

Whatever is random about a sample (crop, flip, caption, empty caption, posterior sample, noise, timestep, whether and
where LPL looks at it) comes from generators keyed by (seed, epoch, sample index). So a run is the same after a resume,
with any number of loader workers, and over one process or several.

The order of samples is one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). Where a run
stands is one number, a position in that sequence; batches are always full and may span two epochs.
"""

from __future__ import annotations

import glob
import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets import ClassLabel, Dataset, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lpl.objectives import Objective, timestep_density, timestep_weights
from lpl.pictures import on_white
from lpl.preemption import leave_signals_alone
from lpl.timeouts import Readings, TookTooLong, at_most, watched


logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Row = dict[str, Any]  # of a data set, by column
Candidates = Iterable[tuple[int, Callable[[], Row]]]  # indices, and what reads their rows
# torchvision's names, which diffusers' scripts take, and what PIL has for them
RESAMPLING = {mode.name.lower(): mode for mode in Image.Resampling} | {"nearest_exact": Image.Resampling.NEAREST}


Image.init()  # lets PIL know all that it can read
FORMATS = [kind for kind in Image.ID if kind != "EPS"]  # that is a program, which PIL has Ghostscript run

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}  # what --streaming reads from a folder
LARGEST_FILE = 2**30  # bytes of one in an archive, which may unpack to any size
LONGEST = 8  # times its shorter side: an image beyond is cropped before it is resized


class Stream(IntEnum):
    """What a generator is for. Each purpose has its own, so that a new draw in one does not move the others."""

    ORDER = 0
    AUGMENTATION = 1
    TIMESTEP = 2
    NOISE = 3
    LPL = 4


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that depends on the numbers given and nothing else."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def load_training_images(args: Any, num_classes: int | None = None) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is held out for the validation loss (None: nothing is).

    Args:
        num_classes: of a class-conditional family, whose captions are class labels.

    Raises:
        ValueError: where there is nothing to train on, or a column is missing or of the wrong kind.
    """
    dataset, held_out = load_split(args, "train", num_classes), None
    if args.max_train_samples is not None:
        dataset = dataset.shuffle(seed=args.seed).select(range(min(args.max_train_samples, len(dataset))))
    if args.validation_split is not None:
        held_out = load_split(args, args.validation_split, num_classes)
    elif args.validation_every_nth is not None:
        every_nth = range(0, len(dataset), args.validation_every_nth)
        held_out = dataset.select(every_nth)
        dataset = dataset.select(sorted(set(range(len(dataset))) - set(every_nth)))
        if len(dataset) == 0:
            raise ValueError(f"--validation_every_nth {args.validation_every_nth}: nothing is left to train on")
    if held_out is not None:
        held_out = held_out.select(range(min(args.num_validation_samples, len(held_out))))
    return dataset, held_out


def load_split(args: Any, split: str, num_classes: int | None) -> Dataset | IterableDataset:
    """Image and caption column of a split; with --streaming its rows are read when they are needed, and not decoded.

    Raises:
        ValueError: where it cannot be loaded, or a column is missing or of the wrong kind.
    """
    where = f"--dataset_name {args.dataset_name}" if args.dataset_name else f"--train_data_dir {args.train_data_dir}"
    options = {"split": split, "cache_dir": args.cache_dir, "streaming": args.streaming}
    try:
        if not args.dataset_name:
            kind, files = "imagefolder", [os.path.join(glob.escape(args.train_data_dir), "**")]
            if args.streaming:
                kind, shards = shard_files(args.train_data_dir)
                files = [glob.escape(str(shard)) for shard in shards]
            # All files under one name: left to itself, the library takes "test" in a file's name for a split.
            dataset = load_dataset(kind, data_files={"train": files}, **options)
        else:
            dataset = load_dataset(
                args.dataset_name, args.dataset_config_name, data_dir=args.train_data_dir, **options
            )
        if args.streaming:
            dataset = dataset.decode(False)
    except Exception as error:  # the library raises a dozen kinds; each means that there is nothing to train on
        why = first_line(error.__cause__ or error)
        raise ValueError(f"{where}: the data set cannot be loaded: {why}") from error
    check_columns(dataset, args.image_column, args.caption_column, where, num_classes)
    dataset = dataset.select_columns([args.image_column, args.caption_column])
    if args.streaming:
        return dataset
    dataset = dataset.cast_column(args.image_column, ImageFeature(decode=False))  # TrainingImages opens them itself
    if args.dataset_name:
        return dataset
    if (left := len(image_files(args.train_data_dir)) - len(dataset)) > 0:
        logger.warning("%s: %d images are left out, since no metadata file names them", where, left)
    return dataset


def check_columns(
    dataset: Dataset | IterableDataset,
    image_column: str,
    caption_column: str,
    where: str,
    num_classes: int | None = None,
) -> None:
    """Refuse a data set that is empty, lacks the named columns, or has something else in them.

    Raises:
        ValueError: with the columns that there are, and the flag to change.
    """
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{where}: the data set has no images")
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"{where}: there is no column {column!r} ({flag}); its columns are "
                f"{', '.join(dataset.column_names)}{_folder_hint(dataset, caption_column, num_classes)}"
            )
    if not isinstance(dataset.features[image_column], ImageFeature):
        raise ValueError(f"{where}: column {image_column!r} (--image_column) holds no images")
    if num_classes is None:
        _check_captions(dataset, caption_column, where)
    else:
        _check_labels(dataset, caption_column, where, num_classes)


def _folder_hint(dataset: Dataset | IterableDataset, caption_column: str, num_classes: int | None) -> str:
    if "imagefolder" not in str(dataset.info.builder_name):
        return ""
    if num_classes is not None:
        return "; a folder of images takes its class labels from its sub-folders' names, or from a metadata.jsonl"
    return (
        "; a folder of images takes its captions from a metadata.jsonl with the keys file_name and " + caption_column
    )


def _check_captions(dataset: Dataset | IterableDataset, column: str, where: str) -> None:
    feature = dataset.features[column]
    kind = getattr(getattr(feature, "feature", feature), "dtype", None)  # of a list's entries, or of the value itself
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold strings or lists of strings, "
            f"but its first value is {next(iter(dataset[column]), None)!r}"
        )


def _check_labels(dataset: Dataset | IterableDataset, column: str, where: str, num_classes: int) -> None:
    feature = dataset.features[column]
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ValueError(
            f"{where}: column {column!r} (--caption_column) must hold class labels, numbers from 0 on, "
            f"but its first value is {next(iter(dataset[column]), None)!r}"
        )
    if isinstance(dataset, IterableDataset):  # each is looked at when its image is
        return
    labels = [label for label in dataset[column] if label is not None]
    if not labels or min(labels) < 0 or max(labels) >= num_classes:
        raise ValueError(
            f"{where}: the class labels in column {column!r} (--caption_column) must be from 0 to {num_classes - 1}, "
            f"the classes of this model, but they go from {min(labels, default=None)} to {max(labels, default=None)}"
        )


def class_names(dataset: Dataset | IterableDataset, column: str) -> dict[int, str]:
    """The names of the classes by label, where the data set has them."""
    return dict(enumerate(getattr(dataset.features[column], "names", None) or []))


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


def data_folders(args: Any) -> list[str]:
    """Where the files of a data set may lie: in its folder; of one on the Hub, there, or in what was downloaded."""
    if not args.dataset_name:
        return [args.train_data_dir] if args.train_data_dir else []
    downloads = os.path.join(args.cache_dir or datasets.config.HF_DATASETS_CACHE, "downloads")
    own = (f"hf://datasets/{args.dataset_name}", args.dataset_name, args.train_data_dir)
    return [folder for folder in (*own, HF_HUB_CACHE, downloads) if folder]


def open_image(image: Any, folders: Sequence[str]) -> Any:
    """An image as a data set holds it, ``{"bytes": ..., "path": ...}``, opened by PIL; any other value as it is.

    Args:
        folders: where a path may lead, links and all: a data set says what it likes, also of other people's files.

    Raises:
        ValueError: for a path that leads elsewhere.
        OSError: where it is no image, or not there.
    """
    if not isinstance(image, Mapping):
        return image
    if image["bytes"] is not None:
        return Image.open(BytesIO(image["bytes"]), formats=FORMATS)
    path = image["path"]
    if path is None:
        return None
    if not any(lies_in(path, str(folder)) for folder in folders):
        raise ValueError(f"{path} is not in the data set's folder; copy it there")
    if "://" not in path:
        return Image.open(path, formats=FORMATS)
    with fsspec.open(path) as file:
        return Image.open(BytesIO(file.read(LARGEST_FILE)), formats=FORMATS)


def lies_in(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it; one in a zip archive lies where the archive does."""
    kind, _, rest = path.partition("://")
    if kind == "zip":
        path = rest.partition("::")[2]
    if "::" in path:
        return False
    if "://" in path:
        return "://" in folder and ".." not in path and path.startswith((f"{folder}/", f"{folder}@"))
    return "://" not in folder and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def to_rgb(image: Image.Image | None) -> Image.Image:
    """An image of any mode, turned upright, as 8-bit RGB; what is transparent becomes white.

    Raises:
        ValueError: where there is none.
    """
    if image is None:
        raise ValueError("there is no image in this row")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return on_white(image)


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

    def positions(self, batch: int) -> list[list[int]]:
        """What it takes to go on behind so many batches of each process, besides their number: nothing."""
        return []


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples to a batch: tensors stacked, (B, ...), captions in a list; what is None stays None.

    ``bad`` is one list: what the batch had to do without.
    """
    batch: Batch = {"bad": [found for sample in samples for found in sample.pop("bad")]}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else None if first is None else values
    return batch


def training_batches(images: TrainingImages, batches: KeyedBatches, num_workers: int) -> Iterator[Batch]:
    """Endless batches on the CPU, in pinned memory where there is a GPU to send them to.

    Raises:
        HungLoader: from the iterator, where a file's reading in one of the processes cannot be given up.
    """
    seconds = images.args.dataloader_timeout if num_workers else 0
    images = replace(images, readings=Readings(num_workers))
    loader = iter(
        DataLoader(
            images,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            timeout=seconds,
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_alone,
        )
    )
    return watched(loader, images.readings, seconds, images.name) if seconds else loader


HELD_OUT = {  # with these flags both losses are plain, nothing is random, and all runs have one seed
    "seed": 0,
    "center_crop": True,
    "random_flip": False,
    "proportion_empty_prompts": 0.0,
    "noise_offset": 0.0,
    "input_perturbation": 0.0,
    "dream_training": False,
    "snr_gamma": None,
    "weighting_scheme": None,
    "precondition_outputs": 0,
    "lpl_variant": "paper",  # LPL's mean is over the whole batch
    "lpl_max_samples": None,
    "lpl_crop": None,
}


def held_out_batches(images: TrainingImages, batch_size: int, first: int = 0, stride: int = 1) -> Iterator[Batch]:
    """Every ``stride``-th of the samples once, the same at every call and in every run.

    The n-th of N samples is taken at the (n + 1/2) / N quantile of the timesteps, so that all noise levels have their
    part, and that two runs of the same objective can be compared number by number.
    """
    fixed = replace(images, args=Namespace(**vars(images.args) | HELD_OUT))
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


def image_files(folder: str) -> list[Path]:
    """Files in a folder, and the folders below, whose name is an image's."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return [file for file in Path(folder).rglob("*") if file.suffix.lower() in suffixes]


def shard_files(folder: str) -> tuple[str, list[Path]]:
    """The kind of the shards in a folder and the folders below, as load_dataset names it, and their files in order.

    Raises:
        ValueError: where there are none, or of both kinds.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.suffix in SHARDS)
    kinds = {SHARDS[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ValueError(
            f"--train_data_dir {folder}: --streaming reads a folder of .parquet files or one of .tar files "
            f"(WebDataset), and this one has {'both' if kinds else 'neither'}"
            + ("" if kinds else "; a folder of images is read without --streaming")
        )
    return kinds.pop(), files
