"""Data sets that are read during training (--streaming), in an order that a resumed run continues exactly.

A *shard* is a file that is read from beginning to end: parquet or tar. A *row* is a sample as stored in its shard, its
image undecoded. The number of rows of a shard is unknown until it has been read. A sample's *index* is its shard times
``ROWS`` plus its row; its random numbers are keyed by (seed, epoch, index), as for any data set.

Order: in every epoch the shards follow a permutation keyed by (seed, epoch). Over all epochs this is one endless
sequence, of which each of P processes reads every P-th shard. With fewer shards than processes, a shard is split into
several *units* of interleaved rows; otherwise a unit is a whole shard. A process cuts what it reads into *blocks* of
--shuffle_buffer_size rows (the last block of an epoch may be smaller), and permutes each block, keyed by (seed, epoch,
index of its first row). So every sample comes once per epoch, in one process. If shards differ in length, one process
may begin an epoch before another. The main process reads and the loader's workers decode, so that the number of
workers changes nothing.

The *position* of a process is the unit and the row that its block begins with, and the number of samples of the block
that are done. A resumed run reads the shard up to there without decoding it.
"""

from __future__ import annotations

import logging
import tarfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TypeVar, cast

import pyarrow
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from torch.utils.data import Sampler

from lpl.config.groups import Data, Diffusion
from lpl.data.dataset import Candidates, LatentSpace, Row, Sample, TrainingImages
from lpl.data.order import Stream, keyed_generator
from lpl.data.reading import lies_in
from lpl.data.source import class_names, load_split, shard_files
from lpl.data.timeouts import FLAG, HungLoader
from lpl.objectives import Objective
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
ROWS = 10**9  # most rows per shard; index 3000000017 reads as shard 3, row 17
TRIED = 1000  # first rows, at least one of which must be readable
Item = TypeVar("Item")
Indexed = tuple[int, Row | ValueError]  # an index and its row, or why it cannot be read
Key = tuple[int, list[Indexed]]  # epoch; the sample, then the samples that may replace it


class LostShard(ValueError):
    """A shard cannot be reached; the message says which, and why."""


