"""A stand-in for the Hugging Face Hub on localhost, which the real huggingface_hub and datasets talk to.

    with HubServer(token="hf_test") as hub:
        hub.env  # HF_ENDPOINT and the like, for a subprocess (huggingface_hub reads them when it is imported)
        hub.connect(monkeypatch, tmp_path)  # the same for this process
        hub.repos["user/name"].files["README.md"]  # bytes: what main holds now; a test may put files there, too
        hub.repos["datasets/user/name"]  # data sets are repositories of their own
        hub.repos["user/name"].at("step-100").history()  # commits of a branch, newest first: message, added, deleted
        hub.faults.append(Fault("PUT /lfs", status=503, times=2))  # what goes wrong, see Fault
        hub.stop(), hub.start()  # gone, and back at the same address
        hub.requests  # "METHOD /path" of all that came in, in order

Everything is kept in memory. Files of 1 MB or more, weights and parquet files travel by LFS. What the Hub has and this
has not: Xet, pull requests, tags, pages of long lists, and storage on another host.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".parquet")
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"  # where a file is


# What the Hub holds --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Commit:
    """One commit: what it says, and all files after it (path -> content), which nobody changes afterwards."""

    message: str
    files: dict[str, bytes]
    parent: "Commit | None" = None
    description: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def added(self) -> list[str]:
        """Paths that are new or have changed; those of one commit in the order in which they were sent."""
        before = self.parent.files if self.parent else {}
        return [path for path, content in self.files.items() if before.get(path) != content]

    @property
    def deleted(self) -> list[str]:
        """Paths that are gone."""
        return [path for path in (self.parent.files if self.parent else ()) if path not in self.files]

    @cached_property
    def sha(self) -> str:
        """40 hex digits that depend on all that led here."""
        blobs = {path: _git_oid(content) for path, content in sorted(self.files.items())}
        facts = [self.parent and self.parent.sha, self.message, self.description, blobs]
        return hashlib.sha1(json.dumps(facts).encode()).hexdigest()

    def history(self) -> list["Commit"]:
        """This commit and those before it, newest first; the last one is the empty beginning."""
        found = [self]
        while parent := found[-1].parent:
            found.append(parent)
        return found


@dataclass
class Repository:
    """One repository. A test may change `files`, main's newest: the next request finds the change committed."""

    private: bool = False  # for its owner and `readers` only; to others it does not exist
    gated: bool = False  # its files are for its owner and `readers` only
    files: dict[str, bytes] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)  # names of users
    kind: str | None = None  # "models" or "datasets"; None, as a test makes it: whatever it is asked for as
    branches: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("initial commit", {})})

    @property
    def commits(self) -> list[str]:
        """Messages of main's commits, oldest first, without the beginning."""
        return [commit.message for commit in reversed(self.at().history())][1:]

    def commit(self, message: str, files: dict[str, bytes], branch: str = "main", description: str = "") -> Commit:
        """Make `files` all files of `branch`."""
        self.branches[branch] = Commit(message, dict(files), self.branches[branch], description)
        if branch == "main":
            self.files = dict(files)
        return self.branches[branch]

    def at(self, revision: str = "main") -> Commit:
        """The newest commit of a branch, or the commit whose sha begins so (7 digits or more); else KeyError."""
        if self.files != self.branches["main"].files:
            self.commit("Files that a test put there", self.files)
        if revision in self.branches:
            return self.branches[revision]
        for commit in (commit for head in self.branches.values() for commit in head.history()):
            if len(revision) >= 7 and commit.sha.startswith(revision):
                return commit
        raise KeyError(revision)


@dataclass
class Account:
    """What a token stands for."""

    user: str
    role: str = "write"  # or "read"
    orgs: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        return repo.partition("/")[0] in (self.user, *self.orgs)


