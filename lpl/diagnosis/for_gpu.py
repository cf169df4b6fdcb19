"""The report of ``--dry_run --for_gpu``: what a run would need on a GPU that is not there, and what would make it fit.

:mod:`lpl.diagnosis.estimate` counts it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from lpl.config import Config
from lpl.config.checks import gpus
from lpl.config.choices import RANK, WITHOUT_BFLOAT16
from lpl.config.command_line import build_parser, given_flags
from lpl.diagnosis.counting import Counting, as_on_gpu
from lpl.diagnosis.estimate import CONTEXT, Estimate, Method, estimate
from lpl.diagnosis.remedies import remedies
from lpl.diagnosis.status import Stage, Status
from lpl.diagnosis.without_weights import OneGpu, family_without_weights
from lpl.families.derived import with_derived
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolve
from lpl.tools.words import Rows, counted, pixels, short_count, size, table, warn
from lpl.training.given_lora import with_adapters
from lpl.training.optimizers import check_optimizer
from lpl.training.sharding import Sharding, asks_for_fsdp, check_sharding
from lpl.training.start import trained_parts


LONGEST = 45.0  # seconds after which no further flags are tried


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
    sharding: Sharding | None = None,
) -> list[Attempt]:
    """Flags of :func:`remedies`, added one after the other until the run fits, as far as each saves memory.

    Args:
        capacity: bytes of the GPU.
        found: without any of them.
    """
    started, tried, taken = time.monotonic(), set[str](), list[Attempt]()
    while not found.fits(capacity) and time.monotonic() - started < LONGEST:
        stage = max(found.memory, key=lambda stage: (found.memory[stage], stage is Stage.LPL_STEP))
        flags = _flags(config, description, mixed_precision, stage, sharding)
        row = next((row for row in flags if row not in tried), None)
        if row is None:
            break
        tried.add(row)
        precision = "bf16" if "mixed_precision bf16" in row else mixed_precision
        another = changed(config, row)
        count = partial(estimate, description=description, method=method, processes=processes, sharding=sharding)
        better = count(another, mixed_precision=precision, stages=_stages(found))
        if better.peak >= found.peak:
            continue
        batch, smaller = (each.optimization.train_batch_size for each in (config, another))
        if smaller < batch and not better.fits(capacity):
            accumulated = smaller * another.optimization.gradient_accumulation_steps
            smaller = _fitting_batch({batch: found.peak, smaller: better.peak}, capacity - CONTEXT)
            row = f"--train_batch_size {smaller} --gradient_accumulation_steps {accumulated // smaller}"
            another = changed(config, row)
            better = count(another, mixed_precision=precision, stages=_stages(found))
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


def _flags(
    config: Config, description: Description, mixed_precision: str, stage: Stage, sharding: Sharding | None
) -> list[str]:
    """Flags that need less memory at a stage and go with the sharding, those first that keep the run's numbers."""
    accelerator: Any = OneGpu(mixed_precision)
    with Counting(), as_on_gpu():
        trained = trained_parts(family_without_weights(config, description, mixed_precision), config)
        rows = remedies(Status(config, accelerator, trained, stage, step=1))
    return [row.flags for row in rows if not _refused(sharding, changed(config, row.flags))]


def _refused(sharding: Sharding | None, config: Config) -> bool:
    try:
        check_sharding(sharding, config)
    except ValueError:
        return True
    return False


# Words ---------------------------------------------------------------------------------------------------------------


