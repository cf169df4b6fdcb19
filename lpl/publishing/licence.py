"""The base model's licence, for the card of what is trained from it.

The licence is read from the base model's own card: README.md of a local folder, metadata of a repository on the Hub.
Without a network, the card in the Hub's cache is read. Any failure costs the licence only, within seconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, metadata_load, try_to_load_from_cache

from lpl.config.groups import Model
from lpl.publishing import hub
from lpl.publishing.card import HUB
from lpl.tools import layout
from lpl.tools.privacy import hub_file, is_hub_id


logger = logging.getLogger(__name__)
PATIENCE = 5.0  # seconds that the Hub may take
LICENCES = (  # known to the Hub; those that image models have
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "unknown", "other"),
)
LARGEST_README = 2**20  # bytes; a larger file is no model card


def base_licence(model: Model, token: str | None = None) -> dict[str, Any]:
    """``license``, ``license_name`` and ``license_link`` of the base model, as far as its card has them."""
    path, revision = model.source, model.revision
    if (place := hub_file(path)) is not None:
        path, revision = place.repository, place.revision or revision
    try:
        if not is_hub_id(path):
            return _known_to_the_hub(_licence(_card_in(Path(path, layout.CARD))))
        if constants.HF_HUB_OFFLINE:
            cached = try_to_load_from_cache(path, layout.CARD, model.cache_dir, revision)
            card = _card_in(Path(cached)) if isinstance(cached, str) else {}
        else:
            info = hub.api(token).model_info(path, revision=revision, timeout=PATIENCE)
            card = info.card_data.to_dict() if info.card_data else {}
        return _licence(card, f"{HUB}/{path}/blob/{quote(revision or hub.MAIN)}")
    except Exception as error:  # anything may go wrong with a network and with a README that somebody else wrote
        logger.debug("The licence of %s cannot be read: %s", path, error)
        return {}


def _card_in(readme: Path) -> Mapping[str, Any]:
    """The metadata of a model card; empty if there is no such file."""
    if not readme.is_file() or readme.stat().st_size > LARGEST_README:
        return {}
    return metadata_load(readme) or {}


def _licence(card: Mapping[str, Any], repository: str = "") -> dict[str, Any]:
    """The licence in a card's metadata.

    Args:
        repository: address of the card's files on the Hub; a link to a file beside the card is left out without it.
    """
    licence = {name: card[name] for name in ("license", "license_name") if _is_named(card.get(name))}
    link = str(card.get("license_link", "")) if "license" in licence else ""
    if re.fullmatch(r"[\w./-]+", link):  # a file beside that card, and not beside ours
        link = f"{repository}/{link.removeprefix('./').removeprefix('/')}" if repository else ""
    if re.fullmatch(r"https?://[^\s()<>|]+", link):
        licence["license_link"] = link
    return licence


def _known_to_the_hub(licence: dict[str, Any]) -> dict[str, Any]:
    """The licence as "other" if the Hub does not know it: the Hub would refuse the card, and with it the weights."""
    if licence.get("license") in (None, *LICENCES):
        return licence
    return {"license_name": licence["license"]} | licence | {"license": "other"}


def _is_named(value: Any) -> bool:
    """Whether a value is a word, or a list of words."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and re.fullmatch(r"[\w.+-]{1,96}", word) for word in words)
