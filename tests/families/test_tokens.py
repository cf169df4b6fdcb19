"""The loader's tokens give the conditions that captions give, bit for bit, and no tokenizer runs in the step."""

import pickle

import pytest
import torch
from tiny_families import CPU, TINY, batch_of, load

from lpl.families.tokens import Tokenize, Tokenized, with_tokens


CAPTIONS = ["A cat ", "", "the dog, and a very long caption " * 30, ""]
LABELS = [3, 1000, 999, 3]


@pytest.fixture(params=[name for names in TINY.values() for name in names])
def folder(request):
    return request.getfixturevalue(request.param)


def refuse(*args, **kwargs):
    raise AssertionError("a tokenizer ran in the step")


@torch.no_grad()
@pytest.mark.parametrize("captions", [slice(None), slice(1, 2), slice(0, 1)])  # both kinds of captions, and one alone
def test_tokens_of_the_loader_change_nothing(folder, monkeypatch, captions):
    family = load(folder)
    batch = batch_of(family, (LABELS if family.class_conditional else CAPTIONS)[captions])
    expected = family.conditions(batch, CPU)
    tokens = pickle.loads(pickle.dumps(family.tokenize))(batch["caption"])  # as it comes to a spawned process
    for name, component in family.pipeline.components.items():
        if name.startswith("tokenizer") and component is not None:
            monkeypatch.setattr(type(component), "__call__", refuse)
            monkeypatch.setattr(type(component), "tokenize", refuse)
    found = family.conditions(batch | {"tokens": tokens}, CPU)
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)


@torch.no_grad()
def test_a_text_encoder_that_is_dropped_gets_the_empty_caption(folder, monkeypatch):
    """The others get theirs. The pipeline is told of captions that each tokenizer reads as it should."""
    family = load(folder)
    names = list(family.token_lengths())
    if not names:
        pytest.skip("refuses --text_encoder_dropout")
    captions, count = ["A cat ", "the dog", ""], len(names)
    dropped = torch.tensor([[True] * count, [number == 0 for number in range(count)], [False] * count])
    tokens = pickle.loads(pickle.dumps(family.tokenize))(captions, dropped)
    for column, name in enumerate(names):
        said = [family.empty_text if dropped[row, column] else caption for row, caption in enumerate(captions)]
        expected = family.tokenize(said)[name]
        assert tokens[name]["texts"] == family.texts(captions)
        for part in ("input_ids", "attention_mask"):
            assert expected[part] is tokens[name][part] is None or torch.equal(expected[part], tokens[name][part])
    for name, component in family.pipeline.components.items():
        if name.startswith("tokenizer") and component is not None:
            monkeypatch.setattr(type(component), "__call__", refuse)  # none of the captions is read again
    found = family.conditions(batch_of(family, captions) | {"tokens": tokens}, CPU)
    monkeypatch.undo()
    whole = family.conditions(batch_of(family, captions), CPU)
    empty = family.conditions(batch_of(family, 3 * [family.empty_text]), CPU)
    for part in {"encoder_hidden_states", "text_embeds", "pooled_projections"} & found.keys():
        assert torch.equal(found[part][0], empty[part][0]) and torch.equal(found[part][2], whole[part][2])
        assert torch.equal(found[part][1], empty[part][1]) == (count == 1 or (part, family.name) in OF_ONE_ENCODER)
        assert torch.equal(found[part][1], whole[part][1]) == ((part, family.name) in OF_THE_LAST)


# Conditions that come from the first text encoder alone, and from others than the first
OF_ONE_ENCODER = {("pooled_projections", "flux"), ("encoder_hidden_states", "hunyuan-image")}
OF_THE_LAST = {("encoder_hidden_states", "flux"), ("text_embeds", "stable-diffusion-xl")}


def test_what_is_sent_to_the_loader_has_no_models(folder):
    family = load(folder)
    assert b"torch" in pickle.dumps(family.denoiser) and b"torch" not in pickle.dumps(family.tokenize)


class Counting:
    """A tokenizer that counts its calls."""

    added_tokens_encoder = {"<cat>": 7}
    model_max_length = 5
    calls = 0

    def __call__(self, texts, max_length=None, **options):
        self.calls += 1
        ids = torch.arange(len(texts) * (max_length or 5)).view(len(texts), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def tokenize(self, text):
        self.calls += 1
        return text.split()


CALL = {"padding": "max_length", "max_length": 5, "truncation": True, "return_tensors": "pt"}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (["a", "c"], CALL),
        (["a"], CALL),
        (["a", "b"], CALL | {"max_length": 6}),
        (["a", "b"], CALL | {"truncation": False}),
        (["a", "b"], CALL | {"add_special_tokens": False}),
        (["a", "b"], CALL | {"padding_side": "left"}),
        (["a", "b"], {"padding": "longest"}),
    ],
)
def test_any_other_call_reaches_the_tokenizer(text, options):
    tokenizer = Counting()
    tokens = Tokenize({"tokenizer": tokenizer}, {"tokenizer": 5})(["a", "b"])["tokenizer"]
    known = Tokenized(tokenizer, tokens["texts"], {name: tokens[name] for name in ("input_ids", "attention_mask")})
    assert torch.equal(known(["a", "b"], **CALL).input_ids, tokens["input_ids"]) and tokenizer.calls == 1
    known(text, **options)
    assert tokenizer.calls == 2


def test_textual_inversions_of_several_vectors_are_looked_for():
    tokenizer = Counting()
    known = Tokenized(tokenizer, ["a"], {})
    assert known.tokenize("a <cat>") == [] and tokenizer.calls == 0
    tokenizer.added_tokens_encoder = {"<cat>": 7, "<cat>_1": 8}
    assert known.tokenize("a <cat>") == ["a", "<cat>"] and known.model_max_length == 5


def test_the_pipeline_itself_is_not_changed(sd_pipeline):
    family = load(sd_pipeline)
    tokenizer = family.pipeline.tokenizer
    other = with_tokens(family.pipeline, family.tokenize(["a"]), CPU)
    assert family.pipeline.tokenizer is tokenizer is not other.tokenizer
    assert other.text_encoder is family.pipeline.text_encoder and with_tokens(other, None, CPU) is other
