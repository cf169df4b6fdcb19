"""Parses the command line into a :class:`Config`, and writes it back.

The recipe overrides the defaults, and the command line overrides the recipe.

:func:`recipe` returns the values that a run writes to ``recipe.yaml``; as ``--config`` they give the same flags again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from lpl.config.checks import check_words, idle_without_lpl
from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL, OFT, OPTIMIZERS, RANK
from lpl.config.config import FLAGS, GROUP_OF, GROUPS, Config
from lpl.config.data_sets import as_word
from lpl.config.flag import add_group, built, flags_of
from lpl.config.foreign import FOREIGN, Foreign, translated
from lpl.config.parser import Parser
from lpl.config.prompt_files import read_prompts
from lpl.config.recipes import read_recipe
from lpl.config.rules import holds_out, is_path
from lpl.options import parse_weight
from lpl.tools.words import plain_warnings, warn


PACKAGES = ("accelerate", "datasets", "peft", "transformers")  # imported by every run; the loss alone needs none


# The parser ----------------------------------------------------------------------------------------------------------


def build_parser(prog: str | None = None) -> Parser:
    """The parser of the training script's command line; ``prog`` defaults to the name of the running script."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE (--train_data_dir | --dataset_name) DATA [flags]",
        description="Fine-tune a latent diffusion model on captioned images with the latent perceptual loss.",
    )
    for group in (*GROUPS.values(), Foreign):
        add_group(parser.add_title(group.__doc__), group)
    return parser


def add_flags(parser: Parser, names: Collection[str]) -> None:
    """Add flags of the training script to the parser of another program."""
    for group in GROUPS.values():
        add_group(parser, group, names)


def given_flags(parser: Parser, words: Sequence[str]) -> set[str]:
    """Names of the flags in a valid command line; the parser loses its defaults."""
    for action in parser.flags:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(words)))


def read_shared(names: Collection[str], values: Mapping[str, Any], typed: Collection[str]) -> dict[str, Any]:
    """What the recipe of --config says of some flags, for another program; its other flags are left aside.

    Args:
        values: of that program's flags.
        typed: flags of the command line.

    Raises:
        ValueError: if it cannot be read, or a value is invalid.
    """
    parser = Parser()
    add_flags(parser, names)
    source = {"token": values["hub_token"], "cache_dir": values["cache_dir"]}
    return read_recipe(parser, values["config"], values.get("without") or (), typed, strict=False, **source).values


