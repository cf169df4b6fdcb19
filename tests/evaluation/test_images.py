import json
import logging

import numpy as np
import pytest
import skimage.data
from PIL import EpsImagePlugin, Image

from lpl.evaluation import ImageSet, Preprocessing, folder_images, listed_images
from lpl.evaluation.images import NAMED, has_captions, pixel_digest


@pytest.fixture(scope="module")
def astronaut():
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture
def folder(tmp_path, astronaut):
    """Three crops and their captions, as `metadata.jsonl` has them."""
    lines = []
    for index, name in enumerate(["c.png", "a.png", "b.png"]):
        astronaut.crop((index, 0, index + 90, 64)).save(tmp_path / name)
        lines.append({"file_name": name, "text": f"caption of {name}"})
    write_metadata(tmp_path, lines)
    return tmp_path


def write_metadata(folder, lines):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def columns(*greys, height=4):
    """An image of one grey per column."""
    return Image.fromarray(np.tile(np.array(greys, dtype=np.uint8), (height, 1)))


# Preprocessing


def test_the_largest_square_in_the_middle_is_resized(astronaut):
    wide = astronaut.crop((0, 100, 300, 300))
    expected = wide.crop((50, 0, 250, 200)).resize((64, 64), Image.Resampling.LANCZOS)
    assert Preprocessing(64)(wide) == expected
    tall = astronaut.crop((100, 0, 200, 171))
    expected = tall.crop((0, 35, 100, 135)).resize((64, 64), Image.Resampling.BICUBIC)
    assert Preprocessing(64, interpolation="bicubic")(tall) == expected


@pytest.mark.parametrize("width", [4, 5, 6, 7])
def test_what_has_the_right_size_keeps_its_pixels(width):
    """Also at an odd difference of the sides, where a middle of half pixels would mix neighbours."""
    image = columns(*range(0, 30 * width, 30))
    found = np.asarray(Preprocessing(4)(image))[0, :, 0].tolist()
    start = (width - 4) // 2
    assert found == list(range(30 * start, 30 * (start + 4), 30))


def test_any_mode_becomes_upright_rgb_on_white(tmp_path, astronaut):
    small = astronaut.resize((8, 8))
    for mode in ("L", "P", "CMYK", "LA", "RGBA"):
        found = Preprocessing(8)(small.convert(mode))
        assert (found.mode, found.size) == ("RGB", (8, 8))
    clear = small.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.array([[255] * 4 + [0] * 4], np.uint8), 8, 0)))
    found = np.asarray(Preprocessing(8)(clear))
    assert (found[:, 4:] == 255).all() and (found[:, :4] == np.asarray(small)[:, :4]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    clear.save(tmp_path / "turned.png", exif=exif)
    found = np.asarray(Preprocessing(8)(Image.open(tmp_path / "turned.png")))
    assert (found[4:] == 255).all() and (found[:4] == np.rot90(np.asarray(small), -1)[:4]).all()


def test_16_bits_are_not_clipped():
    image = Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))
    assert np.asarray(Preprocessing(4)(image))[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"resolution": 0}, "--resolution 0"),
        ({"resolution": 8, "interpolation": "sinc"}, "lanczos"),
    ],
)
def test_wrong_preprocessing_is_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Preprocessing(**settings)


# Sets


def test_digests_go_by_what_the_network_sees(tmp_path, astronaut):
    preprocessing = Preprocessing(32)
    astronaut.save(tmp_path / "one.png")
    astronaut.save(tmp_path / "other.tiff")
    files = folder_images(tmp_path, preprocessing)
    listed = listed_images([astronaut], "listed", preprocessing)
    assert files.digest(0) == files.digest(1) == listed.digest(0) == listed.digest(-1)
    changed = np.array(astronaut)
    changed[200:216, 200:216] ^= 255
    others = [
        listed_images([Image.fromarray(changed)], "changed", preprocessing),
        listed_images([astronaut], "filter", Preprocessing(32, interpolation="bilinear")),
        listed_images([astronaut], "size", Preprocessing(33)),
    ]
    assert len({images.digest(0) for images in [listed, *others]}) == 4


