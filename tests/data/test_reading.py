"""One image: geometry, modes, rotation, captions."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lpl.data.reading import MARGIN, Picture, cropped, read_picture, to_rgb
from tests.data.test_dataset import coordinates, images_of, levels, static


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


@pytest.mark.parametrize("size", [(256, 128), (128, 200), (16, 8), (33, 250)])
def test_the_shorter_side_gets_the_resolution_and_the_shape_is_kept(size):
    crop = levels(images_of(coordinates(*size), center_crop=True)[0, 0]).astype(float)
    assert crop.shape == (32, 32, 3)
    step = min(size) / 32  # picture's pixels per pixel of the crop, along both sides
    inner = crop[4:-4, 4:-4]
    for axis, channel in ((1, 0), (0, 1)):
        assert np.diff(inner[..., channel], axis=axis).mean() == pytest.approx(step, rel=0.15)


@pytest.mark.parametrize(
    "picture, size, corner",
    [
        ((48, 32), (32, 24), (0, 12)),  # (width, height), (height, width), (top, left)
        ((48, 32), (16, 48), (8, 0)),
        ((200, 20), (20, 100), (0, 50)),  # ten times as long as high, but only five times the crop's aspect ratio
        ((200, 20), (20, 20), (0, 90)),
        ((20, 200), (20, 20), (90, 0)),
    ],
)
def test_a_crop_need_not_be_square(picture, size, corner):
    pixels, found = cropped(Picture.of(coordinates(*picture)), size, (0.5, 0.5), False, "lanczos")
    crop = levels({"pixels": pixels})
    assert found == corner and crop.shape == (*size, 3)
    assert tuple(crop[0, 0, 1::-1]) == corner
    assert tuple(crop[-1, -1, 1::-1]) == (corner[0] + size[0] - 1, corner[1] + size[1] - 1)


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


def test_bytes_that_are_no_image_are_refused_in_words():
    with pytest.raises(OSError, match="^cannot identify image file in 4 bytes$"):
        read_picture({"bytes": b"text", "path": None}, [])


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


# Reduced sizes -------------------------------------------------------------------------------------------------------


def waves(width, height):
    """A smooth picture, of which a shift by a pixel shows in every place."""
    y, x = np.indices((height, width)) / max(width, height)
    numbers = np.stack([x, y, (1 + np.sin(60 * x) * np.cos(40 * y)) / 2], -1)
    return Image.fromarray((255 * numbers).astype(np.uint8))


def jpeg(image, kind="JPEG", orientation=1, **options):
    """A row's image: the bytes of a file."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, exif=exif.tobytes(), quality=95, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def both(file, monkeypatch, **changes):
    """The sample of a JPEG as it is trained on, and as it is if the whole file is decoded."""
    images = images_of(file, random_flip=True, **changes)
    samples = [images[epoch, 0] for epoch in range(4)]
    monkeypatch.setattr("lpl.data.reading.REDUCIBLE", ())
    return zip(samples, [images[epoch, 0] for epoch in range(4)])


@pytest.mark.parametrize("size, mean", [((999, 517), 0.5), ((601, 1199), 0.5), ((640, 640), 0.8), ((1999, 133), 0.3)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_gives_the_same_crop(orientation, size, mean, monkeypatch):
    """The mean difference is at least 0.5 if the rounding of reduced sides is forgotten."""
    file = jpeg(waves(*size), orientation=orientation)
    for reduced, whole in both(file, monkeypatch):
        for name in ("original_size", "crop_top_left"):
            assert torch.equal(reduced[name], whole[name])
        difference = np.abs(levels(reduced) - levels(whole))
        assert reduced["bad"] == [] and difference.max() <= 6 and difference.mean() < mean


@pytest.mark.parametrize("kind, mode", [("JPEG", "L"), ("JPEG", "CMYK"), ("MPO", "RGB")])
def test_each_kind_of_jpeg_is_reduced(kind, mode, monkeypatch):
    file = jpeg(waves(640, 480).convert(mode), kind)
    assert read_picture(file, [], (32, 32)).image.size == (160, 120)
    for reduced, whole in both(file, monkeypatch):
        assert np.abs(levels(reduced) - levels(whole)).max() <= 3


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (129, 2000), (128, 128), (127, 127), (70, 300)])
@pytest.mark.parametrize("crop", [(32, 32), (24, 64), (16, 16)])
def test_no_image_is_decoded_at_less_than_twice_its_size_in_training(size, crop):
    for orientation in (1, 6):
        picture = read_picture(jpeg(waves(*size), orientation=orientation), [], crop)
        assert (picture.width, picture.height) == (size if orientation == 1 else size[::-1])
        scale = max(crop[0] / picture.height, crop[1] / picture.width)
        for decoded, whole in zip(picture.image.size, (picture.width, picture.height)):
            assert decoded == whole or decoded >= MARGIN * round(whole * scale)


