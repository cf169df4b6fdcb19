"""The list of data sets: what it takes, what it is refused with, which of it is public."""

import json
import os

import pytest
import yaml
from commands import refusal
from trainer import arguments, resolved

from lpl.config import recipes
from lpl.config.command_line import parse, recipe, words_of
from lpl.config.groups import Data
from lpl.config.rules import are_public
from lpl.publishing.public_recipe import left_to_give, local_sources, public_recipe


def words_with(tmp_path, pipeline, images, entries, **flags):
    """A command line with a recipe of these data sets."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"datasets": entries}))
    words = arguments(pipeline, images, tmp_path / "run", **flags, config=str(path))
    return [
        word for number, word in enumerate(words) if "--train_data_dir" not in words[max(0, number - 1) : number + 1]
    ]


def test_entries_keep_what_they_say_and_take_the_rest_from_beside(sd_pipeline, image_folder, tmp_path):
    entries = [
        {"train_data_dir": str(image_folder), "repeats": 3, "name": "mine"},
        {"dataset_name": "user/pictures", "caption_column": "words", "loss_weight": 0.5, "train_split": None},
    ]
    words = words_with(tmp_path, sd_pipeline, image_folder, entries, image_column="picture", max_train_samples=9)
    config = parse(words)
    one, two = config.data.parts
    assert (one.name, one.repeats, one.loss_weight, two.name, two.repeats, two.loss_weight) == (
        *("mine", 3, 1.0),
        *("user/pictures", 1, 0.5),
    )
    assert (one.data.image_column, one.data.caption_column, one.data.max_train_samples) == ("picture", "text", None)
    assert (two.data.train_data_dir, two.data.caption_column, two.data.train_split) == (None, "words", "train")
    again = parse([*words_of(config), "--output_dir", str(tmp_path / "run")])  # as JSON on the command line
    assert again.data == config.data
    (tmp_path / "again.yaml").write_text(recipes.recipe_text(recipe(config)))
    assert parse(["--config", str(tmp_path / "again.yaml")]).data == config.data


CATS = {"dataset_name": "user/cats"}
REFUSED = [
    ([{"train_data_dri": "x"}], {}, ("entry 1", "'train_data_dri'", "train_data_dir")),
    ([CATS, {"resolution": 512}], {}, ("entry 2", "'resolution'", "beside the list")),
    ([CATS | {"repeats": 0}], {}, ("repeats 0", "from 1 to 10,000")),
    ([CATS | {"repeats": 1.5}], {}, ("repeats takes a whole number, not 1.5",)),
    ([CATS | {"repeats": True}], {}, ("repeats takes a whole number, not True",)),
    ([CATS | {"loss_weight": -1}], {}, ("loss_weight -1", "0 or more")),
    ([CATS | {"loss_weight": float("nan")}], {}, ("loss_weight nan",)),
    ([CATS | {"name": 7}], {}, ("name takes a word", "not 7")),
    ([CATS | {"max_train_samples": 0}], {}, ("max_train_samples 0", "more than 0")),
    ([CATS | {"name": "a"}, CATS | {"name": "a"}], {}, ("a is the name of two entries",)),
    ([CATS, {"repeats": 2}], {}, ("entry 2", "names no data set", "train_data_dir")),
    ([CATS, {"train_data_dir": "nowhere"}], {}, ("data set 'nowhere'", "--train_data_dir nowhere")),
    ([CATS], {"dataset_name": "user/dogs"}, ("--dataset_name is for one data set", "leave one of them out")),
    ([CATS], {"streaming": True, "max_train_steps": 1}, ("--streaming reads one data set",)),
    ([CATS | {"validation_split": "x"}], {"validation_every_nth": 2}, ("--validation_every_nth", "exclude")),
    ([7], {}, ("each data set is a mapping",)),
]


@pytest.mark.parametrize("entries, flags, said", REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_meant_is_refused(entries, flags, said, sd_pipeline, image_folder, tmp_path, capsys):
    message = refusal(capsys, words_with(tmp_path, sd_pipeline, image_folder, entries, **flags))
    assert all(part in message for part in said), message


def test_a_folder_that_is_missing_its_captions_is_named(sd_pipeline, image_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.png").write_bytes((image_folder / next(image_folder.glob("*.png")).name).read_bytes())
    entries = [{"train_data_dir": str(image_folder)}, {"train_data_dir": str(bare)}]
    with pytest.raises(ValueError, match="data set 'bare': .*there are no captions"):
        resolved(words_with(tmp_path, sd_pipeline, image_folder, entries))


def test_a_list_is_public_if_all_of_it_is_on_the_hub(image_folder):
    public, local = [CATS | {"repeats": 2}], [CATS, {"train_data_dir": str(image_folder), "repeats": 2}]
    assert are_public(public, {}) and not are_public(local, {}) and not are_public([{"repeats": 1}], {})
    assert public_recipe({"datasets": public}) == {"datasets": public} and public_recipe({"datasets": local}) == {}
    given = [json.loads(word) for word in left_to_give({"datasets": local})["datasets"]]
    place = f"path/to/{image_folder.name}"
    assert given == [CATS, {"train_data_dir": place, "repeats": 2}] and local_sources({"datasets": local}) == [place]


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_a_folder_of_ones_home(flag):
    (part,) = Data(datasets=({flag: "~/cats"},)).parts
    assert getattr(part.data, flag) == os.path.expanduser("~/cats")


def test_one_data_set_is_a_part_by_itself():
    (part,) = Data(train_data_dir="cats").parts
    assert part.data == Data(train_data_dir="cats") and (part.name, part.repeats, part.loss_weight) == ("cats", 1, 1)
