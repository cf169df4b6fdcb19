"""DiT: classes, their names, and one size."""

import json

import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from tiny_families import inputs, load

from lpl.families.dit import DiT


@torch.no_grad()
def test_dit_drops_no_labels_of_itself(dit_pipeline):
    family = load(dit_pipeline)
    family.denoiser.train()
    embedders = [module for module in family.denoiser.modules() if isinstance(module, LabelEmbedding)]
    assert len(embedders) == 2 and all(len(module.embedding_table.weight) == 1001 for module in embedders)
    latents, timesteps, conditions = (
        value[:1].expand(64, *value.shape[1:]) if torch.is_tensor(value) else value for value in inputs(family)
    )
    output = family.predict(family.denoiser, latents, timesteps, {"class_labels": torch.full((64,), 3)})
    torch.testing.assert_close(output, output[:1].expand_as(output))  # in train mode 1 in 10 would be another


def test_dit_refuses_what_is_not_square(dit_pipeline):
    family = load(dit_pipeline)
    with pytest.raises(ValueError, match="8 x 6"):
        family.predict(
            family.denoiser, torch.zeros(1, 4, 8, 6), torch.tensor([1]), {"class_labels": torch.tensor([1])}
        )


def test_dit_reads_its_classes_names_from_the_index(dit_pipeline):
    index = json.loads((dit_pipeline / "model_index.json").read_text())
    assert DiT.class_names(index) == NAMES
    assert DiT.class_names({"_class_name": "DiTPipeline"}) == {}
    labels = load(dit_pipeline).pipeline.labels  # as diffusers understands the same entry
    assert labels and all(DiT.class_label(name, NAMES) == label for name, label in labels.items())


NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 207: "golden retriever"}


@pytest.mark.parametrize(
    "prompt, names, label",
    [
        ("goldfish", NAMES, 1),
        (" Golden Retriever ", NAMES, 207),
        ("Tinca tinca", NAMES, 0),
        ("tench, Tinca tinca", NAMES, 0),
        ("999", NAMES, 999),
        (5, NAMES, 5),
        ("cups", {0: "cats", 1: "cups"}, 1),
        ("7", {0: "3", 1: "5", 2: "7"}, 2),  # a name, before it is a number
        ("12", {}, 12),
    ],
)
def test_class_labels(prompt, names, label):
    assert DiT.class_label(prompt, names) == label


@pytest.mark.parametrize("prompt", ["a goldfish", "1000", "-1", "1.5", "", "²"])
@pytest.mark.parametrize("names, shown", [(NAMES, "goldfish"), ({}, "0 to 999"), ({0: "cats", 1: "cups"}, "cups")])
def test_class_labels_that_are_none(prompt, names, shown):
    with pytest.raises(ValueError) as error:
        DiT.class_label(prompt, names)
    assert prompt in str(error.value) and shown in str(error.value) and "--validation_prompts" in str(error.value)


def test_dit_with_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="10 classes.*1000"):
        DiT.empty_caption({"vae": {}, "transformer": {"num_embeds_ada_norm": 10}})
