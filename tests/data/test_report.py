"""python -m lpl.data: what it counts, what it decodes, the contact sheet, and what it refuses."""

import json
import runpy
import shlex
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lpl.data import command, report
from lpl.data.sheet import frame_of, sheet_of, tile_of


SIZES = {"square": (64, 64), "wide": (64, 128), "tall": (128, 48), "small": (24, 32)}  # height, width


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Four images with captions, one of them twice, one that is cut short, one without a caption, and an archive."""
    place = tmp_path / "images"
    place.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        picture(size, number).save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"a {name} picture")
    (place / "again.png").write_bytes((place / "wide.png").read_bytes())
    (place / "again.txt").write_text("a wide picture")
    (place / "cut.png").write_bytes((place / "square.png").read_bytes()[:2000])
    (place / "cut.txt").write_text("a picture, cut short")
    picture((64, 64), 9).save(place / "mute.png")
    (place / "more.zip").write_bytes(b"x")
    return place


@pytest.fixture
def shown(tmp_path, capsys):
    """Runs the command; returns its words, and its numbers."""

    def run(*words, fails=False):
        places = ("--data_cache_dir", tmp_path / "cache", "--cache_dir", tmp_path / "cache")
        files = ("--json", tmp_path / "facts.json", "--contact_sheet", tmp_path / "sheet.png")
        words = [str(word) for word in (*words, *places, *files, "--dataloader_num_workers", 0)]
        if fails:
            with pytest.raises(SystemExit) as ending:
                command.main(words)
            return str(ending.value)
        command.main(words)
        return capsys.readouterr().out, json.loads((tmp_path / "facts.json").read_text())

    return run


def looked_at(folder, tmp_path, *words):
    """The images that the command looks at."""
    flags = ["--data_cache_dir", tmp_path / "cache", "--cache_dir", tmp_path / "cache", "--dataloader_num_workers", 0]
    return command.look_at(*command.parsed([str(word) for word in (folder, *flags, *words)])).images


def test_it_says_what_is_there_and_what_is_not_used(folder, shown, tmp_path):
    said, facts = shown(folder, "--resolution", 64)
    assert (facts["images"], facts["samples_per_epoch"], facts["held_out"]) == (7, 7, 0)
    reasons = {found["file"]: found["reason"] for found in facts["files"]["unreadable"]}
    assert reasons.keys() == {"cut.png", "mute.png"} and "no caption" in reasons["mute.png"]
    assert facts["files"]["same"] == [["again.png", "wide.png"]] and "again.png = wide.png" in said
    assert any("more.zip" in words for words in facts["warnings"]) and "more.zip" in said
    assert Image.open(tmp_path / "sheet.png").width > 600 and str(tmp_path / "sheet.png") in said


def test_sizes_and_what_training_makes_of_them(folder, shown):
    _, facts = shown(folder, "--resolution", 64)
    sizes = facts["sizes"]
    assert (sizes["smallest"], sizes["median"], sizes["largest"]) == ([24, 32], [64, 64], [64, 128])
    assert sizes["shapes"] == {"portrait": 1, "square": 3, "landscape": 3}
    assert sizes["enlarged"] == 2  # the small one, and the tall one, which is 48 px wide
    assert sizes["cut"]["most"] == pytest.approx(1 - 48 / 128)
    assert sizes["cut"]["mean"] == pytest.approx((2 * (1 - 64 / 128) + 1 - 48 / 128 + 1 - 24 / 32) / 7)
    assert facts["buckets"] == {"sizes": [{"size": [64, 64], "samples": 7}], "left_out": 0}


def test_buckets_are_those_of_training(folder, shown, tmp_path):
    words = ("--resolution", 64, "--aspect_ratio_buckets", "64,64;48,80", "--validation_every_nth", 7)
    said, facts = shown(folder, *words)
    assert facts["held_out"] == 1 and facts["images"] == 6
    found = {tuple(bucket["size"]): bucket["samples"] for bucket in facts["buckets"]["sizes"]}
    items = looked_at(folder, tmp_path, *words).items
    assert found == {size: len(of_size) for size, of_size in items.buckets.items()}
    assert found[48, 80] == 1 and facts["buckets"]["left_out"] == len(items.left_out) == 2  # small, tall
    assert "48 x 80 px" in said and any("smaller than all" in words for words in facts["warnings"])


def test_captions_are_counted_and_drawn_as_in_training(folder, shown, tmp_path):
    words = ("--resolution", 64, "--trigger_word", "sks", "--caption_prefix", "I see")
    said, facts = shown(folder, *words)
    captions = facts["captions"]
    assert (captions["captions"], captions["different"], captions["missing"]) == (6, 5, 1)
    assert captions["words"] == {"shortest": 6, "median": 6, "longest": 7}
    assert captions["repeated"] == [["sks, I see a wide picture", 2]]
    assert captions["kind"] == "words" and captions["frequent"][0] == ["picture", 6]
    images = looked_at(folder, tmp_path, *words)
    assert captions["examples"][0] == images[0, 0]["caption"] == "sks, I see a wide picture"
    assert "sks, I see a wide picture" in said


def test_captions_of_tags(folder, shown):
    for file in folder.glob("*.txt"):
        file.write_text("cat, blue sky, grass, sun, 1girl")
    _, facts = shown(folder, "--resolution", 64, "--shuffle_tags", "--proportion_empty_prompts", 1)
    assert facts["captions"]["kind"] == "tags" and ["blue sky", 6] in facts["captions"]["frequent"]
    assert set(facts["captions"]["examples"]) == {"(dropped)"}


def test_a_large_data_set_is_decoded_in_part(folder, shown, monkeypatch):
    monkeypatch.setattr(report, "DECODED", 2)
    monkeypatch.setattr(command, "DECODED", 2)
    said, facts = shown(folder, "--resolution", 64)
    assert facts["files"] == {"decoded": 2, "unreadable": [], "same": None}
    assert "2 of 7, evenly spaced" in said and "not looked for" in said
    _, facts = shown(folder, "--resolution", 64, "--read_all")
    assert facts["files"]["decoded"] == 7 and len(facts["files"]["unreadable"]) == 2 and facts["files"]["same"]


def test_workers_find_the_same(folder, tmp_path):
    images = looked_at(folder, tmp_path, "--resolution", 64)
    images = replace(images, data=replace(images.data, dataloader_num_workers=2))
    items = report.items_to_decode(images, everything=True)
    assert report.unreadable(images, items).keys() == {1, 2}  # cut, mute


def test_data_sets_and_a_recipe(folder, shown, tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    picture((64, 64), 5).save(others / "other.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"learning_rate: 1.0e-5\nresolution: 64\ndatasets:\n  - train_data_dir: {folder}\n    repeats: 2\n"
        f"  - train_data_dir: {others}\n    instance_prompt: another one\n    loss_weight: 0.5\n"
    )
    said, facts = shown("--config", recipe)
    assert facts["images"] == 8 and facts["samples_per_epoch"] == 15
    assert facts["data_sets"] == [["images", "7 images x 2, loss weight 1"], ["others", "1 image, loss weight 0.5"]]
    assert "of others" in said and "64 px" in said


def test_class_labels(class_folder, shown):
    said, facts = shown(class_folder, "--resolution", 32, "--class_labels")
    assert sum(count for _, count in facts["captions"]["classes"]) == 9 and len(facts["captions"]["classes"]) == 3
    assert facts["captions"]["classes"][0][0] in said


@pytest.mark.parametrize("apart", [False, True])
def test_masks_are_counted(apart, folder, shown, tmp_path):
    masks = tmp_path / "masks" if apart else folder
    masks.mkdir(exist_ok=True)
    Image.new("L", (64, 64), 255).save(masks / ("square.png" if apart else "square-masklabel.png"))
    flags = ("--mask_data_dir", masks) if apart else ("--mask_column", "mask")
    said, facts = shown(folder, "--resolution", 64, *flags)
    assert facts["masks"]["images"] == 1 and "1 of 7 have one" in said and "no effect" not in said


# The contact sheet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_the_frame_is_the_crop(tmp_path, flip):
    """The pixels in the frame are those of the sample."""
    place = tmp_path / "images"
    place.mkdir()
    picture((64, 160)).save(place / "a.png")
    (place / "a.txt").write_text("a")
    seeds = range(50)
    for seed in seeds:
        images = looked_at(place, tmp_path, "--resolution", 64, "--random_flip", "--seed", seed)
        if images.draws(0, 0).flip == flip:
            break
    left, top, right, bottom = frame_of(images, 0, report.read_item(images, 0))
    assert (top, bottom) == (0, 1) and right - left == pytest.approx(64 / 160)
    cut = np.asarray(picture((64, 160)))[:, round(left * 160) : round(right * 160)]
    sample = ((images[0, 0]["pixels"] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(sample, cut[:, ::-1] if flip else cut)


def test_tiles_show_what_is_wrong(folder, tmp_path):
    Image.new("L", (128, 64), 0).save(folder / "wide-masklabel.png")
    flags = ("--resolution", 64, "--mask_column", "mask", "--unmasked_weight", 0.5)
    images = looked_at(folder, tmp_path, *flags)
    tiles = {tile.name.split()[0]: tile for tile in (tile_of(images, item) for item in range(7))}
    assert tiles["cut.png"].image is None and "truncated" in tiles["cut.png"].caption
    assert tiles["small.png"].alert and tiles["small.png"].badge == "64 px, x 2.7"
    assert not tiles["square.png"].alert and tiles["square.png"].badge == "64 px"
    assert tiles["wide.png"].mask.getextrema() == (0, 0) and tiles["square.png"].mask.getextrema() == (255, 255)
    plain = sheet_of(looked_at(folder, tmp_path, *flags[:2]), "images", 3)
    assert sheet_of(images, "images", 7).height > plain.height > 300


# What it refuses -----------------------------------------------------------------------------------------------------


def test_a_sheet_of_one_image(folder, shown, tmp_path):
    shown(folder, "--num_images", 1)
    assert (tmp_path / "sheet.png").is_file()


def test_nothing_to_train_on(tmp_path, shown):
    place = tmp_path / "images"
    place.mkdir()
    assert "give a folder of images" in shown(fails=True)
    assert "the folder has no images" in shown(place, fails=True)
    (place / "mute.png").write_bytes(b"")
    assert "there are no captions; put a metadata.jsonl beside" in shown(place, fails=True)
    (place / "mute.png").unlink()
    (place / "a.png").write_text("x")
    (place / "a.txt").write_text("a")
    assert "nothing to train on: none of the images can be read" in shown(place, fails=True)


def test_a_sheet_is_not_written_into_the_data(folder, capsys):
    with pytest.raises(SystemExit) as ending:
        command.main([str(folder), "--contact_sheet", str(folder / "sheet.png")])
    assert "it lies in the data's folder" in str(ending.value) and not (folder / "sheet.png").exists()


def test_a_recipe_cannot_name_files_to_write(folder, shown, tmp_path):
    """Only flags of the data are read from a recipe, which may come from the Hub."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"json: {tmp_path}/other.json\ncontact_sheet: {tmp_path}/other.png\nresolution: 64\n")
    shown(folder, "--config", recipe)
    assert not list(tmp_path.glob("other.*"))
    request, _ = command.parsed([str(folder), "--config", str(recipe)])
    assert request.json is None and request.contact_sheet == "contact_sheet.png"


