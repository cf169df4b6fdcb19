"""Rules for the declarations of flags: which values are public, and when a flag has an effect."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpl.config.choices import CLIP_SCORE, SET_METRICS
from lpl.config.flag import Range, Values
from lpl.options import MASK_RANGES
from lpl.tools.privacy import HUB_ID, is_hub_id


if TYPE_CHECKING:
    from lpl.config.config import Config


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


def is_revision(value: Any, values: Values) -> bool:
    return isinstance(value, str) and bool(WITHIN.fullmatch(value))


def is_word(value: Any, values: Values) -> bool:
    return isinstance(value, str) and bool(WORD.fullmatch(value))


def within_the_data_set(value: Any, values: Values) -> bool:
    """With a data set on the Hub, --train_data_dir is a folder inside it."""
    inside = is_revision(value, values) and not os.path.exists(value)
    return inside and is_hub_id(str(values.get("dataset_name") or ""))


# Conditions under which flags have an effect -------------------------------------------------------------------------


def from_the_hub(config: Config) -> bool:
    return not Path(config.model.pipeline).is_dir()


def with_ema(config: Config) -> bool:
    return config.optimization.use_ema


def with_masks(config: Config) -> bool:
    return not config.lpl.lpl_no_outlier_mask


def with_prodigy(config: Config) -> bool:
    return config.optimization.optimizer == "prodigy"


def trains_text_encoders(config: Config) -> bool:
    return config.model.train_text_encoder


def validated(config: Config) -> bool:
    return bool(config.validation.validation_prompts) or config.data.holds_out


def evaluated(config: Config) -> bool:
    return config.evaluation.eval_steps is not None


def pushed(config: Config) -> bool:
    return config.output.push_to_hub


def asks_the_hub(config: Config) -> bool:
    return config.output.push_to_hub or config.output.resume_from_checkpoint == "hub"


def biased(*strategies: str) -> Callable[[Config], bool]:
    return lambda config: config.diffusion.timestep_bias_strategy in strategies


def density(scheme: str) -> Callable[[Config], bool]:
    return lambda config: config.diffusion.weighting_scheme == scheme


def holds_out(config: Config) -> bool:
    return config.data.holds_out


def shuffles_a_stream(config: Config) -> bool:
    return config.data.streaming and config.data.max_train_samples is None


def takes_some_samples(config: Config) -> bool:
    return (config.lpl.lpl_max_samples or 0) < config.optimization.train_batch_size


def decodes_in_chunks(config: Config) -> bool:
    return (config.lpl.lpl_chunk_size or 0) < config.optimization.train_batch_size


def takes_a_part(config: Config) -> bool:
    return (config.lpl.lpl_crop or 0) < min(config.data.size)


def dreams(config: Config) -> bool:
    return config.diffusion.dream_training


def warms_up(config: Config) -> bool:
    return config.optimization.lr_scheduler != "constant" or config.optimization.lr_warmup_steps == 0


def scheduled(name: str) -> Callable[[Config], bool]:
    return lambda config: config.optimization.lr_scheduler == name


def one_prompt(config: Config) -> bool:
    return config.validation.validation_prompt is not None


def compares_sets(config: Config) -> bool:
    return evaluated(config) and not set(SET_METRICS).isdisjoint(config.evaluation.eval_metrics)


def scores_captions(config: Config) -> bool:
    return evaluated(config) and CLIP_SCORE in config.evaluation.eval_metrics


def uses_a_token(config: Config) -> bool:
    return asks_the_hub(config) or hub_source(config.output.config or "") is not None


# Values --------------------------------------------------------------------------------------------------------------


def depth_weighting(words: str | Sequence[str]) -> str | tuple[float, ...]:
    """A name, or one number per block."""
    if isinstance(words, str):
        return words
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        return " ".join(words)


def mask_range(name: str) -> Range:
    return Range(*MASK_RANGES[name])
