"""Simulated CUDA on a CPU build of torch: tensors that say they are on cuda:0 and hold their values on the CPU.

Every operator is computed on the CPU. Before that devices are compared as CUDA compares them (a tensor of one number on
the CPU may meet others, and indices may be on the CPU), and where the host would wait for the device, that is noted
with the function of effzoo that caused it.
Import this before torch: the stub of a device has to be there first.
"""

import ctypes
import importlib.util
import os
import sys
from collections import Counter

from library import library

ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402

aten = torch.ops.aten
PACKAGE = os.path.dirname(importlib.util.find_spec("effzoo").origin) + os.sep
WAITS: Counter[str] = Counter()  # "file of effzoo: function: what waits"

READS = {  # operators whose result the host has to know: a number, or a shape
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default, aten.repeat_interleave.Tensor, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten.linalg_qr.default, aten._linalg_svd.default, aten.linalg_inv_ex.default,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
CROSSING = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.lift_fresh.default,
    aten.set_.source_Tensor,
    aten.detach.default,
}


class Mixed(RuntimeError):
    """An operator got tensors on the CPU and on the device."""


class Cuda(torch.Tensor):
    """A tensor that says it is on cuda:0."""

    @staticmethod
    def __new__(cls, real):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device="cuda:0",
        )
        made.host_ = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Cuda({self.host_})"

    def tolist(self):
        _waits("tolist")
        return self.host_.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = Cuda(self.host_.clone())
            memo[id(self)] = (
                torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new
            )
        return memo[id(self)]


class Machine(TorchDispatchMode):
    """While it is in force, there is a device "cuda"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def on_cpu(x):
    """The values of a tensor of either kind."""
    return x.host_ if isinstance(x, Cuda) else x


def _waits(what):
    """Note a wait, and the innermost function of effzoo that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    where = (
        "elsewhere"
        if frame is None
        else (f"{frame.f_code.co_filename.removeprefix(PACKAGE)}: {frame.f_code.co_qualname}")
    )
    WAITS[f"{where}: {what}"] += 1


def _run(func, args, kwargs):
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on, off = [x for x in given if isinstance(x, Cuda)], [x for x in given if not isinstance(x, Cuda)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if func is aten._pin_memory.default:
        pinned = args[0].clone()
        pinned.pinned = True
        return pinned
    if on and off and func not in CROSSING:
        _compare(func, args, off)
    name = func.overloadpacket.__name__
    if on and func in READS:
        _waits(name)
    if on and func in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype == torch.bool and isinstance(x, Cuda) for x in indices):
            _waits(f"{name} with a mask")
        if not all(isinstance(x, Cuda) for x in indices):
            _waits(f"{name} with indices on the CPU")
    to_cuda = bool(on) if device is None else device.type == "cuda"
    crosses = (func is aten._to_copy.default and device is not None and (device.type == "cuda") != bool(on)) or (
        func is aten.copy_.default and bool(on) and bool(off)
    )
    if crosses:
        target = func is aten._to_copy.default or isinstance(args[0], Cuda)
        to_cuda = to_cuda if func is aten._to_copy.default else target
        if not (to_cuda and getattr(off[-1] if off else None, "pinned", False)):
            _waits("copy to the device" if to_cuda else "copy to the host")
    real_args, real_kwargs = pytree.tree_map(_real, (args, kwargs))
    if func is aten._to_copy.default and crosses and real_kwargs.get("dtype") is None:
        out = real_args[0].clone()  # from the CPU to the CPU it would be the same storage
        layout = real_kwargs.get("memory_format")
        out = out if layout in (None, torch.preserve_format) else out.contiguous(memory_format=layout)
    else:
        out = func(*real_args, **real_kwargs)
    if not to_cuda:
        return out
    wrapped = pytree.tree_map_only(torch.Tensor, Cuda, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on else wrapped


def _real(x):
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else on_cpu(x)


def _compare(func, args, off):
    """Raise Mixed where CUDA would refuse these tensors together."""
    if func in INDEXING:
        wrong = [] if isinstance(args[0], Cuda) else [args[0]]
        wrong += [x for x in args[2:3] if isinstance(x, torch.Tensor) and not isinstance(x, Cuda) and x.ndim]
    else:
        wrong = [x for x in off if x.ndim]
    if wrong:
        raise Mixed(f"{func}: {wrong[0].dtype}{list(wrong[0].shape)} on the CPU among tensors on the device")


torch.set_num_threads(1)
torch.__future__.set_swap_module_params_on_conversion(True)
# torch.tensor(numbers, device="cuda") is then made on the CPU and copied, which is seen here
torch._C._set_only_lift_cpu_tensors(True)
torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
torch.cuda._lazy_init = lambda: None
torch.cuda.current_device = lambda: 0
torch.cuda.is_initialized = lambda: True
