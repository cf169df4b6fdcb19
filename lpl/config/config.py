"""All groups of flags together: what a run was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from lpl.config.flag import AS_TRAINED, Flag, flags_of
from lpl.config.groups import Data, Diffusion, Evaluation, Lora, Lpl, Model, Optimization, Output, Validation


Group = TypeVar("Group", Data, Diffusion, Lpl)


@dataclass(frozen=True)
class Config:
    """What was asked for. Complete once :func:`lpl.families.resolve.resolve` has filled in what follows the pipeline.

    Args:
        given: flags that were given, by words or by a recipe that says something else than the default.
        rerun_of: what the recipe that the run was started from has measured.
        timestep_threshold: ``--lpl_t_threshold`` of diffusers' research script, until ``resolve`` states it as
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
        """Every flag's value by its name."""
        return {name: getattr(getattr(self, group), name) for name, group in GROUP_OF.items()}

    def changed(self, **values: Any) -> Config:
        """The same with other values of flags, by their names."""
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
    """A group as it is where the held-out losses are computed: nothing is random, and both losses are plain."""
    return replace(
        group,
        **{
            name: declared.held_out
            for name, declared in flags_of(type(group)).items()
            if declared.held_out is not AS_TRAINED
        },
    )
