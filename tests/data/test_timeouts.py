"""Reads that do not finish are given up; if one cannot be interrupted, the file is named."""

import multiprocessing
import os
import signal
import threading
import time

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature

from lpl.data.dataset import TrainingImages
from lpl.data.order import KeyedBatches
from lpl.data.timeouts import HungLoader, Readings, TookTooLong, at_most, watched
from tests.data.test_dataset import images_of, static
from tests.data.test_loader import batches_of


@pytest.fixture
def pipe(tmp_path):
    """A file that can be opened when somebody writes to it, and nobody does."""
    path = tmp_path / "a.png"
    os.mkfifo(path)
    return path


def with_pipe(pipe, seconds):
    """Four images, of which the third is the pipe."""
    paths = [pipe.with_name(f"{number}.png") for number in range(4)]
    for number in (0, 1, 3):
        static(seed=number).save(paths[number])
    paths[2] = pipe
    rows = {"image": list(map(str, paths)), "text": [f"picture {number}" for number in range(4)]}
    images = images_of(dataloader_timeout=seconds, train_batch_size=2, train_data_dir=str(pipe.parent))
    images.dataset = Dataset.from_dict(rows).cast_column("image", ImageFeature(decode=False))
    return images


def epoch(images, workers):
    """Two batches, which have all four samples."""
    batches = batches_of(images, KeyedBatches(4, 2, 0, 0, 1, 0), workers)
    return [next(batches) for _ in range(2)]


def test_what_takes_too_long_is_interrupted():
    start = time.monotonic()
    with pytest.raises(TookTooLong, match="took longer than 0.1 s"), at_most(0.1):
        time.sleep(20)
    assert time.monotonic() - start < 5
    with at_most(0.05):
        pass
    time.sleep(0.1)  # nothing comes afterwards


def test_an_exception_that_gets_lost_is_raised_again():
    start = time.monotonic()
    with pytest.raises(TookTooLong), at_most(0.1):
        for _ in range(2):
            try:
                time.sleep(20)
            except TookTooLong:
                if time.monotonic() - start > 1:
                    raise
    assert time.monotonic() - start < 10


def test_a_timer_that_runs_already_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with at_most(5):
            time.sleep(0.05)
        assert not rung
        time.sleep(0.5)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_take_their_time():
    done = []

    def read():
        with at_most(0.05):
            time.sleep(0.2)
        done.append(1)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_never_opens_costs_its_sample(workers, pipe):
    batches = epoch(with_pipe(pipe, 0.5), workers)
    bad = [found for batch in batches for found in batch["bad"]]
    assert [place for place, _ in bad] == [2] and "took longer than 0.5 s (--dataloader_timeout)" in bad[0][1]
    captions = [caption for batch in batches for caption in batch["caption"]]
    assert sorted(captions) == ["picture 0", "picture 1", "picture 3", "picture 3"]


def test_it_is_waited_for_once(pipe):
    images = with_pipe(pipe, 0.3)
    images[0, 2]
    start = time.monotonic()
    assert images[1, 2]["bad"][0][0] == 2
    assert time.monotonic() - start < 0.25


@pytest.mark.parametrize("hangs, words", [(True, "a.png"), (False, "no batch came for")])
def test_what_cannot_be_interrupted_ends_the_run_and_is_named(hangs, words, pipe, monkeypatch):
    """As code that hangs outside of Python: its process heeds no signal."""
    main, sample = os.getpid(), TrainingImages.__getitem__
    monkeypatch.setattr("lpl.data.timeouts.STARTING", 2.0)

    def hang(self, key):
        if os.getpid() != main and key[1] == 2:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            if not hangs:
                time.sleep(1000)
        return sample(self, key)

    monkeypatch.setattr(TrainingImages, "__getitem__", hang)
    with pytest.raises(HungLoader, match=words):
        epoch(with_pipe(pipe, 0.5), 1)


def test_slow_files_one_after_the_other_are_no_hang(monkeypatch):
    images = images_of(*(static(seed=seed) for seed in range(4)), dataloader_timeout=0.5, train_batch_size=4)
    monkeypatch.setattr("lpl.data.timeouts.STARTING", 0.1)
    candidates = TrainingImages.candidates

    def slow(self, index):
        for place, read in candidates(self, index):
            yield place, lambda read=read: time.sleep(0.4) or read()

    monkeypatch.setattr(TrainingImages, "candidates", slow)
    batch = next(batches_of(images, KeyedBatches(4, 4, 0, 0, 1, 0), 1))
    assert batch["bad"] == []


@pytest.mark.parametrize("gone", [True, False])
def test_a_worker_that_is_gone_is_told_from_a_lost_connection(gone):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0 if gone else 60,))
    worker.start()
    readings = Readings(1)
    readings._table[0, 0] = worker.pid
    if gone:
        worker.join()

    def batches():
        raise ConnectionResetError("by peer")
        yield

    with pytest.raises(RuntimeError if gone else ConnectionResetError, match="is gone" if gone else "by peer"):
        next(watched(batches(), readings, 0, str))
    worker.kill()
    worker.join()


def test_readings_of_the_main_process_are_not_noted():
    readings = Readings(0)
    with readings.noted(3):
        assert readings.running() == {}
