"""The registry of families: every one is complete here, and has its tiny pipeline and its recipe."""

import pytest
from diffusers import DiffusionPipeline
from tiny_families import FAMILY_OF, TINY

from lpl.families import FAMILIES, Family, find_family
from tests.runs.test_shipped_recipes import PIPELINES, RECIPES, values


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_its_tiny_pipeline_and_its_recipe(family):
    assert issubclass(family, Family) and issubclass(family.pipeline_class, DiffusionPipeline)
    assert family.name in TINY, f"{family.name} lacks a tiny pipeline: tests/support/tiny.py, tiny_families.TINY"
    trained = {PIPELINES.get(values(name)["pretrained_model_name_or_path"]) for name in RECIPES}
    assert trained & set(TINY[family.name]), (
        f"{family.name} lacks a recipe in examples/recipes (test_shipped_recipes.PIPELINES)"
    )


def test_families_do_not_share_a_name_or_a_pipeline():
    assert set(TINY) == set(FAMILY_OF) and len(FAMILY_OF) == len(FAMILIES)
    assert len({family.pipeline_class for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("name", ["KandinskyPipeline", "StableDiffusion", "", None])
def test_unknown_pipelines_are_refused(name):
    with pytest.raises(ValueError) as error:
        find_family(name)
    assert str(name) in str(error.value) and "--pretrained_model_name_or_path" in str(error.value)
    assert all(family.pipeline_class.__name__ in str(error.value) for family in FAMILIES)
