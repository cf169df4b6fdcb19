"""Images from a pipeline, or from the checkpoints of a training run, one per prompt and seed.

Vocabulary. A *source* is what a user names: a folder or an id on the Hub. A *run* is the output folder of the training
script, known by its recipe.yaml; its recipe says which pipeline was trained and how it is sampled. A *model* is one
state that images are drawn with: a pipeline, and the *weights*, a folder that holds what was trained of it, in
diffusers' layout (``unet/``, ``text_encoder/``, ...) or as LoRA.

Invariants. Image i follows from the model, prompts[i] and seeds[i], whatever the batch size and the number of
processes; a batch of another size may round otherwise in the last bit. A folder of images holds ``000000.png`` ...,
``metadata.jsonl`` with their captions, so that it is a data set of the kind imagefolder, and ``settings.json``. Images
that are there under the same settings, and can be read, are kept, so that an interrupted command goes on, and a longer
list only adds to a shorter one; a folder that was made under other settings is refused, and nothing in it is touched.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import hf_hub_download
from peft import PeftModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from lpl.config import Config
from lpl.config.command_line import build_parser, config_of
from lpl.config.recipes import read_recipe
from lpl.evaluation.images import METADATA, UNREADABLE
from lpl.evaluation.processes import in_parts, processes, threaded
from lpl.families import Family
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolved_resolution
from lpl.objectives import own_objective, training_scheduler
from lpl.tools.files import write_text
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import save_picture
from lpl.tools.words import first_line, warn
from lpl.training import lora
from lpl.training.average import EMA_FOLDER
from lpl.training.checkpoints import PREFIX, Progress, find_checkpoints
from lpl.training.loading import load_denoiser, pipeline_source, replaced_components
from lpl.training.sampling import decoding_exactly


RECIPE, INDEX, SETTINGS = "recipe.yaml", "model_index.json", "settings.json"


# Which models a source stands for ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One state of a model, found but not loaded."""

    label: str
    step: int | None  # of the run; None: a pipeline that stands for itself
    args: Config  # the flags of the training script, of the run or at their defaults
    configs: Description
    weights: Path | None = None  # of the trained parts; None: the pipeline has them

    @property
    def name(self) -> str:
        """The label, with the step where there is one."""
        return self.label if self.step is None else f"{self.label}, step {self.step}"

    def sampled(self, resolution: int | None = None, steps: int | None = None, guidance: float | None = None) -> Model:
        """The same model with those sampling settings, where given; else they are the run's or the pipeline's.

        Raises:
            ValueError: for a resolution that the pipeline cannot draw.
        """
        given = {
            "resolution": resolution,
            "validation_inference_steps": steps,
            "validation_guidance_scale": guidance,
        }
        args = self.args.changed(**{name: value for name, value in given.items() if value is not None})
        return replace(self, args=args.changed(resolution=resolved_resolution(args.data, self.configs)))

    def settings(self, dtype: str) -> dict[str, Any]:
        """Whatever decides what the images look like, beside prompts and seeds; of a model that is ``sampled``."""
        args = self.args
        return {
            "pipeline": args.pretrained_model_name_or_path,
            "revision": args.revision,
            "variant": args.variant,
            "vae": args.pretrained_vae_model_name_or_path,
            "weights": None if self.weights is None else str(self.weights),
            "files": self._files(),
            "step": self.step,
            "prediction_type": args.prediction_type,
            **sampling_settings(args, self.configs.family, dtype),
        }

    def _files(self) -> str:
        """Changes whenever weights or configurations do: sha256 over names, sizes and times of the local files, and
        over the commits that the Hub's ids stand for."""
        args = self.args
        pipeline, vae = Path(args.pretrained_model_name_or_path), args.pretrained_vae_model_name_or_path
        components = [name for name, entry in self.configs.index.items() if isinstance(entry, list | tuple)]
        places = [pipeline / INDEX, *(pipeline / name for name in components)]
        places += [Path(vae)] if vae else []
        sources = [(str(pipeline), INDEX, args.revision)]
        sources += [(vae, "config.json", None)] if vae else []
        sources += [(str(pipeline), INDEX, args.non_ema_revision)] if args.non_ema_revision else []
        if self.weights is not None:
            places += [self.weights / lora.FILE, *sorted(self.weights.glob("*_lora"))]
            places += [self.weights / name for name in components]
        found: list[Any] = [_commit(*source, args.cache_dir) for source in sources if not Path(source[0]).is_dir()]
        for place in places:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []:
                status = file.stat()
                found.append((str(file), status.st_size, status.st_mtime_ns))
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def sampling_settings(args: Config, family: type[Family], dtype: str) -> dict[str, Any]:
    """How images are drawn: what the flags of the training script say, else the pipeline's own."""
    defaults = inspect.signature(family.pipeline_class.__call__).parameters
    given = {
        "num_inference_steps": args.validation_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }
    return {
        "resolution": args.resolution,
        **{name: defaults[name].default if value is None else value for name, value in given.items()},
        "max_sequence_length": args.max_sequence_length,
        "dtype": dtype,
    }