def test_what_strangers_write_does_not_reach_the_terminal(folder, shown):
    (folder / "wide.txt").write_text("a \x1b[31mred\x07 one")
    said, _ = shown(folder, "--resolution", 64)
    assert "\x1b" not in said and "a ?[31mred? one" in said


def test_ctrl_c_does_not_wait_for_the_workers(monkeypatch):
    """They ignore it; see tests/tools/test_process.py."""
    left = []
    monkeypatch.setattr("sys.argv", ["lpl.data", "--verbose"])
    monkeypatch.setattr("lpl.tools.process.leave_after", left.append)
    runpy.run_module("lpl.data", run_name="__main__")
    assert left == [command.main]


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: contact_sheet.png)" in text and "SUPPRESS" not in text


def test_the_command_of_a_run(folder, tmp_path):
    """Given back, it shows the same data."""
    words = ("--resolution", 64, "--aspect_ratio_buckets", "auto", "--caption_prefix", "two words")
    _, config = command.parsed([str(word) for word in (folder, *words)])
    given = command.command_of(config, 7, False)
    assert given.startswith("python -m lpl.data ") and "'two words'" in given and given.endswith("--seed 7")
    again = command.parsed(shlex.split(given)[3:])[1]
    assert again.data == config.data and again.optimization.seed == 7
