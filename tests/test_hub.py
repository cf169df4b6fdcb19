"""The Hub's side of a run against tests/hub_server.py, which the real huggingface_hub talks to.

huggingface_hub reads its settings when it is imported, long before these tests run; `hub` sets them in its `constants`
module, where it looks them up at every call. The `hf` command runs in a process of its own, with `HubServer.env`.
"""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer, Repository
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image

from lpl.hub import HubError, RunCard, prepare_repository, public_command, push_folder, write_model_card


TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A machine that nobody has logged in on."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.fixture
def hub(monkeypatch, no_login):
    with HubServer(token=TOKEN) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def result(tmp_path):
    """The output folder of a run, with what belongs on the Hub and what does not."""
    weights, no = os.urandom(2048), b"not for the Hub"
    contents = {
        "model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": weights, "recipe.yaml": no,
        "metrics.jsonl": b"{}", "samples/before_after.png": b"png", "loss_curves.png": b"png",
        "checkpoint-500/unet/model.safetensors": no, "logs/run/events.out.tfevents.1": no, "wandb/run": no,
        ".cache/x": no, "unet/.cache/y": no, "cache/latents/0.safetensors": no, "samples/.a.png.1.tmp": no,
    }  # fmt: skip
    for name, content in contents.items():
        path = tmp_path / "fox-lpl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "fox-lpl"


UPLOADED = {
    "README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors", "metrics.jsonl",
    "samples/before_after.png", "loss_curves.png",
}  # fmt: skip


def card(**changes) -> RunCard:
    facts = {
        "base_model": "someone/diffusion", "dataset": "someone/foxes", "pipeline_class": "StableDiffusionPipeline",
        "repo_id": "user/fox-lpl", "tags": ["stable-diffusion"], "resolution": 512, "steps": 1000, "batch_size": 32,
        "learning_rate": 1e-5, "objective": "epsilon", "lpl_weight": 0.1534, "lpl_weight_setting": "auto:0.2",
        "lpl_share": 0.196, "lpl_sigma_threshold": 6.0, "lpl_blocks": ("mid", "up_0"),
    }  # fmt: skip
    return RunCard(**{**facts, **changes})


def written(folder: Path, **changes) -> ModelCard:
    return ModelCard.load(write_model_card(folder, card(**changes)))


def run_hf(hub: HubServer, *arguments: str) -> None:
    """Run the `hf` command, logged in to `hub`."""
    command = [str(Path(sys.executable).with_name("hf")), *arguments]
    subprocess.run(command, env={**os.environ, **hub.env}, check=True, capture_output=True, timeout=60)


# Repository


@pytest.mark.parametrize("asked, full", [("fox", "user/fox"), ("team/fox", "team/fox"), (None, "user/out-1")])
def test_the_repository_is_created_once_and_found_again(hub, tmp_path, asked, full):
    for _ in range(2):
        assert prepare_repository(asked, tmp_path / "out-1", TOKEN) == full
    assert list(hub.repos) == [full]


