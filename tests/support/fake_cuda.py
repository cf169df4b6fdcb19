"""A CUDA device without data, on a CPU build of torch: finds each place where the host would wait for the device.

    fake_cuda_library.load(library)   # in a process of its own, before torch is imported
    with FakeCuda() as device: ...    # within, torch.cuda.is_available()
    device.waits                      # one Wait for each time that the host would have waited

CPU tensors stay real, CUDA tensors are torch's fake tensors: shape, dtype and device. A mix of devices raises an
error, as on a GPU. A value read on the host is 0, or True, and a tensor copied to it has zeros.

A *wait* is a value read on the host, an operation whose shape depends on values, a blocking copy, or an explicit
synchronisation. A copy to the device is blocking without ``non_blocking``, or if it is larger than SMALL and comes
from memory that is not pinned. Real kernels, numerics and operations without a CUDA kernel are not covered.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves


SMALL = 64 * 1024  # bytes; CUDA queues such copies without waiting, pinned or not


aten = torch.ops.aten
READS_VALUES = {
    *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default),
    *(aten.unique_consecutive.default, aten.equal.default, aten.is_nonzero.default, aten.bincount.default),
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
IN_PLACE = {aten._fused_adamw_.tensor_lr, aten._fused_adam_.tensor_lr}  # without a kernel for fake tensors


class Shapes(FakeTensorMode):
    """Computes the shapes of results, and does not look for a real device."""

    avoid_device_init = True


def on_cuda(value):
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


class FakeCuda(TorchDispatchMode):
    """The device while the context lasts.

    ``fused_updates`` counts the calls of fused optimizers: without one, nothing was trained.

    Args:
        listening: whether waits are recorded; may be changed at any time.
    """

    def __init__(self, listening=True):
        super().__init__()
        self.listening, self.waits, self.fused_updates = listening, [], 0
        self.shapes = Shapes(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self._pinned = {}  # by address; kept, so that no address is used twice

    def __enter__(self):
        self._patches = ExitStack()
        answers = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "Fake CUDA",
            "synchronize": lambda device=None: self._wait("explicit synchronisation"),
            "empty_cache": lambda: None,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "get_rng_state_all": list,
            "_lazy_init": lambda: None,
        }
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **answers))
        self._patches.enter_context(mock.patch.multiple(torch.cuda, Stream=FakeStream, stream=FakeStream.current))
        self._patches.enter_context(mock.patch.object(torch.cuda, "current_stream", FakeStream))
        self._patches.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        self._patches.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy like others
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        self._patches.close()
        return super().__exit__(*error)

    def _wait(self, what):
        if self.listening:
            frames = frames_here()
            place = f"{frames[0][1].f_code.co_filename}:{frames[0][1].f_lineno}" if frames else "backward pass"
            self.waits.append(Wait(what, tuple(name for name, _ in frames), place))

    # Pinned memory

    def _pin(self, tensor):
        pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def _is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._pinned

    # Operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return self._pin(args[0])
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **kwargs | {"pin_memory": False}))
        device = kwargs.get("device")
        cuda = any(map(on_cuda, arg_tree_leaves(*args, **kwargs)))
        if not cuda and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait("a value is read on the host")
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func in READS_VALUES or (func is aten.repeat_interleave.Tensor and "output_size" not in kwargs):
            self._wait("the shape or the result depends on values")
        if func in INDEXING:
            self._check_indices(func, *args)
        if func is aten._to_copy.default:
            source, target = args[0], torch.device(device or args[0].device)
            non_blocking = kwargs.get("non_blocking", False)
            if target.type == "cpu":
                if not non_blocking:
                    self._wait(f"a copy to the host, {tuple(source.shape)}")
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            self._check_upload(source, non_blocking)
        elif func is aten.copy_.default:
            target, source, non_blocking = (*args, kwargs.get("non_blocking", False))[:3]
            if not on_cuda(target):
                if not (non_blocking and self._is_pinned(target)):
                    self._wait(f"a copy to the host, {tuple(source.shape)}")
                return target
            self._check_upload(source, non_blocking)
        if func in IN_PLACE:
            _check_devices(arg_tree_leaves(*args, **kwargs))
            self.fused_updates += 1
            return None
        return self.shapes.dispatch(func, (), args, kwargs)

    def _check_upload(self, source, non_blocking):
        if not on_cuda(source) and source.numel():
            pageable = source.nbytes > SMALL and not self._is_pinned(source)
            if not non_blocking or pageable:
                kind = "a copy from memory that is not pinned" if non_blocking else "a blocking copy"
                self._wait(f"{kind} to the device, {tuple(source.shape)}")

    def _check_indices(self, func, values, indices, *others):
        for index in indices:
            if index is not None and not on_cuda(index):
                self._wait(f"a blocking copy of an index to the device, {tuple(index.shape)}")
            elif index is not None and index.dtype in (torch.bool, torch.uint8):
                self._wait("a mask is read on the host")


class FakeStream:
    """A stream; there is nothing to wait for."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        torch.cuda.synchronize()

    @staticmethod
    def current(stream):
        return ExitStack()


_torch_apply = torch.nn.Module._apply


def _apply(self, fn, recurse=True):
    """Module.to: torch would swap fake parameters, which fails where something has a weak reference to one."""
    if not any(isinstance(parameter, FakeTensor) for parameter in self.parameters()):
        return _torch_apply(self, fn, recurse)
    moved = {}  # by the old one, which several modules may share
    for module in self.modules():
        for name, old in module._parameters.items():
            if old is not None and old not in moved:
                with torch.no_grad():
                    new = fn(old)
                moved[old] = old if new is old else torch.nn.Parameter(new, old.requires_grad)
            module._parameters[name] = moved.get(old)
        for name, old in module._buffers.items():
            module._buffers[name] = None if old is None else fn(old)
    return self


def _check_devices(values):
    devices = {str(value.device) for value in values if isinstance(value, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"a fused optimizer got tensors on {' and '.join(sorted(devices))}")


@dataclass(frozen=True)
class Wait:
    """One place where the host waits.

    Args:
        what: in words.
        frames: ``module:function`` of each Python frame, the innermost first; torch's own are left out.
        place: file and line of the innermost of them.
    """

    what: str
    frames: tuple[str, ...]
    place: str


def frames_here():
    """The Python frames outside torch, the innermost first: names and frame objects."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in (__name__, "contextlib") and module.split(".")[0] not in ("torch", "<string>"):
            found.append((f"{module}:{frame.f_code.co_qualname}", frame))
        frame = frame.f_back
    return found
