"""How results are written: warnings, columns of the pictures, the table, the card."""

# ruff: noqa: F401, F811 (fixtures of another file)

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCardData
from PIL import Image

from lpl.config.choices import SET_METRICS
from lpl.evaluation import Preprocessing, listed_images, report
from lpl.evaluation.results import HALVES, REAL, State
from tests.evaluation.test_results import (
    darker,
    drawn,
    evaluated,
    kept,
    networks,
    photos,
    reference,
)


# Warnings


def result(label="run", images=5000, drawn=None, dim=8, **metrics):
    found = {name: {"value": value, "spread": None} for name, value in metrics.items()}
    return {
        **{"label": label, "step": None, "images": images, "enlarged": 0, "drawn": drawn, "dims": {"net": dim}},
        **{"metrics": {"net": found}, "differences": None, "high_frequency_energy": 0.1},
    }


def test_warnings_of_what_does_not_compare():
    drawn = {"num_inference_steps": 2, "guidance_scale": 1.0, "dtype": "float32"}
    alike = [result(fid=1.0, precision=0.5, drawn=drawn), result("other", fid=1.0, drawn=drawn)]
    assert report.all_warnings(alike, 5000) == {}
    unlike = [alike[0], result("other", images=4000, drawn=drawn | {"guidance_scale": 3.0, "dtype": "bfloat16"})]
    found = report.all_warnings(unlike, 5000)
    counts, *sampling = found
    assert "4000, 5000 images" in counts and found[counts] == ["compare equal numbers, by --num_images"]
    assert [(words, found[words]) for words in sampling] == [
        ("the sources are sampled with unequal guidance_scale: 1.0, 3.0", ["give --guidance_scale"]),
        ("the sources are sampled with unequal dtype: float32, bfloat16", ["give --dtype"]),
    ]


def test_one_warning_of_few_images_and_what_it_means_for_each_metric():
    found = report.all_warnings([result(fid=1.0, precision=0.5, recall=0.5), result(recall=0.5, images=70)], 70)
    (few, details) = next(iter(found.items()))
    assert few == "there are few images for fid, precision, recall"
    assert len(details) == len(set(details)) == 3
    assert sum(detail.startswith("precision, recall: 70 reference images are few") for detail in details) == 1
    assert sum(detail.startswith("fid: 70 reference images are few for 8 features") for detail in details) == 1


# The pictures


def test_columns_find_their_captions(photos):
    captions = [photos.captions[0], photos.captions[3], "nobody says this", photos.captions[1]]
    assert report.in_columns(photos, captions) == {0: 0, 1: 3, 3: 1}
    twice = listed_images([photos[0]] * 3, "twice", Preprocessing(32), ["a", "b", "a"])
    assert report.in_columns(twice, ["a", "a", "a", "b"]) == {0: 0, 1: 0, 2: 2, 3: 1}
    bare = listed_images([photos[0]] * 3, "bare", Preprocessing(32))
    assert report.in_columns(bare, captions) == {0: 0, 1: 1, 2: 2}


@pytest.fixture
def grids(monkeypatch):
    """Rows and captions of samples.png, and of crops.png with the row apart."""
    found = []
    white = Image.new("RGB", (8, 8))
    monkeypatch.setattr(report, "paired_grid", lambda rows, captions: found.append((rows, captions)) or white)
    monkeypatch.setattr(
        report, "zoomed_crops", lambda rows, captions, apart: found.append((rows, captions, apart)) or white
    )
    return found


def test_no_image_stands_under_anothers_caption(photos, tmp_path, grids):
    """A column has an image in each row; what shares no caption is left out."""
    first, second = photos.select([0, 1, 2]), photos.select([3, 1, 2])
    shown = [State(name, "", images=images) for name, images in zip("abc", (first, second, photos.select([5, 6])))]
    report.draw_samples(shown, photos, tmp_path)
    (rows, captions), (parts, headings, apart) = grids
    assert captions == headings == photos.captions[1:3] and list(rows) == list(parts) == ["a", "b", REAL]
    assert apart == REAL
    for row in [*rows.values(), *parts.values()]:
        assert len(row) == 2 and all(np.array_equal(row[column], photos[1 + column]) for column in (0, 1))


def test_there_are_no_more_columns_than_fit(photos, tmp_path, grids):
    report.draw_samples([State("a", "", images=photos)], photos, tmp_path)
    (rows, captions), (parts, headings, _) = grids
    assert (len(captions), len(headings)) == (6, 4) == tuple(len(grid["a"]) for grid in (rows, parts))


