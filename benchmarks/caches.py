"""Images per second of training with both caches, over those without: the training script itself, on a CPU.

    python -m benchmarks.caches

Two models: the quickstart's, on the pictures that it was trained on; and a mid-sized Stable Diffusion with random
weights, a UNet of 74 million parameters between CLIP's text encoder and the VAE at their full sizes. Each is trained
without LPL and with it, in interleaved runs of a few steps that differ in the caches alone. Filling the caches is not
counted: it comes before the first step, and encodes each image and caption once. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import train_text_to_image_lpl as script
from benchmarks.lpl_cost import KL


ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
CACHES = ("--cache_latents", "--cache_text_embeddings")
WAYS = {"without LPL": ("--lpl_weight", "0"), "with LPL": ("--lpl_weight", "0.1")}
MODELS: dict[str, Sequence[str]] = {
    "quickstart, 96 px": ("--resolution", "96", "--train_batch_size", "16", "--max_sequence_length", "4"),
    "mid-sized, 128 px": ("--resolution", "128", "--train_batch_size", "2"),
}


def mid_sized(folder: Path) -> Path:
    """A Stable Diffusion with random weights."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    text = CLIPTextConfig(  # of CLIP ViT-L/14
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=len(pieces) - 2,
        eos_token_id=len(pieces) - 1,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(128, 256, 512), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), sample_size=16,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def speeds(pipeline: Path, data: Path, folder: Path, flags: Sequence[str], steps: int) -> list[float]:
    """Images per second in each step of a run but the first."""
    words = ["--pretrained_model_name_or_path", pipeline, "--train_data_dir", data, "--output_dir", folder]
    words += ["--max_train_steps", steps, "--logging_steps", 1, "--checkpointing_steps", 10**6, "--center_crop"]
    words += ["--report_to", "none", "--seed", 0, "--dataloader_num_workers", 0, "--data_cache_dir", folder / "cache"]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    cpu = mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    with mock.patch.object(sys, "argv", [script.__file__, *map(str, words), *flags]), cpu:
        script.main()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["images_per_second"] for record in records if "loss" in record][1:]


def measured(name: str, pipeline: Path, data: Path, folder: Path, steps: int, repeats: int) -> dict[str, object]:
    """Images per second of each way without and with caches, medians over the steps of interleaved runs."""
    found: dict[str, object] = {}
    for way, flags in WAYS.items():
        without, cached = list[float](), list[float]()
        for repeat in range(repeats):
            place = folder / f"{name} {way} {repeat}".replace(" ", "_")
            words = [*MODELS[name], *flags]
            without += speeds(pipeline, data, place / "without", words, steps)
            cached += speeds(pipeline, data, place / "with", [*words, *CACHES], steps)
        before, after = statistics.median(without), statistics.median(cached)
        found[way] = {"without": round(before, 3), "with": round(after, 3), "ratio": round(after / before, 3)}
        print(f"{name}, {way}: {found[way]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "caches.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {}
        for model in args.models:
            quickstart = model.startswith("quickstart")
            pipeline = QUICKSTART / "pipeline" if quickstart else mid_sized(folder / "mid-sized")
            few = () if quickstart else ("--max_train_samples", "16")
            MODELS[model] = (*MODELS[model], *few)
            results[model] = measured(model, pipeline, QUICKSTART / "data" / "plain", folder, args.steps, args.repeats)
    record = {
        "hardware": f"CPU ({platform.machine()}), OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "torch": version("torch"),
        "steps": args.steps,
        "repeats": args.repeats,
        "images_per_second": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
