"""What a step costs at the models' real sizes, with and without LPL, as the script's own --dry_run measures it.

    python tests/gpu/real_sizes.py                                    # every family, whole and LoRA, on a GPU
    python tests/gpu/real_sizes.py --families sdxl flux --kinds lora lora-4bit -- --lpl_gradient_checkpointing
    python tests/gpu/real_sizes.py --scale tiny --mixed_precision no  # the same path with shrunken models, on a CPU

No weights are loaded from anywhere: denoiser and VAE have the architecture of a public model and random weights, which
cost as much as trained ones. Text encoders are narrow stand-ins that give embeddings of the right width, so that their
own time and memory are NOT in the numbers; LPL's share of the loss means nothing here. One family at a time is
written to a temporary folder, in bfloat16, and removed again. Results are written after every run; a run that is
measured again replaces the earlier one, and one that fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT)]  # tests/tiny.py and the package

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Model, T5EncoderModel  # noqa: E402

from benchmarks.real_sizes import MODELS, Model, shrunk  # noqa: E402


KINDS = {
    "full": (),
    "lora": ("--rank", "16"),
    "lora-8bit": ("--rank", "16", "--quantize_base", "8bit"),
    "lora-4bit": ("--rank", "16", "--quantize_base", "4bit"),
}
NOT_BUILT = "none"  # in the place of a kind where the model could not even be made


# Building -----------------------------------------------------------------------------------------------------------


@contextmanager
def in_bfloat16(device: str) -> Iterator[None]:
    """Modules that are made within are born in bfloat16 on the device: no copy of twice the size comes first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def text_encoder(kind: str, width: int, projection: int, second: bool) -> tuple[nn.Module, Any]:
    """A stand-in of one or two layers whose embeddings have that width, and its tokenizer."""
    if kind == "t5":
        tokenizer = tiny._t5_tokenizer()
        return T5EncoderModel(tiny._t5_config(tokenizer, width)), tokenizer
    if kind == "gemma":
        tokenizer = tiny._gemma_tokenizer()
        return Gemma2Model(tiny._gemma_config(tokenizer, width)), tokenizer
    tokenizer = tiny._clip_tokenizer(**({"pad_token": "!"} if second else {}))
    cls = CLIPTextModelWithProjection if kind == "clip_projected" else CLIPTextModel
    return cls(tiny._clip_config(tokenizer, width, projection)), tokenizer


def build(model: Model, scale: str, folder: Path, device: str) -> dict[str, int]:
    """Write the pipeline with random weights; how many parameters denoiser and VAE have."""
    denoiser_config, vae_config, widths = shrunk(model, scale)
    with tiny.seeded(0):
        with in_bfloat16(device):
            parts = {model.denoiser_name: model.denoiser[0](**denoiser_config), "vae": model.vae[0](**vae_config)}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for (number, kind, *_), width in zip(model.encoders, widths, strict=True):
            encoder, tokenizer = text_encoder(kind, *width, second=number == "_2")
            parts |= {f"text_encoder{number}": encoder.to(torch.bfloat16), f"tokenizer{number}": tokenizer}
    model.pipeline(**parts, scheduler=model.scheduler, **model.others).save_pretrained(folder)
    return counts


def write_images(folder: Path, resolution: int, count: int, labels: bool) -> None:
    """Smooth noise in the size that is trained, with captions, or in two classes' sub-folders."""
    generator = np.random.default_rng(0)
    lines = []
    for index in range(count):
        place = folder / ("even", "odd")[index % 2] if labels else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((resolution, resolution)).save(place / f"{index}.jpg")
        lines.append(json.dumps({"file_name": f"{index}.jpg", "text": f"smooth noise, number {index}"}))
    if not labels:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


# Measuring ----------------------------------------------------------------------------------------------------------


