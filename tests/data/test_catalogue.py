"""The index of images: each is opened once, and never again unless it changes; nothing stale is believed."""

import hashlib
import io
import os
import time

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from lpl.data import catalogue, index
from lpl.data.catalogue import Catalogue, upright_size


OLD = time.time() - 3600


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of three pictures that changed long ago, as far as the index can tell."""
    place = tmp_path / "images"
    place.mkdir()
    for number in range(3):
        Image.new("RGB", (40 + number, 30)).save(place / f"{number}.png")
    monkeypatch.setattr(index, "RACY", -(10**12))  # ctime cannot be set
    return place


def listed(place, names=None):
    paths = [str(place / name) for name in names or sorted(os.listdir(place))]
    return Dataset.from_dict({"image": paths}).cast_column("image", ImageFeature(decode=False))


def looked_up(place, tmp_path, **options):
    return Catalogue.of(listed(place), "image", [str(place)], tmp_path / "cache", **options)


@pytest.fixture
def opened(monkeypatch):
    """The images that were opened."""
    found, look = [], catalogue._looked_at

    def counted(image, *args):
        found.append(image["path"] and os.path.basename(image["path"]))
        return look(image, *args)

    monkeypatch.setattr(catalogue, "_looked_at", counted)
    return found


def test_each_image_is_opened_once(folder, tmp_path, opened):
    first = looked_up(folder, tmp_path)
    assert first.sizes.tolist() == [[30, 40], [30, 41], [30, 42]] and sorted(opened) == ["0.png", "1.png", "2.png"]
    assert looked_up(folder, tmp_path).sizes.tolist() == first.sizes.tolist() and len(opened) == 3


def test_a_changed_image_alone_is_read_anew(folder, tmp_path, opened):
    looked_up(folder, tmp_path)
    before = os.stat(folder / "1.png")
    Image.new("RGB", (99, 77)).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # hides the change; ctime shows it
    opened.clear()
    assert looked_up(folder, tmp_path).sizes.tolist()[1] == [77, 99] and opened == ["1.png"]


def test_a_file_that_has_just_changed_is_not_indexed(folder, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(index, "RACY", 2 * 10**9)
    looked_up(folder, tmp_path)
    looked_up(folder, tmp_path)
    assert len(opened) == 6


def test_digests_are_those_of_the_files_and_are_added_to_sizes(folder, tmp_path, opened):
    looked_up(folder, tmp_path)
    found = looked_up(folder, tmp_path, digests=True)
    assert found.digests == [hashlib.sha256((folder / f"{n}.png").read_bytes()).hexdigest() for n in range(3)]
    assert looked_up(folder, tmp_path, digests=True).digests == found.digests and len(opened) == 6


def test_broken_and_missing_files_have_no_size(folder, tmp_path):
    (folder / "1.png").write_bytes(b"no image")
    (folder / "2.png").unlink()
    names = ["0.png", "1.png", "2.png"]
    found = Catalogue.of(listed(folder, names), "image", [str(folder)], tmp_path / "cache", digests=True)
    assert found.sizes.tolist() == [[30, 40], [0, 0], [0, 0]] and found.digests[1:] == ["", ""]


def test_a_pipe_is_not_opened(folder, tmp_path):
    os.mkfifo(folder / "3.png")  # whoever opens it waits for ever
    assert looked_up(folder, tmp_path).sizes[3].tolist() == [0, 0]


def test_files_outside_of_the_data_set_are_not_opened(folder, tmp_path):
    found = Catalogue.of(listed(folder), "image", [str(tmp_path / "other")], tmp_path / "cache")
    assert not found.sizes.any()


def test_images_in_parquet_are_known_by_their_row(folder, tmp_path, opened):
    rows = [{"image": {"bytes": (folder / f"{n}.png").read_bytes(), "path": None}} for n in (2, 0)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")

    def found():
        dataset = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "hub"))
        return Catalogue.of(dataset, "image", [], tmp_path / "cache", digests=True)

    assert found().sizes.tolist() == [[30, 42], [30, 40]] and len(opened) == 2
    assert found().digests[1] == hashlib.sha256((folder / "0.png").read_bytes()).hexdigest() and len(opened) == 2


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_images_in_parquet_have_any_format(form, tmp_path):
    """Pillow tries other formats before; one of those reads by lines, which not every file object can."""
    content = io.BytesIO()
    Image.new("RGB", (20, 10)).save(content, form)
    dataset = Dataset.from_list([{"image": {"bytes": content.getvalue(), "path": None}}])
    found = Catalogue.of(dataset, "image", [], tmp_path / "cache", digests=True)
    assert found.sizes.tolist() == [[10, 20]] and found.digests == [hashlib.sha256(content.getvalue()).hexdigest()]


def test_a_damaged_index_is_made_anew(folder, tmp_path):
    looked_up(folder, tmp_path)
    (index,) = (tmp_path / "cache" / "images").iterdir()
    index.write_bytes(b"PAR1")
    assert looked_up(folder, tmp_path).sizes.tolist()[0] == [30, 40]


def test_an_index_that_cannot_be_written_is_done_without(folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert looked_up(folder, tmp_path).sizes.shape == (3, 2) and "cannot be written" in caplog.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_of_exif_counts(tmp_path, kind):
    exif = Image.Exif()
    exif[catalogue.ORIENTATION] = 6
    file = tmp_path / "turned"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, kind, exif=exif)
    with Image.open(file) as image:
        assert upright_size(image) == ImageOps.exif_transpose(image).size[::-1] == (30, 20)


def test_what_is_known_of_other_images_stays(folder, tmp_path, opened):
    """Training images and held-out ones have one index."""
    for names in (["0.png", "2.png"], ["1.png", "1.png"], ["2.png", "0.png", "1.png"]):
        found = Catalogue.of(listed(folder, names), "image", [str(folder)], tmp_path / "cache")
        assert found.sizes.tolist() == [[30, 40 + int(name[0])] for name in names]
    assert sorted(opened) == ["0.png", "1.png", "1.png", "2.png"]


def test_rows_without_an_image_have_no_size(folder, tmp_path):
    dataset = Dataset.from_dict({"image": [str(folder / "0.png"), None]}).cast_column("image", ImageFeature())
    for _ in range(2):
        found = Catalogue.of(dataset, "image", [str(folder)], tmp_path / "cache", digests=True)
        assert found.sizes.tolist() == [[30, 40], [0, 0]] and found.digests[1] == catalogue.NONE
