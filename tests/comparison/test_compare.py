"""python -m lpl.compare: what it refuses, its runs on tiny pipelines, its numbers and its words."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from tiny import tiny_image_folder
from trainer import ROOT, arguments, metrics, parsed, run, same, train, weights

from lpl.comparison import command, measures, report, runs
from lpl.comparison.measures import Measure, verdict
from lpl.comparison.runs import LONGER, WITH, WITHOUT, Run
from lpl.config import command_line
from lpl.evaluation import Preprocessing, folder_images
from lpl.tools.files import lines
from tests.data.test_folder import also, images


SCRIPT = str(ROOT / "train_text_to_image_lpl.py")
NETWORK = "tests.evaluation.test_command:block_means"
SMALL = ("--features", NETWORK, "--nearest_k", "4", "--num_inference_steps", "2", "--device", "cpu")
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def as_before(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPL_CACHE", str(tmp_path_factory.mktemp("features")))
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command changes
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny_image_folder(tmp_path_factory.mktemp("photos"), count=12)


def words(folder, training, *more):
    return ["--output_dir", str(folder), *SMALL, *more, "--", "python", SCRIPT, *training]


def training(pipeline, images, **flags):
    flags = {"max_train_steps": STEPS, "seed": None} | flags
    return arguments(pipeline, images, "nowhere", **flags)


def called(calls, stop=()):
    """In the place of a new process: the script in this one; a run in `stop` ends after two steps, by a signal."""

    def call(line, lock):
        calls.append(line)
        flags = line[line.index(SCRIPT) + 1 :]
        name = os.path.basename(flags[flags.index("--output_dir") + 1])
        if "--dry_run" not in line and name in stop:
            run([*flags, "--max_train_steps", "2"])
            return 75
        try:
            run(flags)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return 0

    return call


@pytest.fixture(scope="module")
def compared(sd_pipeline, image_folder, photos, tmp_path_factory):
    """Two seeds and equal time; the second run is stopped once, and the same command goes on."""
    folder, calls = tmp_path_factory.mktemp("compared") / "deep", []
    line = training(sd_pipeline, image_folder, use_ema=True, checkpointing_steps=2, lpl_measuring_steps=1)
    line = words(folder, line, "--reference", str(photos), "--seeds", "3", "4", "--equal_time")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "call", called(calls, stop=("with-3",)))
        with pytest.raises(SystemExit) as stopped:
            command.main(line)
        first = len(calls)
        patch.setattr(command, "call", called(calls))
        command.main(line)
    return SimpleNamespace(folder=folder, words=line, calls=calls, first=first, code=stopped.value.code)


def place(compared, name):
    return compared.folder / "runs" / name


# The runs


def test_it_begins_with_a_dry_run_and_goes_on_where_it_was_stopped(compared):
    names = [os.path.basename(line[line.index("--output_dir") + 1]) for line in compared.calls]
    assert compared.code == 75 and compared.first == 3
    assert "--dry_run" in compared.calls[0] and not any("--dry_run" in line for line in compared.calls[1:])
    assert names[1:3] == ["without-3", "with-3"]  # the second one is stopped
    assert names[3:] == ["with-3", "without-4", "with-4", "longer-3", "longer-4"]
    resumed = [line for line in compared.calls if "--resume_from_checkpoint" in line]
    assert resumed == [compared.calls[3]]  # the others would warn that there is no checkpoint


def test_the_run_with_lpl_is_the_training_command(compared, sd_pipeline, image_folder, tmp_path):
    """It was resumed, too."""
    flags = {"max_train_steps": STEPS, "use_ema": True, "lpl_measuring_steps": 1, "seed": 3}
    alone = train(sd_pipeline, image_folder, tmp_path / "alone", **flags)
    assert same(weights(place(compared, "with-3")), weights(alone))
    assert metrics(place(compared, "with-3")) == metrics(alone)


def test_the_run_without_lpl_differs_in_nothing_else(compared, sd_pipeline, image_folder, tmp_path):
    """Its average has the decay of a run with LPL, which --lpl_weight 0 alone would change."""
    flags = {"max_train_steps": STEPS, "use_ema": True, "lpl_weight": 0, "ema_decay": 0.99975, "seed": 3}
    alone = train(sd_pipeline, image_folder, tmp_path / "alone", **flags)
    assert same(weights(place(compared, "without-3")), weights(alone))
    with_lpl, without = (
        yaml.safe_load((place(compared, name) / "recipe.yaml").read_text()) for name in ("with-3", "without-3")
    )
    differing = {name for name in with_lpl if with_lpl[name] != without[name]}
    of_lpl = {name for name in differing if name.startswith("lpl_")}
    assert differing - of_lpl <= {"output_dir", "measured"} and "lpl_weight" in of_lpl


@pytest.mark.slow
def test_runs_are_equal_where_lpl_never_begins(sd_pipeline, image_folder, photos, tmp_path, monkeypatch):
    """Of a LoRA."""
    monkeypatch.setattr(command, "call", called([]))
    monkeypatch.setattr(command, "_check_training", lambda config: None)  # which refuses this
    line = training(sd_pipeline, image_folder, use_ema=True, lpl_start_step=STEPS, rank=2)
    command.main(words(tmp_path / "c", line, "--reference", str(photos), "--metrics", "fid"))
    assert same(weights(tmp_path / "c/runs/with-0"), weights(tmp_path / "c/runs/without-0"))
    (found,) = json.loads((tmp_path / "c/comparison.json").read_text())["measures"].values()
    assert found["Fréchet distance"]["differences"] == [0.0] and found["Fréchet distance"]["better_in"] == 0


def test_finished_runs_keep_no_checkpoint(compared):
    assert not list(compared.folder.glob("runs/*/checkpoint-*"))


@pytest.mark.slow
def test_seeds_that_are_added_leave_the_others_alone(compared, monkeypatch, tmp_path):
    folder = shutil.copytree(compared.folder, tmp_path / "c")
    calls = []
    monkeypatch.setattr(command, "call", called(calls))
    seeds = compared.words.index("--seeds")
    line = [*compared.words[: seeds + 3], "5", *compared.words[seeds + 3 :]]
    line[1] = str(folder)
    command.main([word for word in line if word != "--equal_time"])
    assert [os.path.basename(line[line.index("--output_dir") + 1]) for line in calls] == ["without-5", "with-5"]
    assert json.loads((folder / "comparison.json").read_text())["seeds"] == [3, 4, 5]


def test_a_run_that_fails_ends_the_command(sd_pipeline, image_folder, photos, tmp_path, monkeypatch, capsys):
    codes = iter([0, 1])
    monkeypatch.setattr(command, "call", lambda *_: next(codes))
    line = words(tmp_path / "c", training(sd_pipeline, image_folder), "--reference", str(photos))
    with pytest.raises(SystemExit) as left:
        command.main(line)
    assert left.value.code == 1 and "ended with exit code 1" in capsys.readouterr().err


def test_a_refusal_of_the_training_script_comes_first(sd_pipeline, image_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "call", lambda *_: 2)
    line = words(tmp_path / "c", training(sd_pipeline, image_folder), "--reference", str(photos))
    with pytest.raises(SystemExit, match="the dry run ended with exit code 2"):
        command.main(line)
    assert not (tmp_path / "c/runs").exists()
    # Another training command is then no other comparison.
    with pytest.raises(SystemExit, match="the dry run"):
        command.main([*line, "--learning_rate", "1e-5"])


TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open(sys.argv[1], "w").write("saved"), sys.exit(75)))
open(sys.argv[1], "w").write("begun")
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.fixture
def lock(tmp_path):
    with runs.locked(tmp_path / "locked") as held:
        yield held


def test_signals_reach_the_training_behind_its_launcher(tmp_path, lock):
    """The launcher leaves at once, as accelerate's does; the command waits until the training has saved."""
    file, before = tmp_path / "state", signal.getsignal(signal.SIGTERM)

    def end():
        while not file.is_file() or not file.read_text():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    assert runs.call([sys.executable, "-c", LAUNCHER, TRAINING, str(file)], lock) == 75
    assert file.read_text() == "saved"
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_ends_by_itself_has_its_exit_code(lock):
    assert runs.call([sys.executable, "-c", "raise SystemExit(3)"], lock) == 3


