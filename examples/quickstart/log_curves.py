"""Draws docs/log_curves.png: the log of a healthy run of the quickstart, and of two in trouble.

    MORE="--validation_every_nth 10 --validation_steps 50 --report_to none"
    examples/quickstart/finetune.sh quickstart/healthy 300 $MORE
    examples/quickstart/finetune.sh quickstart/learning_rate 300 $MORE --learning_rate 5e-3
    examples/quickstart/finetune.sh quickstart/weight 300 $MORE --lpl_weight 20
    PYTHONPATH=. python examples/quickstart/log_curves.py

The folder logs holds the metrics.jsonl of each run; without arguments, these are drawn.
"""

import argparse
from pathlib import Path

import numpy as np

from lpl.tools.files import entries
from lpl.tools.pictures import label_axes, new_figure, save_figure


HERE = Path(__file__).resolve().parent
RUNS = {  # name of the log -> words, colour
    "healthy": ("healthy", "#2b5f9e"),
    "learning_rate": ("learning rate 25 times too high", "#c4601d"),
    "weight": ("LPL's weight 68 times too high", "#4a8a3c"),
}
PANELS = {  # key -> title, scale
    "diffusion_loss": ("diffusion loss, mean of 50 steps", 1),
    "validation_loss": ("validation loss", 1),
    "validation_lpl": ("validation LPL", 1),
    "lpl_share": ("LPL's share of the loss, %, mean of 50 steps", 100),
}
MEAN = 5  # entries of the log


def curve(log: Path, key: str) -> tuple[list[int], np.ndarray]:
    """Steps and values; what is logged in training is averaged over MEAN entries."""
    found = [(entry["step"], entry[key]) for entry in entries(log) if key in entry]
    if not key.startswith("validation"):
        parts = [found[start : start + MEAN] for start in range(0, len(found), MEAN)]
        found = [(part[-1][0], np.mean([value for _, value in part])) for part in parts]
    return [step for step, _ in found], np.array([value for _, value in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=HERE / "logs")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "log_curves.png")
    args = parser.parse_args()
    figure = new_figure(10, 6, dpi=110, w_pad=0.12, h_pad=0.12)
    for place, (key, (title, scale)) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        for name, (words, colour) in RUNS.items():
            steps, values = curve(args.logs / f"{name}.jsonl", key)
            axes.plot(steps, scale * values, color=colour, label=words, linewidth=2)
        label_axes(axes, title, "optimizer step", "")
    figure.axes[0].legend(fontsize=9, frameon=False)
    save_figure(figure, args.output)


if __name__ == "__main__":
    main()
