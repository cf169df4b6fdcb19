"""Measures the best values the study could reach: real crops, the autoencoder alone, two samples of one Gaussian.

    PYTHONPATH=. python examples/study/floor.py

Writes `study/checks/floor.json` for report.py, with a description of the machine. Every generated image is decoded, so
no model can be sharper than the autoencoder's reconstructions of the reference.
"""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from rows import SETTINGS

from lpl import evaluation as measures


BATCH = 64
SEEDS = range(3)  # of random draws
CPUINFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Number and model of the CPU cores."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    words = f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"
    return f"{torch.cuda.get_device_name()}, {words}" if torch.cuda.is_available() else words


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, images: measures.ImageSet) -> list[Image.Image]:
    """Encode each image to the mean of its latents, and decode it."""
    processor, found = VaeImageProcessor(), []
    for start in range(0, len(images), BATCH):
        pixels = processor.preprocess([images[number] for number in range(start, min(start + BATCH, len(images)))])
        found += processor.postprocess(vae.decode(vae.encode(pixels).latent_dist.mean).sample, "pil")
    return found


def gaussian_bias(features: np.ndarray, seed: int) -> float:
    """The Fréchet distance of two samples of the Gaussian with the moments of the features, (N, D); N in each."""
    random, moments = np.random.default_rng(seed), (features.mean(0), np.cov(features, rowvar=False))
    one, other = (random.multivariate_normal(*moments, size=len(features)) for _ in range(2))
    return measures.compare(one, other, ["fid"])["fid"].value


def measure(study: Path) -> dict[str, Any]:
    """What report.py reads: for each set and seed the metrics, the energy and the spectrum."""
    preprocessing = measures.Preprocessing(SETTINGS["resolution"])
    real = measures.folder_images(study / "data/reference/train", preprocessing)
    training = measures.folder_images(study / "data/train/train", preprocessing)
    vae = AutoencoderKL.from_pretrained(study / "autoencoder").eval()
    decoded = measures.listed_images(reconstructions(vae, real), "reconstructions", preprocessing)
    network = measures.load_network("examples.study.features:load")
    features = measures.set_features(real, network)

    def numbers(images: measures.ImageSet) -> dict[str, Any]:
        estimates = measures.compare(measures.set_features(images, network), features)
        return {metric: estimate.value for metric, estimate in estimates.items()} | spectral(images)

    drawn = {str(seed): np.random.default_rng(seed).permutation(len(training))[: len(real)] for seed in SEEDS}
    sets = {
        "reference": {"0": spectral(real)},
        "training": {seed: numbers(training.select(places)) for seed, places in drawn.items()},
        "gaussian": {str(seed): {"fid": gaussian_bias(features, seed)} for seed in SEEDS},
        "reconstructions": {"0": numbers(decoded)},
    }
    return {"hardware": hardware(), "sets": sets}


def spectral(images: measures.ImageSet) -> dict[str, Any]:
    frequencies, log_power = measures.log_power_spectrum(images)
    return {
        "energy": measures.high_frequency_energy(images),
        "spectrum": {"frequencies": frequencies.tolist(), "log_power": log_power.tolist()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"), help="output folder of prepare.sh")
    args = parser.parse_args()
    os.environ["STUDY"] = str(args.study)
    output = args.study / "checks/floor.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(measure(args.study), indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
