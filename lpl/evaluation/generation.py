"""Draws images with a pipeline or with a checkpoint of a training run, one per prompt and seed.

Invariants. Image i follows from the model, prompts[i] and seeds[i], whatever the batch size and the number of
processes; another batch size may change the last bit. A folder of images holds ``000000.png`` ..., ``metadata.jsonl``
with their captions, so that it is a data set of the kind imagefolder, and ``settings.json``. Readable images that were
drawn under the same settings are kept: an interrupted command continues, and a longer list adds to a shorter one. A
folder that was drawn under other settings is refused and left untouched. Which models a source stands for:
:mod:`lpl.evaluation.sources`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from lpl.evaluation.images import METADATA, UNREADABLE
from lpl.evaluation.processes import in_parts, processes, threaded
from lpl.evaluation.sources import Model, has_adapter
from lpl.families import Family
from lpl.families.fit import component_class
from lpl.objectives import own_objective
from lpl.tools.files import write_text
from lpl.tools.layout import LORA, PEFT_SUFFIX, SETTINGS
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import save_picture
from lpl.tools.words import first_line
from lpl.training.loading import load_denoiser, pipeline_source, replaced_components
from lpl.training.lora import PEFT_FILE
from lpl.training.sampling import decoding_exactly


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(model: Model, device: torch.device | str = "cpu", dtype: str = "float32") -> Family:
    """The model, ready to draw: text encoders and denoiser in ``dtype``, the VAE always in float32.

    Raises:
        ValueError: if weights are missing or cannot be loaded.
    """
    try:
        loaded = _loaded(model, dtype)
    except (OSError, ValueError) as error:
        if str(error).startswith("--"):  # one of our own messages
            raise
        raise ValueError(
            f"--generated {model.name}: its weights cannot be loaded; check --variant and --revision "
            f"({first_line(error)})"
        ) from error
    description, prediction_type = model.description, model.config.model.prediction_type
    if prediction_type is not None and prediction_type != own_objective(description.scheduler):
        scheduler = description.training_scheduler(prediction_type)
        loaded.pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config))
    parts: list[nn.Module] = [loaded.vae, loaded.denoiser, *loaded.text_encoders]
    for part in parts:
        part.to(device).eval()
    return loaded


def _loaded(model: Model, dtype: str) -> Family:
    """The model on the CPU, with the trained weights or the LoRA."""
    config, description, family = model.config, model.description, model.description.family
    reduced = dict.fromkeys((*family.text_encoder_names, family.denoiser_name), DTYPES[dtype])
    if dtype == "float16":
        reduced |= dict.fromkeys(family.no_float16, torch.bfloat16)
    components = replaced_components(config.model) | trained_parts(model, reduced)
    if config.lora.lora and config.model.non_ema_revision:
        components[family.denoiser_name] = load_denoiser(
            config.model, None, description, DTYPES[dtype], config.model.non_ema_revision
        )
    loaded = family.load(
        config.model.pipeline,
        {"default": torch.float32, **reduced},
        max_sequence_length=config.model.max_sequence_length,
        guidance_scale=config.model.guidance_scale,
        **(pipeline_source(config.model, description) | family.left_out() | components),
    )
    if model.weights is not None and config.lora.lora:
        _add_adapters(loaded, model.weights)
    return loaded


def trained_parts(model: Model, dtypes: Mapping[str, torch.dtype]) -> dict[str, nn.Module]:
    """The pipeline's components that the weights' folder holds in full.

    Raises:
        ValueError: if it holds neither components nor adapters.
    """
    if model.weights is None or (has_adapter(model.weights) and model.config.lora.lora):
        return {}
    family, index = model.description.family, model.description.index
    parts: dict[str, nn.Module] = {}
    for name in (family.denoiser_name, *family.trainable_text_encoders):
        if (folder := model.weights / name).is_dir():
            parts[name] = component_class(index[name]).from_pretrained(
                folder, dtype=dtypes[name], use_safetensors=True
            )
    if not parts:
        raise ValueError(f"--generated {model.name}: {model.weights} holds neither trained parts nor a LoRA")
    return parts


def _add_adapters(family: Family, folder: Path) -> None:
    """Load a LoRA as the trainer writes it: by the pipeline's own loader, or by peft for each part."""
    if (folder / LORA).is_file():
        family.pipeline.load_lora_weights(str(folder), weight_name=LORA, use_safetensors=True)
        return
    for place in sorted(folder.glob(f"*{PEFT_SUFFIX}/{PEFT_FILE}")):
        part = getattr(family.pipeline, place.parent.name.removesuffix(PEFT_SUFFIX))
        PeftModel.from_pretrained(part, str(place.parent))  # in place


# Drawing -------------------------------------------------------------------------------------------------------------


