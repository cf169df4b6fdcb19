"""Caches say what a direct computation says, whatever is cropped, flipped, drawn, masked, broken or changed."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from caches import cached_pair
from datasets import Dataset
from PIL import Image
from tiny_families import CPU, FAMILY_OF, TINY, batch_of, load
from trainer import parsed

from lpl.autoencoders import posterior
from lpl.data.captions import caption_rows
from lpl.data.store import Store
from lpl.data.timeouts import HungLoader
from lpl.training import caching


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions are encoded."""
    counts = {"images": 0, "captions": 0}
    encode, encode_captions = caching.posterior, caching._encoded

    def images(vae, pixels):
        counts["images"] += len(pixels)
        return encode(vae, pixels)

    def captions(part, *args):
        counts["captions"] += len(part)
        return encode_captions(part, *args)

    monkeypatch.setattr(caching, "posterior", images)
    monkeypatch.setattr(caching, "_encoded", captions)
    return counts


@pytest.fixture
def data(image_folder, tmp_path):
    """A copy of the images, which may be changed."""
    return shutil.copytree(image_folder, tmp_path / "data")


def captions_of(folder, change):
    file = folder / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(change(number, line)) + "\n" for number, line in enumerate(lines)))


def pictures(folder):
    return sorted(file for file in folder.glob("*.??g") if "mask" not in file.name)


def static(width, height, seed=0, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze())


# The same samples ----------------------------------------------------------------------------------------------------