def _commit(repository: str, file: str, revision: str | None, cache_dir: str | None) -> str:
    """The commit that a repository's revision is at, as the cache has it by now."""
    return Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir)).parent.name


def is_run(source: str) -> bool:
    """Whether it is a training run's output folder."""
    return Path(source, RECIPE).is_file()


def is_checkpoint(source: str) -> bool:
    """Whether it is one checkpoint in such a folder."""
    folder = Path(source).resolve()
    return folder.name.startswith(PREFIX) and (folder / Progress.FILE).is_file() and is_run(str(folder.parent))


def is_model(source: str) -> bool:
    """Whether it holds something to draw images with, and not images."""
    folder = Path(source)
    if not folder.is_dir():
        return True  # an id on the Hub, or nothing
    return is_run(source) or is_checkpoint(source) or (folder / INDEX).is_file() or _has_adapter(folder)


def find_models(source: str, label: str | None = None, **flags: Any) -> list[Model]:
    """The models that a source stands for, in the order of their training; configurations are read, weights not.

    A run stands for its checkpoints, under the moving average's weights where they have one, and for its result, the
    last. A checkpoint at the result's own step is left out.

    Args:
        label: default: the source's own name.
        flags: of the training script where they are given here: ``pretrained_model_name_or_path`` (where a run's base
            pipeline is now), ``cache_dir``, ``max_sequence_length``, and of a pipeline ``revision`` and ``variant``.

    Raises:
        ValueError: where nothing is found, with what is accepted.
    """
    label = label or Path(source).resolve().name
    flags = {name: value for name, value in flags.items() if value is not None}
    if is_checkpoint(source):
        whole = find_models(str(Path(source).resolve().parent), label, **flags)
        step = Progress.load(Path(source)).step
        return [model for model in whole if model.step == step]
    if not is_run(source):
        args = config_of(flags).changed(pretrained_model_name_or_path=source, validation_inference_steps=None)
        return [Model(label, None, *_with_configs(args, source))]
    return _models_of_run(Path(source), label, flags)


def _models_of_run(folder: Path, label: str, flags: Mapping[str, Any]) -> list[Model]:
    flags = {name: value for name, value in flags.items() if name not in ("revision", "variant")}
    args = config_of(_read_recipe(folder) | flags)
    whole = (folder / INDEX).is_file()
    if whole:  # it has the frozen parts and the scheduler too, wherever the base pipeline may be now
        absent = ("revision", "variant", "pretrained_vae_model_name_or_path", "non_ema_revision")
        args = args.changed(**dict.fromkeys(absent), pretrained_model_name_or_path=str(folder))
    args, configs = _with_configs(args, str(folder))
    last = _last_step(folder)
    finished = (whole or _has_adapter(folder)) and (last is None or last >= (args.max_train_steps or last))
    final = args.max_train_steps or last
    models = []
    for checkpoint in find_checkpoints(folder):
        step = Progress.load(checkpoint).step
        if not (finished and step == final):
            averaged = checkpoint / EMA_FOLDER
            models.append(Model(label, step, args, configs, averaged if averaged.is_dir() else checkpoint))
    if finished:
        models.append(Model(label, final, args, configs, None if whole else folder))
    if not models:
        raise ValueError(f"--generated {folder}: this run has neither a checkpoint nor a result yet")
    return models


def _read_recipe(folder: Path) -> dict[str, Any]:
    try:
        values = read_recipe(build_parser("lpl"), str(folder / RECIPE), strict=False).values
        if (folder / INDEX).is_file():  # a published one may not say what it was made of
            values.setdefault("pretrained_model_name_or_path", str(folder))
        values["pretrained_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"--generated {folder}: its {RECIPE} is none that the training script has written ({error})"
        ) from error
    return values


def _with_configs(args: Config, source: str) -> tuple[Config, Description]:
    """With how many tokens the text encoders are given, and the pipeline's configurations."""
    try:
        configs = read_pipeline(args.model, args.lpl.lpl_blocks)
    except ValueError as error:
        words = str(error)
        if source != args.pretrained_model_name_or_path:
            words += f" (the base pipeline in the recipe of {source}; say by this flag where it is now)"
        raise ValueError(words if is_run(source) else words.replace(*_FLAGS)) from error
    length, most = configs.family.sequence_length, configs.family.max_sequence_length
    if args.max_sequence_length is not None and length is None:
        warn(f"--max_sequence_length has no effect on {source}")
    length = None if length is None else args.max_sequence_length or length
    if most is not None and length is not None and length > most:
        raise ValueError(f"--max_sequence_length {length}: {source} takes {most} at most")
    return args.changed(max_sequence_length=length), configs


