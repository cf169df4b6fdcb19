"""The order of samples: every image once per epoch, the same over one process or several, and after a resume."""

from itertools import islice

import numpy as np
import pytest
import torch

from lpl.data.order import KeyedBatches, keyed_generator


def batches(length=10, batch_size=3, seed=0, process=0, processes=1, first=0, count=10):
    return list(islice(KeyedBatches(length, batch_size, seed, process, processes, first), count))


def test_each_epoch_visits_every_image_once_in_its_own_order():
    keys = [key for batch in batches() for key in batch]  # 30 of them: three epochs, batches span two
    orders = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)
    assert orders[0] != [index for _, index in sum(batches(seed=1, count=4), [])][:10]


def test_two_processes_together_follow_the_order_of_one():
    alone = batches(count=12)
    first, second = (batches(process=process, processes=2, count=6) for process in range(2))
    assert [batch for pair in zip(first, second) for batch in pair] == alone
    twice = batches(batch_size=6, count=6)
    assert [a + b for a, b in zip(first, second)] == twice


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_order_goes_on_where_it_stood(processes):
    whole = batches(process=processes - 1, processes=processes, count=9)
    assert batches(process=processes - 1, processes=processes, first=4, count=5) == whole[4:]


def test_a_batch_larger_than_the_data_set_spans_epochs():
    (keys,) = batches(length=2, batch_size=5, count=1)
    assert sorted(keys[:2]) == [(0, 0), (0, 1)] and sorted(keys[2:4]) == [(1, 0), (1, 1)] and keys[4][0] == 2


def test_keys_give_different_generators():
    keys = [(0, 1), (1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 2), (2**31, 1, 1, 2)]
    draws = [torch.rand((), generator=keyed_generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)


@pytest.mark.parametrize("key", [(0,), (7, 3, 2**31, 1), (2**32 - 1, 5), (2**32, 5), (2**70, 0, 1)])
def test_generators_are_those_of_numpys_seed_sequence(key):
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    assert keyed_generator(*key).initial_seed() == int(state[0]) >> 1
