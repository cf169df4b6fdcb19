"""Makes a student of a VAE's decoder, for --lpl_student of the training script.

    python -m lpl.distill --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES --output_dir student
    python -m lpl.distill --config recipe.yaml --train_data_dir IMAGES --output_dir student

The second one takes the model, the loss, the resolution and the precision from a recipe of the training script. With a
pipeline, the student learns from the denoiser's own estimates of the images' latents, at noise levels inside LPL's
threshold; with a VAE alone, or ``--pairs_from errors``, from latents with errors of several kinds and sizes. It
reproduces the loss as the ``--lpl_*`` flags configure it. Every 8th image is held out to measure it.

Files in the output folder: the student (``config.json`` and its weights), its card with ``fidelity.png``, and
``distill.json``, all numbers; ``pairs/`` and ``fit.*``, from which the same command continues where it was stopped.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin

from lpl.autoencoders import downscaling_factor, latent_channels
from lpl.config import Config
from lpl.config.checks import check_outside
from lpl.config.command_line import add_flags, changed_by, config_of, given_flags, read_shared
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, Range, add_group, built, flag, flags_of
from lpl.config.groups import Output
from lpl.config.parser import Parser
from lpl.data.dataset import LatentSpace, TrainingImages
from lpl.data.source import load_images, load_split
from lpl.distillation.fit import Schedule, fit, measure
from lpl.distillation.pairs import HELD_OUT, Errors, Predictions, prepare
from lpl.distillation.report import PICTURE, cost, write_report
from lpl.families.derived import with_derived
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.features import DecoderFeatureExtractor
from lpl.gate import sigma_threshold_at
from lpl.inspection.command import image_size
from lpl.inspection.vae import check_vae, find_vae, load_vae, with_configuration
from lpl.objectives import Objective, get_objective
from lpl.publishing import hub
from lpl.publishing.publication import take
from lpl.publishing.uploads import upload
from lpl.student import GROUPS, Student, probe
from lpl.tools.files import check_writable, settle, write_text
from lpl.tools.machine import usable_device
from lpl.tools.privacy import shown
from lpl.tools.words import plain_warnings
from lpl.training.loading import load_family, weight_dtype
from lpl.training.losses import perceptual_loss
from lpl.training.parts import TrainedParts


PROGRAM = "python -m lpl.distill"
SHARED_FLAGS = (  # with the training script
    *("config", "revision", "variant", "cache_dir", "prediction_type", "max_sequence_length", "guidance_scale"),
    *("train_data_dir", "dataset_name", "dataset_config_name", "train_split", "image_column", "caption_column"),
    *("resolution", "center_crop", "random_flip", "max_train_samples", "image_interpolation_mode"),
    *("lpl_blocks", "lpl_normalization", "lpl_detach_statistics", "lpl_depth_weighting", "lpl_no_outlier_mask"),
    *("lpl_outlier_quantile", "lpl_outlier_margin", "lpl_outlier_dilation", "lpl_outlier_erosion"),
    *("lpl_outlier_stride", "lpl_distance", "lpl_variant", "lpl_vae_dtype", "lpl_sigma_threshold"),
    *("lpl_threshold_base_resolution", "lpl_gradient_checkpointing", "mixed_precision"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "verbose"),
)
NUMBERS, PAIRS, SETTINGS = "distill.json", "pairs", "settings.json"
WIDTHS = Range(lambda value: value > 0 and value % GROUPS == 0, f"a multiple of {GROUPS}")
PUBLISHED = ("config.json", "diffusion_pytorch_model.safetensors", "README.md", PICTURE, NUMBERS)
OF_THIS_RUN = (  # they change no pair
    *("config", "push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "verbose", "cache_dir"),
    "lpl_gradient_checkpointing",
)
FROM_RECIPE = {*SHARED_FLAGS, "pretrained_model_name_or_path"} - {*OF_THIS_RUN} | {"lpl_gradient_checkpointing"}
SOURCES = ("predictions", "errors")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The command's own flags; names as in the training script."""

    pretrained_model_name_or_path: str | None = flag(
        None, "a pipeline or a VAE: a folder or an id on the Hub", path=True
    )
    output_dir: str = flag(MISSING, "where the student, its card and its numbers go", path=True)
    pairs_from: str | None = flag(
        None,
        "what the student learns from: the denoiser's predictions, or errors that are made; default: predictions of a "
        "pipeline, errors for a VAE alone",
        choices=SOURCES,
    )
    num_pairs: int = flag(3000, "pairs of latents and estimates", range=POSITIVE)
    steps: int = flag(700, "optimizer steps of the student", range=POSITIVE)
    batch_size: int = flag(32, "pairs in a step", range=POSITIVE)
    decode_batch_size: int = flag(8, "pairs whose estimates and LPL are computed at a time", range=POSITIVE)
    learning_rate: float = flag(2e-3, "of the student, at its highest", range=POSITIVE)
    width: int | None = flag(
        None,
        "channels of the student's blocks; default: half of the decoder's widest block, at least 96",
        range=WIDTHS,
    )
    depth: int = flag(4, "residual blocks of the student", range=POSITIVE)
    measure_steps: int = flag(
        100, "steps between two measurements, from which a stopped command continues", range=POSITIVE
    )
    device: str | None = flag(None, "e.g. cpu or cuda:1; default: a GPU if there is one")
    seed: int = flag(0, "of the pairs and the student", range=NOT_NEGATIVE)


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s (--pretrained_model_name_or_path PIPELINE | --config RECIPE) --train_data_dir IMAGES "
        "--output_dir FOLDER [flags]",
        description="Make a student of a VAE's decoder, which stands in for the latent perceptual loss.",
    )
    add_group(parser, Distillation)
    add_flags(parser, SHARED_FLAGS)
    return parser


