"""Edits of a model card that exists: results that are measured later, and the address where it is published.

All other text stays, including what its owner wrote.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lpl.config.choices import ADAPTER_NAMES
from lpl.publishing import hub
from lpl.publishing.card import loading_source
from lpl.tools import layout
from lpl.tools.files import write_whole


RESULTS, AGAIN = "\n## Results\n", "\n## Train it again\n"  # headings of card.md.j2


def add_results(readme: Path, results: Sequence[EvalResult], text: str) -> None:
    """Put results into a card.

    Args:
        results: for the metadata; they replace those of the same metric on the same data set.
        text: Markdown under a heading of level 3; it replaces the part of the results with the same heading.
    """
    card, data = _loaded(readme)
    content = f"{card.text.rstrip()}\n"
    if RESULTS not in content:
        content = content.replace(AGAIN, RESULTS + AGAIN, 1)
    before, _, rest = content.partition(RESULTS)
    section, more, behind = rest.partition("\n## ")
    parts = [part.strip() for part in re.split(r"(?m)^(?=### )", section) if part.strip()]
    heading = text.splitlines()[0]
    kept = [part for part in parts if part.splitlines()[0] != heading]
    card.text = "\n\n".join([f"{before.rstrip()}\n\n## Results", *kept, text.strip()]) + f"\n{more}{behind}"
    replaced = {_key(result) for result in results}
    others = [result for result in data.eval_results or () if _key(result) not in replaced]
    data.eval_results = [*others, *results]
    data.model_name = data.model_name or readme.resolve().parent.name
    write_whole(readme, card.save)


def _loaded(readme: Path) -> tuple[ModelCard, ModelCardData]:
    """A card, and the metadata in it."""
    card = ModelCard.load(readme)
    assert isinstance(card.data, ModelCardData)
    return card, card.data


def _key(result: EvalResult) -> tuple[str | None, ...]:
    """Metric and data set of a result."""
    return result.dataset_type, result.dataset_name, result.metric_type, result.metric_name


def address_card(readme: Path, repo_id: str, revision: str | None = None) -> str:
    """The card of a finished run for a repository, whatever address it was written for.

    Title, code and the command that trains the model again name the repository.

    Args:
        repo_id: `user/name`.
        revision: a branch; None: main.
    """
    card, data = _loaded(readme)
    source = _recipe_source(card.text)
    if source is None:
        return card.content
    address, _, branch = source.removesuffix(f"/{layout.RECIPE}").partition("@")
    old, new = (name.rpartition("/")[2] for name in (address, repo_id))
    was, now = loading_source(address, branch), loading_source(repo_id, revision)
    # Every line of code that loads something, except an adapter's base pipeline.
    adapted = not set(ADAPTER_NAMES).isdisjoint(data.tags or ())
    loading = re.compile(r"pipeline(?! = )" if adapted else "pipeline")
    lines = [line.replace(was, now) if loading.match(line) else line for line in card.text.split("\n")]
    text = re.sub(rf"^# {re.escape(old)}$", lambda _: f"# {new}", "\n".join(lines), count=1, flags=re.M)
    before, heading, command = text.partition(AGAIN)
    command = command.replace(f"--config {shlex.quote(source)}", f"--config {hub.address(repo_id, revision)}", 1)
    card.text = before + heading + command
    if data.eval_results and data.model_name == old:
        data.model_name = new
    return card.content


def _recipe_source(text: str) -> str | None:
    """The recipe of the command under "Train it again"; None if there is no such command."""
    found = re.search(r"^(`{3,})bash\n(.*?)\n\1$", text.partition(AGAIN)[2], re.M | re.S)
    try:
        words = shlex.split(found[2]) if found else []
    except ValueError:  # somebody edited it
        return None
    return words[words.index("--config") + 1] if "--config" in words[:-1] else None
