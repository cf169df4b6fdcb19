"""Training images of several sizes: which image is trained at which, and batches of one size.

An *item* is what an epoch trains on once: an image at a size. With one resolution each image is one item, with several
one for each resolution that it is large enough for. A *bucket* holds the items of one size.

Each bucket puts its items, epoch after epoch, in an order keyed by (seed, epoch, bucket), and cuts this endless
sequence into batches over all processes. A batch belongs to the epoch of its last item; the batches of an epoch are
shuffled. So batches are always full, items that do not fill one wait for the next epoch, and none is lost. The batches
of an epoch depend on (seed, epoch) alone, and a run's place is the number of batches behind it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from lpl.config.groups import Data
from lpl.config.sizes import AUTO, Size
from lpl.data.catalogue import Catalogue, cache_root
from lpl.data.mixture import Mixture
from lpl.data.order import Stream, keyed_generator
from lpl.data.source import data_folders
from lpl.tools.words import pixels


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Items:
    """Which image is trained at which size.

    Args:
        rows: of the data set, (M,), by item.
        sizes: height and width, (M, 2).
        left_out: rows that are too small for every size.
    """

    rows: np.ndarray
    sizes: np.ndarray
    left_out: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def size(self, item: int) -> Size:
        height, width = self.sizes[item]
        return int(height), int(width)

    @cached_property
    def buckets(self) -> dict[Size, np.ndarray]:
        """The items of each size, the largest buckets first."""
        sizes, which = _distinct(self.sizes)
        order = np.argsort(-np.bincount(which, minlength=len(sizes)), kind="stable")
        return {(int(sizes[n, 0]), int(sizes[n, 1])): np.flatnonzero(which == n) for n in order}

    def in_words(self, most: int | None = None) -> str:
        """The sizes with the number of their items, the ``most`` frequent ones.

        >>> Items(np.arange(3), np.array([[64, 64], [64, 64], [48, 80]])).in_words()
        '64 px (2), 48 x 80 px (1)'
        """
        shown = [f"{pixels(*size)} ({len(items)})" for size, items in self.buckets.items()]
        more = [f"{len(shown) - most} more sizes"] if most and len(shown) > most else []
        return ", ".join(shown[:most] + more)

    def largest(self) -> Items:
        """Only the items of the size with the most pixels."""
        size = max(self.buckets, key=lambda size: (size[0] * size[1], size))
        return Items(self.rows[self.buckets[size]], self.sizes[self.buckets[size]])


def items_of(
    images: np.ndarray,
    groups: Sequence[Sequence[Size]],
    step: int | None = None,
    upscale: bool = False,
    keep_small: bool = False,
) -> Items:
    """The items of some images: each at one size of each group, the nearest to its aspect ratio.

    An image that is smaller than the size is not enlarged: it gets the nearest size that it covers. If it covers none
    of the first group's, it gets its own size in whole steps, or is left out if that is not possible; groups after the
    first have larger sizes, at which it is not trained.

    Args:
        images: height and width, (N, 2); an image of unknown size, (0, 0), gets the one nearest to a square.
        groups: of sizes, the smallest resolution first.
        step: of the sides, to make sizes for small images; None: only the sizes of the groups.
        upscale: enlarge images instead, for each group.
        keep_small: enlarge those that would be left out.
    """
    distinct, which = _distinct(images)
    options = groups, step, upscale, keep_small
    found = [_sizes(int(height), int(width), *options) for height, width in distinct]
    most = max(map(len, found), default=0)
    sizes = np.zeros((len(distinct), most, 2), dtype=np.int32)
    for place, of_image in enumerate(found):
        sizes[place, : len(of_image)] = np.reshape(of_image, (-1, 2))
    sizes = sizes[which]  # (N, most, 2)
    rows, places = np.nonzero(sizes[..., 0])
    left_out = np.flatnonzero(~sizes[..., 0].any(1))
    return Items(rows, sizes[rows, places], left_out.tolist())


def _distinct(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of sizes (N, 2), in order, and which of them each is, (N,)."""
    keys, which = np.unique(sizes.astype(np.int64) @ [2**32, 1], return_inverse=True)  # much faster than by rows
    return np.stack(np.divmod(keys, 2**32), 1), which


