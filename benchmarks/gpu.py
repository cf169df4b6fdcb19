"""Measures steps of real sizes on a GPU, with and without LPL; see benchmarks/gpu.sh, which runs it.

Models have the architectures of public ones and random weights, which cost as much as trained ones. Each runs in a
process of its own, without LPL, with it and by its cheaper ways; *floor* is what every implementation of LPL has to
compute, *bare loop* the denoiser's forward and backward pass with AdamW and nothing else. All samples are inside LPL's
threshold. Waits are the synchronisations with the GPU that torch reports in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.counted import ARCHITECTURES, METHOD, completed, counted
from benchmarks.lpl_cost import floor
from lpl.diagnosis.estimate import Rehearsal
from lpl.diagnosis.status import Stage
from lpl.diagnosis.without_weights import OneGpu
from lpl.objectives import FlowMatching
from lpl.training.given_lora import Adapters


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "gpu.json"
STEPS = 3  # that are timed, after one that is not
LORA = ("--rank", "16")
CHECKPOINTING = ("--gradient_checkpointing",)


@dataclass(frozen=True)
class Case:
    """A model at a size, and its flags."""

    architecture: str
    side: int
    batch: int
    flags: tuple[str, ...] = ()


CASES = {
    "sd15": Case("sd15", 512, 4),
    "sdxl": Case("sdxl", 1024, 2, CHECKPOINTING),
    "sd35-medium-512": Case("sd35-medium", 512, 4, CHECKPOINTING),
    "pixart-sigma": Case("pixart-sigma", 1024, 2, CHECKPOINTING),
    "flux": Case("flux", 1024, 1, (*LORA, *CHECKPOINTING)),
    "sd35-medium": Case("sd35-medium", 1024, 2, CHECKPOINTING),
}
BARE, PLAIN, LPL, FLOOR = "bare loop", "without LPL", "LPL", "floor of LPL"
WAYS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    LPL: (),
    "--lpl_chunk_size 1": ("--lpl_chunk_size", "1"),
    "--lpl_max_samples 1": ("--lpl_max_samples", "1"),
    "--lpl_gradient_checkpointing": ("--lpl_gradient_checkpointing",),
    "--lpl_blocks mid up_0 up_1": ("--lpl_blocks", "mid", "up_0", "up_1"),
    FLOOR: (),
    BARE: (),
}
KEYS = ("case", "way", "device", "scale")


def words(name: str, way: str, scale: str) -> list[str]:
    """The flags of a run besides its pipeline."""
    case = CASES[name]
    side = ARCHITECTURES[case.architecture].resolution[1] if scale == "tiny" else case.side
    precision = "no" if scale == "tiny" else "bf16"
    common = ["--resolution", str(side), "--train_batch_size", str(case.batch), "--mixed_precision", precision]
    return [*common, "--seed", "0", *case.flags, *WAYS[way]]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


# One way of one model ------------------------------------------------------------------------------------------------


def measure(name: str, way: str, scale: str) -> dict[str, Any]:
    """Seconds and peak bytes of a step, and the waits in it."""
    architecture = CASES[name].architecture
    with completed(architecture, words(name, way, scale), scale) as (config, description):
        accelerator = OneGpu(config.optimization.mixed_precision or "no")
        accelerator.device = device()
        objective = description.objective(config.model.objective)
        flow = isinstance(objective, FlowMatching)
        timesteps = torch.zeros(config.optimization.train_batch_size, dtype=torch.float32 if flow else torch.long)
        choice = torch.rand(len(timesteps), 2)
        with device():
            run = Rehearsal(config, description, objective, METHOD, accelerator, Adapters(whole=False))
            run.begin()
            batch = run.batch(timesteps, choice)
    latents, clean = torch.zeros_like(batch["noise"]), torch.randn_like(batch["noise"])
    batch["pixels"] = torch.zeros_like(batch["pixels"])

    def bare() -> None:
        conditions = run.trained.conditions(batch, device())
        output = run.model(clean, timesteps.to(device()), conditions)
        F.mse_loss(output.float(), latents).backward()
        run.updates.optimizer.step()
        run.updates.optimizer.zero_grad()

    step: Callable[[], Any] = {
        BARE: bare,
        FLOOR: lambda: floor(run.trained.family.vae, clean.clone().requires_grad_(), latents),
    }.get(way, lambda: run.step(batch, way != PLAIN))
    return _timed(step)


def _timed(step: Callable[[], Any]) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    found: dict[str, Any] = {"seconds": (time.perf_counter() - start) / STEPS, "memory": None, "waits": None}
    if on_gpu:
        found["memory"] = torch.cuda.max_memory_allocated()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        found["waits"] = sum("synchroniz" in str(warning.message) for warning in caught)
    return found


# All of them ---------------------------------------------------------------------------------------------------------


def load(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text()) if output.exists() else {"runs": []}


def save(output: Path, record: Mapping[str, Any]) -> None:
    """Write the results, the table and the picture."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    output.with_suffix(".md").write_text(markdown(record["runs"]))
    draw(record["runs"], output.with_suffix(".png"))


def keep(output: Path, run: Mapping[str, Any]) -> None:
    """Add a run, in the place of an earlier one of the same kind."""
    record = load(output)
    others = [old for old in record["runs"] if any(old[key] != run[key] for key in KEYS)]
    packages = {package: version(package) for package in ("torch", "diffusers", "transformers")}
    save(output, record | {"versions": packages, "runs": [*others, run]})


