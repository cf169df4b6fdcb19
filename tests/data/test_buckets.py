"""Sizes of images, and batches of one size: none is lost, none is enlarged, and a resumed order goes on."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from trainer import settings

from lpl.config.sizes import made_sizes
from lpl.data.buckets import BucketBatches, Items, bucketed, items_of
from lpl.data.dataset import collate, held_out_batches
from lpl.data.source import load_training_images
from tests.data.test_dataset import over, static


SQUARES = [[(32, 32)], [(64, 64)]]


def sizes_of(images, *args, **options):
    items = items_of(np.array(images), *args, **options)
    return [(int(row), items.size(item)) for item, row in enumerate(items.rows)], list(items.left_out)


def test_an_image_gets_the_size_that_is_nearest_to_its_aspect_ratio():
    found, left_out = sizes_of([(200, 200), (100, 300), (130, 100), (110, 100), (0, 0)], [made_sizes(64, 16)])
    assert found == [(0, (64, 64)), (1, (32, 96)), (2, (80, 48)), (3, (64, 64)), (4, (64, 64))] and left_out == []


def test_no_image_is_enlarged_unless_asked():
    small = [(40, 30), (15, 90)]
    assert sizes_of(small, [made_sizes(64, 16)], step=16) == ([(0, (32, 16))], [1])
    assert sizes_of(small, [[(64, 64)]]) == ([], [0, 1])
    enlarged, left_out = sizes_of(small, [made_sizes(64, 16)], step=16, upscale=True)
    assert [row for row, _ in enlarged] == [0, 1] and left_out == [] and enlarged[0][1] == (80, 48)


def test_several_resolutions_train_an_image_at_each_that_it_is_large_enough_for():
    found, _ = sizes_of([(64, 70), (63, 99), (20, 20)], SQUARES, keep_small=True)
    assert found == [(0, (32, 32)), (0, (64, 64)), (1, (32, 32)), (2, (32, 32))]


@pytest.fixture(scope="module")
def items():
    """Items of 12 sizes, most of them with fewer than a batch."""
    rng = np.random.default_rng(0)
    return items_of(rng.integers(40, 140, (50, 2)), [made_sizes(64, 16), made_sizes(96, 16)], step=16)


def batches(items, batch_size=4, process=0, processes=1, first=0, count=100, seed=0):
    return list(islice(BucketBatches(items, batch_size, seed, process, processes, first), count))


def test_batches_are_full_and_of_one_size_and_no_item_is_lost(items):
    every = batches(items, count=400)
    assert {len(batch) for batch in every} == {4}
    assert all(len({items.size(item) for _, item in batch}) == 1 for batch in every)
    counts = Counter(item for batch in every for _, item in batch)
    epochs = 400 * 4 / len(items)
    assert set(counts) == set(range(len(items)))
    assert max(abs(count - epochs) for count in counts.values()) <= 4  # what waits for a batch to fill
    assert len({key for batch in every for key in batch}) == 1600  # no (epoch, item) twice


def test_each_size_visits_its_items_once_an_epoch_in_a_new_order(items):
    size, members = next(iter(items.buckets.items()))
    keys = [key for batch in batches(items, count=400) for key in batch if items.size(key[1]) == size]
    orders = [[item for _, item in sorted(keys, key=keys.index) if _ == epoch] for epoch in range(3)]
    assert [sorted(order) for order in orders] == [sorted(members.tolist())] * 3 and orders[0] != orders[1]


def test_two_processes_together_follow_the_order_of_one(items):
    first, second = (batches(items, 2, process, 2) for process in range(2))
    assert [a + b for a, b in zip(first, second)] == batches(items)


def test_a_resumed_order_goes_on_where_it_stood(items):
    whole = batches(items)
    for first in (0, 1, 17, 18, 19, 55, 90):
        assert batches(items, first=first, count=5) == whole[first : first + 5]


def test_the_largest_size_alone():
    items = Items(np.array([0, 0, 1]), np.array([[32, 32], [64, 64], [64, 48]]))
    assert items.largest().rows.tolist() == [0] and items.largest().size(0) == (64, 64)


@pytest.fixture
def photos(tmp_path):
    """A folder of six upright, wide and tall pictures, and one that is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (width, height) in enumerate([(64, 64), (96, 48), (48, 96), (70, 70), (90, 45), (20, 20)]):
        static(width, height, seed=number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    (folder / "6.png").write_bytes(b"no image")
    (folder / "6.txt").write_text("broken")
    return folder


def trained_on(photos, tmp_path, **flags):
    config = settings(train_data_dir=str(photos), data_cache_dir=str(tmp_path / "cache"), **flags)
    dataset, _ = load_training_images(config.data, 0, None)
    return replace(over(dataset, config), items=bucketed(dataset, config.data, None))


def test_samples_have_the_size_of_their_bucket(photos, tmp_path, caplog):
    flags = {"resolution": "32,64", "aspect_ratio_buckets": "auto", "bucket_step": 16}
    images = trained_on(photos, tmp_path, **flags)
    assert images.rows == 7 and images.length == len(images.items) == 11
    for batch in islice(images.batches(2, 0, 1, 0), 12):
        found = collate([images[key] for key in batch])
        height, width = found["target_size"][0].tolist()
        assert found["pixels"].shape == (2, 3, height, width)
        assert found["noise"].shape == (2, 4, height // 4, width // 4)
        assert height <= 64 * 2 and height * width <= 64 * 64


def test_images_that_are_too_small_are_named(photos, tmp_path, caplog):
    images = trained_on(photos, tmp_path, resolution=64, aspect_ratio_buckets="64,64;48,96;96,48;45,90")
    assert "1 of 7 images are smaller than all --aspect_ratio_buckets" in caplog.text and "5.png" in caplog.text
    assert images.items.rows.tolist() == [0, 1, 2, 3, 4, 6] and images.items.left_out == [5]
    (photos / "6.png").unlink()
    with pytest.raises(ValueError, match="--bucket_upscale"):
        trained_on(photos, tmp_path, resolution=64, aspect_ratio_buckets="640,640")


def test_held_out_images_come_once_in_batches_of_one_size(photos, tmp_path):
    images = trained_on(photos, tmp_path, resolution=64, aspect_ratio_buckets="auto", bucket_step=16)
    found = list(held_out_batches(images, 4))
    assert sorted(index for batch in found for index in batch["index"].tolist()) == list(range(len(images)))
    assert len(found) > 2
