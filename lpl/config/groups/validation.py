"""Flags: samples, held-out losses and metrics during a training."""

from __future__ import annotations

from dataclasses import dataclass

from lpl.config import prompts, rules, sizes
from lpl.config.choices import CLIP, GPUS, METRICS, SET_METRICS, TRACKERS
from lpl.config.flag import FINITE, NOT_NEGATIVE, POSITIVE, at_most, flag, own_flag, silent_flag


@dataclass(frozen=True)
class Validation:
    """validation and logging"""

    dry_run: bool = flag(
        False,
        "report what a run would do and what time and memory it needs, then exit; writes nothing, "
        "except into the cache a pipeline that is made of a single file, another denoiser or merged LoRA",
        own=True,
        in_recipe=False,
    )
    for_gpu: str | None = flag(
        None,
        f"with --dry_run: estimate for a GPU with that memory, such as 24GB, or of that name ({', '.join(GPUS)}), or "
        "for several, such as 8x24GB, with FSDP2 if accelerate's configuration asks for it; needs neither GPU, "
        "weights nor data",
        own=True,
        in_recipe=False,
    )
    validation_prompt: str | None = silent_flag(
        None, "prompt to sample --num_validation_images images from; for DiT, a class"
    )
    validation_prompts: tuple[prompts.Entry, ...] | None = silent_flag(
        None,
        "prompts to sample one image each from; for DiT, classes; as JSON, or in --config as mappings, each with its "
        f"own {', '.join(prompts.KEYS)}",
        word=prompts.prompt,
    )
    validation_prompts_file: str | None = flag(
        None,
        "file of such prompts: .txt with one a line, which may end in sd-scripts' options --n --w --h --d --l --s; "
        ".jsonl, .json or .yaml",
        own=True,
        path=True,
        in_recipe=False,
    )
    num_validation_images: int = silent_flag(
        4,
        "number of images to sample from --validation_prompt; 0 = none",
        range=(NOT_NEGATIVE, at_most(10_000)),
        used=rules.when("validation_prompt"),
    )
    validation_epochs: int = silent_flag(
        5,
        "run validation (samples and validation loss) every N epochs; 0 = only before and after the training",
        range=NOT_NEGATIVE,
        used=rules.validates,
    )
    validation_steps: int | None = silent_flag(
        None,
        "run validation every N optimizer steps; overrides --validation_epochs",
        range=POSITIVE,
        used=rules.validates,
    )
    validation_sizes: str | None = silent_flag(
        None,
        'sizes to draw each validation prompt at, "HEIGHT,WIDTH;HEIGHT,WIDTH"; default: the square of --resolution',
        word=sizes.some_sizes,
        used=rules.when("validation_prompts"),
    )
    validation_lora_scales: tuple[float, ...] | None = silent_flag(
        None,
        "strengths of the LoRA to draw each validation prompt at when the training ends, such as 0 0.5 1",
        used=rules.draws_a_lora,
    )
    validation_inference_steps: int = silent_flag(
        25, "number of sampling steps for validation images; a distilled model has 8 by default", range=POSITIVE
    )
    validation_guidance_scale: float | None = silent_flag(
        None, "guidance scale for validation images; default: the pipeline's, for a distilled model none", range=FINITE
    )
    report_to: str = own_flag("tensorboard", f"experiment tracker: {', '.join(TRACKERS)}, all or none")
    tracker_project_name: str = own_flag("text2image-fine-tune", "project name in the tracker")
    logging_dir: str = own_flag("logs", "folder for the trackers' files, inside --output_dir", path=True)
    logging_steps: int = silent_flag(10, "write a log entry every N optimizer steps", range=POSITIVE)
    debug_loss: bool = silent_flag(False, "log the diffusion loss of each image")
    verbose: bool = own_flag(
        False, "show the libraries' own notices at the start, and all of their progress bars", in_recipe=False
    )


@dataclass(frozen=True)
class Evaluation:
    """evaluation"""

    eval_steps: int | None = own_flag(
        None, "compare generated with real images every N optimizer steps; default: never", range=POSITIVE
    )
    eval_data_dir: str | None = own_flag(
        None,
        "folder of real images with captions to compare with; use images outside the training set",
        path=True,
        used=rules.when("eval_steps"),
    )
    eval_metrics: tuple[str, ...] = own_flag(
        SET_METRICS, f"metrics to compute: {', '.join(METRICS)}", used=rules.when("eval_steps")
    )
    eval_features: tuple[str, ...] = own_flag(
        ("facebook/dinov2-base",),
        "feature networks for the metrics, named as for python -m lpl.evaluate",
        path=True,
        code=True,
        used=rules.compares_sets,
    )
    eval_clip: str = own_flag(CLIP, "CLIP model for clip_score", path=True, used=rules.scores_captions)
    eval_num_images: int | None = own_flag(
        None,
        "number of images to generate for the evaluation; default: the number of real images",
        range=POSITIVE,
        used=rules.when("eval_steps"),
    )
    eval_batch_size: int = own_flag(
        8, "batch size for generating evaluation images", range=POSITIVE, used=rules.when("eval_steps")
    )
