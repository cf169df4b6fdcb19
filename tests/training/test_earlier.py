"""An output folder that holds an earlier run's result: it is set aside, and never taken for another one."""

import json
import os
import shutil

import pytest
from trainer import held_by_another, same, train, weights

from lpl.evaluation.sources import find_models
from lpl.publishing.command import check_finished
from lpl.tools import layout


FLAGS = {"lpl_weight": 0, "max_train_steps": 1}
LORA = FLAGS | {"rank": 2}


@pytest.fixture(scope="module")
def whole(sd_pipeline, image_folder, tmp_path_factory):
    """A full fine-tuning; its base has CLIP's vocabulary in the files that older programs read."""
    pipeline = shutil.copytree(sd_pipeline, tmp_path_factory.mktemp("base") / "sd")
    for name in ("vocab.json", "merges.txt"):
        (pipeline / "tokenizer" / name).write_text("{}" if name.endswith("json") else "#version: 0.2\n")
    return train(pipeline, image_folder, tmp_path_factory.mktemp("whole") / "run", **FLAGS)


def test_what_was_not_trained_is_the_bases_own_files(whole, sd_pipeline):
    for name in ("tokenizer/tokenizer_config.json", "text_encoder/model.safetensors", "vae/config.json"):
        assert (whole / name).read_bytes() == (sd_pipeline / name).read_bytes()
    assert (whole / "tokenizer/vocab.json").read_text() == "{}" and (whole / "tokenizer/merges.txt").is_file()


def test_files_have_the_permissions_that_the_umask_says(sd_pipeline, image_folder, tmp_path):
    before = os.umask(0o027)
    try:
        flags = LORA | {"checkpointing_steps": 1, "use_ema": True, "validation_prompts": ["a cat"]}
        train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {layout.LORA, "run_comfyui.safetensors", "state.safetensors", layout.CARD, layout.RECIPE, "00.png"} <= names
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_a_folder_is_one_runs_at_a_time(sd_pipeline, image_folder, tmp_path):
    with held_by_another(tmp_path / "run"), pytest.raises(SystemExit, match="another run writes to this folder now"):
        train(sd_pipeline, image_folder, tmp_path / "run", **FLAGS)
    train(sd_pipeline, image_folder, tmp_path / "run", **FLAGS)


def test_an_earlier_result_is_set_aside(whole, sd_pipeline, image_folder, tmp_path, caplog):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = weights(folder)
    train(sd_pipeline, image_folder, folder, **LORA)
    assert not (folder / layout.INDEX).exists() and not (folder / "unet").exists()
    assert same(weights(folder / "earlier-run"), before) and "moved to earlier-run: " in caplog.text
    (earlier,), (lora,) = find_models(str(folder / "earlier-run")), find_models(str(folder))
    assert earlier.weights is None and lora.weights == folder
    first = (folder / layout.LORA).read_bytes()
    train(sd_pipeline, image_folder, folder, resume_from_checkpoint="latest", seed=1, **{k: LORA[k] for k in LORA})
    assert (folder / "earlier-run-2" / layout.LORA).read_bytes() == first != (folder / layout.LORA).read_bytes()
    check_finished(folder)
    check_finished(folder / "earlier-run")


def test_a_file_of_somebody_else_is_set_aside(sd_pipeline, image_folder, tmp_path):
    (tmp_path / layout.CARD).write_text("# My notes\n")
    train(sd_pipeline, image_folder, tmp_path, **LORA)
    assert (tmp_path / layout.EARLIER_RUN / layout.CARD).read_text() == "# My notes\n"
    assert "My notes" not in (tmp_path / layout.CARD).read_text()


def test_a_run_that_goes_on_keeps_its_own(sd_pipeline, image_folder, tmp_path):
    flags = LORA | {"checkpointing_steps": 1}
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **flags)
    train(sd_pipeline, image_folder, folder, **flags | {"max_train_steps": 2}, resume_from_checkpoint="latest")
    assert not (folder / "earlier-run").exists()


def test_a_folder_with_both_kinds(whole, image_folder, tmp_path):
    """As earlier versions left them: the recipe says what was trained, and nothing is published."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / layout.LORA).write_bytes(b"")
    with pytest.raises(ValueError, match="a pipeline and a LoRA"):
        check_finished(folder)
    assert find_models(str(folder))[-1].weights is None
    recipe = folder / layout.RECIPE
    recipe.write_text(recipe.read_text().replace("lora: false", "lora: true"))
    assert find_models(str(folder))[-1].weights == folder
    recipe.unlink()
    with pytest.raises(ValueError, match="a pipeline and a LoRA"):
        find_models(str(folder))


def test_a_pipeline_that_nobody_could_load_is_not_published(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    index = json.loads((folder / layout.INDEX).read_text())
    (folder / layout.INDEX).write_text(json.dumps(index | {"safety_checker": ["stable_diffusion", "X"]}))
    with pytest.raises(ValueError, match="lists safety_checker"):
        check_finished(folder)
