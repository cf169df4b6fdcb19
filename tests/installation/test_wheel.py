"""The wheel, where the repository is not: built, installed into a fresh environment, and trained with."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from trainer import ROOT, arguments, metrics


pytestmark = pytest.mark.slow

PACKAGED = [*(ROOT / "lpl").rglob("*.py"), *(ROOT / "lpl").rglob("*.j2"), ROOT / "train_text_to_image_lpl.py"]
FILES = [file.relative_to(ROOT).as_posix() for file in PACKAGED]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist of a copy of the repository, without what earlier builds left."""
    source, target = tmp_path_factory.mktemp("source") / "lpl", tmp_path_factory.mktemp("dist")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "quickstart", "study")
    shutil.copytree(ROOT, source, ignore=left_out)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (built,) = target.glob("*.tar.gz"), target.glob("*.whl")
    assert sdist.stat().st_size < 2e6
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a program of an environment that has the wheel, and the other packages of this one; in an empty folder."""
    folder, elsewhere = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [place for place in sys.path if Path(place).name == "site-packages"]
    (packages / "here.pth").write_text("\n".join(here))
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    environment = kept | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "102",
    }

    def program(name, *words, code=0):
        command = [str(folder / "bin" / name), *map(str, words)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    # --no-index: the requirements of the extras are met by what is here, or pip ends with an error
    program("python", "-m", "pip", "install", "--no-index", f"{wheel}[train,evaluate]")
    program.folder = folder
    return program


def test_the_wheel_has_the_package_and_the_script_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(FILES)


def test_what_is_imported_is_the_wheels(installed):
    done = installed(
        "python", "-c", "import lpl, train_text_to_image_lpl as script; print(lpl.__file__, script.__file__)"
    )
    assert all(Path(place).is_relative_to(installed.folder) for place in done.stdout.split())


def test_help_and_errors_of_the_command(installed):
    assert installed("lpl-train", "--help").stdout.split() == (ROOT / "docs" / "help.txt").read_text().split()
    said = installed("lpl-train", "--lpl_wight", "0", code=2).stderr
    assert said.startswith("train_text_to_image_lpl.py: error: ") and said.count("\n") == 1
    assert "python -m lpl.evaluate " in installed("python", "-m", "lpl.evaluate", "--help").stdout


def test_a_dry_run_reports_and_writes_nothing(installed, sd_pipeline, image_folder, tmp_path):
    done = installed("lpl-train", *arguments(sd_pipeline, image_folder, tmp_path / "out", dry_run=True))
    assert "LPL" in done.stdout + done.stderr and not (tmp_path / "out").exists()


def test_a_launched_run_and_its_recipe(installed, sd_pipeline, image_folder, tmp_path):
    """`accelerate launch -m` trains; `lpl-train` repeats it; its card names no folder of this machine."""
    first, again = tmp_path / "first", tmp_path / "again"
    flags = arguments(sd_pipeline, image_folder, first, validation_prompts=["a cat"])
    launch = ["-m", "accelerate.commands.launch", "-m", "train_text_to_image_lpl"]
    installed("python", *launch, *flags)
    assert len(metrics(first)) == 2
    pipeline = DiffusionPipeline.from_pretrained(first)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", height=32, width=32, num_inference_steps=2).images[0].size == (32, 32)

    card = (first / "README.md").read_text()
    assert "accelerate launch train_text_to_image_lpl.py" in card
    assert not any(str(place) in card for place in (installed.folder, tmp_path, ROOT))
    assert yaml.safe_load((first / "recipe.yaml").read_text())["measured"]["libraries"]["lpl"]

    installed("lpl-train", "--config", first / "recipe.yaml", "--output_dir", again)
    assert metrics(again) == metrics(first)
