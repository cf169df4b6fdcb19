"""The benchmarks run, on shrunken models: their figures mean nothing here."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file
from tiny import tiny_sd, tiny_vae
from trainer import ROOT

import lpl
from benchmarks import (
    caches,
    data_scale,
    gpu,
    growth,
    lpl_cost,
    lpl_estimators,
    lpl_step,
    operations,
    pages,
    recipes,
    same_result,
)
from benchmarks.counted import METHOD, completed
from lpl.diagnosis.estimate import Rehearsal, estimate
from lpl.diagnosis.status import Stage
from lpl.training.sharding import Sharding


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
    assert record["results"].pop("without LPL") == {"time": 1, "memory": 1, "memory_with_weights": 1}
    assert len(record["results"]) == 14 and all(row["memory"] >= 0.9 for row in record["results"].values())
    whole = json.loads((tmp_path / "step.json").read_text())["results"]
    again = run(monkeypatch, lpl_step, tmp_path / "step.json", *flags, "--only", "lpl_crop")["results"]
    assert list(again) == list(whole) and again["--lpl_every 4"] == whole["--lpl_every 4"]
    with pytest.raises(SystemExit):
        run(monkeypatch, lpl_step, tmp_path / "step.json", *flags[2:], "--resolution", "128", "--only", "lpl_crop")


def test_estimators(monkeypatch, tmp_path):
    monkeypatch.setattr(lpl_estimators, "SHEETS", 2)
    monkeypatch.setattr(lpl_estimators, "CROPS", (96,))
    monkeypatch.setattr(lpl_estimators, "PAIRS", 48)
    record = run(monkeypatch, lpl_estimators, tmp_path / "estimators.json")
    assert record["--lpl_every 4"] == {"bias": 0, "added_variance": 3}
    assert record["--lpl_max_samples 1 of 2"]["bias"] < 1e-4 < record["--lpl_crop 96, margin 0"]["bias"]
    assert record["--lpl_crop 96, margin 16"]["added_variance"] > 1
    alone, corrected = record["--lpl_student"], record["--lpl_student, --lpl_correct_every 8"]
    assert 0.1 < alone["bias"] < 0.5 and alone["added_variance"] == 0 and corrected["bias"] < 1e-4
    assert corrected["added_variance"] == pytest.approx(7 * alone["bias"] ** 2, rel=0.01)


@pytest.mark.slow
def test_caches(monkeypatch, tmp_path):
    name = "mid-sized, 128 px"
    monkeypatch.setattr(caches, "mid_sized", tiny_sd)
    monkeypatch.setitem(caches.MODELS, name, ("--resolution", "32", "--train_batch_size", "2"))
    record = run(monkeypatch, caches, tmp_path / "caches.json", "--models", name, "--steps", "2", "--repeats", "1")
    for row in record["images_per_second"][name].values():
        assert row["ratio"] == pytest.approx(row["with"] / row["without"], abs=0.01) and row["without"] > 0


def test_a_page_without_the_marks_is_told_of():
    assert pages.filled("a<b>old<c>d", "<b>", "<c>", "new") == "a<b>\nnew\n<c>d"
    for page in ("a<b>old", "<c>old<b>", "old"):
        with pytest.raises(ValueError, match="the page has no <b> ... <c>"):
            pages.filled(page, "<b>", "<c>", "new")


# What is counted -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_operations_is_what_is_counted():
    """After a change, python -m benchmarks.operations --write."""
    found = operations.count("sd15")
    assert operations.line("sd15", found) in operations.DOCS.read_text()


@pytest.mark.parametrize("name", operations.MODELS)
def test_each_cheaper_way_counts_less(name):
    text = operations.DOCS.read_text()
    table = text[text.index(operations.START) : text.index(operations.END)]
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {operations.MODELS[name][0]},"))
    plain, lpl, whole, inside, ratio, *cheaper = map(float, row.strip("| ").split(" | ")[1:])
    assert whole == pytest.approx(1 + lpl / plain, abs=0.01) and ratio == pytest.approx(
        1 + inside * lpl / plain, abs=0.02
    )
    assert all(1 < each < ratio for each in cheaper)


@pytest.mark.parametrize("name", ["sd15_lora", "paper_mmdit_eps_512_lpl", "dit_xl2_imagenet_lpl"])
def test_recipes_are_counted_and_written(name, monkeypatch, tmp_path):
    for file in (f"{name}.yaml", "README.md"):
        (tmp_path / file).write_text((recipes.FOLDER / file).read_text())
    found = recipes.needs(name, scale="tiny", flags=["--resolution", "64"])
    assert found.lpl and found.lpl >= found.plain > found.loaded and found.lpl_operations > found.operations
    assert (found.host > 0) == name.startswith("paper")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    recipes.write(name, found)
    head = (tmp_path / f"{name}.yaml").read_text()
    assert all(f"# {line}\n" in head for line in found.lines().splitlines()) and head.count("# Memory:") == 1
    assert f" | {found.cells()} |\n" in (tmp_path / "README.md").read_text()


def grown(monkeypatch, folder, over, changes, *flags):
    """The points of each curve, and the bytes of the picture."""
    monkeypatch.setitem(growth.GROWTH, over, replace(growth.GROWTH[over], **changes))
    growth.main(["--over", over, "--output_dir", str(folder), "--picture", str(folder / "growth.png"), *flags])
    how = "_cpu" if "--measure" in flags else ""
    return json.loads((folder / f"growth_{over}{how}.json").read_text())["curves"]


@pytest.mark.slow
def test_growth_is_counted(monkeypatch, tmp_path):
    small = replace(growth.SD15, resolution=64)
    curves = grown(monkeypatch, tmp_path, "batch", {"values": (1, 2), "curves": {"SD 1.5": small}}, "--scale", "tiny")
    one, two = (point["ways"] for point in curves["SD 1.5"])
    for way in growth.WAYS:
        assert two[way]["operations"] == 2 * one[way]["operations"] and two[way]["memory"] > one[way]["memory"]
        assert way == growth.PLAIN or one[way]["operations"] > one[growth.PLAIN]["operations"]
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_with_the_model_is_that_of_the_recipes(tmp_path):
    growth.main(["--over", "model", "--output_dir", str(tmp_path), "--picture", str(tmp_path / "growth.png")])
    points = json.loads((tmp_path / "growth_model.json").read_text())["curves"]["LoRA"]
    assert {"sdxl_lora", "flux2_lora"} <= {point["recipe"] for point in points}
    ratios = [
        [p["ways"][way]["operations"] / p["ways"][growth.PLAIN]["operations"] for p in points] for way in growth.WAYS
    ]
    assert all(1 == plain < student < lpl for plain, lpl, student in zip(*ratios, strict=True))
    for name in (point["recipe"] for point in points):
        values = recipes.values(name)
        images = values["train_batch_size"] * values["gradient_accumulation_steps"]
        assert values["resolution"] == 1024 and images == growth.SAMPLES and values["train_batch_size"] == 1


def test_growth_with_processes(monkeypatch, tmp_path):
    """FSDP2 gathers in bf16 twice and reduces in float32: as many bytes as DDP's ring; memory is divided."""
    small = replace(growth.SD35, resolution=64)
    changes = {"values": (4,), "curves": {"DDP": small, "FSDP2": replace(small, sharded=True)}}
    curves = grown(monkeypatch, tmp_path, "processes", changes, "--scale", "tiny")
    (whole,), (shards,) = curves["DDP"], curves["FSDP2"]
    for way in growth.WAYS:
        ours, theirs = shards["ways"][way], whole["ways"][way]
        assert ours["operations"] == theirs["operations"] and ours["memory"] < theirs["memory"]
        assert theirs["sent"] == 2 * 4 * whole["parameters"] * 3 / 4 == pytest.approx(ours["sent"], rel=0.01)
    with completed(small.architecture, small.words("bf16"), "tiny") as (config, description):
        found = estimate(config, description, METHOD, "bf16", 4, sharding=Sharding())  # as --for_gpu counts it
    for way, stage in ((growth.PLAIN, Stage.STEP), (growth.LPL, Stage.LPL_STEP)):
        assert shards["ways"][way]["memory"] == pytest.approx(found.memory[stage], abs=2**12)
        assert shards["ways"][way]["operations"] == found.operations[stage]


