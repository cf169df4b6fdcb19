"""Uploads in order, tried again whatever fails, against a Hub that does as it is told."""

import shutil
import threading

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lpl.config.groups import Output
from lpl.publishing import hub as hub_module
from lpl.publishing import uploads as uploads_module
from lpl.publishing.uploads import Snapshot, Uploads
from lpl.tools import layout
from tests.publishing.test_publication import write


def test_a_later_snapshot_takes_in_an_earlier_one(tmp_path):
    earlier = write(tmp_path / "a", unet__w_st="old", vae__w_st="vae", **{"last-checkpoint/old-random": "old"})
    later = write(tmp_path / "b", unet__w_st="new", **{"last-checkpoint/state": "new"})
    Snapshot(later, "b").take_in(Snapshot(earlier, "a"))
    assert not earlier.exists()
    assert {str(p.relative_to(later)): p.read_text() for p in later.rglob("*") if p.is_file()} == {
        "unet/w.safetensors": "new", "vae/w.safetensors": "vae", "last-checkpoint/state": "new",
    }  # fmt: skip


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("POST", "http://hub/api")
    return HfHubHTTPError(f"{status} said", response=httpx2.Response(status, headers=headers, request=request))


class FakeHub:
    """Takes commits, or raises what it is told to, one after the other; can be made to wait."""

    def __init__(self):
        self.commits, self.errors, self.open = [], [], threading.Event()
        self.open.set()
        self.asked = threading.Semaphore(0)

    def push(self, folder, repo_id, token, revision, message, replaced):
        self.asked.release()
        assert self.open.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        self.commits.append((message, {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}))
        return "http://hub/user/fox"


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub_module, "push", fake.push)
    monkeypatch.setattr(uploads_module, "FIRST_WAIT", 0.01)
    return fake


@pytest.fixture
def uploads(fake, tmp_path):
    return Uploads(Output(output_dir=str(tmp_path)), "user/fox")


def add(uploads, number):
    folder = write(uploads.new(number), **{f"{number}.txt": "x"})
    uploads.add(Snapshot(folder, f"Step {number}"))


def done(uploads, seconds=20):
    return uploads.finish(lambda: False, seconds)


def test_commits_keep_their_order(uploads, fake, tmp_path):
    for number in range(3):
        add(uploads, number)
        assert fake.asked.acquire(timeout=10)
    assert done(uploads)
    assert [message for message, _ in fake.commits] == ["Step 0", "Step 1", "Step 2"]
    assert not (tmp_path / layout.UPLOADS).exists()


def test_a_slow_hub_holds_up_nothing_and_misses_nothing(uploads, fake):
    fake.open.clear()
    add(uploads, 0)
    assert fake.asked.acquire(timeout=10)
    for number in (1, 2, 3):  # at once, while the first is on its way
        add(uploads, number)
    fake.open.set()
    assert done(uploads)
    assert fake.commits == [("Step 0", {"0.txt"}), ("Step 3", {"1.txt", "2.txt", "3.txt"})]


FAULTS = [answer(500), answer(503), answer(429, **{"Retry-After": "0"}), answer(409), answer(412),
          answer(403), httpx2.ReadError("the connection was deleted"), OSError("no network")]  # fmt: skip


def test_whatever_fails_is_tried_again_with_what_has_come_meanwhile(uploads, fake, caplog, monkeypatch):
    monkeypatch.setattr(hub_module, "pause", lambda error, wait: 0.01)
    fake.errors = list(FAULTS)
    for number in range(3):
        add(uploads, number)
    while fake.errors:
        assert fake.asked.acquire(timeout=10)
    assert done(uploads)
    assert set().union(*(files for _, files in fake.commits)) == {"0.txt", "1.txt", "2.txt"}
    assert fake.commits[-1][0] == "Step 2" and "tried again" in caplog.text


def test_a_hub_that_is_gone_is_asked_a_few_times_more_and_the_command_is_named(uploads, fake, caplog, tmp_path):
    fake.errors = [answer(403) for _ in range(100)]
    add(uploads, 0)
    assert fake.asked.acquire(timeout=10)
    before = len(fake.errors)
    assert not done(uploads)
    assert before - len(fake.errors) <= uploads_module.LAST_TRIES + 1
    assert f"python -m lpl.publish {tmp_path} --hub_model_id user/fox" in caplog.text and "403" in caplog.text


def test_the_hubs_wish_is_granted():
    assert hub_module.pause(answer(429, **{"Retry-After": "7"}), 2) == 7
    assert hub_module.pause(answer(429, **{"Retry-After": "86400"}), 2) == hub_module.LONGEST_WAIT
    assert hub_module.pause(answer(503), 2) == 2 and hub_module.pause(OSError(), 2**20) == hub_module.LONGEST_WAIT
    assert hub_module.pause(answer(429, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), 2) == 2
    of_a_file = RuntimeError("of a file")
    of_a_file.__cause__ = answer(429, **{"Retry-After": "5"})
    assert hub_module.pause(of_a_file, 2) == 5 and not hub_module.is_refused(of_a_file)
    assert hub_module.is_refused(answer(403)) and not hub_module.is_refused(OSError())


class OfTheMachinery(BaseException):
    """As the client's Rust parts raise."""


def test_whatever_is_raised_nobody_waits_for_ever(uploads, fake, caplog):
    fake.errors = [OfTheMachinery("panic")]
    add(uploads, 0)
    assert fake.asked.acquire(timeout=10)
    assert not done(uploads) and "panic" in caplog.text


def test_a_folder_that_cannot_be_removed_is_no_failed_upload(uploads, fake, monkeypatch):
    remove = shutil.rmtree

    def in_use(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("a file in it is open")
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", in_use)
    for number in range(3):
        add(uploads, number)
    assert done(uploads) and fake.commits[-1][0] == "Step 2"


def test_states_that_are_dropped_here_are_not_kept_for_a_hub_that_is_away(uploads, fake, tmp_path, caplog):
    fake.open.clear()
    add(uploads, 0)
    assert fake.asked.acquire(timeout=10)
    for number in (1, 2, 3):
        folder = write(uploads.new(number), **{f"checkpoint-{number}/w": "x"})
        write(tmp_path, **{f"checkpoint-{number}/w": "x"})
        uploads.add(Snapshot(folder, f"Step {number}"))
        if number == 1:
            shutil.rmtree(tmp_path / "checkpoint-1")
    fake.open.set()
    assert done(uploads)
    assert fake.commits[-1] == ("Step 3", {"checkpoint-2/w", "checkpoint-3/w"})
    assert "checkpoint-1 was deleted before" in caplog.text


def test_there_is_a_limit_to_waiting(uploads, fake, caplog):
    fake.open.clear()
    add(uploads, 0)
    assert not done(uploads, 0.3)
    assert "there was no time" in caplog.text
    fake.open.set()


def test_what_a_killed_run_left_is_removed(fake, tmp_path):
    write(tmp_path, **{f"{layout.UPLOADS}/0/x": "x"})
    Uploads(Output(output_dir=str(tmp_path)), "user/fox")
    assert not (tmp_path / layout.UPLOADS).exists()
