"""The model card of a run: README.md, YAML metadata that the Hub reads and a text that visitors read.

A *card* says what a stranger needs to trust a model, to use it and to train it again, of a finished run or of one that
goes on (``max_steps``). It is public, so nothing of this machine goes into it (:mod:`lpl.public`), and it shows what
lies beside it only: samples, curves, recipe and log are looked for in its folder. All facts are on the
:class:`RunCard`; only the *address*, the repository's id or ``path/to/NAME``, may change later (:func:`address_card`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lpl.config.command_line import loss_words as loss_flags
from lpl.config.command_line import recipe
from lpl.config.command_line import words_of as command_line
from lpl.config.recipes import is_own
from lpl.diagnosis.plan import Plan
from lpl.loss import LatentPerceptualLoss
from lpl.publishing.public_recipe import left_to_give, rerun_command
from lpl.tools.files import write_whole
from lpl.tools.layout import RECIPE
from lpl.tools.machine import peak_memory
from lpl.tools.privacy import is_hub_id, is_local, local_name, public_command, shown, without_secrets
from lpl.tools.words import duration, size
from lpl.training.loading import weight_dtype
from lpl.training.lora import FILE as LORA_FILE
from lpl.training.lora import OTHERS_SUFFIX
from lpl.training.provenance import installed_versions


logger = logging.getLogger(__name__)
BEFORE_AFTER, CURVES, EVALUATION = "samples/before_after.png", "loss_curves.png", "evaluation/curves.png"
LOG = "metrics.jsonl"
RESULTS, AGAIN = "\n## Results\n", "\n## Train it again\n"
SCRIPT = "train_text_to_image_lpl.py"
MAIN = "main"  # the branch that nobody has to name
HUB, PAPER = "https://huggingface.co", "https://arxiv.org/abs/2411.04873"
EXAMPLES = 12  # of the widget, at most
GRIDS = 6  # of samples between the first and the last step, at most
LINE = 100  # characters of a command on one line, at most


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What the model card says about a run; plain values, of any model family.

    Base model and data set may be local folders, `command` may hold a token: the card shows neither path nor token.
    """

    # What it is
    base_model: str  # Hub id or local folder
    dataset: str  # Hub id or local folder
    pipeline_class: str  # diffusers class that loads the result, "StableDiffusionPipeline"
    repo_id: str | None = None  # None: not on the Hub, and the folder's name is the title
    revision: str | None = None  # the repository's branch; None: main
    tags: Sequence[str] = ()  # the family: "stable-diffusion", "sd3", ...
    licence: Mapping[str, Any] = field(default_factory=dict)  # the base model's, as base_licence has it
    # How to use it
    resolution: int  # pixels
    prompt: str | int = "a photo of a lighthouse at dusk"  # an int is a class label, for class-conditional models
    classes: Mapping[int, str] = field(default_factory=dict)  # the data's, by label, in class-conditional models
    dtype: str = "float16"  # of torch, for inference
    inference_steps: int | None = None  # None: the pipeline's default
    guidance_scale: float | None = None  # None: the pipeline's default
    loading_arguments: Mapping[str, None] = field(default_factory=dict)  # components that the pipeline does without
    base_arguments: Mapping[str, str] = field(default_factory=dict)  # where of the base model's repository it was
    sampling_arguments: Mapping[str, object] = field(default_factory=dict)  # further ones of the pipeline's call
    # What it was trained on
    images: int | None = None  # how many; None: nobody knows, as in a stream
    fingerprint: str | None = None  # of the data, "sha256:..."
    # How it was trained
    steps: int  # optimizer steps so far
    max_steps: int | None = None  # of the whole run; None: it is over
    batch_size: int  # samples per optimizer step, over all devices and accumulation
    processes: int = 1
    learning_rate: float
    objective: str  # "epsilon", "v_prediction", "sample", "flow_matching"
    lr_scheduler: str | None = None
    mixed_precision: str | None = None  # None or "no": float32
    ema_decay: float | None = None  # None: no EMA
    lora_rank: int | None = None  # None: full fine-tuning
    trained: str | None = None  # what was, in words
    from_scratch: bool = False  # the base model gave its configuration only
    seed: int | None = None
    seconds: float | None = None  # of the optimizer steps alone
    peak_memory: int | None = None  # bytes, of one process
    hardware: str | None = None  # "1 x NVIDIA H200", "1 x CPU"
    # What LPL did
    lpl_weight: float | None = None  # w as it was in the end; None or 0: LPL was off
    lpl_weight_setting: str | None = None  # as the user gave it, "auto:0.2" or "3.0"
    lpl_share: float | None = None  # measured share of the total loss, 0 to 1
    lpl_sigma_threshold: float | None = None  # tau at this resolution; None or inf: none
    lpl_blocks: Sequence[str] = ()  # of the decoder, "mid", "up_0"
    lpl_start_step: int = 0
    lpl_options: str = ""  # flags that make another loss than the default
    results: Sequence[EvalResult] = ()  # what was measured of the trained model
    results_text: str = ""  # the same for people, Markdown under a heading of the third rank
    # How to run it again
    recipe: Mapping[str, Any] = field(default_factory=dict)  # every flag, resolved
    command: Sequence[str] = ()  # the script and the flags that decide the training's numbers
    versions: Mapping[str, str] = field(default_factory=installed_versions)

    @property
    def lpl(self) -> bool:
        return bool(self.lpl_weight)

    @property
    def class_conditional(self) -> bool:
        return isinstance(self.prompt, int)

    @property
    def goes_on(self) -> bool:
        return self.max_steps is not None and self.steps < self.max_steps

    @property
    def on_cpu(self) -> bool:
        return (self.hardware or "").endswith("CPU")


