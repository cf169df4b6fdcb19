"""The report of ``--dry_run --for_gpu``: what a run would need on a GPU that is not there. Needs no weights.

The models are built from their configurations without data (:mod:`lpl.diagnosis.counting`), and the training loop's
own step runs on them. Memory is what live tensors take at a time, at its *peak* in a *stage*: loading the models, a
step without LPL, a step with LPL in which every sample is inside, drawing a sample, saving. An *operation* is a
floating-point one of a matrix product, convolution or attention.

What is estimated, not counted: CUDA's context, the libraries' workspaces and the allocator's gaps (``CONTEXT``).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import diffusers
import torch
import transformers
from accelerate.utils.operations import convert_outputs_to_fp32
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import BatchEncoding

from lpl.autoencoders import decode, drop_encoder, unscale
from lpl.config import Config
from lpl.config.checks import gpu_memory
from lpl.config.choices import RANK
from lpl.config.command_line import build_parser, given_flags
from lpl.config.groups import Data, Lpl
from lpl.data.dataset import Batch, LatentSpace
from lpl.diagnosis.counting import GPU, Counting, as_on_gpu
from lpl.diagnosis.needs import bytes_of, count_parameters, optimizer_bytes
from lpl.diagnosis.remedies import remedies
from lpl.diagnosis.status import Stage, Status
from lpl.families import Conditions, Family
from lpl.families.derived import with_derived
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolve, with_decoder_dtype
from lpl.objectives import FlowMatching, Objective
from lpl.student import Student, StudentLoss
from lpl.tools.machine import DTYPES
from lpl.tools.trust import components_in
from lpl.tools.words import Rows, counted, pixels, short_count, size, table
from lpl.training.given_lora import Adapters, shapes_of, with_adapters
from lpl.training.loading import denoiser_class, precisions
from lpl.training.losses import lpl_weight, perceptual_loss
from lpl.training.memory import offload_vaes
from lpl.training.parts import TrainedParts
from lpl.training.start import place_models, trained_parts
from lpl.training.updates import prepare


logger = logging.getLogger(__name__)

CONTEXT = 2**30  # bytes of CUDA's context, workspaces and the allocator's gaps: assumed, not counted
LONGEST = 45.0  # seconds after which no further flags are tried
PACKED = {  # bytes of a quantised weight, with the scales of its blocks, if they are more than one of each row
    **dict.fromkeys(("8bit", "torchao:int8wo", "torchao:float8wo", "quanto:int8", "quanto:float8"), 1.0),
    "4bit": 0.5 + 4 / 64,
    "quanto:int4": 0.5 + 4 / 128,
}
STEPS = 2  # of the run: the length of the schedule, which takes no memory worth counting
TOKENS = 77  # of a caption, where the flags do not say: CLIP's


@dataclass(frozen=True)
class Method:
    """The training loop's own parts, which this package does not import.

    Args:
        losses: the class that computes both terms of Eq. 3.
        step: takes one optimizer step on the next batches.
    """

    losses: Callable[..., Any]
    step: Callable[..., int]


@dataclass(frozen=True)
class Estimate:
    """What a run needs on one GPU.

    Args:
        parameters: trained and all parameters of each part of the pipeline.
        memory: bytes at the peak of each stage.
        operations: of an optimizer step, of one whose samples are all inside, and of the text encoders alone.
        host: bytes of what rests in the CPU's memory: the EMA with --offload_ema, and offloaded weights.
        student_operations: of a step with --lpl_student without a correction; 0 without a student.
    """

    parameters: Mapping[str, tuple[int, int]]
    memory: Mapping[Stage, int]
    operations: Mapping[Stage, int]
    text_encoder_operations: int = 0
    host: int = 0
    student_operations: int = 0

    @property
    def peak(self) -> int:
        """Bytes at the peak of the whole run."""
        return max(self.memory.values())

    def fits(self, capacity: int) -> bool:
        """Whether a GPU with that many bytes is large enough, with what is assumed for the context."""
        return self.peak + CONTEXT <= capacity


# Models without weights ----------------------------------------------------------------------------------------------


class Tokenizer:
    """Gives captions of the longest length; stands for a tokenizer, whose vocabulary need not be there."""

    padding_side = "right"

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, text: Any, *args: Any, max_length: int | None = None, **kwargs: Any) -> BatchEncoding:
        shape = 1 if isinstance(text, str) else len(text), max_length or self.model_max_length
        return BatchEncoding({name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")})

    def encode(self, text: str) -> list[int]:
        """About a token for four letters."""
        return [0] * (len(text) // 4)

    def tokenize(self, text: str) -> list[str]:
        return []

    def apply_chat_template(self, messages: Any, *, tokenize: bool = True, **kwargs: Any) -> Any:
        return self(messages, **kwargs) if tokenize else ""

    def batch_decode(self, ids: Any, *args: Any, **kwargs: Any) -> list[str]:
        return [""] * len(ids)


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Models that are made within have that precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model from its configuration, all of it in one precision, as ``from_pretrained`` loads it."""
    with _made_in(dtype):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for module in model.modules():
        saved = {name for name in module._buffers if name not in module._non_persistent_buffers_set}
        for kept, names in ((module._parameters, set(module._parameters)), (module._buffers, saved)):
            for name in names:
                value = kept[name]
                if value is not None and value.is_floating_point() and value.dtype != dtype:
                    lowered = value.detach().to(dtype)
                    kept[name] = nn.Parameter(lowered) if isinstance(value, nn.Parameter) else lowered
    return model


