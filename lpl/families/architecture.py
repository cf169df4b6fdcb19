"""How sites and other programs name what a LoRA or a checkpoint is for; each family declares its own names.

Two conventions are in use. ModelSpec (github.com/Stability-AI/ModelSpec) identifies an *architecture*, which SwarmUI
and sites read. sd-scripts writes a *version* of the base, which A1111 and managers of LoRA read: without "sdxl_" in
front, or a mark of Stable Diffusion 2, A1111 concludes Stable Diffusion 1.
"""

from __future__ import annotations

from typing import NamedTuple

from lpl.objectives import VPrediction


SPECIFICATION = "1.0.1"  # ModelSpec's version
DIFFUSERS = "diffusers"
STABILITY = "https://github.com/Stability-AI/generative-models"


class Architecture(NamedTuple):
    """The names of an architecture.

    Args:
        name: ``modelspec.architecture`` of a whole model; that of a LoRA has "/lora" behind it.
        version: ``ss_base_model_version``.
        implementation: ``modelspec.implementation``: the code that the names of weights are from, in a file for other
            programs.
        network: ``ss_network_module``, the part of sd-scripts that trains such a LoRA.
        second: ``ss_v2``: Stable Diffusion 2.
    """

    name: str
    version: str
    implementation: str = DIFFUSERS
    network: str = "networks.lora"
    second: bool = False


def prediction(objective: str) -> str:
    """ModelSpec's name of an objective; it has one of v, and for all but epsilon and v others may choose."""
    return "v" if objective == VPrediction.name else objective
