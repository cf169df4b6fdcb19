"""How the cost of a step grows with one thing while all else stays, with LPL, with its student and without it.

    python -m benchmarks.growth --over batch    # or resolution, blocks, processes, model: counted, for real models
    python -m benchmarks.growth --over batch --measure                  # or resolution: ratios, on this CPU
    python -m benchmarks.growth --over batch --measure --device cuda    # or resolution, blocks: real models on a GPU

Counted as by ``--dry_run --for_gpu``: the training loop's own step runs on models without weights. Memory is that of
live tensors at the step's peak on one GPU; CUDA takes about 1 GiB besides. All samples are inside LPL's threshold. On
a CPU, the quickstart's pipeline is measured, with random weights, and figures are relative to a step without LPL.
With FSDP2 the models are in torch's own shards, of processes that are not there. *Sent* is what a GPU sends to others
in a step by the usual ring: of n processes, an all-gather or a reduce-scatter sends (n - 1) / n of the whole tensor,
an all-reduce twice that. Writes a JSON file, and draws all results that are there as ``docs/growth.png``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import recipes
from benchmarks.counted import ARCHITECTURES, METHOD, completed
from benchmarks.lpl_cost import seconds
from benchmarks.operations import student_operations
from lpl.config import Config
from lpl.data.dataset import Batch
from lpl.diagnosis.counting import Counting
from lpl.diagnosis.estimate import Rehearsal, rehearsal
from lpl.diagnosis.needs import bytes_of, count_parameters
from lpl.diagnosis.without_weights import OneGpu, model_without_weights
from lpl.distillation.command import default_width
from lpl.families.description import Description
from lpl.objectives import FlowMatching
from lpl.student import Student, StudentLoss
from lpl.tools.pictures import label_axes, new_figure, save_figure
from lpl.training.given_lora import Adapters
from lpl.training.sharding import Sharding


ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "growth.png"
PLAIN, LPL, STUDENT = WAYS = ("without LPL", "with LPL", "with the student")
BLOCKS = ("mid", "up_0", "up_1", "up_2", "up_3")
GIB, SAMPLES = 2**30, 8


@dataclass(frozen=True)
class Training:
    """What is trained, and where.

    Args:
        flags: besides pipeline, resolution, batch and precision.
        processes: GPUs; by DDP, or with ``sharded`` by FSDP2.
    """

    architecture: str
    resolution: int = 512
    batch: int = 1
    flags: tuple[str, ...] = ()
    processes: int = 1
    sharded: bool = False

    def words(self, precision: str) -> list[str]:
        """The command line, without the pipeline."""
        size = ["--resolution", str(self.resolution), "--train_batch_size", str(self.batch)]
        return [*size, "--mixed_precision", precision, "--seed", "0", *self.flags]


@dataclass(frozen=True)
class Growth:
    """One thing that grows.

    Args:
        axis: its name, with what stays.
        values: its sizes.
        curves: what is trained, by title.
        at: what is trained at a value.
        measured: values and training on a CPU.
    """

    axis: str
    values: Sequence[Any]
    curves: Mapping[str, Training]
    at: Callable[[Training, Any], Training]
    measured: tuple[Sequence[Any], Training] | None = None


def _blocks(training: Training, count: int) -> Training:
    return replace(training, flags=(*training.flags, "--lpl_blocks", *BLOCKS[:count]))


CHECKPOINTING = ("--gradient_checkpointing",)
SD15, SD35 = Training("sd15"), Training("sd35-medium", flags=CHECKPOINTING)
QUICKSTART = Training("quickstart", resolution=96, batch=4, flags=("--max_sequence_length", "4"))
GROWTH = {
    "batch": Growth(
        "batch size, at 512 px",
        (1, 4, 16, 64),
        {"SD 1.5": SD15},
        lambda training, value: replace(training, batch=value),
        ((1, 2, 4, 8, 16), QUICKSTART),
    ),
    "resolution": Growth(
        "side of the image in px, batch size 1",
        (256, 512, 1024, 2048),
        {"SD 1.5": SD15},
        lambda training, value: replace(training, resolution=value),
        ((48, 96, 192), QUICKSTART),
    ),
    "blocks": Growth(
        "decoder blocks that LPL compares, at 512 px, batch size 1",
        (1, 2, 3, 4, 5),
        {"SD 1.5": SD15},
        _blocks,
    ),
    "processes": Growth(
        "GPUs, SD3.5 medium at 1024 px, batch size 1 on each",
        (1, 2, 8, 64),
        {"DDP": replace(SD35, resolution=1024), "FSDP2": replace(SD35, resolution=1024, sharded=True)},
        lambda training, value: replace(training, processes=value),
    ),
}
MODEL = "model"
AXES = {over: growth.axis for over, growth in GROWTH.items()} | {
    MODEL: "billions of parameters, LoRA recipes at 1024 px"
}
RECIPES = re.compile(  # memory in GiB with LPL and without, TFLOP with and without
    r"^\| \[(\w+)\.yaml\].*\| LoRA, 1024 px \|.* GB \| (.*) GiB \| (.*) GiB \| (.*) TFLOP \| (.*) TFLOP \|$",
    re.MULTILINE,
)


# Steps ---------------------------------------------------------------------------------------------------------------


def ways(run: Rehearsal, channels: int, batch: Callable[[], Batch]) -> Iterator[tuple[str, Callable[[], None]]]:
    """The steps that are compared; a student is made behind the steps without it.

    Args:
        channels: of the latents.
        batch: makes the batch of a step.
    """
    yield PLAIN, lambda: run.step(batch(), False)
    run.measure_a_sample()
    yield LPL, lambda: run.step(batch(), True)
    settings = {"latent_channels": channels, "width": default_width(run.trained.family.vae)}
    student = model_without_weights(Student, settings, torch.float32).requires_grad_(False)
    yield STUDENT, lambda: run.step(batch(), True, StudentLoss(cast(Student, student)))


def draws(config: Config, description: Description) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) at which all samples are inside the threshold, and LPL's random numbers (B, 2)."""
    count = config.optimization.train_batch_size
    flow = isinstance(description.objective(config.model.objective), FlowMatching)
    return torch.zeros(count, dtype=torch.float32 if flow else torch.long), torch.rand(count, 2)


