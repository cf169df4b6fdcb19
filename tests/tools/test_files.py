"""Files are written atomically and durably, and states come back as they were."""

import os
import stat

import pytest
import torch
from trainer import held_by_another

from lpl.tools import files
from lpl.tools.files import (
    READY,
    entries,
    filled_whole,
    lines,
    load_state,
    put_back,
    remove_halves,
    removed,
    save_state,
    settle,
    visible_files,
    write_text,
    write_whole,
)
from lpl.tools.layout import INDEX


class Killed(BaseException):
    """Nothing after it is run, not even a handler of exceptions."""


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# Files


def test_a_file_is_written_with_its_folder(tmp_path):
    path = write_text(tmp_path / "deep" / "a.txt", "Füchse\n")
    assert path.read_bytes() == "Füchse\n".encode() and names(tmp_path) == ["deep", "deep/a.txt"]


def test_half_a_file_is_never_seen(tmp_path):
    path = write_text(tmp_path / "a.txt", "before")

    def half(unfinished):
        unfinished.write_text("aft")
        assert path.read_text() == "before"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_whole(path, half)
    assert path.read_text() == "before" and names(tmp_path) == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("replaced") or replace(*paths))
    path = write_text(tmp_path / "a.txt", "text")
    assert events == [path.stat().st_ino, "replaced", tmp_path.stat().st_ino]


def test_a_whole_folder_is_flushed(tmp_path, monkeypatch):
    write_text(tmp_path / "deep" / "a.txt", "text")
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(os.fstat(number).st_ino))
    settle(tmp_path)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} == set(flushed)


def test_a_file_that_is_somebody_elses_too_keeps_its_permissions(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "folder" / "ours"
    for path in (theirs, tmp_path / "folder" / "new"):
        write_text(path, "text").chmod(0o400)
    os.link(theirs, ours)
    settle(tmp_path / "folder")
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o400
    assert stat.S_IMODE((tmp_path / "folder/new").stat().st_mode) != 0o400


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    for name in (".a.txt.123.tmp", "samples/.b.png.9.tmp", "samples/c.png", ".hidden", "x/y/.d.1.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_halves(tmp_path)
    assert {".hidden", "samples/c.png", "x/y/.d.1.tmp"} == {n for n in names(tmp_path) if (tmp_path / n).is_file()}


def test_a_log_ends_at_the_line_that_a_crash_cut_short(tmp_path):
    written = [{"step": 1, "file": "Füchse"}, {"step": 2}]
    path = tmp_path / "log.jsonl"
    assert entries(path) == []
    path.write_text(lines(written), encoding="utf-8")
    assert entries(path) == written
    path.write_bytes(lines(written).encode() + '{"file": "F\u00fc'.encode()[:-1])
    assert entries(path) == written


def test_hidden_files_are_not_listed(tmp_path):
    for name in ("a.txt", "sub/b.txt", ".tmp", "sub/.tmp", ".hidden/c.txt"):
        write_text(tmp_path / name, "")
    assert [path.as_posix() for path in visible_files(tmp_path, tmp_path)] == ["a.txt", "sub/b.txt"]
    assert [path.as_posix() for path in visible_files(tmp_path, tmp_path / "a.txt")] == ["a.txt"]


# Replacing


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_what_is_replaced_is_deleted_once_its_replacement_is_there(kind, tmp_path):
    path = tmp_path / "a"
    if kind == "file":
        path.write_text("before")
    elif kind == "folder":
        write_text(path / "b", "before")
    with removed(path):
        assert not path.exists()
        path.write_text("after")
    assert path.read_text() == "after" and names(tmp_path) == ["a"]


def test_a_failure_within_leaves_the_old_beside_it(tmp_path):
    path = write_text(tmp_path / "a", "before")
    with pytest.raises(Killed), removed(path):
        raise Killed
    put_back(tmp_path)
    assert path.read_text() == "before" and names(tmp_path) == ["a"]


def fill(folder):
    for name in (INDEX, "unet/weights", "vae/weights"):
        write_text(folder / name, "after")


def test_a_folder_is_filled_entry_by_entry_the_index_last(tmp_path, monkeypatch):
    for name in (INDEX, "unet/weights", "unet/old", "other"):
        write_text(tmp_path / name, "before")
    order = []
    rename = type(tmp_path).rename
    monkeypatch.setattr(
        type(tmp_path), "rename", lambda path, place: order.append((path, place)) or rename(path, place)
    )
    with filled_whole(tmp_path) as unfinished:
        fill(unfinished)
        assert (tmp_path / INDEX).read_text() == "before"
    moved = [place.name for path, place in order if path.parent.name == READY]
    assert set(moved[:2]) == {"unet", "vae"} and moved[2:] == [INDEX]
    expected = ["model_index.json", "other", "unet", "unet/weights", "vae", "vae/weights"]
    assert names(tmp_path) == expected and (tmp_path / "unet/weights").read_text() == "after"


def test_wherever_filling_is_killed_all_entries_are_of_one_result(tmp_path, monkeypatch):
    """Killed at each renaming in turn; after the first one the new result is whole. Nothing else is left."""
    rename, moves = type(tmp_path).rename, 0
    for last in range(8):
        folder = tmp_path / str(last)
        for name in (INDEX, "unet/weights", "vae/weights"):
            write_text(folder / name, "before")
        moves = 0

        def killed(path, place, last=last):
            nonlocal moves
            if moves == last:
                raise Killed
            moves += 1
            return rename(path, place)

        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "rename", killed)
            try:
                with filled_whole(folder) as unfinished:
                    fill(unfinished)
            except Killed:
                pass
        put_back(folder)
        assert names(folder) == ["model_index.json", "unet", "unet/weights", "vae", "vae/weights"]
        found = [(folder / name).read_text() for name in ("unet/weights", "vae/weights", INDEX)]
        assert found == ["after" if last else "before"] * 3


# States


def test_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.arange(3.0)
    state = {
        "step": 3,
        0: {"exp_avg": shared, "nothing": None, "betas": (0.9, 0.999), "on": True},
        "again": [shared, torch.ones(2, 3, dtype=torch.bfloat16).T, "text", 1e-3],
        "empty": {},
    }
    path = save_state(state, tmp_path / "state.safetensors")
    found = load_state(path)
    assert list(found) == list(state) and found["step"] == 3 and found["empty"] == {}
    assert found[0] | {"exp_avg": None} == state[0] | {"exp_avg": None}
    assert torch.equal(found[0]["exp_avg"], shared) and torch.equal(found["again"][1], state["again"][1])
    assert found["again"][0] is found[0]["exp_avg"] and found["again"][2:] == ["text", 1e-3]


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", torch.nn.Linear(1, 1)])
def test_anything_else_is_no_state(value, tmp_path):
    with pytest.raises(TypeError, match=type(value).__name__):
        save_state({"value": value}, tmp_path / "state.safetensors")
    assert not names(tmp_path)


def test_the_module_reads_no_pickle():
    assert not {"pickle", "torch"} & set(vars(files))


def test_a_folder_is_held_by_one_process(tmp_path):
    """Until it ends."""
    with held_by_another(tmp_path / "run"):
        with pytest.raises(ValueError, match="--output_dir run: another run writes to this folder now"):
            files.hold("--output_dir run", tmp_path / "run")
        files.hold("--output_dir run", tmp_path / "other")
    files.hold("--output_dir run", tmp_path / "run")
    files.hold("--output_dir run", tmp_path / "run")
