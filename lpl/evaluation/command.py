"""Measures how far generated images are from real ones, in numbers, spectra and pictures.

    python -m lpl.evaluate --generated with=run_with_lpl without=run_without --reference FOLDER --output_dir evaluated

A *source* behind ``--generated`` is a folder of images, a pipeline, or a training run's output folder, which stands
for the series of its checkpoints and its result (:mod:`lpl.evaluation.sources`). The *reference* is a folder of real
images, preferably ones that were not trained on. All models get the same prompts and seeds; both sides get the same
preprocessing. A *result* is what is measured of one *state*: a folder, a pipeline, or one checkpoint. Its *set
metrics* compare two sets of images, each through one feature network; CLIPScore compares images with their captions.

Files in the output folder: ``evaluation.json``, all numbers and how they were computed; ``evaluation.md``, its table;
``spectrum.png`` (Fig. 5, 6); ``samples.png`` (the same seeds in the same columns); ``crops.png`` (enlarged parts of
them); ``curves.png`` for a series; ``images/``, the drawn images. The same command keeps the images it finds, and
draws again those that are broken or whose model, sampling or prompts have changed.

Under ``accelerate launch -m lpl.evaluate ...`` each process draws and embeds a part. A Fréchet distance through a
network other than Inception is not called FID. A number compares to a published one only if reference, number of
images, resolution and preprocessing are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from lpl.config import groups
from lpl.config.checks import check_outside, warn_idle
from lpl.config.choices import CLIP, CLIP_SCORE, METRICS, NEIGHBOUR_METRICS, SET_METRICS
from lpl.config.command_line import add_flags, given_flags
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, add_group, built, flag, flags_of
from lpl.config.parser import Parser
from lpl.data.folder import image_files, why_no_images
from lpl.data.reading import FORMATS
from lpl.data.texts import read_text
from lpl.evaluation import MOST_BY_DEFAULT, NEAREST_K, check_libraries
from lpl.evaluation.generation import generate, image_path, prompt_text
from lpl.evaluation.images import UNREADABLE, ImageSet, Preprocessing, folder_images
from lpl.evaluation.metrics import check_bootstrap, check_counts
from lpl.evaluation.networks import check_networks, load_networks, wanted_networks
from lpl.evaluation.processes import processes
from lpl.evaluation.report import aligned, on_card, summary, table, write_evaluation
from lpl.evaluation.results import REAL, Reference, Settings, State, class_labels, measure, prompts_of, shown_states
from lpl.evaluation.sources import find_models, is_model, is_run
from lpl.families.description import Description
from lpl.publishing.card_edits import add_results
from lpl.tools.files import check_writable
from lpl.tools.layout import CARD, EVALUATION_IMAGES
from lpl.tools.machine import DTYPES, usable_device
from lpl.tools.process import settle_group
from lpl.tools.words import plain_warnings, why_no_folder


logger = logging.getLogger(__name__)
PROGRAM = "python -m lpl.evaluate"
SHARED_FLAGS = (  # those of the training script
    *("revision", "variant", "cache_dir", "max_sequence_length", "caption_column", "image_interpolation_mode"),
    "verbose",
)


# The command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is measured; names as in the training script, or in the pipelines' calls."""

    generated: tuple[str, ...] = flag(
        MISSING,
        "folders of images, pipelines (folder or id on the Hub), or training runs; LABEL=SOURCE names one",
        path=True,
    )
    reference: str = flag(MISSING, "folder of real images, with their captions in a metadata.jsonl if any", path=True)
    output_dir: str = flag(MISSING, "where the numbers, the pictures and the drawn images go", path=True)
    metrics: tuple[str, ...] = flag(SET_METRICS, "what to compute; clip_score needs captions", choices=METRICS)
    features: tuple[str, ...] = flag(
        ("facebook/dinov2-base",),
        "feature networks: a folder or an id on the Hub for transformers, inception, or PACKAGE.MODULE:FUNCTION that "
        "returns, without arguments, a module from uint8 (B, 3, H, W) to (B, D); each gives the set metrics",
        path=True,
    )
    clip: str | None = flag(None, f"network of clip_score; default: {CLIP}", path=True)
    num_images: int | None = flag(
        None,
        f"images of each source; default: as many as the reference has, at most {MOST_BY_DEFAULT}; of a folder all",
        range=POSITIVE,
    )
    resolution: int | None = flag(
        None,
        "side in pixels that images are drawn and compared at; default: the run's, of folders the first image's",
        range=POSITIVE,
    )
    batch_size: int = flag(8, "images that are drawn and embedded at a time", range=POSITIVE)
    num_inference_steps: int | None = flag(
        None, "sampling steps; default: the run's, else the pipeline's", range=POSITIVE
    )
    guidance_scale: float | None = flag(
        None, "guidance of the sampling; default: the run's, else the pipeline's", range=NOT_NEGATIVE
    )
    prompts_file: str | None = flag(
        None, "prompts, one a line, taken in turn; default: the reference's captions, shuffled", path=True
    )
    pretrained_model_name_or_path: str | None = flag(
        None, "where a run's base pipeline is now, if not where its recipe says", path=True
    )
    seed: int = flag(
        0,
        "of the first image; each further one has the next. It also decides how captions are shuffled, what the "
        "kernel distance's subsets are, the resamples, and the reference's halves",
        range=NOT_NEGATIVE,
    )
    bootstrap: int = flag(0, "resamples of the images, for the spread of each number; 0: none")
    nearest_k: int = flag(NEAREST_K, "neighbours for precision, recall, density and coverage", range=POSITIVE)
    update_card: bool = flag(False, "put the numbers into the model card of each training run's folder")
    device: str | None = flag(None, "e.g. cpu or cuda:1; default: a GPU if there is one")
    dtype: str = flag("float32", "precision of the drawing, but for the VAE", choices=tuple(DTYPES))


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Args:
        model, data: groups of the training script, of which this program has the SHARED_FLAGS.
        given: the flags on the command line.
        words: the command itself.
    """

    request: Request
    model: groups.Model
    data: groups.Data
    given: frozenset[str]
    words: tuple[str, ...]

    @property
    def settings(self) -> Settings:
        """What is measured, and how."""
        request = self.request
        return Settings(
            reference=request.reference,
            metrics=request.metrics,
            features=request.features,
            clip=request.clip or CLIP,
            batch_size=request.batch_size,
            cache_dir=self.model.cache_dir,
            bootstrap=request.bootstrap,
            seed=request.seed,
            nearest_k=request.nearest_k,
            prompts_file=request.prompts_file,
            words=self.words,
        )

    @property
    def networks(self) -> dict[str, tuple[str, bool]]:
        """The networks that the metrics need, as :func:`wanted_networks` gives them."""
        settings = self.settings
        return wanted_networks(settings.metrics, settings.features, settings.clip)

    def folder_images(self, folder: str, preprocessing: Preprocessing) -> ImageSet:
        return folder_images(folder, preprocessing, self.data.caption_column)


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s --generated [LABEL=]SOURCE ... --reference FOLDER --output_dir FOLDER [flags]",
        description="Measure how far generated images are from real ones.",
    )
    add_group(parser, Request)
    add_flags(parser, SHARED_FLAGS)
    return parser


def parse(words: Sequence[str]) -> Command:
    """Reads the command line; ends the process if it cannot be parsed."""
    values = vars(build_parser().parse_args(words))
    shared = {name: values[name] for name in (*SHARED_FLAGS, "pretrained_model_name_or_path")}
    return Command(
        built(Request, values),
        built(groups.Model, shared),
        built(groups.Data, shared),
        frozenset(given_flags(build_parser(), words)),
        (*PROGRAM.split(), *words),
    )


def check_command(command: Command) -> None:
    """Refuse what the command line alone shows to be wrong, and networks that cannot be loaded.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    request = command.request
    check_libraries(PROGRAM)
    for group in (request, command.model):
        for name, declared in flags_of(type(group)).items():
            declared.check(name, getattr(group, name))
    check_bootstrap(request.bootstrap)
    if Path(request.output_dir).is_file():
        raise ValueError(f"--output_dir {request.output_dir}: this is a file; give a folder")
    check_writable(f"--output_dir {request.output_dir}", request.output_dir, [EVALUATION_IMAGES])
    if why := why_no_images(request.reference):
        raise ValueError(f"--reference {request.reference}: {why}")
    if request.prompts_file is not None and not Path(request.prompts_file).is_file():
        what = "this is a folder; give a file" if Path(request.prompts_file).is_dir() else "there is no such file"
        raise ValueError(f"--prompts_file {request.prompts_file}: {what}")
    read_prompts(request)
    if request.clip is not None and CLIP_SCORE not in request.metrics:
        raise ValueError(f"--clip {request.clip} is for clip_score, which --metrics does not name; leave one out")
    check_outside("--output_dir", request.output_dir, "--reference", request.reference)
    sources = labelled_sources(request.generated)
    for _, source in sources:
        if not is_model(source):
            check_outside("--output_dir", request.output_dir, "--generated", source)
    labels = [label for label, _ in sources]
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise ValueError(f"--generated: two sources are called {repeated}; name them, LABEL=SOURCE")
    if REAL in labels:
        raise ValueError(f"--generated {REAL}=...: that is the reference's name; give another label")
    check_networks(command.networks, command.model.cache_dir)


