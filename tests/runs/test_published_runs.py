"""Whole runs that publish themselves, on a server that speaks the Hub's API, with the real client."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import Fault, HubServer, Repository
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from safetensors.torch import load
from trainer import ROOT, arguments, metrics, run, same, train, weights

from lpl.publishing import command as publish
from lpl.publishing import publication, uploads
from lpl.tools import layout
from lpl.tools.files import load_state


TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"
REPO = "user/fox"
RUN = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "lpl_measuring_steps": 2,
    "use_ema": True,
    "ema_decay": 0.5,
    "validation_prompts": ["a cat"],
    "validation_steps": 2,
    "push_to_hub": True,
    "hub_model_id": "fox",
    "hub_token": TOKEN,
    "seed": 3,
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that a run is directed to, and nobody waits between two tries."""
    with HubServer(TOKEN) as server:
        server.connect(monkeypatch, tmp_path / "home")
        server.without_waits(monkeypatch)
        monkeypatch.setattr(uploads, "FIRST_WAIT", 0.01)
        yield server


def states(hub, branch="main"):
    """Message and files of each commit, oldest first."""
    return [(commit.message, commit.files) for commit in hub.repos[REPO].branches[branch].history()[::-1]][1:]


def unet(files, folder="unet"):
    return load(files[f"{folder}/diffusion_pytorch_model.safetensors"])


