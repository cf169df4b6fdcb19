"""tests/hub_server.py does what the Hub does, as far as the real huggingface_hub and datasets can tell.

The client waits a second and more before it tries again; `waits` writes these waits down instead.
"""

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from hub_server import Account, Fault, HubServer, Repository
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    file_download,
    get_session,
    hf_hub_download,
    hf_hub_url,
    model_info,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http
from PIL import Image


TOKEN, READ, OTHER = "hf_write", "hf_read", "hf_someone"
BIG = bytes(range(256)) * 5000  # 1.28 MB: travels by LFS


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(TOKEN, read_token=READ) as server:
        server.tokens[OTHER] = Account("someone")
        server.connect(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def api(hub):
    return HfApi(token=TOKEN)


@pytest.fixture
def repo(api):
    """Id of an empty model repository."""
    return api.create_repo("fox").repo_id


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited, in order. A test may put a function into `waits.call`."""

    class Waits(list):
        def call(self): ...

    waits = Waits()
    clock = SimpleNamespace(sleep=lambda seconds: waits.append(seconds) or waits.call())
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", clock)
    return waits


def push(api, repo, files, deleted=(), message="push", **options):
    """One commit; its sha."""
    operations = [CommitOperationDelete(path) for path in deleted]
    operations += [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, operations, commit_message=message, **options).oid


def in_background(function, *arguments, **options):
    """The running thread; what the function returned or raised is in its `result`."""

    def run():
        try:
            thread.result = function(*arguments, **options)
        except Exception as error:
            thread.result = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


# Revisions -----------------------------------------------------------------------------------------------------------


def test_each_branch_has_files_of_its_own(hub, api, repo):
    first = push(api, repo, {"a.txt": b"1"})
    push(api, repo, {"a.txt": b"2"})
    api.create_branch(repo, branch="now")
    api.create_branch(repo, branch="runs/fox", revision=first)
    for branch, content in (("main", b"2"), ("now", b"2"), ("runs/fox", b"1")):
        assert hub.repos[repo].at(branch).files == {"a.txt": content}
    last = push(api, repo, {"sub/b.txt": b"3"}, revision="runs/fox")
    assert api.list_repo_files(repo) == ["a.txt"] and hub.repos[repo].files == {"a.txt": b"2"}
    assert api.list_repo_files(repo, revision="runs/fox") == ["a.txt", "sub/b.txt"]
    assert api.model_info(repo, revision="runs/fox").sha == last != api.model_info(repo).sha
    heads = {head.name: head.target_commit for head in api.list_repo_refs(repo).branches}
    assert heads == {name: hub.repos[repo].at(name).sha for name in ("main", "now", "runs/fox")}
    found = hf_hub_download(repo, "sub/b.txt", revision="runs/fox", token=TOKEN)
    assert Path(found).read_bytes() == b"3"


def test_a_branch_is_created_once(api, repo):
    api.create_branch(repo, branch="x")
    api.create_branch(repo, branch="x", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="x")
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(repo, branch="y", revision="nowhere")


def test_what_is_no_branch_cannot_be_committed_to(hub, api, repo):
    sha = push(api, repo, {"a": b"1"})
    for revision in ("nowhere", sha):
        with pytest.raises(RevisionNotFoundError):
            push(api, repo, {"a": b"2"}, revision=revision)
    assert hub.repos[repo].commits == ["push"] and not api.revision_exists(repo, "nowhere")


def test_old_commits_stay(hub, api, repo, tmp_path):
    shas = [
        push(api, repo, {"scheduler_config.json": json.dumps({"num_train_timesteps": steps}).encode(), "w": content})
        for steps, content in ((10, BIG), (20, BIG[1:]))
    ]
    hub.repos[repo].files["scheduler_config.json"] = b'{"num_train_timesteps": 30}'  # a test may do so
    assert len({*shas, hub.repos[repo].at().sha}) == 3
    for revision, steps, content in ((shas[0], 10, BIG), (shas[1], 20, BIG[1:]), ("main", 30, BIG[1:])):
        scheduler = DDPMScheduler.from_pretrained(repo, revision=revision, cache_dir=tmp_path, token=TOKEN)
        assert scheduler.config.num_train_timesteps == steps
        found = hf_hub_download(repo, "w", revision=revision, cache_dir=tmp_path, token=TOKEN)
        assert Path(found).read_bytes() == content
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=tmp_path, token=TOKEN))
        assert json.loads((folder / "scheduler_config.json").read_text()) == {"num_train_timesteps": steps}
        assert (folder / "w").read_bytes() == content
    assert model_info(repo, revision=shas[0][:7], token=TOKEN).sha == shas[0]


def test_commits_tell_what_they_did(hub, api, repo):
    push(api, repo, {"b": b"1", "a": b"1", "old/x": b"1", "old/y": b"1"}, message="first")
    push(api, repo, {"w.safetensors": BIG, "a": b"2"}, deleted=["b", "old/"], message="second")
    first, second = reversed(hub.repos[repo].at().history()[:-1])
    assert hub.repos[repo].commits == [first.message, second.message] == ["first", "second"]
    assert (first.added, first.deleted) == (["b", "a", "old/x", "old/y"], [])
    assert (second.added, second.deleted) == (["w.safetensors", "a"], ["b", "old/x", "old/y"])
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["second", "first", "initial commit"]
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        push(api, repo, {}, deleted=["nowhere"])


def test_a_commit_whose_parent_is_not_the_newest_is_refused(hub, api, repo):
    first = push(api, repo, {"a": b"1"})
    push(api, repo, {"a": b"2"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        push(api, repo, {"a": b"3"}, parent_commit=first)
    assert error.value.response.status_code == 412 and hub.repos[repo].files == {"a": b"2"}


def test_requests_are_kept_with_their_times(hub, api, repo):
    start = time.time()
    push(api, repo, {"a": b"1"}, revision="main")
    names = [f"POST /api/models/{repo}/{what}/main" for what in ("preupload", "commit")]
    assert hub.requests == ["POST /api/repos/create", *names]
    assert [hub.requests[-1].method, hub.requests[-1].path] == names[1].split()
    assert hub.requests[0].time <= start <= hub.requests[1].time <= hub.requests[2].time <= time.time()


# Files ---------------------------------------------------------------------------------------------------------------


def test_models_and_data_sets_are_apart(hub, api):
    for kind in ("model", "dataset"):
        assert not api.repo_exists("user/fox", repo_type=kind)
        api.create_repo("fox", repo_type=kind)
        push(api, "user/fox", {f"{kind}.bin": BIG}, repo_type=kind)
    assert set(hub.repos) == {"user/fox", "datasets/user/fox"}
    for kind in ("model", "dataset"):
        assert api.list_repo_files("user/fox", repo_type=kind) == [f"{kind}.bin"]
        assert Path(api.hf_hub_download("user/fox", f"{kind}.bin", repo_type=kind)).read_bytes() == BIG
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("fox", repo_type="dataset")


def test_files_and_folders_are_listed(api, repo):
    files = {"a/b/c.txt": b"12", "a/d.safetensors": b"123", "e.bin": BIG}
    first = push(api, repo, files, message="first")
    last = push(api, repo, {"a/b/c.txt": b"3"}, message="last")
    assert [entry.path for entry in api.list_repo_tree(repo)] == ["a", "e.bin"]
    assert [entry.path for entry in api.list_repo_tree(repo, "a")] == ["a/b", "a/d.safetensors"]
    found = list(api.list_repo_tree(repo, recursive=True, expand=True))
    changed = {entry.path: entry.last_commit.oid for entry in found}
    assert changed == {"a": last, "a/b": last, "a/b/c.txt": last, "a/d.safetensors": first, "e.bin": first}
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))

    folder, small, large = api.get_paths_info(repo, ["a/b", "a/b/c.txt", "nowhere", "e.bin"], revision=first)
    assert folder.path == "a/b" and folder.last_commit is None
    assert (small.size, small.lfs, small.blob_id) == (2, None, hashlib.sha1(b"blob 2\x0012").hexdigest())
    assert (large.size, large.lfs.sha256) == (len(BIG), hashlib.sha256(BIG).hexdigest())
    [sibling] = [entry for entry in api.model_info(repo, files_metadata=True).siblings if entry.rfilename == "e.bin"]
    assert sibling.lfs.sha256 == large.lfs.sha256 and sibling.size == len(BIG)


def test_what_is_told_of_a_file(api, repo):
    sha = push(api, repo, {"a": b"12", "b.bin": BIG})
    small, large = (api.get_hf_file_metadata(url=hf_hub_url(repo, name)) for name in ("a", "b.bin"))
    assert (small.commit_hash, small.etag, small.size) == (sha, hashlib.sha1(b"blob 2\x0012").hexdigest(), 2)
    assert (large.commit_hash, large.etag, large.size) == (sha, hashlib.sha256(BIG).hexdigest(), len(BIG))
    headers = get_session().head(hf_hub_url(repo, "b.bin")).headers
    assert headers["X-Linked-Etag"] == f'"{large.etag}"' and headers["X-Linked-Size"] == str(len(BIG))
    assert "X-Linked-Etag" not in get_session().head(hf_hub_url(repo, "a")).headers
    with pytest.raises(RemoteEntryNotFoundError) as error:
        api.hf_hub_download(repo, "nowhere")
    assert error.value.response.headers["X-Repo-Commit"] == sha


@pytest.mark.parametrize(
    "asked, part", [("2-4", b"234"), ("7-", b"789"), ("-2", b"89"), ("8-99", b"89"), ("10-", None)]
)
def test_a_part_of_a_file(api, repo, asked, part):
    push(api, repo, {"digits": b"0123456789"})
    answer = get_session().get(hf_hub_url(repo, "digits"), headers={"Range": f"bytes={asked}"})
    if part is None:
        assert answer.status_code == 416 and answer.headers["Content-Range"] == "bytes */10"
    else:
        start = b"0123456789".index(part)
        assert answer.status_code == 206 and answer.content == part
        assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/10"


def test_large_files_are_uploaded_in_parts(hub, api, repo, waits):
    hub.chunk_size = 500_000
    hub.faults.append(Fault("PUT /lfs/part/.*/2", status=500, times=1))
    push(api, repo, {"big.bin": BIG, "small.safetensors": b"small"})
    assert hub.repos[repo].files == {"big.bin": BIG, "small.safetensors": b"small"}
    puts = [request.path.split("/") for request in hub.requests if request.method == "PUT"]
    assert sorted(path[4] for path in puts if path[2] == "part") == ["1", "2", "2", "3"]
    assert [path[2] for path in puts].count("upload") == 1 and waits == [1]


def test_the_card_is_read(api, repo):
    card = b"---\nlicense: mit\ntags: [fox, lpl]\ndatasets: [user/pictures]\nlibrary_name: diffusers\n---\n# Fox\n"
    push(api, repo, {"README.md": card})
    info = api.model_info(repo)
    assert info.card_data.license == "mit" and info.card_data.datasets == ["user/pictures"]
    assert {"fox", "lpl", "license:mit", "dataset:user/pictures", "diffusers"} == set(info.tags)
    assert info.library_name == "diffusers" and info.author == "user" and not info.private and info.gated is False
    push(api, repo, {"README.md": b"no metadata"})
    assert api.model_info(repo).tags == []
    with pytest.raises(ValueError, match="Invalid metadata"):
        push(api, repo, {"README.md": b"---\na: [\n---\n"})


# Who may do what -----------------------------------------------------------------------------------------------------


def test_whoami(api, hub):
    assert api.whoami()["name"] == "user" and [org["name"] for org in api.whoami()["orgs"]] == ["team"]
    roles = {token: HfApi(token=token).whoami()["auth"]["accessToken"]["role"] for token in (TOKEN, READ)}
    assert roles == {TOKEN: "write", READ: "read"}
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_a_token_for_reading_does_not_write(hub, api, repo):
    push(api, repo, {"a": b"1"})
    reader, seen = HfApi(token=READ), len(hub.requests)
    assert Path(reader.hf_hub_download(repo, "a")).read_bytes() == b"1"
    reader.auth_check(repo)
    for write in (
        lambda: reader.create_repo("new"),
        lambda: reader.auth_check(repo, write=True),
        lambda: reader.create_branch(repo, branch="x"),
        lambda: push(reader, repo, {"a": b"2"}),
        lambda: push(reader, repo, {}, deleted=["a"]),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            write()
        assert error.value.response.status_code == 403
    assert list(hub.repos) == [repo] and hub.repos[repo].commits == ["push"] and len(hub.requests) == seen + 8
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone/fox")
    assert api.create_repo("team/fox").repo_id == "team/fox"


@pytest.mark.parametrize(
    "how, token, error, status",
    [
        ("public", False, None, None),
        ("public", "hf_wrong", HfHubHTTPError, 401),
        ("private", False, RepositoryNotFoundError, 401),
        ("private", "hf_wrong", HfHubHTTPError, 401),
        ("private", OTHER, RepositoryNotFoundError, 404),
        ("private", READ, None, None),
        ("gated", False, GatedRepoError, 401),
        ("gated", "hf_wrong", HfHubHTTPError, 401),
        ("gated", OTHER, GatedRepoError, 403),
        ("gated", READ, None, None),
        ("nowhere", OTHER, RepositoryNotFoundError, 404),
    ],
)
def test_who_may_read(hub, how, token, error, status):
    if how != "nowhere":
        hub.repos["user/fox"] = Repository(private=how == "private", gated=how == "gated", files={"a": b"1"})
    someone = HfApi(token=token)

    def read():
        return Path(hf_hub_download("user/fox", "a", token=token)).read_bytes()

    if error is None:
        assert read() == b"1" and someone.auth_check("user/fox") is None
        return
    for attempt in (read, lambda: someone.auth_check("user/fox")):
        with pytest.raises(error) as raised:
            attempt()
        assert type(raised.value) is error and raised.value.response.status_code == status
    if how == "gated" and token != "hf_wrong":
        assert someone.model_info("user/fox").gated  # what it is can be seen
    if how != "nowhere":
        hub.repos["user/fox"].readers.add("someone")
        assert token != OTHER or read() == b"1"


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_the_client_tries_again(hub, api, repo, waits, status):
    hub.faults.append(fault := Fault("PUT /lfs", status=status, times=2))
    push(api, repo, {"w.bin": BIG})
    assert waits == [1, 2] and fault.hits == 2 and hub.repos[repo].files == {"w.bin": BIG}


def test_the_client_waits_as_long_as_it_is_told(hub, api, repo, waits):
    hub.faults.append(Fault("preupload", status=429, times=1, retry_after=7))
    push(api, repo, {"a": b"1"})
    assert waits == [8]  # the client adds a second


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 500])
def test_what_the_client_does_not_try_again(hub, api, repo, waits, status):
    hub.faults.append(Fault(r"POST .*/commit/main", status=status, times=1, message="so it is"))
    with pytest.raises(HfHubHTTPError, match="so it is") as error:
        push(api, repo, {"a": b"1"})
    assert error.value.response.status_code == status and not waits and not hub.repos[repo].commits
    push(api, repo, {"a": b"1"})
    assert hub.repos[repo].commits == ["push"]


def test_a_fault_can_be_told_in_the_words_of_the_hub(hub, api, repo):
    hub.faults += [Fault("commit", status=412, times=1), Fault("commit", status=404, code="RepoNotFound")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push(api, repo, {"a": b"1"})
    with pytest.raises(RepositoryNotFoundError):
        push(api, repo, {"a": b"1"})


@pytest.mark.parametrize("sent", [0, 100_000])
def test_a_connection_that_breaks_in_an_upload(hub, api, repo, waits, sent):
    hub.faults.append(Fault("PUT /lfs", cut_body=sent, times=2))
    push(api, repo, {"w.bin": BIG})
    assert waits == [1, 2] and hub.repos[repo].files == {"w.bin": BIG}


def test_a_download_goes_on_where_the_connection_broke(hub, api, repo, waits, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    push(api, repo, {"w.bin": BIG})
    for sent in (300_000, len(BIG) - 300_000):  # the rest is enough
        hub.faults.append(Fault("GET .*/resolve/", cut_answer=sent, times=1))
    assert Path(api.hf_hub_download(repo, "w.bin")).read_bytes() == BIG
    assert [request.method for request in hub.requests[-3:]] == ["HEAD", "GET", "GET"] and waits == [1]


@pytest.mark.parametrize("stopped", [False, True])
def test_half_a_commit_is_none(hub, api, repo, stopped):
    push(api, repo, {"a": b"1"})
    head = [f"POST /api/models/{repo}/commit/main HTTP/1.1", f"Authorization: Bearer {TOKEN}", "Content-Length: 999"]
    lines = [{"key": "header", "value": {"summary": "half"}}, {"key": "deletedFile", "value": {"path": "a"}}]
    hub.faults.append(Fault("/commit/"))  # none but that it tells
    with socket.create_connection(("127.0.0.1", hub.port), timeout=5) as connection:
        connection.sendall("\r\n".join([*head, "", "\n".join(map(json.dumps, lines))]).encode())
        hub_has_it = hub.faults[0].reached.wait(5)
        hub.stop() if stopped else connection.shutdown(socket.SHUT_WR)
        assert hub_has_it and connection.recv(1) == b""
    assert hub.repos[repo].commits == ["push"] and hub.repos[repo].files == {"a": b"1"}


@pytest.mark.parametrize("received", [0, 5])
def test_what_was_done_stays_done_where_the_answer_is_lost(hub, api, repo, received):
    hub.faults.append(Fault("/commit/", cut_answer=received, times=1))
    with pytest.raises(HTTPError):
        push(api, repo, {"a": b"1"})
    assert hub.repos[repo].commits == ["push"]
    push(api, repo, {"a": b"1"})  # the client finds it there
    assert hub.repos[repo].commits == ["push"]


def test_an_answer_that_comes_when_it_is_let_go(hub, api, repo):
    hub.faults.append(fault := Fault("/commit/", hold=threading.Event(), times=1))
    thread = in_background(push, api, repo, {"a": b"1"})
    assert fault.reached.wait(5)
    assert api.model_info(repo).siblings == []  # others are served meanwhile
    assert thread.is_alive() and not hub.repos[repo].commits
    fault.hold.set()
    thread.join(5)
    assert thread.result == hub.repos[repo].at().sha and hub.repos[repo].commits == ["push"]


def test_an_answer_that_takes_its_time(hub, api, repo):
    hub.faults.append(Fault("revision|models", delay=0.2, times=1))
    start = time.monotonic()
    api.model_info(repo)
    assert time.monotonic() - start >= 0.2
    start = time.monotonic()
    api.model_info(repo)
    assert time.monotonic() - start < 0.2


def test_a_hub_that_goes_away_and_comes_back(hub, api, repo, waits):
    push(api, repo, {"a": b"1"})
    address = hub.url
    hub.stop()
    with pytest.raises(HTTPError):
        api.model_info(repo)
    waits.call = lambda: hub.start() if len(waits) == 2 else None
    push(api, repo, {"w.bin": BIG})
    assert waits == [1, 2] and hub.url == address and set(hub.repos[repo].files) == {"a", "w.bin"}


@pytest.mark.parametrize("fault", [Fault("/commit/", hold=threading.Event()), Fault("/commit/", delay=60)])
def test_a_hub_that_goes_away_drops_what_it_is_at(hub, api, repo, fault):
    hub.faults.append(fault)
    thread = in_background(push, api, repo, {"a": b"1"})
    assert fault.reached.wait(5)
    hub.stop()
    thread.join(5)
    assert isinstance(thread.result, HTTPError)
    hub.start()
    assert api.model_info(repo).siblings == [] and not hub.repos[repo].commits


# datasets ------------------------------------------------------------------------------------------------------------


def picture(color):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(tmp_path, captions):
    images = [{"bytes": picture(caption), "path": None} for caption in captions]
    features = Features({"image": ImageFeature(), "text": Value("string")})
    Dataset.from_dict({"image": images, "text": captions}, features=features).to_parquet(tmp_path / "rows.parquet")
    return (tmp_path / "rows.parquet").read_bytes()


LOAD = """
import json, sys
from datasets import Dataset, load_dataset

def rows(name, **options):
    return [[row["text"], row["image"].getpixel((0, 0))] for row in load_dataset(name, split="train", **options)]

sha, found = sys.argv[1], {}
for name in ("user/shards", "user/folder"):
    for streaming in (False, True):
        found[f"{name} {streaming}"] = rows(name, streaming=streaming)
found["old"] = rows("user/shards", streaming=True, revision=sha)
found["branch"] = rows("user/shards", revision="other")
Dataset.from_dict({"text": ["a", "b"]}).push_to_hub("user/pushed", private=True)
found["pushed"] = load_dataset("user/pushed", split="train")["text"][:]
print(json.dumps(found))
"""


def test_data_sets_are_loaded_streamed_and_pushed(hub, tmp_path):
    shards = hub.repos["datasets/user/shards"] = Repository(
        files={"data/train-0.parquet": parquet(tmp_path, ["blue"])}
    )
    old = shards.at().sha
    shards.branches["other"] = shards.at()
    shards.commit("More", shards.files | {"data/train-0.parquet": parquet(tmp_path, ["red", "lime"])})
    shards.commit("Black", {"data/train-0.parquet": parquet(tmp_path, ["black"])}, "other")
    files = {"red.png": picture("red"), "more/lime.png": picture("lime")}
    lines = [json.dumps({"file_name": path, "text": Path(path).stem}) for path in files]
    hub.repos["datasets/user/folder"] = Repository(files=files | {"metadata.jsonl": "\n".join(lines).encode()})

    environment = os.environ | hub.env | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", LOAD, old]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)

    both = [["lime", [0, 255, 0]], ["red", [255, 0, 0]]]
    for name in ("user/shards", "user/folder"):
        assert sorted(found[f"{name} False"]) == sorted(found[f"{name} True"]) == both
    assert found["old"] == [["blue", [0, 0, 255]]] and found["branch"] == [["black", [0, 0, 0]]]
    pushed = hub.repos["datasets/user/pushed"]
    assert found["pushed"] == ["a", "b"] and pushed.private and "data/train-00000-of-00001.parquet" in pushed.files
