"""FSDP2: the trained models in shards, each process with one part of every weight, its gradient and its state.

An accelerate configuration with ``fsdp_version: 2`` asks for it. torch's ``fully_shard`` is called here and not by
``Accelerator.prepare``, which trains on a CPU by DDP instead, and reduces gradients in half precision.

What is trained whole is sharded: a weight is a tensor whose ``full_tensor()`` every process has to ask for. Each
micro-batch reduces its gradients at once, since unreduced ones would be whole in each process. With LoRA the frozen
base is sharded and the few trained weights are not: their gradients are averaged once a step. The VAE, LPL's decoder,
its student and frozen text encoders are whole in each process. Files hold whole tensors, so that a checkpoint goes on
under another engine or number of processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, str_to_bool
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lpl.config import Config
from lpl.training.optimizers import cannot_shard


Item = TypeVar("Item")


@dataclass(frozen=True)
class Sharding:
    """What accelerate's configuration says of FSDP2.

    Args:
        reshard_after_forward: drop gathered weights between forward and backward pass: less memory, one more transfer.
        offload: shards, gradients and optimizer state are in CPU memory.
        mesh: the processes; None: all of accelerate's.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    mesh: DeviceMesh | None = None

    @classmethod
    def asked(cls, accelerator: Accelerator) -> Sharding | None:
        """The sharding that accelerate's configuration asks for; None: none.

        Raises:
            ValueError: for what cannot work, with the line of the configuration.
        """
        if not asks_for_fsdp():
            return None
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "FSDP of version 1 (in accelerate's configuration) is not supported; write fsdp_version: 2 under "
                "fsdp_config, as in examples/accelerate/fsdp2.yaml"
            )
        on_cpu, plugin = accelerator.device.type == "cpu", FullyShardedDataParallelPlugin()
        several = DistributedType.MULTI_CPU if on_cpu else DistributedType.MULTI_GPU
        # From here on accelerate's own FSDP is out of the way; it still has made the processes' group.
        accelerator.state.distributed_type = DistributedType.NO if accelerator.num_processes == 1 else several
        if accelerator.num_processes == 1:
            return None  # there is nobody to share with
        if accelerator.parallelism_config is not None:
            raise ValueError(
                "parallelism_config (in accelerate's configuration) is not supported: all processes share one model; "
                "leave it out"
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing (in accelerate's configuration) is not supported; leave it out, and "
                "give --gradient_checkpointing"
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError("FSDP2 is not supported with --mixed_precision fp16; give bf16 or no")
        return cls(bool(plugin.reshard_after_forward), isinstance(plugin.cpu_offload, CPUOffloadPolicy))

    def shard(self, part: nn.Module, accelerator: Accelerator, layers: Sequence[str] = ()) -> None:
        """Shard a model in place, from the CPU to the device; trained weights of a LoRA stay whole.

        Args:
            layers: classes of the layers that are gathered one by one; empty: those that the model's class names.
        """
        lora = any(not parameter.requires_grad for parameter in part.parameters())
        kept = [parameter for parameter in part.parameters() if parameter.requires_grad] if lora else []
        on_gpu = accelerator.device.type != "cpu"
        half = torch.bfloat16 if accelerator.mixed_precision == "bf16" and not lora else None
        options: dict[str, Any] = {
            "mesh": self.mesh or init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            "reshard_after_forward": self.reshard_after_forward,
            # Timesteps lose their value in half precision, so inputs stay as they are.
            "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if self.offload else OffloadPolicy(),
            "ignored_params": set(kept),
        }
        for parameter in kept:
            parameter.data = parameter.data.to(accelerator.device)
            distributed.broadcast(parameter.data, 0)  # as DDP does: new ones are random
        blocks = blocks_of(part, layers)
        if not blocks:
            raise ValueError(
                f"FSDP2 (in accelerate's configuration): {type(part).__name__} does not say which of its layers can "
                "be gathered one by one; launch with --multi_gpu"
            )
        # Flux's blocks do, and nothing changes what they return: each family trains as in one process (a test)
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(part, **options)
        for module in part.modules():  # of ignored parameters' modules, and what no parameter brings along
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(accelerator.device))


def asks_for_fsdp() -> bool:
    """Whether accelerate's configuration asks for FSDP, of whatever version."""
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def check_sharding(sharding: Sharding | None, config: Config) -> None:
    """Refuse what cannot be sharded.

    Raises:
        ValueError: with the flag to change.
    """
    if sharding is None:
        return
    optimization, lora = config.optimization, config.lora
    if optimization.torch_compile:
        raise ValueError(
            "--torch_compile is not supported with FSDP2 (in accelerate's configuration); leave the flag out, or "
            "launch with --multi_gpu"
        )
    if optimization.channels_last:
        raise ValueError(
            "--channels_last is not supported with FSDP2 (in accelerate's configuration), which shards contiguous "
            "weights; leave the flag out, or launch with --multi_gpu"
        )
    if lora.quantize_base:
        raise ValueError(
            f"--quantize_base {lora.quantize_base}: FSDP2 (in accelerate's configuration) shards no quantised base; "
            "leave the flag out, or launch with --multi_gpu"
        )
    if optimization.activation_offload:
        raise ValueError(
            "--activation_offload: with FSDP2 (in accelerate's configuration) it would move gathered weights too; "
            "leave the flag out"
        )
    if lora.group_offload:
        raise ValueError(
            "--group_offload: FSDP2 (in accelerate's configuration) gathers the blocks by itself; leave the flag out, "
            "and write fsdp_offload_params: true there for shards in CPU memory"
        )
    if not lora.lora and cannot_shard(optimization):
        given = "--use_8bit_adam" if optimization.use_8bit_adam else f"--optimizer {optimization.optimizer}"
        raise ValueError(f"{given}: it cannot update sharded weights; leave the flag out, or train --lora")
    if config.model.non_ema_revision and optimization.use_ema:
        raise ValueError(
            "--non_ema_revision: with FSDP2 (in accelerate's configuration) the moving average starts from the "
            "trained weights; leave out --non_ema_revision, or --use_ema"
        )
    if optimization.offload_ema and sharding.offload:
        raise ValueError(
            "--offload_ema: the shards are in CPU memory already, as fsdp_offload_params in accelerate's "
            "configuration says; leave the flag out"
        )


def blocks_of(model: nn.Module, layers: Sequence[str] = ()) -> list[nn.Module]:
    """The layers that are gathered one by one, inner ones first."""
    names: Any = layers or getattr(model, "_no_split_modules", None) or getattr(model, "_repeated_blocks", None) or ()
    found = [module for module in model.modules() if type(module).__name__ in names]
    return [module for module in reversed(found) if next(module.parameters(), None) is not None]


def called_in_precision(trained: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The trained parts with calls under autocast, as accelerate makes them for DDP."""
    plain = trained.forward

    def forward(*inputs: Any) -> Tensor:
        with accelerator.autocast():
            output: Tensor = plain(*inputs)
        return output.view_as(output)  # whose gradient (BatchLosses.compare_gradients) calls no hook of the shards

    trained.forward = forward  # type: ignore[method-assign]
    return trained


def reshard(trained: nn.Module) -> None:
    """Drop gathered weights, which calls without a backward pass may have left: the shards alone are ever changed."""
    for module in trained.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def plain_class(model: nn.Module) -> Any:
    """A model's class, which ``fully_shard`` replaces by a subclass of it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each tensor what this process has of it: they share their memory."""
    return [cast(DTensor, each.detach()).to_local() if isinstance(each, DTensor) else each for each in tensors]


def whole(value: Any, keep: bool = True) -> Any:
    """A nest of dicts and lists with whole tensors for the sharded ones, in CPU memory. Called by every process.

    Args:
        keep: False: nobody needs it here; a sharded tensor becomes None.
    """
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    if not isinstance(value, DTensor):
        return value
    full = cast(DTensor, value.detach()).full_tensor()
    return full.cpu() if keep else None


def like(whole: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor in shards like another tensor, if that one is sharded, or with its strides, which fused kernels
    expect of the state of a weight; a number stays what it is.

    Raises:
        ValueError: for a part of an optimizer's state with another shape than its sharded weight.
    """
    if not isinstance(sharded, DTensor):
        if whole.shape != sharded.shape or whole.stride() == sharded.stride():
            return whole
        return torch.empty_like(sharded, dtype=whole.dtype, device=whole.device).copy_(whole)
    if whole.ndim == 0:
        return whole
    if whole.shape != sharded.shape:
        raise ValueError("--optimizer: its state cannot be sharded; resume without FSDP2, or with another optimizer")
    whole = whole.to(sharded.device_mesh.device_type)
    found = distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return cast(Tensor, found.to(sharded.device))


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole weights into a model, which may be sharded.

    Raises:
        RuntimeError: for weights of other layers.
    """
    own = model.state_dict()
    model.load_state_dict({name: like(value, own[name]) if name in own else value for name, value in state.items()})


def everywhere(flag: Tensor, sharded: bool) -> Tensor:
    """Whether a flag is true in every process; each knows its shards only."""
    if sharded:
        numbers = flag.to(torch.int32)
        distributed.all_reduce(numbers, distributed.ReduceOp.MIN)
        return numbers.bool()
    return flag


def plain_copy(model: nn.Module, keep: bool) -> nn.Module:
    """A sharded model as one of its plain class, with whole weights in CPU memory. Called by every process.

    Args:
        keep: False: nobody needs it here, and it has no weights.
    """
    state = whole(model.state_dict(), keep)
    kind, config = plain_class(model), cast(Any, model).config
    with torch.device("meta"):
        copy = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    if keep:
        copy.load_state_dict(state, assign=True)
    return copy


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Average the gradients of weights that each process has whole, as DDP would have done."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or accelerator.num_processes == 1:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    averaged = cast(Tensor, accelerator.reduce(flat, "mean"))
    for gradient, part in zip(gradients, averaged.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def in_step(
    items: Iterator[Item], spare: Callable[[], Item], accelerator: Accelerator, sharded: bool
) -> Iterator[tuple[Item, bool]]:
    """Yields items; where models are sharded, as long as any process has some, since each call needs every process.

    Args:
        spare: gives an item for a process that has none at all.

    Yields:
        An item, and whether it is this process's own: one that has no more gets its last one again.
    """
    if not sharded:
        yield from ((item, True) for item in items)
        return
    last: list[Item] = []
    while True:
        found = next(((item,) for item in items), None)
        mine = torch.tensor([float(found is not None)], device=accelerator.device)
        if not cast(Tensor, accelerator.reduce(mine, "sum")).item():
            return
        last = [found[0]] if found is not None else last or [spare()]
        yield last[0], found is not None
