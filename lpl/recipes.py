"""Recipes: YAML files that map flags to values, and under ``measured`` have what a run found out, which is no flag.

:func:`read_recipe` reads a file, or of a repository on the Hub the ``recipe.yaml`` in it. A file is its user's own, as
the command line is. What comes from the Hub is a stranger's, and is given no more than the numbers of the training:

- What is this machine's and its user's business (:func:`is_own`) is passed over: where files lie, to whom something is
  sent, how the run is started, what it is compared with. A recipe can neither write nor publish anything anywhere.
- A model or data set has to be one on the Hub (:func:`is_public`), for a path leads to other people's files.
- Code of one's own (PACKAGE.MODULE:FUNCTION) is refused; there are no YAML tags, and no references.

What it can still do is make the run long, large or bad. Flags on the command line win, and none is looked at that is
given there too.

The *public* form of a run's recipe holds what a stranger would take of it, so nothing of this machine.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import os
import re
import reprlib
import shlex
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lpl.checks import warn
from lpl.data import first_line
from lpl.files import write_text
from lpl.public import HUB_ID, is_hub_id, shown, without_secrets


FILE = "recipe.yaml"
LARGEST_RECIPE = 1_000_000  # bytes
MEASURED = "measured"  # what is no flag in a recipe


class Recipe(NamedTuple):
    """What a recipe says."""

    values: dict[str, Any]  # by flag, of the flags' types; those that are given
    measured: dict[str, Any]  # what the run that wrote it has found out; of a stranger's recipe it may be anything


def read_recipe(
    parser: argparse.ArgumentParser,
    source: str,
    without: Sequence[str] = (),
    typed: Collection[str] = (),
    *,
    strict: bool = True,
    token: str | None = None,
    cache_dir: str | None = None,
) -> Recipe:
    """A recipe that is a file, or of a repository ``user/repo`` or ``user/repo@revision`` on the Hub.

    What is null or false in it is left to the default.

    Args:
        without: flags that are left out.
        typed: flags of the command line, which a stranger's recipe cannot change.
        strict: refuse flags that there are not, which another version may have written.
        token: for the Hub; None: that of the login.
        cache_dir: where the download is kept; None: with all others.

    Raises:
        ValueError: for what is no recipe, an unknown flag, or a value that the flag cannot have, or may not.
    """
    repository = hub_source(source)
    try:
        entries = read_entries(download(*repository, token, cache_dir) if repository else source)
    except (HTTPError, OSError, ValueError) as error:
        why = _why_not_on_the_hub(error, *repository) if repository else f"it cannot be read ({error})"
        raise ValueError(f"--config {source}: {why}") from error
    measured = _take_measured(entries)
    values = _values(parser, source, entries, without, strict)
    if repository:
        values = _entrusted(parser, source, values, typed)
    return Recipe(values, measured)


# Files ---------------------------------------------------------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """YAML's plain values, without references: those of lists of references are small here, and fill the memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has a reference (*name); write the value out instead")
        return super().compose_node(parent, index)


def read_entries(path: str | Path) -> dict[Any, Any]:
    """What a recipe's file maps to what, as plain YAML: no tag makes it more than data.

    Raises:
        OSError, ValueError: where it cannot be read, or is no recipe.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_RECIPE + 1)
    _check_size(len(content))
    try:
        entries = yaml.load(content, RecipeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(entries, dict):
        raise ValueError("it must map flags to values, a line each, such as learning_rate: 1.0e-5")
    return entries


def _take_measured(entries: dict[Any, Any]) -> dict[Any, Any]:
    measured = entries.pop(MEASURED, None)
    return measured if isinstance(measured, dict) else {}


def _check_size(size: int) -> None:
    if size > LARGEST_RECIPE:
        raise ValueError(f"it has more than {LARGEST_RECIPE:,} bytes")


def recipe_text(values: Mapping[str, Any], measured: Mapping[str, Any] | None = None) -> str:
    """The content of a recipe's file: the flags by name, and behind them what was measured."""
    flags = dict(sorted(values.items(), key=lambda entry: str(entry[0])))
    return yaml.safe_dump(flags | ({MEASURED: dict(measured)} if measured else {}), sort_keys=False)


# A revision, or a folder within a repository
WITHIN = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w .+/-]*", re.ASCII)


