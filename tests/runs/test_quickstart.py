"""The quickstart: its emoji, its pipeline, and how its autoencoder is trained."""

import hashlib
import importlib.util
import io
import itertools
import re
import shlex
import sys
import tarfile

import pyarrow.parquet
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from trainer import ROOT


QUICKSTART = ROOT / "examples/quickstart"
SPEC = importlib.util.spec_from_file_location("make_data", QUICKSTART / "make_data.py")
make_data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_data)


def package(folder, names):
    """A package with a red disc on a transparent ground under each name."""
    disc, content = Image.new("RGBA", (16, 16)), io.BytesIO()
    disc.paste("red", (4, 4, 12, 12))
    disc.save(content, "WEBP", lossless=True)
    place = folder / "package.tgz"
    with tarfile.open(place, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(f"package/assets/{name}.webp")
            entry.size = len(content.getvalue())
            tar.addfile(entry, io.BytesIO(content.getvalue()))
    return place


def make(monkeypatch, folder, names, digest=None):
    place = package(folder, names)
    monkeypatch.setattr(make_data, "SHA512", digest or hashlib.sha512(place.read_bytes()).hexdigest())
    words = ["--output_dir", folder / "emoji", "--package", place, "--resolution", 8]
    monkeypatch.setattr(sys, "argv", ["make_data.py", *map(str, words)])
    make_data.main()
    return [pyarrow.parquet.read_table(folder / f"emoji/{part}").to_pylist() for part in ("plain", "toned")]


def test_who_has_a_skin_tone(monkeypatch, tmp_path):
    without = ["1f600", "1f44d", "1f469-200d-1f4bb"]
    tones = ["1f44d-1f3fd", "1f44d-1f3ff", "1f469-1f3fd-200d-1f4bb", "1f64c-1f3fd"]  # the last has no plain one
    left_out = ["1f1ec-1f1e7", "0023-fe0f-20e3", "1f3f4-e0067-e007f", "1f9d11f3fb"]
    plain, toned = make(monkeypatch, tmp_path, [*without, *tones, *left_out])
    assert [row["text"] for row in plain] == ["thumbs up sign", "woman, personal computer", "grinning face"]
    assert [row["code_points"] for row in toned] == ["1f44d-1f3fd", "1f469-1f3fd-200d-1f4bb"]
    picture = Image.open(io.BytesIO(plain[0]["image"]["bytes"]))
    assert picture.size == (8, 8) and min(picture.getpixel((0, 0))) > 240 and picture.getpixel((4, 4))[0] > 200
    assert "MIT License" in (tmp_path / "emoji/README.md").read_text()


def test_another_package_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path, ["1f600"], digest="other")
    assert "this is not the file that npm pack @lobehub/fluent-emoji-3d@1.1.0 downloads" in capsys.readouterr().err


def test_the_shipped_data_set():
    parts = [pyarrow.parquet.read_table(QUICKSTART / f"data/{part}") for part in ("plain", "toned")]
    assert [len(part) for part in parts] == [1579, 302]
    assert set(parts[1]["text"].to_pylist()) <= set(parts[0]["text"].to_pylist())
    assert "MIT License" in (QUICKSTART / "data/README.md").read_text()


# The pipeline --------------------------------------------------------------------------------------------------------


def test_the_shipped_pipeline_draws_what_it_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples/study"))
    features = importlib.import_module("features")
    folder = QUICKSTART / "pipeline"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 20e6
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    captions = pyarrow.parquet.read_table(QUICKSTART / "data/plain")["text"].to_pylist()
    options = {"height": 96, "width": 96, "max_sequence_length": 4, "num_inference_steps": 10, "guidance_scale": 2.0}
    images = pipeline(captions[100::150], generator=torch.manual_seed(0), output_type="np", **options).images
    places = features.places_of(captions)
    with torch.no_grad():
        named = features.load().named(torch.from_numpy(images).permute(0, 3, 1, 2) * 255)
    assert sum(named == torch.tensor([places[caption] for caption in captions[100::150]])) >= 6


def test_samples_have_real_pictures_beside_them():
    (prompts,) = re.findall(r"--validation_prompts (.*) .$", (QUICKSTART / "finetune.sh").read_text(), re.MULTILINE)
    captions = pyarrow.parquet.read_table(QUICKSTART / "data/toned")["text"].to_pylist()
    assert len(names := shlex.split(prompts)) == 8 and set(names) <= set(captions)


# The autoencoder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def autoencoder(monkeypatch):
    """The module that trains it, with noise of 16 px for pictures."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    module = importlib.import_module("train_autoencoder")
    pictures = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    monkeypatch.setattr(module, "read_pictures", lambda data: (pictures, []))
    return module


def trained(autoencoder, monkeypatch, folder, minutes=600.0):
    words = ["--data", "-", "--output_dir", folder, "--steps", 20, "--batch_size", 4, "--channels", 8, 8, 16]
    words += ["--save_minutes", 1, "--max_minutes", minutes]
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", *map(str, words)])
    autoencoder.main()
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_an_autoencoder_that_was_stopped_goes_on_exactly(autoencoder, monkeypatch, tmp_path):
    whole = trained(autoencoder, monkeypatch, tmp_path / "whole")
    clock = itertools.count(0, 30)  # seconds; every look at the clock takes half a minute
    monkeypatch.setattr(autoencoder.time, "monotonic", lambda: next(clock))
    runs = 0
    while not (tmp_path / "parts/reconstructions.png").is_file():
        parts = trained(autoencoder, monkeypatch, tmp_path / "parts", minutes=3)
        runs += 1
    assert runs > 3 and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_grown_autoencoder_begins_with_the_outer_levels(autoencoder):
    smaller = autoencoder.grown(None, (8, 8), 4, 16)
    nn.init.normal_(smaller.decoder.up_blocks[1].resnets[0].conv2.weight)
    larger = autoencoder.grown(smaller, (8, 8, 16), 4, 16)
    for one, other in (
        (smaller.encoder.down_blocks[0], larger.encoder.down_blocks[0]),
        (smaller.decoder.up_blocks[1], larger.decoder.up_blocks[2]),
    ):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, other.state_dict()[name]), name
    inner = larger.decoder.up_blocks[0].resnets[0]
    features = torch.randn(1, 16, 4, 4)
    assert torch.equal(inner(features, None), features)
