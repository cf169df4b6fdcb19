"""A stand-in for the Hugging Face Hub: enough of its API for huggingface_hub to create, upload, list and download.

    with HubServer(token="hf_test") as hub:
        hub.env  # HF_ENDPOINT and the like, for a subprocess (huggingface_hub reads them when it is imported)
        hub.fail["commit"] = 403  # from now on every request whose path holds "commit" is answered with 403
        hub.repos["user/name"].files["README.md"]  # bytes

Everything is kept in memory. Files of 1 MB or more, and weights of any size, travel by LFS, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repository:
    """One repository: its newest files by path, and the messages of its commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        """40 hex digits that change with every commit."""
        return hashlib.sha1(json.dumps(self.commits).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 from `__enter__` to `__exit__`; requests without `token` get 401."""

    daemon_threads = True

    def __init__(self, token: str = "hf_test", user: str = "user"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.user = token, user
        self.repos: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.fail: dict[str, int] = {}  # part of a path -> status that is answered instead
        self.requests: list[str] = []  # "METHOD /path", in order
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that turn a process's huggingface_hub towards this server."""
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        return {**settings, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self.shutdown()
        self.server_close()


class _Refusal(Exception):
    """An answer other than 200: status, the Hub's error code, and what is said."""

    def __init__(self, status: int, code: str = "", message: str = "refused", **body):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.body = {"error": message, **body}


class _Handler(BaseHTTPRequestHandler):
    """Matches method and path with ROUTES; the route's function answers with what is sent as JSON, or bytes."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {path}")
        try:
            self._refuse(path)
            for method, pattern, function in ROUTES:
                if method in (self.command, self.command.replace("HEAD", "GET")) and (m := pattern.fullmatch(path)):
                    return self._send(200, *function(self, **m.groupdict()))
            raise _Refusal(404, message=f"no route for {self.command} {path}")
        except _Refusal as refusal:
            self._send(refusal.status, refusal.body, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _refuse(self, path: str) -> None:
        for part, status in self.server.fail.items():
            if part in path:
                raise _Refusal(status, message=f"{part} was told to fail")
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise _Refusal(401, message="Invalid username or password")

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_arguments) -> None:
        """Say nothing; `HubServer.requests` remembers."""

    def json(self) -> dict:
        return json.loads(self.body)

    def repository(self, repo: str) -> Repository:
        if repo not in self.server.repos:
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        return self.server.repos[repo]


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = r"(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """Register a function for `method` and paths that match `pattern`; it returns (body,) or (body, headers)."""
    return lambda function: ROUTES.append((method, re.compile(pattern), function)) or function


@route("POST", "/api/repos/create")
def create(request: _Handler):
    asked = request.json()
    name = f"{asked.get('organization') or request.server.user}/{asked['name']}"
    url = f"{request.server.url}/{name}"
    if name in request.server.repos:
        raise _Refusal(409, message="You already created this model repo", url=url)
    private = asked.get("private") or asked.get("visibility") == "private"
    request.server.repos[name] = Repository(private=bool(private))
    return ({"url": url, "name": name},)


@route("POST", "/api/validate-yaml")
def validate_yaml(request: _Handler):
    found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    try:
        correct = found and isinstance(yaml.safe_load(found[1]), dict)
    except yaml.YAMLError:
        correct = False
    if not correct:
        raise _Refusal(400, message="Invalid metadata", errors=[{"message": "no YAML"}], warnings=[])
    return ({"errors": [], "warnings": []},)


@route("GET", f"/api/models/{REPO}/auth-check(/write)?")
def auth_check(request: _Handler, repo: str):
    request.repository(repo)
    return ({},)


@route("POST", f"/api/models/{REPO}/preupload/main")
def preupload(request: _Handler, repo: str):
    files = request.repository(repo).files
    answers = []
    for asked in request.json()["files"]:
        large = asked["size"] >= 1_000_000 or asked["path"].endswith(".safetensors")
        oid = _oid(files[asked["path"]], large) if asked["path"] in files else None
        mode = "lfs" if large else "regular"
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return ({"files": answers},)


@route("POST", f"/{REPO}.git/info/lfs/objects/batch")
def lfs_batch(request: _Handler, repo: str):
    request.repository(repo)
    objects = []
    for asked in request.json()["objects"]:
        actions = {name: {"href": f"{request.server.url}/lfs/{name}/{asked['oid']}"} for name in ("upload", "verify")}
        known = asked["oid"] in request.server.objects
        objects.append({**asked, "authenticated": True, **({} if known else {"actions": actions})})
    return ({"transfer": "basic", "objects": objects},)


@route("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request: _Handler, oid: str):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refusal(400, message="the content is not what was announced")
    request.server.objects[oid] = request.body
    return ({},)


@route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
def lfs_verify(request: _Handler, oid: str):
    if oid not in request.server.objects:
        raise _Refusal(404, message="never uploaded")
    return ({},)


@route("POST", f"/api/models/{REPO}/commit/main")
def commit(request: _Handler, repo: str):
    repository = request.repository(repo)
    for line in filter(None, request.body.splitlines()):
        key, value = (entry := json.loads(line))["key"], entry["value"]
        if key == "header":
            repository.commits.append(value["summary"])
        elif key == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            repository.files[value["path"]] = request.server.objects[value["oid"]]
        elif key == "deletedFile":
            repository.files.pop(value["path"], None)
    url = f"{request.server.url}/{repo}/commit/{repository.sha}"
    return ({"success": True, "commitUrl": url, "commitOid": repository.sha},)


@route("GET", f"/api/models/{REPO}(/revision/[^/]+)?")
def model_info(request: _Handler, repo: str):
    repository = request.repository(repo)
    siblings = [{"rfilename": path} for path in sorted(repository.files)]
    return ({"id": repo, "sha": repository.sha, "private": repository.private, "tags": [], "siblings": siblings},)


@route("GET", f"/api/models/{REPO}/tree/.*")
def tree(request: _Handler, repo: str):
    files = request.repository(repo).files
    return ([{"type": "file", "path": p, "size": len(c), "oid": _oid(c, False)} for p, c in sorted(files.items())],)


@route("GET", f"/{REPO}/resolve/[^/]+/(?P<path>.+)")
def resolve(request: _Handler, repo: str, path: str):
    repository = request.repository(repo)
    if path not in repository.files:
        raise _Refusal(404, "EntryNotFound", "Entry not found")
    content = repository.files[path]
    return content, {"ETag": f'"{_oid(content, False)}"', "X-Repo-Commit": repository.sha}


def _oid(content: bytes, large: bool) -> str:
    """git's name of a blob; of a large file, its SHA-256."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
