"""What examples/ shows is run here, not admired; README and docs/ in test_documents.py."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from trainer import ROOT

from lpl import LatentPerceptualLoss, get_objective
from lpl.config.command_line import build_parser


def commands_in(text):
    """The flags of every call of the training script in a shell text; a number for a shell's argument."""
    for block in re.findall(r"train_text_to_image_lpl\.py\"? \\\n(?:.*\\\n)*.*$", text, re.MULTILINE):
        words = shlex.split(block.partition("\\\n")[2].replace("\\\n", " "))
        yield ["7" if re.fullmatch(r"\$\d", word) else word for word in words if not word.startswith("${@")]


@pytest.mark.parametrize("name", ["finetune", "train_denoiser"])
def test_the_commands_that_are_shown_parse(name):
    commands = list(commands_in((ROOT / f"examples/quickstart/{name}.sh").read_text()))
    assert commands
    for words in commands:
        build_parser().parse_args(words)


class TestOwnLoop:
    @pytest.fixture
    def parts(self, sd_pipeline):
        pipeline = DiffusionPipeline.from_pretrained(sd_pipeline)
        objective = get_objective("epsilon", pipeline.scheduler)
        embeddings = pipeline.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0].detach()
        return pipeline.unet, objective, LatentPerceptualLoss(pipeline.vae), torch.randn(2, 4, 8, 8), embeddings

    def loss(self, parts, **options):
        sys.path.insert(0, str(ROOT / "examples"))
        from own_loop import training_loss

        torch.manual_seed(1)
        return training_loss(*parts, **options)

    def test_lpl_is_added(self, parts):
        plain, half, full = (self.loss(parts, weight=weight, sigma_threshold=1e9) for weight in (0.0, 0.5, 1.0))
        assert full > half > plain
        torch.testing.assert_close(full - plain, 2 * (half - plain))

    def test_only_below_the_threshold(self, parts):
        assert self.loss(parts, weight=1.0, sigma_threshold=0.0) == self.loss(parts, weight=0.0)

    def test_the_gradient_reaches_the_denoiser_only(self, parts):
        self.loss(parts, sigma_threshold=1e9).backward()
        unet, _, loss_fn, *_ = parts
        assert any(parameter.grad is not None for parameter in unet.parameters())
        assert all(parameter.grad is None for parameter in loss_fn.vae.parameters())


@pytest.fixture(scope="module")
def loss_alone(tmp_path_factory):
    """Runs Python where nothing but torch, diffusers and what they need is installed."""
    packages = tmp_path_factory.mktemp("packages")
    absent = ("accelerate", "transformers", "datasets", "peft", "bitsandbytes", "matplotlib")
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.lower().startswith(absent):
            (packages / entry.name).symlink_to(entry)
    environment = {"PYTHONPATH": f"{packages}:{ROOT}", "PATH": os.environ["PATH"]}

    def python(*words):
        return subprocess.run([sys.executable, "-S", *words], env=environment, capture_output=True, text=True)

    return python


def test_the_loss_alone_needs_no_trainer(loss_alone):
    done = loss_alone("-c", "import sys; from lpl import LatentPerceptualLoss; print('accelerate' in sys.modules)")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_training_without_the_extra_is_refused_in_a_line(loss_alone):
    words = ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(ROOT / "docs")]
    done = loss_alone(str(ROOT / "train_text_to_image_lpl.py"), *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "not installed: accelerate, datasets, peft, transformers; install the wheel with its extra" in done.stderr
