"""A folder of images: which captions it gives, what is refused or left out, and what the sentences say."""

import io
import json
import logging
import os
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from commands import refusal
from PIL import PngImagePlugin
from trainer import arguments, settings, train, validation_metrics

from lpl.data.folder import Contents, image_files, why_no_images
from lpl.tools.files import entries
from tests.data.test_dataset import load_data, loaded, static
from tests.data.test_fingerprint import of_folder
from tests.data.test_streaming import encoded


def also(folder, files):
    """A folder with these files too: name -> text or bytes."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(content)
    return folder


def images(folder, *names):
    return also(folder, {name: encoded(number) for number, name in enumerate(names)})


def captions(folder, **flags):
    return list(loaded(folder, **flags).dataset["text"])


def why(folder, **flags):
    """The sentence with which a folder is refused when it is loaded."""
    with pytest.raises(ValueError) as error:
        loaded(folder, **flags)
    assert "\n" not in str(error.value) and f"--train_data_dir {folder}: " in str(error.value)
    return str(error.value)


# Text files ----------------------------------------------------------------------------------------------------------


def test_captions_come_from_text_files_of_the_same_names(tmp_path):
    folder = images(tmp_path / "data", "a.png", "b.JPG", "sub/c.d.png", "e.png")
    texts = {"a.txt": b"\xef\xbb\xbfa cat\r\nsits\r\n", "b.TXT": "a dog", "sub/c.d.caption": "K\xe4fer"}
    also(folder, texts | {"e.txt": "K\xe4fer".encode("utf-16"), "README.txt": "no caption"})
    assert captions(folder) == ["a cat sits", "a dog", "K\xe4fer", "K\xe4fer"]


def test_metadata_wins_over_text_files(tmp_path, caplog):
    folder = images(tmp_path / "data", "a.png", "b.png")
    also(folder, {"a.txt": "text", "b.txt": "text", "metadata.jsonl": '{"file_name": "a.png", "text": "metadata"}'})
    assert captions(folder) == ["metadata"] and "1 image is left out" in caplog.text


def test_an_image_without_a_text_file_is_a_bad_sample(tmp_path, caplog):
    folder = also(images(tmp_path / "data", "a.png", "b.png", "c.png"), {"a.txt": "a", "b.txt": " \n"})
    sample = loaded(folder)[0, 1]
    assert sample["caption"] == "a" and [place for place, _ in sample["bad"]] == [1, 2]
    assert "text file" in sample["bad"][0][1] and "2 of 3 images have no caption" in caplog.text
    assert "1 with an empty text file (b.png), 1 without a text file of the same name (c.png)" in caplog.text
    (folder / "a.txt").write_bytes("K\xe4fer".encode("latin-1"))
    assert "1 with a text file that is not in UTF-8 (a.png), 1 with an empty text file (b.png)" in why(folder)


def test_a_caption_in_each_line(tmp_path, caplog):
    folder = also(images(tmp_path / "data", "a.png", "b.png"), {"a.txt": "a cat\r\n\n \na  dog\n", "b.txt": "a fox"})
    found = loaded(folder, caption_per_line=True)
    assert [{found[epoch, row]["caption"] for epoch in range(20)} for row in range(2)] == [
        {"a cat", "a dog"},
        {"a fox"},
    ]
    assert "no effect" not in caplog.text and "--caption_column" not in caplog.text
    loaded(folder, caption_column="tags")
    assert "captions come from text files, not from --caption_column tags" in caplog.text
    also(folder, {"metadata.jsonl": '{"file_name": "a.png", "text": "one\\ntwo"}'})
    assert loaded(folder, caption_per_line=True)[0, 0]["caption"] == "one\ntwo"
    assert "--caption_per_line has no effect" in caplog.text


def test_the_instance_prompt_is_of_images_without_a_text_file(tmp_path, caplog):
    flags = {"instance_prompt": "sks dog"}
    folder = also(images(tmp_path / "data", "a.png", "b.png", "c.png"), {"b.txt": " "})
    assert [loaded(folder, **flags)[0, place]["caption"] for place in range(3)] == ["sks dog"] * 3
    assert "they get --instance_prompt" in caplog.text
    also(folder, {"a.txt": "a"})
    found = loaded(folder, **flags)
    assert [found[0, place]["caption"] for place in range(3)] == ["a", "sks dog", "sks dog"]
    assert "1 of 3 images have captions of their own" in caplog.text
    bare = loaded(images(tmp_path / "bare", "a.png", "b.png"), **flags)
    assert bare.dataset.column_names == ["image"] and bare[0, 1]["caption"] == "sks dog"
    assert of_folder(tmp_path / "bare", **flags) != of_folder(folder, **flags)


def test_several_columns_of_a_metadata_file(tmp_path):
    folder = images(tmp_path / "data", "a.png", "b.png", "c.png")
    rows = [
        {"file_name": "a.png", "text": "x", "tags": None, "else": 1},
        {"file_name": "b.png", "text": " ", "tags": ["y"]},
        {"file_name": "c.png"},
    ]
    also(folder, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    found = loaded(folder, caption_column="text:0.5,tags:0.5")
    assert found.dataset.column_names == ["image", "text", "tags"]
    assert [found[0, place]["caption"] for place in range(3)] == ["x", "y", "x"]  # the next one replaces the last
    assert "there is no column 'words' (--caption_column)" in why(folder, caption_column="text,words")
    assert "'x' is no share" in why(folder, caption_column="text:x,tags")
    one, other, both = (of_folder(folder, caption_column=words) for words in ("text", "tags", "text,tags"))
    assert len({one, other, both}) == 3 and of_folder(folder, caption_column="text:9,tags:1") == both


def test_a_column_of_exactly_that_name_is_taken(tmp_path):
    row = {"file_name": "a.png", "text:0.5,tags:0.5": "exactly", "text": "x", "tags": "y"}
    folder = also(images(tmp_path / "data", "a.png"), {"metadata.jsonl": json.dumps(row)})
    assert loaded(folder, caption_column="text:0.5,tags:0.5")[0, 0]["caption"] == "exactly"


def test_metadata_without_captions_and_an_instance_prompt(tmp_path):
    folder = also(images(tmp_path / "data", "a.png"), {"metadata.jsonl": '{"file_name": "a.png", "words": "x"}'})
    assert loaded(folder, instance_prompt="sks dog")[0, 0]["caption"] == "sks dog"
    assert "'text'" in why(folder)
    assert "'other'" in why(folder, instance_prompt="sks dog", caption_column="other")


def test_text_files_cannot_lead_out_of_the_folder(tmp_path):
    folder = also(images(tmp_path / "data", "a.png", "b.png", "c.png"), {"a.txt": "a"})
    (folder / "b.txt").symlink_to(also(tmp_path, {"secret": "my own"}) / "secret")
    os.mkfifo(folder / "c.txt")  # whoever opens it waits for ever
    assert captions(folder) == ["a", None, None]


def test_text_files_and_metadata_have_the_same_fingerprint(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    texts, lines = images(tmp_path / "texts", *names), images(tmp_path / "lines", *names)
    also(texts, {f"{name[0]}.txt": f"a {name}" for name in names})
    rows = [json.dumps({"file_name": name, "text": f"a {name}"}) for name in names]
    also(lines, {"metadata.jsonl": "\n".join(rows)})
    assert of_folder(texts) == of_folder(lines)
    (texts / "a.txt").write_text("another")
    assert of_folder(texts) != of_folder(lines)


def test_a_run_on_text_files_holds_out_resumes_and_lists_bad_samples(sd_pipeline, tmp_path):
    folder = images(tmp_path / "data/images", *(f"{number}.png" for number in range(6)))
    also(folder, {f"{number}.txt": f"picture {number}" for number in range(5)})
    flags = {"lpl_weight": 0, "validation_every_nth": 3, "validation_steps": 2, "checkpointing_steps": 2}
    run = train(sd_pipeline, folder, tmp_path / "run", **flags)
    train(sd_pipeline, folder, run, **flags | {"max_train_steps": 4, "resume_from_checkpoint": "latest"})
    whole = train(sd_pipeline, folder, tmp_path / "whole", **flags | {"max_train_steps": 4})
    assert validation_metrics(run) == validation_metrics(whole)
    assert [entry["file"] for entry in entries(run / "bad_samples.jsonl")] == ["5.png"]


# Metadata files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '\ufefffile_name,text\r\na.png,NA\r\nb.png,None\r\nc.png,"null, or\nnil"\r\n',
        'file_name;text\na.png;NA\nb.png;None\nc.png;"null, or\nnil"\n',
        'file_name\ttext\na.png\tNA\n\nb.png\tNone\nc.png\t"null, or\nnil"\n',
    ],
)
def test_words_in_a_csv_are_captions(content, tmp_path):
    folder = also(images(tmp_path / "data", "a.png", "b.png", "c.png"), {"metadata.csv": content})
    assert captions(folder) == ["NA", "None", "null, or\nnil"]


def test_words_in_a_csv_of_a_data_set_are_captions(tmp_path):
    folder = also(images(tmp_path / "data", "a.png", "b.png"), {"metadata.csv": "file_name,text\na.png,NA\nb.png,\n"})
    dataset, _ = load_data(settings(dataset_name=str(folder), cache_dir=str(tmp_path / "cache")))
    assert list(dataset["text"]) == ["NA", None]


def test_a_metadata_file_may_be_jsonl_or_parquet(tmp_path):
    folder = images(tmp_path / "data", "a.png", "b.png")
    line = '{"file_name": "%s.png", "text": "%s\u2028"}\r\n'
    also(folder, {"metadata.jsonl": "\ufeff" + line % ("a", "x") + "\r\n" + line % ("b", "y")})
    assert captions(folder) == ["x\u2028", "y\u2028"]
    (folder / "metadata.jsonl").unlink()
    table = pyarrow.table({"file_name": ["b.png", "a.png"], "text": [["y", "z"], ["x"]]})
    pyarrow.parquet.write_table(table, folder / "METADATA.parquet")
    assert captions(folder) == [["y", "z"], ["x"]]


def test_metadata_files_of_sub_folders_are_read_in_order(tmp_path):
    folder = images(tmp_path / "data", "y/a.png", "x/a.png", "z/a.png")
    also(folder, {f"{name}/metadata.jsonl": f'{{"file_name": "a.png", "text": "{name}"}}' for name in "zxy"})
    assert captions(folder) == ["x", "y", "z"]
    assert "several kinds" in why(also(folder, {"z/metadata.csv": "file_name,text"}))


def test_names_in_metadata_mean_the_file_that_is_there(tmp_path, caplog):
    name = "\xdcn\xef c\xf6de & 'x'.JPG"
    folder = images(tmp_path / "[data]*", "sub/A.PNG", name, "b\nc.png", "d.png", "D.png")
    written = ["sub\\a.png", unicodedata.normalize("NFD", name).lower(), "b\nc.png", str(folder / "d.png"), "d.PNG"]
    rows = [json.dumps({"file_name": word, "text": str(place)}) for place, word in enumerate(written)]
    also(folder, {"metadata.jsonl": "\n".join(rows)})
    data = loaded(folder)
    assert len(data) == 5 and data[0, 0]["bad"] == data[0, 1]["bad"] == data[0, 2]["bad"] == data[0, 3]["bad"] == []
    assert data[0, 4]["bad"][0][0] == 4 and "1 of 5 rows name a file that is not there" in caplog.text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metadata.csv", "file_name,text\na.png,a cat, sitting\n", ["line 2", "3 cells", "2 columns", "quotes"]),
        ("metadata.csv", 'file_name,text\na.png,"a cat\n', ["metadata.csv", "line 2"]),
        ("metadata.csv", "file_name,text\na.png,K\xe4fer\n".encode("latin-1"), ["metadata.csv", "UTF-8"]),
        ("metadata.csv", "file_name,text\n", ["metadata.csv has no rows"]),
        ("metadata.csv", "file_name,caption\na.png,x\n", ["'text'", "did you mean --caption_column caption?"]),
        ("metadata.csv", "file,text\na.png,x\n", ["file, text", "file_name"]),
        ("metadata.jsonl", '[\n{"file_name": "a.png", "text": "a"}\n]', ["metadata.jsonl, line 1", "file_name"]),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "a"}\n{"file_name": "b', ["metadata.jsonl, line 2"]),
        (
            "metadata.jsonl",
            r'{"file_name": "a.png", "text": "a \ud83d"}',
            ["line 1", r"'\ud83d' is no whole character"],
        ),
        ("metadata.jsonl", '{"file_name": 3, "text": "a"}', ["line 1", "file_name is 3"]),
        ("metadata.jsonl", '{"file_name": "a", "text": "a"}', ["none of the 1 files", "data/a for example", "suffix"]),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 3}', ["'text'", "strings", "3"]),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": ["y"]}',
            ["'text'", "several kinds", "'x' and ['y']"],
        ),
        ("metadata.parquet", b"no table", ["cannot be loaded", "metadata.parquet"]),
    ],
)
def test_metadata_that_cannot_be_meant_is_refused(name, content, words, tmp_path):
    sentence = why(also(images(tmp_path / "data", "a.png"), {name: content}))
    assert all(word in sentence for word in words), sentence


def test_class_labels_in_a_csv(tmp_path):
    folder = also(images(tmp_path / "data", "a.png", "b.png"), {"metadata.csv": "file_name,label\na.png,0\nb.png,7\n"})
    config = settings(train_data_dir=str(folder), caption_column="label")
    assert list(load_data(config, 10)[0]["label"]) == [0, 7]


# What else lies there ------------------------------------------------------------------------------------------------


def test_a_place_without_images_is_described(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    zipped = also(tmp_path / "zipped", {"a.zip": b""})
    photos = also(tmp_path / "photos", {"a.cr2": b"", "b.CR2": b""})
    tables = also(tmp_path / "tables", {"a.parquet": b""})
    links = tmp_path / "links"
    links.mkdir()
    (links / "cats").symlink_to(photos)
    for place, words in (
        (empty, "no files"),
        (zipped, "unpacked first (a.zip)"),
        (photos, "2 .cr2); convert them"),
        (tables, "--dataset_name"),
        (links, f"cats is a link to {photos}"),
        (zipped / "a.zip", "this is a file"),
        (tmp_path / "none", "no such folder"),
    ):
        assert words in why_no_images(place)


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.zip", "archive; unpack it"),
        ("a.parquet", "file; give its folder"),
        ("a.png", "file; give its folder"),
        ("dead", "link to"),
    ],
)
def test_a_file_is_no_folder(name, words, sd_pipeline, tmp_path, capsys):
    also(tmp_path, {"a.zip": b"", "a.parquet": b"", "a.png": b""})
    (tmp_path / "dead").symlink_to(tmp_path / "gone")
    message = refusal(capsys, arguments(sd_pipeline, tmp_path / name, tmp_path / "out"))
    assert words in message and f"--train_data_dir {tmp_path / name}" in message


def test_what_is_not_read_is_named(tmp_path, caplog):
    folder = also(images(tmp_path / "data", "a.png", "__MACOSX/b.png", ".hidden/c.png", "._a.png"), {"a.txt": "a"})
    also(folder, {"b.cr2": b"", "more.zip": b"", os.fsdecode(b"\xff.png"): b""})
    (folder / "more").symlink_to(images(tmp_path / "elsewhere", "b.png"))
    with caplog.at_level(logging.WARNING):
        assert captions(folder) == ["a"]
    assert all(words in caplog.text for words in ("more is a link to", "1 .cr2", "(more.zip)", "name is not in UTF-8"))
    assert [file.name for file in image_files(folder)] == ["a.png"]


def test_captions_in_a_file_of_another_name_are_named(sd_pipeline, tmp_path, capsys):
    folder = also(images(tmp_path / "data", "a.png"), {"captions.jsonl": "{}"})
    message = refusal(capsys, arguments(sd_pipeline, folder, tmp_path / "out"))
    assert "captions.jsonl is not read" in message and "metadata.jsonl" in message and "cat.txt" in message


def test_a_snapshot_of_the_hubs_cache_is_a_folder(tmp_path):
    """Its files are links to blobs beside the snapshots."""
    blobs, snapshot = tmp_path / "datasets--a--b/blobs", tmp_path / "datasets--a--b/snapshots/0123/data"
    also(blobs, {"0": encoded(0), "1": '{"file_name": "a.png", "text": "a"}'})
    snapshot.mkdir(parents=True)
    for blob, name in (("0", "a.png"), ("1", "metadata.jsonl"), ("../../mine", "b.png")):
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    also(tmp_path, {"mine": encoded(1)})
    assert loaded(snapshot)[0, 0]["bad"] == [] and captions(snapshot) == ["a"]
    config = settings(dataset_name=str(snapshot), cache_dir=str(tmp_path / "cache"))
    assert list(load_data(config)[0]["text"]) == ["a"]
    (snapshot / "metadata.jsonl").unlink()
    also(snapshot, {"metadata.jsonl": '{"file_name": "b.png", "text": "b"}'})
    with pytest.raises(ValueError, match="b.png is a link to .*/mine, which is not in the data set's folder"):
        loaded(snapshot)[0, 0]


def test_large_texts_and_profiles_in_a_png_do_not_cost_the_image(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 3 * 2**20, zip=True)
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("bomb", "x" * 70 * 2**20, zip=True)
    contents = []
    for options in ({"pnginfo": texts, "icc_profile": bytes(3 * 2**20)}, {"pnginfo": bomb}):
        buffer = io.BytesIO()
        static().save(buffer, "PNG", **options)
        contents.append(buffer.getvalue())
    folder = also(tmp_path / "data", {"a.png": contents[0], "b.png": contents[1], "a.txt": "a", "b.txt": "b"})
    data = loaded(folder)
    assert data[0, 0]["bad"] == [] and "too large" in data[0, 1]["bad"][0][1]
    assert Contents.of(folder).captioned == [str(folder / "a.png"), str(folder / "b.png")]
