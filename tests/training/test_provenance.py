"""What a run measures of its circumstances, and what it says where those of its recipe's run were others."""

from dataclasses import replace

import datasets
import pytest
import yaml
from hub_server import HubServer, Repository
from runs import run_of
from trainer import metrics, parsed, run, same, settings, train, weights

from lpl import __version__
from lpl.config import Config
from lpl.config.command_line import build_parser, config_of
from lpl.config.recipes import read_recipe, recipe_text
from lpl.data.fingerprint import fingerprint
from lpl.data.source import load_training_images
from lpl.data.streaming import load_streamed_images
from lpl.families.description import read_pipeline
from lpl.publishing.public_recipe import publish_recipe
from lpl.training.provenance import commits, compare_with, measured_facts, start_recipe, update_recipe
from tests.data.test_streaming import write
from tests.publishing.test_public_recipe import on_the_hub


FIRST, SECOND = "a" * 40, "b" * 40
BEFORE = {
    "lpl_weight": 0.15,
    "lpl_share": 0.2,
    "data": {"fingerprint": "sha256:1", "images": 100},
    "num_processes": 4,
    "global_batch": 64,
    "commits": {"pretrained_model_name_or_path": f"user/model@{FIRST}", "dataset_name": f"user/data@{FIRST}"},
    "hardware": "4 x CPU",
    "libraries": {"lpl": "0.1.0", "torch": "2.13.0"},
}


def now(**changes):
    return {name: value for name, value in (BEFORE | changes).items() if not name.startswith("lpl_")}


# Facts ---------------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_run(sd_pipeline, image_folder, tmp_path):
    config, _ = parsed(sd_pipeline, image_folder, tmp_path / "run", gradient_accumulation_steps=3)
    dataset, _ = load_training_images(config.data, config.optimization.seed, config.model.cache_dir)
    facts = measured_facts(config, dataset, 4, "4 x CPU")
    libraries = facts.pop("libraries")
    assert facts.pop("base").startswith("sha256:")
    assert libraries["lpl"] == __version__ and {"torch", "diffusers", "transformers", "pillow"} < set(libraries)
    assert facts == {
        "data": {"fingerprint": fingerprint(dataset, "image", ["text"], [str(image_folder)]), "images": 8},
        "num_processes": 4,
        "global_batch": 2 * 4 * 3,
        "commits": {},
        "hardware": "4 x CPU",
    }


def test_a_recipe_gives_them_back(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text({"seed": 3}, BEFORE))
    assert read_recipe(build_parser(), str(path)) == ({"seed": 3}, BEFORE)
    assert compare_with(read_recipe(build_parser(), str(path)).measured, now(), 16) == []


