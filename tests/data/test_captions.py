"""The caption of a sample: columns and their shares, tags, what stands around it, and what it needs no random number
for."""

import logging
from collections import Counter

import pytest
import torch
from datasets import Dataset
from trainer import same, settings, train, validation_metrics, weights

from lpl.config import held_out
from lpl.data.captions import Captions, caption_columns, caption_rows, columns_of, report_instance_prompt
from lpl.data.dataset import collate, held_out_batches, real_images
from lpl.data.order import Stream, keyed_generator
from tests.data.test_dataset import RANDOM, images_of, over, static
from tests.data.test_folder import also, images


TAGS = "sks, a, b, c, d, e"


def caption(row, column="text", **flags):
    """The caption of a row without random numbers; a string stands for a row with that text."""
    row = {"text": row} if isinstance(row, str) else row
    return Captions.of(settings(caption_column=column, **flags).data).caption(row)


def drawn(row, count=300, column="text", **flags):
    """The captions of a row in many epochs."""
    captions = Captions.of(settings(caption_column=column, **flags).data)
    return [captions.caption(row, 0.0, keyed_generator(0, epoch, 3, Stream.CAPTION)) for epoch in range(count)]


# Columns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, available, expected",
    [
        ("text", [], {"text": 1.0}),
        ("a,b", ["a", "b"], {"a": 1.0, "b": 1.0}),
        (" a : 3 , b : 1 ", [], {"a": 3.0, "b": 1.0}),
        ("a:0.7,b:0", [], {"a": 0.7, "b": 0.0}),
        ("a:0.7", ["a"], {"a": 0.7}),
        ("a:0.7,b:0.3", ["a:0.7,b:0.3", "a", "b"], {"a:0.7,b:0.3": 1.0}),  # a column of that very name
        ("x:y,b", ["x:y", "b"], {"x:y": 1.0, "b": 1.0}),
        ("x:y:2,b:1", ["x:y", "b"], {"x:y": 2.0, "b": 1.0}),
        ("a b", [], {"a b": 1.0}),
    ],
)
def test_columns_and_shares(words, available, expected):
    assert caption_columns(words, available) == expected


@pytest.mark.parametrize(
    "words, why",
    [
        ("a:x,b:1", "'x' is no share"),
        ("a:-1,b:1", "'-1' is no share"),
        ("a:nan,b:1", "'nan' is no share"),
        ("a:inf,b:1", "'inf' is no share"),
        ("a:,b", "'' is no share"),
        ("a:0.7,b", "give a share to each column"),
        ("a:0,b:0", "more than 0 to one of them"),
        ("a,a", "named twice"),
        ("a,", "a name is missing"),
        (",", "a name is missing"),
        (":1", "a name is missing"),
    ],
)
def test_what_are_no_columns_is_refused(words, why):
    with pytest.raises(ValueError, match="^--caption_column ") as error:
        caption_columns(words, ["a", "b"])
    assert why in str(error.value)


def test_columns_are_drawn_by_their_shares():
    counts = Counter(drawn({"a": "x", "b": "y", "c": "z"}, 1000, "a:6,b:3,c:1"))
    assert abs(counts["x"] - 600) < 60 and abs(counts["y"] - 300) < 60 and abs(counts["z"] - 100) < 40


def test_where_a_column_is_empty_the_others_are_drawn():
    counts = Counter(drawn({"a": " \n", "b": "y", "c": "z"}, 1000, "a:8,b:1,c:1"))
    assert set(counts) == {"y", "z"} and abs(counts["y"] - 500) < 60
    assert set(drawn({"a": None, "b": [None, " "], "c": ["z"]}, 20, "a:8,b:1,c:1")) == {"z"}


def test_a_share_of_0_is_for_rows_without_another_text():
    assert set(drawn({"a": "x", "b": "y"}, 200, "a:1,b:0")) == {"x"}
    assert set(drawn({"a": "", "b": "y"}, 20, "a:1,b:0")) == {"y"}


@pytest.mark.parametrize("value", [None, 3, [], [None], {"en": "a cat"}, "", " \t\n", ["", " "]])
def test_what_is_no_caption_is_refused(value):
    with pytest.raises(ValueError, match="--caption_column"):
        Captions("text").caption({"text": value}, 0.5)


def test_of_a_list_those_that_are_texts_are_drawn():
    captions = Captions("text")
    row = {"text": ["a", "", None, "b", " "]}
    assert [captions.caption(row, choice) for choice in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]