def finish(folder, files):
    """The repository's files in a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


# Strategies

STATES = {
    "end": [],
    "every_save": [],
    "checkpoint": ["last-checkpoint"],
    "all_checkpoints": ["checkpoint-2", "checkpoint-4"],
}


@pytest.mark.parametrize("strategy", STATES)
def test_what_each_strategy_publishes(strategy, hub, sd_pipeline, image_folder, tmp_path, monkeypatch):
    # Each upload is waited for, or the end's would take in the one before.
    add = uploads.Uploads.add

    def added(self, snapshot):
        add(self, snapshot)
        while self._pending:
            threading.Event().wait(0.02)

    monkeypatch.setattr(uploads.Uploads, "add", added)
    flags = RUN | {"hub_strategy": strategy, "checkpoints_total_limit": 1}
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    commits = states(hub)
    early = [] if strategy == "end" else ["Step 2", "Step 4"]
    assert [message for message, _ in commits] == [*early, "End of training"]
    files = commits[-1][1]
    always = {"README.md", "model_index.json", "recipe.yaml", "metrics.jsonl", "samples/before_after.png"}
    assert always | {"samples/step-000002.png", "vae/config.json", "scheduler/scheduler_config.json"} <= set(files)
    assert same(unet(files), weights_of(folder / "unet"))
    found = {name.partition("/")[0] for name in files}
    assert {name for name in found if "checkpoint" in name} == set(STATES[strategy])
    for message, files in commits[:-1]:
        step = int(message.split()[1])
        assert f"samples/step-{step:06d}.png" in files and "README.md" in files and "loss_curves.png" in files
        assert json.loads(files["metrics.jsonl"].splitlines()[-1])["step"] == step
        pipeline = DiffusionPipeline.from_pretrained(finish(tmp_path / message, files))
        assert same(dict(pipeline.unet.state_dict()), unet(files))
    if early:
        assert not same(unet(commits[0][1]), unet(commits[1][1]))
        # The last checkpoint's average, which is what is there locally too; the first one is gone by now.
        assert same(unet(commits[1][1]), weights_of(folder / "checkpoint-4/ema/unet"))
    assert not (folder / layout.UPLOADS).exists()


def weights_of(folder):
    return {name: value for (_, name), value in weights(folder).items()}


def test_a_lora_is_published_with_each_checkpoint(hub, sd_pipeline, image_folder, tmp_path):
    flags = RUN | {"hub_strategy": "every_save", "lora": True, "rank": 2, "prediction_type": "v_prediction"}
    train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    for _, files in states(hub):
        assert {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "README.md"} <= set(files)
        assert not any(name.startswith(("unet", "vae")) for name in files)
        assert files["run_comfyui.preview.png"] in [files[name] for name in files if name.endswith("-ema/00.png")]
    named = tmp_path / "named.safetensors"
    named.write_bytes(files["run_comfyui.safetensors"])
    with safe_open(named, "pt") as file:
        about = file.metadata()
    found = {name: about[f"modelspec.{name}"] for name in ("title", "author", "prediction_type")}
    assert found == {"title": "fox", "author": "user", "prediction_type": "v"} and about["ss_steps"] == "4"


def test_a_branch_and_a_private_repository(hub, sd_pipeline, image_folder, tmp_path):
    flags = RUN | {"hub_revision": "second", "hub_private_repo": True, "max_train_steps": 1}
    train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    assert hub.repos[REPO].private and states(hub, "second")[-1][0] == "End of training" and not states(hub)


# Resuming


def test_another_machine_goes_on_from_what_was_pushed(hub, sd_pipeline, image_folder, tmp_path):
    whole = train(
        sd_pipeline,
        image_folder,
        tmp_path / "whole",
        **RUN | {"push_to_hub": None, "hub_model_id": None, "hub_token": None},
    )
    flags = RUN | {"hub_strategy": "checkpoint"}
    train(sd_pipeline, image_folder, tmp_path / "first", **flags | {"max_train_steps": 2})
    other = train(sd_pipeline, image_folder, tmp_path / "other", **flags, resume_from_checkpoint="hub")
    assert metrics(other) == metrics(whole)
    for name in ("checkpoint-4/unet", "checkpoint-4/ema/unet", "unet"):
        assert same(weights(other / name), weights(whole / name))
    picture = "samples/before_after.png"
    assert (other / picture).read_bytes() == (whole / picture).read_bytes()
    states_ = [load_state(folder / "checkpoint-4/state.safetensors")["updates"]["count"] for folder in (other, whole)]
    assert torch.equal(*states_) and not (other / ".download").exists()


def test_a_later_checkpoint_that_is_here_wins(hub, sd_pipeline, image_folder, tmp_path, caplog):
    flags = RUN | {"hub_strategy": "checkpoint"}
    train(sd_pipeline, image_folder, tmp_path / "run", **flags | {"max_train_steps": 2})
    hub.faults.append(Fault("lfs", status=403))  # nothing more gets there
    caplog.set_level("INFO")
    train(
        sd_pipeline, image_folder, tmp_path / "run", **flags | {"max_train_steps": 4}, resume_from_checkpoint="latest"
    )
    train(sd_pipeline, image_folder, tmp_path / "run", **flags | {"max_train_steps": 5}, resume_from_checkpoint="hub")
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert "checkpoint-4" in caplog.text
    assert not [request for request in hub.requests if "/resolve/" in request and "state.safetensors" in request]


@pytest.mark.parametrize("there", ["no repository", "an empty one"])
def test_where_nothing_was_pushed_yet_the_run_starts_afresh(there, hub, sd_pipeline, image_folder, tmp_path, caplog):
    if there == "an empty one":
        hub.repos[REPO] = Repository()
    train(sd_pipeline, image_folder, tmp_path / "run", **RUN | {"max_train_steps": 1}, resume_from_checkpoint="hub")
    assert "training starts afresh" in caplog.text and metrics(tmp_path / "run")


# Faults

FAULTS = {
    "it is overloaded": [Fault("PUT /lfs", status=503, times=2), Fault("commit", status=500, times=3)],
    "it limits the rate": [Fault("commit", status=429, retry_after=0, times=3)],
    "somebody else commits": [Fault("commit", status=412, times=2), Fault("commit", status=409, times=1)],
    "it goes away within a file": [Fault("PUT /lfs", cut_body=500, times=3)],
    "its answer is cut": [Fault("POST .*commit", cut_answer=20, times=2)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_in_trouble_costs_nothing(name, hub, sd_pipeline, image_folder, tmp_path, monkeypatch):
    hub.faults += [
        Fault(
            **{
                key: getattr(fault, key)
                for key in ("pattern", "status", "times", "retry_after", "cut_body", "cut_answer")
            }
        )
        for fault in FAULTS[name]
    ]
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **RUN | {"hub_strategy": "every_save"})
    assert all(fault.hits for fault in hub.faults)
    message, files = states(hub)[-1]
    assert message == "End of training" and same(unet(files), weights_of(folder / "unet"))


@pytest.mark.parametrize("status", [401, 403, "gone"])
def test_a_hub_that_refuses_leaves_all_here_and_the_command_does_it_later(
    status, hub, sd_pipeline, image_folder, tmp_path, caplog, monkeypatch
):
    if status == "gone":
        save = publication.Publication.checkpoint
        monkeypatch.setattr(publication.Publication, "checkpoint", lambda *args: (hub.stop(), save(*args)))
    else:
        hub.faults.append(Fault("commit/", status=status))
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **RUN | {"hub_strategy": "every_save"})
    assert len(metrics(folder)) == 4 and (folder / "model_index.json").is_file()
    command = re.search(r"uploads the result: python -m lpl.publish (.*)", caplog.text)[1]
    assert states(hub) == [] and TOKEN not in caplog.text
    hub.faults.clear()
    if status == "gone":
        hub.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    publish.main(command.split())
    ((message, files),) = states(hub)
    assert same(unet(files), weights_of(folder / "unet")) and {"README.md", "recipe.yaml"} <= set(files)


# What others get


def searched(folder):
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


KINDS = {
    "all weights": ("sd_pipeline", "image_folder", {"hub_strategy": "all_checkpoints"}),
    "LoRA": ("sdxl_pipeline", "image_folder", {"rank": 2, "train_text_encoder": True, "hub_strategy": "checkpoint"}),
    "peft": ("dit_pipeline", "class_folder", {"rank": 2, "hub_strategy": "every_save", "caption_column": None}),
    "eval": ("sd_pipeline", "image_folder", {"hub_strategy": "end", "validation_prompts": None}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_anywhere_and_no_path_of_this_machine_on_the_hub(kind, hub, tmp_path, request, caplog, capsys):
    pipeline, images, flags = KINDS[kind]
    pipeline, images = request.getfixturevalue(pipeline), request.getfixturevalue(images)
    prompts = {"validation_prompts": ["1"]} if images.name.startswith("class") else {}
    flags = RUN | prompts | {"report_to": "tensorboard", "debug_loss": True} | flags
    train(pipeline, images, tmp_path / "my-run", **flags)
    assert any("tfevents" in name for name in searched(tmp_path / "my-run"))
    told = caplog.text + "".join(capsys.readouterr())
    assert TOKEN not in told
    pushed = [(f"{message}: {name}", content) for message, files in states(hub) for name, content in files.items()]
    assert pushed
    for name, content in [*searched(tmp_path / "my-run").items(), *pushed]:
        assert TOKEN.encode() not in content, name
    local = [str(tmp_path), str(images), str(pipeline), str(Path.home()) + "/"]
    for name, content in pushed:
        assert not [path for path in local if path.encode() in content], name


def command(hub, tmp_path, *words):
    """The script in a process of its own: datasets looks for its Hub when it is imported."""
    environment = os.environ | hub.env | {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
    call = [sys.executable, str(ROOT / "train_text_to_image_lpl.py"), *map(str, words)]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_stranger_with_the_id_alone_gets_the_same_loss_curve(hub, sd_pipeline, image_folder, tmp_path):
    hub.repos["someone/diffusion"] = Repository(files=searched(sd_pipeline))
    hub.repos["datasets/someone/foxes"] = Repository(files=searched(image_folder))
    words = arguments("someone/diffusion", image_folder, tmp_path / "first", **RUN | {"hub_token": None})
    for flag in ("--train_data_dir", "--cache_dir"):
        del words[words.index(flag) : words.index(flag) + 2]
    command(hub, tmp_path, *words, "--dataset_name", "someone/foxes")
    hub.repos[REPO].private = False
    hub.tokens = {}  # whoever comes now has no login here
    hub.token = ""
    said = command(hub, tmp_path, "--config", REPO, "--output_dir", tmp_path / "second", "--report_to", "none")
    assert metrics(tmp_path / "second") == metrics(tmp_path / "first")
    assert same(weights(tmp_path / "second/unet"), weights(tmp_path / "first/unet"))
    assert "loss curve will differ" not in said


def test_with_local_data_the_folder_is_given_and_compared(hub, sd_pipeline, image_folder, tmp_path, caplog):
    first = train(sd_pipeline, image_folder, tmp_path / "first", **RUN)
    words = [
        "--config",
        REPO,
        "--output_dir",
        str(tmp_path / "second"),
        "--pretrained_model_name_or_path",
        str(sd_pipeline),
        "--report_to",
        "none",
        "--train_data_dir",
    ]
    run([*words, str(image_folder)])
    assert metrics(tmp_path / "second") == metrics(first) and "recipe's run" not in caplog.text
    fewer = finish(tmp_path / "fewer", searched(image_folder))
    lines = (fewer / "metadata.jsonl").read_text().splitlines()
    (fewer / "metadata.jsonl").write_text("\n".join([lines[0].replace('"text": "', '"text": "not '), *lines[1:]]))
    run([*words, str(fewer)])
    assert "the data is not that of the recipe's run" in caplog.text


def test_a_finished_folder_is_published_later(hub, sd_pipeline, image_folder, tmp_path, monkeypatch, capsys):
    quiet = {"push_to_hub": None, "hub_model_id": None, "hub_token": None}
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **RUN | quiet)
    before = searched(folder)
    publish.main([str(folder), "--hub_model_id", "team/later", "--hub_token", TOKEN])
    files = hub.repos["team/later"].files
    assert same(unet(files), weights_of(folder / "unet")) and searched(folder) == before
    card = files["README.md"].decode()
    assert "team/later" in card and str(tmp_path) not in card and "path/to/run" not in card
    assert str(tmp_path).encode() not in files["recipe.yaml"]
    assert "published at" in capsys.readouterr().out
    DiffusionPipeline.from_pretrained(snapshot_download("team/later", token=TOKEN, local_dir=tmp_path / "copy"))


def test_what_is_published_reads_as_a_model_of_the_hub(hub, sd_pipeline, image_folder, tmp_path):
    train(sd_pipeline, image_folder, tmp_path / "run", **RUN)
    info = HfApi(token=TOKEN).model_info(REPO)
    assert info.card_data.library_name == "diffusers" and "latent-perceptual-loss" in info.card_data.tags
