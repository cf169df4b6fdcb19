"""Downloads a recipe from the Hub, and explains why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lpl.tools import layout
from lpl.tools.privacy import without_secrets
from lpl.tools.words import first_line


def downloaded(repository: str, revision: str | None, token: str | None, cache_dir: str | None, largest: int) -> str:
    """Download a repository's recipe of at most ``largest`` bytes, and return its path.

    Raises:
        HTTPError, OSError, ValueError: if it is missing, not accessible or too large.
    """
    options: dict[str, Any] = {"revision": revision, "token": (token or "").strip() or None, "cache_dir": cache_dir}
    if (hf_hub_download(repository, layout.RECIPE, dry_run=True, **options).file_size or 0) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return hf_hub_download(repository, layout.RECIPE, **options)


@contextmanager
def reading(repository: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub or the file into a ValueError that says what to do."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(_why_not(error, repository, revision)) from error


def _why_not(error: Exception, repository: str, revision: str | None) -> str:
    login = "run `hf auth login` or give --hub_token"
    match error:
        case GatedRepoError():
            return f"the repository is gated; accept its terms on its page, then {login}"
        case RepositoryNotFoundError():
            return f"there is no such file here, and no such repository on the Hub; if it is a private one, {login}"
        case RevisionNotFoundError():
            return f"the repository has no revision {revision}"
        case RemoteEntryNotFoundError():
            return f"the repository has no {layout.RECIPE}, which the training script writes and publishes"
        case LocalEntryNotFoundError():
            return (
                "there is no such file here, and the Hub cannot be reached "
                f"({without_secrets(first_line(error.__cause__ or error))})"
            )
    return f"its {layout.RECIPE} on the Hub cannot be read ({without_secrets(first_line(error))})"
