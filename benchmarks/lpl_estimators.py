"""Bias and added variance of the cheaper ways of computing the loss, compared with the whole loss.

    python -m benchmarks.lpl_estimators

Sheets of four emoji, 192 px, through the quickstart's autoencoder; the estimate z0_hat is z0 plus Gaussian noise of
0.3 times its standard deviation. With g the gradient of the batch's mean LPL with respect to z0_hat and g' an
estimator's,

    bias = |E g' - g| / |g|          added variance = E |g' - E g'|^2 / |g|^2

over all possible draws of an estimator: every subset, every tile. Also counts how often strided quantiles change a
mask. The quickstart's student, which belongs to 96 px and the denoiser's own estimates, is compared on those, of
pictures that it was not trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from examples.quickstart.make_data import DATA, read_pictures
from lpl import DecoderFeatureExtractor, LatentPerceptualLoss, outlier_mask
from lpl.autoencoders import downscaling_factor, encode
from lpl.distillation import command as distill
from lpl.distillation.pairs import is_held_out
from lpl.student import load_student


QUICKSTART = DATA.parent
SHEETS = 4
CROPS = (96, 48)
PAIRS = 512  # of which the held-out ones show the student


def sheets() -> Tensor:
    """Pixels, (SHEETS, 3, 192, 192) in [-1, 1]."""
    pictures = read_pictures(DATA / "plain")[0]
    chosen = pictures[:: len(pictures) // (4 * SHEETS)][: 4 * SHEETS] / 127.5 - 1
    rows = chosen.unflatten(0, (SHEETS, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    return rows.flatten(4, 5).flatten(2, 3)


def gradient(value: Callable[[Tensor], Tensor], predicted: Tensor) -> Tensor:
    predicted = predicted.clone().requires_grad_()
    return torch.autograd.grad(value(predicted), predicted)[0]


def compare(estimates: list[Tensor], whole: Tensor) -> dict[str, float]:
    mean = torch.stack(estimates).mean(0)
    spread = sum((estimate - mean).square().sum() for estimate in estimates) / len(estimates)
    return {
        "bias": round(float((mean - whole).norm() / whole.norm()), 4),
        "added_variance": round(float(spread / whole.square().sum()), 3),
    }


@contextmanager
def tf32() -> Iterator[None]:
    """Emulates TF32 in convolutions: their inputs are rounded to 10 bits, and sums are float32."""

    def rounded(x: Tensor) -> Tensor:
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def convolution(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, *rest: run(rounded(x), rounded(weight), *rest)

    names = ("conv2d", "conv_transpose2d")
    with mock.patch.multiple(F, **{name: convolution(getattr(F, name)) for name in names}):
        yield


def measure(vae: AutoencoderKL) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    pixels = sheets()
    side = pixels.shape[-1] // downscaling_factor(vae.config)
    latents = encode(vae, pixels, torch.zeros(len(pixels), vae.config.latent_channels, side, side))
    predicted = latents + 0.3 * latents.std() * torch.randn_like(latents)
    loss = LatentPerceptualLoss(vae)
    whole = gradient(lambda z: loss(z, latents).mean(), predicted)
    batch = len(latents)

    def estimate(other: LatentPerceptualLoss, window: tuple[int, int, int, int] | None = None) -> Tensor:
        return gradient(lambda z: other(z, latents, window).mean(), predicted)

    results = {f"--lpl_every {n}": compare([n * whole, *[0 * whole] * (n - 1)], whole) for n in (2, 4)}
    for most in (1, 2):
        estimates = []
        for rows in itertools.combinations(range(batch), most):
            chosen = torch.zeros(batch, 1, 1, 1)
            chosen[list(rows)] = batch / most
            estimates.append(whole * chosen)
        results[f"--lpl_max_samples {most} of {batch}"] = compare(estimates, whole)
    for crop, margin in itertools.product(CROPS, (0, 4, 8, 16)):
        part = crop // downscaling_factor(vae.config)
        corners = itertools.product(range(0, side, part), repeat=2)
        with mock.patch("lpl.loss.MARGIN", margin):
            estimates = [estimate(loss, (*corner, part, part)) for corner in corners]
        results[f"--lpl_crop {crop}, margin {margin}"] = compare(estimates, whole)
    others = {
        "--lpl_outlier_stride 4": LatentPerceptualLoss(vae, outliers={"stride": 4}),
        "--lpl_no_outlier_mask": LatentPerceptualLoss(vae, mask_outliers=False),
        "--lpl_detach_statistics": LatentPerceptualLoss(vae, detach_statistics=True),
        "--lpl_blocks mid up_0 up_1 up_2": LatentPerceptualLoss(vae, blocks=("mid", "up_0", "up_1", "up_2")),
        "--lpl_blocks mid up_0 up_1": LatentPerceptualLoss(vae, blocks=("mid", "up_0", "up_1")),
        "--lpl_blocks mid up_0": LatentPerceptualLoss(vae, blocks=("mid", "up_0")),
        "--lpl_blocks mid": LatentPerceptualLoss(vae, blocks=("mid",)),
        "--lpl_vae_dtype bfloat16": LatentPerceptualLoss(deepcopy(vae).to(torch.bfloat16)),
    }
    results |= {name: compare([estimate(other)], whole) for name, other in others.items()}
    with tf32():
        results["TF32 in the decoder's convolutions"] = compare([estimate(loss)], whole)
    with torch.no_grad():
        features = DecoderFeatureExtractor(vae)(predicted)
    for name, maps in features.items():
        exact, strided = outlier_mask(maps), outlier_mask(maps, stride=4)
        results[f"masks of {name}"] = {
            "dropped": round(float((~exact).float().mean()), 5),
            "changed_by_stride_4": round(float((exact != strided).float().mean()), 5),
        }
    return results


def students() -> dict[str, dict[str, float]]:
    """The quickstart's student with and without corrections, on some of its held-out pictures."""
    with TemporaryDirectory() as folder:
        words = ["--pretrained_model_name_or_path", str(QUICKSTART / "pipeline"), "--max_sequence_length", "4"]
        words += ["--train_data_dir", str(QUICKSTART / "data/plain"), "--output_dir", folder, "--resolution", "96"]
        source, _ = distill.source_of(*distill.parsed(words), torch.device("cpu"))
        latents, predicted, _ = source([number for number in range(PAIRS) if is_held_out(number)])
    loss = LatentPerceptualLoss(source.vae)
    student = load_student(str(QUICKSTART / "student"), loss)
    whole, alone = (gradient(lambda z, of=of: of(z, latents).mean(), predicted) for of in (loss, student))
    results = {"--lpl_student": compare([alone], whole)}
    for n in (2, 8, 16, 32):
        corrected = [alone + n * (whole - alone), *[alone] * (n - 1)]
        results[f"--lpl_student, --lpl_correct_every {n}"] = compare(corrected, whole)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lpl_estimators.json")
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(QUICKSTART / "pipeline", subfolder="vae").eval()
    results = measure(vae.requires_grad_(False)) | students()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1))
    for name, row in results.items():
        print(f"{name:36s}" + "".join(f"  {key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
