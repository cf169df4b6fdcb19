"""A checkpoint and a recipe that an earlier version wrote (commit e6be010, before the rooms) are read by this one.

`earlier/` is that run's folder without its result: LoRA of rank 2 with EMA on the tiny Stable Diffusion, 4 steps with
a checkpoint after 2. In `recipe.yaml` PIPELINE, IMAGES, OUTPUT and CACHE stand for its folders.
"""

import json
import shutil
from pathlib import Path

import pytest
from trainer import metrics, run


EARLIER = Path(__file__).with_name("earlier")


@pytest.fixture
def command(sd_pipeline, image_folder, tmp_path):
    """The words that run the earlier recipe, and the output folder."""
    text = (EARLIER / "recipe.yaml").read_text()
    places = {"PIPELINE": sd_pipeline, "IMAGES": image_folder, "OUTPUT": tmp_path / "run", "CACHE": tmp_path / "cache"}
    for name, place in places.items():
        text = text.replace(name, str(place))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return ["--config", str(recipe)], tmp_path / "run"


def expected(*steps):
    return [record for record in metrics(EARLIER) if record["step"] in steps]


def same(records, others):
    """Equal but for rounding, which differs between processors, and for numbers that were not logged then."""
    for record, other in zip(records, others, strict=True):
        assert {name: record[name] for name in other} == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_an_earlier_recipe_has_the_same_losses(command):
    words, folder = command
    run(words)
    same(metrics(folder), expected(1, 2, 3, 4))


def test_an_earlier_checkpoint_is_resumed_to_the_same_losses(command):
    words, folder = command
    folder.mkdir()
    shutil.copytree(EARLIER / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(words[1], folder / "recipe.yaml")
    log = [json.loads(line) for line in (EARLIER / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log if entry["step"] <= 2))
    run([*words, "--resume_from_checkpoint", "latest"])
    same(metrics(folder), expected(1, 2, 3, 4))
