"""Recipes: YAML files that map flags to values; ``measured`` records what a run has measured.

:func:`read_recipe` reads a file, or the ``recipe.yaml`` of a Hub repository. A file is trusted like the command line.
A recipe from the Hub is untrusted and sets only what the training computes:

- Flags of the machine and its user (``own`` in the declaration) are ignored: output folders, publishing, logging,
  evaluation.
- Models and data sets must be on the Hub (:func:`is_public`), since a local path would name other files here.
- Code (PACKAGE.MODULE:FUNCTION), YAML tags and YAML references are refused.

It can still make a run long, large or bad. Flags on the command line override it, and are not checked in the recipe.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lpl.config import data_sets, prompts
from lpl.config.config import FLAGS
from lpl.config.parser import Parser
from lpl.config.rules import argument, hub_source, is_path
from lpl.tools.words import close_match, warn


LARGEST_RECIPE = 1_000_000  # bytes
SHIPPED = Path("examples", "recipes")  # of a clone
MEASURED = "measured"  # the key of a recipe that is not a flag


class Recipe(NamedTuple):
    """The content of a recipe."""

    values: dict[str, Any]  # by flag, in the flags' types; only flags that the recipe gives
    measured: dict[str, Any]  # what the original run measured; untrusted if the recipe is from the Hub


def read_recipe(
    parser: Parser,
    source: str,
    without: Sequence[str] = (),
    typed: Collection[str] = (),
    *,
    strict: bool = True,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Recipe:
    """Read a recipe from a file, or from a Hub repository ``user/repo`` or ``user/repo@revision``.

    Values of null or false mean the default.

    Args:
        without: flags to leave out.
        typed: flags of the command line, which a recipe from the Hub cannot change.
        strict: refuse unknown flags, which another version may have written.
        token: for the Hub; None: the token of the login.
        cache_dir: folder for the download; None: the default cache.

    Raises:
        ValueError: if it is not a recipe, or has an unknown flag or a value that is invalid or not allowed.
    """
    repository = hub_source(source)
    try:
        entries = _entries_on_the_hub(*repository, token, cache_dir) if repository else read_entries(source)
    except (OSError, ValueError) as error:
        there = sorted(file.name for file in Path(source).parent.glob("[!.]*.yaml")) if not repository else []
        beside = f"; beside it are {', '.join(there)}" if there and isinstance(error, FileNotFoundError) else ""
        if (named := Path(SHIPPED, f"{source}.yaml")).is_file() and not repository:
            beside = f"; did you mean {named}?"
        why = error if repository else f"it cannot be read ({error}){beside}{_if_of_others(source)}"
        raise ValueError(f"--config {source}: {why}") from error
    measured = take_measured(entries)
    values = _values(parser, source, entries, without, strict)
    if repository:
        values = _entrusted(parser, source, values, typed)
    return Recipe(values, measured)


def _entries_on_the_hub(
    repository: str, revision: str | None, token: str | None, cache_dir: str | None
) -> dict[Any, Any]:
    from lpl.config.hub_recipes import downloaded, reading  # imported only if needed: it is slow

    with reading(repository, revision):
        return read_entries(downloaded(repository, revision, token, cache_dir, LARGEST_RECIPE))


# Files ---------------------------------------------------------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """Plain YAML without references, since a small file of nested ones could fill the memory, and without repeated
    keys, of which YAML would take the last."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a reference (*name); write the value out instead")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        times = Counter(str(key.value) for key, _ in node.value)
        if twice := [key for key, number in times.items() if number > 1]:
            raise yaml.YAMLError(f"it has {twice[0]} twice; leave one of them out")
        return super().construct_mapping(node, deep)


def _if_of_others(source: str, names: Collection[Any] = ()) -> str:
    """What to do with the configuration of another trainer: TOML, JSON, or ai-toolkit's YAML."""
    found = Path(source).suffix.lower() in (".toml", ".json") or "job" in names
    return "; files of other trainers are not read: docs/data-from-others.md says what to write instead" * found


def read_entries(path: str | Path) -> dict[Any, Any]:
    """Read a recipe's entries as plain YAML, without tags.

    Raises:
        OSError, ValueError: if it cannot be read, or is not a recipe.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_RECIPE + 1)
    if len(content) > LARGEST_RECIPE:
        raise ValueError(f"it has more than {LARGEST_RECIPE:,} bytes")
    try:
        entries = yaml.load(content, RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(entries, dict):
        raise ValueError("it must map flags to values, a line each, such as learning_rate: 1.0e-5")
    return entries


def take_measured(entries: dict[Any, Any]) -> dict[Any, Any]:
    """Remove ``measured`` from a recipe's entries, and return it."""
    measured = entries.pop(MEASURED, None)
    return measured if isinstance(measured, dict) else {}


