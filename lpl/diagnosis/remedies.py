"""TODO: what is here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lpl.config.config import FLAGS
from lpl.config.groups import REFUSED
from lpl.tools.words import size


BYTES_4BIT = 0.5 + 4 / 64  # a weight, and its part of the scale that 64 of them share
NOTICED = 0.001  # share of the trained models' bytes below which flags save nothing worth a word


@dataclass(frozen=True)
class Remedy:
    """Flags that need less memory.

    Args:
        saves: what they save, and what that costs, in words.
        saved: bytes, as far as they are known.
    """

    flags: str
    saves: str
    saved: int | None = None

    @property
    def anew(self) -> bool:
        """Whether no checkpoint can go on under them."""
        return any(name in FLAGS and FLAGS[name].on_resume is REFUSED for name in re.findall(r"--(\w+)", self.flags))

    def __str__(self) -> str:
        return self.saves if self.saved is None else f"about {size(self.saved)} of {self.saves}"