def check_device(device: str | None, dtype: str) -> None:
    """
    Raises:
        ValueError: for a device that cannot be used, or that cannot compute in this type.
    """
    if usable_device(device).type == "cpu" and dtype == "float16":
        raise ValueError("--dtype float16 needs a GPU; use bfloat16 or float32")


def read_prompts(request: Request) -> list[str]:
    """The lines of --prompts_file; empty without it.

    Raises:
        ValueError: if the file cannot be read as UTF-8, or has none.
    """
    if request.prompts_file is None:
        return []
    try:
        lines = read_text(request.prompts_file).splitlines()
    except ValueError as error:
        raise ValueError(f"--prompts_file {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts_file {request.prompts_file}: the file has no prompts")
    return prompts


def labelled_sources(words: Sequence[str]) -> list[tuple[str, str]]:
    """(label, source) of each word of --generated; the label defaults to the folder's or the repository's name.

    >>> labelled_sources(["before=stabilityai/sd", "runs/lpl/"])
    [('before', 'stabilityai/sd'), ('lpl', 'runs/lpl/')]
    """
    found = []
    for word in words:
        label, equals, source = word.partition("=")
        if not equals or Path(word).exists():
            label, source = Path(word).resolve().name, word
        source = os.path.expanduser(source)
        if not label or not source:
            raise ValueError(f"--generated {word}: it must be a source, or LABEL=SOURCE")
        found.append((label, source))
    return found


