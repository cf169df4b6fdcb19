"""Trains the small `AutoencoderKL` of the quickstart: 64-pixel pictures to 8 x 16 x 16 latents, 33 minutes on 2 cores.

The autoencoder is convolutional, so most of the time goes to cheap 32-pixel windows and only the end to 64 pixels.
Learning rate and window depend on `progress`, from 0 to 1: the larger of steps / `--steps` and time / `--max_minutes`.
So a slow machine, too, finishes the cosine decay within the time budget. The autoencoder is saved every few minutes,
with measured `scaling_factor` and `shift_factor`, and can be used at any time.

    python examples/quickstart/train_autoencoder.py --data quickstart/data --output_dir quickstart/autoencoder
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm


RESOLUTION = 64
SHORT_WINDOWS = 0.85  # share of the run on windows of half the side; the rest adapts to the borders of whole pictures
KL_WEIGHT = 2e-4  # on the mean over latents; small, as in Stable Diffusion's autoencoder
EQUIVARIANCE = 0.25  # share of the steps that decode half-size latents, see `reconstruction_pair`


def load_pictures(data: Path) -> torch.Tensor:
    """All pictures of an imagefolder data set, uint8 (N, 3, H, W); all of one size."""
    files = sorted(data.glob("train/*.png"))
    if not files:
        raise ValueError(f"no train/*.png in --data {data}: run prepare_data.py --output_dir {data} first")
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> pixels [-1, 1]"""
    return pictures.float() / 127.5 - 1


def center_crops(pictures: torch.Tensor, count: int, side: int = RESOLUTION) -> torch.Tensor:
    """Centre crops of `count` pictures, spread evenly over the data set."""
    top, left = (pictures.shape[-2] - side) // 2, (pictures.shape[-1] - side) // 2
    chosen = torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long()
    return pictures[chosen, :, top : top + side, left : left + side]


def random_windows(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Every picture cropped at a random place and mirrored at random: uint8 -> pixels [-1, 1], (B, 3, side, side)"""
    count, _, height, width = pictures.shape
    tops = torch.randint(height - side + 1, (count,)).tolist()
    lefts = torch.randint(width - side + 1, (count,)).tolist()
    places = zip(pictures, tops, lefts)
    windows = torch.stack([picture[:, top : top + side, left : left + side] for picture, top, left in places])
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    return to_unit_range(torch.where(mirrored, windows.flip(-1), windows))


def build_autoencoder(
    channels: tuple[int, ...] = (32, 48, 96), latent_channels: int = 8, side: int = RESOLUTION
) -> AutoencoderKL:
    """An autoencoder like SD3's, without quant convolutions; without attention, so that windows of any size agree."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=side,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def reconstruction_pair(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reconstruction, target, and the KL term (a mean over all latents).

    Some steps downsample both latents and pictures by two (the idea of EQ-VAE): latents whose low frequencies are the
    low frequencies of the picture are easier to learn for a diffusion model.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()  # (B, 8, h, w)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    if torch.rand(()) < EQUIVARIANCE:
        latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
    return vae.decode(latents).sample, images, kl


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """L1 of the pixels and of their differences to the right and below (sharp edges), at scales 1, 1/2 and 1/4."""
    error, loss = output - target, output.new_zeros(())
    for scale in range(scales):
        error = F.avg_pool2d(error, 2) if scale else error
        loss = loss + error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return loss


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Linear warmup over some steps, then half a cosine over the progress down to 1 % of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def image_batches(vae: AutoencoderKL, pictures: torch.Tensor, size: int = 16) -> Iterator[torch.Tensor]:
    """uint8 -> pixels [-1, 1], batch by batch, on the device and in the memory format of the autoencoder"""
    for batch in pictures.split(size):
        yield to_unit_range(batch).to(vae.device, memory_format=torch.channels_last)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Writes `shift_factor` (mean) and `scaling_factor` (1 / std) of the latents into the config, as SD3 uses them."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in image_batches(vae, pictures)])
    std, mean = torch.std_mean(latents)
    vae.register_to_config(scaling_factor=round(1 / std.item(), 4), shift_factor=round(mean.item(), 4))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> uint8, through the mean of the posterior"""
    batches = image_batches(vae, pictures)
    output = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in batches])
    return ((output.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of every picture in dB, (N,); both uint8."""
    error = (output.float() - target.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-3))


