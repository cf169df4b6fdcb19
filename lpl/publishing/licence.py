"""TODO: what is here."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import hf_hub_download, metadata_load

from lpl.publishing.card import HUB
from lpl.tools.privacy import is_hub_id


logger = logging.getLogger(__name__)


PATIENCE = 5.0  # seconds that the Hub has to tell a licence
LICENCES = (  # that the Hub knows; of those that models for images have
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "unknown", "other"),
)
LARGEST_README = 2**20  # bytes; more are no model card


# The base model's licence --------------------------------------------------------------------------------------------


def base_licence(
    path: str, revision: str | None = None, token: str | None = None, cache_dir: str | None = None
) -> dict[str, Any]:
    """The licence of a base model, for the card of what is trained from it: ``license``, ``license_name`` and
    ``license_link`` of its own card, as far as they are there.

    A local pipeline's card is in its folder, else the Hub is asked, or its cache without a network. Whatever goes
    wrong costs the licence only, and no more than a few seconds.
    """
    found: dict[str, Any] = {}

    def look() -> None:
        try:
            found.update(_licence_of(path, revision, token, cache_dir))
        except Exception as error:  # a network and a README of somebody else's: everything is possible
            logger.debug("The licence of %s cannot be found out: %s", path, error)

    # In a thread that may be left behind: the client tries again, and no timeout of its covers all that it waits for.
    looking = threading.Thread(target=look, name="base licence", daemon=True)
    looking.start()
    looking.join(PATIENCE)
    return dict(found)


def _licence_of(path: str, revision: str | None, token: str | None, cache_dir: str | None) -> dict[str, Any]:
    readme, repository = Path(path, "README.md"), None
    if is_hub_id(path):
        repository = f"{HUB}/{path}/blob/{quote(revision or 'main')}"
        readme = Path(hf_hub_download(path, "README.md", revision=revision, token=token, cache_dir=cache_dir))
    if not readme.is_file() or readme.stat().st_size > LARGEST_README:
        return {}
    card = metadata_load(readme) or {}
    licence = {name: card[name] for name in ("license", "license_name") if _named(card.get(name))}
    if repository is None and licence.get("license") not in (None, *LICENCES):  # the Hub would refuse the card
        licence = {"license_name": licence["license"]} | licence | {"license": "other"}
    link = str(card.get("license_link", "")) if "license" in licence else ""
    if re.fullmatch(r"[\w./-]+", link):  # a file beside that card, which is not beside ours
        link = f"{repository}/{link.removeprefix('./').removeprefix('/')}" if repository else ""
    if re.fullmatch(r"https?://[^\s()<>|]+", link):
        licence["license_link"] = link
    return licence


def _named(value: Any) -> bool:
    """Whether it is a word, or a list of some."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and re.fullmatch(r"[\w.+-]{1,96}", word) for word in words)
