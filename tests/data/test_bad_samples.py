"""Bad data costs the sample, not the run: it is listed with its reason, replaced, and limited."""

import io
import json
import os
import signal
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from trainer import metrics, train

from lpl.config.data_checks import parse_limit
from lpl.data.bad_samples import BadSamples
from lpl.tools.files import entries
from lpl.training.log import Log


def picture(mode="RGB", size=(40, 36)):
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG that says of itself that it has 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GOOD = {
    "palette.png": saved(picture("P")),
    "alpha.png": saved(picture("RGBA")),
    "grey_alpha.png": saved(picture("LA")),
    "sixteen.png": saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)),
    "cmyk.jpg": saved(picture("CMYK"), "JPEG"),
    "bits.png": saved(picture("1")),
    "one.png": saved(picture(size=(1, 1))),
    "wide.png": saved(picture(size=(20_000, 3))),
    "plain.png": saved(picture()),
}
BAD = {
    "zero.png": b"",
    "text.png": b"no picture",
    "cut.png": saved(picture(size=(200, 200)))[:5000],
    "cut.jpg": saved(picture(size=(200, 200)), "JPEG")[:800],
    "bomb.png": bomb(),
}


def folder_of(place, files, captions=None):
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    lines = [{"file_name": name, "text": (captions or {}).get(name, f"a {name}")} for name in files]
    (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


FLAGS = {"lpl_weight": 0, "max_train_steps": 8, "train_batch_size": 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_kind_of_bad_image_is_listed_once_and_replaced(sd_pipeline, tmp_path, workers):
    folder = folder_of(tmp_path / "data/images", GOOD | BAD)
    run = train(sd_pipeline, folder, tmp_path / "run", dataloader_num_workers=workers, **FLAGS)
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in listed) == sorted(BAD)
    assert all(line["reason"] for line in listed)
    assert len(metrics(run)) == 8 and all(np.isfinite(record["loss"]) for record in metrics(run))


def test_good_images_of_any_kind_are_not_listed(sd_pipeline, tmp_path):
    folder = folder_of(tmp_path / "data/images", GOOD)
    run = train(sd_pipeline, folder, tmp_path / "run", **FLAGS)
    assert not (run / "bad_samples.jsonl").exists()


def test_captions_that_are_missing_cost_their_sample(sd_pipeline, tmp_path):
    folder = folder_of(tmp_path / "data/images", GOOD, {"plain.png": None})
    run = train(sd_pipeline, folder, tmp_path / "run", **FLAGS)
    (line,) = (run / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "plain.png" and "caption" in line


@pytest.mark.parametrize("limit", ["2", "0.15"])  # of 14
def test_a_limit_ends_the_run_with_the_list_and_a_checkpoint(sd_pipeline, tmp_path, limit):
    folder = folder_of(tmp_path / "data/images", GOOD | BAD)
    with pytest.raises(SystemExit, match="--max_bad_samples.*of 14 samples.*bad_samples.jsonl"):
        train(sd_pipeline, folder, tmp_path / "run", max_bad_samples=limit, **FLAGS)
    assert len((tmp_path / "run/bad_samples.jsonl").read_text().splitlines()) > 2
    assert list((tmp_path / "run").glob("checkpoint-*/progress.json"))


def test_a_list_goes_on_at_a_resume_and_begins_anew_otherwise(sd_pipeline, tmp_path):
    folder = folder_of(tmp_path / "data/images", GOOD | BAD)
    flags = FLAGS | {"checkpointing_steps": 4}
    run = train(sd_pipeline, folder, tmp_path / "run", **flags | {"max_train_steps": 4})
    train(sd_pipeline, folder, run, resume_from_checkpoint="latest", **flags)
    listed = [json.loads(line)["file"] for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(BAD)
    for name in BAD:
        (folder / name).write_bytes(GOOD["plain.png"])
    train(sd_pipeline, folder, run, **FLAGS)
    assert not (run / "bad_samples.jsonl").exists()


def test_a_list_that_a_crash_cut_short_goes_on(tmp_path):
    """Within a letter; what is written next begins a line of its own, and what was cut off comes again."""
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    images = SimpleNamespace(rows=9, file_names=lambda rows: dict.fromkeys(rows, "ä\u2028.png"))

    def resumed(*found):
        listed = BadSamples(accelerator, images, tmp_path, "2", resumed=True)
        listed.add((row, "no image") for row in found)
        return listed.write()

    resumed(1, 2)
    whole = (tmp_path / "bad_samples.jsonl").read_bytes()
    (tmp_path / "bad_samples.jsonl").write_bytes(whole[: whole.rindex("ä".encode()) + 1])
    for _ in range(2):
        assert resumed(2) is None and (tmp_path / "bad_samples.jsonl").read_bytes() == whole
    assert "3 of 9 samples" in resumed(7)
    assert [entry["image"] for entry in entries(tmp_path / "bad_samples.jsonl")] == [1, 2, 7]


def test_a_run_that_is_asked_to_end_lists_them_first(sd_pipeline, tmp_path, monkeypatch):
    """Not only at the steps of the log, and the resumed run does not come by them again."""
    folder, observe = folder_of(tmp_path / "data/images", GOOD | BAD), Log.observe

    def asked(self, step, *args):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        observe(self, step, *args)

    monkeypatch.setattr(Log, "observe", asked)
    with pytest.raises(SystemExit):
        train(sd_pipeline, folder, tmp_path / "run", logging_steps=100, **FLAGS)
    assert len(entries(tmp_path / "run/bad_samples.jsonl")) > 2


@pytest.mark.parametrize("text", ["-1", "1.5", "few", "nan"])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"--max_bad_samples {text}: accepted are"):
        parse_limit(text)


def test_places_that_hold_another_file_are_listed_anew(tmp_path):
    """The data has changed before the resume."""
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    for names in (["a.png", "b.png", "c.png"], ["a.png", "new.png"]):
        images = SimpleNamespace(rows=len(names), file_names=lambda rows, names=names: {n: names[n] for n in rows})
        listed = BadSamples(accelerator, images, tmp_path, resumed=True)
        listed.add((row, "no image") for row in range(len(names)))
        listed.write()
    files = [entry["file"] for entry in entries(tmp_path / "bad_samples.jsonl")]
    assert files == ["a.png", "b.png", "c.png", "new.png"]
