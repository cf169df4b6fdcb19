"""A Hub on localhost that this process's huggingface_hub talks to; no test waits between two tries."""

import pytest
from hub_server import HubServer


TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(token=TOKEN) as server:
        server.connect(monkeypatch, tmp_path / "home")
        server.without_waits(monkeypatch)
        yield server
