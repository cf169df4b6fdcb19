"""Shares work between the processes of an evaluation: each computes a part, and all get all results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm.auto import tqdm


SEVERAL_HOURS = timedelta(hours=12)  # a process may wait this long for the others


def processes(cpu: bool = False) -> PartialState:
    """This process among those that ``accelerate launch`` has started, or the only one."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # By default PartialState looks for GPUs only; without one, each process would be taken for the only one.
    cpu = cpu or not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, **({"timeout": SEVERAL_HOURS} if several else {}))


def in_parts(count: int, compute: Callable[[Sequence[int]], Sequence]) -> list:
    """One result for each of ``count`` indices, in all processes; of n processes each computes every n-th index."""
    state = processes()
    results: list = [None] * count
    parts = everywhere(compute(range(state.process_index, count, state.num_processes)))
    for start, part in enumerate(parts):
        results[start :: len(parts)] = part
    return results


def everywhere(value: Any) -> list[Any]:
    """The values of all processes, in each of them."""
    return gather_object([value]) if processes().num_processes > 1 else [value]


def threaded(function: Callable, items: Sequence, title: str | None = None) -> list:
    """``[function(item) for item in items]`` in threads, since PIL releases the interpreter's lock.

    Args:
        title: of a progress bar on the main process; None: no bar.
    """
    hidden = title is None or not processes().is_main_process
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(function, items), title, len(items), leave=False, disable=hidden))
