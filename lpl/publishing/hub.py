"""The run's repository on the Hugging Face Hub: made ready before the training, pushed to, and resumed from.

Each function here asks the Hub once; :mod:`lpl.publication` says what is published and when, and does not give up. All
use the token given, else that of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import _http

from lpl.tools.privacy import without_secrets
from lpl.training.checkpoints import Progress, checkpoint_path, find_checkpoints


logger = logging.getLogger(__name__)
MAIN = "main"  # the branch where --hub_revision names none
LAST_CHECKPOINT = "last-checkpoint"  # where --hub_strategy checkpoint puts it, as transformers' Trainer does
DOWNLOADS = ".download"  # in the output folder: what is not whole yet
OF_A_RUN = ("metrics.jsonl", "recipe.yaml", "samples")  # what a resumed run goes on with beside its checkpoint
SILENCE = 120.0  # seconds without a byte after which a connection counts as gone; the client alone waits for ever
LONGEST_WAIT = 300.0  # seconds between two tries
REFUSED = (401, 403)  # another try gives no other answer


class HubError(RuntimeError):
    """The Hub refuses or cannot be reached; the message is one sentence that names the flag to change."""


def prepare_repository(
    repo_id: str | None,
    output_dir: str | os.PathLike,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Create the model repository, or find it there, before any work is done.

    Args:
        repo_id: `name` or `user/name`; None takes the name of `output_dir`.
        private: a new repository is private; else it is what the account's settings say.
        revision: a branch, which is made where there is none.

    Returns:
        The full id, `user/name`.

    Raises:
        HubError: no token, a name that the Hub does not accept, no permission to write, or no network.
    """
    name = repo_id or Path(output_dir).resolve().name
    _check_token(token, "--push_to_hub", ", or leave --push_to_hub out")
    try:
        full_id = _api(token).create_repo(name, private=private or None, exist_ok=True).repo_id
        _check_write_permission(full_id, token)
        if revision not in (None, MAIN):
            _api(token).create_branch(full_id, branch=revision, exist_ok=True)
    except (HTTPError, OSError, ValueError) as error:  # all that a request raises, a name it does not accept included
        raise HubError(f"--push_to_hub: {explain(error, name)}") from error
    if private:
        _warn_where_public(full_id, token)
    return full_id


def address(repo_id: str, revision: str | None = None) -> str:
    """What --config takes, ``user/name`` or ``user/name@branch``."""
    return repo_id if revision in (None, MAIN) else f"{repo_id}@{revision}"


def push(
    folder: str | os.PathLike,
    repo_id: str,
    token: str | None = None,
    revision: str | None = None,
    message: str = "End of training",
    replaced: str | None = None,
) -> str:
    """Commit all of a folder: in one commit, so that nobody ever finds half of it.

    Args:
        replaced: a folder of the repository from which everything goes that the commit does not bring.

    Returns:
        The page's address.

    Raises:
        Exception: whatever a request raises; nothing is committed then.
    """
    api, paths = _api(token), [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    there = api.list_repo_files(repo_id, revision=revision) if replaced else []
    gone = [file for file in there if file.startswith(f"{replaced}/") and file not in files]
    operations = [*map(CommitOperationDelete, gone), *(CommitOperationAdd(*entry) for entry in files.items())]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.repo_url)