def hub_source(source: str) -> tuple[str, str | None] | None:
    """Repository and revision of ``user/repo`` or ``user/repo@revision``; None for a file, or what was meant for one.

    >>> hub_source("user/repo"), hub_source("user/repo@v1.0"), hub_source("recipes/sdxl.yaml")
    (('user/repo', None), ('user/repo', 'v1.0'), None)
    """
    repository, at, revision = source.partition("@")
    if os.path.exists(source) or source.endswith((".yaml", ".yml")) or not HUB_ID.fullmatch(repository):
        return None
    return (repository, revision or None) if WITHIN.fullmatch(revision) or not at else None


def download(repository: str, revision: str | None, token: str | None, cache_dir: str | None) -> str:
    """The path of a repository's recipe.

    Raises:
        HTTPError, OSError, ValueError: where there is none, or none that can be seen, or it is too large.
    """
    options = {"revision": revision, "token": (token or "").strip() or None, "cache_dir": cache_dir}
    _check_size(hf_hub_download(repository, FILE, dry_run=True, **options).file_size or 0)
    return hf_hub_download(repository, FILE, **options)


def _why_not_on_the_hub(error: Exception, repository: str, revision: str | None) -> str:
    login = "run `hf auth login` or give --hub_token"
    match error:
        case GatedRepoError():
            return f"the repository is gated; accept its terms on its page, then {login}"
        case RepositoryNotFoundError():
            return f"there is no such file here, and no such repository on the Hub; if it is a private one, {login}"
        case RevisionNotFoundError():
            return f"the repository has no revision {revision}"
        case RemoteEntryNotFoundError():
            return f"the repository has no {FILE}, which the training script writes and publishes"
        case LocalEntryNotFoundError():
            return (
                "there is no such file here, and the Hub cannot be reached "
                f"({without_secrets(first_line(error.__cause__ or error))})"
            )
    return f"its {FILE} on the Hub cannot be read ({without_secrets(first_line(error))})"


# Values --------------------------------------------------------------------------------------------------------------


def _values(
    parser: argparse.ArgumentParser, source: str, entries: Mapping[Any, Any], without: Sequence[str], strict: bool
) -> dict[str, Any]:
    flags = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "without")}
    for name in without:
        if name not in entries:
            raise ValueError(f"--without {name}: the recipe has no such flag{close_match(name, entries)}")
    values = {}
    for name, value in entries.items():
        if name in without:
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
            )
        value = _value(parser, source, flags[name], value)
        if value is not None:
            values[name] = value
    return values


def close_match(name: str, known: Collection[Any], before: str = "") -> str:
    """The end of a sentence that says what may have been meant."""
    words = [str(word) for word in known]
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), words, n=1, cutoff=0.5)
    return f"; did you mean {before}{close[0]}?" if close else ""


def _value(parser: argparse.ArgumentParser, source: str, action: argparse.Action, value: Any) -> Any:
    """What the flag would be on a command line with that value; None: absent."""
    name = action.dest
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"--config {source}: {name} takes true or false, not {reprlib.repr(value)}")
        return value or None
    if isinstance(value, list) and action.nargs != "+":
        raise ValueError(f"--config {source}: {name} takes one value, not a list")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"--config {source}: {name} is an empty list; leave it out")
    parser.source = f"--config {source}: "
    # Each by a command line of its own, with "=", for values that look like flags.
    words = [_word(source, action, item) for item in items]
    parsed = [getattr(parser.parse_args([f"--{name}={word}"]), name) for word in words]
    parser.source = ""
    return [item for part in parsed for item in part] if action.nargs == "+" else parsed[0]


def _word(source: str, action: argparse.Action, value: Any) -> str:
    """A value of YAML's as it would be typed.

    Raises:
        ValueError: for one that cannot be typed.
    """
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


# What strangers are given, and may say -------------------------------------------------------------------------------

OWN = (
    *("output_dir", "logging_dir", "cache_dir", "report_to", "tracker_project_name", "push_to_hub"),
    *("resume_from_checkpoint", "dry_run"),
)
OWN_BEGINNINGS = ("hub_", "eval_")
MODELS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "lpl_vae_name_or_path")
PLACES = (*MODELS, "dataset_name", "train_data_dir", "revision", "non_ema_revision", "variant")  # or parts of one
VARIANT = re.compile(r"\w[\w.-]*", re.ASCII)