def family_without_weights(config: Config, description: Description, mixed_precision: str) -> Family:
    """The pipeline that the flags name, from its configurations; within :class:`Counting`.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
    """
    model, family = config.model, description.family
    dtypes = precisions(model, config.lora, family, weight_dtype_of(mixed_precision))
    denoiser = family.untrained_config(description.denoiser) if model.from_scratch else description.denoiser
    trained_in = dtypes.get(family.denoiser_name, torch.float32)
    components: dict[str, Any] = {
        **description.absent,
        "vae": _made(getattr(diffusers, description.vae["_class_name"]), description.vae, torch.float32),
        family.denoiser_name: _made(denoiser_class(description), denoiser, trained_in),
        "scheduler": description.scheduler,
    }
    where = {"revision": model.revision, "cache_dir": model.cache_dir}
    for name in family.text_encoder_names:
        if name in description.absent:
            continue
        kind = getattr(transformers, description.index[name][1])
        settings = kind.config_class.from_pretrained(model.pipeline, subfolder=name, **where)
        components[name] = _made(kind, settings, dtypes[name])
        length = getattr(settings.get_text_config(), "max_position_embeddings", None) or model.max_sequence_length
        components[name.replace("text_encoder", "tokenizer")] = Tokenizer(length or TOKENS)
    needed, options = family.pipeline_class._get_signature_keys(family.pipeline_class)
    flags = {name: description.index[name] for name in options if name in description.index}
    flags = {name: value for name, value in flags.items() if name not in components_in(description.index)}
    flags |= {name: False for name in options if name == "requires_safety_checker"}
    pipeline = family.pipeline_class(**{name: components.get(name) for name in needed}, **flags)
    made: Any = family(pipeline, model.max_sequence_length, model.guidance_scale)
    plain = made.predict
    made.predict = lambda *inputs: plain(*inputs[:-1], _longest(inputs[-1]))
    return made


def _longest(conditions: Conditions) -> Conditions:
    """As if each caption had as many tokens as there can be; here no tensor has values that would tell."""
    if "lengths" not in conditions:
        return conditions
    count, tokens = next(iter(conditions.values())).shape[:2]
    return conditions | {"lengths": (tokens,) * count}


def weight_dtype_of(mixed_precision: str) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


