"""How a run begins: what it finds out besides what was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator


@dataclass
class Run:
    """What a run finds out about itself, and where it stands.

    Args:
        seed: that its random numbers are keyed by.
        step: finished optimizer steps.
        folder: the output folder.
        mixed_precision: accelerate's.
        repository: full id on the Hub; None without ``--push_to_hub``.
        recipe: every flag, resolved.
    """

    accelerator: Accelerator
    seed: int
    step: int
    folder: Path
    mixed_precision: str
    repository: str | None
    recipe: dict[str, Any]
