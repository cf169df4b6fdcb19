"""What is published and when, against a server that speaks the Hub's API; see tests/test_hub.py for its fixture."""

import json
import os
import threading
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lpl.publishing import hub as hub_module
from lpl.publishing import publication
from lpl.publishing.publication import published, snapshot_of_result, take
from lpl.publishing.uploads import Snapshot, Uploads


def write(folder: Path, **files: str) -> Path:
    """Files by their path, with "__" for "/" and "_" before the suffix for "."."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json").replace("_st", ".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


# Snapshots


def test_what_belongs_to_others_and_what_does_not(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    write(tmp_path, model_index_json=json.dumps(index), unet__weights_st="w", unet__config_json="{}")
    for name in ("checkpoint-5/unet/w.safetensors", "logs/x", "wandb/x", "cache/x", "notes.txt", ".uploads/0/x",
                 "samples/.a.png.1.tmp", "unet/.cache/x", "evaluation/images/a.png", "evaluation/evaluation.json",
                 "bad_samples.jsonl", "recipe.yaml"):  # fmt: skip
        write(tmp_path, **{name: "no"})
    wanted = ["README.md", "metrics.jsonl", "loss_curves.png", "samples/before_after.png", "evaluation/spectrum.png"]
    wanted.append("samples/step-000000/00.png")
    for name in wanted:
        write(tmp_path, **{name: "yes"})
    found = {str(path) for path in published(tmp_path)}
    assert found == {"model_index.json", "unet/weights.safetensors", "unet/config.json", *wanted}


def test_a_lora_is_its_files_and_a_new_scheduler(tmp_path):
    names = ["pytorch_lora_weights.safetensors", "transformer_lora/adapter_config.json", "scheduler/config.json"]
    for name in [*names, "README.md"]:
        write(tmp_path, **{name: "{}"})
    assert {str(path) for path in published(tmp_path)} == {*names, "README.md"}


def test_weights_are_links_that_outlive_their_checkpoint_and_the_rest_are_copies(tmp_path):
    write(tmp_path, run__w_st="weights", run__metrics_json="[1]")
    for name in ("w.safetensors", "metrics.json"):
        take(tmp_path / "run" / name, tmp_path / "snapshot" / name)
    assert os.path.samefile(tmp_path / "run/w.safetensors", tmp_path / "snapshot/w.safetensors")
    (tmp_path / "run/w.safetensors").unlink()
    (tmp_path / "run/metrics.json").write_text("[2]")
    assert (tmp_path / "snapshot/w.safetensors").read_text() == "weights"
    assert (tmp_path / "snapshot/metrics.json").read_text() == "[1]"


def test_weights_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path, w_st="weights")
    take(tmp_path / "w.safetensors", tmp_path / "to/w.safetensors")
    assert (tmp_path / "to/w.safetensors").read_text() == "weights"


@pytest.mark.parametrize("name", publication.NAMES)
@pytest.mark.parametrize("origin, stays", [("someone/diffusion", True), ("/home/me/models/x", False), ("..", False)])
def test_configurations_forget_local_folders(name, origin, stays, tmp_path):
    content = {"_class_name": "A", name: origin, "size": 3}
    write(tmp_path, config_json=json.dumps(content))
    take(tmp_path / "config.json", tmp_path / "to/config.json")
    left = json.loads((tmp_path / "to/config.json").read_text())
    assert left == (content if stays else {"_class_name": "A", "size": 3})


def test_a_later_snapshot_takes_in_an_earlier_one(tmp_path):
    earlier = write(tmp_path / "a", unet__w_st="old", vae__w_st="vae", **{"last-checkpoint/old-random": "old"})
    later = write(tmp_path / "b", unet__w_st="new", **{"last-checkpoint/state": "new"})
    Snapshot(later, "b").take_in(Snapshot(earlier, "a"))
    assert not earlier.exists()
    assert {str(p.relative_to(later)): p.read_text() for p in later.rglob("*") if p.is_file()} == {
        "unet/w.safetensors": "new", "vae/w.safetensors": "vae", "last-checkpoint/state": "new",
    }  # fmt: skip


# Uploads


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
    monkeypatch.setattr(publication, "FIRST_WAIT", 0.01)
    return fake


@pytest.fixture
def uploads(fake, tmp_path):
    return Uploads(tmp_path, "user/fox", None, None)


def add(uploads, number):
    folder = uploads.new(number)
    write(folder, **{f"{number}.txt": "x"})
    uploads.add(Snapshot(folder, f"Step {number}"))


def done(uploads, seconds=20):
    return uploads.finish(lambda: False, seconds)


def test_commits_keep_their_order(uploads, fake, tmp_path):
    for number in range(3):
        add(uploads, number)
        assert fake.asked.acquire(timeout=10)
    assert done(uploads)
    assert [message for message, _ in fake.commits] == ["Step 0", "Step 1", "Step 2"]
    assert not (tmp_path / publication.SNAPSHOTS).exists()


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
          answer(403), httpx2.ReadError("the connection is gone"), OSError("no network")]  # fmt: skip


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
    assert before - len(fake.errors) <= publication.LAST_TRIES + 1
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
    remove = publication.shutil.rmtree

    def in_use(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("a file in it is open")
        remove(path, ignore_errors=True)

    monkeypatch.setattr(publication.shutil, "rmtree", in_use)
    for number in range(3):
        add(uploads, number)
    assert done(uploads) and fake.commits[-1][0] == "Step 2"


def test_states_that_are_dropped_here_are_not_kept_for_a_hub_that_is_away(uploads, fake, tmp_path, caplog):
    fake.open.clear()
    add(uploads, 0)
    assert fake.asked.acquire(timeout=10)
    for number in (1, 2, 3):
        folder = uploads.new(number)
        write(folder, **{f"checkpoint-{number}/w": "x"})
        write(tmp_path, **{f"checkpoint-{number}/w": "x"})
        uploads.add(Snapshot(folder, f"Step {number}"))
        if number == 1:
            publication.shutil.rmtree(tmp_path / "checkpoint-1")
    fake.open.set()
    assert done(uploads)
    assert (
        fake.commits[-1] == ("Step 3", {"checkpoint-2/w", "checkpoint-3/w"}) and "checkpoint-1 is gone" in caplog.text
    )


def test_there_is_a_limit_to_waiting(uploads, fake, caplog):
    fake.open.clear()
    add(uploads, 0)
    assert not done(uploads, 0.3)
    assert "there was no time" in caplog.text
    fake.open.set()


def test_what_a_killed_run_left_is_removed(fake, tmp_path):
    write(tmp_path, **{f"{publication.SNAPSHOTS}/0/x": "x"})
    Uploads(tmp_path, "user/fox", None, None)
    assert not (tmp_path / publication.SNAPSHOTS).exists()


def test_a_finished_folder_is_published_whole(tmp_path):
    folder = write(tmp_path / "run", model_index_json="{}", recipe_yaml="x", **{"README.md": "card"})
    (folder / "recipe.yaml").write_text("learning_rate: 0.001\noutput_dir: /home/me/run\ntrain_data_dir: /home/me/x\n")
    snapshot_of_result(folder, tmp_path / "snapshot", "user/fox")
    assert {path.name for path in (tmp_path / "snapshot").iterdir()} == {
        "model_index.json",
        "README.md",
        "recipe.yaml",
    }
    assert "/home/me" not in (tmp_path / "snapshot/recipe.yaml").read_text()
