"""Writes a pipeline as one file in the layout of the original; :mod:`lpl.families.single_file` names its weights."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.families.architecture import SPECIFICATION, prediction
from lpl.families.components import the_weights
from lpl.families.description import Description
from lpl.families.single_file import components_of
from lpl.objectives import Epsilon, VPrediction, own_objective
from lpl.tools.files import write_whole
from lpl.tools.machine import DTYPES, SHORT
from lpl.tools.words import warn


def write_single_file(description: Description, folder: Path, target: Path, precision: str | None = None) -> Path:
    """Write a pipeline's weights into one file.

    Args:
        description: of the pipeline in ``folder``.
        precision: of the weights, such as "fp16"; None: of each weight as it is.

    Raises:
        ValueError: for what the original's layout cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    for name, prefix, convert in components_of(description.family, description.parts):
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        try:
            state = {key: _cast(key, tensor, precision) for key, tensor in _weights(folder / name).items()}
            found = convert(config, state)
        except ValueError as error:
            raise ValueError(f"the {name} cannot be written: {error}") from error
        tensors |= {prefix + key: tensor.contiguous() for key, tensor in found.items()}
    objective = own_objective(description.scheduler)
    tensors |= _marks(description, objective)
    title, metadata = target.stem, _metadata(description, objective)
    return write_whole(target, lambda path: save_file(tensors, path, {"modelspec.title": title, **metadata}))


def _weights(folder: Path) -> dict[str, Tensor]:
    names = the_weights(sorted(path.name for path in folder.iterdir()))
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def _cast(name: str, tensor: Tensor, precision: str | None) -> Tensor:
    """A weight in that precision.

    Raises:
        ValueError: where a finite number becomes infinite.
    """
    if precision is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(DTYPES[SHORT[precision]])
    if bool((cast.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"{name} has numbers that {precision} cannot hold; choose bf16")
    return cast


def _marks(description: Description, objective: str) -> dict[str, Tensor]:
    """Empty weights by which programs know how SDXL is sampled; a warning of what they have to be told."""
    if description.family.denoiser_name != "unet" or objective == Epsilon.name:
        return {}
    if objective != VPrediction.name:
        warn(
            f"other programs sample {description.family.name} as a model of noise or v, and this one is of {objective}"
        )
        return {}
    if description.family.name != "stable-diffusion-xl":
        warn("the model predicts v: where a program takes it for a model of noise, tell it")
    names = ["v_pred", *(["ztsnr"] if description.scheduler.config.get("rescale_betas_zero_snr") else [])]
    return {name: torch.tensor([]) for name in names}


def _metadata(description: Description, objective: str) -> dict[str, str]:
    """ModelSpec's description of the file."""
    family = description.family
    architecture, side = family.architecture(description.parts, objective), family.native_resolution(description.parts)
    values = {
        "sai_model_spec": SPECIFICATION,
        "architecture": architecture.name,
        "implementation": architecture.implementation,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": f"{side}x{side}",
        "prediction_type": prediction(objective),
    }
    return {f"modelspec.{name}": value for name, value in values.items()}