CASES = {
    "centre": ("sd", {}),
    "flips": ("sd", {"random_flip": True, "proportion_empty_prompts": 0.4}),
    "crops": ("sd", {"center_crop": None, "crops_per_image": 2, "random_flip": True, "seed": 7}),
    "buckets": ("sd", {"aspect_ratio_buckets": "auto", "resolution": "32,48", "bucket_step": 8, "random_flip": True}),
    "held out": ("sd", {"validation_every_nth": 3, "random_flip": True, "center_crop": None, "crops_per_image": 1}),
    "nearest": ("sd", {"image_interpolation_mode": "nearest"}),
    "words around": ("sd", {"caption_prefix": "a photo of", "trigger_word": "sks"}),
    "SDXL": ("sdxl", {"text_encoder_dropout": [0.4, 0.5], "proportion_empty_prompts": 0.2, "random_flip": True}),
    "SD3": ("sd3", {"text_encoder_dropout": [0, 0.5, 0.5], "max_sequence_length": 24}),
    "workers": ("sd", {"dataloader_num_workers": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_without_caches(case, request, image_folder, tmp_path):
    family, flags = CASES[case]
    pair = cached_pair(request.getfixturevalue(f"{family}_pipeline"), image_folder, tmp_path, **flags)
    pair.check(range(3))


def test_each_cache_goes_alone(sd_pipeline, image_folder, tmp_path):
    pair = cached_pair(sd_pipeline, image_folder, tmp_path / "a", cache_text_embeddings=False)
    pair.check()
    assert pair.cached.embeddings is None and pair.family.text_encoders
    assert not list(pair.family.vae.encoder.parameters())
    pair = cached_pair(sd_pipeline, image_folder, tmp_path / "b", cache_latents=False, center_crop=None)
    pair.check()
    assert pair.cached.latents is None and pair.family.vae.encoder is not None and not pair.family.text_encoders


def test_alternatives_are_drawn_in_training(sd_pipeline, data, tmp_path):
    captions_of(data, lambda number, line: line | {"text": [f"cat {number}", f"dog {number}", "", " "], "tags": "x"})
    pair = cached_pair(sd_pipeline, data, tmp_path, caption_column="text:0.6,tags:0.4")
    pair.check(range(4))
    assert len({pair.cached[epoch, 1]["caption"] for epoch in range(30)}) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TINY if not FAMILY_OF[name].class_conditional])
def test_conditions_of_every_family_come_back(name, request):
    family, captions = load(request.getfixturevalue(TINY[name][0])), ["a cat", ""]
    entries = [entry for _, entry in caching._encoded([("", caption, ()) for caption in captions], family, CPU)]
    stacked = {part: torch.stack([entry[part] for entry in entries]) for part in entries[0]}
    batch = batch_of(family, captions)
    found, expected = family.conditions(batch | {"embeddings": stacked}, CPU), family.conditions(batch, CPU)
    assert found.keys() >= expected.keys()
    assert all(torch.equal(torch.as_tensor(found[part]), torch.as_tensor(expected[part])) for part in expected)


def test_class_labels_need_no_embeddings(dit_pipeline, class_folder, tmp_path):
    flags = {"cache_text_embeddings": False, "random_flip": True, "proportion_empty_prompts": 0.5}
    cached_pair(dit_pipeline, class_folder, tmp_path, **flags).check()
    with pytest.raises(ValueError, match="--cache_text_embeddings"):
        parsed(dit_pipeline, class_folder, tmp_path / "run", cache_text_embeddings=True)


def test_captions_may_come_from_the_flag_alone(sd_pipeline, data, tmp_path):
    (data / "metadata.jsonl").unlink()
    cached_pair(sd_pipeline, data, tmp_path, instance_prompt="a photo of sks").check()


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_masks(unmasked_weight, sd_pipeline, data, tmp_path):
    names = [file.name for file in pictures(data)]
    for number, name in enumerate(names[:4]):
        with Image.open(data / name) as image:
            mask = Image.new("L", image.size, 0) if number == 2 else static(*image.size, number, "L")
        mask.save(data / f"{name.partition('.')[0]}.mask.png")
    (data / f"{names[3].partition('.')[0]}.mask.png").write_bytes(b"no image")
    flags = {"mask_column": "mask", "unmasked_weight": unmasked_weight, "random_flip": True}
    pair = cached_pair(sd_pipeline, data, tmp_path, **flags)
    pair.check()
    bad = [row for row, _ in pair.cached[0, 2]["bad"]], [row for row, _ in pair.cached[0, 3]["bad"]]
    assert bad == (([2, 3], [3]) if unmasked_weight == 0 else ([], [3]))


def test_a_mask_that_breaks_is_no_mask_that_is_not_there(sd_pipeline, data, tmp_path):
    flags = {"mask_column": "mask", "cache_text_embeddings": False}
    names = [file.name for file in pictures(data)]
    for name in names[:2]:
        with Image.open(data / name) as image:
            static(*image.size, 0, "L").save(data / f"{name.partition('.')[0]}.mask.png")
    (data / f"{names[0].partition('.')[0]}.mask.png").rename(data / "kept")
    cached_pair(sd_pipeline, data, tmp_path, **flags).check()  # the first image has none
    (data / f"{names[0].partition('.')[0]}.mask.png").write_bytes(b"no image")
    cached_pair(sd_pipeline, data, tmp_path, **flags).check()


def test_transparency(sd_pipeline, data, tmp_path):
    static(60, 50, 3, "RGBA").save(pictures(data)[0])
    for flags in ({}, {"alpha_mask": True}, {"alpha_mask": True, "unmasked_weight": 0.25}):
        cached_pair(sd_pipeline, data, tmp_path, **flags, cache_text_embeddings=False).check()


def test_several_data_sets_also_as_bytes(sd_pipeline, image_folder, tmp_path, encoded):
    pictures = [static(64, 48, seed) for seed in range(3)]
    columns = {"image_column": "picture", "caption_column": "words"}
    (tmp_path / "class").mkdir()
    path = tmp_path / "list.yaml"
    entries = [
        {"train_data_dir": str(image_folder), "repeats": 2},
        {"dataset_name": str(tmp_path / "class"), **columns, "loss_weight": 0.25},
    ]
    path.write_text(yaml.safe_dump({"datasets": entries}))

    def check():
        rows = {"picture": pictures, "words": ["a fox", "a hen", "a pig"]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "class" / "train.parquet")
        flags = {"train_data_dir": None, "config": path, "center_crop": None, "crops_per_image": 2}
        cached_pair(sd_pipeline, image_folder, tmp_path, **flags).check()

    check()
    before = encoded["images"]
    assert before > 8 + 3  # some crops are alike, of square images all
    check()
    assert encoded["images"] == before
    pictures[1] = static(64, 48, 9)  # another image in the same row, behind those of the folder
    check()
    assert encoded["images"] == before + 2


# What is bad ---------------------------------------------------------------------------------------------------------


def test_bad_rows_are_replaced_as_without_caches(sd_pipeline, data, tmp_path):
    names = [file.name for file in pictures(data)]
    (data / names[1]).write_bytes(b"no image")
    (data / names[2]).write_bytes((data / names[2]).read_bytes()[:-200])  # opens, and cannot be decoded
    captions_of(data, lambda number, line: line | {"text": None if number == 4 else line["text"]})
    pair = cached_pair(sd_pipeline, data, tmp_path, random_flip=True)
    pair.check()
    assert [row for row, _ in pair.cached[0, 1]["bad"]] == [1, 2] and pair.cached[0, 4]["bad"][0][0] == 4
    assert "cannot be opened" in pair.cached[0, 1]["bad"][0][1]


def test_workers_fill_the_same_cache(sd_pipeline, data, tmp_path):
    cached_pair(sd_pipeline, data, tmp_path, dataloader_num_workers=1, dataloader_timeout=30).check()


def test_a_read_that_cannot_be_interrupted_ends_the_run_and_is_named(sd_pipeline, data, tmp_path, monkeypatch):
    """As code that hangs outside of Python: its process heeds no signal."""
    main, read = os.getpid(), caching.picture_in

    def hang(row, *rest):
        if os.getpid() != main and row["image"]["path"].endswith(pictures(data)[2].name):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(1000)
        return read(row, *rest)

    monkeypatch.setattr(caching, "picture_in", hang)
    with pytest.raises(HungLoader, match=f"{pictures(data)[2].name} .* took longer than --dataloader_timeout 0.5"):
        cached_pair(sd_pipeline, data, tmp_path, dataloader_num_workers=1, dataloader_timeout=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_cost_the_image(value, sd_pipeline, data, tmp_path, monkeypatch):
    target = {}

    def broken(vae, pixels):
        mean, std = posterior(vae, pixels)
        for row, own in enumerate(pixels):
            if target and torch.equal(own, target["pixels"]):
                mean[row, 0, 0, 0] = value
        return mean, std

    monkeypatch.setattr(caching, "posterior", broken)
    target["pixels"] = cached_pair(sd_pipeline, data, tmp_path / "first").plain[0, 3]["pixels"]
    pair = cached_pair(sd_pipeline, data, tmp_path / "second")
    sample = pair.cached[0, 3]
    assert [row for row, _ in sample["bad"]] == [3] and "not finite" in sample["bad"][0][1]
    pair.check(indices=(0, 1, 2, 4))
    store = Store(tmp_path / "second/cache/latents")
    assert all(part.isfinite().all() for key in store._place for part in store[key].values())


def test_a_caption_whose_embeddings_are_not_finite_ends_the_run(sd_pipeline, image_folder, tmp_path):
    def change(family):
        family.text_encoders[0].final_layer_norm.weight.data.fill_(float("nan"))

    with pytest.raises(ValueError, match="--cache_text_embeddings: encoder_hidden_states of .* is not finite"):
        cached_pair(sd_pipeline, image_folder, tmp_path, change)
    assert not list((tmp_path / "cache").glob("embeddings/*"))


def test_no_usable_image_is_refused(sd_pipeline, image_folder, tmp_path, monkeypatch):
    def nothing(vae, pixels):
        mean, std = posterior(vae, pixels)
        return mean * float("nan"), std

    monkeypatch.setattr(caching, "posterior", nothing)
    with pytest.raises(ValueError, match="--cache_latents: no image of the data set can be encoded"):
        cached_pair(sd_pipeline, image_folder, tmp_path)


def test_an_image_that_changes_while_the_cache_is_filled_is_left_out(sd_pipeline, data, tmp_path, monkeypatch):
    """Under the key of the old one it would be found again when the old one is back."""
    file = pictures(data)[0]
    content, find = file.read_bytes(), caching._missing

    def missing(*args):
        found = find(*args)
        static(48, 48, 5).save(file)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(caching, "_missing", missing)
        pair = cached_pair(sd_pipeline, data, tmp_path)
    assert pair.cached[0, 0]["bad"] == [(0, "it has changed since this run began")]
    file.write_bytes(content)
    cached_pair(sd_pipeline, data, tmp_path).check()


# Only what is missing ------------------------------------------------------------------------------------------------


def test_only_what_changed_is_encoded(sd_pipeline, data, tmp_path, encoded):
    def run(**flags):
        before = dict(encoded)
        pair = cached_pair(sd_pipeline, data, tmp_path, **flags)
        pair.check()
        return encoded["images"] - before["images"], encoded["captions"] - before["captions"]

    rows = len(list(caption_rows(Dataset.from_json(str(data / "metadata.jsonl")), ["text"])))
    assert run() == (rows, rows + 1)  # and the empty caption
    nothing = {"learning_rate": 0.5, "seed": 9, "train_batch_size": 3, "proportion_empty_prompts": 0.7}
    assert run(**nothing, lpl_weight=0, output_dir=tmp_path / "x", lora=True, rank=4) == (0, 0)
    static(48, 48, 5).save(pictures(data)[0])
    assert run() == (1, 0)
    captions_of(data, lambda number, line: line | {"text": "another"} if number in (1, 2) else line)
    assert run() == (0, 1)
    assert run(random_flip=True) == (rows, 0)  # the mirrored ones
    assert run(resolution=48) == (rows, 0) and run(resolution=48) == (0, 0)
    assert run() == (0, 0)


def test_crops_are_those_of_any_run(sd_pipeline, data, tmp_path, encoded):
    for seed in (1, 2):
        flags = {"center_crop": None, "crops_per_image": 3, "seed": seed, "cache_text_embeddings": False}
        cached_pair(sd_pipeline, data, tmp_path, **flags).check(range(4))
        assert encoded["images"] <= 3 * 8
    assert encoded["images"] > 8


def test_a_killed_run_goes_on(sd_pipeline, image_folder, tmp_path, encoded, monkeypatch):
    write, limit = Store.write, 2

    def killed(store, entries):
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise SystemExit
        write(store, entries)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", killed)
        patch.setattr(caching, "SHARD", 3)
        with pytest.raises(SystemExit):
            cached_pair(sd_pipeline, image_folder, tmp_path)
    encoded["images"] = 0
    cached_pair(sd_pipeline, image_folder, tmp_path).check()
    assert encoded["images"] == 8 - 2 * 3


def test_shards_are_written_before_they_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "SHARD_BYTES", 100)
    with caching._Shards(Store(tmp_path)) as shards:
        for number in range(5):
            shards.add(str(number), {"mean": torch.zeros(20)})
    assert len(list(tmp_path.iterdir())) == 3


def test_a_store_that_loses_a_shard_is_filled_again(sd_pipeline, image_folder, tmp_path, encoded):
    cached_pair(sd_pipeline, image_folder, tmp_path)
    for shard in (tmp_path / "cache/latents").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1])
    encoded["images"] = 0
    cached_pair(sd_pipeline, image_folder, tmp_path).check()
    assert encoded["images"] == 8


def test_the_caption_that_stands_for_none_is_the_familys(qwen_image_pipeline, image_folder, tmp_path):
    cached_pair(qwen_image_pipeline, image_folder, tmp_path, proportion_empty_prompts=0.5).check()


def test_what_a_pipeline_takes_of_its_encoder_is_part_of_the_key(krea2_pipeline, image_folder, tmp_path):
    def only_the_first(family):
        family.pipeline.register_to_config(text_encoder_select_layers=(1, 1))

    keys = [
        cached_pair(krea2_pipeline, image_folder, tmp_path, change).cached.embeddings.encoders
        for change in (None, only_the_first)
    ]
    assert keys[0] != keys[1]
