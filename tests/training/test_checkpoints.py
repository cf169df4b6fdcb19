"""Checkpoints: whole or not there, in diffusers' layout, the newest ones kept, found again by name and by `latest`."""

import errno
import json
import os
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator, debug_launcher
from diffusers import UNet2DConditionModel
from trainer import arguments, metrics, run, same, train, unfinished, weights

from lpl.evaluation.sources import find_models
from lpl.tools import files, layout
from lpl.tools.files import load_state
from lpl.training import checkpoints
from lpl.training.checkpoints import (
    Progress,
    check_recipe,
    find_checkpoints,
    find_resumable,
    save_checkpoint,
    set_aside,
)
from tests.training.conftest import nothing


@pytest.fixture(scope="module")
def trained(sd_pipeline, image_folder, tmp_path_factory):
    """Four steps with EMA, a checkpoint after each, two of them kept."""
    return train(
        sd_pipeline,
        image_folder,
        tmp_path_factory.mktemp("trained"),
        lpl_weight=0,
        max_train_steps=4,
        use_ema=True,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        seed=3,
    )


def folders(place, *names):
    for name in names:
        (place / name).mkdir(parents=True)
        Progress(step=1, seed=0).save(place / name)
    return place


def names(output_dir):
    return [path.name for path in find_checkpoints(output_dir)]


def test_the_oldest_checkpoints_above_the_limit_are_dropped(trained):
    assert names(trained) == ["checkpoint-3", "checkpoint-4"]
    assert not unfinished(trained)


def test_a_checkpoint_has_diffusers_layout(trained):
    checkpoint = trained / "checkpoint-4"
    unet, ema = (UNet2DConditionModel.from_pretrained(checkpoint / name) for name in ("unet", "ema/unet"))
    assert json.loads((checkpoint / "ema.json").read_text()) == {"optimization_step": 4}
    assert not all(torch.equal(a, b) for a, b in zip(unet.parameters(), ema.parameters()))
    files = {path.name for path in checkpoint.iterdir()}  # the weights are there once, and nothing is pickled
    assert files == {"unet", "ema", "ema.json", "state.safetensors", "random-0.safetensors", "progress.json"}
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert {name: progress[name] for name in ("step", "seed", "looked")} == {"step": 4, "seed": 3, "looked": True}


def test_the_pipeline_gets_the_averaged_weights(trained):
    assert same(weights(trained / "unet"), weights(trained / "checkpoint-4" / "ema" / "unet"))
    assert not same(weights(trained / "unet"), weights(trained / "checkpoint-4" / "unet"))


def test_latest_is_the_highest_number_and_never_an_unfinished_one(tmp_path):
    folders(tmp_path, "checkpoint-9", "checkpoint-10", ".checkpoint-11.unfinished", "checkpoint-best", "checkpoint-")
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]
    assert find_resumable(str(tmp_path), "latest") == tmp_path / "checkpoint-10"


def test_latest_without_a_checkpoint_starts_afresh(tmp_path, caplog):
    assert find_resumable(str(tmp_path), "latest") is None and "starts afresh" in caplog.text
    assert find_resumable(str(tmp_path / "not there"), "latest") is None
    assert find_resumable(str(folders(tmp_path, "checkpoint-1")), None) is None


def test_a_checkpoint_is_found_by_its_name_or_path(tmp_path):
    folders(tmp_path / "run", "checkpoint-5")
    for name in ("checkpoint-5", str(tmp_path / "run" / "checkpoint-5")):
        assert find_resumable(str(tmp_path / "run"), name) == tmp_path / "run" / "checkpoint-5"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("checkpoint-4", "checkpoint-5", str(tmp_path)):
        with pytest.raises(ValueError) as error:
            find_resumable(str(tmp_path), name)
        assert "--resume_from_checkpoint" in str(error.value) and name in str(error.value)


