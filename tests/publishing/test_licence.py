"""The licence of the base model, from local folders and from the Hub; any failure costs the licence only."""

import threading
import time

import pytest
import yaml
from hub_server import Fault, Repository
from huggingface_hub import constants, hf_hub_download

from lpl.config.groups import Model
from lpl.publishing import licence
from lpl.publishing.licence import base_licence
from tests.publishing.conftest import TOKEN


NAMED = {"license": "other", "license_name": "fox-1.0", "license_link": "LICENSE.md", "extra_gated_prompt": "no"}
NAMED_ONLY = {"license": "other", "license_name": "fox-1.0"}


def base_card(**metadata) -> bytes:
    return f"---\n{yaml.safe_dump(metadata)}---\n# Base\n".encode()


def test_the_licence_of_a_local_pipeline(tmp_path):
    assert base_licence(Model(str(tmp_path))) == {}
    (tmp_path / "README.md").write_bytes(base_card(license="openrail++", tags=["x"], extra_gated_prompt="no"))
    assert base_licence(Model(str(tmp_path))) == {"license": "openrail++"}
    (tmp_path / "README.md").write_bytes(base_card(**NAMED))  # the link leads to a file that is not beside our card
    assert base_licence(Model(str(tmp_path))) == NAMED_ONLY
    (tmp_path / "README.md").write_bytes(base_card(**NAMED | {"license_link": "https://host/licence"}))
    assert base_licence(Model(str(tmp_path)))["license_link"] == "https://host/licence"


@pytest.mark.parametrize(
    "content",
    [b"no card", b"---\n: {\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b"---\nlicense: [1, {}]\nlicense_link: 3\n---\n",
     b"---\nlicense: 'a\n\n  b'\n---\n", b"---\na: " + b"[" * 500 + b"\n---\n"],
)  # fmt: skip
def test_a_broken_card_costs_the_licence_only(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    assert base_licence(Model(str(tmp_path))) == {}


@pytest.fixture
def repository(hub) -> Repository:
    """A private base model with a second branch, which the token may read."""
    hub.repos["someone/base"] = repository = Repository(files={"README.md": base_card(**NAMED)}, private=True)
    repository.branches["v1"] = repository.at()
    repository.readers.add("user")
    return repository


LINKED = NAMED_ONLY | {"license_link": "https://huggingface.co/someone/base/blob/v1/LICENSE.md"}


def test_the_licence_from_the_hub(repository, hub):
    assert base_licence(Model("someone/base")) == {}  # nobody is logged in
    assert base_licence(Model("someone/base", "v1"), TOKEN) == LINKED
    assert not [request for request in hub.requests if "resolve" in request]  # nothing is downloaded


def test_without_a_network_the_card_in_the_cache_counts(repository, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base_licence(Model("someone/base", "v1"), TOKEN) == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hf_hub_download("someone/base", "README.md", revision="v1", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base_licence(Model("someone/base", "v1"), TOKEN) == LINKED


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 429}, {"cut_answer": 20}, {"cut_answer": 0}])
def test_a_hub_in_trouble_costs_the_licence_only(fault, repository, hub):
    hub.faults.append(Fault("someone/base", **fault))
    assert base_licence(Model("someone/base", None), TOKEN) == {}


def test_a_silent_hub_is_given_up(repository, hub, monkeypatch):
    monkeypatch.setattr(licence, "PATIENCE", 0.3)
    hub.faults.append(Fault("someone/base", hold=threading.Event()))
    start = time.monotonic()
    assert base_licence(Model("someone/base", None), TOKEN) == {} and time.monotonic() - start < 3


@pytest.mark.parametrize(
    "word, told", [("mit", {"license": "mit"}), ("ours-1", {"license": "other", "license_name": "ours-1"})]
)
def test_a_licence_that_the_hub_does_not_know_is_another_one(word, told, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: {word}\n---\n")
    assert base_licence(Model(str(tmp_path))) == told
