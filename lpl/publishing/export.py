"""Writes a pipeline as one file for ComfyUI, Forge and other programs: of a finished run, or any other.

    python -m lpl.export sd15-lpl --dtype fp16

The file lies in the pipeline's folder; the folder's other files stay as they are. diffusers reads it, too, by
``from_single_file``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from lpl.config.choices import PRECISIONS
from lpl.config.groups import Model
from lpl.config.parser import Parser
from lpl.families.description import read_pipeline
from lpl.tools import layout
from lpl.tools.files import check_writable
from lpl.tools.results import lora_entries, pipeline_entries
from lpl.tools.words import plain_warnings, size, why_no_folder
from lpl.training.single_file import write_single_file


PROGRAM = "python -m lpl.export"


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s FOLDER [flags]",
        description="Write a pipeline as one .safetensors file in the layout of the original model.",
    )
    parser.add_argument(
        "folder", type=os.path.expanduser, metavar="FOLDER", help="the pipeline, such as a run's output"
    )
    parser.add_argument("--dtype", choices=PRECISIONS, help="precision of the weights; default: as they are")
    parser.add_argument(
        "--output", type=os.path.expanduser, metavar="FILE", help="default: NAME_single_file.safetensors in the folder"
    )
    return parser


def export(folder: Path, dtype: str | None = None, output: Path | None = None) -> Path:
    """Write the pipeline in a folder as one file, and return its path.

    Raises:
        ValueError: with what to do instead.
    """
    if why := why_no_folder(str(folder)):
        raise ValueError(f"{folder}: {why}")
    if not pipeline_entries(folder) and lora_entries(folder):
        others = next((name for name in lora_entries(folder) if name.endswith(layout.OTHERS_SUFFIX)), None)
        raise ValueError(
            f"{folder}: it is a LoRA"
            + (f", and {others} is its file for other programs" if others else ", which only diffusers reads")
        )
    target = output or folder / (folder.resolve().name + layout.SINGLE_FILE)
    _check_target(target, folder)
    description = read_pipeline(Model(pretrained_model_name_or_path=str(folder)))
    return write_single_file(description, folder, target, dtype)


def _check_target(target: Path, folder: Path) -> None:
    """Refuse a file that cannot be written, or that would replace one of the pipeline's.

    Raises:
        ValueError: with what to give instead.
    """
    what = f"--output {target}"
    if target.is_dir():
        raise ValueError(f"{what}: this is a folder; give a file in it, such as {target / 'model.safetensors'}")
    if target.suffix != ".safetensors":
        raise ValueError(f"{what}: the file is a .safetensors file; give a name that ends so")
    place, root = target.parent.resolve() / target.name, folder.resolve()
    if place.is_relative_to(root):
        first, *deeper = place.relative_to(root).parts
        earlier = not deeper and first not in lora_entries(folder)
        if not earlier and (place.exists() or first in pipeline_entries(folder)):
            raise ValueError(f"{what}: this place belongs to what is in {folder}; give another file")
    check_writable(what, target.parent)


def main(argv: Sequence[str] | None = None) -> None:
    plain_warnings(PROGRAM)
    arguments = build_parser().parse_args(argv)
    try:
        path = export(Path(arguments.folder), arguments.dtype, Path(arguments.output) if arguments.output else None)
        print(f"written to {path}, {size(path.stat().st_size)}")
    except (OSError, SafetensorError, ValueError) as error:
        sys.exit(f"{PROGRAM}: error: {str(error).removeprefix('--pretrained_model_name_or_path ')}")


if __name__ == "__main__":
    main()