def recipe_text(values: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """The text of a recipe file: the flags by name, then ``measured``."""
    flags = dict(sorted(values.items(), key=lambda entry: str(entry[0])))
    return yaml.safe_dump(
        flags | ({MEASURED: dict(measured)} if measured else {}), sort_keys=False, allow_unicode=True
    )


# Values --------------------------------------------------------------------------------------------------------------


def _values(
    parser: Parser, source: str, entries: Mapping[Any, Any], without: Sequence[str], strict: bool
) -> dict[str, Any]:
    flags = {action.dest: action for action in parser.flags if action.dest not in ("help", "config", "without")}
    for name in without:
        if name not in entries:
            raise ValueError(f"--without {name}: the recipe has no such flag{close_match(name, entries)}")
    values = {}
    for name, value in entries.items():
        if name in without or str(name).removesuffix("_args") in without:  # arguments go with their class
            continue
        if name == "hub_token":
            raise ValueError(
                f"--config {source}: hub_token does not belong in a file; log in by hf auth login instead"
            )
        if name not in flags and not strict:
            continue
        if name not in flags:
            raise ValueError(
                f"--config {source}: there is no flag {reprlib.repr(name)}{close_match(str(name), flags)}"
                f"{_if_of_others(source, entries)}"
            )
        value = _value(parser, source, flags[name], value)
        if value is not None:
            values[name] = value
    return values


def _value(parser: Parser, source: str, action: argparse.Action, value: Any) -> Any:
    """The value that the flag would have on a command line; None: not given."""
    name = action.dest
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"--config {source}: {name} takes true or false, not {reprlib.repr(value)}")
        return value or None
    if isinstance(value, list) and action.nargs != "+":
        raise ValueError(f"--config {source}: {name} takes one value, not a list")
    if isinstance(value, dict) and action.type is argument:
        value = [f"{key}={json.dumps(item, default=str)}" for key, item in value.items()]
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"--config {source}: {name} is an empty list; leave it out")
    parser.source = f"--config {source}: "
    # Parsed one by one, with "=", since values may look like flags.
    words = [_word(source, action, item) for item in items]
    parsed = [getattr(parser.parse_args([f"--{name}={word}"]), name) for word in words]
    parser.source = ""
    return [item for part in parsed for item in part] if action.nargs == "+" else parsed[0]


def _word(source: str, action: argparse.Action, value: Any) -> str:
    """A YAML value as a word of the command line.

    Raises:
        ValueError: if it has no such form.
    """
    if isinstance(value, dict) and action.type is data_sets.entry:
        return json.dumps(value, default=str)
    if isinstance(value, dict) and action.type is prompts.prompt:
        try:
            return prompts.as_word(value)
        except ValueError as error:
            raise ValueError(f"--config {source}: {action.dest}: {error}") from error
    if isinstance(value, bool) and not isinstance(action.default, bool):
        if value is False and "no" in (action.choices or ()):  # YAML reads a bare no as false
            return "no"
        raise ValueError(
            f"--config {source}: {action.dest} takes a value, not {str(value).lower()}; put it in quotes if it is a "
            "word"
        )
    if isinstance(value, datetime.date) or not isinstance(value, str | int | float):
        kind = "a date; put it in quotes" if isinstance(value, datetime.date) else f"{type(value).__name__}"
        raise ValueError(f"--config {source}: {action.dest} takes a plain value, not {kind}")
    return str(value)


# Recipes from the Hub ------------------------------------------------------------------------------------------------


def is_own(name: str) -> bool:
    """Whether a flag concerns the machine and its user, not the training."""
    return name in FLAGS and FLAGS[name].own


def is_public(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the value of a flag means the same on every machine: it does not depend on a local path.

    Args:
        values: all values of the recipe.
    """
    if name not in FLAGS:
        return True
    declared = FLAGS[name]
    return not declared.own and (declared.public is None or declared.public(values[name], values))


def _entrusted(parser: Parser, source: str, values: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """The flags that a recipe from the Hub may set, without those of the command line.

    Raises:
        ValueError: if a model or data set is not on the Hub, or a value is code.
    """
    values = {name: value for name, value in values.items() if name not in typed}
    for name, value in values.items():
        words = value if isinstance(value, list) else [value]
        if name in FLAGS and FLAGS[name].code and (code := [word for word in words if is_path(word)]):
            raise ValueError(
                f"--config {source}: {name} has {reprlib.repr(code[0])}, and code is not run because a recipe of "
                f"the Hub says so; give --{name} if you trust it, or leave it out by --without {name}"
            )
    if ignored := sorted(name for name in values if is_own(name) and values[name] != parser.get_default(name)):
        warn(
            f"--config {source}: {', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} this machine's business "
            "and not taken from a recipe of the Hub; what you want of it, give on the command line"
        )
    taken = {name: value for name, value in values.items() if not is_own(name)}
    for name in taken:
        if not is_public(name, taken):
            raise ValueError(
                f"--config {source}: {name} is {reprlib.repr(taken[name])}, which is not on the Hub, or is here too; "
                f"give your own by --{name}, or leave it out by --without {name}"
            )
    most = os.cpu_count() or 1
    if (taken.get("dataloader_num_workers") or 0) > most:  # does not change the results
        warn(f"--config {source}: dataloader_num_workers {taken['dataloader_num_workers']} is taken for {most}")
        taken["dataloader_num_workers"] = most
    return taken
