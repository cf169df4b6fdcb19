"""What the programs show: their own lines, and what matters of their libraries'."""

import errno
import logging
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm
from trainer import ROOT, arguments

from lpl.tools import console


def said(*words):
    """What a program writes to standard error, as its user sees it."""
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DELAY"}
    environment |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600).stderr


MORE_COMMANDS = [
    ["lpl.inspect", "--pretrained_model_name_or_path", "no", "--images", "no", "--output_dir", "no"],
    ["lpl.publish", "no"],
    ["lpl.export", "no"],
    ["lpl.compare", "--output_dir", "no"],
    ["lpl.data", "no"],
    ["lpl.distill", "--pretrained_model_name_or_path", "no", "--train_data_dir", "no", "--output_dir", "no"],
]


@pytest.mark.parametrize(
    "words",
    [
        ["lpl.evaluate", "--generated", "no", "--reference", "no", "--output_dir", "no"],
        *(pytest.param(words, marks=pytest.mark.slow) for words in MORE_COMMANDS),
    ],
    ids=lambda words: words[0],
)
def test_a_command_says_only_what_is_wrong(words):
    text = said("-m", *words)
    assert text.startswith(f"python -m {words[0]}: error: ") and len(text.splitlines()) == 1, text


def test_a_run_shows_only_its_own_lines(sd_pipeline, image_folder, tmp_path):
    flags = {
        "max_train_steps": 1,
        "input_perturbation": 0.1,
        "dream_detail_preservation": 0.5,
    }  # one is without effect
    text = said("train_text_to_image_lpl.py", *arguments(sd_pipeline, image_folder, tmp_path / "out", **flags))
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    own = ("train_text_to_image_lpl.py: warning: --dream_detail_preservation", "steps: ")
    assert lines[0].startswith(own[0])
    others = [
        line for line in lines if not line.startswith(own) and " INFO: " not in line and " WARNING: " not in line
    ]
    assert not others, others


LIBRARIES = ("transformers", "diffusers", "datasets", "PIL", "accelerate")


@pytest.fixture
def hushed(monkeypatch):
    levels = {name: logging.getLogger(name).level for name in (*console.OF_PACKAGES, *LIBRARIES)}
    for name in LIBRARIES:  # as at the start of a program; other tests set them
        logging.getLogger(name).setLevel(logging.WARNING)
    monkeypatch.setattr(os, "environ", {})
    with warnings.catch_warnings(record=True) as caught:
        console.hush_libraries()
        yield caught
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_what_matters_is_still_said(hushed):
    for name in ("transformers.modeling_utils", "diffusers.models.modeling_utils", *LIBRARIES):
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
    for name in console.OF_PACKAGES:
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.warn("something", kind, stacklevel=1)
    assert [warning.category for warning in hushed] == [UserWarning]
    assert float(os.environ["TQDM_DELAY"]) > 0  # a bar comes where something takes longer


def test_a_line_is_written_above_a_bar(capsys):
    handler = console.AboveBars()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    with tqdm(total=2, desc="steps", ascii=True, ncols=40, delay=0) as bar:
        bar.update(1)
        bar.refresh()
        handler.emit(logging.LogRecord("lpl", logging.INFO, "", 0, "drawing", (), None))
    said = capsys.readouterr().err
    assert re.search(r"(^|[\r\n]|\x1b\[A)INFO: drawing\n", said), said  # \x1b[A: where bars of others are


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch):
    def gone(text):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=gone, flush=lambda: None))
    console.AboveBars().emit(logging.LogRecord("lpl", logging.INFO, "", 0, "drawing", (), None))
