"""The data loader: worker processes, pinned memory, and the watch over reads that do not finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Sampler

from lpl.data.dataset import Batch, TrainingImages, collate
from lpl.data.timeouts import Readings, watched
from lpl.tools.process import leave_signals_alone


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
    workers = images.data.dataloader_num_workers
    seconds = images.data.dataloader_timeout if workers else 0
    images = replace(images, readings=Readings(workers))
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=partial(collate, tokenize=tokenize),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        timeout=seconds,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_alone,
    )
    iterator = cast(Iterator[Batch], iter(loader))
    return watched(iterator, images.readings, seconds, images.name) if seconds else iterator
