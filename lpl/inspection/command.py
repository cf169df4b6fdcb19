"""Shows what the latent perceptual loss sees in a VAE and in your images, before you train with it.

    python -m lpl.inspect --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir inspected

It writes five pictures, and ``inspect.json`` with their numbers:

- ``features.png``: the decoder's feature maps, and what the masks remove from them (Fig. 3).
- ``outliers.png``: how much is masked, how extreme it is, and where; :func:`outlier_advice` suggests the flags.
- ``balance.png``: each block's term of Eq. 2 for estimates of a known error, and the depth weights that equalise the
  terms.
- ``errors.png``: what errors of one size in the latent, 20% of its standard deviation, do to the image: a random one,
  and those that the decoder hides and amplifies most, as far as a search finds them.
- ``interpolation.png``: latents that are downscaled and upscaled again, and the resulting error in the latent, in the
  image, and in LPL (Sec. 7, Fig. 12).

No denoiser is involved. Features are those of the images' own latents z0, at the posterior's mean. The estimate of z0
is z0 + r * std(z0) * noise with noise ~ N(0, I) and *relative errors* r from ERRORS. *Masked* positions are those that
an outlier mask excludes; a *map* is one channel of one image. Images are processed one by one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from lpl.autoencoders import RGB, downscaling_factor, feature_vae
from lpl.config.checks import check_outside, warn_idle
from lpl.config.command_line import add_flags
from lpl.config.flag import NOT_NEGATIVE, POSITIVE, Values, add_group, built, flag, flags_of
from lpl.config.groups import Lpl, Model
from lpl.config.parser import Parser
from lpl.config.rules import from_a_file
from lpl.data.folder import Contents, image_files
from lpl.data.reading import FORMATS, to_rgb
from lpl.inspection.advice import report, summary
from lpl.inspection.figures import (
    balance_figure,
    errors_figure,
    features_figure,
    interpolation_figure,
    outliers_figure,
)
from lpl.inspection.measure import OUTLIER_SETTINGS, STEPS, Inspector
from lpl.inspection.vae import check_vae, find_vae, load_vae, with_configuration
from lpl.tools.files import check_writable, write_text
from lpl.tools.machine import DTYPES, usable_device
from lpl.tools.pictures import save_figure
from lpl.tools.words import first_line, plain_warnings


SHARED_FLAGS = (  # with the training script
    *(
        "revision",
        "variant",
        "single_file_config",
        "denoiser_model_name_or_path",
        "cache_dir",
        "lpl_blocks",
        "lpl_normalization",
        "lpl_distance",
        "lpl_vae_dtype",
    ),
    "verbose",
    *(f"lpl_outlier_{name}" for name in OUTLIER_SETTINGS),
)
LARGEST_DEFAULT_RESOLUTION = 512
NUMBERS = "inspect.json"


# The command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The command's own flags; names as in the training script."""

    pretrained_model_name_or_path: str = flag(
        MISSING, "a pipeline or a VAE: a folder or an id on the Hub; or a single file", path=True
    )
    images: tuple[str, ...] = flag(MISSING, "image files, or folders of them", path=True)
    num_images: int = flag(4, "images at most, evenly spread over those given", range=POSITIVE)
    resolution: int | None = flag(
        None, "side of the square that is cropped from them in pixels; default: the VAE's", range=POSITIVE
    )
    output_dir: str = flag(MISSING, "where the pictures and inspect.json go", path=True)
    device: str | None = flag(None, "e.g. cpu or cuda:1; default: a GPU if there is one")
    seed: int = flag(0, "of the noise", range=NOT_NEGATIVE)


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m lpl.inspect",
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir FOLDER [flags]",
        description="Show what the latent perceptual loss sees in a VAE and in your images.",
    )
    add_group(parser, Inspection)
    add_flags(parser, SHARED_FLAGS)
    return parser


def groups_of(values: Values) -> tuple[Inspection, Model, Lpl]:
    """The groups of flags that the command takes, from parsed values.

    Raises:
        ValueError: if a number is out of range.
    """
    for group in (Inspection, Model, Lpl):
        for name, declared in flags_of(group).items():
            if name in values:
                declared.check(name, values[name])
    return built(Inspection, values), built(Model, values), built(Lpl, values)