# Sources -------------------------------------------------------------------------------------------------------------


def find_states(command: Command) -> list[State]:
    """All states of the sources, models with their sampling settings.

    Raises:
        ValueError: for a word that names no source.
    """
    request, model = command.request, command.model
    names = ("pretrained_model_name_or_path", "revision", "variant", "cache_dir", "max_sequence_length")
    flags = {name: getattr(model, name) for name in names}
    sampling = (request.resolution, request.num_inference_steps, request.guidance_scale)
    states = []
    for label, source in labelled_sources(request.generated):
        if is_model(source):
            found = (model.sampled(*sampling) for model in find_models(source, label, **flags))
            states += [State(label, source, model.step, model=model) for model in found]
        elif not image_files(source):
            why = why_no_folder(source) or "this folder is no pipeline, no training run, and has no images"
            raise ValueError(f"--generated {source}: {why}")
        else:
            states.append(State(label, source))
    return states


def common_resolution(request: Request, states: Sequence[State]) -> int:
    """The side of all images in pixels: --resolution, or that of the models, or of the first image.

    Raises:
        ValueError: if the models differ, or if the first image cannot be read.
    """
    sides = {state.model.config.data.size[0] for state in states if state.model}
    if len(sides) > 1:
        raise ValueError(f"--resolution: the models draw at {', '.join(map(str, sorted(sides)))} pixels; give one")
    if request.resolution is not None:
        return request.resolution
    if sides:
        return sides.pop()
    first = sorted(image_files(states[0].source))[0]
    try:
        with Image.open(first, formats=FORMATS) as image:
            return min(image.size)
    except UNREADABLE as error:
        raise ValueError(f"--resolution is not given, and {first} cannot be read for it; give it") from error


