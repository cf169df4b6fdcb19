"""--eval_steps: what a run measures of itself while it trains."""

import json

import pytest
from huggingface_hub import ModelCard
from test_evaluate import NETWORK, evaluated, photos  # noqa: F401
from trainer import train

from lpl.evaluation import Preprocessing, compare, folder_images, load_network, set_features


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
def run(sd_pipeline, image_folder, photos, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return train(sd_pipeline, image_folder, folder, max_train_steps=4, eval_data_dir=photos, **FLAGS)


def found(folder):
    return json.loads((folder / "evaluation/evaluation.json").read_text())


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


def test_a_resumed_run_goes_on_with_its_results(run, sd_pipeline, image_folder, photos, tmp_path):  # noqa: F811
    flags = FLAGS | {"eval_data_dir": photos}
    train(sd_pipeline, image_folder, tmp_path / "run", max_train_steps=2, **flags)
    train(sd_pipeline, image_folder, tmp_path / "run", max_train_steps=4, resume_from_checkpoint="latest", **flags)
    ours, theirs = (
        [(result["step"], result["metrics"]) for result in found(folder)["results"]]
        for folder in (tmp_path / "run", run)
    )
    assert ours == theirs


def test_the_card_has_the_last_result(run):
    card = ModelCard.load(run / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["frechet_distance"] == found(run)["results"][-1]["metrics"][NETWORK]["fid"]["value"]
    assert "## Results" in card.text and "evaluation/curves.png" in card.text and "real images" in card.text


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


def test_there_is_no_card_to_update(photos, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="--update_card"):
        evaluated([photos], photos, tmp_path, "--update_card")