def load_streamed_images(
    data: Data, seed: int, cache_dir: str | None, num_classes: int | None = None, classes: Sequence[str] = ()
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Opens the training data and reads the held-out data, as :func:`lpl.data.source.load_training_images` does.

    Held-out data, and with --max_train_samples the training data, is read into memory: the first rows of the data
    set, whatever the seed. --validation_every_nth counts within each shard.
    """
    dataset, held_out = load_split(data, data.train_split, cache_dir, num_classes, classes), None
    assert isinstance(dataset, IterableDataset), "without --streaming, load_training_images loads the data set"
    rows = all_rows(dataset, data)
    if data.validation_split is not None:
        names = class_names(dataset, data)
        other = cast(IterableDataset, load_split(data, data.validation_split, cache_dir, num_classes, names))
        held_out = fetched(other, all_rows(other, data), data.num_validation_samples, data)
    elif (every_nth := data.validation_every_nth) is not None:
        rows = ((index, row) for index, row in rows if is_trained(index, every_nth))
        chosen = ((index, row) for index, row in all_rows(dataset, data) if not is_trained(index, every_nth))
        held_out = fetched(dataset, chosen, data.num_validation_samples, data)
    if data.max_train_samples is not None:
        return fetched(dataset, rows, data.max_train_samples, data), held_out
    return dataset, held_out


def fetched(dataset: IterableDataset, rows: Iterable[Indexed], count: int, data: Data) -> Dataset:
    """Reads the first ``count`` readable rows into memory.

    Raises:
        ValueError: if there are none.
    """
    found = list(islice((row for _, row in rows if not isinstance(row, ValueError)), count))
    if not found:
        raise ValueError("--train_data_dir, --dataset_name: the data set has no images")
    fetched = Dataset.from_list(found, features=dataset.features)
    for column in filter(None, (data.image_column, data.mask_column)):
        fetched = fetched.cast_column(column, ImageFeature(decode=False))
    return fetched


# Rows ----------------------------------------------------------------------------------------------------------------


def all_rows(dataset: IterableDataset, data: Data) -> Iterator[Indexed]:
    """Yields every row, shard after shard."""
    for shard in range(dataset.num_shards):
        yield from shard_rows(dataset, shard, data)


def shard_rows(dataset: IterableDataset, shard: int, data: Data) -> Iterator[Indexed]:
    """Yields the rows of a shard. If the shard is broken, one error replaces the rest of its rows.

    Raises:
        LostShard: if the shard cannot be reached.
    """
    index = shard * ROWS
    try:
        for row in dataset.shard(dataset.num_shards, shard):
            image = row[data.image_column] or {}
            place = data.dataset_name or data.train_data_dir
            if image.get("bytes") is None and not _belongs(image.get("path"), place):
                row = ValueError("the row holds no image, or a path that leads out of the data set; embed the images")
            yield index, row
            index += 1
    except Exception as error:
        if not _is_broken(error):
            problem = f"--streaming: shard {shard} cannot be read from row {index % ROWS} on ({first_line(error)})"
            raise LostShard(problem) from error
        yield index, ValueError(f"the rest of the shard cannot be read: {first_line(error)}")


def _belongs(path: str | None, place: str | None) -> bool:
    """Whether the path of an image is within the data set, a folder or a name on the Hub."""
    if path is None or place is None:
        return False
    if Path(place).is_dir():
        return lies_in(path, place)
    return path.rpartition("::")[2].startswith(f"hf://datasets/{place}@")


def _is_broken(error: Exception) -> bool:
    """Whether bad data raises this error, at any time, and not a file or a network that is unavailable now."""
    broken = (ValueError, EOFError, tarfile.TarError, zlib.error, pyarrow.ArrowException)
    return isinstance(error, broken) or (type(error) is OSError and error.errno is None)  # pyarrow's, of a bad page


def is_trained(index: int, every_nth: int | None) -> bool:
    """Whether a sample is trained on, not held out by --validation_every_nth."""
    return every_nth is None or index % ROWS % every_nth != 0


# Order ---------------------------------------------------------------------------------------------------------------


class StreamedBatches(Sampler[list[Key]]):
    """Endless batches of one process, with the rows themselves.

    Args:
        position: where to begin: (unit, row, samples done of the block that begins there).
        first_batch: batches that this process has already trained on.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        data: Data,
        batch_size: int,
        seed: int,
        num_processes: int,
        position: Sequence[int],
        first_batch: int = 0,
    ) -> None:
        self.dataset, self.data, self.batch_size, self.seed = dataset, data, batch_size, seed
        self.num_processes, self.first_batch = num_processes, first_batch
        self.parts = ceil(num_processes / dataset.num_shards)  # units per shard
        self.position = list(position)
        self._begun: deque[tuple[int, int, int]] = deque()  # of each block: samples before it, its unit, its row
        self._reading = 0, 0.0  # index of the row being read, and time.monotonic() when its reading began

    def __iter__(self) -> Iterator[list[Key]]:
        *start, done = self.position
        before, batch = -done, []
        for unit, epoch, block in read_ahead(self._blocks(*start), self._wait_for):
            first, _ = block[0]
            self._begun.append((before, unit, first % ROWS))
            before += len(block)
            key = keyed_generator(self.seed, epoch, first, Stream.ORDER)
            block = [block[place] for place in torch.randperm(len(block), generator=key)]
            for place in range(done, len(block)):
                batch.append((epoch, block[place]))
                if len(batch) == self.batch_size:
                    yield with_substitutes(batch, block[(place + 1) % len(block)])
                    batch = []
            done = 0

    def positions(self, batch: int) -> list[list[int]]:
        """The position of each process after ``batch`` of its batches. All processes must call this together."""
        samples = (batch - self.first_batch) * self.batch_size
        while len(self._begun) > 1 and self._begun[1][0] <= samples:
            self._begun.popleft()
        mine = self.position
        if self._begun:
            before, unit, row = self._begun[0]
            mine = [unit, row, samples - before]
        return gather_object([mine]) if self.num_processes > 1 else [mine]

    def _blocks(self, unit: int, row: int) -> Iterator[tuple[int, int, list[Indexed]]]:
        """Yields (unit that the block begins in, epoch, block) in the order of reading."""
        units = self.dataset.num_shards * self.parts
        begun, block = unit, []
        while True:
            epoch, place = divmod(unit, units)
            order = torch.randperm(units, generator=keyed_generator(self.seed, epoch, Stream.ORDER))
            shard, part = divmod(int(order[place]), self.parts)
            for indexed in self._rows(shard, part, row):
                begun = begun if block else unit
                block.append(indexed)
                if len(block) == self.data.shuffle_buffer_size:
                    yield begun, epoch, block
                    block = []
            unit, row = unit + self.num_processes, 0
            if block and unit // units != epoch:
                yield begun, epoch, block
                block = []

    def _rows(self, shard: int, part: int, first: int) -> Iterator[Indexed]:
        """Yields the training rows of a unit, from row ``first`` of its shard on."""
        every_nth = self.data.validation_every_nth
        self._reading = shard * ROWS, time.monotonic()
        for index, row in shard_rows(self.dataset, shard, self.data):
            place = index % ROWS
            if place >= first and is_trained(index, every_nth):
                number = place - (place // every_nth + 1 if every_nth else 0)  # among the training rows
                if number % self.parts == part:
                    yield index, row
            self._reading = index + 1, time.monotonic()

    def _wait_for(self, block: Future[Item]) -> Item:
        """Waits for a block.

        Raises:
            HungLoader: if one of its rows takes longer than --dataloader_timeout.
        """
        seconds = self.data.dataloader_timeout
        while not wait([block], seconds or None).done:
            index, since = self._reading
            if time.monotonic() - since >= seconds:
                raise HungLoader(
                    f"--streaming: shard {index // ROWS}, row {index % ROWS}, took longer than {FLAG} {seconds:g} to "
                    "read; repair the disk or the network that it comes from, or raise the timeout"
                )
        return block.result()


def with_substitutes(batch: list[tuple[int, Indexed]], spare: Indexed) -> list[Key]:
    """The keys of a batch: each sample with the others and a spare one, which may replace it.

    A loader's worker gets a batch in one message, which contains each row once.
    """
    rows = [*(row for _, row in batch), spare]
    return [(epoch, rows[place:] + rows[:place]) for place, (epoch, _) in enumerate(batch)]


def read_ahead(items: Iterator[Item], wait_for: Callable[[Future[Item]], Item]) -> Iterator[Item]:
    """Yields endless items, each read in a thread while the one before is used.

    Args:
        wait_for: returns an item when it has been read.
    """
    following = read_in_thread(items)
    while True:
        item = wait_for(following)
        following = read_in_thread(items)
        yield item


def read_in_thread(items: Iterator[Item]) -> Future[Item]:
    """Reads the next item. Nothing waits for the thread, not even the process's end, unlike an executor's."""
    item: Future[Item] = Future()

    def read() -> None:
        try:
            item.set_result(next(items))
        except BaseException as error:
            item.set_exception(error)

    threading.Thread(target=read, daemon=True).start()
    return item


# Samples -------------------------------------------------------------------------------------------------------------


@dataclass
class StreamedImages(TrainingImages):
    """Samples as in :class:`lpl.data.dataset.TrainingImages`; their rows come with the key.

    Args:
        last_resort: the first readable row, found by :meth:`check`.
    """

    dataset: IterableDataset
    last_resort: list[Indexed] = field(default_factory=list)

    @property
    def length(self) -> None:
        return None

    @property
    def rows(self) -> None:
        return None

    def batches(
        self,
        batch_size: int,
        process_index: int,
        num_processes: int,
        first_batch: int,
        positions: Sequence[list[int]] = (),
    ) -> StreamedBatches:
        """The order of one process.

        Args:
            positions: where each process stood when the run was interrupted.
        """
        if len(positions) == num_processes:
            position = positions[process_index]
        else:
            following = max((unit + 1 for unit, *_ in positions), default=0)
            position = [following + process_index, 0, 0]
            if positions:
                logger.warning(
                    "--streaming: the run to resume had %d processes, this one has %d; it continues with the shards "
                    "that follow, and skips the unread rest of the open shards in this epoch",
                    len(positions),
                    num_processes,
                )
        return StreamedBatches(self.dataset, self.data, batch_size, self.seed, num_processes, position, first_batch)

    def check(self) -> None:
        every_nth, reasons = self.data.validation_every_nth, []
        rows = all_rows(self.dataset, self.data)
        for indexed in islice((row for row in rows if is_trained(row[0], every_nth)), TRIED):
            try:
                self.readable(self._candidates([indexed]))
            except ValueError as error:
                reasons.append(str(error))
                continue
            self.last_resort = [indexed]
            return
        if not reasons:
            raise ValueError("--train_data_dir, --dataset_name: there are no images to train on")
        raise ValueError(reasons[0].replace("no image of the data set", f"none of the first {len(reasons)} images"))

    def file_names(self, places: Sequence[int]) -> dict[int, str | None]:
        """Shard and row of samples. Reads no file."""
        folder = None if self.data.dataset_name else self.data.train_data_dir
        files = shard_files(folder)[1] if folder else None
        shards = {place: files[place // ROWS].name if files else f"shard {place // ROWS}" for place in places}
        return {place: f"{shards[place]}, row {place % ROWS}" for place in places}

    def __getitem__(self, key: Key) -> Sample:
        epoch, rows = key
        return self.sample(epoch, rows[0][0], self._candidates([*rows, *self.last_resort]))

    def _candidates(self, rows: Iterable[Indexed]) -> Candidates:
        return ((index, partial(self._checked, row)) for index, row in rows)

    def _checked(self, row: Row | ValueError) -> Row:
        """A row, whose image :func:`lpl.data.reading.open_image` decodes.

        Raises:
            ValueError: if it is broken, or if the model has no such class label.
        """
        if isinstance(row, ValueError):
            raise row
        label = self._label(row)
        if isinstance(self.empty_caption, int) and label is not None and not 0 <= label < self.empty_caption:
            raise ValueError(f"the class label is {label}, but this model's are from 0 to {self.empty_caption - 1}")
        return row


def training_images(
    dataset: Dataset | IterableDataset,
    objective: Objective,
    space: LatentSpace,
    data: Data,
    diffusion: Diffusion,
    seed: int,
    empty_caption: str | int = "",
    cache_dir: str | None = None,
) -> TrainingImages:
    """:class:`StreamedImages` of a streamed data set, otherwise :class:`lpl.data.dataset.TrainingImages`."""
    rest = (objective, space, data, diffusion, seed, empty_caption, cache_dir)
    if isinstance(dataset, IterableDataset):
        return StreamedImages(dataset, *rest)
    return TrainingImages(dataset, *rest)
