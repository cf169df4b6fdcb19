"""The Hub's side of a run, against tests/support/hub_server.py, which the real huggingface_hub talks to."""

import json
import logging
import os

import pytest
from httpx2 import Timeout, TimeoutException
from hub_server import Fault, Repository
from huggingface_hub import close_session, constants, get_session
from huggingface_hub.errors import HfHubHTTPError

from lpl.config.groups import Output
from lpl.publishing.hub import SILENCE, HubError, api, download_run, push, reason
from lpl.publishing.hub import prepare_repository as prepare
from lpl.tools import layout
from lpl.training.checkpoints import find_checkpoints
from tests.publishing.conftest import TOKEN


def prepare_repository(name, folder="out", token=TOKEN, private=False, revision=None, lora=False) -> str:
    return prepare(
        Output(
            hub_model_id=name,
            output_dir=str(folder),
            push_to_hub=True,
            hub_token=token,
            hub_private_repo=private,
            hub_revision=revision,
        ),
        lora,
    )


def download(name, folder) -> None:
    download_run(Output(hub_model_id=name, output_dir=str(folder), hub_token=TOKEN))


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A machine that nobody has logged in on."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.fixture
def result(tmp_path):
    """A folder to upload, with a file that travels by LFS."""
    folder = tmp_path / "fox-lpl"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet/model.safetensors").write_bytes(os.urandom(2048))
    return folder


# Repository


@pytest.mark.parametrize("asked, full", [("fox", "user/fox"), ("team/fox", "team/fox"), (None, "user/out-1")])
def test_the_repository_is_created_once_and_found_again(hub, tmp_path, asked, full):
    for _ in range(2):
        assert prepare_repository(asked, tmp_path / "out-1") == full
    assert list(hub.repos) == [full]


