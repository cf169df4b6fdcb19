"""Rules for the declarations of flags: which values are public, and when a flag has an effect."""

from __future__ import annotations

import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from lpl.config.choices import CLIP_SCORE, LR_SCHEDULERS, SET_METRICS
from lpl.config.flag import Range, Values, number
from lpl.config.sizes import sides_of
from lpl.options import AUTO, MASK_RANGES
from lpl.tools.privacy import HUB_ID, hub_file, is_hub_id


# A revision, or a folder within a repository
WITHIN = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][\w .+/-]*", re.ASCII)
WORD = re.compile(r"\w[\w.-]*", re.ASCII)


def hub_source(source: str) -> tuple[str, str | None] | None:
    """Repository and revision of ``user/repo`` or ``user/repo@revision``; None for a file name.

    >>> hub_source("user/repo"), hub_source("user/repo@v1.0"), hub_source("recipes/sdxl.yaml")
    (('user/repo', None), ('user/repo', 'v1.0'), None)
    """
    repository, at, revision = source.partition("@")
    if os.path.exists(source) or source.endswith((".yaml", ".yml")) or not HUB_ID.fullmatch(repository):
        return None
    return (repository, revision or None) if WITHIN.fullmatch(revision) or not at else None


# Values that mean the same on every machine --------------------------------------------------------------------------


def on_the_hub(value: Any, values: Values) -> bool:
    return isinstance(value, str) and is_hub_id(value)


def model_on_the_hub(value: Any, values: Values) -> bool:
    """A repository on the Hub, or a file in one."""
    return on_the_hub(value, values) or (isinstance(value, str) and hub_file(value) is not None)


def all_on_the_hub(value: Any, values: Values) -> bool:
    """Whether all LoRA of --merge_lora are on the Hub."""
    return all(isinstance(word, str) and model_on_the_hub(source_and_strength(word)[0], values) for word in value)


def is_revision(value: Any, values: Values) -> bool:
    return isinstance(value, str) and bool(WITHIN.fullmatch(value))


def is_word(value: Any, values: Values) -> bool:
    return isinstance(value, str) and bool(WORD.fullmatch(value))


def within_the_data_set(value: Any, values: Values) -> bool:
    """With a data set on the Hub, --train_data_dir is a folder inside it."""
    inside = is_revision(value, values) and not os.path.exists(value)
    return inside and is_hub_id(str(values.get("dataset_name") or ""))


def are_public(value: Any, values: Values) -> bool:
    """Whether all data sets of a list are on the Hub."""
    return all(
        on_the_hub(found.get("dataset_name"), found)
        and ("train_data_dir" not in found or within_the_data_set(found["train_data_dir"], found))
        for found in value
    )


# Conditions under which flags have an effect, given the values of all flags -----------------------------------------

Condition = Callable[[Values], bool]


def when(name: str, *values: Any) -> Condition:
    """The flag ``name`` is on, or has one of these values."""
    return lambda flags: flags[name] in values if values else bool(flags[name])


def has(name: str) -> Condition:
    """The other flag has a value."""
    return lambda flags: flags[name] is not None


def unless(name: str) -> Condition:
    return lambda flags: not flags[name]


def from_the_hub(flags: Values) -> bool:
    return not os.path.exists(flags["pretrained_model_name_or_path"])


def holds_out(flags: Values) -> bool:
    in_list = any("validation_split" in found for found in flags["datasets"] or ())
    return in_list or flags["validation_split"] is not None or flags["validation_every_nth"] is not None


def masks_the_loss(flags: Values) -> bool:
    return flags["alpha_mask"] or flags["mask_column"] is not None or flags["mask_data_dir"] is not None


def validates(flags: Values) -> bool:
    return bool(flags["validation_prompts"]) or holds_out(flags)


def draws_a_lora(flags: Values) -> bool:
    return flags["lora"] and bool(flags["validation_prompts"])


def asks_the_hub(flags: Values) -> bool:
    return flags["push_to_hub"] or flags["resume_from_checkpoint"] == "hub"


def uses_a_token(flags: Values) -> bool:
    return asks_the_hub(flags) or hub_source(flags["config"] or "") is not None


def shuffles_a_stream(flags: Values) -> bool:
    return flags["streaming"] and flags["max_train_samples"] is None


def changes_tags(flags: Values) -> bool:
    return flags["shuffle_tags"] or flags["tag_dropout"] > 0


def divides_tags(flags: Values) -> bool:
    return changes_tags(flags) or flags["keep_tags_separator"] is not None


def less_than(name: str, other: str) -> Condition:
    """The flag ``name`` has a smaller value than another one."""
    return lambda flags: (flags[name] or 0) < flags[other]


