"""The study's parts share no pixel, its rows are command lines that the script takes, and its page says what was
measured."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainer import ROOT

from lpl.config.command_line import build_parser
from lpl.distillation import command as distill
from lpl.evaluation import Preprocessing, listed_images
from lpl.evaluation import command as evaluate


sys.path.insert(0, str(ROOT / "examples/study"))
import report
import run
from features import DIM, Features
from floor import gaussian_bias
from prepare_data import CROPS, PICTURES, cells, read, write_part
from rows import BASE, OBJECTIVES, ROW, ROWS, SETTINGS
from run import RESUMING, arguments


@pytest.mark.parametrize("source", PICTURES)
def test_the_parts_share_no_pixel(source):
    side, size = PICTURES[source], read(source).size
    places = cells(size, side)
    assert all(places[part] for part in CROPS)
    boxes = [box for part in CROPS for box in places[part]]
    for (left, top), (others_left, others_top) in itertools.combinations(boxes, 2):
        assert abs(left - others_left) >= side or abs(top - others_top) >= side
    assert all(left + side <= size[0] and top + side <= size[1] for left, top in boxes)


def test_crops_stay_inside_their_cells(tmp_path, monkeypatch):
    """A picture that is white in the part's own cells and black elsewhere gives white crops."""
    monkeypatch.setattr("prepare_data.PICTURES", {"skimage/brick.png": 128})

    def painted(source):
        picture = read(source)
        picture.paste("black", (0, 0, *picture.size))
        for left, top in cells(picture.size, 128)["reference"]:
            picture.paste("white", (left, top, left + 128, top + 128))
        return picture

    monkeypatch.setattr("prepare_data.read", painted)
    seen = []
    monkeypatch.setattr("PIL.Image.Image.save", lambda image, _: seen.append(image.getextrema()))
    assert write_part(tmp_path, "reference") == len(seen) == CROPS["reference"]
    assert set(seen) == {((255, 255),) * 3}


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
    assert row.objective in OBJECTIVES


def test_the_base_is_trained_without_lpl():
    args = build_parser().parse_args(arguments({"pretrained_model_name_or_path": "p"} | SETTINGS | BASE))
    assert args.lpl_weight == "0" and args.from_scratch


def test_the_feature_network():
    assert Features().eval()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, DIM)


# Running the rows ----------------------------------------------------------------------------------------------------

PLAIN_SPEED = 100.0  # images per second