# What goes wrong -----------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What happens to the first `times` requests whose "METHOD /path" the regular expression `pattern` is found in.

    A request waits for `delay` seconds and until `hold` is set; then it is cut, refused with `status`, or carried out.
    The first fault of `HubServer.faults` that matches is the only one that happens to a request.
    """

    pattern: str
    status: int | None = None  # answered instead, and nothing is done
    times: int | None = None  # None: always
    message: str = ""
    code: str = ""  # of X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo
    retry_after: int | None = None  # seconds, told to the client
    delay: float = 0.0
    hold: threading.Event | None = None
    cut_body: int | None = None  # the connection breaks after so many bytes of the request's body; nothing is done
    cut_answer: int | None = None  # it is done, but the connection breaks after so many bytes; 0: no answer at all
    hits: int = 0  # requests that it happened to
    reached: threading.Event = field(default_factory=threading.Event)  # set by the first of them

    def happens_to(self, request: str) -> bool:
        if self.hits == self.times or not re.search(self.pattern, request):
            return False
        self.hits += 1
        self.reached.set()
        return True

    def refusal(self) -> "_Refusal":
        said = {412: "A commit has happened since. Please refresh and try again."}
        message = self.message or said.get(self.status) or HTTPStatus(self.status).phrase
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return _Refusal(self.status, self.code, message, headers=retry)


class Request(str):
    """A request as "METHOD /path", and its `method`, `path` and `time` (seconds, as `time.time()`) apart."""

    method: str
    path: str
    time: float

    def __new__(cls, method: str, path: str) -> "Request":
        request = super().__new__(cls, f"{method} {path}")
        request.method, request.path, request.time = method, path, time.time()
        return request


# The server ----------------------------------------------------------------------------------------------------------


class HubServer:
    """Serves on a port of 127.0.0.1 from `start` to `stop`, or inside of a `with` block.

    Without a token, what is public can be read. `token` is `user`'s, who belongs to `orgs`, and so is `read_token`,
    which may not write. Other people's go into `tokens`.
    """

    def __init__(
        self,
        token: str = "hf_test",
        user: str = "user",
        read_token: str | None = None,
        orgs: tuple[str, ...] = ("team",),
        chunk_size: int | None = None,
    ):
        self.token = token
        self.tokens = {token: Account(user, "write", orgs)}
        if read_token:
            self.tokens[read_token] = Account(user, "read", orgs)
        self.repos: dict[str, Repository] = {}  # "user/name", "datasets/user/name"
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.parts: dict[tuple[str, int], bytes] = {}  # LFS: (sha256 of the whole, number of the part) -> content
        self.chunk_size = chunk_size  # LFS: files of more bytes are uploaded in parts
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.Lock()  # one request is worked on at a time
        self.port = 0
        self.listener: _Listener | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that turn a process's huggingface_hub towards this server."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        return {**settings, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def connect(self, monkeypatch, home: Path) -> None:
        """Turn this process's huggingface_hub towards this server until the test is over.

        It reads its settings when it is imported, and looks them up in its `constants` at every call. `home` is where
        it keeps what it downloads; nobody is logged in there. datasets keeps the address that it was imported with:
        what loads data sets from here needs a process of its own, with `env`.
        """
        from huggingface_hub import constants, hf_api

        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # of huggingface_hub.model_info and the like
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(variable, raising=False)
        address = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + TEMPLATE}
        places = {"HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token")}
        for name, value in {**address, **places, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)

    @staticmethod
    def without_waits(monkeypatch) -> None:
        """This process's client tries again at once until the test is over."""
        from huggingface_hub import file_download
        from huggingface_hub.utils import _http

        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))

    def start(self) -> "HubServer":
        self.listener = _Listener(self)
        self.port = self.listener.server_port
        threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Break all connections, whatever is going on there, and take no more; nothing if it has stopped already."""
        if self.listener:
            self.listener.close()
            self.listener = None

    __enter__ = start

    def __exit__(self, *_exception) -> None:
        self.stop()

    def find(self, kind: str, repo: str) -> Repository | None:
        """The repository `user/name` of a kind, "models" or "datasets"."""
        found = [self.repos.get(key) for key in (f"{kind}/{repo}", repo)]
        return next((entry for entry in found if entry and entry.kind in (None, kind)), None)


class _Listener(ThreadingHTTPServer):
    """What `HubServer` is between `start` and `stop`: the socket, and the connections that `stop` has to break."""

    daemon_threads = True

    def __init__(self, hub: HubServer):
        self.hub, self.closed, self.connections = hub, threading.Event(), set()
        super().__init__(("127.0.0.1", hub.port), _Handler)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            _break(connection)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # a client may go away
            super().handle_error(request, client_address)


class Answer(NamedTuple):
    """What a route answers with, if it is more than a body: bytes, or something to send as JSON."""

    body: object
    headers: dict[str, str] = {}
    status: int = 200


class _Refusal(Exception):
    """An answer other than 200: status, the Hub's error code, and what is said."""

    def __init__(self, status: int, code: str = "", message: str = "refused", headers: dict | None = None, **body):
        super().__init__(message)
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer({"error": message, **body}, told, status)


