"""One of several GPUs under FSDP2, for :mod:`lpl.diagnosis.estimate`: the other processes are not there.

torch's own ``fully_shard`` cuts models without data into shards, and its own hooks gather and reduce them, in a group
of processes that send nothing. FSDP2 asks torch for the device, which has to be there. So tensors are on the host for
it, and for the denoiser; LPL, in which nothing is sharded, finds them on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.testing._internal.distributed.fake_pg import FakeStore

from lpl.diagnosis.counting import HOST, Counting
from lpl.diagnosis.without_weights import OneGpu
from lpl.loss import LatentPerceptualLoss
from lpl.training.sharding import Sharding


DEVICE: Any = FakeTensor.device  # where they are computed


class Shard(OneGpu):
    """One of several GPUs with FSDP2."""

    def __init__(self, mixed_precision: str, processes: int, sharding: Sharding) -> None:
        super().__init__(mixed_precision, processes)
        self.sharding = sharding

    def prepare(self, optimizer: Any) -> Any:  # type: ignore[override]
        optimizer.optimizer = optimizer
        return optimizer


@contextmanager
def other_processes(sharding: Sharding, processes: int) -> Iterator[Sharding]:
    """Within, there are other processes, which do nothing; yields the sharding over all of them.

    Entered before :class:`Counting`, since torch reads who takes part.
    """
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        # torch keeps what it finds out of a mesh's tensors, for equal meshes too: named, this one equals no real one.
        yield replace(sharding, mesh=init_device_mesh(HOST.type, (processes,), mesh_dim_names=("counted",)))
    finally:
        distributed.destroy_process_group()


@contextmanager
def on_host(counting: Counting) -> Iterator[None]:
    """Within :func:`as_on_gpu`, tensors are on the host, except for LPL; gathered weights are counted as long as FSDP2
    keeps their memory; and shards that rest in the CPU's memory are copied to the GPU before they are gathered."""
    gpu, inputs, resize = FakeTensor.device, cast(Any, FSDPParam.all_gather_inputs), torch.UntypedStorage.resize_

    def on_gpu(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _replaced(FakeTensor, "device", gpu):
                return method(*args, **kwargs)

        return run

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        counting.resized(storage)
        return storage

    def copied(shard: FSDPParam) -> list[Tensor]:
        return [each.clone() if counting.rests(each) else each for each in inputs.fget(shard)]

    with (
        _replaced(FakeTensor, "device", DEVICE),
        _replaced(torch.UntypedStorage, "resize_", resized),
        _replaced(FSDPParam, "all_gather_inputs", property(copied)),
        _replaced(LatentPerceptualLoss, "__call__", on_gpu(LatentPerceptualLoss.__call__)),
        _replaced(LatentPerceptualLoss, "samples_at_once", on_gpu(LatentPerceptualLoss.samples_at_once)),
    ):
        yield


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    """Within, an attribute of a class is another one."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
