"""How many operations LPL adds to a step, counted for public models; writes the table of docs/cost.md.

    python -m benchmarks.operations           # print it
    python -m benchmarks.operations --write   # write it between the markers of docs/cost.md

TFLOP per sample of a forward and backward pass of the whole denoiser with the encoding of the image, without gradient
checkpointing, text encoders and optimizer. A way's share of LPL is what is left of LPL's operations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import AutoencoderTiny

from benchmarks.counted import ARCHITECTURES, counted
from benchmarks.pages import filled
from lpl.config import Config
from lpl.data.dataset import LatentSpace, TrainingImages
from lpl.diagnosis.plan import share_inside, threshold_of
from lpl.diagnosis.status import Stage
from lpl.distillation.report import Operations
from lpl.families.description import Description
from lpl.student import Student, StudentLoss


DOCS = Path(__file__).resolve().parent.parent / "docs" / "cost.md"
START, END = "<!-- python -m benchmarks.operations -->", "<!-- end -->"
MODELS = {  # name -> title, side in pixels
    "sd15": ("Stable Diffusion 1.5", 512),
    "sdxl": ("Stable Diffusion XL", 1024),
    "sd35-medium": ("Stable Diffusion 3.5 medium", 1024),
    "pixart-sigma": ("PixArt Sigma", 1024),
}
SCALED = {"`--lpl_every 4`": 1 / 4, "half of the samples": 1 / 2}  # the share of LPL's operations that is left
FLAGS = {  # other flags; TINY stands for an AutoencoderTiny's folder
    "`--lpl_blocks mid`": ("--lpl_blocks", "mid"),
    "`--lpl_blocks mid up_0 up_1`": ("--lpl_blocks", "mid", "up_0", "up_1"),
    "AutoencoderTiny": ("--lpl_vae_name_or_path", "TINY"),
}
STUDENT, CORRECTED = "a student", "and `--lpl_correct_every 32`"
WIDTH, DEPTH = 256, 4  # of the student


@dataclass(frozen=True)
class Row:
    """Of one model: TFLOP per sample without LPL and of LPL, the share of samples inside, LPL's by cheaper ways."""

    plain: float
    lpl: float
    inside: float
    cheaper: dict[str, float]

    def ratio(self, lpl: float, inside: float) -> float:
        """Operations of a step with LPL, relative to one without."""
        return 1 + inside * lpl / self.plain

    def cells(self) -> list[str]:
        numbers = [f"{self.plain:.3g}", f"{self.lpl:.3g}", f"{self.ratio(self.lpl, 1.0):.2f}", f"{self.inside:.2f}"]
        ways = [self.lpl, *self.cheaper.values()]
        return numbers + [f"{self.ratio(lpl, self.inside):.2f}" for lpl in ways]


def count(name: str, scale: str = "real") -> Row:
    """Count the operations of one of MODELS.

    Args:
        scale: "tiny": of a shrunken model, to try this out.
    """
    side = ARCHITECTURES[name].resolution[1] if scale == "tiny" else MODELS[name][1]
    common = ["--resolution", str(side), "--train_batch_size", "1", "--mixed_precision", "bf16", "--seed", "0"]
    config, description, found = counted(name, common, scale=scale, stages=(Stage.STEP, Stage.LPL_STEP))
    plain, with_lpl = (found.operations[stage] for stage in (Stage.STEP, Stage.LPL_STEP))
    lpl = {way: share * (with_lpl - plain) for way, share in SCALED.items()}
    with tempfile.TemporaryDirectory() as folder:
        tiny = AutoencoderTiny(latent_channels=ARCHITECTURES[name].vae[1]["latent_channels"])
        tiny.save_config(folder)
        for way, words in FLAGS.items():
            words = [folder if word == "TINY" else word for word in words]
            _, _, other = counted(name, [*common, *words], scale=scale, stages=(Stage.LPL_STEP,))
            lpl[way] = other.operations[Stage.LPL_STEP] - plain
    lpl[STUDENT] = student_operations(*description.space, side)
    lpl[CORRECTED] = lpl[STUDENT] + (with_lpl - plain) / 32
    plain, with_lpl = (operations - found.text_encoder_operations for operations in (plain, with_lpl))
    tera = {way: operations / 1e12 for way, operations in lpl.items()}
    return Row(plain / 1e12, (with_lpl - plain) / 1e12, inside(config, description), tera)


def student_operations(channels: int, factor: int, side: int) -> float:
    """Operations of a student's value and gradient for an image; they are proportional to its positions."""
    student, few = StudentLoss(Student(channels, WIDTH, DEPTH)), 8
    latents, predicted = torch.zeros(2, 1, channels, few, few)
    with Operations() as counter:
        student(predicted.requires_grad_(), latents)
    return counter.total * (side / factor / few) ** 2


def inside(config: Config, description: Description) -> float:
    """The share of the samples drawn in training that are inside LPL's threshold."""
    objective, space = description.objective(config.model.objective), LatentSpace(*description.space)
    images = TrainingImages(Dataset.from_dict({}), objective, space, config.data, config.diffusion, seed=0)
    return share_inside(images, threshold_of(config))


def line(name: str, row: Row) -> str:
    """A row of the table."""
    title, side = MODELS[name]
    return f"| {' | '.join([f'{title}, {side} px', *row.cells()])} |"


def table(lines: Sequence[str]) -> str:
    heads = [
        "",
        "without LPL",
        "LPL",
        "x, all inside",
        "share inside",
        "x, at that share",
        *SCALED,
        *FLAGS,
        STUDENT,
        CORRECTED,
    ]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/cost.md")
    args = parser.parse_args()
    text = table([line(name, count(name)) for name in MODELS])
    print(text)
    if args.write:
        DOCS.write_text(filled(DOCS.read_text(), START, END, text))


if __name__ == "__main__":
    main()
