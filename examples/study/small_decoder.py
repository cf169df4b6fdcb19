"""Distils the quickstart's decoder into a small `AutoencoderTiny`, in whose features LPL can be computed as well
(`--lpl_vae_name_or_path`).

    python examples/study/small_decoder.py --study study

It learns to decode latents as the autoencoder does. Writes `small_decoder/`, complete or not at all.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tqdm import trange


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from make_data import DATA, read_pictures
from train_autoencoder import reconstruction_loss, to_unit_range


WIDTH = 24
BATCH = 16


def untrained(teacher: AutoencoderKL) -> AutoencoderTiny:
    """Of the teacher's latent space; its encoder is not used."""
    levels = len(teacher.config.block_out_channels)
    return AutoencoderTiny(
        latent_channels=teacher.config.latent_channels,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(WIDTH,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(2,) * (levels - 1) + (1,),
    )


def example(teacher: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [-1, 1] -> latents as a denoiser has them, scaled, and what the teacher decodes them to."""
    latents = teacher.encode(images).latent_dist.sample()
    scaled = (latents - teacher.config.shift_factor) * teacher.config.scaling_factor
    return scaled, teacher.decode(latents).sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("study"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = AutoencoderKL.from_pretrained(DATA.parent / "pipeline", subfolder="vae").eval()
    pictures, small = read_pictures(DATA / "plain")[0], untrained(teacher)
    optimizer = torch.optim.AdamW(small.decoder.parameters(), args.learning_rate)
    for step in (bar := trange(args.steps, mininterval=5)):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        with torch.no_grad():
            scaled, target = example(teacher, to_unit_range(pictures[torch.randint(len(pictures), (BATCH,))]))
        loss = reconstruction_loss(small.decode(scaled).sample, target)
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
