"""Shows what will be trained on, before any model is there.

    python -m lpl.data path/to/images --resolution 512 --aspect_ratio_buckets auto

takes the data flags of the training script, or its recipe by --config, and needs no pipeline. It prints numbers of
images, sizes, buckets and captions, and what cannot be read or is left out, and draws a contact sheet with the crops
that training takes. A large data set is not decoded as a whole unless --read_all is given; the table says what was.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler

from lpl.config import Config
from lpl.config.checks import check_data, check_outside
from lpl.config.command_line import add_flags, config_of, given_flags, read_shared, words_of
from lpl.config.config import FLAGS
from lpl.config.flag import POSITIVE, add_group, built, flag, flags_of
from lpl.config.groups import Data
from lpl.config.parser import Parser
from lpl.config.sizes import AUTO, default_step, sides_of
from lpl.data.buckets import bucketed
from lpl.data.catalogue import Catalogue, cache_root
from lpl.data.dataset import LatentSpace, TrainingImages
from lpl.data.folder import listed_once, why_no_images
from lpl.data.places import as_read, check_captions_of
from lpl.data.report import DECODED, Look, items_to_decode, sections, unreadable
from lpl.data.sheet import sheet_of
from lpl.data.source import data_folders, load_training_images
from lpl.data.streaming import load_streamed_images
from lpl.data.timeouts import HungLoader
from lpl.objectives import get_objective
from lpl.tools.files import check_writable, write_text
from lpl.tools.pictures import save_picture
from lpl.tools.words import plain_warnings, table


PROGRAM = "python -m lpl.data"
# Data flags that change nothing of what is shown here
IDLE = ("shuffle_buffer_size", "max_bad_samples", "cache_latents", "cache_text_embeddings", "text_encoder_dropout")
SHARED_FLAGS = (  # with the training script
    *(name for name in flags_of(Data) if name not in IDLE),
    *("cache_dir", "seed", "config", "without", "hub_token", "verbose"),
)
RESOLUTION = 512  # pixels, where neither flag nor recipe gives one
MULTIPLE = 8  # of the sides of buckets; every pipeline here takes them or multiples of them
CLASSES = 2**31 - 1  # a model's number of classes is not known here
NONE = "none"


@dataclass(frozen=True)
class Request:
    """What is shown."""

    contact_sheet: str = flag(
        "contact_sheet.png", f"PNG file with some of the images, and the crops drawn in; {NONE}: no file", path=True
    )
    num_images: int = flag(24, "images on the contact sheet, evenly spaced", range=POSITIVE)
    read_all: bool = flag(
        False,
        f"decode every image and compare all files; default: of more than {DECODED:,} images so many, evenly spaced",
    )
    json: str | None = flag(None, "file for all numbers, and all unreadable and repeated files", path=True)
    class_labels: bool = flag(False, "the captions are class labels, as DiT takes them")


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s (FOLDER | --dataset_name NAME | --config RECIPE) [flags]",
        description="Show what will be trained on.",
    )
    parser.add_argument("folder", nargs="?", type=str, metavar="FOLDER", help="the same as --train_data_dir")
    add_group(parser, Request)
    add_flags(parser, SHARED_FLAGS)
    return parser


def parsed(words: Sequence[str]) -> tuple[Request, Config]:
    """The command's own flags, and those of the data as a configuration of the training script.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    parser = build_parser()
    values = vars(parser.parse_args(words))  # first, since --help is answered here and shows the defaults
    given = given_flags(build_parser(), words)
    if values["config"] is not None:
        said = read_shared(SHARED_FLAGS, values, given)
        parser.set_defaults(**said)
        values, given = vars(parser.parse_args(words)), given | said.keys()
    if (folder := values.pop("folder")) is not None:
        if values["train_data_dir"] is not None and "train_data_dir" in given:
            raise ValueError(f"{folder}: the folder is given twice, also as --train_data_dir; leave one of them out")
        values["train_data_dir"] = folder
    for name, declared in (FLAGS | flags_of(Request)).items():
        if name in values:
            declared.check(name, values[name])
    if not any(values[name] for name in ("train_data_dir", "dataset_name", "datasets")):
        raise ValueError("give a folder of images, --dataset_name, or --config with a recipe that names its data")
    request = built(Request, values)
    config = _completed(config_of({name: values[name] for name in SHARED_FLAGS}, given), request.class_labels)
    check_data(config)
    _check_written(request, config)
    return request, config


