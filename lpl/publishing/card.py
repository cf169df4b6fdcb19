"""The model card of a run: README.md, with YAML metadata for the Hub and text for visitors.

A *card* says what a stranger needs to trust a model, to use it and to train it again, after a run or during one
(``max_steps``). :class:`~lpl.publishing.run_card.RunCard` holds the facts, :class:`Result` finds the files to show,
and ``card.md.j2`` is the text. The card is public: it shows no path and no token of this machine
(:mod:`lpl.tools.privacy`). Only the *address*, the repository's id or ``path/to/NAME``, may change later
(:mod:`lpl.publishing.card_edits`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from lpl.config.choices import ADAPTER_NAMES, OFT
from lpl.config.prompts import NEGATIVE
from lpl.families import FAMILIES
from lpl.publishing.hub import MAIN, address
from lpl.publishing.public_recipe import left_to_give, local_sources, rerun_command
from lpl.publishing.run_card import RunCard
from lpl.tools import layout, words
from lpl.tools.files import write_whole
from lpl.tools.headers import read_header
from lpl.tools.privacy import (
    hub_file,
    is_hub_id,
    is_local,
    local_name,
    public_command,
    shown,
    without_secrets,
)
from lpl.tools.results import last_samples, single_files


TEMPLATE = Path(__file__).with_name("card.md.j2")
HUB = "https://huggingface.co"
EXAMPLES = 12  # most examples of the widget
GRIDS = 6  # most grids of samples between the first and the last step
LINE = 100  # most characters of a command on one line


def write_model_card(folder: str | os.PathLike, card: RunCard) -> Path:
    """Write README.md into `folder`, which holds the result already: the card shows the files that it finds there.

    Returns:
        The path of README.md.
    """
    result = Result(Path(folder), card)
    functions = (fence, link, literal, loading_source, public_command, quote, is_hub_id, is_local, shown)
    values: dict[str, Any] = {function.__name__: function for function in functions}
    values |= {"size": words.size, "duration": words.duration, "layout": layout, "card": card, "result": result}
    content = ModelCard.from_template(result.metadata(), str(TEMPLATE), **values).content
    content = encodable(without_secrets(content))
    return write_whole(result.folder / layout.CARD, ModelCard(content).save)


@dataclass(frozen=True)
class Samples:
    """The images that validation drew at one step.

    Args:
        place: their folder, within the output folder.
    """

    place: str
    prompts: Sequence[str | int]
    seed: int  # of the first one
    negatives: Sequence[str | None] = ()  # of the prompts, if any has one

    def image(self, number: int) -> str:
        return f"{self.place}/{number:02d}.png"


@dataclass(frozen=True)
class Result:
    """A run's output folder as its card shows it: paths are within the folder, and of files that exist."""

    folder: Path
    card: RunCard

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    @property
    def address(self) -> str:
        """What loads the result: the repository's id or ``path/to/NAME``."""
        return self.card.repo_id or local_name(self.folder)

    @property
    def title(self) -> str:
        return self.address.rpartition("/")[2]

    def metadata(self) -> ModelCardData:
        """What the Hub indexes; only Hub ids count as base model and data set there.

        The task of class-conditional models is unconditional generation, the nearest one that the Hub knows.
        """
        card = self.card
        place = hub_file(card.base_model)
        base_model = card.base_model if place is None else place.repository
        on_hub = is_hub_id(base_model) and not card.from_scratch
        task = "unconditional-image-generation" if card.class_conditional else "text-to-image"
        tags = ["diffusers", *(["class-conditional"] if card.class_conditional else []), task]
        tags += ["diffusers-training", *([card.adapter] if card.lora_rank else []), *card.tags]
        return ModelCardData(
            **({} if card.from_scratch else card.licence),
            base_model=base_model if on_hub else None,
            base_model_relation=("adapter" if card.lora_rank else "finetune") if on_hub else None,
            eval_results=list(card.results) or None,
            model_name=self.title if card.results else None,
            datasets=list(filter(is_hub_id, (card.dataset, *card.other_datasets))) or None,
            inference=True,
            instance_prompt=None if card.trigger is None else encodable(card.trigger),  # shown as the trigger words
            library_name="diffusers",
            pipeline_tag=task,
            tags=tags + (["latent-perceptual-loss"] if card.lpl else []),
            widget=self._examples() or None,
        )

    # Samples

    @cached_property
    def samples(self) -> Samples | None:
        """The last samples of this run, the moving average's if there are any."""
        place = last_samples(self.folder, self.card.steps)
        if place is None:
            return None
        settings = json.loads((place / layout.SETTINGS).read_text(encoding="utf-8"))
        draws = settings.get("draws") or [{}]
        seed = draws[0].get("seed", settings["seed"])
        negatives = [draw.get(NEGATIVE) for draw in draws][: len(settings["prompts"])]
        return Samples(f"{layout.SAMPLES}/{place.name}", settings["prompts"], seed, negatives)

    @property
    def first_sample(self) -> Samples | None:
        """The last samples, if the code of the card draws the first of them again: same weights and prompt."""
        samples, step = self.samples, f"{layout.SAMPLES}/step-{self.card.steps:06d}"
        if samples is None or not self.card.redrawn or samples.place.removesuffix("-ema") != step:
            return None
        return samples if samples.prompts[:1] == [self.card.prompt] else None

    def _examples(self) -> list[dict[str, Any]]:
        """The widget's examples: prompts and the last images drawn for them."""
        if self.samples is None or self.card.class_conditional:
            return []
        examples = []
        for number, (prompt, negative) in enumerate(zip_longest(self.samples.prompts, self.samples.negatives)):
            image = self.samples.image(number)
            if str(prompt).strip() and self.has(image):
                asked = {"parameters": {NEGATIVE: encodable(negative)}} if negative else {}
                examples.append({"text": encodable(str(prompt)), **asked, "output": {"url": image}})
        return examples[:EXAMPLES]

    @cached_property
    def grids(self) -> dict[int, str]:
        """Grids of samples by step, of the finished steps of this run, oldest first."""
        paths = self.folder.glob(f"{layout.SAMPLES}/step-*.png")
        steps = {int(match[1]): path.name for path in paths if (match := re.fullmatch(r"step-(\d+)", path.stem))}
        return {step: f"{layout.SAMPLES}/{steps[step]}" for step in sorted(steps) if 0 < step <= self.card.steps}

    @property
    def before_after(self) -> bool:
        return not self.card.goes_on and self.has(layout.BEFORE_AFTER)

    @property
    def comparisons(self) -> dict[str, str]:
        """Grids that compare states of the finished run, by what they compare."""
        grids = {"checkpoints": layout.CHECKPOINTS, "strengths of the LoRA": layout.LORA_SCALES}
        return {} if self.card.goes_on else {what: name for what, name in grids.items() if self.has(name)}

    @property
    def last_grid(self) -> int | None:
        """Its step."""
        return max(self.grids, default=None)

    @property
    def earlier_grids(self) -> list[int]:
        """Steps of the grids before the last one: every n-th, counted from the end."""
        last = self.card.steps if self.before_after else self.last_grid
        steps = [step for step in self.grids if step != last]
        return steps[:: -(math.ceil(len(steps) / GRIDS) or 1)][::-1]

    # Use

    @cached_property
    def replaced(self) -> dict[str, str]:
        """Parts of a LoRA's base that come from elsewhere than the base, with the beginning of the call that loads
        them."""
        card, parts = self.card, {}
        if not card.lora_rank:
            return parts
        for name in card.file_lacks:
            parts[name] = (
                f"AutoModel.from_pretrained({literal(shown(card.file_config or ''))}, subfolder={literal(name)}"
            )
        if card.vae:
            parts["vae"] = f"AutoModel.from_pretrained({literal(shown(card.vae))}"
        if card.denoiser:
            name, revision = card.denoiser
            variant = {name: value for name, value in card.base_arguments.items() if name == "variant"}
            place = {"subfolder": name, "revision": revision, **variant}
            given = [f"{key}={literal(value)}" for key, value in place.items()]
            parts[name] = f"AutoModel.from_pretrained({', '.join([literal(shown(card.base_model)), *given])}"
        if card.other_denoiser:
            name, kind, source = card.other_denoiser
            config = literal(shown(card.file_config or card.base_model))
            parts[name] = f"AutoModel.from_pretrained({literal(shown(source))}"
            if source.endswith(".safetensors"):
                parts[name] = (
                    f"{kind}.from_single_file({file_source(source)}, config={config}, subfolder={literal(name)}"
                )
        return parts

    @property
    def imports(self) -> list[str]:
        """What the code takes from diffusers."""
        loaded = [call.partition(".")[0] for call in self.replaced.values()]
        names = [*loaded, self.scheduler_class, self.card.pipeline_class]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def merging(self) -> list[str]:
        """Code that merges the LoRA into the base of the trained one."""
        lines = []
        for source, strength in self.card.merged if self.card.lora_rank else ():
            if (place := self._peft_source(source)) is None:
                lines += [f"pipeline.load_lora_weights({lora_source(source)})"]
                lines += [f"pipeline.fuse_lora(lora_scale={strength})", "pipeline.unload_lora_weights()"]
                continue
            part = f"pipeline.{self._denoiser}"
            lines += [f"{part} = PeftModel.from_pretrained({part}, {place})"]
            merged = f"{part} = {part}.merge_and_unload()"
            lines += (
                [merged] if strength == 1 else [f"with rescale_adapter_scale({part}, {strength}):", f"    {merged}"]
            )
        return lines

    def _peft_source(self, source: str) -> str | None:
        """Arguments with which peft loads an adapter of the denoiser; None if diffusers loads it."""
        path, inside = Path(source).expanduser(), f"{self._denoiser}{layout.PEFT_SUFFIX}"
        folder = path.parent if path.is_file() else path
        if (folder / layout.PEFT_CONFIG).is_file() and not (folder / layout.LORA).is_file():
            return literal(shown(str(folder)))
        if hasattr(getattr(diffusers, self.card.pipeline_class, None), "load_lora_weights"):
            return None
        if (place := hub_file(source)) is not None:
            within = place.file.rpartition("/")[0]
            return literal(place.repository) + (f", subfolder={literal(within)}" if within else "")
        return f"{literal(shown(source))}, subfolder={literal(inside)}"

    @property
    def _denoiser(self) -> str:
        """The name of the pipeline's denoiser."""
        names = {family.pipeline_class.__name__: family.denoiser_name for family in FAMILIES}
        return names.get(self.card.pipeline_class, "transformer")

    @property
    def peft_imports(self) -> list[str]:
        """What the code takes from peft."""
        code = "\n".join(self.merging)
        used = {
            "from peft import PeftModel": "PeftModel" in code or (self.card.lora_rank and self.peft_folder),
            "from peft.helpers import rescale_adapter_scale": "rescale_adapter_scale" in code,
        }
        return [line for line, there in used.items() if there]

    @property
    def base_call(self) -> str:
        """The beginning of the call that loads a LoRA's base."""
        card = self.card
        if card.file_config is None:
            return f"from_pretrained({literal(shown(card.base_model))}"
        return f"from_single_file({file_source(card.base_model)}, config={literal(shown(card.file_config))}"

    @property
    def peft_folder(self) -> str | None:
        """Folder of an adapter that peft saved; None if diffusers saved the LoRA."""
        return next((path.parent.name for path in sorted(self.folder.glob(f"*/{layout.PEFT_CONFIG}"))), None)

    @property
    def adapted(self) -> str:
        """The component that peft's adapter is for."""
        return (self.peft_folder or "").removesuffix(layout.PEFT_SUFFIX)

    @property
    def adapter(self) -> str:
        """The adapter in words."""
        kind, name, size = self.card.adapter, ADAPTER_NAMES[self.card.adapter], self.card.lora_rank
        return f"An {name} with blocks of {size}" if kind == OFT else f"A {name} of rank {size}"

    @property
    def scheduler_class(self) -> str | None:
        """Class of the scheduler beside a LoRA, which belongs to a new objective."""
        config = self.folder / "scheduler" / "scheduler_config.json"
        return json.loads(config.read_text())["_class_name"] if self.card.lora_rank and config.is_file() else None

    @property
    def comfyui_file(self) -> str | None:
        return next((path.name for path in self.folder.glob(f"*{layout.OTHERS_SUFFIX}")), None)

    @property
    def single_file(self) -> str | None:
        return next(iter(single_files(self.folder)), None)

    @property
    def single_file_place(self) -> str:
        """ComfyUI's folder for the single file: one for transformers alone has no VAE."""
        names, _ = read_header(self.folder / str(self.single_file))
        return "checkpoints" if any(name.startswith("first_stage_model.") for name in names) else "diffusion_models"

    def call_arguments(self) -> dict[str, object]:
        """Text pipelines take prompt and size; class-conditional ones take labels, and know one size only."""
        card = self.card
        arguments: dict[str, object] = {"prompt": card.prompt, "height": card.size[0], "width": card.size[1]}
        if card.class_conditional:
            arguments = {"class_labels": [card.prompt]}
        scale = {card.guidance_argument: card.example.get("guidance_scale", card.guidance_scale)}
        own = {name: value for name, value in card.example.items() if name not in ("seed", "guidance_scale")}
        if card.class_conditional:
            own = {name: value for name, value in own.items() if name not in ("height", "width")}
        own = {name: value for name, value in own.items() if value is not None}
        arguments |= {"num_inference_steps": card.inference_steps} | scale | dict(card.sampling_arguments) | own
        return {name: value for name, value in arguments.items() if value is not None}

    # Training again

    def rerun(self) -> str:
        """The command that trains the model again."""
        card = self.card
        source = address(card.repo_id, card.revision) if card.repo_id else f"{self.address}/{layout.RECIPE}"
        command = rerun_command(card.recipe, {"num_processes": card.processes}, source)
        if len(command) > LINE:
            for name in ("config", *left_to_give(card.recipe)):
                command = command.replace(f" --{name} ", f" \\\n  --{name} ", 1)
        return command

    @property
    def local_sources(self) -> list[str]:
        """Data and models of the run that are not on the Hub."""
        return local_sources(self.card.recipe)

    @property
    def local_folders(self) -> set[str]:
        """Arguments of the command that are folders of this machine, though they may look like plain words."""
        card = self.card
        sources = [card.base_model, card.dataset, *card.other_datasets, card.vae, card.file_config]
        sources += [card.lora_init, card.training_adapter, card.denoiser_source]
        return {source for source in sources if source and os.path.exists(source)}


