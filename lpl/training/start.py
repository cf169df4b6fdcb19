"""How a run starts: accelerate's state, the checkpoint it resumes, the images it trains on, its length."""

from __future__ import annotations

import logging
import math
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    set_seed,
)

from lpl.config import Config
from lpl.config.command_line import recipe
from lpl.config.groups import Optimization, Output
from lpl.data.buckets import bucketed
from lpl.data.dataset import Batches, LatentSpace, TrainingImages
from lpl.data.fingerprint import data_facts
from lpl.data.source import SHOWN, class_names, load_training_images
from lpl.data.streaming import StreamedBatches, load_streamed_images, training_images
from lpl.families import Family
from lpl.families.description import Description
from lpl.tools import layout
from lpl.tools.console import AboveBars
from lpl.tools.files import hold
from lpl.tools.process import settle_group
from lpl.tools.results import lora_entries, pipeline_entries
from lpl.tools.words import warn
from lpl.training.average import MovingAverage
from lpl.training.base_model import identity
from lpl.training.checkpoints import (
    Progress,
    check_data,
    check_recipe,
    find_checkpoints,
    find_resumable,
    tidy,
)
from lpl.training.given_lora import Adapters
from lpl.training.loading import average_from_revision, load_family, loading_weights, weight_dtype
from lpl.training.memory import place
from lpl.training.parts import TrainedParts
from lpl.training.preemption import OTHERS_WAIT
from lpl.training.sharding import Sharding, asks_for_fsdp, check_sharding


logger = logging.getLogger(__name__)


class Stage(Enum):
    """What a run is doing, in words; {} stands for the step."""

    READING = "while reading flags and data"
    LOADING = "while loading the models"
    STEP = "in step {}"
    LPL_STEP = "in step {}, which has LPL"
    SAMPLES = "while sampling after step {}"
    LOSSES = "while computing the validation losses after step {}"
    EVALUATION = "in the evaluation after step {}"
    SAVING = "while saving the result"


