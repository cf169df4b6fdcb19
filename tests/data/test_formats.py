"""Formats: HEIC and AVIF, the first of several frames, and what is said of files that are not read."""

import ast
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from trainer import ROOT

from lpl.data.folder import why_no_images
from lpl.data.formats import SUFFIXES
from lpl.data.reading import open_image, to_rgb
from tests.data.test_dataset import coordinates, levels, loaded
from tests.data.test_folder import also


RED, BLUE = Image.new("RGB", (48, 32), "#f00000"), Image.new("RGB", (48, 32), "#0000f0")


def encoded(image, kind, **options):
    """The bytes of the image as a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content):
    """The image that training reads from such bytes."""
    return to_rgb(open_image({"bytes": content, "path": None}, []))


@pytest.mark.parametrize("name, kind", [("a.heic", "HEIF"), ("a.HIF", "HEIF"), ("a.avif", "AVIF")])
def test_heic_and_avif_are_read(name, kind, tmp_path):
    folder = also(tmp_path / "data", {name: encoded(coordinates(64, 64), kind, quality=95), "a.txt": "a"})
    sample = loaded(folder)[0, 0]
    assert sample["bad"] == [] and sample["original_size"].tolist() == [64, 64]
    wanted = np.asarray(coordinates(64, 64).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(levels(sample) - wanted).mean() < 3


@pytest.mark.parametrize("kind", ["HEIF", "AVIF", "WEBP", "JPEG"])
def test_each_format_is_turned_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    image = decoded(encoded(coordinates(64, 32), kind, exif=exif.tobytes(), quality=95))
    assert image.size == (32, 64)
    corner = np.asarray(image)[3, -4].astype(int)  # what was at the top left
    assert corner[0] < 16 and corner[1] < 16


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_white_of_each_mode_of_heic(mode):
    """Those that it can hold; a mode that it cannot is converted when it is written."""
    white = (
        Image.fromarray(np.full((32, 32), 65535, np.uint16))
        if mode == "I;16"
        else Image.new("RGB", (32, 32), "white").convert(mode)
    )
    assert np.asarray(decoded(encoded(white, "HEIF", quality=95))).min() > 250


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO", "HEIF"])
def test_the_first_frame_is_read(kind):
    content = encoded(RED, kind, save_all=True, append_images=[BLUE])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    image = decoded(content)
    assert image.size == (48, 32) and np.abs(np.asarray(image).astype(int) - (240, 0, 0)).max() <= 12


def test_without_pillow_heif_the_sentence_says_what_to_install(tmp_path):
    folder = also(tmp_path / "data", {"a.heic": encoded(RED, "HEIF"), "b.HEIC": b""})
    assert ".heic" in SUFFIXES and why_no_images(folder) is None
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from lpl.data.formats import not_read; print(not_read({'.heic': 3, '.heif': 1, '.avif': 1, '.svg': 2}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ast.literal_eval(done.stdout) == [
        "files of kinds that are not read (3 .heic, 1 .heif); pip install pillow-heif, which reads them",
        "files of kinds that are not read (2 .svg); convert them to .png or .jpg",
    ]


def test_a_folder_names_what_is_to_be_installed(tmp_path, monkeypatch):
    for module in ("formats", "folder"):
        monkeypatch.setattr(f"lpl.data.{module}.SUFFIXES", {".png"})
    assert "2 .heic); pip install pillow-heif" in why_no_images(also(tmp_path, {"a.heic": b"", "b.HEIC": b""}))
