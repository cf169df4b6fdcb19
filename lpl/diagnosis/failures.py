"""Explains the error that ends a run: what was out of memory, disk space or processes, and how to continue."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lpl.config import Config
from lpl.data.loader import worker_count
from lpl.data.streaming import LostShard
from lpl.data.timeouts import GONE, HungLoader
from lpl.diagnosis.needs import DiskNeeds, NoRoom
from lpl.diagnosis.remedies import remedies
from lpl.diagnosis.status import Stage, Status
from lpl.tools.machine import free_space, is_full, is_out_of_memory, memory_in_words, wanted_memory
from lpl.tools.process import leave
from lpl.tools.words import first_line, size
from lpl.training.checkpoints import find_checkpoints, tidy


__all__ = ["Stage", "Status", "explained", "explanation"]
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")


@contextmanager
def explained(script: str, config: Config) -> Iterator[Status]:
    """Within, an error that can be explained ends the run with its explanation and exit code 1, without a traceback.

    One process of several exits at once: an orderly end would wait for the others, which wait for it. Their launcher
    ends them.
    """
    status = Status(config)
    try:
        yield status
    except Exception as error:
        words = explanation(status, error)
        if words is None:
            raise
        words = f"{script}: error: {words}"
        if status.stage not in (Stage.READING, Stage.LOADING):
            print(file=sys.stderr)  # below the bar
        if status.accelerator is None or status.processes == 1:
            sys.exit(words)
        number = status.accelerator.process_index
        print(f"{words}\nthis was process {number} of 0 to {status.processes - 1}", file=sys.stderr, flush=True)
        leave(1)


def explanation(status: Status, error: Exception) -> str | None:
    """Why the run ends and how to continue; None for an error that is not known."""
    if is_out_of_memory(error):
        return _out_of_memory(status, error)
    if is_full(error):
        return _disk_full(status, error)
    if words := _loader_ended(status, error) or _process_ended(status, error) or _not_compiled(status, error):
        return words
    if isinstance(error, HungLoader):
        return f"{error}\n{_how_to_continue(status)}"
    if isinstance(error, LostShard):
        return f"{error}\n{_how_to_continue(status, ' once it can be read again')}"
    if isinstance(error, FloatingPointError):  # of weights that are not saved
        return f"{error}\n{_how_to_continue(status, ' with a lower --learning_rate')}"
    return str(error) if isinstance(error, NoRoom) else None


def _out_of_memory(status: Status, error: BaseException) -> str:
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    device = torch.device("cpu") if host else status.device
    found = remedies(status, device)
    lines = [f"out of memory {status.words()}: {memory_in_words(device)}{wanted_memory(error)}"]
    if found:
        lines[0] += "; what saves memory:"
        width = max(len(remedy.flags) for remedy in found)
        resumable = bool(status.checkpoints())
        for remedy in found:
            new_run = "; in a new run only" if resumable and remedy.new_run_only else ""
            lines.append(f"  {remedy.flags:<{width}}  {remedy.effect}{new_run}")
    return "\n".join([*lines, _how_to_continue(status, " with such flags" if found else " with more memory")])


def _disk_full(status: Status, error: BaseException) -> str:
    config, output, name = status.config, status.config.output, getattr(error, "filename", None)
    if status.accelerator is not None and status.accelerator.is_main_process and not config.validation.dry_run:
        tidy(output.output_dir)  # half-written files take room
    reason = getattr(error, "strerror", None) or first_line(error)
    words = f"{name} cannot be written" if name else f"a file cannot be written {status.words()}"
    words += f": {reason}; {size(free_space(output.output_dir))} are free for --output_dir {output.output_dir}"
    if status.trained is not None:
        needs = DiskNeeds.of(status.trained, config.optimization, output, status.step, status.step)
        words += f", a checkpoint needs {size(needs.checkpoint)} and the result {size(needs.writing)}"
    limit = "" if output.checkpoints_total_limit else ", or set --checkpoints_total_limit"
    return f"{words}; make room{limit}\n{_how_to_continue(status)}"


def _loader_ended(status: Status, error: BaseException) -> str | None:
    """For a loader process that was killed, as the system does where memory is short."""
    said = f"{error} {error.__cause__ or ''}"
    if not isinstance(error, RuntimeError) or not re.search(r"DataLoader worker \(pid", said):
        return None
    if "Bus error" in said:
        words = "a process that loads images ran out of shared memory (/dev/shm; docker has --shm-size for it)"
    elif "Killed" in said or GONE in said:
        words = (
            f"a process that loads images was killed {status.words()}, as the system does when memory runs out; "
            f"{memory_in_words(torch.device('cpu'))}"
        )
    else:
        return None
    fewer = worker_count(status.config.data) // 2
    return f"{words}; try --dataloader_num_workers {fewer}\n{_how_to_continue(status, ' with that')}"


def _process_ended(status: Status, error: BaseException) -> str | None:
    """For another process of the run that is gone."""
    if status.processes == 1 or not any(words in str(error) for words in LOST_PROCESS):
        return None
    return f"another process of the run ended {status.words()}; its own error says why"


def _not_compiled(status: Status, error: BaseException) -> str | None:
    """For an error of torch.compile; a C++ compiler's own words are somewhere in its message."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    found = re.search(r"(\S+ )?(fatal )?error: .*", str(error))
    reason = found[0].strip() if found else first_line(error)
    words = f"--torch_compile: a part of the model cannot be compiled {status.words()} ({reason}); leave the flag out"
    return f"{words}\n{_how_to_continue(status, ' without it')}"


def _how_to_continue(status: Status, condition: str = "") -> str:
    """The command that resumes the run, under a condition that begins with a space."""
    output, found = status.config.output, status.checkpoints()
    named, complete = output.resume_from_checkpoint, ""
    if found:
        last = found[-1]
        named = "latest" if last == find_checkpoints(output.output_dir)[-1] else last.name
        complete = f"{last.name} is complete; "
    elif named in (None, "latest", "hub"):
        return "this run has no checkpoint to resume from"
    return f"{complete}to continue{condition}, run the same command with --resume_from_checkpoint {named}"