def describe(
    plan: Plan,
    lpl_loss: LatentPerceptualLoss | None,
    records: Sequence[Mapping[str, float]],
    steps: int,
    prompts: Sequence[str] | Sequence[int],
    classes: Mapping[int, str],
    facts: Mapping[str, Any],
    licence: Mapping[str, Any],
    results: tuple[Sequence[EvalResult], str] = ((), ""),
) -> RunCard:
    """The run after so many steps, as its model card tells it.

    Args:
        records: of its log.
        classes: the data's, by label.
        facts: :func:`lpl.rerun.measured_facts`.
        licence: :func:`base_licence`.
        results: what was measured of its pictures, as metadata and as Markdown.
    """
    args, family, accelerator = plan.config, plan.trained.family, plan.run.accelerator
    with_lpl = [record for record in records if record.get("lpl_weight", 0) > 0 and "lpl_share" in record]
    return RunCard(
        base_model=args.pretrained_model_name_or_path,
        dataset=args.dataset_name or os.path.abspath(args.train_data_dir),  # a folder, though it be named like an id
        pipeline_class=family.pipeline_class.__name__,
        repo_id=args.hub_model_id if args.push_to_hub else None,
        revision=args.hub_revision if args.push_to_hub else None,
        tags=(family.name,),
        licence=licence,
        resolution=args.resolution,
        prompt=(prompts or [0 if family.class_conditional else "a photo"])[0],
        classes=classes,
        dtype=str(weight_dtype(accelerator)).removeprefix("torch."),
        images=plan.images.length,
        fingerprint=facts["data"]["fingerprint"],
        trained=plan.what(),
        from_scratch=args.from_scratch,
        inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale,
        loading_arguments=family.loading_arguments(),
        base_arguments={name: value for name in ("revision", "variant") if (value := getattr(args, name))},
        sampling_arguments=family.sampling_arguments(),
        steps=steps,
        max_steps=plan.max_steps,
        batch_size=plan.global_batch,
        processes=accelerator.num_processes,
        learning_rate=args.learning_rate * (plan.global_batch if args.scale_lr else 1),
        objective=args.prediction_type,
        lr_scheduler=args.lr_scheduler,
        mixed_precision=accelerator.mixed_precision,
        ema_decay=args.ema_decay,
        lora_rank=args.rank if args.lora.lora else None,
        seed=args.seed,
        seconds=training_seconds(records, plan.global_batch),
        peak_memory=peak_memory(accelerator.device),
        hardware=plan.hardware,
        lpl_weight=with_lpl[-1]["lpl_weight"] if with_lpl else None,
        lpl_weight_setting=args.lpl_weight,
        lpl_share=sum(record["lpl_share"] for record in with_lpl) / len(with_lpl) if with_lpl else None,
        lpl_sigma_threshold=plan.threshold,
        lpl_blocks=lpl_loss.block_names if args.lpl.enabled else (),
        lpl_start_step=args.lpl_start_step,
        lpl_options=loss_flags(args),
        results=results[0],
        results_text=results[1],
        recipe=recipe(args),
        command=[sys.argv[0], *command_line(args, lambda name: not is_own(name))],
    )


