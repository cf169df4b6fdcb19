"""The public form of a run's recipe: a stranger runs the same training, and learns nothing of the machine."""

import re
import shlex
import warnings

import pytest
import yaml
from hub_server import Repository
from trainer import parsed

from lpl.config import recipes
from lpl.config.command_line import build_parser, parse, recipe
from lpl.families.description import read_pipeline
from lpl.families.resolve import resolve
from lpl.publishing import public_recipe
from tests.config.test_hub_recipes import BASE, published
from tests.publishing.conftest import TOKEN


SET = {  # flags of a run, of every kind
    "learning_rate": 3e-6,
    "lpl_blocks": ["mid", "up_0"],
    "lpl_depth_weighting": ["1", "0.5"],
    "validation_prompts": ["a 'fox': #1", "no"],
    "random_flip": True,
    "lora": True,
    "mixed_precision": "no",
    "snr_gamma": 5.0,
    "lr_scheduler": "cosine",
}
ON_THIS_MACHINE = {"logging_dir": "my/logs", "tracker_project_name": "mine", "push_to_hub": True, "report_to": "none"}


def on_the_hub(hub, name, folder):
    """A repository with the files of a folder."""
    hub.repos[name] = Repository()
    for file in folder.rglob("*"):
        if file.is_file():
            hub.repos[name].files[file.relative_to(folder).as_posix()] = file.read_bytes()
    return name


def all_but_own(args):
    return {name: value for name, value in recipe(args).items() if not recipes.is_own(name)}


@pytest.mark.parametrize("model_on_hub", [True, False])
@pytest.mark.parametrize("data_on_hub", [True, False])
def test_a_stranger_runs_the_same_training(model_on_hub, data_on_hub, hub, sd_pipeline, image_folder, tmp_path):
    """Both ways: the stranger's flags are the run's, and the stranger's public recipe is the run's."""
    model = on_the_hub(hub, "user/model", sd_pipeline) if model_on_hub else sd_pipeline
    data = {"dataset_name": "user/pictures", "train_data_dir": None} if data_on_hub else {}
    flags = SET | ON_THIS_MACHINE | {"hub_model_id": "user/run"} | data
    args, _ = parsed(model, image_folder, tmp_path / "run", **flags, cache_dir=tmp_path / "cache")
    text = public_recipe.public_text(recipe(args), {"num_processes": 1}, "user/run")
    published(hub, text)

    words = shlex.split(re.search(r"^#   (accelerate .*)$", text, re.M)[1])
    assert words[:5] == ["accelerate", "launch", "train_text_to_image_lpl.py", "--config", "user/run"]
    given = {f"--{name}" for name in ("train_data_dir", "pretrained_model_name_or_path")}
    given -= {"--train_data_dir"} if data_on_hub else set()
    given -= {"--pretrained_model_name_or_path"} if model_on_hub else set()
    assert set(words[5::2]) == given
    assert all(f"# {name} has to be given" in text for name in given)
    own = {"--train_data_dir": str(image_folder), "--pretrained_model_name_or_path": str(sd_pipeline)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing in it is passed over
        again = parse([own.get(words[max(n - 1, 0)], word) for n, word in enumerate(words)][3:])
    again = resolve(again, read_pipeline(again.model, again.lpl.lpl_blocks))
    assert all_but_own(again) == all_but_own(args)
    assert public_recipe.public_text(recipe(again), again.rerun_of, "user/run") == text
    assert (again.output.output_dir, again.output.push_to_hub, again.model.cache_dir) == (
        "sd-model-finetuned",
        False,
        None,
    )


def test_a_public_recipe_names_nothing_of_the_machine(sd_pipeline, image_folder, tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    for name, folder in (("model", sd_pipeline), ("my foxes", image_folder)):
        (home / name).symlink_to(folder)
    flags = ON_THIS_MACHINE | {"hub_model_id": "alice/run", "logging_dir": str(home / "logs"), "validation_steps": 3}
    flags |= {"validation_prompts": [f"the password is {TOKEN}"]}
    args, _ = parsed(home / "model", home / "my foxes", home / "out", **flags, cache_dir=home / "cache")
    values = recipe(args)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.recipe_text(values, {"num_processes": 4, "hardware": "4 x CPU"}))
    public_recipe.publish_recipe(path, tmp_path / "out/recipe.yaml", "team/run")
    text = (tmp_path / "out/recipe.yaml").read_text()
    assert "alice" not in text and str(tmp_path) not in text and TOKEN not in text and "mine" not in text
    assert public_recipe.left_to_give(values) == {
        "pretrained_model_name_or_path": ["path/to/model"],
        "train_data_dir": ["path/to/my foxes"],
    }
    assert public_recipe.rerun_command(values, {"num_processes": 4}, "team/run@v1") == (
        "accelerate launch --multi_gpu --num_processes 4 train_text_to_image_lpl.py --config team/run@v1 "
        "--pretrained_model_name_or_path path/to/model --train_data_dir 'path/to/my foxes'"
    )
    entries = yaml.safe_load(text)
    assert entries.pop("measured") == {"num_processes": 4, "hardware": "4 x CPU"}
    assert all(line.startswith("# ") or line == "#" for line in text.split("\n\n")[0].splitlines())
    left_out = {name for name, value in values.items() if name not in entries and value is not None}
    assert left_out == {name for name in values if recipes.is_own(name) and values[name] is not None} | {
        "pretrained_model_name_or_path",
        "train_data_dir",
    }


def test_the_repository_of_a_public_recipe_is_the_runs_own(tmp_path):
    for repository, command in (("user/run", "user/run"), (None, "recipe.yaml"), ("a\nb: 1", "recipe.yaml")):
        (tmp_path / "recipe.yaml").write_text(recipes.recipe_text(BASE | {"hub_model_id": repository}))
        public_recipe.publish_recipe(tmp_path / "recipe.yaml", tmp_path / "public.yaml")
        text = (tmp_path / "public.yaml").read_text()
        assert f"--config {command}\n" in text and yaml.safe_load(text) == BASE
        assert recipes.read_recipe(build_parser(), str(tmp_path / "public.yaml")).values == BASE


def test_no_line_of_the_head_becomes_a_flag(tmp_path):
    values = BASE | {"dataset_name": "/data/x\nseed: 3", "pretrained_model_name_or_path": "/a\r\noutput_dir: /root"}
    text = public_recipe.public_text(values, {}, None)
    assert yaml.safe_load(text) == {"max_train_steps": 3}
