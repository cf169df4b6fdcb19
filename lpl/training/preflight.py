"""What this machine, its packages and its folders tell, before anything is downloaded or loaded."""

from __future__ import annotations

from pathlib import Path

from lpl.config import Config
from lpl.config.choices import TRACKERS
from lpl.config.groups import Data
from lpl.data.reading import image_files
from lpl.data.source import held_out_names, shard_files
from lpl.families import Family
from lpl.tools import layout
from lpl.tools.machine import has_gpu, missing
from lpl.tools.words import warn
from lpl.training.checkpoints import find_resumable


def preflight(config: Config) -> None:
    """Refuse what cannot be run here.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    _check_data(config.data)
    _check_packages(config)
    _check_gpu(config)
    if config.evaluation.eval_steps is not None:
        folder = config.evaluation.eval_data_dir
        if folder is None or not image_files(folder):
            raise ValueError(f"--eval_data_dir {folder}: there is no such folder, or it has no images")
    if config.output.resume_from_checkpoint not in (None, "latest", "hub"):
        find_resumable(config.output.output_dir, config.output.resume_from_checkpoint)


def check_captions(data: Data, family: type[Family]) -> None:
    """Refuse a folder of images without captions, or class labels; looks at names only.

    Raises:
        ValueError: with an example of what is missing.
    """
    if data.dataset_name or data.streaming:
        return
    folder, column = data.folder, data.caption_column
    if any(file.suffix in (".jsonl", ".csv", ".parquet") for file in Path(folder).rglob("metadata.*")):
        return
    if not family.class_conditional:
        raise ValueError(
            f"--train_data_dir {folder}: there are no captions; put a metadata.jsonl beside the images, a line each, "
            f'such as {{"file_name": "cat.png", "{column}": "a photo of a cat"}}; only DiT takes class folders'
        )
    if runs := [file.parent for file in Path(folder).rglob(layout.RECIPE) if (file.parent / layout.LOG).is_file()]:
        raise ValueError(
            f"--train_data_dir {folder}: {runs[0]} is the output folder of a run, whose pictures would be a class; "
            "move it elsewhere"
        )
    if len({file.parent for file in image_files(folder)}) < 2:
        raise ValueError(
            f"--train_data_dir {folder}: there are no class labels; put each class's images into a sub-folder, or a "
            f'metadata.jsonl beside them, a line each, such as {{"file_name": "cat.png", "{column}": 0}}'
        )


def _check_data(data: Data) -> None:
    if data.dataset_name:
        return
    files = shard_files(data.folder)[1] if data.streaming else image_files(data.folder)
    if not files:
        raise ValueError(f"--train_data_dir {data.train_data_dir}: the folder has no images")
    if names := held_out_names(data.folder, files):
        warn(
            f"--train_data_dir {data.train_data_dir}: everything in it is trained on, {' and '.join(names)} too; give "
            "the folder of the training images alone"
        )


def _check_packages(config: Config) -> None:
    tracker = config.validation.report_to
    if tracker in TRACKERS and missing(tracker):
        raise ValueError(f"--report_to {tracker}: pip install {tracker}, or choose --report_to none")
    for flag, used, package in (
        ("--quantize_base", config.lora.quantize_base is not None, "bitsandbytes"),
        ("--use_8bit_adam", config.optimization.use_8bit_adam, "bitsandbytes"),
        ("--optimizer prodigy", config.optimization.optimizer == "prodigy", "prodigyopt"),
    ):
        if used and missing(package):
            raise ValueError(f"{flag} needs {package}: pip install {package}, or leave the flag out")


def _check_gpu(config: Config) -> None:
    if has_gpu():
        return
    if config.lora.quantize_base is not None:
        raise ValueError(
            f"--quantize_base {config.lora.quantize_base} needs a GPU, and this machine has none; leave it out"
        )
    for flag, used, others in (
        ("--mixed_precision fp16", config.optimization.mixed_precision == "fp16", "bf16 or no"),
        ("--lpl_vae_dtype float16", config.lpl.lpl_vae_dtype == "float16", "bfloat16 or float32"),
    ):
        if used:
            raise ValueError(f"{flag} needs a GPU, and this machine has none; use {others}")
    if config.optimization.allow_tf32:
        warn("--allow_tf32 has no effect without a GPU")
