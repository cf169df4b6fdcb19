"""Tensors by key on disk: whole or absent, whatever happens to files, disks and processes."""

import errno
import os
import pickle
import signal
import time
from itertools import combinations

import pytest
import torch

from lpl.data import store as module
from lpl.data.store import Store, key_of


def entry(number):
    return {"mean": torch.full((2, 3), float(number)), "std": torch.full((3,), number, dtype=torch.bfloat16)}


def entries(*numbers):
    return {key_of(number): entry(number) for number in numbers}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def folder(tmp_path):
    """A folder with two shards, whose entries are 0 to 2, and 3."""
    store = Store(tmp_path / "store")
    store.write(entries(0, 1, 2))
    store.write(entries(3))
    return store.folder


def test_entries_come_back_as_they_were_written(folder):
    store = Store(folder)
    for number in range(4):
        assert key_of(number) in store and same(store[key_of(number)], entry(number))
    assert key_of(4) not in store
    with pytest.raises(KeyError):
        store[key_of(4)]


def test_nothing_is_made_before_something_is_written(tmp_path):
    assert key_of(0) not in Store(tmp_path / "store") and not (tmp_path / "store").exists()


def test_another_process_finds_it(folder):
    store = Store(folder)
    assert same(store[key_of(0)], entry(0))  # with open files
    assert same(pickle.loads(pickle.dumps(store))[key_of(3)], entry(3))


def test_what_others_have_written_is_there_after_a_refresh(folder):
    first, second = Store(folder), Store(folder)
    first.write(entries(4, 5))
    second.write(entries(5, 6))  # the same entry, in another shard
    for store in (first, second):
        store.refresh()
        assert all(same(store[key_of(number)], entry(number)) for number in range(7))
    assert all(same(Store(folder)[key_of(number)], entry(number)) for number in range(7))


def test_two_that_write_the_same_leave_one_shard(folder):
    stores, shards = [Store(folder), Store(folder)], len(os.listdir(folder))
    for store in stores:
        store.write(entries(7, 8))
    assert len(os.listdir(folder)) == shards + 1 and same(stores[0][key_of(7)], entry(7))


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "empty", "long", "no JSON", "length", "wrong offsets"])
def test_a_damaged_shard_is_not_used(damage, folder, caplog):
    shard = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    content = shard.read_bytes()
    changed = {
        "cut": content[:-1],
        "cut in the header": content[:40],
        "empty": b"",
        "long": content + b"\0",
        "no JSON": content[:8] + b"x" + content[9:],
        "length": b"\xff" * 8 + content[8:],
        "wrong offsets": content.replace(b"[0,", b"[1,", 1),
    }[damage]
    assert changed != content
    shard.write_bytes(changed)
    store = Store(folder)
    assert [key_of(number) in store for number in range(4)] == [False, False, False, True]
    assert f"{shard} is damaged and not used" in caplog.text
    other = Store(folder)  # another process, which has seen it damaged too
    store.write(entries(0, 1, 2))  # under the same name
    other.refresh()
    assert all(same(other[key_of(number)], entry(number)) for number in range(4))
    assert all(same(Store(folder)[key_of(number)], entry(number)) for number in range(4))


def test_a_shard_that_disappears_is_said(folder):
    store = Store(folder)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="has disappeared or been damaged .*makes what is missing anew"):
        store[key_of(0)]


def test_a_full_disk_leaves_no_half_shard(folder, monkeypatch):
    store, before = Store(folder), sorted(os.listdir(folder))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ValueError, match="--data_cache_dir: .* cannot be written to .*No space left.*make room"):
        store.write(entries(9))
    assert key_of(9) not in store and sorted(os.listdir(folder)) == before


def test_a_write_that_is_killed_leaves_nothing_to_read(folder):
    child = os.fork()
    if child == 0:
        for number in range(10, 10**6):
            Store(folder).write({key_of(number): {"mean": torch.full((2**16,), float(number))}})
        os._exit(0)
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    store = Store(folder)
    for number in range(10, 1000):
        if key_of(number) in store:
            assert torch.equal(store[key_of(number)]["mean"], torch.full((2**16,), float(number)))


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN", 2)
    store = Store(tmp_path)
    for number in range(5):
        store.write(entries(number))
    for number in (0, 4, 2, 1, 0, 3):
        assert same(store[key_of(number)], entry(number))
    assert store._opened.cache_info().currsize == 2


def test_keys_of_different_parts_differ():
    """Also of parts that read alike when they are joined."""
    parts = [
        *(("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("ab", ["c"]), (["ab", "c"],), ('ab", "c',), ("ab,c",)),
        *((1, 23), (12, 3), ("1", 23), (1.0, 23), ([1], 23), ([1, 23],), (True, 23), (None, 23), ("", 1, 23)),
        *((), ("",), ("", ""), ([],), ([], []), ({},), (0,), (False,), ("é",), ("e\u0301",), ("\ud800",)),
    ]
    assert all(key_of(*first) != key_of(*second) for first, second in combinations(parts, 2))
    assert key_of("a", (1, 2)) == key_of("a", [1, 2])
