"""The parser of all command lines here, and the format of their help."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection
from typing import Any, NoReturn

from lpl.config.flag import boolean, number
from lpl.config.foreign import FOREIGN, OTHERS
from lpl.config.rules import argument, count_or_auto, schedule
from lpl.options import AUTO
from lpl.tools.words import close_match


NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    source = ""  # prefix of errors in words that are not from the command line

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter} | options)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own takes -1e-4 for a flag

    def add_title(self, title: str | None) -> argparse._ArgumentGroup:
        """Add a titled section of the help, for flags."""
        group = self.add_argument_group(title)
        group._negative_number_matcher = NEGATIVE_NUMBER
        return group

    @property
    def flags(self) -> list[argparse.Action]:
        return self._actions

    def error(self, message: str) -> NoReturn:
        unknown, _, words = message.partition("unrecognized arguments: ")
        if words and not unknown:
            word = words.split()[0].partition("=")[0]
            known = [action.dest for action in self._actions if action.dest not in FOREIGN]
            message += _of_others(word, known) or close_match(word, known, "--")
            if not word.startswith("-"):
                message += "; several words as one value need quotes"
        message = " ".join(message.split())  # one line
        self.exit(2, f"{self.prog}: error: {self.source}{message} (all flags: --help)\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # Python before 3.13 silently drops it
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]


def _of_others(word: str, known: Collection[str]) -> str:
    """What another trainer's flag is called here; empty for any other word."""
    name = word.lstrip("-").replace("-", "_")
    if name not in OTHERS or "max_train_steps" not in known:  # another command than the training
        return ""
    return f"; here: {OTHERS[name] or 'there is no such thing'} (docs/migrate.md)"


class HelpFormatter(argparse.MetavarTypeHelpFormatter):
    """Shows the type of each flag, and its default unless it is None or off."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        names = {None: "str", os.path.expanduser: "str", number: "int|float", count_or_auto: f"{AUTO}|int"}
        names |= {schedule: "str", argument: "NAME=VALUE"}
        return names.get(action.type) or getattr(action.type, "__name__", "str")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.nargs == 0 or default is None or action.dest in FOREIGN:
            return action.help
        words = " ".join(default) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {words.lower() if action.type is boolean else words})"