@pytest.mark.parametrize("bare", [True, False])
def test_some_real_images_are_shown_where_none_bear_the_captions(bare, photos, tmp_path, grids):
    images = listed_images(list(photos.select([4, 5])), "a", Preprocessing(32), ["red", "blue"])
    real = listed_images(list(photos), "real", Preprocessing(32), None if bare else photos.captions)
    report.draw_samples([State("a", "", images=images)], real, tmp_path)
    (rows, captions), (_, _, apart) = grids
    assert list(rows) == ["a", "some real images"] and captions == ["red", "blue"] and apart == "some real images"
    assert np.array_equal(rows[apart][1], photos[8])  # spread evenly


def test_folders_without_captions_stand_in_their_order(photos, tmp_path, grids):
    bare = listed_images(list(photos.select([3, 4, 5])), "bare", Preprocessing(32))
    report.draw_samples([State("a", "", images=bare), State("b", "", images=bare.select([0, 1]))], photos, tmp_path)
    (rows, captions), _ = grids
    assert captions == ["", ""] and list(rows) == ["a", "b", "some real images"]


def curves(monkeypatch, evaluation, tmp_path):
    """What the curves are drawn of."""
    found = []
    monkeypatch.setattr(report, "metric_curves", lambda lines, *more: found.append((lines, *more)))
    monkeypatch.setattr(report, "save_figure", lambda figure, path: None)
    report.draw_curves(evaluation, tmp_path)
    return found


def test_curves_are_of_a_series_and_have_the_halves(monkeypatch, reference, photos, tmp_path):
    series = [drawn("run", darker(photos, by), step) for step, by in ((0, 4), (2, 2))]
    ((lines, better, real),) = curves(monkeypatch, evaluated(series, reference), tmp_path)
    found = [(line["label"], line["step"]) for line in lines]
    assert found == [("run", 0), ("run", 2), (REAL, None), (HALVES, None)]
    assert lines[3]["metrics"]["Fréchet distance"] == reference.halves["org/means"]["fid"] and real == REAL
    assert (better["Fréchet distance"], better["coverage"]) == ("lower", "higher")
    assert not curves(monkeypatch, evaluated(series[:1], reference), tmp_path)


def test_a_run_that_has_changed_its_network_keeps_the_curves_apart(monkeypatch, reference, photos, tmp_path):
    evaluation = evaluated([drawn("run", darker(photos, by), step) for step, by in ((0, 4), (2, 2))], reference)
    evaluation["results"][0]["metrics"] = {"other/network": evaluation["results"][0]["metrics"]["org/means"]}
    ((lines, _, _),) = curves(monkeypatch, evaluation, tmp_path)
    assert "Fréchet distance, network" in lines[0]["metrics"] and "Fréchet distance, means" in lines[1]["metrics"]
    assert [row[3] for row in report.table(evaluation)[1:3]] == ["network", "means"]


# The table and what stands below it


def test_only_inception_gives_a_fid():
    entry = result(fid=1.25, precision=0.5)
    common = {"reference": {"images": 10, "high_frequency_energy": 0.2, "halves": {}}, "networks": {"net": {}}}
    heading, row, _ = report.table(common | {"results": [entry]})
    assert heading[4:6] == ["Fréchet distance ↓", "precision ↑"]
    assert row[:6] == ["run", "", "5000", "net", "1.25", "0.5"]
    entry["metrics"] = {"inception": entry["metrics"]["net"]}
    assert report.table(common | {"results": [entry]})[0][4] == "FID ↓"


def test_the_table_ends_with_differences_and_what_real_images_have(reference, photos):
    states = [drawn("before", darker(photos)), drawn("after", darker(photos, by=2))]
    evaluation = evaluated(states, reference)
    heading, *rows = report.table(evaluation)
    assert [row[0] for row in rows] == ["before", "after", "after minus before", REAL, "real images, half and half"]
    assert {len(row) for row in (heading, *rows)} == {11}
    fid, energy = heading.index("Fréchet distance ↓"), len(heading) - 1
    assert rows[2][fid].startswith("-") and "±" in rows[2][fid] and rows[2][energy] == ""
    assert rows[3][fid] == "" and rows[3][energy] == f"{reference.spectrum.high_frequency_energy:.4f}"
    assert (rows[4][2], "±" in rows[4][fid]) == ("8", False)