def test_the_token_of_the_login_is_used(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert prepare_repository("fox", token=None) == "user/fox"


def test_private_repositories_and_public_ones_that_stay_so(hub, caplog):
    prepare_repository("hidden", private=True)
    assert hub.repos["user/hidden"].private and not caplog.records
    hub.repos["user/open"] = Repository()
    prepare_repository("open", private=True)
    assert "user/open exists and is public" in caplog.text


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message, which is one sentence on one line, names the flag that brought the user here, and no token."""
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and "--push_to_hub" in text and TOKEN not in text
    return text


def test_the_command_that_publishes_has_no_push_to_hub(no_login):
    with pytest.raises(HubError, match="^publishing needs a Hugging Face token") as error:
        prepare(Output(hub_model_id="user/fox", output_dir="out"))
    assert "--push_to_hub" not in str(error.value)


def test_no_token(no_login):
    with pytest.raises(HubError) as error:
        prepare_repository("fox", token=None)
    assert "`hf auth login`" in sentence(error) and "--hub_token" in sentence(error)


def test_a_token_that_is_not_accepted(hub):
    with pytest.raises(HubError) as error:
        prepare_repository("fox", token="hf_wrong")
    assert "401" in sentence(error) and "`hf auth login`" in sentence(error) and "--hub_token" in sentence(error)


@pytest.mark.parametrize("refused", ["repos/create", "auth-check"])
def test_no_permission(hub, refused):
    hub.faults.append(Fault(refused, status=403))
    with pytest.raises(HubError) as error:
        prepare_repository("team/fox")
    assert "403" in sentence(error) and "team/fox" in sentence(error) and "--hub_model_id" in sentence(error)


def test_a_hub_that_cannot_check_permission_is_trusted(hub):
    hub.faults.append(Fault("auth-check", status=404))
    assert prepare_repository("fox") == "user/fox"


def test_a_hub_in_trouble(hub):
    hub.faults.append(Fault("repos/create", status=500))
    with pytest.raises(HubError, match="500.*--hub_model_id"):
        prepare_repository("fox")


@pytest.mark.parametrize("name", ["a fox", "a/b/c", "-fox"])
def test_a_name_that_the_hub_does_not_accept(hub, name):
    with pytest.raises(HubError) as error:
        prepare_repository(name)
    assert "--hub_model_id" in sentence(error) and not hub.requests


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(monkeypatch, no_login, offline):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(HubError) as error:
        prepare_repository("fox")
    assert "cannot be reached" in sentence(error) and "lpl.publish" in sentence(error)


# Upload


def test_a_folder_is_one_commit_and_pushing_again_sends_what_has_changed(hub, result):
    repo_id = prepare_repository(None, result)
    assert push(result, repo_id, TOKEN, message="1000 steps") == f"{hub.url}/user/fox-lpl"
    repository = hub.repos[repo_id]
    assert set(repository.files) == {"model_index.json", "unet/model.safetensors"}
    assert repository.commits == ["1000 steps"]
    (result / "model_index.json").write_text("[]")
    push(result, repo_id, TOKEN)
    assert repository.at().added == ["model_index.json"] and len(repository.commits) == 2
    push(result, repo_id, TOKEN)
    assert len(repository.commits) == 2  # nothing new, no commit


@pytest.mark.parametrize("xet", [False, True])
def test_many_files_are_one_commit_or_none(xet, hub, result, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    (result / "unet/model.safetensors").unlink()
    for number in range(300):
        (result / f"{number}.png").write_bytes(os.urandom(8))
    repo_id = prepare_repository(None, result)
    hub.faults.append(Fault("commit", status=500, times=1))
    with pytest.raises(HfHubHTTPError):
        push(result, repo_id, TOKEN)
    assert hub.repos[repo_id].commits == []
    push(result, repo_id, TOKEN)
    assert hub.repos[repo_id].commits == ["End of training"] and len(hub.repos[repo_id].files) == 301


def test_what_a_folder_of_the_repository_had_and_is_not_brought_goes(hub, result):
    repo_id = prepare_repository(None, result)
    hub.repos[repo_id].files = {"last-checkpoint/random-1": b"1", "last-checkpoint/state": b"1", "other": b"1"}
    (result / "last-checkpoint").mkdir()
    (result / "last-checkpoint/state").write_text("2")
    push(result, repo_id, TOKEN, replaced="last-checkpoint")
    files = hub.repos[repo_id].files
    assert files["last-checkpoint/state"] == b"2" and "other" in files and "last-checkpoint/random-1" not in files


def test_a_branch_is_made_and_pushed_to(hub, result):
    repo_id = prepare_repository(None, result, revision="second")
    assert prepare_repository(None, result, revision="second") == repo_id  # it is there by now
    push(result, repo_id, TOKEN, "second")
    assert "model_index.json" in hub.repos[repo_id].at("second").files and not hub.repos[repo_id].files


@pytest.mark.parametrize("failing", ["preupload", "lfs/upload", "commit"])
def test_a_failed_upload_changes_nothing_and_says_why(hub, result, failing):
    repo_id = prepare_repository(None, result)
    hub.faults.append(Fault(failing, status=403, message=f"no {TOKEN} here"))
    with pytest.raises((HfHubHTTPError, RuntimeError)) as error:  # the latter for a single file
        push(result, repo_id, TOKEN)
    assert "403" in reason(error.value) and TOKEN not in reason(error.value) and not hub.repos[repo_id].files


def test_a_hub_that_says_nothing_is_not_waited_for(hub, result, monkeypatch):
    repo_id = prepare_repository(None, result)
    monkeypatch.setattr("lpl.publishing.hub.SILENCE", 0.1)
    close_session()  # the next one has that timeout
    hub.faults.append(Fault("preupload", delay=30))
    with pytest.raises(TimeoutException):
        push(result, repo_id, TOKEN)
    close_session()


# Resuming


def checkpoint(step: int, place: str) -> dict[str, bytes]:
    return {f"{place}/progress.json": json.dumps({"step": step, "seed": 0}).encode(), f"{place}/unet/w": b"weights"}


OF_THE_RUN = {"metrics.jsonl": b"log", "recipe.yaml": b"recipe", "samples/step-000000/00.png": b"png", "unet/w": b"no"}


def test_the_last_checkpoint_comes_with_what_a_run_goes_on_with(hub, tmp_path):
    files = checkpoint(5, "checkpoint-5") | checkpoint(10, "checkpoint-10") | OF_THE_RUN
    hub.repos["user/fox"] = Repository(private=True, files=files)
    for _ in range(2):  # the second time it is there
        download("fox", tmp_path / "run")
        found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
        assert found == {
            "metrics.jsonl",
            "recipe.yaml",
            "samples/step-000000/00.png",
            *checkpoint(10, "checkpoint-10"),
        }


@pytest.mark.parametrize("last, wanted", [(7, 10), (12, 12)])
def test_of_two_strategies_the_later_checkpoint_counts(last, wanted, hub, tmp_path):
    files = checkpoint(last, "last-checkpoint") | checkpoint(10, "checkpoint-10") | OF_THE_RUN
    hub.repos["user/fox"] = Repository(files=files)
    download("fox", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == [f"checkpoint-{wanted}"]


def test_an_interrupted_download_is_no_checkpoint_and_goes_on(hub, tmp_path):
    hub.repos["user/fox"] = Repository(files=checkpoint(7, "last-checkpoint") | OF_THE_RUN)
    hub.faults.append(Fault("GET .*unet/w", status=403))
    with pytest.raises(HubError, match="--resume_from_checkpoint hub"):
        download("user/fox", tmp_path)
    assert find_checkpoints(tmp_path) == []
    hub.faults.clear()
    download("user/fox", tmp_path)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-7"]
    assert not (tmp_path / ".download").exists()


def test_the_log_of_a_later_checkpoint_replaces_that_of_an_earlier_one(hub, tmp_path):
    hub.repos["user/fox"] = Repository(files=checkpoint(9, "last-checkpoint") | OF_THE_RUN)
    run = tmp_path / "run"
    for name, content in (
        checkpoint(7, "checkpoint-7") | {"metrics.jsonl": b"old", "samples/mine.png": b"mine"}
    ).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    download("user/fox", run)
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-7", "checkpoint-9"]
    assert (run / "metrics.jsonl").read_text() == "log" and (run / "samples/mine.png").is_file()
    assert (run / "samples/step-000000/00.png").is_file()


def test_every_client_gives_up_a_silent_hub(hub):
    api(TOKEN)
    close_session()  # as the library does when a connection is refused
    assert get_session().timeout == Timeout(SILENCE)


def test_the_client_tells_no_signed_address(hub, capfd):
    logging.getLogger("huggingface_hub.utils._http").warning("PUT https://s3/x?X-Amz-Signature=%s", "secret")
    assert "secret" not in capfd.readouterr().err


def test_what_is_here_stays(hub, tmp_path):
    hub.repos["user/fox"] = Repository(files=checkpoint(7, "last-checkpoint") | OF_THE_RUN)
    (tmp_path / "metrics.jsonl").write_text("mine")
    for name, content in checkpoint(9, "checkpoint-9").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    download("user/fox", tmp_path)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9"]
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_there_is_nothing_to_resume_from(hub, tmp_path, caplog):
    download("user/fox", tmp_path / "run")
    hub.repos["user/fox"] = Repository(files={"README.md": b"a"})
    download("user/fox", tmp_path / "run")
    assert "there is no repository user/fox yet" in caplog.text and "user/fox has no checkpoint yet" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora, there", [(True, layout.INDEX), (False, layout.LORA)])
def test_a_repository_with_a_result_of_the_other_kind_is_refused(lora, there, hub, tmp_path):
    (tmp_path / there).write_text("{}")
    push(tmp_path, prepare_repository("fox"), TOKEN)
    with pytest.raises(HubError, match="another --hub_model_id"):
        prepare_repository("fox", lora=lora)
    assert prepare_repository("fox", lora=not lora) == "user/fox"
