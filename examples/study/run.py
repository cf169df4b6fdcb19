"""Trains and measures rows of the study, with several seeds each, and records them in results.json.

    python examples/study/run.py --rows flow flow_lpl --seeds 0 1 2
    python examples/study/run.py --rows all --max_minutes 480
    python examples/study/run.py --list

The queue takes rows in the order of rows.py, one seed after the other. It skips what results.json has, goes on with a
run that was interrupted, and begins none after `--max_minutes`. What a row needs besides examples/quickstart (another
base, a small decoder) is made first. Runs have one thread each. They are in bfloat16 where the machine computes in it,
else in float32: these are recorded beside the others, and compared with one another only.

A run has its log and its pipeline in `study/rows/NAME/SEED/`, and its images and measurements in
`study/measured/NAME/SEED/`. A row that gets the time of another one needs the recorded speeds of that one and of the
row without LPL on such a machine.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch
from features import load, places_of, read_pictures
from PIL import Image
from rows import BASES, GUIDED, ROW, ROWS, SAMPLING, SETTINGS, Row


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lpl.evaluation.metrics import frechet_distance
from lpl.evaluation.results import REAL
from lpl.tools.layout import LORA


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "train_text_to_image_lpl.py"
QUICKSTART = ROOT / "examples/quickstart"
TRAIN = QUICKSTART / "data/plain"  # what bases are trained on, and the feature network
DATA = QUICKSTART / "data/toned"  # what rows are trained on, and compared with
RESULTS = HERE / "results.json"
NETWORK = "examples.study.features:load"
IN_FLOAT32 = "-float32"  # after a seed
FINISHED = ("model_index.json", LORA)  # what a run writes at its end: a pipeline, or a LoRA
AS = "as "  # before the row whose time is given, in the place of a number of steps
BANDS = {"band_1": (0, 1 / 8), "band_2": (1 / 8, 1 / 4), "band_3": (1 / 4, 3 / 8), "band_4": (3 / 8, 1 / 2)}
RESUMING = {"checkpointing_steps": 200, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
if torch.cuda.is_available():
    MACHINE = torch.cuda.get_device_name()
elif torch.cpu._is_amx_tile_supported():
    MACHINE = "CPU with AMX"
elif torch.cpu._is_avx512_bf16_supported():
    MACHINE = "CPU with AVX-512 BF16"
else:
    MACHINE = "CPU without bfloat16"
BFLOAT16 = MACHINE != "CPU without bfloat16"  # which many CPUs only emulate
RECORDING, MAKING = Lock(), RLock()
TRAINING: dict[tuple[str, str], Lock] = {}  # row and key of a seed: several rows measure one training


# Commands ------------------------------------------------------------------------------------------------------------


def arguments(flags: Mapping[str, object]) -> list[str]:
    """A command line of flags; True stands for a switch, words for several values. Paths and lists are not split."""
    line: list[str] = []
    for name, value in flags.items():
        values = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
        line += [f"--{name}", *([] if value is True else map(str, values))]
    return line


def call(command: list[str], log: Path) -> None:
    """Run it, on one thread, and raise if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": str(not torch.cuda.is_available()).lower(),
    }
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed, see {log}")


# What rows need ------------------------------------------------------------------------------------------------------


def make_base(study: Path, name: str) -> Path:
    """The folder of the base, trained if it is not there."""
    folder = study / "bases" / name if name in BASES else QUICKSTART / "pipeline"
    if not (folder / "model_index.json").is_file():
        if name not in BASES:
            raise ValueError(f"{folder} is not there: make it by examples/quickstart/train_pipeline.sh")
        if "train_data_dir" in BASES[name]:
            make_guided_samples(study)
        train(study, QUICKSTART / "pipeline", TRAIN, folder, BASES[name])
    return folder


def make_guided_samples(study: Path) -> None:
    """An imagefolder of what the quickstart's pipeline draws with guidance for the captions of TRAIN."""
    drawn = study / "measured/guided_samples"
    if not (study / "guided").is_dir():
        evaluate(study, QUICKSTART / "pipeline", drawn, SAMPLING | GUIDED, TRAIN)
        next(drawn.glob("images/*/metadata.jsonl")).parent.rename(study / "guided")


def make_small_decoder(study: Path) -> None:
    if not (study / "small_decoder/config.json").is_file():
        call([sys.executable, str(HERE / "small_decoder.py"), "--study", str(study)], study / "small_decoder.log")


