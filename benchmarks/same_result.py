"""One training in many ways, in real processes: is it the same loss curve? Writes the table of docs/reliability.md.

    python -m benchmarks.same_result           # print it
    python -m benchmarks.same_result --write   # and write it into the page

Each way takes the same 16 images a step, LPL included. Sums are rounded in another order if the batch is split
otherwise, so curves differ. The bound is what rounding does to this very training: three runs in one process begin
with each weight off by one unit in its last place, up or down at random, and a curve may be four times as far from the
reference as the farthest of them was up to that step. The processes use gloo on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Image, load_dataset
from safetensors.torch import load_file, save_file

from benchmarks.pages import filled
from lpl.tools import layout
from lpl.tools.files import entries


ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "examples/quickstart"
DOCS = ROOT / "docs" / "reliability.md"
START, END = "<!-- same result -->", "<!-- end of same result -->"
IMAGES, SHARDS = 16, 8  # in a step; of the streamed data
MARGIN = 4.0
TERMS = ("loss", "lpl")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass(frozen=True)
class Way:
    """How a run is launched.

    Args:
        batch: images of a process in a micro-batch; micro-batches make up the rest.
    """

    processes: int = 1
    batch: int = IMAGES
    fsdp: bool = False
    flags: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        engine = ", FSDP2" if self.fsdp else ", DDP" if self.processes > 1 else ""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        micro = f" x {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{processes} x {self.batch}{micro}{engine}" + (", streamed" if self.flags else "")

    @property
    def micro_batches(self) -> int:
        return IMAGES // (self.processes * self.batch)


ONE = Way()
WAYS = (  # the reference is ONE; of two ways the first is killed at half of the steps, and the second goes on
    (Way(batch=1),),
    (Way(4, 4),),
    (Way(2, 8, fsdp=True),),
    (Way(4, 4, fsdp=True),),
    (Way(4, 4, fsdp=True), Way(2, 8)),
    (Way(4, 2), Way(2, 8, fsdp=True)),
)
STREAMED = ("--streaming",)  # the order of the images depends on the number of processes
STREAMED_FOUR = Way(4, 4, flags=STREAMED)
STREAMED_WAYS = (
    (Way(4, 4, fsdp=True, flags=STREAMED),),
    (STREAMED_FOUR, Way(4, 4, fsdp=True, flags=STREAMED)),
)


def launch(pipeline: Path, words: Sequence[str], folder: Path, way: Way, killed_at: int | None = None) -> None:
    """Train; ``kill -9`` of all processes once there is that checkpoint."""
    flags = [
        *("--pretrained_model_name_or_path", str(pipeline), "--output_dir", str(folder), "--report_to", "none"),
        *("--train_batch_size", str(way.batch), "--gradient_accumulation_steps", str(way.micro_batches)),
        *("--seed", "0", "--logging_steps", "1", "--resume_from_checkpoint", "latest", *way.flags, *words),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(way.processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (FSDP2 if way.fsdp else {})
    command = [sys.executable, *(launcher if way.processes > 1 else []), "train_text_to_image_lpl.py", *flags]
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            if killed_at is not None and (folder / f"{layout.CHECKPOINT_PREFIX}{killed_at}").is_dir():
                for each in [*process.children(recursive=True), process]:  # torchrun's have sessions of their own
                    each.kill()
                killed_at = None
            time.sleep(0.1)
        if killed_at is not None and not process.returncode:
            sys.exit(f"{way.words} was over before it could be killed; give more --steps")
        if process.returncode not in (0, -signal.SIGKILL):
            output.seek(0)
            sys.exit(f"{way.words} failed:\n{output.read()[-3000:]}")


def embedded(row: dict[str, Any]) -> dict[str, Any]:
    image = row["image"]
    return {"image": {"bytes": image["bytes"] or Path(image["path"]).read_bytes(), "path": None}}


def sharded(images: Path, folder: Path) -> Path:
    """The same images as parquet files, which are streamed."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        dataset = load_dataset("imagefolder", data_dir=str(images), split="train")
        dataset = dataset.cast_column("image", Image(decode=False)).map(embedded)
        for number in range(SHARDS):
            dataset.shard(SHARDS, number).to_parquet(folder / f"part-{number}.parquet")
    return folder


def curve(folder: Path) -> dict[str, list[float]]:
    """The logged losses of each step."""
    records = [record for record in entries(folder / layout.LOG) if "loss" in record]
    return {term: [record[term] for record in records] for term in TERMS}


