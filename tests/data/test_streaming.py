"""Streamed data sets: every sample once an epoch, in an order that a resumed run takes up at any batch."""

import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from itertools import islice, takewhile
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from diffusers import DDPMScheduler
from hub_server import HubServer, Repository
from PIL import Image
from trainer import ROOT, arguments, launch, metrics, same, settings, train, validation_metrics, weights

from lpl import get_objective
from lpl.data.dataset import LatentSpace
from lpl.data.reading import open_image
from lpl.data.streaming import ROWS, LostShard, load_streamed_images, read_ahead, shard_rows, training_images
from lpl.data.timeouts import HungLoader
from tests.data.test_loader import batches_of


KINDS = {"parquet": ("image", "text"), "tar": ("jpg", "txt")}  # columns of images and captions
UNEVEN = (7, 3, 0, 12, 1)  # rows of the shards


def encoded(number, size=(40, 36)):
    values = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, rows, text=None):
    """A parquet or a tar file of (image's bytes, caption)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        images = [content if isinstance(content, dict) else {"bytes": content, "path": None} for content, _ in rows]
        columns = {"image": images, "text": [caption for _, caption in rows], "else": [0] * len(rows)}
        features = Features({"image": ImageFeature(), "text": text or Value("string"), "else": Value("int64")})
        Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=5)
        return
    with tarfile.open(path, "w") as archive:
        for number, (content, caption) in enumerate(rows):
            for suffix, data in (("jpg", content), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{path.stem}-{number:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write(folder, lengths, kind="parquet"):
    """Shards of so many rows; row 3 of shard 1 has the caption "1-3"."""
    for shard, length in enumerate(lengths):
        rows = [(encoded(100 * shard + row), f"{shard}-{row}") for row in range(length)]
        write_shard(folder / f"{shard:03d}.{kind}", rows)
    return folder


def streamed(folder, kind="parquet", num_classes=None, **changes):
    """(images, what is held out) of a folder of shards."""
    image, caption = KINDS[kind]
    columns = {"image_column": image, "caption_column": caption, "shuffle_buffer_size": 5}
    config = settings(streaming=True, train_data_dir=str(folder), **columns | changes)
    data, diffusion, seed = config.data, config.diffusion, config.optimization.seed
    dataset, held_out = load_streamed_images(data, seed, None, num_classes)
    objective = get_objective("epsilon", DDPMScheduler())
    return training_images(dataset, objective, LatentSpace(4, 4), data, diffusion, seed), held_out


def order(images, process=0, processes=1, first_batch=0, positions=()):
    return images.batches(4, process, processes, first_batch, positions)


def keys(batches, epochs=2):
    """(epoch, index) of the samples of the first epochs."""
    samples = ((epoch, rows[0][0]) for batch in batches for epoch, rows in batch)
    return list(takewhile(lambda key: key[0] < epochs, samples))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Uneven shards of both kinds."""
    return {kind: write(tmp_path_factory.mktemp(kind), UNEVEN, kind) for kind in KINDS}


EVERY = sorted(shard * ROWS + row for shard, length in enumerate(UNEVEN) for row in range(length))


# Captions ------------------------------------------------------------------------------------------------------------


def test_captions_of_a_stream_come_from_several_columns_or_the_instance_prompt(folders, tmp_path):
    features = Features({"image": ImageFeature(), "text": Value("string"), "tags": Value("string")})
    rows = {"image": [{"bytes": encoded(0), "path": None}] * 3, "text": ["x", "", None], "tags": ["y", "z", " "]}
    folder = tmp_path / "data"
    folder.mkdir()
    Dataset.from_dict(rows, features).to_parquet(folder / "000.parquet")
    images, _ = streamed(folder, caption_column="text:1,tags:0", instance_prompt="sks dog", trigger_word="sks")
    batches = [images[key] for keys in islice(order(images), 3) for key in keys]
    expected = {0: "sks, x", 1: "sks, z", 2: "sks dog"}
    assert {int(sample["index"]): sample["caption"] for sample in batches} == expected
    images, _ = streamed(folders["tar"], "tar", caption_column="text", instance_prompt="sks dog")
    assert images[next(iter(order(images)))[0]]["caption"] == "sks dog"


