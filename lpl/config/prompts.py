"""Validation prompts: texts, or texts with what each is drawn with.

An *entry* is a text, or a mapping with the keys of :data:`KEYS`; what it leaves out is what the run draws with. In a
recipe it is a mapping, on the command line its JSON.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from lpl.config.flag import FINITE, NOT_NEGATIVE, POSITIVE, Range, at_most
from lpl.tools.words import close_match


Entry = str | dict[str, Any]

MOST_PROMPTS = 10_000
TEXT = "prompt"
NEGATIVE = "negative_prompt"
KEYS: dict[str, type] = {  # named as the arguments of diffusers' pipelines
    TEXT: str,
    NEGATIVE: str,
    "seed": int,
    "width": int,
    "height": int,
    "guidance_scale": float,
    "num_inference_steps": int,
}
RANGES: dict[str, Sequence[Range]] = {
    "seed": (NOT_NEGATIVE, at_most(2**32 - 1)),
    "width": (POSITIVE, at_most(2**16)),
    "height": (POSITIVE, at_most(2**16)),
    "guidance_scale": (FINITE,),
    "num_inference_steps": (POSITIVE,),
}


def prompt(word: str) -> Entry:
    """A word of the command line: a JSON object with a prompt is a mapping, all else a text.

    >>> prompt("a cat"), prompt('{"prompt": "a cat", "seed": 3}'), prompt('{"scene": "a cat"}')
    ('a cat', {'prompt': 'a cat', 'seed': 3}, '{"scene": "a cat"}')
    """
    try:
        found = json.loads(word) if word.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        found = None
    return entry_of(found) if isinstance(found, dict) and TEXT in found else word


def entry_of(found: Mapping[Any, Any]) -> dict[str, Any]:
    """A mapping of a file as an entry: without keys that have no value; a number for a prompt is a class."""
    kept = {key: value for key, value in found.items() if value is not None}
    text = kept.get(TEXT)
    return kept | ({TEXT: str(text)} if isinstance(text, int) and not isinstance(text, bool) else {})


def as_word(found: Mapping[Any, Any]) -> str:
    """A mapping of a recipe as a word of the command line.

    Raises:
        ValueError: if it has no prompt.
    """
    if TEXT not in found:
        raise ValueError(f"{reprlib.repr(dict(found))} has no {TEXT}; a mapping takes {', '.join(KEYS)}")
    return json.dumps(found, default=str)


def text_of(entry: Entry) -> str:
    return entry if isinstance(entry, str) else entry[TEXT]


def own_settings(entry: Entry) -> dict[str, Any]:
    """What an entry says besides its text."""
    return {} if isinstance(entry, str) else {name: value for name, value in entry.items() if name != TEXT}


def size_of(entry: Entry, size: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of an entry; a side that it leaves out is that of ``size``. None: it says nothing of them."""
    own = own_settings(entry)
    if "height" not in own and "width" not in own:
        return None
    return own.get("height", size[0]), own.get("width", size[1])


def check_entries(entries: Sequence[Entry]) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: with the prompt's number, what was given, and what is accepted.
    """
    if len(entries) > MOST_PROMPTS:
        raise ValueError(f"validation_prompts: there are {len(entries):,}; accepted are at most {MOST_PROMPTS:,}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, str):
            _check_entry(f"validation_prompts, prompt {number}", entry)


def _check_entry(where: str, entry: Mapping[str, Any]) -> None:
    if TEXT not in entry:
        raise ValueError(f"{where}: it has no {TEXT}; a mapping takes {', '.join(KEYS)}")
    for name, value in entry.items():
        if name not in KEYS:
            hint = close_match(str(name), KEYS) or f"; it takes {', '.join(KEYS)}"
            raise ValueError(f"{where}: there is no {reprlib.repr(name)}{hint}")
        kind = KEYS[name]
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            words = {str: "a text", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"{where}: {name} takes {words}, not {reprlib.repr(value)}")
        for accepts, words in RANGES.get(name, ()):
            if not accepts(value):
                raise ValueError(f"{where}: {name} {value}: it must be {words}")
