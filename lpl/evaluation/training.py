"""Evaluations during training, as ``--eval_steps`` asks for.

``evaluation/`` in the output folder holds the same files as ``python -m lpl.evaluate`` writes, with a *result* for
each evaluated step. A resumed run continues the results it finds, and ends with the same pictures and card as an
uninterrupted one; results against another reference are set aside. The weights are the moving average's if the run
keeps one. Prompts and seeds are the same at each step, and in every run with the same reference, whatever the run's
own seed. The drawn images of the run's first and last evaluation are kept.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from huggingface_hub import EvalResult

from lpl.config.groups import Data, Evaluation, Model, Output, Validation
from lpl.data.folder import image_files
from lpl.evaluation import MOST_BY_DEFAULT, NEAREST_K, check_libraries, report, results
from lpl.evaluation.generation import draw, image_path, prompt_text
from lpl.evaluation.images import ImageSet, Preprocessing, folder_images, has_captions
from lpl.evaluation.metrics import check_counts
from lpl.evaluation.networks import check_networks, load_networks, wanted_networks
from lpl.evaluation.processes import processes
from lpl.evaluation.results import Reference, Settings, State
from lpl.evaluation.sources import sampling_settings
from lpl.evaluation.spectrum import Spectrum
from lpl.families import Family
from lpl.tools.files import free_place
from lpl.tools.layout import EARLIER_EVALUATION, EVALUATION, EVALUATION_FILE, EVALUATION_IMAGES
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import save_picture
from lpl.training.average import MovingAverage, averaged
from lpl.training.parts import TrainedParts
from lpl.training.preemption import Preemption


logger = logging.getLogger(__name__)


def check_evaluation(evaluation: Evaluation, model: Model) -> None:
    """Refuse what the flags, the folder of real images and the networks' configurations show to be wrong.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_libraries("--eval_steps")
    real = len(image_files(_real_folder(evaluation)))
    check_counts(evaluation.eval_metrics, _count(evaluation, real), real, NEAREST_K, "--eval_")
    check_networks(_networks(evaluation), model.cache_dir)


def check_captions(evaluation: Evaluation, data: Data, family: type[Family]) -> None:
    """Refuse a folder without captions for a family that is drawn from captions.

    Raises:
        ValueError: with what a metadata file has to look like.
    """
    folder = _real_folder(evaluation)
    if not family.class_conditional and not has_captions(folder, data.caption_column):
        raise ValueError(
            f"--eval_data_dir {folder}: it has no captions to draw from; put a metadata.jsonl beside the images, a "
            f'line each, such as {{"file_name": "cat.png", "{data.caption_column}": "a photo of a cat"}}'
        )


def _real_folder(evaluation: Evaluation) -> str:
    assert evaluation.eval_data_dir is not None
    return evaluation.eval_data_dir


def _count(evaluation: Evaluation, real: int) -> int:
    """How many images are drawn."""
    return evaluation.eval_num_images or min(real, MOST_BY_DEFAULT)


def _networks(evaluation: Evaluation) -> dict[str, tuple[str, bool]]:
    return wanted_networks(evaluation.eval_metrics, evaluation.eval_features, evaluation.eval_clip, "--eval_")


