"""Numbers in words."""

import os
import subprocess
import sys

import pytest

from lpl.config.config import FLAGS
from lpl.tools.words import close_match, duration, short_count, size, why_no_folder


@pytest.mark.parametrize("rank, said", [(None, "here: warning: look\n"), ("0", "here: warning: look\n"), ("3", "")])
def test_the_first_process_alone_warns(rank, said):
    program = "from lpl.tools.words import plain_warnings, warn; plain_warnings('here'); (lambda: warn('look'))()"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {} if rank is None else {"RANK": rank}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0 and ended.stderr == said


@pytest.mark.parametrize(
    "words, value, said",
    [
        (duration, 41.4, "41 s"),
        (duration, 90, "2 min"),
        (duration, 3599, "1 h 0 min"),
        (duration, 9000, "2 h 30 min"),
        (duration, 50 * 3600, "2 days 2 h"),
        (size, 1023, "1023 bytes"),
        (size, 1536, "1.5 KiB"),
        (size, 3 * 2**30, "3.0 GiB"),
        (size, 2.5 * 2**40, "2.5 TiB"),
        (short_count, 999, "999"),
        (short_count, 859_500_000, "859.50M"),
        (short_count, 12_000_000_000, "12.00B"),
    ],
)
def test_numbers_in_words(words, value, said):
    assert words(value) == said


@pytest.mark.parametrize(
    "name, meant",
    [
        ("--lr", "--learning_rate"),  # initials
        ("--lpl-wieght", "--lpl_weight"),  # a misspelling
        ("--epochs", "--num_train_epochs"),  # a word of several
        ("--batch_size", "--train_batch_size"),
        ("--grad_accum", "--gradient_accumulation_steps"),  # starts of words
        ("--data_dir", "--train_data_dir"),
        ("--output", "--output_dir"),
    ],
)
def test_the_flag_that_was_meant(name, meant):
    assert meant in close_match(name, FLAGS, "--").rstrip("?").split()


def test_nothing_is_suggested_where_nothing_is_near():
    assert close_match("--xyz", FLAGS, "--") == ""


def test_what_is_no_folder(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.ZIP").touch()
    assert why_no_folder(str(tmp_path)) is None
    assert why_no_folder(str(tmp_path / "a.txt")).startswith("this is a file")
    assert "unpack it" in why_no_folder(str(tmp_path / "a.ZIP"))
    assert why_no_folder(str(tmp_path / "no")) == "there is no such folder"