def test_a_folder_is_held_by_one_comparison_and_its_training(tmp_path):
    """The training holds the lock too, so that it is not started twice if the comparison is killed."""
    holds = [sys.executable, "-c", "import os, sys; os.fstat(int(sys.argv[1]))"]
    with runs.locked(tmp_path) as lock:
        assert runs.call([*holds, str(lock)], lock) == 0
        with pytest.raises(ValueError, match="still writes to it"), runs.locked(tmp_path):
            pass
    with runs.locked(tmp_path):
        pass


# What it leaves


def test_the_page_has_verdicts_tables_and_picture(compared):
    page = (compared.folder / "comparison.md").read_text()
    assert (
        "**Equal steps.**" in page and "**Equal time.**" in page and "![samples and measures](comparison.png)" in page
    )
    assert "| Fréchet distance ↓ |" in page and " of 2 |" in page and "±" in page
    assert "EMA decay: 0.99975 in all runs, the default with LPL (without LPL it would be 0.9999)" in page
    assert "python -m lpl.compare --output_dir" in page
    picture = Image.open(compared.folder / "comparison.png").convert("RGB")
    assert len(picture.getcolors(picture.width * picture.height)) > 100


def test_the_numbers_are_those_of_the_evaluation(compared):
    found = json.loads((compared.folder / "comparison.json").read_text())
    results = json.loads((compared.folder / "evaluation/evaluation.json").read_text())["results"]
    values = {result["label"]: result["metrics"][NETWORK]["fid"]["value"] for result in results}
    row = found["measures"]["Equal steps"]["Fréchet distance"]
    assert row["with"] == [values["with LPL, seed 3"], values["with LPL, seed 4"]]
    assert row["without"] == [values["without LPL, seed 3"], values["without LPL, seed 4"]]
    assert row["differences"] == [with_lpl - without for with_lpl, without in zip(row["with"], row["without"])]
    longer = found["measures"]["Equal time"]["Fréchet distance"]
    assert longer["without"] == [values[f"without LPL, equal time, seed {seed}"] for seed in (3, 4)]
    steps = found["runs"]["longer"]["steps"]
    assert steps[0] == steps[1] and found["runs"]["with"]["steps"] == [STEPS, STEPS]