def crops_for_lpl(flags: Values) -> bool:
    return (flags["lpl_crop"] or 0) < sides_of(flags["resolution"])[-1]


def warms_up(flags: Values) -> bool:
    name = flags["lr_scheduler"]
    return (name != "constant" and not is_path(name)) or flags["lr_warmup_steps"] == 0


def is_path(name: Any) -> bool:
    """Whether a name is the path of a class or function, ``package.module:Class``: code."""
    return ":" in str(name)


def by_path(name: str) -> Condition:
    """The flag ``name`` is the path of a class."""
    return lambda flags: is_path(flags[name])


def compares_sets(flags: Values) -> bool:
    return flags["eval_steps"] is not None and not set(SET_METRICS).isdisjoint(flags["eval_metrics"])


def scores_captions(flags: Values) -> bool:
    return flags["eval_steps"] is not None and CLIP_SCORE in flags["eval_metrics"]


def from_a_file(flags: Values) -> bool:
    """The pipeline, or the denoiser, may be a single file."""
    places = flags["pretrained_model_name_or_path"], flags["denoiser_model_name_or_path"]
    return any(place and (str(place).endswith(".safetensors") or os.path.isdir(place)) for place in places)


# Values --------------------------------------------------------------------------------------------------------------


def depth_weighting(words: str | Sequence[str]) -> str | tuple[float, ...]:
    """A name, or one number per block."""
    if isinstance(words, str):
        return words
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        return " ".join(words)


def source_and_strength(word: str) -> tuple[str, float]:
    """``FILE:STRENGTH`` or ``FILE``, whose strength is 1.

    >>> source_and_strength("style.safetensors:0.7"), source_and_strength("user/lora")
    (('style.safetensors', 0.7), ('user/lora', 1.0))
    """
    source, colon, strength = word.rpartition(":")
    try:
        return (source, float(strength)) if colon and source else (word, 1.0)
    except ValueError:
        return word, 1.0


def count_or_auto(word: str) -> int | None:
    """A whole number, or None for ``auto``."""
    if word == AUTO:
        return None
    try:
        return int(word)
    except ValueError:
        raise ArgumentTypeError(f"{word!r}: accepted are {AUTO} and a whole number") from None


def halves(word: str) -> tuple[str, str]:
    """
    >>> halves("attn.to_q=16")
    ('attn.to_q', '16')
    """
    name, _, value = word.rpartition("=")
    return name, value


def rank_pattern(word: str) -> str:
    """NAME=RANK."""
    name, value = halves(word)
    if not name or not value.isdecimal() or int(value) < 1:
        raise ArgumentTypeError(f"{word!r}: accepted is NAME=RANK, such as attn.to_q=16")
    return word


def alpha_pattern(word: str) -> str:
    """NAME=ALPHA."""
    name, value = halves(word)
    try:
        alpha = float(value)
    except ValueError:
        alpha = 0.0
    if not name or not 0 < alpha < math.inf:
        raise ArgumentTypeError(f"{word!r}: accepted is NAME=ALPHA, such as attn.to_q=16")
    return word


def schedule(word: str) -> str:
    """A name of LR_SCHEDULERS, or the path of a class."""
    if word not in LR_SCHEDULERS and not is_path(word):
        raise ArgumentTypeError(f"{word!r}: accepted are {', '.join(LR_SCHEDULERS)}, and package.module:Class")
    return word


def argument(word: str) -> str:
    """NAME=VALUE, an argument of a class."""
    name, equals, text = word.partition("=")
    try:
        value = value_of(text)
        plain = all(map(_is_plain, _items(value)))
    except yaml.YAMLError:
        plain = False
    if not (name.isidentifier() and equals and plain):
        raise ArgumentTypeError(
            f"{word!r}: accepted is NAME=VALUE, with a finite number, a word, true, false, null or a list of these"
        )
    return word


def arguments(words: Sequence[str] | None) -> dict[str, Any]:
    """
    >>> arguments(["eps=1e-8", "betas=[0.9, 0.99]", "nesterov=true", "clip=null"])
    {'eps': 1e-08, 'betas': (0.9, 0.99), 'nesterov': True, 'clip': None}
    """
    pairs = (word.partition("=") for word in words or ())
    return {name: value_of(text) for name, _, text in pairs}


def value_of(text: str) -> Any:
    """A value in YAML; lists become tuples."""
    value = _number(yaml.safe_load(text)) if _number(text) is text else _number(text)
    return tuple(map(_number, value)) if isinstance(value, list) else value


def _number(value: Any) -> Any:
    """A word that is a number as that number: YAML takes 1e-8 for a word."""
    try:
        return number(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _is_plain(value: Any) -> bool:
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str | int)


def mask_range(name: str) -> Range:
    return Range(*MASK_RANGES[name])