class OneGpu:
    """Does what accelerate does for a step, for a GPU that is not there.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        processes: GPUs; with several, each holds a copy of the gradients in the buckets that they are exchanged in.
    """

    device = GPU
    scaler = None
    gradient_accumulation_steps = 1  # further micro-batches are computed from this one

    def __init__(self, mixed_precision: str, processes: int = 1) -> None:
        self.mixed_precision, self.num_processes = mixed_precision, processes
        self._buckets: list[Tensor] = []

    def prepare(self, trained: TrainedParts, optimizer: Any) -> tuple[nn.Module, Any]:
        """What is trained, under autocast and with outputs in float32; and its optimizer."""
        plain, optimizer.optimizer = trained.forward, optimizer

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.autocast():
                output = plain(*args, **kwargs)
            return output if self.mixed_precision == "no" else convert_outputs_to_fp32(lambda: output)()

        trained.forward = forward  # type: ignore[method-assign]
        if self.num_processes > 1:
            self._buckets = [torch.empty_like(parameter) for parameter in trained.weights()]
        return trained, optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        if self.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=weight_dtype_of(self.mixed_precision))

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self) -> None:
        pass

    def reduce(self, numbers: Tensor, how: str) -> Tensor:
        return numbers


# Counting ------------------------------------------------------------------------------------------------------------


class Rehearsal:
    """A run without data: its models, its optimizer's state and its steps; within :class:`Counting`.

    Args:
        objective: made outside, since its tables are on the host.
        adapters: LoRA that the flags name, read outside.
    """

    def __init__(
        self,
        config: Config,
        description: Description,
        objective: Objective,
        method: Method,
        accelerator: OneGpu,
        adapters: Adapters,
    ) -> None:
        self.config, self.description, self.accelerator, self.method = config, description, accelerator, method
        optimization, stands_in = config.optimization, cast(Any, accelerator)
        family = family_without_weights(config, description, accelerator.mixed_precision)
        self.cached = _forget_encoders(family, config.data)
        self.packed = _pack(family.denoiser, config.lora.quantize_base)
        self.trained = trained_parts(family, config, adapters)
        here = config.changed(offload_ema=False, non_ema_revision=None)  # what is offloaded is left out of the count
        self.average = place_models(self.trained, here, description, stands_in)
        self.lpl_loss = (
            perceptual_loss(*_decoder(family, config.lpl, config.model.cache_dir)) if config.lpl.enabled else None
        )
        self.lpl_loss = offload_vaes(family.vae, self.lpl_loss, optimization, accelerator.device)
        self.weight = lpl_weight(config.lpl, accelerator.device)
        plain = replace(optimization, optimizer="AdamW", use_8bit_adam=False)
        batch = optimization.train_batch_size * accelerator.num_processes
        self.model, self.updates = prepare(stands_in, self.trained, self.average, plain, batch, STEPS)
        self.losses = method.losses(family, objective, self.lpl_loss, config.lpl, config.diffusion)
        self.student = _student(config.lpl, config.model.cache_dir) if config.lpl.enabled else None
        self.state: list[Tensor] = []

    @property
    def offloaded(self) -> Sequence[Tensor]:
        """The weights of the EMA that the CPU holds."""
        return self.average.shadow_params if self.average is not None and self.config.optimization.offload_ema else ()

    def begin(self) -> None:
        """Create the optimizer's state."""
        optimizer: Any = self.updates.optimizer
        if self.config.optimization.optimizer == "AdamW" and not self.config.optimization.use_8bit_adam:
            self._fill_gradients()
            optimizer.step()
            optimizer.zero_grad()
            return
        count = optimizer_bytes(self.trained.weights(), self.config.optimization)
        self.state = [torch.empty(count, dtype=torch.uint8)]
        optimizer.step = lambda: None

    def _fill_gradients(self) -> None:
        for parameter in self.trained.weights():
            parameter.grad = torch.empty_like(parameter)

    def measure_a_sample(self) -> None:
        """Let LPL find out how many samples it decodes at a time, which it does once and not in each step."""
        assert self.lpl_loss is not None
        config, factor = self.config, LatentSpace(*self.description.space).factor
        shape = LatentSpace(*self.description.space).shape(*config.data.size)
        side = config.lpl.lpl_crop and config.lpl.lpl_crop // factor
        window = (0, 0, side, side) if side else None
        self.lpl_loss.samples_at_once(torch.empty(config.optimization.train_batch_size, *shape), window)

    def step(self, batch: Batch, with_lpl: bool, student: StudentLoss | None = None) -> None:
        """The last micro-batch of an optimizer step, and the update.

        Args:
            student: computes LPL, without a correction.
        """
        lpl = replace(self.config.lpl, lpl_weight="1", lpl_correct_every=0)  # w is not measured
        if self.config.optimization.gradient_accumulation_steps > 1:
            self._fill_gradients()  # those of the micro-batches before
        self.method.step(
            iter([batch]),
            with_lpl,
            number=self.config.lpl.lpl_start_step,
            model=self.model,
            losses=replace(self.losses, student=student),
            weight=lpl_weight(lpl, self.accelerator.device) if student else self.weight,
            updates=self.updates,
        )

    def batch(self, timesteps: Tensor, choice: Tensor) -> Batch:
        """A batch of images without data; every sample is inside the threshold.

        Args:
            timesteps: (B,), on the host.
            choice: uniform random numbers, (B, 2), on the host.
        """
        (height, width), count = self.config.data.size, len(timesteps)
        shape = (count, *LatentSpace(*self.description.space).shape(height, width))
        sizes = torch.tensor([[height, width]]).repeat(count, 1)
        label = self.description.num_classes
        embeddings = {name: row.new_empty(count, *row.shape) for name, row in self.cached.items()}
        moments = {"posterior": {name: torch.empty(shape) for name in ("mean", "std")}}
        return {
            **(moments if self.config.data.cache_latents else {"pixels": torch.empty(count, 3, height, width)}),
            **({"embeddings": embeddings} if embeddings else {}),
            "timestep": timesteps,
            "lpl_choice": choice,
            **{name: torch.empty(shape) for name in ("noise", "posterior_noise", "input_noise")},
            **dict.fromkeys(("original_size", "target_size"), sizes),
            "crop_top_left": torch.zeros_like(sizes),
            "caption": ["a caption"] * count if label is None else torch.zeros(count, dtype=torch.long),
        }

    @torch.no_grad()
    def conditions(self, batch: Batch) -> None:
        """The pass of the text encoders."""
        self.trained.family.conditions(batch, self.accelerator.device)

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """One step of sampling, with guidance by a second row, and the decoding of one image."""
        family = self.trained.family
        with self.accelerator.autocast():
            conditions = family.conditions(batch, self.accelerator.device)
            family.predict(family.denoiser, batch["noise"], batch["timestep"], conditions)
        raw = unscale(family.vae, batch["noise"][:1]).to(family.vae.dtype)
        decode(family.vae, raw)


