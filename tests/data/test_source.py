"""Loading: columns and class labels are checked, samples are limited, every nth is held out."""

from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from trainer import settings

from lpl.data.source import check_columns, load_split, load_training_images
from lpl.data.streaming import load_streamed_images
from tests.data.test_dataset import folder_of, load_data, loaded, over, static
from tests.data.test_streaming import encoded, streamed


def labelled(labels, feature):
    features = Features({"image": ImageFeature(), "label": feature})
    return Dataset.from_dict({"image": [static() for _ in labels], "label": labels}, features)


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"image_column": "picture"}, ("'picture'", "--image_column", "image, text")),
        ({"caption_column": "caption"}, ("'caption'", "image, text", "did you mean --caption_column text?")),
        ({"caption_column": "image"}, ("'image'", "--caption_column", "strings")),
        ({"image_column": "text"}, ("'text'", "--image_column", "no images")),
    ],
)
def test_wrong_columns_are_named(tmp_path, flags, words):
    folder = folder_of(tmp_path / "data", {"a.png": static(), "b.png": static()})
    refused(lambda: loaded(folder, **flags), str(folder), *words)


def test_of_several_columns_the_missing_one_is_named(tmp_path):
    folder = folder_of(tmp_path / "data", {"a.png": static()})
    refused(lambda: loaded(folder, caption_column="text:1,txt:2"), "no column 'txt' (--caption_column)", "image, text")
    refused(lambda: loaded(folder, caption_column="text,image"), "'image'", "--caption_column", "strings")


def test_a_folder_without_captions(tmp_path):
    folder = folder_of(tmp_path / "data", {"a.png": static()}, captions=False)
    refused(lambda: loaded(folder), str(folder), "'text'", "--caption_column", "metadata.jsonl", "file_name")


def test_an_unknown_data_set(tmp_path):
    config = settings(dataset_name="nobody/nothing", cache_dir=str(tmp_path))
    refused(lambda: load_data(config), "--dataset_name nobody/nothing", "cannot be loaded")


@pytest.mark.parametrize("captions", [[1, 2], [None, None], [[1], [2]]])
def test_captions_of_the_wrong_kind(captions):
    dataset = Dataset.from_dict({"image": [static(), static()], "text": captions})
    dataset = dataset.cast_column("image", ImageFeature())
    refused(lambda: check_columns(dataset, "image", "text", "--dataset_name x"), "'text'", "--caption_column")


def test_a_caption_column_without_captions(tmp_path):
    """It has no type; the prompt stands for all of them, as where there is no column."""
    folder = folder_of(tmp_path / "data", {"a.png": static()})
    (folder / "metadata.csv").write_text("file_name,text,tags\na.png,,x\n")
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    assert loaded(folder, instance_prompt="a fox")[0, 0]["caption"] == "a fox"
    assert loaded(folder, caption_column="text,tags")[0, 0]["caption"] == "x"
    refused(lambda: loaded(folder), "'text'", "but its first value is None")


def test_an_empty_data_set():
    features = Features({"image": ImageFeature(), "text": Value("string")})
    dataset = Dataset.from_dict({"image": [], "text": []}, features)
    refused(lambda: check_columns(dataset, "image", "text", "--dataset_name x"), "--dataset_name x", "no images")


def test_max_train_samples_are_drawn_by_the_seed(tmp_path):
    folder = folder_of(tmp_path / "data", {f"{number}.png": static(8, 8) for number in range(6)})
    drawn = [sorted(loaded(folder, max_train_samples=3, seed=seed).dataset["text"]) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 3 and drawn[0] == drawn[1] != drawn[2]
    assert len(loaded(folder, max_train_samples=99)) == 6


@pytest.mark.parametrize(
    "labels, feature, words",
    [
        ([0, 1], Value("string"), ("class labels", "--caption_column")),
        ([0, 10], Value("int64"), ("0 to 9", "0 to 10")),
        ([-1, 1], Value("int64"), ("0 to 9", "-1 to 1")),
    ],
)
def test_labels_that_the_model_does_not_have(labels, feature, words):
    dataset = labelled(list(map(str, labels)) if feature.dtype == "string" else labels, feature)
    refused(lambda: check_columns(dataset, "image", "label", "--dataset_name x", 10), "'label'", *words)


def test_a_folder_without_classes(tmp_path):
    folder = folder_of(tmp_path / "data", {"a.png": static()})
    config = settings(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), caption_column="label")
    refused(lambda: load_data(config, 10), "'label'", "sub-folders")


def test_every_nth_sample_is_held_out(tmp_path):
    folder = folder_of(tmp_path / "data", {f"{number}.png": static(8, 8) for number in range(7)})
    config = settings(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), validation_every_nth=3)
    dataset, held_out = load_data(config)
    assert held_out["text"] == ["0.png", "3.png", "6.png"] and dataset["text"] == ["1.png", "2.png", "4.png", "5.png"]
    assert load_data(config.changed(num_validation_samples=2))[1]["text"] == ["0.png", "3.png"]


