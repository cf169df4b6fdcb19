"""The public form of a run's recipe: the flags that a stranger can use, without paths of this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lpl.config.config import FLAGS
from lpl.config.data_sets import as_word, place_of, public_entry
from lpl.config.recipes import MEASURED, is_public, read_entries, recipe_text, take_measured
from lpl.config.rules import source_and_strength
from lpl.tools import layout
from lpl.tools.files import write_text
from lpl.tools.privacy import HUB_ID, is_local, shown, without_secrets


PLACES = [name for name, declared in FLAGS.items() if declared.public]  # their values may lead to one's own files


def public_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a stranger can rerun a run with; local values are left out, see :func:`left_to_give`."""
    return {name: value for name, value in values.items() if value is not None and is_public(name, values)}


def left_to_give(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Flags that a rerun of the public recipe needs besides: data and models that are not on the Hub."""
    local = [name for name in PLACES if values.get(name) is not None and not is_public(name, values)]
    return {name: _public_words(values[name]) for name in local}


def _public_words(value: Any) -> list[str]:
    if isinstance(value, list):  # of data sets, or of LoRA to merge
        return [as_word(public_entry(found)) if isinstance(found, dict) else shown_lora(found) for found in value]
    return [" ".join(shown(str(value)).split())]


def shown_lora(word: str) -> str:
    """A word of --merge_lora as it may be public."""
    source = source_and_strength(word)[0]
    return " ".join(shown(source).split()) + word.removeprefix(source)


def local_sources(values: Mapping[str, Any]) -> list[str]:
    """Data and models of a run that are not on the Hub."""
    given = left_to_give(values)
    listed = [place_of(found) for found in values.get("datasets") or () if "datasets" in given]
    places = [shown(place) for place in listed if is_local(place)]
    return list(dict.fromkeys([*chain(*(words for name, words in given.items() if name != "datasets")), *places]))


def rerun_command(values: Mapping[str, Any], measured: Mapping[str, Any], repository: str | None = None) -> str:
    """The shell command that reruns the public recipe, on one line.

    Args:
        values, measured: of the run's own recipe.
        repository: with the public recipe, as --config takes it; None: a file.
    """
    processes = measured.get("num_processes")
    alone = not isinstance(processes, int) or processes <= 1
    several = [] if alone else ["--multi_gpu", "--num_processes", str(processes)]
    given = chain(*((f"--{name}", *words) for name, words in left_to_give(values).items()))
    script = ["train_text_to_image_lpl.py", "--config", repository or layout.RECIPE]
    return shlex.join(["accelerate", "launch", *several, *script, *given])


def public_text(values: Mapping[str, Any], measured: Mapping[str, Any], repository: str | None = None) -> str:
    """The public recipe as a file, headed by a comment with the command that reruns it; for the arguments see
    :func:`rerun_command`."""
    lines = [
        f"The recipe of {repository or 'this model'}: the flags that decide its training's numbers. Run it again:",
        "",
        f"  {rerun_command(values, measured, repository)}",
        "",
        *(f"--{name} has to be given: that run's is not on the Hub." for name in left_to_give(values)),
        f'"{MEASURED}" holds no flags but measured facts of that run, which a rerun compares with its own.',
    ]
    head = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return without_secrets(f"{head}\n{recipe_text(public_recipe(values), measured)}")


def publish_recipe(recipe: Path, target: Path, repository: str | None = None) -> None:
    """Write the public form of a run's own recipe.

    Args:
        repository: where the recipe is published, as --config takes it; None: the run's hub_model_id, if any.

    Raises:
        OSError, ValueError: the recipe cannot be read.
    """
    values = read_entries(recipe)
    measured, own = take_measured(values), str(values.get("hub_model_id"))
    repository = repository or (own if HUB_ID.fullmatch(own) else None)
    write_text(target, public_text(values, measured, repository))
