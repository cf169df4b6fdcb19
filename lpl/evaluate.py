"""Measures how far generated images are from real ones, in numbers, spectra and pictures.

    python -m lpl.evaluate --generated with=run_with_lpl without=run_without --reference FOLDER --output_dir evaluated

A *source* behind ``--generated`` is a folder of images, a pipeline, or a training run's output folder, which stands
for the series of its checkpoints and its result (:mod:`lpl.evaluation.generation`). The *reference* is a folder of
real images, best of ones that were not trained on. All models get the same prompts and seeds; both sides get the same
preprocessing. A *result* is what is found of one *state*: of a folder, of a pipeline, of one checkpoint. Its *set
metrics* compare two sets of images through a feature network each; CLIPScore compares images with their captions.

In the output folder: ``evaluation.json``, everything that was found and how; ``evaluation.md``, its table;
``spectrum.png`` (Fig. 5, 6), ``samples.png`` (the same seeds in the same columns), ``crops.png`` (parts of them,
enlarged), ``curves.png`` where there is a series; ``images/``, what was drawn. The same command goes on with images
that are there; they are drawn anew where the model, its sampling or the prompts have changed.

Under ``accelerate launch -m lpl.evaluate ...`` each process draws and embeds a part. A Fréchet distance through
another network than Inception is no FID, and is not called so. No number compares to a published one unless reference,
number of images, resolution and preprocessing are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lpl import arguments, hub
from lpl.checks import DTYPES, check_ranges
from lpl.data import first_line, image_files
from lpl.evaluation import CLIP, CLIP_SCORE, METRICS, SET_METRICS
from lpl.evaluation import metrics as measures
from lpl.evaluation.generation import Model, find_models, generate, is_model, processes
from lpl.evaluation.images import ImageSet, Preprocessing, folder_images
from lpl.evaluation.networks import check_network, load_network, try_out
from lpl.evaluation.results import (
    REAL,
    State,
    aligned,
    class_labels,
    markdown_table,
    measure,
    model_index,
    prompts_of,
    summary,
    table,
    write_evaluation,
)


logger = logging.getLogger(__name__)

__all__ = ["build_parser", "main", "model_index", "run"]

MOST_BY_DEFAULT = 10_000  # images of each source, as many as the paper takes
SHARED_FLAGS = (  # those that are as in the training script
    *("revision", "variant", "cache_dir", "max_sequence_length", "caption_column", "image_interpolation_mode"),
)


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; names as in the training script, or in the pipelines' calls."""
    parser = arguments.Parser(
        prog="python -m lpl.evaluate",
        usage="%(prog)s --generated [LABEL=]SOURCE ... --reference FOLDER --output_dir FOLDER [flags]",
        description="Measure how far generated images are from real ones.",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--generated",
        nargs="+",
        required=True,
        help="folders of images, pipelines (folder or id on the Hub), or training runs; LABEL=SOURCE names one",
    )
    add("--reference", required=True, help="folder of real images, with their captions in a metadata.jsonl if any")
    add("--output_dir", required=True, help="where the numbers, the pictures and the drawn images go")
    add("--metrics", nargs="+", choices=METRICS, default=list(SET_METRICS),
        help="what to compute; clip_score needs captions")  # fmt: skip
    add("--features", nargs="+", default=["facebook/dinov2-base"],
        help="feature networks: a folder or an id on the Hub for transformers, inception, or PACKAGE.MODULE:FUNCTION "
        "that returns, without arguments, a module from uint8 (B, 3, H, W) to (B, D); each gives the set "
        "metrics")  # fmt: skip
    add("--clip", help=f"network of clip_score; default: {CLIP}")
    add("--num_images", type=int, help=f"images of each source; default: as many as the reference has, at most "
        f"{MOST_BY_DEFAULT}; of a folder all")  # fmt: skip
    add(
        "--resolution",
        type=int,
        help="side in pixels that images are drawn and compared at; default: the run's, of folders the first image's",
    )
    add("--batch_size", type=int, default=8, help="images that are drawn and embedded at a time")
    add("--num_inference_steps", type=int, help="sampling steps; default: the run's, else the pipeline's")
    add("--guidance_scale", type=float, help="guidance of the sampling; default: the run's, else the pipeline's")
    add("--prompts", help="file of prompts, one a line, taken in turn; default: the reference's captions, shuffled")
    add("--pretrained_model_name_or_path", help="where a run's base pipeline is now, if not where its recipe says")
    add("--seed", type=int, default=0, help="of the first image; each further one has the next")
    add("--bootstrap", type=int, default=0, help="resamples for 95%% intervals; 0: none")
    add("--neighbours", type=int, default=5, help="k of precision, recall, density and coverage")
    add("--update_card", action="store_true", help="put the numbers into the README.md of each run's folder")
    add("--device", help="e.g. cpu or cuda:1; default: a GPU if there is one")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="precision of the drawing, but for the VAE")
    for action in arguments.build_parser()._actions:
        if action.dest in SHARED_FLAGS:
            parser._add_action(action)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the command line alone tells to be wrong, and fill in the network of CLIPScore.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_ranges(args)
    for name in ("num_images", "batch_size", "num_inference_steps", "neighbours"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: it must be 1 or more")
    if args.bootstrap < 0 or args.bootstrap == 1:
        raise ValueError(f"--bootstrap {args.bootstrap}: it must be 2 or more, or 0 for no intervals")
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    if not Path(args.reference).is_dir():
        raise ValueError(f"--reference {args.reference}: there is no such folder")
    if args.prompts is not None and not Path(args.prompts).is_file():
        raise ValueError(f"--prompts {args.prompts}: there is no such file")
    if args.clip is not None and CLIP_SCORE not in args.metrics:
        raise ValueError(f"--clip {args.clip} is for clip_score, which --metrics does not name; leave one out")
    if args.metrics == [CLIP_SCORE]:
        args.features = []
    args.clip = args.clip or CLIP
    labels = [label for label, _ in labelled_sources(args.generated)]
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"--generated: two sources are called {repeated}; name them, LABEL=SOURCE")
    if REAL in labels:
        raise ValueError(f"--generated {REAL}=...: that is the reference's name; give another label")
    _check_device(args)


