"""Data sets that are read while they are trained on (--streaming), in an order that a resumed run takes up exactly.

A *shard* is what the data set's library reads from beginning to end: a parquet or a tar file. A *row* is a sample as
it lies in its shard, with its image not decoded. How many rows a shard has is not known before it was read. A sample's
*index* is its shard times ``ROWS`` plus its row; its random numbers are keyed by (seed, epoch, index), as ever.

The order: epoch after epoch the shards follow a permutation keyed by (seed, epoch), one endless sequence, of which
each of P processes reads every P-th one. Where there are fewer shards than processes, a shard is several *units*, each
with every so many-th of its rows; else it is one. What a process reads is cut into *blocks* of --shuffle_buffer_size
rows, the last of an epoch may be smaller, and each is permuted, keyed by (seed, epoch, index of its first row). So
every sample comes once in every epoch, in one of the processes; where shards differ in length, one process may begin
an epoch before another does. The main process reads, and a loader's processes decode, so their number moves nothing.

Where a process stands is its *position*: the unit and the row that its block begins with, and how many samples of the
block are done. A resumed run reads its shard up to there, and decodes nothing of it.
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
from typing import Any, TypeVar

import pyarrow
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from torch.utils.data import Sampler

from lpl.data.dataset import Candidates, Row, TrainingImages
from lpl.data.order import Stream, keyed_generator
from lpl.data.source import load_split, shard_files
from lpl.data.timeouts import FLAG, HungLoader
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
ROWS = 10**9  # per shard at most: an index is read as shard 3, row 17 where it is 3000000017
TRIED = 1000  # rows at the beginning, of which one at least must be readable
Item = TypeVar("Item")
Indexed = tuple[int, Row | ValueError]  # an index and its row, or why it cannot be read
Key = tuple[int, list[Indexed]]  # epoch; the sample, and those that may take its place


class LostShard(ValueError):
    """A shard that cannot be reached; says which, and why."""


def load_streamed_images(
    args: Any, num_classes: int | None = None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """As :func:`lpl.data.load_training_images`.

    What is held out, and with --max_train_samples what is trained on, is read into memory: the first ones of the data
    set. --validation_every_nth counts within each shard.
    """
    dataset, held_out = load_split(args, "train", num_classes), None
    rows = all_rows(dataset, args)
    if args.validation_split is not None:
        other = load_split(args, args.validation_split, num_classes)
        held_out = fetched(other, all_rows(other, args), args.num_validation_samples, args)
    elif (every_nth := args.validation_every_nth) is not None:
        rows = ((index, row) for index, row in rows if is_trained(index, every_nth))
        chosen = ((index, row) for index, row in all_rows(dataset, args) if not is_trained(index, every_nth))
        held_out = fetched(dataset, chosen, args.num_validation_samples, args)
    if args.max_train_samples is not None:
        dataset = fetched(dataset, rows, args.max_train_samples, args)
    return dataset, held_out


def fetched(dataset: IterableDataset, rows: Iterable[Indexed], count: int, args: Any) -> Dataset:
    """The first so many rows, in memory; those that cannot be read are left out.

    Raises:
        ValueError: where there are none.
    """
    found = list(islice((row for _, row in rows if not isinstance(row, ValueError)), count))
    if not found:
        raise ValueError("--train_data_dir, --dataset_name: the data set has no images")
    return Dataset.from_list(found, features=dataset.features).cast_column(args.image_column, ImageFeature())


# Rows ----------------------------------------------------------------------------------------------------------------


def all_rows(dataset: IterableDataset, args: Any) -> Iterator[Indexed]:
    """Every row, shard after shard."""
    for shard in range(dataset.num_shards):
        yield from shard_rows(dataset, shard, args)


def shard_rows(dataset: IterableDataset, shard: int, args: Any) -> Iterator[Indexed]:
    """The rows of a shard; where it is broken, an error stands in the place of the rest.

    Raises:
        LostShard: where it cannot be reached.
    """
    index = shard * ROWS
    try:
        for row in dataset.shard(dataset.num_shards, shard):
            image = row[args.image_column] or {}
            if image.get("bytes") is None and not _belongs(image.get("path"), args.dataset_name):
                row = ValueError("the row holds no image, or a path that leads out of the data set; embed the images")
            yield index, row
            index += 1
    except Exception as error:
        if not _is_broken(error):
            problem = f"--streaming: shard {shard} cannot be read from row {index % ROWS} on ({first_line(error)})"
            raise LostShard(problem) from error
        yield index, ValueError(f"the rest of the shard cannot be read: {first_line(error)}")


def _belongs(path: str | None, dataset_name: str | None) -> bool:
    """Whether the path of an image is within the data set."""
    if path is None or dataset_name is None:
        return False
    if Path(dataset_name).is_dir():
        return Path(path).resolve().is_relative_to(Path(dataset_name).resolve())
    return path.rpartition("::")[2].startswith(f"hf://datasets/{dataset_name}@")


def _is_broken(error: Exception) -> bool:
    """Whether that is what bad data raises, today and tomorrow, and not a file or a network that is gone for now."""
    broken = (ValueError, EOFError, tarfile.TarError, zlib.error, pyarrow.ArrowException)
    return isinstance(error, broken) or (type(error) is OSError and error.errno is None)  # pyarrow's, of a bad page


def is_trained(index: int, every_nth: int | None) -> bool:
    """Whether a sample is trained on, and not held out by --validation_every_nth."""
    return every_nth is None or index % ROWS % every_nth != 0


# Order ---------------------------------------------------------------------------------------------------------------


class StreamedBatches(Sampler[list[Key]]):
    """Batches of one process with the rows themselves, from a position on, without an end.

    Args:
        position: (unit, row, samples done of the block that begins there).
        first_batch: how many batches of this process come before.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        args: Any,
        process_index: int,
        num_processes: int,
        position: Sequence[int],
        first_batch: int = 0,
    ) -> None:
        self.dataset, self.args, self.num_processes, self.first_batch = dataset, args, num_processes, first_batch
        self.parts = ceil(num_processes / dataset.num_shards)  # units of a shard
        self.position = list(position)
        self._begun: deque[tuple[int, int, int]] = deque()  # of each block: samples before it, its unit, its row
        self._reading = 0, 0.0  # index of the row that is being read, and seconds of the clock since when

    def __iter__(self) -> Iterator[list[Key]]:
        *start, done = self.position
        before, batch = -done, []
        for unit, epoch, block in ahead(self._blocks(*start), self._waited_for):
            first, _ = block[0]
            self._begun.append((before, unit, first % ROWS))
            before += len(block)
            key = keyed_generator(self.args.seed, epoch, first, Stream.ORDER)
            block = [block[place] for place in torch.randperm(len(block), generator=key)]
            for place in range(done, len(block)):
                batch.append((epoch, block[place]))
                if len(batch) == self.args.train_batch_size:
                    yield with_stand_ins(batch, block[(place + 1) % len(block)])
                    batch = []
            done = 0

    def positions(self, batch: int) -> list[list[int]]:
        """Where each process stands behind so many of its batches; all have to ask."""
        samples = (batch - self.first_batch) * self.args.train_batch_size
        while len(self._begun) > 1 and self._begun[1][0] <= samples:
            self._begun.popleft()
        mine = self.position
        if self._begun:
            before, unit, row = self._begun[0]
            mine = [unit, row, samples - before]
        return gather_object([mine]) if self.num_processes > 1 else [mine]

    def _blocks(self, unit: int, row: int) -> Iterator[tuple[int, int, list[Indexed]]]:
        """Blocks in the order of reading, with the unit that they begin in and their epoch."""
        units = self.dataset.num_shards * self.parts
        begun, block = unit, []
        while True:
            epoch, place = divmod(unit, units)
            order = torch.randperm(units, generator=keyed_generator(self.args.seed, epoch, Stream.ORDER))
            shard, part = divmod(int(order[place]), self.parts)
            for indexed in self._rows(shard, part, row):
                begun = begun if block else unit
                block.append(indexed)
                if len(block) == self.args.shuffle_buffer_size:
                    yield begun, epoch, block
                    block = []
            unit, row = unit + self.num_processes, 0
            if block and unit // units != epoch:
                yield begun, epoch, block
                block = []

    def _rows(self, shard: int, part: int, first: int) -> Iterator[Indexed]:
        """Those of a unit that are trained on, from a row of its shard on."""
        every_nth = self.args.validation_every_nth
        self._reading = shard * ROWS, time.monotonic()
        for index, row in shard_rows(self.dataset, shard, self.args):
            place = index % ROWS
            if place >= first and is_trained(index, every_nth):
                number = place - (place // every_nth + 1 if every_nth else 0)  # of those that are trained on
                if number % self.parts == part:
                    yield index, row
            self._reading = index + 1, time.monotonic()

    def _waited_for(self, block: Future[Item]) -> Item:
        """A block, as soon as it is read.

        Raises:
            HungLoader: where one of its rows takes longer than --dataloader_timeout.
        """
        seconds = self.args.dataloader_timeout
        while not wait([block], seconds or None).done:
            index, since = self._reading
            if time.monotonic() - since >= seconds:
                raise HungLoader(
                    f"--streaming: the reading of shard {index // ROWS}, row {index % ROWS}, does not end; mend the "
                    f"disk or the network that it comes from, or wait longer for a row ({FLAG} {seconds:g})"
                )
        return block.result()


def with_stand_ins(batch: list[tuple[int, Indexed]], spare: Indexed) -> list[Key]:
    """Each sample of a batch with the others and one more, that may take its place.

    A loader's process gets a batch as a whole, where the same row is sent once.
    """
    rows = [*(row for _, row in batch), spare]
    return [(epoch, rows[place:] + rows[:place]) for place, (epoch, _) in enumerate(batch)]


def ahead(items: Iterator[Item], waited_for: Callable[[Future[Item]], Item]) -> Iterator[Item]:
    """The same without an end, each read in a thread while the one before is used."""
    following = read_in_thread(items)
    while True:
        item = waited_for(following)
        following = read_in_thread(items)
        yield item


def read_in_thread(items: Iterator[Item]) -> Future[Item]:
    """The next one. Neither the end of its user nor that of the process waits for it, as an executor's would."""
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
    """Samples as :class:`lpl.data.TrainingImages` has them, of rows that come with the key."""

    last_resort: list[Indexed] = field(default_factory=list)  # the first row that can be read

    @property
    def length(self) -> None:
        return None

    def batches(
        self, process_index: int, num_processes: int, first_batch: int, positions: Sequence[list[int]] = ()
    ) -> StreamedBatches:
        """The order that one process trains in.

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
                    "--streaming: the run to resume had %d processes and has %d now; it goes on with the shards "
                    "that follow, and what was left of those that were being read is not seen in this epoch",
                    *(len(positions), num_processes),
                )
        return StreamedBatches(self.dataset, self.args, process_index, num_processes, position, first_batch)

    def check(self) -> None:
        every_nth, reasons = self.args.validation_every_nth, []
        rows = all_rows(self.dataset, self.args)
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
        raise ValueError(reasons[0].replace("not one image of the data set", f"not one of {len(reasons)} images"))

    def file_names(self, places: Sequence[int]) -> dict[int, str | None]:
        """Shard and row of samples; no file is read."""
        files = None if self.args.dataset_name else shard_files(self.args.train_data_dir)[1]
        shards = {place: files[place // ROWS].name if files else f"shard {place // ROWS}" for place in places}
        return {place: f"{shards[place]}, row {place % ROWS}" for place in places}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, rows = key
        return self.sample(epoch, rows[0][0], self._candidates([*rows, *self.last_resort]))

    def _candidates(self, rows: Iterable[Indexed]) -> Candidates:
        return ((index, partial(self._decoded, row)) for index, row in rows)

    def _decoded(self, row: Row | ValueError) -> Row:
        """The row with its image decoded.

        Raises:
            ValueError: where that cannot be, or for a class label that the model does not know.
        """
        if isinstance(row, ValueError):
            raise row
        image, caption = row[self.args.image_column], row[self.args.caption_column]
        if isinstance(self.empty_caption, int) and caption is not None and not 0 <= caption < self.empty_caption:
            raise ValueError(f"the class label is {caption}, and the model's are from 0 to {self.empty_caption - 1}")
        return row | {self.args.image_column: ImageFeature().decode_example(image)}


def training_images(dataset: Dataset | IterableDataset, *rest: Any) -> TrainingImages:
    """Images of a data set that is here, or streamed."""
    return (StreamedImages if isinstance(dataset, IterableDataset) else TrainingImages)(dataset, *rest)
