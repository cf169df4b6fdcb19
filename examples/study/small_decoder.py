"""Distils the study's decoder into a small one of about the student's size, an `AutoencoderTiny` in whose features LPL
can be computed as well (`--lpl_vae_name_or_path`).

    python examples/study/small_decoder.py --study study

It learns to decode latents of the training part as the autoencoder does. Writes `small_decoder/`, complete or not at
all.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm import trange


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from make_data import read_pictures
from train_autoencoder import random_windows, reconstruction_loss


QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart"
WIDTH = 24
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = AutoencoderKL.from_pretrained(QUICKSTART / "pipeline", subfolder="vae").eval().requires_grad_(False)
    pictures = read_pictures(QUICKSTART / "data/plain")[0]
    levels = len(teacher.config.block_out_channels)
    small = AutoencoderTiny(
        latent_channels=teacher.config.latent_channels,
        encoder_block_out_channels=(8,) * levels,  # not used
        decoder_block_out_channels=(WIDTH,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(2,) * (levels - 1) + (1,),
    )
    optimizer = torch.optim.AdamW(small.decoder.parameters(), args.learning_rate)
    for step in (bar := trange(args.steps, mininterval=5)):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        images = random_windows(pictures[torch.randint(len(pictures), (BATCH,))], teacher.config.sample_size)
        with torch.no_grad():
            latents = teacher.encode(images).latent_dist.sample()
            target = teacher.decode(latents).sample
        loss = reconstruction_loss(small.decode(latents * teacher.config.scaling_factor).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    folder, part = args.study / "small_decoder", args.study / "small_decoder.part"
    small.save_pretrained(part)
    part.rename(folder)
    count = sum(weight.numel() for weight in small.decoder.parameters())
    print(f"{folder}: {count:,} parameters, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
