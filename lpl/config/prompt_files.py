"""Reads validation prompts from a file.

- ``.txt``: a prompt a line; blank lines and those that begin with # are left out. A line may end in the options of
  kohya's sd-scripts, ``a cat --n blurry --w 512 --h 768 --d 7 --l 5 --s 30``.
- ``.jsonl``: a text or a mapping a line, see :data:`lpl.config.prompts.KEYS`.
- ``.yaml``, ``.json``: a list of them.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lpl.config.prompts import NEGATIVE, TEXT, Entry, entry_of
from lpl.config.recipes import LARGEST_RECIPE, RecipeLoader
from lpl.tools.words import decoded


OPTION = re.compile(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)")
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {  # of sd-scripts
    "n": (NEGATIVE, str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
    "g": ("guidance_scale", float),  # that of Flux
}
WORDS = "--n NEGATIVE, --w WIDTH, --h HEIGHT, --d SEED, --s STEPS, --l SCALE and --g SCALE"


def read_prompts(path: str) -> tuple[Entry, ...]:
    """The prompts of --validation_prompts_file.

    Raises:
        ValueError: if it cannot be read, has none, or has a line that is none.
    """
    readers = {".txt": _lines, ".jsonl": _json_lines, ".yaml": _list, ".yml": _list, ".json": _json}
    what, reader = f"--validation_prompts_file {path}", readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{what}: accepted are files whose names end in {', '.join(readers)}")
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        if len(content) > LARGEST_RECIPE:
            raise ValueError(f"it has more than {LARGEST_RECIPE:,} bytes")
        found = tuple(reader(decoded(content)))
    except OSError as error:
        raise ValueError(f"{what}: it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from error
    if not found:
        raise ValueError(f"{what}: there is no prompt in it")
    return found


def _lines(content: str) -> list[Entry]:
    entries: list[Entry] = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            entries.append(_with_options(line.strip(), f"line {number}: "))
    return entries


def _with_options(line: str, where: str) -> Entry:
    """A line with the options of sd-scripts.

    >>> _with_options("a cat --n blurry, dark --d 7 --l 5", "")
    {'prompt': 'a cat', 'negative_prompt': 'blurry, dark', 'seed': 7, 'guidance_scale': 5.0}
    """
    marks = list(OPTION.finditer(line))
    if not marks:
        return line
    entry: dict[str, Any] = {TEXT: line[: marks[0].start()].strip()}
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(line)], strict=True):
        word, option = line[mark.end() : end].strip(), mark[1].lower()
        if option not in OPTIONS:
            raise ValueError(f"{where}there is no --{mark[1]}; accepted are {WORDS}")
        name, kind = OPTIONS[option]
        if name in entry:
            raise ValueError(f"{where}--{mark[1]} gives {name} twice; leave one of them out")
        try:
            entry[name] = kind(word)
        except ValueError:
            raise ValueError(f"{where}--{mark[1]} takes a number, not {reprlib.repr(word)}") from None
    return entry


def _json_lines(content: str) -> list[Entry]:
    entries: list[Entry] = []
    for number, line in enumerate(content.split("\n"), 1):  # texts may have other ends of lines
        if line.strip():
            try:
                entries.append(_entry(json.loads(line), f"line {number}"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON ({error})") from None
    return entries


def _list(content: str) -> list[Entry]:
    try:
        return _entries(yaml.load(content, RecipeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _json(content: str) -> list[Entry]:
    try:
        return _entries(json.loads(content))
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _entries(found: Any) -> list[Entry]:
    if not isinstance(found, list):
        raise ValueError("it must be a list of prompts: texts, or mappings with a prompt")
    return [_entry(item, f"prompt {number}") for number, item in enumerate(found, 1)]


def _entry(found: Any, where: str) -> Entry:
    if isinstance(found, dict):
        return entry_of(found)
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError(f"{where} is {reprlib.repr(found)}; a prompt is a text, or a mapping with a prompt")
    return str(found)
