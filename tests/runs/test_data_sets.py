"""Whole runs on several data sets at once."""

import json

import pytest
import yaml
from datasets import Dataset
from PIL import Image
from trainer import arguments, metrics, run, same, weights

from lpl.publishing.public_recipe import left_to_give, publish_recipe


@pytest.fixture
def entries(image_folder, tmp_path):
    """The images of a folder, twice each, and class images in parquet with other columns and less weight."""
    pictures = [Image.open(file) for file in sorted(image_folder.glob("*.png"))[:3]]
    (tmp_path / "class").mkdir()
    rows = {"picture": pictures, "words": ["a fox"] * 3}
    Dataset.from_dict(rows).to_parquet(tmp_path / "class" / "train.parquet")
    ours = {"train_data_dir": str(image_folder), "repeats": 2, "name": "foxes"}
    columns = {"image_column": "picture", "caption_column": "words"}
    return [ours, {"dataset_name": str(tmp_path / "class"), **columns, "loss_weight": 0.25}]


def test_a_published_recipe_of_several_data_sets_repeats_the_run(entries, sd_pipeline, image_folder, tmp_path, caplog):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"datasets": entries}))
    words = arguments(sd_pipeline, image_folder, tmp_path / "first", seed=None, checkpointing_steps=2)
    place = words.index("--train_data_dir")
    run([*words[:place], *words[place + 2 :], "--config", str(path)])
    recipe = tmp_path / "first" / "recipe.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert (
        values["datasets"] == entries
        and values["measured"]["data"]["images"] == len(Dataset.from_json(str(image_folder / "metadata.jsonl"))) + 3
    )
    publish_recipe(recipe, tmp_path / "public.yaml")
    assert "datasets:" not in (tmp_path / "public.yaml").read_text()  # they are not on the Hub
    assert list(left_to_give(values)) == ["pretrained_model_name_or_path", "datasets"]
    given = ["--datasets", *map(json.dumps, entries), "--pretrained_model_name_or_path", str(sd_pipeline)]
    caplog.clear()
    run(["--config", str(tmp_path / "public.yaml"), *given, "--output_dir", str(tmp_path / "again")])
    assert metrics(tmp_path / "again") == metrics(tmp_path / "first")
    assert same(weights(tmp_path / "again"), weights(tmp_path / "first"))
    assert "images instead of" not in caplog.text and "other images" not in caplog.text
    # Another list is warned of when the run is resumed.
    entries[1]["loss_weight"] = 0
    given = ["--datasets", *map(json.dumps, entries), "--pretrained_model_name_or_path", str(sd_pipeline)]
    resumed = ["--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path / "again"), "--max_train_steps", "6"]
    run(["--config", str(tmp_path / "public.yaml"), *given, *resumed])
    assert "--datasets" in caplog.text and "the new value holds from here on" in caplog.text


def test_the_loss_is_that_of_the_weighted_samples(entries, sd_pipeline, image_folder, tmp_path):
    losses = []
    for weight in (1.0, 0.5):
        for entry in entries:
            entry["loss_weight"] = weight
        words = arguments(sd_pipeline, image_folder, tmp_path / str(weight), max_train_steps=1, lpl_weight=1)
        place = words.index("--train_data_dir")
        run([*words[:place], *words[place + 2 :], "--datasets", *map(json.dumps, entries)])
        losses.append(metrics(tmp_path / str(weight), "diffusion_loss", "lpl")[0])
    assert losses[1] == pytest.approx([value / 2 for value in losses[0]], rel=1e-6) and losses[0][1] > 0