def test_images_get_captions_of_several_columns_and_nothing_else_changes():
    rows = [{"image": static(), "text": "x", "tags": ["y", "z"]}]
    one, several = (over(rows, settings(caption_column=words)) for words in ("text", "text:0.5,tags:0.5"))
    counts = Counter(several[epoch, 0]["caption"] for epoch in range(60))
    assert set(counts) == {"x", "y", "z"} and 15 < counts["x"] < 45
    assert all(torch.equal(one[epoch, 0][name], several[epoch, 0][name]) for epoch in range(3) for name in RANDOM)


def test_an_image_without_any_text_gives_way_to_the_next_one():
    rows = [{"image": static(), "text": " ", "tags": None}, {"image": static(), "text": None, "tags": "z"}]
    sample = over(rows, settings(caption_column="text,tags"))[0, 0]
    assert sample["caption"] == "z" and sample["bad"][0][0] == 0 and "it has no caption" in sample["bad"][0][1]


# Instance prompt -----------------------------------------------------------------------------------------------------


def test_the_instance_prompt_is_of_rows_without_a_text():
    flags = {"instance_prompt": "a photo of sks dog"}
    assert caption(" ", **flags) == caption({}, **flags) == "a photo of sks dog"
    assert caption("a cat", **flags) == "a cat"
    assert caption({}, instance_prompt="") == ""


def test_the_default_column_need_not_be_there_with_an_instance_prompt():
    data = settings(instance_prompt="x").data
    assert columns_of(data, ["image"]) == [] and columns_of(data, ["image", "text"]) == ["text"]
    assert columns_of(settings(instance_prompt="x", caption_column="words").data, ["image"]) == ["words"]
    assert columns_of(settings().data, ["image"]) == ["text"]


@pytest.mark.parametrize(
    "texts, said",
    [
        (["a", None, " "], "1 of 3 images have captions of their own"),
        (["a", "b", "c"], "--instance_prompt has no effect"),
        ([None, "", " "], None),
    ],
)
def test_of_how_many_images_the_instance_prompt_is(texts, said, caplog):
    with caplog.at_level(logging.WARNING):
        report_instance_prompt(Dataset.from_dict({"text": texts}), settings(instance_prompt="x").data)
        report_instance_prompt(Dataset.from_dict({"text": texts}), settings().data)
    assert len(caplog.records) == (said is not None) and (said or "") in caplog.text


def test_rows_without_columns_are_as_many_as_images():
    dataset = Dataset.from_dict({"image": [1, 2], "text": ["a", "b"], "tags": ["c", None]})
    assert list(caption_rows(dataset, [])) == [{}, {}]
    assert list(caption_rows(dataset, ["tags", "text"])) == [
        {"tags": "c", "text": "a"},
        {"tags": None, "text": "b"},
    ]


# Tags ----------------------------------------------------------------------------------------------------------------


def test_tags_are_shuffled_but_those_to_keep():
    found = drawn({"text": TAGS}, shuffle_tags=True, keep_tags=1)
    assert all(each.split(", ")[0] == "sks" and sorted(each.split(", ")) == sorted(TAGS.split(", ")) for each in found)
    assert len(set(found)) > 80  # of 120
    firsts = Counter(each.split(", ")[1] for each in found)
    assert set(firsts) == set("abcde") and min(firsts.values()) > 35


def test_tags_are_dropped_but_those_to_keep():
    found = drawn({"text": TAGS}, 1000, tag_dropout=0.25, keep_tags=2)
    assert all(each.startswith("sks, a") and sorted(each.split(", ")[1:]) == each.split(", ")[1:] for each in found)
    counts = Counter(tag for each in found for tag in each.split(", "))
    assert counts["sks"] == counts["a"] == 1000 and all(abs(counts[tag] - 750) < 70 for tag in "bcde")
    assert set(drawn({"text": TAGS}, 3, tag_dropout=1.0)) == {""}


def test_what_shuffling_draws_is_the_same_with_dropout():
    """So that one option can be compared with and without the other."""
    shuffled = drawn({"text": TAGS}, 50, shuffle_tags=True)
    both = drawn({"text": TAGS}, 50, shuffle_tags=True, tag_dropout=0.5)
    orders = [[tag for tag in one.split(", ") if tag in two.split(", ")] for one, two in zip(shuffled, both)]
    assert [", ".join(order) for order in orders] == both


def test_tags_may_be_kept_by_a_mark():
    row, flags = {"text": "sks, dog ||| a, b,c ||| photo,4k"}, {"keep_tags_separator": "|||", "keep_tags": 1}
    found = drawn(row, shuffle_tags=True, **flags)
    assert set(found) == {f"sks, dog, {a}, {b}, {c}, photo, 4k" for a, b, c in map(tuple, ORDERS)}
    assert {each.split(", ")[0] for each in drawn({"text": "sks, a"}, shuffle_tags=True, **flags)} == {"sks"}
    assert set(drawn({"text": "sks ||| a, b"}, shuffle_tags=True, **flags)) == {"sks, a, b", "sks, b, a"}
    assert caption(row, **flags) == "sks, dog, a, b, c, photo, 4k"  # the mark goes in any case


