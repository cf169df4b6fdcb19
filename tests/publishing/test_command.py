"""``python -m lpl.publish``: what it refuses, and how it ends where the Hub does; tests/runs has whole runs."""

import subprocess
import sys

import pytest
from hub_server import Fault

from lpl.publishing import command, uploads
from lpl.tools import layout
from tests.publishing.conftest import TOKEN


@pytest.fixture
def result(tmp_path):
    """The output folder of a finished run."""
    folder = tmp_path / "fox"
    folder.mkdir()
    (folder / layout.INDEX).write_text("{}")
    (folder / layout.CARD).write_text("---\ntags: []\n---\n# fox\n")
    return folder


HOLDS = "import sys; from lpl.tools.files import hold; hold('', sys.argv[1]); print('held', flush=True); input()"


def test_a_folder_is_published_and_stays_as_it_is(hub, result, capsys):
    before = {path.name: path.read_bytes() for path in result.iterdir()}
    command.main([str(result), "--hub_token", TOKEN])
    assert capsys.readouterr().out == f"published at {hub.url}/user/fox\n"
    assert hub.repos["user/fox"].files == before == {path.name: path.read_bytes() for path in result.iterdir()}
    assert hub.repos["user/fox"].commits == ["Publish a finished training"]


def test_a_folder_that_a_run_writes_to_is_refused(hub, result):
    """The run's own uploads lie in it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(result)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match="another run writes to this folder now"):
            command.main([str(result), "--hub_token", TOKEN])
        run.communicate("\n")
    assert "user/fox" not in hub.repos
    command.main([str(result), "--hub_token", TOKEN])
    assert "user/fox" in hub.repos


def test_an_upload_is_tried_again(hub, result, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_WAIT", 0.01)
    hub.faults.append(Fault("commit/", status=503, times=2))
    command.main([str(result), "--hub_token", TOKEN])
    assert hub.repos["user/fox"].commits


@pytest.mark.parametrize("status, tries", [(403, 1), (500, uploads.LAST_TRIES)])
def test_a_failed_upload_ends_with_one_sentence(status, tries, hub, result, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_WAIT", 0.01)
    hub.faults.append(fault := Fault("commit/", status=status))
    with pytest.raises(SystemExit) as error:
        command.main([str(result), "--hub_token", TOKEN])
    assert f"error: the upload to user/fox failed ({status}" in str(error.value)
    assert "run the same command again" in str(error.value) and TOKEN not in str(error.value)
    assert tries <= fault.hits <= tries + 1 and {path.name for path in result.iterdir()} == {layout.INDEX, layout.CARD}


@pytest.mark.parametrize("folder, words", [(".", "not the output folder of a finished run"), ("no", "no such folder")])
def test_what_is_not_finished_is_refused(folder, words, hub, tmp_path):
    with pytest.raises(SystemExit, match=words):
        command.main([str(tmp_path / folder), "--hub_token", TOKEN])
    assert not hub.requests


def test_the_folder_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.build_parser().parse_args(["~/fox"]).output_dir == str(tmp_path / "fox")
