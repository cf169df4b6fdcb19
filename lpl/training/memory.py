"""Less memory on the device: frozen weights, and kept activations, that are there only while they are used.

A *group* is a set of frozen weights that are used together: those of a block of the denoiser, of a text encoder's
block, of the VAE's encoder. While nobody uses it, its weights *rest* in pinned CPU memory, or on the device in 8 bits,
or both. Each parameter of its modules is then a stand-in, one NaN in the parameter's shape. Weights never change, so
nothing is copied back.

In 8 bits (float8 of 4 bits of exponent and 3 of mantissa) each row of a weight has a scale, so that its largest number
is the largest of the format. As in diffusers' layerwise casting, layers that are sensitive stay as they are.

Autograd keeps a weight that a backward pass needs. Under gradient checkpointing that is once the block is computed
again, so that the weights of about one block are on the device at a time, in both passes.

diffusers' hooks (``enable_group_offload``, ``enable_layerwise_casting``) are for inference. They move trained weights
with the frozen ones; they change ``.data`` of weights that autograd has saved, and a U-Net's backward pass raises; a
block stays on the device where its recomputation ends early, which is the usual case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self, cast

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from lpl.config import Config
from lpl.config.choices import FP8
from lpl.config.groups import Optimization
from lpl.loss import LatentPerceptualLoss
from lpl.training.parts import TrainedParts
from lpl.training.sharding import blocks_of


FLOAT8 = torch.float8_e4m3fn
SMALL = 2**20  # bytes; what is smaller stays on the device


class Resting(NamedTuple):
    """A weight that rests: its numbers, and what stands in for it.

    Args:
        scales: of each row, if the numbers are in 8 bits.
    """

    numbers: Tensor
    scales: Tensor | None
    stand_in: nn.Parameter

    @classmethod
    def of(cls, weight: Tensor, device: torch.device, host: bool, packed: bool) -> Resting:
        numbers, scales = weight.detach(), None
        if packed:
            largest = numbers.float().flatten(1).abs().amax(1).view(-1, *(1,) * (weight.ndim - 1))
            scales = largest.clamp(min=torch.finfo(torch.float32).tiny * 512) / torch.finfo(FLOAT8).max
            numbers, scales = (numbers / scales).to(FLOAT8), scales.to(device)
        return cls(on_host(numbers, device) if host else numbers.to(device), scales, _stand_in(weight, device))

    def wake(self, device: torch.device, host: bool) -> nn.Parameter:
        numbers = on_device(self.numbers, device) if host else self.numbers
        if self.scales is not None:
            numbers = numbers.to(self.stand_in.dtype).mul_(self.scales)
        return nn.Parameter(numbers, requires_grad=False)


class Group:
    """Frozen weights that are on a device only within this context, which may be entered again within itself.

    Args:
        owners: the modules whose own parameters they are; trained parameters stay as they are.
        host: they rest in CPU memory.
        packed: owners whose weights rest in 8 bits.
    """

    def __init__(
        self,
        owners: Iterable[nn.Module],
        device: torch.device,
        host: bool = True,
        packed: Collection[nn.Module] = (),
    ) -> None:
        self.device, self.host, self.users = device, host, 0
        rested: dict[nn.Parameter, Resting] = {}  # modules may share a weight
        self.places: list[tuple[nn.Module, str, Resting]] = []
        for owner in owners:
            for name, weight in owner.named_parameters(recurse=False):
                in_8_bits = name == "weight" and owner in packed
                if weight.requires_grad or not (host or in_8_bits):
                    continue
                if weight not in rested:
                    rested[weight] = Resting.of(weight, device, host, in_8_bits)
                self.places.append((owner, name, rested[weight]))
        self._rest()

    def _rest(self) -> None:
        for owner, name, resting in self.places:
            owner._parameters[name] = resting.stand_in

    def __enter__(self) -> Self:
        self.users += 1
        if self.users == 1:
            awake: dict[int, nn.Parameter] = {}
            for owner, name, resting in self.places:
                if id(resting) not in awake:
                    awake[id(resting)] = resting.wake(self.device, self.host)
                owner._parameters[name] = awake[id(resting)]
        return self

    def __exit__(self, *_: object) -> None:
        self.users -= 1
        if not self.users:
            self._rest()

    def follow(self, module: nn.Module) -> None:
        """Be there while the module's forward pass runs, also where an error or a recomputation ends it early."""

        def enter(*_: Any) -> None:
            self.__enter__()

        def leave(*_: Any) -> None:
            self.__exit__()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in memory of the CPU, pinned for the GPU that it comes back to; the host does not wait for it."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=device.type == "cuda")
    return copied.copy_(tensor, non_blocking=True)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of what :func:`on_host` returned; the host does not wait for it."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def _stand_in(weight: Tensor, device: torch.device) -> nn.Parameter:
    """Of a weight's shape and dtype, without its memory; what reads it finds NaN."""
    nothing = torch.full((1,) * weight.ndim, torch.nan, dtype=weight.dtype, device=device)
    return nn.Parameter(nothing.expand(weight.shape), requires_grad=False)


