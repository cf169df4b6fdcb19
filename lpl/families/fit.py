"""Whether the components of a pipeline fit one another, by their configurations alone.

Vocabulary. A *relation* compares a number of the denoiser's configuration with what the other components, or other
numbers of the same configuration, need it to be. Each family states its own (:meth:`Family.relations`). Text encoders
are known by their :data:`Widths`: ``hidden_size`` of the embeddings, and ``projection_dim`` of a CLIP's pooled output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import transformers
from diffusers import pipelines
from transformers.utils.import_utils import requires_backends

from lpl.autoencoders import latent_channels
from lpl.tools.words import first_line


Widths = dict[str, int]


class Relation(NamedTuple):
    """
    Args:
        name, value: in the denoiser's configuration.
        accepted: what the value may be.
        why: what that is, in words.
    """

    name: str
    value: int
    accepted: Collection[int]
    why: str


def needs(denoiser: Mapping[str, Any], name: str, accepted: int | Collection[int], why: str) -> Relation:
    """The relation of a number of the denoiser's configuration."""
    return Relation(name, denoiser[name], (accepted,) if isinstance(accepted, int) else accepted, why)


def latents(
    denoiser: Mapping[str, Any], vae: Mapping[str, Any], patch: int = 1, variance: bool = False
) -> list[Relation]:
    """The denoiser takes the VAE's latents, in patches of that side, and returns as many channels.

    Args:
        variance: it may return as many again, a learned variance.
    """
    channels = latent_channels(vae) * patch**2
    why = f"channels of the VAE's latents{f' in patches of {patch} x {patch}' if patch > 1 else ''}"
    taken, returned = denoiser["in_channels"], denoiser.get("out_channels") or denoiser["in_channels"]
    return [
        Relation(
            "in_channels", taken, (channels,), f"{why}, and models for inpainting or editing are not trained here"
        ),
        Relation("out_channels", returned, (channels, 2 * channels) if variance else (channels,), why),
    ]


def cross_attention(unet: Mapping[str, Any], width: int, why: str) -> list[Relation]:
    """A UNet attends to embeddings of that width; it may have a width for each block, or a projection before all."""
    name = "encoder_hid_dim" if unet.get("encoder_hid_dim") else "cross_attention_dim"
    found = unet[name] if isinstance(unet[name], list | tuple) else [unet[name]]
    return [Relation(name, value, (width,), why) for value in dict.fromkeys(found) if value is not None]


def captions(transformer: Mapping[str, Any], width: int) -> list[Relation]:
    """A transformer that projects the text encoder's embeddings to its own width, and attends to them there."""
    own = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    return [
        needs(transformer, "caption_channels", width, "width of the text encoder"),
        needs(transformer, "cross_attention_dim", own, "width of its own attention"),
    ]


def check_relations(what: str, denoiser: str, relations: Iterable[Relation]) -> None:
    """Refuse a pipeline whose components do not fit one another.

    Args:
        what: the flag and its value.
        denoiser: the component's name.

    Raises:
        ValueError: with the first number that does not fit, and what would.
    """
    for name, value, accepted, why in relations:
        if value not in accepted:
            needed = f"{accepted[0]} or more" if isinstance(accepted, range) else " or ".join(map(str, accepted))
            raise ValueError(
                f"{what}: its components do not fit one another: {name} of its {denoiser} is {value} and must be "
                f"{needed} ({why}); give a pipeline whose components belong together"
            )


def component_class(entry: Sequence[str]) -> Any:
    """The class of a component by its entry in a pipeline's index, library and name; None: this version has none.

    The library may be a folder of diffusers' pipelines, as for Kolors' text encoder.
    """
    library, name = entry
    module = transformers if library == "transformers" else getattr(pipelines, library, diffusers)
    return getattr(module, name, None)


def encoder_widths(what: str, path: str, name: str, index: Mapping[str, Any], **where: Any) -> Widths:
    """The widths of a text encoder that the pipeline has.

    Args:
        what: the flag and its value.
        index: ``model_index.json``.

    Raises:
        ValueError: where the encoder, or its tokenizer, is missing.
    """
    for part in (name.replace("text_encoder", "tokenizer"), name):
        if tuple(index.get(part) or (None, None)) == (None, None):
            raise ValueError(f"{what}: the pipeline has no {part}, which training needs; give one that has it")
        kind = component_class(index[part])
        if kind is None and part == name:
            raise ValueError(
                f"{what}: this version of {index[name][0]} has no {index[name][1]}, the class of its {name}"
            )
        try:
            requires_backends(kind, getattr(kind, "_backends", []))
        except ImportError as error:
            raise ValueError(f"{what}: its {part} cannot be loaded: {first_line(error)}") from error
    encoder = component_class(index[name])
    try:
        config = encoder.config_class.from_pretrained(path, subfolder=name, **where).get_text_config()
    except Exception as error:  # the libraries raise a dozen kinds
        reason = "" if Path(path).is_dir() else f" ({first_line(error)})"  # of the Hub
        raise ValueError(f"{what}: the pipeline has no {name} whose configuration can be read{reason}") from error
    return {"hidden_size": config.hidden_size, "projection_dim": getattr(config, "projection_dim", 0)}
