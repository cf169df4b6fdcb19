"""What was asked for: every flag declared once, typed and frozen; recipes; what two flags say against each other.

``groups.py`` declares the flags, ``command_line.py`` reads words and recipes into a :class:`Config`, ``checks.py``
refuses what cannot be meant. Nothing here knows images, models or metrics, and nothing imports torch: a wrong flag is
answered at once. May import: ``lpl.options``, ``lpl.tools``. A new flag is one statement in ``groups.py``.
Tests: ``tests/config``.
"""

from lpl.config.config import Config, held_out


__all__ = ["Config", "held_out"]
