"""Publishes a finished output folder on the Hub: for those who decide later, or whose upload failed.

    python -m lpl.publish sd35-lpl --hub_model_id user/sd35-lpl

What goes there is what --push_to_hub of the training script puts there (:mod:`lpl.publication`), in one commit; the
folder itself stays as it is.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lpl.config import command_line as arguments
from lpl.publishing import hub
from lpl.publishing.card_edits import address_card
from lpl.publishing.publication import snapshot_of_result
from lpl.publishing.uploads import FIRST_WAIT, LAST_TRIES, SNAPSHOTS


logger = logging.getLogger(__name__)
PROGRAM = "python -m lpl.publish"
FLAGS = ("hub_model_id", "hub_token", "hub_private_repo", "hub_revision")


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.Parser(
        prog=PROGRAM,
        usage="%(prog)s FOLDER [flags]",
        description="Publish the output folder of a finished training run on the Hugging Face Hub.",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    parser.add_argument("output_dir", type=Path, metavar="FOLDER", help="output folder of the run")
    arguments.add_flags(parser, FLAGS)
    return parser


def check_finished(folder: Path) -> None:
    """Refuse what is no output folder of a run that is done.

    Raises:
        ValueError: with what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    results = [*folder.glob("model_index.json"), *folder.glob("*.safetensors"), *folder.glob("*_lora")]
    if not results or not (folder / "README.md").is_file():
        raise ValueError(
            f"{folder}: this is no output folder of a finished run, which has a model card, README.md, and a "
            "pipeline or a LoRA; run the training to its end"
        )


def publish(args: argparse.Namespace) -> str:
    """Upload it; the page's address.

    Raises:
        ValueError, hub.HubError: where it cannot be.
    """
    folder = args.output_dir
    check_finished(folder)
    repo_id = hub.prepare_repository(
        args.hub_model_id, folder, args.hub_token, args.hub_private_repo, args.hub_revision
    )
    snapshot = folder / SNAPSHOTS
    shutil.rmtree(snapshot, ignore_errors=True)  # of an upload that was given up, or killed
    try:
        snapshot_of_result(folder, snapshot, hub.address(repo_id, args.hub_revision))
        card = address_card(folder / "README.md", repo_id, args.hub_revision)
        (snapshot / "README.md").write_text(card, encoding="utf-8")
        for number in range(LAST_TRIES):
            try:
                return hub.push(snapshot, repo_id, args.hub_token, args.hub_revision, "Publish a finished training")
            except Exception as error:  # a request raises dozens
                said = f"the upload to {repo_id} failed ({hub.reason(error)})"
                if number == LAST_TRIES - 1 or hub.is_refused(error):
                    raise hub.HubError(f"{said}; run the same command again.") from error
                wait = hub.pause(error, FIRST_WAIT * 2**number)
                logger.warning("%s; the next try is in %g s", said, wait)
                time.sleep(wait)
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)
    raise AssertionError("every try returns or raises")


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        print(f"published at {publish(build_parser().parse_args(argv))}")
    except (OSError, ValueError, hub.HubError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")


if __name__ == "__main__":
    main()
