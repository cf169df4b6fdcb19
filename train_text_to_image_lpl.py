#!/usr/bin/env python
"""Fine-tune a latent diffusion model on captioned images with the latent perceptual loss (LPL).

    accelerate launch train_text_to_image_lpl.py --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES

Read from top to bottom: configuration -> data -> models -> optimizer -> resume -> loop -> save -> push. The method is
:class:`Losses` and :func:`optimizer_step` below, over ``lpl/``: objectives in ``lpl/objectives.py`` (Table 1), the loss
in ``lpl/loss.py`` (Eq. 2), its gate in ``lpl/gate.py``, its weight in ``lpl/weighting.py`` (Eq. 3). ``--lpl_weight 0``
is the plain diffusion baseline and never runs the decoder.
"""

from __future__ import annotations

from lpl.config import command_line


# A wrong flag is answered here, before the libraries are imported, which takes seconds.
CONFIG = command_line.parse() if __name__ == "__main__" else None

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lpl import LatentPerceptualLoss, evaluation
from lpl.autoencoders import encode
from lpl.config import Config, held_out
from lpl.config.groups import Diffusion, Lpl
from lpl.data.bad_samples import BadSamples
from lpl.data.dataset import Batch, real_images
from lpl.data.loader import training_batches
from lpl.diagnosis.dry_run import DryRun
from lpl.diagnosis.failures import Status, explained
from lpl.diagnosis.plan import Plan
from lpl.families import Family
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.gate import random_window, rows_inside, sigma_threshold_at, subset
from lpl.objectives import Objective, diffusion_weight, dream_shift
from lpl.publishing import hub
from lpl.publishing.card import RunCard, write_model_card
from lpl.publishing.licence import base_licence
from lpl.publishing.publication import Publication
from lpl.tools import layout
from lpl.tools.pictures import loss_curves
from lpl.tools.process import leave_after
from lpl.training.average import MovingAverage
from lpl.training.checkpoints import TrainingState, set_aside
from lpl.training.loading import average_from_revision, load_family
from lpl.training.log import Log
from lpl.training.losses import BatchLosses, perceptual_loss
from lpl.training.parts import TrainedParts, unwrapped
from lpl.training.pauses import Pauses
from lpl.training.preemption import EXIT_CODE, Preemption
from lpl.training.preflight import check_captions, preflight
from lpl.training.provenance import compare_with, measured_facts, write_recipe
from lpl.training.result import Result
from lpl.training.skipped_steps import SkippedSteps
from lpl.training.start import Length, Stage, finish, open_images, refusing, start_accelerator, start_or_resume
from lpl.training.updates import Updates, prepare
from lpl.training.validation import HeldOutLosses, Samples, Validation
from lpl.weighting import LplWeight


logger = logging.getLogger(__name__)

SCRIPT = Path(__file__).name


def main() -> None:
    warnings.formatwarning = lambda message, *_, **__: f"{SCRIPT}: warning: {message}\n"
    config = CONFIG or command_line.parse()
    with explained(SCRIPT, config) as status:  # what ends a run is explained in words
        train(config, status)


def train(config: Config, status: Status) -> None:
    # Before any weights: whatever can be refused is refused here.
    with refusing(SCRIPT, hub.HubError):
        preflight(config)
        description = read_pipeline(config.model, config.lpl.lpl_blocks)
        config = status.config = resolve(config, description)  # complete from here on
        check_captions(config.data, description.family)
        if config.evaluation.eval_steps is not None:
            evaluation.check_evaluation(config.evaluation, config.data, config.model, description.family)
        accelerator = status.accelerator = start_accelerator(config)
        run = start_or_resume(config, accelerator, hub.download_run)
        images, held_out_images = open_images(config, description, run)
        classes = description.class_names(images.class_names)
        prompts = description.prompts(config.validation.validation_prompts or (), classes)
        publishes = config.output.push_to_hub and run.is_main and not config.validation.dry_run
        run.repository = hub.prepare_repository(config.output) if publishes else None
    # Models: a frozen VAE and frozen text encoders around what is trained, which is in float32.
    with refusing(SCRIPT):
        status.now(Stage.LOADING)
        family = load_family(config.model, config.lora, description, accelerator)
        trained = status.trained = TrainedParts(family, ...)