def test_digests_hold_the_shape():
    image = columns(1, 2, 3, 4, height=1)
    turned = Image.frombytes("L", (1, 4), image.tobytes())
    assert pixel_digest(image) != pixel_digest(turned)


def test_a_set_is_a_sequence(astronaut):
    images = listed_images([columns(0), columns(100), columns(200)], "greys", Preprocessing(2), ["a", "b", "c"])
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 100, 200] and len(images) == 3
    digests = [images.digest(index) for index in range(3)]
    some = images.select([2, 0])
    assert some.captions == ["c", "a"] and [some.digest(0), some.digest(1)] == [digests[2], digests[0]]
    assert some[0].getpixel((0, 0))[0] == 200 and some.name == "greys"
    with pytest.raises(IndexError):
        images.select([3])
    with pytest.raises(IndexError):
        images.digest(3)


def test_a_digest_that_is_known_is_not_computed_again():
    images = ImageSet("greys", [columns(0), columns(100)], Preprocessing(2), digests={1: "known"})
    some = images.select([1, 0])
    assert [some.digest(0), some.digest(1)] == ["known", images.digest(0)] != [images.digest(0)] * 2


def test_captions_have_to_fit(astronaut):
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        ImageSet("set", [astronaut], Preprocessing(8), ["a", "b"])
    with pytest.raises(ValueError, match="no images"):
        listed_images([], "none", Preprocessing(8))


# Folders


def test_folders_are_sorted_and_captioned(folder, astronaut):
    images = folder_images(folder, Preprocessing(64))
    assert images.captions == ["caption of a.png", "caption of b.png", "caption of c.png"]
    assert images[2] == astronaut.crop((13, 0, 77, 64)) and images.name == folder.name
    assert images.digest(2) == pixel_digest(images[2])


def test_without_metadata_there_are_no_captions_and_folders_below_count(tmp_path, astronaut):
    for name in ("cats/b.png", "cats/a.png", "dogs/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        astronaut.save(tmp_path / name)
    images = folder_images(str(tmp_path), Preprocessing(16))
    assert len(images) == 3 and images.captions is None


def test_other_captions_and_lists_of_them(folder):
    write_metadata(folder, [{"file_name": "a.png", "label": "x"}, {"file_name": "b.png", "label": ["y", "z"]}])
    assert folder_images(folder, Preprocessing(16), caption_column="label").captions == ["x", "y"]


def test_captions_of_several_columns_are_the_first_ones_that_there_are(folder):
    rows = [{"file_name": "a.png", "text": " ", "tags": ["x"]}, {"file_name": "b.png", "text": "y", "tags": "z"}]
    write_metadata(folder, rows)
    assert folder_images(folder, Preprocessing(16), caption_column="text:0.1,tags:0.9").captions == ["x", "y"]
    rows = [{"file_name": "a.png", "text:0.1,tags:0.9": "x"}]  # as lpl.compare writes what a run holds out
    write_metadata(folder, rows)
    assert folder_images(folder, Preprocessing(16), caption_column="text:0.1,tags:0.9").captions == ["x"]


def test_what_metadata_does_not_name_is_left_out_with_a_word(folder, caplog):
    write_metadata(folder, [{"file_name": "b.png"}])
    with caplog.at_level(logging.WARNING):
        images = folder_images(folder, Preprocessing(16))
    assert len(images) == 1 and images.captions is None
    assert "2 images are left out" in caplog.text and "1 of 1 lines have no 'text'" in caplog.text


def test_unreadable_files_are_left_out_with_one_warning(folder, caplog):
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])  # its head can be read
    (folder / "metadata.jsonl").unlink()
    for number in range(NAMED + 1):
        (folder / f"d{number}.png").write_text("no image")
    with caplog.at_level(logging.WARNING):
        images = folder_images(folder, Preprocessing(16))
    assert len(images) == 2
    (record,) = caplog.records
    message = record.getMessage()
    assert f"{NAMED + 2} images" in message and "b.png" in message and "and 2 more" in message


