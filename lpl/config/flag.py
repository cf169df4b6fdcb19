"""One declaration per flag: ``name: type = flag(default, help, ...)`` in a frozen dataclass, a group of flags.

The declaration also fixes the flag's range, whether a recipe records it, whether a resumed run may change it, and what
a recipe from the Hub may set it to.

The annotation gives the type. A ``bool`` with default False is a flag without a value; a ``bool`` with default
True takes true or false; ``tuple[T, ...]`` takes several values; None means "not given".
"""

from __future__ import annotations

import argparse
import math
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints


Group = TypeVar("Group")
Values = Mapping[str, Any]  # by flag name


class Range(NamedTuple):
    """The numbers that a flag accepts, and their description in messages."""

    accepts: Callable[[Any], bool]
    words: str


POSITIVE = Range(lambda value: 0 < value < math.inf, "more than 0")
FINITE = Range(math.isfinite, "finite")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "0 or more")
SHARE = Range(lambda value: 0 <= value <= 1, "between 0 and 1")
POSITIVE_SHARE = Range(lambda value: 0 < value <= 1, "more than 0 and at most 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "0 or more and less than 1")
STEPS_OR_SHARE = Range(lambda value: value < 1 or value == int(value), "a whole number, or a share below 1")
TWO_OR_MORE = Range(lambda value: value >= 2, "2 or more")


def at_most(most: int) -> Range:
    return Range(lambda value: value <= most, f"at most {most:,}")


class OnResume(Enum):
    """What happens if a resumed run changes the flag."""

    WARNED = auto()
    REFUSED = auto()  # the checkpoint does not fit the new value
    SILENT = auto()  # the training does not depend on it
    LENGTH = auto()  # warned of only if the learning rate schedule depends on the length


REFUSED, SILENT, LENGTH = OnResume.REFUSED, OnResume.SILENT, OnResume.LENGTH

AS_TRAINED = object()  # held_out: the held-out losses use the run's own value


@dataclass(frozen=True)
class Flag:
    """A flag's declaration besides its name, type and default.

    Args:
        help: the help text, one line that can be read alone.
        choices: accepted values.
        ranges: ranges of accepted numbers; a number must lie in all of them.
        on_resume: see :class:`OnResume`.
        own: the flag concerns the machine and its user, not the training; a recipe from the Hub cannot set it.
        public: called with the value and all values; returns whether the value means the same on every machine.
            None: every value does.
        path: the value may be a local path, in which ``~`` stands for the home folder.
        in_recipe: whether ``recipe.yaml`` records the flag.
        held_out: value for the held-out losses.
        training_only: a promise that the held-out losses do not read this LPL flag; a run warns of it accordingly. A
            flag that they read has ``held_out`` instead.
        same_loss: an LPL flag that does not change the loss function.
        used: called with the configuration; returns whether the flag has an effect. A run warns of a given flag that
            has none.
        words: converts the given words to the value.
        word: converts the one given word to the value.
        code: a value with a colon is the path of code, which a recipe from the Hub cannot name.
        former_default: default of earlier versions, which their recipes record; there it counts as not given.
    """

    help: str
    choices: tuple[Any, ...] | None = None
    ranges: tuple[Range, ...] = ()
    on_resume: OnResume = OnResume.WARNED
    own: bool = False
    public: Callable[[Any, Values], bool] | None = None
    path: bool = False
    in_recipe: bool = True
    held_out: Any = AS_TRAINED
    training_only: bool = False
    same_loss: bool = False
    used: Callable[[Values], bool] | None = None
    words: Callable[[str | Sequence[str]], Any] | None = None
    word: Callable[[str], Any] | None = None
    code: bool = False
    former_default: Any = None

    def check(self, name: str, value: Any) -> None:
        """Refuse a number out of range.

        Raises:
            ValueError: with the flag, its value, and what is accepted.
        """
        for accepts, words in self.ranges:
            if value is not None and not accepts(value):
                finite = "" if math.isfinite(value) or words == FINITE.words else "a finite number, "
                raise ValueError(f"--{name} {value}: it must be {finite}{words}")


def flag(default: Any, help: str, *, range: Range | Sequence[Range] = (), **rules: Any) -> Any:
    """Declare a flag; ``rules`` are the arguments of :class:`Flag`."""
    ranges = (range,) if isinstance(range, Range) else tuple(range)
    return field(default=default, metadata={"flag": Flag(help, ranges=ranges, **rules)})


silent_flag = partial(flag, on_resume=SILENT)
own_flag = partial(flag, on_resume=SILENT, own=True)


def kind_of(group: type, name: str) -> Any:
    """The type of a flag's value, or of each of its values."""
    return _kind(get_type_hints(group)[name])[0]


def flags_of(group: type) -> dict[str, Flag]:
    """The flags of a group by name."""
    return {item.name: item.metadata["flag"] for item in fields(group) if "flag" in item.metadata}


def boolean(word: str) -> bool:
    """``true`` or ``false``."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r}: accepted are true and false")
    return word.lower() == "true"


def number(word: str) -> int | float:
    """A whole number as an int, another one as a float."""
    try:
        return int(word)
    except ValueError:
        return float(word)


KINDS = {str: None, bool: boolean, int | float: number}  # types of values -> argparse's; others convert themselves


# The bridge to argparse ----------------------------------------------------------------------------------------------


def add_group(parser: argparse.ArgumentParser | Any, group: type, names: Collection[str] | None = None) -> None:
    """Add the flags of a group to a parser.

    Args:
        names: the flags to add; None: all.
    """
    for item, options in _options(group):
        if names is None or item.name in names:
            parser.add_argument(f"--{item.name}", **options)


def built(group: type[Group], values: Values) -> Group:
    """Build a group from parsed values; flags without a value keep their defaults.

    Raises:
        ValueError: if words cannot be converted to a value.
    """
    taken = {name: values[name] for name in flags_of(group) if name in values}  # type: ignore[arg-type]
    for name, value in taken.items():
        words = flags_of(group)[name].words
        taken[name] = words(value) if words else tuple(value) if isinstance(value, list) else value
    return group(**taken)


def _options(group: type) -> Iterator[tuple[Field, dict[str, Any]]]:
    """Each flag with its arguments for ``add_argument``."""
    hints = get_type_hints(group)
    for item in (item for item in fields(group) if "flag" in item.metadata):
        declared: Flag = item.metadata["flag"]
        kind, several = _kind(hints[item.name])
        several = several or declared.words is not None
        if kind is bool and item.default is False:
            yield item, {"action": "store_true", "help": declared.help}
            continue
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        options: dict[str, Any] = {"default": default, "help": declared.help, "choices": declared.choices}
        options["type"] = declared.word or (os.path.expanduser if declared.path else KINDS.get(kind, kind))
        if several:
            options["nargs"] = "+"
        if default is MISSING:
            options |= {"required": True, "default": None}
        yield item, options


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type without "| None", and whether the flag takes several values.

    >>> _kind(int | None), _kind(tuple[str, ...])
    ((<class 'int'>, False), (<class 'str'>, True))
    """
    if isinstance(hint, types.UnionType) and hint != int | float:
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)
