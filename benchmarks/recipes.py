"""The memory and the operations that recipes name in their heads, counted (``--dry_run --for_gpu``).

    python -m benchmarks.recipes                       # print them
    python -m benchmarks.recipes --write               # write them into examples/recipes/*.yaml, its README.md, and
                                                       # docs/hardware.md, which has recipes on smaller GPUs too
    python -m benchmarks.recipes --names sd15_lora     # of some recipes only

GiB of the largest stage, with what is assumed for CUDA. Operations are those of an optimizer step on one GPU, with all
samples inside LPL's threshold.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.counted import BY_PUBLIC_NAME, counted
from benchmarks.pages import filled
from lpl.diagnosis.estimate import CONTEXT
from lpl.diagnosis.status import Stage


ROOT = Path(__file__).resolve().parent.parent
FOLDER, HARDWARE = ROOT / "examples" / "recipes", ROOT / "docs" / "hardware.md"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
GIB = 2**30
SMALLER = (  # recipe, flags that save memory, GB of the GPU that has room for it then
    ("sdxl_lora", "--quantize_base 4bit --resolution 512", 8),
    ("sdxl_lora", "--quantize_base 4bit", 12),
    ("sdxl_lora", "--resolution 768", 12),
    ("sd15_full", "--use_8bit_adam --train_batch_size 1 --gradient_accumulation_steps 16", 16),
    ("flux_lora", "--quantize_base 4bit", 24),
    ("pixart_sigma", "--use_8bit_adam", 24),
    ("sd35_medium_full", "--use_8bit_adam --train_batch_size 1 --gradient_accumulation_steps 16", 48),
    ("sdxl_lora", "--group_offload --offload_frozen", 8),
    ("sdxl_lora", "--offload_frozen", 12),
    ("flux_lora", "--group_offload --offload_frozen", 8),
    ("flux_lora", "--quantize_base fp8 --offload_frozen", 24),
    ("flux_lora", "--offload_frozen", 32),
)
START, END = "<!-- smaller -->", "<!-- end of smaller -->"


@dataclass(frozen=True)
class Needs:
    """GiB and TFLOP of a recipe; ``lpl`` and ``lpl_operations`` are None where it trains without LPL."""

    plain: float
    lpl: float | None
    loaded: float
    samples: float
    host: float
    operations: float
    lpl_operations: float | None

    def lines(self) -> str:
        """The head's lines on memory and operations, without a "#"."""
        with_lpl = "" if self.lpl is None else f"{self.lpl:.1f} GiB with LPL, "
        host = f"; the EMA takes {self.host:.1f} GiB of the CPU's" if self.host else ""
        memory = (
            f"{with_lpl}{self.plain:.1f} GiB without LPL (estimated by --dry_run --for_gpu; nobody has measured it): "
            f"models {self.loaded:.1f}, samples {self.samples:.1f}, each with 1.0 for CUDA{host}."
        )
        more = (
            ""
            if self.lpl_operations is None
            else f"{three_digits(self.lpl_operations)} TFLOP with LPL on all samples, "
        )
        operations = f"{more}{three_digits(self.operations)} TFLOP without, in a step of one GPU."
        return "\n".join(_labelled("Memory:", memory) + _labelled("Compute:", operations))

    def cells(self) -> str:
        """The row's last cells in the README."""
        memory = ["-" if value is None else f"{value:.1f} GiB" for value in (self.lpl, self.plain)]
        counts = (self.lpl_operations, self.operations)
        return " | ".join(memory + ["-" if count is None else f"{three_digits(count)} TFLOP" for count in counts])


def three_digits(value: float) -> str:
    """
    >>> three_digits(1234.5), three_digits(28.123)
    ('1230', '28.1')
    """
    return f"{float(f'{value:.3g}'):g}"


def _labelled(label: str, text: str) -> list[str]:
    return textwrap.wrap(f"{label:9} {text}", 117, subsequent_indent=" " * 10, break_on_hyphens=False)


def architecture(name: str) -> str:
    """The architecture that a recipe trains; of one that continues from another recipe, the other's."""
    source = values(name)["pretrained_model_name_or_path"]
    if source in BY_PUBLIC_NAME:
        return BY_PUBLIC_NAME[source]
    (earlier,) = (other for other in NAMES if values(other)["output_dir"] == source)
    return architecture(earlier)


def values(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def needs(name: str, scale: str = "real", flags: Sequence[str] = ()) -> Needs:
    """Count what a recipe needs.

    Args:
        scale: "tiny": of shrunken models, to try this out.
        flags: added to the recipe's.
    """
    text = (FOLDER / f"{name}.yaml").read_text()
    processes = int(match[1]) if (match := re.search(r"--num_processes (\d+)", text)) else 1
    _, _, found = counted(
        architecture(name), ["--config", str(FOLDER / f"{name}.yaml"), *flags], processes, scale=scale
    )
    memory, operations = found.memory, found.operations
    loaded, samples = ((memory[stage] + CONTEXT) / GIB for stage in (Stage.LOADING, Stage.SAMPLES))
    plain = max(loaded, samples, (memory[Stage.STEP] + CONTEXT) / GIB)
    with_lpl, more = memory.get(Stage.LPL_STEP), operations.get(Stage.LPL_STEP)
    return Needs(
        plain,
        max(plain, (with_lpl + CONTEXT) / GIB) if with_lpl else None,
        loaded,
        samples,
        found.host / GIB,
        operations[Stage.STEP] / 1e12,
        more / 1e12 if more else None,
    )


def write(name: str, found: Needs) -> None:
    """Put the figures into the recipe's head and into its row of the README."""
    file, readme = FOLDER / f"{name}.yaml", FOLDER / "README.md"
    lines = "".join(f"# {line}\n" for line in found.lines().splitlines())
    file.write_text(re.sub(r"# Memory: .*?(?=# Result:)", lambda _: lines, file.read_text(), count=1, flags=re.DOTALL))
    row = re.compile(rf"^(\| \[{name}\.yaml\].*? \| \d+ x \d+ GB) \| .*\|$", re.MULTILINE)
    readme.write_text(row.sub(lambda match: f"{match[1]} | {found.cells()} |", readme.read_text()))


def smaller_row(name: str, flags: str, gigabytes: int, found: Needs) -> str:
    """A row of docs/hardware.md."""
    memory = " | ".join("-" if value is None else f"{value:.1f} GiB" for value in (found.lpl, found.plain))
    return f"| `{name}` | `{flags}` | {gigabytes} GB | {memory} |"


def write_hardware(names: Sequence[str]) -> None:
    """Put the figures of recipes into docs/hardware.md."""
    page = HARDWARE.read_text()
    for name in names:
        cells = re.search(rf"^\| \[{name}\.yaml\].*? GB \| (.*)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
        assert cells is not None
        page = re.sub(rf"^(\| `{name}` \|.*? \| 1 x \d+ GB \|) .*$", rf"\1 {cells[1]}", page, flags=re.MULTILINE)
    rows = [smaller_row(*row, needs(row[0], flags=row[1].split())) for row in SMALLER]
    table = "\n".join(["| recipe | with | GPU | with LPL | without |", "|---|---|---|---|---|", *rows])
    HARDWARE.write_text(filled(page, START, END, table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--write", action="store_true", help="write the figures into the recipes and the README")
    args = parser.parse_args()
    for name in args.names:
        found = needs(name)
        print(f"{name}: {found.cells()}", flush=True)
        if args.write:
            write(name, found)
    if args.write:
        write_hardware(args.names)


if __name__ == "__main__":
    main()
