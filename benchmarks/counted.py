"""What a command line would need on a GPU, counted as by ``--dry_run --for_gpu``, for this repository's tables."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.newer_sizes import NEWER
from benchmarks.real_sizes import MODELS, OTHERS, Model, configurations
from lpl.config import Config, command_line
from lpl.diagnosis.estimate import Estimate, Method, estimate
from lpl.diagnosis.status import Stage
from lpl.families.description import Description, read_pipeline
from lpl.families.resolve import resolve, with_decoder_dtype
from train_text_to_image_lpl import Losses, optimizer_step


METHOD = Method(Losses, optimizer_step)
ARCHITECTURES: dict[str, Model] = {**MODELS, **OTHERS, **NEWER}
PIPELINES = {"quickstart": Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "pipeline"}
BY_PUBLIC_NAME = {model.public: name for name, model in ARCHITECTURES.items()}


@contextmanager
def completed(name: str, words: Sequence[str], scale: str = "real") -> Iterator[tuple[Config, Description]]:
    """A command line on an architecture, complete, and its pipeline's configurations, whose files are there within.

    Args:
        name: of the architecture.
        words: flags besides the pipeline.
        scale: "real", or "tiny" for shrunken models.
    """
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = PIPELINES.get(name) or configurations(ARCHITECTURES[name], Path(place, "pipeline"), scale)
        own = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(Path(place, "output"))]
        config = command_line.parse([*words, *own, "--dry_run", "--for_gpu", "80GB"])
        description = read_pipeline(config.model, config.lpl.lpl_blocks, weights=False)
        config = resolve(config, description)
        yield with_decoder_dtype(config, config.optimization.mixed_precision or "no"), description


def counted(
    name: str,
    words: Sequence[str],
    processes: int = 1,
    scale: str = "real",
    stages: Sequence[Stage] = (Stage.STEP, Stage.LPL_STEP, Stage.SAMPLES),
) -> tuple[Config, Description, Estimate]:
    """A command line and its pipeline's configurations, as :func:`completed` gives them, and what the run would need.

    Args:
        processes: GPUs.
    """
    with completed(name, words, scale) as (config, description):
        precision = config.optimization.mixed_precision or "no"
        return config, description, estimate(config, description, METHOD, precision, processes, stages)
