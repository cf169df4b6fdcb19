"""A run that ends before its time: one error in words, and the last checkpoint is complete."""

import gc
import os
import re
import signal
import subprocess
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from diffusers import AutoencoderKL, UNet2DConditionModel
from trainer import metrics, same, script, train, unfinished, weights

from lpl import features
from lpl.config import Config
from lpl.config.config import FLAGS
from lpl.config.flag import REFUSED
from lpl.data.dataset import TrainingImages
from lpl.data.streaming import LostShard
from lpl.data.timeouts import GONE, HungLoader
from lpl.diagnosis.failures import Stage, explained, explanation
from lpl.diagnosis.needs import NoRoom
from lpl.tools.process import SIGNALS
from lpl.training import checkpoints
from lpl.training.checkpoints import find_checkpoints
from tests.diagnosis.test_needs import MIB, OPTIMIZERS


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """A run that ends by an error listens to signals until its process is gone."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


# Out of memory -------------------------------------------------------------------------------------------------------


def in_child(function):
    """What a forked process ends with: its error's words, or nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        words = ""
        try:
            function()
        except SystemExit as error:
            words = str(error.code)
        except BaseException:
            words = traceback.format_exc()
        os.write(writing, words.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        words = stream.read().decode()
    os.waitpid(child, 0)
    return words


def at_call(monkeypatch, owner, name, when, error):
    """Let that call of a method, counted from 1, raise an error."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")
RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "lpl_measuring_steps": 2, "use_ema": True, "ema_decay": 0.5}


def ended(*arguments, **flags):
    """The error that the run ends with."""
    with pytest.raises(SystemExit) as left:
        train(*arguments, **flags)
    return left.value.code


def test_a_step_without_memory(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """It is said once, with what would help; the checkpoint before is whole, and the run goes on as if uninterrupted,
    with flags that need less memory."""
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **RUN)
    with monkeypatch.context() as patch:
        at_call(patch, UNet2DConditionModel, "forward", 3, OUT)
        said = ended(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    first, *rows, last = said.splitlines()
    assert re.fullmatch(
        r"train_text_to_image_lpl.py: error: out of memory in step 3, which has LPL: this machine has [\d.]+ GiB, "
        r"this run's process had [\d.]+ [MG]iB at most; 20.00 MiB more were asked for; what saves memory:",
        first,
    )
    assert {row.split()[0] for row in rows} >= {"--gradient_checkpointing", "--train_batch_size", "--lpl_chunk_size"}
    assert all(("in a new run only" in row) is (FLAGS[row.split()[0][2:]].on_resume is REFUSED) for row in rows)
    assert any("in a new run only" in row for row in rows)
    assert last == (
        "checkpoint-2 is complete; to continue with such flags, run the same command with --resume_from_checkpoint "
        "latest"
    )
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    cheaper = {"gradient_checkpointing": True, "lpl_chunk_size": 1, "resume_from_checkpoint": "latest"}
    train(sd_pipeline, image_folder, tmp_path / "run", **RUN | cheaper)
    one, other = weights(whole / "unet"), weights(tmp_path / "run/unet")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert len(metrics(tmp_path / "run")) == 4


@pytest.mark.slow  # where it runs out depends on what the tests before have left in this process
def test_memory_that_really_runs_out(sd_pipeline, image_folder, tmp_path):
    """In the middle of a step, wherever the system says so."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("what this process has mapped is not known here")

    def limited():
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 300 * MIB, mapped + 300 * MIB))
        torch.backends.mkldnn.enabled = False  # its errors do not say what it lacks
        train(sd_pipeline, image_folder, tmp_path / "run", resolution=64, train_batch_size=400, lpl_weight=0)

    said = in_child(limited)
    assert re.match(r"train_text_to_image_lpl.py: error: out of memory in step [12]: this machine has ", said), said
    assert "more were asked for; what saves memory:" in said and "  --train_batch_size 200 " in said


def test_the_first_steps_without_memory(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "forward", 1, OUT)
    said = ended(sd_pipeline, image_folder, tmp_path, lpl_weight=0, train_batch_size=1, gradient_checkpointing=True)
    assert "out of memory in step 1: " in said and "--lpl" not in said and "--train_batch_size" not in said
    assert "  --lora  " in said and "in a new run only" not in said
    assert said.endswith("\nthis run has no checkpoint to resume from")


def test_no_memory_for_samples(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, AutoencoderKL, "_decode", 2, OUT)
    flags = {"validation_prompts": ["a cat"], "validation_steps": 2, "checkpointing_steps": 2, "lpl_weight": 0}
    said = ended(sd_pipeline, image_folder, tmp_path, **flags)
    assert "out of memory while sampling after step 2: " in said
    assert "--use_8bit_adam" in said and "--train_batch_size" not in said and "--gradient_checkpointing" not in said
    assert "checkpoint-2 is complete" in said