def download_run(
    repo_id: str | None, output_dir: str | os.PathLike, token: str | None = None, revision: str | None = None
) -> None:
    """Put the last checkpoint that was pushed into the output folder, with log, samples and recipe, unless the folder
    has one as late; for --resume_from_checkpoint hub.

    Raises:
        HubError: no token, no permission, or no network; that there is no such repository or checkpoint is a warning.
    """
    flag, output_dir = "--resume_from_checkpoint hub", Path(output_dir)
    name = repo_id or output_dir.resolve().name
    _check_token(token, flag, ", or resume from latest")
    folder = output_dir / DOWNLOADS
    try:
        full_id = name if "/" in name else f"{_api(token).whoami()['name']}/{name}"
        files = _api(token).list_repo_files(full_id, revision=revision)
        remote = last_checkpoint(files)
        if remote is None:
            logger.warning(f"{flag}: {full_id} has no checkpoint yet")
            return
        source = {"revision": revision, "token": token, "local_dir": folder}
        step = Progress.load(Path(hf_hub_download(full_id, f"{remote}/{Progress.FILE}", **source)).parent).step
        local = find_checkpoints(output_dir)
        if here := bool(local) and Progress.load(local[-1]).step >= step:
            logger.info(f"{flag}: {local[-1].name} in {output_dir} is as late as the Hub's {step}, and is taken")
        else:
            wanted = [f"{remote}/*", *(f"{entry}*" for entry in OF_A_RUN)]
            snapshot_download(full_id, allow_patterns=wanted, **source)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise HubError(f"{flag}: {explain(error, name)}") from error
        logger.warning(f"{flag}: there is no repository {name} yet, or the token may not read it")
        return
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"{flag}: {explain(error, name)}") from error
    if not here:
        for file in (file for file in folder.rglob("*") if file.is_file()):  # what is here is of an earlier step
            name = file.relative_to(folder)
            if name.parts[0] in OF_A_RUN:
                (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
                file.replace(output_dir / name)
        shutil.rmtree(checkpoint_path(output_dir, step), ignore_errors=True)  # no whole one, or it would be local
        (folder / remote).rename(checkpoint_path(output_dir, step))
    shutil.rmtree(folder)


def last_checkpoint(files: list[str]) -> str | None:
    """The folder of a repository's latest whole checkpoint.

    >>> last_checkpoint(["checkpoint-5/progress.json", "checkpoint-10/progress.json", "checkpoint-20/config.json"])
    'checkpoint-10'
    """
    folders = [file.removesuffix(f"/{Progress.FILE}") for file in files if file.endswith(f"/{Progress.FILE}")]
    if LAST_CHECKPOINT in folders:
        return LAST_CHECKPOINT
    numbers = [int(match[1]) for folder in folders if (match := re.fullmatch(r"checkpoint-(\d+)", folder))]
    return f"checkpoint-{max(numbers)}" if numbers else None


def _api(token: str | None) -> HfApi:
    set_client_factory(_client)
    return HfApi(token=(token or "").strip() or None)


def _client():
    """As the library makes its own, but for its patience."""
    client = _http.default_client_factory()
    client.timeout = SILENCE
    return client


class _Discreet(logging.Filter):
    """Keeps secrets, such as signed addresses, out of what the client says."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(_Discreet())


def _check_token(token: str | None, flag: str, otherwise: str) -> None:
    if not (token or get_token()):
        raise HubError(
            f"{flag} needs a Hugging Face token and there is none: run `hf auth login`, give --hub_token{otherwise}."
        )


def _check_write_permission(repo_id: str, token: str | None) -> None:
    """Raise where the Hub says no: `create_repo` lets a read-only token pass when the repository exists."""
    try:
        _api(token).auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise
        logger.debug("The Hub does not tell whether %s can be written to: %s", repo_id, reason(error))


def _warn_where_public(repo_id: str, token: str | None) -> None:
    """`create_repo` leaves the visibility of a repository that exists as it is, without a word."""
    try:
        public = not _api(token).model_info(repo_id).private
    except (HTTPError, OSError):
        return
    if public:
        logger.warning("%s exists and is public: it stays public until its settings on the Hub are changed.", repo_id)


def explain(error: Exception, name: str) -> str:
    """One sentence for the user: what happened and which flag changes it."""
    status, said = getattr(getattr(error, "response", None), "status_code", None), reason(error)
    if isinstance(error, HFValidationError):
        return f"{name!r} is no name for a repository ({said}); give another one as --hub_model_id."
    if status == 401:
        return f"the Hub does not accept the token ({said}); run `hf auth login` or give another --hub_token."
    if status == 403:
        return (
            f"the token may not write to {name!r} ({said}); name a repository of yours as --hub_model_id, or use a "
            "token with write permission (`hf auth login`, --hub_token)."
        )
    if status:
        return f"the Hub refuses {name!r} ({said}); check --hub_model_id, or leave --push_to_hub out."
    return f"the Hub cannot be reached ({said}); leave --push_to_hub out, and publish later by python -m lpl.publish."


def pause(error: BaseException, wait: float) -> float:
    """Seconds until the next try: as the Hub wishes, where an error says so, else ``wait``; not too many."""
    response = answer_of(error)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else wait, LONGEST_WAIT)


def answer_of(error: BaseException) -> Any:
    """The Hub's answer that an error comes from: of a file, the client raises another one behind it."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def is_refused(error: BaseException) -> bool:
    """Whether the Hub says that this token may not do so."""
    response = answer_of(error)
    return response is not None and response.status_code in REFUSED


def reason(error: BaseException) -> str:
    """The error and what it came from on one line of at most 200 characters, without request ids and tokens."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    said = " ".join(without_secrets(re.sub(r"\(Request ID: [^)]*\)", "", said)).split()).rstrip(".")
    if status:
        return (said if str(status) in said else f"{status}: {said}")[:200]
    cause = reason(error.__cause__) if error.__cause__ else ""
    return (said if cause in said else f"{said}: {cause}")[:200]
