"""Counts memory and operations of code that runs without a GPU, without weights, and without computing anything.

Within :class:`Counting`, new tensors have shapes and no data (torch's fake tensors), and so has whatever is computed
from one; a tensor that exists already, and what is computed from such tensors alone, is real and stands for the host.
The mode follows each storage from its first tensor to its last, which on a GPU is what the allocator does, and adds up
the operations of matrix products, convolutions and attention by torch's own formulas.

Within :class:`AsOnGpu`, fake tensors answer that they are on a GPU, and autocast and attention choose as they do
there, so that what a backward pass keeps has the sizes that it would have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


BLOCK = 512  # bytes that the allocator on a GPU rounds up to
GPU, HOST = torch.device("cuda"), torch.device("cpu")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: libraries keep tensors from one use to the next
KNOWN: dict[Any, list[Any]] = {}  # shapes, strides and dtypes of what a call gives, by all that it depends on
aten = torch.ops.aten
attention = aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


class Counting(TorchDispatchMode):
    """Counts bytes and operations within.

    Args:
        fake: nothing is computed; False: all tensors are real, for comparison.

    Attributes:
        current, peak: bytes of live storages, now and at most since :meth:`reset`.
        host: bytes of live storages in the CPU's memory, which are not counted otherwise: pinned, or :meth:`offload`.
        operations: floating-point operations since :meth:`reset`, a multiplication and its addition being two.
    """

    shaping = 0  # torch is working out shapes, and has to see where the tensors are

    def __init__(self, fake: bool = True) -> None:
        super().__init__()
        self.fake = FAKE if fake else None
        self.current = self.peak = self.operations = self.host = 0
        self._live: dict[int, int] = {}  # bytes of a storage by its id
        self._resting: dict[int, int] = {}  # of those in the CPU's memory

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # the wrapper that torch puts around costs more than the rest
        return False

    def reset(self) -> None:
        """Start to count the peak and the operations of what follows."""
        self.peak, self.operations = self.current, 0

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """No longer count some tensors, which are elsewhere than on the device."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            self.current -= self._live.get(key, 0)
            self._live[key] = 0

    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Count some tensors, and what shares their memory, as the CPU's."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            size, self._live[key] = self._live.get(key, 0), 0
            self._resting[key] = self._resting.get(key, 0) + size
            self.current, self.host = self.current - size, self.host + size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, of which torch has freed or allocated the memory in place."""
        key = id(storage)
        if key in self._live:
            before, self._live[key] = self._live[key], _in_blocks(storage)
            self.current += self._live[key] - before
            self.peak = max(self.peak, self.current)

    def rests(self, tensor: Tensor) -> bool:
        """Whether it is in the CPU's memory."""
        return self._resting.get(id(tensor.untyped_storage()), 0) > 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with its shards
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if pinned := bool(kwargs.get("pin_memory")):
            kwargs = kwargs | {"pin_memory": False}
        if func is aten._pin_memory.default:
            func, pinned = aten.clone.default, True
        if self.fake is None:
            out = func(*args, **kwargs)
        else:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            fakes = [x for x in given if isinstance(x, FakeTensor)]
            if given and not fakes:
                return func(*args, **kwargs)
            if func in READ:
                return READ[func](given[0])
            Counting.shaping += 1
            try:
                out = self._shaped(func, args, kwargs, len(fakes) == len(given) > 0)
            finally:
                Counting.shaping -= 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and isinstance(tensor, FakeTensor) == (self.fake is not None):
                self._hold(tensor, pinned)
        count = OPERATIONS.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=out)
        return out

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], only_fakes: bool) -> Any:
        """What an operation gives, by shapes; torch works them out once for all calls that are alike."""
        assert self.fake is not None
        kind = _kind(func)
        if kind is Kind.IN_PLACE and only_fakes:
            return args[0] if func._schema.returns else None
        if kind is Kind.VIEW and only_fakes:
            with in_kernel_invocation_manager(self.fake):
                out = func(*args, **kwargs)
            return list(map(self._made, out)) if isinstance(out, list | tuple) else self._made(out)
        key = (func, _alike(args), _alike(kwargs)) if kind is Kind.NEW and only_fakes else None
        if key is not None and (shapes := KNOWN.get(key)) is not None:
            made = [
                shape and self._made(torch.empty_strided(*shape[:2], dtype=shape[2], device="meta"))
                for shape in shapes
            ]
            return tuple(made) if len(made) > 1 else made[0]
        with self.fake:
            out = func(*args, **kwargs)
        if key is not None:
            outs = out if isinstance(out, tuple | list) else (out,)
            if all(x is None or x.device == HOST for x in outs):
                KNOWN[key] = [None if x is None else (x.shape, x.stride(), x.dtype) for x in outs]
        return out

    def _made(self, meta: Tensor) -> FakeTensor:
        return FakeTensor(FAKE, meta, HOST)

    def _hold(self, tensor: Tensor, pinned: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live:
            return
        size = self._live[key] = _in_blocks(storage)
        weakref.finalize(storage, self._free, key).atexit = False
        self.current += size
        if pinned:
            self.offload([tensor])
        self.peak = max(self.peak, self.current)

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key)
        self.host -= self._resting.pop(key, 0)