class _Cut(Exception):
    """The connection breaks here."""


class _Handler(BaseHTTPRequestHandler):
    """Matches method and path with ROUTES, after what `faults` have in store for the request."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the client waits 40 ms for each body

    def _serve(self) -> None:
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(url.query)
        with self.hub.lock:
            self.hub.requests.append(request := Request(self.command, unquote(url.path)))
            fault = next((fault for fault in self.hub.faults if fault.happens_to(request)), Fault(""))
        try:
            self._wait(fault)
            self.body = self._read(fault.cut_body)
            self._send(self._answer(url.path, fault), fault.cut_answer)
        except _Cut:
            self.close_connection = True
            _break(self.connection)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _wait(self, fault: Fault) -> None:
        self.server.closed.wait(fault.delay)
        while fault.hold and not (fault.hold.wait(0.02) or self.server.closed.is_set()):
            pass
        if self.server.closed.is_set():
            raise _Cut

    def _read(self, cut: int | None) -> bytes:
        """The request's body."""
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length if cut is None else min(cut, length))
        if cut is not None or len(body) < length:  # half a commit must not be carried out
            raise _Cut
        return body

    def _answer(self, path: str, fault: Fault) -> Answer:
        try:
            if fault.status:
                raise fault.refusal()
            with self.hub.lock:
                answer = self._route(path)
            return answer if isinstance(answer, Answer) else Answer(answer)
        except _Refusal as refusal:
            return refusal.answer

    def _route(self, path: str):
        for method, pattern, function in ROUTES:
            if method in (self.command, self.command.replace("HEAD", "GET")) and (found := pattern.fullmatch(path)):
                return function(self, **{name: value and unquote(value) for name, value in found.groupdict().items()})
        raise _Refusal(404, message=f"no route for {self.command} {path}")

    def _send(self, answer: Answer, cut: int | None) -> None:
        if cut == 0:
            raise _Cut
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, default=str).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            raise _Cut

    def log_message(self, *_arguments) -> None:
        """Say nothing; `HubServer.requests` remembers."""

    # for the routes

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def asked_for(self, flag: str) -> bool:
        """Whether the address holds `?flag=true`."""
        return self.query.get(flag, [""])[0].lower() in ("true", "1")

    @property
    def account(self) -> Account | None:
        """Whose token came with the request; None without one."""
        header = self.headers.get("Authorization")
        if header is not None and header.removeprefix("Bearer ") not in self.hub.tokens:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[header.removeprefix("Bearer ")] if header else None

    def repository(self, kind: str, repo: str, gate: bool = False, write: bool = False) -> Repository:
        """The repository, if the token allows that much: seeing it, having its files where it is gated, writing."""
        found, account = self.hub.find(kind, repo), self.account
        owner = account is not None and account.owns(repo)
        reader = owner or (found is not None and account is not None and account.user in found.readers)
        if found is None or (found.private and not reader):  # one 401 of many for the client, but for its code
            raise _Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
        if gate and found.gated and not reader:
            raise _Refusal(403 if account else 401, "GatedRepo", f"Access to {repo} is restricted")
        if write and not (owner and account.role == "write"):
            raise _Refusal(403 if account else 401, message=f"This token may not write to {repo}")
        return found


def _break(connection: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RDWR)


# Routes --------------------------------------------------------------------------------------------------------------

ROUTES: list[tuple[str, re.Pattern, Callable]] = []
API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"  # a slash in it comes as %2F


def route(method: str, pattern: str) -> Callable:
    """Register a function for `method` and paths that match `pattern`; it returns a body or an `Answer`."""
    return lambda function: ROUTES.append((method, re.compile(pattern), function)) or function


