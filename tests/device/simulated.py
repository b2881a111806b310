"""An accelerator that is none: tensors on `sim:0` and `sim:1` compute real numbers, and refuse what a GPU refuses.

A tensor of it is a plain `torch.Tensor` of the device type that torch keeps for others (PrivateUse1): sizes, views,
versions, autograd and modules are torch's own. Its memory is the host's: a DLPack capsule says where it lies and on
which device, and the same capsule with the device changed is the CPU's tensor of the same memory. Every operation that
torch has not made of smaller ones falls back to one function, which refuses what is on two devices, computes on the
CPU, and says that the result is on the device. Nothing is compiled.

`register()` is for a process of its own: torch knows one such device, and for good. What differs from a GPU: random
numbers come from the CPU's generator, so that a job can be compared with the CPU's; operations happen at once.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "sim"
COUNT = 2
_CPU, _OURS = 1, 12  # DLPack's numbers of device types: kDLCPU, kDLExtDev
_KEY = "PrivateUse1"
_WIDE = (torch.float64, torch.complex128)
_NO_FLOAT64 = (  # word for word what MPS says
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
_HERE = str(Path(__file__))


@dataclass(frozen=True)
class Sync:
    """The host waited for the device: `kind`, the operation, and the lines of Python that led there, innermost first.

    Kinds: `item` a number was read (item, bool, float, a check of an inverse), `copy` a tensor was read by the host,
    `size` the result's size is known only when it is computed (nonzero, a mask as index), `solver` a decomposition
    whose kernel waits for itself (svd, eigh), `upload` pageable host memory was copied to the device, which waits too.
    """

    kind: str
    operation: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation} at {' < '.join(self.lines[:4])}"


@dataclass
class State:
    """What the device is to refuse and to count at present."""

    float64: bool = True
    counting: list[list[Sync]] = field(default_factory=list)
    seen: list[Counter[str]] = field(default_factory=list)


STATE = State()


@contextmanager
def without_float64() -> Iterator[None]:
    """The device has no float64, as MPS has none, nor decompositions: TypeError, NotImplementedError on them."""
    before, STATE.float64 = STATE.float64, False
    try:
        yield
    finally:
        STATE.float64 = before


class Syncs(list[Sync]):
    """What was counted; `waits` leaves out uploads and the solvers that wait for themselves."""

    @property
    def waits(self) -> list[Sync]:
        return [sync for sync in self if sync.kind in ("item", "copy", "size")]

    def table(self) -> str:
        """One line per place, the most frequent first."""
        return "\n".join(f"{count:6d}  {text}" for text, count in Counter(map(str, self)).most_common())


@contextmanager
def host_syncs() -> Iterator[Syncs]:
    """Collects every wait of the host for the device inside the block."""
    found = Syncs()
    STATE.counting.append(found)
    try:
        yield found
    finally:
        STATE.counting.remove(found)


@contextmanager
def operations() -> Iterator[Counter[str]]:
    """Counts what the device computes inside the block, by the names of torch's operations."""
    found: Counter[str] = Counter()
    STATE.seen.append(found)
    try:
        yield found
    finally:
        STATE.seen.remove(found)


def _waited(kind: str, operation: str) -> None:
    if not STATE.counting:
        return
    sync = Sync(kind, operation, tuple(_lines()))
    for found in STATE.counting:
        found.append(sync)


def _lines() -> Iterator[str]:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != _HERE and "/torch/" not in name:
            yield f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back


