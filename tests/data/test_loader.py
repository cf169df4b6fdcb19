"""Workers change no number."""

from dataclasses import replace
from itertools import islice

import torch

from lpl.data.loader import training_batches
from lpl.data.order import KeyedBatches
from tests.data.test_dataset import RANDOM, images_of, static


def batches_of(images, order, workers=0):
    """The batches of a loader with so many workers."""
    return training_batches(replace(images, data=replace(images.data, dataloader_num_workers=workers)), order)


def test_loader_workers_change_nothing():
    images = images_of(*(static(seed=seed) for seed in range(5)), random_flip=True)
    order = KeyedBatches(5, 2, 0, 0, 1, 0)
    alone, helped = (list(islice(batches_of(images, order, workers), 6)) for workers in (0, 2))
    for a, b in zip(alone, helped):
        assert a["caption"] == b["caption"] and all(torch.equal(a[name], b[name]) for name in RANDOM)
