"""A run that is asked to stop ends after the step with a checkpoint, and goes on as if nothing had happened."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainer import ROOT, arguments, metrics, same, train, weights

from lpl.checkpoints import find_checkpoints
from lpl.families.sd import StableDiffusion
from lpl.logs import Log
from lpl.preemption import EXIT_CODE, SIGNALS, Preemption, leave_signals_alone


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
        asked(Log, "add", 3, number)  # in the third step, between two entries of the log
        with pytest.raises(SystemExit) as left:
            train(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    assert left.value.code == EXIT_CODE
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run/model_index.json").exists()
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
    asked(Log, "add", 2)
    with pytest.raises(SystemExit):
        train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    monkeypatch.undo()
    train(sd_pipeline, image_folder, tmp_path / "run", **flags, resume_from_checkpoint="latest")
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags)
    assert same(weights(tmp_path / "run/unet"), weights(whole / "unet"))


def test_a_loaders_workers_leave_signals_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        leave_signals_alone(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)


class Alone:
    num_processes = 1


def test_the_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    preemption = Preemption(Alone())
    preemption.listen()
    try:
        assert not preemption.asked() and not preemption.asked_now()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.asked() and preemption.asked_now() and not left
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        preemption.close()
    assert left == [128 + signal.SIGTERM]


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


def test_all_processes_agree_on_the_step():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        free_port = listening.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=agree, args=(rank, free_port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert answers[0] == answers[1] == [False, False, False, True, True]


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
