"""Random generators keyed by what they are for, and the order of samples.

The order is one endless sequence: epoch after epoch, each a permutation keyed by (seed, epoch). A run's place in it is
one number, the count of batches behind it. Batches are always full and may span two epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler


class Stream(IntEnum):
    """The purpose of a generator. Each purpose has its own, so that a new draw for one leaves the others unchanged."""

    ORDER = 0
    AUGMENTATION = 1
    TIMESTEP = 2
    NOISE = 3
    LPL = 4
    CAPTION = 5
    TEXT_ENCODERS = 6
    BUCKET = 7


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator that depends on seed and key only."""
    words: Any = (seed, *key)
    if max(words) < 2**32:
        words = np.array(words, np.uint32)  # the same to numpy, which takes longer to see it
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class KeyedBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index) for one process.

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
        """What a resumed run needs besides the number of batches: nothing."""
        return []
