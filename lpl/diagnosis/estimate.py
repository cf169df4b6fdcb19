"""Counts what a run would need on a GPU that is not there. Needs no weights; :mod:`lpl.diagnosis.for_gpu` reports it.

The models are built from their configurations without data (:mod:`lpl.diagnosis.counting`), and the training loop's
own step runs on them. Memory is what live tensors take at a time, at its *peak* in a *stage*: loading the models, a
step without LPL, a step with LPL in which every sample is inside, drawing a sample, saving. An *operation* is a
floating-point one of a matrix product, convolution or attention.

With FSDP2, what is trained is in torch's own shards (:mod:`lpl.diagnosis.shards`), and memory is that of one process.

What is estimated, not counted: CUDA's context, the libraries' workspaces and the allocator's gaps (``CONTEXT``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lpl.autoencoders import decode, drop_encoder, unscale
from lpl.config import Config
from lpl.config.groups import Data, Lpl
from lpl.data.dataset import Batch, LatentSpace
from lpl.diagnosis.counting import Counting, as_on_gpu
from lpl.diagnosis.needs import bytes_of, count_parameters, models_of, optimizer_bytes
from lpl.diagnosis.shards import Shard, on_host, other_processes
from lpl.diagnosis.status import Stage
from lpl.diagnosis.without_weights import OneGpu, family_without_weights, model_without_weights
from lpl.families import Conditions, Family
from lpl.families.description import Description
from lpl.families.resolve import with_decoder_dtype
from lpl.loss import LatentPerceptualLoss
from lpl.objectives import FlowMatching, Objective
from lpl.student import Student, StudentLoss
from lpl.tools.machine import DTYPES
from lpl.training.given_lora import Adapters, shapes_of
from lpl.training.losses import lpl_weight, perceptual_loss
from lpl.training.memory import offload_vaes
from lpl.training.sharding import Sharding, local
from lpl.training.start import place_models, trained_parts
from lpl.training.updates import prepare


CONTEXT = 2**30  # bytes of CUDA's context, workspaces and the allocator's gaps: assumed, not counted
PACKED = {  # bytes of a quantised weight, with the scales of its blocks, if they are more than one of each row
    **dict.fromkeys(("8bit", "torchao:int8wo", "torchao:float8wo", "quanto:int8", "quanto:float8"), 1.0),
    "4bit": 0.5 + 4 / 64,
    "quanto:int4": 0.5 + 4 / 128,
}
STEPS = 2  # of the run: the length of the schedule, which takes no memory worth counting


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
        host: bytes of what rests in the CPU's memory: the EMA with --offload_ema, offloaded weights, and with FSDP2's
            offload the shards with their gradients and optimizer state.
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


class Rehearsal:
    """A run without data: its models, its optimizer's state and its steps; within :class:`Counting`.

    Args:
        objective: made outside, since its tables are on the host.
        adapters: LoRA that the flags name, read outside.
        counting: is told what the CPU's memory holds; None: nothing is counted.
    """

    def __init__(
        self,
        config: Config,
        description: Description,
        objective: Objective,
        method: Method,
        accelerator: OneGpu,
        adapters: Adapters,
        counting: Counting | None = None,
    ) -> None:
        self.counting = counting
        self.config, self.description, self.accelerator, self.method = config, description, accelerator, method
        optimization, stands_in = config.optimization, cast(Any, accelerator)
        family = family_without_weights(config, description, accelerator.mixed_precision)
        self.cached = _forget_encoders(family, config.data)
        self.packed = _pack(family.denoiser, config.lora.quantize_base)
        self.trained = trained_parts(family, config, adapters)
        here = config.changed(offload_ema=False, non_ema_revision=None)  # what is offloaded is left out of the count
        self.average = place_models(self.trained, here, description, stands_in, accelerator.sharding)
        self.lpl_loss = _lpl_loss(family, config.lpl, config.model.cache_dir) if config.lpl.enabled else None
        self.lpl_loss = offload_vaes(family.vae, self.lpl_loss, optimization, accelerator.device)
        self.weight = lpl_weight(config.lpl, accelerator.device)
        plain = replace(optimization, optimizer="AdamW", use_8bit_adam=False, lr_scheduler="constant")
        batch = optimization.train_batch_size * accelerator.num_processes
        self.model, self.updates = prepare(stands_in, self.trained, self.average, plain, batch, STEPS)
        self.losses = method.losses(family, objective, self.lpl_loss, config.lpl, config.diffusion)
        self.student = _student(config.lpl, config.model.cache_dir) if config.lpl.enabled else None
        self.state: list[Tensor] = []
        if self.average is not None and (optimization.offload_ema or self.resting):
            self._offload(self.average.shadow_params)
        for weight in self.resting:
            weight.register_post_accumulate_grad_hook(lambda weight: self._offload([cast(Tensor, weight.grad)]))

    @property
    def resting(self) -> list[nn.Parameter]:
        """Trained weights whose shards the CPU holds, with their gradients, optimizer state and EMA."""
        sharding = self.accelerator.sharding
        offloads = sharding is not None and sharding.offload
        return [weight for weight in self.trained.weights() if offloads and isinstance(weight, DTensor)]

    def _offload(self, tensors: Iterable[Tensor]) -> None:
        if self.counting is not None:
            self.counting.offload(local(tensors))

    def begin(self) -> None:
        """Create the optimizer's state, by an update: the first one of shards has torch work out whole tensors."""
        optimizer: Any = self.updates.optimizer
        if self.config.optimization.optimizer != "AdamW" or self.config.optimization.use_8bit_adam:
            count = optimizer_bytes(local(self.trained.weights()), self.config.optimization)
            self.state = [torch.empty(count, dtype=torch.uint8)]
            optimizer.step = lambda: None
        self._fill_gradients()
        self.updates.step()
        for weight in self.resting:
            self._offload([*self.state, *filter(torch.is_tensor, optimizer.state[weight].values())])

    def _fill_gradients(self) -> None:
        for parameter in self.trained.weights():
            parameter.grad = torch.empty_like(parameter)
        self._offload(cast(Tensor, weight.grad) for weight in self.resting)

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
    conditions = family.encode_prompts(["a caption"], cast(Any, family.text_encoders[0]).device, None)
    names = [name for name in family.text_encoder_names if getattr(family.pipeline, name) is not None]
    family.release(dict.fromkeys(names, lambda: None))
    return {name: torch.as_tensor(value)[0] for name, value in conditions.items()}