def offload(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a frozen model to the device so that each block, and each layer outside of blocks, comes when it runs."""
    blocks = rest_blocks(model, device)
    within = set(chain.from_iterable(block.modules() for block in blocks))
    for module in model.modules():
        if module not in within and any(True for _ in module.parameters(recurse=False)):
            Group([module], device).follow(module)
    return model.to(device)  # buffers


def rest_blocks(
    model: nn.Module,
    device: torch.device,
    host: bool = True,
    packed: Collection[nn.Module] = (),
    layers: Sequence[str] = (),
) -> Sequence[nn.Module]:
    """Let the frozen weights of each block come when it runs; returns the blocks. All else stays where it is."""
    blocks, taken = blocks_of(model, layers), set[nn.Module]()
    for block in blocks:  # inner ones first
        owners = [module for module in block.modules() if module not in taken]
        taken.update(owners)
        Group(owners, device, host, packed).follow(block)
    return blocks


def in_8_bits(model: Any) -> set[nn.Module]:
    """The layers whose weights --quantize_base fp8 stores in 8 bits, by diffusers' rules for layerwise casting."""
    own = (*(model._skip_layerwise_casting_patterns or ()), *(model._keep_in_fp32_modules or ()), "lora_")
    sensitive = re.compile("|".join((*DEFAULT_SKIP_MODULES_PATTERN, *own)))
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {module for name, module in layers if not sensitive.search(name)}


def offload_activations(model: nn.Module) -> None:
    """Let what autograd keeps of the model's forward pass wait in CPU memory; under gradient checkpointing these are
    the inputs of the blocks. The copies run in the order of the computation, so the host waits for none.
    """
    active: list[saved_tensors_hooks] = []

    def pack(tensor: Tensor) -> Tensor | tuple[Tensor, torch.device]:
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if weight or tensor.nbytes < SMALL or not has_own_memory(tensor.device):
            return tensor
        return on_host(tensor, tensor.device), tensor.device

    def unpack(packed: Tensor | tuple[Tensor, torch.device]) -> Tensor:
        return packed if isinstance(packed, Tensor) else on_device(*packed)

    def enter(*_: Any) -> None:
        active.append(saved_tensors_hooks(pack, unpack))
        active[-1].__enter__()

    def leave(*_: Any) -> None:
        active.pop().__exit__()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


class WithDecoder:
    """The perceptual loss, whose decoder is on the device only while it computes value and gradient."""

    def __init__(self, loss: LatentPerceptualLoss, decoder: Group) -> None:
        self._loss, self._decoder = loss, decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._decoder:
            return self._loss(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


# What the flags ask for ----------------------------------------------------------------------------------------------


def has_own_memory(device: torch.device) -> bool:
    """Whether anything is saved by leaving weights in the CPU's memory."""
    return device.type != "cpu"


def place(part: nn.Module, trained: TrainedParts, config: Config, device: torch.device) -> None:
    """Move a part of the pipeline to the device, or what of it the flags leave there."""
    moves, frozen_encoders = has_own_memory(device), set(trained.family.text_encoders) - set(trained.parts.values())
    if moves and config.optimization.offload_frozen and part in frozen_encoders:
        offload(part, device)
    host, packs = moves and config.lora.group_offload, config.lora.quantize_base == FP8
    if part is trained.denoiser and (host or packs):
        rest_blocks(part, device, host, in_8_bits(part) if packs else (), trained.family.sharded_layers)
    if part in trained.parts.values():
        # All processes have frozen weights, and buffers, which no step changes. DDP would send the former at the
        # start, where stand-ins and torchao's cannot be sent, and the latter before each step: SD 3.5 medium's 0.9 GB.
        same = [name for name, weight in trained.named_parameters() if not weight.requires_grad]
        same += [name for name, _ in trained.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, same)
    if part is trained.denoiser and moves and config.optimization.activation_offload:
        offload_activations(part)
    part.to(device)


def offload_vaes(
    vae: Any, loss: LatentPerceptualLoss | None, optimization: Optimization, device: torch.device
) -> LatentPerceptualLoss | None:
    """With --offload_frozen, let the VAE's encoder and decoder come when they run, and LPL's decoder with the loss.

    Called once nobody looks into the VAE any more. Returns the loss to use.
    """
    if not (optimization.offload_frozen and has_own_memory(device)):
        return loss
    groups = {}
    for half in (vae.encoder, vae.decoder, *([cast(Any, loss.vae).decoder] if loss is not None else [])):
        if half not in groups:
            groups[half] = Group(half.modules(), device)
            groups[half].follow(half)
    return loss and cast(LatentPerceptualLoss, WithDecoder(loss, groups[cast(Any, loss.vae).decoder]))