def test_the_student_is_not_there_in_steps_without_it(monkeypatch):
    """Nor does any step lack the optimizer's state: both would change the memory that is measured on a GPU."""
    events = []
    for name in ("begin", "step"):
        original = getattr(Rehearsal, name)

        def seen(self, *args, original=original, name=name):
            events.append(name)
            return original(self, *args)

        monkeypatch.setattr(Rehearsal, name, seen)
    made = growth.model_without_weights
    monkeypatch.setattr(growth, "model_without_weights", lambda *args: events.append("student") or made(*args))
    growth.measure(replace(growth.QUICKSTART, resolution=32, batch=1), torch.device("cpu"), repeats=1)
    assert events[:5] == ["begin", "step", "step", "student", "step"]


def test_growth_is_measured(monkeypatch, tmp_path, capsys):
    changes = {"measured": ((1, 2), replace(growth.QUICKSTART, resolution=32))}
    curves = grown(monkeypatch, tmp_path, "batch", changes, "--measure", "--repeats", "1")
    for point in curves["quickstart"]:
        rates = {way: row["rate"] for way, row in point["ways"].items()}
        assert rates[growth.PLAIN] == 1 and rates[growth.LPL] > 0 and rates[growth.STUDENT] > 0
    with pytest.raises(SystemExit):
        growth.main(["--over", "model", "--measure"])
    assert "--over model is only counted on this device" in capsys.readouterr().err


# On a GPU ------------------------------------------------------------------------------------------------------------