def write_images(folder: Path, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """An imagefolder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06d}.png" for number in range(len(images))]
    for name, image in zip(names, images):
        image.save(folder / name)
    rows = [json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in zip(names, captions)]
    (folder / "metadata.jsonl").write_text("".join(rows))


# One run -------------------------------------------------------------------------------------------------------------


def train(study: Path, source: Path, data: Path, folder: Path, flags: Mapping[str, object]) -> None:
    where = {
        "pretrained_model_name_or_path": source,
        "train_data_dir": data,
        "data_cache_dir": study / "cache",
        "output_dir": folder,
        "mixed_precision": "bf16" if BFLOAT16 else "no",
    }
    line = [word.replace("{study}", str(study)) for word in arguments(where | SETTINGS | RESUMING | flags)]
    call([sys.executable, str(SCRIPT), *line], folder.with_suffix(".log"))


def given_time_of(row: Row) -> str | None:
    """The row whose time that row is given, if it is given one's."""
    steps = str(row.flags.get("max_train_steps", ""))
    return steps.removeprefix(AS) if steps.startswith(AS) else None


def speed_of(name: str, results: Mapping[str, Any], machine: str) -> float | None:
    """Mean images per second of a row's trainings on such a machine, if there are any there."""
    training = ROWS[name].of or name
    runs = (
        run for other, row in ROWS.items() if (row.of or other) == training for run in results.get(other, {}).values()
    )
    speeds = {run["images_per_second"] for run in runs if run["machine"] == machine}  # one of a training
    return mean(speeds) if speeds else None


def steps_for_the_time_of(name: str, results: Mapping[str, Any]) -> int:
    """Steps without LPL that take as long as all of that row's: those of a run that was given the time on such a
    machine, else by the recorded speeds."""
    given = (run for row in ROWS if given_time_of(ROWS[row]) == name for run in results.get(row, {}).values())
    for run in given:
        if run["machine"] == MACHINE:
            return int(run["steps"])
    speeds = []
    for row in (name, ROWS[name].without):
        if (speed := speed_of(row, results, MACHINE)) is None:
            raise ValueError(f"the time of {row} is not known: run it on this machine first, --rows {row}")
        speeds.append(speed)
    return round(ROW["max_train_steps"] * speeds[1] / speeds[0])


def trained_row(study: Path, name: str, seed: int) -> Path:
    """The folder of a run, trained unless it is there."""
    with TRAINING.setdefault((name, key_of(seed)), Lock()):
        return train_row(study, name, seed)


def train_row(study: Path, name: str, seed: int) -> Path:
    row, folder = ROWS[name], study / "rows" / name / key_of(seed)
    if not any((folder / file).is_file() for file in FINISHED):
        with MAKING:  # two seeds of a row need the same
            base = make_base(study, row.base)
            if "lpl_vae_name_or_path" in row.flags:
                make_small_decoder(study)
        flags = ROW | row.flags | {"seed": seed}
        if (other := given_time_of(row)) is not None:
            flags["max_train_steps"] = steps_for_the_time_of(other, recorded())
        train(study, base, DATA, folder, flags)
    for checkpoint in folder.glob("checkpoint-*"):  # lpl.evaluate would measure them too
        shutil.rmtree(checkpoint)
    return folder


def evaluate(
    study: Path, generated: Path, output: Path, sampling: Mapping[str, object] = SAMPLING, data: Path = DATA
) -> None:
    """Compares a model, which draws one image for each caption of a data set, or a folder, with the pictures."""
    reference = study / f"reference_{data.name}"
    with MAKING:
        if not (reference / "metadata.jsonl").is_file():
            images, captions = read_pictures(data)
            write_images(reference, [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], captions)
    options = {
        "generated": [f"model={generated}"],
        "reference": reference,
        "output_dir": output,
        "metrics": "fid",
        "features": NETWORK,
        "resolution": SETTINGS["resolution"],
        "max_sequence_length": SETTINGS["max_sequence_length"],
        "batch_size": 64,
        "dtype": "bfloat16" if BFLOAT16 else "float32",
        "seed": 0,
    }
    call([sys.executable, "-m", "lpl.evaluate", *arguments(options | dict(sampling))], output / "log")


def image_numbers(output: Path) -> dict[str, float]:
    """What results.json has of a set of images."""
    evaluation = json.loads((output / "evaluation.json").read_text())
    result = evaluation["results"][-1]
    return {
        **{metric: estimate["value"] for metric, estimate in result["metrics"][NETWORK].items()},
        **own_measures(output),
        **bands(evaluation["spectrum"]),
    }


def run_numbers(run: Path) -> dict[str, Any]:
    """What results.json has of a training."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (held_out,) = [entry for entry in entries if "validation_loss" in entry and entry["step"]]
    records = [entry for entry in entries if "loss" in entry]
    shares = [record["lpl_share"] for record in records if record.get("lpl_share")]
    return {
        "steps": records[-1]["step"],
        "machine": MACHINE,
        "images_per_second": max(record["images_per_second"] for record in records),  # other jobs disturb the others
        **{name: held_out[name] for name in ("validation_loss", "validation_lpl")},
        **({"lpl_share": mean(shares)} if shares else {}),
    }


@torch.no_grad()
def own_measures(output: Path) -> dict[str, float]:
    """What lpl.evaluate does not measure: the Fréchet distance of textures, the share of the images that the feature
    network takes for what their captions say, and the mean PSNR to the picture of the same caption, in dB."""
    folder = next(output.glob("images/*/metadata.jsonl")).parent
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    drawn = torch.from_numpy(np.stack([np.asarray(Image.open(folder / row["file_name"])) for row in rows]))
    drawn = drawn.permute(0, 3, 1, 2)
    pictures, captions = read_pictures(DATA)
    row_of = {caption: row for row, caption in enumerate(captions)}
    places, network = places_of(read_pictures(TRAIN)[1]), load()
    named = torch.cat([network.named(part) for part in drawn.split(128)])
    textures = (
        torch.cat([network.texture(part) for part in images.split(128)]).numpy() for images in (drawn, pictures)
    )
    right = torch.tensor([places[row["text"]] for row in rows])
    errors = drawn.float() - pictures[[row_of[row["text"]] for row in rows]].float()
    psnr = 10 * torch.log10(255**2 / errors.square().mean((1, 2, 3)).clamp(min=1e-3))
    return {
        "texture": frechet_distance(*textures),
        "recognised": (named == right).float().mean().item(),
        "psnr": psnr.mean().item(),
    }


def bands(spectrum: Mapping[str, Any]) -> dict[str, float]:
    """Power relative to the real images' (geometric mean over the frequencies of each of BANDS)."""
    frequencies = np.array(spectrum["frequencies"])
    power = {name: np.array(values) for name, values in spectrum["log_power"].items()}
    real = power.pop(REAL)
    (drawn,) = power.values()
    inside = {band: (frequencies > low) & (frequencies <= high) for band, (low, high) in BANDS.items()}
    return {band: float(10 ** (drawn - real)[places].mean()) for band, places in inside.items()}


# The queue -----------------------------------------------------------------------------------------------------------


def key_of(seed: int) -> str:
    """What a seed's run in this machine's precision is called."""
    return f"{seed}" if BFLOAT16 else f"{seed}{IN_FLOAT32}"


def recorded() -> dict[str, Any]:
    """Row -> key of a seed -> numbers, of all finished runs."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}


def record(name: str, seed: int, found: Mapping[str, Any]) -> None:
    with RECORDING:
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
        results["rows"].setdefault(name, {})[key_of(seed)] = found
        RESULTS.with_suffix(".part").write_text(json.dumps(results, indent=1) + "\n")
        RESULTS.with_suffix(".part").rename(RESULTS)


def do(study: Path, name: str, seed: int) -> None:
    """Trains, measures and records one run."""
    run, output = trained_row(study, ROWS[name].of or name, seed), study / "measured" / name / key_of(seed)
    shutil.rmtree(output / "images", ignore_errors=True)  # of another training, in a folder of another name
    evaluate(study, run, output, SAMPLING | ROWS[name].sampling)
    record(name, seed, image_numbers(output) | run_numbers(run))
    print(f"{name}, seed {seed}: {recorded()[name][key_of(seed)]}", flush=True)


def queue(names: list[str], seeds: list[int], results: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Rows and seeds that are not recorded yet."""
    for name in names:
        yield from ((name, seed) for seed in seeds if key_of(seed) not in results.get(name, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"), help="folder for models and images")
    parser.add_argument("--rows", nargs="+", choices=("all", *ROWS), default=["all"], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="number of simultaneous runs")
    parser.add_argument("--max_minutes", type=float, default=float("inf"), help="begin no run after that time")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    args = parser.parse_args()
    names = list(ROWS) if "all" in args.rows else args.rows
    if args.list:
        for name in names:
            row, runs = ROWS[name], recorded().get(name, {})
            print(f"{name:20s} {row.table:11s} {row.label:50s} {len(runs)} runs  {' '.join(arguments(row.flags))}")
        return
    end = time.monotonic() + 60 * args.max_minutes
    with ThreadPoolExecutor(args.workers) as pool:
        runs = queue(names, args.seeds, recorded())
        list(pool.map(lambda run: do(args.study.resolve(), *run) if time.monotonic() < end else None, runs))


if __name__ == "__main__":
    main()
