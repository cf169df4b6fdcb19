"""Stores a trained quickstart pipeline small enough for the repository: denoiser and autoencoder in float16.

diffusers loads them as float32 anyway. Takes seconds.

    python examples/quickstart/store_half.py --pipeline quickstart/denoiser --output_dir examples/quickstart/pipeline
"""

import argparse
import re
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder with the trained pipeline")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the small pipeline")
    args = parser.parse_args()
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(args.output_dir)
    for file in args.output_dir.glob("**/*.json"):  # of the machine that it was trained on
        file.write_text(re.sub(r' *"_name_or_path": ".*",\n', "", file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