def test_what_cannot_or_must_not_be_reduced_is_decoded_whole():
    whole = waves(640, 480)
    assert read_picture(jpeg(whole), [], (32, 32), "nearest_exact").image.size == whole.size  # takes its own pixels
    assert read_picture(jpeg(whole), []).image.size == whole.size
    assert read_picture(jpeg(whole, "PNG"), [], (32, 32)).image.size == whole.size
    opened = Image.open(io.BytesIO(jpeg(whole)["bytes"]))  # by somebody else, who may use it again
    assert read_picture(opened, [], (32, 32)).image.size == opened.size == whole.size


# Types of pixels -----------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 16).reshape(4, 4)


def opened(image, kind, **options):
    """The image as a file of that kind holds it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


def ramp_of(kind, white):
    return Image.fromarray((RAMP * white).astype(kind))


FITS = b"".join(
    card.ljust(80)
    for card in (b"SIMPLE  = T", b"BITPIX  = -32", b"NAXIS   = 2", b"NAXIS1  = 4", b"NAXIS2  = 4", b"END".ljust(2480))
)
WHITE = {  # which value is white is known
    "16-bit TIFF": lambda: opened(ramp_of("uint16", 65535), "TIFF"),
    "16-bit PNG": lambda: opened(ramp_of("uint16", 65535), "PNG"),
    "16-bit PGM": lambda: Image.open(io.BytesIO(b"P5 4 4 65535\n" + (RAMP * 65535).astype(">u2").tobytes())),
    "10-bit PGM": lambda: Image.open(io.BytesIO(b"P5 4 4 1023\n" + (RAMP * 1023).astype(">u2").tobytes())),
    "float TIFF": lambda: opened(ramp_of("float32", 1), "TIFF"),
    "TIFF where 0 is white": lambda: opened(
        Image.fromarray((65535 * (1 - RAMP)).astype("uint16")), "TIFF", tiffinfo={262: 0}
    ),
    "LAB TIFF": lambda: opened(
        Image.merge("LAB", [ramp_of("uint8", 255), *[Image.new("L", (4, 4), 128)] * 2]), "TIFF"
    ),
}
UNKNOWN = {
    "integers of 32 bits": (lambda: opened(ramp_of("int32", 255), "TIFF"), "signed integers"),
    "floating-point numbers to 255": (lambda: opened(ramp_of("float32", 255), "TIFF"), "from 0 to 255"),
    "negative ones": (lambda: opened(Image.fromarray((RAMP - 0.5).astype("float32")), "TIFF"), "from -0.5 to 0.5"),
    "NaN": (lambda: opened(Image.fromarray(np.full((4, 4), np.nan, "float32")), "TIFF"), "from nan to nan"),
    "of an instrument": (lambda: Image.open(io.BytesIO(FITS.ljust(5760, b"\0"))), "not known (FITS, mode F)"),
}


@pytest.mark.parametrize("name", WHITE)
def test_black_stays_black_and_white_stays_white(name):
    levels = np.asarray(to_rgb(WHITE[name]())).astype(int)
    assert np.abs(levels - (RAMP * 255)[..., None]).max() <= 10  # the lightness of LAB is another curve


@pytest.mark.parametrize("name", UNKNOWN)
def test_pixels_without_a_known_white_are_a_bad_sample(name):
    make, reason = UNKNOWN[name]
    sample = images_of(make(), static())[0, 0]
    ((place, why),) = sample["bad"]
    assert place == 0 and reason in why and "save it with 8 or 16 bits" in why
    assert sample["caption"] == "picture 1"