@dataclass
class Run:
    """What a run finds out or decides for itself; what was asked for is in the configuration.

    Args:
        folder: --output_dir.
        progress: where the run stands, as checkpoints record it.
        flags: every flag, resolved, as a recipe records it.
        resumed: the checkpoint that the run resumes from, if it does.
        repository: full id, ``user/name``, of the repository that the run publishes to, if it does.
        facts: what the run's numbers depend on besides its flags, see :mod:`lpl.training.provenance`.
        ending: the run ends at this step, before its last one.
        problem: why, if no signal asked for it.
    """

    accelerator: Accelerator
    folder: Path
    progress: Progress
    flags: dict[str, Any]
    resumed: Path | None = None
    repository: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    ending: bool = False
    problem: str = ""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.progress.step

    @step.setter
    def step(self, step: int) -> None:
        self.progress.step = step

    @property
    def seed(self) -> int:
        return self.progress.seed

    @property
    def owns_folder(self) -> bool:
        """Whether what is in the output folder is this run's: it resumes from one of the folder's checkpoints."""
        if self.resumed is None:
            return False
        place = self.resumed.resolve()
        return place.parent == self.folder.resolve() and place.name.startswith(layout.CHECKPOINT_PREFIX)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def mixed_precision(self) -> str:
        """``no``, ``fp16`` or ``bf16``; accelerate's configuration may say it."""
        return self.accelerator.mixed_precision

    @property
    def recipe(self) -> dict[str, Any]:
        """Every flag, resolved, in YAML's types."""
        return self.flags | ({"hub_model_id": self.repository} if self.repository else {})


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Args:
        global_batch: images per optimizer step, over all processes and micro-batches.
        max_steps: optimizer steps of the whole run.
        epoch: optimizer steps of an epoch; of a stream, whose length nobody knows, of the whole run.
    """

    global_batch: int
    max_steps: int
    epoch: int

    @classmethod
    def of(cls, optimization: Optimization, images: int | None, processes: int) -> Length:
        """The length of a run by its images in an epoch (None: unknown) and its number of processes."""
        batch = optimization.train_batch_size * processes * optimization.gradient_accumulation_steps
        if images is None:
            assert optimization.max_train_steps is not None  # refused by config.checks
            return cls(batch, optimization.max_train_steps, optimization.max_train_steps)
        steps = optimization.max_train_steps
        if steps is None:
            steps = math.ceil(optimization.num_train_epochs * images / batch)
        return cls(batch, steps, math.ceil(images / batch))


@contextmanager
def run_errors(script: str, *errors: type[Exception]) -> Iterator[None]:
    """Within, a ValueError, or one of the other errors, ends the process with its sentence and exit code 1."""
    try:
        yield
    except (ValueError, *errors) as error:
        sys.exit(f"{script}: error: {error}")


def start_accelerator(config: Config, idle_weights: bool = False) -> Accelerator:
    """Accelerate's state, with trackers for what they can show.

    Args:
        idle_weights: of the family's denoiser.

    Raises:
        ValueError: for an engine or a precision that is not supported.
    """
    validation, output = config.validation, config.output
    accelerator = Accelerator(
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=OTHERS_WAIT),
            DistributedDataParallelKwargs(
                # The last layers of a text encoder may be computed for nothing: SDXL takes the ones before.
                find_unused_parameters=config.model.train_text_encoder or idle_weights,
                gradient_as_bucket_view=True,  # else what is sent is a second copy of all gradients
            ),
        ],
        gradient_accumulation_steps=config.optimization.gradient_accumulation_steps,
        mixed_precision=config.optimization.mixed_precision,
        log_with=None if validation.report_to == "none" or validation.dry_run else validation.report_to,
        project_config=ProjectConfiguration(
            output.output_dir, logging_dir=str(Path(output.output_dir, validation.logging_dir))
        ),
    )
    logging.basicConfig(
        format="%(asctime)s %(levelname)s: %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if accelerator.is_main_process else logging.ERROR,
        handlers=[AboveBars()],
    )
    for library in ("accelerate", "httpx", "httpx2"):  # they log every file that they touch
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)  # they log every caption that they truncate
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type.value} (in accelerate's configuration) is not supported; to spread a "
            "model over several GPUs, launch with --config_file examples/accelerate/fsdp2.yaml"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 (in accelerate's configuration) needs a GPU; give --mixed_precision bf16 or no")
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"{accelerator.mixed_precision} (in accelerate's configuration) is not supported; give --mixed_precision"
        )
    micro_batches = config.optimization.gradient_accumulation_steps
    if accelerator.gradient_accumulation_steps != micro_batches:
        raise ValueError(
            f"accelerate's configuration accumulates {accelerator.gradient_accumulation_steps} micro-batches, and "
            f"--gradient_accumulation_steps is {micro_batches}; give the flag, and leave it out there"
        )
    sharding = Sharding.asked(accelerator)
    check_sharding(sharding, config)
    if sharding is None and asks_for_fsdp():
        warn("FSDP2 (in accelerate's configuration) shards nothing in one process; launch several by --num_processes")
    if config.optimization.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def start_or_resume(config: Config, accelerator: Accelerator, download: Callable[[Output], None]) -> Run:
    """A run at its beginning, or at the checkpoint that --resume_from_checkpoint names.

    Args:
        download: puts the last checkpoint that was pushed into the output folder, see
            :func:`lpl.publishing.hub.download_run`.

    Raises:
        ValueError: where the checkpoint is of something else than what the command trains, or another run writes to
            the folder.
    """
    output, seed = config.output, config.optimization.seed
    with accelerator.main_process_first():
        if accelerator.is_main_process and not config.validation.dry_run:
            if Path(output.output_dir).is_dir():  # else it is held as soon as it is made
                hold(f"--output_dir {output.output_dir}", output.output_dir)
            tidy(output.output_dir)
            if output.resume_from_checkpoint == "hub":
                download(output)
        resumed = find_resumable(output.output_dir, output.resume_from_checkpoint)
    if len(seen := set(gather_object([resumed.name if resumed else "none"]))) > 1:
        raise ValueError(
            f"--output_dir {output.output_dir}: the processes find different checkpoints ({', '.join(sorted(seen))}); "
            "all machines need the same folder"
        )
    if resumed is not None:
        progress = Progress.load(resumed)
        if seed not in (None, progress.seed):
            raise ValueError(f"--seed {seed}: the run to resume has the seed {progress.seed}; leave the flag out")
    else:
        if earlier := find_checkpoints(output.output_dir):
            logger.warning(
                f"--output_dir {output.output_dir} has checkpoints of an earlier run, {earlier[-1].name} among them; "
                "this run starts afresh and moves them aside; to resume it, add --resume_from_checkpoint latest"
            )
        elif config.validation.dry_run and (
            pipeline_entries(folder := Path(output.output_dir)) or lora_entries(folder)
        ):
            logger.warning(
                f"--output_dir {output.output_dir} has the result of an earlier run, which a run moves aside as soon "
                "as it writes"
            )
        drawn = broadcast_object_list([secrets.randbelow(2**31)])[0]
        progress = Progress(step=0, seed=drawn if seed is None else seed)
    set_seed(progress.seed)
    flags = recipe(config) | {"seed": progress.seed, "mixed_precision": accelerator.mixed_precision}
    if resumed is not None:
        check_recipe(resumed, flags, accelerator.num_processes, identity(config.model))
    return Run(accelerator, Path(output.output_dir), progress, flags, resumed)


def open_images(config: Config, description: Description, run: Run) -> tuple[TrainingImages, TrainingImages | None]:
    """What is trained on, and what is held out for the validation loss (None: nothing is); one image is read.

    Raises:
        ValueError: where there is nothing to train on, or a column is missing or of the wrong kind.
    """
    data, cache_dir = config.data, config.model.cache_dir
    load = load_streamed_images if data.streaming else load_training_images
    with run.accelerator.main_process_first():
        dataset, held_out = load(data, run.seed, cache_dir, description.num_classes, run.progress.classes)
        items, held_out_items = (bucketed(part, data, cache_dir) for part in (dataset, held_out))
    common = (
        description.objective(config.model.objective),
        LatentSpace(*description.space),
        data,
        config.diffusion,
        run.seed,
        description.empty_caption,
        cache_dir,
    )
    images = replace(training_images(dataset, *common), items=items)
    images.check()
    if description.num_classes is not None:
        run.progress.classes = class_names(dataset, data)
        _compare_labels(run, description)
    if run.resumed is not None and run.is_main:
        run.facts["data"] = data_facts(dataset, data, cache_dir)
        check_data(run.resumed, run.facts["data"])
    return images, None if held_out is None else TrainingImages(held_out, *common, held_out_items)


def _compare_labels(run: Run, description: Description) -> None:
    """Warn of classes that have another label in the pipeline than in the data of a run that begins."""
    index = description.family.class_names(description.index)
    known = {name.strip(): label for label, names in index.items() for name in names.split(",")}
    labels = [
        f"{name} {label} ({known[name]})"
        for label, name in enumerate(run.progress.classes)
        if known.get(name, label) != label
    ]
    if labels and run.resumed is None:
        logger.warning(
            "--pretrained_model_name_or_path: classes have other labels in the data than in the pipeline (in brackets)"
            f", which has to relearn them: {', '.join(labels[:SHOWN])}"
        )


def order_of(images: TrainingImages, optimization: Optimization, run: Run) -> Batches | StreamedBatches:
    """The batches of this process, from where the run stands on."""
    accelerator = run.accelerator
    first_batch = run.step * optimization.gradient_accumulation_steps
    process, processes = accelerator.process_index, accelerator.num_processes
    return images.batches(optimization.train_batch_size, process, processes, first_batch, run.progress.stream)


def load_weights(config: Config, description: Description, accelerator: Accelerator) -> Family:
    """The pipeline, all of it frozen, on the CPU.

    Raises:
        ValueError: where weights cannot be loaded.
    """
    what = f"--pretrained_model_name_or_path {config.model.source}"
    with loading_weights(what, "; look at --variant and --revision"):
        return load_family(config.model, config.lora, description, weight_dtype(accelerator.mixed_precision))


def trained_parts(family: Family, config: Config, adapters: Adapters | None = None) -> TrainedParts:
    """What is trained of a pipeline, as the flags say.

    Args:
        adapters: LoRA that the flags name; None: they are read.
    """
    return TrainedParts(
        family,
        config.lora,
        text_encoders=config.model.train_text_encoder,
        gradient_checkpointing=config.optimization.gradient_checkpointing,
        cache_dir=config.model.cache_dir,
        adapters=adapters,
    )


def place_models(
    trained: TrainedParts,
    config: Config,
    description: Description,
    accelerator: Accelerator,
    sharding: Sharding | None,
) -> MovingAverage | None:
    """Move the models to the device; returns the EMA, if there is one.

    Args:
        sharding: of what is trained; None: it is whole in each process.

    Raises:
        ValueError: where weights are not finite.
    """
    family = trained.family
    for part in (family.vae, family.denoiser, *family.text_encoders):
        if sharding is None or part not in trained.parts.values():
            place(part, trained, config, accelerator.device)
    if broken := trained.not_finite():
        given = "lora_init" if config.lora.lora_init else "pretrained_model_name_or_path"
        path = config.lora.lora_init or config.model.source
        raise ValueError(f"--{given} {path}: the weights of {broken} are not finite")
    if sharding is not None:
        names = " and ".join(trained.parts)
        logger.info(f"FSDP2: {names} in shards over {accelerator.num_processes} processes")
        for part in trained.parts.values():
            sharding.shard(part, accelerator, family.sharded_layers if part is family.denoiser else ())
    average = MovingAverage.of(trained, config.optimization)
    if average is not None and config.model.non_ema_revision and not config.lora.lora:
        average_from_revision(average, config.model, description)
    return average


def finish(accelerator: Accelerator) -> None:
    """Close trackers and the process group once all processes are done: launchers end those behind the first."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    settle_group(accelerator.num_processes)
