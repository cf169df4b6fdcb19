"""The optimizer, and one step of it: everything moves, or nothing."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from lpl.config.groups import Optimization
from lpl.config.rules import is_path
from lpl.training.average import MovingAverage
from lpl.training.optimizers import averages_weights, factors, hyperparameters, of_bitsandbytes, optimizer_by_path
from lpl.training.parts import TrainedParts
from lpl.training.sharding import average_gradients, called_in_precision, like, local, whole


def prepare(
    accelerator: Accelerator,
    trained: TrainedParts,
    average: MovingAverage | None,
    optimization: Optimization,
    global_batch: int,
    max_steps: int,
) -> tuple[nn.Module, Updates]:
    """The trained parts as accelerate wraps them, and the updates of their weights.

    The schedule counts optimizer steps, whatever the number of processes and micro-batches.
    """
    optimizer = make_optimizer(optimization, trained, global_batch)
    schedule = make_schedule(optimization, optimizer, max_steps)
    if trained.sharded:
        model, prepared = called_in_precision(trained, accelerator), accelerator.prepare(optimizer)
    else:
        model, prepared = accelerator.prepare(trained, optimizer)
    return model, Updates(accelerator, trained, prepared, schedule, max_steps, average, optimization.max_grad_norm)


def make_schedule(optimization: Optimization, optimizer: torch.optim.Optimizer, max_steps: int) -> LambdaLR:
    if is_path(optimization.lr_scheduler):
        return LambdaLR(optimizer, factors(optimization, max_steps).__getitem__)
    return get_scheduler(
        optimization.lr_scheduler,
        optimizer,
        num_warmup_steps=optimization.warmup_steps(max_steps),
        num_training_steps=max_steps,
        num_cycles=optimization.lr_num_cycles,
        power=optimization.lr_power,
    )


def make_optimizer(optimization: Optimization, trained: TrainedParts, global_batch: int) -> torch.optim.Optimizer:
    """AdamW, in 8 bits with --use_8bit_adam, Prodigy, or a class by its path; text encoders have a learning rate of
    their own."""
    factor = global_batch if optimization.scale_lr else 1
    groups: list[dict[str, Any]] = [{"params": trained.parameters_of(trained.denoiser)}]
    if trained.text_encoders:
        assert optimization.text_encoder_lr is not None
        groups.append(
            {
                "params": trained.parameters_of(*trained.text_encoders),
                "lr": optimization.text_encoder_lr * factor,
                "weight_decay": optimization.adam_weight_decay_text_encoder,
            }
        )
    if of_bitsandbytes(optimization):
        # It lays weights out so in the first step. States with the strides of --channels_last would be saved in
        # another order than the one that they are used in.
        for weight in (weight for group in groups for weight in group["params"]):
            weight.data = weight.data.contiguous()
    shared: dict[str, Any] = {
        "lr": optimization.learning_rate * factor,
        "betas": (optimization.adam_beta1, optimization.adam_beta2),
        "weight_decay": optimization.adam_weight_decay,
        "eps": optimization.adam_epsilon,
    }
    if optimization.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            **shared,
            beta3=optimization.prodigy_beta3,
            decouple=optimization.prodigy_decouple,
            use_bias_correction=optimization.prodigy_use_bias_correction,
            safeguard_warmup=optimization.prodigy_safeguard_warmup,
        )
    if is_path(optimization.optimizer):
        return optimizer_by_path(optimization, groups, shared)
    if optimization.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared, fused=True)


class Updates:
    """One optimizer step: clips gradients; updates weights, optimizer state, the position in the schedule and the
    moving average. Where a gradient is not finite, nothing is updated.

    Whether a gradient is finite is known on the device only, and no step waits for it: AdamW's fused kernel takes the
    answer, and the learning rate is looked up by a count that stays on the device. Others cannot do this; with them
    each step waits.

    Args:
        optimizer: as accelerate has prepared it.
        schedule: learning rates as factors on their first value; only read.
        max_steps: optimizer steps of the whole run.
        max_grad_norm: norm that gradients are clipped to; 0: no clipping.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trained: TrainedParts,
        optimizer: AcceleratedOptimizer,
        schedule: LambdaLR,
        max_steps: int,
        average: MovingAverage | None,
        max_grad_norm: float,
    ) -> None:
        self.accelerator, self.optimizer, self.schedule = accelerator, optimizer, schedule
        self.average, self.max_grad_norm = average, max_grad_norm
        self.parameters = trained.weights()
        self.averages = trained.sharded and trained.lora  # gradients, which nothing else averages
        device = local(self.parameters)[0].device
        self.skipped = torch.zeros((), device=device)  # 1 where the last step changed nothing
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # steps that changed something
        # One more than there are steps: what holds after the last one.
        self.factors = torch.tensor([schedule.lr_lambdas[0](step) for step in range(max_steps + 1)], device=device)
        self.base_rates = [float(rate) for rate in schedule.base_lrs]
        own: Any = optimizer.optimizer
        self.waits = not (type(own) is torch.optim.AdamW and own.defaults["fused"])
        if averages_weights(own):
            trained.averaging = own
            trained.averaging.train()
        self._take_hold()

    def _take_hold(self) -> None:
        """Let the optimizer read the device's tensors."""
        if not self.waits:
            self.optimizer.optimizer.found_inf = self.skipped
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = torch.full((), rate, device=self.skipped.device)

    def step(self) -> None:
        """After the last micro-batch's backward pass."""
        if self.average is not None:
            self.average.wait()  # for its copies, which read the weights
        self.accelerator.unscale_gradients()  # fp16
        if self.averages:
            average_gradients(self.parameters, self.accelerator)
        norm = get_total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.skipped.copy_(norm.isfinite().logical_not())
        if self.max_grad_norm:
            clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self._set_learning_rates()
        # The loss scaling of fp16 checks by itself, and has to see each step.
        if not self.waits or self.accelerator.scaler is not None or not self.skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1 - self.skipped.long()
        if self.average is not None:
            self.average.update(local(self.parameters), self.skipped)

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
        """The denoiser's learning rate in the last step; waits for the device."""
        return float(self.optimizer.param_groups[0]["lr"])

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean of each number over all processes."""
        return cast(Tensor, self.accelerator.reduce(numbers, "mean"))

    def state_dict(self) -> dict[str, Any]:
        """With whole tensors, on the main process. Called by every process."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": whole(self.optimizer.state_dict(), self.accelerator.is_main_process),
            "count": self.count,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from it, with the learning rates and settings of this run's flags."""
        groups = self.optimizer.state_dict()["param_groups"]
        for saved, group in zip(state["optimizer"]["param_groups"], groups, strict=True):
            saved.update({name: group[name] for name in hyperparameters(self.optimizer.optimizer) if name in group})
        moments = state["optimizer"]["state"]
        numbered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(numbered):
            values = moments.get(number, {})
            values.update({name: like(value, parameter) for name, value in values.items() if torch.is_tensor(value)})
        self.optimizer.load_state_dict(state["optimizer"])
        self.count.copy_(state["count"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._take_hold()
