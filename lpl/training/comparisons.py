"""Grids that compare states of a model: a column for each, a row for each validation prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from lpl.data.fingerprint import spaced
from lpl.tools.pictures import SMALLEST_TILE, labelled_grid
from lpl.tools.words import distinct


MOST_COLUMNS, MOST_ROWS = 12, 100
MOST_PIXELS = 64_000_000  # of all tiles

logger = logging.getLogger(__name__)


def compared(columns: Mapping[str, Sequence[Image.Image]], names: Sequence[str]) -> Image.Image:
    """The grid.

    Args:
        columns: by heading, the images of all prompts.
        names: of the prompts; the grid has the first MOST_ROWS of them.
    """
    if len(names) > MOST_ROWS:
        logger.info(f"a grid that compares has the first {MOST_ROWS} of {len(names):,} samples")
    labels = distinct(names[:MOST_ROWS])
    rows = {label: [column[number] for column in columns.values()] for number, label in enumerate(labels)}
    room = int(math.sqrt(MOST_PIXELS / (len(columns) * len(rows))))
    longest = max(max(image.size) for row in rows.values() for image in row)
    return labelled_grid(rows, list(columns), None if longest <= room else max(room, SMALLEST_TILE))


def evenly(steps: Sequence[int]) -> list[int]:
    """At most MOST_COLUMNS of them, with the first and the last."""
    return [steps[place] for place in spaced(len(steps), MOST_COLUMNS)]
