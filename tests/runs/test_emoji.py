"""The data set of emoji: what is trained on, what is held out, and under which names."""

import hashlib
import importlib.util
import io
import sys
import tarfile

import pyarrow.parquet
import pytest
from PIL import Image
from trainer import ROOT


SPEC = importlib.util.spec_from_file_location("make_data", ROOT / "examples/emoji/make_data.py")
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
    return [pyarrow.parquet.read_table(folder / f"emoji/{part}").to_pylist() for part in ("train", "held_out")]


def test_what_is_trained_on_and_what_is_held_out(monkeypatch, tmp_path):
    plain = ["1f600", "1f44d", "1f469-200d-1f4bb"]
    toned = ["1f44d-1f3fd", "1f44d-1f3ff", "1f469-1f3fd-200d-1f4bb", "1f64c-1f3fd"]  # the last has no plain one
    left_out = ["1f1ec-1f1e7", "0023-fe0f-20e3", "1f3f4-e0067-e007f", "1f9d11f3fb"]
    train, held_out = make(monkeypatch, tmp_path, [*plain, *toned, *left_out])
    assert [row["text"] for row in train] == ["thumbs up sign", "woman, personal computer", "grinning face"]
    assert [row["code_points"] for row in held_out] == ["1f44d-1f3fd", "1f469-1f3fd-200d-1f4bb"]
    picture = Image.open(io.BytesIO(train[0]["image"]["bytes"]))
    assert picture.size == (8, 8) and min(picture.getpixel((0, 0))) > 240 and picture.getpixel((4, 4))[0] > 200
    assert "MIT License" in (tmp_path / "emoji/README.md").read_text()


def test_another_package_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path, ["1f600"], digest="other")
    assert "this is not the file that npm pack @lobehub/fluent-emoji-3d@1.1.0 downloads" in capsys.readouterr().err
