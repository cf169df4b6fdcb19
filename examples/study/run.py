"""Trains and measures rows of the study, with several seeds each.

Finished rows are not run again, and interrupted ones resume from their last checkpoint.

    python examples/study/run.py --rows flow flow_lpl --seeds 0 1 2
    python examples/study/run.py --list

Needs the output of `examples/study/prepare.sh`. A student and a small decoder are made when a row needs them. Several
runs are trained at a time, with one thread each. `metrics.jsonl` and the trained pipeline are written to
`study/rows/NAME/SEED/`, the measurements to `evaluation/` in there. A row that gets as much time as another one needs
the times of that row and of the one without LPL, so these are run first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from rows import BASE, OBJECTIVES, ROW, ROWS, SETTINGS, Row, without


HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "train_text_to_image_lpl.py"
AS = "as "  # before the row whose time is given, in the place of a number of steps
METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
IMAGES = 1280
DISTILL = (
    *("-m", "lpl.distill", "--pretrained_model_name_or_path", "{study}/bases/flow_matching"),
    *("--train_data_dir", "{study}/data/train", "--caption_column", "label", "--resolution", "64"),
    *("--output_dir", "{study}/{name}"),
)
MADE = {  # what rows name as {study}/NAME: its command, and the file that this writes last
    "student": ((*DISTILL, "--num_pairs", "6000", "--steps", "2000"), "README.md"),
    "brief_student": (DISTILL, "README.md"),
    "small_decoder": ((str(HERE / "small_decoder.py"), "--study", "{study}"), "config.json"),
}
RESUMING = {"checkpointing_steps": 200, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}


def arguments(flags: Mapping[str, object]) -> list[str]:
    """A command line of flags; True stands for a switch."""
    line: list[str] = []
    for name, value in flags.items():
        line += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
    return line


def call(command: list[str], log: Path) -> None:
    """Run it, on one thread, and raise if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(SCRIPT.parent),
        "ACCELERATE_USE_CPU": "true",
    }
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed, see {log}")


def train(study: Path, source: Path, folder: Path, flags: Mapping[str, object]) -> None:
    where = {
        "pretrained_model_name_or_path": source,
        "train_data_dir": study / "data/train",
        "caption_column": "label",
        "output_dir": folder,
    }
    line = [word.replace("{study}", str(study)) for word in arguments(where | SETTINGS | RESUMING | flags)]
    call([sys.executable, str(SCRIPT), *line], folder.with_suffix(".log"))
    for checkpoint in folder.glob("checkpoint-*"):  # otherwise they would be measured as well
        shutil.rmtree(checkpoint)


def train_base(study: Path, objective: str) -> None:
    folder = study / "bases" / objective
    if not (folder / "model_index.json").is_file():
        train(study, study / "untrained", folder, BASE | {"prediction_type": objective})
        print(f"{folder} is trained", flush=True)


def make(study: Path, name: str) -> None:
    """What rows need besides the base; a command that is stopped is called again."""
    command, last = MADE[name]
    if not (study / name / last).is_file():
        words = [word.format(study=study, name=name) for word in command]
        call([sys.executable, *words], study / f"{name}.log")
        print(f"{study / name} is made", flush=True)


def needed(rows: Iterable[Row]) -> list[str]:
    """Names in MADE."""
    values = {value for row in rows for value in row.flags.values()}
    return [name for name in MADE if "{study}/" + name in values]


def given_time_of(row: Row) -> str | None:
    """The row whose time that row is given, if it is given one's."""
    steps = str(row.flags.get("max_train_steps", ""))
    return steps.removeprefix(AS) if steps.startswith(AS) else None


def steps_for_the_time_of(study: Path, name: str) -> int:
    """Steps without LPL that take as long as all of that row's; the same for all seeds."""
    ratio = time_of_a_step(study / "rows" / name) / time_of_a_step(study / "rows" / without(ROWS[name]))
    return round(ROW["max_train_steps"] * ratio)


def time_of_a_step(row: Path) -> float:
    """Seconds per image, a mean over the row's finished seeds: of each one the fastest entry of its log, which other
    jobs disturbed least."""
    finished = [folder for folder in sorted(row.glob("*/")) if (folder / "model_index.json").is_file()]
    return mean(1 / max(speeds(folder)) for folder in finished)


def speeds(folder: Path) -> list[float]:
    """Images per second, entry by entry."""
    return [json.loads(line)["images_per_second"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_row(study: Path, row: Row, name: str, seed: int) -> None:
    folder = study / "rows" / name / str(seed)
    if (folder / "model_index.json").is_file():
        return
    flags = ROW | row.flags | {"seed": seed, "prediction_type": row.objective}
    if (other := given_time_of(row)) is not None:
        flags["max_train_steps"] = steps_for_the_time_of(study, other)
    train(study, study / "bases" / row.objective, folder, flags)
    print(f"{name}, seed {seed}: trained", flush=True)


def measure(study: Path, folder: Path, steps: int) -> None:
    """Draw as many images as the reference set has, of the same classes, and compare both."""
    output = folder / "evaluation"
    if (output / "evaluation.json").is_file():
        return
    options = {
        "generated": folder,
        "reference": study / "data/reference/train",
        "output_dir": output,
        "metrics": " ".join(METRICS),
        "features": "examples.study.features:load",
        "num_images": IMAGES,
        "resolution": SETTINGS["resolution"],
        "num_inference_steps": steps,
        "guidance_scale": 1,
        "batch_size": 64,
        "seed": 0,
    }
    call([sys.executable, "-m", "lpl.evaluate", *arguments(options)], folder.with_suffix(".evaluation.log"))
    found = json.loads((output / "evaluation.json").read_text())
    print(folder, json.dumps(found)[:200], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"), help="output folder of prepare.sh")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="number of simultaneous runs")
    parser.add_argument("--sampling_steps", type=int, default=20)
    parser.add_argument("--only", choices=("bases", "train", "measure"), help="run one stage only")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    args = parser.parse_args()
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:28s} {row.table:12s} {row.label:55s} {' '.join(arguments(row.flags))}")
        return
    os.environ["STUDY"] = str(args.study)  # features.py finds its weights there
    others = [other for row in args.rows if (other := given_time_of(ROWS[row]))]
    plain = [without(ROWS[other]) for other in others]
    rows = list(dict.fromkeys([*plain, *others, *args.rows]))
    stages = [row for row in rows if not given_time_of(ROWS[row])], [row for row in rows if given_time_of(ROWS[row])]
    objectives = [name for name in OBJECTIVES if any(ROWS[row].objective == name for row in rows)]
    with ThreadPoolExecutor(args.workers) as pool:
        if args.only in (None, "bases"):
            list(pool.map(lambda name: train_base(args.study, name), objectives))
        if args.only == "bases":
            return
        if args.only != "measure":
            list(pool.map(lambda name: make(args.study, name), needed(ROWS[row] for row in rows)))

        def do(name: str, seed: int) -> None:
            if args.only in (None, "train"):
                train_row(args.study, ROWS[name], name, seed)
            if args.only in (None, "measure"):
                measure(args.study, args.study / "rows" / name / str(seed), args.sampling_steps)

        for stage in stages:  # a stage begins when the one before is complete
            list(pool.map(lambda run: do(*run), [(name, seed) for seed in args.seeds for name in stage]))


if __name__ == "__main__":
    main()