def save_comparison(vae: AutoencoderKL, originals: torch.Tensor, path: Path, columns: int = 10, rows: int = 4) -> None:
    """Saves rows of originals, each above the row of its reconstructions, at twice the size."""
    originals, side = originals[: rows * columns], originals.shape[-1]
    pairs = torch.stack([originals, reconstruct(vae, originals)]).unflatten(1, (rows, columns))
    sheet = pairs.permute(1, 0, 4, 2, 5, 3).reshape(rows * 2 * side, columns * side, 3)
    image = Image.fromarray(sheet.numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def save(vae: AutoencoderKL, pictures: torch.Tensor, folder: Path) -> None:
    measure_latents(vae, center_crops(pictures, 256))
    vae.save_pretrained(folder)


def train(vae: AutoencoderKL, pictures: torch.Tensor, args: argparse.Namespace) -> None:
    """The training loop; the head of this file explains `progress`."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = saved = time.monotonic()
    progress, step, average = 0.0, 0, math.nan
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}% |{bar:30}| {elapsed}<{remaining}{postfix}", mininterval=5)
    while progress < 1:
        side = RESOLUTION // 2 if progress < SHORT_WINDOWS else RESOLUTION
        chosen = torch.randint(len(pictures), (args.batch_size,))
        images = random_windows(pictures[chosen], side).to(vae.device, memory_format=torch.channels_last)
        output, target, kl = reconstruction_pair(vae, images)
        loss = reconstruction_loss(output, target) + KL_WEIGHT * kl
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, step, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()

        step += 1
        now = time.monotonic()
        if step % 50 == 0:
            average = loss.item()
            bar.set_postfix_str(f"step {step}, loss {average:.4f}, kl {kl.item():.2f}", refresh=False)
        if now - saved > 60 * args.save_minutes:
            save(vae, pictures, args.output_dir)
            saved = now
        following = min(1.0, max(step / args.steps, (now - start) / (60 * args.max_minutes)))
        bar.update(following - progress)
        progress = following
    bar.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder written by prepare_data.py.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the autoencoder.")
    parser.add_argument("--steps", type=int, default=12000, help="Maximum number of steps (default: %(default)s).")
    parser.add_argument(
        "--max_minutes", type=float, default=33, help="Maximum time in minutes (default: %(default)s)."
    )
    parser.add_argument(
        "--save_minutes", type=float, default=4, help="Minutes between two saves (default: %(default)s)."
    )
    parser.add_argument("--batch_size", type=int, default=12, help="Windows per step (default: %(default)s).")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak learning rate (default: %(default)s).")
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=(32, 48, 96),
        help="Channels of the autoencoder's levels, multiples of 8.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s).")
    args = parser.parse_args()
    if min(args.steps, args.max_minutes, args.batch_size) <= 0:
        parser.error("--steps, --max_minutes and --batch_size have to be positive")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    pictures = load_pictures(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = build_autoencoder(tuple(args.channels)).to(device, memory_format=torch.channels_last)
    print(f"{len(pictures)} pictures, {vae.num_parameters() / 1e6:.2f} million parameters, on {device}")
    train(vae, pictures, args)
    save(vae, pictures, args.output_dir)

    sample = center_crops(pictures, 256)
    quality = psnr(reconstruct(vae, sample), sample)
    save_comparison(vae, center_crops(pictures, 40), args.output_dir / "reconstructions.png")
    print(f"PSNR {quality.mean():.2f} dB (worst picture {quality.min():.2f}), saved to {args.output_dir}")


if __name__ == "__main__":
    main()