# Counted -------------------------------------------------------------------------------------------------------------


class Exchange(Counting):
    """Also counts the bytes that a process sends to others.

    Args:
        processes: of the group.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.processes, self.sent = processes, 0.0

    def reset(self) -> None:
        super().reset()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WHOLE:
            tensors, passes = WHOLE[func](args)
            self.sent += passes * (self.processes - 1) / self.processes * bytes_of(tensors)
        return super().__torch_dispatch__(func, types, args, kwargs)


c10d = torch.ops.c10d
WHOLE: dict[Any, Callable[[Any], tuple[Sequence[Tensor], int]]] = {  # the whole tensors, and passes over them
    c10d._allgather_base_.default: lambda args: ([args[0]], 1),
    c10d._reduce_scatter_base_.default: lambda args: ([args[1]], 1),
    c10d.allreduce_.default: lambda args: (args[0], 2),
}


def count(training: Training, scale: str = "real") -> dict[str, Any]:
    """Of each way the bytes at the peak, the operations and the bytes sent; and the denoiser's parameters."""
    if training.sharded and training.processes > 1:
        return _count(training, scale)
    alike = replace(training, processes=min(2, training.processes), sharded=False)
    found = _count(alike, scale)
    sent = 2 * (training.processes - 1) / training.processes * found["gradients"]  # DDP's all-reduce
    return found | {"ways": {way: row | {"sent": sent} for way, row in found["ways"].items()}}


@cache  # any number of processes with DDP is alike
def _count(training: Training, scale: str) -> dict[str, Any]:
    """What :func:`count` gives, with what FSDP2 sends."""
    counting, found = Exchange(training.processes), dict[str, Any]()
    sharding = Sharding() if training.sharded else None
    with completed(training.architecture, training.words("bf16"), scale) as (config, description):
        drawn = draws(config, description)
        how = config, description, METHOD, "bf16", counting, training.processes, sharding
        with rehearsal(*how) as run:
            parameters = count_parameters(run.trained.denoiser, trained_only=False)
            gradients = bytes_of(run.trained.weights())
            run.begin()
            for way, step in ways(run, description.space[0], lambda: run.batch(*drawn)):
                counting.reset()
                step()
                found[way] = {"memory": counting.peak, "operations": counting.operations, "sent": counting.sent}
    return {"parameters": parameters, "gradients": gradients, "ways": found}


