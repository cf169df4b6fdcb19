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
that are there; they are drawn anew where the model, its sampling or the prompts have changed, or they are broken.

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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lpl.config import command_line as arguments
from lpl.config.checks import check_ranges, warn_idle
from lpl.config.choices import CLIP, CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.data.reading import FORMATS, image_files
from lpl.evaluation import MOST_BY_DEFAULT, NEAREST_K, check_libraries
from lpl.evaluation.generation import Model, find_models, generate, image_path, is_model, is_run
from lpl.evaluation.images import ImageSet, Preprocessing, folder_images
from lpl.evaluation.metrics import check_bootstrap, check_counts
from lpl.evaluation.networks import check_networks, load_networks, wanted_networks
from lpl.evaluation.processes import processes
from lpl.evaluation.report import aligned, on_card, summary, table, write_evaluation
from lpl.evaluation.results import REAL, Reference, State, class_labels, measure, prompts_of, shown_states
from lpl.publishing.card_edits import add_results
from lpl.tools.machine import DTYPES
from lpl.tools.words import first_line


logger = logging.getLogger(__name__)
PROGRAM = "python -m lpl.evaluate"
SHARED_FLAGS = (  # those that are as in the training script
    *("revision", "variant", "cache_dir", "max_sequence_length", "caption_column", "image_interpolation_mode"),
)


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; names as in the training script, or in the pipelines' calls."""
    parser = arguments.Parser(
        prog=PROGRAM,
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
    add("--prompts_file", help="prompts, one a line, taken in turn; default: the reference's captions, shuffled")
    add("--pretrained_model_name_or_path", help="where a run's base pipeline is now, if not where its recipe says")
    add("--seed", type=int, default=0, help="of the first image; each further one has the next. It also decides how "
        "captions are shuffled, what the kernel distance's subsets are, the resamples, and the reference's "
        "halves")  # fmt: skip
    add("--bootstrap", type=int, default=0, help="resamples of the images, for the spread of each number; 0: none")
    add("--nearest_k", type=int, default=NEAREST_K, help="neighbours for precision, recall, density and coverage")
    add("--update_card", action="store_true", help="put the numbers into the model card of each training run's folder")
    add("--device", help="e.g. cpu or cuda:1; default: a GPU if there is one")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="precision of the drawing, but for the VAE")
    arguments.add_flags(parser, SHARED_FLAGS)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the command line alone tells to be wrong, networks included; fill in that of CLIPScore.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_libraries(PROGRAM)
    check_ranges(vars(args))
    check_bootstrap(args.bootstrap)
    for name in ("num_images", "batch_size", "num_inference_steps", "nearest_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: it must be 1 or more")
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    if not image_files(args.reference):
        raise ValueError(f"--reference {args.reference}: there is no such folder, or it has no images")
    if args.prompts_file is not None and not Path(args.prompts_file).is_file():
        raise ValueError(f"--prompts_file {args.prompts_file}: there is no such file")
    if args.clip is not None and CLIP_SCORE not in args.metrics:
        raise ValueError(f"--clip {args.clip} is for clip_score, which --metrics does not name; leave one out")
    args.clip = args.clip or CLIP
    labels = [label for label, _ in labelled_sources(args.generated)]
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"--generated: two sources are called {repeated}; name them, LABEL=SOURCE")
    if REAL in labels:
        raise ValueError(f"--generated {REAL}=...: that is the reference's name; give another label")
    _check_device(args)
    check_networks(wanted_networks(args.metrics, args.features, args.clip), args.cache_dir)


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
            sides = {min(Image.open(first, formats=FORMATS).size)}
        except OSError as error:
            raise ValueError(f"--resolution is not given, and {first} cannot be read for it; give it") from error
    args.resolution = args.resolution or sides.pop()


def warn_of_idle(args: argparse.Namespace, states: Sequence[State]) -> None:
    """Say so where a flag is given that does nothing."""
    models = [state.model for state in states if state.model is not None]
    drawn, pipelines = bool(models), any(model.step is None for model in models)
    bases = [model.args.pretrained_model_name_or_path for model in models if model.step is not None]
    of_drawing = ("num_inference_steps", "guidance_scale", "dtype", "prompts_file", "max_sequence_length")
    used = {
        **dict.fromkeys(of_drawing, drawn),
        "revision": pipelines,
        "variant": pipelines,
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path in bases,
        "features": any(name in SET_METRICS for name in args.metrics),
        "nearest_k": any(name in NEIGHBOUR_METRICS for name in args.metrics),
        "seed": drawn or args.bootstrap or any(name in SET_METRICS for name in args.metrics),
    }
    for name in used:
        if name in args.given and not used[name]:
            warn_idle(name)


def check_sizes(states: Sequence[State], args: argparse.Namespace, reference: int) -> None:
    """Refuse sets that are too small for the metrics; images that are not read yet are taken to be readable."""
    wanted = [name for name in args.metrics if name in SET_METRICS]
    for state in states if wanted else ():
        there = len(image_files(state.source) if state.images is None else state.images)
        count = number_drawn(args, reference) if state.model else min(args.num_images or there, there)
        check_counts(wanted, count, reference, args.nearest_k)