def print_estimate(config: Config, method: Method) -> None:
    """Print what the run would need on the GPU of --for_gpu.

    Raises:
        ValueError: where flags and pipeline do not go together.
    """
    if int(os.environ.get("RANK", 0)):
        return  # the first process tells
    processes, capacity = asked_for(config)
    check_optimizer(config.optimization, config.given)  # outside the count, which a trial step would be part of
    config = with_derived(config, weights=False)
    description = read_pipeline(config.model, config.lpl.lpl_blocks, weights=False)
    config = with_adapters(resolve(config, description), description)
    precision = config.optimization.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    sharding = Sharding.asked(cast(Any, OneGpu(precision, processes)))
    check_sharding(sharding, config)
    if sharding is None and asks_for_fsdp():
        warn("FSDP2 (in accelerate's configuration) shards nothing on one GPU; give several, as in --for_gpu 8x80GB")
    if precision == "bf16" and cast(str, config.validation.for_gpu).lower().endswith(WITHOUT_BFLOAT16):
        warn(f"--for_gpu {config.validation.for_gpu}: it only emulates bfloat16; give --mixed_precision fp16")
    stages = [Stage.STEP, Stage.LPL_STEP]
    if config.validation.validation_prompts or config.evaluation.eval_steps is not None:
        stages.append(Stage.SAMPLES)
    found = estimate(config, description, method, precision, processes, stages, sharding=sharding)
    print(_report(config, found, capacity, precision, processes, sharding), flush=True)
    if found.fits(capacity):
        return
    print("\nLooking for flags that make it fit, for a minute or so ...", flush=True)
    started = time.monotonic()
    tried = attempts(config, description, method, precision, capacity, found, processes, sharding)
    rows = _remedies(tried, capacity, time.monotonic() - started >= LONGEST, sharding)
    print(f"\n{table({'What would make it fit': rows})}", flush=True)


def asked_for(config: Config) -> tuple[int, int]:
    """How many GPUs --for_gpu or the launcher asks for, and the bytes of one.

    Raises:
        ValueError: where they contradict each other.
    """
    text, launched = config.validation.for_gpu, int(os.environ.get("WORLD_SIZE", 1))
    assert text is not None
    count, capacity = gpus(text)
    if count is not None and launched not in (1, count):
        raise ValueError(
            f"--for_gpu {text}: the launcher has started {launched} processes; launch one (--num_processes 1)"
        )
    return count or launched, capacity


STAGES = {
    Stage.LOADING: "models loaded",
    Stage.STEP: "step",
    Stage.LPL_STEP: "step with LPL",
    Stage.SAMPLES: "samples",
    Stage.SAVING: "saving",
}


def _report(
    config: Config, found: Estimate, capacity: int, precision: str, processes: int, sharding: Sharding | None
) -> str:
    optimization, every, name = config.optimization, config.lpl.lpl_every, config.validation.for_gpu
    on_each, for_each = (" on each GPU", " for each GPU") if processes > 1 else ("", "")
    parts = [
        (
            part,
            f"{short_count(of)} of {short_count(all_)} parameters trained" if of else f"{short_count(all_)}, frozen",
        )
        for part, (of, all_) in found.parameters.items()
    ]
    memory = [(words, size(found.memory[stage])) for stage, words in STAGES.items() if stage in found.memory]
    if found.host:
        memory.append(("of the CPU", f"{size(found.host)}{for_each}, what is offloaded"))
    fits = f"{'fits' if found.fits(capacity) else 'does not fit'}{on_each}"
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
        f"{counted(processes, 'GPU')}{_engine(sharding)}"
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


def _engine(sharding: Sharding | None) -> str:
    if sharding is None:
        return ""
    return ", FSDP2 with shards in CPU memory" if sharding.offload else ", FSDP2"


def _remedies(tried: Sequence[Attempt], capacity: int, in_time_only: bool, sharding: Sharding | None = None) -> Rows:
    rows = [(attempt.flags, f"{size(attempt.found.peak)} with these and the ones above") for attempt in tried]
    if not tried or not tried[-1].found.fits(capacity):
        ended = f"the search ended after {LONGEST:.0f} s" if in_time_only else "no other flags save memory"
        offload = ", fsdp_offload_params: true in accelerate's configuration"
        more = "" if sharding is None else f", more GPUs{'' if sharding.offload else offload}"
        rows.append(("in the end", f"{ended}; see docs/hardware.md, give the flags above{more}, or a larger GPU"))
    return rows


def tera(count: float) -> str:
    """
    >>> tera(2.5e12)
    '2.5 TFLOP'
    """
    return f"{count / 1e12:.3g} TFLOP"