# Words -> configuration ----------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """Parse and check the command line; exits with a one-line error if it is invalid.

    Args:
        prog: what errors and warnings begin with; default: the name of the running script.
    """
    plain_warnings(build_parser(prog).prog)
    with usage_errors(prog):
        config = _read(build_parser(prog), sys.argv[1:] if argv is None else argv)
        check_words(config)
        _check_installed()
    if argv is None and config.output.hub_token:  # trackers upload the command line
        sys.argv = [word.replace(config.output.hub_token, "hf_...") for word in sys.argv]
    return config


def _check_installed() -> None:
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"not installed: {', '.join(absent)}; install the wheel with its extra [train], or give pip install "
            "-r requirements.txt in the repository"
        )


@contextmanager
def usage_errors(prog: str | None = None) -> Iterator[None]:
    """Report a ValueError as argparse reports a wrong flag, and exit with code 2."""
    try:
        yield
    except ValueError as error:
        build_parser(prog).error(str(error))


def config_of(values: Mapping[str, Any], given: Collection[str] = (), **rest: Any) -> Config:
    """Build a configuration from values of the parser or a recipe; other flags keep their defaults."""
    groups = {name: built(group, values) for name, group in GROUPS.items()}
    return Config(**groups, given=frozenset(given), **rest)


def _read(parser: Parser, words: Sequence[str]) -> Config:
    """Merge defaults, recipe and command line, and fill in defaults that depend on other flags.

    Raises:
        ValueError: if the recipe cannot be read, or a value is invalid.
    """
    values = vars(parser.parse_args(words))
    typed = given_flags(build_parser(), words)
    given, measured = set(typed), {}
    if values["config"] is None:
        if values["without"]:
            raise ValueError("--without leaves out flags of a recipe; give one with --config, or leave it out")
    else:
        source = {"token": values["hub_token"], "cache_dir": values["cache_dir"]}
        said, measured = read_recipe(parser, values["config"], values["without"] or (), typed, **source)
        given |= changed_by(said, parser)
        parser.set_defaults(**said)
        values = vars(parser.parse_args(words))
        if "lpl_weight" in typed and parse_weight(values["lpl_weight"]) == (0.0, None):
            given -= _forget_lpl(values, given - typed)
    for name, declared in (FLAGS | flags_of(Foreign)).items():
        declared.check(name, values[name])
    config = config_of(values, given - FOREIGN, rerun_of=measured)
    foreign = {name: values[name] for name in given & FOREIGN}
    return _completed(translated(config, foreign))


def changed_by(said: Mapping[str, Any], parser: Parser) -> set[str]:
    """Names of the flags that a recipe changes: it records defaults too."""

    def not_given(action: argparse.Action) -> tuple[Any, ...]:
        former = FLAGS[action.dest].former_default if action.dest in FLAGS else None
        return (action.default, [action.default], former)

    return {
        action.dest
        for action in parser.flags
        if action.dest in said and (said[action.dest] not in not_given(action) or action.dest in FOREIGN)
    }


def _forget_lpl(values: dict[str, Any], names: Collection[str]) -> set[str]:
    """For the baseline of a recipe with LPL: reset the flags that have no effect without LPL; returns their names."""
    idle = set(idle_without_lpl(names, holds_out(values)))
    for name in sorted(idle):
        values[name] = build_parser().get_default(name)
        warn(f"--lpl_weight 0: {name} of the recipe has no effect and is left out")
    return idle


def _completed(config: Config) -> Config:
    """Fill in the defaults that depend on other flags."""
    optimization, lora, validation = config.optimization, config.lora, config.validation
    name = next((name for name in OPTIMIZERS if name.lower() == optimization.optimizer.lower()), None)
    if name is None and not is_path(optimization.optimizer):
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"--optimizer {optimization.optimizer}: accepted are {known}, and package.module:Class")
    values: dict[str, Any] = {"optimizer": name or optimization.optimizer}
    if optimization.use_ema and optimization.ema_decay is None:
        values["ema_decay"] = EMA_DECAY_WITH_LPL if config.lpl.enabled else EMA_DECAY
    if lora.lora_init is not None or lora.adapter == OFT:
        values["lora"] = True
    elif lora.lora or lora.rank is not None or "adapter" in config.given:
        rank = lora.rank or RANK
        values |= {"lora": True, "rank": rank, "lora_alpha": lora.lora_alpha or float(rank)}
    if config.output.checkpoints_total_limit == 0:
        values["checkpoints_total_limit"] = 1  # what diffusers' scripts do with it
    if validation.validation_prompt is not None:
        if validation.validation_prompts is not None:
            raise ValueError("--validation_prompt and --validation_prompts exclude one another; give one of them")
        values["validation_prompts"] = (validation.validation_prompt,) * validation.num_validation_images
    if validation.validation_prompts_file is not None:
        for name in ("validation_prompt", "validation_prompts"):
            if getattr(validation, name) is not None:
                raise ValueError(
                    f"--validation_prompts_file and --{name} exclude one another; give one of them (of a recipe, "
                    f"leave it out by --without {name})"
                )
        values["validation_prompts"] = read_prompts(validation.validation_prompts_file)
    return config.changed(**values)


# Configuration -> words ----------------------------------------------------------------------------------------------


def recipe(config: Config) -> dict[str, Any]:
    """All resolved flags of a run, in YAML's types; as ``--config`` they give the same flags again."""
    values = {name: value for name, value in config.values().items() if FLAGS[name].in_recipe}
    if config.validation.validation_prompt is not None:
        values["validation_prompts"] = None  # set from --validation_prompt
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def words_of(config: Config, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The command line of a run: every flag that is not at its default."""
    words = []
    for name, value in recipe(config).items():
        default = _default(name)
        if not wanted(name) or value is None or value == default:
            continue
        listed = [] if default is False else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(as_word, listed)]
    return words


def _default(name: str) -> Any:
    """The default of a flag, in YAML's types."""
    value = next(item.default for item in fields(GROUPS[GROUP_OF[name]]) if item.name == name)
    return list(value) if isinstance(value, tuple) else value


def loss_words(config: Config) -> str:
    """The part of the command line that changes the latent perceptual loss, as one line."""
    return " ".join(words_of(config, lambda name: name.startswith("lpl_") and not FLAGS[name].same_loss))