def test_the_token_of_the_login_is_used(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert prepare_repository("fox", "out", None) == "user/fox"


def test_private_repositories_and_public_ones_that_stay_so(hub, caplog):
    prepare_repository("hidden", "out", TOKEN, private=True)
    assert hub.repos["user/hidden"].private and not caplog.records
    hub.repos["user/open"] = Repository()
    prepare_repository("open", "out", TOKEN, private=True)
    assert "user/open exists and is public" in caplog.text


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message, which is one sentence on one line, names the flag that brought the user here, and no token."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and "--push_to_hub" in text and TOKEN not in text
    return text


def test_no_token(no_login):
    with pytest.raises(HubError) as error:
        prepare_repository("fox", "out", None)
    assert "`hf auth login`" in sentence(error) and "--hub_token" in sentence(error)


def test_a_token_that_is_not_accepted(hub):
    with pytest.raises(HubError) as error:
        prepare_repository("fox", "out", "hf_wrong")
    assert "401" in sentence(error) and "`hf auth login`" in sentence(error) and "--hub_token" in sentence(error)


@pytest.mark.parametrize("refused", ["repos/create", "auth-check"])
def test_no_permission(hub, refused):
    hub.fail[refused] = 403
    with pytest.raises(HubError) as error:
        prepare_repository("team/fox", "out", TOKEN)
    assert "403" in sentence(error) and "team/fox" in sentence(error) and "--hub_model_id" in sentence(error)


def test_a_hub_that_cannot_check_permission_is_trusted(hub):
    hub.fail["auth-check"] = 404
    assert prepare_repository("fox", "out", TOKEN) == "user/fox"


def test_a_hub_in_trouble(hub):
    hub.fail["repos/create"] = 500
    with pytest.raises(HubError, match="500.*--hub_model_id"):
        prepare_repository("fox", "out", TOKEN)


@pytest.mark.parametrize("name", ["a fox", "a/b/c", "-fox"])
def test_a_name_that_the_hub_does_not_accept(hub, name):
    with pytest.raises(HubError) as error:
        prepare_repository(name, "out", TOKEN)
    assert "--hub_model_id" in sentence(error) and not hub.requests


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(monkeypatch, no_login, offline):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(HubError) as error:
        prepare_repository("fox", "out", TOKEN)
    assert "cannot be reached" in sentence(error) and "`hf upload`" in sentence(error)


# Upload


def test_what_belongs_on_the_hub_is_uploaded_and_can_be_downloaded(hub, result, tmp_path):
    repo_id = prepare_repository(None, result, TOKEN)
    write_model_card(result, card(repo_id=repo_id))
    assert push_folder(result, repo_id, TOKEN, "1000 steps") == f"{hub.url}/user/fox-lpl"
    assert set(hub.repos[repo_id].files) == UPLOADED and hub.repos[repo_id].commits == ["1000 steps"]
    assert len(hub.objects) == 1  # the weights, by LFS

    run_hf(hub, "download", repo_id, "--local-dir", str(tmp_path / "copy"))
    for name in UPLOADED:
        assert (tmp_path / "copy" / name).read_bytes() == (result / name).read_bytes()
    assert set(HfApi(token=TOKEN).list_repo_files(repo_id)) == UPLOADED


def test_pushing_again_sends_what_has_changed(hub, result):
    repo_id = prepare_repository(None, result, TOKEN)
    push_folder(result, repo_id, TOKEN)
    (result / "metrics.jsonl").write_text("[]")
    assert push_folder(result, repo_id, TOKEN)
    assert hub.repos[repo_id].files["metrics.jsonl"] == b"[]"
    assert len([request for request in hub.requests if request.startswith("PUT /lfs/")]) == 1
    assert push_folder(result, repo_id, TOKEN) and len(hub.repos[repo_id].commits) == 2  # nothing new, no commit


@pytest.mark.parametrize("failing", ["preupload", "lfs/upload", "commit", "validate-yaml"])
def test_a_failed_upload_warns_and_its_command_catches_up(hub, result, failing, caplog):
    repo_id = prepare_repository(None, result, TOKEN)
    write_model_card(result, card())
    hub.fail[failing] = 403
    with caplog.at_level(logging.WARNING, logger="lpl.hub"):
        assert push_folder(result, repo_id, TOKEN) is None
    [record] = [record for record in caplog.records if record.name == "lpl.hub"]
    message = record.getMessage()
    assert "403" in message and str(result) in message and "`hf auth login`" in message and TOKEN not in message
    if failing == "commit":
        hub.fail.clear()
        run_hf(hub, *shlex.split(message.partition(": hf ")[2]))
        assert set(hub.repos[repo_id].files) == UPLOADED


@pytest.mark.parametrize("folder, offline", [("nowhere", False), (".", True)])
def test_an_upload_that_cannot_start_warns_too(hub, monkeypatch, tmp_path, folder, offline, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert push_folder(tmp_path / folder, "user/fox", TOKEN) is None
    assert "hf upload user/fox" in caplog.text


# Model card


def test_the_metadata(tmp_path):
    data = written(tmp_path, license="creativeml-openrail-m").data
    assert data.base_model == "someone/diffusion" and data.base_model_relation == "finetune"
    assert data.datasets == ["someone/foxes"] and data.license == "creativeml-openrail-m" and data.inference is True
    assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
    assert {"diffusers", "text-to-image", "latent-perceptual-loss", "stable-diffusion"} <= set(data.tags)


def test_only_hub_ids_are_metadata(tmp_path):
    data = written(tmp_path, base_model=str(tmp_path), dataset="../pictures/foxes").data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "license"} & set(data)


def test_pictures_are_shown_where_they_are(tmp_path, result):
    assert "![" not in written(tmp_path).text
    text = written(result).text
    assert "](samples/before_after.png)" in text and "](loss_curves.png)" in text


def code(text: str, language: str) -> str:
    return text.split(f"```{language}\n")[1].split("\n```")[0]


def test_the_code_that_draws_an_image(tmp_path):
    text = code(written(tmp_path, prompt='a "red" fox 狐', guidance_scale=5.0, dtype="bfloat16").text, "python")
    compile(text, "card", "exec")
    assert 'StableDiffusionPipeline.from_pretrained("user/fox-lpl", dtype=torch.bfloat16)' in text
    assert 'prompt="a \\"red\\" fox 狐"' in text and "height=512" in text and "guidance_scale=5.0" in text
    assert "num_inference_steps" not in text


def test_further_arguments_of_the_call(tmp_path):
    text = code(written(tmp_path, sampling_arguments={"binned": False, "height": 256, "extra": None}).text, "python")
    compile(text, "card", "exec")
    assert "binned=False" in text and "height=256" in text and "extra" not in text


def test_the_code_runs(tmp_path, sd_pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use = {"repo_id": str(sd_pipeline), "resolution": 32, "inference_steps": 1, "dtype": "float32"}
    exec(code(written(tmp_path, **use).text, "python").replace('"cuda"', '"cpu"'), {})
    assert Image.open("image.png").size == (32, 32)


def test_the_code_of_class_conditional_models(tmp_path):
    card = written(tmp_path, prompt=207, pipeline_class="DiTPipeline")
    assert "class_labels=[207]" in code(card.text, "python") and "height" not in code(card.text, "python")
    assert "class-conditional" in card.data.tags and card.data.pipeline_tag is None


def test_the_code_of_an_adapter_saved_by_peft(tmp_path):
    for place in ("transformer_lora", "checkpoint-500/transformer_lora"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    text = code(written(tmp_path, lora_rank=8).text, "python")
    compile(text, "card", "exec")
    loaded = 'PeftModel.from_pretrained(pipeline.transformer, "user/fox-lpl", subfolder="transformer_lora")'
    assert f"pipeline.transformer = {loaded}" in text


def test_the_code_of_a_lora_with_another_objective(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    text = code(written(tmp_path, lora_rank=8).text, "python")
    compile(text, "card", "exec")
    assert "from diffusers import DDIMScheduler, Stable" in text
    assert 'pipeline.scheduler = DDIMScheduler.from_pretrained("user/fox-lpl", subfolder="scheduler")' in text
    assert "scheduler" not in code(written(tmp_path).text, "python")  # a whole pipeline has it inside


def test_the_code_of_a_lora(tmp_path):
    card = written(tmp_path, lora_rank=8, base_model=str(tmp_path / "sd"), repo_id=None)
    text = code(card.text, "python")
    compile(text, "card", "exec")
    assert 'from_pretrained("path/to/sd"' in text and f'load_lora_weights("path/to/{tmp_path.name}")' in text
    assert "lora" in card.data.tags


def test_the_tables(tmp_path):
    text = written(tmp_path, mixed_precision="bf16", ema_decay=0.99975, hardware="1 x | GPU").text
    for fact in ("1,000", "32,000 samples", "1e-05", "`epsilon`", "bf16", "0.99975", "1 x \\| GPU", "torch 2."):
        assert fact in text
    for fact in ("0.1534, measured", "20% of the loss", "19.6%", "σ ≤ 6", "`mid`, `up_0`"):
        assert fact in text


def test_a_weight_set_by_hand(tmp_path):
    assert "| Weight | 3, set by hand |" in written(tmp_path, lpl_weight=3.0, lpl_weight_setting="3.0").text


def test_without_lpl(tmp_path):
    card = written(tmp_path, lpl_weight=0.0)
    assert "latent perceptual loss was off" in card.text and "arxiv" not in card.text
    assert "latent-perceptual-loss" not in card.data.tags


def test_neither_path_nor_token_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "my photos", "runs/fox"):
        (tmp_path / name).mkdir(parents=True)
    command = [
        str(tmp_path / "train_text_to_image_lpl.py"), f"--pretrained_model_name_or_path={tmp_path}/base",
        "--train_data_dir", str(tmp_path / "my photos"), "--output_dir", "runs/fox", "--hub_token", TOKEN,
        "--push_to_hub", "--dataset_name", f"pipe:curl -H 'Authorization:Bearer {TOKEN}' https://me:secret@host/a/b.tar",
        "--validation_prompts", "a cat / dog, and/or a fox", f"{tmp_path}/a.txt,{tmp_path}/b.txt", "",
    ]  # fmt: skip
    write_model_card(tmp_path, card(base_model="base", dataset=str(tmp_path / "my photos"), command=command))
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert TOKEN not in text and "hub_token" not in text and "me:secret" not in text
    assert code(text, "bash").splitlines() == [
        "accelerate launch train_text_to_image_lpl.py \\",
        "  --pretrained_model_name_or_path=path/to/base \\",
        "  --train_data_dir 'path/to/my photos' \\",
        "  --output_dir path/to/fox \\",
        "  --push_to_hub \\",
        """  --dataset_name 'pipe:curl -H '"'"'Authorization:Bearer hf_...'"'"' https://host/a/b.tar' \\""",
        "  --validation_prompts 'a cat / dog, and/or a fox' path/to/a.txt,path/to/b.txt ''",
    ]
    assert "`path/to/base`" in text and "`path/to/my photos`" in text


@pytest.mark.parametrize(
    "given, shown",
    [
        (["--hub_token=x", "--seed", "1"], ["--seed", "1"]),
        (["--hub_tok", "x", "--hub_model_id", "user/fox"], ["--hub_model_id", "user/fox"]),
        (["--hub_token"], []),
        (["--a", "file:///home/me/data/x.tar"], ["--a", "path/to/x.tar"]),
        (["--a", "/home/me/{00..99}.tar::/mnt/y.tar"], ["--a", "path/to/{00..99}.tar::path/to/y.tar"]),
        (["--a", r"C:\Users\me\data"], ["--a", "path/to/data"]),
        (["--a=~/runs/", "--b", "../x"], ["--a=path/to/runs", "--b", "path/to/x"]),
        (["--a", "https://host/a/b", "s3://bucket/a/b"], ["--a", "https://host/a/b", "s3://bucket/a/b"]),
        (["--a", r"blocks\.\d+", "and/or"], ["--a", r"blocks\.\d+", "and/or"]),
        (["--a", "someone/foxes", "--lr", "1e-5", "--b", "-1"], ["--a", "someone/foxes", "--lr", "1e-5", "--b", "-1"]),
    ],
)
def test_the_public_command(given, shown):
    words = shlex.split(public_command(["/home/me/train.py", *given]).replace("\\\n", ""))
    assert words == ["accelerate", "launch", "train.py", *shown]


@pytest.mark.parametrize("prompt", ["a: b # c\n---\n", "```", "\udcff", "| a | b", "{{ x }}"])
def test_odd_texts_leave_a_card_that_reads(tmp_path, prompt):
    card = written(tmp_path, prompt=prompt, dataset=prompt, command=["train.py", "--prompt", prompt])
    assert card.data.library_name == "diffusers" and card.text.count("\n## ") == 5
    yaml.safe_load(card.data.to_yaml())
