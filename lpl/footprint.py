"""How much memory a call of the loss takes, counted on meta tensors, which have shapes but no numbers.

The whole call runs on a copy of the VAE without weights: both decodes, the terms and the decoder's backward pass. The
count is that of a GPU's operators, without what the allocator and the convolutions' workspaces add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Footprint:
    """The memory of what ran: the peak in bytes, and the elements of the largest tensor."""

    peak: int = 0
    largest: int = 0


def footprint(run: Callable[[], Any], given: Iterable[Tensor]) -> Footprint:
    """Count what ``run`` allocates, beyond the tensors that it is given."""
    counter = _Counter({tensor.untyped_storage()._cdata for tensor in given})
    with counter:
        run()
    return counter.found


@dataclass
class _Counter(TorchDispatchMode):
    """Follows the memory of every tensor that an operator returns until it is released."""

    given: set[int]
    found: Footprint = field(default_factory=Footprint)

    def __post_init__(self) -> None:
        super().__init__()
        self._live: set[int] = set()
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        self.found.largest = max(self.found.largest, tensor.numel())
        memory = tensor.untyped_storage()
        key, size = memory._cdata, memory.nbytes()
        if key in self._live or key in self.given:
            return
        self._live.add(key)
        self._bytes += size
        self.found.peak = max(self.found.peak, self._bytes)
        finalize(memory, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._bytes -= size
