"""What others may see: commands and texts without tokens and paths of this machine."""

import shlex

import pytest

from lpl.tools.privacy import is_local, local_name, public_command, without_secrets


TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ"


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


@pytest.mark.parametrize(
    "secret, shown",
    [
        (f"token {TOKEN}.", "token hf_...."),
        ("api_org_aBcDeFgHiJkLmNoPq1", "hf_..."),
        ("hf_oauth_eyJhbGciOiJFZERT.eyJ-zdWIi_x", "hf_..."),
        ("Authorization: Bearer abcdefghijklmnop.qrs-tuv=", "Authorization: Bearer ..."),
        ("https://me:pass@host/a.tar", "https://host/a.tar"),
        ("https://h/a.tar?X-Amz-Signature=0a1b&b=1", "https://h/a.tar?X-Amz-Signature=...&b=1"),
        ("'https://h/a?sig=a%2Fb' 'c'", "'https://h/a?sig=...' 'c'"),
        ("hf_hub_download, a bearer of news, what is a token?", "hf_hub_download, a bearer of news, what is a token?"),
    ],
)
def test_secrets_of_other_kinds(secret, shown):
    assert without_secrets(secret) == shown


def test_a_home_does_not_tell_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    assert local_name(tmp_path / "alice") == local_name("~") == local_name("/") == "path/to/folder"
    assert local_name("~/foxes/") == "path/to/foxes"


def test_what_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foxes").mkdir()
    assert all(map(is_local, ("foxes", "/nowhere/foxes", "../foxes", "~/foxes", str(tmp_path))))
    assert not any(map(is_local, ("someone/foxes", "https://host/foxes.tar", "hf://datasets/someone/foxes")))