def is_own(name: str) -> bool:
    """Whether a flag is the business of a machine and its user, and none of the training's numbers."""
    return name in OWN or name.startswith(OWN_BEGINNINGS)


def is_public(name: str, values: Mapping[str, Any]) -> bool:
    """Whether the value of a flag means the same to everybody: no path of a machine, and nothing that leads to one.

    Args:
        values: all flags of the recipe.
    """
    value = values[name]
    if is_own(name):
        return False
    if name not in PLACES:
        return True
    if not isinstance(value, str):
        return False
    match name:
        case "revision" | "non_ema_revision":
            return bool(WITHIN.fullmatch(value))
        case "variant":
            return bool(VARIANT.fullmatch(value))
        case "train_data_dir":  # beside a data set of the Hub it is a folder in there
            inside = WITHIN.fullmatch(value) and not os.path.exists(value)
            return bool(inside and is_hub_id(str(values.get("dataset_name") or "")))
    return is_hub_id(value)


def _entrusted(
    parser: argparse.ArgumentParser, source: str, values: Mapping[str, Any], typed: Collection[str]
) -> dict[str, Any]:
    """The flags of a stranger's recipe, without those of the command line and those that are not for strangers to say.

    Raises:
        ValueError: for a model or data set that is not on the Hub, and for code.
    """
    values = {name: value for name, value in values.items() if name not in typed}
    if code := [feature for feature in values.get("eval_features", ()) if ":" in feature]:
        raise ValueError(
            f"--config {source}: eval_features has {reprlib.repr(code[0])}, and code is not run because a recipe of "
            "the Hub says so; give --eval_features if you trust it, or leave it out by --without eval_features"
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
    if taken.get("dataloader_num_workers", 0) > most:  # their number moves nothing
        warn(f"--config {source}: dataloader_num_workers {taken['dataloader_num_workers']} is taken for {most}")
        taken["dataloader_num_workers"] = most
    return taken


def public_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags of a run that a stranger can rerun it with; what is local is left out, see :func:`left_to_give`."""
    return {name: value for name, value in values.items() if value is not None and is_public(name, values)}


def left_to_give(values: Mapping[str, Any]) -> dict[str, str]:
    """What somebody who reruns the public recipe has to give: by flag, the data and models that are not on the Hub."""
    local = [name for name in PLACES if values.get(name) is not None and not is_public(name, values)]
    return {name: " ".join(shown(str(values[name])).split()) for name in local}


def rerun_command(values: Mapping[str, Any], measured: Mapping[str, Any], repository: str | None = None) -> str:
    """The command that reruns the public recipe, one line of a shell.

    Args:
        values, measured: of the run's own recipe.
        repository: that has the public one, as --config takes it; None: a file.
    """
    processes = measured.get("num_processes")
    alone = not isinstance(processes, int) or processes <= 1
    several = [] if alone else ["--multi_gpu", "--num_processes", str(processes)]
    given = chain(*((f"--{name}", value) for name, value in left_to_give(values).items()))
    script = ["train_text_to_image_lpl.py", "--config", repository or FILE]
    return shlex.join(["accelerate", "launch", *several, *script, *given])


def public_text(values: Mapping[str, Any], measured: Mapping[str, Any], repository: str | None = None) -> str:
    """The public recipe's file, under a comment that says what it is and how to rerun it; for the arguments see
    :func:`rerun_command`."""
    lines = [
        f"The recipe of {repository or 'this model'}: the flags that decide its training's numbers. Run it again:",
        "",
        f"  {rerun_command(values, measured, repository)}",
        "",
        *(f"--{name} has to be given: that run's is not on the Hub." for name in left_to_give(values)),
        f'What is under "{MEASURED}" is no flag: that run has found it out, and a rerun compares itself with it.',
    ]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return without_secrets(f"{head}\n{recipe_text(public_recipe(values), measured)}")


def publish_recipe(recipe: Path, target: Path, repository: str | None = None) -> None:
    """Write the public form of a run's own recipe.

    Args:
        repository: where it will be, as --config takes it; None: the hub_model_id of the run, if it has one.

    Raises:
        OSError, ValueError: where the recipe cannot be read.
    """
    values = read_entries(recipe)
    measured, own = _take_measured(values), str(values.get("hub_model_id"))
    repository = repository or (own if HUB_ID.fullmatch(own) else None)
    write_text(target, public_text(values, measured, repository))
