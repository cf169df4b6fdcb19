"""The optimizer that the flags ask for, and what one of its steps changes: all of it, or nothing."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from lpl.training.average import MovingAverage
from lpl.training.parts import TrainedParts


def make_optimizer(args: Namespace, trained: TrainedParts, global_batch: int) -> torch.optim.Optimizer:
    """AdamW, in 8 bits with --use_8bit_adam, or Prodigy; text encoders have a learning rate of their own."""
    factor = global_batch if args.scale_lr else 1
    groups = [{"params": trained.parameters_of(trained.denoiser)}]
    if trained.text_encoders:
        groups.append(
            {
                "params": trained.parameters_of(*trained.text_encoders),
                "lr": args.text_encoder_lr * factor,
                "weight_decay": args.adam_weight_decay_text_encoder,
            }
        )
    shared = {
        "lr": args.learning_rate * factor,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer.lower() == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            **shared,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared, fused=True)


class Updates:
    """One optimizer step and what goes with it: gradients are clipped; weights, the optimizer's state, the place in
    the schedule and the moving average move. Where a gradient is not finite, none of them does.

    Whether it is so is known on the device only, and no step waits for it: AdamW's fused kernel takes the answer, the
    learning rate is looked up by a count that stays there too. AdamW in 8 bits and Prodigy know nothing of this; with
    them each step waits.

    Args:
        optimizer: as accelerate has prepared it.
        schedule: learning rates as factors on their first value; it is read only.
        max_steps: of the whole run.
        max_grad_norm: the gradient's norm at most; 0: as it is.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trained: TrainedParts,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        max_steps: int,
        ema: MovingAverage | None,
        max_grad_norm: float,
    ) -> None:
        self.accelerator, self.optimizer, self.ema, self.max_grad_norm = accelerator, optimizer, ema, max_grad_norm
        self.parameters = trained.weights()
        device = accelerator.device
        self.skipped = torch.zeros((), device=device)  # 1 where the last step changed nothing
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # steps that changed something
        # Ends with what holds behind the last step, in case that the schedule is longer than the run.
        self.factors = torch.tensor([schedule.lr_lambdas[0](step) for step in range(max_steps + 1)], device=device)
        self.base_rates = list(schedule.base_lrs)
        self.waits = not isinstance(optimizer.optimizer, torch.optim.AdamW)
        self._take_hold()

    def _take_hold(self) -> None:
        """Have the optimizer read what is on the device."""
        if not self.waits:
            self.optimizer.optimizer.found_inf = self.skipped
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = torch.full((), rate, device=self.accelerator.device)

    def step(self) -> None:
        """After the last micro-batch's backward pass."""
        self.accelerator.unscale_gradients()  # fp16
        norm = get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        self.skipped.copy_(norm.isfinite().logical_not())
        if self.max_grad_norm:
            clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self._set_learning_rates()
        # With fp16 the loss scaling looks for itself, and has to see each step.
        if not self.waits or self.accelerator.scaler is not None or not self.skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1 - self.skipped.long()
        if self.ema is not None:
            self.ema.update(self.parameters, self.skipped)

    def _set_learning_rates(self) -> None:
        factor = self.factors.index_select(0, self.count.clamp(max=len(self.factors) - 1))[0]
        factor = float(factor) if self.waits else factor
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            if self.waits:
                group["lr"] = base * factor
            else:
                torch.mul(factor, base, out=group["lr"])

    @property
    def learning_rate(self) -> float:
        """The denoiser's in the last step; waits for the device."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "count": self.count,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the learning rates, betas, eps and weight decay of this run's flags."""
        groups = self.optimizer.state_dict()["param_groups"]
        for saved, group in zip(state["optimizer"]["param_groups"], groups, strict=True):
            flags = ("lr", "initial_lr", "betas", "eps", "weight_decay", "fused", "foreach")
            saved.update({name: group[name] for name in flags if name in group})
        self.optimizer.load_state_dict(state["optimizer"])
        self.count.copy_(state["count"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._take_hold()
