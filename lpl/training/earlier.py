"""What an earlier run left in the output folder is set aside before a run writes there.

A run that starts afresh, or from a checkpoint of another folder, owns nothing of what it finds: an earlier result,
with its card, log, recipe and pictures, goes into ``earlier-run``, which is an output folder of its own; checkpoints
get other names (:func:`lpl.training.checkpoints.set_aside`). A run that resumes owns its folder, except for a result
of the other kind: a pipeline where a LoRA is trained, or a LoRA where a pipeline is.
"""

from __future__ import annotations

import logging

from lpl.tools import layout
from lpl.tools.files import UNFINISHED, free_place, hold
from lpl.tools.results import lora_entries, pipeline_entries, scheduler_entries, single_files
from lpl.training.checkpoints import set_aside
from lpl.training.start import Run


logger = logging.getLogger(__name__)
BESIDE = (  # what describes a result
    *(layout.LOG, layout.SAMPLE_LOSSES, layout.BAD_SAMPLES, layout.CURVES, layout.SAMPLES, layout.EVALUATION),
    *(layout.EARLIER_EVALUATION, layout.RECIPE, layout.CARD),
)


def set_earlier_aside(run: Run, lora: bool) -> None:
    """Make room for a run before its main process writes.

    Args:
        lora: it trains a LoRA.

    Raises:
        ValueError: another run writes there.
    """
    if not run.is_main:
        return
    hold(f"--output_dir {run.folder}", run.folder)
    own = run.owns_folder
    moved = set_aside(run.folder, run.step if own else 0)
    pipeline, adapters = pipeline_entries(run.folder), lora_entries(run.folder)
    pipeline = [*single_files(run.folder), *pipeline] if pipeline else []
    if own:
        suffixes = (layout.OTHERS_SUFFIX, layout.OTHERS_PREVIEW)
        mine = [run.folder.resolve().name + suffix for suffix in suffixes]  # the folder may have had another name
        entries = pipeline + [x for x in adapters if x.endswith(suffixes) and x not in mine] if lora else adapters
    else:
        found = pipeline or adapters or moved
        beside = [name for name in BESIDE if (run.folder / name).exists()]  # somebody's README too
        entries = [*beside, *(scheduler_entries(run.folder) if found else []), *pipeline, *adapters]
    entries = list(dict.fromkeys(entries))  # the index and the LoRA last: with them, a killed move continues
    unfinished = run.folder / f".{layout.EARLIER_RUN}{UNFINISHED}"
    if not entries and not unfinished.is_dir():
        return
    unfinished.mkdir(exist_ok=True)
    for name in entries:
        (run.folder / name).rename(unfinished / name)
    place = unfinished.rename(free_place(run.folder / layout.EARLIER_RUN))
    logger.warning(
        f"--output_dir {run.folder}: what an earlier run left there is moved to {place.name}: {', '.join(entries)}"
    )
