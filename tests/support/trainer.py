"""Runs of the training script on tiny pipelines: in this process, or launched as a user would.

`train(pipeline, images, output_dir, max_train_steps=3, use_ema=True)` is the command with those flags and the DEFAULTS
below; True is a flag without a value, a list one with several, None leaves a default out. tau is not scaled, or at
32 px next to no sample would be inside.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train_text_to_image_lpl as script
from lpl.config.command_line import config_of, parse
from lpl.families.derived import with_derived
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.tools import layout
from lpl.tools.files import hold
from lpl.training import lora
from lpl.training.given_lora import with_adapters
from lpl.training.preflight import check_captions, preflight
from lpl.training.speed import check_model


ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "resolution": 32,
    "train_batch_size": 2,
    "max_train_steps": 2,
    "learning_rate": 1e-3,
    "seed": 0,
    "report_to": "none",
    "dataloader_num_workers": 0,  # thousands of runs would start processes
    "logging_steps": 1,
    "validation_inference_steps": 2,
    "lpl_threshold_base_resolution": 0,
}


def arguments(pipeline, images, output_dir, /, **flags):
    """The words of a command line, without the script."""
    paths = {
        "pretrained_model_name_or_path": pipeline,
        "train_data_dir": images,
        "output_dir": output_dir,
        "cache_dir": Path(images).with_name("cache"),
    }
    without_lpl = {"lpl_threshold_base_resolution": None} if flags.get("lpl_weight") == 0 else {}  # else refused
    flags = paths | DEFAULTS | without_lpl | flags
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def parsed(pipeline, images, output_dir, /, **flags):
    """What the script knows before it loads any weights: (args, configurations)."""
    return resolved(arguments(pipeline, images, output_dir, **flags))


def resolved(words):
    """The same for a whole command line."""
    config = parse([str(word) for word in words])
    preflight(config)
    config = with_derived(config)
    description = read_pipeline(config.model, config.lpl.lpl_blocks)
    config = with_adapters(resolve(config, description), description)
    check_captions(config.data, description.family)
    check_model(config, description)
    return config, description


def reset_accelerate():
    """Forget the last run's accelerator: its state is shared by all accelerators of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run(words):
    """The script's main() in this process, on the CPU. SystemExit where the command is refused."""
    reset_accelerate()
    torch.set_num_threads(torch.get_num_threads())  # in a fork, loaders' threads would make torch's pool all at once
    argv = [str(ROOT / "train_text_to_image_lpl.py"), *words]
    on_cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true")
    without_curves = mock.patch.object(script, "loss_curves")  # they take longer than the training
    with mock.patch.object(sys, "argv", argv), on_cpu, without_curves:
        try:
            script.main()
        finally:
            reset_accelerate()


def train(pipeline, images, output_dir, /, **flags):
    """Train in this process; the output folder."""
    run(arguments(pipeline, images, output_dir, **flags))
    return Path(output_dir)


def launch(pipeline, images, output_dir, /, *options, module="accelerate.commands.launch", **flags):
    """Train in processes of its own by `accelerate launch OPTIONS ...`, or another launcher; the output folder."""
    words = arguments(pipeline, images, output_dir, **flags)
    command = [sys.executable, "-m", module, *options, "train_text_to_image_lpl.py", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Path(output_dir)


@contextmanager
def held_by_another(folder):
    """Another process holds the folder within."""
    context = multiprocessing.get_context("fork")
    held, leave = context.Event(), context.Event()

    def other():
        hold("--output_dir", folder)
        held.set()
        leave.wait(60)

    process = context.Process(target=other)
    process.start()
    try:
        assert held.wait(60)
        yield
    finally:
        leave.set()
        process.join()


def metrics(folder, *names):
    """The training entries of a run's log, without its speed; with names, those numbers of each."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    records = [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]
    records = [record for record in records if "loss" in record]
    return [[record[name] for name in names] for record in records] if names else records


def validation_metrics(folder):
    """[step, validation loss, validation LPL or None] of each time that the held-out samples were looked at."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "validation_loss", "validation_lpl")
    return [[record.get(name) for name in names] for record in records if "validation_loss" in record]


def unfinished(folder):
    """What a run has left half-written."""
    return [path.name for path in folder.glob(".*") if path.name != layout.LOCK]


def weights(folder):
    """Every tensor of a saved model, or of a whole pipeline, by file and name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    files = [file for file in files if not file.name.endswith(lora.OTHERS_SUFFIX)]  # the same again
    assert files, f"{folder} has no weights"
    return {(str(file.relative_to(folder)), name): value for file in files for name, value in load_file(file).items()}


def same(first, second):
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def settings(**changes):
    """The flags that data and validation look at, with neutral values."""
    values = {
        "seed": 0,
        "resolution": 32,
        "center_crop": False,
        "random_flip": False,
        "image_interpolation_mode": "lanczos",
        "proportion_empty_prompts": 0.0,
        "image_column": "image",
        "caption_column": "text",
        "mask_column": None,
        "alpha_mask": False,
        "unmasked_weight": 0.0,
        "weighting_scheme": "none",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "mode_scale": 1.29,
        "timestep_bias_strategy": "none",
        "timestep_bias_multiplier": 1.0,
        "timestep_bias_begin": 0,
        "timestep_bias_end": 1000,
        "timestep_bias_portion": 0.25,
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
        "streaming": False,
        "shuffle_buffer_size": 1000,
        "max_train_samples": None,
        "train_data_dir": None,
        "dataset_name": None,
        "dataset_config_name": None,
        "cache_dir": None,
        "validation_split": None,
        "validation_every_nth": None,
        "num_validation_samples": 64,
        "dataloader_num_workers": 0,
        "dataloader_timeout": 0,
    }
    return config_of(values | changes)