def parsed(words: Sequence[str]) -> tuple[Distillation, Config]:
    """The command's own flags, and the shared ones as a configuration of the training script.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    parser, own = build_parser(), flags_of(Distillation)
    values, given = vars(parser.parse_args(words)), given_flags(build_parser(), words)
    if values["config"] is not None:
        said = read_shared(FROM_RECIPE, values, given)
        given |= changed_by(said, parser)
        parser.set_defaults(**said)
        values = vars(parser.parse_args(words))
    given -= own.keys()
    for name, declared in own.items():
        declared.check(name, values[name])
    if values["pretrained_model_name_or_path"] is None:
        raise ValueError("--pretrained_model_name_or_path is missing: a pipeline or a VAE; or --config with a recipe")
    shared = {name: value for name, value in values.items() if name in SHARED_FLAGS}
    both = {name: values[name] for name in ("pretrained_model_name_or_path", "output_dir", "seed")}
    config = config_of(shared | both | {"report_to": "none"}, given)
    if not config.data.train_data_dir and not config.data.dataset_name:
        raise ValueError("--train_data_dir or --dataset_name is missing: the images that the student learns from")
    if "," in str(config.data.resolution):
        raise ValueError(
            f"--resolution {config.data.resolution}: a student is made for one size; give the one that most images "
            "are trained at"
        )
    if config.data.train_data_dir:
        check_outside("--output_dir", config.output.output_dir, "--train_data_dir", config.data.train_data_dir)
    check_writable(f"--output_dir {config.output.output_dir}", config.output.output_dir)
    return built(Distillation, values), config


# What the student learns from ----------------------------------------------------------------------------------------


def pipeline_source(config: Config, device: torch.device) -> tuple[Predictions, Config]:
    """The denoiser's own estimates, and the complete configuration.

    Raises:
        ValueError: where pipeline, data and flags do not fit one another.
    """
    config = with_derived(config)
    description = read_pipeline(config.model, config.lpl.lpl_blocks)
    config = resolve(config, description)
    data = config.data
    dataset = load_split(data, data.train_split, config.model.cache_dir, description.num_classes)
    objective, space = description.objective(config.model.objective), LatentSpace(*description.space)
    images = _images(config, dataset, objective, space, description.empty_caption)
    dtype = weight_dtype(config.optimization.mixed_precision)
    frozen = replace(config.lora, lora=True)  # as the denoiser of a LoRA: it is not trained
    family = load_family(config.model, frozen, description, dtype)
    for part in (family.vae, family.denoiser, *family.text_encoders):
        cast(Any, part).to(device)
    model = TrainedParts(family, config.lora).requires_grad_(False).eval()
    lpl = config.lpl
    tau = sigma_threshold_at(lpl.lpl_sigma_threshold, *data.size, lpl.lpl_threshold_base_resolution)
    return Predictions(images, model, tau, dtype), config


def vae_source(config: Config, device: torch.device) -> tuple[Errors, Config]:
    """Errors that are made, on images that need no captions, and the complete configuration.

    Raises:
        ValueError: where VAE, data and flags do not fit one another.
    """
    model = with_configuration(config.model)
    subfolder, vae_config = find_vae(model, config.lpl.lpl_blocks)
    check_vae(config.lpl, vae_config)
    side = config.data.size[0] if config.data.resolution else None
    config = config.changed(resolution=image_size(side, vae_config)[0])
    data = config.data
    dataset = load_images(data, data.train_split, config.model.cache_dir)
    dataset = dataset.add_column(data.caption_column, [0] * len(dataset))
    objective = get_objective("flow_matching", FlowMatchEulerDiscreteScheduler())  # whose noise is not used
    space = LatentSpace(latent_channels(vae_config), downscaling_factor(vae_config))
    images = _images(config, dataset, objective, space, empty_caption=0)
    return Errors(images, load_vae(model, subfolder, vae_config, device)), config


def _images(
    config: Config, dataset: Any, objective: Objective, space: LatentSpace, empty_caption: str | int
) -> TrainingImages:
    assert isinstance(dataset, Dataset), "nothing is streamed"
    data, seed = config.data, config.optimization.seed or 0
    if data.max_train_samples is not None:
        dataset = dataset.shuffle(seed=seed).select(range(min(data.max_train_samples, len(dataset))))
    if len(dataset) < HELD_OUT:
        raise ValueError(
            f"{len(dataset)} images, but {HELD_OUT} or more are needed, since every {HELD_OUT}th is held out; give "
            "more by --train_data_dir or --dataset_name, or a larger --max_train_samples"
        )
    images = TrainingImages(
        dataset, objective, space, data, config.diffusion, seed, empty_caption, config.model.cache_dir
    )
    images.check()
    return images


def source_of(own: Distillation, config: Config, device: torch.device) -> tuple[Predictions | Errors, Config]:
    """What makes the estimates, and the complete configuration.

    Raises:
        ValueError: where pipeline, VAE, data and flags do not fit one another.
    """
    if config.optimization.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; give bf16 or no")
    subfolder, _ = find_vae(with_configuration(config.model), config.lpl.lpl_blocks)
    kind = own.pairs_from or ("errors" if subfolder is None else "predictions")
    if kind == "errors":
        return vae_source(config, device)
    return pipeline_source(config, device)


# The command ---------------------------------------------------------------------------------------------------------


def run(own: Distillation, config: Config) -> dict[str, Any]:
    """Make the pairs, train the student, measure it, and write all of it; returns the numbers.

    Raises:
        ValueError: if flags, model and images do not fit one another, or the folder holds pairs of other ones.
    """
    device, folder = usable_device(own.device), Path(own.output_dir)
    source, config = source_of(own, config, device)
    precision = config.lpl.decoder_dtype(config.optimization.mixed_precision or "no")
    loss = perceptual_loss(source.vae, replace(config.lpl, lpl_vae_dtype=precision), config.model.cache_dir)
    facts = {
        "model": shown(config.model.source),
        "data": shown(config.data.dataset_name or config.data.folder),
        "images": len(source.images),
        "resolution": config.data.size[0],
        "pairs": own.num_pairs,
        "pairs_from": "errors" if isinstance(source, Errors) else "predictions",
        "seed": own.seed,
        "loss": loss.options,
    }
    values = config.values()
    asked = {name: values[name] for name in SHARED_FLAGS if name not in OF_THIS_RUN}
    made = {"model": config.model.source, "decoder": probe(source.vae), "loss": loss.options}
    made |= {"images": len(source.images), "pairs": own.num_pairs, "pairs_from": facts["pairs_from"], "seed": own.seed}
    check_settings(folder, json.loads(json.dumps(asked | made)))
    pairs = prepare(folder / PAIRS, source, loss, own.num_pairs, own.decode_batch_size).usable()
    train, held_out = pairs.split()
    torch.manual_seed(own.seed)
    width = own.width or default_width(source.vae)
    student = Student(
        latent_channels(source.vae.config),
        width,
        own.depth,
        loss=loss.options,
        decoder=probe(source.vae),
        resolution=config.data.size[0],
    )
    schedule = Schedule(own.steps, own.batch_size, own.learning_rate, own.seed, own.measure_steps, width, own.depth)
    fit(student, train, held_out, schedule, folder, device)
    found = measure(student, held_out, own.batch_size, device)
    numbers = facts | {"steps": own.steps, "width": width, "depth": own.depth} | found.summary()
    numbers |= {"held_out": len(held_out), "cost": cost(student, loss, held_out, device)}
    student.register_to_config(fidelity=found.summary())
    student.save_pretrained(folder)
    settle(folder)
    write_text(folder / NUMBERS, json.dumps(numbers, indent=2) + "\n")
    write_report(folder, numbers, found, held_out)
    return numbers


@torch.no_grad()
def default_width(vae: ModelMixin) -> int:
    """Half of the channels of the decoder's widest block, at least 96."""
    latents = torch.zeros(1, latent_channels(vae.config), 8, 8, device=vae.device)
    widest = max(maps.shape[1] for maps in DecoderFeatureExtractor(vae)(latents).values())
    return max(96, widest // 2 // GROUPS * GROUPS)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds pairs of other settings; write these.

    Raises:
        ValueError: with the setting that differs.
    """
    place = folder / PAIRS / SETTINGS
    if place.is_file():
        earlier = json.loads(place.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if earlier.get(name) != value:
                too_long = name in ("decoder", "loss")
                change = f"another {name}" if too_long else f"{name} {earlier.get(name)}, and now it is {value}"
                raise ValueError(
                    f"--output_dir {folder}: it holds pairs that were made with {change}; give another folder, or "
                    f"delete this one's {PAIRS}"
                )
    write_text(place, json.dumps(settings, indent=2) + "\n")


def push(output: Output, repository: str, numbers: Mapping[str, Any]) -> str:
    """Publish the student in one commit; returns the page's address.

    Raises:
        hub.HubError: with the reason.
    """

    def fill(snapshot: Path) -> None:
        for name in PUBLISHED:
            take(Path(output.output_dir, name), snapshot / name)

    return upload(output, repository, f"A student of LPL's decoder, cosine {numbers['cosine']:.3f}", fill)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)  # they log every caption that they truncate
    plain_warnings(PROGRAM)
    try:
        own, config = parsed(sys.argv[1:] if argv is None else argv)
        output = config.output
        repository = hub.prepare_repository(output) if output.push_to_hub else None  # before an hour's work
        numbers = run(own, config)
        print(
            f"the student's gradient has a cosine of {numbers['cosine']:.3f} with LPL's and a relative error of "
            f"{numbers['relative_error']:.3f} on held-out images; it, its card and its numbers are in {own.output_dir}"
        )
        if repository is not None:
            print(f"published at {push(output, repository, numbers)}")
    except (OSError, ValueError, hub.HubError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")


if __name__ == "__main__":
    main()