def of_recipes() -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Curve, billions of parameters and what was counted, by ``python -m benchmarks.recipes``, of LoRA recipes.

    A recipe's memory is that of its largest stage, with what CUDA takes. Its steps have SAMPLES images.
    """
    found = list[tuple[float, dict[str, Any]]]()
    student = SAMPLES * student_operations(16, 8, 1024)
    for name, *numbers in RECIPES.findall((recipes.FOLDER / "README.md").read_text()):
        parameters = ARCHITECTURES[recipes.architecture(name)].parameters[0]
        memory, plain_memory, operations, plain = map(float, numbers)
        rows = {
            PLAIN: {"memory": plain_memory * GIB, "operations": plain * 1e12},
            LPL: {"memory": memory * GIB, "operations": operations * 1e12},
            STUDENT: {"operations": plain * 1e12 + student},
        }
        found.append((parameters / 1e9, {"parameters": parameters, "recipe": name, "ways": rows}))
    yield from (("LoRA", *point) for point in sorted(found, key=lambda point: point[0]))


# Measured ------------------------------------------------------------------------------------------------------------


def measure(training: Training, device: torch.device, repeats: int, scale: str = "real") -> dict[str, Any]:
    """Images per second of each way relative to the step without LPL; on a GPU seconds and bytes at the peak too."""
    on_gpu, found = device.type == "cuda", dict[str, Any]()
    precision = "bf16" if on_gpu else "no"
    with completed(training.architecture, training.words(precision), scale) as (config, description), device:
        accelerator = OneGpu(precision)
        accelerator.device = device
        objective = description.objective(config.model.objective)
        timesteps, choice = (drawn.cpu() for drawn in draws(config, description))
        run = Rehearsal(config, description, objective, METHOD, accelerator, Adapters(whole=False))
        run.begin()  # else the first step would be without the optimizer's state
        batch = run.batch(timesteps, choice)
        for name in ("pixels", "noise", "posterior_noise", "input_noise"):
            cast(Tensor, batch[name]).normal_()
        parameters = count_parameters(run.trained.denoiser, trained_only=False)
        steps, times = dict[str, Callable[[], None]](), dict[str, list[float]]()
        for way, step in ways(run, description.space[0], lambda: batch):  # warm-up; the student is not yet there
            steps[way], times[way] = step, []
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step()
            found[way] = {"memory": torch.cuda.max_memory_allocated()} if on_gpu else {}
        for _ in range(repeats):
            for way, step in steps.items():
                times[way].append(seconds(step, device) if on_gpu else cpu_seconds(step))
    middle = {way: statistics.median(values) for way, values in times.items()}
    for way, row in found.items():
        row["rate"] = round(middle[PLAIN] / middle[way], 3)
        row |= {"images_per_second": round(training.batch / middle[way], 3)} if on_gpu else {}
    return {"parameters": parameters, "ways": found}


def cpu_seconds(step: Callable[[], None]) -> float:
    """What a step takes of one core, whatever else runs there."""
    start = time.process_time()
    step()
    return time.process_time() - start


# Results -------------------------------------------------------------------------------------------------------------


def grow(args: argparse.Namespace) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Title of the curve, value, and what was found there."""
    if args.over == MODEL:
        yield from of_recipes()
        return
    growth, device = GROWTH[args.over], torch.device(args.device)
    values, curves = growth.values, growth.curves
    if args.measure and device.type == "cpu":
        assert growth.measured is not None
        values, curves = growth.measured[0], {"quickstart": growth.measured[1]}
    for title, training in curves.items():
        if args.curves and title not in args.curves:
            continue
        for value in tqdm(values, desc=title):
            here = growth.at(training, value)
            if not args.measure:
                yield title, value, count(here, args.scale)
                continue
            try:
                yield title, value, measure(here, device, args.repeats, args.scale)
            except torch.OutOfMemoryError:
                break  # nor will the larger ones fit


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    packages = {package: version(package) for package in ("torch", "diffusers")}
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    how = {"hardware": hardware, "repeats": args.repeats} if args.measure else {"counted": True}
    return {"over": args.over, **how, "scale": args.scale, **packages}


def load(over: str, how: str, folder: Path) -> dict[str, Any]:
    """Curves by title, each a list of points; empty where there is no file."""
    file = folder / f"growth_{over}{how}.json"
    return json.loads(file.read_text())["curves"] if file.exists() else {}


# The picture ---------------------------------------------------------------------------------------------------------

STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"linestyle": ":", "marker": "o", "markerfacecolor": "white"},
    LPL: {"linestyle": "-", "marker": "o"},
    STUDENT: {"linestyle": "--", "marker": "x"},
}
COLOURS = {
    "SD 1.5": "#3465a4",
    "DDP": "#75507b",
    "FSDP2": "#0e8a8a",
    "LoRA": "#8f5902",
    "quickstart": "#777777",
}
LEGEND = {"LoRA": "LoRA recipes", "quickstart": "earlier quickstart, 64 px, CPU time", "DDP": "SD3.5 medium, DDP"}
LEGEND["FSDP2"] = "SD3.5 medium, FSDP2"