def warn_of_idle(command: Command, states: Sequence[State]) -> None:
    """Warn of flags that are given and have no effect."""
    request = command.request
    models = [state.model for state in states if state.model is not None]
    drawn, pipelines = bool(models), any(model.step is None for model in models)
    bases = [model.config.model.pretrained_model_name_or_path for model in models if model.step is not None]
    of_drawing = ("num_inference_steps", "guidance_scale", "dtype", "prompts_file", "max_sequence_length")
    of_sets = any(name in SET_METRICS for name in request.metrics)
    used = {
        **dict.fromkeys(of_drawing, drawn),
        "revision": pipelines,
        "variant": pipelines,
        "pretrained_model_name_or_path": request.pretrained_model_name_or_path in bases,
        "features": of_sets,
        "nearest_k": any(name in NEIGHBOUR_METRICS for name in request.metrics),
        "seed": drawn or request.bootstrap or of_sets,
    }
    for name in used:
        if name in command.given and not used[name]:
            warn_idle(name)


def check_sizes(states: Sequence[State], request: Request, reference: int) -> None:
    """Refuse sets that are too small for the metrics; images that are not read yet count as readable."""
    wanted = [name for name in request.metrics if name in SET_METRICS]
    for state in states if wanted else ():
        there = len(image_files(state.source) if state.images is None else state.images)
        count = number_drawn(request, reference) if state.model else min(request.num_images or there, there)
        check_counts(wanted, count, reference, request.nearest_k)


def number_drawn(request: Request, reference: int) -> int:
    """How many images each model draws."""
    return request.num_images or min(reference, MOST_BY_DEFAULT)


def cards(request: Request) -> list[tuple[str, Path]]:
    """Label and model card of the sources that --update_card applies to: training runs."""
    found = [(label, Path(source, CARD)) for label, source in labelled_sources(request.generated) if is_run(source)]
    return [(label, card) for label, card in found if card.is_file()] if request.update_card else []


# Their images --------------------------------------------------------------------------------------------------------


def prompts_for(description: Description, request: Request, reference: ImageSet) -> list[str] | list[int]:
    """The prompts that a model takes in turn: those of --prompts_file in their order, else the reference's.

    Raises:
        ValueError: if there are none, or if they are no classes of a class-conditional model.
    """
    family, names = description.family, description.class_names({})
    if pool := read_prompts(request):
        where = f"--prompts_file {request.prompts_file}"
        return class_labels(family, pool, names, where) if family.class_conditional else pool
    try:
        return prompts_of(reference, request.reference, family, names, "--reference", request.seed)
    except ValueError as error:
        raise ValueError(f"{error}; or give --prompts_file") from error