def test_the_commit_of_a_model_of_the_hub(sd_pipeline, tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        on_the_hub(hub, "user/model", sd_pipeline)
        first = hub.repos["user/model"].at().sha
        names = {"pretrained_model_name_or_path": "user/model", "cache_dir": str(tmp_path / "cache")}
        config = Config().changed(**names)
        assert commits(config, None) == {}  # nothing is loaded yet
        read_pipeline(config.model)
        assert commits(config, None) == {"pretrained_model_name_or_path": f"user/model@{first}"}
        hub.repos["user/model"].files["new"] = b"new"
        read_pipeline(config.model)
        second = hub.repos["user/model"].at().sha
        assert commits(config, None) == {"pretrained_model_name_or_path": f"user/model@{second}"} and first != second
        assert commits(config.changed(revision=first), None) == {
            "pretrained_model_name_or_path": f"user/model@{first}"
        }


def test_the_commit_of_a_data_set_of_the_hub_loaded_or_streamed(tmp_path, monkeypatch):
    write(tmp_path / "data", (3, 2))
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        hub.repos["user/pictures"] = Repository()
        for file in (tmp_path / "data").iterdir():
            hub.repos["user/pictures"].files[f"data/train-{file.name}"] = file.read_bytes()
        words = [
            "--pretrained_model_name_or_path",
            str(tmp_path),
            "--dataset_name",
            "user/pictures",
            "--cache_dir",
            str(tmp_path / "cache"),
        ]
        config = config_of(vars(build_parser().parse_args(words)))
        cache_dir = config.model.cache_dir
        loaded = measured_facts(config, load_training_images(config.data, 0, cache_dir)[0], 1, "CPU")
        config = config.changed(streaming=True)
        streamed = measured_facts(config, load_streamed_images(config.data, 0, cache_dir)[0], 1, "CPU")
        commit = {"dataset_name": f"user/pictures@{hub.repos['user/pictures'].at().sha}"}
    assert loaded["commits"] == streamed["commits"] == commit
    assert loaded["data"]["images"] == 5 and "images" not in streamed["data"]
    here, _ = load_training_images(settings(dataset_name=str(tmp_path / "data")).data, 0, str(tmp_path / "cache"))
    assert loaded["data"]["fingerprint"] == fingerprint(here, "image", ["text"])  # the same bytes, from elsewhere
    assert loaded["data"]["fingerprint"] != streamed["data"]["fingerprint"]


def test_facts_are_added_as_soon_as_they_are_known(sd_pipeline, image_folder, tmp_path, cpu):
    """And the recipe is not written again for facts that it has."""
    config, _ = parsed(sd_pipeline, image_folder, tmp_path / "run")
    run, path = run_of(config), tmp_path / "run/recipe.yaml"
    path.parent.mkdir()
    dataset, _ = load_training_images(config.data, 0, config.model.cache_dir)
    start_recipe(config, run, dataset, "1 x CPU", {})
    first = read_recipe(build_parser(), str(path))
    assert first.measured == run.facts == measured_facts(config, dataset, 1, "1 x CPU")
    update_recipe(run, {"lpl_weight": 0.5})
    second = read_recipe(build_parser(), str(path))
    assert second.measured == run.facts == first.measured | {"lpl_weight": 0.5} and second.values == first.values
    path.unlink()
    update_recipe(run, {"lpl_weight": 0.5})
    assert not path.exists()


def test_a_run_warns_of_what_differs_from_its_recipe(sd_pipeline, image_folder, tmp_path, cpu, caplog):
    config, _ = parsed(sd_pipeline, image_folder, tmp_path / "run")
    config = replace(config, rerun_of={"data": {"fingerprint": "sha256:1"}})
    (tmp_path / "run").mkdir()
    dataset, _ = load_training_images(config.data, 0, config.model.cache_dir)
    start_recipe(config, run_of(config), dataset, "1 x CPU", {})
    assert "the data is not that of the recipe's run" in caplog.text


# A run and its rerun -------------------------------------------------------------------------------------------------


def test_a_stranger_reruns_what_was_published(sd_pipeline, image_folder, tmp_path, monkeypatch, caplog):
    flags = {"max_train_steps": 3, "lpl_measuring_steps": 1, "random_flip": True, "cache_dir": None}
    own = ["--train_data_dir", str(image_folder), "--report_to", "none"]
    public = []
    with HubServer() as hub:
        hub.connect(monkeypatch, tmp_path)
        on_the_hub(hub, "user/model", sd_pipeline)
        first, second, third = (tmp_path / name for name in ("first", "second", "third"))
        train("user/model", image_folder, first, **flags)
        for folder in (first, second):
            publish_recipe(folder / "recipe.yaml", tmp_path / "public.yaml", "user/run")
            public.append((tmp_path / "public.yaml").read_bytes())
            hub.repos["user/run"] = Repository(files={"recipe.yaml": public[-1]})
            if folder == first:
                caplog.clear()
                run(["--config", "user/run", *own, "--output_dir", str(second)])
                assert "loss curve" not in caplog.text
        run(["--config", "user/run", *own, "--output_dir", str(third), "--max_train_samples", "6"])
    assert metrics(second) == metrics(first) and same(weights(second / "unet"), weights(first / "unet"))
    assert public[0] == public[1]
    measured = yaml.safe_load(public[0])["measured"]
    assert {"data", "num_processes", "global_batch", "commits", "libraries", "lpl_weight", "lpl_share"} < set(measured)
    assert yaml.safe_load(public[0])["mixed_precision"] == "no"  # as accelerate is configured
    assert "the data is not that of the recipe's run (6 images instead of 8)" in caplog.text


# Comparison ----------------------------------------------------------------------------------------------------------


def one(*arguments):
    (sentence,) = compare_with(*arguments)
    assert "\n" not in sentence and not sentence.endswith(".")
    return sentence


def test_the_same_circumstances_bring_no_word():
    assert compare_with(BEFORE, now(), 16) == [] == compare_with({}, now(), 16)


@pytest.mark.parametrize(
    "data, said",
    [
        ({"fingerprint": "sha256:2", "images": 90}, "(90 images instead of 100)"),
        ({"fingerprint": "sha256:2", "images": 100}, "(other images or captions, or in another order)"),
        ({"fingerprint": "sha256:2"}, "(other images or captions, or in another order)"),
    ],
)
def test_other_data(data, said):
    sentence = one(BEFORE, now(data=data), 16)
    assert sentence == f"the data is not that of the recipe's run {said}, so the loss curve will differ"


@pytest.mark.parametrize(
    "processes, batch, size, advice",
    [
        (1, 16, 16, "--gradient_accumulation_steps 4 gives the same"),
        (2, 32, 16, "--gradient_accumulation_steps 2 gives the same"),
        (8, 128, 16, "--gradient_accumulation_steps 1 --train_batch_size 8 gives the same"),
        (1, 24, 24, "--gradient_accumulation_steps 4 --train_batch_size 16 gives the same"),
        (3, 48, 16, "3 processes cannot share 64 images"),
        (128, 128, 1, "128 processes cannot share 64 images"),
        (4, 16, 4, "--gradient_accumulation_steps 4 gives the same"),
    ],
)
def test_another_global_batch(processes, batch, size, advice):
    sentence = one(BEFORE, now(num_processes=processes, global_batch=batch), size)
    assert sentence.startswith(f"a step takes {batch} images on {processes} process{'es' if processes > 1 else ''} ")
    assert " and took 64 on 4 processes in the recipe's run, so the loss curve will differ; " in sentence
    assert sentence.endswith(advice)
    if advice.startswith("--"):  # it is true
        flags = build_parser().parse_args(["--train_batch_size", str(size), *advice.split()[:-3]])
        assert flags.train_batch_size * flags.gradient_accumulation_steps * processes == 64
        assert flags.train_batch_size <= size


def test_the_advice_makes_the_same_run():
    """Several processes or several micro-batches: the same samples in each step, see tests/runs/test_training.py."""
    assert compare_with(BEFORE, now(num_processes=2, global_batch=64), 16) == []
    streamed = {"fingerprint": "sha256:1"}
    sentence = one(BEFORE | {"data": streamed}, now(data=streamed, num_processes=2), 16)
    assert sentence.startswith("--streaming reads in another order on 2 processes than on 4 processes, as in")


def test_another_commit():
    changed = BEFORE["commits"] | {"pretrained_model_name_or_path": f"user/model@{SECOND}"}
    sentence = one(BEFORE, now(commits=changed), 16)
    assert "user/model is at commit bbbbbbb now and was at aaaaaaa" in sentence
    assert sentence.endswith(f"; --revision {FIRST} is the same")
    other_model = BEFORE["commits"] | {"pretrained_model_name_or_path": f"user/other@{SECOND}"}
    assert compare_with(BEFORE, now(commits=other_model), 16) == []  # that was the user's wish
    changed = BEFORE["commits"] | {"dataset_name": f"user/data@{SECOND}"}
    assert compare_with(BEFORE, now(commits=changed), 16) == []  # only its card has changed
    both = compare_with(BEFORE, now(commits=changed, data={"fingerprint": "sha256:2", "images": 100}), 16)
    assert len(both) == 2 and both[1].startswith("dataset_name user/data is at commit bbbbbbb now")
    assert "--revision" not in both[1]


def test_other_libraries_and_hardware_are_one_short_line():
    sentence = one(BEFORE, now(libraries={"lpl": "0.1.0", "torch": "2.14.0", "new": "1"}, hardware="1 x H200"), 16)
    assert sentence == (
        "different from the recipe's run (in brackets): torch 2.14.0 (2.13.0), hardware 1 x H200 (4 x CPU); last "
        "digits may differ"
    )


ANYTHING = [None, True, -1, 0, 10**4000, 1.5, "a\x1b[2J" * 1000, [], [1], {}, {"a": {}}, {1: 2}, {None: "x"}]


@pytest.mark.parametrize("anything", ANYTHING, ids=range(len(ANYTHING)))
def test_a_strangers_recipe_may_have_measured_anything(anything):
    inner = [{name: dict.fromkeys(value, anything)} for name, value in BEFORE.items() if isinstance(value, dict)]
    for measured in [{name: anything} for name in BEFORE] + inner + [dict.fromkeys(BEFORE, anything)]:
        for sentence in compare_with(measured, now(), 16):
            assert sentence.isprintable() and len(sentence) < 500
