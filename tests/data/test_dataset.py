"""Samples: random numbers keyed by (seed, epoch, index), batches, geometry, captions, unreadable files."""

import io
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from trainer import settings

from lpl import get_objective
from lpl.data.dataset import TrainingImages, collate, held_out_batches, real_images
from lpl.data.loader import training_batches
from lpl.data.order import KeyedBatches, keyed_generator
from lpl.data.reading import choose_caption
from lpl.data.source import check_columns, class_names, load_training_images


LATENT_SHAPE = (4, 8, 8)
RANDOM = ("pixels", "noise", "posterior_noise", "timestep", "lpl_choice")


def images_of(*pictures, captions=None, objective=None, **changes):
    """TrainingImages over PIL images; a list of rows stands for the data set."""
    captions = captions or [f"picture {number}" for number in range(len(pictures))]
    rows = [{"image": picture, "text": caption} for picture, caption in zip(pictures, captions)]
    objective = objective or get_objective("epsilon", DDPMScheduler())
    return TrainingImages(rows, objective, LATENT_SHAPE, settings(**changes))


def static(width=64, height=48, seed=0):
    """A picture of noise: no two crops are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def coordinates(width, height):
    """A picture that says where a crop is from: red = x, green = y."""
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def levels(sample):
    """Pixels [-1, 1], (3, R, R) -> (R, R, 3) in 0 ... 255."""
    return ((sample["pixels"] + 1) * 127.5).round().int().permute(1, 2, 0).numpy()


# Random numbers -----------------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_whenever_it_is_drawn():
    images = images_of(static(), static(seed=1), random_flip=True, noise_offset=0.1)
    first = images[3, 1]
    torch.rand(7), images[0, 0]
    again = images[3, 1]
    assert first["caption"] == again["caption"]
    assert all(torch.equal(first[name], again[name]) for name in RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_a_sample_differs_by_epoch_index_and_seed(name):
    images = images_of(static(), static())
    other_seed = images_of(static(), static(), seed=1)
    samples = [images[0, 0], images[0, 1], images[1, 0], other_seed[0, 0]]
    values = [sample[name] for sample in samples]
    assert all(not torch.equal(values[i], values[j]) for i in range(4) for j in range(i))


def test_each_purpose_has_a_generator_of_its_own(monkeypatch):
    keys = []
    monkeypatch.setattr("lpl.data.order.keyed_generator", lambda *key: keys.append(key) or keyed_generator(*key))
    images_of(static(), noise_offset=0.1, seed=7)[2, 0]
    assert len(keys) == len(set(keys)) == 4 and {key[:3] for key in keys} == {(7, 2, 0)}


def test_the_two_noises_are_independent():
    sample = images_of(static(), input_perturbation=0.1)[0, 0]
    noises = torch.stack([sample[name].flatten() for name in ("noise", "posterior_noise", "input_noise")])
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.25


@pytest.mark.parametrize(
    "change, kept",
    [
        ({"noise_offset": 0.1}, ("pixels", "posterior_noise", "timestep", "lpl_choice")),
        ({"input_perturbation": 0.1}, RANDOM),
        ({"random_flip": True}, ("noise", "posterior_noise", "timestep")),
        ({"center_crop": True}, ("noise", "posterior_noise", "timestep")),
        ({"proportion_empty_prompts": 0.5}, RANDOM),
    ],
)
def test_an_option_moves_no_other_random_number(change, kept):
    plain, changed = images_of(static()), images_of(static(), **change)
    for epoch in range(4):
        assert all(torch.equal(plain[epoch, 0][name], changed[epoch, 0][name]) for name in kept)


def test_what_lpl_looks_at_is_drawn_uniformly():
    images = images_of(static(8, 8))
    drawn = torch.stack([images[epoch, 0]["lpl_choice"] for epoch in range(400)])  # (400, 2)
    counts = torch.stack([torch.histc(column, 4, 0, 1) for column in drawn.T])
    assert drawn.min() >= 0 and drawn.max() < 1 and counts.min() > 70
    assert torch.corrcoef(drawn.T)[0, 1].abs() < 0.15


def test_noise_offset_shifts_whole_channels():
    plain, shifted = images_of(static())[0, 0]["noise"], images_of(static(), noise_offset=0.5)[0, 0]["noise"]
    shift = shifted - plain
    assert shift.flatten(1).std(1).max() < 1e-6 and shift[:, 0, 0].unique().numel() == 4


def test_timesteps_follow_the_weighting_scheme():
    flow = get_objective("flow_matching", FlowMatchEulerDiscreteScheduler())
    middle = images_of(static(), objective=flow, weighting_scheme="logit_normal", logit_std=0.2)
    spread = images_of(static(), objective=flow, weighting_scheme="none")
    near, far = (torch.stack([images.timestep(epoch, 0) for epoch in range(200)]) for images in (middle, spread))
    assert near.std() < 100 < 250 < far.std() < 330  # 1000 / sqrt(12) = 289


# Order --------------------------------------------------------------------------------------------------------------


def batches(length=10, batch_size=3, seed=0, process=0, processes=1, first=0, count=10):
    return list(islice(KeyedBatches(length, batch_size, seed, process, processes, first), count))


def test_each_epoch_visits_every_image_once_in_its_own_order():
    keys = [key for batch in batches() for key in batch]  # 30 of them: three epochs, batches span two
    orders = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)
    assert orders[0] != [index for _, index in sum(batches(seed=1, count=4), [])][:10]


def test_two_processes_together_follow_the_order_of_one():
    alone = batches(count=12)
    first, second = (batches(process=process, processes=2, count=6) for process in range(2))
    assert [batch for pair in zip(first, second) for batch in pair] == alone
    twice = batches(batch_size=6, count=6)
    assert [a + b for a, b in zip(first, second)] == twice


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_order_goes_on_where_it_stood(processes):
    whole = batches(process=processes - 1, processes=processes, count=9)
    assert batches(process=processes - 1, processes=processes, first=4, count=5) == whole[4:]


def test_a_batch_larger_than_the_data_set_spans_epochs():
    (keys,) = batches(length=2, batch_size=5, count=1)
    assert sorted(keys[:2]) == [(0, 0), (0, 1)] and sorted(keys[2:4]) == [(1, 0), (1, 1)] and keys[4][0] == 2


def test_loader_workers_change_nothing():
    images = images_of(*(static(seed=seed) for seed in range(5)), random_flip=True)
    order = KeyedBatches(5, 2, 0, 0, 1, 0)
    alone, helped = (list(islice(training_batches(images, order, workers), 6)) for workers in (0, 2))
    for a, b in zip(alone, helped):
        assert a["caption"] == b["caption"] and all(torch.equal(a[name], b[name]) for name in RANDOM)


def test_keys_give_different_generators():
    keys = [(0, 1), (1, 0), (0, 1, 1), (1, 0, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 2), (2**31, 1, 1, 2)]
    draws = [torch.rand((), generator=keyed_generator(*key)).item() for key in keys]
    assert len(set(draws)) == len(keys)


# Geometry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, left, top", [((64, 32), 16, 0), ((32, 64), 0, 16), ((32, 32), 0, 0), ((34, 32), 1, 0)])
def test_center_crop(size, left, top):
    crop = levels(images_of(coordinates(*size), center_crop=True)[0, 0])
    assert (crop[0, 0, :2] == (left, top)).all() and (crop[-1, -1, :2] == (left + 31, top + 31)).all()


@pytest.mark.parametrize("size, axis", [((48, 32), 0), ((32, 48), 1)])
def test_random_crops_reach_both_ends(size, axis):
    images = images_of(coordinates(*size))
    corners = [levels(images[epoch, 0])[0, 0] for epoch in range(200)]
    assert {corner[axis] for corner in corners} == set(range(17))
    assert {corner[1 - axis] for corner in corners} == {0}


def test_half_of_the_images_are_mirrored():
    images = images_of(coordinates(32, 32), random_flip=True)
    crops = [levels(images[epoch, 0]) for epoch in range(100)]
    flipped = [crop[0, 0, 0] == 31 for crop in crops]
    assert 35 < sum(flipped) < 65
    assert all((crop[..., 0] == np.arange(32)[:: -1 if flip else 1]).all() for crop, flip in zip(crops, flipped))
    assert all(np.array_equal(crop[:, 0, 1], np.arange(32)) for crop in crops)  # never upside down
    assert levels(images_of(coordinates(32, 32))[0, 0])[0, 0, 0] == 0


@pytest.mark.parametrize("size", [(256, 128), (128, 200), (16, 8), (33, 250)])
def test_the_shorter_side_gets_the_resolution_and_the_shape_is_kept(size):
    crop = levels(images_of(coordinates(*size), center_crop=True)[0, 0]).astype(float)
    assert crop.shape == (32, 32, 3)
    step = min(size) / 32  # picture's pixels per pixel of the crop, along both sides
    inner = crop[4:-4, 4:-4]
    for axis, channel in ((1, 0), (0, 1)):
        assert np.diff(inner[..., channel], axis=axis).mean() == pytest.approx(step, rel=0.15)


def test_interpolation_mode_is_used():
    crops = {
        mode: images_of(static(64, 64), center_crop=True, image_interpolation_mode=mode)[0, 0]["pixels"]
        for mode in ("nearest", "bilinear", "lanczos")
    }
    source = set(map(tuple, np.asarray(static(64, 64)).reshape(-1, 3)))
    nearest = ((crops["nearest"] + 1) * 127.5).round().int().permute(1, 2, 0).reshape(-1, 3).tolist()
    assert set(map(tuple, nearest)) <= source  # copies of the picture's own pixels
    assert not torch.equal(crops["bilinear"], crops["lanczos"])


def test_pixels_are_from_minus_one_to_one():
    black_and_white = Image.fromarray(np.repeat([[0], [255]], 2, 1).astype(np.uint8)).resize((32, 32), 0)
    pixels = images_of(black_and_white)[0, 0]["pixels"]
    assert pixels.dtype == torch.float32 and pixels.unique().tolist() == [-1.0, 1.0]


def test_exif_rotation_is_applied():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise by 90 degrees to show
    coordinates(64, 32).save(buffer, "PNG", exif=exif)
    crop = levels(images_of(Image.open(buffer), center_crop=True)[0, 0])
    assert (crop[0, 0, :2] == (16, 31)).all() and (crop[-1, -1, :2] == (47, 0)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    gray = Image.new("L", (32, 32), 128 if mode != "1" else 255)
    picture = Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)) if mode == "I;16" else gray.convert(mode)
    assert picture.mode == mode
    assert np.unique(levels(images_of(picture)[0, 0])).tolist() == [255 if mode == "1" else 128]


# Captions -----------------------------------------------------------------------------------------------------------


def test_every_caption_of_a_list_is_drawn_equally_often():
    images = images_of(static(), captions=[["a", "b", "c"]])
    drawn = Counter(images[epoch, 0]["caption"] for epoch in range(300))
    assert set(drawn) == {"a", "b", "c"} and min(drawn.values()) > 70


@pytest.mark.parametrize("share, low, high", [(0.0, 0, 0), (0.25, 40, 100), (1.0, 200, 200)])
def test_share_of_empty_prompts(share, low, high):
    images = images_of(static(), proportion_empty_prompts=share)
    assert low <= sum(images[epoch, 0]["caption"] == "" for epoch in range(200)) <= high


@pytest.mark.parametrize("caption", [None, 3, [], [None], {"en": "a cat"}])
def test_what_is_no_caption_is_refused(caption):
    with pytest.raises(ValueError, match="--caption_column"):
        choose_caption(caption, 0.5)


def test_collate_stacks_tensors_and_lists_captions():
    images = images_of(static(), static())
    batch = collate([images[0, 0], images[0, 1]])
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["timestep"].shape == (2,)
    assert batch["noise"].shape == batch["posterior_noise"].shape == (2, *LATENT_SHAPE)
    assert batch["caption"] == ["picture 0", "picture 1"] and batch["input_noise"] is None


def test_real_images_bear_their_captions():
    images = images_of(coordinates(32, 32), static(32, 32), static(32, 32, seed=1), captions=["x", "noise", "noise"])
    images.dataset = {"text": ["x", "noise", "noise"]} | dict(enumerate(images.dataset))
    found = real_images(images, ["noise", "x", "noise"])
    assert [np.asarray(image).tobytes() for image in found] == [
        np.asarray(picture).tobytes() for picture in (static(32, 32), coordinates(32, 32), static(32, 32))
    ]
    assert real_images(images, ["noise", "unheard of"]) is None


# What cannot be trained on ------------------------------------------------------------------------------------------


def folder_of(folder, files, captions=True):
    """An imagefolder with these files, bytes or PIL images by name."""
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content.save(folder / name)
    lines = [json.dumps({"file_name": name} | ({"text": name} if captions else {})) for name in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def loaded(folder, **changes):
    """TrainingImages over a folder, loaded as the script loads it."""
    args = settings(train_data_dir=str(folder), cache_dir=str(folder.with_name("cache")), **changes)
    dataset, _ = load_training_images(args)
    return TrainingImages(dataset, get_objective("epsilon", DDPMScheduler()), LATENT_SHAPE, args)


def test_a_corrupt_image_gives_way_to_the_next_one(tmp_path):
    images = loaded(folder_of(tmp_path / "data", {"a.png": static(), "b.png": b"no picture", "c.png": static(seed=2)}))
    sample = images[0, 1]
    assert sample["caption"] == "c.png"  # the next one's caption goes with it
    ((place, reason),) = sample["bad"]
    assert place == 1 and "cannot identify image file" in reason
    assert images[0, 2]["bad"] == [] and images[0, 2]["caption"] == "c.png" and images[0, 0]["caption"] == "a.png"


def test_a_truncated_last_image_gives_way_to_the_first_one(tmp_path):
    buffer = io.BytesIO()
    static().save(buffer, "PNG")
    cut = buffer.getvalue()[:1000]
    images = loaded(folder_of(tmp_path / "data", {"a.png": static(), "b.png": cut}))
    sample = images[0, 1]
    assert sample["caption"] == "a.png" and sample["bad"][0][0] == 1


def test_a_missing_image_in_a_column_gives_way_to_the_next_one():
    images = images_of(None, static())
    sample = images[0, 0]
    assert sample["caption"] == "picture 1" and sample["bad"] == [(0, "there is no image in this row")]


def test_not_one_readable_image_is_an_error(tmp_path):
    images = loaded(folder_of(tmp_path / "data", {"a.png": b"no", "b.png": b"pictures"}))
    with pytest.raises(ValueError, match="--train_data_dir.*not one image"):
        images[0, 0]


@pytest.mark.parametrize("missing", [None, []])
def test_a_row_without_a_caption_gives_way_to_the_next_one(missing):
    images = images_of(coordinates(32, 32), static(), captions=[missing, "b"])
    sample = images[0, 0]
    assert sample["caption"] == "b" and sample["bad"][0][0] == 0 and "caption" in sample["bad"][0][1]


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"image_column": "picture"}, ("'picture'", "--image_column", "image, text")),
        ({"caption_column": "caption"}, ("'caption'", "--caption_column", "image, text", "metadata.jsonl")),
        ({"caption_column": "image"}, ("'image'", "--caption_column", "strings")),
        ({"image_column": "text"}, ("'text'", "--image_column", "no images")),
    ],
)
def test_wrong_columns_are_named(tmp_path, flags, words):
    folder = folder_of(tmp_path / "data", {"a.png": static(), "b.png": static()})
    refused(lambda: loaded(folder, **flags), str(folder), *words)


def test_a_folder_without_captions(tmp_path):
    folder = folder_of(tmp_path / "data", {"a.png": static()}, captions=False)
    refused(lambda: loaded(folder), str(folder), "'text'", "--caption_column", "metadata.jsonl", "file_name")


def test_an_unknown_data_set(tmp_path):
    args = settings(dataset_name="nobody/nothing", cache_dir=str(tmp_path))
    refused(lambda: load_training_images(args), "--dataset_name nobody/nothing", "cannot be loaded")


@pytest.mark.parametrize("captions", [[1, 2], [None, None], [[1], [2]]])
def test_captions_of_the_wrong_kind(captions):
    dataset = Dataset.from_dict({"image": [static(), static()], "text": captions})
    dataset = dataset.cast_column("image", ImageFeature())
    refused(lambda: check_columns(dataset, "image", "text", "--dataset_name x"), "'text'", "--caption_column")


def test_an_empty_data_set():
    features = Features({"image": ImageFeature(), "text": Value("string")})
    dataset = Dataset.from_dict({"image": [], "text": []}, features)
    refused(lambda: check_columns(dataset, "image", "text", "--dataset_name x"), "--dataset_name x", "no images")


def test_max_train_samples_are_drawn_by_the_seed(tmp_path):
    folder = folder_of(tmp_path / "data", {f"{number}.png": static(8, 8) for number in range(6)})
    drawn = [sorted(loaded(folder, max_train_samples=3, seed=seed).dataset["text"]) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 3 and drawn[0] == drawn[1] != drawn[2]
    assert len(loaded(folder, max_train_samples=99)) == 6


# What else a sample says about its image ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"center_crop": True}, {"random_flip": True}])
def test_the_crop_is_described_as_it_was_taken(flags):
    """The pixel at the crop's corner is the resized, mirrored picture's at ``crop_top_left``."""
    images = images_of(coordinates(48, 32), coordinates(32, 64), **flags)  # no resizing: the shorter side is 32
    for epoch, index in ((epoch, index) for epoch in range(12) for index in range(2)):
        sample, width = images[epoch, index], (48, 32)[index]
        crop = levels(sample)
        top, left = sample["crop_top_left"].tolist()
        mirrored = crop[0, 0, 0] > crop[0, 1, 0]
        assert crop[0, 0, 1] == top and crop[0, 0, 0] == (width - 1 - left if mirrored else left)
        assert sample["original_size"].tolist() == [[32, 48], [64, 32]][index]
        assert sample["target_size"].tolist() == [32, 32] and sample["index"] == index


def test_the_original_size_is_the_one_before_resizing():
    sample = images_of(static(200, 100), center_crop=True)[0, 0]
    assert sample["original_size"].tolist() == [100, 200] and sample["crop_top_left"].tolist() == [0, 16]


def test_timesteps_follow_the_bias():
    biased = images_of(static(8, 8), timestep_bias_strategy="earlier", timestep_bias_multiplier=1e9)
    assert max(int(biased.timestep(epoch, 0)) for epoch in range(50)) < 250
    plain = images_of(static(8, 8))
    assert max(int(plain.timestep(epoch, 0)) for epoch in range(50)) > 800


# Class labels -------------------------------------------------------------------------------------------------------


def labelled(labels, feature):
    features = Features({"image": ImageFeature(), "label": feature})
    return Dataset.from_dict({"image": [static() for _ in labels], "label": labels}, features)


def test_class_labels_are_captions(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            static(seed=number).save(tmp_path / "data" / name / f"{number}.png")
    args = settings(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), caption_column="label")
    dataset, _ = load_training_images(args, num_classes=10)
    images = TrainingImages(dataset, get_objective("epsilon", DDPMScheduler()), LATENT_SHAPE, args, empty_caption=10)
    assert sorted(images[0, index]["caption"] for index in range(4)) == [0, 0, 1, 1]
    assert class_names(dataset, "label") == {0: "cats", 1: "dogs"}
    args.proportion_empty_prompts = 1.0
    assert images[0, 0]["caption"] == 10


def test_a_share_of_the_labels_is_dropped():
    images = images_of(static(8, 8), captions=[3], proportion_empty_prompts=0.3)
    images.empty_caption = 1000
    drawn = Counter(images[epoch, 0]["caption"] for epoch in range(200))
    assert set(drawn) == {3, 1000} and 40 < drawn[1000] < 80


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
    args = settings(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), caption_column="label")
    refused(lambda: load_training_images(args, 10), "'label'", "sub-folders")


# Held out ------------------------------------------------------------------------------------------------------------


def test_every_nth_sample_is_held_out(tmp_path):
    folder = folder_of(tmp_path / "data", {f"{number}.png": static(8, 8) for number in range(7)})
    args = settings(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), validation_every_nth=3)
    dataset, held_out = load_training_images(args)
    assert held_out["text"] == ["0.png", "3.png", "6.png"] and dataset["text"] == ["1.png", "2.png", "4.png", "5.png"]
    args.num_validation_samples = 2
    assert load_training_images(args)[1]["text"] == ["0.png", "3.png"]


def test_held_out_batches_are_the_same_in_every_run():
    pictures = [static(seed=seed) for seed in range(5)]
    one = images_of(*pictures, seed=3, random_flip=True, noise_offset=0.1, proportion_empty_prompts=0.9)
    other = images_of(*pictures, seed=4, center_crop=True, input_perturbation=0.1)
    for first, second in zip(held_out_batches(one, 2), held_out_batches(other, 2), strict=True):
        assert first["caption"] == second["caption"] and "" not in first["caption"]
        assert all(torch.equal(first[name], second[name]) for name in RANDOM)


def test_held_out_batches_cover_samples_and_timesteps_once_over_all_processes():
    images = images_of(*(static(seed=seed) for seed in range(7)))
    whole = list(held_out_batches(images, 3))
    assert [len(batch["caption"]) for batch in whole] == [3, 3, 1]
    assert sorted(torch.cat([batch["timestep"] for batch in whole]).tolist()) == [71, 214, 357, 500, 642, 785, 928]
    shared = [batch for process in range(2) for batch in held_out_batches(images, 3, process, 2)]
    by_index = {int(i): t for batch in whole for i, t in zip(batch["index"], batch["timestep"])}
    assert {int(i): t for batch in shared for i, t in zip(batch["index"], batch["timestep"])} == by_index
    assert sorted(by_index) == list(range(7))
