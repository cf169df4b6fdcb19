"""The run's repository on the Hugging Face Hub: created before the training, pushed to, and resumed from.

Each function asks the Hub once; :mod:`lpl.publishing.uploads` tries again. All use the given token, or else that of
`hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
from httpx2 import HTTPError
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import _http

from lpl.config import Config
from lpl.config.checks import starting_points
from lpl.config.groups import Output
from lpl.tools import layout
from lpl.tools.privacy import hub_file, without_secrets
from lpl.training.checkpoints import Progress, checkpoint_path, find_checkpoints


logger = logging.getLogger(__name__)
MAIN = "main"  # the branch where --hub_revision names none
OF_A_RUN = (layout.LOG, layout.RECIPE, layout.SAMPLES)  # what a resumed run needs beside its checkpoint
SILENCE = 120.0  # seconds without a byte after which a connection is given up; the client alone waits for ever
LONGEST_WAIT = 300.0  # seconds between two tries
REFUSED = (401, 403)  # another try gets the same answer


class HubError(RuntimeError):
    """The Hub refuses or cannot be reached; the message is one sentence that names the flag to change."""


def prepare_repository(output: Output, lora: bool = False) -> str:
    """Create the model repository of --hub_model_id, by default named like the output folder, or find it.

    A new repository is private with --hub_private_repo, else as the account's settings say. The branch of
    --hub_revision is created if it does not exist.

    Args:
        lora: whether a LoRA is published, or a pipeline.

    Returns:
        The full id, `user/name`.

    Raises:
        HubError: no token, a name that the Hub does not accept, no permission to write, no network, or a result of the
            other kind in the repository.
    """
    name, token, private = _name(output), output.hub_token, output.hub_private_repo
    what = "--push_to_hub" if output.push_to_hub else "publishing"  # python -m lpl.publish has no such flag
    _check_token(token, what, ", or leave --push_to_hub out" if output.push_to_hub else "")
    try:
        full_id = api(token).create_repo(name, private=private or None, exist_ok=True).repo_id
        _check_write_permission(full_id, token)
        if output.hub_revision and output.hub_revision != MAIN:
            api(token).create_branch(full_id, branch=output.hub_revision, exist_ok=True)
        there = api(token).list_repo_files(full_id, revision=output.hub_revision)
    except (HTTPError, OSError, ValueError) as error:  # all that a request raises; ValueError for a bad name
        otherwise = "leave --push_to_hub out" if output.push_to_hub else ""
        raise HubError(f"{what}: {explain(error, name, otherwise)}") from error
    _check_kind(what, full_id, there, lora)
    if private:
        _warn_if_public(full_id, token)
    return full_id


def check_not_source(config: Config, repository: str) -> None:
    """Refuse to publish over what the run starts from.

    Args:
        repository: full id of the repository that the run publishes to.

    Raises:
        HubError: with the flag that names it as a source.
    """
    branch = config.output.hub_revision or MAIN
    for name, source in starting_points(config.model, config.lora):
        place = hub_file(source)
        revision = config.model.revision if name == "pretrained_model_name_or_path" else None
        revision = (place and place.revision) or revision or MAIN
        if (source if place is None else place.repository) == repository and revision == branch:
            raise HubError(
                f"--push_to_hub: {repository} is what the run starts from (--{name}), and would be written over; give "
                "another --hub_model_id or --hub_revision"
            )


def _check_kind(what: str, repo_id: str, files: list[str], lora: bool) -> None:
    """Refuse a repository with a result of the other kind, which would stay beside this one, under its card."""
    other = re.compile(re.escape(layout.INDEX) if lora else rf"{layout.LORA}|[^/]+{layout.PEFT_SUFFIX}/.*")
    if found := next(filter(other.fullmatch, files), None):
        kinds = ("LoRA", "pipeline") if lora else ("pipeline", "LoRA")
        raise HubError(
            f"{what}: {repo_id} has a {kinds[1]} ({found}), and this is a {kinds[0]}, whose card would be over "
            "both; give another --hub_model_id or --hub_revision"
        )


def _name(output: Output) -> str:
    return output.hub_model_id or Path(output.output_dir).resolve().name


def address(repo_id: str, revision: str | None = None) -> str:
    """The repository as --config takes it: ``user/name`` or ``user/name@branch``."""
    return repo_id if revision in (None, MAIN) else f"{repo_id}@{revision}"


def push(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    message: str = "End of training",
    replaced: str | None = None,
) -> str:
    """Upload a folder in one commit, so that nobody ever finds half of it.

    Args:
        replaced: a folder of the repository; its files that the commit does not bring are deleted.

    Returns:
        The page's address.

    Raises:
        Exception: anything that a request raises; nothing is committed then.
    """
    client, paths = api(token), [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    there = client.list_repo_files(repo_id, revision=revision) if replaced else []
    gone = [file for file in there if file.startswith(f"{replaced}/") and file not in files]
    operations = [*map(CommitOperationDelete, gone), *(CommitOperationAdd(*entry) for entry in files.items())]
    commit = client.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.repo_url)


def download_run(output: Output) -> None:
    """Put the last published checkpoint into the output folder, with log, samples and recipe, unless the folder has
    one of that step or a later one; for --resume_from_checkpoint hub.

    Raises:
        HubError: no token, no permission, or no network. A missing repository or checkpoint is a warning only.
    """
    flag, folder, name = "--resume_from_checkpoint hub", Path(output.output_dir), _name(output)
    _check_token(output.hub_token, flag, ", or resume from latest")
    try:
        remote = _download_checkpoint(output, folder / layout.DOWNLOADS)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise HubError(f"{flag}: {explain(error, name)}") from error
        logger.warning(f"{flag}: there is no repository {name} yet, or the token may not read it")
        return
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{flag}: {explain(error, name)}") from error
    if remote is not None:
        _move_into(folder, remote)
    shutil.rmtree(folder / layout.DOWNLOADS, ignore_errors=True)


def _download_checkpoint(output: Output, target: Path) -> Path | None:
    """Download the last checkpoint, and what a resumed run needs beside it.

    Returns:
        The checkpoint; None if the Hub has none, or if the output folder has one of that step or a later one.
    """
    client, revision = api(output.hub_token), output.hub_revision
    full_id = name if "/" in (name := _name(output)) else f"{client.whoami()['name']}/{name}"
    folders = last_checkpoints(client.list_repo_files(full_id, revision=revision))
    if not folders:
        logger.warning(f"--resume_from_checkpoint hub: {full_id} has no checkpoint yet")
        return None
    source = {"revision": revision, "token": output.hub_token, "local_dir": target}
    steps = {
        folder: Progress.load(Path(hf_hub_download(full_id, f"{folder}/{layout.PROGRESS}", **source)).parent).step
        for folder in folders
    }
    remote, step = max(steps.items(), key=lambda entry: entry[1])
    local = find_checkpoints(output.output_dir)
    if local and Progress.load(local[-1]).step >= step:
        logger.info(
            f"--resume_from_checkpoint hub: {local[-1].name} in {output.output_dir} is used, which is not older than "
            f"the Hub's of step {step}"
        )
        return None
    snapshot_download(full_id, allow_patterns=[f"{remote}/*", *(f"{entry}*" for entry in OF_A_RUN)], **source)
    return target / remote


def _move_into(folder: Path, checkpoint: Path) -> None:
    """Move a downloaded checkpoint and the files beside it into the output folder, over those of an earlier step."""
    for file in (file for file in checkpoint.parent.rglob("*") if file.is_file()):
        name = file.relative_to(checkpoint.parent)
        if name.parts[0] in OF_A_RUN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(folder / name)
    place = checkpoint_path(folder, Progress.load(checkpoint).step)
    shutil.rmtree(place, ignore_errors=True)  # it is not whole, or it would have been used
    checkpoint.rename(place)


def last_checkpoints(files: list[str]) -> list[str]:
    """The folders of a repository's files of which one is its latest whole checkpoint: two if --hub_strategy changed.

    >>> last_checkpoints(["checkpoint-5/progress.json", "checkpoint-10/progress.json", "checkpoint-20/config.json"])
    ['checkpoint-10']
    """
    folders = [file.removesuffix(f"/{layout.PROGRESS}") for file in files if file.endswith(f"/{layout.PROGRESS}")]
    numbers = [int(match[1]) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder))]
    numbered = [f"checkpoint-{max(numbers)}"] if numbers else []
    return [folder for folder in folders if folder == layout.LAST_CHECKPOINT] + numbered


def api(token: str | None) -> HfApi:
    """A client that gives up a silent connection."""
    return HfApi(token=(token or "").strip() or None)


def _client() -> httpx2.Client:
    """The library's own client, with a timeout."""
    client = _http.default_client_factory()
    client.timeout = SILENCE
    return client


