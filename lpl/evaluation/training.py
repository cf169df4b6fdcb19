"""Evaluations while a model trains: what ``--eval_steps`` asks for.

``evaluation/`` in the output folder has what ``python -m lpl.evaluate`` writes, a *result* for each step that is
evaluated; a resumed run goes on with those that are there, and ends with the pictures and the card of one that was
not interrupted. The weights are the moving average's where one is kept. Prompts and seeds are the same at each step,
and in each run with the same reference, whatever the run's own seed. Of the drawn images those of the run's first and
last evaluation are kept.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from huggingface_hub import EvalResult

from lpl.config import Config
from lpl.config.command_line import words_of as command_line
from lpl.data.reading import image_files
from lpl.evaluation import MOST_BY_DEFAULT, NEAREST_K, check_libraries, report, results
from lpl.evaluation.generation import draw, image_path, sampling_settings
from lpl.evaluation.images import ImageSet, Preprocessing, folder_images, has_captions
from lpl.evaluation.metrics import check_counts
from lpl.evaluation.networks import check_networks, load_networks, wanted_networks
from lpl.evaluation.results import Reference, State
from lpl.evaluation.spectrum import Spectrum
from lpl.families import Family
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import save_picture
from lpl.training.average import MovingAverage, averaged
from lpl.training.parts import TrainedParts
from lpl.training.preemption import Preemption


FOLDER = "evaluation"


def check_evaluation(args: Config, family: type[Family]) -> None:
    """Refuse what the flags, the folder of real images and the networks' small files tell to be wrong.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_libraries("--eval_steps")
    real = len(image_files(args.eval_data_dir))
    drawn = args.eval_num_images or min(real, MOST_BY_DEFAULT)
    check_counts(args.eval_metrics, drawn, real, NEAREST_K, "--eval_")
    check_networks(wanted_networks(args.eval_metrics, args.eval_features, args.eval_clip, "--eval_"), args.cache_dir)
    if not family.class_conditional and not has_captions(args.eval_data_dir, args.caption_column):
        raise ValueError(
            f"--eval_data_dir {args.eval_data_dir}: it has no captions to draw from; put a metadata.jsonl beside the "
            f'images, a line each, such as {{"file_name": "cat.png", "{args.caption_column}": "a photo of a cat"}}'
        )


