"""What LPL adds to a training step, and what the cheaper ways of computing it save.

    python -m benchmarks.lpl_step                                             # CPU, 256 px
    python -m benchmarks.lpl_step --device cuda --resolution 512 --batch_size 8 --dtype bfloat16

A step is forward and backward of Stable Diffusion 1.x's UNet at its real size (random weights, all of them trained, no
optimizer) on every sample, and LPL with its VAE on the samples inside the threshold: here all of them, the most
expensive case. All ways are timed in one process, interleaved; figures are relative to the step without LPL, times of
--lpl_every and --lpl_correct_every averaged over the steps, memory that of the step that needs most: what it allocates
beside the models and their gradients, or with them. The student has random weights, and the width that
`python -m lpl.distill` gives it. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.lpl_cost import KL, peak_memory, seconds
from lpl import LatentPerceptualLoss, get_objective
from lpl.distillation.command import default_width
from lpl.student import Student, StudentLoss, difference


CORRECT_EVERY = 32  # with which they add less variance than --lpl_every 2 (benchmarks/lpl_estimators.py)


def ways(vae: AutoencoderKL, tiny: AutoencoderTiny, side: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """Flags -> the loss, and how it is computed."""
    whole, half = LatentPerceptualLoss(vae), side // 2
    tile = (half, half, half, half)
    student = StudentLoss(Student(vae.config.latent_channels, default_width(vae)))
    student.student.to(vae.device)
    return {
        "without LPL": {"loss": None},
        "LPL": {"loss": whole},
        "--lpl_every 2": {"loss": whole, "every": 2},
        "--lpl_every 4": {"loss": whole, "every": 4},
        f"--lpl_max_samples {batch_size // 2}": {"loss": whole, "rows": batch_size // 2},
        "--lpl_crop, half of each side": {"loss": whole, "window": tile},
        "--lpl_blocks mid": {"loss": LatentPerceptualLoss(vae, blocks=("mid",))},
        "--lpl_blocks mid up_0 up_1": {"loss": LatentPerceptualLoss(vae, blocks=("mid", "up_0", "up_1"))},
        "--lpl_no_outlier_mask": {"loss": LatentPerceptualLoss(vae, mask_outliers=False)},
        "--lpl_outlier_stride 4": {"loss": LatentPerceptualLoss(vae, outliers={"stride": 4})},
        "--lpl_chunk_size 1": {"loss": LatentPerceptualLoss(vae, chunk_size=1)},
        "--lpl_gradient_checkpointing": {"loss": LatentPerceptualLoss(vae, gradient_checkpointing=True)},
        "--lpl_vae_name_or_path, AutoencoderTiny": {"loss": LatentPerceptualLoss(tiny)},
        "--lpl_student": {"loss": student},
        f"--lpl_correct_every {CORRECT_EVERY}": {"loss": student, "corrected_by": whole, "every": CORRECT_EVERY},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the UNet's autocast"
    )
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="WAY", help="parts of the names of ways; others stay as recorded")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lpl_step_cpu.json")
    args = parser.parse_args()
    about = {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads",
        "torch": version("torch"),
        **{name: getattr(args, name) for name in ("dtype", "resolution", "batch_size", "repeats")},
    }
    earlier = json.loads(args.output.read_text()) if args.only and args.output.is_file() else about
    if not about.items() <= earlier.items():
        parser.error(f"--only: {args.output} is of another machine or other flags; give another --output")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).to(device)
    vae = AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.18215).eval().requires_grad_(False).to(device)
    tiny = AutoencoderTiny(latent_channels=4).eval().requires_grad_(False).to(device)
    objective = get_objective(
        "epsilon", DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    side = args.resolution // 8
    latents, noise = (torch.randn(args.batch_size, 4, side, side, device=device) for _ in range(2))
    timesteps = torch.full((args.batch_size,), 300, device=device)
    embeddings = torch.randn(args.batch_size, 77, 768, device=device)
    noisy = objective.add_noise(latents, noise, timesteps)

    def step(
        loss: LatentPerceptualLoss | StudentLoss | None,
        rows: int | None = None,
        window: Any = None,
        every: int = 1,
        corrected_by: LatentPerceptualLoss | None = None,
    ) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=args.dtype != "float32"):
            output = unet(noisy, timesteps, embeddings).sample.float()
        total = F.mse_loss(output, noise)
        if loss is not None:
            predicted = objective.clean_latents(output, noisy, timesteps)[:rows]
            windows = () if window is None else (window,)
            value = loss(predicted, latents[:rows], *windows)
            total = total + 0.1 * value.mean()
            if corrected_by is not None:
                exact, places = corrected_by(predicted, latents[:rows]), torch.arange(len(predicted), device=device)
                total = total + 0.1 * every * difference(value, exact, predicted, places)[0].mean()
        total.backward()
        unet.zero_grad(set_to_none=False)  # keep the gradients' memory, so that it counts for no way
        return total

    runs: dict[str, Callable[[], Tensor]] = {}
    options = ways(vae, tiny, side, args.batch_size)
    if args.only:
        wanted = ("without LPL", "lpl_student", *args.only)
        options = {name: given for name, given in options.items() if any(part in name for part in wanted)}
    for name, given in options.items():
        runs[name] = lambda given=given: step(**given)
    step(None)  # allocates the gradients, which then count for no way
    memory: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in tqdm(runs.items(), desc="memory"):  # and warm-up
        memory[name] = peak_memory(run, device)
    for _ in tqdm(range(args.repeats), desc="timed"):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    middle = {name: statistics.median(values) for name, values in times.items()}
    plain = middle["without LPL"]
    held = sum(weight.nbytes for model in (unet, unet, vae) for weight in model.parameters())  # unet: gradients too
    results = {}
    for name, given in options.items():
        every = given.get("every", 1)
        between = middle["--lpl_student"] if "corrected_by" in given else plain
        results[name] = {
            "time": round(((every - 1) * between + middle[name]) / every / plain, 3),
            "memory": round(memory[name] / memory["without LPL"], 3),
            "memory_with_weights": round((memory[name] + held) / (memory["without LPL"] + held), 3),
        }
        print(f"{name:42s} time {results[name]['time']:6.3f}  memory {results[name]['memory']:6.3f}")
    record = about | {
        "seconds_without_lpl": round(plain, 3),
        "mebibytes_without_lpl": round(memory["without LPL"] / 2**20),
        "results": earlier.get("results", {}) | results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
