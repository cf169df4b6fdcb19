"""Folders under either flag, paths of images as text, captions inside a json."""

import io
import json
import tarfile

import pytest
from datasets import Dataset, DatasetDict
from trainer import settings

from lpl.data.places import as_read
from lpl.data.streaming import load_streamed_images
from tests.data.test_dataset import load_data, loaded, over, static
from tests.data.test_source import refused


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def with_texts(folder):
    """Two images with text files."""
    for name in "ab":
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        static().save(folder / "sub" / f"{name}.png")
        (folder / "sub" / f"{name}.txt").write_text(name)


def saved(folder):
    Dataset.from_dict({"image": [static()] * 2, "text": ["a", "b"]}).save_to_disk(folder)


def saved_dict(folder):
    rows = Dataset.from_dict({"image": [static()] * 2, "text": ["a", "b"]})
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)


def parquet(folder):
    folder.mkdir()
    Dataset.from_dict({"image": [encoded(static())] * 2, "text": ["a", "b"]}).to_parquet(folder / "train.parquet")


def paths(folder):
    """Parquet that names images by their place in the folder."""
    (folder / "images").mkdir(parents=True)
    for name in "ab":
        static().save(folder / "images" / f"{name}.png")
    rows = {"image": ["images/a.png", "images/b.png"], "text": ["a", "b"]}
    Dataset.from_dict(rows).to_parquet(folder / "train.parquet")


def shards(folder):
    """WebDataset, its captions in .json files."""
    folder.mkdir()
    with tarfile.open(folder / "000.tar", "w") as archive:
        for name in "ab":
            texts = json.dumps({"caption": name, "again": f"again {name}"})
            for suffix, content in (("png", encoded(static())), ("json", texts.encode())):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


IN_SHARDS = {"image_column": "png", "caption_column": "json.caption"}


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("make", [with_texts, saved, saved_dict, parquet, paths, shards])
def test_either_flag_reads_a_folder(make, flag, tmp_path):
    make(tmp_path / "data")
    columns = IN_SHARDS if make is shards else {}
    config = settings(**{flag: str(tmp_path / "data")}, cache_dir=str(tmp_path / "cache"), **columns)
    images = over(load_data(config)[0], config)
    samples = [images[0, index] for index in range(2)]
    assert [sample["caption"] for sample in samples] == ["a", "b"] and not samples[0]["bad"]


@pytest.mark.parametrize("make", [parquet, paths, shards])
def test_streams_read_paths_and_captions_in_json_too(make, tmp_path):
    make(tmp_path / "data")
    columns = IN_SHARDS if make is shards else {}
    config = settings(train_data_dir=str(tmp_path / "data"), streaming=True, max_train_samples=2, **columns)
    images = over(load_streamed_images(config.data, 0, None)[0], config)
    assert [images[0, index]["caption"] for index in range(2)] == ["a", "b"]


def test_paths_that_lead_out_of_the_folder_are_not_opened(tmp_path):
    paths(tmp_path / "data")
    static().save(tmp_path / "secret.png")
    rows = {"image": ["../secret.png", str(tmp_path / "secret.png"), "https://host/x.png"], "text": ["a", "b", "c"]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    config = settings(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    refused(lambda: over(load_data(config)[0], config)[0, 0], "is not in the data set's folder")


@pytest.mark.parametrize(
    "name, content", [("state.json", "{}"), ("dataset_dict.json", '{"a": 1}'), ("dataset_dict.json", "")]
)
def test_files_of_other_programs_do_not_make_a_saved_data_set(name, content, tmp_path):
    with_texts(tmp_path)
    (tmp_path / name).write_text(content)
    assert len(loaded(tmp_path)) == 2


def test_a_whole_json_is_no_caption(tmp_path):
    shards(tmp_path / "data")
    config = settings(dataset_name=str(tmp_path / "data"), image_column="png", caption_column="json")
    refused(lambda: load_data(config), "strings", "did you mean --caption_column json.caption?")


def test_several_keys_of_a_json_with_shares(tmp_path):
    shards(tmp_path / "data")
    columns = {"image_column": "png", "caption_column": "json.caption:0.5,json.again:0.5"}
    config = settings(dataset_name=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), **columns)
    images = over(load_data(config)[0], config)
    captions = {images[epoch, index]["caption"] for epoch in range(10) for index in range(2)}
    assert captions == {"a", "b", "again a", "again b"}


def test_a_split_of_a_folder_is_left_to_the_library(tmp_path):
    with_texts(tmp_path / "data")
    data = settings(dataset_name=str(tmp_path / "data"), validation_split="test").data
    assert as_read(data) is data
    labelled = settings(dataset_name=str(tmp_path / "data")).data
    assert as_read(labelled, class_conditional=True) is labelled and as_read(labelled).folder == labelled.dataset_name