# Functions of the template -------------------------------------------------------------------------------------------


def encodable(text: str) -> str:
    """Without what UTF-8 cannot hold: a prompt may hold any bytes."""
    return text.encode(errors="replace").decode()


def literal(value: object) -> str:
    """Python source of a plain value; text stands in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def loading_source(address: str, revision: str | None) -> str:
    """First arguments of ``from_pretrained``, as Python source.

    >>> loading_source("user/fox", "v2"), loading_source("user/fox", "main")
    ('"user/fox", revision="v2"', '"user/fox"')
    """
    return literal(address) + (f", revision={literal(revision)}" if revision not in (None, "", MAIN) else "")


def file_source(source: str) -> str:
    """First argument of ``from_single_file``, as Python source."""
    place = hub_file(source)
    return literal(shown(source) if place is None else place.address)


def lora_source(source: str) -> str:
    """Arguments of ``load_lora_weights``, as Python source.

    >>> lora_source("user/lora"), lora_source("user/lora/style.safetensors")
    ('"user/lora"', '"user/lora", weight_name="style.safetensors"')
    """
    place = hub_file(source)
    return (
        literal(shown(source)) if place is None else f"{literal(place.repository)}, weight_name={literal(place.file)}"
    )


def fence(code: str) -> str:
    """The marks around a block of code: longer than any run of backticks in it."""
    return "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))


def link(source: str, kind: str = "") -> str:
    """A link to the Hub, or the name of a local folder; `kind` is "datasets/" for data sets."""
    if is_hub_id(source):
        return f"[{source}]({HUB}/{kind}{source})"
    if (place := hub_file(source)) is not None:
        return f"[{place.file} of {place.repository}]({place.address})"
    name = " ".join(shown(source).split())
    return f"the local folder `{name.removeprefix('path/to/')}`" if is_local(source) else f"`{name}`"
