"""What a run's model card says, as values: :class:`RunCard`. :mod:`lpl.publishing.card` writes it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from lpl.config.choices import LORA
from lpl.config.command_line import loss_words, words_of
from lpl.config.data_sets import public_entry
from lpl.config.recipes import is_own
from lpl.diagnosis.plan import Plan
from lpl.families.derived import origin
from lpl.options import parse_weight
from lpl.tools.machine import peak_memory
from lpl.tools.privacy import hide_paths
from lpl.tools.results import missing_components, training_seconds
from lpl.training.loading import weight_dtype
from lpl.training.provenance import installed_versions


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
    skipped_steps: int = 0  # of them, those that changed nothing
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
        licence: Mapping[str, Any],
        results: tuple[Sequence[EvalResult], str] = ((), ""),
    ) -> RunCard:
        """The run after its present step.

        Args:
            blocks: names of the decoder blocks that LPL compares.
            records: entries of the run's log.
            prompts: validation prompts; the first one is the card's example.
            example: arguments of the pipeline's call for it.
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
            classes=plan.images.class_names,
            denoiser=_denoiser_of_revision(plan),
            other_denoiser=_other_denoiser(plan),
            dtype=str(weight_dtype(run.accelerator.mixed_precision)).removeprefix("torch."),
            loading_arguments=family.loading_arguments(),
            sampling_arguments=family.sampling_arguments(),
            attributes=family.attributes_for(height, width),
            first_image="frames[0][0]" if family.draws_videos else "images[0]",
            guidance_argument=family.guidance_argument,
            images=plan.images.rows,
            epoch=plan.images.length,
            sizes="" if plan.images.items is None else plan.sizes(3),
            fingerprint=run.facts["data"]["fingerprint"],
            steps=run.step,
            skipped_steps=run.progress.skipped,
            max_steps=plan.max_steps,
            batch_size=plan.global_batch,
            processes=run.accelerator.num_processes,
            mixed_precision=run.mixed_precision,
            trained=plan.what(),
            seed=run.seed,
            seconds=training_seconds(records, plan.global_batch) or None,
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
    seen = [record for record in records if math.isfinite(record.get("lpl_share", math.nan))]
    with_lpl = [record for record in seen if 0 < record.get("lpl_weight", 0) < math.inf]
    if not with_lpl:
        return {}
    share = sum(record["lpl_share"] for record in with_lpl) / len(with_lpl)
    return {"lpl_weight": with_lpl[-1]["lpl_weight"], "lpl_share": share}
