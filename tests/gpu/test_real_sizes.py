"""real_sizes.py itself: its architectures are the public ones, and it reads what the dry run writes. No GPU needed."""

import pytest
import torch

from lpl.diagnosis.dry_run import Cost, cost_in_words
from lpl.tools.words import table
from tests.gpu import real_sizes
from tests.gpu.real_sizes import MODELS, last_error, markdown, merged, read_cost, read_results


@pytest.mark.parametrize("name", MODELS)
def test_real_architectures_have_the_known_number_of_parameters(name):
    model = MODELS[name]
    with torch.device("meta"):  # no memory for the weights
        parts = [cls(**config) for cls, config in (model.denoiser, model.vae)]
    assert tuple(sum(p.numel() for p in part.parameters()) for part in parts) == model.parameters


@pytest.mark.parametrize("name", MODELS)
def test_shrunken_ones_differ_in_numbers_only(name):
    model = MODELS[name]
    denoiser, vae, _ = real_sizes.shrunk(model, "tiny")
    assert denoiser.keys() == model.denoiser[1].keys() and vae.keys() == model.vae[1].keys()
    for tiny, real in ((denoiser, model.denoiser[1]), (vae, model.vae[1])):
        assert all(type(tiny[key]) is type(real[key]) for key in real)


@pytest.mark.parametrize("cost", [Cost(0.125, 3 * 2**29), Cost(1.5e-5, 1000), Cost(120.0, None)])
def test_costs_are_read_as_the_report_writes_them(cost):
    assert read_cost(cost_in_words(cost)) == {"seconds": pytest.approx(cost.seconds), "memory": cost.memory}


def test_no_memory_and_other_texts():
    assert read_cost(cost_in_words(None)) == {"seconds": None, "memory": None}
    with pytest.raises(ValueError, match="half a second"):
        read_cost("half a second")
    with pytest.raises(ValueError, match="no costs"):
        read_results("Dry run: nothing was written.\n")


REPORT = table(
    {
        "What is trained": [("unet", "whole, 5 parameters"), ("learning rate", "1 throughout")],
        "One step, mean of 5, on a GPU": [
            ("without LPL", cost_in_words(Cost(2.0, 2**30))),
            ("with LPL", cost_in_words(None)),
        ],
    }
)


def test_report_is_read():
    results = read_results(f"something before\n\n{REPORT}")
    assert results["What is trained"] == {"unet": "whole, 5 parameters", "learning rate": "1 throughout"}
    assert results["without LPL"] == {"seconds": 2.0, "memory": 2**30}
    assert results["with LPL"] == {"seconds": None, "memory": None}


def test_error_is_the_line_that_tells_and_names_no_place(tmp_path):
    text = (
        f'  File "{tmp_path}/x.py", line 1\nOSError: no such file {tmp_path}/pipeline\n'
        "Traceback (most recent call last):\nsubprocess.CalledProcessError: Command died\n"
    )
    assert last_error(text, tmp_path) == "OSError: no such file pipeline"
    assert last_error("train.py: error: --rank 0: it must be more than 0\n", tmp_path).startswith("train.py: error")
    assert last_error("Killed\n", tmp_path) == "Killed"


def test_a_run_replaces_its_own_kind_and_failures_stand_in_the_table():
    run = dict.fromkeys([*real_sizes.KEYS, "kind"], "same") | {"versions": {"torch": "1"}, "command": "accelerate"}
    failed = run | {"error": "no | memory"}
    other = run | {"kind": "lora"} | read_results(REPORT)
    another = run | {"batch": 2, "kind": real_sizes.NOT_BUILT, "error": "out of disk"}
    runs = merged(merged(merged(merged([], run), another), other), failed)
    assert runs == [another, other, failed]
    assert merged([another], run | {"batch": 2}) == [run | {"batch": 2}]  # now it could be made
    runs = runs[1:]
    rows = markdown(runs).splitlines()
    assert "| 2 | - | - | 1 | - | - |" in rows[2] and "no / memory" in rows[3]
    assert {row.count("|") for row in rows[:4]} == {12}


def test_a_command_that_fails_or_hangs_is_told(tmp_path):
    words = real_sizes.command(MODELS["sd15"], "full", 64, 1, "no", [])
    assert real_sizes.execute(words, tmp_path, 0.01) == ("", "took longer than 0 s")