def command(model: Model, kind: str, resolution: int, batch: int, precision: str, flags: Sequence[str]) -> list[str]:
    """The script's command, to be run beside the folders "pipeline" and "images"."""
    return [
        *("accelerate", "launch", "--num_processes", "1", "train_text_to_image_lpl.py", "--dry_run"),
        *("--pretrained_model_name_or_path", "pipeline", "--train_data_dir", "images", "--output_dir", "output"),
        *("--cache_dir", "cache", "--resolution", str(resolution), "--train_batch_size", str(batch)),
        *("--max_train_steps", "1000", "--learning_rate", "1e-5", "--seed", "0", "--report_to", "none"),
        *("--dataloader_num_workers", "2", "--mixed_precision", precision),
        *model.flags,
        *KINDS[kind],
        *flags,
    ]


def execute(words: Sequence[str], folder: Path, seconds: float) -> tuple[str, str | None]:
    """Run the command; what it printed, and why it failed."""
    script = str(ROOT / "train_text_to_image_lpl.py")
    words = [script if word == Path(script).name else word for word in words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *words[2:]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the launcher's own child has to end with it
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "", f"took longer than {seconds:.0f} s"
    return output, None if process.returncode == 0 else last_error(errors, folder)


def last_error(text: str, folder: Path) -> str:
    """The line of a command's errors that says what went wrong, without paths of the machine."""
    for place in (folder, ROOT, Path(sys.prefix)):
        text = text.replace(f"{place}/", "")
    lines = [line.strip() for line in text.splitlines() if line.strip() and "CalledProcessError" not in line]
    told = [line for line in lines if re.match(r"\S*(Error|Exception|error)\b|\S+\.py: error", line)]
    return (told or lines or ["no message"])[-1][:500]


def read_report(text: str) -> dict[str, dict[str, str]]:
    """The dry run's report: titles, and under each its rows."""
    sections: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            rows = sections.setdefault(line, {})
        elif match := re.match(r" {2}(\S.*?) {2,}(.+)", line):
            rows[match[1]] = match[2]
    return sections


UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def read_cost(text: str) -> dict[str, float | int | None]:
    """Seconds and bytes of "0.1 s, peak memory 2.0 GiB"; None where a step ran out of memory or was not measured.

    Raises:
        ValueError: for another text, so that a changed report does not go unnoticed.
    """
    if text == "out of memory":
        return {"seconds": None, "memory": None}
    match = re.fullmatch(r"([\d.e+-]+) s, peak memory (?:([\d.]+) (\w+)|not measured)", text)
    if match is None:
        raise ValueError(f"{text!r} is not the cost of a step as the dry run tells it")
    return {"seconds": float(match[1]), "memory": round(float(match[2]) * UNITS[match[3]]) if match[2] else None}


def read_results(text: str) -> dict[str, Any]:
    """The numbers of a dry run's report, and its rows on what was trained and on LPL."""
    sections = read_report(text)
    step = next((rows for title, rows in sections.items() if title.startswith("One step")), {})
    costs = {name: read_cost(step[name]) for name in ("without LPL", "with LPL") if name in step}
    if not costs:
        raise ValueError("the dry run's report has no costs of a step")
    told = {title: sections.get(title, {}) for title in ("What is trained", "Latent perceptual loss")}
    return costs | told


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def measure(name: str, args: argparse.Namespace, save: Any) -> None:
    """Build one family, take its measurements, and hand each to ``save``."""
    model = MODELS[name]
    resolution = args.resolution or model.resolution[args.scale == "tiny"]
    batch = args.batch or model.batch
    setting = {"family": name, "model": model.public, "resolution": resolution, "batch": batch, "scale": args.scale}
    setting |= {"mixed_precision": args.mixed_precision, "flags": shlex.join(args.flags), "device": device_name()}
    setting["versions"] = {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}
    with tempfile.TemporaryDirectory(dir=args.work_dir) as place:
        folder = Path(place)
        try:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            setting["parameters"] = build(model, args.scale, folder / "pipeline", device)
            write_images(folder / "images", resolution, 4 * batch, labels=name.startswith("dit"))
        except Exception as error:  # whatever it is, the other families are still measured
            save(setting | {"kind": NOT_BUILT, "error": last_error(f"{type(error).__name__}: {error}", folder)})
            return
        finally:
            gc.collect()
            torch.cuda.empty_cache()  # what is left here would be missing there
        for kind in args.kinds or model.kinds:
            if kind == "full" and kind not in model.kinds:
                continue
            words = command(model, kind, resolution, batch, args.mixed_precision, args.flags)
            output, error = execute(words, folder, args.timeout)
            run = setting | {"kind": kind, "command": shlex.join(words)}
            try:
                save(run | (read_results(output) if error is None else {"error": error}))
            except ValueError as unread:
                save(run | {"error": str(unread)})


# Telling ------------------------------------------------------------------------------------------------------------

KEYS = ("family", "resolution", "batch", "scale", "mixed_precision", "flags", "device")


def merged(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """With one more run, which replaces an earlier one of the same settings, and the failure to build its model."""
    kinds = (run["kind"], NOT_BUILT)
    return [old for old in runs if old["kind"] not in kinds or any(old[key] != run[key] for key in KEYS)] + [run]


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of all runs, and below it their commands."""
    heads = ["model", "kind", "px", "batch", "s/step", "with LPL", "x", "GiB", "with LPL", "x", "device"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for run in runs:
        cells = [run["family"], run["kind"], run["resolution"], run["batch"], *cost_cells(run), run["device"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    told = {f"{run['device']}: " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
    lines += ["", "Text encoders are stand-ins: their time and memory are not included.", *sorted(told), ""]
    lines += [f"    {run['command']}" for run in runs if "command" in run]
    return "\n".join(lines) + "\n"


def cost_cells(run: Mapping[str, Any]) -> list[str]:
    """Seconds without and with LPL and their ratio, then GiB likewise; an error in the place of the first."""
    if "error" in run:
        return [run["error"].replace("|", "/"), *[""] * 5]
    cells = []
    for measure, unit in (("seconds", 1), ("memory", 2**30)):
        plain, with_lpl = (run.get(name, {}).get(measure) for name in ("without LPL", "with LPL"))
        cells += ["-" if value is None else f"{value / unit:.3g}" for value in (plain, with_lpl)]
        cells.append(f"{with_lpl / plain:.2f}" if plain and with_lpl else "-")
    return cells


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--families", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--kinds", nargs="+", choices=list(KINDS), help="what is trained; every family's own: full and lora")
    add("--scale", choices=("real", "tiny"), default="real", help="tiny: shrunken models, to try this on a CPU")
    add("--batch", type=int, help="samples in a batch; each family's own")
    add("--resolution", type=int, help="side in pixels; each family's own, and DiT takes no other")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), default="bf16")
    add("--timeout", type=float, default=580, help="seconds for each command")
    add("--work_dir", help="where pipelines are written for a while: 24 GB for Flux; the system's temporary folder")
    add(
        "--output", type=Path, help="JSON file that the results are added to; beside this file, none with --scale tiny"
    )
    add("flags", nargs="*", help="after --: further flags of the training script")
    args = parser.parse_args(words)
    if args.output is None and args.scale == "real":
        args.output = HERE / "results.json"
    return args


def main() -> None:
    args = parse()
    if args.scale == "real" and not torch.cuda.is_available():
        sys.exit("real_sizes.py: error: models of real size need a GPU; give --scale tiny to try this on a CPU")
    runs: list[Any] = json.loads(args.output.read_text()) if args.output and args.output.exists() else []
    done: list[Any] = []

    def save(run: Mapping[str, Any]) -> None:
        nonlocal runs
        runs = merged(runs, run)
        done.append(run)
        print(f"{run['family']} {run['kind']}: {' '.join(cost_cells(run))}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(runs, indent=2) + "\n")
            args.output.with_suffix(".md").write_text(markdown(runs))

    for name in args.families:
        measure(name, args, save)
    print(markdown(done))
    sys.exit(any("error" in run for run in done))


if __name__ == "__main__":
    main()