@torch.no_grad()
def _forget_encoders(family: Family, data: Data) -> Conditions:
    """Leave out what the caches replace; returns the conditions of a caption that are read instead, if any are."""
    if data.cache_latents:
        drop_encoder(family.vae)
    if not data.cache_text_embeddings:
        return {}
    conditions = family.encode_prompts(["a caption"], cast(Any, family.text_encoders[0]).device)
    names = [name for name in family.text_encoder_names if getattr(family.pipeline, name) is not None]
    family.release(dict.fromkeys(names, lambda: None))
    return {name: torch.as_tensor(value)[0] for name, value in conditions.items()}


def _decoder(family: Family, lpl: Lpl, cache_dir: str | None) -> tuple[Any, Lpl, str | None]:
    """Arguments of :func:`perceptual_loss`; a decoder of another precision or VAE is made from its configuration."""
    path, dtype = lpl.lpl_vae_name_or_path, DTYPES[lpl.decoder_dtype()]
    if path is None and family.vae.dtype == dtype:
        return family.vae, lpl, cache_dir
    # Any class's file is read so; AutoModel's name for it changes with what it has loaded before
    settings: Any = family.vae.config if path is None else AutoencoderKL.load_config(path, cache_dir=cache_dir)
    other = _made(getattr(diffusers, settings["_class_name"]), settings, dtype).requires_grad_(False).eval()
    if path is None:  # a copy has no encoder
        drop_encoder(other)
    return other, replace(lpl, lpl_vae_name_or_path=None), cache_dir


def _student(lpl: Lpl, cache_dir: str | None) -> StudentLoss | None:
    """The student of --lpl_student, without weights."""
    if lpl.lpl_student is None:
        return None
    empty = _made(Student, Student.load_config(lpl.lpl_student, cache_dir=cache_dir), torch.float32)
    return StudentLoss(cast(Student, empty))


