"""Samples that cannot be read: counted, listed with the reason, and limited.

A *bad sample* is a row of the data set whose image or caption cannot be read. The next row replaces it
(:meth:`lpl.data.dataset.TrainingImages.readable`), the same one in every epoch and process. ``bad_samples.jsonl`` has
one line for each, ``{"image": place in the data set, "file": its name if known, "reason": ...}``, written at logging
steps. A resumed run continues the list.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from lpl.config.data_checks import parse_limit
from lpl.data.dataset import TrainingImages
from lpl.tools.files import entries, lines, write_text
from lpl.tools.layout import BAD_SAMPLES
from lpl.tools.words import counted


logger = logging.getLogger(__name__)


class BadSamples:
    """The bad samples of a run, over all its processes.

    Args:
        folder: the run's output folder.
        limit: --max_bad_samples: a number of samples, a share of the data set if below 1, or None.
        resumed: whether the list in the folder belongs to this run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: TrainingImages,
        folder: str | PathLike[str],
        limit: str | None = None,
        resumed: bool = False,
    ) -> None:
        self.accelerator, self.images = accelerator, images
        self.path = Path(folder, BAD_SAMPLES)
        share = parse_limit(limit)
        self.limit = share if share is None or share >= 1 else share * (images.rows or 0)
        if accelerator.is_main_process:
            if resumed and self.path.is_file():
                write_text(self.path, lines(entries(self.path)))  # without a line that a crash cut short
            else:
                self.path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        self._known = self._still_there({entry["image"]: entry["file"] for entry in entries(self.path)})
        self._new: dict[int, str] = {}

    def _still_there(self, listed: Mapping[int, str | None]) -> set[int]:
        """Without the places that hold another file since the data has changed."""
        if self.images.rows is None:
            return set(listed)
        names = self.images.file_names([place for place in listed if place < self.images.rows])
        return {place for place, name in names.items() if name == listed[place]}

    def observe(self, step: int, batch: Mapping[str, Any], *_: Any) -> None:
        """Record the bad samples of a micro-batch."""
        self.add(batch["bad"])

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Adds the bad samples of a batch: places in the data set, and reasons."""
        self._new |= {index: reason for index, reason in found if index not in self._known}

    def write(self) -> str | None:
        """Lists new bad samples. Every process must call this at the same steps.

        Returns:
            why the run must end, if there are more than the limit; the same in every process.
        """
        gathered = gather_object([self._new])
        new = {index: reason for part in gathered for index, reason in part.items() if index not in self._known}
        self._new = {}
        if not new:
            return None
        self._known |= new.keys()
        if self.accelerator.is_main_process:
            names = self.images.file_names(sorted(new))
            listed = [{"image": index, "file": names[index], "reason": new[index]} for index in sorted(new)]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines(listed))
            first = listed[0]
            logger.warning(
                f"--max_bad_samples: {self._count()} could not be read so far and had to be replaced, such as "
                f"{first['file'] or first['image']} ({first['reason']}); {self.path} lists them"
            )
        if self.limit is None or len(self._known) <= self.limit:
            return None
        return (
            f"--max_bad_samples: {self._count()} cannot be read; {self.path} "
            "lists them with their reasons; repair or remove them, or raise the limit"
        )

    def _count(self) -> str:
        if self.images.rows is None:
            return counted(len(self._known), "sample")
        return f"{len(self._known)} of {counted(self.images.rows, 'sample')}"
