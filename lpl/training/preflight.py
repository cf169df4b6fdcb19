"""What this machine, its packages and its folders tell, before anything is downloaded or loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lpl.config import Config
from lpl.config.choices import FP8, ON_A_GPU, QUANTIZED, TRACKERS
from lpl.config.groups import Data, naming
from lpl.data.catalogue import cache_root
from lpl.data.folder import Contents, why_no_images
from lpl.data.mixture import parts_of
from lpl.data.places import as_read, check_captions_of
from lpl.data.source import held_out_names, shard_files
from lpl.families import Family
from lpl.tools import layout
from lpl.tools.files import check_writable
from lpl.tools.machine import has_gpu, missing
from lpl.tools.words import warn
from lpl.training.checkpoints import find_resumable
from lpl.training.optimizers import check_optimizer
from lpl.training.speed import check_speed


def preflight(config: Config) -> None:
    """Refuse what cannot be run here.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    _check_output(config)
    for part in config.data.parts:
        with naming(part, config.data.parts):
            _check_data(as_read(part.data))
    _check_packages(config)
    check_optimizer(config.optimization, config.given)
    check_speed(config)
    _check_gpu(config)
    if config.evaluation.eval_steps is not None:
        folder = config.evaluation.eval_data_dir
        if folder is None or (why := why_no_images(folder)):
            raise ValueError(f"--eval_data_dir {folder}: {why}")
    if config.output.resume_from_checkpoint not in (None, "latest", "hub"):
        find_resumable(config.output.output_dir, config.output.resume_from_checkpoint)


def check_captions(data: Data, family: type[Family]) -> None:
    """Refuse a folder of images without captions, or class labels; looks at names only.

    Raises:
        ValueError: with an example of what is missing.
    """
    for part in (parts := parts_of(data, family.class_conditional)):
        with naming(part, parts):
            check_captions_of(as_read(part.data, family.class_conditional), family.class_conditional)


def _check_data(data: Data) -> None:
    if data.dataset_name:
        return
    if data.streaming:
        files: Sequence[str | Path] = shard_files(data.folder)[1]
    elif why := why_no_images(data.folder):
        raise ValueError(f"--train_data_dir {data.train_data_dir}: {why}")
    else:
        files = [os.path.join(place, "") for place in Contents.of(data.folder).image_folders]
    if names := held_out_names(data.folder, files):
        warn(
            f"--train_data_dir {data.train_data_dir}: everything in it is trained on, {' and '.join(names)} too; give "
            "the folder of the training images alone"
        )


def _check_output(config: Config) -> None:
    """Only the first process writes; the others may be on machines that do not see the folder."""
    if os.environ.get("RANK", "0") != "0":
        return
    data = config.data
    if data.cache_latents or data.cache_text_embeddings or data.aspect_ratio_buckets or "," in str(data.resolution):
        check_writable(f"--data_cache_dir {cache_root(data)}", cache_root(data))
    folder, validation = config.output.output_dir, config.validation
    folders = [layout.SAMPLES, *([layout.EVALUATION] if config.evaluation.eval_steps is not None else [])]
    files = (layout.LOG, layout.RECIPE, layout.CURVES, layout.CARD)
    check_writable(f"--output_dir {folder}", folder, folders, files)
    if validation.report_to != "none":
        check_writable(f"--logging_dir {validation.logging_dir}", Path(folder, validation.logging_dir))


def _check_packages(config: Config) -> None:
    tracker = config.validation.report_to
    if tracker in TRACKERS and missing(tracker):
        raise ValueError(f"--report_to {tracker}: pip install {tracker}, or choose --report_to none")
    quantized = QUANTIZED.get(config.lora.quantize_base or FP8)
    if quantized is not None and missing(quantized[0]):
        there = [name for name, needed in QUANTIZED.items() if needed is None or not missing(needed[0])]
        raise ValueError(
            f"--quantize_base {config.lora.quantize_base} needs {quantized[1]}: pip install {quantized[1]}, or use "
            f"one that needs nothing more: {', '.join(there)}"
        )
    for flag, used, package in (
        ("--use_8bit_adam", config.optimization.use_8bit_adam, "bitsandbytes"),
        ("--optimizer prodigy", config.optimization.optimizer == "prodigy", "prodigyopt"),
    ):
        if used and missing(package):
            raise ValueError(f"{flag} needs {package}: pip install {package}, or leave the flag out")


def _check_gpu(config: Config) -> None:
    if has_gpu():
        return
    if config.lora.quantize_base in ON_A_GPU:
        raise ValueError(
            f"--quantize_base {config.lora.quantize_base} needs a GPU, and this machine has none; leave it out"
        )
    for flag, used, others in (
        ("--mixed_precision fp16", config.optimization.mixed_precision == "fp16", "bf16 or no"),
        ("--lpl_vae_dtype float16", config.lpl.lpl_vae_dtype == "float16", "bfloat16 or float32"),
    ):
        if used:
            raise ValueError(f"{flag} needs a GPU, and this machine has none; use {others}")
    for flag, used in (
        ("--allow_tf32", config.optimization.allow_tf32),
        ("--offload_frozen", config.optimization.offload_frozen),
        ("--group_offload", config.lora.group_offload),
        ("--activation_offload", config.optimization.activation_offload),
    ):
        if used:
            warn(f"{flag} has no effect without a GPU")
