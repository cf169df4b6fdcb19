"""What the fingerprint of a data set sees, what it does not see, and what it is not put off by."""

import hashlib
import json
import os
import shutil

import pytest
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from trainer import settings

from lpl.data import fingerprint as module
from lpl.data import reading
from lpl.data.captions import columns_of
from lpl.data.catalogue import digest_of
from lpl.data.fingerprint import fingerprint, other_data, shard_paths
from lpl.data.source import data_folders, load_training_images
from lpl.data.streaming import load_streamed_images
from tests.data.test_streaming import KINDS, encoded, write, write_shard


CAPTIONS = ["a fox", "two foxes", "", "ein Fuchs", "a fox", "no fox"]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "foxes", [encoded(number) for number in range(6)], CAPTIONS)


def write_folder(folder, images, captions):
    """A folder of images with those bytes and captions."""
    folder.mkdir(parents=True)
    for number, content in enumerate(images):
        (folder / f"{number}.png").write_bytes(content)
    lines = [json.dumps({"file_name": f"{n}.png", "text": caption}) for n, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def of_folder(folder, **changes):
    """The fingerprint of what would be trained on; nothing is taken from a cache."""
    config = settings(train_data_dir=str(folder), cache_dir=str(folder.with_name("cache")), **changes)
    data, cache_dir = config.data, config.model.cache_dir
    load = load_streamed_images if data.streaming else load_training_images
    dataset, _ = load(data, config.optimization.seed, cache_dir)
    shutil.rmtree(folder.with_name("cache"), ignore_errors=True)
    columns = columns_of(data, dataset.column_names)
    return fingerprint(dataset, data.image_column, columns, data_folders(data, cache_dir))


def of_rows(images, captions=None):
    """The fingerprint of a data set that holds its images' bytes; None is a row without one."""
    rows = [content if isinstance(content, dict) else {"bytes": content, "path": None} for content in images]
    columns = {"image": rows, "text": captions or [str(number) for number in range(len(images))]}
    return fingerprint(Dataset.from_dict(columns).cast_column("image", ImageFeature(decode=False)), "image", ["text"])


# The same ------------------------------------------------------------------------------------------------------------


def test_what_the_fingerprint_is():
    """Whoever changes it breaks the comparison with all recipes that are published."""
    images = [hashlib.sha256(content).hexdigest() for content in (b"one", b"two")]
    lines = ['["loaded", 3]', '"a"', r'"\u00fc"', "null", *(f'"{image}"' for image in images), '"missing"']
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert of_rows([b"one", b"two", None], ["a", "ü", None]) == f"sha256:{expected}"


def test_where_and_under_which_names_the_files_lie_does_not_count(folder, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    for file in [*moved.glob("*.png")]:
        file.rename(file.with_name(f"picture-{file.name}"))
    metadata = moved / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"file_name": "', '"file_name": "picture-'))
    os.utime(moved / "picture-0.png", (0, 0))
    assert of_folder(moved) == of_folder(folder)


def test_how_the_data_is_loaded_does_not_count(folder, tmp_path):
    (tmp_path / "parquet").mkdir()
    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    embedded = dataset.with_format("arrow").map(embed_table_storage, batched=True)  # as push_to_hub does
    embedded.with_format(None).to_parquet(tmp_path / "parquet/0.parquet")
    data = settings(dataset_name=str(tmp_path / "parquet")).data
    loaded, _ = load_training_images(data, 0, str(tmp_path / "cache"))
    assert loaded[0]["image"]["bytes"] == (folder / "0.png").read_bytes()
    assert fingerprint(loaded, "image", ["text"]) == of_folder(folder)
    decoded = loaded.cast_column("image", ImageFeature())
    assert fingerprint(decoded, "image", ["text"]) == of_folder(folder)
    assert fingerprint(loaded.select(range(6)), "image", ["text"]) == of_folder(folder)


def test_other_columns_do_not_count(folder):
    dataset = Dataset.from_dict({"image": [b"x"], "text": ["a"], "else": [1]})
    assert fingerprint(dataset, "image", ["text"]) == fingerprint(dataset.remove_columns("else"), "image", ["text"])


# Another -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, captions",
    [
        ([b"one", b"twO", b"three"], "abc"),  # a byte
        ([b"one", b"two", b"three"], "abC"),  # a caption
        ([b"one", b"two"], "ab"),  # one less
        ([b"one", b"two", b"three", b"three"], "abcc"),  # one more
        ([b"two", b"one", b"three"], "bac"),  # the order
        ([b"two", b"one", b"three"], "abc"),  # which caption is whose
        ([b"one", b"two", None], "abc"),  # a file that is missing
        ([b"onet", b"wo", b"three"], "abc"),  # nothing runs into what comes next
        ([b"one", b"two", b"three"], ["a", 'b"\n"c', ""]),
    ],
)
def test_it_sees_every_change(images, captions):
    assert of_rows(images, list(captions)) != of_rows([b"one", b"two", b"three"], list("abc"))


def test_captions_may_be_lists_or_labels():
    images = [b"one", b"two"]
    found = [of_rows(images, captions) for captions in ([["a", "b"], ["c"]], [["a"], ["b", "c"]], [0, 1], [1, 0])]
    found += [of_rows(images, ["0", "1"]), of_rows(images, ["0", None])]
    assert len(set(found)) == len(found)


def test_it_is_of_what_is_trained_on(folder):
    found = {of_folder(folder), of_folder(folder, max_train_samples=4), of_folder(folder, validation_every_nth=3)}
    assert len(found | {of_folder(folder, max_train_samples=4, seed=1)}) == 4


# Large data sets -----------------------------------------------------------------------------------------------------


def test_of_many_images_so_many_are_read_and_all_captions(monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 4)
    images, captions = [bytes([number]) for number in range(10)], list("abcdefghij")
    whole = of_rows(images, captions)
    seen = [of_rows([*images[:n], b"other", *images[n + 1 :]], captions) != whole for n in range(10)]
    assert [place for place, changed in enumerate(seen) if changed] == [0, 3, 6, 9]
    assert all(of_rows(images, [*captions[:n], "other", *captions[n + 1 :]]) != whole for n in range(10))
    assert of_rows(images[:9], captions[:9]) != whole


def test_no_more_files_are_opened_than_it_says(monkeypatch):
    opened = []
    monkeypatch.setattr(module, "image_digest", lambda image, folders: opened.append(image["bytes"]) or "digest")
    of_rows([str(number).encode() for number in range(2000)])
    assert len(opened) == module.IMAGES == 512 and {b"0", b"1999"} < set(opened)


# Bad files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_or_no_image_counts_as_such(folder):
    whole = of_folder(folder)
    (folder / "3.png").write_bytes(b"no image")
    bad = of_folder(folder)
    dataset, _ = load_training_images(settings(train_data_dir=str(folder)).data, 0, str(folder.with_name("cache")))
    (folder / "3.png").unlink()
    missing = fingerprint(dataset, "image", ["text"], [str(folder)])
    (folder / "3.png").mkdir()
    assert len({whole, bad, missing}) == 3
    assert fingerprint(dataset, "image", ["text"], [str(folder)]) == missing


def test_nothing_outside_of_the_data_set_is_read(tmp_path, monkeypatch):
    (tmp_path / "mine").write_bytes(b"my own")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "data/pipe")  # whoever opens it waits for ever
    for path in ("mine", "data/../mine", "data/link", "data/pipe", "data/none"):
        image = {"bytes": None, "path": str(tmp_path / path)}
        assert module.image_digest(image, [str(tmp_path / "data")]) == module.MISSING, path
    assert module.image_digest({"bytes": None, "path": str(tmp_path / "mine")}, [str(tmp_path)]) != module.MISSING
    for image in (None, {}, {"path": "http://127.0.0.1:1/x"}, {"path": "hf://datasets/someone/else@main/x"}):
        assert module.image_digest(image, ["hf://datasets/user/data"]) == module.MISSING


