"""What `fit` is given: a tensor or array, or slices of one, and names for its axes.

Invariant: what is no tensor of finite real numbers is refused here, before anything is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import ShapeError, SpecError
from tensoradapt.linalg import as_tensor, empty, energy, has_float64, norm_of
from tensoradapt.linalg.level import FAINT

Slices = Sequence[Any] | Callable[[], Iterable[Any]]
ORDER = "the order is ta.fit(tensor, format)"


def source_of(tensor: Any, device: Any = None) -> Tensor | Slices:
    """A tensor in float32 or float64 on the device, or what slices come from. Raises ShapeError."""
    if isinstance(tensor, Iterator):
        raise ShapeError(
            "a stream of slices is read several times", got="an iterator", hint="give a function that returns a new one"
        )
    if type(tensor).__module__.partition(".")[0] == "tensorly":
        raise ShapeError(
            "this is no tensor but TensorLy's factors of one",
            got=type(tensor).__name__,
            hint="fit what they stand for: ta.fit(x.to_tensor(), ...)",
        )
    if isinstance(tensor, list | tuple) or (callable(tensor) and not isinstance(tensor, Tensor | type)):
        return tensor
    return plain(tensor, device)


def plain(tensor: Any, device: Any = None) -> Tensor:
    """A tensor of real numbers, float32 or float64, detached. Raises ShapeError."""
    if isinstance(tensor, str | type | None):
        raise ShapeError("this is no tensor", got=repr(tensor)[:40], hint=ORDER)
    found = as_tensor(tensor)
    if found.is_complex() or not found.numel():
        raise ShapeError("a fit needs real numbers", got=f"{found.dtype} of shape {tuple(found.shape)}")
    at = found.device if device is None else empty(device).device
    dtype = torch.float32 if found.dtype not in (torch.float32, torch.float64) or not has_float64(at) else found.dtype
    return found.detach().to(at, dtype)


def finite_norm(tensor: Tensor) -> float:
    """The norm of a tensor. Raises ShapeError where it is not finite."""
    norm = norm_of(tensor)
    bad = 0 if math.isfinite(norm) else int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ShapeError("the tensor is not finite", got=f"{bad} of {tensor.numel()} entries are NaN or infinite")
    return norm


def stack_norm(read: Callable[[], Iterable[Tensor]]) -> float:
    """The norm of the tensor that slices make. A device is asked once for all. Raises ShapeError as `finite_norm`."""
    squares = [energy(part) for part in read()]
    square = float(torch.stack([each.to(squares[0].device) for each in squares]).sum())
    if math.isfinite(square) and square > FAINT:
        return math.sqrt(square)
    return math.hypot(*(finite_norm(part) for part in read()))


def slices_of(source: Slices) -> Iterable[Any]:
    """The slices of a stream, from the first on."""
    return source() if callable(source) else source


def stack_shape(source: Slices) -> tuple[int, ...]:
    """The shape of the tensor that slices make. Raises ShapeError where they are no matrices of one shape."""
    shapes = [tuple(as_tensor(part).shape) for part in slices_of(source)]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ShapeError("slices are matrices of one shape", got=sorted(set(shapes))[:3])
    return (len(shapes), *shapes[0])


def axes_of(axes: Any, shape: Sequence[int], network: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a tensor's axes: those given (also in one string), a network's, out and in of a matrix, or axis_k.

    Raises SpecError on what are no names, ShapeError on another number of them.
    """
    given = tuple(axes.replace(",", " ").split()) if isinstance(axes, str) else axes
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) and name.isidentifier() for name in given):
        raise SpecError(
            "axes are names", got=repr(axes)[:80], expected="('layer', 'out', 'in'), or in one string: 'layer out in'"
        )
    plain = ("out", "in") if len(shape) == 2 else tuple(f"axis_{k}" for k in range(len(shape)))
    named = tuple(given) or (network if len(network) == len(shape) else plain)
    if len(named) != len(shape) or not shape or len(set(named)) < len(named):
        raise ShapeError(
            "axes name the tensor's dimensions, each once", got=named, expected=f"{len(shape)} names for {tuple(shape)}"
        )
    return named
