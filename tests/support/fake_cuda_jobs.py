"""Runs training loops on fake CUDA, each in a process of its own: python fake_cuda_jobs.py LIBRARY SCRATCH < jobs.

jobs: JSON, {name: {"commands": command lines, "fault": one of faults.FAULTS or null}}. Prints JSON, {name: {"error":
traceback or null, "waits": what, functions and place of each, "updates": calls of the fused optimizer}}. The processes
are forked, so that the libraries are imported once; SCRATCH is a file that they may write.
"""

import json
import os
import sys
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import fake_cuda_library


if __name__ == "__main__":
    fake_cuda_library.load(sys.argv[1])

import gpu_loops
from fake_cuda import FakeCuda
from faults import FAULTS


def result_of(job):
    """The waits of the loops of a job, one after another, and the error that ended them."""
    error = None
    with FAULTS[job["fault"]]() if job["fault"] else nullcontext(), FakeCuda(listening=False) as device:

        def watch(on):
            device.listening = on

        try:
            for words in job["commands"]:
                gpu_loops.run_watched(words, watch)
        except BaseException:
            error = traceback.format_exc()
    return {"error": error, "waits": [asdict(wait) for wait in device.waits], "updates": device.fused_updates}


def in_a_process(job, path):
    """The result of a job, from a fork of this process."""
    if child := os.fork():
        os.waitpid(child, 0)
        return json.loads(path.read_text())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    path.write_text(json.dumps(result_of(job)))
    os._exit(0)


if __name__ == "__main__":
    given = json.load(sys.stdin)
    path = Path(sys.argv[2])
    results = {name: in_a_process(job, path) for name, job in given.items()}
    json.dump(results, sys.stdout)