def draw(folder: Path, path: Path) -> None:
    """A row for each thing: memory, and LPL's cost relative to a step without it; for processes the bytes sent."""
    from matplotlib.lines import Line2D

    rows = {over: curves for over in AXES if (curves := load(over, "", folder))}
    if not rows:
        return
    figure = new_figure(10, 2.7 * len(rows), dpi=110, w_pad=0.12, h_pad=0.1)
    shown = dict.fromkeys(title for curves in rows.values() for title in curves)
    for row, (over, curves) in enumerate(rows.items()):
        left, right = (figure.add_subplot(len(rows), 2, 2 * row + side) for side in (1, 2))
        measured = load(over, "_cpu", folder)
        shown |= dict.fromkeys(measured)
        _memory(left, over, curves)
        _cost(right, over, curves, measured)
        for axes in (left, right):
            _ticks(axes, over, [*curves.values()][0] + (measured.get("quickstart", []) if axes is right else []))
            axes.set_ylim(0, 1.08 * axes.dataLim.y1)
    lines = [Line2D([], [], color=COLOURS[title], linewidth=2, label=LEGEND.get(title, title)) for title in shown]
    lines += [Line2D([], [], color="black", label=way, **style) for way, style in STYLES.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    save_figure(figure, path)


def _memory(axes: Any, over: str, curves: Mapping[str, Any]) -> None:
    for title, points in curves.items():
        for way in WAYS:
            if "memory" in points[0]["ways"][way]:
                memory = [point["ways"][way]["memory"] / GIB for point in points]
                axes.plot(_at(points), memory, **_style(over, title, way))
    label_axes(axes, f"Memory by {over}", AXES[over], "GiB on each GPU")


def _cost(axes: Any, over: str, curves: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    key = "sent" if over == "processes" else "operations"
    for title, points in curves.items():
        for way in (LPL,) if key == "sent" else (LPL, STUDENT):
            ours = [point["ways"][way][key] for point in points]
            base = [1e9 if key == "sent" else point["ways"][PLAIN][key] for point in points]
            ratios = [one / other for one, other in zip(ours, base, strict=True)]
            axes.plot(_at(points), ratios, **_style(over, title, way))
    for title, points in measured.items():
        for way in (LPL, STUDENT):
            times = [1 / point["ways"][way]["rate"] for point in points]
            axes.plot(_at(points), times, **_style(over, title, way))
    if key == "sent":
        label_axes(axes, "Traffic by processes", AXES[over], "GB sent by each GPU in a step")
    else:
        label_axes(axes, f"Cost by {over}", AXES[over], "x a step without LPL")


def _style(over: str, title: str, way: str) -> dict[str, Any]:
    """Models have nothing between them."""
    style = STYLES[way] | {"color": COLOURS[title], "markersize": 5}
    return style | {"linestyle": "none"} if over == MODEL else style


def _at(points: Sequence[Mapping[str, Any]]) -> list[float]:
    return [point["at"] for point in points]


def _ticks(axes: Any, over: str, points: Sequence[Mapping[str, Any]]) -> None:
    values = (2, 4, 8, 16, 32) if over == MODEL else sorted(set(_at(points)))
    if over != "blocks":
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--over", required=True, choices=list(AXES), help="what grows")
    add("--curves", nargs="+", help="titles of those to do; others stay as an earlier run has left them")
    add("--measure", action="store_true", help="time steps instead of counting")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="with --measure")
    add("--repeats", type=int, default=5, help="steps of each way that are timed")
    add("--scale", choices=("real", "tiny"), default="real", help="tiny: shrunken models, to try this out")
    add("--output_dir", type=Path, default=RESULTS, help="folder of the JSON files")
    add("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda" and args.over in ("batch", "resolution", "blocks")
    if args.measure and not on_gpu and (args.over not in GROWTH or GROWTH[args.over].measured is None):
        parser.error(f"--over {args.over} is only counted on this device; leave out --measure")
    how = f"_{args.device}" if args.measure else ""
    if args.measure:
        torch.set_num_threads(1)  # whose time is that of one core
    file, about = args.output_dir / f"growth_{args.over}{how}.json", settings(args)
    earlier = json.loads(file.read_text()) if file.exists() else {}
    curves: dict[str, list[dict[str, Any]]] = earlier["curves"] if about.items() <= earlier.items() else {}
    points: dict[str, list[dict[str, Any]]] = {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for title, value, found in grow(args):
        points.setdefault(title, []).append({"at": value, **found})
        file.write_text(json.dumps(about | {"curves": curves | points}, indent=1) + "\n")
    draw(args.output_dir, args.picture)


if __name__ == "__main__":
    main()
