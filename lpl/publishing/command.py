"""Publishes a finished output folder on the Hub: after a run without --push_to_hub, or after a failed upload.

    python -m lpl.publish sd35-lpl --hub_model_id user/sd35-lpl

It publishes what --push_to_hub of the training script does (:mod:`lpl.publishing.publication`), in one commit; the
folder itself stays as it is.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lpl.config.command_line import add_flags
from lpl.config.flag import built
from lpl.config.groups import Output
from lpl.config.parser import Parser
from lpl.publishing import hub
from lpl.publishing.card_edits import address_card
from lpl.publishing.publication import snapshot_of_result
from lpl.publishing.uploads import upload
from lpl.tools import layout
from lpl.tools.files import LOCK, hold
from lpl.tools.results import check_one_kind, lora_entries, missing_components, pipeline_entries
from lpl.tools.words import why_no_folder


PROGRAM = "python -m lpl.publish"
FLAGS = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "verbose")


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s FOLDER [flags]",
        description="Publish the output folder of a finished training run on the Hugging Face Hub.",
    )
    parser.add_argument("output_dir", type=os.path.expanduser, metavar="FOLDER", help="output folder of the run")
    add_flags(parser, FLAGS)
    return parser


def check_finished(folder: Path) -> None:
    """Refuse a folder that is no output folder of a finished run.

    Raises:
        ValueError: with what is missing.
    """
    if why := why_no_folder(str(folder)):
        raise ValueError(f"{folder}: {why}")
    results = [*pipeline_entries(folder), *lora_entries(folder)]
    if not results or not (folder / layout.CARD).is_file():
        raise ValueError(
            f"{folder}: not the output folder of a finished run, which has a model card, README.md, and a pipeline or "
            "a LoRA; run the training to its end"
        )
    check_one_kind(str(folder), folder)
    if missing := missing_components(folder):
        raise ValueError(
            f"{folder}: its model_index.json lists {' and '.join(missing)}, but the folder lacks the files, so nobody "
            "could load it; put them there, or write [null, null] for what it can do without"
        )


def publish(output: Output) -> str:
    """Upload a finished output folder.

    Returns:
        The page's address.

    Raises:
        ValueError, hub.HubError: with the reason.
    """
    folder = Path(output.output_dir)
    check_finished(folder)
    if (folder / LOCK).is_file():  # of a run, which may go on
        hold(str(folder), folder)
    repository = hub.prepare_repository(output, bool(lora_entries(folder)))

    def fill(snapshot: Path) -> None:
        snapshot_of_result(folder, snapshot, hub.address(repository, output.hub_revision))
        card = address_card(folder / layout.CARD, repository, output.hub_revision)
        (snapshot / layout.CARD).write_text(card, encoding="utf-8")

    return upload(output, repository, "Publish a finished training", fill)


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    values = vars(build_parser().parse_args(argv))
    try:
        print(f"published at {publish(built(Output, values))}")
    except (OSError, ValueError, hub.HubError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")


if __name__ == "__main__":
    main()
