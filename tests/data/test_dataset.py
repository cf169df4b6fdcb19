"""Samples: random numbers keyed by (seed, epoch, index), batches, captions, unreadable files, held-out batches."""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from trainer import settings

from lpl import get_objective
from lpl.data.dataset import LatentSpace, TrainingImages, collate, held_out_batches, real_images
from lpl.data.order import keyed_generator
from lpl.data.source import load_training_images


SPACE = LatentSpace(4, 4)
NOISES = ("noise", "posterior_noise")
RANDOM = ("pixels", "noise", "posterior_noise", "timestep", "lpl_choice")


def images_of(*pictures, captions=None, objective=None, **changes):
    """TrainingImages over PIL images; a list of rows stands for the data set."""
    captions = captions or [f"picture {number}" for number in range(len(pictures))]
    rows = [{"image": picture, "text": caption} for picture, caption in zip(pictures, captions)]
    return over(rows, settings(**changes), objective=objective)


def over(dataset, config, empty_caption="", objective=None):
    """TrainingImages over a data set, under a configuration."""
    objective = objective or get_objective("epsilon", DDPMScheduler())
    data, diffusion, seed, cache_dir = config.data, config.diffusion, config.optimization.seed, config.model.cache_dir
    return TrainingImages(dataset, objective, SPACE, data, diffusion, seed, empty_caption, cache_dir)


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
    monkeypatch.setattr("lpl.data.dataset.keyed_generator", lambda *key: keys.append(key) or keyed_generator(*key))
    images_of(static(), noise_offset=0.1, seed=7)[2, 0]
    assert len(keys) == len(set(keys)) == 4 and {key[:3] for key in keys} == {(7, 2, 0)}
    keys.clear()
    images_of(static(), seed=7, shuffle_tags=True, text_encoder_dropout=[0.5])[2, 0]
    assert len(keys) == len(set(keys)) == 6 and {key[:3] for key in keys} == {(7, 2, 0)}


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


def test_half_of_the_images_are_mirrored():
    images = images_of(coordinates(32, 32), random_flip=True)
    crops = [levels(images[epoch, 0]) for epoch in range(100)]
    flipped = [crop[0, 0, 0] == 31 for crop in crops]
    assert 35 < sum(flipped) < 65
    assert all((crop[..., 0] == np.arange(32)[:: -1 if flip else 1]).all() for crop, flip in zip(crops, flipped))
    assert all(np.array_equal(crop[:, 0, 1], np.arange(32)) for crop in crops)  # never upside down
    assert levels(images_of(coordinates(32, 32))[0, 0])[0, 0, 0] == 0


# Captions -----------------------------------------------------------------------------------------------------------


def test_every_caption_of_a_list_is_drawn_equally_often():
    images = images_of(static(), captions=[["a", "b", "c"]])
    drawn = Counter(images[epoch, 0]["caption"] for epoch in range(300))
    assert set(drawn) == {"a", "b", "c"} and min(drawn.values()) > 70


@pytest.mark.parametrize("share, low, high", [(0.0, 0, 0), (0.25, 40, 100), (1.0, 200, 200)])
def test_share_of_empty_prompts(share, low, high):
    images = images_of(static(), proportion_empty_prompts=share)
    assert low <= sum(images[epoch, 0]["caption"] == "" for epoch in range(200)) <= high


def test_collate_stacks_tensors_and_lists_captions():
    images = images_of(static(), static())
    batch = collate([images[0, 0], images[0, 1]])
    assert batch["pixels"].shape == (2, 3, 32, 32) and batch["timestep"].shape == (2,)
    assert batch["noise"].shape == batch["posterior_noise"].shape == (2, *SPACE.shape(32, 32))
    assert batch["caption"] == ["picture 0", "picture 1"] and batch["input_noise"] is None


def test_real_images_bear_their_captions():
    images = images_of(coordinates(32, 32), static(32, 32), static(32, 32, seed=1), captions=["x", "noise", "noise"])
    images.dataset = Dataset.from_list(images.dataset)
    found = real_images(images, ["noise", "x", "noise"], [(n, (32, 32)) for n in range(3)])
    assert [np.asarray(image).tobytes() for image in found] == [
        np.asarray(picture).tobytes() for picture in (static(32, 32), coordinates(32, 32), static(32, 32))
    ]
    assert real_images(images, ["noise", "unheard of"], [(0, (32, 32))]) is None


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
    config = settings(train_data_dir=str(folder), cache_dir=str(folder.with_name("cache")), **changes)
    return over(load_data(config)[0], config)


def load_data(config, num_classes=None):
    """The training and the held-out data of a configuration."""
    return load_training_images(config.data, config.optimization.seed, config.model.cache_dir, num_classes)


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
    with pytest.raises(ValueError, match="data: no image of the data set can be read .the first: cannot identify"):
        images[0, 0]


@pytest.mark.parametrize("missing", [None, []])
def test_a_row_without_a_caption_gives_way_to_the_next_one(missing):
    images = images_of(coordinates(32, 32), static(), captions=[missing, "b"])
    sample = images[0, 0]
    assert sample["caption"] == "b" and sample["bad"][0][0] == 0 and "caption" in sample["bad"][0][1]


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


def test_each_index_may_have_a_size_of_its_own(monkeypatch):
    sizes = [(16, 24), (32, 64)]
    monkeypatch.setattr(TrainingImages, "size_of", lambda images, index: sizes[index])
    images = images_of(static(), None, input_perturbation=0.1)  # the first image replaces the second one
    for index, (height, width) in enumerate(sizes):
        sample = images[0, index]
        assert sample["pixels"].shape == (3, height, width) and sample["target_size"].tolist() == [height, width]
        assert all(sample[name].shape == (4, height // 4, width // 4) for name in (*NOISES, "input_noise"))


def test_timesteps_follow_the_bias():
    biased = images_of(static(8, 8), timestep_bias_strategy="earlier", timestep_bias_multiplier=1e9)
    assert max(int(biased.timestep(epoch, 0)) for epoch in range(50)) < 250
    plain = images_of(static(8, 8))
    assert max(int(plain.timestep(epoch, 0)) for epoch in range(50)) > 800


# Class labels -------------------------------------------------------------------------------------------------------


def test_class_labels_are_captions(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            static(seed=number).save(tmp_path / "data" / name / f"{number}.png")
    config = settings(train_data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), caption_column="label")
    images = over(load_data(config, num_classes=10)[0], config, empty_caption=10)
    assert sorted(images[0, index]["caption"] for index in range(4)) == [0, 0, 1, 1]
    assert images.class_names == {0: "cats", 1: "dogs"}
    without = over(images.dataset, config.changed(proportion_empty_prompts=1.0), empty_caption=10)
    assert without[0, 0]["caption"] == 10


def test_a_share_of_the_labels_is_dropped():
    images = images_of(static(8, 8), captions=[3], proportion_empty_prompts=0.3)
    images.empty_caption = 1000
    drawn = Counter(images[epoch, 0]["caption"] for epoch in range(200))
    assert set(drawn) == {3, 1000} and 40 < drawn[1000] < 80


# Held out ------------------------------------------------------------------------------------------------------------


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