ORDERS = ("abc", "acb", "bac", "bca", "cab", "cba")


def test_another_separator():
    assert set(drawn({"text": "a b;c"}, 50, shuffle_tags=True, tag_separator=";")) == {"a b; c", "c; a b"}
    assert set(drawn({"text": "a_b  c"}, 50, shuffle_tags=True, tag_separator=" ")) == {"a_b c", "c a_b"}


def test_a_text_stays_as_it_is_without_options():
    text = " a,b , ||| c,, [trigger] "
    assert caption(text) == text and set(drawn({"text": text}, 5)) == {text}


def test_tags_of_a_sample_are_keyed_and_differ_between_epochs():
    images = images_of(static(), static(), captions=[TAGS, TAGS], shuffle_tags=True)
    first = [images[epoch, 0]["caption"] for epoch in range(20)]
    assert first == [images[epoch, 0]["caption"] for epoch in range(20)] and len(set(first)) > 15
    assert first != [images[epoch, 1]["caption"] for epoch in range(20)]
    other = images_of(static(), static(), captions=[TAGS, TAGS], shuffle_tags=True, seed=1)
    assert first != [other[epoch, 0]["caption"] for epoch in range(20)]


def test_what_replaces_a_sample_draws_as_if_it_were_alone():
    """However many broken ones were tried before it: a run that knows them already draws the same."""
    rows = [{"image": None, "text": TAGS}, {"image": static(), "text": TAGS}]
    images = over(rows, settings(shuffle_tags=True, caption_column="text,text2"))
    first = [images[epoch, 0]["caption"] for epoch in range(5)]
    images.given_up[0] = "known"
    assert [images[epoch, 0]["caption"] for epoch in range(5)] == first


# Around --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, text, expected",
    [
        ({"trigger_word": "sks"}, "a cat", "sks, a cat"),
        ({"trigger_word": "sks"}, "a sks cat", "a sks cat"),
        ({"trigger_word": "sks"}, "(sks:1.2)", "(sks:1.2)"),
        ({"trigger_word": "man"}, "a woman", "man, a woman"),
        ({"trigger_word": "TOK"}, "a tok", "TOK, a tok"),
        ({"trigger_word": "c++"}, "c++ code", "c++ code"),
        ({"trigger_word": "sks"}, "a [trigger] cat", "a sks cat"),
        ({"caption_prefix": "a photo of"}, "a cat", "a photo of a cat"),
        ({"caption_prefix": "a photo of "}, "a cat", "a photo of a cat"),
        ({"caption_suffix": ", 4k"}, "a cat", "a cat, 4k"),
        ({"caption_suffix": "in the sun"}, "a cat", "a cat in the sun"),
        ({"caption_prefix": "a sks:", "caption_suffix": ".", "trigger_word": "sks"}, "a cat", "a sks: a cat."),
        ({"caption_prefix": "x", "trigger_word": "sks"}, "a cat", "sks, x a cat"),
        ({"trigger_word": "sks", "instance_prompt": "dog"}, " ", "sks, dog"),
        ({"trigger_word": "sks", "instance_prompt": ""}, " ", "sks"),
    ],
)
def test_what_stands_around_a_text(flags, text, expected):
    assert caption(text, **flags) == expected


def test_prefix_and_trigger_word_are_not_shuffled():
    flags = {"shuffle_tags": True, "caption_prefix": "x,", "caption_suffix": "y", "trigger_word": "sks"}
    assert set(drawn({"text": "a, b"}, 50, **flags)) == {"sks, x, a, b y", "sks, x, b, a y"}


def test_dropped_captions_are_empty_all_the_same():
    images = images_of(static(), trigger_word="sks", caption_prefix="x", proportion_empty_prompts=1.0)
    assert images[0, 0]["caption"] == ""


# All of them ---------------------------------------------------------------------------------------------------------


def test_every_caption_that_a_row_can_get_is_listed():
    row = {"text": ["x", "x", " ", "y, z"], "tags": "t, u", "more": "m"}
    captions = Captions.of(settings(caption_column="text:1,tags:1,more:0", trigger_word="sks").data)
    listed = captions.captions(row)
    assert listed == ["sks, x", "sks, y, z", "sks, t, u"]
    generators = [keyed_generator(0, epoch, Stream.CAPTION) for epoch in range(100)]
    found = {captions.caption(row, number % 4 / 4, generator) for number, generator in enumerate(generators)}
    assert found == set(listed)
    assert captions.captions({"more": "m"}) == ["sks, m"] and captions.captions({"text": " "}) == []