def _pack(denoiser: nn.Module, quantize_base: str | None) -> list[Tensor]:
    """The weights of a quantised base, and the one that is unpacked for use; empty for any other base."""
    weights = [module.weight for module in denoiser.modules() if isinstance(module, nn.Linear)]
    if quantize_base not in PACKED or not weights:
        return []
    numbers = sum(weight.numel() for weight in weights)
    largest = max(weights, key=Tensor.numel)
    return [torch.empty(int(PACKED[quantize_base] * numbers), dtype=torch.uint8), torch.empty_like(largest)]


def estimate(
    config: Config,
    description: Description,
    method: Method,
    mixed_precision: str,
    processes: int = 1,
    stages: Sequence[Stage] = (Stage.STEP, Stage.LPL_STEP, Stage.SAMPLES),
    counting: Counting | None = None,
) -> Estimate:
    """Count what a run needs; nothing is loaded or computed.

    Args:
        config: complete.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        processes: GPUs.
        stages: those that are counted, beside loading and saving.
        counting: counts on the device that is here instead of on a GPU, to compare with it.
    """
    config = with_decoder_dtype(config, mixed_precision)
    optimization, lpl = config.optimization, config.lpl
    batch_size, accelerator = optimization.train_batch_size, OneGpu(mixed_precision, processes)
    objective = description.objective(config.model.objective)
    flow = isinstance(objective, FlowMatching)
    timesteps = torch.zeros(max(batch_size, 2), dtype=torch.float32 if flow else torch.long)
    choice, on_gpu = torch.rand(batch_size, 2), as_on_gpu() if counting is None else nullcontext()
    counting = counting or Counting()
    memory: dict[Stage, int] = {}
    operations: dict[Stage, int] = {}
    adapters = shapes_of(config, description)
    with counting, on_gpu:
        run = Rehearsal(config, description, objective, method, accelerator, adapters)
        if run.packed:
            layers = (module for module in run.trained.denoiser.modules() if type(module) is nn.Linear)
            counting.leave_out(layer.weight for layer in layers if not layer.weight.requires_grad)
        counting.leave_out(run.offloaded)
        memory[Stage.LOADING], pinned = counting.current, counting.host
        run.begin()
        memory[Stage.SAVING] = counting.current  # what is written goes through the CPU's memory, tensor by tensor
        counting.reset()
        run.conditions(run.batch(timesteps[:batch_size], choice))
        text_encoders = counting.operations
        for stage in stages:
            if stage is Stage.LPL_STEP and not lpl.enabled:
                continue
            if stage is Stage.LPL_STEP:
                run.measure_a_sample()
            counting.reset()
            if stage is Stage.SAMPLES:
                run.draw(run.batch(timesteps[:2], torch.empty(2, 2)))
            else:
                run.step(run.batch(timesteps[:batch_size], choice), stage is Stage.LPL_STEP)
                operations[stage] = counting.operations * optimization.gradient_accumulation_steps
            loads = stage is Stage.SAMPLES and not optimization.offload_frozen  # layer by layer with it
            released = run.trained.family.released_bytes if loads else 0
            memory[stage] = counting.peak + released
        student_operations = 0
        if run.student is not None:
            counting.reset()
            run.step(run.batch(timesteps[:batch_size], choice), True, run.student)
            student_operations = counting.operations * optimization.gradient_accumulation_steps
            if run.weight.share is None and not lpl.lpl_correct_every:  # LPL itself is never computed
                memory[Stage.LPL_STEP] = counting.peak
        parameters = {
            name: (count_parameters(part), count_parameters(part, False)) for name, part in _parts(run.trained)
        }
        host = bytes_of(run.offloaded) + pinned
    text_encoders *= optimization.gradient_accumulation_steps
    return Estimate(parameters, memory, operations, text_encoders, host, student_operations)


def _parts(trained: TrainedParts) -> list[tuple[str, nn.Module]]:
    family = trained.family
    names = dict.fromkeys([*trained.parts, family.denoiser_name, *family.text_encoder_names, "vae"])
    parts = ((name, getattr(family.pipeline, name)) for name in names)
    return [(name, part) for name, part in parts if part is not None]


# What would make it fit ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """Flags added to those before, and the estimate with all of them."""

    flags: str
    found: Estimate


