"""Runs with LoHa, LoKr and OFT: resuming is exact, and the card's code draws the last sample."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trainer import metrics, same, train, weights

from tests.runs.test_matrix import run_card


KINDS = {
    "loha": {"rank": 2, "lora_rank_pattern": ["to_q=3"], "validation_lora_scales": [0, 1]},
    "lokr": {"rank": 2, "decompose_factor": 4, "lora_alpha_pattern": ["to_q=1"]},
    "oft": {"oft_block_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind, sd_pipeline, image_folder, tmp_path):
    flags = {"adapter": kind, "learning_rate": 0.05, "lpl_weight": 0.1} | KINDS[kind]
    flags |= {"use_ema": True, "ema_decay": 0.5}
    flags |= {"checkpointing_steps": 1, "gradient_checkpointing": True, "validation_prompts": ["a cat"]}
    whole = train(sd_pipeline, image_folder, tmp_path / "whole", max_train_steps=3, **flags)
    half = tmp_path / "half"
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    train(sd_pipeline, image_folder, half, max_train_steps=3, **flags, resume_from_checkpoint="latest")
    assert same(adapter_of(half), adapter_of(whole))
    assert metrics(half) == metrics(whole)[-1:]

    samples = whole / "samples"
    seen = np.asarray(Image.open(samples / "step-000003-ema" / "00.png"), float)
    assert np.abs(np.asarray(run_card(whole, sd_pipeline), float) - seen).max() <= 1
    first = np.asarray(Image.open(samples / "step-000000" / "00.png"), float)
    assert np.abs(first - seen).max() > 1
    if kind == "loha":
        strengths = [np.asarray(Image.open(samples / f"lora-scale-{scale}" / "00.png")) for scale in (0, 1)]
        assert (strengths[0] == first).all() and (strengths[1] == seen).all()
    assert (whole / "whole_comfyui.safetensors").is_file() == (kind != "oft")
    card = (whole / "README.md").read_text()
    assert ("rotates what a layer puts out" in card) == (kind == "oft") and "rank None" not in card


def adapter_of(folder: Path):
    return weights(folder / "unet_lora")