def _lpl_loss(family: Family, lpl: Lpl, cache_dir: str | None) -> LatentPerceptualLoss:
    """The loss; a decoder of another precision or VAE is made from its configuration."""
    path, dtype = lpl.lpl_vae_name_or_path, DTYPES[lpl.decoder_dtype()]
    if path is None and family.vae.dtype == dtype:
        return perceptual_loss(family.vae, lpl, cache_dir)
    # Any class's file is read so; AutoModel's name for it changes with what it has loaded before
    settings: Any = family.vae.config if path is None else AutoencoderKL.load_config(path, cache_dir=cache_dir)
    other: Any = model_without_weights(getattr(diffusers, settings["_class_name"]), settings, dtype)
    other.requires_grad_(False).eval()
    if path is None:  # a copy has no encoder
        drop_encoder(other)
    return perceptual_loss(other, replace(lpl, lpl_vae_name_or_path=None), cache_dir)


def _student(lpl: Lpl, cache_dir: str | None) -> StudentLoss | None:
    """The student of --lpl_student, without weights."""
    if lpl.lpl_student is None:
        return None
    empty = model_without_weights(Student, Student.load_config(lpl.lpl_student, cache_dir=cache_dir), torch.float32)
    return StudentLoss(cast(Student, empty))


def _pack(denoiser: nn.Module, quantize_base: str | None) -> list[Tensor]:
    """The weights of a quantised base, and the one that is unpacked for use; empty for any other base."""
    weights = [module.weight for module in denoiser.modules() if isinstance(module, nn.Linear)]
    if quantize_base not in PACKED or not weights:
        return []
    numbers = sum(weight.numel() for weight in weights)
    largest = max(weights, key=Tensor.numel)
    return [torch.empty(int(PACKED[quantize_base] * numbers), dtype=torch.uint8), torch.empty_like(largest)]


@contextmanager
def rehearsal(
    config: Config,
    description: Description,
    method: Method,
    mixed_precision: str,
    counting: Counting,
    processes: int = 1,
    sharding: Sharding | None = None,
    on_gpu: bool = True,
) -> Iterator[Rehearsal]:
    """A run that is counted within; arguments as those of :func:`estimate`.

    Args:
        on_gpu: False: on the device that is here.
    """
    objective, adapters = description.objective(config.model.objective), shapes_of(config, description)
    accelerator = OneGpu(mixed_precision, processes)
    with ExitStack() as within:
        if sharding is not None:
            sharding = within.enter_context(other_processes(sharding, processes))
            accelerator = Shard(mixed_precision, processes, sharding)
        within.enter_context(counting)
        if on_gpu:
            within.enter_context(as_on_gpu())
        if sharding is not None:
            within.enter_context(on_host(counting))
        yield Rehearsal(config, description, objective, method, accelerator, adapters, counting)


def estimate(
    config: Config,
    description: Description,
    method: Method,
    mixed_precision: str,
    processes: int = 1,
    stages: Sequence[Stage] = (Stage.STEP, Stage.LPL_STEP, Stage.SAMPLES),
    counting: Counting | None = None,
    sharding: Sharding | None = None,
) -> Estimate:
    """Count what a run needs; nothing is loaded or computed.

    Args:
        config: complete.
        mixed_precision: ``no``, ``fp16`` or ``bf16``.
        processes: GPUs.
        stages: those that are counted, beside loading and saving.
        counting: counts on the device that is here instead of on a GPU, to compare with it.
        sharding: of what is trained, over several processes; None: each has a copy of it.
    """
    config = with_decoder_dtype(config, mixed_precision)
    optimization, lpl = config.optimization, config.lpl
    batch_size, on_gpu = optimization.train_batch_size, counting is None
    flow = isinstance(description.objective(config.model.objective), FlowMatching)
    timesteps = torch.zeros(max(batch_size, 2), dtype=torch.float32 if flow else torch.long)
    choice, counting = torch.rand(batch_size, 2), counting or Counting()
    memory: dict[Stage, int] = {}
    operations: dict[Stage, int] = {}
    how = config, description, method, mixed_precision, counting, processes, sharding, on_gpu
    with rehearsal(*how) as run:
        if run.packed:
            layers = (module for module in run.trained.denoiser.modules() if type(module) is nn.Linear)
            counting.leave_out(layer.weight for layer in layers if not layer.weight.requires_grad)
        memory[Stage.LOADING] = counting.current
        run.begin()
        # What is written goes through the CPU's memory, tensor by tensor; sharded ones are made whole before.
        whole = max(bytes_of([weight]) for weight in run.trained.parameters()) if run.trained.sharded else 0
        memory[Stage.SAVING] = counting.current + whole
        host = counting.host + bytes_of(local(run.resting))  # and their gradients
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
            name: (count_parameters(part), count_parameters(part, False))
            for name, part in models_of(run.trained).items()
        }
    text_encoders *= optimization.gradient_accumulation_steps
    return Estimate(parameters, memory, operations, text_encoders, host, student_operations)