def check_flags(inspection: Inspection, lpl: Lpl) -> torch.device:
    """Refuse flags that cannot be carried out on this machine, and return the device.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    if lpl.lpl_blocks == (RGB,):
        raise ValueError(f"--lpl_blocks {RGB}: pixels are no features; name decoder blocks")
    if Path(inspection.output_dir).is_file():
        raise ValueError(f"--output_dir {inspection.output_dir}: this is a file; give a folder")
    check_writable(f"--output_dir {inspection.output_dir}", inspection.output_dir)
    for folder in filter(os.path.isdir, inspection.images):
        check_outside("--output_dir", inspection.output_dir, "--images", folder)
    device = usable_device(inspection.device)
    if device.type == "cpu" and lpl.lpl_vae_dtype == "float16":
        raise ValueError("--lpl_vae_dtype float16 needs a GPU; use bfloat16 or float32")
    return device


# Images -----------------------------------------------------------------------------------------------------------


def find_images(given: Sequence[str], most: int) -> list[Path]:
    """The image files, sorted folder by folder, evenly thinned to at most ``most``.

    Raises:
        ValueError: if a path does not exist, or a folder has no images.
    """
    files: list[Path] = []
    for name in given:
        if not name:
            raise ValueError("--images: the path is empty; give a file or a folder")
        found = sorted(image_files(name)) if Path(name).is_dir() else [Path(name)] if Path(name).is_file() else []
        if not found:
            what = Contents.of(name).without_images() if Path(name).is_dir() else "there is no such file or folder"
            raise ValueError(f"--images {name}: {what}")
        files += found
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def read_image(file: Path, size: tuple[int, int]) -> Image.Image:
    """The largest centre crop, resized to ``size`` = (height, width).

    Raises:
        ValueError: if the file cannot be read as an image.
    """
    try:
        image = to_rgb(Image.open(file, formats=FORMATS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--images {file}: it cannot be read ({first_line(error)})") from error
    height, width = size
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def image_size(resolution: int | None, config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the inspected images; defaults to the VAE's own size, at most LARGEST_DEFAULT_RESOLUTION.

    Raises:
        ValueError: if the VAE does not accept the resolution.
    """
    factor = downscaling_factor(config)
    if resolution is None:
        own = config.get("sample_size")
        own = own if isinstance(own, int) else LARGEST_DEFAULT_RESOLUTION
        resolution = max(2, min(own, LARGEST_DEFAULT_RESOLUTION) // factor) * factor
    if resolution % factor or resolution < 2 * factor:
        below = max(2, resolution // factor) * factor
        raise ValueError(
            f"--resolution {resolution}: this VAE takes multiples of {factor} from {2 * factor} on, such as "
            f"{below} or {below + factor}"
        )
    return resolution, resolution


# The command ---------------------------------------------------------------------------------------------------------


def run(inspection: Inspection, model: Model, lpl: Lpl) -> dict[str, Any]:
    """Inspect the images, write the pictures and the numbers, and return the numbers.

    Raises:
        ValueError: if flags do not fit this machine, the VAE, or the images; before any weights are loaded.
    """
    device = check_flags(inspection, lpl)
    files = find_images(inspection.images, inspection.num_images)
    for name in ("denoiser_model_name_or_path", *(() if from_a_file(vars(model)) else ("single_file_config",))):
        if getattr(model, name) is not None:
            warn_idle(name)
    model = with_configuration(model)
    subfolder, config = find_vae(model, lpl.lpl_blocks)
    check_vae(lpl, config)
    size = image_size(inspection.resolution, config)
    images = [read_image(file, size) for file in files]
    vae = load_vae(model, subfolder, config, device)
    inspector = Inspector(vae, feature_vae(vae, None, DTYPES[lpl.decoder_dtype()]), lpl, inspection.seed)
    with tqdm(total=STEPS * len(images), desc="inspecting") as progress:
        for image in images:
            inspector.inspect(image, progress.update)
    path = inspection.pretrained_model_name_or_path
    numbers = {
        "vae": {"path": path, "class": type(vae).__name__, "dtype": lpl.decoder_dtype()},
        "images": [str(file) for file in files],
        "resolution": size[0],
        "seed": inspection.seed,
        "loss": {"normalization": lpl.lpl_normalization, "distance": lpl.lpl_distance},
    } | summary(inspector)
    write(Path(inspection.output_dir), inspector, images, [file.name for file in files], numbers)
    return numbers


def write(
    folder: Path,
    inspector: Inspector,
    images: Sequence[Image.Image],
    names: Sequence[str],
    numbers: Mapping[str, Any],
) -> None:
    """Write the pictures and ``inspect.json``."""
    for name, figure in (
        ("features", features_figure(inspector, images, names)),
        ("outliers", outliers_figure(inspector, numbers["outliers"])),
        ("balance", balance_figure(numbers["balance"])),
        ("errors", errors_figure(inspector, names)),
        ("interpolation", interpolation_figure(inspector, images[0], names[0], numbers["interpolation"])),
    ):
        save_figure(figure, folder / f"{name}.png")
    write_text(folder / NUMBERS, json.dumps(numbers, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = build_parser()
    values = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    plain_warnings(parser.prog)
    try:
        numbers = run(*groups_of(values))
    except (OSError, ValueError) as error:  # OSError: weights cannot be loaded, or pictures cannot be written
        parser.error(str(error))
    print(report(numbers))
    print(f"pictures and numbers are in {values['output_dir']}")


if __name__ == "__main__":
    main()
