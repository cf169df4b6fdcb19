"""All groups of flags together: the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from lpl.config.flag import AS_TRAINED, Flag, flags_of
from lpl.config.groups import Data, Diffusion, Evaluation, Lora, Lpl, Model, Optimization, Output, Validation


Group = TypeVar("Group", Data, Diffusion, Lpl)


@dataclass(frozen=True)
class Config:
    """The configuration of a run. :func:`lpl.families.resolve.resolve` fills in what depends on the pipeline.

    Args:
        given: names of the flags given on the command line, or by a recipe with a value other than the default.
        rerun_of: the ``measured`` entries of the recipe that the run was started from.
        timestep_threshold: ``--lpl_t_threshold`` of diffusers' research script, until ``resolve`` converts it to
            ``--lpl_sigma_threshold``.
    """

    model: Model = Model()
    lora: Lora = Lora()
    data: Data = Data()
    lpl: Lpl = Lpl()
    diffusion: Diffusion = Diffusion()
    optimization: Optimization = Optimization()
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    given: frozenset[str] = frozenset()
    rerun_of: Mapping[str, Any] = field(default_factory=dict)
    timestep_threshold: int | None = None

    def values(self) -> dict[str, Any]:
        """The values of all flags by name."""
        return {name: getattr(getattr(self, group), name) for name, group in GROUP_OF.items()}

    def changed(self, **values: Any) -> Config:
        """Return a copy with other values, given by flag name."""
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            groups.setdefault(GROUP_OF[name], {})[name] = value
        return replace(self, **{name: replace(getattr(self, name), **part) for name, part in groups.items()})


GROUPS: dict[str, type] = {
    item.name: type(item.default) for item in fields(Config) if hasattr(item.default, "__dataclass_fields__")
}
GROUP_OF: dict[str, str] = {name: group for group, kind in GROUPS.items() for name in flags_of(kind)}
FLAGS: dict[str, Flag] = {name: declared for kind in GROUPS.values() for name, declared in flags_of(kind).items()}


def held_out(group: Group) -> Group:
    """A group for the held-out losses: no randomness, and neither loss is modified."""
    return replace(
        group,
        **{
            name: declared.held_out
            for name, declared in flags_of(type(group)).items()
            if declared.held_out is not AS_TRAINED
        },
    )