def test_gpu_results_are_kept_and_told(monkeypatch, tmp_path):
    output = tmp_path / "gpu.json"
    run = {"case": "sd15", "device": "CPU", "scale": "tiny"}
    gpu.keep(output, run | {"way": gpu.LPL, "error": "no | memory"})
    assert not gpu.is_done(output, run | {"way": gpu.LPL})
    for way, seconds in ((gpu.PLAIN, 1.0), (gpu.LPL, 2.0)):
        gpu.keep(output, run | {"way": way, "seconds": seconds, "memory": 2**30, "waits": 0})
    assert gpu.is_done(output, run | {"way": gpu.LPL}) and len(gpu.load(output)["runs"]) == 2
    assert "| sd15 | LPL | 2 | 2 | 1 | - | - | 0 | CPU |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 5000
    started = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **_: started.append(args))
    gpu.main(["--scale", "tiny", "--seconds", "0", "--output", str(output)])
    assert not started  # no time is left


def test_times_of_several_devices_are_told_apart(tmp_path):
    runs = [
        {"case": "sd15", "scale": scale, "device": device, "way": way, "seconds": seconds}
        for scale, device, speed in (("tiny", "CPU", 10), ("real", "one GPU", 1), ("real", "another", 2))
        for way, seconds in ((gpu.PLAIN, 1 / speed), (gpu.LPL, 2 / speed))
    ]
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "barh", lambda _, names, widths: drawn.update(zip(names, widths, strict=True)))
        gpu.draw(runs, tmp_path / "gpu.png")
    assert drawn["sd15, tiny, LPL, CPU"] == drawn["sd15, LPL, one GPU"] == drawn["sd15, LPL, another"] == 2
    assert len(drawn) == 6


@pytest.mark.slow
def test_gpu_script_on_a_cpu(tmp_path):
    words = [str(ROOT / "benchmarks" / "gpu.sh"), "--scale", "tiny", "--seconds", "3000", "--no_tests"]
    command = [*words, "--models", "sd15", "flux", "--output", str(tmp_path / "gpu.json")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHON": sys.executable})
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert {(run["case"], run["way"]) for run in record["runs"]} == {
        (c, w) for c in ("sd15", "flux") for w in gpu.WAYS
    }
    assert all(run["seconds"] > 0 for run in record["runs"])
    gpu.add_estimates(tmp_path / "gpu.json")
    with_lpl = [run for run in gpu.load(tmp_path / "gpu.json")["runs"] if run["way"] == gpu.LPL]
    assert all(run["estimated_memory"] > 0 and run["operations"] > 0 for run in with_lpl)


@pytest.mark.slow
def test_data_at_scale(monkeypatch, tmp_path):
    monkeypatch.setattr(data_scale, "SIZES", {"few": 3})
    monkeypatch.setattr(data_scale, "PROCESSES", (1, 2, 7))
    (found,) = run(monkeypatch, data_scale, tmp_path / "scale.json", "--sizes", "few").values()
    assert found["images_per_second"] > 0
    for order in found["orders"].values():
        assert order["missed"] == order["twice"] == 0
    assert found["orders"]["7"]["units"] == 9 and found["orders"]["2"]["longest"] == 2


def test_what_does_not_read_every_unit_is_seen(monkeypatch):
    original = data_scale.Units._rows
    lost = lambda self, shard, part, first: original(self, shard, part, first or shard == 1)  # noqa: E731
    monkeypatch.setattr(data_scale.Units, "_rows", lost)
    assert data_scale.coverage(3, 2)["missed"] == 1


def test_curves_are_compared_with_what_rounding_does():
    reference = {term: [1.0, 2.0] for term in same_result.TERMS}
    nudged = {term: [1.0 + 1e-7, 2.0] for term in same_result.TERMS}
    bound = same_result.bounds([nudged], reference)
    assert bound["loss"] == pytest.approx([4e-7, 4e-7])  # it never falls
    ways = (same_result.Way(4, 2), same_result.Way(2, 8, fsdp=True))
    row = same_result.compared(ways, nudged, reference, bound)
    assert (
        row["way"] == "4 processes x 2 x 2 micro-batches, DDP; killed, then 2 processes x 8, FSDP2" and row["inside"]
    )
    far = {term: [1.0, 2.0 + 1e-5] for term in same_result.TERMS}
    assert not same_result.compared(ways, far, reference, bound)["inside"]
    assert "| **no** |" in same_result.table([same_result.compared(ways, far, reference, bound)], bound, 2)


def test_weights_are_nudged_by_one_unit(tmp_path, sd_pipeline):
    before = load_file(sd_pipeline / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(
        same_result.nudged(sd_pipeline, tmp_path / "nudged", 0) / "unet/diffusion_pytorch_model.safetensors"
    )
    for name, weight in before.items():
        assert ((torch.nextafter(weight, after[name]) == after[name]) & (after[name] != weight)).all()
