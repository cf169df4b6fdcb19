"""The configuration of a run: every flag declared once, typed and frozen; recipes; checks between flags.

``groups/`` declares the flags, ``command_line.py`` parses the command line and a recipe into a :class:`Config`,
``checks.py``, ``data_checks.py`` and ``place_checks.py`` refuse invalid combinations. Nothing here knows images,
models or metrics, and nothing imports torch, so a wrong flag is refused at once. May import: ``lpl.options``,
``lpl.tools``. A new flag is one statement in ``groups/``. Tests: ``tests/config``.
"""

from lpl.config.config import Config, held_out


__all__ = ["Config", "held_out"]
