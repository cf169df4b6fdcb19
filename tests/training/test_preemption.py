"""A run that is asked to stop ends after the step with a checkpoint, and goes on as if nothing had happened."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, debug_launcher
from torch.distributed import TCPStore
from trainer import ROOT, arguments, metrics, same, script, train, weights

from lpl.families.sd import StableDiffusion
from lpl.tools.process import SIGNALS
from lpl.training import preemption
from lpl.training.checkpoints import find_checkpoints
from lpl.training.log import Log
from lpl.training.preemption import EXIT_CODE, Preemption


RUN = {
    "max_train_steps": 5,
    "logging_steps": 4,
    "checkpointing_steps": 100,
    "use_ema": True,
    "ema_decay": 0.5,
    "lpl_measuring_steps": 3,
    "validation_prompts": ["a cat", "a dog"],
    "validation_steps": 4,
    "validation_every_nth": 4,
    "seed": 3,
}


@pytest.fixture(scope="module")
def uninterrupted(sd_pipeline, image_folder, tmp_path_factory):
    return train(sd_pipeline, image_folder, tmp_path_factory.mktemp("whole") / "run", **RUN)


@pytest.fixture
def asked(monkeypatch):
    """`asked(function, when, signal)`: send this process a signal in a call of that function."""

    def at(owner, name, when, number=signal.SIGTERM):
        original, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == when:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return at


def equal(first, second):
    """Weights, entries of the log, and every picture that was sampled."""
    grids = [
        {file.relative_to(run): file.read_bytes() for file in sorted((run / "samples").rglob("*.png"))}
        for run in (first, second)
    ]
    assert same(weights(first / "unet"), weights(second / "unet"))
    assert metrics(first) == metrics(second)
    assert grids[0] == grids[1] and len(grids[0]) > 6
    return True


def resumed(sd_pipeline, image_folder, folder):
    return train(sd_pipeline, image_folder, folder, **RUN, resume_from_checkpoint="latest")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(
    number, uninterrupted, sd_pipeline, image_folder, tmp_path, monkeypatch, asked
):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context():
        asked(Log, "observe", 3, number)  # in the third step, between two entries of the log
        with pytest.raises(SystemExit) as left:
            train(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    assert left.value.code == EXIT_CODE
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run/model_index.json").exists()
    measured = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["measured"]
    assert measured["lpl_weight"] > 0  # known after the third step
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    monkeypatch.undo()
    assert equal(resumed(sd_pipeline, image_folder, tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("when", [1, 3, 4])  # the first prompt before training; the first and second after step 4
def test_samples_that_were_given_up_are_made_up_for(
    when, uninterrupted, sd_pipeline, image_folder, tmp_path, monkeypatch, asked
):
    asked(StableDiffusion, "call_arguments", when)
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    monkeypatch.undo()
    step = 0 if when == 1 else 4
    assert left.value.code == EXIT_CODE and not (tmp_path / f"run/samples/step-{step:06d}.png").exists()
    checkpoints = [path.name for path in find_checkpoints(tmp_path / "run")]
    assert checkpoints == ([f"checkpoint-{step}"] if step else [])
    assert equal(resumed(sd_pipeline, image_folder, tmp_path / "run"), uninterrupted)


def test_a_signal_in_the_last_step_still_leaves_a_checkpoint(sd_pipeline, image_folder, tmp_path, monkeypatch, asked):
    flags = {"max_train_steps": 2, "lpl_weight": 0}
    asked(Log, "observe", 2)
    with pytest.raises(SystemExit):
        train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    monkeypatch.undo()
    train(sd_pipeline, image_folder, tmp_path / "run", **flags, resume_from_checkpoint="latest")
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags)
    assert same(weights(tmp_path / "run/unet"), weights(whole / "unet"))


class Alone:
    num_processes = 1


def until(condition, seconds=20):
    """Whether it holds before so much time is over."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


def test_a_signal_is_noted_until_the_end(capfd, monkeypatch):
    monkeypatch.setattr(preemption, "LONGEST", 0.5)
    monkeypatch.setattr(preemption, "leave", lambda code: pytest.fail("it was closed"))
    before, threads = signal.set_wakeup_fd(-1), threading.active_count()
    listening = Preemption(Alone())
    listening.listen()
    try:
        assert not listening.asked() and not listening.asked_now()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert listening.asked() and listening.asked_now()
    finally:
        listening.close()
    assert until(lambda: threading.active_count() == threads)  # nothing of it is left
    assert signal.set_wakeup_fd(before) == -1
    assert capfd.readouterr().err.count("SIGUSR1: the run saves a checkpoint") == 1