def _in_blocks(storage: torch.UntypedStorage) -> int:
    """Bytes, as an allocator rounds them up."""
    return -(-storage.nbytes() // BLOCK) * BLOCK


def _value(tensor: Tensor) -> bool | int | float:
    """What the host reads where there is no data: all is well, and nothing was skipped."""
    return True if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


class Kind(Enum):
    """How an operation's results share memory with what it is given."""

    NEW, VIEW, IN_PLACE, OTHER = range(4)


@cache
def _kind(func: Any) -> Kind:
    schema = func._schema
    aliases = [part.alias_info for part in (*schema.arguments, *schema.returns)]
    name = schema.name.split("::")[1]
    if func in IN_PLACE or (name.endswith("_") and name not in ("resize_", "set_") and len(schema.returns) == 1):
        return Kind.IN_PLACE
    if not any(aliases) and not schema.name.startswith("fsdp::"):  # whose results are views, untold
        plain = all(str(returned.type) in ("Tensor", "Optional[Tensor]") for returned in schema.returns)
        return Kind.NEW if plain and schema.returns else Kind.OTHER
    views = not any(alias and alias.is_write for alias in aliases) and name in VIEWS
    return Kind.VIEW if views else Kind.OTHER


def _alike(value: Any) -> Any:
    """A key that calls with other tensors of the same shapes have too."""
    if isinstance(value, FakeTensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_alike, value))
    if isinstance(value, dict):
        return tuple((name, _alike(item)) for name, item in value.items())
    return type(value), value


VIEWS = {
    *("view", "t", "transpose", "permute", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "alias"),
    *("split", "split_with_sizes", "unbind"),
}
READ: Mapping[Any, Callable[[Tensor], Any]] = {
    aten._local_scalar_dense.default: _value,
    aten.is_nonzero.default: _value,
    aten.equal.default: lambda tensor: True,
}
IN_PLACE = (aten._fused_adamw_.tensor_lr,)  # which torch has no shapes for
OPERATIONS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    attention: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape),
    attention_backward: lambda g, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}


# As on a GPU ---------------------------------------------------------------------------------------------------------

IN_FLOAT32 = {  # under CUDA's autocast; a CPU's leaves them in the precision of their input
    *(F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.rms_norm, torch.rms_norm),
    *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax, F.softplus),
    *(torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, Tensor.square),
    *(torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal, torch.norm, Tensor.norm),
    *(torch.sum, Tensor.sum, torch.prod, Tensor.prod, torch.cumsum, Tensor.cumsum),
} - {Tensor.square}
AS_GIVEN = {F.interpolate}  # a CPU's autocast has them in float32


class AsOnGpu(TorchFunctionMode):
    """Within, fake tensors behave as on a GPU where Python code or autocast asks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:  # torch remembers what it finds by a device's name
            return func(*args, **kwargs)
        args = tuple(map(_on_host, args))
        kwargs = {str(name): _on_host(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") and (func in IN_FLOAT32 or func in AS_GIVEN):
            if func in IN_FLOAT32:
                args = tuple(map(_in_float32, args))
                kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _on_host(value: Any) -> Any:
    """An argument, of which a device on the GPU becomes the one that computes here."""
    if isinstance(value, torch.device):
        return HOST if value.type == GPU.type else value
    return HOST if isinstance(value, str) and value.startswith(GPU.type) else value


def _in_float32(values: Any) -> Any:
    if isinstance(values, tuple | list):
        return type(values)(map(_in_float32, values))
    low = isinstance(values, Tensor) and values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if low else values


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that keeps its output and one number per query, as the GPU's kernels do."""
    if query.ndim < 4:  # the GPU's kernels take none of these; the weights of all keys are kept
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal)[0]
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        lowest = torch.zeros((), dtype=query.dtype)
        attn_mask = torch.where(attn_mask, lowest, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    return attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, fake tensors behave as on a GPU, also where a backward pass recomputes, and autocast for the GPU is that
    of the device that computes here."""
    original, run, device = torch.autocast, torch.autograd._engine_run_backward, FakeTensor.device
    place = torch.UntypedStorage.data_ptr

    class Autocast(original):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(_on_host(device_type).type if device_type == GPU.type else device_type, *args, **kwargs)

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with AsOnGpu():  # torch leaves the mode when it calls a backward pass
            return run(*args, **kwargs)

    torch.autocast = Autocast  # type: ignore[misc]
    FakeTensor.device = property(lambda self: device.fget(self) if Counting.shaping else GPU)  # type: ignore[assignment]
    torch.UntypedStorage.data_ptr = lambda self: id(self) if self.device.type == "meta" else place(self)
    torch.autograd._engine_run_backward = run_backward
    try:
        with AsOnGpu():
            yield
    finally:
        torch.autocast = original  # type: ignore[misc]
        torch.autograd._engine_run_backward, torch.UntypedStorage.data_ptr = run, place
        FakeTensor.device = device  # type: ignore[assignment]
