"""The data loader: worker processes, pinned memory, and the watch over reads that do not finish."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch.utils.data import DataLoader, Dataset, Sampler

from lpl.config.groups import Data
from lpl.data.dataset import Batch, TrainingImages, collate
from lpl.data.timeouts import Readings, watched
from lpl.tools.process import leave_signals_alone


# The launchers' names for the number of a run's processes on this machine, or else of all of them
PROCESSES_HERE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
MOST_WORKERS = 8  # of a process, unless the flag says more


def worker_count(data: Data) -> int:
    """--dataloader_num_workers; by default the cores that this process may use and does not need itself.

    Where processes do not start by forking, the default is 0: each worker would import all libraries, and get a copy
    of the data set, before the first step.
    """
    if data.dataloader_num_workers is not None:
        return data.dataloader_num_workers
    if multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores // get_int_from_env(PROCESSES_HERE, 1) - 1))


def training_batches(
    images: TrainingImages,
    batches: Sampler[list],
    tokenize: Callable[..., dict[str, Any]] | None = None,
) -> Iterator[Batch]:
    """Yields endless batches on the CPU, in pinned memory if there is a GPU.

    Args:
        batches: the order, from :meth:`TrainingImages.batches`.
        tokenize: makes the ``tokens`` of a batch of its captions, in the worker processes.

    Raises:
        HungLoader: from the iterator, if a worker cannot be interrupted while it reads a file.
    """
    return watched_loader(
        images,
        lambda images: images,
        batch_sampler=batches,
        collate_fn=partial(collate, tokenize=tokenize),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=worker_count(images.data) > 0,
    )


def watched_loader(
    images: TrainingImages, dataset_of: Callable[[TrainingImages], Dataset], **options: Any
) -> Iterator[Any]:
    """Yields from a loader whose workers record what they read.

    Args:
        dataset_of: returns the loader's data set, given the images that record their reads.
        options: further arguments of the loader.

    Raises:
        HungLoader: from the iterator, if a worker cannot be interrupted while it reads a file.
    """
    workers = worker_count(images.data)
    seconds = images.data.dataloader_timeout if workers else 0
    images = replace(images, readings=Readings(workers))
    loader = DataLoader(
        dataset_of(images), num_workers=workers, timeout=seconds, worker_init_fn=leave_signals_alone, **options
    )
    iterator = iter(loader)
    return watched(iterator, images.readings, seconds, images.name) if seconds else iterator
