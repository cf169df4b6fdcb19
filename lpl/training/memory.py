"""Less memory on the device: frozen weights that are there only while they are used.

A *group* is a set of frozen weights that are used together: those of a block of the denoiser, of a text encoder's
block, of the VAE's encoder. While nobody uses it, its weights *rest* in pinned CPU memory, and each parameter of its
modules is a stand-in, one NaN in the parameter's shape. Weights never change, so nothing is copied back.

Autograd keeps a weight that a backward pass needs. Under gradient checkpointing that is once the block is computed
again, so that the weights of about one block are on the device at a time, in both passes.

diffusers' hooks (``enable_group_offload``) are for inference. They move trained weights with the frozen ones; they put
``.data`` elsewhere that autograd has saved; and a block stays on the device where its recomputation ends early.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpl.config import Config
from lpl.config.groups import Optimization
from lpl.loss import LatentPerceptualLoss
from lpl.training.parts import TrainedParts
from lpl.training.sharding import blocks_of


class Group:
    """Frozen weights that are on a device only within this context, which may be entered again within itself.

    Args:
        owners: the modules whose own parameters they are; trained parameters stay as they are.
    """

    def __init__(self, owners: Iterable[nn.Module], device: torch.device) -> None:
        self.device, self.users = device, 0
        rested: dict[nn.Parameter, tuple[Tensor, nn.Parameter]] = {}  # modules may share a weight
        self.places: list[tuple[nn.Module, str, Tensor, nn.Parameter]] = []
        for owner in owners:
            for name, weight in owner.named_parameters(recurse=False):
                if not weight.requires_grad:
                    if weight not in rested:
                        rested[weight] = on_host(weight.detach()), _stand_in(weight, device)
                    self.places.append((owner, name, *rested[weight]))
        self._rest()

    def _rest(self) -> None:
        for owner, name, _, stand_in in self.places:
            owner._parameters[name] = stand_in

    def __enter__(self) -> Self:
        self.users += 1
        if self.users == 1:
            here: dict[int, nn.Parameter] = {}
            for owner, name, weight, _ in self.places:
                if id(weight) not in here:
                    here[id(weight)] = nn.Parameter(on_device(weight, self.device), requires_grad=False)
                owner._parameters[name] = here[id(weight)]
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


def on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory of the CPU; the host does not wait for it."""
    pinned = tensor.device.type == "cuda" or torch.cuda.is_available()
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
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
    blocks = offload_blocks(model, device)
    within = set(chain.from_iterable(block.modules() for block in blocks))
    for module in model.modules():
        if module not in within and any(True for _ in module.parameters(recurse=False)):
            Group([module], device).follow(module)
    return model.to(device)  # buffers


def offload_blocks(model: nn.Module, device: torch.device) -> Sequence[nn.Module]:
    """Let the frozen weights of each block come when it runs; returns the blocks. All else stays where it is."""
    blocks, taken = blocks_of(model), set[nn.Module]()
    for block in blocks:  # inner ones first
        owners = [module for module in block.modules() if module not in taken]
        taken.update(owners)
        Group(owners, device).follow(block)
    return blocks


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
    """Move a part of the pipeline to the device, or what --offload_frozen and --group_offload leave there of it."""
    moves = has_own_memory(device)
    if moves and config.optimization.offload_frozen and part in trained.family.text_encoders:
        if part not in trained.parts.values():
            offload(part, device)
    elif moves and config.lora.group_offload and part is trained.denoiser:
        offload_blocks(part, device)
        # DDP would send the stand-ins to all processes.
        frozen = [name for name, weight in trained.named_parameters() if not weight.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, frozen)
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