def is_done(output: Path, run: Mapping[str, Any]) -> bool:
    """Whether a run has been measured; one that failed is tried again."""
    return any(all(old[key] == run[key] for key in KEYS) and "error" not in old for old in load(output)["runs"])


def measure_all(args: argparse.Namespace) -> None:
    """Runs what has not been run, as long as there is time."""
    end = time.monotonic() + args.seconds
    if not args.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
        left_over(command, {"case": "tests/gpu", "way": "tests"}, args, end)
    for name in args.models:
        for way in args.ways:
            own = ["--one", "--models", name, f"--ways={way}", "--scale", args.scale, "--output", str(args.output)]
            left_over([sys.executable, "-m", "benchmarks.gpu", *own], {"case": name, "way": way}, args, end)


def left_over(command: Sequence[str], run: dict[str, Any], args: argparse.Namespace, end: float) -> None:
    """Run a command in what is left of the time, unless its result is there; what went wrong is kept too."""
    run |= {"device": device_name(), "scale": args.scale}
    left = end - time.monotonic()
    if left <= 0 or is_done(args.output, run):
        return
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        keep(args.output, run | {"error": "the time ran out"})
        return
    said = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
    if done.returncode:
        keep(args.output, run | {"error": said[-1][:300]})
    elif run["way"] == "tests":
        keep(args.output, run | {"seconds": time.monotonic() - start, "said": said[-1][:300]})
    print(f"{run['case']}, {run['way']}: {said[-1][:100] if done.returncode else 'done'}", flush=True)


def add_estimates(output: Path) -> None:
    """Add to each run what is counted for it; needs no GPU."""
    record = load(output)
    for run in record["runs"]:
        if run.get("seconds") is None or run["way"] not in WAYS or run["way"] in (BARE, FLOOR):
            continue
        stage = Stage.STEP if run["way"] == PLAIN else Stage.LPL_STEP
        name = CASES[run["case"]].architecture
        *_, found = counted(name, words(run["case"], run["way"], run["scale"]), scale=run["scale"], stages=(stage,))
        run |= {"estimated_memory": found.memory[stage], "operations": found.operations[stage]}
    save(output, record)


# Telling -------------------------------------------------------------------------------------------------------------


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of all runs."""
    heads = ["model", "way", "s/step", "x", "GiB", "estimated", "TFLOP/s", "waits", "device"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    plain = {where(run): run.get("seconds") for run in runs if run["way"] == PLAIN}
    for run in runs:
        seconds, base = run.get("seconds"), plain.get(where(run))
        rate = run["operations"] / seconds / 1e12 if seconds and "operations" in run else None
        ratio = seconds / base if seconds and base else None
        memory = [run[key] / 2**30 if run.get(key) else None for key in ("memory", "estimated_memory")]
        numbers = [seconds, ratio, *memory, rate, run.get("waits")]
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        if "error" in run:
            cells[0] = run["error"].replace("|", "/")
        lines.append(f"| {' | '.join([run['case'], run['way'], *cells, run['device']])} |")
    return "\n".join(lines) + "\n"


def where(run: Mapping[str, Any]) -> tuple[str, str, str]:
    """What times compare within: a model on a device, at a scale."""
    return run["case"], run["device"], run["scale"]


def label(run: Mapping[str, Any], several: bool) -> str:
    """
    Args:
        several: whether runs of other devices are beside it.
    """
    parts = [run["case"], *(["tiny"] if run["scale"] == "tiny" else []), run["way"]]
    return ", ".join([*parts, *([run["device"]] if several else [])])


def draw(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Seconds of a step by model and way, relative to the step without LPL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = {where(run): run["seconds"] for run in runs if run["way"] == PLAIN and run.get("seconds")}
    shown = [run for run in runs if run.get("seconds") and where(run) in base]
    devices = {run["device"] for run in shown}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.25 * max(4, len(shown))))
    names = [label(run, several=len(devices) > 1) for run in shown]
    axes.barh(names, [run["seconds"] / base[where(run)] for run in shown])
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"time, relative to a step without LPL ({', '.join(sorted(devices))})")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scale", choices=("real", "tiny"), default="real", help="tiny: shrunken models, to try this on a CPU")
    add("--seconds", type=float, default=560, help="after which nothing is started, and what runs is ended")
    add("--models", nargs="+", choices=list(CASES), default=list(CASES))
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add("--output", type=Path, default=OUTPUT, help="JSON file; what it has is not measured again")
    add("--no_tests", action="store_true", help="without tests/gpu")
    add("--estimates", action="store_true", help="add what is counted to an existing file; needs no GPU")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.estimates:
        return add_estimates(args.output)
    if args.scale == "real" and not torch.cuda.is_available():
        sys.exit("gpu.py: error: models of real size need a GPU; give --scale tiny to try this on a CPU")
    if args.one:
        (name,), (way,) = args.models, args.ways
        run = {"case": name, "way": way, "device": device_name(), "scale": args.scale}
        return keep(args.output, run | measure(name, way, args.scale))
    measure_all(args)
    print(markdown(load(args.output)["runs"]))


if __name__ == "__main__":
    main()
