"""The model card of a run: README.md, with YAML metadata for the Hub and text for visitors.

A *card* says what a stranger needs to trust a model, to use it and to train it again, after a run or during one
(``max_steps``). :class:`RunCard` holds the facts, :class:`Result` finds the files to show, and ``card.md.j2`` is the
text. The card is public: it shows no path and no token of this machine (:mod:`lpl.tools.privacy`). Only the *address*,
the repository's id or ``path/to/NAME``, may change later (:mod:`lpl.publishing.card_edits`).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diffusers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lpl.config.choices import ADAPTER_NAMES, LORA, OFT
from lpl.config.command_line import loss_words, words_of
from lpl.config.data_sets import public_entry
from lpl.config.prompts import NEGATIVE
from lpl.config.recipes import is_own
from lpl.diagnosis.plan import Plan
from lpl.families import FAMILIES
from lpl.families.derived import origin
from lpl.options import parse_weight
from lpl.publishing.hub import MAIN, address
from lpl.publishing.public_recipe import left_to_give, local_sources, rerun_command
from lpl.tools import layout, words
from lpl.tools.files import write_whole
from lpl.tools.headers import names_in
from lpl.tools.machine import peak_memory
from lpl.tools.privacy import (
    hide_paths,
    hub_file,
    is_hub_id,
    is_local,
    local_name,
    public_command,
    shown,
    without_secrets,
)
from lpl.tools.results import last_samples, missing_components, single_files
from lpl.training.loading import weight_dtype
from lpl.training.provenance import installed_versions


TEMPLATE = Path(__file__).with_name("card.md.j2")
HUB = "https://huggingface.co"
EXAMPLES = 12  # most examples of the widget
GRIDS = 6  # most grids of samples between the first and the last step
LINE = 100  # most characters of a command on one line


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What the model card says about a run: plain values, for any model family.

    Base model and data set may be local folders, and `command` may hold a token: the card shows neither.
    """

    # What it is
    base_model: str  # Hub id or local folder
    dataset: str  # Hub id or local folder, of the first one
    pipeline_class: str  # diffusers class that loads the result, "StableDiffusionPipeline"
    repo_id: str | None = None  # None: not on the Hub; the title is the folder's name
    revision: str | None = None  # the repository's branch; None: main
    tags: Sequence[str] = ()  # the family: "stable-diffusion", "sd3", ...
    licence: Mapping[str, Any] = field(default_factory=dict)  # the base model's, from base_licence
    # How to use it
    size: tuple[int, int]  # height and width in pixels
    sizes: str = ""  # of training images in words, if there are several
    epoch: int | None = None  # samples of an epoch, if known
    prompt: str | int = "a photo of a lighthouse at dusk"  # an int is a class label, for class-conditional models
    classes: Mapping[int, str] = field(default_factory=dict)  # names of the data's classes by label
    trigger: str | None = None  # the trigger word, or else the prompt of images without captions
    dtype: str = "float16"  # torch dtype for inference
    inference_steps: int | None = None  # None: the pipeline's default
    guidance_scale: float | None = None  # None: the pipeline's default
    guidance_argument: str = "guidance_scale"  # of the pipeline's call
    example: Mapping[str, Any] = field(default_factory=dict)  # arguments that draw the first sample, for these
    loading_arguments: Mapping[str, None] = field(default_factory=dict)  # components that the pipeline does without
    base_arguments: Mapping[str, Any] = field(default_factory=dict)  # revision and variant; None: what the base lacks
    vae: str | None = None  # Hub id or local folder of a VAE that replaces the base model's
    denoiser: tuple[str, str] | None = None  # of a LoRA's base: its name, and the revision that it alone comes from
    file_config: str | None = None  # of a base model that is a single file: the pipeline with its configuration
    file_lacks: Sequence[str] = ()  # components that come from that pipeline
    denoiser_source: str | None = None  # where the base model's denoiser comes from, if from elsewhere
    other_denoiser: tuple[str, str, str] | None = None  # of a LoRA's base: its name, class and source
    merged: Sequence[tuple[str, float]] = ()  # LoRA that were merged into the base model, and their strengths
    lora_init: str | None = None  # the LoRA that the training began with
    training_adapter: str | None = None  # the LoRA that was active in training only
    redrawn: bool = True  # the code on the card draws a sample again, up to rounding
    sampling_arguments: Mapping[str, object] = field(default_factory=dict)  # further arguments of the pipeline's call
    attributes: Mapping[str, object] = field(default_factory=dict)  # of the pipeline, to be set before its call
    first_image: str = "images[0]"  # in what the call returns
    # What it was trained on
    images: int | None = None  # None: unknown, as in a stream
    fingerprint: str | None = None  # of the data, "sha256:..."
    masks: str | None = None  # where loss masks come from, in words
    # How it was trained
    steps: int  # optimizer steps so far
    max_steps: int | None = None  # steps of the whole run; None: the run is over
    batch_size: int  # samples per optimizer step, over all devices and accumulation
    processes: int = 1
    learning_rate: float
    objective: str  # "epsilon", "v_prediction", "sample", "flow_matching"
    lr_scheduler: str | None = None
    mixed_precision: str | None = None  # None or "no": float32
    ema_decay: float | None = None  # None: no EMA
    lora_rank: int | None = None  # of OFT, the size of its blocks; None: full fine-tuning
    adapter: str = LORA  # its kind
    trained: str | None = None  # the trained parts in words
    from_scratch: bool = False  # only the base model's configuration was used
    seed: int | None = None
    seconds: float | None = None  # of the optimizer steps alone
    peak_memory: int | None = None  # bytes, of one process
    hardware: str | None = None  # "1 x NVIDIA H200", "1 x CPU"
    # What LPL did
    lpl_weight: float | None = None  # last value of w; None or 0: LPL was off
    lpl_target: float | None = None  # share of the total loss that w was measured for; None: w was set by hand
    lpl_share: float | None = None  # measured share of the total loss, 0 to 1
    lpl_sigma_threshold: float | None = None  # tau at this size; None or inf: no threshold
    lpl_blocks: Sequence[str] = ()  # of the decoder, "mid", "up_0"
    lpl_start_step: int = 0
    lpl_options: str = ""  # flags that make another loss than the default
    results: Sequence[EvalResult] = ()  # metrics of the trained model
    results_text: str = ""  # the same as Markdown, under a heading of level 3
    # How to run it again
    other_datasets: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)  # every flag, resolved
    command: Sequence[str] = ()  # the script and the flags that decide the training's numbers
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    @classmethod
    def of(
        cls,
        plan: Plan,
        *,
        blocks: Sequence[str],
        records: Sequence[Mapping[str, float]],
        prompts: Sequence[str | int],
        example: Mapping[str, Any],
        classes: Mapping[int, str],
        facts: Mapping[str, Any],
        licence: Mapping[str, Any],
        results: tuple[Sequence[EvalResult], str] = ((), ""),
    ) -> RunCard:
        """The run after its present step.

        Args:
            blocks: names of the decoder blocks that LPL compares.
            records: entries of the run's log.
            prompts: validation prompts; the first one is the card's example.
            example: arguments of the pipeline's call for it.
            classes: names of the data's classes by label.
            facts: :func:`lpl.training.provenance.measured_facts`.
            licence: :func:`lpl.publishing.licence.base_licence`.
            results: metrics of the run's samples, as metadata and as Markdown.
        """
        run, family = plan.run, plan.trained.family
        general = 0 if family.num_classes is not None else plan.config.data.trigger or "a photo"
        asked = _asked_for(plan)
        height, width = (example.get(name) or side for name, side in zip(("height", "width"), asked["size"]))
        return cls(
            **asked,
            pipeline_class=family.pipeline_class.__name__,
            repo_id=run.repository,
            tags=(family.name,),
            licence=licence,
            prompt=prompts[0] if prompts else general,
            example=example,
            classes=classes,
            denoiser=_denoiser_of_revision(plan),
            other_denoiser=_other_denoiser(plan),
            dtype=str(weight_dtype(run.accelerator)).removeprefix("torch."),
            loading_arguments=family.loading_arguments(),
            sampling_arguments=family.sampling_arguments(),
            attributes=family.attributes_for(height, width),
            first_image="frames[0][0]" if family.draws_videos else "images[0]",
            guidance_argument=family.guidance_argument,
            images=plan.images.rows,
            epoch=plan.images.length,
            sizes="" if plan.images.items is None else plan.sizes(3),
            fingerprint=facts["data"]["fingerprint"],
            steps=run.step,
            max_steps=plan.max_steps,
            batch_size=plan.global_batch,
            processes=run.accelerator.num_processes,
            mixed_precision=run.mixed_precision,
            trained=plan.what(),
            seed=run.seed,
            seconds=training_seconds(records, plan.global_batch),
            peak_memory=peak_memory(run.accelerator.device),
            hardware=plan.hardware,
            **_lpl_in(records),
            lpl_sigma_threshold=plan.threshold,
            lpl_blocks=blocks,
            results=results[0],
            results_text=results[1],
            recipe=run.recipe,
        )

    @property
    def lpl(self) -> bool:
        return bool(self.lpl_weight)

    @property
    def lpl_bounded(self) -> bool:
        return self.lpl_sigma_threshold is not None and math.isfinite(self.lpl_sigma_threshold)

    @property
    def class_conditional(self) -> bool:
        return isinstance(self.prompt, int)

    @property
    def goes_on(self) -> bool:
        return self.max_steps is not None and self.steps < self.max_steps

    @property
    def on_cpu(self) -> bool:
        return (self.hardware or "").endswith("CPU")