def number_drawn(args: argparse.Namespace, reference: int) -> int:
    """How many images each model draws."""
    return args.num_images or min(reference, MOST_BY_DEFAULT)


def class_names(model: Model) -> dict[int, str]:
    """By label; none of a model that takes captions."""
    family = model.configs.family
    return family.class_names(model.configs.index) if family.class_conditional else {}


def prompts_for(model: Model, args: argparse.Namespace, reference: ImageSet) -> list[str] | list[int]:
    """The prompts that are cycled through: of --prompts_file in their order, else of the reference.

    Raises:
        ValueError: where there are none, or they are no classes of a class-conditional model.
    """
    family, names = model.configs.family, class_names(model)
    if args.prompts_file is not None:
        where = f"--prompts_file {args.prompts_file}"
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        pool = [line.strip() for line in lines if line.strip()]
        if not pool:
            raise ValueError(f"{where}: the file has no prompts")
        return class_labels(family, pool, names, where) if family.class_conditional else pool
    try:
        return prompts_of(reference, args.reference, family, names, "--reference", args.seed)
    except ValueError as error:
        raise ValueError(f"{error}; or give --prompts_file") from error


def draw_state(
    state: State, args: argparse.Namespace, device: torch.device, preprocessing: Preprocessing, reference: ImageSet
) -> None:
    """Fill in the images of a model, which lie in a folder whose name changes with whatever decides them."""
    model, names = state.model, class_names(state.model)
    pool = prompts_for(model, args, reference)
    count = number_drawn(args, len(reference))
    prompts = [pool[number % len(pool)] for number in range(count)]
    state.drawn = model.settings(args.dtype)
    key = hashlib.sha256(json.dumps([state.drawn, pool, args.seed]).encode()).hexdigest()[:8]
    folder = Path(args.output_dir, "images", re.sub(r"[^\w.-]+", "-", f"{model.name}-{key}"))
    seeds = [args.seed + number for number in range(count)]
    generate(model, prompts, seeds, folder, batch_size=args.batch_size, device=device, dtype=args.dtype)
    files = [image_path(folder, number) for number in range(count)]
    captions = [names.get(prompt, str(prompt)) for prompt in prompts]
    state.images = ImageSet(state.name, files, preprocessing, captions)


def read_state(state: State, args: argparse.Namespace, preprocessing: Preprocessing) -> None:
    """Fill in the images of a folder, --num_images of them at most, evenly spread."""
    images = folder_images(state.source, preprocessing, args.caption_column)
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


# All of it -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw, measure, and write everything; returns what is in evaluation.json (empty but on the main process).

    Raises:
        ValueError: for arguments that do not fit, before anything is loaded.
    """
    check_arguments(args)
    states = find_states(args)
    warn_of_idle(args, states)
    check_sizes(states, args, len(image_files(args.reference)))
    if args.update_card and not cards(args):
        raise ValueError("--update_card: none of the sources is a training run's folder with its README.md")
    workers = processes(cpu=args.device == "cpu")
    main, device = workers.is_main_process, torch.device(args.device or workers.device)
    if not main:
        logging.getLogger("lpl").setLevel(logging.ERROR)  # what is said of images is said once
    preprocessing = Preprocessing(args.resolution, args.image_interpolation_mode)
    real = folder_images(args.reference, preprocessing, args.caption_column)
    for state in states:
        if state.model is None:
            read_state(state, args, preprocessing)
        else:
            prompts_for(state.model, args, real)
    check_sizes(states, args, len(real))
    wanted = wanted_networks(args.metrics, args.features, args.clip)
    reference = Reference(real, load_networks(wanted, real[0], device, args.cache_dir), args)
    for state in states:
        if state.model is not None:
            draw_state(state, args, device, preprocessing, real)
    results = measure(states, reference)
    evaluation: dict[str, Any] = {}
    if main:
        shown = shown_states(states)
        evaluation = summary(results, shown, reference, args)
        write_evaluation(evaluation, shown, real, args.output_dir)
        for label, card in cards(args):
            add_results(card, *on_card(evaluation, label))
            print(f"{card} has these results now")
    workers.wait_for_everyone()
    return evaluation


def cards(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Label and model card of those that --update_card is about: of runs, since only they have a card of ours."""
    found = [
        (label, Path(source, "README.md")) for label, source in labelled_sources(args.generated) if is_run(source)
    ]
    return [(label, card) for label, card in found if card.is_file()] if args.update_card else []


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags, those that are ``given``, and the command itself as ``words``."""
    args = build_parser().parse_args(words)
    args.given = arguments.given_flags(build_parser(), words)
    args.words = [*PROGRAM.split(), *words]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_, **__: f"{PROGRAM}: warning: {message}\n"
    for library in ("httpx", "httpx2", "diffusers", "transformers"):  # they tell each file and cut caption
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
        print(f"numbers and pictures, and what the warnings mean, are in {args.output_dir}")


def finish() -> None:
    """Close the process group, if there is one, after its thread has dropped the last barrier: a process that leaves
    before that aborts."""
    workers = processes()
    if workers.num_processes > 1:
        time.sleep(0.2)
        workers.destroy_process_group()


if __name__ == "__main__":
    main()
