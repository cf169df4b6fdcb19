"""TODO: what is here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from lpl.publishing.card import loading_source
from lpl.tools.files import write_whole
from lpl.tools.layout import RECIPE


# A card that is there ------------------------------------------------------------------------------------------------


def add_results(readme: Path, results: Sequence[EvalResult], text: str) -> None:
    """Put what was measured into a card that is there; all else in it stays.

    Args:
        results: for the metadata, in the place of those of the same metric on the same data set.
        text: Markdown under a heading of the third rank, in the place of what has the same heading among the results.
    """
    card = ModelCard.load(readme)
    content = f"{card.text.rstrip()}\n"
    if RESULTS not in content:
        content = content.replace(AGAIN, RESULTS + AGAIN, 1)
    before, _, rest = content.partition(RESULTS)
    section, more, behind = rest.partition("\n## ")
    parts = [part.strip() for part in re.split(r"(?m)^(?=### )", section) if part.strip()]
    heading = text.splitlines()[0]
    kept = [part for part in parts if part.splitlines()[0] != heading]
    card.text = "\n\n".join([f"{before.rstrip()}\n\n## Results", *kept, text.strip()]) + f"\n{more}{behind}"
    replaced = {_measured(result) for result in results}
    others = [result for result in card.data.eval_results or () if _measured(result) not in replaced]
    card.data.eval_results = [*others, *results]
    card.data.model_name = card.data.model_name or readme.resolve().parent.name
    write_whole(readme, card.save)


def _measured(result: EvalResult) -> tuple[str | None, ...]:
    """Which metric on which data."""
    return result.dataset_type, result.dataset_name, result.metric_type, result.metric_name


def address_card(readme: Path, repo_id: str, revision: str | None = None) -> str:
    """The card of a finished run as it is to stand in a repository, whatever the run itself had in mind.

    Title, code and the command that trains it again name the repository; all else stays, results that were added
    later and what its owner wrote included.

    Args:
        repo_id: `user/name`.
        revision: a branch; None: main.
    """
    card = ModelCard.load(readme)
    source = _given_source(card.text)
    if source is None:
        return card.content
    address, _, branch = source.removesuffix(f"/{RECIPE}").partition("@")
    old, new = (name.rpartition("/")[2] for name in (address, repo_id))
    was, now = _source_literal(address, branch), _source_literal(repo_id, revision)
    # Every line of code that loads something, but a LoRA's pipeline, which comes from somewhere else.
    loading = re.compile(r"pipeline(?! = )" if "lora" in (card.data.tags or ()) else "pipeline")
    lines = [line.replace(was, now) if loading.match(line) else line for line in card.text.split("\n")]
    text = re.sub(rf"^# {re.escape(old)}$", lambda _: f"# {new}", "\n".join(lines), count=1, flags=re.M)
    before, heading, command = text.partition(AGAIN)
    command = command.replace(f"--config {shlex.quote(source)}", f"--config {_hub_recipe(repo_id, revision)}", 1)
    card.text = before + heading + command
    if card.data.eval_results and card.data.model_name == old:
        card.data.model_name = new
    return card.content


def _given_source(text: str) -> str | None:
    """The recipe of the command under "Train it again"; None where there is no such command."""
    found = re.search(r"^(`{3,})bash\n(.*?)\n\1$", text.partition(AGAIN)[2], re.M | re.S)
    try:
        words = shlex.split(found[2]) if found else []
    except ValueError:  # an edited one
        return None
    return words[words.index("--config") + 1] if "--config" in words[:-1] else None