def test_captions_stay_with_their_images_where_one_is_missing(folder):
    (folder / "b.png").unlink()
    images = folder_images(folder, Preprocessing(64))
    assert images.captions == ["caption of a.png", "caption of c.png"]
    assert images[1].getpixel((0, 0)) == Image.open(folder / "c.png").getpixel((13, 0))


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        folder_images(tmp_path / "nowhere", Preprocessing(16))
    with pytest.raises(ValueError, match="no readable image"):
        folder_images(tmp_path, Preprocessing(16))
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="no readable image"):
        folder_images(tmp_path, Preprocessing(16))


def test_each_file_is_read_once_for_its_digest_and_size(folder, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, *more, **kwargs: opened.append(file) or real(file, *more, **kwargs)
    )
    images = folder_images(folder, Preprocessing(16))
    digests = [images.digest(index) for index in range(3)]
    assert sorted(opened) == [folder / name for name in ("a.png", "b.png", "c.png")]
    assert digests == [pixel_digest(image) for image in images] and len(set(digests)) == 3


def test_what_is_enlarged_is_counted_and_named(folder, caplog):
    """The crops are 90 x 64; a set of some of them counts its own."""
    columns(0, 200).convert("RGB").save(folder / "b.png")
    with caplog.at_level(logging.WARNING):
        images = folder_images(folder, Preprocessing(64))
    assert f"{folder}: 1 of 3 images are smaller than 64 pixels and are enlarged" in caplog.text
    assert images.enlarged == 1 and images.select([0, 2]).enlarged == 0 and images.select([1, 1, 0]).enlarged == 2
    assert folder_images(folder, Preprocessing(65)).enlarged == 3
    caplog.clear()
    assert folder_images(folder, Preprocessing(2)).enlarged == 0 and not caplog.records


def test_the_shorter_side_decides_what_is_enlarged(tmp_path):
    columns(*range(64), height=8).save(tmp_path / "wide.png")
    assert folder_images(tmp_path, Preprocessing(8)).enlarged == 0
    assert folder_images(tmp_path, Preprocessing(9)).enlarged == 1


def test_what_lies_elsewhere_is_left_out(folder, tmp_path_factory, astronaut, caplog):
    """A line of metadata.jsonl, or a link, that leads out of the folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "other.png"
    astronaut.save(elsewhere)
    (folder / "link.png").symlink_to(elsewhere)
    lines = [{"file_name": name, "text": name} for name in ("a.png", "link.png", str(elsewhere))]
    write_metadata(folder, lines)
    with caplog.at_level(logging.WARNING):
        images = folder_images(folder, Preprocessing(16))
    assert images.captions == ["a.png"]
    assert "2 images are left out because they cannot be read" in caplog.text and "copy it there" in caplog.text


def test_programs_are_not_run_as_images(folder, monkeypatch):
    """EPS is PostScript, which PIL would give to Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("a program was run"))
    (folder / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert Image.open(folder / "b.png").format == "EPS"
    assert folder_images(folder, Preprocessing(16)).captions == ["caption of a.png", "caption of c.png"]


def test_whether_all_have_captions_is_known_from_metadata_alone(folder, tmp_path_factory):
    (folder / "a.png").write_text("no image")
    assert has_captions(folder) and not has_captions(folder, "label")
    write_metadata(folder, [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png"}])
    assert not has_captions(folder) and not has_captions(tmp_path_factory.mktemp("bare"))
    (folder / "metadata.jsonl").write_text("")
    assert not has_captions(folder)


def test_captions_may_be_text_files(tmp_path, astronaut):
    for name in ("a", "b"):
        astronaut.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    assert folder_images(tmp_path, Preprocessing(16)).captions == ["caption of a", "caption of b"]
    assert has_captions(tmp_path)
    (tmp_path / "b.txt").unlink()
    assert folder_images(tmp_path, Preprocessing(16)).captions is None


def test_labels_are_captions_too(folder):
    write_metadata(folder, [{"file_name": "a.png", "label": 0}, {"file_name": "b.png", "label": 12}])
    assert folder_images(folder, Preprocessing(16), caption_column="label").captions == ["0", "12"]


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', '{"file_name": 3}', "[" * 100_000])
def test_broken_metadata_is_refused_with_its_line(folder, line):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match="line 4"):
        folder_images(folder, Preprocessing(16))
