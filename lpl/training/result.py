"""TODO: what is here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpl.families.description import Description
from lpl.training import lora
from lpl.training.loading import pipeline_source, replaced_components
from lpl.training.parts import TrainedParts


def save_result(
    folder: Path,
    args: Namespace,
    configs: Description,
    trained: TrainedParts,
    scheduler: Any,
    classes: Mapping[int, str],
) -> None:
    """What the run was for, into an empty folder: the pipeline with what was trained in it, or the LoRA."""
    changed = {"scheduler": scheduler} if scheduler is not configs.scheduler else {}
    if args.lora.lora:
        trained.save(folder)
        own_name = Path(args.output_dir).resolve().name
        lora.save_for_other_programs(configs.family.pipeline_class, folder, trained.parts, own_name)
        for name, component in changed.items():
            component.save_pretrained(folder / name)
        return
    # The frozen parts as they were shipped, not as this run cast them.
    components = changed | replaced_components(args.model) | dict(trained.parts)
    source = pipeline_source(args.model, configs) | components
    pipeline = configs.family.pipeline_class.from_pretrained(args.pretrained_model_name_or_path, **source)
    if classes:  # which the pipeline reads from its index, but would not write there
        pipeline.register_to_config(id2label={str(label): name for label, name in sorted(classes.items())})
    pipeline.save_pretrained(folder)