def changed(config: Config, flags: str) -> Config:
    """A configuration with the flags of a remedy, which are as typed."""
    words = flags.split()
    if words[0] == "without":
        return config.changed(**{words[1].removeprefix("--"): False})
    values, names = vars(build_parser().parse_args(words)), given_flags(build_parser(), words)
    new = {name: values[name] for name in names}
    if new.get("lora"):
        new |= {"rank": RANK, "lora_alpha": float(RANK), "use_ema": False}
    return config.changed(**new)


def attempts(
    config: Config,
    description: Description,
    method: Method,
    mixed_precision: str,
    capacity: int,
    found: Estimate,
    processes: int = 1,
    seconds: float = LONGEST,
) -> list[Attempt]:
    """Flags of :func:`remedies`, added one after the other until the run fits, as far as each saves memory.

    Args:
        capacity: bytes of the GPU.
        found: without any of them.
        seconds: after which no further ones are tried.
    """
    started, tried, taken = time.monotonic(), set[str](), list[Attempt]()
    while not found.fits(capacity) and time.monotonic() - started < seconds:
        stage = max(found.memory, key=lambda stage: (found.memory[stage], stage is Stage.LPL_STEP))
        flags = _flags(config, description, mixed_precision, stage)
        row = next((row for row in flags if row not in tried), None)
        if row is None:
            break
        tried.add(row)
        precision = "bf16" if "mixed_precision bf16" in row else mixed_precision
        another = changed(config, row)
        better = estimate(another, description, method, precision, processes, _stages(found))
        if better.peak >= found.peak:
            continue
        batch, smaller = (each.optimization.train_batch_size for each in (config, another))
        if smaller < batch and not better.fits(capacity):
            accumulated = smaller * another.optimization.gradient_accumulation_steps
            smaller = _fitting_batch({batch: found.peak, smaller: better.peak}, capacity - CONTEXT)
            row = f"--train_batch_size {smaller} --gradient_accumulation_steps {accumulated // smaller}"
            another = changed(config, row)
            better = estimate(another, description, method, precision, processes, _stages(found))
        if smaller < batch and taken and taken[-1].flags.startswith("--train_batch_size"):
            taken.pop()
        config, found, mixed_precision = another, better, precision
        taken.append(Attempt(row, better))
    return taken


def _fitting_batch(peaks: Mapping[int, int], capacity: int) -> int:
    """The largest divisor of the smaller batch whose memory is at most the capacity; 1 if there is none.

    Args:
        peaks: bytes by batch, of two batches; others lie on the line through them.

    >>> _fitting_batch({16: 180, 8: 100}, 40), _fitting_batch({16: 180, 8: 100}, 0)
    (2, 1)
    """
    (larger, most), (smaller, least) = sorted(peaks.items(), reverse=True)
    each = (most - least) / (larger - smaller)
    sizes = [size for size in range(1, smaller) if smaller % size == 0]
    return max((size for size in sizes if least - each * (smaller - size) <= capacity), default=1)


def _stages(found: Estimate) -> tuple[Stage, ...]:
    """The stages that flags can make smaller: a step without LPL is never larger than one with it."""
    step = Stage.LPL_STEP if Stage.LPL_STEP in found.memory else Stage.STEP
    return (step, *(stage for stage in (Stage.SAMPLES,) if stage in found.memory))


def _flags(config: Config, description: Description, mixed_precision: str, stage: Stage) -> list[str]:
    """Flags that need less memory at a stage, those first that keep the run's numbers."""
    accelerator: Any = OneGpu(mixed_precision)
    with Counting(), as_on_gpu():
        trained = trained_parts(family_without_weights(config, description, mixed_precision), config)
        rows = remedies(Status(config, accelerator, trained, stage, step=1))
    return [row.flags for row in rows]


# Words ---------------------------------------------------------------------------------------------------------------


