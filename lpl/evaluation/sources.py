"""What a source stands for: a pipeline, or the series of a training run's checkpoints and its result.

Vocabulary. A *source* is what a user names: a folder or an id on the Hub. A *run* is the output folder of the training
script, known by its recipe.yaml; its recipe says which pipeline was trained and how it is sampled. A *model* is one
state that images are drawn with: a pipeline and the *weights*, a folder with the trained parts in diffusers' layout
(``unet/``, ``text_encoder/``, ...) or as LoRA. Only configurations are read here; :mod:`lpl.evaluation.generation`
loads models and draws.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from lpl.config import Config, groups
from lpl.config.command_line import build_parser, config_of
from lpl.config.recipes import Recipe, read_recipe
from lpl.families import Family
from lpl.families.derived import with_derived
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolved_resolution
from lpl.tools.files import entries
from lpl.tools.layout import CHECKPOINT_PREFIX, EMA, INDEX, LOG, LORA, PEFT_SUFFIX, PROGRESS, RECIPE
from lpl.tools.results import check_one_kind
from lpl.tools.trust import components_in
from lpl.tools.words import warn
from lpl.training.checkpoints import Progress, find_checkpoints
from lpl.training.lora import PEFT_FILE


@dataclass(frozen=True)
class Model:
    """One state of a model, found but not loaded."""

    label: str
    step: int | None  # of the run; None: a pipeline that belongs to no run
    config: Config  # of the run, or the training script's defaults
    description: Description
    weights: Path | None = None  # of the trained parts; None: the pipeline's own

    @property
    def name(self) -> str:
        """The label, with the step of a run."""
        return self.label if self.step is None else f"{self.label}, step {self.step}"

    def sampled(self, resolution: int | None = None, steps: int | None = None, guidance: float | None = None) -> Model:
        """The same model with these sampling settings; None keeps the run's or the pipeline's.

        Raises:
            ValueError: for a resolution that the pipeline cannot draw.
        """
        given = {
            "resolution": resolution,
            "validation_inference_steps": steps,
            "validation_guidance_scale": guidance,
        }
        config = self.config.changed(**{name: value for name, value in given.items() if value is not None})
        return replace(self, config=config.changed(resolution=resolved_resolution(config.data, self.description)))

    def settings(self, dtype: str) -> dict[str, Any]:
        """All that decides what the images look like besides prompts and seeds; of a model that is ``sampled``."""
        model = self.config.model
        sampling = (self.config.data, model, self.config.validation, self.description.family, dtype)
        return {
            "pipeline": model.pretrained_model_name_or_path,
            "revision": model.revision,
            "variant": model.variant,
            "vae": model.pretrained_vae_model_name_or_path,
            "weights": None if self.weights is None else str(self.weights),
            "files": self._files(),
            "step": self.step,
            "prediction_type": model.prediction_type,
            **sampling_settings(*sampling),
        }

    def class_names(self) -> dict[int, str]:
        """Names of the classes by label; empty for a model that takes captions."""
        return self.description.class_names({})

    def _files(self) -> str:
        """Changes with weights and configurations: sha256 over names, sizes and times of the local files, and over
        the commits that ids on the Hub stand for."""
        model = self.config.model
        path, vae = model.pipeline, model.pretrained_vae_model_name_or_path
        components = list(components_in(self.description.index))
        places = [Path(path, INDEX), *(Path(path, name) for name in components)]
        sources = [(path, INDEX, model.revision)]
        if vae:
            places.append(Path(vae))
            sources.append((vae, "config.json", None))
        if model.non_ema_revision:
            sources.append((path, INDEX, model.non_ema_revision))
        if self.weights is not None:
            places += [self.weights / LORA, *sorted(self.weights.glob(f"*{PEFT_SUFFIX}"))]
            places += [self.weights / name for name in components]
        found: list[Any] = [_commit(*source, model.cache_dir) for source in sources if not Path(source[0]).is_dir()]
        for place in places:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []:
                status = file.stat()
                found.append((str(file), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def sampling_settings(
    data: groups.Data, model: groups.Model, validation: groups.Validation, family: type[Family], dtype: str
) -> dict[str, Any]:
    """How images are drawn: what the flags say, else the defaults of the pipeline's call."""
    defaults = inspect.signature(family.pipeline_class.__call__).parameters
    steps, guidance = validation.validation_inference_steps, validation.validation_guidance_scale
    return {
        "resolution": data.size[0],
        "num_inference_steps": defaults["num_inference_steps"].default if steps is None else steps,
        "guidance_scale": family.default_guidance() if guidance is None else guidance,
        "max_sequence_length": model.max_sequence_length,
        "dtype": dtype,
    }


def _commit(repository: str, file: str, revision: str | None, cache_dir: str | None) -> str:
    """The commit that a revision stands for in the cache."""
    return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir)).parent.name


# Kinds of sources ----------------------------------------------------------------------------------------------------


def is_run(source: str) -> bool:
    """Whether it is a training run's output folder."""
    return Path(source, RECIPE).is_file()


def is_checkpoint(source: str) -> bool:
    """Whether it is a checkpoint in a training run's output folder."""
    folder = Path(source).resolve()
    return folder.name.startswith(CHECKPOINT_PREFIX) and (folder / PROGRESS).is_file() and is_run(str(folder.parent))