def _asked_for(plan: Plan) -> dict[str, Any]:
    """The fields of a card that are flags."""
    config, run = plan.config, plan.run
    model, data, optimization = config.model, config.data, config.optimization
    listed = None if data.datasets is None else tuple(map(public_entry, data.datasets))
    found_out = config.changed(seed=run.seed, mixed_precision=run.mixed_precision, datasets=listed)
    # A folder may look like a Hub id.
    places = [part.data.dataset_name or os.path.abspath(part.data.train_data_dir or "") for part in data.parts]
    where = {"revision": model.revision, "variant": model.variant}
    lacking = dict.fromkeys(missing_components(Path(model.pipeline)))
    file_config, file_lacks = origin(model) or (None, ())
    return {
        "file_config": file_config,
        "file_lacks": file_lacks,
        "merged": model.merged,
        "denoiser_source": model.denoiser_model_name_or_path,
        "lora_init": config.lora.lora_init,
        "training_adapter": config.lora.training_adapter,
        "base_model": model.pretrained_model_name_or_path,
        "dataset": places[0],
        "other_datasets": places[1:],
        "revision": config.output.hub_revision if run.repository else None,
        "base_arguments": {name: value for name, value in where.items() if value} | lacking,
        "vae": model.pretrained_vae_model_name_or_path,
        "redrawn": config.lora.quantize_base is None,
        "from_scratch": model.from_scratch,
        "masks": data.masks,
        "size": data.size,
        "trigger": data.trigger,
        "inference_steps": config.validation.validation_inference_steps,
        "guidance_scale": config.validation.validation_guidance_scale,
        "learning_rate": optimization.learning_rate * (plan.global_batch if optimization.scale_lr else 1),
        "lr_scheduler": optimization.lr_scheduler,
        "objective": config.model.prediction_type,
        "ema_decay": optimization.ema_decay,
        "lora_rank": (config.lora.rank or config.lora.oft_block_size) if config.lora.lora else None,
        "adapter": config.lora.adapter,
        "lpl_target": parse_weight(config.lpl.lpl_weight)[1],
        "lpl_start_step": config.lpl.lpl_start_step,
        "lpl_options": hide_paths(loss_words(config)),
        "command": [sys.argv[0], *words_of(found_out, lambda name: not is_own(name))],
    }