@pytest.mark.parametrize("of", [lambda image: module.image_digest(image, [image["path"]]), digest_of])
def test_a_huge_file_is_read_to_a_bound(of, tmp_path, monkeypatch):
    part = reading.PART
    monkeypatch.setattr(reading, "LARGEST_FILE", 4 * part)
    digests = []
    for name, size in (("huge", 40 * part), ("large", 4 * part)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
        digests.append(of({"bytes": None, "path": str(tmp_path / name)}))
    assert digests == [hashlib.sha256(bytes(4 * part)).hexdigest()] * 2


# Streamed data sets --------------------------------------------------------------------------------------------------


def streamed(folder, kind="parquet"):
    image, caption = KINDS[kind]
    return of_folder(folder, streaming=True, image_column=image, caption_column=caption)


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_data_set_is_known_by_its_shards_and_first_rows(kind, tmp_path):
    lengths = (20, 3, 4)
    whole = streamed(write(tmp_path / "whole", lengths, kind), kind)
    assert streamed(write(tmp_path / "elsewhere", lengths, kind), kind) == whole
    renamed, first, fewer, behind = (write(tmp_path / name, lengths, kind) for name in ("a", "b", "c", "d"))
    (renamed / f"001.{kind}").rename(renamed / f"0010.{kind}")
    (fewer / f"002.{kind}").unlink()
    rows = [(encoded(row), "changed" if row == 15 else f"0-{row}") for row in range(20)]
    write_shard(first / f"000.{kind}", rows)
    rows = [(encoded(row), "changed" if row == 16 else f"0-{row}") for row in range(20)]
    write_shard(behind / f"000.{kind}", rows)
    found = [streamed(folder, kind) for folder in (renamed, first, fewer)]
    assert len({whole, *found}) == 4
    assert streamed(behind, kind) == whole  # as the module says


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_still_tells_the_shards(kind, tmp_path):
    folder = write(tmp_path / "data", (1, 2), kind)
    image, caption = KINDS[kind]
    config = settings(streaming=True, train_data_dir=str(folder), image_column=image, caption_column=caption)
    dataset, _ = load_streamed_images(config.data, 0, None)
    assert shard_paths(dataset) == [str(folder / f"00{number}.{kind}") for number in range(2)]
    assert shard_paths(None) == []


def test_a_broken_shard_has_a_fingerprint_too(tmp_path):
    whole = streamed(write(tmp_path / "whole", (3, 1), "tar"), "tar")
    broken = write(tmp_path / "broken", (3, 1), "tar")
    data = settings(streaming=True, train_data_dir=str(broken), image_column="jpg", caption_column="txt").data
    dataset, _ = load_streamed_images(data, 0, None)
    (broken / "000.tar").write_bytes((broken / "000.tar").read_bytes()[:2000])
    found = fingerprint(dataset, "jpg", ["txt"], data_folders(data, None))
    assert found.startswith("sha256:") and found != whole


def test_what_is_fetched_of_a_stream_is_a_data_set_as_any(tmp_path):
    folder = write(tmp_path / "data", (4,))
    some, others = (of_folder(folder, streaming=True, max_train_samples=count) for count in (3, 2))
    assert some != others != streamed(folder)
    assert some == of_rows([encoded(row) for row in range(3)], [f"0-{row}" for row in range(3)])


def test_other_repeats_are_other_data():
    before = {"fingerprint": "sha256:0", "images": 2}
    assert other_data(before, before) is None and other_data({}, before) is None
    repeated = before | {"samples": 11}
    assert other_data(before, repeated) == "other repeats, 11 samples an epoch instead of 2"
    assert other_data(repeated, repeated) is None
