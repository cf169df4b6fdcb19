"""Several data sets as one: columns, rows and items, weights, what replaces a bad image, classes, kohya's folders."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from trainer import settings

from lpl.data.mixture import parts_of, with_prompt
from tests.data.test_dataset import RANDOM, load_data, loaded, over, static
from tests.data.test_source import refused


def folder_of(folder, *names, column="text", image="file_name", captions=None):
    """A folder of images with a metadata.jsonl, whose columns may have other names."""
    folder.mkdir(parents=True)
    lines = []
    for number, name in enumerate(names):
        static(seed=number).save(folder / name)
        lines.append(json.dumps({image: name, column: captions[number] if captions else f"{folder.name} {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def parquet_of(folder, *captions):
    """Images as bytes in parquet, in the columns picture and words."""
    dataset = Dataset.from_dict({"picture": [static(seed=9)] * len(captions), "words": list(captions)})
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.fixture
def two(tmp_path):
    """Three cats, twice each, and two pictures of another data set with other columns and half the weight."""
    cats = folder_of(tmp_path / "cats", "a.png", "b.png", "c.png")
    others = parquet_of(tmp_path / "others", "x", ["y"][0])
    return [
        {"train_data_dir": cats, "repeats": 2},
        {
            "dataset_name": others,
            "name": "others",
            "image_column": "picture",
            "caption_column": "words",
            "loss_weight": 0.5,
        },
    ]


def images_of(entries, tmp_path, num_classes=None, **changes):
    config = settings(datasets=entries, cache_dir=str(tmp_path / "cache"), **changes)
    dataset, held_out = load_data(config, num_classes)
    return over(dataset, config), held_out and over(held_out, config)


def test_items_are_rows_and_then_their_repeats(two, tmp_path):
    images, _ = images_of(two, tmp_path)
    assert (len(images), images.rows) == (8, 5)
    assert [images.row_of(item) for item in range(8)] == [0, 1, 2, 3, 4, 0, 1, 2]
    samples = [images[0, item] for item in range(8)]
    assert [sample["caption"] for sample in samples] == ["cats a.png", "cats b.png", "cats c.png", "x", "y"] + [
        f"cats {name}.png" for name in "abc"
    ]
    assert [float(sample["loss_weight"]) for sample in samples] == [1, 1, 1, 0.5, 0.5, 1, 1, 1]
    assert all(not torch.equal(samples[0][name], samples[5][name]) for name in RANDOM)  # a repeat has its own draws
    assert images.mixture.in_words() == [
        ("cats", "3 images x 2, loss weight 1"),
        ("others", "2 images, loss weight 0.5"),
    ]


def test_an_epoch_has_every_item_once(two, tmp_path):
    images, _ = images_of(two, tmp_path)
    batches = iter(images.batches(4, 0, 1, 0))
    keys = next(batches) + next(batches)
    assert sorted(keys) == [(0, item) for item in range(8)]
    assert Counter(images.row_of(item) for _, item in keys) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}


def test_a_list_of_one_data_set_is_that_data_set(tmp_path):
    folder = folder_of(tmp_path / "cats", "a.png", "b.png")
    listed, _ = images_of([{"train_data_dir": folder}], tmp_path)
    alone = loaded(tmp_path / "cats")
    for item in range(2):
        one, other = listed[1, item], alone[1, item]
        assert one.keys() == other.keys() and "loss_weight" not in one
        assert one["caption"] == other["caption"] and all(torch.equal(one[name], other[name]) for name in RANDOM)


def test_a_bad_image_is_replaced_within_its_data_set_and_named(two, tmp_path):
    (tmp_path / "cats" / "c.png").write_bytes(b"no picture")
    images, _ = images_of(two, tmp_path)
    for item in (2, 7):
        sample = images[0, item]
        assert sample["caption"] == "cats a.png" and [row for row, _ in sample["bad"]] == [2]
    assert images.file_names([2, 3]) == {2: "cats: c.png", 3: "others: row 3"}
    for name in "ab":
        (tmp_path / "cats" / f"{name}.png").write_bytes(b"no picture")
    assert images[0, 0]["caption"] == "x"  # nothing else is left


def test_data_sets_of_one_name_are_told_apart(tmp_path):
    folders = [folder_of(tmp_path / place / "cats", "a.png") for place in ("one", "two", "three")]
    names = ("cats", "cats (2)", "cats")
    entries = [{"train_data_dir": folder, "name": name} for folder, name in zip(folders, names)]
    images, _ = images_of(entries, tmp_path)
    assert images.file_names([0, 1, 2]) == {0: "cats: a.png", 1: "cats (2): a.png", 2: "cats (3): a.png"}


def test_data_sets_with_several_caption_columns_beside_others(two, tmp_path):
    """Each draws of its own columns, by its own shares; a list in one of them makes no difference."""
    rows = [{"file_name": f"{name}.png", "text": "words", "tags": ["tag", "other"]} for name in "abc"]
    (tmp_path / "cats" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    two[0]["caption_column"] = "text:0.5,tags:0.5"
    images, held_out = images_of(two, tmp_path, validation_every_nth=5, center_crop=True)
    captions = [{images[epoch, row]["caption"] for epoch in range(24)} for row in range(4)]
    assert captions == [{"words", "tag", "other"}] * 2 + [{"x"}, {"y"}]
    assert list(images.captions_at()) == [["words", "tag", "other"]] * 2 + [["x"], ["y"]]
    assert held_out[0, 0]["caption"] in ("words", "tag", "other")
    two[0]["caption_column"] = "tags:1,text:0"
    assert {images_of(two, tmp_path)[0][epoch, 0]["caption"] for epoch in range(9)} == {"tag", "other"}


def test_one_list_of_caption_columns_for_all_data_sets_with_their_own_prompts(tmp_path):
    captions = {"10_sks dog": {"text": "a", "tags": "b"}, "2_sks cat": {"text": "", "tags": " "}}
    for folder, columns in captions.items():
        folder_of(tmp_path / "kohya" / folder, "one.png")
        row = json.dumps({"file_name": "one.png", **columns})
        (tmp_path / "kohya" / folder / "metadata.jsonl").write_text(row)
    images = loaded(tmp_path / "kohya", caption_column="text,tags")
    assert {images[epoch, 0]["caption"] for epoch in range(9)} == {"a", "b"}
    assert {images[epoch, 1]["caption"] for epoch in range(9)} == {"sks cat"}


def test_data_sets_with_masks_beside_others_without(two, tmp_path):
    (tmp_path / "masks").mkdir()
    static().save(tmp_path / "masks" / "b.png")
    two[0]["mask_data_dir"] = str(tmp_path / "masks")
    images, _ = images_of(two, tmp_path, mask_column="mask")
    whole = [bool((images[0, row]["mask"] == 1).all()) for row in range(4)]
    assert whole == [True, False, True, True]
    del two[0]["mask_data_dir"]
    refused(lambda: images_of(two, tmp_path, mask_column="mask"), "there is no column 'mask'")


def test_numbers_of_images(two, tmp_path):
    two[0]["max_train_samples"] = 1
    images, _ = images_of(two, tmp_path)
    assert (len(images), images.rows) == (4, 3)
    images, _ = images_of(two, tmp_path, max_train_samples=2)  # of all data sets together
    assert images.rows == 2


def test_what_is_held_out_is_neither_repeated_nor_weighted(two, tmp_path):
    images, held_out = images_of(two, tmp_path, validation_every_nth=2)
    assert [held_out[0, item]["caption"] for item in range(len(held_out))] == ["cats a.png", "cats c.png", "y"]
    assert "loss_weight" not in held_out[0, 2] and images.rows == 2 and len(images) == 3


def test_each_data_set_may_hold_out_a_split(two, tmp_path):
    dataset = Dataset.from_dict({"picture": [static()], "words": ["held"]})
    dataset.to_parquet(tmp_path / "others" / "test.parquet")
    two[1]["validation_split"] = "test"
    images, held_out = images_of(two, tmp_path)
    assert images.rows == 5 and [held_out[0, item]["caption"] for item in range(len(held_out))] == ["held"]


def test_lists_of_captions_beside_single_ones(tmp_path):
    one = folder_of(tmp_path / "one", "a.png")
    lists = folder_of(tmp_path / "lists", "a.png", captions=[["p", "q"]])
    images, _ = images_of([{"train_data_dir": one}, {"train_data_dir": lists}], tmp_path)
    assert {images[epoch, 0]["caption"] for epoch in range(9)} == {"one a.png"}
    assert {images[epoch, 1]["caption"] for epoch in range(9)} == {"p", "q"}


def class_folder(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        static().save(folder / name / "0.png")
    return {"train_data_dir": str(folder)}


def test_a_class_has_one_label_in_all_data_sets(tmp_path):
    entries = [class_folder(tmp_path / "one", "cat", "dog"), class_folder(tmp_path / "two", "bird", "cat")]
    images, _ = images_of(entries, tmp_path, num_classes=10, caption_column="label")
    assert images.class_names == {0: "cat", 1: "dog", 2: "bird"}
    assert list(images.dataset["label"]) == [0, 1, 2, 0]
    refused(lambda: images_of(entries, tmp_path, num_classes=2, caption_column="label"), "3 classes", "bird")
    (tmp_path / "two" / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "label": 0}')
    refused(lambda: images_of(entries, tmp_path, num_classes=10, caption_column="label"), "'two'", "without names")


def test_an_error_names_its_data_set(two, tmp_path):
    two[1]["caption_column"] = "word"
    refused(lambda: images_of(two, tmp_path), "data set 'others'", "'word'", "did you mean --caption_column words?")


@pytest.mark.parametrize(
    "columns, captions",
    [
        ({"text": ["x", None]}, ["x", "a fox"]),
        ({"text": [["x"], None]}, [["x"], ["a fox"]]),
        ({}, ["a fox", "a fox"]),
        ({"text": ["x", "y"]}, ["x", "y"]),
    ],
)
def test_a_prompt_stands_for_missing_captions(columns, captions):
    dataset = Dataset.from_dict({"image": [1, 2]} | columns)
    assert list(with_prompt(dataset, ["text"], "a fox")["text"]) == captions
    assert with_prompt(dataset, ["text"], None) is dataset


def test_kohyas_folders_are_data_sets(tmp_path):
    for name, pictures in (("10_sks dog", 2), ("1_dog", 3)):
        (tmp_path / "img" / name).mkdir(parents=True)
        for number in range(pictures):
            static(seed=number).save(tmp_path / "img" / name / f"{number}.png")
            (tmp_path / "img" / name / f"{number}.txt").write_text(f"{name} {number}")
    images = loaded(tmp_path / "img")
    assert (len(images), images.rows) == (23, 5)
    assert images.mixture.in_words() == [("10_sks dog", "2 images x 10"), ("1_dog", "3 images")]
    data = settings(train_data_dir=str(tmp_path / "img")).data
    assert len(parts_of(data, class_conditional=True)) == 1  # there, they are classes
    (tmp_path / "img" / "01_cats").mkdir()
    static().save(tmp_path / "img" / "01_cats" / "0.png")
    assert len(parts_of(data, class_conditional=False)) == 1  # no number of repeats
