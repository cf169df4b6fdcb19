"""Validation prompts as texts, mappings and files: what is read, what a recipe keeps, what is refused."""

import json
import warnings

import pytest
import yaml
from commands import refusal
from trainer import arguments, resolved

from lpl.config import recipes
from lpl.config.command_line import parse, recipe, words_of
from lpl.config.prompt_files import read_prompts
from lpl.config.prompts import KEYS
from lpl.publishing.public_recipe import public_recipe


WHOLE = {
    "prompt": "a cat",
    "negative_prompt": "blurry, dark",
    "seed": 7,
    "width": 64,
    "height": 32,
    "guidance_scale": 5.5,
    "num_inference_steps": 3,
}
LINES = """\
# of sd-scripts
a cat --n blurry, dark --w 64 --h 32 --d 7 --s 3 --l 5.5

a dog -- in the snow
"""
FILES = {
    "prompts.txt": LINES,
    "prompts.jsonl": f'{json.dumps(WHOLE)}\n\n"a dog -- in the snow"\n',
    "prompts.json": json.dumps([WHOLE, "a dog -- in the snow"]),
    "prompts.yaml": yaml.safe_dump([WHOLE, "a dog -- in the snow"]),
}


def words(tmp_path, pipeline, images, **flags):
    return arguments(pipeline, images, tmp_path / "run", **flags)


def file_of(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return {"validation_prompts_file": str(tmp_path / name)}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_says_the_same(name, sd_pipeline, image_folder, tmp_path):
    assert WHOLE.keys() == KEYS.keys()
    config, _ = resolved(words(tmp_path, sd_pipeline, image_folder, **file_of(tmp_path, name, FILES[name])))
    assert config.validation.validation_prompts == (WHOLE, "a dog -- in the snow")


@pytest.mark.parametrize(
    "name, content",
    [
        ("prompts.json", json.dumps(["a cat \U0001f600\u2028on a mat"], indent="\t")),
        ("prompts.jsonl", json.dumps("a cat \U0001f600\u2028on a mat", ensure_ascii=False)),
    ],
)
def test_json_as_programs_write_it(name, content, tmp_path):
    """Escaped pairs, tabs, and separators of lines within a text."""
    path = file_of(tmp_path, name, content)["validation_prompts_file"]
    assert read_prompts(path) == ("a cat \U0001f600\u2028on a mat",)


def test_a_file_as_windows_writes_it(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\r\nöl\r\n", encoding="utf-16", newline="")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ("a cat", "öl")


def test_a_recipe_holds_the_prompts_and_not_their_file(sd_pipeline, image_folder, tmp_path):
    given = file_of(tmp_path, "prompts.txt", LINES)
    config = parse(words(tmp_path, sd_pipeline, image_folder, **given))
    assert "validation_prompts_file" not in recipe(config)
    assert public_recipe(recipe(config))["validation_prompts"] == [WHOLE, "a dog -- in the snow"]
    (tmp_path / "again.yaml").write_text(recipes.recipe_text(recipe(config)))
    again = parse(["--config", str(tmp_path / "again.yaml")])
    on_the_command_line = parse([*words_of(config), "--output_dir", str(tmp_path / "run")])
    prompts = config.validation.validation_prompts
    assert again.validation.validation_prompts == on_the_command_line.validation.validation_prompts == prompts


def test_a_structured_text_stays_a_text(sd_pipeline, image_folder, tmp_path):
    text = '{"scene": "a cat", "style": "photo"}'
    config = parse(words(tmp_path, sd_pipeline, image_folder, validation_prompts=[text, "{"]))
    assert config.validation.validation_prompts == (text, "{")


def test_classes_by_name_and_number(dit_pipeline, class_folder, tmp_path):
    given = file_of(tmp_path, "prompts.yaml", "- 3\n- {prompt: 4, seed: 1}\n- prompt: '5'\n")
    config, description = resolved(words(tmp_path, dit_pipeline, class_folder, **given))
    assert description.prompts(config.validation.validation_prompts, {}) == [3, 4, 5]


BAD_FILES = [
    ("prompts.csv", "a cat", ("names end in .txt, .jsonl",)),
    ("prompts.txt", "# nothing\n\n", ("there is no prompt",)),
    ("prompts.txt", "a dog\na cat --x 3", ("line 2: there is no --x", "--n NEGATIVE")),
    ("prompts.txt", "a cat --d 3 --d 4", ("line 1: --d gives seed twice",)),
    ("prompts.txt", "a cat --d seven", ("line 1: --d takes a number, not 'seven'",)),
    ("prompts.jsonl", '"a dog"\n{"prompt": ', ("line 2 is no JSON",)),
    ("prompts.jsonl", "[1]", ("line 1 is [1]",)),
    ("prompts.json", '["a dog", ', ("Expecting value",)),
    ("prompts.yaml", "prompt: a cat", ("must be a list",)),
    ("prompts.yaml", "- &a {prompt: x}\n- *a", ("reference",)),
    ("prompts.yaml", "- true", ("prompt 1 is True",)),
    ("prompts.txt", "x" * 1_000_001, ("1,000,000 bytes",)),
]


@pytest.mark.parametrize("name, content, expected", BAD_FILES)
def test_refused_files(name, content, expected, sd_pipeline, image_folder, tmp_path, capsys):
    given = file_of(tmp_path, name, content)
    message = refusal(capsys, words(tmp_path, sd_pipeline, image_folder, **given))
    assert message.startswith("--validation_prompts_file") and all(part in message for part in expected)


def test_a_file_that_is_not_there_or_no_text(sd_pipeline, image_folder, tmp_path, capsys):
    given = {"validation_prompts_file": str(tmp_path / "none.txt")}
    assert "cannot be read" in refusal(capsys, words(tmp_path, sd_pipeline, image_folder, **given))
    (tmp_path / "none.txt").write_bytes(b"\xff\xfe\x00")
    assert "save it in that encoding" in refusal(capsys, words(tmp_path, sd_pipeline, image_folder, **given))


@pytest.mark.parametrize("name", ["validation_prompt", "validation_prompts"])
def test_prompts_are_given_once(name, sd_pipeline, image_folder, tmp_path, capsys):
    given = file_of(tmp_path, "prompts.txt", "a cat") | {name: "a cat"}
    message = refusal(capsys, words(tmp_path, sd_pipeline, image_folder, **given))
    assert f"--validation_prompts_file and --{name} exclude" in message and f"--without {name}" in message


REFUSED = [
    ({"promt": "a"}, ("no prompt",)),
    ({"prompt": "a", "sede": 3}, ("no 'sede'", "seed")),
    ({"prompt": "a", "seed": -1}, ("seed -1: it must be 0 or more",)),
    ({"prompt": "a", "seed": 2**32}, ("at most",)),
    ({"prompt": "a", "seed": 1.5}, ("seed takes a whole number, not 1.5",)),
    ({"prompt": "a", "width": True}, ("width takes a whole number, not True",)),
    ({"prompt": "a", "guidance_scale": "five"}, ("guidance_scale takes a number",)),
    ({"prompt": "a", "guidance_scale": float("inf")}, ("guidance_scale inf: it must be finite",)),
    ({"prompt": "a", "num_inference_steps": 0}, ("num_inference_steps 0",)),
    ({"prompt": ["a"]}, ("prompt takes a text",)),
    ({"prompt": "a", "height": 33}, ("prompt 2, height 33", "multiples of")),  # by the pipeline
]


@pytest.mark.parametrize("entry, expected", REFUSED)
def test_refused_entries(entry, expected, sd_pipeline, image_folder, tmp_path, capsys, no_weights):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"validation_prompts": ["a dog", entry]}))
    message = refusal(capsys, words(tmp_path, sd_pipeline, image_folder, config=str(path)))
    assert "validation_prompts" in message and all(part in message for part in expected)


