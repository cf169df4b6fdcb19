"""Streaming at the size of large data sets: start, memory, order, and how fast images are read. CPU only.

    python -m benchmarks.data_scale            # a million, 12M and 320M images in shards of 10,000
    python -m benchmarks.data_scale --write    # and write the tables into docs/data.md

The shards are files of their own names with the same few photographs in each (hard links), so that opening, listing,
ordering and reading are real, and the disk holds one shard. What depends on the number of images in a shard is not
reached: a run reads shards from their beginning. The order is that of the training script for each number of
processes, with one row for each of the units that a process reads.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from diffusers import DDPMScheduler
from PIL import Image
from skimage import data as pictures

from benchmarks.pages import filled
from lpl.config import Config
from lpl.data.dataset import LatentSpace
from lpl.data.loader import training_batches
from lpl.data.streaming import StreamedBatches, StreamedImages, load_streamed_images, training_images
from lpl.objectives import get_objective


DOCS = Path(__file__).resolve().parent.parent / "docs" / "data.md"
START, END = "<!-- scale -->", "<!-- end of scale -->"
SIZES = {"1M": 100, "12M": 1_200, "320M": 32_000}  # shards
PROCESSES = (1, 8, 64, 1024)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
SIDE, RESOLUTION, BATCH, BATCHES = 512, 256, 16, 12


def write_shards(folder: Path, count: int) -> Path:
    """A folder of tar files with 512 px photographs and captions."""
    folder.mkdir(parents=True)
    first = folder / "shard-00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(64):
            photo = Image.fromarray(getattr(pictures, PHOTOS[number % len(PHOTOS)])()).convert("RGB")
            photo = photo.resize((SIDE, SIDE)).rotate(number)
            content = io.BytesIO()
            photo.save(content, "JPEG", quality=90)
            for suffix, value in (("jpg", content.getvalue()), ("txt", b"a photo")):
                entry = tarfile.TarInfo(f"{number:05d}.{suffix}")
                entry.size = len(value)
                tar.addfile(entry, io.BytesIO(value))
    for number in range(1, count):
        os.link(first, folder / f"shard-{number:05d}.tar")
    return folder


def opened(folder: Path, workers: int) -> StreamedImages:
    config = Config().changed(
        train_data_dir=str(folder),
        streaming=True,
        image_column="jpg",
        caption_column="txt",
        resolution=str(RESOLUTION),
        dataloader_num_workers=workers,
    )
    dataset, _ = load_streamed_images(config.data, 0, None)
    objective = get_objective("epsilon", DDPMScheduler())
    return cast(
        StreamedImages, training_images(dataset, objective, LatentSpace(4, 8), config.data, config.diffusion, 0)
    )


def started(folder: Path) -> dict[str, float]:
    """In a process of its own: seconds to the first batch, MiB then and after the others, images per second."""
    begin = time.perf_counter()
    images = opened(folder, workers=1)
    images.check()
    batches = training_batches(images, images.batches(BATCH, 0, 1, 0))
    next(batches)
    first, found = time.perf_counter() - begin, {"first_mib": memory()}
    begin = time.perf_counter()
    for _ in islice(batches, BATCHES):
        pass
    return found | {
        "seconds": first,
        "mib": memory(),
        "images_per_second": BATCHES * BATCH / (time.perf_counter() - begin),
    }


def memory() -> float:
    """Of this process, and what its loader has of its own, in MiB."""
    process = psutil.Process()
    loaders = sum(child.memory_full_info().uss for child in process.children(recursive=True))
    return (process.memory_info().rss + loaders) / 2**20


class Units(StreamedBatches):
    """The order without any files: each unit has one row, which is its number."""

    def _rows(self, shard: int, part: int, first: int) -> Iterator[Any]:
        if not first:
            yield shard * self.parts + part, {}


def coverage(shards: int, processes: int, seed: int = 0) -> dict[str, int]:
    """How often each unit of an epoch is read by all processes together, each stopped in the middle and resumed."""
    dataset: Any = SimpleNamespace(num_shards=shards)
    data: Any = SimpleNamespace(shuffle_buffer_size=1)
    read, longest, units = Counter(), 0, 0
    for process in range(processes):
        mine, unit = [], process
        for first_half in (True, False):
            order = Units(dataset, data, 1, seed, processes, [unit, 0, 0])
            units = shards * order.parts
            for following, epoch, block in order._blocks(unit, 0):
                if epoch or (first_half and len(mine) == units // processes // 2):
                    unit = following  # where the resumed run begins
                    break
                mine.append(block[0][0])
        read.update(mine)
        longest = max(longest, len(mine))
    return {
        "units": units,
        "missed": units - len(read),
        "twice": sum(count - 1 for count in read.values()),
        "longest": longest,
    }


def measured(name: str, shards: int, folder: Path) -> dict[str, Any]:
    place = write_shards(folder / name, shards)
    command = [sys.executable, "-m", "benchmarks.data_scale", "--opened", str(place)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(output.strip().splitlines()[-1])
    return found | {"orders": {number: coverage(shards, number) for number in PROCESSES}}


def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| images | shards | seconds to the first batch | MiB then | MiB later | images per second, 1 worker |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        lines.append(
            f"| {name} | {SIZES[name]:,} | {found['seconds']:.1f} | {found['first_mib']:,.0f} | {found['mib']:,.0f} | "
            f"{found['images_per_second']:.0f} |"
        )
    lines += [
        "",
        "| images | processes | parts of an epoch | missed | read twice | most, least of a process |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for processes, order in found["orders"].items():
            least = order["units"] // int(processes)
            lines.append(
                f"| {name} | {int(processes):,} | {order['units']:,} | {order['missed']} | {order['twice']} | "
                f"{order['longest']:,}, {least:,} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="those to do; others stay as they are recorded"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_scale.json")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/data.md")
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.opened:
        torch.set_num_threads(1)
        print(json.dumps(started(args.opened)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measured(name, SIZES[name], Path(folder)) for name in args.sizes}
    earlier = json.loads(args.output.read_text()) if args.output.is_file() else {}
    results = {name: (earlier | found)[name] for name in SIZES if name in earlier or name in found}
    args.output.write_text(json.dumps(results, indent=1))
    text = tables(results)
    print(text)
    if args.write:
        DOCS.write_text(filled(DOCS.read_text(), START, END, text))


if __name__ == "__main__":
    main()
