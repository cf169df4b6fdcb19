"""Workers change no number, and tokenise the captions."""

import os
from dataclasses import replace
from itertools import islice

import pytest
import torch

from lpl.data.loader import PROCESSES_HERE, training_batches, worker_count
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


def test_captions_are_tokenised_in_the_loader():
    images = images_of(*(static(seed=seed) for seed in range(5)), random_flip=True)
    order = KeyedBatches(5, 2, 0, 0, 1, 0)
    images = replace(images, data=replace(images.data, dataloader_num_workers=1))
    for batch in islice(training_batches(images, order, place_and_length), 3):
        process, lengths = batch["tokens"]
        assert process != os.getpid() and lengths == [len(caption) for caption in batch["caption"]]


@pytest.mark.parametrize(
    "cores, environment, method, workers",
    [
        (1, {}, "fork", 0),
        (2, {}, "fork", 1),
        (64, {}, "fork", 8),
        (64, {}, "spawn", 0),
        (16, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "16"}, "fork", 3),
        (4, {"LOCAL_WORLD_SIZE": "8"}, "fork", 0),
        (8, {"WORLD_SIZE": "2"}, "fork", 3),  # started by hand
    ],
)
def test_workers_by_default(cores, environment, method, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: method)
    for name in PROCESSES_HERE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    data = images_of(static()).data
    assert worker_count(replace(data, dataloader_num_workers=None)) == workers
    assert worker_count(replace(data, dataloader_num_workers=5)) == 5


def place_and_length(captions):
    return os.getpid(), [len(caption) for caption in captions]