@pytest.fixture
def stuck():
    """A process that listens, and waits in a library for another one that never comes: no handler of Python runs."""
    children = []

    def start(longest):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            preemption.LONGEST = longest
            signal.signal(signal.SIGALRM, lambda *_: None)
            Preemption(Alone()).listen()
            store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
            os.write(writing, b"!")
            try:
                store.get("what nobody sets")
            finally:
                os._exit(1)
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)
        children.append(child)
        time.sleep(0.3)
        return child

    yield start
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def code_of(child):
    """What a process ends with, in 20 seconds; None: it does not."""
    status = []
    until(lambda: status.extend(given for pid, given in [os.waitpid(child, os.WNOHANG)] if pid) or status)
    return os.waitstatus_to_exitcode(status[0]) if status else None


def test_the_second_signal_leaves_at_once(stuck, capfd):
    child = stuck(longest=60)
    os.kill(child, signal.SIGALRM)  # which Python handles too
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    assert "SIGTERM: the run saves a checkpoint after this step and ends, after 1 minutes" in capfd.readouterr().err
    os.kill(child, signal.SIGINT)
    assert code_of(child) == 128 + signal.SIGINT


def test_a_run_that_hangs_ends_all_the_same(stuck, capfd):
    child = stuck(longest=0.5)
    os.kill(child, signal.SIGUSR1)
    assert code_of(child) == EXIT_CODE
    assert "the last checkpoint is whole: --resume_from_checkpoint latest continues" in capfd.readouterr().err


def agree(rank, port, queue):
    """One of two processes; only the second one gets a signal."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    class Two:
        num_processes = 2

    preemption = Preemption(Two())
    preemption.listen()
    answers = []
    for step in range(5):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(preemption.asked())
    queue.put((rank, answers))
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_agree_on_the_step():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        free_port = listening.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=agree, args=(rank, free_port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = dict(queue.get(timeout=180) for _ in workers)  # each imports everything first
    for worker in workers:
        worker.join(60)
    assert answers[0] == answers[1] == [False, False, False, True, True]


def one_of_two(pipeline, images, folder, stopped):
    """A process of two; the second one is asked to stop, or nobody is, and what the first does at the end is slow."""
    rank = torch.distributed.get_rank()
    patch = pytest.MonkeyPatch()
    saved, name = (script.logger, "info") if stopped else (script, "write_model_card")
    slow = getattr(saved, name)
    patch.setattr(saved, name, lambda *given: (rank == 0 and time.sleep(2)) or slow(*given))
    if stopped and rank == 1:
        observe, calls = Log.observe, []
        patch.setattr(
            *(Log, "observe"),
            lambda *given: (
                calls.append(1) or (len(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM)) or observe(*given)
            ),
        )
    ends = Accelerator.end_training
    patch.setattr(
        *(Accelerator, "end_training"),
        lambda self: (folder.with_name(f"{rank}").write_text(str(time.monotonic())), ends(self)),
    )
    start = time.monotonic()
    try:
        train(pipeline, images, folder, max_train_steps=4, checkpointing_steps=100, lpl_weight=0)
    except SystemExit as left:
        assert stopped and left.code == EXIT_CODE
    assert time.monotonic() - start > 2


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [True, False])
def test_two_processes_leave_together(stopped, sd_pipeline, image_folder, tmp_path):
    """Also where one alone is asked: both stop, a step later, at the same checkpoint."""
    gc.collect()
    run = tmp_path / "run"
    debug_launcher(one_of_two, args=(sd_pipeline, image_folder, run, stopped), num_processes=2)
    times = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert abs(times[0] - times[1]) < 1
    assert [path.name for path in find_checkpoints(run)] == (["checkpoint-3"] if stopped else [])
    assert (run / "model_index.json").exists() is not stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]]
)
def test_a_launched_run_saves_and_says_so(launcher, sd_pipeline, image_folder, tmp_path):
    words = arguments(
        sd_pipeline, image_folder, tmp_path / "run", max_train_steps=2000, logging_steps=1, checkpointing_steps=10**6
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *launcher, "train_text_to_image_lpl.py", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = tmp_path / "run/metrics.jsonl"
    until = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) > 3) and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name.rpartition("-")[2])
    assert "SIGTERM" in said and (process.returncode == EXIT_CODE or launcher), said[-2000:]
    assert Path(checkpoint, "unet").is_dir()
