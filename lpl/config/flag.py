"""One declaration per flag: ``name: type = flag(default, help, ...)`` in a frozen dataclass, a group of flags.

Everything else that is known of a flag follows from its declaration: its place on the command line, its range, whether
a recipe records it, whether a resumed run may change it, what a recipe from the Hub may set it to.

The annotation gives the type. ``bool`` that defaults to False is a flag without a value; ``bool`` that defaults to
True takes true or false; ``tuple[T, ...]`` takes several values; None means "not given".
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum, auto
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints


Group = TypeVar("Group")
Values = Mapping[str, Any]  # by the flag's name


class Range(NamedTuple):
    """The numbers that a flag accepts, and how that is said."""

    accepts: Callable[[Any], bool]
    words: str


POSITIVE = Range(lambda value: 0 < value < math.inf, "more than 0")
FINITE = Range(math.isfinite, "finite")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "0 or more")
SHARE = Range(lambda value: 0 <= value <= 1, "between 0 and 1")
POSITIVE_SHARE = Range(lambda value: 0 < value <= 1, "more than 0 and at most 1")
BELOW_ONE = Range(lambda value: 0 <= value < 1, "0 or more and less than 1")
TWO_OR_MORE = Range(lambda value: value >= 2, "2 or more")


def at_most(most: int) -> Range:
    return Range(lambda value: value <= most, f"at most {most:,}")


class OnResume(Enum):
    """What happens where the command that resumes a run changes a flag."""

    WARNED = auto()
    REFUSED = auto()  # the checkpoint is of something else
    SILENT = auto()  # no number of the training depends on it
    LENGTH = auto()  # silent where the learning-rate schedule has no end, else warned of


AS_TRAINED = object()  # held_out: the held-out losses are computed under the run's own value


@dataclass(frozen=True)
class Flag:
    """What is known of a flag besides its name, type and default.

    Args:
        help: one line.
        choices: accepted words.
        ranges: all have to accept a number.
        on_resume: see :class:`OnResume`.
        own: of a machine and its user, not of the training's numbers; a stranger's recipe cannot set it.
        public: whether a value means the same to everybody, given the value and those of all flags; None: any does.
        path: a folder or file is looked for there.
        in_recipe: whether ``recipe.yaml`` records it.
        held_out: its value where the held-out losses are computed.
        training_only: an option of LPL that the held-out losses do not depend on.
        same_loss: an option of LPL that does not make another loss.
        used: whether it has an effect in a run, given all flags; where it is given and has none, the run warns.
        words: turns the words given into the value.
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
    used: Callable[[Any], bool] | None = None
    words: Callable[[str | Sequence[str]], Any] | None = None

    def check(self, name: str, value: Any) -> None:
        """Refuse a number that is out of range.

        Raises:
            ValueError: with the flag, its value, and what is accepted.
        """
        for accepts, words in self.ranges:
            if value is not None and not accepts(value):
                finite = "" if math.isfinite(value) or words == FINITE.words else "a finite number, "
                raise ValueError(f"--{name} {value}: it must be {finite}{words}")


def flag(default: Any, help: str, *, range: Range | Sequence[Range] = (), **rules: Any) -> Any:
    """The statement that declares a flag; for ``rules`` see :class:`Flag`."""
    ranges = (range,) if isinstance(range, Range) else tuple(range)
    return field(default=default, metadata={"flag": Flag(help, ranges=ranges, **rules)})


def flags_of(group: type) -> dict[str, Flag]:
    """The flags that a group declares, by name."""
    return {item.name: item.metadata["flag"] for item in fields(group)}


def boolean(word: str) -> bool:
    """``true`` or ``false``."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r}: accepted are true and false")
    return word.lower() == "true"


# The bridge to argparse ----------------------------------------------------------------------------------------------


def add_group(parser: argparse.ArgumentParser | Any, group: type, names: Collection[str] | None = None) -> None:
    """Give a parser the flags that a group declares.

    Args:
        names: those that are added; None: all.
    """
    for item, options in _options(group):
        if names is None or item.name in names:
            parser.add_argument(f"--{item.name}", **options)


def built(group: type[Group], values: Values) -> Group:
    """The group with those of the parsed values that are its own; the others are at their defaults.

    Raises:
        ValueError: where words have no meaning as a value.
    """
    taken = {name: values[name] for name in flags_of(group) if name in values}  # type: ignore[arg-type]
    for name, value in taken.items():
        words = flags_of(group)[name].words
        taken[name] = words(value) if words else tuple(value) if isinstance(value, list) else value
    return group(**taken)


def _options(group: type) -> Iterator[tuple[Field, dict[str, Any]]]:
    """Each flag with the arguments of ``add_argument``."""
    hints = get_type_hints(group)
    for item in fields(group):
        declared: Flag = item.metadata["flag"]
        kind, several = _kind(hints[item.name])
        several = several or declared.words is not None
        if kind is bool and item.default is False:
            yield item, {"action": "store_true", "help": declared.help}
            continue
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        options: dict[str, Any] = {"default": default, "help": declared.help, "choices": declared.choices}
        options["type"] = boolean if kind is bool else None if kind is str else kind
        if several:
            options["nargs"] = "+"
        if default is MISSING:
            options |= {"required": True, "default": None}
        yield item, options


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of a value without "| None", and whether there are several.

    >>> _kind(int | None), _kind(tuple[str, ...])
    ((<class 'int'>, False), (<class 'str'>, True))
    """
    if isinstance(hint, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not types.NoneType)
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)
