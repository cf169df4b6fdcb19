"""A run before its first step: what is trained, on how many images, for how many steps, and where LPL applies.

``announce`` logs it in a few lines at every start, ``lpl/diagnosis/dry_run.py`` prints all of it, and the model card
quotes it. *Inside* are the samples whose sigma is at most the threshold tau: LPL applies to those.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lpl.config import Config
from lpl.config.rules import warms_up
from lpl.data.dataset import TrainingImages
from lpl.data.fingerprint import spaced
from lpl.diagnosis.needs import check_disk, count_parameters
from lpl.gate import is_inside, sigma_threshold_at
from lpl.objectives import FlowMatching, Objective, own_objective, training_scheduler
from lpl.tools.machine import slowness_of_bfloat16
from lpl.tools.words import counted, percent, pixels, short_count
from lpl.training.parts import TrainedParts
from lpl.training.start import Length, Run


logger = logging.getLogger(__name__)
SIZES = 6  # listed where a run begins
FEW_INSIDE = 0.05  # share of the samples inside the threshold under which the run warns
CAPTIONS = 2000  # samples whose captions are counted
EMULATED = 3.0  # times as slow in bfloat16 as in float32
DRAWS = 2000  # timesteps drawn to estimate that share


@dataclass
class Plan:
    """Everything that is known about a run before its first step."""

    config: Config
    run: Run
    length: Length
    trained: TrainedParts
    images: TrainingImages
    schedule: LambdaLR

    @property
    def objective(self) -> Objective:
        return self.images.objective

    @property
    def max_steps(self) -> int:
        return self.length.max_steps

    @property
    def global_batch(self) -> int:
        return self.length.global_batch

    def announce(self) -> None:
        """Log what the run will do.

        Raises:
            NoRoom: where the disk has no room for the result or a checkpoint.
        """
        config, run, lpl = self.config, self.run, self.config.lpl
        if run.resumed is not None:
            to_go = max(0, self.max_steps - run.step)
            logger.info(f"resumed from {run.resumed}, {to_go} of {self.max_steps} steps to go")
        if config.data.masks is not None:
            logger.info(config.data.masks)
        logger.info(
            f"{self.count()} images{self.repeated()}, {self.max_steps} steps of {self.global_batch}{self.epochs(': ')}"
        )
        for name, words in self.data_sets():
            logger.info(f"data set {name}: {words}")
        logger.info(f"training {self.what()}, in {self.precision_of(self.trained.weights())}{self.autocast()}")
        logger.info(
            f"objective {config.model.prediction_type}, {self.sizes(SIZES)}, seed {run.seed}, "
            f"results in {config.output.output_dir}"
        )
        if lpl.enabled:
            applied = f"; {applied}" if (applied := self.applied_to()) else ""
            logger.info(
                f"LPL with weight {lpl.lpl_weight} where sigma <= {self.threshold:g}: {self.share_inside():.0%} of "
                f"the samples are inside{applied}"
            )
        for warning in self.warnings():
            logger.warning(warning)
        if run.accelerator.is_main_process:
            lacking = check_disk(self.trained, config.optimization, config.output, self.max_steps, run.step)
            if lacking:
                logger.warning(lacking)

    # The run

    @property
    def hardware(self) -> str:
        """The devices of all processes, such as "8 x NVIDIA H200"."""
        accelerator = self.run.accelerator
        on_gpu = accelerator.device.type == "cuda"
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name() if on_gpu else 'CPU'}"

    @property
    def steps_to_go(self) -> int:
        return max(0, self.max_steps - self.run.step)

    @property
    def validation_steps(self) -> int:
        """Optimizer steps between two validations."""
        validation = self.config.validation
        return validation.validation_steps or validation.validation_epochs * self.length.epoch or self.max_steps

    def count(self) -> str:
        """The number of images in words."""
        return "streamed" if self.images.rows is None else str(self.images.rows)

    def sizes(self, most: int | None = None) -> str:
        """The sizes of the images in words, with the number of their samples in an epoch if there are several.

        Args:
            most: how many sizes are listed; None: all.
        """
        items = self.images.items
        return pixels(*self.config.data.size) if items is None else items.in_words(most)

    def repeated(self) -> str:
        """What repeats make of the number of images, in words; empty without."""
        return f" ({self.images.length} an epoch)" if self.images.length != self.images.rows else ""

    def data_sets(self) -> list[tuple[str, str]]:
        """The data sets and what is trained on of each; empty unless there are several or repeats."""
        return [] if self.images.mixture is None else self.images.mixture.in_words()

    def epochs(self, before: str) -> str:
        """The number of epochs in words, after the words ``before``; empty where it is not known."""
        length = self.images.length
        return f"{before}{self.max_steps * self.global_batch / length:.1f} epochs" if length else ""

    # What is trained

    def what(self) -> str:
        """What is trained, in words: parts, how, and how many parameters."""
        lora, count = self.config.lora, sum(map(count_parameters, self.trained.parts.values()))
        names = list(self.trained.parts)  # the denoiser comes first
        if self.config.model.from_scratch:
            names[0] += " from scratch"
        if not lora.lora:
            return f"all of {' and '.join(names)}, {short_count(count)} parameters"
        kind = lora.words.replace("LoRA", "DoRA") if lora.use_dora else lora.words
        kind = f"rank-stabilised {kind}" if lora.use_rslora else kind
        if lora.lora_alpha is not None:
            kind += f" and alpha {lora.lora_alpha:g}"
        if lora.use_dora and names[1:]:
            names[1] = f"LoRA on {names[1]}"
        over = f" over weights of {lora.quantize_base.replace('bit', ' bits')}" if lora.quantize_base else ""
        return f"{kind} on {' and '.join(names)}{over}, {short_count(count)} parameters"

    def autocast(self) -> str:
        precision = self.run.accelerator.mixed_precision
        return "" if precision == "no" else f" under {precision} autocast"

    @staticmethod
    def precision_of(parameters: Iterable[nn.Parameter]) -> str:
        """The names of their dtypes."""
        return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})) or "nothing"

    def learning_rates(self) -> list[str]:
        """The learning rate of each group of parameters over the run; does not move the schedule."""
        warmup = self.config.optimization.warmup_steps(self.max_steps)
        quarters = (self.max_steps * quarter // 4 for quarter in range(5))
        steps = sorted({min(step, self.max_steps - 1) for step in (0, warmup, *quarters)})
        curves = []
        for base, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True):
            rates = [f"{base * factor(step):.2g}" for step in steps]
            points = ", ".join(f"{rate} at step {step + 1}" for rate, step in zip(rates, steps, strict=True))
            curves.append(points if len(set(rates)) > 1 else f"{rates[0]} throughout")
        return curves

    def saved_scheduler(self) -> str:
        """The class of the scheduler that the result samples with."""
        own, name = self.trained.family.pipeline.scheduler, self.config.model.prediction_type
        assert name is not None
        if own_objective(own) == name:
            return f"{type(own).__name__}, the pipeline's own"
        made = training_scheduler(name, own)
        return f"{type(made).__name__}, in place of the pipeline's {type(own).__name__}"

    # What may not be meant

    def warnings(self) -> list[str]:
        """Why the run may do something else than intended."""
        found = [
            self._length_warning(),
            self._warmup_warning(),
            self._caption_warning(),
            self._bucket_warning(),
            self._dora_warning(),
            self._precision_warning(),
        ]
        return [*filter(None, found), *(self._lpl_warnings() if self.config.lpl.enabled else ())]

    def _length_warning(self) -> str | None:
        if self.run.step <= self.max_steps:  # equal: the run had ended, and is started again
            return None
        return (
            f"no step is trained: the run to resume has {self.run.step}, beyond the {self.max_steps} asked for, which "
            "count from its beginning; raise --max_train_steps, or --num_train_epochs, to train on"
        )

    def _warmup_warning(self) -> str | None:
        optimization = self.config.optimization
        steps = optimization.warmup_steps(self.max_steps)
        if steps < self.max_steps or self.max_steps == 0 or not warms_up(self.config.values()):
            return None
        return (
            f"--lr_warmup_steps {optimization.lr_warmup_steps}: the run ends after {self.max_steps}, at "
            f"{percent(self.max_steps / steps)} of --learning_rate; give fewer, or a share of the run, such as 0.1"
        )

    def _precision_warning(self) -> str | None:
        accelerator = self.run.accelerator
        if accelerator.mixed_precision != "bf16":
            return None
        if accelerator.device.type == "cuda":
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
            return None if computes else "this GPU only emulates bfloat16; give --mixed_precision fp16"
        if accelerator.device.type != "cpu":
            return None
        if (times := slowness_of_bfloat16()) < EMULATED:
            return None
        return (
            f"a product of matrices takes {times:.0f} times as long in bfloat16 on this CPU; give --mixed_precision no"
        )

    def _dora_warning(self) -> str | None:
        if not self.config.lora.use_dora or self.trained.family.lora_layout is None:
            return None
        return (
            "--use_dora: the result is for diffusers alone; ComfyUI, Forge and others scale DoRA each in its own "
            "way, so no file is written for them; leave the flag out for one"
        )

    def _bucket_warning(self) -> str | None:
        """How many sizes have too few images for a batch."""
        if self.images.items is None:
            return None
        batch = self.config.optimization.train_batch_size * self.run.accelerator.num_processes
        counts = [len(items) for items in self.images.items.buckets.values() if len(items) < batch]
        if not counts:
            return None
        return (
            f"{counted(len(counts), 'size')} of images, with {counted(sum(counts), 'sample')} an epoch in all, "
            f"{'has' if len(counts) == 1 else 'have'} fewer than the {batch} of a batch: the same image comes several "
            "times in their batches; a smaller --train_batch_size or a larger --bucket_step avoids it"
        )

    def _caption_warning(self) -> str | None:
        """How many captions the text encoder does not take whole, of CAPTIONS samples at most."""
        if self.images.rows is None:
            return None
        family, places = self.trained.family, spaced(self.images.rows, CAPTIONS)
        captions = [str(caption) for listed in self.images.captions_at(places) for caption in listed]
        counts, limit = family.caption_lengths(captions)
        if not (cut := sum(count > limit for count in counts)):
            return None
        looked_at = " looked at" if len(places) < self.images.rows else ""
        most = math.inf if family.max_sequence_length is None else family.max_sequence_length
        longer = "; --max_sequence_length can be raised" if family.sequence_length and limit < most else ""
        return (
            f"--caption_column {self.config.data.caption_column}: {cut} of {len(captions)} captions{looked_at} have "
            f"more than the {limit} tokens that the text encoder takes, and are cut off there{longer}"
        )

    # Where LPL applies

    @property
    def threshold(self) -> float:
        return threshold_of(self.config)

    def share_inside(self) -> float:
        return share_inside(self.images, self.threshold)

    def timesteps_inside(self) -> str:
        """The threshold as a condition on the timestep; for flow t is the fraction of the way to the noise."""
        if isinstance(self.objective, FlowMatching):
            return f"t <= {self.threshold / (1 + self.threshold):.3f}"  # sigma = t / (1 - t)
        count = self.objective.num_train_timesteps
        inside = is_inside(self.objective.sigma(torch.arange(count)), self.threshold).nonzero()
        return f"t <= {int(inside.max())} of {count}" if len(inside) else f"no timestep of {count}"

    def applied_to(self) -> str:
        """The part of the steps, samples and images inside that LPL is computed on; empty for all of them."""
        lpl, (height, width), words = self.config.lpl, self.config.data.size, []
        if lpl.lpl_every > 1:
            words.append(f"one step in {lpl.lpl_every}, at {lpl.lpl_every} times the weight")
        if lpl.lpl_max_samples is not None:
            words.append(f"at most {lpl.lpl_max_samples} of {self.config.optimization.train_batch_size} samples")
        if lpl.lpl_crop is not None:
            parts = (height // lpl.lpl_crop) * (width // lpl.lpl_crop)
            which = f"one of {parts} parts" if self.config.data.one_size else "one part"
            words.append(f"{which} of {pixels(lpl.lpl_crop, lpl.lpl_crop)}")
        return ", ".join(words)

    def _lpl_warnings(self) -> list[str]:
        """Why LPL may do less than intended."""
        lpl, found = self.config.lpl, []
        if (inside := self.share_inside()) < FEW_INSIDE:
            found.append(
                f"LPL applies to only {inside:.1%} of the samples; raise --lpl_sigma_threshold, which is scaled to "
                "this resolution unless --lpl_threshold_base_resolution is 0"
            )
        if lpl.lpl_start_step >= self.max_steps:
            found.append(f"--lpl_start_step {lpl.lpl_start_step}: the run ends after {self.max_steps}, without LPL")
        elif lpl.lpl_start_step + lpl.lpl_ramp_steps > self.max_steps:
            reached = (self.max_steps - lpl.lpl_start_step) / lpl.lpl_ramp_steps
            found.append(
                f"--lpl_ramp_steps {lpl.lpl_ramp_steps}: the run ends where LPL has {reached:.0%} of its weight"
            )
        return found


def threshold_of(config: Config) -> float:
    """tau at the size of the images."""
    lpl = config.lpl
    return sigma_threshold_at(lpl.lpl_sigma_threshold, *config.data.size, lpl.lpl_threshold_base_resolution)


def share_inside(images: TrainingImages, threshold: float) -> float:
    """The share of the timesteps drawn in training at which LPL applies (Eq. 2)."""
    timesteps = torch.stack([images.timestep(0, index) for index in range(DRAWS)])
    return float(is_inside(images.objective.sigma(timesteps), threshold).double().mean())
