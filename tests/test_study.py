"""The study's parts share no pixel, and its rows are command lines that the script takes."""

import itertools
import sys

import pytest
import torch
from trainer import ROOT

from lpl.arguments import build_parser


sys.path.insert(0, str(ROOT / "examples/study"))
from features import DIM, Features
from prepare_data import CROPS, PICTURES, cells, read, write_part
from rows import BASE, OBJECTIVES, ROW, ROWS, SETTINGS
from run import arguments


@pytest.mark.parametrize("source", PICTURES)
def test_the_parts_share_no_pixel(source):
    side, size = PICTURES[source], read(source).size
    places = cells(size, side)
    assert all(places[part] for part in CROPS)
    boxes = [box for part in CROPS for box in places[part]]
    for (left, top), (others_left, others_top) in itertools.combinations(boxes, 2):
        assert abs(left - others_left) >= side or abs(top - others_top) >= side
    assert all(left + side <= size[0] and top + side <= size[1] for left, top in boxes)


def test_crops_stay_inside_their_cells(tmp_path, monkeypatch):
    """A picture that is white in the part's own cells and black elsewhere gives white crops."""
    monkeypatch.setattr("prepare_data.PICTURES", {"skimage/brick.png": 128})

    def painted(source):
        picture = read(source)
        picture.paste("black", (0, 0, *picture.size))
        for left, top in cells(picture.size, 128)["reference"]:
            picture.paste("white", (left, top, left + 128, top + 128))
        return picture

    monkeypatch.setattr("prepare_data.read", painted)
    seen = []
    monkeypatch.setattr("PIL.Image.Image.save", lambda image, _: seen.append(image.getextrema()))
    assert write_part(tmp_path, "reference") == len(seen) == CROPS["reference"]
    assert set(seen) == {((255, 255),) * 3}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_command_lines(name):
    row = ROWS[name]
    flags = {"pretrained_model_name_or_path": "p", "train_data_dir": "d"} | SETTINGS | ROW | row.flags
    flags["max_train_steps"] = 7 if isinstance(flags["max_train_steps"], str) else flags["max_train_steps"]
    args = build_parser().parse_args(arguments(flags))
    for flag, value in row.flags.items():
        if flag != "max_train_steps":
            given = getattr(args, flag)
            assert given == value or str(given) == value or given == value.split(), flag
    assert row.objective in OBJECTIVES


def test_the_base_is_trained_without_lpl():
    args = build_parser().parse_args(arguments({"pretrained_model_name_or_path": "p"} | SETTINGS | BASE))
    assert args.lpl_weight == "0" and args.from_scratch


def test_the_feature_network():
    assert Features().eval()(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, DIM)