_FLAGS = ("--pretrained_model_name_or_path", "--generated")


def _last_step(folder: Path) -> int | None:
    """The last step in the run's log; None where there is no log."""
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.strip()), default=None)


def _has_adapter(folder: Path) -> bool:
    return (folder / lora.FILE).is_file() or any(folder.glob(f"*_lora/{lora.PEFT_FILE}"))


# Loading them --------------------------------------------------------------------------------------------------------


def load_model(model: Model, device: torch.device | str = "cpu", dtype: str = "float32") -> Family:
    """The model, ready to draw: text encoders and denoiser in ``dtype``, the VAE always in float32.

    Raises:
        ValueError: where weights are missing or cannot be loaded.
    """
    args, configs = model.args, model.configs
    family = configs.family
    reduced = dict.fromkeys((*family.text_encoder_names, family.denoiser_name), DTYPES[dtype])
    if dtype == "float16":
        reduced |= dict.fromkeys(family.no_float16, torch.bfloat16)
    try:
        components = replaced_components(args.model) | trained_parts(model, reduced)
        if args.lora.lora and args.non_ema_revision:
            components[family.denoiser_name] = load_denoiser(
                args.model, None, configs, DTYPES[dtype], args.non_ema_revision
            )
        loaded = family.load(
            args.pretrained_model_name_or_path,
            {"default": torch.float32, **reduced},
            max_sequence_length=args.max_sequence_length,
            guidance_scale=args.guidance_scale,
            **pipeline_source(args.model, configs) | dict(family.left_out) | components,
        )
        if model.weights is not None and _has_adapter(model.weights):
            _add_adapters(loaded, model.weights)
    except (OSError, ValueError) as error:
        if str(error).startswith("--"):  # it is in our words already
            raise
        raise ValueError(
            f"--generated {model.name}: its weights cannot be loaded; look at --variant and --revision "
            f"({first_line(error)})"
        ) from error
    scheduler = configs.scheduler
    if args.prediction_type not in (None, own_objective(scheduler)):
        scheduler = training_scheduler(args.prediction_type, scheduler)
        loaded.pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))
    for part in (loaded.vae, loaded.denoiser, *loaded.text_encoders):
        part.to(device).eval()
    return loaded


def trained_parts(model: Model, dtypes: Mapping[str, torch.dtype]) -> dict[str, nn.Module]:
    """Those parts of the pipeline that lie whole in the weights' folder.

    Raises:
        ValueError: where there are neither parts nor adapters.
    """
    if model.weights is None:
        return {}
    family, index = model.configs.family, model.configs.index
    parts = {}
    for name in (family.denoiser_name, *family.trainable_text_encoders):
        if (folder := model.weights / name).is_dir():
            library, class_name = index[name]
            kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
            parts[name] = kind.from_pretrained(folder, dtype=dtypes[name], use_safetensors=True)
    if not parts and not _has_adapter(model.weights):
        raise ValueError(f"--generated {model.name}: {model.weights} holds neither trained parts nor a LoRA")
    return parts


def _add_adapters(family: Family, folder: Path) -> None:
    """LoRA as the trainer writes it: by the pipeline's own loader, or of peft for each part (lpl.lora)."""
    if (folder / lora.FILE).is_file():
        family.pipeline.load_lora_weights(str(folder), weight_name=lora.FILE, use_safetensors=True)
        return
    for place in sorted(folder.glob(f"*_lora/{lora.PEFT_FILE}")):
        part = getattr(family.pipeline, place.parent.name.removesuffix("_lora"))
        PeftModel.from_pretrained(part, str(place.parent))  # in place


# Drawing -------------------------------------------------------------------------------------------------------------


def draw(
    family: Family,
    prompts: Sequence[str | int],
    seeds: Sequence[int],
    resolution: int,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Image.Image]:
    """One image per prompt, in their order; the noise of each is of its own seed.

    Args:
        family: loaded, in eval mode, on one device.
        prompts: captions; class labels of a class-conditional family.
        resolution: side in pixels.
        steps, guidance: None: the pipeline's own.
        dtype: of autocast; float32: none.
    """
    family.pipeline.set_progress_bar_config(disable=True)
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    device = family.vae.device
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        with torch.no_grad(), autocast, decoding_exactly(family.vae):
            images = family.pipeline(
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                **sampling,
                **_batched(family, prompts[part], resolution),
            ).images
        yield from images