@pytest.mark.parametrize("flags", [{"shuffle_tags": True}, {"tag_dropout": 0.1}])
def test_captions_with_random_tags_are_not_listed(flags):
    captions = Captions.of(settings(keep_tags_separator="|", **flags).data)
    assert captions.captions({"text": "b | a"}) is None and captions.in_order({"text": "b | a"}) == ["b, a"]


def test_held_out_losses_shuffle_and_drop_nothing():
    flags = {"shuffle_tags": True, "tag_dropout": 0.5, "trigger_word": "sks", "caption_prefix": "x"}
    images = images_of(*[static()] * 3, captions=["a, b, c, d"] * 3, text_encoder_dropout=[0.5, 0.5], **flags)
    (batch,) = held_out_batches(images, 3)
    assert batch["caption"] == ["sks, x a, b, c, d"] * 3 and "dropped" not in batch
    assert held_out(images.data).trigger_word == "sks"


def test_real_images_bear_any_caption_of_theirs():
    rows = [{"image": static(), "text": ["x", "y"]}, {"image": static(seed=1), "text": ["z"]}]
    images = over(Dataset.from_list(rows), settings(trigger_word="sks", shuffle_tags=True))
    assert len(real_images(images, ["sks, y", "sks, z", "sks, x"], [(n, (8, 8)) for n in range(3)])) == 3
    assert real_images(images, ["y"], [(0, (8, 8))]) is None


def test_images_without_captions_bear_the_instance_prompt():
    images = over(Dataset.from_list([{"image": static()}] * 2), settings(instance_prompt="sks dog"))
    assert (
        len(real_images(images, ["sks dog"] * 3, [(n, (8, 8)) for n in range(3)])) == 3
        and images[0, 1]["caption"] == "sks dog"
    )


# Text encoders -------------------------------------------------------------------------------------------------------


def test_each_text_encoder_is_dropped_with_its_probability():
    plain = images_of(static())
    images = images_of(static(), text_encoder_dropout=[0.0, 0.25, 1.0], proportion_empty_prompts=0.5)
    samples = [images[epoch, 0] for epoch in range(400)]
    dropped = torch.stack([sample["dropped"] for sample in samples])  # (400, 3)
    assert not dropped[:, 0].any() and dropped[:, 2].all() and 70 < dropped[:, 1].sum() < 130
    empty = torch.tensor([sample["caption"] == "" for sample in samples])
    assert 20 < (empty & dropped[:, 1]).sum() < 80  # independent of one another
    assert "dropped" not in plain[0, 0]
    assert all(torch.equal(plain[epoch, 0][name], images[epoch, 0][name]) for epoch in range(3) for name in RANDOM)


def test_a_batch_tokenizes_what_is_dropped():
    def tokenize(captions, dropped=None):
        return captions, dropped

    images = images_of(static(), static(), text_encoder_dropout=[1.0, 0.0])
    captions, dropped = collate([images[0, 0], images[0, 1]], tokenize)["tokens"]
    assert captions == ["picture 0", "picture 1"] and dropped.tolist() == [[True, False]] * 2
    assert collate([images_of(static())[0, 0]], tokenize)["tokens"] == (["picture 0"], None)


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_with_all_of_it_is_the_same_with_workers_and_after_a_resume(sdxl_pipeline, tmp_path):
    folder = images(tmp_path / "data", "a.png", "b.png", "c.png")
    also(folder, {"a.txt": TAGS, "b.txt": "[trigger] ||| x, y, z"})
    flags = {"train_batch_size": 2, "max_train_steps": 3, "lpl_weight": 0, "checkpointing_steps": 1, "seed": 3}
    flags |= {"instance_prompt": "dog", "trigger_word": "sks", "shuffle_tags": True, "tag_dropout": 0.3}
    flags |= {"keep_tags_separator": "|||", "text_encoder_dropout": [0.5, 0.5], "validation_every_nth": 3}
    whole = train(sdxl_pipeline, folder, tmp_path / "whole", **flags)
    card = (whole / "README.md").read_text()
    assert "instance_prompt: sks" in card and "Put `sks` into the prompt" in card and 'prompt="sks"' in card
    train(sdxl_pipeline, folder, tmp_path / "parts", **flags | {"max_train_steps": 1})
    again = {"resume_from_checkpoint": "latest", "dataloader_num_workers": 1}
    parts = train(sdxl_pipeline, folder, tmp_path / "parts", **flags | again)
    assert same(weights(parts / "unet"), weights(whole / "unet"))
    assert validation_metrics(parts)[-1] == validation_metrics(whole)[-1]
    del flags["text_encoder_dropout"]
    other = train(sdxl_pipeline, folder, tmp_path / "other", **flags)
    assert not same(weights(other / "unet"), weights(whole / "unet"))
