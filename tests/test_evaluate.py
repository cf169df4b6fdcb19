"""`python -m lpl.evaluate` on tiny pipelines and folders of real pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from PIL import Image
from tiny import tiny_image_folder
from torch import nn
from trainer import ROOT, train

from lpl import evaluate
from lpl.evaluation import (
    Preprocessing,
    compare,
    folder_images,
    generation,
    high_frequency_energy,
    load_network,
    results,
)


PICTURES = {"samples.png", "crops.png", "spectrum.png", "curves.png"}
NETWORK = "test_evaluate:block_means"
COUNT = 12


class BlockMeans(nn.Module):
    """Mean colours of the four quarters: 12 features without a weight."""

    num_features = 12

    def forward(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)


def block_means():
    return BlockMeans()


class Captions:
    """In the place of CLIP: the mean colour, and the letters of a caption."""

    name, fingerprint, dim, preprocessing = "clip", "clip-1", 3, {"resize": 8}

    def features(self, images):
        return torch.tensor(np.stack([np.asarray(image).mean((0, 1)) for image in images]), dtype=torch.float32)

    def text_features(self, captions):
        return torch.tensor([[len(caption), caption.count("a"), caption.count("e")] for caption in captions]).float()


def words(generated, reference, folder, *more, **flags):
    """A command line; flags of None are left out."""
    flags = {"features": NETWORK, "device": "cpu", "num_inference_steps": 2, "guidance_scale": 2.0} | flags
    named = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
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
        [f"before={sd_pipeline}", f"run={run_folder}", f"same={photos}"], photos, folder, bootstrap=4, resolution=32
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts: printed.append(" ".join(map(str, parts))))
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
    monkeypatch.setattr(evaluate, "load_network", load)


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
    assert "warning: fid: 12 generated images are few" in command.printed and "Warning: fid: 12" in table
    assert evaluation["networks"][NETWORK]["dim"] == 12 and len(evaluation["networks"][NETWORK]["fingerprint"]) == 64
    assert evaluation["reference"]["preprocessing"] == {"resolution": 32, "crop": "center", "interpolation": "lanczos"}
    assert evaluation["versions"]["torchmetrics"] and evaluation["command"].startswith(
        "python -m lpl.evaluate --generated"
    )


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
    found = compare(*features, bootstrap=4)
    for name, estimate in found.items():
        ours = result["metrics"][NETWORK][name]
        assert [ours["value"], ours["low"], ours["high"]] == pytest.approx(
            [estimate.value, estimate.low, estimate.high]
        )
    assert result["high_frequency_energy"] == pytest.approx(high_frequency_energy(sets[0]))
    assert evaluation["reference"]["high_frequency_energy"] == pytest.approx(high_frequency_energy(sets[1]))


def test_all_models_draw_the_same_prompts_and_seeds(command, photos):
    drawn = [json.loads(file.read_text()) for file in sorted((command.folder / "images").glob("*/settings.json"))]
    assert len(drawn) == 3
    assert all((d["prompts"], d["seeds"]) == (drawn[0]["prompts"], list(range(COUNT))) for d in drawn)
    captions = folder_images(photos, Preprocessing(32), progress=False).captions
    assert sorted(drawn[0]["prompts"]) == sorted(captions) and drawn[0]["prompts"] != captions  # shuffled


def test_the_same_again_draws_nothing(command, evaluation, monkeypatch):
    before = files(command.folder / "images")
    monkeypatch.setattr(generation, "load_model", None)
    again = evaluate.run(evaluate.parse(command.words))
    assert json.loads(json.dumps(again)) == evaluation
    assert files(command.folder / "images") == before


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
    flags = {"resolution": 32, "num_images": 7, "metrics": "kid", "prompts": tmp_path / "prompts.txt", "seed": 40}
    evaluated([sd_pipeline], photos, tmp_path / "out", **flags)
    (settings,) = (tmp_path / "out" / "images").glob("*/settings.json")
    drawn = json.loads(settings.read_text())
    assert drawn["prompts"] == ["a cat", "a dog", "a bird"] * 2 + ["a cat"] and drawn["seeds"] == list(range(40, 47))


def test_folders_alone_are_compared_at_their_own_size(photos, image_folder, tmp_path, nothing_loads, monkeypatch):
    monkeypatch.setattr(evaluate, "load_network", load_network)
    found = evaluated([image_folder], photos, tmp_path, metrics="fid", num_images=5)
    assert found["results"][0]["images"] == 5 and found["reference"]["preprocessing"]["resolution"] == 48
    assert not (tmp_path / "curves.png").exists() and not (tmp_path / "images").exists()


def test_clip_score_is_of_each_image_and_its_caption(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_network", lambda name, *more: Captions())
    monkeypatch.setattr(evaluate, "check_network", lambda *args, **kwargs: None)
    found = evaluated([photos], photos, tmp_path, metrics="clip_score", clip="clip", features=None, resolution=32)
    images = folder_images(photos, Preprocessing(32), progress=False)
    seen, said = Captions().features(list(images)), Captions().text_features(images.captions)
    expected = 100 * nn.functional.cosine_similarity(seen, said).mean().item()
    assert found["results"][0]["metrics"] == {
        "clip": {"clip_score": {"value": pytest.approx(expected), "low": None, "high": None}}
    }


def test_classes_are_drawn_by_their_labels(dit_pipeline, class_folder, tmp_path):
    found = evaluated([dit_pipeline], class_folder, tmp_path, resolution=32, metrics="fid", num_images=9)
    assert found["results"][0]["images"] == 9
    (settings,) = tmp_path.glob("images/*/settings.json")
    assert sorted(json.loads(settings.read_text())["prompts"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # of cats, cups, rockets
    (tmp_path / "prompts.txt").write_text("goldfish\n207")
    evaluated([dit_pipeline], class_folder, tmp_path / "named", resolution=32, metrics="fid", num_images=3,
              prompts=tmp_path / "prompts.txt")  # fmt: skip
    (settings,) = (tmp_path / "named").glob("images/*/settings.json")
    assert json.loads(settings.read_text())["prompts"] == [1, 207, 1]


# What is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_images": 0}, "--num_images 0: it must be 1 or more"),
        ({"batch_size": 0}, "--batch_size 0: it must be 1 or more"),
        ({"bootstrap": 1}, "--bootstrap 1: it must be 2 or more"),
        ({"guidance_scale": -1}, "--guidance_scale -1.0: it must be 0 or more"),
        ({"clip": "some/clip"}, "--clip some/clip is for clip_score"),
        ({"device": "teapot"}, "--device teapot: .*give cpu"),
        ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
        ({"prompts": "no_such_file"}, "--prompts no_such_file: there is no such file"),
        ({"reference": "no_such_folder"}, "--reference no_such_folder: there is no such folder"),
        ({"resolution": 30}, "--resolution 30: this pipeline takes multiples of 4"),
        ({"features": "no_such_module:function"}, "--features no_such_module:function: .*cannot be imported"),
        ({"num_images": 6}, "6 generated .* need 7"),
        ({"generated": ["no/such/pipeline"]}, "--generated no/such/pipeline: there is no such folder"),
        ({"generated": ["="]}, "--generated =: it must be a source, or LABEL=SOURCE"),
        ({"generated": ["a=one", "a=two"]}, "two sources are called a; name them, LABEL=SOURCE"),
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


def test_prompts_are_needed_where_the_reference_has_no_captions(sd_pipeline, class_folder, tmp_path, nothing_loads):
    with pytest.raises(ValueError, match="no captions to draw from; put a metadata.jsonl .*; or give --prompts"):
        evaluated([sd_pipeline], class_folder, tmp_path, resolution=32)
    with pytest.raises(ValueError, match="clip_score compares images with their captions"):
        evaluated([class_folder], class_folder, tmp_path, metrics="clip_score", features=None)
    with pytest.raises(ValueError, match="this folder is no pipeline, no training run, and has no images"):
        (tmp_path / "empty").mkdir()
        evaluated([tmp_path / "empty"], class_folder, tmp_path)


def test_models_of_unequal_resolutions_need_the_flag(sd_pipeline, run_folder, photos, tmp_path, nothing_loads):
    with pytest.raises(ValueError, match="--resolution: the models draw at 32, 512 pixels; give one"):
        evaluated([sd_pipeline, run_folder], photos, tmp_path)


# What is said


def result(label="run", step=None, images=5000, drawn=None, **metrics):
    found = {name: {"value": value, "low": None, "high": None} for name, value in metrics.items()}
    return {"label": label, "step": step, "images": images, "drawn": drawn, "metrics": {"net": found}}


def test_warnings_of_what_does_not_compare():
    networks = {"net": SimpleNamespace(dim=8)}
    drawn = {"num_inference_steps": 2, "guidance_scale": 1.0}
    alike = [result(fid=1.0, precision=0.5, drawn=drawn), result("other", fid=1.0, drawn=drawn)]
    assert results.all_warnings(alike, 5000, networks) == []
    unlike = [alike[0], result("other", images=4000, drawn=drawn | {"guidance_scale": 3.0})]
    counts, sampling = results.all_warnings(unlike, 5000, networks)
    assert "4000, 5000 images" in counts and "unequal guidance_scale: 1.0, 3.0; give --guidance_scale" in sampling
    (few,) = results.all_warnings([result(precision=0.5, recall=0.5)], 50, networks)
    assert few.startswith("precision, recall: 50 reference images are few")


def test_only_inception_gives_a_fid():
    entry = result(fid=1.25, precision=0.5) | {"high_frequency_energy": 0.1}
    common = {"reference": {"images": 10, "high_frequency_energy": 0.2}}
    heading, row, _ = results.table(common | {"results": [entry]})
    assert heading[4:6] == ["Fréchet distance ↓", "precision ↑"] and row[:6] == [
        "run",
        "",
        "5000",
        "net",
        "1.25",
        "0.5",
    ]
    entry["metrics"] = {"inception": entry["metrics"]["net"]}
    assert results.table(common | {"results": [entry]})[0][4] == "FID ↓"


def test_the_model_index_holds_the_last_state(evaluation):
    found = evaluate.model_index(evaluation, "run", "user/photos")
    last = evaluation["results"][2]["metrics"][NETWORK]
    assert {entry.metric_name.partition(" (")[0]: entry.metric_value for entry in found} == {
        results.title(name, NETWORK): estimate["value"] for name, estimate in last.items()
    }
    card = yaml.safe_load(ModelCardData(model_name="run", eval_results=found).to_yaml())
    (index,) = card["model-index"]
    assert index["results"][0]["dataset"] == {"name": "user/photos", "type": "user/photos"}
    measured = {metric["type"]: metric for metric in index["results"][0]["metrics"]}
    assert measured["frechet_distance"]["value"] == last["fid"]["value"] and "fid" not in measured
    assert measured["precision"]["args"]["neighbours"] == 5 and measured["precision"]["args"]["resolution"] == 32
    with pytest.raises(ValueError, match="no result is labelled 'walk'; there are before, run, same"):
        evaluate.model_index(evaluation, "walk", "user/photos")


def test_secrets_stay_out_of_the_command():
    written = results.command(["--generated", "https://user:pass@host/x", "hf_" + "a" * 30])
    assert "pass" not in written and "hf_a" not in written


def test_columns_find_their_captions(photos):
    images = folder_images(photos, Preprocessing(32), progress=False)
    captions = [images.captions[0], images.captions[3], "nobody says this", images.captions[1]]
    assert results.in_columns(images, captions) == [0, 3, None, 1]
    images.captions = None
    assert results.in_columns(images, captions) == [0, 1, 2, 3]


def test_no_image_stands_under_anothers_caption(photos, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(results, "paired_grid", lambda *parts: grids.append(parts) or Image.new("RGB", (8, 8)))
    images = folder_images(photos, Preprocessing(32), progress=False)
    first, second = images.select([0, 1]), images.select([2, 1])
    other = images.select([5, 6])
    shown = [results.State(name, "", images=found) for name, found in zip("abc", (first, second, other))]
    results.draw_samples(shown, images, tmp_path)
    ((rows, captions),) = grids
    assert captions == images.captions[:2] and list(rows) == ["a", "b", "real images"]  # c has neither
    assert [list(map(np.asarray, row))[0].min() == 255 for row in rows.values()] == [False, True, False]
    for row in rows.values():
        assert np.array_equal(row[1], images[1])


def test_a_run_alone_is_shown_at_its_beginning_and_its_end(run_folder):
    args = evaluate.parse(words([f"a={run_folder}"], "photos", "out", resolution=32))
    states = evaluate.find_states(args)
    assert [state.name for state in evaluate.shown_states(states)] == ["a, step 2", "a, step 4"]
    args.generated.append(f"b={run_folder}")
    assert [state.name for state in evaluate.shown_states(evaluate.find_states(args))] == ["a, step 4", "b, step 4"]


# Launched


@pytest.mark.slow
def test_two_processes_find_what_one_finds(command, evaluation, tmp_path):
    line = [str(tmp_path) if word == str(command.folder) else word for word in command.words]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}",
        "LPL_CACHE": str(tmp_path / "features"),
    }
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lpl.evaluate", *line],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("numbers and pictures are in") == 1
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