# Order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_comes_once_an_epoch_each_time_in_another_order(kind, folders):
    images, _ = streamed(folders[kind], kind)
    found = keys(order(images), 3)
    epochs = [[index for epoch, index in found if epoch == number] for number in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [EVERY] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert found == sorted(found, key=lambda key: key[0])
    assert keys(order(streamed(folders[kind], kind, seed=1)[0]), 3) != found


def test_shards_and_rows_are_shuffled(tmp_path):
    images, _ = streamed(write(tmp_path, (20, 20, 20)), shuffle_buffer_size=10)
    found = [index for _, index in keys(order(images), 4)]
    blocks = [found[start : start + 10] for start in range(0, 240, 10)]
    assert all(block != sorted(block) and max(block) - min(block) == 9 for block in blocks)
    orders = {tuple(block[0] // ROWS for block in blocks[start : start + 6 : 2]) for start in (0, 6, 12, 18)}
    assert len(orders) > 1 and all(sorted(shards) == [0, 1, 2] for shards in orders)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 3, 12])  # and more of them than shards
def test_several_processes_share_every_epoch(kind, processes, folders):
    images, _ = streamed(folders[kind], kind)
    together = Counter(key for rank in range(processes) for key in keys(order(images, rank, processes)))
    assert set(together.values()) == {1}
    for epoch in range(2):
        assert sorted(index for number, index in together if number == epoch) == EVERY


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_one_shard_is_shared_row_by_row(processes, tmp_path):
    images, _ = streamed(write(tmp_path, (11,)))
    together = Counter(key for rank in range(processes) for key in keys(order(images, rank, processes)))
    assert set(together.values()) == {1}
    assert sorted(index for epoch, index in together if epoch == 0) == list(range(11))


@pytest.mark.parametrize("kind, process, processes", [("parquet", 0, 1), ("tar", 1, 2), ("parquet", 6, 7)])
def test_a_run_goes_on_from_any_batch(kind, process, processes, folders):
    images, _ = streamed(folders[kind], kind)
    whole = list(islice(order(images, process, processes), 14))
    for batch in range(13):
        before = order(images, process, processes)
        list(islice(before, batch + batch % 3))  # loaders fetch some batches before they are needed
        after = order(images, process, processes, batch, positions_of(before, batch, process, processes))
        assert list(islice(after, 13 - batch)) == whole[batch:13]
        again = order(images, process, processes, 13, positions_of(after, 13, process, processes))
        assert next(iter(again)) == whole[13]


def positions_of(batches, batch, process=0, processes=1):
    """The positions of all processes, where only one is there."""
    batches.num_processes = 1  # else it would ask the others
    (position,) = batches.positions(batch)
    batches.num_processes = processes
    return [position if rank == process else [] for rank in range(processes)]


def test_a_run_goes_on_without_reading_the_shards_before(tmp_path, monkeypatch):
    images, _ = streamed(write(tmp_path, (20, 20, 20)))
    before = order(images)
    list(islice(before, 12))
    positions, read = before.positions(11), []

    def counted(dataset, shard, data):
        read.append(shard)
        return shard_rows(dataset, shard, data)

    monkeypatch.setattr("lpl.data.streaming.shard_rows", counted)
    next(iter(order(images, 0, 1, 11, positions)))
    whole = list(islice(order(images), 12))
    assert positions == [[2, 0, 4]]  # 44 samples are done, 4 of them of the third shard
    assert read[0] == whole[11][0][1][0][0] // ROWS


def test_another_number_of_processes_goes_on_with_the_shards_that_follow(folders, caplog):
    images, _ = streamed(folders["parquet"])
    first = [order(images, rank, 2) for rank in range(2)]
    for batches in first:
        list(islice(batches, 2))
    positions = [positions_of(batches, 2)[0] for batches in first]
    reached = max(unit for unit, *_ in positions)
    later = order(images, 0, 1, 4, positions)
    assert later.position == [reached + 1, 0, 0] and "had 2 processes, this one has 1" in caplog.text


# Samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_the_number_of_workers(kind, folders):
    images, _ = streamed(folders[kind], kind, random_flip=True, dataloader_timeout=60)
    images.check()
    runs = [list(islice(batches_of(images, order(images), workers), 8)) for workers in (0, 1, 2)]
    for batches in zip(*runs):
        for other in batches[1:]:
            assert other["caption"] == batches[0]["caption"] and other["bad"] == []
            assert all(torch.equal(other[name], batches[0][name]) for name in ("pixels", "noise", "timestep", "index"))
    captions = [f"{index // ROWS}-{index % ROWS}" for index in runs[0][0]["index"].tolist()]
    assert runs[0][0]["caption"] == captions


def test_random_numbers_are_those_of_the_index_whatever_the_order(folders):
    samples = []
    for size, processes in ((5, 1), (9, 2)):
        images, _ = streamed(folders["parquet"], shuffle_buffer_size=size)
        drawn = [key for batch in islice(order(images, 0, processes), 10) for key in batch]
        samples.append({(epoch, rows[0][0]): images[epoch, rows] for epoch, rows in drawn})
    both = samples[0].keys() & samples[1].keys()
    assert len(both) > 9
    for key in both:
        first, second = (each[key] for each in samples)
        assert all(torch.equal(first[name], second[name]) for name in ("noise", "timestep", "lpl_choice", "pixels"))


def test_nothing_is_decoded_before_it_is_needed(folders, monkeypatch):
    images, _ = streamed(folders["parquet"])
    decoded = []
    monkeypatch.setattr("lpl.data.reading.open_image", lambda *given: decoded.append(1) or open_image(*given))
    batches = batches_of(images, order(images, 0, 1, 4, [[0, 0, 3]]), 0)
    next(batches)
    assert len(decoded) == 4


def test_a_sample_that_cannot_be_read_is_replaced_and_named(tmp_path):
    rows = [(encoded(number), f"0-{number}") for number in range(12)]
    rows[4], rows[7] = (b"no picture", "0-4"), (encoded(7), None)
    rows[9] = ({"bytes": None, "path": __file__}, "0-9")
    write_shard(tmp_path / "000.parquet", rows)
    images, _ = streamed(tmp_path)
    images.check()
    runs = [list(islice(batches_of(images, order(images), workers), 3)) for workers in (0, 2)]
    bad = dict(found for batch in runs[0] for found in batch["bad"])
    assert sorted(bad) == [4, 7, 9] and "caption" in bad[7] and "out of the data set" in bad[9]
    assert images.file_names([4]) == {4: "000.parquet, row 4"} and "row 4" in images.name(4)
    captions = Counter(caption for batch in runs[0] for caption in batch["caption"])
    assert captions.total() == 12 and not captions.keys() & {"0-4", "0-7", "0-9"}
    assert [batch["caption"] for batch in runs[0]] == [batch["caption"] for batch in runs[1]]


def test_the_first_image_stands_in_where_no_other_can_be_read(tmp_path):
    write_shard(tmp_path / "0.parquet", [(encoded(0), "good")])
    write_shard(tmp_path / "1.parquet", [(b"bad", f"{number}") for number in range(30)])
    images, _ = streamed(tmp_path)
    images.check()
    batches = list(islice(batches_of(images, order(images), 0), 16))
    assert {caption for batch in batches for caption in batch["caption"]} == {"good"}
    assert len({place for batch in batches for place, _ in batch["bad"]}) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_shard_costs_what_cannot_be_read_of_it(kind, folders, tmp_path):
    for file in folders[kind].iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.name.startswith("003") else content)
    images, _ = streamed(tmp_path, kind)
    images.check()
    found = [index for epoch, index in keys(order(images)) if epoch == 1]
    assert set(found) < {*EVERY, 3 * ROWS} and {index for index in EVERY if index // ROWS != 3} < set(found)
    bad = dict(item for batch in islice(batches_of(images, order(images), 0), 9) for item in batch["bad"])
    (place,) = (place for place, reason in bad.items() if "the rest of the shard cannot be read" in reason)
    assert place // ROWS == 3 and all(place >= index for index in found if index // ROWS == 3)


def test_a_shard_that_is_gone_ends_the_run(tmp_path):
    images, _ = streamed(write(tmp_path, (4, 4)))
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(LostShard, match="shard . cannot be read from row 0 on .*No such file"):
        next(batches_of(images, order(images), 0))


def test_a_shard_that_is_lost_ends_the_run_with_a_sentence(folders, sd_pipeline, tmp_path, monkeypatch):
    read = []

    def lost(dataset, shard, data):
        read.append(shard)
        yield from shard_rows(dataset, shard, data)
        if len(read) > 12:
            raise LostShard(f"--streaming: shard {shard} cannot be read from row 3 on (the network is gone)")

    monkeypatch.setattr("lpl.data.streaming.shard_rows", lost)
    with pytest.raises(SystemExit) as left:
        train(sd_pipeline, folders["parquet"], tmp_path, **RUN | {"checkpointing_steps": 1, "max_train_steps": 50})
    assert "cannot be read from row 3 on (the network is gone)" in left.value.code
    assert "is complete; to continue once it can be read again, run the same command" in left.value.code


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_never_comes_ends_the_run_and_is_named(workers, tmp_path, monkeypatch):
    """A loader asks for its first batches before it is there."""
    images, _ = streamed(write(tmp_path, (12,)), dataloader_timeout=0.4)
    never = threading.Event()

    def hangs(dataset, shard, data):
        for index, row in shard_rows(dataset, shard, data):
            if index % ROWS == 7:
                never.wait()
            yield index, row

    monkeypatch.setattr("lpl.data.streaming.shard_rows", hangs)
    try:
        with pytest.raises(HungLoader, match="shard 0, row 7, took longer than --dataloader_timeout 0.4"):
            list(islice(batches_of(images, order(images), workers), 3))
    finally:
        never.set()


def test_slow_rows_one_after_the_other_are_no_hang(tmp_path, monkeypatch):
    images, _ = streamed(write(tmp_path, (12,)), dataloader_timeout=0.4)

    def slow(dataset, shard, data):
        for indexed in shard_rows(dataset, shard, data):
            time.sleep(0.15)
            yield indexed

    monkeypatch.setattr("lpl.data.streaming.shard_rows", slow)  # a block of five takes longer than the timeout
    assert len(list(islice(batches_of(images, order(images), 0), 3))) == 3


def test_nobody_waits_for_a_row_that_is_read_ahead():
    never = threading.Event()
    items = read_ahead(iter(lambda: never.wait(20 * next(numbers)), None), lambda item: item.result())
    numbers = iter(range(2))
    start = time.monotonic()
    assert next(items) is False
    items.close()
    assert time.monotonic() - start < 10
    never.set()


def test_a_row_is_sent_to_a_loaders_process_once(tmp_path):
    images, _ = streamed(write(tmp_path, (40,)), shuffle_buffer_size=40)
    for batch in islice(order(images), 12):  # across the end of a block
        sent = bytes(ForkingPickler.dumps(batch))
        rows = {index: row for _, near in batch for index, row in near}
        assert len(rows) == 5 and all(len(near) == 5 for _, near in batch)
        assert all(sent.count(row["image"]["bytes"]) == 1 for row in rows.values())


def test_labels_that_the_model_does_not_know_cost_their_sample(tmp_path):
    names = ClassLabel(names=["cat", "dog", "owl"])
    write_shard(tmp_path / "0.parquet", [(encoded(number), number % 3) for number in range(9)], names)
    images, _ = streamed(tmp_path, num_classes=2)
    images.empty_caption = 2
    images.check()
    batches = list(islice(batches_of(images, order(images), 0), 2))
    assert {label for batch in batches for label in batch["caption"]} == {0, 1}
    assert any("the class label is 2" in reason for batch in batches for _, reason in batch["bad"])


# What is trained on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 7])
def test_what_is_held_out_is_not_trained_on(processes, folders):
    images, held_out = streamed(folders["tar"], "tar", validation_every_nth=3, num_validation_samples=4)
    assert held_out["txt"] == ["0-0", "0-3", "0-6", "1-0"]
    found = [key for rank in range(processes) for key in keys(order(images, rank, processes))]
    assert sorted(index for epoch, index in found if epoch == 0) == [index for index in EVERY if index % ROWS % 3]


def test_the_first_samples_alone_are_read_into_memory(folders):
    images, held_out = streamed(folders["parquet"], max_train_samples=8, validation_every_nth=5)
    assert images.dataset["text"] == ["0-1", "0-2", "0-3", "0-4", "0-6", "1-1", "1-2", "3-1"] and images.length == 8
    assert held_out["text"][:3] == ["0-0", "0-5", "1-0"] and len(held_out) == 7
    assert images[0, 3]["caption"] == "0-4"


def test_nothing_to_train_on_is_an_error(tmp_path):
    for name, lengths, rows in (("empty", (0, 0), []), ("bad", (), [(b"", "a")] * 3), ("one", (1, 1), [])):
        write(tmp_path / name, lengths)
        if rows:
            write_shard(tmp_path / name / "0.parquet", rows)
        images, _ = streamed(tmp_path / name, validation_every_nth=None if name != "one" else 2)
        words = r"none of the first 3 images can be read \(the first: " if rows else "no images to train on"
        with pytest.raises(ValueError, match=words):
            images.check()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"image_column": "picture"}, "'picture'.*--image_column.*its columns are image, text, else"),
        ({"image_column": "text"}, "'text'.*holds no images"),
        ({"caption_column": "else"}, "'else'.*must hold strings.*first value is 0"),
    ],
)
def test_wrong_columns_are_refused(flags, words, folders):
    with pytest.raises(ValueError, match=words):
        streamed(folders["parquet"], **flags)