def draw(
    family: Family,
    prompts: Sequence[str | int],
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Image.Image]:
    """One image per prompt, in their order; each draws its noise from its own seed.

    Args:
        family: loaded, in eval mode, on one device.
        prompts: captions, or class labels of a class-conditional family.
        size: height and width in pixels.
        steps, guidance: None: the pipeline's own.
        dtype: of autocast; float32 turns it off.
    """
    family.pipeline.set_progress_bar_config(disable=True)
    batch_size = 1 if family.guides_by_prompt else batch_size
    sampling = {"num_inference_steps": steps, family.guidance_argument: guidance}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    device = _device(family)
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        with torch.no_grad(), autocast, family.encoding_exactly(), decoding_exactly(family.vae):
            drawn = cast(Any, family.pipeline)(
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                **sampling,
                **_batched(family, prompts[part], size),
            )
        yield from family.images_of(drawn)


def _device(family: Family) -> torch.device:
    return next(family.vae.parameters()).device


def _batched(family: Family, prompts: Sequence[str | int], size: tuple[int, int]) -> dict[str, Any]:
    """The pipeline's arguments for several prompts at once."""
    calls = [family.call_arguments(prompt, *size) for prompt in prompts]
    if family.class_conditional:
        return calls[0] | {"class_labels": [label for call in calls for label in call["class_labels"]]}
    texts = [name for name in ("prompt", "negative_prompt") if name in calls[0]]
    return calls[0] | {name: [call[name] for call in calls] for name in texts}


def generate(
    model: Model,
    prompts: Sequence[str | int],
    seeds: Sequence[int],
    folder: str | os.PathLike,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    dtype: str = "float32",
) -> Path:
    """Draw image i from prompts[i] and seeds[i] into a folder; each process draws a part, and waits for the others.

    Args:
        model: its configuration says at which size, with how many steps and which guidance (:meth:`Model.sampled`).
        prompts: captions, or class labels (numbers) of a class-conditional model.
        folder: empty, new, or one that this function has begun to fill under the same settings.
        device: defaults to that of this process.
        dtype: of denoiser and text encoders: float32, bfloat16 or float16.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder holds other images.
    """
    if len(prompts) != len(seeds) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give the same number of both, at least one")
    state = processes(cpu=device is not None and torch.device(device).type == "cpu")
    folder = Path(folder)
    with state.main_process_first():
        _prepare(folder, model, prompts, seeds, dtype)
    there = in_parts(len(prompts), lambda mine: threaded(lambda number: _is_whole(image_path(folder, number)), mine))
    missing = [number for number, whole in enumerate(there) if not whole]
    mine = missing[state.process_index :: state.num_processes]
    if mine:
        validation = model.config.validation
        family = load_model(model, device or cast(torch.device, state.device), dtype)
        if slicing := getattr(family.vae, "enable_slicing", None):  # images are decoded one at a time
            slicing()
        images = draw(
            family,
            [prompts[number] for number in mine],
            [seeds[number] for number in mine],
            model.config.data.size,
            validation.validation_inference_steps,
            validation.validation_guidance_scale,
            batch_size,
            DTYPES[dtype],
        )
        shown = tqdm(mine, desc=f"drawing {model.name}", disable=not state.is_main_process)
        for number, image in zip(shown, images, strict=True):
            save_picture(image, image_path(folder, number))
    state.wait_for_everyone()
    return folder


def image_path(folder: Path, number: int) -> Path:
    """The file of image ``number``."""
    return folder / f"{number:06d}.png"


def _is_whole(file: Path) -> bool:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.load()
    except UNREADABLE:  # also if there is no file
        return False
    return True


def _prepare(folder: Path, model: Model, prompts: Sequence[str | int], seeds: Sequence[int], dtype: str) -> None:
    """Refuse a folder with other images; write metadata and settings unless they already cover these prompts."""
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
    names = model.class_names()
    lines = [_metadata(number, prompt, seed, names) for number, (prompt, seed) in enumerate(zip(prompts, seeds))]
    write_text(folder / METADATA, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / SETTINGS, json.dumps(settings | wanted, indent=2, ensure_ascii=False) + "\n")


def _metadata(number: int, prompt: str | int, seed: int, names: Mapping[int, str]) -> dict[str, Any]:
    """A line of metadata.jsonl; a class has both label and name."""
    label = {"label": prompt} if isinstance(prompt, int) else {}
    return {"file_name": f"{number:06d}.png", "text": prompt_text(prompt, names), **label, "seed": seed}


def prompt_text(prompt: str | int, names: Mapping[int, str]) -> str:
    """A caption as it is; for a class label its name, else its number.

    >>> prompt_text("a cat", {}), prompt_text(1, {1: "goldfish"}), prompt_text(2, {1: "goldfish"})
    ('a cat', 'goldfish', '2')
    """
    return names.get(prompt, str(prompt)) if isinstance(prompt, int) else prompt