set_client_factory(_client)  # closes the connections that there are, so once


class _Discreet(logging.Filter):
    """Removes secrets, e.g. signed addresses, from the client's messages."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(_Discreet())


def _check_token(token: str | None, flag: str, otherwise: str) -> None:
    if not (token or get_token()):
        between = "," if otherwise else " or"
        raise HubError(
            f"{flag} needs a Hugging Face token, and none is found: run `hf auth login`{between} give --hub_token"
            f"{otherwise}."
        )


def _check_write_permission(repo_id: str, token: str | None) -> None:
    """Raise if the Hub says no: `create_repo` accepts a read-only token when the repository exists."""
    try:
        api(token).auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED:
            raise
        logger.debug("The Hub does not say whether %s can be written to: %s", repo_id, reason(error))


def _warn_if_public(repo_id: str, token: str | None) -> None:
    """`create_repo` silently keeps the visibility of a repository that exists."""
    try:
        public = not api(token).model_info(repo_id).private
    except (HTTPError, OSError):
        return
    if public:
        logger.warning("%s exists and is public: it stays public until its settings on the Hub are changed.", repo_id)


def explain(error: Exception, name: str, otherwise: str = "") -> str:
    """One sentence for the user: what happened, and which flag changes it.

    Args:
        otherwise: how to go on without the Hub, as a command; empty where there is no other way.
    """
    status, said = getattr(getattr(error, "response", None), "status_code", None), reason(error)
    if isinstance(error, HFValidationError):
        return f"{name!r} is not a valid name of a repository ({said}); give another --hub_model_id."
    if status == 401:
        return f"the Hub does not accept the token ({said}); run `hf auth login` or give another --hub_token."
    if status == 403:
        return (
            f"the token may not write to {name!r} ({said}); name a repository of yours as --hub_model_id, or use a "
            "token with write permission (`hf auth login`, --hub_token)."
        )
    if status:
        return f"the Hub refuses {name!r} ({said}); check --hub_model_id{f', or {otherwise}' if otherwise else ''}."
    later = f"{otherwise}, and publish later by python -m lpl.publish" if otherwise else "run the same command later"
    return f"the Hub cannot be reached ({said}); {later}."


def pause(error: BaseException, wait: float) -> float:
    """Seconds until the next try: what the Hub asks for, or else ``wait``; at most :data:`LONGEST_WAIT`."""
    response = answer_of(error)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else wait, LONGEST_WAIT)


def answer_of(error: BaseException) -> Any:
    """The Hub's answer behind an error; for a single file, the client wraps the error in another one."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    return getattr(cause, "response", None)


def is_refused(error: BaseException) -> bool:
    """Whether the Hub does not accept the token, or does not permit it this."""
    response = answer_of(error)
    return response is not None and response.status_code in REFUSED


def reason(error: BaseException) -> str:
    """The error and its cause on one line of at most 200 characters, without request ids and tokens."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = " ".join(without_secrets(re.sub(r"\(Request ID: [^)]*\)", "", said)).split()).rstrip(".")
    if status:
        return (said if str(status) in said else f"{status}: {said}")[:200]
    cause = reason(error.__cause__) if error.__cause__ else ""
    return (said if cause in said else f"{said}: {cause}")[:200]
