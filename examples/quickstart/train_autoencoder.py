"""Trains a small `AutoencoderKL` with four levels, as Stable Diffusion's: 96-pixel pictures to 8 x 12 x 12 latents.

It grows from two levels to four: the outer levels have learnt before the next one comes between them, whose residual
blocks begin as the identity. In trials of 14,400 windows, trained outer levels led to 28 dB, four levels at once to
25, and to 22 where their blocks did not begin so.

The autoencoder is convolutional, so most steps take windows of half the side, and only the last ones whole pictures, a
quarter as many. It is saved every few minutes, with measured `scaling_factor` and `shift_factor`, and can be used at
any time. The same command goes on where it was stopped: each step draws its random numbers from (seed, step).

    python examples/quickstart/train_autoencoder.py --output_dir quickstart/autoencoder
"""

import argparse
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from make_data import DATA, read_pictures
from PIL import Image
from torch import nn
from tqdm import tqdm


GROWTH = {2: 0.08, 3: 0.2}  # levels, and the share of the run until which the autoencoder has no more
SHORT_WINDOWS = 0.8  # share of the run on windows of half the side; the rest adapts to the borders of whole pictures
KL_WEIGHT = 2e-4  # on the mean over latents; small, as in Stable Diffusion's autoencoder
EQUIVARIANCE = 0.25  # share of the steps that decode half-size latents, see `reconstruction_pair`


def to_unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> pixels [-1, 1]"""
    return pictures.float() / 127.5 - 1


def spread(pictures: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` pictures, spread evenly over the data set."""
    return pictures[torch.linspace(0, len(pictures) - 1, min(count, len(pictures))).long()]


def random_windows(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Every picture cropped at a random place and mirrored at random: uint8 -> pixels [-1, 1], (B, 3, side, side)"""
    count, _, height, width = pictures.shape
    tops = torch.randint(height - side + 1, (count,)).tolist()
    lefts = torch.randint(width - side + 1, (count,)).tolist()
    places = zip(pictures, tops, lefts)
    windows = torch.stack([picture[:, top : top + side, left : left + side] for picture, top, left in places])
    mirrored = torch.rand(count, 1, 1, 1) < 0.5
    return to_unit_range(torch.where(mirrored, windows.flip(-1), windows))


def build_autoencoder(channels: tuple[int, ...], latent_channels: int, side: int) -> AutoencoderKL:
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


def grown(vae: AutoencoderKL | None, channels: tuple[int, ...], latent_channels: int, side: int) -> AutoencoderKL:
    """An autoencoder with these levels that begins with the outer ones of `vae`."""
    larger = build_autoencoder(channels, latent_channels, side)
    for name, module in larger.named_modules():
        if name.endswith(".conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    if vae is not None:
        weights = larger.state_dict()
        for name, weight in vae.state_dict().items():
            name = re.sub(r"up_blocks\.(\d)", lambda found: f"up_blocks.{int(found[1]) + 1}", name)  # from inside out
            if "mid_block" not in name and name in weights and weights[name].shape == weight.shape:
                weights[name] = weight
        larger.load_state_dict(weights)
    return larger


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


def stage_at(step: int, args: argparse.Namespace) -> tuple[int, int]:
    """Levels of the autoencoder at a step, and the step from which it has had them."""
    ends = [math.ceil(share * args.steps) for share in GROWTH.values()]
    passed = sum(end <= step for end in ends)
    return [*GROWTH, len(args.channels)][passed], [0, *ends][passed]


def save(
    vae: AutoencoderKL, optimizer: torch.optim.Optimizer, step: int, pictures: torch.Tensor, folder: Path
) -> None:
    """The autoencoder, and what the same command goes on from."""
    measure_latents(vae, spread(pictures, 256))
    vae.save_pretrained(folder)
    torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, folder / "state.pt.part")
    (folder / "state.pt.part").rename(folder / "state.pt")


def train(pictures: torch.Tensor, device: str, args: argparse.Namespace) -> tuple[AutoencoderKL, bool]:
    """The training loop; the head of this file explains it. Returns also whether all steps were taken."""
    place, side = args.output_dir / "state.pt", pictures.shape[-1]

    def with_levels(levels: int, smaller: AutoencoderKL | None = None) -> tuple[AutoencoderKL, torch.optim.Optimizer]:
        vae = grown(smaller, tuple(args.channels[:levels]), args.latent_channels, side)
        vae.to(device, memory_format=torch.channels_last)
        return vae, torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)

    state = torch.load(place, map_location=device) if place.is_file() else {"step": 0}
    step = state["step"]
    levels, begun = stage_at(max(step - 1, 0), args)
    vae, optimizer = with_levels(levels)
    if step:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
    saved, end = time.monotonic(), time.monotonic() + 60 * args.max_minutes
    bar = tqdm(total=args.steps, initial=step, mininterval=5)
    while step < args.steps and time.monotonic() < end:
        torch.manual_seed(args.seed * args.steps + step)
        if stage_at(step, args) != (levels, begun):
            levels, begun = stage_at(step, args)
            vae, optimizer = with_levels(levels, smaller=vae)
        short = step < SHORT_WINDOWS * args.steps
        window, count = (side // 2, args.batch_size) if short else (side, args.batch_size // 4)
        chosen = torch.randint(len(pictures), (count,))
        images = random_windows(pictures[chosen], window).to(device, memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            output, target, kl = reconstruction_pair(vae, images)
        loss = reconstruction_loss(output.float(), target.float()) + KL_WEIGHT * kl
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / args.steps, step - begun, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()

        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix_str(f"{levels} levels, loss {loss.item():.4f}, kl {kl.item():.2f}", refresh=False)
        if time.monotonic() - saved > 60 * args.save_minutes:
            save(vae, optimizer, step, pictures, args.output_dir)
            saved = time.monotonic()
    bar.close()
    save(vae, optimizer, step, pictures, args.output_dir)
    return vae, step == args.steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "plain", help="folder with a Parquet file of make_data.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the autoencoder")
    parser.add_argument("--steps", type=int, default=9000, help="number of steps (default: %(default)s)")
    parser.add_argument("--max_minutes", type=float, default=600, help="stop, to go on later (default: %(default)s)")
    parser.add_argument("--save_minutes", type=float, default=4, help="time between two saves (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="short windows per step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--channels", type=int, nargs="+", default=(32, 64, 96, 96), help="of the levels, multiples of 8"
    )
    parser.add_argument("--latent_channels", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.max_minutes, args.batch_size) <= 0:
        parser.error("--steps, --max_minutes and --batch_size have to be positive")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    pictures, _ = read_pictures(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae, finished = train(pictures, device, args)
    sample = spread(pictures, 256)
    quality = psnr(reconstruct(vae, sample), sample)
    print(f"{len(pictures)} pictures, {vae.num_parameters() / 1e6:.2f} million parameters")
    print(f"PSNR {quality.mean():.2f} dB (worst picture {quality.min():.2f}), saved to {args.output_dir}")
    if finished:  # train_pipeline.sh looks for the last file
        save_comparison(vae, spread(pictures, 40), args.output_dir / "reconstructions.png")


if __name__ == "__main__":
    main()