def test_no_memory_for_the_models(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "to", 1, OUT)
    said = ended(sd_pipeline, image_folder, tmp_path)
    assert "out of memory while loading the models: " in said
    assert (
        "--mixed_precision bf16  half of the frozen weights" in said
        and "--train_batch_size" not in said
        and "8bit" not in said
    )


def test_no_memory_of_the_machine(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, TrainingImages, "__getitem__", 4, MemoryError())  # the first one is a trial
    said = ended(sd_pipeline, image_folder, tmp_path)
    assert "out of memory in step 2, which has LPL: this machine has " in said


def test_the_machines_memory_beside_a_gpu(status):
    said = explanation(status(machine={"device": torch.device("cuda")}, dataloader_num_workers=3), MemoryError())
    assert "this machine has" in said and "\n  --dataloader_num_workers 1  " in said and "--lora" not in said


def test_nothing_is_left_to_save(status):
    flags = {"train_batch_size": 1, "rank": 1, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    flags |= {"quantize_base": "fp8"}
    said = explanation(status(Stage.STEP, lpl_weight=0, use_8bit_adam=True, **flags), OUT)
    assert "what saves memory" not in said and said.endswith("\nthis run has no checkpoint to resume from")


def test_checkpoints_of_another_run_are_none_of_this_one(status, tmp_path):
    run, resumed = status(), status(resume_from_checkpoint="latest")
    for step in (2, 9):
        checkpoints.checkpoint_path(tmp_path / "out", step).mkdir(parents=True)
        checkpoints.Progress(step, seed=0).save(checkpoints.checkpoint_path(tmp_path / "out", step))
    os.utime(checkpoints.checkpoint_path(tmp_path / "out", 9), (0, 0))
    last = explanation(run, OUT).splitlines()[-1]
    assert last.startswith("checkpoint-2 is complete; ") and last.endswith("--resume_from_checkpoint checkpoint-2")
    os.utime(checkpoints.checkpoint_path(tmp_path / "out", 2), (0, 0))
    assert "this run has no checkpoint" in explanation(run, OUT)
    assert "--resume_from_checkpoint latest" in explanation(resumed, OUT)


def test_other_errors_are_as_they_were(sd_pipeline, image_folder, tmp_path, monkeypatch):
    at_call(monkeypatch, UNet2DConditionModel, "forward", 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(sd_pipeline, image_folder, tmp_path)


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_loaders_process_that_was_killed(sd_pipeline, image_folder, tmp_path, monkeypatch):
    main, sample = os.getpid(), TrainingImages.__getitem__

    def killed(self, key):
        if os.getpid() != main and key[0] == 1:  # in the second epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, key)

    monkeypatch.setattr(TrainingImages, "__getitem__", killed)
    flags = {"dataloader_num_workers": 1, "checkpointing_steps": 1, "max_train_steps": 50, "lpl_weight": 0}
    said = ended(sd_pipeline, image_folder, tmp_path, **flags)
    assert "a process that loads images was killed in step " in said
    assert "try --dataloader_num_workers 0\ncheckpoint-" in said


def test_a_loaders_process_that_is_missed(status):
    said = explanation(status(), RuntimeError(f"DataLoader worker (pid 7) {GONE}"))
    assert said.startswith("a process that loads images was killed")


def test_a_loader_without_shared_memory(status):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")
    said = explanation(status(dataloader_num_workers=4), error)
    assert "shared memory" in said and "try --dataloader_num_workers 2" in said
    assert (
        explanation(status(), RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault."))
        is None
    )


def test_a_kernel_that_cannot_be_compiled(sd_pipeline, image_folder, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("C++ compile error\n\nOutput:\n/tmp/x.cpp: In function:\n/tmp/x.cpp:3:5: error: no match\n")

    monkeypatch.setattr(features, "BACKEND", backend)
    said = ended(sd_pipeline, image_folder, tmp_path, torch_compile=True)
    assert said == (
        "train_text_to_image_lpl.py: error: --torch_compile: a part of the model cannot be compiled in step 1, which "
        "has LPL (/tmp/x.cpp:3:5: error: no match); leave the flag out\nthis run has no checkpoint to resume from"
    )


def test_a_loader_that_hangs(status):
    said = explanation(status(), LostShard("--streaming: shard 3 cannot be read"))
    assert said == "--streaming: shard 3 cannot be read\nthis run has no checkpoint to resume from"
    said = explanation(status(), HungLoader("the reading of a.png does not end"))
    assert said == "the reading of a.png does not end\nthis run has no checkpoint to resume from"


def one_of_two(pipeline, images, folder):
    """A process of two; the second one has no memory in the third step."""
    if torch.distributed.get_rank() == 1:
        at_call(pytest.MonkeyPatch(), UNet2DConditionModel, "forward", 3, OUT)
    train(pipeline, images, folder, **RUN)


def test_one_process_of_two_without_memory(sd_pipeline, image_folder, tmp_path, capfd):
    """It leaves with exit code 1 and its error, and keeps nobody waiting."""
    gc.collect()
    with pytest.raises(Exception, match="exit code 1"):
        debug_launcher(one_of_two, args=(sd_pipeline, image_folder, tmp_path / "run"), num_processes=2)
    said = capfd.readouterr().err
    assert "error: out of memory in step 3, which has LPL: " in said and "checkpoint-2 is complete" in said
    assert "latest\nthis was process 1 of 0 to 1\n" in said and "Traceback" not in said
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_the_others_say_that_it_was_not_them(status):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:20129")
    assert "another process of the run ended in step 3" in explanation(status(machine={"num_processes": 2}), error)
    assert explanation(status(), error) is None


# Disk ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_so_large(sd_pipeline, image_folder, tmp_path):
    """A real write that fails in the middle of a checkpoint."""
    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # the weights fit, the optimizer's state not
        train(sd_pipeline, image_folder, tmp_path / "run", checkpointing_steps=2, lpl_weight=0)

    said = in_child(limited)
    assert said.startswith(f"train_text_to_image_lpl.py: error: {tmp_path / 'run/checkpoint-2'} cannot be written: ")
    assert "File too large" in said and "a checkpoint needs " in said
    assert not list((tmp_path / "run").glob("*checkpoint*")) and not unfinished(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a real disk of that size; called again, it has another."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(count):
        again = ",remount" if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"size={count}{again}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


CHECKPOINT, RESULT = 830_000, 850_000  # bytes of the tiny model without EMA: a checkpoint, the result being written


def test_a_full_disk_ends_the_run_with_what_was_whole(sd_pipeline, image_folder, tmp_path, small_disk, caplog):
    flags = {"max_train_steps": 6, "checkpointing_steps": 2, "lpl_weight": 0}
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", **flags)
    disk = small_disk(int(2.5 * CHECKPOINT))
    said = ended(sd_pipeline, image_folder, disk / "run", **flags)
    assert "the result and 3 checkpoints of " in caplog.text  # it was warned of
    assert said.startswith(f"train_text_to_image_lpl.py: error: {disk / 'run/checkpoint-6'} cannot be written: ")
    assert (
        "No space left on device" in said and "\ncheckpoint-4 is complete; to continue, run the same command" in said
    )
    assert sorted(path.name for path in (disk / "run").glob("*checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert not unfinished(disk / "run")
    small_disk(int(4 * CHECKPOINT + RESULT))
    train(sd_pipeline, image_folder, disk / "run", **flags, resume_from_checkpoint="latest")
    assert same(weights(disk / "run/unet"), weights(whole / "unet")) and metrics(disk / "run") == metrics(whole)


def test_a_checkpoint_that_would_go_anyway_makes_room(sd_pipeline, image_folder, small_disk, caplog):
    """Two checkpoints and the result fit on the disk, but not three checkpoints."""
    flags = {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "lpl_weight": 0, "use_ema": True}
    flags |= OPTIMIZERS["prodigy"] | {"max_train_steps": 8}  # its state is four times the weights
    disk = small_disk(4_750_000)  # each takes 1.7 MB, and writing the result 0.9 MB
    train(sd_pipeline, image_folder, disk / "run", **flags)
    assert [path.name for path in find_checkpoints(disk / "run")] == ["checkpoint-6", "checkpoint-8"]
    assert (disk / "run/model_index.json").is_file() and not unfinished(disk / "run")
    assert "the disk is full: checkpoint-2 is deleted to make room for checkpoint-6" in caplog.text


def test_a_full_disk_beside_the_checkpoints(status, tmp_path):
    (tmp_path / "out/.result.unfinished").mkdir(parents=True)
    said = explanation(status(Stage.SAVING), OSError(28, "No space left on device"))
    assert said.startswith("a file cannot be written while saving the result: No space left on device; ")
    assert not (tmp_path / "out/.result.unfinished").exists() and ", or set --checkpoints_total_limit\n" in said
    assert "; make room\n" in explanation(status(checkpoints_total_limit=1), OSError(28, "No space left on device"))
    assert explanation(status(), OSError(2, "No such file or directory")) is None


def test_the_words_are_an_error_of_the_script():
    with pytest.raises(SystemExit) as left, explained(script.SCRIPT, Config()):
        raise NoRoom("--output_dir x: no room")
    assert left.value.code == "train_text_to_image_lpl.py: error: --output_dir x: no room"
