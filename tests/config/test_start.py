"""A command that only asks or is wrong is answered at once: the libraries are never imported."""

import json
import subprocess
import sys

import pytest
from trainer import ROOT


SCRIPT = "train_text_to_image_lpl.py"
SLOW = ("torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "peft", "huggingface_hub")
# Runs the script as a program, then says its exit code and which of these it has imported.
WRAPPER = f"""
import json, runpy, sys
sys.argv = {[SCRIPT]!r} + sys.argv[1:]
code = None
try:
    runpy.run_path({SCRIPT!r}, run_name="__main__")
except SystemExit as end:
    code = end.code
print("\\n" + json.dumps([code, [name for name in {SLOW!r} if name in sys.modules]]))
"""
BASE = ["--pretrained_model_name_or_path", "user/model"]


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--help"], 0, "--lpl_weight str"),
        ([], 2, "--pretrained_model_name_or_path is missing"),
        (["--lpl_wight", "0"], 2, "did you mean --lpl_weight?"),
        ([*BASE, "--train_data_dir", "no/such/folder"], 2, "--train_data_dir no/such/folder: there is no such folder"),
        (
            [*BASE, "--train_data_dir", "docs", "--learning_rate", "-1"],
            2,
            "--learning_rate -1.0: it must be 0 or more",
        ),
        (
            [*BASE, "--train_data_dir", "docs", "--config", "no/such.yaml"],
            2,
            "--config no/such.yaml: it cannot be rea",
        ),
    ],
)
def test_an_answer_needs_no_libraries(words, code, said):
    call = [sys.executable, "-c", WRAPPER, *words]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []], done.stderr
    assert said in (done.stdout if code == 0 else done.stderr)


def test_a_warning_of_the_command_line_is_one_line():
    """Not Python's, which names a file and repeats its line of code."""
    words = ["--pretrained_model_name_or_path", "docs", "--train_data_dir", "docs"]  # refused behind the warning
    words += ["--enable_xformers_memory_efficient_attention"]
    call = [sys.executable, SCRIPT, *words]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)
    warnings = [line for line in done.stderr.splitlines() if "xformers" in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"{SCRIPT}: warning: ")
    assert "warnings.warn" not in done.stderr and "UserWarning" not in done.stderr
