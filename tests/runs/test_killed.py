"""A run that is killed at any moment leaves a whole checkpoint, and goes on from it to the same weights."""

import contextlib
import os
import random
import signal
import time

import pytest
from trainer import metrics, same, train, unfinished, weights

from lpl.tools import files, layout
from lpl.training.checkpoints import Progress, checkpoint_path, find_checkpoints, find_resumable, tidy


RUN = {
    "max_train_steps": 30,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "lpl_measuring_steps": 3,
    "validation_prompts": ["a cat"],
    "validation_steps": 7,
    "seed": 3,
}


def killed(seconds, pipeline, images, folder):
    """Train in a child process and kill it after that time; whether it was done before."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            train(pipeline, images, folder, **RUN, resume_from_checkpoint="latest")
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
    return os.WIFEXITED(status)


def kill_and_resume(times, pipeline, images, tmp_path):
    """Kill and resume so many times; a run that gets to its end in spite of it is compared, and begun again."""
    whole = train(pipeline, images, tmp_path / "whole", **RUN)
    folder, chance, reached, kills = tmp_path / "run0", random.Random(0), 0, 0
    while kills < times:
        if killed(chance.uniform(0.3, 2.5), pipeline, images, folder):
            assert equal(folder, whole)
            folder, reached = tmp_path / f"run{kills}", 0
            continue
        kills += 1
        tidy(folder)
        found = find_checkpoints(folder)
        for checkpoint in found:
            assert weights(checkpoint / "unet") and weights(checkpoint / "ema/unet")
        step = Progress.load(found[-1]).step if found else 0
        assert step >= reached
        reached = step
    train(pipeline, images, folder, **RUN, resume_from_checkpoint="latest")
    assert equal(folder, whole)


def equal(folder, whole):
    """Weights, log and pictures, of two runs that are done."""
    assert same(weights(folder / "unet"), weights(whole / "unet")) and metrics(folder) == metrics(whole)
    pictures = [(run / "samples/before_after.png").read_bytes() for run in (folder, whole)]
    return pictures[0] == pictures[1]


def test_killed_three_times(sd_pipeline, image_folder, tmp_path):
    kill_and_resume(3, sd_pipeline, image_folder, tmp_path)


@pytest.mark.slow
def test_killed_a_hundred_times(sd_pipeline, image_folder, tmp_path):
    """Or as often as KILLS says."""
    kill_and_resume(int(os.environ.get("KILLS", "100")), sd_pipeline, image_folder, tmp_path)


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        checkpoint_path(tmp_path, step).mkdir()
        Progress(step, seed=0).save(checkpoint_path(tmp_path, step))
    return tmp_path


def test_one_that_was_whole_but_not_in_place_is_put_there(folder):
    hidden = folder / f".checkpoint-3{files.UNFINISHED}"
    hidden.mkdir()
    Progress(3, seed=0).save(hidden)
    assert find_resumable(str(folder), "latest").name == "checkpoint-2"
    tidy(folder)
    assert find_resumable(str(folder), "latest").name == "checkpoint-3" and not unfinished(folder)


def test_what_is_half_written_or_half_deleted_goes(folder):
    for ending in (files.UNFINISHED, files.REMOVED):
        (folder / f".checkpoint-3{ending}/unet").mkdir(parents=True)
    Progress(3, seed=0).save(folder / f".checkpoint-3{files.REMOVED}")
    tidy(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_what_a_killed_write_leaves_goes(folder):
    """A kill cannot be caught: the file beside the one that was to be written stays."""
    for place_of in (folder, checkpoint_path(folder, 2), folder / "samples"):
        place_of.mkdir(exist_ok=True)
        (place_of / ".progress.json.4711.tmp").write_text("half")
    (folder / ".mine.tmp").write_text("not ours")
    (folder / "checkpoint-2/a.1.tmp").write_text("not ours")
    tidy(folder)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tmp"))
    assert left == [".mine.tmp", "checkpoint-2/a.1.tmp"] and names_of(folder) == ["checkpoint-1", "checkpoint-2"]


def names_of(folder):
    return [path.name for path in find_checkpoints(folder)]


def test_one_whose_last_file_is_empty_is_not_put_in_place(folder):
    hidden = folder / f".checkpoint-3{files.UNFINISHED}"
    hidden.mkdir()
    (hidden / layout.PROGRESS).write_text("")
    tidy(folder)
    assert names_of(folder) == ["checkpoint-1", "checkpoint-2"] and not hidden.exists()


def test_a_checkpoint_without_its_last_file_is_passed_over(folder, caplog):
    (checkpoint_path(folder, 2) / layout.PROGRESS).unlink()
    assert find_resumable(str(folder), "latest").name == "checkpoint-1"
    assert "checkpoint-2 is not a whole checkpoint" in caplog.text


@pytest.mark.parametrize("moment", range(6))
def test_a_result_is_replaced_whole_or_not_at_all(moment, tmp_path, monkeypatch):
    """Killed at any of its renames: after tidying up all parts are old, or all are new, and nothing else is there."""

    def result(folder, text):
        (folder / "unet").mkdir()
        (folder / "unet/weights").write_text(text)
        (folder / "model_index.json").write_text(text)

    result(tmp_path, "old")
    rename, left = type(tmp_path).rename, iter(range(moment))

    def killed(self, target):
        if next(left, None) is None:
            raise SystemExit
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(type(tmp_path), "rename", killed)
        with files.filled_whole(tmp_path) as folder:
            result(folder, "new")
    tidy(tmp_path)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(("unet/weights", "model_index.json"), "new" if moment else "old")
