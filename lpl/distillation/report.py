"""What a student costs, its card and its picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lpl.distillation.fit import LOG, Measurement
from lpl.distillation.pairs import Pairs
from lpl.loss import LatentPerceptualLoss
from lpl.student import Student, StudentLoss
from lpl.tools.files import number_entries, write_text
from lpl.tools.layout import CARD
from lpl.tools.pictures import label_axes, new_figure, save_figure


PICTURE = "fidelity.png"
REPEATS = 5  # of the calls that are timed
BINS = 5


def cost(student: Student, loss: LatentPerceptualLoss, pairs: Pairs, device: torch.device) -> dict[str, Any]:
    """A call of the student, with its gradient, relative to one of the loss: operations, and median time here."""
    few = pairs.select(torch.arange(min(2, len(pairs))))
    calls = {"student": StudentLoss(student), "lpl": loss}
    for call in calls.values():
        _call(call, few, device)  # LPL's first call counts its own memory, which takes operations
    operations = {name: _operations(lambda call=call: _call(call, few, device)) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS + 1):  # in turns; the first is not counted
        for name, call in calls.items():
            start = time.perf_counter()
            _call(call, few, device)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: sorted(found[1:])[REPEATS // 2] for name, found in seconds.items()}
    return {
        "operations": operations["student"] / operations["lpl"],
        "time": medians["student"] / medians["lpl"],
        "gflop_per_sample": operations["student"] / len(few) / 1e9,
        "lpl_gflop_per_sample": operations["lpl"] / len(few) / 1e9,
        "device": device.type,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }


def _call(loss: Callable[[Tensor, Tensor], Tensor], pairs: Pairs, device: torch.device) -> None:
    predicted = pairs.predicted.to(device).requires_grad_()
    loss(predicted, pairs.latents.to(device)).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of all products and convolutions within."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (counted := flop_registry.get(func._overloadpacket)) is not None:
            self.total += counted(*args, **(kwargs or {}), out_val=out)
        return out


def _operations(call: Callable[[], None]) -> int:
    with Operations() as counter:
        call()
    return counter.total


# The picture and the card --------------------------------------------------------------------------------------------


def binned(by: Tensor, found: Measurement) -> list[tuple[str, int, float, float]]:
    """Range, number, mean cosine and relative error of the pairs, in BINS parts of equal number, (N,) -> rows."""
    order, rows = by.argsort(), []
    for part in order.tensor_split(BINS):
        if len(part):
            low, high = by[part].min().item(), by[part].max().item()
            error = found.relative_error[part].square().mean().sqrt().item()
            rows.append((f"{low:.2f} to {high:.2f}", len(part), found.cosine[part].mean().item(), error))
    return rows


def write_report(folder: Path, numbers: Mapping[str, Any], found: Measurement, pairs: Pairs) -> None:
    """Draw ``fidelity.png`` and write the card."""
    _draw(folder, found, pairs)
    write_text(folder / CARD, card(numbers, found, pairs))


def _draw(folder: Path, found: Measurement, pairs: Pairs) -> None:
    figure = new_figure(12, 3.6)
    by_size, by_sigma, values, steps = figure.subplots(1, 4)
    by_size.scatter(pairs.size, found.cosine, s=6, alpha=0.5)
    label_axes(by_size, "Gradient, by size of error", "error / RMS of the latents", "cosine with LPL's")
    known = ~pairs.sigma.isnan()
    by_sigma.scatter(pairs.sigma[known], found.cosine[known], s=6, alpha=0.5)
    label_axes(by_sigma, "Gradient, by noise", "sigma", "cosine with LPL's")
    values.scatter(found.exact, found.value, s=6, alpha=0.5)
    ends = [float(found.exact.min()), float(found.exact.max())]
    values.plot(ends, ends, color="grey", linewidth=0.8)
    values.loglog()
    for axis in (values.xaxis, values.yaxis):
        axis.set_minor_formatter("")  # they would cover one another
    label_axes(values, "Value", "LPL", "student")
    log = number_entries(folder / LOG)
    steps.plot([entry["step"] for entry in log], [entry["cosine"] for entry in log])
    label_axes(steps, "While it was trained", "step", "cosine, held-out images")
    save_figure(figure, folder / PICTURE)


def card(numbers: Mapping[str, Any], found: Measurement, pairs: Pairs) -> str:
    """The model card, in Markdown."""
    cost, loss = numbers["cost"], numbers["loss"]
    tables = {"error / RMS": binned(pairs.size, found)}
    if not pairs.sigma.isnan().any():
        tables["sigma"] = binned(pairs.sigma, found)
    rows = "\n\n".join(_table(name, table) for name, table in tables.items())
    pull = "LPL has none here" if numbers["pull"] is None else f"{numbers['pull']:.3f}"
    learned = "the denoiser's own estimates" if numbers["pairs_from"] == "predictions" else "errors that were made"
    return f"""---
library_name: diffusers
tags: [latent-perceptual-loss, distillation]
---

# A student of the decoder of {numbers["model"]}

It stands in for the [latent perceptual loss](https://arxiv.org/abs/2411.04873) (LPL) in training, at
{cost["operations"]:.1%} of its operations:

```bash
accelerate launch train_text_to_image_lpl.py --lpl_student THIS_FOLDER_OR_ID ...
```

| on {numbers["held_out"]} pairs of held-out images | |
|---|---|
| cosine of its gradient with LPL's | {numbers["cosine"]:.3f} |
| relative error of its gradient | {numbers["relative_error"]:.3f} |
| pull of its gradient towards more contrast, relative to LPL's | {pull} |
| correlation of the logarithms of the values | {numbers["log_correlation"]:.3f} |
| operations, relative to LPL | {cost["operations"]:.3f} |
| time, relative to LPL, on this machine's {cost["device"]} | {cost["time"]:.3f} |

![Fidelity]({PICTURE})

{rows}

Made from {numbers["pairs"]:,} pairs of latents of {numbers["images"]:,} images at {numbers["resolution"]} px and
{learned}, in {numbers["steps"]:,} steps; {cost["parameters"]:,} parameters. It reproduces the loss with
{_sentence(loss)}. With another configuration, or another VAE, it is refused.
"""


def _table(name: str, rows: list[tuple[str, int, float, float]]) -> str:
    lines = [
        [name, "pairs", "cosine", "relative error"],
        *([r, str(n), f"{c:.3f}", f"{e:.3f}"] for r, n, c, e in rows),
    ]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---|---|---|---|", *body])


def _sentence(loss: Mapping[str, Any]) -> str:
    blocks = " ".join(loss["blocks"])
    weights = loss["depth_weighting"]
    weights = weights if isinstance(weights, str) else " ".join(map(str, weights))
    masks = "outlier masks" if loss["mask_outliers"] else "no masks"
    return f"blocks {blocks}, normalisation {loss['normalization']}, depth weights {weights}, {masks}"
