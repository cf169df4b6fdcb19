"""Optimizers and learning rate schedules by the path of their class, ``package.module:Class``.

Nothing else knows which class it is. A class gets the learning rates of the flags, and its own settings from
``--optimizer_args`` and ``--lr_scheduler_args``; what these leave out has the class's defaults. Two steps on a small
weight of its own, a *trial*, show what a class needs before anything is downloaded:

- Classes for matrices only, such as Muon, refuse a vector. They get all weights of two dimensions; AdamW, with the
  flags that it has here, gets the others.
- Classes that average the weights by themselves, as schedule-free ones do, have ``train`` and ``eval``. The average is
  sampled, measured and saved; a checkpoint holds the weights in between, so that a resumed run is exact.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lpl.config.groups import Optimization
from lpl.config.rules import is_path
from lpl.tools.machine import has_gpu
from lpl.tools.words import first_line, warn


ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay", "adam_weight_decay_text_encoder")
ROUNDING = 1e-9  # of a schedule that ends at 0
OBJECTS = {"schedulers", "lr_lambda"}  # arguments of torch's schedules that are no plain values
SIDE = 256  # of the weight that is tried: large enough for states in 8 bits


# Classes -------------------------------------------------------------------------------------------------------------


def class_at(flag: str, path: str, kind: type) -> type[Any]:
    """The class at ``package.module:Class``.

    Raises:
        ValueError: where it cannot be imported, or is none of that kind.
    """
    module, _, name = path.partition(":")
    package = module.partition(".")[0]
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ValueError(
                f"{flag} {path}: it needs {package}: pip install {package}, or change the flag"
            ) from error
        raise ValueError(f"{flag} {path}: {first_line(error)}; accepted is package.module:Class") from error
    except Exception as error:  # a package may raise anything while it is imported
        raise ValueError(
            f"{flag} {path}: it cannot be imported ({first_line(error)}); accepted is package.module:Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{flag} {path}: this is no class of {kind.__module__}.{kind.__name__}")
    return found


def check_optimizer(optimization: Optimization, given: Collection[str] = ()) -> None:
    """Refuse a class that cannot be found or used, and warn of flags that it does not read.

    Args:
        given: names of the given flags.

    Raises:
        ValueError: with the flag to change.
    """
    if is_path(optimization.optimizer):
        found = tried(optimization)
        for name in [] if found.matrices_only else sorted(set(ADAM) & set(given)):
            warn(f"--{name} has no effect on --optimizer {optimization.optimizer}; see --optimizer_args")
        if found.averages and optimization.use_ema:
            raise ValueError(
                f"--use_ema: --optimizer {optimization.optimizer} averages by itself; leave one of them out"
            )
    if is_path(optimization.lr_scheduler):
        factors(optimization, optimization.max_train_steps or 1)


# Optimizers ----------------------------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """What two steps show of a class.

    Args:
        matrices_only: it takes weights of two dimensions only.
        averages: it has ``train`` and ``eval``.
        share: bytes of its state per byte of the weights.
        shapes: each tensor of its state is a number or has its weight's shape, so that it is sharded as the weight is.
    """

    matrices_only: bool
    averages: bool
    share: float
    shapes: bool = True


def tried(optimization: Optimization) -> Trial:
    """See :class:`Trial`.

    Raises:
        ValueError: for a class that cannot be used, with the flag to change.
    """
    return _tried(optimization.optimizer, optimization.optimizer_args)


@lru_cache
def _tried(path: str, words: tuple[str, ...] | None) -> Trial:
    kind, optimization = class_at("--optimizer", path, Optimizer), Optimization(optimizer=path, optimizer_args=words)
    step = inspect.signature(kind.step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        raise ValueError(f"--optimizer {path}: it computes the loss several times a step (closure); choose another")
    matrix, vector = nn.Parameter(torch.ones(SIDE, SIDE)), nn.Parameter(torch.ones(SIDE))
    optimizer = _made(kind, optimization, [matrix], 1e-4)
    try:
        kind([vector], lr=1e-4, **optimization.optimizer_arguments)
        matrices_only = False
    except (ValueError, TypeError):
        matrices_only = True
    averages = averages_weights(optimizer)
    matrix.grad = torch.ones_like(matrix)
    try:
        with torch.random.fork_rng(devices=[]):
            if averages:
                optimizer.train()  # type: ignore[attr-defined]
            for _ in range(2):
                optimizer.step()
        state = list(_tensors(optimizer.state_dict()["state"]))
        share = sum(map(_bytes, state)) / _bytes(matrix)
        shapes = all(tensor.ndim == 0 or tensor.shape == matrix.shape for tensor in state)
    except Exception as error:  # of a package
        if not has_gpu():
            raise ValueError(
                f"--optimizer {path}: its step fails here ({first_line(error)}); choose another"
            ) from error
        share, shapes = 2.0, True  # it needs the GPU; as AdamW
    if not bool(matrix.isfinite().all()):
        raise ValueError(
            f"--optimizer_args {' '.join(words or ()) or '(none)'}: --optimizer {path} makes a weight of 1 infinite "
            "or NaN in two steps; change them"
        )
    return Trial(matrices_only, averages, share, shapes)


def _made(kind: type[Any], optimization: Optimization, parameters: Any, rate: float) -> Optimizer:
    path, arguments = optimization.optimizer, optimization.optimizer_arguments
    try:
        return kind(parameters, lr=rate, **arguments)
    except Exception as error:  # of a package
        known = ", ".join(_settings(kind)) or "nothing"
        words = " ".join(optimization.optimizer_args or ()) or "(none)"
        raise ValueError(
            f"--optimizer_args {words}: --optimizer {path} cannot be made ({first_line(error)}); accepted is {known}"
        ) from error


def _settings(kind: type[Any]) -> list[str]:
    """The names that --optimizer_args or --lr_scheduler_args may give a class."""
    names = list(inspect.signature(kind).parameters)[1:]
    return [name for name in names if name not in ("lr", "last_epoch", "args", "kwargs")]


def optimizer_by_path(
    optimization: Optimization, groups: Sequence[Mapping[str, Any]], adam: Mapping[str, Any]
) -> Optimizer:
    """The optimizer of --optimizer package:Class.

    Args:
        groups: parameters, and what differs from the first group's settings.
        adam: settings of AdamW, with the learning rate.

    Raises:
        ValueError: where there is nothing that it can train.
    """
    kind, found = class_at("--optimizer", optimization.optimizer, Optimizer), tried(optimization)
    own = [{name: group[name] for name in ("params", "lr") if name in group} for group in groups]
    if not found.matrices_only:
        return _made(kind, optimization, own, adam["lr"])
    matrices, others = _of_rank(own, True), _of_rank(groups, False)
    if not matrices:
        raise ValueError(f"--optimizer {optimization.optimizer}: it trains matrices only, and there is none")
    made = _made(kind, optimization, matrices, adam["lr"])
    return MatricesApart(made, torch.optim.AdamW(others, **adam)) if others else made


def _of_rank(groups: Sequence[Mapping[str, Any]], matrices: bool) -> list[dict[str, Any]]:
    """The groups with their matrices, or with all else; no empty ones."""
    parts = [{**group, "params": [p for p in group["params"] if (p.ndim == 2) == matrices]} for group in groups]
    return [part for part in parts if part["params"]]


class MatricesApart(Optimizer):
    """One optimizer for matrices and another one for all other weights, as one."""

    def __init__(self, matrices: Optimizer, others: Optimizer) -> None:
        self.parts = matrices, others
        super().__init__([*matrices.param_groups, *others.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both see the state and the groups that are here."""
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups, first = self.state, self.param_groups[first:last], last

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def averages_weights(optimizer: Any) -> bool:
    """Whether an optimizer averages the weights by itself: they have to be asked for."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def cannot_shard(optimization: Optimization) -> bool:
    """Whether it is known not to update sharded weights."""
    if not is_path(optimization.optimizer):
        return optimization.use_8bit_adam or optimization.optimizer == "prodigy"
    if of_bitsandbytes(optimization):
        return True
    found = tried(optimization)
    return found.averages or not found.shapes  # a state of other shapes could be saved, and not be resumed


def of_bitsandbytes(optimization: Optimization) -> bool:
    """Whether it is of bitsandbytes, whose kernels take a weight's and a state's numbers as they lie in memory."""
    return optimization.use_8bit_adam or optimization.optimizer.startswith("bitsandbytes")


def name_of(optimizer: Any) -> str:
    """What it is called, for users."""
    if isinstance(optimizer, MatricesApart):
        matrices, others = (type(part).__name__ for part in optimizer.parts)
        return f"{matrices} for matrices, {others} for the rest"
    return type(optimizer).__name__


def hyperparameters(optimizer: Any) -> set[str]:
    """The entries of its groups that flags decide; a class may keep more there."""
    parts = getattr(optimizer, "parts", (optimizer,))
    return {"initial_lr"}.union(*(inspect.signature(type(part)).parameters for part in parts))


def bytes_by_path(parameters: Sequence[Tensor], optimization: Optimization) -> int:
    """Bytes of the state for some parameters, about: in proportion to what the trial has shown."""
    found = tried(optimization)
    theirs = [p for p in parameters if p.ndim == 2 or not found.matrices_only]
    taken = sum(map(_bytes, theirs))
    return round(found.share * taken + 2 * (sum(map(_bytes, parameters)) - taken))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in a nest of dicts and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


# Schedules -----------------------------------------------------------------------------------------------------------


def factors(optimization: Optimization, steps: int) -> list[float]:
    """Before each step, and after the last one, the learning rate of --lr_scheduler package:Class as a factor.

    The class sees --learning_rate.

    Raises:
        ValueError: for a class that cannot be used, with the flag to change.
    """
    path, words = optimization.lr_scheduler, " ".join(optimization.lr_scheduler_args or ()) or "(none)"
    kind, rate = class_at("--lr_scheduler", path, LRScheduler), optimization.learning_rate or 1.0
    given = f"--lr_scheduler_args {words}: --lr_scheduler {path}"
    if unfit := OBJECTS.intersection(inspect.signature(kind).parameters):
        raise ValueError(
            f"--lr_scheduler {path}: its {min(unfit)} takes objects or functions, which no flag can give; choose "
            "another class"
        )
    if "metrics" in inspect.signature(kind.step).parameters:
        raise ValueError(f"--lr_scheduler {path}: it follows a metric, and here a schedule follows the step only")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=rate)
    try:
        scheduler = kind(optimizer, **optimization.scheduler_arguments)
    except Exception as error:  # of a package
        raise ValueError(
            f"{given} cannot be made ({first_line(error)}); accepted is {', '.join(_settings(kind)) or 'nothing'}"
        ) from error
    table = [float(optimizer.param_groups[0]["lr"]) / rate]
    optimizer.step()  # torch warns otherwise
    for step in range(steps):
        try:
            scheduler.step()
        except ValueError as error:  # OneCycleLR behind its last step
            raise ValueError(
                f"--lr_scheduler {path}: it ends after {step} steps, and the run has {steps}; change "
                "--lr_scheduler_args or --max_train_steps"
            ) from error
        except Exception as error:  # of a package
            raise ValueError(f"{given} fails after {step} steps ({first_line(error)})") from error
        table.append(float(optimizer.param_groups[0]["lr"]) / rate)
    if wrong := [factor for factor in table if not -ROUNDING < factor < math.inf]:
        raise ValueError(
            f"{given} gives step {table.index(wrong[0]) + 1} the learning rate {wrong[0] * rate:g}; it must be a "
            "finite number, 0 or more"
        )
    return table
