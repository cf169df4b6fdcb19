"""How faithful students of several widths and depths become on the same pairs: `results/student_sizes.json`.

    python -m benchmarks.student_sizes --pairs student --output_dir sizes -- \\
        --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES --resolution 96 --max_sequence_length 4

``--pairs`` is the folder of a finished student; behind ``--`` stand the flags of its ``python -m lpl.distill``. Each
size is a run of that command of its own, with the same pairs, seed and steps; the same command continues where it was
stopped. Written is, for each size, what the student needs and its fidelity on the held-out pairs by step; other sizes
in the file stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from lpl.distillation.command import main as distill
from lpl.tools.files import entries, write_text


RESULTS = Path(__file__).resolve().parent / "results" / "student_sizes.json"
SIZES = ((32, 4), (48, 4), (64, 2), (64, 4), (96, 4), (64, 8))  # width, depth
KEPT = ("width", "depth", "pairs", "steps", "cosine", "relative_error", "pull", "log_correlation", "cost")


def train(pairs: Path, folder: Path, size: tuple[int, int], steps: int, words: list[str]) -> None:
    """Make a student of one size, unless it is there.

    Raises:
        ValueError: if one of other steps is there.
    """
    if (folder / "distill.json").is_file():
        if (made := json.loads((folder / "distill.json").read_text())["steps"]) != steps:
            raise ValueError(f"{folder} has a student of {made} steps; give --steps {made} or another --output_dir")
        return
    if not (folder / "pairs").is_dir():
        shutil.copytree(pairs / "pairs", folder / "pairs.part", dirs_exist_ok=True)
        (folder / "pairs.part").rename(folder / "pairs")
    width, depth = map(str, size)
    own = ["--output_dir", str(folder), "--width", width, "--depth", depth, "--steps", str(steps)]
    number = json.loads((pairs / "distill.json").read_text())["pairs"]
    distill([*words, *own, "--num_pairs", str(number)])


def read(folder: Path) -> dict[str, object]:
    numbers = json.loads((folder / "distill.json").read_text())
    by_step = {str(entry["step"]): entry["relative_error"] for entry in entries(folder / "fit.jsonl")}
    return {name: numbers[name] for name in KEPT} | {"relative_error_by_step": by_step}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="folder of a finished student")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sizes", nargs="+", default=[f"{width}x{depth}" for width, depth in SIZES])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(words[:place])
    found = json.loads(args.results.read_text()) if args.results.is_file() else {}  # of other --sizes
    for size in args.sizes:
        width, depth = map(int, size.split("x"))
        folder = args.output_dir / size
        train(args.pairs, folder, (width, depth), args.steps, words[place + 1 :])
        found[size] = read(folder)
        print(json.dumps(found[size]), flush=True)
        write_text(args.results, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