@pytest.mark.parametrize("pipeline, data", [("dit_pipeline", "class_folder"), ("flux_pipeline", "image_folder")])
def test_families_without_negative_prompts(pipeline, data, request, tmp_path, capsys, no_weights):
    prompt = json.dumps({"prompt": "1", "negative_prompt": "2"})
    base = [request.getfixturevalue(name) for name in (pipeline, data)]
    message = refusal(capsys, words(tmp_path, *base, validation_prompts=[prompt]))
    assert "prompt 1" in message and "takes no negative_prompt" in message


@pytest.mark.parametrize(
    "own, general, pipeline, warned",
    [
        ({}, None, "sd_pipeline", False),
        ({}, 1, "sd_pipeline", True),
        ({"guidance_scale": 2}, 1, "sd_pipeline", False),
        ({"guidance_scale": 1}, None, "sd_pipeline", True),
        ({"guidance_scale": 0.5}, None, "z_image_pipeline", False),  # which adds half of the difference
        ({"guidance_scale": 0}, None, "z_image_pipeline", True),
    ],
)
def test_a_negative_prompt_needs_guidance(own, general, pipeline, warned, request, image_folder, tmp_path):
    prompt = json.dumps({"prompt": "a cat", "negative_prompt": "blurry"} | own)
    given = {"validation_prompts": [prompt], "validation_guidance_scale": general}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolved(words(tmp_path, request.getfixturevalue(pipeline), image_folder, **given))
    assert any("negative_prompt has no effect" in str(each.message) for each in caught) is warned