def _check_device(args: argparse.Namespace) -> None:
    if args.device is not None:
        try:
            torch.zeros((), device=args.device).item()
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"--device {args.device}: {first_line(error)}; give cpu, or leave it out") from error
    on_cpu = torch.device(args.device).type == "cpu" if args.device else not torch.cuda.is_available()
    if on_cpu and args.dtype == "float16":
        raise ValueError("--dtype float16 needs a GPU; use bfloat16 or float32")


def labelled_sources(words: Sequence[str]) -> list[tuple[str, str]]:
    """(label, source) of each word behind --generated; an own label is the folder's or the repository's name.

    >>> labelled_sources(["before=stabilityai/sd", "runs/lpl/"])
    [('before', 'stabilityai/sd'), ('lpl', 'runs/lpl/')]
    """
    found = []
    for word in words:
        label, equals, source = word.partition("=")
        if not equals or Path(word).exists():
            label, source = Path(word).resolve().name, word
        if not label or not source:
            raise ValueError(f"--generated {word}: it must be a source, or LABEL=SOURCE")
        found.append((label, source))
    return found


# What is drawn -------------------------------------------------------------------------------------------------------


def find_states(args: argparse.Namespace) -> list[State]:
    """All states that --generated names, models with their sampling settings; fills in --resolution.

    Raises:
        ValueError: for what is no source, and where resolutions differ.
    """
    names = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir", "max_sequence_length")
    flags = {name: getattr(args, name) for name in names}
    sampling = (args.resolution, args.num_inference_steps, args.guidance_scale)
    states = []
    for label, source in labelled_sources(args.generated):
        if is_model(source):
            found = (model.sampled(*sampling) for model in find_models(source, label, **flags))
            states += [State(label, source, model.step, model=model) for model in found]
        elif not image_files(source):
            raise ValueError(f"--generated {source}: this folder is no pipeline, no training run, and has no images")
        else:
            states.append(State(label, source))
    _settle_resolution(args, states)
    return states


def _settle_resolution(args: argparse.Namespace, states: Sequence[State]) -> None:
    """One for all: that of the models, or of the first image."""
    sides = {state.model.args.resolution for state in states if state.model}
    if len(sides) > 1:
        raise ValueError(f"--resolution: the models draw at {', '.join(map(str, sorted(sides)))} pixels; give one")
    if not sides and args.resolution is None:
        first = sorted(image_files(states[0].source))[0]
        try:
            sides = {min(Image.open(first).size)}
        except OSError as error:
            raise ValueError(f"--resolution is not given, and {first} cannot be read for it; give it") from error
    args.resolution = args.resolution or sides.pop()


def prompts_for(model: Model, args: argparse.Namespace, reference: ImageSet) -> list[str] | list[int]:
    """The prompts that are cycled through: of --prompts in their order, else of the reference.

    Raises:
        ValueError: where there are none, or they are no classes of a class-conditional model.
    """
    family = model.configs.family
    names = family.class_names(model.configs.index) if family.class_conditional else {}
    if args.prompts is not None:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
        pool = [line.strip() for line in lines if line.strip()]
        if not pool:
            raise ValueError(f"--prompts {args.prompts}: the file has no prompts")
        return class_labels(family, pool, names, f"--prompts {args.prompts}") if family.class_conditional else pool
    try:
        return prompts_of(reference, args.reference, family, names, "--reference", args.seed)
    except ValueError as error:
        raise ValueError(f"{error}; or give --prompts") from error


def draw_state(
    state: State, args: argparse.Namespace, device: torch.device, preprocessing: Preprocessing, reference: ImageSet
) -> None:
    """Fill in the images of a model, which lie in a folder whose name changes with whatever decides them."""
    model = state.model
    count = number_drawn(args, len(reference))
    pool = prompts_for(model, args, reference)
    settings = model.settings(args.dtype)
    key = hashlib.sha256(json.dumps([settings, pool, args.seed]).encode()).hexdigest()[:8]
    folder = Path(args.output_dir, "images", re.sub(r"[^\w.-]+", "-", f"{model.name}-{key}"))
    generate(
        model,
        [pool[number % len(pool)] for number in range(count)],
        [args.seed + number for number in range(count)],
        folder,
        batch_size=args.batch_size,
        device=device,
        dtype=args.dtype,
    )
    state.images = folder_images(folder, preprocessing, progress=processes().is_main_process).select(range(count))
    state.images.name = state.name
    state.drawn = settings


