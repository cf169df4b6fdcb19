"""The study's rows are command lines that the script takes, the queue goes on, and the page says what was recorded."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from trainer import ROOT

from lpl import autoencoders
from lpl.config.command_line import build_parser
from lpl.evaluation import command as evaluate
from lpl.evaluation.results import REAL


sys.path.insert(0, str(ROOT / "examples/study"))
import features
import report
import run
import small_decoder
from rows import BASES, CONVERGED, ROW, ROWS, SAMPLING, SETTINGS
from run import RESUMING, arguments


PLAIN_SPEED = 100.0  # images per second


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_command_lines(name):
    row = ROWS[name]
    flags = {"pretrained_model_name_or_path": "p", "train_data_dir": "d"} | SETTINGS | RESUMING | ROW | row.flags
    flags["max_train_steps"] = 7 if isinstance(flags["max_train_steps"], str) else flags["max_train_steps"]
    args = build_parser().parse_args(arguments(flags))
    for flag, value in row.flags.items():
        if flag != "max_train_steps":
            given = getattr(args, flag)
            assert given == value or str(given) == value or given == value.split(), flag
    assert row.base in (CONVERGED, *BASES) and row.sampling.keys() <= SAMPLING.keys()
    assert ROWS[row.without].flags["lpl_weight"] == "0" and ROWS[row.without].sampling == row.sampling
    assert row.of is None or ROWS[row.of].flags == row.flags


@pytest.mark.parametrize("name", BASES)
def test_bases_are_trained_without_lpl(name):
    args = build_parser().parse_args(arguments({"pretrained_model_name_or_path": "p"} | SETTINGS | BASES[name]))
    assert (args.lpl_weight == "0") == (args.lpl_student is None)


def test_every_emoji_is_recognised():
    """The shipped feature network belongs to the shipped pictures."""
    images, captions = features.read_pictures(run.TRAIN)
    network, places = features.load(), features.places_of(captions)
    chosen = slice(0, None, 20)
    with torch.no_grad():
        named = network.named(images[chosen]).tolist()
    right = [place == places[caption] for place, caption in zip(named, captions[chosen])]
    assert sum(right) > 0.95 * len(right)


def test_blur_changes_textures():
    images = features.read_pictures(run.DATA)[0][:8]
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, stride=1, padding=1)
    network = features.load()
    with torch.no_grad():
        sharp, moved, soft = (network.texture(each) for each in (images, images.roll(4, -1), blurred))
    assert sharp.shape == (8, 96) and (soft - sharp).norm() > 5 * (moved - sharp).norm()


# The queue -----------------------------------------------------------------------------------------------------------


def trained(folder: Path, speeds: list[float], share: float = 0.0, steps: int = 100) -> None:
    """What the trainer leaves, as far as the study reads it."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    ends = range(steps // len(speeds), steps + 1, steps // len(speeds))
    lines = [
        {"step": step, "loss": 0.5, "images_per_second": speed, "lpl_weight": share, "lpl_share": share}
        for step, speed in zip(ends, speeds)
    ]
    lines += [{"step": step, "validation_loss": 0.5, "validation_lpl": 0.2} for step in (0, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoint-50").mkdir()


def measured(folder: Path, fid: float) -> None:
    """What lpl.evaluate leaves: two drawn images, of which the first is the right one."""
    result = {"images": 2, "metrics": {run.NETWORK: {"fid": {"value": fid}}}, "high_frequency_energy": 0.02}
    powers = {REAL: [0.0, 0.0], "model": [0.0, -1.0]}
    evaluation = {"results": [result], "spectrum": {"frequencies": [0.1, 0.5], "log_power": powers}}
    images, captions = features.read_pictures(run.DATA)
    pictures = [Image.fromarray(images[place].permute(1, 2, 0).numpy()) for place in (3, 3)]
    run.write_images(folder / "images/model", pictures, [captions[3], captions[4]])
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What run.py would start; a training leaves its files, with LPL at half the speed."""
    started = []

    def call(command, log):
        started.append(command)
        if "{study}" in " ".join(command):
            raise AssertionError(command)
        if "small_decoder" in command[1]:
            Path(command[-1], "small_decoder").mkdir()
            Path(command[-1], "small_decoder/config.json").write_text("{}")
        elif command[1] == str(run.SCRIPT):
            slower = 1 if command[command.index("--lpl_weight") + 1] == "0" else 2
            steps = int(command[command.index("--max_train_steps") + 1])
            trained(Path(command[command.index("--output_dir") + 1]), [PLAIN_SPEED / slower] * 2, steps=steps)
        else:
            measured(Path(command[command.index("--output_dir") + 1]), 1.0)

    monkeypatch.setattr(run, "call", call)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(run, "BFLOAT16", True)
    return started


def start(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", "--study", str(tmp_path / "study"), *words])
    run.main()


def trainings(commands):
    return [build_parser().parse_args(command[2:]) for command in commands if command[1] == str(run.SCRIPT)]


def test_the_queue_trains_measures_and_records(tmp_path, monkeypatch, commands):
    start(monkeypatch, tmp_path, "--rows", "flow", "flow_lpl", "flow_longer", "--seeds", "0", "1")
    args = trainings(commands)
    names = ["flow"] * 2 + ["flow_lpl"] * 2 + ["flow_longer"] * 2
    assert [Path(each.output_dir).parent.name for each in args] == names
    steps = ROW["max_train_steps"]
    assert [each.max_train_steps for each in args] == [steps] * 4 + [2 * steps] * 2  # LPL's step takes twice as long
    assert all(each.pretrained_model_name_or_path == str(run.QUICKSTART / "pipeline") for each in args)
    evaluations = [evaluate.parse(command[3:]).request for command in commands if "lpl.evaluate" in command]
    assert len(evaluations) == 6
    assert all((each.num_inference_steps, each.guidance_scale, each.seed) == (20, 1, 0) for each in evaluations)
    found = json.loads((tmp_path / "results.json").read_text())["rows"]["flow_lpl"]["1"]
    assert (found["fid"], found["recognised"], found["images_per_second"]) == (1.0, 0.5, 50.0)
    assert (found["band_1"], found["band_4"]) == pytest.approx((1, 0.1))
    assert not list((tmp_path / "study/rows").glob("*/*/checkpoint-*"))
    commands.clear()
    start(monkeypatch, tmp_path, "--rows", "flow", "flow_lpl", "flow_longer", "--seeds", "0", "1")
    assert not commands


def test_a_row_that_is_trained_anew_is_measured_by_its_own_images(tmp_path, monkeypatch, commands):
    """The name of the folder of images changes with the weights."""
    earlier = tmp_path / "study/measured/flow/0/images/earlier"
    run.write_images(earlier, [Image.new("RGB", (96, 96))], [features.read_pictures(run.DATA)[1][0]])
    start(monkeypatch, tmp_path, "--rows", "flow", "--seeds", "0")
    assert not earlier.exists() and run.recorded()["flow"]["0"]["recognised"] == 0.5


def test_rows_of_one_training_do_not_train_it_at_once(tmp_path, monkeypatch):
    inside, seen = [], []

    def train_row(study, name, seed):
        inside.append(name)
        time.sleep(0.05)
        seen.append(len(inside))
        inside.pop()
        return study

    monkeypatch.setattr(run, "train_row", train_row)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run.trained_row(tmp_path, "flow", 0), range(4)))
    assert seen == [1] * 4


def test_a_folder_may_have_a_space_in_its_name(tmp_path, monkeypatch, commands):
    start(monkeypatch, tmp_path / "my study", "--rows", "epsilon_tiny", "--seeds", "0")
    folders = [Path(each.output_dir) for each in trainings(commands)]
    assert folders and all((tmp_path / "my study/study") in folder.parents for folder in folders)
    (evaluation,) = [evaluate.parse(command[3:]).request for command in commands if "lpl.evaluate" in command]
    assert evaluation.generated == (f"model={folders[-1]}",)


def test_runs_in_float32_are_beside_the_others(tmp_path, monkeypatch, commands):
    with pytest.raises(ValueError, match="run it on this machine first, --rows flow_lpl"):
        start(monkeypatch, tmp_path, "--rows", "flow_longer", "--seeds", "0")
    for half in (True, False, True):
        monkeypatch.setattr(run, "BFLOAT16", half)
        monkeypatch.setattr(run, "MACHINE", "new" if half else "old")
        start(monkeypatch, tmp_path, "--rows", "flow", "flow_lpl", "--seeds", "0")
    assert [each.mixed_precision for each in trainings(commands)] == ["bf16", "bf16", "no", "no"]
    evaluations = [evaluate.parse(command[3:]).request for command in commands if "lpl.evaluate" in command]
    assert [str(each.dtype).removeprefix("torch.") for each in evaluations] == ["bfloat16"] * 2 + ["float32"] * 2
    results = run.recorded()
    assert results["flow_lpl"].keys() == {"0", "0-float32"}
    results["flow"]["0-float32"] |= {"fid": 2.0, "images_per_second": 150.0}
    assert run.steps_for_the_time_of("flow_lpl", results) == 2 * ROW["max_train_steps"]
    assert "| flow matching, LPL | +0.0% |" in report.table("objective", report.compared(results))
    monkeypatch.setattr(run, "MACHINE", "old")
    assert run.steps_for_the_time_of("flow_lpl", results) == 3 * ROW["max_train_steps"]
    results["epsilon_longer"] = {"0": {"steps": 700, "machine": "old"}, "1": {"steps": 800, "machine": "new"}}
    assert run.steps_for_the_time_of("flow_lpl", results) == 700  # every run that is given this time has as many
    del results["epsilon_longer"]
    del results["flow_lpl"]["0"]
    found = report.compared(results)
    assert (found["flow_lpl"]["0-float32"]["change"], found["flow_lpl"]["0-float32"]["time"]) == (-0.5, 3)
    (line,) = [line for line in report.table("objective", found).splitlines() if "`flow_lpl`" in line]
    assert line.startswith("| flow matching, LPL | -50.0% |") and "| 0, in float32 |" in line


def test_times_are_of_one_machine():
    """A model that is measured in another row was trained there too."""
    results = {
        "flow": {"0": numbers(4.0, 100.0, "fast")},
        "sampling_5": {"0": numbers(4.0, 30.0, "slow")},
        "flow_lpl": {"0": numbers(4.0, 10.0, "slow")},
        "share_5": {"0": numbers(4.0, 10.0, "unknown")},
    }
    found = report.compared(results)
    assert found["flow_lpl"]["0"]["time"] == 3 and found["share_5"]["0"].keys() & {"change", "time"} == {"change"}


def test_no_run_begins_after_the_time_is_over(tmp_path, monkeypatch, commands):
    start(monkeypatch, tmp_path, "--rows", "all", "--max_minutes", "0")
    assert not commands


def test_a_model_is_measured_under_another_sampling(tmp_path, monkeypatch, commands):
    start(monkeypatch, tmp_path, "--rows", "guidance_2_lpl", "flow_lpl", "--seeds", "0")
    assert len(trainings(commands)) == 1
    evaluations = [evaluate.parse(command[3:]).request for command in commands if "lpl.evaluate" in command]
    assert [each.guidance_scale for each in evaluations] == [2, 1]
    assert len({each.generated for each in evaluations}) == 1 and len({each.output_dir for each in evaluations}) == 2


def test_what_a_row_needs_is_made_first(tmp_path, monkeypatch, commands):
    start(monkeypatch, tmp_path, "--rows", "epsilon_student", "epsilon_tiny", "--seeds", "0")
    assert len([command for command in commands if "small_decoder" in command[1]]) == 1
    base, student, tiny = trainings(commands)
    assert base.pretrained_model_name_or_path == str(run.QUICKSTART / "pipeline")
    assert not base.from_scratch and base.train_data_dir == str(run.TRAIN)
    assert base.output_dir.endswith("bases/epsilon") and base.prediction_type == "epsilon"
    assert student.pretrained_model_name_or_path == tiny.pretrained_model_name_or_path == base.output_dir
    assert (ROOT / student.lpl_student).is_dir() and tiny.lpl_vae_name_or_path.endswith("small_decoder")


def test_a_small_decoder_reads_what_a_run_gives_it():
    """Scaled latents, which stand for the same raw ones as the teacher's."""
    vae = AutoencoderKL.from_pretrained(run.QUICKSTART / "pipeline", subfolder="vae").eval()
    small = small_decoder.untrained(vae)
    with torch.no_grad():
        scaled, target = small_decoder.example(vae, torch.rand(2, 3, 32, 32) * 2 - 1)
        assert torch.equal(autoencoders.unscale(small, scaled), scaled)
        torch.testing.assert_close(autoencoders.decode(vae, autoencoders.unscale(vae, scaled)), target)
        assert small.decode(scaled).sample.shape == target.shape


def test_the_command_finds_the_package():
    """From another folder, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, ROOT / "examples/study/run.py", "--list", "--rows", "flow_lpl"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert "--lpl_weight auto:0.2" in done.stdout, done.stderr


# The report ----------------------------------------------------------------------------------------------------------


def numbers(fid, speed=100.0, machine="CPU"):
    return {"fid": fid, "texture": fid, "images_per_second": speed, "machine": machine, "steps": 400}


def test_rows_are_compared_with_the_same_seed():
    found = report.compared({"flow": {"0": numbers(4.0), "1": numbers(8.0)}, "flow_lpl": {"1": numbers(6.0, 50.0)}})
    assert (found["flow_lpl"]["1"]["change"], found["flow_lpl"]["1"]["time"]) == (-0.25, 2)
    assert "change" not in found["flow"]["0"]
    lines = [line.split(" | ") for line in report.table("objective", found).splitlines()]
    assert lines[2][:4] == ["| flow matching", "", "", "6.00 ± 2.83"] and "0, 1" in lines[2]
    assert lines[3][1:4] == ["-25.0%", "-25.0%", "6.00"]
    assert {len(line) for line in lines[:4]} == {len(lines[0])} and "PSNR, dB ↑" not in lines[0]
    assert lines[5] == ["Not run: `epsilon`, `epsilon_lpl`, `v`, `v_lpl`."]
    assert "--rows share_5 share_50 share_80 weight_3" in report.table("weight", found)


def test_what_is_kept_of_the_gain():
    rows = {"flow": numbers(4.0), "flow_lpl": numbers(3.0), "flow_student": numbers(3.25)}
    found = report.compared({name: {"0": run} for name, run in rows.items()})
    assert (found["flow_student"]["0"]["kept"], found["flow_student"]["0"]["change"]) == (0.75, 3.25 / 4 - 1)
    assert "kept" not in found["flow_lpl"]["0"] and "75%" in report.table("cheap", found)


def test_the_cost_is_drawn_before_a_row_with_lpl_has_a_time(tmp_path):
    results = {"flow": {"0": numbers(4.0, machine="new")}, "flow_lpl": {"0": numbers(3.0, machine="old")}}
    report.gain_for_time(report.compared(results), tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_a_cell_is_mean_and_deviation():
    assert report.cell("{:+.2f}", [1.0, 2.0]) == "+1.50 ± 0.71"
    assert report.cell("{:.2f}", [1.0]) == report.cell("{:.2f}", [1.0, 1.0]) == "1.00"
    assert report.cell("{:.2f}", []) == ""


def test_the_report_is_written(tmp_path, monkeypatch, commands):
    """Page and pictures of a small study; a second time nothing changes."""
    start(monkeypatch, tmp_path, "--rows", *report.SHOWN_ROWS.values(), "--seeds", "0")
    images, captions = features.read_pictures(run.DATA)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:5]]
    run.write_images(tmp_path / "study/reference_toned", pictures, captions[:5])
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs/results.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "SHOWN", 2)
    monkeypatch.setattr(report, "ENLARGED", 1)
    monkeypatch.setattr(sys, "argv", ["report.py", "--study", str(tmp_path / "study")])
    report.main()
    text = page.read_text(encoding="utf-8")
    assert "| 50.0% |" in text
    names = {f"study_{kind}.png" for kind in ("rows", "cost", "samples", "crops")}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    report.main()
    assert page.read_text(encoding="utf-8") == text


def test_the_page_says_what_was_recorded():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert report.filled(page, report.compared(run.recorded())) == page
