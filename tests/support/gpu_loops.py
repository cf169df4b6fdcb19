"""The training loop of a tiny pipeline on a GPU, real or fake, with a watch over its steps.

`FAMILIES` and `KINDS` say what is run; `words(...)` is the command, `run_watched(words, watch)` runs it and leaves out
what follows the last step: the result is not saved.
"""

import sys
from unittest import mock

from trainer import ROOT, arguments, reset_accelerate

import train_text_to_image_lpl as script


KINDS = {"full": {"use_ema": True}, "LoRA": {"rank": 2, "use_ema": True}}
FLAGS = {  # 2 steps of two micro-batches: all samples inside, the weight measured in the first, two entries in the log
    "max_train_steps": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "checkpointing_steps": 1000,
    "lpl_sigma_threshold": 1e6,
    "lpl_weight": "auto:0.2",
    "lpl_measuring_steps": 1,
    "proportion_empty_prompts": 0.5,  # captions of both kinds
}


def words(pipeline, images, output_dir, **flags):
    """The command line of a run."""
    return arguments(pipeline, images, output_dir, **FLAGS | flags)


def run_watched(command, watch):
    """Run the script's main(); `watch(True)` is called before its first step, `watch(False)` behind the last one."""
    start_bar, close_bar = script.Log.start_bar, script.Log.close_bar

    def started(log):
        start_bar(log)
        watch(True)

    def ended(log, step):
        watch(False)
        close_bar(log, step)

    reset_accelerate()
    with (
        mock.patch.object(sys, "argv", [str(ROOT / "train_text_to_image_lpl.py"), *command]),
        mock.patch.multiple(script.Log, start_bar=started, close_bar=ended),
        mock.patch.object(script, "save"),
        mock.patch.object(script.Plan, "announce"),  # draws thousands of timesteps
    ):
        try:
            script.main()
        finally:
            watch(False)
            reset_accelerate()