@route("GET", "/api/whoami-v2")
def whoami(request: _Handler):
    account = request.account
    if account is None:
        raise _Refusal(401, message="Invalid username or password")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
    orgs = [{"type": "org", "name": name} for name in account.orgs]
    return {"type": "user", "name": account.user, "fullname": account.user, "orgs": orgs, "auth": token}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: _Handler):
    try:
        missing = _metadata(request.json()["content"]) is None
    except yaml.YAMLError as error:
        raise _Refusal(400, message="Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
    return {"errors": [], "warnings": [{"message": "there is no metadata"}] if missing else []}


@route("POST", "/api/repos/create")
def create(request: _Handler):
    asked, account = request.json(), request.account
    if account is None:
        raise _Refusal(401, message="Invalid username or password")
    kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or account.user}/{asked['name']}"
    if account.role != "write" or not account.owns(name):
        raise _Refusal(403, message=f"This token may not create {name}")
    url = _page(request, kind, name)
    if request.hub.find(kind, name):
        raise _Refusal(409, message="You already created this repository", url=url)
    private = bool(asked.get("private") or asked.get("visibility") == "private")
    request.hub.repos[name if kind == "models" else f"{kind}/{name}"] = Repository(private, kind=kind)
    return {"url": url, "name": name}


@route("GET", f"{API}/auth-check(?P<write>/write)?")
def auth_check(request: _Handler, kind: str, repo: str, write: str | None):
    request.repository(kind, repo, gate=True, write=bool(write))
    return {}


@route("GET", f"{API}(/revision/{REVISION})?")
def info(request: _Handler, kind: str, repo: str, revision: str | None):
    repository = request.repository(kind, repo)
    commit = _at(repository, revision or "main")
    card = _metadata(commit.files.get("README.md", b"").decode()) or {}
    known = {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    return {
        **{"id": repo, "author": repo.partition("/")[0], "sha": commit.sha, "lastModified": commit.date},
        **{"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False},
        **{"cardData": card, "tags": _tags(card), **known},
        "siblings": [_sibling(path, commit.files[path], request.asked_for("blobs")) for path in sorted(commit.files)],
    }


@route("GET", f"{API}/refs")
def refs(request: _Handler, kind: str, repo: str):
    repository = request.repository(kind, repo)
    repository.at()
    heads = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.sha}
        for name, commit in repository.branches.items()
    ]
    return {"branches": heads, "converts": [], "tags": [], "pullRequests": []}


@route("GET", f"{API}/commits/{REVISION}")
def commits(request: _Handler, kind: str, repo: str, revision: str):
    return [
        {**_last_commit(commit), "message": commit.description, "authors": [{"user": repo.partition("/")[0]}]}
        for commit in _at(request.repository(kind, repo), revision).history()
    ]


@route("POST", f"{API}/branch/{REVISION}")
def create_branch(request: _Handler, kind: str, repo: str, revision: str):
    repository = request.repository(kind, repo, write=True)
    if revision in repository.branches:
        raise _Refusal(409, message=f"The branch {revision} exists already")
    repository.branches[revision] = _at(repository, request.json().get("startingPoint") or "main")
    return {}


@route("GET", f"{API}/tree/{REVISION}(/(?P<folder>.+))?")
def tree(request: _Handler, kind: str, repo: str, revision: str, folder: str | None):
    commit = _at(request.repository(kind, repo), revision)
    inside = f"{folder}/" if folder else ""
    paths = [path for path in _folders_and_files(commit) if path.startswith(inside)]
    if folder and not paths:
        raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
    if not request.asked_for("recursive"):
        paths = [path for path in paths if "/" not in path.removeprefix(inside)]
    return [_entry(commit, path, request.asked_for("expand")) for path in paths]


@route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(request: _Handler, kind: str, repo: str, revision: str):
    commit, form = _at(request.repository(kind, repo), revision), parse_qs(request.body.decode())
    there = set(_folders_and_files(commit))
    return [_entry(commit, path, form.get("expand") == ["true"]) for path in form.get("paths", ()) if path in there]


