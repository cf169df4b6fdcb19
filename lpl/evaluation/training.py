"""Evaluations while a model trains: what ``--eval_steps`` asks for.

``evaluation/`` in the output folder has what ``python -m lpl.evaluate`` writes, a *result* for each step that is
evaluated; a resumed run goes on with those that are there. The weights are the moving average's where one is kept.
Prompts and seeds are the same at each step, and in each run with the same reference, whatever the run's own seed. Of
the drawn images those of the first and of the last evaluation are kept.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from lpl.checks import DTYPES
from lpl.evaluation import CLIP_SCORE
from lpl.evaluation.generation import draw, image_path
from lpl.evaluation.images import Preprocessing, folder_images
from lpl.evaluation.networks import load_network, try_out
from lpl.evaluation.results import (
    State,
    markdown_table,
    measure,
    model_index,
    prompts_of,
    short,
    summary,
    write_evaluation,
)
from lpl.families import Family
from lpl.pictures import save_picture
from lpl.preemption import Preemption
from lpl.trainee import Trainee, averaged


FOLDER = "evaluation"


class TrainingEvaluation:
    """Draws images with the model in training and compares them with real ones.

    Args:
        family: the pipeline in training.
        scheduler: one that samples the objective in training.
        args: the flags; those beginning with ``eval_`` are about this.
        names: of the classes, by label, of a class-conditional family.
        preemption: where a signal has asked for an end, an evaluation is given up.

    Raises:
        ValueError: for a reference without images, or without captions to draw from.
    """

    def __init__(
        self, family: Family, scheduler: Any, args: Namespace, names: Mapping[int, str], preemption: Preemption
    ) -> None:
        self.family, self.scheduler, self.args, self.preemption = family, scheduler, args, preemption
        self.folder = Path(args.output_dir, FOLDER)
        self.reference = folder_images(args.eval_data_dir, Preprocessing(args.resolution), args.caption_column)
        pool = prompts_of(self.reference, args.eval_data_dir, type(family), names, "--eval_data_dir")
        count = args.eval_num_images or len(self.reference)
        self.prompts = [pool[number % len(pool)] for number in range(count)]
        wanted = dict.fromkeys([*args.eval_features, *([args.eval_clip] if CLIP_SCORE in args.eval_metrics else [])])
        self.networks = {name: load_network(name, family.vae.device, args.cache_dir) for name in wanted}
        for network in self.networks.values():
            try_out(network, self.reference[0])
        self.captions = [names.get(prompt, str(prompt)) for prompt in self.prompts]
        self.settings = Namespace(
            **{"metrics": args.eval_metrics, "features": args.eval_features, "clip": args.eval_clip},
            **{"batch_size": args.eval_batch_size, "reference": args.eval_data_dir},
            **{"bootstrap": 0, "seed": 0, "neighbours": 5, "prompts": None},
        )
        self.states: list[State] = []
        self.results: list[dict[str, Any]] = []
        self.latest: dict[str, Any] = {}  # the content of evaluation.json

    def resume(self, step: int) -> None:
        """Go on with the results of an earlier part of the run, up to a step."""
        file = self.folder / "evaluation.json"
        if step and file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))["results"]
            self.results = [result for result in found if result["step"] <= step]

    def run(self, accelerator: Accelerator, trainee: Trainee, ema: EMAModel | None, step: int) -> dict[str, float]:
        """Draw, measure, write; called by every process. Returns the numbers for the log, on the main process."""
        folder = self.folder / "images" / f"step-{step:06d}"
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in the same place
        accelerator.wait_for_everyone()
        with averaged(ema, trainee):
            self._draw(accelerator, trainee, folder)
        if self.preemption.asked_now():  # which waits for all processes
            return {}
        images = folder_images(folder, self.reference.preprocessing, progress=False)
        images.captions = self.captions
        drawn = {
            "num_inference_steps": self.args.validation_inference_steps,
            "guidance_scale": self.args.validation_guidance_scale,
        }
        label = Path(self.args.output_dir).resolve().name
        state = State(label, self.args.output_dir, step, images, drawn)
        (result,) = measure([state], self.reference, self.networks, self.settings)
        if not accelerator.is_main_process:
            return {}
        self.results = [*(other for other in self.results if other["step"] != step), result]
        self.states = [*self.states[:1], state]
        for old in sorted(self.folder.glob("images/step-*"))[1:-1]:
            shutil.rmtree(old)
        self.latest = summary(self.results, self.states, self.reference, self.networks, self.settings)
        write_evaluation(self.latest, self.states, self.reference, self.folder)
        several = len(self.networks) > 1
        return {
            f"eval_{metric}" + (f"/{short(network)}" if several else ""): estimate["value"]
            for network, metrics in result["metrics"].items()
            for metric, estimate in metrics.items()
        } | {"eval_high_frequency_energy": result["high_frequency_energy"]}

    def on_card(self) -> dict[str, Any]:
        """What the model card says of it, by the names of RunCard."""
        if not self.latest:
            return {}
        label = self.results[-1]["label"]
        name = Path(self.args.eval_data_dir).resolve().name
        return {
            "results": model_index(self.latest, label, name),
            "results_table": markdown_table(self.latest)
            + f"\n\nDrawn images against {len(self.reference)} real ones that `{name}` holds.",
        }

    def _draw(self, accelerator: Accelerator, trainee: Trainee, folder: Path) -> None:
        """This process's part of the images."""
        pipeline = self.family.pipeline
        pipeline.register_modules(scheduler=type(self.scheduler).from_config(self.scheduler.config))
        mine = range(accelerator.process_index, len(self.prompts), accelerator.num_processes)
        trainee.eval()
        images = draw(
            self.family,
            [self.prompts[number] for number in mine],
            list(mine),
            self.args.resolution,
            self.args.validation_inference_steps,
            self.args.validation_guidance_scale,
            self.args.eval_batch_size,
            DTYPES[{"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")],
        )
        for number, image in zip(mine, images, strict=True):
            save_picture(image, image_path(folder, number))
            if self.preemption.received:
                break
        trainee.train()
