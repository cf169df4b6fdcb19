"""Shows what the latent perceptual loss sees in a VAE and in your images, before you train with it.

    python -m lpl.inspect --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir inspected

Four pictures, and ``inspect.json`` with their numbers:

- ``features.png``: the decoder's feature maps, and what the masks leave out of them (Fig. 3).
- ``outliers.png``: how much is masked, how extreme it is, and where; :func:`outlier_advice` says what to set.
- ``balance.png``: each block's term of Eq. 2 for estimates that are off by so much, and the depth weights that would
  make the terms alike.
- ``interpolation.png``: latents made smaller and large again; what that costs in the latent, in the image, and in LPL
  (Sec. 7, Fig. 12).

There is no denoiser here. Features are those of the images' own latents, z0, at the posterior's mean, and in the place
of an estimate stands z0 + r * std(z0) * noise with noise ~ N(0, I) and *relative errors* r of ERRORS. *Masked* is what
an outlier mask leaves out; a *map* is one channel of one image. Images are taken one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from lpl.autoencoders import RGB, SUPPORTED, decoder_blocks, downscaling_factor, feature_vae, skeleton
from lpl.config import command_line as arguments
from lpl.config.checks import check_ranges
from lpl.data.reading import FORMATS, image_files, to_rgb
from lpl.families.description import check_autoencoder, check_vae_dtype
from lpl.inspection.advice import report, summary
from lpl.inspection.figures import balance_figure, features_figure, interpolation_figure, outliers_figure
from lpl.inspection.measure import OUTLIER_SETTINGS, STEPS, Inspector
from lpl.tools.files import write_text
from lpl.tools.machine import DTYPES
from lpl.tools.pictures import save_figure
from lpl.tools.trust import check_components, check_weights
from lpl.tools.words import first_line


SHARED_FLAGS = (  # those that are as in the training script
    *("revision", "variant", "cache_dir", "lpl_blocks", "lpl_normalization", "lpl_distance", "lpl_vae_dtype"),
    *(f"lpl_outlier_{name}" for name in OUTLIER_SETTINGS),
)
LARGEST_DEFAULT_RESOLUTION = 512


# The command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; names as in the training script."""
    parser = arguments.Parser(
        prog="python -m lpl.inspect",
        usage="%(prog)s --pretrained_model_name_or_path PIPELINE --images FOLDER --output_dir FOLDER [flags]",
        description="Show what the latent perceptual loss sees in a VAE and in your images.",
        allow_abbrev=False,
        formatter_class=arguments.HelpFormatter,
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="a pipeline or a VAE: a folder or an id on the Hub")
    add("--images", nargs="+", required=True, help="image files, or folders of them")
    add("--num_images", type=int, default=4, help="images at most, evenly spread over those given")
    add("--resolution", type=int, help="side of the square that is cropped from them in pixels; default: the VAE's")
    add("--output_dir", required=True, help="where the pictures and inspect.json go")
    add("--device", help="e.g. cpu or cuda:1; default: a GPU if there is one")
    add("--seed", type=int, default=0, help="of the noise")
    arguments.add_flags(parser, SHARED_FLAGS)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what the command line alone tells to be wrong, and fill in the device.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    check_ranges(vars(args))
    if args.num_images < 1:
        raise ValueError(f"--num_images {args.num_images}: it must be 1 or more")
    if args.lpl_blocks == [RGB]:
        raise ValueError(f"--lpl_blocks {RGB}: pixels are no features; name decoder blocks")
    if Path(args.output_dir).is_file():
        raise ValueError(f"--output_dir {args.output_dir}: this is a file; give a folder")
    gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {first_line(error)}") from error
    if kind == "cuda" and not gpu:
        raise ValueError(f"--device {args.device}: this machine has no GPU that PyTorch can use; give cpu")
    try:
        torch.zeros((), device=args.device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: PyTorch cannot compute on it here; give cpu") from error
    if kind == "cpu" and args.lpl_vae_dtype == "float16":
        raise ValueError("--lpl_vae_dtype float16 needs a GPU; use bfloat16 or float32")


def find_images(given: Sequence[str], most: int) -> list[Path]:
    """The files that are meant, sorted folder by folder, at most so many of them, evenly spread.

    Raises:
        ValueError: for a path that is neither, and a folder without images.
    """
    files: list[Path] = []
    for name in given:
        found = sorted(image_files(name)) if Path(name).is_dir() else [Path(name)] if Path(name).is_file() else []
        if not found:
            what = "the folder has no images" if Path(name).is_dir() else "there is no such file or folder"
            raise ValueError(f"--images {name}: {what}")
        files += found
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def find_vae(args: argparse.Namespace) -> tuple[str | None, Mapping[str, Any]]:
    """Where below the path the VAE is, and its configuration: a pipeline's component, or what stands there itself.

    Raises:
        ValueError: where there is none, or none that is supported.
    """
    path, where = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        index = DiffusionPipeline.load_config(path, **where)
    except (OSError, ValueError):
        places = [None, "vae"]
    else:
        check_components(path, index)
        components = {name: entry[-1] for name, entry in index.items() if isinstance(entry, list | tuple)}
        places = [name for name, kind in components.items() if kind in SUPPORTED] or ["vae"]
    for place in places:
        try:  # this class knows the file's name, for any class
            config = AutoencoderKL.load_config(path, subfolder=place, **where)
        except (OSError, ValueError) as error:
            problem = first_line(error)
            continue
        what = f"--pretrained_model_name_or_path {path}"
        check_autoencoder(f"{what}: its VAE", config, SUPPORTED, args.lpl_blocks)
        check_weights(what, path, [place or ""], args.revision)
        return place, config
    raise ValueError(
        f"--pretrained_model_name_or_path {path}: neither a pipeline nor a VAE is found there ({problem})"
    )


def check_vae(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Refuse what does not fit the VAE's configuration, and fill in the resolution.

    Raises:
        ValueError: with what was given, what is accepted, and the flag to change.
    """
    decoder_blocks(skeleton(config), args.lpl_blocks)
    check_vae_dtype(args.lpl_vae_dtype, config)
    factor = downscaling_factor(config)
    if args.resolution is None:
        own = config.get("sample_size")
        own = own if isinstance(own, int) else LARGEST_DEFAULT_RESOLUTION
        args.resolution = max(2, min(own, LARGEST_DEFAULT_RESOLUTION) // factor) * factor
    if args.resolution % factor or args.resolution < 2 * factor:
        below = max(2, args.resolution // factor) * factor
        raise ValueError(
            f"--resolution {args.resolution}: this VAE takes multiples of {factor}, "
            f"such as {below} or {below + factor}"
        )


def read_image(file: Path, resolution: int) -> Image.Image:
    """The largest square in the middle, at that side.

    Raises:
        ValueError: where the file is no image.
    """
    try:
        image = to_rgb(Image.open(file, formats=FORMATS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--images {file}: it cannot be read ({first_line(error)})") from error
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)


# All of it -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at the images through the VAE and write the pictures and the numbers, which are also returned.

    Raises:
        ValueError: for arguments that do not fit this machine, the VAE, or the images, before any weights are loaded.
    """
    check_arguments(args)
    files = find_images(args.images, args.num_images)
    place, config = find_vae(args)
    check_vae(args, config)
    images = [read_image(file, args.resolution) for file in files]
    options = {} if place is None else {"subfolder": place}
    vae = AutoModel.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=torch.float32,
        use_safetensors=True,
        **options,
    )
    vae = vae.requires_grad_(False).eval().to(args.device)
    inspector = Inspector(vae, feature_vae(vae, None, DTYPES[args.lpl_vae_dtype]), args)
    with tqdm(total=STEPS * len(images), desc="inspecting") as progress:
        for image in images:
            inspector.inspect(image, progress.update)
    numbers = {
        "vae": {"path": args.pretrained_model_name_or_path, "class": type(vae).__name__, "dtype": args.lpl_vae_dtype},
        "images": [str(file) for file in files],
        "resolution": args.resolution,
        "seed": args.seed,
        "loss": {"normalization": args.lpl_normalization, "distance": args.lpl_distance},
    } | summary(inspector)
    names = [file.name for file in files]
    folder = Path(args.output_dir)
    for name, figure in (
        ("features", features_figure(inspector, images, names)),
        ("outliers", outliers_figure(inspector, numbers["outliers"])),
        ("balance", balance_figure(numbers["balance"])),
        ("interpolation", interpolation_figure(inspector, images[0], names[0], numbers["interpolation"])),
    ):
        save_figure(figure, folder / f"{name}.png")
    text = json.dumps(numbers, indent=2)
    write_text(folder / "inspect.json", text + "\n")
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        numbers = run(args)
    except (OSError, ValueError) as error:  # the former where weights cannot be loaded, or pictures not written
        parser.error(str(error))
    print(report(numbers))
    print(f"pictures and numbers are in {args.output_dir}")


if __name__ == "__main__":
    main()