def training_seconds(records: Sequence[Mapping[str, float]], batch: int) -> float | None:
    """Time of the optimizer steps alone, of all runs that a log has seen: from the steps and speed of its entries.

    Args:
        batch: samples of a step.

    >>> training_seconds([{"step": 10, "images_per_second": 4.0}, {"step": 15, "images_per_second": 2.0}], 8)
    40.0
    """
    seconds, last_step = 0.0, 0
    for record in records:
        if speed := record.get("images_per_second"):
            seconds += (record["step"] - last_step) * batch / speed
            last_step = record["step"]
    return seconds or None


# The card ------------------------------------------------------------------------------------------------------------


def write_model_card(folder: str | os.PathLike, card: RunCard) -> Path:
    """Write README.md into `folder`, which holds the result by now: pictures and adapter are shown as found there.

    Returns:
        The path of README.md.
    """
    folder = Path(folder)
    sections = (_introduction, _pictures, _use, _training, _perceptual_loss, _curves, _results, _rerun, _citation)
    body = "\n\n".join(text for section in sections if (text := section(folder, card)))
    content = f"---\n{_metadata(folder, card).to_yaml()}\n---\n\n{body}\n"
    content = without_secrets(content).encode(errors="replace").decode()  # a prompt may hold bytes that are no UTF-8
    return write_whole(folder / "README.md", ModelCard(content).save)


def _metadata(folder: Path, card: RunCard) -> ModelCardData:
    """What the Hub indexes; only Hub ids count as base model and data set there.

    Class-conditional models are tagged as unconditional ones, the nearest task that the Hub knows.
    """
    own = is_hub_id(card.base_model) and not card.from_scratch
    task = "unconditional-image-generation" if card.class_conditional else "text-to-image"
    tags = ["diffusers", *(["class-conditional"] if card.class_conditional else []), task]
    tags += ["diffusers-training", *(["lora"] if card.lora_rank else []), *card.tags]
    return ModelCardData(
        **({} if card.from_scratch else card.licence),
        base_model=card.base_model if own else None,
        base_model_relation=("adapter" if card.lora_rank else "finetune") if own else None,
        eval_results=list(card.results) or None,
        model_name=_title(folder, card) if card.results else None,
        datasets=[card.dataset] if is_hub_id(card.dataset) else None,
        inference=True,
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags + (["latent-perceptual-loss"] if card.lpl else []),
        widget=_examples(folder, card) or None,
    )


def _examples(folder: Path, card: RunCard) -> list[dict[str, Any]]:
    """The widget's: prompts, and what the model made of them last."""
    samples, settings = _last_samples(folder, card)
    if samples is None or card.class_conditional:
        return []
    pictures = [(prompt, f"samples/{samples}/{number:02d}.png") for number, prompt in enumerate(settings["prompts"])]
    examples = [
        {"text": prompt.encode(errors="replace").decode(), "output": {"url": picture}}
        for prompt, picture in pictures
        if str(prompt).strip() and (folder / picture).is_file()
    ]
    return examples[:EXAMPLES]


