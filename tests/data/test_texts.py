"""The index of text files: what was read once is not read again, and no change of a file goes unnoticed."""

import os
import random
import shutil
import time

import pytest
from trainer import settings

from lpl.data import index, texts
from lpl.data.texts import contents_of
from tests.data.test_dataset import load_data
from tests.data.test_folder import also, images


TICK = 0.02  # seconds, more than one of the kernel's clock, which stamps files


@pytest.fixture
def reads(monkeypatch):
    """Files whose bytes are read, in order; every folder has an index, and a file is old after no time at all."""
    found = []
    read = texts._content
    monkeypatch.setattr(texts, "_content", lambda file: found.append(file) or read(file))
    monkeypatch.setattr(texts, "WORTH", 0)
    monkeypatch.setattr(index, "RACY", -(10**12))
    return found


@pytest.fixture
def folder(tmp_path):
    return also(tmp_path / "data", {f"{name}.txt": f"caption {name}" for name in "abc"})


def read(folder, cache):
    files = sorted(map(str, folder.rglob("*.txt")))
    return dict(zip([os.path.relpath(file, folder) for file in files], contents_of(files, str(folder), cache)))


def test_files_are_read_once(folder, tmp_path, reads):
    first = read(folder, tmp_path / "cache")
    assert first == {f"{name}.txt": f"caption {name}".encode() for name in "abc"} and len(reads) == 3
    assert read(folder, tmp_path / "cache") == first and len(reads) == 3


def test_what_has_changed_is_read_again(folder, tmp_path, reads):
    """Also a file of the old size and the old time, and a new file under an old name."""
    read(folder, tmp_path / "cache")
    reads.clear()
    time.sleep(TICK)
    before = os.stat(folder / "a.txt")
    (folder / "a.txt").write_text("Caption A")
    os.utime(folder / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "c.txt").unlink()
    also(folder, {"d.txt": "caption d", "sub/a.txt": "below"})
    os.replace(folder / "d.txt", folder / "b.txt")
    found = read(folder, tmp_path / "cache")
    assert found == {"a.txt": b"Caption A", "b.txt": b"caption d", "sub/a.txt": b"below"}
    assert [os.path.relpath(file, folder) for file in reads] == ["a.txt", "b.txt", "sub/a.txt"]


def test_a_file_that_has_just_changed_is_not_kept(folder, tmp_path, reads, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(texts, "WORTH", 0)
    read(folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_read_is_not_kept(folder, tmp_path, reads):
    also(folder, {"large.txt": "x" * (texts.LARGEST + 1)})
    (folder / "dead.txt").symlink_to(tmp_path / "gone")
    for _ in range(2):
        found = read(folder, tmp_path / "cache")
        assert isinstance(found["dead.txt"], FileNotFoundError) and len(found["large.txt"]) == texts.LARGEST + 1
    assert [os.path.basename(file) for file in reads[-2:]] == ["dead.txt", "large.txt"] and len(reads) == 7


@pytest.mark.parametrize("harm", ["cut", "emptied", "a folder"])
def test_a_broken_index_is_made_again(harm, folder, tmp_path, reads):
    first = read(folder, tmp_path / "cache")
    (index,) = (tmp_path / "cache").iterdir()
    content = index.read_bytes()
    index.unlink()
    if harm == "a folder":
        index.mkdir()
    else:
        index.write_bytes(content[:-9] if harm == "cut" else b"")
    assert read(folder, tmp_path / "cache") == first and len(reads) == 6
    assert read(folder, tmp_path / "cache") == first and len(reads) == (9 if harm == "a folder" else 6)


def test_no_flipped_bit_changes_a_caption(folder, tmp_path, reads):
    first = read(folder, tmp_path / "cache")
    (index,) = (tmp_path / "cache").iterdir()
    content = index.read_bytes()
    for place in range(0, len(content), 41):
        index.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert read(folder, tmp_path / "cache") == first


def test_two_folders_do_not_share_an_index(folder, tmp_path, reads):
    other = shutil.copytree(folder, tmp_path / "other")
    also(other, {"a.txt": "another a"})
    read(folder, tmp_path / "cache")
    assert read(other, tmp_path / "cache")["a.txt"] == b"another a"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_thousand_random_edits_give_no_stale_caption(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(index, "RACY", TICK * 1e9)
    draw, folder = random.Random(0), also(tmp_path / "data", {f"{n}.txt": str(n) for n in range(30)})
    for edit in range(100):
        for _ in range(10):
            file, other = folder / f"{draw.randrange(40)}.txt", folder / f"{draw.randrange(40)}.txt"
            what = draw.choice(["write", "write in place", "delete", "move", "keep the time", "touch"])
            if what == "write" or not file.exists():
                file.write_text(f"edit {edit}")
            elif what == "write in place":
                with file.open("r+") as opened:
                    opened.write(str(draw.randrange(10)))
            elif what == "delete":
                file.unlink()
            elif what == "move":
                os.replace(file, other)
            elif what == "keep the time":
                state = os.stat(file)
                file.write_bytes(file.read_bytes()[::-1])
                os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
            else:
                os.utime(file)
        assert read(folder, tmp_path / "cache") == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_training_takes_captions_from_the_index(tmp_path, reads):
    folder = also(images(tmp_path / "data", "a.png", "b.png"), {"a.txt": "one\ncaption", "b.txt": "another"})
    config = settings(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        assert list(load_data(config)[0]["text"]) == ["one caption", "another"]
    assert len(reads) == 2
