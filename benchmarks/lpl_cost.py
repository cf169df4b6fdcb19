"""What the latent perceptual loss costs beyond the decoder passes that it needs.

    python -m benchmarks.lpl_cost                                              # CPU, 256 px
    python -m benchmarks.lpl_cost --device cuda --resolutions 512 1024 --batch_size 4 --dtype bfloat16

The floor of a call: decode the target without gradient and the prediction with gradient, and backpropagate to the
latent, up to the last block. Every way of computing the loss is timed against the floor in one process, interleaved,
on decoders of the real architectures with random weights. Times are ratios of medians; memory is the peak that the
call allocates. ``plain`` is the same loss by autograd. Writes a JSON file and a picture.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lpl import LatentPerceptualLoss, outlier_mask


matplotlib.use("Agg")
import matplotlib.pyplot as plt


FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
KL = FOUR | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "sdxl": lambda: AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.13025),
    "sd3": lambda: AutoencoderKL(
        **KL,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        **FOUR,
        down_block_out_channels=(128, 256, 512, 512),
        layers_per_down_block=2,
        up_block_out_channels=(192, 384, 768, 768),
        layers_per_up_block=3,
        latent_channels=4,
    ),
}  # the asymmetric one is the variant with 1.5 times the decoder's width
WAYS: dict[str, dict[str, Any]] = {
    "exact masks": {},
    "quantiles from every 4th position": {"outliers": {"stride": 4}},
    "without masks": {"mask_outliers": False},
    "separate statistics": {"normalization": "separate"},
    "blocks mid to up_2": {"blocks": ("mid", "up_0", "up_1", "up_2")},
    "blocks mid to up_1": {"blocks": ("mid", "up_0", "up_1")},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "one sample at a time": {"chunk_size": 1},
    "checkpointing, one sample at a time": {"gradient_checkpointing": True, "chunk_size": 1},
}


def decoder_features(vae: nn.Module, latents: Tensor) -> list[Tensor]:
    """The unmodified decoder."""
    hidden = latents.to(vae.dtype) / vae.config.scaling_factor
    if vae.post_quant_conv is not None:
        hidden = vae.post_quant_conv(hidden)
    hidden = vae.decoder.mid_block(vae.decoder.conv_in(hidden))
    features = [hidden]
    for block in vae.decoder.up_blocks:
        features.append(hidden := block(hidden))
    return features


def floor(vae: nn.Module, predicted: Tensor, latents: Tensor) -> Tensor:
    """The passes that every implementation needs; every feature gets some gradient."""
    with torch.no_grad():
        decoder_features(vae, latents)
    features = decoder_features(vae, predicted)
    return torch.autograd.grad(features, predicted, [torch.ones_like(maps) for maps in features])[0]


def floor_channels_last(vae: nn.Module, predicted: Tensor, latents: Tensor) -> Tensor:
    """The floor in the channels-last layout that LPL uses on a CPU, to separate the gain of the layout."""
    return floor(vae, *(z.contiguous(memory_format=torch.channels_last) for z in (predicted, latents)))


def plain(vae: nn.Module, predicted: Tensor, latents: Tensor) -> Tensor:
    """Eq. 2 written directly, with gradients by autograd."""
    with torch.no_grad():
        target = decoder_features(vae, latents)
    total = 0.0
    for ours, theirs in zip(decoder_features(vae, predicted), target):
        ours, theirs = ours.float(), theirs.float()
        keep = outlier_mask(ours).float()
        kept = keep.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (ours * keep).sum((2, 3), keepdim=True) / kept
        variance = ((ours - mean).square() * keep).sum((2, 3), keepdim=True) / kept
        deviation = (variance + 1e-4 * variance.detach().mean(1, keepdim=True) + 1e-12).sqrt()
        error = ((ours - mean) / deviation - (theirs - mean) / deviation).square() * keep
        side = (latents.shape[-2:].numel() / ours.shape[-2:].numel()) ** 0.5
        total = total + side * (error.sum((2, 3), keepdim=True) / kept).mean((1, 2, 3))
    return torch.autograd.grad(total.sum(), predicted)[0]


def call(loss: LatentPerceptualLoss) -> Callable[..., Tensor]:
    def run(vae: nn.Module, predicted: Tensor, latents: Tensor) -> Tensor:
        return torch.autograd.grad(loss(predicted, latents).sum(), predicted)[0]

    return run


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a run allocates at its peak, beyond those allocated before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = highest = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, resolution: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time and memory of every way relative to the floor, for one architecture at one resolution."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    vae = ARCHITECTURES[name]().eval().requires_grad_(False).to(device, getattr(torch, args.dtype))
    latents = torch.randn(args.batch_size, vae.config.latent_channels, resolution // 8, resolution // 8, device=device)
    predicted = (latents + 0.3 * torch.randn_like(latents)).requires_grad_()
    ways: dict[str, Callable[..., Tensor]] = {"floor": floor, "floor, channels last": floor_channels_last}
    ways["left to autograd"] = plain
    ways |= {
        way: call(LatentPerceptualLoss(vae, **options))
        for way, options in WAYS.items()
        if args.batch_size > 1 or "one sample" not in way
    }
    runs = {way: (lambda run=run: run(vae, predicted, latents)) for way, run in ways.items()}
    memory, times = {}, {way: [] for way in runs}
    for way, run in runs.items():
        run()  # warm
        memory[way] = peak_memory(run, device)
    for _ in tqdm(range(args.repeats), desc=f"{name} {resolution} px", leave=False):
        for way, run in runs.items():
            times[way].append(seconds(run, device))
    middle = {way: statistics.median(values) for way, values in times.items()}
    return {
        way: {
            "time": round(middle[way] / middle["floor"], 3),
            "memory": round(memory[way] / memory["floor"], 3),
            "seconds": round(middle[way], 4),
            "mebibytes": round(memory[way] / 2**20, 1),
        }
        for way in runs
    }


def picture(results: dict[str, dict[str, dict[str, float]]], subtitle: str, path: Path) -> None:
    """Bars of time and memory, one row for each way, one colour for each decoder; the floor is a line."""
    ways = [way for way in next(iter(results.values())) if way != "floor"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.45 * len(ways)), sharey=True, layout="constrained")
    height = 0.8 / len(results)
    for axis, what in zip(axes, ("time", "memory")):
        for number, (decoder, rows) in enumerate(results.items()):
            places = [row + (number - (len(results) - 1) / 2) * height for row in range(len(ways))]
            bars = axis.barh(places, [rows[way][what] for way in ways], height, label=decoder)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="black", linewidth=1, linestyle="--")
        axis.set_title(f"{what}, floor = 1")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(ways)), ways)
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right", fontsize=8)
    figure.suptitle(subtitle, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--resolutions", nargs="+", type=int, default=[256])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lpl_cost_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    settings = {
        "hardware": hardware,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.exists():  # rows of an earlier run with these settings stay, unless they are measured again
        earlier = json.loads(args.output.read_text())
        results = earlier.pop("results") if settings.items() <= earlier.items() else {}
    for resolution in args.resolutions:
        for name in args.architectures:
            results[f"{name}, {resolution} px"] = rows = measure(name, resolution, args)
            print(f"\n{name}, {resolution} px, batch {args.batch_size}, {args.dtype}, {hardware}")
            for way, row in rows.items():
                print(f"  {way:38s} time {row['time']:6.3f}  memory {row['memory']:6.3f}  {row['mebibytes']:8.0f} MiB")
            args.output.write_text(json.dumps(settings | {"results": results}, indent=1))
            subtitle = f"One call of the loss, {hardware}, {args.dtype}, batch of {args.batch_size}"
            picture(results, subtitle, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
