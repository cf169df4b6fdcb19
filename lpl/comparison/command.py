"""Tells whether LPL helps *you*: trains with and without it, and measures both against held-out images.

    python -m lpl.compare --output_dir comparison --reference IMAGES --seeds 0 1 2 -- \\
        accelerate launch train_text_to_image_lpl.py --config recipe.yaml --train_data_dir DATA

Behind ``--`` stands the training command as you would type it, with its launcher. That way nothing is configured
twice, and what is compared is the training that you want. The command is read once, completed, and written to
``training.yaml``, from which all runs start; they differ in ``--output_dir``, ``--seed`` and ``--lpl_weight`` alone.
One default depends on LPL, that of ``--ema_decay``; it is written there as well, so that both kinds of runs have the
one with LPL. ``--equal_time`` adds a run without LPL, of as many steps as take the time of those with LPL.

A dry run comes first, with all refusals of the training script. Then the runs follow one another, so that their times
compare. The same command continues where it was stopped, with finished runs left alone; with more ``--seeds`` it adds
runs. The reference defaults to --eval_data_dir of the training command, else to the images that it holds out.

Files in the output folder: ``comparison.md`` (verdict, tables, picture), ``comparison.json``, ``comparison.png``;
``runs/``, the runs without checkpoints; ``evaluation/``, as of ``python -m lpl.evaluate``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch

from lpl.comparison import report
from lpl.comparison.measures import measures_of
from lpl.comparison.runs import LONGER, WITH, WITHOUT, Run, call, check_alike, locked, steps_for_equal_time
from lpl.config import Config
from lpl.config.checks import check_words
from lpl.config.choices import EMA_DECAY
from lpl.config.command_line import add_flags, given_flags, parse, recipe
from lpl.config.command_line import build_parser as training_parser
from lpl.config.config import FLAGS
from lpl.config.flag import NOT_NEGATIVE, OnResume, add_group, at_most, built, flag, flags_of
from lpl.config.parser import Parser
from lpl.config.recipes import read_entries, recipe_text
from lpl.data.dataset import LatentSpace, TrainingImages
from lpl.data.folder import image_files
from lpl.data.reading import Picture
from lpl.data.source import load_training_images
from lpl.evaluation import MOST_BY_DEFAULT
from lpl.evaluation import command as evaluate
from lpl.evaluation.images import METADATA, Preprocessing, has_captions
from lpl.evaluation.metrics import check_counts
from lpl.evaluation.report import SAMPLING, short_names
from lpl.families.derived import with_derived
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolve
from lpl.tools.files import check_writable, write_text
from lpl.tools.layout import EVALUATION, RECIPE
from lpl.tools.machine import SHORT
from lpl.tools.pictures import save_picture
from lpl.tools.places import lies_within
from lpl.tools.privacy import without_secrets
from lpl.tools.words import counted, plain_warnings, warn
from lpl.training.preemption import EXIT_CODE


PROGRAM = "python -m lpl.compare"
SCRIPT, INSTALLED = "train_text_to_image_lpl", "lpl-train"  # the second one is the wheel's command
EXAMPLE = f"-- accelerate launch {SCRIPT}.py --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES"
TRAINING, RUNS, REFERENCE = "training.yaml", "runs", "reference"
WRITTEN = re.compile(r"\d{5}\.png")  # the held-out images
EVALUATION_FLAGS = (  # of python -m lpl.evaluate
    *("metrics", "features", "clip", "num_images", "batch_size", "num_inference_steps", "guidance_scale"),
    *("prompts_file", "nearest_k", "device", "dtype"),
)
KEEPING = {  # flags that change no result
    *("gradient_checkpointing", "lpl_gradient_checkpointing", "lpl_chunk_size", "offload_ema"),
    *("max_bad_samples", "max_skipped_steps"),
}
OF_THE_TRAINING = ("caption_column", "image_interpolation_mode", "cache_dir")  # what the evaluation takes from it


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command's own flags."""

    output_dir: str = flag(MISSING, "where the runs, the page, its picture and its numbers go", path=True)
    reference: str | None = flag(
        None,
        "folder of real images with captions that are not trained on; default: --eval_data_dir of the training "
        "command, or what its --validation_every_nth or --validation_split holds out",
        path=True,
    )
    seeds: tuple[int, ...] | None = flag(
        None, "seeds that are trained with and without LPL; default: --seed of the training command, or 0"
    )
    equal_time: bool = flag(False, "also train without LPL for as many steps as take the time of those with LPL")


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Args:
        evaluation: words for ``python -m lpl.evaluate``, without sources, reference and folder.
        launcher: the training command's words up to the script, and --verbose.
        training: its configuration.
        words: the command itself.
    """

    request: Request
    evaluation: tuple[str, ...]
    launcher: tuple[str, ...]
    training: Config
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.request.output_dir)

    @property
    def recipe(self) -> Path:
        return self.folder / TRAINING

    @property
    def seeds(self) -> tuple[int, ...]:
        seeds = self.request.seeds or (self.training.optimization.seed or 0,)
        return tuple(dict.fromkeys(seeds))

    def run(self, kind: str, seed: int) -> Run:
        return Run(kind, seed, self.folder / RUNS / f"{kind}-{seed}")

    def runs(self, *kinds: str) -> list[Run]:
        return [self.run(kind, seed) for seed in self.seeds for kind in kinds]


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s --output_dir FOLDER [flags] -- accelerate launch train_text_to_image_lpl.py [its flags]",
        description="Train with and without the latent perceptual loss, and measure both against held-out images.",
    )
    add_group(parser, Request)
    add_group(parser, evaluate.Request, EVALUATION_FLAGS)
    add_flags(parser, ("verbose",))
    return parser


def parsed(words: Sequence[str]) -> Command:
    """
    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    own, dashes, training = _split(words)
    if not dashes and any(Path(word).name.removesuffix(".py") in (SCRIPT, INSTALLED) for word in own):
        raise ValueError(f"write -- before the training command: {EXAMPLE}")
    values = vars(build_parser().parse_args(own))
    if not dashes:
        raise ValueError(f"the training command is missing; write it at the end: {EXAMPLE}")
    request = built(Request, values)
    for seed in request.seeds or ():
        for accepts, said in (NOT_NEGATIVE, at_most(2**32 - 1)):
            if not accepts(seed):
                raise ValueError(f"--seeds {seed}: it must be {said}")
    for name, declared in flags_of(evaluate.Request).items():
        if name in values:
            declared.check(name, values[name])
    launcher, flags = _training_words(training)
    if shutil.which(launcher[0]) is None:
        raise ValueError(f"-- {launcher[0]} ...: there is no such program")
    config = parse(flags, f"{SCRIPT}.py")
    plain_warnings(PROGRAM)
    _check_training(config)
    typed = given_flags(training_parser(), flags)
    ignored = [name for name in ("output_dir", *(["seed"] if request.seeds else [])) if name in typed]
    if ignored:
        warn(f"--{' and --'.join(ignored)} of the training command: the comparison sets its own")
    config = config.changed(
        output_dir=str(Path(request.output_dir, RUNS)), checkpoints_total_limit=1, resume_from_checkpoint=None
    )
    launcher += ("--verbose",) if config.validation.verbose else ()  # which no recipe has
    return Command(request, tuple(_evaluation_words(values)), launcher, config, (*PROGRAM.split(), *words))


