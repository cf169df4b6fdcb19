"""What a newcomer installs, cites and runs first agrees with the code; `make test-package` tries it."""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from trainer import ROOT

from lpl import __version__


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALL = (ROOT / "docs" / "install.md").read_text()
NOTEBOOK = nbformat.read(ROOT / "examples" / "quickstart" / "quickstart.ipynb", nbformat.NO_CONVERT)
CODE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")


# Requirements


def test_the_requirements_are_those_of_training_and_evaluation():
    lines = set((ROOT / "requirements.txt").read_text().split())
    own = f"{PROJECT['name']}[train]"
    assert own in EXTRAS["evaluate"]
    asked = {*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["evaluate"]} - {own}
    assert lines - {"safetensors"} == asked  # which diffusers brings


@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_is_explained(extra):
    (row,) = re.findall(rf"^\| `\[{extra}\]` \| .*", INSTALL, re.MULTILINE)
    for requirement in EXTRAS[extra]:
        name = re.split(r"[\[>]", requirement)[0]
        assert name in row or row.endswith("... |") or f"contains `[{requirement.partition('[')[2]}`" in row


def test_the_wheel_that_is_named_is_this_version():
    assert f"{PROJECT['name'].replace('-', '_')}-{__version__}-py3-none-any.whl" in INSTALL


# lpl-train


def test_the_command_answers_as_the_script_does():
    """At once, too: the libraries are not imported."""
    report = "atexit.register(lambda: print('torch' in sys.modules))"
    code = f"import atexit, sys; {report}; from lpl.train import main; main()"
    call = [sys.executable, "-c", code, "--help"]
    done = subprocess.run(call, cwd=ROOT, env={"COLUMNS": "102"}, capture_output=True, text=True)
    help_text, _, imported = done.stdout.rstrip().rpartition("\n")
    assert done.returncode == 0 and imported == "False", done.stderr
    assert help_text.split() == (ROOT / "docs" / "help.txt").read_text().split()


# Citation and changes


def test_the_citation_is_of_this_version_and_of_the_cards_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    card = (ROOT / "lpl" / "publishing" / "card.md.j2").read_text()
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author = {{{authors}}}" in " ".join(card.split())
    assert f"title = {{{paper['title']}}}" in card and f"url = {{{paper['url']}}}" in card


def test_the_changelog_has_this_version_or_is_before_the_first():
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == __version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


# The notebook


def test_the_notebook_is_valid_and_without_outputs():
    nbformat.validate(NOTEBOOK)
    for cell in NOTEBOOK.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


def test_the_notebooks_commands_are_the_quickstarts():
    makefile = (ROOT / "Makefile").read_text()
    (steps,) = re.findall(r"QUICKSTART_STEPS \?= (\d+)", makefile)
    assert f"{steps} steps" in (ROOT / "README.md").read_text()
    values = {"$(BIN)/": "", "$(QUICKSTART_STEPS)": steps, "$(QUICKSTART)": "quickstart"}
    for name, value in values.items():
        makefile = makefile.replace(name, value)
    (command,) = re.findall(r"examples/quickstart/finetune.sh .*", makefile)
    assert command in CODE