def _last_samples(folder: Path, card: RunCard) -> tuple[str | None, dict[str, Any]]:
    """The folder with the model's last samples, the moving average's where there are some, and how they were drawn."""
    found = []
    for path in folder.glob("samples/*/settings.json"):
        name = re.fullmatch(r"step-(\d+)(-ema)?", path.parent.name)
        if name and int(name[1]) <= card.steps:  # later ones are of an earlier run in the same place
            found.append((int(name[1]), name[2] or "", path))
    if not found:
        return None, {}
    path = max(found)[-1]
    return path.parent.name, json.loads(path.read_text(encoding="utf-8"))


def _introduction(folder: Path, card: RunCard) -> str:
    base = f"a `{card.pipeline_class}` that is not on the Hub" if is_local(card.base_model) else _link(card.base_model)
    data = f"{card.images:,} images" if card.images else "images"
    data = data if is_local(card.dataset) else _link(card.dataset, "datasets/")
    what = f"{base[0].upper()}{base[1:]}, fine-tuned"
    if card.from_scratch:
        what = f"A model of the same shape as {base}, trained from random weights"
    elif card.lora_rank:
        what = f"A LoRA of rank {card.lora_rank} for {base}, trained"
    text = f"{what} on {data} for {card.steps:,} steps at {card.resolution} px"
    if card.lpl:
        text += (
            f" with the [latent perceptual loss]({PAPER}) (LPL), which weighs errors as they show in the decoded image"
        )
    parts = [f"# {_title(folder, card)}", f"{text}."]
    if card.goes_on:
        share = card.steps / card.max_steps
        parts.append(
            f"> **The training goes on.** This is its state after step {card.steps:,} of {card.max_steps:,} "
            f"({share:.0%}); what is in this repository will be replaced."
        )
    return "\n\n".join(parts)


# Pictures ------------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, card: RunCard) -> str:
    """The last grid of samples, and behind a fold those before."""
    grids = _grids(folder, card)
    if not card.goes_on and (folder / BEFORE_AFTER).is_file():
        last = f"![Samples before and after the training]({BEFORE_AFTER})"
        grids.pop(card.steps, None)
    elif grids:
        step = max(grids)
        last = f"![Samples after step {step}]({grids.pop(step)})"
    else:
        return ""
    every = math.ceil(len(grids) / GRIDS) or 1
    steps = sorted(grids)[::-every][::-1]  # counted from the end
    pictures = [f"After step {step:,}:\n\n![Samples after step {step}]({grids[step]})" for step in steps]
    caption = f"*Each column has one {'class' if card.class_conditional else 'prompt'} and one seed.*"
    before = [_folded("Samples during the training", "\n\n".join(pictures))] if pictures else []
    return "\n\n".join([last, caption, *before])


def _grids(folder: Path, card: RunCard) -> dict[int, str]:
    """Pictures of samples by step, of those steps that this run has behind it."""
    names = {path.name: re.fullmatch(r"step-(\d+)", path.stem) for path in folder.glob("samples/step-*.png")}
    steps = {int(match[1]): f"samples/{name}" for name, match in names.items() if match}
    return {step: name for step, name in steps.items() if 0 < step <= card.steps}


def _curves(folder: Path, card: RunCard) -> str:
    if not (folder / CURVES).is_file():
        return ""
    what = "Losses, LPL's share of them and the learning rate" if card.lpl else "Loss and learning rate"
    log = f"\n\nAll numbers are in [{LOG}]({LOG})." if (folder / LOG).is_file() else ""
    return f"![{what} over the training]({CURVES}){log}"


# Use -----------------------------------------------------------------------------------------------------------------


