"""Where small problems are solved: in float64, on the device of their matrices, else on the CPU.

The Gram matrices of bonds, the cores of fits and the factors of a gauge are small, and their rounding is amplified:
they are worked on in float64. A device without float64 (Apple's MPS) lacks most decompositions too, so that both go to
the CPU, which has either; products of large matrices stay on the device. Invariant: results are those of the CPU up to
the rounding of float32 products, and nothing moves off a device that has float64 but what `settled` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPLETE = ("cpu", "cuda", "meta")  # the kinds of devices that are known to have float64
SMALL = 1 << 19  # entries up to which a step costs less than telling a device about it and waiting for its answer


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; a kind that is not known is asked."""
    if device.type in COMPLETE:
        return True
    try:
        torch.ones((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return False
    return True


def home_of(device: torch.device) -> torch.device:
    """The device of small problems: the matrices' own, or the CPU where that has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its own device or, where that has none, on the CPU."""
    return tensor.to(home_of(tensor.device), torch.float64)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; nobody waits for CUDA, where what is uploaded is copied before the call returns."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def settled(tensor: Tensor) -> Tensor:
    """A tensor where many steps on it are best made: on the CPU where it is small, whatever its device is.

    One transfer then takes the place of the answers that an iteration would wait for.
    """
    return tensor if tensor.numel() > SMALL else tensor.cpu()


def at_home(function: Callable[..., Any], a: Tensor, *more: Tensor) -> Any:
    """What a decomposition of matrices gives, back on their device; on the CPU where the device has none of its own."""
    home = home_of(a.device)
    if home == a.device:
        return function(a, *more)
    found = function(*(each.to(home) for each in (a, *more)))
    return found.to(a.device) if isinstance(found, Tensor) else tuple(each.to(a.device) for each in found)