def draw_state(state: State, request: Request, device: torch.device, reference: ImageSet) -> None:
    """Draw the images of a model, into a folder whose name changes with everything that decides them."""
    model = state.model
    assert model is not None
    names, pool = model.class_names(), prompts_for(model.description, request, reference)
    count = number_drawn(request, len(reference))
    prompts = [pool[number % len(pool)] for number in range(count)]
    state.drawn = model.settings(request.dtype)
    key = hashlib.sha256(json.dumps([state.drawn, pool, request.seed]).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", f"{model.name}-{key}")
    folder = Path(request.output_dir, EVALUATION_IMAGES, name)
    seeds = [request.seed + number for number in range(count)]
    generate(model, prompts, seeds, folder, batch_size=request.batch_size, device=device, dtype=request.dtype)
    files = [image_path(folder, number) for number in range(count)]
    captions = [prompt_text(prompt, names) for prompt in prompts]
    state.images = ImageSet(state.name, files, reference.preprocessing, captions)


def read_state(state: State, command: Command, preprocessing: Preprocessing) -> None:
    """Read the images of a folder, at most --num_images of them, evenly spread."""
    wanted = command.request.num_images
    images = command.folder_images(state.source, preprocessing)
    count = min(wanted or len(images), len(images))
    if wanted and count < wanted:
        logger.warning("--num_images %d: %s has only %d images", wanted, state.source, count)
    state.images = images.select(number * len(images) // count for number in range(count))
    state.images.name = state.label
    if CLIP_SCORE in command.request.metrics and state.images.captions is None:
        raise ValueError(
            f"--generated {state.source}: clip_score compares images with their captions, and there is no "
            f"metadata.jsonl with {command.data.caption_column!r}; leave clip_score out"
        )


# The whole -----------------------------------------------------------------------------------------------------------


def run(command: Command) -> dict[str, Any]:
    """Draw, measure, and write everything; returns the content of evaluation.json, empty except on the main process.

    Raises:
        ValueError: for flags that do not fit, before anything is loaded.
    """
    return evaluated(command)[0]


def evaluated(command: Command) -> tuple[dict[str, Any], list[State], ImageSet]:
    """The same, the states with their images, and the real images."""
    request = command.request
    check_device(request.device, request.dtype)
    check_command(command)
    states = find_states(command)
    preprocessing = Preprocessing(common_resolution(request, states), command.data.image_interpolation_mode)
    warn_of_idle(command, states)
    check_sizes(states, request, len(image_files(request.reference)))
    if request.update_card and not cards(request):
        raise ValueError(f"--update_card: none of the sources is a training run's folder with its {CARD}")
    workers = processes(cpu=request.device == "cpu")
    device = torch.device(request.device) if request.device else cast(torch.device, workers.device)
    if not workers.is_main_process:
        logging.getLogger("lpl").setLevel(logging.ERROR)  # the main process warns for all
    real = command.folder_images(request.reference, preprocessing)
    for state in states:
        if state.model is None:
            read_state(state, command, preprocessing)
        else:
            prompts_for(state.model.description, request, real)
    check_sizes(states, request, len(real))
    networks = load_networks(command.networks, real[0], device, command.model.cache_dir)
    reference = Reference(real, networks, command.settings)
    for state in states:
        if state.model is not None:
            draw_state(state, request, device, real)
    results = measure(states, reference)
    evaluation = write(request, results, states, reference) if workers.is_main_process else {}
    workers.wait_for_everyone()
    return evaluation, states, real


def write(
    request: Request, results: Sequence[Mapping[str, Any]], states: Sequence[State], reference: Reference
) -> dict[str, Any]:
    """Write the evaluation and update the model cards; returns the evaluation."""
    shown = shown_states(states)
    evaluation = summary(results, shown, reference)
    write_evaluation(evaluation, shown, reference.images, request.output_dir)
    for label, card in cards(request):
        add_results(card, *on_card(evaluation, label))
        print(f"{card} now has these results")
    return evaluation


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    command = parse(sys.argv[1:] if argv is None else argv)
    plain_warnings(PROGRAM)
    for library in ("httpx", "httpx2", "diffusers", "transformers"):  # they report each file and truncated caption
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        evaluation = run(command)
    except (OSError, ValueError) as error:  # OSError: something cannot be read or written
        build_parser().error(str(error))
    finish()
    if evaluation:
        print(aligned(table(evaluation)))
        for words in evaluation["warnings"]:
            print(f"warning: {words}")
        print(f"numbers, pictures, and explanations of the warnings are in {command.request.output_dir}")


def finish() -> None:
    """Close the process group."""
    workers = processes()
    settle_group(workers.num_processes)
    if workers.num_processes > 1:
        workers.destroy_process_group()