def _completed(config: Config, class_labels: bool) -> Config:
    """With the defaults that depend on other flags, as far as they are known without a pipeline."""
    data = config.data
    values = {"resolution": data.resolution or RESOLUTION, "mask_column": data.column_of_masks}
    if data.aspect_ratio_buckets == AUTO and data.bucket_step is None:
        values["bucket_step"] = default_step(sides_of(values["resolution"])[0], MULTIPLE)
    if class_labels and "caption_column" not in config.given:
        values["caption_column"] = "label"
    if data.streaming and data.max_train_samples is None:
        values["max_train_samples"] = DECODED
    return config.changed(**values)


def _check_written(request: Request, config: Config) -> None:
    """Refuse places that cannot be written to, and those where the data is."""
    files = {"json": request.json, "contact_sheet": request.contact_sheet if request.contact_sheet != NONE else None}
    for name, place in (files | {"data_cache_dir": config.data.data_cache_dir}).items():
        for part in config.data.parts:
            check_outside(f"--{name}", place, "the data's folder", part.data.dataset_name or part.data.folder)
    for name, place in files.items():
        if place is not None and Path(place).is_dir():
            raise ValueError(f"--{name} {place}: this is a folder; give a file in it")
        if place is not None:
            check_writable(f"--{name} {place}", Path(place).parent)


# The command ---------------------------------------------------------------------------------------------------------


def look_at(request: Request, config: Config) -> Look:
    """Load the data as training does, and decode what was asked for.

    Raises:
        ValueError: if there is nothing to train on.
        HungLoader: if a file cannot be read and its reading cannot be interrupted.
    """
    data, seed, cache_dir = config.data, config.optimization.seed or 0, config.model.cache_dir
    with _said() as said, listed_once():
        for part in data.parts:
            _check_folder(read := as_read(part.data, request.class_labels))
            check_captions_of(read, request.class_labels)
        load = load_streamed_images if data.streaming else load_training_images
        dataset, held_out = load(data, seed, cache_dir, CLASSES if request.class_labels else None)
        assert isinstance(dataset, Dataset), "of a stream, the first images are read"
        everything = request.read_all or len(dataset) <= DECODED
        folders, root = data_folders(data, cache_dir), cache_root(data)
        known = Catalogue.of(dataset, data.image_column, folders, root, digests=everything)
        items = bucketed(dataset, data, cache_dir, known)
    if data.streaming and "max_train_samples" not in config.given:
        said.append(f"--streaming: these are the first {len(dataset)} images; how many there are is not known")
    objective = get_objective("flow_matching", FlowMatchEulerDiscreteScheduler())  # whose noise is not used
    empty = CLASSES if request.class_labels else ""
    rest = data, config.diffusion, seed, empty, cache_dir, items
    images = TrainingImages(dataset, objective, LatentSpace(4, MULTIPLE), *rest)
    chosen = items_to_decode(images, everything)
    return Look(images, known, len(held_out or ()), len(chosen), unreadable(images, chosen), said)


def _check_folder(data: Data) -> None:
    if not data.dataset_name and not data.streaming and (why := why_no_images(data.folder)):
        raise ValueError(f"--train_data_dir {data.train_data_dir}: {why}")


@contextmanager
def _said() -> Iterator[list[str]]:
    """What is warned of within, for the table."""
    found: list[str] = []
    handler, logger = logging.Handler(logging.WARNING), logging.getLogger("lpl")
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.propagate = True
        logger.removeHandler(handler)


def command_of(config: Config, seed: int, class_labels: bool) -> str:
    """The command that shows the data of a training run."""
    own = set(SHARED_FLAGS) & flags_of(Data).keys()
    words = words_of(config, lambda name: name in own)
    return shlex.join([*PROGRAM.split(), *words, *["--class_labels"] * class_labels, "--seed", str(seed)])


def name_of(data: Data) -> str:
    """What the data is called on the sheet and above the table."""
    return ", ".join(part.name for part in data.parts) if data.datasets else data.dataset_name or data.folder


def printable(text: str) -> str:
    """Without what a terminal would obey, since captions and names of files come from strangers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    plain_warnings(PROGRAM)
    try:
        request, config = parsed(sys.argv[1:] if argv is None else argv)
        look = look_at(request, config)
        facts = look.facts()
        print(printable(f"{name_of(config.data)}\n\n{table(sections(facts, look.images))}"), flush=True)
        if request.json is not None:
            write_text(request.json, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        if look.left == 0:
            raise ValueError("there is nothing to train on: none of the images can be read")
        if request.contact_sheet != NONE:
            save_picture(sheet_of(look.images, name_of(config.data), request.num_images), request.contact_sheet)
            print(f"\nThe contact sheet is {request.contact_sheet}.")
    except (OSError, ValueError, HungLoader) as error:
        sys.exit(f"{PROGRAM}: error: {error}")


if __name__ == "__main__":
    main()
