"""TODO: what is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from lpl.data.dataset import Batch, TrainingImages, collate
from lpl.data.order import KeyedBatches
from lpl.data.timeouts import Readings, watched
from lpl.tools.process import leave_signals_alone


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
