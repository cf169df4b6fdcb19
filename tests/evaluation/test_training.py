"""--eval_steps: what a run measures of itself while it trains."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from trainer import train

from lpl.evaluation import Preprocessing, compare, folder_images, load_network, set_features, training
from lpl.training.preemption import EXIT_CODE
from tests.evaluation.test_command import NETWORK, evaluated, photos  # noqa: F401


BROKEN = "tests.evaluation.test_command:broken"
FLAGS = {
    "eval_steps": 2,
    "eval_features": [NETWORK],
    "eval_num_images": 9,
    "eval_batch_size": 4,
    "validation_inference_steps": 2,
    "validation_guidance_scale": 2.0,
    "use_ema": True,
    "ema_decay": 0.5,
    "learning_rate": 1e-2,
    "checkpointing_steps": 2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def flags(photos):  # noqa: F811
    return FLAGS | {"eval_data_dir": photos, "max_train_steps": 4}


@pytest.fixture(scope="module")
def run(sd_pipeline, image_folder, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return train(sd_pipeline, image_folder, folder, cache_dir=folder.with_name("cache"), **flags)


def found(folder):
    return json.loads((folder / "evaluation/evaluation.json").read_text())


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "evaluation").glob("*.png")}


def equal(folder, other):
    """Whether two runs have found the same, drawn the same pictures of it, and say the same on their cards."""
    ours, theirs = (
        [(result["step"], result["metrics"]) for result in found(run)["results"]] for run in (folder, other)
    )
    mine, yours = pictures(folder), pictures(other)
    cards = [ModelCard.load(run / "README.md") for run in (folder, other)]
    said = [card.text.partition("## Results")[2].partition("\n## ")[0] for card in cards]
    return (
        ours == theirs
        and found(folder)["spectrum"] == found(other)["spectrum"]
        and mine.keys() == yours.keys()
        and all(np.array_equal(mine[name], yours[name]) for name in mine)
        and said[0] == said[1] != ""
        and str(cards[0].data.eval_results) == str(cards[1].data.eval_results)
    )


def test_every_step_that_is_due_has_its_result(run):
    results = found(run)["results"]
    assert [result["step"] for result in results] == [0, 2, 4]
    values = [result["metrics"][NETWORK]["fid"]["value"] for result in results]
    assert len(set(values)) == 3 and all(value > 0 for value in values)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {record["step"]: record for record in records if "eval_fid" in record}
    assert [logged[step]["eval_fid"] for step in (0, 2, 4)] == values
    assert set(logged[4]) > {"eval_kid", "eval_precision", "eval_high_frequency_energy"}


def test_its_pictures_and_images(run):
    names = {path.name for path in (run / "evaluation").glob("*.png")}
    assert names == {"curves.png", "samples.png", "crops.png", "spectrum.png"}
    kept = sorted(path.name for path in (run / "evaluation/images").iterdir())
    assert kept == ["step-000000", "step-000004"]
    assert len(list((run / "evaluation/images/step-000004").glob("*.png"))) == 9


def test_how_it_was_drawn_and_run_is_written_down(run, photos):  # noqa: F811
    evaluation = found(run)
    for result in evaluation["results"]:
        assert result["source"] == str(run) and result["images"] == 9 and result["differences"] is None
        assert result["drawn"] == {
            **{"resolution": 32, "num_inference_steps": 2, "guidance_scale": 2.0},
            **{"max_sequence_length": None, "dtype": "float32"},
        }
    assert set(evaluation["spectrum"]["log_power"]) == {"run, step 0", "run, step 4", "real images"}
    assert evaluation["reference"]["folder"] == str(photos) and evaluation["settings"]["seed"] == 0  # not the run's 3
    assert evaluation["command"].startswith("accelerate launch") and "--eval_steps 2" in evaluation["command"]


def test_features_of_the_real_images_alone_are_kept(run):
    assert len(list((run.with_name("cache") / "features").iterdir())) == 1


def test_the_numbers_are_those_of_its_images(run, photos):  # noqa: F811
    network = load_network(NETWORK)
    sets = [folder_images(folder, Preprocessing(32)) for folder in (run / "evaluation/images/step-000004", photos)]
    expected = compare(*(set_features(images, network, progress=False) for images in sets), ["fid", "coverage"])
    metrics = found(run)["results"][-1]["metrics"][NETWORK]
    assert {name: metrics[name]["value"] for name in expected} == {
        name: pytest.approx(estimate.value) for name, estimate in expected.items()
    }


def test_the_command_finds_the_same_of_the_result(run, photos, tmp_path):  # noqa: F811
    """The weights are those that are saved, the moving average's; prompts and seeds are the command's."""
    evaluation = evaluated([run], photos, tmp_path, num_images=9)
    ours, theirs = (given["results"][-1]["metrics"][NETWORK]["fid"]["value"] for given in (found(run), evaluation))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert theirs != pytest.approx(found(run)["results"][-2]["metrics"][NETWORK]["fid"]["value"], rel=1e-2)


def cut_off(run, folder):
    """A copy of a run that was killed later: evaluations of steps 4 and 6 were written already, checkpoints not."""
    copied = shutil.copytree(run, folder / "run")
    shutil.rmtree(copied / "checkpoint-4")
    evaluation = found(copied)
    evaluation["results"].append(evaluation["results"][-1] | {"step": 6})
    (copied / "evaluation/evaluation.json").write_text(json.dumps(evaluation))
    return copied


def test_a_resumed_run_goes_on_with_its_results(run, sd_pipeline, image_folder, flags, tmp_path):
    again = cut_off(run, tmp_path)
    train(sd_pipeline, image_folder, again, resume_from_checkpoint="latest", **flags)
    assert equal(again, run)


def test_a_run_that_is_over_keeps_its_results(run, sd_pipeline, image_folder, flags, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    (again / "README.md").unlink()
    train(sd_pipeline, image_folder, again, resume_from_checkpoint="latest", **flags)
    assert equal(again, run)


@pytest.mark.parametrize(
    "changes, said",
    [({"resolution": 64}, "another preprocessing"), ({"eval_num_images": 8}, "another number of drawn images")],
)
def test_results_that_do_not_compare_are_set_aside(
    changes, said, run, sd_pipeline, image_folder, flags, tmp_path, caplog
):
    """Spectra of another resolution would not even be of the same length."""
    again = cut_off(run, tmp_path)
    train(sd_pipeline, image_folder, again, resume_from_checkpoint="latest", **flags | changes)
    assert [result["step"] for result in found(again)["results"]] == [4]
    assert f"({said}" in caplog.text and "is moved to earlier-evaluation" in caplog.text
    earlier = json.loads((again / "earlier-evaluation/evaluation.json").read_text())
    assert [result["step"] for result in earlier["results"]] == [0, 2, 4, 6]


def test_real_images_may_be_moved(run, sd_pipeline, image_folder, flags, tmp_path):
    again, moved = cut_off(run, tmp_path), shutil.copytree(flags["eval_data_dir"], tmp_path / "moved")
    train(sd_pipeline, image_folder, again, resume_from_checkpoint="latest", **flags | {"eval_data_dir": moved})
    assert [result["step"] for result in found(again)["results"]] == [0, 2, 4]


def test_where_the_first_images_are_gone_the_last_are_shown(run, sd_pipeline, image_folder, flags, tmp_path):
    again = cut_off(run, tmp_path)
    shutil.rmtree(again / "evaluation/images/step-000000")
    train(sd_pipeline, image_folder, again, resume_from_checkpoint="latest", **flags)
    assert [result["step"] for result in found(again)["results"]] == [0, 2, 4]
    assert set(found(again)["spectrum"]["log_power"]) == {"run, step 4", "real images"}


def test_an_evaluation_that_is_given_up_is_made_up_for(run, sd_pipeline, image_folder, flags, tmp_path, monkeypatch):
    """The machine is taken away after the third image of step 2."""
    save, drawn = training.save_picture, []

    def taken_away(image, path):
        drawn.append(path)
        if path.parent.name == "step-000002" and path.name == "000002.png":
            os.kill(os.getpid(), signal.SIGTERM)
        return save(image, path)

    monkeypatch.setattr(training, "save_picture", taken_away)
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    assert left.value.code == EXIT_CODE and len(drawn) == 9 + 3
    assert [result["step"] for result in found(tmp_path / "run")["results"]] == [0]
    monkeypatch.undo()
    train(sd_pipeline, image_folder, tmp_path / "run", resume_from_checkpoint="latest", **flags)
    assert equal(tmp_path / "run", run)


def test_several_networks_are_told_apart(sd_pipeline, image_folder, flags, tmp_path):
    networks = [NETWORK, "tests.evaluation.test_command:grey"]
    flags = flags | {"eval_features": networks, "eval_metrics": ["kid"], "max_train_steps": 1}
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {name: value for record in records for name, value in record.items() if name.startswith("eval_kid")}
    last = found(folder)["results"][-1]["metrics"]
    assert logged == {f"eval_kid/{name}": last[name]["kid"]["value"] for name in networks}
    assert len(set(logged.values())) == 2


def test_too_few_readable_images_are_told_of_before_training(sd_pipeline, image_folder, flags, tmp_path):
    copied = shutil.copytree(flags["eval_data_dir"], tmp_path / "photos")
    for file in sorted(copied.glob("0*"))[:6]:
        file.write_text("no image")
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run", **flags | {"eval_data_dir": copied})
    assert "9 generated and 6 reference images" in left.value.code
    assert "(--eval_num_images) or fewer --eval_metrics" in left.value.code
    assert not (tmp_path / "run/evaluation").exists()


def test_a_network_that_fails_is_told_of_before_training(sd_pipeline, image_folder, flags, tmp_path):
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run", **flags | {"eval_features": [BROKEN]})
    assert f"--eval_features {BROKEN}: it fails on an image of 32 x 32 pixels" in left.value.code


@pytest.mark.parametrize("wrong", [{"eval_steps": -1}, {"eval_num_images": 2}, {"eval_features": ["no.such:network"]}])
def test_a_wrong_flag_is_told_of_as_other_flags_are(wrong, sd_pipeline, image_folder, flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, image_folder, tmp_path / "run", **flags | wrong)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said and f"--{next(iter(wrong))}" in said
    assert not (tmp_path / "run").exists()


def test_the_card_has_the_last_result(run):
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["frechet_distance"] == found(run)["results"][-1]["metrics"][NETWORK]["fid"]["value"]
    assert "## Results" in card.text and "evaluation/curves.png" in card.text and "real images" in card.text
    assert "- Warning: there are few images for fid" in card.text and "### Against the real images of `" in card.text


def test_the_command_puts_its_numbers_into_the_card(run, photos, tmp_path):  # noqa: F811
    before = ModelCard.load(run / "README.md")
    evaluation = evaluated([f"mine={run}"], photos, tmp_path, "--update_card", num_images=8)
    after = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in after.data.eval_results}
    assert values["frechet_distance"] == evaluation["results"][-1]["metrics"][NETWORK]["fid"]["value"]
    parts = (before.text.partition("## Results")[0], after.text.partition("## Results")[0])
    assert parts[0] == parts[1] and "## Train" in after.text.partition("## Results")[2]
    value = evaluation["results"][-1]["metrics"][NETWORK]["fid"]["value"]
    assert f"{value:.4g}" in after.text and after.text.count("## Results") == 1
    before.save(run / "README.md")


def test_the_card_keeps_what_was_measured_on_other_images(run, photos, image_folder, tmp_path):  # noqa: F811
    """The run's own result, on its reference, and that of another one; the same again takes its own place only."""
    before = ModelCard.load(run / "README.md")
    for number in (1, 2):
        evaluated([run], image_folder, tmp_path / str(number), "--update_card", num_images=8)
    after = ModelCard.load(run / "README.md")
    distances = {
        result.dataset_name: result.metric_value
        for result in after.data.eval_results
        if result.metric_type == "frechet_distance"
    }
    assert set(distances) == {photos.name, image_folder.name}
    own = {result.metric_type: result.metric_value for result in before.data.eval_results}
    assert distances[photos.name] == own["frechet_distance"]
    assert len(after.data.eval_results) == 2 * len(before.data.eval_results)
    for folder in (photos, image_folder):
        assert after.text.count(f"### Against the real images of `{folder.name}`") == 1
    before.save(run / "README.md")


def test_there_is_no_card_to_update(photos, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="--update_card"):
        evaluated([photos], photos, tmp_path, "--update_card")