def _batched(family: Family, prompts: Sequence[str | int], resolution: int) -> dict[str, Any]:
    """How the pipeline is called to draw several prompts at once."""
    calls = [family.call_arguments(prompt, resolution, resolution) for prompt in prompts]
    if family.class_conditional:
        return calls[0] | {"class_labels": [label for call in calls for label in call["class_labels"]]}
    return calls[0] | {"prompt": [call["prompt"] for call in calls]}


def generate(
    source: str | Model,
    prompts: Sequence[str | int],
    seeds: Sequence[int],
    folder: str | os.PathLike,
    *,
    resolution: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    progress: bool = True,
    **flags: Any,
) -> Path:
    """Draw image i from prompts[i] and seeds[i] into a folder; with several processes each draws a part, all wait.

    Args:
        source: a pipeline, a checkpoint, or a run, of which the result or else the last checkpoint is taken.
        prompts: captions; class labels (numbers) of a class-conditional model.
        folder: empty, new, or one that this function has filled under the same settings, and goes on with.
        resolution: side in pixels; default, as of ``steps`` and ``guidance``: the run's, else the pipeline's.
        device: default: that of this process.
        dtype: of denoiser and text encoders: float32, bfloat16 or float16.
        flags: as in :func:`find_models`.

    Returns:
        The folder.

    Raises:
        ValueError: for a source that is none, and a folder that holds other images.
    """
    if len(prompts) != len(seeds) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give as many of one as of the other")
    model = find_models(source, **flags)[-1] if isinstance(source, str) else source
    model = model.sampled(resolution, steps, guidance)
    state = processes(cpu=device is not None and torch.device(device).type == "cpu")
    folder = Path(folder)
    with state.main_process_first():
        _prepare(folder, model, prompts, seeds, dtype)
    there = in_parts(len(prompts), lambda mine: threaded(lambda number: _is_whole(image_path(folder, number)), mine))
    missing = [number for number, whole in enumerate(there) if not whole]
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        args = model.args
        family = load_model(model, device or state.device, dtype)
        images = draw(
            family,
            [prompts[number] for number in mine],
            [seeds[number] for number in mine],
            args.resolution,
            args.validation_inference_steps,
            args.validation_guidance_scale,
            batch_size,
            DTYPES[dtype],
        )
        shown = progress and state.is_main_process
        for number, image in zip(tqdm(mine, desc=f"drawing {model.name}", disable=not shown), images, strict=True):
            save_picture(image, image_path(folder, number))
    state.wait_for_everyone()
    return folder


def image_path(folder: Path, number: int) -> Path:
    """Where image ``number`` lies."""
    return folder / f"{number:06d}.png"


def _is_whole(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
    except UNREADABLE:  # where there is none, too
        return False
    return True


def _prepare(folder: Path, model: Model, prompts: Sequence[str | int], seeds: Sequence[int], dtype: str) -> None:
    """Refuse a folder with other images; write what it will hold, unless it holds as much already."""
    settings = json.loads(json.dumps(model.settings(dtype)))
    wanted = {"prompts": list(prompts), "seeds": list(seeds)}
    count = len(prompts)
    if (folder / SETTINGS).is_file():
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        parts = {name: found.pop(name, []) for name in wanted}
        other = [name for name, value in settings.items() if found.get(name) != value]
        overlap = min(count, len(parts["seeds"]))
        other += [name for name, values in wanted.items() if values[:overlap] != parts[name][:overlap]]
        if other:
            raise ValueError(
                f"{folder} holds images that were drawn with another {', '.join(other)}; give another folder, or "
                "remove this one"
            )
        if overlap == count:
            return
    elif folder.is_dir() and any(file.name != METADATA for file in folder.iterdir()):
        raise ValueError(f"{folder} holds files that were not drawn here; give an empty folder, or a new one")
    family = model.configs.family
    names = family.class_names(model.configs.index) if family.class_conditional else {}
    lines = [_metadata(number, prompt, seed, names) for number, (prompt, seed) in enumerate(zip(prompts, seeds))]
    write_text(folder / METADATA, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / SETTINGS, json.dumps(settings | wanted, indent=2, ensure_ascii=False) + "\n")


def _metadata(number: int, prompt: str | int, seed: int, names: Mapping[int, str]) -> dict[str, Any]:
    """A line of metadata.jsonl; of a class, its label and its name."""
    label = {"label": prompt} if isinstance(prompt, int) else {}
    text = names.get(prompt, str(prompt)) if isinstance(prompt, int) else prompt
    return {"file_name": f"{number:06d}.png", "text": text, **label, "seed": seed}
