"""A run without its script: what a test of something inside a run needs."""

from pathlib import Path

from accelerate import Accelerator

from lpl.config.command_line import recipe
from lpl.training.checkpoints import Progress
from lpl.training.start import Run


def run_of(config, step=0, accelerator=None, **progress):
    """The run of a configuration after some steps; `progress` is what a checkpoint says besides."""
    where = Progress(step, config.optimization.seed, **progress)
    return Run(accelerator or Accelerator(), Path(config.output.output_dir), where, recipe(config))
