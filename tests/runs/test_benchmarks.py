"""The benchmarks run, on shrunken models: their figures mean nothing here."""

import json
import sys

import pytest
import torch
from tiny import tiny_vae

import lpl
from benchmarks import lpl_cost, lpl_estimators, lpl_step


def run(monkeypatch, module, path, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, "--output", str(path), *flags])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_cost(monkeypatch, tmp_path):
    monkeypatch.setattr(lpl_cost, "ARCHITECTURES", {name: lambda: tiny_vae("sd") for name in ("sdxl", "sd3")})
    monkeypatch.setattr(lpl_cost, "WAYS", {"exact masks": {}, "rgb": {"blocks": ("rgb",)}})
    flags = ("--resolutions", "64", "--repeats", "1", "--threads", "1", "--architectures", "sdxl", "sd3")
    record = run(monkeypatch, lpl_cost, tmp_path / "cost.json", *flags)
    for rows in record["results"].values():
        assert rows["floor"]["time"] == rows["floor"]["memory"] == 1 and set(rows) == {
            "floor",
            "floor, channels last",
            "left to autograd",
            "exact masks",
            "rgb",
        }
        assert all(row["mebibytes"] > 0 for row in rows.values())
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_what_is_timed_is_the_loss():
    """Left to autograd it has the same gradient, which the floor has not."""
    vae = tiny_vae("sd", torch.float64)
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    predicted = (latents + 0.3 * torch.randn_like(latents)).requires_grad_()
    ours = lpl_cost.call(lpl.LatentPerceptualLoss(vae))(vae, predicted, latents)
    theirs = lpl_cost.plain(vae, predicted, latents)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(lpl_cost.floor(vae, predicted, latents), theirs, rtol=0.1)


@pytest.mark.parametrize("batch_size", [2])
def test_step(batch_size, monkeypatch, tmp_path):
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 768}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    real = lpl_step.UNet2DConditionModel
    monkeypatch.setattr(lpl_step, "UNet2DConditionModel", lambda **_: real(**small, **kinds, attention_head_dim=4))
    monkeypatch.setattr(lpl_step, "AutoencoderKL", lambda **_: tiny_vae("sd"))
    flags = ("--resolution", "64", "--batch_size", str(batch_size), "--repeats", "1", "--threads", "1")
    record = run(monkeypatch, lpl_step, tmp_path / "step.json", *flags)
    assert record["results"].pop("without LPL") == {"time": 1, "memory": 1}
    assert len(record["results"]) == 11 and all(row["memory"] >= 0.9 for row in record["results"].values())


def test_estimators(monkeypatch, tmp_path):
    monkeypatch.setattr(lpl_estimators, "SIDE", 64)
    monkeypatch.setattr(lpl_estimators, "PICTURES", ("cat", "coffee"))
    monkeypatch.setattr(lpl_estimators, "CROPS", (32,))
    record = run(monkeypatch, lpl_estimators, tmp_path / "estimators.json")
    assert record["--lpl_every 4"] == {"bias": 0, "added_variance": 3}
    assert record["--lpl_max_samples 1 of 2"]["bias"] < 1e-4 < record["--lpl_crop 32, margin 0"]["bias"]
    assert record["--lpl_crop 32, margin 16"]["added_variance"] > 1
