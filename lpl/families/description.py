"""Reads and checks the small configuration files of a pipeline, before its weights are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub.constants import HF_HUB_OFFLINE

from lpl.autoencoders import downscaling_factor, latent_channels
from lpl.config.checks import why_no_pipeline
from lpl.config.groups import Model
from lpl.config.prompts import Entry, text_of
from lpl.families import Family, find_family
from lpl.families.components import lacking
from lpl.families.fit import check_relations, encoder_widths
from lpl.objectives import Objective, get_objective, own_objective, training_scheduler
from lpl.tools.machine import missing
from lpl.tools.trust import check_components, check_weights, components_in
from lpl.tools.words import first_line


@dataclass(frozen=True)
class Description:
    """The small configuration files of a pipeline."""

    family: type[Family]
    index: Mapping[str, Any]  # model_index.json
    vae: Mapping[str, Any]  # of the VAE that is used
    denoiser: Mapping[str, Any]
    scheduler: Any  # a scheduler is its configuration
    listed: Sequence[str]  # components that it has
    absent: Mapping[str, None]  # components that this pipeline lacks, such as SD3's T5 or a safety checker

    @property
    def parts(self) -> dict[str, Mapping[str, Any]]:
        """Configurations of the VAE and of the denoiser, by the component's name."""
        return {"vae": self.vae, self.family.denoiser_name: self.denoiser}

    @property
    def space(self) -> tuple[int, int]:
        """Channels of the latents, and how many pixels wide a latent position is."""
        return latent_channels(self.vae), downscaling_factor(self.vae)

    def training_scheduler(self, prediction_type: str) -> Any:
        """The scheduler to train and sample that objective with: the pipeline's own if it has that objective."""
        if prediction_type == own_objective(self.scheduler):
            return self.scheduler
        return training_scheduler(prediction_type, self.scheduler)

    def objective(self, prediction_type: str) -> Objective:
        return get_objective(prediction_type, self.training_scheduler(prediction_type))

    @property
    def empty_caption(self) -> str | int:
        """The caption that stands for none; for a class-conditional family, the number of classes."""
        return self.family.empty_caption(self.parts)

    @property
    def num_classes(self) -> int | None:
        """For a class-conditional family, whose captions are class labels."""
        return int(self.empty_caption) if self.family.class_conditional else None

    def class_names(self, of_data: Mapping[int, str]) -> dict[int, str]:
        """Names of the classes by label: those of the data come first and replace the model's. Empty unless the family
        is class-conditional."""
        if not self.family.class_conditional:
            return {}
        return dict(of_data) | self.family.class_names(self.index) | dict(of_data)

    def prompts(self, prompts: Sequence[Entry], classes: Mapping[int, str]) -> list[str | int]:
        """Validation prompts as the family takes them: captions, or the labels of classes.

        Raises:
            ValueError: for a class that the model does not have.
        """
        texts = [text_of(prompt) for prompt in prompts]
        if not self.family.class_conditional:
            return list(texts)
        return [self.family.class_label(text, classes) for text in texts]


def read_pipeline(model: Model, blocks: Sequence[str] | None = None, weights: bool = True) -> Description:
    """Family and configurations of --pretrained_model_name_or_path.

    Args:
        blocks: --lpl_blocks, which may name modules of a VAE whose blocks are unknown.
        weights: False: they and the vocabularies need not be there.

    Raises:
        ValueError: if there is no pipeline, or its family or its VAE is not supported.
    """
    path, what = model.pipeline, f"--pretrained_model_name_or_path {model.source}"
    where = {"revision": model.revision, "cache_dir": model.cache_dir}
    try:
        index = _load_config(DiffusionPipeline, path, **where)
    except (OSError, ValueError) as error:
        why = why_no_pipeline(path) or _why_not_on_the_hub(path, first_line(error))
        raise ValueError(f"{what}: {why}") from error
    family = find_family(index.get("_class_name"), what)
    if why := family.why_refused(index):
        raise ValueError(f"{what}: {why}")
    if lacked := [package for package in family.packages if weights and missing(package)]:
        raise ValueError(f"{what}: its tokenizer needs {lacked[0]}: pip install {lacked[0]}")
    check_components(what, index, family.pipeline_class._get_signature_keys(family.pipeline_class)[0])
    components = components_in(index)
    absent = dict.fromkeys(name for name, entry in components.items() if tuple(entry) == (None, None))
    absent |= dict.fromkeys(name for name in family.optional_components if name not in components)
    library, scheduler_class = components.get("scheduler", (None, None))
    if library != "diffusers" or not _is_class(scheduler_class, SchedulerMixin):
        raise ValueError(f"{what}: this version of diffusers has no scheduler {scheduler_class}")
    vae, denoiser, scheduler = (
        _component_config(what, path, name, **where) for name in ("vae", family.denoiser_name, "scheduler")
    )
    if not _is_class(denoiser.get("_class_name"), ModelMixin):
        raise ValueError(
            f"{what}: this version of diffusers has no model {denoiser.get('_class_name')}, the class of its "
            f"{family.denoiser_name}"
        )
    unread = {"vae"} if model.pretrained_vae_model_name_or_path else set()
    unread |= {family.denoiser_name} if model.from_scratch else set()
    taken = inspect.signature(family.pipeline_class.__init__).parameters  # diffusers ignores all others
    listed = [name for name in components if name in taken and name not in absent]
    if weights:
        absent |= dict.fromkeys(lacking(model, family, listed, unread))
        folders = (name for name in listed if name not in unread | absent.keys())
        check_weights(what, path, folders, model.revision)
    used_vae = _used_vae_config(model, vae, family, blocks)
    encoders = {
        name: encoder_widths(what, path, name, index, **where)
        for name in family.text_encoder_names
        if name not in absent or name not in family.optional_components
    }
    _check_fit(what, family, {"vae": used_vae, family.denoiser_name: _with_defaults(denoiser), **encoders})
    return Description(
        family=family,
        index=index,
        vae=used_vae,
        denoiser=denoiser,
        scheduler=getattr(diffusers, scheduler_class).from_config(scheduler),
        listed=[name for name in listed if name not in absent],
        absent=absent,
    )