def trained(folder: Path, speeds: list[float], share: float = 0.0) -> None:
    """What the trainer leaves, as far as the study reads it."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    lines = [
        {"step": 50 * number, "images_per_second": speed, "lpl_weight": share, "lpl_share": share}
        for number, speed in enumerate(speeds, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measured(folder: Path, fid: float, seed: int = 0) -> Path:
    """What lpl.evaluate leaves, of a checkpoint and of the result; returns the result's images."""
    drawn = {"step": 600, "num_inference_steps": 20, "guidance_scale": 1.0, "resolution": 64, "dtype": "float32"}
    results = [
        {
            "images": 2,
            "drawn": drawn | {"step": step},
            "metrics": {report.NETWORK: {"fid": {"value": value}}},
            "high_frequency_energy": 0.02,
        }
        for step, value in ((400, 99.0), (600, fid))
    ]
    powers = {"0, step 400": [9.0, 9.0], "0, step 600": [0.0, -1.0], report.REAL: [0.0, 0.0]}
    evaluation = {
        "results": results,
        "settings": {"seed": seed},
        "spectrum": {"frequencies": [0.1, 0.5], "log_power": powers},
        "versions": dict.fromkeys(("torch", "diffusers", "torchmetrics", "scikit-learn"), "1.0"),
    }
    for name, settings in (("a", drawn | {"step": 400}), ("b", drawn), ("c", drawn | {"num_inference_steps": 5})):
        images = folder / "evaluation/images" / name
        images.mkdir(parents=True)
        (images / "settings.json").write_text(json.dumps(settings | {"seeds": [seed, seed + 1]}))
        for number in range(2):
            Image.new("RGB", (64, 64), (90 * number, 9, 9)).save(images / f"{number}.png")
        lines = [{"file_name": f"{number}.png", "text": "brick"} for number in range(2)]
        (images / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation/evaluation.json").write_text(json.dumps(evaluation))
    return folder / "evaluation/images/b"


@pytest.fixture
def commands(monkeypatch):
    """What run.py would start; a training leaves its files, with LPL at half the speed."""
    started = []

    def call(command, log):
        started.append(command)
        if "{study}" in " ".join(command):
            raise AssertionError(command)
        if command[2] == "lpl.distill" or "small_decoder" in command[1]:
            made = command[command.index("--output_dir") + 1] if command[1] == "-m" else f"{command[-1]}/small_decoder"
            Path(made).mkdir(exist_ok=True)
            for name in ("config.json", "README.md"):
                Path(made, name).write_text("{}")
        elif command[1] == str(run.SCRIPT):
            folder = Path(command[command.index("--output_dir") + 1])
            slower = 1 if command[command.index("--lpl_weight") + 1] == "0" else 2
            trained(folder, [PLAIN_SPEED / slower] * 2)
            (folder / "checkpoint-400").mkdir()
        else:
            measured(Path(command[command.index("--generated") + 1]), 1.0)

    monkeypatch.setattr(run, "call", call)
    monkeypatch.setenv("STUDY", "")  # which main() sets
    return started


def test_a_row_is_run_after_those_whose_time_it_is_given(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--rows", "flow_longer", "--seeds", "0", "1", "--study", str(tmp_path)]
    )
    run.main()
    trainings = [build_parser().parse_args(command[2:]) for command in commands if command[1] == str(run.SCRIPT)]
    folders = [Path(args.output_dir) for args in trainings]
    assert folders[0] == tmp_path / "bases/flow_matching"
    assert {folder.parent.name for folder in folders[1:5]} == {"flow", "flow_lpl"}
    assert [folder.parent.name for folder in folders[5:]] == ["flow_longer"] * 2
    assert [args.max_train_steps for args in trainings] == [4000, *[600] * 4, *[1200] * 2]
    assert all(args.resume_from_checkpoint == "latest" and args.checkpointing_steps < 600 for args in trainings)
    assert not list(tmp_path.rglob("checkpoint-*"))
    evaluations = [evaluate.parse(command[3:]) for command in commands if command[1:3] == ["-m", "lpl.evaluate"]]
    assert len(evaluations) == 6
    for request in (command.request for command in evaluations):
        sampling = (request.num_images, request.num_inference_steps, request.guidance_scale, request.seed)
        assert sampling == (run.IMAGES, 20, 1, 0) and request.metrics == run.METRICS
        assert request.features == (report.NETWORK,) == ("examples.study.features:load",)
        assert request.output_dir == f"{request.generated[0]}/evaluation"
    commands.clear()
    run.main()
    assert not commands


def test_what_a_row_needs_is_made_once_after_the_base(tmp_path, monkeypatch, commands):
    rows = ["cheap_flow_student", "cheap_flow_tiny"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--rows", *rows, "--seeds", "0", "--study", str(tmp_path)])
    run.main()
    made = [command for command in commands if "lpl.distill" in command or "small_decoder" in command[1]]
    assert len(made) == 2 and commands[1:3] == made and commands[0][1] == str(run.SCRIPT)
    (distillation,) = (command[3:] for command in made if "lpl.distill" in command)
    own, config = distill.parsed(distillation)
    assert own.pretrained_model_name_or_path == f"{tmp_path}/bases/flow_matching"
    assert (config.data.resolution, config.data.caption_column) == (64, "label")
    trainings = [build_parser().parse_args(command[2:]) for command in commands if command[1] == str(run.SCRIPT)]
    of = {Path(args.output_dir).parent.name: args for args in trainings}
    assert of["bases"].lpl_student is None and of["bases"].lpl_vae_name_or_path is None
    assert of["cheap_flow_student"].lpl_student == f"{tmp_path}/student"
    assert of["cheap_flow_tiny"].lpl_vae_name_or_path == f"{tmp_path}/small_decoder"
    (tmp_path / "student/README.md").unlink()  # killed while it was written
    commands.clear()
    run.main()
    assert [command[2] for command in commands] == ["lpl.distill"]


def test_the_time_of_a_row_is_the_mean_over_its_finished_seeds(tmp_path):
    trained(tmp_path / "rows/flow/0", [100.0, 90.0, 1.0])  # a job that runs beside it makes it slower
    trained(tmp_path / "rows/flow_lpl/0", [50.0, 50.0, 50.0])
    trained(tmp_path / "rows/flow_lpl/1", [25.0, 25.0, 25.0])
    assert run.steps_for_the_time_of(tmp_path, "flow_lpl") == 1800  # (2 + 4) / 2 times as long
    (tmp_path / "rows/flow_lpl/1/model_index.json").unlink()  # it is still in training
    assert run.steps_for_the_time_of(tmp_path, "flow_lpl") == 1200


# The report ----------------------------------------------------------------------------------------------------------


def test_what_is_read_of_a_run(tmp_path):
    trained(tmp_path / "0", [32.0, 64.0, 64.0], share=0.2)
    measured(tmp_path / "0", 3.0)
    found = report.read_run(tmp_path / "0")
    assert found["fid"] == 3.0  # of the result, not of the checkpoint
    assert (found["steps"], found["seconds"], found["images_per_second"]) == (150, 50 + 25 + 25, 64)
    assert found["lpl_share"] == pytest.approx(0.2)
    assert (found["band_1"], found["band_4"]) == pytest.approx((1, 0.1))


def test_rows_are_compared_with_the_same_seed(tmp_path):
    for name, seed, speed, fid in (("flow", 0, 100.0, 4.0), ("flow", 1, 50.0, 8.0), ("flow_lpl", 1, 25.0, 6.0)):
        trained(tmp_path / "rows" / name / str(seed), [speed])
        measured(tmp_path / "rows" / name / str(seed), fid)
    trained(tmp_path / "rows/epsilon/0", [1.0])  # not measured yet
    found = report.gather(tmp_path)
    assert {name: list(seeds) for name, seeds in found.items()} == {"flow": ["0", "1"], "flow_lpl": ["1"]}
    assert (found["flow_lpl"]["1"]["change"], found["flow_lpl"]["1"]["time"]) == (-0.25, 2)
    assert "change" not in found["flow"]["0"]
    lines = [line.split(" | ") for line in report.table("objective", found).splitlines()]
    assert lines[2][:3] == ["| flow matching", "", "6.00 ± 2.83"] and lines[3][1:3] == ["-25.0%", "6.00"]
    assert lines[4][1] == "not run" and {len(line) for line in lines[:8]} == {len(lines[0])}
    assert "--rows share_5 share_50 share_80 weight_3 " in report.table("weight", found)


def test_what_is_kept_of_the_gain(tmp_path):
    for name, fid in (("plain", 4.0), ("lpl", 3.0), ("student", 3.25)):
        trained(tmp_path / f"rows/cheap_flow_{name}/0", [100.0])
        measured(tmp_path / f"rows/cheap_flow_{name}/0", fid)
    trained(tmp_path / "rows/flow/0", [100.0])
    measured(tmp_path / "rows/flow/0", 1.0)  # of another study
    found = report.gather(tmp_path)
    numbers = found["cheap_flow_student"]["0"]
    assert (numbers["kept"], numbers["change"]) == (0.75, 3.25 / 4 - 1)
    assert "kept" not in found["cheap_flow_lpl"]["0"] and "75%" in report.table("cheap", found)


def test_a_cell_is_mean_and_deviation():
    assert report.cell("{:+.2f}", [1.0, 2.0]) == "+1.50 ± 0.71"
    assert report.cell("{:.2f}", [1.0]) == report.cell("{:.2f}", [1.0, 1.0]) == "1.00"
    assert report.cell("{:.2f}", []) == ""


def test_the_images_that_were_measured(tmp_path):
    images = measured(tmp_path / "0", 3.0)
    assert report.measured_images(tmp_path / "0") == images
    (images / "settings.json").unlink()
    with pytest.raises(ValueError, match="are not in evaluation/images"):
        report.measured_images(tmp_path / "0")


def test_real_images_are_of_the_class_that_stands_over_them():
    real = listed_images(
        [Image.new("L", (4, 4), value) for value in range(6)], "real", Preprocessing(4), list("abcabc")
    )
    shown = report.of_the_same(list("bcab"), real)
    assert [image.getpixel((0, 0))[0] for image in shown] == [1, 2, 0, 4]


def test_rows_of_other_folders_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    assert report.with_earlier({"v": {"0": {"fid": 1.0}}}) == {"v": {"0": {"fid": 1.0}}}
    rows = {"flow": {"0": {"fid": 4.0}, "1": {"fid": 5.0}}, "v": {"1": {"fid": 2.0}}}
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    both = report.with_earlier({"v": {"0": {"fid": 1.0}}, "flow": {"1": {"fid": 6.0}}})
    assert both == {"flow": {"0": {"fid": 4.0}, "1": {"fid": 6.0}}, "v": {"0": {"fid": 1.0}, "1": {"fid": 2.0}}}
    assert list(both) == ["flow", "v"]  # as in ROWS


def test_the_report_is_written(tmp_path, monkeypatch):
    """Page, results and pictures of a small study; a second time nothing changes."""
    for name, fid in (("flow", 4.0), ("flow_lpl", 3.0)):
        trained(tmp_path / "rows" / name / "0", [50.0])
        measured(tmp_path / "rows" / name / "0", fid)
    spectrum = {"frequencies": [0.1, 0.5], "log_power": [0.0, 0.0]}
    sets = dict.fromkeys(report.SETS, {"0": {"fid": 1.0, "energy": 0.1, "spectrum": spectrum}})
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks/floor.json").write_text(json.dumps({"hardware": "an abacus", "sets": sets}))
    reference = tmp_path / "data/reference/train"
    reference.parent.mkdir(parents=True)
    (tmp_path / "rows/flow/0/evaluation/images/b").rename(reference)
    measured(tmp_path / "again", 4.0)
    (tmp_path / "again/evaluation/images/b").rename(tmp_path / "rows/flow/0/evaluation/images/b")
    page = tmp_path / "results.md"
    page.write_text((ROOT / "docs/results.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "SHOWN", 2)
    monkeypatch.setattr(sys, "argv", ["report.py", "--study", str(tmp_path)])
    report.main()
    text, results = page.read_text(encoding="utf-8"), json.loads((tmp_path / "results.json").read_text())
    assert "an abacus" in text and results["rows"]["flow_lpl"]["0"]["change"] == -0.25
    assert results["settings"]["sampling"]["num_inference_steps"] == 20 and results["settings"]["row"] == ROW
    assert {path.name for path in tmp_path.glob("study_*.png")} == {
        path.name for path in (ROOT / "docs").glob("study_*")
    }
    report.main()
    assert page.read_text(encoding="utf-8") == text


def test_the_page_says_what_was_measured():
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert report.filled(page, json.loads((ROOT / "examples/study/results.json").read_text())) == page


def test_two_samples_of_one_gaussian_are_apart_by_their_size():
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)).double().numpy()
    assert 0 < gaussian_bias(features[:50], 0) < 0.5 and gaussian_bias(features, 0) < gaussian_bias(features[:50], 0)
