"""From words to a :class:`Config` and back: the defaults, over them the recipe, over it the command line.

:func:`recipe` gives the values that a run writes into its ``recipe.yaml``; given as ``--config`` they mean the same
flags again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from lpl.config.checks import check_words, idle_without_lpl
from lpl.config.choices import EMA_DECAY, EMA_DECAY_WITH_LPL, OPTIMIZERS, RANK
from lpl.config.config import FLAGS, GROUP_OF, GROUPS, Config
from lpl.config.flag import add_group, boolean, built, flags_of
from lpl.config.foreign import FOREIGN, Foreign, translated
from lpl.config.recipes import read_recipe
from lpl.options import parse_weight
from lpl.tools.console import warnings_in_one_line
from lpl.tools.words import close_match, warn


NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


# The parser ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage before it."""

    source = ""  # where the words that are being parsed come from, if not from the command line

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter} | options)
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own takes -1e-4 for a flag

    def add_title(self, title: str | None) -> argparse._ArgumentGroup:
        """A titled part of the help, to which flags are added."""
        group = self.add_argument_group(title)
        group._negative_number_matcher = NEGATIVE_NUMBER
        return group

    @property
    def flags(self) -> list[argparse.Action]:
        return self._actions

    def error(self, message: str) -> NoReturn:
        unknown, _, words = message.partition("unrecognized arguments: ")
        if words and not unknown:
            known = [action.dest for action in self._actions if action.dest not in FOREIGN]
            message += close_match(words.split()[0].partition("=")[0], known, "--")
        message = " ".join(message.split())  # whatever was given
        self.exit(2, f"{self.prog}: error: {self.source}{message} (all flags: --help)\n")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and arg_strings == ["--"]:  # which Python before 3.13 takes for no value, silently
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)  # type: ignore[misc]


class HelpFormatter(argparse.MetavarTypeHelpFormatter):
    """Shows each flag's type, and its default where there is one that counts."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return getattr(action.type or str, "__name__", "str")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.nargs == 0 or default is None or action.dest in FOREIGN:
            return action.help
        words = " ".join(default) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {words.lower() if action.type is boolean else words})"


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
    """Give another program's parser those flags of the training script."""
    for group in GROUPS.values():
        add_group(parser, group, names)


def given_flags(parser: Parser, words: Sequence[str]) -> set[str]:
    """The flags in the words of a command line that is known to be right; the parser loses its defaults."""
    for action in parser.flags:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(words)))


# Words -> configuration ----------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> Config:
    """The checked command line; ends the process with one sentence where it cannot be run."""
    if argv is None:
        warnings_in_one_line(Path(sys.argv[0]).name)
    with refusing():
        config = _read(build_parser(), sys.argv[1:] if argv is None else argv)
        check_words(config)
    if argv is None and config.output.hub_token:  # trackers upload the command line
        sys.argv = [word.replace(config.output.hub_token, "hf_...") for word in sys.argv]
    return config


@contextmanager
def refusing() -> Iterator[None]:
    """Within, a ValueError is said as a wrong flag is, and ends the process with exit code 2."""
    try:
        yield
    except ValueError as error:
        build_parser().error(str(error))


def config_of(values: Mapping[str, Any], given: Collection[str] = (), **rest: Any) -> Config:
    """A configuration from values of flags as the parser or a recipe has them; the others are at their defaults."""
    groups = {name: built(group, values) for name, group in GROUPS.items()}
    return Config(**groups, given=frozenset(given), **rest)


def _read(parser: Parser, words: Sequence[str]) -> Config:
    """The command line over the recipe over the defaults, and what follows from other flags.

    Raises:
        ValueError: where the recipe cannot be read or says something impossible.
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
        given |= {
            action.dest
            for action in parser.flags
            if action.dest in said
            and (said[action.dest] not in (action.default, [action.default]) or action.dest in FOREIGN)
        }
        parser.set_defaults(**said)
        values = vars(parser.parse_args(words))
        if "lpl_weight" in typed and parse_weight(values["lpl_weight"]) == (0.0, None):
            given -= _forget_lpl(values, given - typed)
    for name, declared in (FLAGS | flags_of(Foreign)).items():
        declared.check(name, values[name])
    config = config_of(values, given - FOREIGN, rerun_of=measured)
    foreign = {name: values[name] for name in given & FOREIGN}
    return _completed(translated(config, foreign))


def _forget_lpl(values: dict[str, Any], names: Collection[str]) -> set[str]:
    """For the baseline of a recipe with LPL: set to their defaults those flags that have no meaning without it."""
    holds_out = values["validation_split"] is not None or values["validation_every_nth"] is not None
    idle = set(idle_without_lpl(names, holds_out))
    for name in sorted(idle):
        values[name] = build_parser().get_default(name)
        warn(f"--lpl_weight 0: {name} of the recipe has no effect and is left out")
    return idle


def _completed(config: Config) -> Config:
    """With the defaults that depend on other flags."""
    optimization, lora, validation = config.optimization, config.lora, config.validation
    name = next((name for name in OPTIMIZERS if name.lower() == optimization.optimizer.lower()), None)
    if name is None:
        raise ValueError(f"--optimizer {optimization.optimizer}: accepted are {' and '.join(OPTIMIZERS)}")
    values: dict[str, Any] = {"optimizer": name}
    if optimization.use_ema and optimization.ema_decay is None:
        values["ema_decay"] = EMA_DECAY_WITH_LPL if config.lpl.enabled else EMA_DECAY
    if lora.lora or lora.rank is not None:
        rank = lora.rank or RANK
        values |= {"lora": True, "rank": rank, "lora_alpha": lora.lora_alpha or float(rank)}
    if config.output.checkpoints_total_limit == 0:
        values["checkpoints_total_limit"] = 1  # what diffusers' scripts do with it
    if validation.validation_prompt is not None:
        if validation.validation_prompts is not None:
            raise ValueError("--validation_prompt and --validation_prompts exclude one another; give one of them")
        values["validation_prompts"] = (validation.validation_prompt,) * validation.num_validation_images
    return config.changed(**values)


# Configuration -> words ----------------------------------------------------------------------------------------------


def recipe(config: Config) -> dict[str, Any]:
    """Every flag of a run, resolved, in YAML's types; as ``--config`` it stands for the same flags."""
    values = {name: value for name, value in config.values().items() if FLAGS[name].in_recipe}
    if config.validation.validation_prompt is not None:
        values["validation_prompts"] = None  # they follow from it
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def words_of(config: Config, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
    """The words that stand for a run: every flag that is not at its default, wherever it came from."""
    words = []
    for name, value in recipe(config).items():
        default = _default(name)
        if not wanted(name) or value is None or value == default:
            continue
        listed = [] if default is False else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, listed)]
    return words


def _default(name: str) -> Any:
    """The value of a flag that nobody gives, in YAML's types."""
    value = next(item.default for item in fields(GROUPS[GROUP_OF[name]]) if item.name == name)
    return list(value) if isinstance(value, tuple) else value


def loss_words(config: Config) -> str:
    """Those of these words that make another latent perceptual loss than the default, as one line."""
    return " ".join(words_of(config, lambda name: name.startswith("lpl_") and not FLAGS[name].same_loss))