def _denoiser_of_revision(plan: Plan) -> tuple[str, str] | None:
    """The denoiser under a LoRA, with --non_ema_revision; a whole one is in the result."""
    revision = plan.config.model.non_ema_revision
    return (plan.trained.family.denoiser_name, revision) if revision and plan.config.lora.lora else None


def _other_denoiser(plan: Plan) -> tuple[str, str, str] | None:
    """The denoiser under a LoRA, with --denoiser_model_name_or_path."""
    family, source = plan.trained.family, plan.config.model.denoiser_model_name_or_path
    return (family.denoiser_name, type(family.denoiser).__name__, source) if source and plan.config.lora.lora else None


def _lpl_in(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The last weight of LPL in a log, and its mean share of the loss."""
    with_lpl = [record for record in records if record.get("lpl_weight", 0) > 0 and "lpl_share" in record]
    if not with_lpl:
        return {}
    share = sum(record["lpl_share"] for record in with_lpl) / len(with_lpl)
    return {"lpl_weight": with_lpl[-1]["lpl_weight"], "lpl_share": share}


def training_seconds(records: Sequence[Mapping[str, float]], batch: int) -> float | None:
    """Time of the optimizer steps alone, over all runs that wrote to a log, from the steps and speeds of its entries.

    Args:
        batch: samples per step.

    >>> training_seconds([{"step": 10, "images_per_second": 4.0}, {"step": 15, "images_per_second": 2.0}], 8)
    40.0
    """
    seconds, last_step = 0.0, 0.0
    for record in records:
        if speed := record.get("images_per_second"):
            seconds += (record["step"] - last_step) * batch / speed
            last_step = record["step"]
    return seconds or None


# The card ------------------------------------------------------------------------------------------------------------


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
            words = [f"{key}={literal(value)}" for key, value in place.items()]
            parts[name] = f"AutoModel.from_pretrained({', '.join([literal(shown(card.base_model)), *words])}"
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
        names = names_in(self.folder / str(self.single_file))
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
