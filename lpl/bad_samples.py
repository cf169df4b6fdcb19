"""Samples that cannot be trained on: counted, listed with the reason, and limited.

A *bad sample* is a row of the data set whose image or caption cannot be read; the next row takes its place
(:meth:`lpl.data.TrainingImages.readable`), in every epoch and every process the same one. ``bad_samples.jsonl`` has
a line for each, ``{"image": place in the data set, "file": its name where it has one, "reason": ...}``, written at
logging steps; a resumed run goes on with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from lpl.data import TrainingImages
from lpl.files import entries, lines, write_text


logger = logging.getLogger(__name__)


def parse_limit(text: str | None) -> float | None:
    """``"20"`` -> 20 samples, ``"0.01"`` -> 0.01, a share of the data set; None -> no limit.

    Raises:
        ValueError: for anything else.

    >>> parse_limit("20"), parse_limit("0.01"), parse_limit("0")
    (20.0, 0.01, 0.0)
    """
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 or (value >= 1 and value.is_integer())):
        raise ValueError(f"--max_bad_samples {text}: accepted are a number of samples, such as 20, or a share below 1")
    return value


class BadSamples:
    """Those of a run, over all its processes.

    Args:
        limit: --max_bad_samples: a number of samples, a share of the data set if it is below 1, or None.
        resumed: whether the list in the folder is this run's.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        images: TrainingImages,
        folder: str,
        limit: str | None = None,
        resumed: bool = False,
    ) -> None:
        self.accelerator, self.images = accelerator, images
        self.path = Path(folder, "bad_samples.jsonl")
        share = parse_limit(limit)
        self.limit = share if share is None or share >= 1 else share * (images.length or 0)
        if accelerator.is_main_process:
            if resumed and self.path.is_file():
                write_text(self.path, lines(entries(self.path)))  # without a line that a crash cut short
            else:
                self.path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        self._known = {entry["image"] for entry in entries(self.path)}
        self._new: dict[int, str] = {}

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """What a batch had to do without: places in the data set, and reasons."""
        self._new |= {index: reason for index, reason in found if index not in self._known}

    def write(self) -> str | None:
        """List what is new; called by every process at the same steps.

        Returns:
            Why the run has to end, where there are more than the limit; the same in every process.
        """
        gathered = gather_object([self._new]) if self.accelerator.num_processes > 1 else [self._new]
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
            logger.warning(
                "%s cannot be used so far, others take their place; %s lists them", *(self._count(), self.path)
            )
        if self.limit is None or len(self._known) <= self.limit:
            return None
        return (
            f"--max_bad_samples: {self._count()} cannot be used; {self.path} "
            "lists them with their reasons; repair or remove them, or raise the limit"
        )

    def _count(self) -> str:
        total = "" if self.images.length is None else f" of {self.images.length}"
        return f"{len(self._known)}{total} samples"
