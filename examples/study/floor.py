"""Measures what the autoencoder alone costs: the pictures through it, without a denoiser.

    python examples/study/floor.py

Recorded in results.json as `floor`. It is no bound: guidance gives more contrast, and smaller distances of textures.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from features import read_pictures
from run import DATA, QUICKSTART, evaluate, image_numbers, record, write_images


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"))
    args = parser.parse_args()
    images, captions = read_pictures(DATA)
    vae = AutoencoderKL.from_pretrained(QUICKSTART / "pipeline", subfolder="vae")
    processor, decoded = VaeImageProcessor(), []
    for part in images.split(64):
        latents = vae.encode(part.float() / 127.5 - 1).latent_dist.mean
        decoded += processor.postprocess(vae.decode(latents).sample, "pil")
    output = args.study.resolve() / "measured/floor"
    write_images(output / "images/0", decoded, captions)
    evaluate(args.study.resolve(), output / "images/0", output)
    record("floor", 0, image_numbers(output))


if __name__ == "__main__":
    main()
