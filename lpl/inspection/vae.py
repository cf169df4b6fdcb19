"""The VAE that is inspected: a pipeline's, that of a single file, or one alone.

Of a single file, whose weights have the original's names, only the VAE is read. A file without one gets it from the
pipeline that its configuration is from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from lpl.autoencoders import SUPPORTED, decoder_blocks, skeleton
from lpl.config.groups import Lpl, Model
from lpl.families.checkpoint_files import component_names, load_component, local_file, read_header
from lpl.families.derived import derived, origin
from lpl.families.description import check_autoencoder, check_vae_dtype
from lpl.tools.single_files import single_file
from lpl.tools.trust import check_components, check_weights, components_in
from lpl.tools.words import first_line


VAE = "vae"  # its name in a pipeline


def with_configuration(model: Model) -> Model:
    """The flags with a folder that has the configuration of a single file, or with the pipeline that has its VAE.

    Raises:
        ValueError: if the file is none that can be used.
    """
    found = derived(replace(model, denoiser_model_name_or_path=None, merge_lora=None), weights=False)
    if (source := origin(found)) is None:
        return found
    config, not_in_file = source
    if VAE in not_in_file:
        return replace(found, pretrained_model_name_or_path=config, revision=None, folder=None)
    return found


def find_vae(model: Model, blocks: Sequence[str] | None = None) -> tuple[str | None, Mapping[str, Any]]:
    """The VAE's subfolder and its configuration; the model is a pipeline, or a VAE itself (no subfolder).

    Args:
        blocks: ``--lpl_blocks``.

    Raises:
        ValueError: if no VAE is found, or none that is supported.
    """
    path, what, problem = model.pipeline, f"--pretrained_model_name_or_path {model.source}", ""
    subfolders: list[str | None] = [None, VAE]
    try:
        index: Any = DiffusionPipeline.load_config(path, revision=model.revision, cache_dir=model.cache_dir)
    except (OSError, ValueError):
        pass
    else:
        check_components(what, index)
        components = {name: entry[-1] for name, entry in components_in(index).items()}
        subfolders = [name for name, kind in components.items() if kind in SUPPORTED] or [VAE]
    for subfolder in subfolders:
        try:  # AutoencoderKL knows the file's name, whatever the class
            config: Any = AutoencoderKL.load_config(
                path, subfolder=subfolder, revision=model.revision, cache_dir=model.cache_dir
            )
        except (OSError, ValueError) as error:
            problem = first_line(error)
            continue
        check_autoencoder(f"{what}: its VAE", config, SUPPORTED, blocks)
        if model.folder is None:
            check_weights(what, path, [subfolder or ""], model.revision)
        return subfolder, config
    raise ValueError(f"{what}: neither a pipeline nor a VAE is found there ({problem})")


def check_vae(lpl: Lpl, config: Mapping[str, Any]) -> None:
    """Refuse blocks and a precision that the VAE does not support.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    decoder_blocks(skeleton(config), lpl.lpl_blocks)
    check_vae_dtype(lpl.lpl_vae_dtype, config)


def load_vae(model: Model, subfolder: str | None, config: Mapping[str, Any], device: torch.device) -> ModelMixin:
    """The VAE in float32, frozen, on the device.

    Args:
        model: as :func:`with_configuration` returns it.
        subfolder, config: as :func:`find_vae` returns them.
    """
    if model.folder is not None:
        vae: Any = _from_file(model, getattr(diffusers, config["_class_name"])).float()
    else:
        vae = AutoModel.from_pretrained(
            model.source,
            revision=model.revision,
            variant=model.variant,
            cache_dir=model.cache_dir,
            dtype=torch.float32,
            use_safetensors=True,
            **({} if subfolder is None else {"subfolder": subfolder}),
        )
    return vae.requires_grad_(False).eval().to(device)


def _from_file(model: Model, kind: type) -> ModelMixin:
    source = single_file(model.source)
    assert source is not None and model.folder is not None
    file = local_file(source, model.revision, model.cache_dir)
    header, _ = read_header(str(file), None, None)
    names = component_names(header, VAE, kind, "")
    try:
        return cast(ModelMixin, load_component(file, header, names, kind, Path(model.folder), VAE))
    except ValueError as error:
        raise ValueError(f"--pretrained_model_name_or_path {model.source}: {error}") from error