def _split(words: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """The words before the first ``--``, whether there is one, and those behind it."""
    place = words.index("--") if "--" in words else len(words)
    return list(words[:place]), place < len(words), list(words[place + 1 :])


def _training_words(words: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The launcher with the script, and the script's flags.

    >>> _training_words(["accelerate", "launch", "train_text_to_image_lpl.py", "--rank", "4"])
    (('accelerate', 'launch', 'train_text_to_image_lpl.py'), ['--rank', '4'])
    """
    names = [Path(word).name.removesuffix(".py") for word in words]
    place = next((place for place, name in enumerate(names) if name in (SCRIPT, INSTALLED)), None)
    if place is None:
        raise ValueError(f"-- {shlex.join(words)}: this command does not run {SCRIPT}.py; an example: {EXAMPLE}")
    if place == 0 and words[0].endswith(".py"):
        raise ValueError(f"-- {words[0]} ...: write the launcher too: -- accelerate launch {words[0]} ...")
    return tuple(words[: place + 1]), list(words[place + 1 :])


def _check_training(config: Config) -> None:
    """Refuse flags of a training command that a comparison cannot have."""
    output = config.output
    if not config.lpl.enabled:
        raise ValueError(
            "--lpl_weight 0: give the training command with LPL; the comparison makes the run without LPL itself"
        )
    for name in ("dry_run", "for_gpu"):
        if config.values()[name]:
            raise ValueError(f"--{name}: leave it out of the training command; a comparison begins with a dry run")
    if output.push_to_hub:
        raise ValueError(
            "--push_to_hub: a comparison publishes nothing; leave it out (of a recipe by --without push_to_hub), and "
            "publish a run afterwards by python -m lpl.publish"
        )
    steps = config.optimization.max_train_steps
    if steps is not None and config.lpl.lpl_start_step >= steps:
        raise ValueError(
            f"--lpl_start_step {config.lpl.lpl_start_step}: the training ends after {steps} steps, so both runs would "
            "be without LPL; add --lpl_start_step 0 to the training command, or train longer"
        )
    if output.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"--resume_from_checkpoint {output.resume_from_checkpoint}: the runs of a comparison begin anew and "
            "resume by themselves; leave it out"
        )


def _evaluation_words(values: dict[str, Any]) -> list[str]:
    """The flags for python -m lpl.evaluate that are not at their defaults."""
    parser, words = build_parser(), []
    for name in EVALUATION_FLAGS:
        value = values[name]
        if value != parser.get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# What is refused before a run ----------------------------------------------------------------------------------------


def check_folder(command: Command) -> None:
    """Refuse a folder that cannot be written to, or that holds something else.

    Raises:
        ValueError: with the flag that differs.
    """
    folder, what = command.folder, f"--output_dir {command.folder}"
    check_writable(what, folder, [RUNS, EVALUATION], [TRAINING, report.PAGE])
    if (folder / RECIPE).is_file():
        raise ValueError(f"{what}: this is a training run's folder; give another one")
    if not any(folder.glob(f"{RUNS}/*")):
        return
    if not command.recipe.is_file():
        raise ValueError(f"{what}: it has a folder {RUNS} that is of no comparison; give another folder")
    earlier = read_entries(command.recipe)
    for name, value in recipe(command.training).items():
        declared = FLAGS[name]
        free = declared.own or declared.on_resume is OnResume.SILENT or name in KEEPING
        if not free and earlier.get(name) != value:
            raise ValueError(
                f"{what}: it holds a comparison of another training command, with {name} {earlier.get(name)}, and now "
                f"it is {value}; give another folder"
            )


def reference_folder(command: Command, description: Description) -> str:
    """The folder of held-out images; those that the training command holds out are written to one.

    Raises:
        ValueError: without any.
    """
    config = command.training
    given = command.request.reference or config.evaluation.eval_data_dir
    data = config.data
    if given:
        alone = [part.data for part in data.parts]
        sources = [("train_data_dir", one.train_data_dir) for one in alone]
        for name, place in [*sources, *(("dataset_name", one.dataset_name) for one in alone)]:
            if place and os.path.isdir(place) and (lies_within(given, place) or lies_within(place, given)):
                raise ValueError(
                    f"--reference {given}: it shares images with --{name} {place}, which are trained on; give images "
                    "that are not, or hold out a part by --validation_every_nth 10 in the training command"
                )
        return given
    if not data.holds_out:
        raise ValueError(
            "--reference is missing: a folder of real images with captions that are not trained on; or hold out a "
            "part of the training images by --validation_every_nth 10 in the training command"
        )
    if data.streaming:
        raise ValueError("--streaming: the images that a run holds out are not written to a folder; give --reference")
    subsets = [data.max_train_samples, *(part.data.max_train_samples for part in data.parts)]
    if data.validation_every_nth is not None and any(count is not None for count in subsets):
        raise ValueError("--max_train_samples: what a run holds out depends on its seed; give --reference")
    folder = command.folder / REFERENCE
    if not (folder / METADATA).is_file() or not any(command.folder.glob(f"{RUNS}/*")):
        write_held_out(config, description, folder)
    return str(folder)


def write_held_out(config: Config, description: Description, folder: Path) -> None:
    """Write the images that a run holds out, all of them, with their captions.

    Raises:
        ValueError: if the folder holds anything else than an earlier call has written.
    """
    if any(file.name != METADATA and not WRITTEN.fullmatch(file.name) for file in folder.glob("*")):
        raise ValueError(
            f"--output_dir {folder.parent}: its folder {REFERENCE}, in which the held-out images are written, holds "
            "other files; move them, give the folder as --reference, or give another --output_dir"
        )
    shutil.rmtree(folder, ignore_errors=True)
    data, cache_dir = replace(config.data, num_validation_samples=MOST_BY_DEFAULT), config.model.cache_dir
    _, held_out = load_training_images(data, 0, cache_dir, description.num_classes)
    assert held_out is not None
    objective, space = description.objective(config.model.objective), LatentSpace(*description.space)
    rest = (config.diffusion, 0, description.empty_caption, cache_dir)
    images = TrainingImages(held_out, objective, space, data, *rest)
    lines = []
    for index in range(len(images)):
        picture, caption, bad = images.readable(images.candidates(index))
        if not bad:  # otherwise it is another image, which is written by itself
            save_picture(cast(Picture, picture).image.convert("RGB"), folder / f"{index:05d}.png")
            lines.append(json.dumps({"file_name": f"{index:05d}.png", data.caption_column: caption}))
    write_text(folder / METADATA, "\n".join(lines) + "\n")


def evaluation_of(command: Command, runs: Sequence[Run], reference: str) -> evaluate.Command:
    """The command that measures the runs."""
    values = command.training.values()
    shared = {name: values[name] for name in OF_THE_TRAINING}
    defaults, dtype = evaluate.build_parser(), SHORT.get(command.training.optimization.mixed_precision or "")
    words = ["--generated", *(f"{run.label}={run.folder}" for run in runs), "--reference", reference]
    words += ["--output_dir", str(command.folder / EVALUATION), *command.evaluation]
    words += ["--dtype", dtype] if dtype and "--dtype" not in words else []
    for name, value in shared.items():
        words += [] if value == defaults.get_default(name) else [f"--{name}", str(value)]
    return evaluate.parse(words)


def check_evaluation(evaluation: evaluate.Command, description: Description, resolution: int) -> None:
    """Refuse what would end the evaluation, hours later.

    The device is tried in another process, since the trainings need all of its memory.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    request = evaluation.request
    evaluate.check_command(evaluation)
    if request.device == "cpu":
        evaluate.check_device(request.device, request.dtype)
    else:
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            other.submit(evaluate.check_device, request.device, request.dtype).result()
    there = len(image_files(request.reference))
    try:
        check_counts(request.metrics, evaluate.number_drawn(request, there), there, request.nearest_k)
    except ValueError as error:
        raise ValueError(
            f"the reference {request.reference} has {counted(there, 'image')}. {error}; or give another --reference, "
            "or hold out more images (--validation_every_nth in the training command)"
        ) from error
    column = evaluation.data.caption_column
    if description.family.class_conditional or request.prompts_file is not None:
        preprocessing = Preprocessing(resolution, evaluation.data.image_interpolation_mode)
        evaluate.prompts_for(description, request, evaluation.folder_images(request.reference, preprocessing))
    elif not has_captions(request.reference, column):
        raise ValueError(
            f"--reference {request.reference}: its images have no captions ({column!r}) to draw from; put a "
            f"{METADATA} beside them, or give --prompts_file"
        )


# The whole -----------------------------------------------------------------------------------------------------------


def completed(command: Command) -> tuple[Command, Description]:
    """The command with a complete configuration of the training, and its pipeline; writes nothing."""
    config = command.training
    check_words(config)
    config = with_derived(config)
    description = read_pipeline(config.model, config.lpl.lpl_blocks)
    command = replace(command, training=resolve(config, description))
    check_folder(command)
    return command, description


def evaluation_for(command: Command, description: Description) -> evaluate.Command:
    """The evaluation of the runs; writes the images that are held out, if the reference is made of them."""
    kinds = (WITH, WITHOUT, *([LONGER] if command.request.equal_time else []))
    reference = reference_folder(command, description)
    evaluation = evaluation_of(command, command.runs(*kinds), reference)
    check_evaluation(evaluation, description, command.training.data.size[0])
    return evaluation


def begin(command: Command, lock: int) -> None:
    """Write the recipe of all runs and, before the first one, take a dry run; ends the process if that fails."""
    begun = any(command.folder.glob(f"{RUNS}/*"))
    write_text(command.recipe, recipe_text(recipe(command.training)))
    if not begun:
        words = [*command.run(WITH, command.seeds[0]).words(command.launcher, command.recipe), "--dry_run"]
        show("a dry run first", words)
        if code := call(words, lock):
            sys.exit(f"{PROGRAM}: the dry run ended with exit code {code}; its message is above, and nothing was run")


def train(command: Command, lock: int) -> list[Run]:
    """Train all runs that are not done; returns all of them. Ends the process if one does not end well."""
    equal_steps = command.runs(WITHOUT, WITH)
    total = len(equal_steps) + (len(command.seeds) if command.request.equal_time else 0)
    for number, run in enumerate(equal_steps, start=1):
        train_run(command, run, f"{number} of {total}", lock)
        check_alike(equal_steps[:number])
    if not command.request.equal_time:
        return equal_steps
    longer = command.runs(LONGER)
    steps = next((run.max_steps for run in longer if run.max_steps), None) or steps_for_equal_time(equal_steps)
    for number, run in enumerate(longer, start=len(equal_steps) + 1):
        train_run(command, run, f"{number} of {total}", lock, steps)
        check_alike([*equal_steps, *longer[: number - len(equal_steps)]])
    return [*equal_steps, *longer]


def train_run(command: Command, run: Run, number: str, lock: int, steps: int | None = None) -> None:
    if run.is_done:
        print(f"{number}: {run.label}: done already", flush=True)
        return
    words = run.words(command.launcher, command.recipe, steps)
    show(f"{number}: {run.label}", words)
    code = call(words, lock)
    if not code and run.finish():
        return
    how = "was stopped" if code == EXIT_CODE else f"ended with exit code {code} before it was done"
    again = "run the same command again to go on from its last checkpoint"
    print(f"\n{PROGRAM}: {run.label} {how}; {again}", file=sys.stderr)
    sys.exit(EXIT_CODE if code == EXIT_CODE else 1)


def show(title: str, words: Sequence[str]) -> None:
    print(f"\n=== {title}\n{shlex.join(words)}\n", flush=True)


def compare(command: Command) -> report.Comparison:
    """Train, measure, and write everything."""
    command, description = completed(command)
    with locked(command.folder) as lock:
        evaluation = evaluation_for(command, description)
        begin(command, lock)
        runs = train(command, lock)
        return measure(command, evaluation, runs)


def measure(command: Command, evaluation: evaluate.Command, runs: Sequence[Run]) -> report.Comparison:
    """Measure the runs, and write everything."""
    show("measures", evaluation.words)
    try:
        found, states, real = evaluate.evaluated(evaluation)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "memory ran out while drawing or measuring; the runs are done and kept: run the same command again with a "
            f"smaller --batch_size than {evaluation.request.batch_size}, or with --dtype bfloat16"
        ) from error
    commands = {"The comparison": command.words}
    steps = {run.kind: run.max_steps for run in command.runs(LONGER)}
    for run in runs:
        if run.seed == command.seeds[0]:
            words = run.words(command.launcher, command.recipe, steps.get(run.kind))
            commands[f"Its run {run.label}"] = tuple(words)
    comparison = report.Comparison(
        runs,
        measures_of(found, runs, evaluation.request.metrics[0]),
        settings(command, found, runs[0]),
        {name: without_secrets(shlex.join(words)) for name, words in commands.items()},
        list(found["warnings"]),
    )
    report.write_comparison(comparison, report.draw(comparison, states, real), command.folder)
    return comparison


def settings(command: Command, evaluation: Mapping[str, Any], run: Run) -> dict[str, str]:
    """What all runs share, in words."""
    optimization, reference, facts = command.training.optimization, evaluation["reference"], run.facts
    result = evaluation["results"][0]
    sampling = ", ".join(f"{name} {result['drawn'][name]}" for name in SAMPLING if result["drawn"][name] is not None)
    found = {
        "Reference": f"{reference['images']} real images at {reference['preprocessing']['resolution']} px",
        "Images of each run": f"{result['images']}, the same prompts and seeds for all runs; {sampling}",
        "Features": ", ".join(short_names(evaluation).values()),
        "Images in a step": str(facts["global_batch"]),
    }
    if optimization.use_ema:
        found["EMA decay"] = f"{optimization.ema_decay} in all runs"
        if "ema_decay" not in command.training.given:
            found["EMA decay"] += f", the default with LPL (without LPL it would be {EMA_DECAY})"
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    return found | {"Hardware": facts["hardware"], "Libraries": libraries}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for library in ("httpx", "httpx2", "diffusers", "transformers"):  # they report each file and truncated caption
        logging.getLogger(library).setLevel(logging.ERROR)
    plain_warnings(PROGRAM)
    try:
        command = parsed(sys.argv[1:] if argv is None else argv)
        comparison = compare(command)
    except (OSError, ValueError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")
    for title, words in comparison.verdicts.items():
        print(f"\n{title}. {words}")
    for base in comparison.bases:
        print(f"\n{evaluate.aligned(report.table(comparison, base))}")
    for words in comparison.all_warnings:
        print(f"\nwarning: {words}")
    print(f"\nthe page with the picture is {command.folder / report.PAGE}")