# Data sets that load_dataset reads -----------------------------------------------------------------------------------


def of_name(folder, tmp_path, **flags):
    return load_data(settings(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), **flags))


def test_splits(tmp_path):
    """A folder of two splits, and the same written by save_to_disk."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("test", "validation"):
        folder_of(folder / split, {f"{split}.png": static()})
    saved = DatasetDict({split: of_name(folder, tmp_path, train_split=split)[0] for split in ("test", "validation")})
    saved.save_to_disk(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        dataset, held_out = of_name(place, tmp_path, train_split="test", validation_split="validation")
        assert (dataset["text"], held_out["text"]) == (["test.png"], ["validation.png"])
        for flags, flag in (
            ({}, "--train_split"),
            ({"train_split": "test", "validation_split": "dev"}, "--validation"),
        ):
            refused(partial(of_name, place, tmp_path, **flags), f"--dataset_name {place}", flag, "validation", "test")


def test_a_data_set_of_save_to_disk(tmp_path):
    rows = Dataset.from_dict({"image": [static()], "text": ["a"]}).cast_column("image", ImageFeature())
    rows.save_to_disk(tmp_path / "saved")
    config = settings(dataset_name=str(tmp_path / "saved"))
    assert over(load_data(config)[0], config)[0, 0]["caption"] == "a"
    data = settings(dataset_name=str(tmp_path / "saved"), streaming=True).data
    refused(lambda: load_split(data, "train", None), "save_to_disk", "without --streaming")


@pytest.mark.parametrize("binary", [pyarrow.binary(), pyarrow.large_binary()], ids=["pandas", "polars"])
@pytest.mark.parametrize("as_struct", [False, True])
def test_images_that_other_programs_wrote_to_parquet(as_struct, binary, tmp_path):
    (tmp_path / "data").mkdir()
    struct = pyarrow.struct({"bytes": binary, "path": pyarrow.string()})
    image, kind = ({"bytes": encoded(0), "path": None}, struct) if as_struct else (encoded(0), binary)
    table = pyarrow.table({"image": pyarrow.array([image], kind), "text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "data/a.parquet")
    config = settings(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert over(load_data(config)[0], config)[0, 0]["bad"] == []
    images, _ = streamed(tmp_path / "data")
    images.check()
    assert images.last_resort


def test_links_in_a_data_set_are_named(tmp_path, caplog):
    folder = folder_of(tmp_path / "data", {"a.png": static()})
    (folder / "more").symlink_to(folder_of(tmp_path / "more", {"b.png": static()}))
    assert len(of_name(folder, tmp_path)[0]) == 1 and "more is not read (a link to" in caplog.text


# Class labels of a run that is resumed -------------------------------------------------------------------------------


def classes_of(folder, names, earlier=(), num_classes=10):
    """(names by label, labels of the images) of a folder with one image in each class."""
    for name in names:
        (folder / name).mkdir(parents=True)
        static(8, 8).save(folder / name / "a.png")
    config = settings(train_data_dir=str(folder), cache_dir=str(folder.with_name("cache")), caption_column="label")
    dataset, _ = load_training_images(config.data, 0, config.model.cache_dir, num_classes, earlier)
    return dataset.features["label"].names, dataset["label"]


@pytest.mark.parametrize(
    "names, labels",
    [
        (["cats", "dogs"], [0, 1]),
        (["birds", "cats", "dogs"], [2, 0, 1]),  # a new class comes first by its name
        (["dogs", "eels"], [1, 2]),  # one is gone
        (["Cats", "dogs"], [2, 1]),
    ],
)
def test_classes_keep_the_labels_of_the_checkpoint(names, labels, tmp_path):
    found, numbers = classes_of(tmp_path / "data", names, ["cats", "dogs"])
    assert numbers == labels and [found[label] for label in labels] == names and found[:2] == ["cats", "dogs"]


def test_more_classes_than_the_model_has_are_refused(tmp_path):
    words = ("other class labels (0 cats, 1 dogs)", "now (0 birds, 1 cats)", "restore the data")
    refused(lambda: classes_of(tmp_path / "data", ["birds", "cats"], ["cats", "dogs"], num_classes=2), *words)


def test_labels_that_have_lost_their_names_are_refused(tmp_path):
    folder = folder_of(tmp_path / "data", {"a.png": static(8, 8)})
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 0}')
    refused(lambda: classes_of(folder, [], ["cats"]), "0 cats", "numbers without names")


def test_labels_of_a_stream_cannot_be_changed(tmp_path):
    labelled([0, 1], ClassLabel(names=["birds", "cats"])).to_parquet(tmp_path / "data" / "0.parquet")
    config = settings(train_data_dir=str(tmp_path / "data"), caption_column="label", streaming=True)
    load_streamed_images(config.data, 0, None, 10, ["birds"])
    refused(lambda: load_streamed_images(config.data, 0, None, 10, ["cats", "dogs"]), "0 cats, 1 dogs", "0 birds")