def _sizes(
    height: int,
    width: int,
    groups: Sequence[Sequence[Size]],
    step: int | None,
    upscale: bool,
    keep_small: bool,
) -> list[Size]:
    """The sizes that an image is trained at, one per group at most, each once."""

    def nearest(sizes: Sequence[Size]) -> Size:
        return min(sizes, key=lambda size: (abs(math.log(size[1] * height / (size[0] * width))), -size[0] * size[1]))

    if 0 in (height, width):
        height = width = 1
        return [nearest(groups[0])]
    found: list[Size] = []
    for number, sizes in enumerate(groups):
        fitting = sizes if upscale else [size for size in sizes if size[0] <= height and size[1] <= width]
        if fitting:
            found.append(nearest(fitting))
        elif number == 0 and step and min(height, width) >= step:
            longest = max(max(size) for size in sizes)  # an image that is long and narrow is cropped to it
            found.append((min(height, longest) // step * step, min(width, longest) // step * step))
        elif number == 0 and keep_small:
            found.append(nearest(sizes))
    return list(dict.fromkeys(found))


def bucketed(
    dataset: Dataset | IterableDataset | None, data: Data, cache_dir: str | None, known: Catalogue | None = None
) -> Items | None:
    """The items of a data set; None: all its images are trained at one size.

    Args:
        known: of its images, if that has been read already.

    Raises:
        ValueError: if all images are too small.
    """
    if data.one_size or not isinstance(dataset, Dataset):
        return None
    if known is None:
        folders = data_folders(data, cache_dir)
        known = Catalogue.of(dataset, data.image_column, folders, cache_root(data), digests=data.cache_latents)
    made = data.aspect_ratio_buckets == AUTO
    enlarged = data.bucket_upscale or data.aspect_ratio_buckets is None
    step, mixture = data.bucket_step if made else None, Mixture.of(dataset)
    rows = np.arange(len(dataset)) if mixture is None else mixture.rows
    items = items_of(known.sizes[rows], data.buckets, step, data.bucket_upscale, enlarged)
    items = replace(items, rows=rows[items.rows], left_out=sorted(set(rows[items.left_out].tolist())))
    if items.left_out:
        words = f"{len(items.left_out)} of {len(dataset)} images are smaller than all --aspect_ratio_buckets"
        if len(items) == 0:
            raise ValueError(f"{words}; add smaller ones, or enlarge the images by --bucket_upscale")
        file = (dataset[items.left_out[0]][data.image_column] or {}).get("path")
        example = f", {Path(file).name} for example" if file else ""
        logger.warning(f"{words} and left out{example}; add smaller ones, or enlarge them by --bucket_upscale")
    return items


class BucketBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, item) for one process, each of items of one size.

    Args:
        batch_size: items per batch and process.
        first_batch: batches that this process has already trained on.
    """

    def __init__(
        self, items: Items, batch_size: int, seed: int, process_index: int, num_processes: int, first_batch: int
    ) -> None:
        self.items, self.seed, self.first_batch = items, seed, first_batch
        self.whole = batch_size * num_processes
        self.mine = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self.buckets = list(items.buckets.values())
        self.counts = np.array(list(map(len, self.buckets)))
        self._order = lru_cache(maxsize=4 * len(self.buckets))(self._drawn)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.first_batch * self.whole // len(self.items)  # not later than that of the first batch
        while self._before(epoch + 1) <= self.first_batch:
            epoch += 1
        done = self.first_batch - self._before(epoch)
        while True:
            for bucket, number in self._epoch(epoch)[done:]:
                yield self._batch(bucket, number)
            epoch, done = epoch + 1, 0

    def positions(self, batch: int) -> list[list[int]]:
        """What a resumed run needs besides the number of batches: nothing."""
        return []

    def _before(self, epoch: int) -> int:
        """Batches before an epoch."""
        return int((self.counts * epoch // self.whole).sum())

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The batches of an epoch in order: bucket, and number among the bucket's batches."""
        first, end = (self.counts * at // self.whole for at in (epoch, epoch + 1))
        batches = [(bucket, n) for bucket in range(len(self.counts)) for n in range(first[bucket], end[bucket])]
        order = torch.randperm(len(batches), generator=keyed_generator(self.seed, epoch, Stream.ORDER))
        return [batches[place] for place in order]

    def _batch(self, bucket: int, number: int) -> list[tuple[int, int]]:
        """The keys of this process in a batch."""
        keys = []
        for place in range(number * self.whole, (number + 1) * self.whole)[self.mine]:
            epoch, within = divmod(place, len(self.buckets[bucket]))
            keys.append((epoch, int(self._order(bucket, epoch)[within])))
        return keys

    def _drawn(self, bucket: int, epoch: int) -> np.ndarray:
        """The items of a bucket in the order of an epoch."""
        items = self.buckets[bucket]
        key = keyed_generator(self.seed, epoch, int(items[0]), Stream.BUCKET)
        return items[torch.randperm(len(items), generator=key).numpy()]
