"""What is measured of states: metrics, halves, differences in pairs, prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lpl.config.choices import SET_METRICS
from lpl.evaluation import Preprocessing, folder_images, listed_images, load_network, report, results
from lpl.evaluation.metrics import compare, halves
from lpl.evaluation.results import REAL, Reference, Settings, State
from lpl.families.dit import DiT
from lpl.families.sd import StableDiffusion
from tests.evaluation.test_command import BlockMeans, Captions


SETTINGS = Settings(
    reference="some/photos",
    features=("org/means",),
    clip="clip",
    batch_size=4,
    bootstrap=8,
    seed=3,
    nearest_k=2,
    words=("python", "-m", "lpl.evaluate"),
)


def settings(**changes):
    return replace(SETTINGS, **changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixteen pictures, of which no halves are alike."""
    from tiny import tiny_image_folder

    return folder_images(tiny_image_folder(tmp_path_factory.mktemp("photos"), count=16), Preprocessing(32))


@pytest.fixture(scope="module")
def networks():
    return {"org/means": load_network(BlockMeans()), "clip": Captions()}


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where features are kept."""
    monkeypatch.setenv("LPL_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def reference(photos, networks):
    return Reference(photos, {"org/means": networks["org/means"]}, settings())


def drawn(label, images, step=None, drawn=True, **sampling):
    """A state whose images a model has drawn."""
    given = {"num_inference_steps": 2, "guidance_scale": 1.0} | sampling
    return State(label, f"runs/{label}", step, images, given if drawn else None, "a model" if drawn else None)


def darker(images, by=3):
    """Other images under the same captions."""
    return listed_images([image.point(lambda value: value // by) for image in images], "darker", Preprocessing(32),
                         images.captions)  # fmt: skip


def test_counterparts_have_the_same_caption():
    """Several of one caption take turns."""
    grey = [Image.new("RGB", (4, 4))] * 5
    real = listed_images(grey[:4], "real", Preprocessing(4), ["a", "b", "a", "c"])
    made = listed_images(grey, "made", Preprocessing(4), ["a", "c", "a", "d", "a"])
    assert results.counterparts(made, real).tolist() == [0, 3, 2, -1, 0]
    assert results.counterparts(made.select([3]), real) is None
    assert results.counterparts(listed_images(grey, "no captions", Preprocessing(4)), real) is None


def evaluated(states, reference):
    """The evaluation, as it is read again."""
    found = results.measure(states, reference)
    return json.loads(json.dumps(report.summary(found, results.shown_states(states), reference)))


# What is measured


def test_what_is_drawn_from_the_same_seeds_is_compared_in_pairs(reference, photos):
    states = [drawn("before", darker(photos)), drawn("same", darker(photos)), drawn("after", darker(photos, by=2))]
    before, same, after = results.measure(states, reference)
    assert before["differences"] is None
    for metric, found in same["differences"]["metrics"]["org/means"].items():
        assert found == {"value": 0.0, "spread": 0.0}, metric  # each resample is alike, however far it moves
    assert before["metrics"]["org/means"]["fid"]["spread"] > 0
    difference = after["differences"]["metrics"]["org/means"]["fid"]
    values = [result["metrics"]["org/means"]["fid"] for result in (after, before)]
    assert difference["value"] == pytest.approx(values[0]["value"] - values[1]["value"]) and difference["value"] < 0
    assert 0 < difference["spread"] < values[0]["spread"] + values[1]["spread"]
    assert after["differences"]["to"] == "before"


def test_what_has_no_pairs_has_no_differences(reference, photos, networks):
    """Folders, other captions, no resamples."""
    renamed = darker(photos)
    renamed.captions = renamed.captions[::-1]
    states = [drawn("before", darker(photos)), drawn("folder", darker(photos), drawn=False), drawn("others", renamed)]
    assert [result["differences"] for result in results.measure(states, reference)] == [None] * 3
    quick = Reference(photos, networks, settings(bootstrap=0))
    states = [drawn("before", darker(photos)), drawn("after", darker(photos))]
    for result in results.measure(states, quick):
        assert result["differences"] is None and result["metrics"]["org/means"]["fid"]["spread"] is None


def test_the_halves_are_those_of_the_metrics(reference, photos, networks):
    features = networks["org/means"].features(list(photos)).numpy()
    expected = {name: half.value for name, half in halves(features, SET_METRICS, nearest_k=2, seed=3).items()}
    found = reference.halves["org/means"]
    assert {name: pytest.approx(half["value"]) for name, half in found.items()} == expected
    assert all(half["spread"] is None for half in found.values()) and found["fid"]["value"] > 0
    few = Reference(photos.select(range(7)), networks, settings())
    assert few.halves == {"org/means": {}}


def test_a_state_gets_its_numbers_its_spectrum_and_its_settings(reference, photos, networks):
    state = drawn("run", darker(photos), step=4)
    (found,) = results.measure([state], reference)
    sets = [networks["org/means"].features(list(images)).numpy() for images in (state.images, photos)]
    expected = compare(*sets, bootstrap=8, seed=3, nearest_k=2, counterparts=np.arange(16))
    for name, estimate in expected.items():
        assert found["metrics"]["org/means"][name] == {
            "value": pytest.approx(estimate.value),
            "spread": pytest.approx(estimate.spread),
        }
    assert (found["label"], found["step"], found["images"], found["enlarged"]) == ("run", 4, 16, 0)
    assert found["high_frequency_energy"] == state.spectrum.high_frequency_energy
    assert state.spectrum.log_power.max() < reference.spectrum.log_power.max()  # it is darker


def test_features_are_kept_where_they_are_wanted_again(photos, networks, kept, tmp_path):
    reference = Reference(photos, networks, settings())
    assert len(list(kept.iterdir())) == 1
    results.measure([drawn("run", darker(photos))], reference, keep=False)
    assert len(list(kept.iterdir())) == 1  # a run draws other images at each step
    results.measure([drawn("run", darker(photos))], reference)
    assert len(list(kept.iterdir())) == 2
    Reference(photos, networks, settings(cache_dir=str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache/features").iterdir())) == 1 and len(list(kept.iterdir())) == 2


def test_clip_score_alone_takes_no_features(photos, networks):
    reference = Reference(photos, {"clip": networks["clip"]}, settings(metrics=["clip_score"]))
    evaluation = evaluated([drawn("a", darker(photos)), drawn("b", darker(photos, by=2))], reference)
    assert reference.features == reference.halves == {} and list(evaluation["networks"]) == ["clip"]
    assert evaluation["results"][1]["differences"]["metrics"]["clip"]["clip_score"]["spread"] is not None
    assert [row[0] for row in report.table(evaluation)[1:]] == ["a", "b", "b minus a", REAL]


def test_a_run_alone_is_shown_at_its_beginning_and_its_end():
    states = [State("a", "", step) for step in (0, 2, 4)]
    assert results.shown_states(states) == [states[0], states[2]]
    assert results.shown_states(states[2:]) == states[2:]
    others = [State("b", "", 1), State("b", "", 2), State("c", "")]
    assert results.shown_states([*states, *others]) == [states[2], others[1], others[2]]


# Which prompts


def test_prompts_are_shuffled_by_the_seed_and_none_is_lost(photos):
    first, again, other = (
        results.prompts_of(photos, "photos", StableDiffusion, {}, "--reference", seed) for seed in (0, 0, 1)
    )
    assert first == again != other and sorted(first) == sorted(other) == sorted(photos.captions)


def test_labels_are_the_models_where_it_knows_the_folders_names(class_folder):
    """Else the folders are numbered, as in training."""
    images = folder_images(class_folder, Preprocessing(32), progress=False)
    knows = {7: "cups, mugs", 3: "rockets", 5: "cats"}
    prompts = results.prompts_of(images, str(class_folder), DiT, knows, "--reference")
    assert sorted(prompts) == [3] * 3 + [5] * 3 + [7] * 3
    prompts = results.prompts_of(images, str(class_folder), DiT, {7: "cups"}, "--reference")
    assert sorted(prompts) == [0] * 3 + [1] * 3 + [2] * 3
    one = class_folder / "cats"
    prompts = results.prompts_of(folder_images(one, Preprocessing(32)), str(one), DiT, {}, "--reference")
    assert sorted(prompts) == list(range(1000))


def test_captions_that_are_no_classes_are_refused_by_the_flag(photos):
    with pytest.raises(ValueError, match="^--eval_data_dir photos: a .*this model draws classes"):
        results.prompts_of(photos, "photos", DiT, {1: "goldfish"}, "--eval_data_dir")