def _check_fit(what: str, family: type[Family], parts: Mapping[str, Mapping[str, Any]]) -> None:
    name = family.denoiser_name
    try:
        relations = family.relations(parts)
    except (KeyError, TypeError) as error:  # another class has other numbers, or none
        raise ValueError(
            f"{what}: its {name}, {parts[name]['_class_name']}, is none that {family.pipeline_class.__name__} can use "
            f"({first_line(error)})"
        ) from error
    check_relations(what, name, relations)


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration with the defaults of what an older version has not written."""
    parameters = inspect.signature(getattr(diffusers, config["_class_name"])).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)


def _is_class(name: Any, base: type) -> bool:
    """Whether diffusers has a subclass of ``base`` by that name."""
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    return isinstance(found, type) and issubclass(found, base)


def _why_not_on_the_hub(path: str, error: str) -> str:
    if Path(path).is_dir():
        return error
    if path.startswith((".", "~")):
        return "there is no such folder, and no repository on the Hub has such a name"
    if HF_HUB_OFFLINE:
        return (
            "there is no such folder, and no pipeline of that name was downloaded before; since HF_HUB_OFFLINE is "
            "set, it is not looked for on the Hub"
        )
    return (
        "there is no such folder, and no such repository on the Hub with a model_index.json can be reached "
        f"({error}); if it is gated or private, accept its licence on its page and run hf auth login"
    )


def _load_config(reader: type[ConfigMixin], path: str, **where: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], reader.load_config(path, **where))


def _component_config(what: str, path: str, name: str, **where: str | None) -> Mapping[str, Any]:
    reader = DDIMScheduler if name == "scheduler" else AutoencoderKL  # for the name of its file; any class is read
    try:
        return _load_config(reader, path, subfolder=name, **where)
    except (OSError, ValueError) as error:
        reason = "" if Path(path).is_dir() else f" ({first_line(error)})"  # of the Hub
        raise ValueError(f"{what}: the pipeline has no {name} whose configuration can be read{reason}") from error


def _used_vae_config(
    model: Model, own: Mapping[str, Any], family: type[Family], blocks: Sequence[str] | None
) -> Mapping[str, Any]:
    """Of the pipeline's own VAE, or of --pretrained_vae_model_name_or_path."""
    if model.pretrained_vae_model_name_or_path is None:
        check_autoencoder("--pretrained_model_name_or_path: the pipeline's VAE", own, family.vaes, blocks)
        return own
    path = model.pretrained_vae_model_name_or_path
    return other_vae_config("pretrained_vae_model_name_or_path", path, model.cache_dir, own, family.vaes, blocks)


def other_vae_config(
    flag: str,
    path: str,
    cache_dir: str | None,
    own: Mapping[str, Any],
    accepted: Sequence[str],
    blocks: Sequence[str] | None = None,
) -> Mapping[str, Any]:
    """Configuration of the VAE that a flag names.

    Args:
        own: configuration of the pipeline's VAE, whose number of latent channels the other VAE must have.
        accepted, blocks: see :func:`check_autoencoder`.

    Raises:
        ValueError: if there is no VAE, or it is not supported or has other latents.
    """
    try:
        config = _load_config(AutoencoderKL, path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--{flag} {path}: there is no autoencoder ({first_line(error)}); of a pipeline, give its folder vae"
        ) from error
    check_autoencoder(f"--{flag} {path}", config, accepted, blocks)
    check_weights(f"--{flag} {path}", path, [""])
    theirs, ours = latent_channels(config), latent_channels(own)
    if theirs != ours:
        raise ValueError(
            f"--{flag} {path}: its latents have {theirs} channels and the pipeline's {ours}; it must have the same "
            "latent space"
        )
    return config


def check_autoencoder(
    what: str, config: Mapping[str, Any], accepted: Sequence[str], blocks: Sequence[str] | None
) -> None:
    """Refuse an autoencoder of any other class, unless it is one of diffusers and --lpl_blocks names its modules.

    Args:
        what: the flag and its value.
        accepted: names of classes.
        blocks: --lpl_blocks.

    Raises:
        ValueError: with the class, and what is accepted.
    """
    name = config.get("_class_name")
    if name not in accepted and not (blocks and _is_class(name, ModelMixin)):
        raise ValueError(
            f"{what} is of the class {name}; supported are {', '.join(accepted)}; for another class of diffusers, "
            "name modules by their path in --lpl_blocks"
        )
    if "auto_map" in config:
        raise ValueError(f"{what} has code of its own (auto_map in its configuration), which is not run here")


def check_vae_dtype(dtype: str, vae: Mapping[str, Any]) -> None:
    """Refuse float16 for a VAE whose configuration has ``force_upcast``."""
    if dtype == "float16" and vae.get("force_upcast"):
        raise ValueError(
            "--lpl_vae_dtype float16: this VAE overflows in float16 (force_upcast in its configuration); "
            "use bfloat16 or float32"
        )
