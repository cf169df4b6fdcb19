"""The quickstart's notebook is executed, with fewer steps."""

import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from trainer import ROOT


STEPS, FEWER = "quickstart/output 300", "quickstart/output 2"


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch):
    """In a copy of what it uses, since it writes beside it; begun in the notebook's folder, as Jupyter does."""
    for name in ("train_text_to_image_lpl.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lpl", "examples/quickstart"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing is missing here
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "examples" / "quickstart"
    notebook = nbformat.read(folder / "quickstart.ipynb", nbformat.NO_CONVERT)
    for cell in notebook.cells:
        cell.source = cell.source.replace(STEPS, FEWER)
    assert sum(FEWER in cell.source for cell in notebook.cells) == 2
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type in ("display_data", "execute_result")
    ]
    assert [("image/png" in data) for data in shown] == [True] * 4
    assert (tmp_path / "quickstart" / "output" / "model_index.json").is_file()