def test_notes_say_what_the_table_does_not(reference, photos):
    states = [drawn("run", darker(photos), dtype="bfloat16"), drawn("x", photos, drawn=False)]
    evaluation = evaluated(states, reference)
    said = "\n".join(report.notes(evaluation))
    assert "- Reference: 16 images at 32 px (central square, lanczos)." in said
    assert "- run: num_inference_steps 2, guidance_scale 1.0, dtype bfloat16." in said and "- x: a folder." in said
    assert "a standard deviation over 8 resamples" in said and "half and half: one half" in said
    assert "enlarged" not in said
    evaluation["settings"]["bootstrap"], evaluation["reference"]["halves"] = 0, {"org/means": {}}
    evaluation["reference"]["enlarged"] = evaluation["results"][1]["enlarged"] = 5
    said = "\n".join(report.notes(evaluation))
    assert "standard deviation" not in said and "one half" not in said
    assert "lanczos); 5 are enlarged, which blurs them." in said
    assert "- x: a folder; 5 are enlarged, which blurs them." in said


def test_secrets_stay_out_of_the_command():
    written = report.command(["--generated", "https://user:pass@host/x", "hf_" + "a" * 30])
    assert "pass" not in written and "hf_a" not in written


# The card


def test_the_model_index_holds_the_last_state(reference, photos):
    states = [drawn("run", darker(photos, by), step) for step, by in ((0, 4), (2, 2))]
    evaluation = evaluated([drawn("before", darker(photos)), *states], reference)
    found = report.model_index(evaluation, "run", "photos")
    last = evaluation["results"][2]["metrics"]["org/means"]
    assert {entry.metric_name: entry.metric_value for entry in found} == {
        f"{report.title(name, 'org/means')} (means)": estimate["value"] for name, estimate in last.items()
    }
    (index,) = yaml.safe_load(ModelCardData(model_name="run", eval_results=found).to_yaml())["model-index"]
    assert index["results"][0]["dataset"] == {"name": "photos", "type": "imagefolder", "config": "photos"}
    measured = {metric["type"]: metric for metric in index["results"][0]["metrics"]}
    assert measured["frechet_distance"]["value"] == last["fid"]["value"] and "fid" not in measured
    args = measured["precision"]["args"]
    assert (args["nearest_k"], args["resolution"], args["num_inference_steps"]) == (2, 32, 2)
    assert args["spread_under_resampling"] == last["precision"]["spread"]
    assert "nearest_k" not in measured["kernel_distance"]["args"]
    with pytest.raises(ValueError, match="no result is labelled 'walk'; the labels are before, run"):
        report.model_index(evaluation, "walk", "photos")


def test_results_on_several_data_sets_stay_apart_in_a_card(reference, photos):
    """Whose metadata are grouped when they are saved."""
    evaluation = evaluated([drawn("run", darker(photos))], reference)
    found = [entry for name in ("photos", "paintings") for entry in report.model_index(evaluation, "run", name)]
    saved = yaml.safe_load(ModelCardData(model_name="run", eval_results=found).to_yaml())
    again = ModelCardData(**saved).eval_results
    assert [entry.dataset_name for entry in again] == [entry.dataset_name for entry in found]


def test_the_card_names_the_reference_and_warns(reference, photos):
    evaluation = evaluated([drawn("run", darker(photos), step=2)], reference)
    index, text = report.on_card(evaluation, "run")
    assert text.splitlines()[0] == "### Against the real images of `photos`" and "some/" not in text
    assert report.markdown_rows(report.table(evaluation)) in text and "- Warning: there are few images for fid" in text
    assert {entry.dataset_name for entry in index} == {"photos"} and len(index) == len(SET_METRICS)


def test_what_is_written_can_be_read_again(reference, photos, tmp_path):
    states = [drawn("a|b", darker(photos), step) for step in (0, 2)]
    evaluation = evaluated(states, reference)
    report.write_evaluation(evaluation, states, photos, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == evaluation
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert text.startswith("# Evaluation\n") and r"a\|b" in text and "```bash\npython -m lpl.evaluate\n```" in text
    for warning, details in evaluation["warnings"].items():
        assert f"- Warning: {warning}:\n  - {details[0]}" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {"spectrum.png", "samples.png", "crops.png", "curves.png"}
    assert set(evaluation["spectrum"]["log_power"]) == {"a|b, step 0", "a|b, step 2", REAL}
    report.draw_curves(evaluated(states[:1], reference), tmp_path)
    assert not (tmp_path / "curves.png").exists()  # of an evaluation that no longer is there
