"""Features of sets: in the images' order, computed once for the same content, shared by processes."""

# ruff: noqa: F811 (fixtures of another file)

import logging
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from lpl.evaluation import Preprocessing, compare, folder_images, listed_images, load_network, set_features
from lpl.evaluation.cache import cache_folder, features_key
from tests.evaluation.test_networks import Means, Unnamed, cache, dinov2, images, pictures  # noqa: F401


def test_features_are_those_of_the_images_in_their_order(images):
    found = set_features(images, load_network(Means()), batch_size=3)
    expected = [np.asarray(image).mean((0, 1)) for image in images]
    assert found.shape == (7, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_features_are_computed_once_for_the_same_content(images, pictures, tmp_path, cache):
    module = Means()
    first = set_features(images, load_network(module))
    assert module.calls == 7 and len(list(cache.iterdir())) == 1
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    again = folder_images(tmp_path, Preprocessing(48))
    assert np.array_equal(set_features(again, load_network(module)), first) and module.calls == 7


@pytest.mark.parametrize("change", ["pixel", "order", "fewer", "weights", "resolution"])
def test_features_are_computed_anew_where_something_has_changed(images, pictures, change):
    module = Means()
    set_features(images, load_network(module))
    module.calls = 0
    if change == "pixel":
        changed = pictures[0].copy()
        changed.paste((0, 0, 0), (0, 0, 8, 8))
        pictures = [changed, *pictures[1:]]
    elif change == "order":
        pictures = pictures[::-1]
    elif change == "fewer":
        pictures = pictures[:-1]
    elif change == "weights":
        module.scale.data += 1
    other = listed_images(pictures, "other", Preprocessing(32 if change == "resolution" else 48))
    found = set_features(other, load_network(module))
    assert module.calls == len(other)
    np.testing.assert_allclose(found[0], module.scale.item() * np.asarray(other[0]).mean((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_broken_caches_are_written_anew(images, cache, content):
    module = Means()
    first = set_features(images, load_network(module))
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if content is None else content)
    assert np.array_equal(set_features(images, load_network(module)), first) and module.calls == 14
    assert np.array_equal(set_features(images, load_network(module)), first) and module.calls == 14


def test_features_of_what_says_nothing_of_itself_are_not_kept(images, cache):
    module = Unnamed()
    first = set_features(images, load_network(module))
    assert np.array_equal(set_features(images, load_network(module)), first) and module.calls == 14
    assert not cache.exists()


def test_features_are_not_kept_where_that_is_said(images, cache):
    """Nor are those taken that are kept already."""
    module = Means()
    first = set_features(images, load_network(module), keep=False)
    assert module.calls == 7 and not cache.exists()
    set_features(images, load_network(module))
    assert np.array_equal(set_features(images, load_network(module), keep=False), first) and module.calls == 21


def test_where_features_are_kept(images, tmp_path, cache, monkeypatch):
    set_features(images, load_network(Means()), cache_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1 and not cache.exists()
    assert cache_folder() == cache
    monkeypatch.delenv("LPL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lpl" / "features"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(images, cache, caplog):
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        found = set_features(images, load_network(Means()))
    assert len(found) == 7 and "not cached" in caplog.text


def test_features_that_find_no_room_on_the_disk_are_not_cached(images, cache, caplog, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lpl.evaluation.cache.save_file", full)
    assert len(set_features(images, load_network(Means()))) == 7
    assert "not cached" in caplog.text and not list(cache.iterdir())


def test_features_that_are_not_finite_are_refused_and_not_kept(images, cache):
    with pytest.raises(ValueError, match="^Means: some features of crops are not finite"):
        set_features(images, load_network(Means(float("nan"))))
    assert not cache.exists()


def test_keys_depend_on_where_one_digest_ends(dinov2):
    network = load_network(dinov2)
    assert features_key(network, ["ab", "c"]) != features_key(network, ["a", "bc"])


# Several processes


def _embed_in_process(rank, port, pictures, cache, keep, queue):
    from accelerate import PartialState

    world = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if torch.cuda.is_available() else {}
    os.environ.update({name: str(value) for name, value in (world | where | on_cpu).items()})
    PartialState._shared_state.clear()
    module = Means()
    images = listed_images(pictures, "crops", Preprocessing(48))
    calls, found, settings = [], [], {"batch_size": 2, "cache_dir": cache[rank], "progress": False, "keep": keep}
    for _ in range(2):
        found.append(set_features(images, load_network(module), **settings))
        calls.append(module.calls)
        PartialState().wait_for_everyone()
    queue.put((rank, calls, found, compare(found[0], found[0][::-1], ["fid", "kid"])))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["shared", "apart", "nowhere"])
def test_two_processes_share_the_work_and_both_get_all(images, pictures, tmp_path, where):
    """Also where only the first one sees what it kept, as on two machines: both have to compute then."""
    folders = [tmp_path / "first", tmp_path / ("second" if where == "apart" else "first")]
    expected = set_features(images, load_network(Means()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # which spares the imports
    queue = context.Queue()
    workers = [
        context.Process(
            target=_embed_in_process, args=(rank, port, pictures, folders, where != "nowhere", queue), daemon=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    results = sorted((queue.get(timeout=60) for _ in workers), key=lambda result: result[0])
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for (_, calls, found, distances), mine in zip(results, (4, 3)):
        assert calls == ([mine, mine] if where == "shared" else [mine, 2 * mine])  # each its part
        assert all(np.array_equal(features, expected) for features in found)
        assert distances == compare(expected, expected[::-1], ["fid", "kid"])
    assert len(list(tmp_path.glob("first/*"))) == (where != "nowhere") and not (tmp_path / "second").exists()