class TrainingEvaluation:
    """Draws images with the model in training and compares them with real ones.

    Args:
        family: the pipeline in training.
        scheduler: samples the objective in training.
        names: of the classes, by label, of a class-conditional family.
        preemption: when a signal has asked the run to stop, an evaluation is abandoned.
        words: the flags of the run's command line, recorded only.

    Raises:
        ValueError: for a reference with too few images or without captions to draw from, and for a network that
            fails.
    """

    def __init__(
        self,
        family: Family,
        scheduler: Any,
        evaluation: Evaluation,
        data: Data,
        validation: Validation,
        output: Output,
        model: Model,
        names: Mapping[int, str],
        preemption: Preemption,
        words: Sequence[str],
    ) -> None:
        self.family, self.scheduler, self.preemption = family, scheduler, preemption
        self.data, self.validation, self.model = data, validation, model
        self.batch_size, self.output_dir = evaluation.eval_batch_size, output.output_dir
        self.folder = Path(output.output_dir, EVALUATION)
        source = _real_folder(evaluation)
        preprocessing = Preprocessing(data.size[0], data.image_interpolation_mode)
        real = folder_images(source, preprocessing, data.caption_column)
        pool = results.prompts_of(real, source, type(family), names, "--eval_data_dir")
        count = _count(evaluation, len(real))
        self.prompts = [pool[number % len(pool)] for number in range(count)]
        self.captions = [prompt_text(prompt, names) for prompt in self.prompts]
        check_counts(evaluation.eval_metrics, count, len(real), NEAREST_K, "--eval_")
        device = next(family.vae.parameters()).device
        networks = load_networks(_networks(evaluation), real[0], device, model.cache_dir)
        settings = Settings(
            reference=source,
            metrics=evaluation.eval_metrics,
            features=evaluation.eval_features,
            clip=evaluation.eval_clip,
            batch_size=evaluation.eval_batch_size,
            cache_dir=model.cache_dir,
            words=("accelerate", "launch", sys.argv[0], *words),
        )
        self.reference = Reference(real, networks, settings)
        self.states: list[State] = []  # the first and the last
        self.latest: dict[str, Any] = {"results": []}  # the content of evaluation.json

    def resume(self, step: int) -> None:
        """Continue the results of an earlier part of the run, up to a step, on the main process.

        Results against another reference, or of another number of images, do not compare and are set aside.
        """
        file = self.folder / EVALUATION_FILE
        if not step or not processes().is_main_process or not file.is_file():
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        found["results"] = [result for result in found["results"] if result["step"] <= step]
        if found["results"] and (changed := self._changed(found)):
            place = self.folder.rename(free_place(self.folder.with_name(EARLIER_EVALUATION)))
            logger.warning(
                f"--output_dir {self.output_dir}: what the run has measured so far does not compare with what it "
                f"measures from here on ({changed}), and is moved to {place.name}"
            )
            return
        self.latest = found
        for first in self.latest["results"][:1]:
            state = State(first["label"], first["source"], first["step"], self._images(first["step"]), first["drawn"])
            frequencies, powers = (self.latest["spectrum"][name] for name in ("frequencies", "log_power"))
            if state.name in powers and all(file.is_file() for file in self._files(first["step"])):
                power, energy = np.array(powers[state.name]), first["high_frequency_energy"]
                state.spectrum = Spectrum(np.array(frequencies), power, energy)
                self.states = [state]

    def _changed(self, earlier: Mapping[str, Any]) -> str:
        """What differs from an earlier evaluation in reference and number of images, in words; empty if nothing does.

        The real images are told by what is measured of them, since their folder may have been moved.
        """
        reference, now = earlier["reference"], self.reference
        energies = reference["high_frequency_energy"], now.spectrum.high_frequency_energy
        alike = {
            "another preprocessing of the images": reference["preprocessing"] == asdict(now.images.preprocessing),
            "other real images": reference["images"] == len(now.images) and math.isclose(*energies, rel_tol=1e-6),
            "another number of drawn images": all(
                found["images"] == len(self.prompts) for found in earlier["results"]
            ),
        }
        return ", ".join(words for words, same in alike.items() if not same)

    def _place(self, step: int | None) -> Path:
        return self.folder / EVALUATION_IMAGES / f"step-{step:06d}"

    def _files(self, step: int) -> list[Path]:
        return [image_path(self._place(step), number) for number in range(len(self.prompts))]

    def _images(self, step: int) -> ImageSet:
        return ImageSet("drawn images", self._files(step), self.reference.images.preprocessing, self.captions)

    def run(
        self, accelerator: Accelerator, trained: TrainedParts, average: MovingAverage | None, step: int
    ) -> dict[str, float]:
        """Draw, measure and write; every process has to call this, and the main one returns numbers for the log."""
        if accelerator.is_main_process:
            shutil.rmtree(self._place(step), ignore_errors=True)  # of an earlier run in the same folder
        accelerator.wait_for_everyone()
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
        with averaged(average, trained):
            self._draw(accelerator, trained, self._place(step), dtype)
        if self.preemption.asked_now():  # which waits for all processes
            return {}
        label = Path(self.output_dir).resolve().name
        drawn = sampling_settings(self.data, self.model, self.validation, type(self.family), dtype)
        state = State(label, self.output_dir, step, self._images(step), drawn)
        (result,) = results.measure([state], self.reference, keep=False)
        if not accelerator.is_main_process:
            return {}
        self._write(state, result)
        names = report.short_names(self.latest)
        return {
            f"eval_{metric}" + (f"/{names[network]}" if len(names) > 1 else ""): estimate["value"]
            for network, metrics in result["metrics"].items()
            for metric, estimate in metrics.items()
        } | {"eval_high_frequency_energy": result["high_frequency_energy"]}

    def _write(self, state: State, result: dict[str, Any]) -> None:
        """Write the evaluation with this result; images of states that are not shown are removed."""
        found = [*(other for other in self.latest["results"] if other["step"] != state.step), result]
        self.states = [*(other for other in self.states[:1] if other.step != state.step), state]
        self.latest = report.summary(found, self.states, self.reference)
        report.write_evaluation(self.latest, self.states, self.reference.images, self.folder)
        kept = [self._place(state.step) for state in self.states]
        for other in self.folder.glob(f"{EVALUATION_IMAGES}/step-*"):
            if other not in kept:
                shutil.rmtree(other)

    def on_card(self) -> tuple[list[EvalResult], str]:
        """Metadata and text for the model card."""
        if not self.latest["results"]:
            return [], ""
        return report.on_card(self.latest, self.latest["results"][-1]["label"])

    def _draw(self, accelerator: Accelerator, trained: TrainedParts, folder: Path, dtype: str) -> None:
        """Draw this process's part of the images; all parts are of the same length where models are sharded."""
        pipeline = self.family.pipeline
        pipeline.register_modules(scheduler=type(self.scheduler).from_config(self.scheduler.config))
        count, processes = len(self.prompts), accelerator.num_processes
        last = processes * -(-count // processes) if trained.sharded else count
        mine = [number % count for number in range(accelerator.process_index, last, processes)]
        stop = self.preemption.asked_now if trained.sharded else self.preemption.received_here
        trained.eval()
        with self.family.whole():
            images = draw(
                self.family,
                [self.prompts[number] for number in mine],
                mine,
                self.data.size,
                self.validation.validation_inference_steps,
                self.validation.validation_guidance_scale,
                self.batch_size,
                DTYPES[dtype],
            )
            for number, image in zip(mine, images, strict=True):
                save_picture(image, image_path(folder, number))
                if stop():
                    break
        trained.train()
