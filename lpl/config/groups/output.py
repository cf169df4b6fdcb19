"""Flags: what is written, logged and published."""

from __future__ import annotations

from dataclasses import dataclass

from lpl.config import rules
from lpl.config.choices import HUB_STRATEGIES, PRECISIONS
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, flag, own_flag, silent_flag


@dataclass(frozen=True)
class Output:
    """output and recipes"""

    config: str | None = flag(
        None,
        "recipe: a YAML file that maps flags to values, such as a run's recipe.yaml, or a Hub repository with one "
        "(user/repo or user/repo@revision); the command line overrides it",
        path=True,
        in_recipe=False,
    )
    without: tuple[str, ...] | None = flag(None, "flags to drop from the recipe of --config", in_recipe=False)
    output_dir: str = own_flag("sd-model-finetuned", "folder for checkpoints, samples, logs and the result", path=True)
    save_single_file: str | None = own_flag(
        None,
        "also write the trained pipeline as one file for ComfyUI, Forge and other programs, with its weights in that "
        "precision",
        choices=PRECISIONS,
        used=rules.unless("lora"),
    )
    checkpointing_steps: int = silent_flag(500, "save a checkpoint every N optimizer steps", range=POSITIVE)
    checkpoints_total_limit: int | None = silent_flag(
        None, "keep only the last N checkpoints, at least one; default: keep all", range=NOT_NEGATIVE
    )
    resume_from_checkpoint: str | None = flag(
        None,
        'a checkpoint folder, "latest", or "hub" for the last checkpoint that --hub_strategy checkpoint pushed',
        own=True,
        path=True,
        in_recipe=False,
    )
    push_to_hub: bool = own_flag(False, "publish the result with samples, curves, recipe and model card")
    hub_model_id: str | None = own_flag(
        None, "Hub repository to publish to; default: the name of --output_dir", used=rules.asks_the_hub
    )
    hub_token: str | None = own_flag(
        None, "token for the Hub; prefer hf auth login or HF_TOKEN", in_recipe=False, used=rules.uses_a_token
    )
    hub_private_repo: bool = own_flag(False, "create the Hub repository as private", used=rules.when("push_to_hub"))
    hub_revision: str | None = own_flag(
        None, "branch to publish to, created if missing; default: main", used=rules.asks_the_hub
    )
    hub_strategy: str = own_flag(
        "end",
        "when to publish: at the end (end), or with each checkpoint: weights and samples (every_save), also the last "
        "training state (checkpoint), or all training states (all_checkpoints)",
        choices=HUB_STRATEGIES,
        used=rules.when("push_to_hub"),
    )