def test_an_interrupted_save_leaves_no_checkpoint(state, tmp_path, monkeypatch):
    def interrupted(folder, random, updates):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "save", interrupted)
        save_checkpoint(state, str(tmp_path), Progress(1, 0), None)
    assert find_checkpoints(tmp_path) == []
    place = save_checkpoint(state, str(tmp_path), Progress(1, 0), None)
    assert find_checkpoints(tmp_path) == [place] and not (place / "half").exists()


def test_saving_again_replaces_a_checkpoint(state, tmp_path):
    for seed in (0, 1):
        place = save_checkpoint(state, str(tmp_path), Progress(7, seed), 1)
    assert names(tmp_path) == ["checkpoint-7"] and Progress.load(place) == Progress(7, 1)


def test_what_was_just_saved_outlives_an_earlier_runs_checkpoints(state, tmp_path):
    folders(tmp_path, "checkpoint-9")
    assert save_checkpoint(state, str(tmp_path), Progress(1, 0), 1).is_dir()
    assert names(tmp_path) == ["checkpoint-1"]


# Of an earlier run


def test_checkpoints_beyond_the_beginning_are_set_aside(tmp_path, caplog):
    folders(tmp_path, "checkpoint-3", "checkpoint-5", "checkpoint-10", "earlier-checkpoint-10")
    (tmp_path / "checkpoint-10/own").write_text("")
    set_aside(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-3"] and (tmp_path / "earlier-checkpoint-10-2/own").is_file()
    assert "checkpoint-5 to earlier-checkpoint-5, checkpoint-10 to earlier-checkpoint-10-2" in caplog.text
    found = find_resumable(str(tmp_path), "earlier-checkpoint-5")
    assert found == tmp_path / "earlier-checkpoint-5" and Progress.load(found).step == 1
    caplog.clear()
    set_aside(tmp_path, 3)
    assert not caplog.records and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "flags, left",
    [
        ({"max_train_steps": 2}, [1, 2]),
        ({"max_train_steps": 3, "resume_from_checkpoint": "checkpoint-3", "use_ema": True}, [3]),
        ({"max_train_steps": 2, "dry_run": True}, [3, 4]),
    ],
)
def test_a_run_has_its_own_checkpoints(flags, left, trained, sd_pipeline, image_folder, tmp_path):
    """Neither are its own dropped for those of an earlier one, nor are these its latest."""
    folder = shutil.copytree(trained, tmp_path / "run")
    flags |= {"lpl_weight": 0, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "seed": 3}
    train(sd_pipeline, image_folder, folder, **flags)
    assert names(folder) == [f"checkpoint-{step}" for step in left]
    aside = sorted(path.name for path in folder.glob("earlier-checkpoint-*"))
    assert aside == [f"earlier-checkpoint-{step}" for step in (3, 4) if step not in left]
    if not flags.get("dry_run"):
        assert [model.step for model in find_models(str(folder))] == left


# Whole, on the disk too


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