# The script ----------------------------------------------------------------------------------------------------------


RUN = {
    "streaming": True,
    "shuffle_buffer_size": 5,
    "max_train_steps": 5,
    "train_batch_size": 3,
    "gradient_accumulation_steps": 2,  # 30 samples: the second epoch of 23 is reached
    "checkpointing_steps": 100,
    "lpl_measuring_steps": 2,
    "random_flip": True,
    "validation_every_nth": 6,
    "validation_steps": 3,
}


@pytest.mark.parametrize("kind, workers, stop", [("parquet", 0, 1), ("tar", 2, 4)])
def test_an_interrupted_run_equals_the_uninterrupted_one(kind, workers, stop, folders, sd_pipeline, tmp_path):
    image, caption = KINDS[kind]
    flags = RUN | {"image_column": image, "caption_column": caption, "dataloader_num_workers": workers}
    whole = train(sd_pipeline, folders[kind], tmp_path / "whole", **flags | {"dataloader_num_workers": 1})
    part = train(sd_pipeline, folders[kind], tmp_path / "part", **flags | {"checkpointing_steps": stop})
    for checkpoint in part.glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{stop}":
            checkpoint.rename(tmp_path / checkpoint.name)
    (part / "metrics.jsonl").unlink()
    train(sd_pipeline, folders[kind], part, **flags, resume_from_checkpoint="latest")
    assert same(weights(part / "unet"), weights(whole / "unet"))
    assert metrics(part) == metrics(whole)[stop:] and len(metrics(whole)) == 5
    assert validation_metrics(part) == [entry for entry in validation_metrics(whole) if entry[0] > stop]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"max_train_steps": None}, "--streaming: .*give --max_train_steps"),
        ({"validation_steps": None}, "--streaming: .*give --validation_steps"),
        ({"validation_steps": None, "validation_every_nth": None, "validation_prompts": ["a"]}, "--validation_steps"),
        ({"max_bad_samples": "0.1"}, "--max_bad_samples 0.1: .*give a number"),
        ({"validation_every_nth": None, "validation_split": "test"}, "use --validation_every_nth"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size 0: it must be more than 0"),
    ],
)
def test_flags_that_need_the_number_of_images_are_refused(flags, words, folders, sd_pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(sd_pipeline, folders["parquet"], tmp_path / "run", **RUN | flags)
    assert re.search(words, capsys.readouterr().err)


def test_a_folder_without_shards_or_with_two_kinds_is_refused(image_folder, folders, sd_pipeline, tmp_path, capsys):
    for kind in KINDS:
        write(tmp_path / "both", (1,), kind)
    for folder, words in ((image_folder, "neither; a folder of images is read without"), (tmp_path / "both", "both")):
        with pytest.raises(SystemExit) as error:
            train(sd_pipeline, folder, tmp_path / "run", **RUN)
        assert error.value.code == 2 and f"this one has {words}" in capsys.readouterr().err


def test_some_of_a_stream_is_trained_on_as_any_data_set(folders, sd_pipeline, tmp_path):
    flags = RUN | {"max_train_samples": 6, "max_train_steps": None, "num_train_epochs": 2, "validation_steps": None}
    run = train(sd_pipeline, folders["parquet"], tmp_path / "run", **flags)
    assert len(metrics(run)) == 2 and len(validation_metrics(run)) == 2


@pytest.mark.slow
def test_a_data_set_on_the_hub_is_streamed_from_there(folders, sd_pipeline, tmp_path):
    flags = RUN | {"max_train_steps": 2}
    local = train(sd_pipeline, folders["parquet"], tmp_path / "local", **flags)
    with HubServer() as hub:
        hub.repos["user/pictures"] = Repository()
        for file in folders["parquet"].iterdir():
            hub.repos["user/pictures"].files[f"data/train-{file.name}"] = file.read_bytes()
        words = arguments(
            *(sd_pipeline, tmp_path / "none", tmp_path / "run"),
            dataset_name="user/pictures",
            train_data_dir=None,
            **flags,
        )
        environment = os.environ | hub.env | {"ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home")}
        subprocess.run(
            [sys.executable, "train_text_to_image_lpl.py", *words], cwd=ROOT, env=environment, check=True, timeout=120
        )
    assert metrics(tmp_path / "run") == metrics(local)
    assert same(weights(tmp_path / "run/unet"), weights(local / "unet"))
    assert not list(tmp_path.rglob("*.parquet"))  # nothing is kept of what was read


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(folders, sd_pipeline, tmp_path):
    options = ("--standalone", "--nproc_per_node=2")
    flags = RUN | {"module": "torch.distributed.run", "checkpointing_steps": 2}
    whole = launch(sd_pipeline, folders["parquet"], tmp_path / "whole", *options, **flags)
    part = tmp_path / "part"
    for more in ({"max_train_steps": 2}, {"resume_from_checkpoint": "latest"}):
        launch(sd_pipeline, folders["parquet"], part, *options, **flags | more)
    assert same(weights(part / "unet"), weights(whole / "unet"))
    assert [record["loss"] for record in metrics(part)] == [record["loss"] for record in metrics(whole)]