# one memory, two names


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Managed(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", _Device)]


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _renamed(tensor: Tensor, kind: int, index: int) -> Tensor:
    capsule = torch._C._to_dlpack(tensor)
    device = _Managed.from_address(_pointer(capsule, b"dltensor")).device
    device.type, device.index = kind, index
    return torch._C._from_dlpack(capsule)


def host(tensor: Tensor) -> Tensor:
    """The CPU's tensor of the same memory."""
    return _renamed(tensor, _CPU, 0)


def ours(tensor: Tensor, index: int) -> Tensor:
    """The device's tensor of the same memory."""
    if tensor.dtype in _WIDE and not STATE.float64:
        raise TypeError(_NO_FLOAT64)
    return _renamed(tensor.resolve_conj().resolve_neg(), _OURS, index)


def _is_ours(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _index(device: torch.device | None) -> int:
    index = device.index if device is not None and device.index is not None else 0
    if not 0 <= index < COUNT:
        raise RuntimeError(f"{NAME} error: invalid device ordinal {index}")
    return index


# Operations on sizes and storages alone: the CPU's kernels serve, and keep the device.
_BY_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _set(target: Tensor, source: Any, offset: int, size: Any, stride: Any = ()) -> Tensor:
    """`target` over the storage, or the storage of the tensor, `source`."""
    storage = source.untyped_storage() if isinstance(source, Tensor) else source
    return torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_BY_CPU, target, storage, offset, size, stride)


def _view(source: Tensor, seen: Tensor) -> Tensor:
    """The device's view of `source` that lies where the CPU's view of it lies."""
    start = source.data_ptr() - source.storage_offset() * source.element_size()
    offset = (seen.data_ptr() - start) // seen.element_size() if seen.numel() else 0
    empty = ours(torch.empty(0, dtype=seen.dtype), source.device.index)
    return _set(empty, source, offset, seen.shape, seen.stride())


# operations

_SIZED = {
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "_unique",
    "unique_consecutive",
    "unique_dim_consecutive",
}
_SIZED |= {"bincount", "equal", "repeat_interleave", "argwhere"}
_SOLVERS = {"_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals", "linalg_lstsq"}
_MISSING = {"linalg_qr", "geqrf", *_SOLVERS}  # where there is no float64
_PUTS = {"index_put", "index_put_", "_index_put_impl_"}
_FREE_CPU = {"index", "_unsafe_index", *_PUTS}  # indices may lie on the host


def _same_device(operation: str, tensors: list[Tensor]) -> int:
    """The index of the one device of the tensors. Raises RuntimeError on two, as a GPU does."""
    found = {str(tensor.device) for tensor in tensors if _is_ours(tensor)}
    strange = {
        str(tensor.device)
        for tensor in tensors
        if not _is_ours(tensor) and (tensor.dim() or tensor.device.type != "cpu")
    }
    if len(found) > 1 or (strange and operation not in _FREE_CPU):
        both = " and ".join(sorted(found | strange)[:2])
        what = "Expected all tensors to be on the same device, but found at least two devices"
        raise RuntimeError(f"{what}, {both}! (when calling {operation})")
    return next(tensor.device.index for tensor in tensors if _is_ours(tensor))


def _count(operation: str, args: tuple[Any, ...]) -> None:
    if operation in _SIZED:
        _waited("size", operation)
    elif operation in _SOLVERS:
        _waited("solver", operation)
    elif operation in _PUTS:  # a read by a mask goes through nonzero
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if masks and not (args[2].numel() == 1 and len(masks) == 1):  # one number for one mask is a masked_fill
            _waited("size", f"{operation} with a mask")


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation that is not made of smaller ones: refuse two devices, compute on the CPU, say that it is ours."""
    operation = op._schema.name.partition("::")[2]
    args = tuple(map(_as_tensor, op._schema.arguments, args))
    flat, spec = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    asked = kwargs.get("device")
    if not any(map(_is_ours, tensors)):
        return _made(op, args, kwargs, asked)
    index = _same_device(operation, tensors)
    if any(isinstance(value, torch.Generator) for value in flat):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    if operation in _MISSING and not STATE.float64:
        raise NotImplementedError(f"The operator 'aten::{operation}' is not currently implemented for the MPS device.")
    _count(operation, args)
    for seen in STATE.seen:
        seen[operation] += 1
    hosts = {id(value): host(value) for value in flat if _is_ours(value)}
    hosts |= {id(out): torch.empty(0, dtype=out.dtype) for out in _targets(op, kwargs) if not out.numel()}
    moved = [hosts.get(id(value), torch.device("cpu") if isinstance(value, torch.device) else value) for value in flat]
    cpu_args, cpu_kwargs = tree_unflatten(moved, spec)
    result = op(*cpu_args, **cpu_kwargs)
    for value in flat:
        if _is_ours(value):
            _follow(value, hosts[id(value)])
    names = {id(hosts[id(value)]): value for value in flat if _is_ours(value)}
    viewed = args[0] if _returns_view(op) else None
    return tree_map(lambda out: _named(out, names, viewed, index), result)


def _as_tensor(given: Any, value: Any) -> Any:
    """A number that torch had made a tensor of, and that came here as a number again."""
    is_number = isinstance(value, bool | int | float | complex) and str(given.type) == "Tensor"
    return torch.tensor(value) if is_number else value


def _made(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None) -> Any:
    made = op(*args, **{**kwargs, "device": torch.device("cpu")})
    return tree_map(lambda out: ours(out, _index(device)) if isinstance(out, Tensor) else out, made)


def _returns_view(op: Any) -> bool:
    return any(out.alias_info is not None and not out.alias_info.is_write for out in op._schema.returns)


def _targets(op: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """What the operation writes its results to, and may give another size."""
    return [kwargs[given.name] for given in op._schema.arguments if given.is_out and given.name in kwargs]


def _follow(value: Tensor, seen: Tensor) -> None:
    """An operation with `out=` may have given its target another size."""
    if seen.shape != value.shape or (seen.numel() and seen.data_ptr() != value.data_ptr()):
        _set(value, ours(seen, value.device.index), 0, seen.shape, seen.stride())


def _named(out: Any, names: dict[int, Tensor], viewed: Tensor | None, index: int) -> Any:
    if not isinstance(out, Tensor):
        return out
    if id(out) in names:
        return names[id(out)]
    return _view(viewed, out) if viewed is not None else ours(out, index)


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    made = torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    return ours(_poisoned(made), _index(device))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return ours(_poisoned(torch.empty_strided(size, stride, dtype=dtype, device="cpu")), _index(device))


def _poisoned(made: Tensor) -> Tensor:
    """Memory that nobody has written is not a number, so that reading it shows."""
    return made.fill_(float("nan")) if made.is_floating_point() else made


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not _is_ours(target):
        _waited("copy", "copy to the host")
    elif not _is_ours(source):
        _waited("upload", "copy from the host")
    read = host(source) if _is_ours(source) else source
    (host(target) if _is_ours(target) else target).copy_(read)
    return target


def _copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    return _copy_from(source, target.resize_(source.shape))


def _number(source: Tensor) -> Any:
    _waited("item", "a number is read")
    return host(source).item()


def _resize(tensor: Tensor, size: Any, memory_format: Any = None) -> Tensor:
    wanted = torch.Size(size)
    if wanted == tensor.shape:
        return tensor
    if wanted.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes() and not tensor.storage_offset():
        return _set(tensor, tensor, 0, wanted, torch.empty(wanted, device="meta").stride())
    larger = ours(torch.zeros(wanted, dtype=tensor.dtype), tensor.device.index)
    kept = min(tensor.numel(), larger.numel())
    host(larger).view(-1)[:kept] = host(tensor).reshape(-1)[:kept]
    return _set(tensor, larger, 0, wanted, larger.stride())


def _set_to_tensor(target: Tensor, source: Tensor) -> Tensor:
    return _set(target, source, source.storage_offset(), source.shape, source.stride())


def _as_strided(source: Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    return torch.ops.aten.as_strided.default.redispatch(_BY_CPU, source, size, stride, offset)


def _convolved(*args: Any) -> Tensor:
    return _fallback(torch.ops.aten.convolution.default, *args)


def _convolved_backward(gradient: Tensor, source: Tensor, weight: Tensor, *args: Any) -> Any:
    return _fallback(torch.ops.aten.convolution_backward.default, gradient, source, weight, [weight.shape[0]], *args)


def _plain_attention(*args: Any, **kwargs: Any) -> int:
    return 0  # the one that is made of matrix products


_KERNELS: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    "_local_scalar_dense": _number,
    "resize_": _resize,
    "set_.source_Storage_storage_offset": _set,
    "set_.source_Tensor": _set_to_tensor,
    "as_strided": _as_strided,
    "convolution_overrideable": _convolved,
    "convolution_backward_overrideable": _convolved_backward,
    "_fused_sdp_choice": _plain_attention,
}


def _cloned(clone: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A copy of a storage: torch asks for an allocator there, which cannot be registered in Python."""

    def made(storage: Any) -> Any:
        if storage.device.type != NAME:
            return clone(storage)
        empty = ours(torch.empty(0, dtype=torch.uint8), storage.device.index)
        return _set(empty, storage, 0, (storage.nbytes(),), (1,)).clone().untyped_storage()

    return made


class Module:
    """What `torch.sim` is."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return COUNT

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The CPU's generator, which was seeded too."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_LIBRARIES: list[Any] = []  # registrations last as long as these


def register() -> None:
    """Gives this process the devices `sim:0` and `sim:1`, for good; a second call does nothing."""
    if _LIBRARIES:
        return
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_fallback, _KEY)
    for name, kernel in _KERNELS.items():
        aten.impl(name, kernel, _KEY)
    _LIBRARIES.extend((every, aten))
    torch.UntypedStorage.clone = _cloned(torch.UntypedStorage.clone)
    # The engine's threads are one per device of the guard, and the guard that Python may register has one device.
    torch.autograd.set_multithreading_enabled(False)
