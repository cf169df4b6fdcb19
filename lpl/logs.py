"""What a run tells while it runs: the progress bar's numbers, ``metrics.jsonl``, and the trackers.

Numbers are summed on the device and fetched at logging steps only, so that no other step waits for them.
``lpl_share`` is ``w LPL / L_total``, ``inside`` the share of samples below the sigma threshold, both over the steps
since the last entry.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Log:
    """The log of one run, continued after a resume.

    Args:
        first_step: finished steps; entries of later ones, from a run that was cut short, are dropped.
    """

    def __init__(self, accelerator: Accelerator, args: Namespace, first_step: int) -> None:
        self.accelerator = accelerator
        self.path = Path(args.output_dir, "metrics.jsonl")
        self._count, self._inside = 0, 0.0
        self._sums = torch.zeros(4, device=accelerator.device)
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [record for record in self.records() if record["step"] <= first_step]
            self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        accelerator.init_trackers(args.tracker_project_name, {k: _plain(v) for k, v in public(args).items()})

    def add(self, loss: Tensor, diffusion_loss: Tensor, lpl: Tensor, weighted_lpl: Tensor, inside: float) -> None:
        """One micro-batch: four means of (), still on the device, and the share of samples inside the threshold."""
        self._sums += torch.stack([loss, diffusion_loss, lpl, weighted_lpl]).detach()
        self._inside += inside
        self._count += 1

    def write(self, step: int, lr: float, lpl_weight: Tensor) -> dict[str, str]:
        """Log the means since the last call; returns them as the progress bar shows them."""
        means = self.accelerator.reduce(
            torch.cat([self._sums, self._sums.new_tensor([self._inside])]) / self._count, "mean"
        )
        loss, diffusion_loss, lpl, weighted, inside = means.tolist()
        record = {
            "loss": loss,
            "diffusion_loss": diffusion_loss,
            "lpl": lpl,
            "lpl_weight": float(lpl_weight),
            "lpl_share": weighted / loss if loss else 0.0,
            "inside": inside,
            "lr": lr,
        }
        self._sums.zero_()
        self._count, self._inside = 0, 0.0
        self.accelerator.log(record, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step} | record) + "\n")
        return {
            "diffusion": f"{diffusion_loss:.4f}",
            "lpl": f"{lpl:.4f}",
            "share": f"{record['lpl_share']:.0%}",
            "lr": f"{lr:.1e}",
        }

    def records(self) -> list[dict[str, Any]]:
        """Every entry so far; a line that a crash cut short ends them."""
        records = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return records


def public(args: Namespace) -> dict[str, Any]:
    """The flags as one may show them: no token, nothing that is not a flag."""
    return {name: value for name, value in vars(args).items() if name not in ("hub_token", "given", "use_lpl")}


def _plain(value: Any) -> Any:
    """TensorBoard takes numbers and strings only."""
    return value if isinstance(value, bool | int | float | str) else str(value)