def run(pipeline: Path, words: Sequence[str], folder: Path, ways: Sequence[Way], steps: int) -> dict[str, list[float]]:
    middle = steps // 2
    saving = ["--max_train_steps", str(steps), "--checkpointing_steps", str(middle)]
    for number, way in enumerate(ways):
        launch(pipeline, [*words, *saving], folder, way, middle if number + 1 < len(ways) else None)
    return curve(folder)


def nudged(pipeline: Path, target: Path, seed: int) -> Path:
    """A pipeline whose denoiser's weights are off by one unit in the last place."""
    if target.is_dir():
        return target
    shutil.copytree(pipeline, target)
    generator = torch.Generator().manual_seed(seed)
    for file in [file for name in ("unet", "transformer") for file in target.glob(f"{name}/*.safetensors")]:
        weights = {name: weight.float() for name, weight in load_file(file).items()}
        for name, weight in weights.items():
            towards = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, -math.inf, math.inf)
            weights[name] = torch.nextafter(weight, towards)
        save_file(weights, file)
    return target


def distances(one: Mapping[str, list[float]], other: Mapping[str, list[float]], term: str) -> list[float]:
    """How far a curve is from another at each step, relative to it."""
    return [abs(a - b) / abs(b) for a, b in zip(one[term], other[term], strict=True)]


def bounds(
    nudges: Iterable[Mapping[str, list[float]]], reference: Mapping[str, list[float]]
) -> dict[str, list[float]]:
    """How far a curve may be from the reference at each step."""
    nudges, found = list(nudges), {}
    for term in TERMS:
        farthest = [max(each) for each in zip(*(distances(nudge, reference, term) for nudge in nudges), strict=True)]
        found[term] = [MARGIN * max(farthest[: step + 1]) for step in range(len(farthest))]
    return found


def compared(
    ways: Sequence[Way],
    found: Mapping[str, list[float]],
    reference: Mapping[str, list[float]],
    bound: Mapping[str, list[float]],
) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"way": "; killed, then ".join(way.words for way in ways), "inside": True}
    for term in TERMS:
        away = distances(found, reference, term)
        row[term] = max(away)
        row["inside"] &= all(a <= b for a, b in zip(away, bound[term], strict=True))
    return row


def table(rows: Sequence[Mapping[str, Any]], bound: Mapping[str, list[float]], steps: int) -> str:
    """The rows as Markdown."""
    lines = [
        f"The largest relative difference in {steps} steps from one process that takes {IMAGES} images at once, and",
        f"whether it is inside the bound at every step, which grows to {bound['loss'][-1]:.1e} (diffusion loss) and",
        f"{bound['lpl'][-1]:.1e} (LPL):",
        "",
        "| processes x images, engine | diffusion loss | LPL | inside the bound |",
        "|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[term]:.1e}" if row[term] else "0, bit for bit" for term in TERMS)
        lines.append(f"| {row['way']} | {figures} | {'yes' if row['inside'] else '**no**'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, default=QUICKSTART / "pipeline")
    parser.add_argument("--train_data_dir", type=Path, default=QUICKSTART / "data/plain")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where the runs are kept, and gone on with")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    args, words = parser.parse_known_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    base = args.pretrained_model_name_or_path.resolve()

    images = args.train_data_dir.resolve()

    def measured(name: str, ways: Sequence[Way], pipeline: Path = base) -> dict[str, list[float]]:
        print(", killed, then ".join(way.words for way in ways), flush=True)
        place = sharded(images, folder / "shards") if ways[0].flags else images
        return run(pipeline, ["--train_data_dir", str(place), *words], folder / name, ways, args.steps)

    reference = measured("one", [ONE])
    nudges = [measured(f"nudged-{n}", [ONE], nudged(base, folder / f"pipeline-{n}", n)) for n in range(3)]
    bound, rows = bounds(nudges, reference), []
    rows += [compared(ways, measured(f"whole-{n}", ways), reference, bound) for n, ways in enumerate(WAYS)]
    streamed = measured("streamed", [STREAMED_FOUR])
    rows += [compared(ways, measured(f"streamed-{n}", ways), streamed, bound) for n, ways in enumerate(STREAMED_WAYS)]
    text = table(rows, bound, args.steps)
    print(text)
    if args.write:
        DOCS.write_text(filled(DOCS.read_text(), START, END, text))
    if not all(row["inside"] for row in rows):
        sys.exit("a row is outside the bound")


if __name__ == "__main__":
    main()