class TrainingEvaluation:
    """Draws images with the model in training and compares them with real ones.

    Args:
        family: the pipeline in training.
        scheduler: one that samples the objective in training.
        args: the flags; those beginning with ``eval_`` are about this.
        names: of the classes, by label, of a class-conditional family.
        preemption: where a signal has asked for an end, an evaluation is given up.

    Raises:
        ValueError: for a reference with too few images or no captions to draw from, and for a network that fails.
    """

    def __init__(
        self, family: Family, scheduler: Any, args: Config, names: Mapping[int, str], preemption: Preemption
    ) -> None:
        self.family, self.scheduler, self.args, self.preemption = family, scheduler, args, preemption
        self.folder = Path(args.output_dir, FOLDER)
        preprocessing = Preprocessing(args.resolution, args.image_interpolation_mode)
        real = folder_images(args.eval_data_dir, preprocessing, args.caption_column)
        pool = results.prompts_of(real, args.eval_data_dir, type(family), names, "--eval_data_dir")
        count = args.eval_num_images or min(len(real), MOST_BY_DEFAULT)
        self.prompts = [pool[number % len(pool)] for number in range(count)]
        self.captions = [names.get(prompt, str(prompt)) for prompt in self.prompts]
        self.settings = Namespace(
            **{"metrics": args.eval_metrics, "features": args.eval_features, "clip": args.eval_clip},
            **{"batch_size": args.eval_batch_size, "reference": args.eval_data_dir, "cache_dir": args.cache_dir},
            **{"bootstrap": 0, "seed": 0, "nearest_k": NEAREST_K, "prompts_file": None},
            words=["accelerate", "launch", sys.argv[0], *command_line(args)],
        )
        check_counts(args.eval_metrics, count, len(real), NEAREST_K, "--eval_")
        wanted = wanted_networks(args.eval_metrics, args.eval_features, args.eval_clip, "--eval_")
        networks = load_networks(wanted, real[0], family.vae.device, args.cache_dir)
        self.reference = Reference(real, networks, self.settings)
        self.states: list[State] = []  # the first and the last
        self.latest: dict[str, Any] = {"results": []}  # the content of evaluation.json

    def resume(self, step: int) -> None:
        """Go on with the results of an earlier part of the run, up to a step."""
        file = self.folder / "evaluation.json"
        if not step or not file.is_file():
            return
        self.latest = json.loads(file.read_text(encoding="utf-8"))
        self.latest["results"] = [result for result in self.latest["results"] if result["step"] <= step]
        for first in self.latest["results"][:1]:
            state = State(first["label"], first["source"], first["step"], self._images(first["step"]), first["drawn"])
            frequencies, powers = (self.latest["spectrum"][name] for name in ("frequencies", "log_power"))
            there = all(image_path(self._place(state.step), number).is_file() for number in range(len(self.prompts)))
            if there and state.name in powers:
                power, energy = np.array(powers[state.name]), first["high_frequency_energy"]
                state.spectrum = Spectrum(np.array(frequencies), power, energy)
                self.states = [state]

    def _place(self, step: int) -> Path:
        return self.folder / "images" / f"step-{step:06d}"

    def _images(self, step: int) -> ImageSet:
        files = [image_path(self._place(step), number) for number in range(len(self.prompts))]
        return ImageSet("drawn images", files, self.reference.images.preprocessing, self.captions)

    def run(
        self, accelerator: Accelerator, trained: TrainedParts, ema: MovingAverage | None, step: int
    ) -> dict[str, float]:
        """Draw, measure, write; called by every process. Returns the numbers for the log, on the main process."""
        if accelerator.is_main_process:
            shutil.rmtree(self._place(step), ignore_errors=True)  # of an earlier run in the same place
        accelerator.wait_for_everyone()
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
        with averaged(ema, trained):
            self._draw(accelerator, trained, self._place(step), dtype)
        if self.preemption.asked_now():  # which waits for all processes
            return {}
        label = Path(self.args.output_dir).resolve().name
        drawn = sampling_settings(self.args, type(self.family), dtype)
        state = State(label, self.args.output_dir, step, self._images(step), drawn)
        (result,) = results.measure([state], self.reference, keep=False)
        if not accelerator.is_main_process:
            return {}
        found = [*(other for other in self.latest["results"] if other["step"] != step), result]
        self.states = [*(other for other in self.states[:1] if other.step != step), state]
        self.latest = report.summary(found, self.states, self.reference, self.settings)
        report.write_evaluation(self.latest, self.states, self.reference.images, self.folder)
        kept = [self._place(state.step) for state in self.states]
        for other in self.folder.glob("images/step-*"):
            if other not in kept:
                shutil.rmtree(other)
        names = report.short_names(self.latest)
        return {
            f"eval_{metric}" + (f"/{names[network]}" if len(names) > 1 else ""): estimate["value"]
            for network, metrics in result["metrics"].items()
            for metric, estimate in metrics.items()
        } | {"eval_high_frequency_energy": result["high_frequency_energy"]}

    def on_card(self) -> tuple[list[EvalResult], str]:
        """What the model card says of it: metadata and text."""
        if not self.latest["results"]:
            return [], ""
        return report.on_card(self.latest, self.latest["results"][-1]["label"])

    def _draw(self, accelerator: Accelerator, trained: TrainedParts, folder: Path, dtype: str) -> None:
        """This process's part of the images."""
        pipeline = self.family.pipeline
        pipeline.register_modules(scheduler=type(self.scheduler).from_config(self.scheduler.config))
        mine = range(accelerator.process_index, len(self.prompts), accelerator.num_processes)
        trained.eval()
        images = draw(
            self.family,
            [self.prompts[number] for number in mine],
            list(mine),
            self.args.resolution,
            self.args.validation_inference_steps,
            self.args.validation_guidance_scale,
            self.args.eval_batch_size,
            DTYPES[dtype],
        )
        for number, image in zip(mine, images, strict=True):
            save_picture(image, image_path(folder, number))
            if self.preemption.received:
                break
        trained.train()
