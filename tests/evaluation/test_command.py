"""`python -m lpl.evaluate` on tiny pipelines and folders of real pictures."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_image_folder
from torch import nn
from trainer import ROOT, train

from lpl.config.choices import SET_METRICS
from lpl.evaluation import Preprocessing, compare, folder_images, generation, high_frequency_energy, load_network
from lpl.evaluation import command as evaluate
from lpl.evaluation.metrics import halves
from lpl.evaluation.networks import load_networks
from lpl.evaluation.results import counterparts


PICTURES = {"samples.png", "crops.png", "spectrum.png", "curves.png"}
NETWORK = "tests.evaluation.test_command:block_means"
COUNT = 12


class BlockMeans(nn.Module):
    """Mean colours of the four quarters: 12 features without a weight."""

    fingerprint = "block means, 1"

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)


def block_means():
    return BlockMeans()


def grey():
    """The mean colour alone."""
    return nn.Sequential(BlockMeans(), nn.Unflatten(1, (3, 4)), nn.AdaptiveAvgPool1d(1), nn.Flatten())


def broken():
    return nn.Linear(3, 4)


class Captions:
    """In the place of CLIP: the mean colour, and the letters of a caption."""

    name, fingerprint, preprocessing = "clip", "clip-1", {"resize": 8}

    def features(self, images):
        return torch.tensor(np.stack([np.asarray(image).mean((0, 1)) for image in images]), dtype=torch.float32)

    def text_features(self, captions):
        return torch.tensor([[len(caption), caption.count("a"), caption.count("e")] for caption in captions]).float()


def words(generated, reference, folder, *more, **flags):
    """A command line; flags of None are left out, True is a flag without a value."""
    flags = {"features": NETWORK, "device": "cpu", "num_inference_steps": 2, "guidance_scale": 2.0} | flags
    given = {name: value for name, value in flags.items() if value is not None}
    named = [part for name, value in given.items() for part in (f"--{name}", str(value))[: 1 if value is True else 2]]
    return [
        "--generated",
        *map(str, generated),
        "--reference",
        str(reference),
        "--output_dir",
        str(folder),
        *named,
        *more,
    ]


def evaluated(*parts, **flags):
    return evaluate.run(evaluate.parse(words(*parts, **flags)))


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def files(folder):
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in Path(folder).rglob("*.png")}


@pytest.fixture(scope="module", autouse=True)
def kept_features(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPL_CACHE", str(tmp_path_factory.mktemp("features")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny_image_folder(tmp_path_factory.mktemp("photos"), count=COUNT)


@pytest.fixture(scope="module")
def run_folder(sd_pipeline, photos, tmp_path_factory):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "lpl_weight": 0, "use_ema": True}
    return train(sd_pipeline, photos, tmp_path_factory.mktemp("run"), **flags)


@pytest.fixture(scope="module")
def command(sd_pipeline, run_folder, photos, tmp_path_factory):
    """Everything at once: the folder that the command has filled, its words, and what it has printed."""
    folder, printed = tmp_path_factory.mktemp("evaluated") / "deep", []
    line = words(
        [f"before={sd_pipeline}", f"run={run_folder}", f"same={photos}"],
        photos,
        folder,
        bootstrap=4,
        nearest_k=4,
        resolution=32,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command changes
        evaluate.main(line)
    return SimpleNamespace(folder=folder, words=line, printed="\n".join(printed))


@pytest.fixture
def evaluation(command):
    return json.loads((command.folder / "evaluation.json").read_text())


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(generation, "load_model", load)
    monkeypatch.setattr(evaluate, "load_networks", load)


# What is written


def test_numbers_table_and_pictures_are_written(command, evaluation):
    assert {file.name for file in command.folder.iterdir()} == PICTURES | {
        "evaluation.json",
        "evaluation.md",
        "images",
    }
    for name in PICTURES:
        picture = np.asarray(Image.open(command.folder / name).convert("L"))
        assert picture.std() > 10 and picture.shape[1] > 500, name
    found = evaluation["results"]
    assert [(r["label"], r["step"], r["images"]) for r in found] == [
        ("before", None, COUNT), ("run", 2, COUNT), ("run", 4, COUNT), ("same", None, COUNT)
    ]  # fmt: skip
    table = (command.folder / "evaluation.md").read_text()
    for result in found:
        value = f"{result['metrics'][NETWORK]['fid']['value']:.4g}"
        assert value in table and value in command.printed
    assert "warning: there are few images for fid, kid, precision" in command.printed
    assert "12 generated images are few" in table and "12 generated images are few" not in command.printed
    assert evaluation["networks"][NETWORK]["dim"] == 12 and len(evaluation["networks"][NETWORK]["fingerprint"]) == 64
    assert evaluation["reference"]["preprocessing"] == {"resolution": 32, "interpolation": "lanczos"}
    assert evaluation["versions"]["torchmetrics"] and evaluation["versions"]["scikit-learn"]
    assert evaluation["command"].startswith("python -m lpl.evaluate --generated")


def test_the_reference_itself_is_at_no_distance(evaluation):
    found = evaluation["results"][-1]["metrics"][NETWORK]
    assert found["fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert [found[name]["value"] for name in ("precision", "recall", "coverage")] == [1.0, 1.0, 1.0]
    others = [result["metrics"][NETWORK]["fid"]["value"] for result in evaluation["results"][:-1]]
    assert min(others) > 0.01


def test_the_numbers_are_those_of_the_images_in_the_folder(command, evaluation, photos):
    result = evaluation["results"][1]
    (folder,) = (command.folder / "images").glob("run-step-2-*")
    preprocessing = Preprocessing(32)
    sets = [folder_images(place, preprocessing, progress=False) for place in (folder, photos)]
    features = [load_network(BlockMeans()).features(list(images)).numpy() for images in sets]
    found = compare(*features, bootstrap=4, nearest_k=4, counterparts=counterparts(*sets))
    for name, estimate in found.items():
        ours = result["metrics"][NETWORK][name]
        assert [ours["value"], ours["spread"]] == pytest.approx([estimate.value, estimate.spread])
    found = halves(features[1], SET_METRICS, nearest_k=4)
    assert evaluation["reference"]["halves"][NETWORK] == {
        name: {"value": pytest.approx(half.value), "spread": None} for name, half in found.items()
    }
    assert result["high_frequency_energy"] == pytest.approx(high_frequency_energy(sets[0]))
    assert evaluation["reference"]["high_frequency_energy"] == pytest.approx(high_frequency_energy(sets[1]))


def test_all_models_draw_the_same_prompts_and_seeds(command, photos):
    drawn = [json.loads(file.read_text()) for file in sorted((command.folder / "images").glob("*/settings.json"))]
    assert len(drawn) == 3
    assert all((d["prompts"], d["seeds"]) == (drawn[0]["prompts"], list(range(COUNT))) for d in drawn)
    captions = folder_images(photos, Preprocessing(32), progress=False).captions
    assert sorted(drawn[0]["prompts"]) == sorted(captions) and drawn[0]["prompts"] != captions  # shuffled


def test_models_are_compared_with_the_first_in_pairs(command, evaluation):
    """Of folders it is not known what they were drawn from."""
    before, *runs, same = evaluation["results"]
    assert before["differences"] is None and same["differences"] is None
    for result in runs:
        assert result["differences"]["to"] == "before"
        for name, difference in result["differences"]["metrics"][NETWORK].items():
            values = [found["metrics"][NETWORK][name]["value"] for found in (result, before)]
            assert difference["value"] == pytest.approx(values[0] - values[1]) and difference["spread"] is not None
    assert command.printed.count("run minus before") == 2 and "real images, half and half" in command.printed


def test_the_same_again_draws_nothing(command, evaluation, monkeypatch):
    before = files(command.folder / "images")
    monkeypatch.setattr(generation, "load_model", None)
    again = evaluate.run(evaluate.parse(command.words))
    assert json.loads(json.dumps(again)) == evaluation
    assert files(command.folder / "images") == before


def test_what_is_broken_by_then_is_drawn_anew(command, evaluation):
    (folder,) = (command.folder / "images").glob("before-*")
    whole = (folder / "000003.png").read_bytes()
    (folder / "000003.png").write_bytes(whole[:100])
    again = evaluate.run(evaluate.parse(command.words))
    assert np.abs(pixels(folder / "000003.png") - pixels(BytesIO(whole))).max() <= 2
    ours, theirs = (found["results"][0]["metrics"][NETWORK]["fid"]["value"] for found in (again, evaluation))
    assert ours == pytest.approx(theirs, rel=1e-2)
    (folder / "000003.png").write_bytes(whole)


def test_which_part_of_a_folder_is_taken_is_spread_evenly(photos, tmp_path):
    command = evaluate.parse(words([photos], photos, tmp_path, num_images=5))
    (state,) = evaluate.find_states(command)
    evaluate.read_state(state, command, Preprocessing(32))
    whole = folder_images(photos, Preprocessing(32), progress=False)
    assert state.pictures.captions == [whole.captions[number] for number in (0, 2, 4, 7, 9)]


def test_another_setting_draws_beside_what_is_there(sd_pipeline, photos, tmp_path):
    flags = {"resolution": 32, "num_images": 7, "metrics": "fid"}
    first = evaluated([sd_pipeline], photos, tmp_path, **flags)
    kept = files(tmp_path / "images")
    second = evaluated([sd_pipeline], photos, tmp_path, **flags | {"guidance_scale": 5.0})
    third = evaluated([sd_pipeline], photos, tmp_path, **flags | {"num_images": 9})
    assert len(list((tmp_path / "images").iterdir())) == 2 and kept.items() <= files(tmp_path / "images").items()
    fids = [found["results"][0]["metrics"][NETWORK]["fid"]["value"] for found in (first, second, third)]
    assert len(set(fids)) == 3 and third["results"][0]["images"] == 9


def test_prompts_of_a_file_are_taken_in_turn(sd_pipeline, photos, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \na bird\n")
    flags = {"resolution": 32, "num_images": 7, "metrics": "kid", "prompts_file": tmp_path / "prompts.txt"}
    found = evaluated([sd_pipeline], photos, tmp_path / "out", seed=40, **flags)
    assert found["settings"]["prompts_file"] == str(tmp_path / "prompts.txt")
    (settings,) = (tmp_path / "out" / "images").glob("*/settings.json")
    drawn = json.loads(settings.read_text())
    assert drawn["prompts"] == ["a cat", "a dog", "a bird"] * 2 + ["a cat"] and drawn["seeds"] == list(range(40, 47))


def test_folders_alone_are_compared_at_their_own_size(photos, image_folder, tmp_path, nothing_loads, monkeypatch):
    monkeypatch.setattr(evaluate, "load_networks", load_networks)
    found = evaluated([image_folder], photos, tmp_path, metrics="fid", num_images=5)
    assert found["results"][0]["images"] == 5 and found["reference"]["preprocessing"]["resolution"] == 48
    assert not (tmp_path / "curves.png").exists() and not (tmp_path / "images").exists()


def test_clip_score_is_of_each_image_and_its_caption(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_networks", lambda wanted, *more: {name: Captions() for name in wanted})
    monkeypatch.setattr(evaluate, "check_networks", lambda *args, **kwargs: None)
    found = evaluated([photos], photos, tmp_path, metrics="clip_score", clip="clip", features=None, resolution=32)
    images = folder_images(photos, Preprocessing(32), progress=False)
    seen, said = Captions().features(list(images)), Captions().text_features(images.captions)
    expected = 100 * nn.functional.cosine_similarity(seen, said).mean().item()
    assert found["results"][0]["metrics"] == {
        "clip": {"clip_score": {"value": pytest.approx(expected), "spread": None}}
    }
    assert list(found["networks"]) == ["clip"] and found["networks"]["clip"]["dim"] == 3


def test_classes_are_drawn_by_their_labels(dit_pipeline, class_folder, tmp_path):
    found = evaluated([dit_pipeline], class_folder, tmp_path, resolution=32, metrics="fid", num_images=9)
    assert found["results"][0]["images"] == 9
    (settings,) = tmp_path.glob("images/*/settings.json")
    assert sorted(json.loads(settings.read_text())["prompts"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # of cats, cups, rockets
    (tmp_path / "prompts.txt").write_text("goldfish\n207")
    evaluated([dit_pipeline], class_folder, tmp_path / "named", resolution=32, metrics="fid", num_images=3,
              prompts_file=tmp_path / "prompts.txt")  # fmt: skip
    (settings,) = (tmp_path / "named").glob("images/*/settings.json")
    assert json.loads(settings.read_text())["prompts"] == [1, 207, 1]


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_images": 0}, "--num_images 0: it must be more than 0"),
        ({"batch_size": 0}, "--batch_size 0: it must be more than 0"),
        ({"bootstrap": 1}, "--bootstrap 1: it must be 2 or more"),
        ({"nearest_k": 0}, "--nearest_k 0: it must be more than 0"),
        ({"guidance_scale": -1}, "--guidance_scale -1.0: it must be 0 or more"),
        ({"clip": "some/clip"}, "--clip some/clip is for clip_score"),
        ({"device": "teapot"}, "--device teapot: .*cpu"),
        ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
        ({"prompts_file": "no_such_file"}, "--prompts_file no_such_file: there is no such file"),
        ({"prompts_file": os.devnull}, "--prompts_file /dev/null: there is no such file"),
        ({"reference": "no_such_folder"}, "--reference no_such_folder: there is no such folder"),
        ({"reference": ROOT / "lpl"}, "--reference .*lpl: the folder has no images"),
        ({"resolution": 0}, "--resolution 0: it must be"),
        ({"resolution": 30}, "--resolution 30: this pipeline takes multiples of 4"),
        ({"features": "no_such_module:function"}, "--features no_such_module:function: .*cannot be imported"),
        ({"num_images": 6}, r"6 generated .* need at least 7 .*\(--num_images\) or fewer --metrics"),
        ({"nearest_k": 11}, "12 generated and 12 reference images: .* need at least 13 of each"),
        ({"update_card": True}, "--update_card: none of the sources is a training run's folder"),
        ({"generated": ["no/such/pipeline"]}, "--generated no/such/pipeline: there is no such folder"),
        ({"generated": ["="]}, "--generated =: it must be a source, or LABEL=SOURCE"),
        ({"generated": ["a=one", "a=two"]}, "two sources are called a; name them, LABEL=SOURCE"),
        ({"generated": ["real images=one"]}, "--generated real images=...: that is the reference's name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_before_anything_is_loaded(
    flags, message, sd_pipeline, photos, tmp_path, nothing_loads
):
    flags = {"generated": [sd_pipeline], "reference": photos, "resolution": 32} | flags
    with pytest.raises(ValueError, match=message):
        evaluated(flags.pop("generated"), flags.pop("reference"), tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_the_command_says_it_in_one_line(photos, tmp_path, capsys, nothing_loads):
    with pytest.raises(SystemExit) as left:
        evaluate.main(words([tmp_path / "gone"], photos, tmp_path / "out"))
    said = capsys.readouterr().err
    assert (
        left.value.code == 2
        and said.count("\n") == 1
        and said.startswith("python -m lpl.evaluate: error: --generated")
    )


def test_prompts_are_needed_where_the_reference_has_no_captions(
    sd_pipeline, class_folder, tmp_path, monkeypatch, nothing_loads
):
    with pytest.raises(ValueError, match="no captions to draw from; put a metadata.jsonl .*; or give --prompts_file"):
        evaluated([sd_pipeline], class_folder, tmp_path, resolution=32)
    with pytest.raises(ValueError, match="clip_score compares images with their captions"):
        monkeypatch.setattr(evaluate, "check_networks", lambda *args: None)
        evaluated([class_folder], class_folder, tmp_path, metrics="clip_score", features=None)
    with pytest.raises(ValueError, match="this folder is no pipeline, no training run, and has no images"):
        (tmp_path / "empty").mkdir()
        evaluated([tmp_path / "empty"], class_folder, tmp_path)


def test_models_of_unequal_resolutions_need_the_flag(sd_pipeline, run_folder, photos, tmp_path, nothing_loads):
    with pytest.raises(ValueError, match="--resolution: the models draw at 32, 512 pixels; give one"):
        evaluated([sd_pipeline, run_folder], photos, tmp_path)


def test_prompts_files_have_to_say_something(sd_pipeline, dit_pipeline, photos, tmp_path, nothing_loads):
    flags = {"resolution": 32, "prompts_file": tmp_path / "prompts.txt"}
    (tmp_path / "prompts.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="--prompts_file .*prompts.txt: the file has no prompts"):
        evaluated([sd_pipeline], photos, tmp_path / "out", **flags)
    (tmp_path / "prompts.txt").write_bytes("K\xe4fer".encode("latin-1"))
    with pytest.raises(ValueError, match="--prompts_file .*prompts.txt is not in UTF-8"):
        evaluated([sd_pipeline], photos, tmp_path / "out", **flags)
    (tmp_path / "prompts.txt").write_text("\ufeffgoldfish\nunicorn\n", encoding="utf-8")
    with pytest.raises(ValueError, match="--prompts_file .*prompts.txt: unicorn: this model draws classes; give a cl"):
        evaluated([dit_pipeline], photos, tmp_path / "out", **flags)


def test_missing_libraries_are_told_of_before_all_else(photos, tmp_path, monkeypatch, nothing_loads):
    for module in ("sklearn", "torchmetrics"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    missing = "python -m lpl.evaluate needs torchmetrics, scikit-learn: pip install torchmetrics scikit-learn"
    with pytest.raises(ValueError, match=missing):
        evaluated([tmp_path / "gone"], tmp_path / "gone", tmp_path / "out", num_images=0)


@pytest.mark.parametrize("given", [["features", "no_such_module:function"], ["metrics", "fid", "clip_score"]])
def test_networks_are_tried_before_anything_is_looked_for(given, tmp_path, photos, monkeypatch):
    """The one of CLIPScore too, whose weights are not here."""
    monkeypatch.setattr(evaluate, "find_states", lambda command: pytest.fail("sources were looked for"))
    name, *values = given
    line = words(
        [tmp_path / "gone"], photos, tmp_path / "out", f"--{name}", *values, **{name: None, "cache_dir": tmp_path}
    )
    with pytest.raises(ValueError, match=r"^--(features no_such_module|clip openai/clip)"):
        evaluate.run(evaluate.parse(line))


def test_images_that_cannot_be_read_are_told_of_before_anything_is_drawn(sd_pipeline, photos, tmp_path, nothing_loads):
    """There are files enough, but not images."""
    copied = shutil.copytree(photos, tmp_path / "photos")
    for file in sorted(copied.glob("0*"))[:6]:
        file.write_text("no image")
    with pytest.raises(ValueError, match="6 generated and 6 reference images"):
        evaluated([sd_pipeline], copied, tmp_path / "out", resolution=32)


# What has no effect


def idle(*parts, **flags):
    """The flags that are said to do nothing."""
    command = evaluate.parse(words(*parts, **flags))
    states = evaluate.find_states(command)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        evaluate.warn_of_idle(command, states)
    flags = [re.fullmatch("--(.*) has no effect in this run", str(warning.message)) for warning in said]
    return {flag[1] for flag in flags}


def test_flags_that_do_nothing_are_named(photos, tmp_path):
    """Folders are not drawn; CLIPScore takes no features."""
    flags = {"revision": "main", "variant": "fp16", "dtype": "bfloat16", "max_sequence_length": 16, "seed": 3}
    more = {"metrics": "clip_score", "nearest_k": 3, "pretrained_model_name_or_path": "base", "prompts_file": "file"}
    expected = {"num_inference_steps", "guidance_scale", "features", *flags, *more} - {"metrics"}
    assert idle([photos], photos, tmp_path, **flags, **more) == expected


def test_flags_that_do_something_are_not_named(sd_pipeline, photos, tmp_path):
    flags = {"dtype": "bfloat16", "seed": 3, "nearest_k": 3, "resolution": 32, "revision": "main"}
    assert idle([sd_pipeline], photos, tmp_path, **flags) == set()
    flags = {"num_inference_steps": None, "guidance_scale": None, "metrics": "fid", "seed": 1}  # decides the halves
    assert idle([photos], photos, tmp_path, **flags) == set()


def test_a_revision_is_of_a_pipeline_and_a_base_of_what_needs_it(sd_pipeline, run_folder, photos, tmp_path):
    flags = {"revision": "main", "variant": "fp16", "pretrained_model_name_or_path": sd_pipeline}
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_folder / "checkpoint-2", unfinished / "checkpoint-2")
    shutil.copy(run_folder / "recipe.yaml", unfinished)
    assert idle([run_folder], photos, tmp_path, **flags) == set(flags)  # it has its own frozen parts
    assert idle([unfinished], photos, tmp_path, **flags) == {"revision", "variant"}
    assert idle([unfinished / "checkpoint-2"], photos, tmp_path, **flags) == {"revision", "variant"}


# Launched


@pytest.mark.slow
def test_two_processes_find_what_one_finds(command, evaluation, photos, tmp_path):
    Image.new("RGB", (48, 48)).save(photos / "unlisted.png")
    line = [str(tmp_path) if word == str(command.folder) else word for word in command.words]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT / 'tests/support'}{os.pathsep}{ROOT}",
        "LPL_CACHE": str(tmp_path / "features"),
    }
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lpl.evaluate", *line],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (photos / "unlisted.png").unlink()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("numbers, pictures, and explanations of the warnings are in") == 1
    assert done.stderr.count("1 images are left out") == 2  # said once of each folder, not by each process
    found = json.loads((tmp_path / "evaluation.json").read_text())
    for ours, theirs in zip(found["results"], evaluation["results"], strict=True):
        values = [{name: e["value"] for name, e in r["metrics"][NETWORK].items()} for r in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-2, abs=1e-4)
    for folder in (command.folder / "images").iterdir():
        images = sorted(folder.glob("*.png"))
        other = [np.asarray(Image.open(tmp_path / "images" / folder.name / file.name)).astype(int) for file in images]
        assert len(images) == COUNT
        assert all(np.abs(np.asarray(Image.open(a)) - b).max() <= 2 for a, b in zip(images, other))
    shutil.rmtree(tmp_path / "images")


@pytest.mark.parametrize("flag", ["reference", "generated"])
def test_nothing_is_written_among_the_images(flag, photos, image_folder, tmp_path, nothing_loads):
    read = {"generated": image_folder, "reference": image_folder, flag: photos}
    with pytest.raises(ValueError, match=f"--output_dir .* lies in --{flag}"):
        evaluated([read["generated"]], read["reference"], photos / "evaluated")


def test_a_source_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluate.labelled_sources(["with=~/run"]) == [("with", str(tmp_path / "run"))]