@route("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(request: _Handler, kind: str | None, repo: str, revision: str, path: str):
    commit = _at(request.repository(kind or "models", repo, gate=True), revision)
    if path not in commit.files:
        raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
    content, large = commit.files[path], _is_large(path, len(commit.files[path]))
    etag = f'"{_sha256(content) if large else _git_oid(content)}"'
    linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))} if large else {}
    headers = {"ETag": etag, "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", **linked}
    if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", "")):
        return _part(content, headers, *asked.groups())
    return Answer(content, headers)


# Routes: uploads


@route("POST", f"{API}/preupload/{REVISION}")
def preupload(request: _Handler, kind: str, repo: str, revision: str):
    files = _head(request.repository(kind, repo, write=True), revision).files
    answers = []
    for asked in request.json()["files"]:
        large = _is_large(asked["path"], asked["size"])
        mode, oid = ("lfs", _sha256) if large else ("regular", _git_oid)
        known = oid(files[asked["path"]]) if asked["path"] in files else None
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
    return {"files": answers}


@route("POST", f"{PAGE}.git/info/lfs/objects/batch")
def lfs_batch(request: _Handler, kind: str | None, repo: str):
    request.repository(kind or "models", repo, write=True)
    objects = []
    for asked in request.json()["objects"]:
        known = asked["oid"] in request.hub.objects
        verify = {"href": f"{request.hub.url}/lfs/verify/{asked['oid']}"}
        actions = {"upload": _upload_action(request.hub, asked["oid"], asked["size"]), "verify": verify}
        objects.append({**asked, "authenticated": True, **({} if known else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


def _upload_action(hub: HubServer, oid: str, size: int) -> dict:
    """Where a file is sent to: in one go, or in parts, with an address for each and one to tell that all are there."""
    if hub.chunk_size is None or size <= hub.chunk_size:
        return {"href": f"{hub.url}/lfs/upload/{oid}"}
    count = -(-size // hub.chunk_size)
    parts = {str(number): f"{hub.url}/lfs/part/{oid}/{number}" for number in range(1, count + 1)}
    return {"href": f"{hub.url}/lfs/complete/{oid}", "header": {"chunk_size": str(hub.chunk_size), **parts}}


@route("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: _Handler, oid: str):
    return _keep(request.hub, oid, request.body)


@route("PUT", r"/lfs/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)")
def lfs_part(request: _Handler, oid: str, number: str):
    request.hub.parts[oid, int(number)] = request.body
    return Answer({}, {"ETag": f'"{_sha256(request.body)}"'})


@route("POST", "/lfs/complete/(?P<oid>[0-9a-f]{64})")
def lfs_complete(request: _Handler, oid: str):
    parts = [(request.hub.parts.get((oid, part["partNumber"]), b""), part["etag"]) for part in request.json()["parts"]]
    if any(etag.strip('"') != _sha256(content) for content, etag in parts):
        raise _Refusal(400, message="a part is missing")
    return _keep(request.hub, oid, b"".join(content for content, _ in parts))


@route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
def lfs_verify(request: _Handler, oid: str):
    if oid not in request.hub.objects:
        raise _Refusal(404, message="never uploaded")
    return {}


@route("POST", f"{API}/commit/{REVISION}")
def commit(request: _Handler, kind: str, repo: str, revision: str):
    repository = request.repository(kind, repo, write=True)
    before = _head(repository, revision)
    files, header = dict(before.files), {}
    for line in filter(None, request.body.splitlines()):
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "header":
            header = value
        else:
            _change(files, request.hub.objects, key, value)
    if not before.sha.startswith(header.get("parentCommit") or ""):
        raise _Refusal(412, message="A commit has happened since. Please refresh and try again.")
    after = repository.commit(header["summary"], files, revision, header.get("description", ""))
    url = f"{_page(request, kind, repo)}/commit/{after.sha}"
    return {"success": True, "commitUrl": url, "commitOid": after.sha}


def _change(files: dict[str, bytes], objects: dict[str, bytes], key: str, value: dict) -> None:
    """Carry out one line of a commit."""
    if key in ("deletedFile", "deletedFolder"):
        folder = f"{value['path'].rstrip('/')}/"
        gone = [path for path in files if path == value["path"] or key == "deletedFolder" and path.startswith(folder)]
        if not gone:
            raise _Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
        for path in gone:
            del files[path]
        return
    if key == "lfsFile" and value["oid"] not in objects:
        raise _Refusal(400, message=f"{value['path']} was never uploaded")
    files.pop(value["path"], None)  # so that what comes in stands last, in order
    files[value["path"]] = objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])


def _keep(hub: HubServer, oid: str, content: bytes) -> dict:
    if _sha256(content) != oid:
        raise _Refusal(400, message="the content is not what was announced")
    hub.objects[oid] = content
    return {}


# Parts of answers


def _page(request: _Handler, kind: str, repo: str) -> str:
    return f"{request.hub.url}/{'' if kind == 'models' else f'{kind}/'}{repo}"


def _at(repository: Repository, revision: str) -> Commit:
    try:
        return repository.at(revision)
    except KeyError:
        raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}") from None


def _head(repository: Repository, branch: str) -> Commit:
    """The newest commit of a branch that is written to; a sha will not do."""
    commit = _at(repository, branch)
    if branch not in repository.branches:
        raise _Refusal(404, "RevisionNotFound", f"{branch} is no branch")
    return commit


def _folders_and_files(commit: Commit) -> list[str]:
    folders = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
    return [*sorted(folders), *sorted(commit.files)]


def _entry(commit: Commit, path: str, expand: bool) -> dict:
    """What `tree` and `paths-info` tell of a file or a folder."""
    more = {"lastCommit": _last_commit(_last_change(commit, path))} if expand else {}
    if path not in commit.files:
        inside = [_git_oid(content) for name, content in sorted(commit.files.items()) if name.startswith(f"{path}/")]
        return {"type": "directory", "path": path, "size": 0, "oid": _git_oid(" ".join(inside).encode()), **more}
    content = commit.files[path]
    lfs = {"lfs": {**_lfs(content), "oid": _sha256(content)}} if _is_large(path, len(content)) else {}
    return {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content), **lfs, **more}


def _last_change(commit: Commit, path: str) -> Commit:
    """The newest commit that added or changed the file, or one in the folder."""
    return next(c for c in commit.history() if any(f"{added}/".startswith(f"{path}/") for added in c.added))


def _sibling(path: str, content: bytes, blobs: bool) -> dict:
    """What `info` tells of a file."""
    lfs = {"lfs": {**_lfs(content), "sha256": _sha256(content)}} if _is_large(path, len(content)) else {}
    return {"rfilename": path, **({"size": len(content), "blobId": _git_oid(content), **lfs} if blobs else {})}


def _lfs(content: bytes) -> dict:
    return {"size": len(content), "pointerSize": 134}


def _last_commit(commit: Commit) -> dict:
    return {"id": commit.sha, "title": commit.message, "date": commit.date}


def _part(content: bytes, headers: dict[str, str], first: str, last: str) -> Answer:
    """What `Range: bytes=first-last` asks for; without `first`, the last so many bytes."""
    size = len(content)
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise _Refusal(416, message="no such part", headers={"Content-Range": f"bytes */{size}"})
    return Answer(content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, 206)


def _metadata(readme: str) -> dict | None:
    """The YAML at the head of a model card; None without any, YAMLError where it is broken."""
    found = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", readme, re.DOTALL)
    metadata = yaml.safe_load(found[1]) if found else None
    if found and not isinstance(metadata, dict):
        raise yaml.YAMLError("metadata must be a mapping")
    return metadata


def _tags(card: dict) -> list[str]:
    """The card's own tags, and what the Hub makes tags of."""
    values = [("", "library_name"), ("", "tags"), ("dataset:", "datasets"), ("license:", "license")]
    values.append(("base_model:", "base_model"))
    listed = [(before, card.get(name) or []) for before, name in values]
    return [f"{before}{tag}" for before, tags in listed for tag in (tags if isinstance(tags, list) else [tags])]


def _is_large(path: str, size: int) -> bool:
    """Whether a file travels by LFS; empty ones never do."""
    return size >= 1_000_000 or (size > 0 and path.endswith(LFS_SUFFIXES))


def _git_oid(content: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