def _use(folder: Path, card: RunCard) -> str:
    """Code that draws one image, with the whole pipeline or with the base model's and the LoRA found in `folder`."""
    here = _here(folder, card)
    source = _literal(shown(card.base_model)) if card.lora_rank else here
    classes, imports, adapted = [card.pipeline_class], ["import torch"], []
    if card.lora_rank and (adapter := _peft_folder(folder)):
        imports.append("from peft import PeftModel")
        loaded = f"PeftModel.from_pretrained(pipeline.transformer, {here}, subfolder={_literal(adapter.name)})"
        adapted.append(f"pipeline.transformer = {loaded}")
    elif card.lora_rank:
        adapted.append(f"pipeline.load_lora_weights({here}, weight_name={_literal(LORA_FILE)})")
    if card.lora_rank and (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():  # a new objective's
        classes.insert(0, json.loads(scheduler.read_text())["_class_name"])
        adapted.append(f'pipeline.scheduler = {classes[0]}.from_pretrained({here}, subfolder="scheduler")')
    imports.insert(1, f"from diffusers import {', '.join(classes)}")
    arguments = card.loading_arguments | (card.base_arguments if card.lora_rank else {})
    absent = "".join(f", {name}={_literal(value)}" for name, value in arguments.items())
    load = f"pipeline = {card.pipeline_class}.from_pretrained({source}, dtype=torch.{card.dtype}{absent})"
    call = ["image = pipeline(", *(f"    {argument}" for argument in _call_arguments(folder, card)), ").images[0]"]
    code = [*imports, "", load, *adapted, 'pipeline.to("cuda")', "", *call, 'image.save("image.png")']
    parts = ["## Use it", _fenced("python", "\n".join(code))]
    if sample := _first_sample(folder, card):
        parts.append(f"This draws [the first of the samples]({sample[1]}) again, up to rounding.")
    if card.lora_rank and (others := next(folder.glob(f"*{OTHERS_SUFFIX}"), None)):
        link = f"[`{others.name}`]({quote(others.name)})"
        parts.append(f"For ComfyUI, Forge and others there is {link}; in ComfyUI it goes into `models/loras`.")
    return "\n\n".join(parts)


def _peft_folder(folder: Path) -> Path | None:
    """Where in `folder` peft saved an adapter; None where diffusers saved it, or nobody."""
    return next((path.parent for path in sorted(folder.glob("*/adapter_config.json"))), None)


def _call_arguments(folder: Path, card: RunCard) -> list[str]:
    """Text pipelines take prompt and size; class-conditional ones take labels and draw at the one size they know."""
    arguments = {"prompt": card.prompt, "height": card.resolution, "width": card.resolution}
    if card.class_conditional:
        arguments = {"class_labels": [card.prompt]}
    arguments |= {"num_inference_steps": card.inference_steps, "guidance_scale": card.guidance_scale}
    arguments |= card.sampling_arguments
    lines = [f"{name}={_literal(value)}," for name, value in arguments.items() if value is not None]
    if card.prompt in card.classes:
        lines[0] += f"  # {_literal(card.classes[card.prompt])}"
    if sample := _first_sample(folder, card):
        lines.append(f"generator=torch.Generator().manual_seed({sample[0]}),")
    return lines


def _first_sample(folder: Path, card: RunCard) -> tuple[int, str] | None:
    """Seed and picture of the first sample of these very weights, where the code draws it again."""
    samples, settings = _last_samples(folder, card)
    if samples is None or settings["prompts"][:1] != [card.prompt]:
        return None
    if samples.removesuffix("-ema") != f"step-{card.steps:06d}":
        return None
    return settings["seed"], f"samples/{samples}/00.png"


def _literal(value: object) -> str:
    """Python source of a plain value; text stands in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


# Facts ---------------------------------------------------------------------------------------------------------------


def _training(folder: Path, card: RunCard) -> str:
    precision = card.mixed_precision if card.mixed_precision not in (None, "no") else None
    seen = card.steps * card.batch_size
    epochs = f", {seen / card.images:,.1f} epochs" if card.images else ""
    memory = "the whole process" if card.on_cpu else "tensors on one GPU"
    rows = {
        "Configuration of" if card.from_scratch else "Base model": _link(card.base_model),
        "Licence": None if card.from_scratch else _licence(card),
        "Data": _data(card),
        "Classes": _classes(card.classes) if card.classes else None,
        "Trained": card.trained,
        "Objective": f"`{card.objective}`",
        "Resolution": f"{card.resolution} px",
        "Steps": f"{card.steps:,}" + (f" of {card.max_steps:,}" if card.goes_on else ""),
        "Batch size": f"{card.batch_size:,} ({seen:,} samples seen{epochs})",
        "Learning rate": f"{card.learning_rate:g}" + (f", {card.lr_scheduler}" if card.lr_scheduler else ""),
        "Precision": f"{precision} mixed precision" if precision else "float32",
        "EMA": f"decay {card.ema_decay:g}" if card.ema_decay else "none",
        "Seed": card.seed,
        "Time": f"{duration(card.seconds)}, samples and checkpoints not counted" if card.seconds else None,
        "Peak memory": f"{size(card.peak_memory)}, {memory}" if card.peak_memory else None,
        "Hardware": card.hardware,
        "Libraries": ", ".join(f"{name} {version}" for name, version in card.versions.items()) or None,
    }
    return "## Training\n\n" + _table(rows)


def _licence(card: RunCard) -> str | None:
    """In words; where none is known, who would know."""
    names = card.licence.get("license_name") or card.licence.get("license")
    if not names:
        return f"that of {_link(card.base_model)}" if is_hub_id(card.base_model) else None
    name = names if isinstance(names, str) else ", ".join(names)
    link = card.licence.get("license_link")
    return (f"[{name}]({link})" if link else name) + ", the base model's"


def _data(card: RunCard) -> str:
    facts = [_link(card.dataset, "datasets/")]
    if card.images:
        facts.append(f"{card.images:,} images")
    if card.fingerprint:
        kind, colon, digest = card.fingerprint.rpartition(":")
        facts.append(f"fingerprint `{kind}{colon}{digest[:12]}…`")
    return ", ".join(facts)


def _classes(names: Mapping[int, str], count: int = 20) -> str:
    """Labels and names of the first classes."""
    listed = ", ".join(f"{label} {name}" for label, name in list(names.items())[:count])
    return listed + (f" and {len(names) - count} more" if len(names) > count else "")


def _perceptual_loss(folder: Path, card: RunCard) -> str:
    if not card.lpl:
        so_far = " so far" if card.goes_on else ""
        return f"No step{so_far} had the latent perceptual loss: this model was trained on the diffusion loss alone."
    threshold = card.lpl_sigma_threshold
    bounded = threshold is not None and threshold != float("inf")
    rows = {
        "Weight": f"{card.lpl_weight:.4g}" + _how_set(card.lpl_weight_setting),
        "Share of the total loss": f"{card.lpl_share:.1%}, mean of the run" if card.lpl_share is not None else None,
        "Applied at": f"noise-to-signal ratio σ ≤ {threshold:g}" if bounded else "all noise levels",
        "Decoder blocks": ", ".join(f"`{name}`" for name in card.lpl_blocks) or None,
        "Options": f"`{card.lpl_options}`" if card.lpl_options else None,
        "From step": f"{card.lpl_start_step:,}" if card.lpl_start_step else None,
    }
    text = (
        "Beside the usual diffusion loss, LPL compares the predicted latents with the true ones in the features of "
        "the autoencoder's decoder: what the decoder blows up counts for more, what nobody would see for less."
    )
    return f"## Latent perceptual loss\n\n{text}\n\n{_table(rows)}"


def _how_set(setting: str | None) -> str:
    """What follows the weight: given as a number, or measured for a share of the loss ("auto:0.2")."""
    if not (setting or "").startswith("auto"):
        return ", set by hand"
    share = re.fullmatch(r"auto:(0?\.\d+)", setting)
    return ", measured in the first steps" + (f" to make LPL {float(share[1]):.0%} of the loss" if share else "")


def _results(folder: Path, card: RunCard) -> str:
    curves = f"![Distances from real images over the training]({EVALUATION})"
    parts = [curves if (folder / EVALUATION).is_file() else "", card.results_text]
    text = "\n\n".join(filter(None, parts))
    return f"## Results\n\n{text}" if text else ""


# Again ---------------------------------------------------------------------------------------------------------------


def _rerun(folder: Path, card: RunCard) -> str:
    """The command that trains it again, what it leads to, and all flags of this one."""
    local = left_to_give(card.recipe)
    command = rerun_command(card.recipe, {"num_processes": card.processes}, _recipe_source(folder, card))
    if len(command) > LINE:
        for name in ("config", *local):
            command = command.replace(f" --{name} ", f" \\\n  --{name} ", 1)
    needed = " and ".join(f"`{name}`" for name in dict.fromkeys(local.values()))
    parts = [
        AGAIN.strip(),
        f"With the LPL trainer, `{SCRIPT}`:",
        _fenced("bash", command),
        *([f"Not part of this model, so give your own copy: {needed}."] if local else []),
        _same(folder, card),
    ]
    if card.command:
        named = {source for source in (card.base_model, card.dataset) if os.path.exists(source)}
        parts.append(_folded("The same run, flag by flag", _fenced("bash", public_command(card.command, named))))
    return "\n\n".join(parts)


def _same(folder: Path, card: RunCard) -> str:
    """What a second run has in common with this one."""
    recipe, log = (f"[{name}]({name})" if (folder / name).is_file() else f"`{name}`" for name in (RECIPE, LOG))
    compared = "; the run compares the data with the fingerprint in it" if card.fingerprint else ""
    # Kernels of GPUs that add in no fixed order are not made deterministic.
    same = "bit for bit" if card.on_cpu else "as closely as the GPU's kernels repeat themselves"
    return (
        f"All settings come from {recipe}{compared}. The losses are those of {log}: {same} on the same hardware with "
        "the same library versions, up to rounding elsewhere."
    )


def _citation(folder: Path, card: RunCard) -> str:
    if not card.lpl:
        return ""
    entry = (
        "@inproceedings{berrada2025boosting,\n"
        "  title = {Boosting Latent Diffusion with Perceptual Objectives},\n"
        "  author = {Berrada Ifriqi, Tariq and Astolfi, Pietro and Hall, Melissa and Havasi, Marton and\n"
        "            Benchetrit, Yohann and Romero-Soriano, Adriana and Alahari, Karteek and Drozdzal, Michal and\n"
        "            Verbeek, Jakob},\n"
        "  booktitle = {International Conference on Learning Representations},\n  year = {2025},\n"
        f"  url = {{{PAPER}}},\n}}"
    )
    return "## Citation\n\n" + _fenced("bibtex", entry)


# Addresses -----------------------------------------------------------------------------------------------------------


def _title(folder: Path, card: RunCard) -> str:
    return (card.repo_id or local_name(folder)).rpartition("/")[2]


def _here(folder: Path, card: RunCard) -> str:
    """What loads the result, as Python source."""
    return _source_literal(card.repo_id or local_name(folder), card.revision if card.repo_id else None)


def _source_literal(address: str, revision: str | None) -> str:
    return _literal(address) + (f", revision={_literal(revision)}" if revision not in (None, "", MAIN) else "")


def _recipe_source(folder: Path, card: RunCard) -> str:
    """What --config is given to train it again."""
    return _hub_recipe(card.repo_id, card.revision) if card.repo_id else f"{local_name(folder)}/{RECIPE}"


def _hub_recipe(repo_id: str, revision: str | None) -> str:
    return repo_id + (f"@{revision}" if revision not in (None, MAIN) else "")


# Markdown ------------------------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, object]) -> str:
    """Two columns of Markdown; rows whose value is None are left out."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        if value is not None:
            lines.append(f"| {name} | {' '.join(str(value).split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _fenced(language: str, code: str) -> str:
    """A code block whose fence is longer than any in the code."""
    longest = max((len(ticks) for ticks in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _folded(summary: str, content: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def _link(source: str, kind: str = "") -> str:
    """A link to the Hub, or what a local folder is called; `kind` is "datasets/" for data sets."""
    if is_hub_id(source):
        return f"[{source}]({HUB}/{kind}{source})"
    name = " ".join(shown(source).split())
    return f"the local folder `{name.removeprefix('path/to/')}`" if is_local(source) else f"`{name}`"