DAMAGES = {
    "empty place": lambda folder: (folder / "progress.json").write_text(""),
    "another place": lambda folder: (folder / "progress.json").write_text("[1]"),
    "state cut off": lambda folder: cut(folder / "state.safetensors"),
    "state empty": lambda folder: (folder / "state.safetensors").write_text(""),
    "weights cut off": lambda folder: cut(next((folder / "ema/unet").glob("*.safetensors"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(damage, trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "run")
    DAMAGES[damage](folder / "checkpoint-4")
    assert find_resumable(str(folder), "latest") == folder / "checkpoint-3"
    assert "checkpoint-4 is not a whole checkpoint and is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-4 is no whole checkpoint; .*whole ones in .*: checkpoint-3"):
        find_resumable(str(folder), "checkpoint-4")


@pytest.mark.parametrize("text", [None, "no tensors"])
def test_what_cannot_be_loaded_is_one_sentence(text, trained, sd_pipeline, image_folder, tmp_path, monkeypatch):
    """A file that is gone, or that only its loading finds to be broken."""
    folder = shutil.copytree(trained, tmp_path / "run")
    state = folder / "checkpoint-4/state.safetensors"
    state.unlink()
    if text:
        state.write_text(text)
        monkeypatch.setattr(checkpoints, "is_whole", lambda folder: True)
    flags = {"use_ema": True, "lpl_weight": 0, "seed": 3, "resume_from_checkpoint": "checkpoint-4"}
    with pytest.raises(SystemExit, match="error: --resume_from_checkpoint checkpoint-4: ") as end:
        train(sd_pipeline, image_folder, folder, **flags)
    assert "\n" not in end.value.code


@pytest.mark.parametrize("text", ["seed: [3", "- seed", "seed: 3\nseed: 4", ""])
def test_a_damaged_recipe_is_one_sentence(text, trained, sd_pipeline, image_folder, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "recipe.yaml").write_text(text)
    flags = {"use_ema": True, "lpl_weight": 0, "seed": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit, match="--resume_from_checkpoint checkpoint-4: .*recipe.yaml cannot be read") as end:
        train(sd_pipeline, image_folder, folder, **flags)
    assert "\n" not in end.value.code


def test_the_disk_holds_a_checkpoint_before_an_old_one_goes(state, tmp_path, monkeypatch):
    old, events = save_checkpoint(state, str(tmp_path), Progress(1, 0), 1), []
    fsync, delete = os.fsync, files._delete

    def synced(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def deleted(path):
        if path.exists():
            events.append(path.name)
        delete(path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(files, "_delete", deleted)
    new = save_checkpoint(state, str(tmp_path), Progress(2, 0), 1)
    assert not old.exists() and events[-1] == f".{old.name}{files.REMOVED}"
    rest = [path.stat().st_ino for path in new.iterdir()]
    assert {*rest, new.stat().st_ino} <= set(events)
    place = max(where for where, event in enumerate(events) if event == (new / layout.PROGRESS).stat().st_ino)
    assert new.stat().st_ino in events[place:] and tmp_path.stat().st_ino in events[place:]


def full_in_the_second_process(folder):
    """Of two processes, each with a random state of its own."""
    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    if not accelerator.is_main_process:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        for owner, name in ((checkpoints, "save_state"), (files, "save_file"), (type(folder), "mkdir")):
            setattr(owner, name, full)
    save_checkpoint(nothing(accelerator), str(folder), Progress(1, 0), None)


def test_only_the_main_process_writes(cpu, tmp_path):
    """Another one may have no room, or another disk; what it draws from is saved and is its own."""
    debug_launcher(full_in_the_second_process, args=(tmp_path,), num_processes=2)
    for process in (0, 1):
        expected = torch.Generator().manual_seed(process).get_state()
        assert torch.equal(load_state(tmp_path / f"checkpoint-1/random-{process}.safetensors")["cpu"], expected)


def test_another_seed_is_refused_on_resume(trained, sd_pipeline, image_folder, capsys):
    words = arguments(
        sd_pipeline, image_folder, trained, lpl_weight=0, max_train_steps=5, resume_from_checkpoint="latest", seed=4
    )
    with pytest.raises(SystemExit) as error:
        run(words)
    assert "--seed 4" in str(error.value.code) and "3" in str(error.value.code)


def test_ema_can_be_switched_on_at_a_resume(sd_pipeline, image_folder, tmp_path):
    plain = {"lpl_weight": 0, "checkpointing_steps": 1}
    train(sd_pipeline, image_folder, tmp_path, **plain, max_train_steps=1)
    train(sd_pipeline, image_folder, tmp_path, **plain, use_ema=True, resume_from_checkpoint="latest")
    assert len(metrics(tmp_path)) == 2
    averaged, last = (weights(tmp_path / "checkpoint-2" / name) for name in ("ema/unet", "unet"))
    assert all(torch.allclose(averaged[name], last[name], atol=1e-6) for name in last)  # its first step copies them


def test_a_restored_ema_goes_on_where_it_was(trained, sd_pipeline, image_folder, tmp_path):
    resumed = shutil.copytree(trained, tmp_path / "run")
    flags = {"lpl_weight": 0, "use_ema": True, "resume_from_checkpoint": "latest", "seed": 3, "max_train_steps": 5}
    train(sd_pipeline, image_folder, resumed, **flags, checkpointing_steps=5)
    assert json.loads((resumed / "checkpoint-5" / "ema.json").read_text())["optimization_step"] == 5


def test_a_changed_recipe_is_named(trained, sd_pipeline, image_folder, caplog):
    """Changes that move numbers are said, those that do not are not; what cannot go on is refused."""
    flags = {"use_ema": True, "seed": 3, "resume_from_checkpoint": "checkpoint-4", "max_train_steps": 4}
    changed = {"learning_rate": 2e-3, "lpl_weight": "auto:0.3", "logging_steps": 7, "checkpointing_steps": 9}
    before = (trained / "recipe.yaml").read_text()
    with caplog.at_level("WARNING"):
        train(sd_pipeline, image_folder, trained, **flags, **changed)
    said = " ".join(record.getMessage() for record in caplog.records if "the run to resume has" in record.getMessage())
    assert "--learning_rate 0.002: the run to resume has 0.001" in said and "--lpl_weight auto:0.3" in said
    assert "logging" not in said and "checkpointing" not in said and "max_train" not in said
    (trained / "recipe.yaml").write_text(before)
    with pytest.raises(SystemExit, match="--prediction_type sample: the run to resume has epsilon"):
        train(sd_pipeline, image_folder, trained, **flags, lpl_weight=0, prediction_type="sample")


def said_of(caplog, folder, measured=None, processes=1, **changes):
    """What a resume says of a run of two processes on a cosine schedule, with these changes."""
    flags = {"lr_scheduler": "cosine", "max_train_steps": 100, "num_train_epochs": 1}
    flags |= {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(flags | {"measured": measured}))
    caplog.clear()
    check_recipe(folder / "checkpoint-1", flags | changes, processes)
    return caplog.text


def test_another_length_is_named_where_the_schedule_depends_on_it(tmp_path, caplog):
    for name in ("max_train_steps", "num_train_epochs"):
        assert f"--{name} 7: the run to resume has" in said_of(caplog, tmp_path, **{name: 7})
        for schedule in ("constant", "constant_with_warmup"):
            assert name not in said_of(caplog, tmp_path, lr_scheduler=schedule, **{name: 7})


def test_a_refused_value_is_named_as_it_was_given(tmp_path):
    with pytest.raises(ValueError, match="--optimizer torch.optim:Adafactor: the run to resume has AdamW,"):
        resumed = {"optimizer": "torch.optim:Adafactor", "use_8bit_adam": False}
        (tmp_path / "recipe.yaml").write_text("optimizer: AdamW\nuse_8bit_adam: false\n")
        check_recipe(tmp_path / "checkpoint-1", resumed, 1)
    with pytest.raises(ValueError, match="--use_8bit_adam true: the run to resume has false,"):
        check_recipe(tmp_path / "checkpoint-1", {"optimizer": "AdamW", "use_8bit_adam": True}, 1)


def test_another_number_of_processes_is_named(tmp_path, caplog):
    measured = {"num_processes": 2, "global_batch": 8}
    assert said_of(caplog, tmp_path, measured, processes=2) == said_of(caplog, tmp_path) == ""
    said = said_of(caplog, tmp_path, measured, processes=1)
    assert "this run has 1 process and the run to resume had 2" in said and "dropout's random state start anew" in said
    assert "a step takes 4 images now and took 8 in the run to resume" in said and "data shifts" in said
    said = said_of(caplog, tmp_path, measured, processes=1, gradient_accumulation_steps=2)
    assert "this run has 1 process and" in said and "data shifts" not in said