def read_state(state: State, args: argparse.Namespace, preprocessing: Preprocessing) -> None:
    """Fill in the images of a folder, --num_images of them at most, evenly spread."""
    images = folder_images(state.source, preprocessing, args.caption_column, processes().is_main_process)
    count = min(args.num_images or len(images), len(images))
    if args.num_images and count < args.num_images:
        logger.warning("--num_images %d: %s has %d images only", args.num_images, state.source, count)
    state.images = images.select(number * len(images) // count for number in range(count))
    state.images.name = state.label
    if CLIP_SCORE in args.metrics and state.images.captions is None:
        raise ValueError(
            f"--generated {state.source}: clip_score compares images with their captions, and there is no "
            f"metadata.jsonl with {args.caption_column!r}; leave clip_score out"
        )


def _check_counts(states: Sequence[State], args: argparse.Namespace, reference: int) -> None:
    """Refuse, before anything is drawn, sets that are too small for the metrics."""
    wanted = [name for name in args.metrics if name in SET_METRICS]
    for state in states if wanted else ():
        count = number_drawn(args, reference) if state.model else len(state.images)
        measures._check_counts(wanted, count, reference, args.neighbours)


def number_drawn(args: argparse.Namespace, reference: int) -> int:
    """How many images each model draws."""
    return args.num_images or min(reference, MOST_BY_DEFAULT)


def shown_states(states: Sequence[State]) -> list[State]:
    """Those in the pictures: the last of each source; of one run alone also the first."""
    last = list({state.label: state for state in states}.values())
    return [states[0], states[-1]] if len(last) == 1 and len(states) > 1 else last


# All of it -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw, measure, and write everything; returns what is in evaluation.json (empty but on the main process).

    Raises:
        ValueError: for arguments that do not fit, before anything is loaded.
    """
    check_arguments(args)
    states = find_states(args)
    workers = processes(cpu=args.device == "cpu")
    main, device = workers.is_main_process, torch.device(args.device or workers.device)
    preprocessing = Preprocessing(args.resolution, interpolation=args.image_interpolation_mode)
    reference = folder_images(args.reference, preprocessing, args.caption_column, main)
    for state in states:
        if state.model is None:
            read_state(state, args, preprocessing)
        else:
            prompts_for(state.model, args, reference)
    _check_counts(states, args, len(reference))
    if args.update_card and not cards(args):
        raise ValueError("--update_card: none of the sources is a folder with a model and its README.md")
    for name in args.features:
        check_network(name, args.cache_dir)
    if CLIP_SCORE in args.metrics:
        check_network(args.clip, args.cache_dir, text=True)
    names = dict.fromkeys([*args.features, *([args.clip] if CLIP_SCORE in args.metrics else [])])
    networks = {name: load_network(name, device, args.cache_dir) for name in names}
    for network in networks.values():
        try_out(network, reference[0])
    for state in states:
        if state.model is not None:
            draw_state(state, args, device, preprocessing, reference)
    results = measure(states, reference, networks, args)
    evaluation: dict[str, Any] = {}
    if main:
        shown = shown_states(states)
        evaluation = summary(results, shown, reference, networks, args)
        write_evaluation(evaluation, shown, reference, args.output_dir)
        for card in cards(args):
            name = next(label for label, source in labelled_sources(args.generated) if Path(source) == card.parent)
            hub.add_results(
                card, model_index(evaluation, name, Path(args.reference).resolve().name), markdown_table(evaluation)
            )
            logger.warning("%s has these results now", card)
    workers.wait_for_everyone()
    return evaluation


def cards(args: argparse.Namespace) -> list[Path]:
    """The model cards that --update_card is about."""
    found = [Path(source, "README.md") for _, source in labelled_sources(args.generated) if is_model(source)]
    return [card for card in found if card.is_file()] if args.update_card else []


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags, and the command itself as ``words``."""
    args = build_parser().parse_args(words)
    args.words = ["python", "-m", "lpl.evaluate", *words]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse(sys.argv[1:] if argv is None else argv)
    for library in ("httpx", "httpx2", "diffusers.pipelines", "transformers"):  # they tell each file and cut caption
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        evaluation = run(args)
    except (OSError, ValueError) as error:  # the former where something cannot be read or written
        build_parser().error(str(error))
    finish()
    if evaluation:
        print(aligned(table(evaluation)))
        for words in evaluation["warnings"]:
            print(f"warning: {words}")
        print(f"numbers and pictures are in {args.output_dir}")


def finish() -> None:
    """Close the process group, if there is one, after its thread has dropped the last barrier: a process that leaves
    before that aborts."""
    workers = processes()
    if workers.num_processes > 1:
        time.sleep(0.2)
        workers.destroy_process_group()


if __name__ == "__main__":
    main()