def print_estimate(config: Config, method: Method) -> None:
    """Print what the run would need on the GPU of --for_gpu.

    Raises:
        ValueError: where flags and pipeline do not go together.
    """
    if int(os.environ.get("RANK", 0)):
        return  # the first process tells
    config = with_derived(config, weights=False)
    description = read_pipeline(config.model, config.lpl.lpl_blocks, weights=False)
    config = with_adapters(resolve(config, description), description)
    precision = config.optimization.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    name = config.validation.for_gpu
    assert name is not None
    capacity = gpu_memory(name)
    stages = [Stage.STEP, Stage.LPL_STEP]
    if config.validation.validation_prompts or config.evaluation.eval_steps is not None:
        stages.append(Stage.SAMPLES)
    found = estimate(config, description, method, precision, processes, stages)
    print(_report(config, found, name, capacity, precision, processes), flush=True)
    if found.fits(capacity):
        return
    print("\nLooking for flags that make it fit, for a minute or so ...", flush=True)
    started = time.monotonic()
    tried = attempts(config, description, method, precision, capacity, found, processes)
    rows = _remedies(tried, capacity, time.monotonic() - started >= LONGEST)
    print(f"\n{table({'What would make it fit': rows})}", flush=True)


STAGES = {
    Stage.LOADING: "models loaded",
    Stage.STEP: "step",
    Stage.LPL_STEP: "step with LPL",
    Stage.SAMPLES: "samples",
    Stage.SAVING: "saving",
}


def _report(config: Config, found: Estimate, name: str, capacity: int, precision: str, processes: int) -> str:
    optimization, every = config.optimization, config.lpl.lpl_every
    parts = [
        (
            part,
            f"{short_count(of)} of {short_count(all_)} parameters trained" if of else f"{short_count(all_)}, frozen",
        )
        for part, (of, all_) in found.parameters.items()
    ]
    memory = [(words, size(found.memory[stage])) for stage, words in STAGES.items() if stage in found.memory]
    if found.host:
        memory.append(("of the CPU", f"{size(found.host)}, what is offloaded"))
    fits = "fits" if found.fits(capacity) else "does not fit"
    memory.append((f"on {name}", f"{fits}: {size(found.peak)} and about {size(CONTEXT)} for CUDA of {size(capacity)}"))
    plain, with_lpl = (found.operations.get(stage) for stage in (Stage.STEP, Stage.LPL_STEP))
    assert plain is not None
    operations = [("step", tera(plain)), ("of them text encoders", tera(found.text_encoder_operations))]
    if with_lpl:
        ratio = 1 + (with_lpl / plain - 1) / every
        operations.insert(1, ("step with LPL", f"{tera(with_lpl)}, LPL is {tera(with_lpl - plain)}"))
        average = f", on average over {every} steps" if every > 1 else ""
        if found.student_operations:
            corrected = (with_lpl - plain) / config.lpl.lpl_correct_every if config.lpl.lpl_correct_every else 0
            ratio = 1 + ((found.student_operations - plain + corrected) / plain) / every
            average = f"{average}, corrections included" if corrected else average
            operations.insert(2, ("step with the student", f"{tera(found.student_operations)}"))
        operations.append(("LPL costs", f"{ratio:.2f} x the operations{average}, at most: with all samples inside"))
    step = (
        f"{optimization.train_batch_size} samples x {optimization.gradient_accumulation_steps} at "
        f"{pixels(*config.data.size)}, {precision if precision != 'no' else 'float32'}, "
        f"{counted(processes, 'GPU')}"
    )
    sections: dict[str, Rows] = {
        "What is trained": [*parts, ("a step", step)],
        "Peak memory by stage": memory,
        "Operations of a step": operations,
    }
    return (
        f"Estimate for {name}: nothing was loaded, run or written. Memory is that of the tensors, counted; CUDA takes "
        f"about {size(CONTEXT)} besides.\n\n{table(sections)}"
    )


def _remedies(tried: Sequence[Attempt], capacity: int, in_time_only: bool) -> Rows:
    rows = [(attempt.flags, f"{size(attempt.found.peak)} with these and the ones above") for attempt in tried]
    if not tried or not tried[-1].found.fits(capacity):
        ended = f"the search ended after {LONGEST:.0f} s" if in_time_only else "no other flags save memory"
        rows.append(("in the end", f"{ended}; see docs/hardware.md, give the flags above, or a larger GPU"))
    return rows


def tera(count: float) -> str:
    """
    >>> tera(2.5e12)
    '2.5 TFLOP'
    """
    return f"{count / 1e12:.3g} TFLOP"