def is_model(source: str) -> bool:
    """Whether images are drawn with it; False for a folder of images."""
    folder = Path(source)
    if not folder.is_dir():
        return True  # an id on the Hub, or a wrong name
    return is_run(source) or is_checkpoint(source) or (folder / INDEX).is_file() or has_adapter(folder)


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA."""
    return (folder / LORA).is_file() or any(folder.glob(f"*{PEFT_SUFFIX}/{PEFT_FILE}"))


# Finding models ------------------------------------------------------------------------------------------------------


def find_models(source: str, label: str | None = None, **flags: Any) -> list[Model]:
    """The models that a source stands for, in the order of their training; reads configurations, not weights.

    A run stands for its checkpoints, with the moving average's weights if it keeps one, and for its result, which
    comes last and replaces the checkpoint of the same step.

    Args:
        label: defaults to the source's own name.
        flags: flags of the training script: ``pretrained_model_name_or_path`` (where a run's base pipeline is now),
            ``cache_dir``, ``max_sequence_length``, and of a pipeline ``revision`` and ``variant``. None is ignored.

    Raises:
        ValueError: if nothing is found, with what is accepted.
    """
    label = label or Path(source).resolve().name
    flags = {name: value for name, value in flags.items() if value is not None}
    if is_checkpoint(source):
        whole = find_models(str(Path(source).resolve().parent), label, **flags)
        step = Progress.load(Path(source)).step
        if not (found := [model for model in whole if model.step == step]):
            raise ValueError(f"--generated {source}: this checkpoint is not whole; give another one, or the run")
        return found
    if not is_run(source):
        check_one_kind(f"--generated {source}", Path(source))
        config = config_of(flags).changed(pretrained_model_name_or_path=source, validation_inference_steps=None)
        return [Model(label, None, *_described(config, source))]
    return _models_of_run(Path(source), label, flags)


def _models_of_run(folder: Path, label: str, flags: Mapping[str, Any]) -> list[Model]:
    flags = {name: value for name, value in flags.items() if name not in ("revision", "variant")}
    values, measured = _read_recipe(folder)
    config = config_of(values | flags)
    lora = config.lora.lora  # a pipeline beside a LoRA is of another run
    whole = (folder / INDEX).is_file() and not lora
    if whole:  # it has frozen parts and scheduler as well, and needs no base pipeline
        absent = ("revision", "variant", "pretrained_vae_model_name_or_path", "non_ema_revision")
        absent += ("single_file_config", "denoiser_model_name_or_path", "merge_lora")
        config = config.changed(**dict.fromkeys(absent), pretrained_model_name_or_path=str(folder))
    config, description = _described(config, str(folder))
    last, max_steps = _last_step(folder), config.optimization.max_train_steps
    if max_steps is None and isinstance(measured.get("max_steps"), int):  # a run by epochs
        max_steps = measured["max_steps"]
    finished = (has_adapter(folder) if lora else whole) and (last is None or last >= (max_steps or last))
    final = max_steps or last
    models = []
    for checkpoint in find_checkpoints(folder):
        step = Progress.load(checkpoint).step
        if not (finished and step == final):
            averaged = checkpoint / EMA
            weights = averaged if averaged.is_dir() else checkpoint
            models.append(Model(label, step, config, description, weights))
    if finished:
        models.append(Model(label, final, config, description, None if whole else folder))
    if not models:
        raise ValueError(f"--generated {folder}: this run has neither a checkpoint nor a result yet")
    return models


def _read_recipe(folder: Path) -> Recipe:
    try:
        values, measured = read_recipe(build_parser("lpl"), str(folder / RECIPE), strict=False)
        if (folder / INDEX).is_file() and not values.get("lora"):  # a published recipe may not name the base
            values.setdefault("pretrained_model_name_or_path", str(folder))
        values["pretrained_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"--generated {folder}: its {RECIPE} was not written by the training script ({error})"
        ) from error
    return Recipe(values, measured)


def _described(config: Config, source: str) -> tuple[Config, Description]:
    """The pipeline's description, and the configuration with the number of tokens that text encoders are given."""
    try:
        config = with_derived(config)
        description = read_pipeline(config.model, config.lpl.lpl_blocks)
    except ValueError as error:
        words = str(error)
        if source != config.model.pretrained_model_name_or_path:
            words += f" (the base pipeline in the recipe of {source}; if it has moved, give its place by this flag)"
        if not is_run(source):  # the source itself is the pipeline
            words = words.replace("--pretrained_model_name_or_path", "--generated")
        raise ValueError(words) from error
    length, most = description.family.sequence_length, description.family.max_sequence_length
    given = config.model.max_sequence_length
    if given is not None and length is None:
        warn(f"--max_sequence_length has no effect on {source}")
    length = None if length is None else given or length
    if most is not None and length is not None and length > most:
        raise ValueError(f"--max_sequence_length {length}: {source} takes at most {most}")
    return config.changed(max_sequence_length=length), description


def _last_step(folder: Path) -> int | None:
    """The last step in the run's log; None without a log."""
    log = folder / LOG
    return max((entry["step"] for entry in entries(log)), default=None) if log.is_file() else None