def test_what_the_training_holds_out_is_the_reference(sd_pipeline, image_folder, tmp_path, monkeypatch):
    """--validation_every_nth 2: the 1st, 3rd, ... of the data set's images, in full."""
    monkeypatch.setattr(command, "call", lambda *_: 1)
    line = training(sd_pipeline, image_folder, validation_every_nth=2, num_validation_samples=1)
    with pytest.raises(SystemExit, match="the dry run"):
        command.main(words(tmp_path / "c", line, "--metrics", "fid"))
    rows = [json.loads(row) for row in (tmp_path / "c/reference/metadata.jsonl").read_text().splitlines()]
    data = [json.loads(row) for row in (image_folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(data) // 2
    captions = {row["text"] if isinstance(row["text"], str) else row["text"][0] for row in data}
    assert {row["text"] for row in rows} <= captions
    assert all((tmp_path / "c/reference" / row["file_name"]).is_file() for row in rows)
    (tmp_path / "c/reference/mine.jpg").write_text("a photo")
    with pytest.raises(SystemExit, match="its folder reference.* holds other files; move them"):
        command.main(words(tmp_path / "c", line, "--metrics", "fid"))
    assert (tmp_path / "c/reference/mine.jpg").read_text() == "a photo"


# Refusals


@pytest.mark.parametrize(
    "flags, more, said",
    [
        ({"lpl_weight": 0}, (), "--lpl_weight 0: give the training command with LPL"),
        ({"dry_run": True}, (), "--dry_run: leave it out"),
        ({"push_to_hub": True}, (), "--push_to_hub: a comparison publishes nothing"),
        ({"resume_from_checkpoint": "checkpoint-2"}, (), "begin anew and resume by themselves"),
        ({"lpl_start_step": STEPS}, (), "so both runs would be without LPL; add --lpl_start_step 0"),
        ({}, ("--seeds", "-1"), "--seeds -1: it must be 0 or more"),
        ({}, ("--num_images", "0"), "--num_images 0: it must be more than 0"),
        ({}, ("--num_images", "2"), "2 generated and 12 reference images"),
        ({}, ("--features", "tests.evaluation.test_command:no_such"), "no_such"),
        ({"max_train_samples": 4, "validation_every_nth": 2}, (None,), "what a run holds out depends on its seed"),
        ({}, (None,), "--reference is missing"),
        pytest.param({}, ("--device", "nonsense"), "--device nonsense", marks=pytest.mark.slow),  # in another process
        ({}, ("--dtype", "float16"), "--dtype float16 needs a GPU"),
        ({}, ("--prompts_file", __file__.replace("test_compare", "__init__")), "the file has no prompts"),
    ],
)
def test_wrong_commands_are_refused(flags, more, said, sd_pipeline, image_folder, photos, tmp_path, monkeypatch):
    """None: without --reference."""
    monkeypatch.setattr(command, "call", lambda *_: pytest.fail("something was run"))
    given = () if None in more else ("--reference", str(photos), *more)
    with pytest.raises(SystemExit) as left:
        command.main(words(tmp_path / "c", training(sd_pipeline, image_folder, **flags), *given))
    assert str(left.value.code).startswith("python -m lpl.compare: error: ") and said in str(left.value.code)
    assert not (tmp_path / "c/runs").exists()


@pytest.mark.parametrize(
    "line, said",
    [
        (["--output_dir", "c"], "the training command is missing"),
        (["--output_dir", "c", "--", "accelerate", "launch", "other.py"], "does not run train_text_to_image_lpl.py"),
        (["--output_dir", "c", "--", "train_text_to_image_lpl.py"], "write the launcher too"),
    ],
)
def test_a_command_without_a_training_is_refused(line, said):
    with pytest.raises(SystemExit, match=said):
        command.main(line)


def test_a_wrong_flag_of_the_training_is_refused_in_its_own_words(capsys):
    with pytest.raises(SystemExit):
        command.main(["--output_dir", "c", "--", "python", SCRIPT, "--learning_rat", "1"])
    said = capsys.readouterr().err
    assert said.startswith("train_text_to_image_lpl.py: error: unrecognized arguments: --learning_rat")


@pytest.mark.parametrize("column", ["text", None])
def test_a_reference_without_captions_is_refused(column, sd_pipeline, image_folder, photos, tmp_path, monkeypatch):
    reference = shutil.copytree(photos, tmp_path / "photos")
    if column is None:
        (reference / "metadata.jsonl").unlink()
    flags = {} if column is None else {"caption_column": "words"}
    monkeypatch.setattr(command, "call", lambda *_: pytest.fail("something was run"))
    with pytest.raises(SystemExit, match="no captions"):
        line = training(sd_pipeline, image_folder, **flags)
        command.main(words(tmp_path / "c", line, "--reference", str(reference)))


def test_a_random_part_of_one_of_the_data_sets_is_no_reference(sd_pipeline, image_folder, tmp_path):
    """Each run draws it by its seed; a split of its own that is held out does not depend on it."""
    part = {"train_data_dir": str(image_folder), "max_train_samples": 4}
    flags = {"datasets": [json.dumps(part)], "train_data_dir": None, "validation_every_nth": 2}
    line = words(tmp_path / "c", training(sd_pipeline, image_folder, **flags))
    with pytest.raises(SystemExit, match="--max_train_samples: what a run holds out depends on its seed"):
        command.main(line)


def test_what_a_run_holds_out_has_its_captions_in_order(sd_pipeline, tmp_path):
    """Of several columns, with the trigger word, where the evaluation looks for them."""
    folder = also(images(tmp_path / "data", "a.png", "b.png"), {"a.txt": "x, y, z", "b.txt": "x"})
    flags = {"caption_column": "text:1", "shuffle_tags": True, "trigger_word": "sks", "validation_every_nth": 2}
    config, description = parsed(sd_pipeline, folder, tmp_path / "out", **flags)
    command.write_held_out(config, description, tmp_path / "reference")
    found = folder_images(tmp_path / "reference", Preprocessing(32), "text:1")
    assert found.captions == ["sks, x, y, z"]


@pytest.mark.parametrize("reference", ["{}", "{}/.."])
def test_a_reference_that_is_trained_on_is_refused(reference, sd_pipeline, image_folder, tmp_path):
    line = words(tmp_path / "c", training(sd_pipeline, image_folder), "--reference", reference.format(image_folder))
    with pytest.raises(SystemExit, match="it shares images with --train_data_dir"):
        command.main(line)


def test_the_folder_of_another_comparison_is_refused(compared, monkeypatch):
    monkeypatch.setattr(command, "call", lambda *_: pytest.fail("something was run"))
    with pytest.raises(SystemExit, match="with learning_rate 0.001, and now it is 0.002; give another folder"):
        command.main([*compared.words, "--learning_rate", "0.002"])


def test_flags_that_change_no_result_may_be_added(compared, monkeypatch):
    """Such as those that save memory, after a run that ended without it."""
    monkeypatch.setattr(command, "call", lambda *_: pytest.fail("something was run"))
    with pytest.raises(SystemExit, match="and now it is 0.002"):
        command.main(
            [*compared.words, "--gradient_checkpointing", "--lpl_chunk_size", "1", "--learning_rate", "0.002"]
        )


def test_the_command_of_the_wheel_is_a_training():
    assert command._training_words(["lpl-train", "--rank", "4"]) == (("lpl-train",), ["--rank", "4"])


def test_a_folder_with_other_runs_is_refused(sd_pipeline, image_folder, photos, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    with pytest.raises(SystemExit, match="a folder runs that is of no comparison"):
        command.main(words(tmp_path, training(sd_pipeline, image_folder), "--reference", str(photos)))


def test_the_folder_of_a_training_is_refused(compared, sd_pipeline, image_folder, photos):
    line = words(place(compared, "with-3"), training(sd_pipeline, image_folder), "--reference", str(photos))
    with pytest.raises(SystemExit, match="this is a training run's folder"):
        command.main(line)


# Numbers and words


def test_the_first_measure_is_through_the_first_network(tmp_path):
    """Though another network has the same metric."""
    folder_with(tmp_path / "a", [10], 4)
    found = {"fid": {"value": 1.0}, "recall": {"value": 0.5}}
    results = [{"label": Run(WITH, 0, tmp_path / "a").label, "high_frequency_energy": 0.1}]
    results[0]["metrics"] = {"org/one": found, "org/two": found}
    networks = {"org/one": {}, "org/two": {}}
    evaluation = {"results": results, "networks": networks, "reference": {"high_frequency_energy": 0.1}}
    for first, title in (("fid", "Fréchet distance, one"), ("recall", "recall, one"), ("clip_score", None)):
        titles = [each.title for each in measures.measures_of(evaluation, [Run(WITH, 0, tmp_path / "a")], first)]
        assert titles[0] == (title or "Fréchet distance, one") and len(titles) == 6


def folder_with(folder, speeds, batch, **facts):
    """A finished run's log and recipe; an entry every 10 steps."""
    folder.mkdir(parents=True)
    log = [{"step": 10 * (number + 1), "images_per_second": speed} for number, speed in enumerate(speeds)]
    (folder / "metrics.jsonl").write_text(lines([*log, {"step": log[-1]["step"], "validation_loss": 1.0}]))
    recipe = {"max_train_steps": log[-1]["step"], "mixed_precision": None, "measured": {"global_batch": batch} | facts}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_steps_for_equal_time(tmp_path):
    """20 steps of 4 images: 40 / 10 + 40 / 20 = 6 s with LPL, and 4 s without."""
    folder_with(tmp_path / "a", [10, 20], 4)
    folder_with(tmp_path / "b", [20, 20], 4)
    found = [Run(WITH, 0, tmp_path / "a"), Run(WITHOUT, 0, tmp_path / "b")]
    assert [run.seconds for run in found] == [6.0, 4.0]
    assert runs.steps_for_equal_time(found) == 30


def test_runs_of_unlike_batches_are_refused(tmp_path):
    folder_with(tmp_path / "a", [10], 4)
    folder_with(tmp_path / "b", [10], 8)
    with pytest.raises(ValueError, match="had unlike global batch"):
        runs.check_alike([Run(WITH, 0, tmp_path / "a"), Run(WITHOUT, 0, tmp_path / "b")])
    folder_with(tmp_path / "c", [10], 4, libraries={"torch": "1"})
    with pytest.warns(match="had unlike libraries"):
        runs.check_alike([Run(WITH, 0, tmp_path / "a"), Run(WITHOUT, 0, tmp_path / "c")])
    runs.check_alike([Run(WITH, 0, tmp_path / "a"), Run(WITHOUT, 1, tmp_path / "b")])
    base = {"pretrained_model_name_or_path": "user/model@1"}
    folder_with(tmp_path / "d", [10], 4, commits=base | {"lpl_vae_name_or_path": "user/vae@1"})
    folder_with(tmp_path / "e", [10], 4, commits=base)
    runs.check_alike([Run(WITH, 0, tmp_path / "d"), Run(WITHOUT, 0, tmp_path / "e")])
    folder_with(tmp_path / "f", [10], 4, commits={"pretrained_model_name_or_path": "user/model@2"})
    with pytest.raises(ValueError, match="had unlike commits"):
        runs.check_alike([Run(WITH, 0, tmp_path / "d"), Run(WITHOUT, 0, tmp_path / "f")])


@pytest.mark.parametrize(
    "speed, missed",
    [(20, []), (18.5, []), (40, ["equal time was missed, which favours the run with LPL: 2 s"])],
)
def test_a_time_that_was_missed_is_warned_of(speed, missed, tmp_path):
    """20 steps of 4 images in 4 s with LPL."""
    found = []
    for kind, its_speed in ((WITHOUT, 20), (WITH, 20), (LONGER, speed)):
        folder_with(tmp_path / kind, [its_speed] * 2, 4)
        found.append(Run(kind, 0, tmp_path / kind))
    said = report.Comparison(found, [], {}, {}, ["few images"]).all_warnings
    assert said[0] == "few images" and [words[:38] for words in said[1:]] == [words[:38] for words in missed]


def measure(title, better, without, with_lpl):
    return Measure(title, better, {WITHOUT: without, WITH: with_lpl, LONGER: without})


def test_differences_and_signs():
    distance = measure("distance", "lower", [2.0, 4.0, 4.0], [1.0, 5.0, 4.0])
    assert distance.differences(WITHOUT) == [-1.0, 1.0, 0.0] and distance.changes(WITHOUT) == [-0.5, 0.25, 0.0]
    assert distance.better_in(WITHOUT) == 1 and distance.worse_in(WITHOUT) == 1
    recall = measure("recall", "higher", [0.5], [0.6])
    assert recall.better_in(WITHOUT) == 1 and measures.agreement(recall, WITHOUT) == "better"
    for values in ([-0.1], [0.1]), ([0.1], [-0.1]):
        assert measure("kid", "lower", *values).changes(WITHOUT) is None
    assert measures.agreement(measure("recall", "higher", [0.5] * 2, [0.5] * 2), WITHOUT) == "equal"


def test_a_verdict_says_no_more_than_the_seeds_do():
    one = verdict([measure("distance", "lower", [2.0], [1.0]), measure("recall", "higher", [0.5], [0.4])], WITHOUT)
    assert one.startswith("Not distinguishable with one seed")
    assert "better with LPL: distance; worse: recall" in one
    mixed = verdict([measure("distance", "lower", [2.0, 2.0], [1.0, 3.0])], WITHOUT)
    assert mixed.startswith("Not distinguishable by the distance: with LPL it is better in 1 of 2 seeds")
    assert "a probability of 100%" in mixed
    hint = verdict([measure("distance", "lower", [2.0] * 3, [1.0] * 3)], WITHOUT)
    assert (
        "is better with LPL in all 3 seeds (-50.0 ± 0.0%). This is a hint" in hint and "a probability of 25%" in hint
    )
    worse = verdict([measure("distance", "lower", [2.0] * 6, [3.0] * 6)], WITHOUT)
    assert "is worse with LPL in all 6 seeds" in worse and "hint" not in worse and "of 3.1%" in worse
    many = verdict([measure("distance", "lower", [2.0] * 9, [1.0] * 8 + [3.0])], WITHOUT)
    assert "is better with LPL in 8 of 9 seeds" in many and "of 3.9%" in many  # 2 (9 + 1) / 2^9


def test_equal_values_are_no_agreement():
    assert verdict([measure("distance", "lower", [2.0] * 2, [2.0] * 2)], WITHOUT).startswith("Not distinguishable")


# The page of the documentation

PAGE = (ROOT / "docs/compare.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks/results/compare_quickstart.json").read_text())


def test_the_commands_that_are_shown_parse():
    blocks = re.findall(r"^python -m lpl\.compare (.*\\\n(?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        own, _, line = command._split(shlex.split(block.replace("\\\n", " ")))
        command.build_parser().parse_args(own)
        _, flags = command._training_words(line)
        command_line.build_parser().parse_args(flags)


@pytest.mark.parametrize("title", RESULTS["measures"])
def test_the_example_has_the_numbers_of_its_result_file(title):
    for name, row in RESULTS["measures"][title].items():
        found = Measure(name, row["better"], {WITHOUT: row["without"], WITH: row["with"]})
        difference = measures.shown(row["differences"], "+")
        cells = [found.name, measures.shown(row["without"]), measures.shown(row["with"]), difference]
        assert " | ".join(cells) in PAGE
    assert RESULTS["verdict"][title] in PAGE


@pytest.mark.slow
def test_the_command_itself(sd_pipeline, image_folder, photos, tmp_path):
    """All processes are started as a user's are, the trainings by accelerate."""
    line = training(sd_pipeline, image_folder)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", SCRIPT]
    command_line = [sys.executable, "-m", "lpl.compare", *words(tmp_path / "c", [], "--reference", str(photos))]
    command_line = [*command_line[: command_line.index("--") + 1], *launcher, *line]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT / "tests/support")  # for the feature network
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Equal steps. Not distinguishable with one seed" in done.stdout
    assert (tmp_path / "c" / report.PICTURE).is_file()
