"""Calls: what a module's forward makes of its weight, told by its class, and not by the features that it names.

Invariant: `is_plain_call` is true only where the output is the weight's linear map of the input and a bias, so that
adding delta(x) to the output and adding delta to the weight are one thing.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tensoradapt.quantised import is_plain

WRAPPERS = {"_hf_hook", "_diffusers_hook"}  # who moves weights and activations around a forward, and changes neither
LINEAR_MAPS = ("bitsandbytes", "vptq")  # packages whose linears are maps of their input before they are packed too
WRITTEN_OUT = ("FalconLinear",)  # of transformers: x W^T + b, in two steps
REMOVALS = {
    BasePruningMethod: ("_tensor_name", "pruned", "torch.nn.utils.prune.remove"),
    WeightNorm: ("name", "weight-normalised", "torch.nn.utils.remove_weight_norm"),
    SpectralNorm: ("name", "spectrally normalised", "torch.nn.utils.remove_spectral_norm"),
}


def forward_of(module: nn.Module) -> Any:
    """The function that a call of a module runs: its class's, or one that was set on the module itself."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    own = inspect.unwrap(own) if WRAPPERS & vars(module).keys() else own
    return getattr(own, "__func__", own)


def is_plain_call(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what a class of PyTorch's does: a subclass with a forward of its own may not."""
    convolves = getattr(type(module), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    forward = forward_of(module)
    return convolves and (
        forward is kind.forward or getattr(forward, "__qualname__", "").partition(".")[0] in WRITTEN_OUT
    )


def conv1d_class(module: nn.Module) -> type[nn.Module] | None:
    """The class `Conv1D` of transformers that a module has among its own, whose weight is stored (in, out)."""
    found = (kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D" and "forward" in vars(kind))
    return next(found, None) if hasattr(module, "nf") else None


def holds_codes(module: nn.Module) -> bool:
    """Whether a module with features has a quantised weight: integers, or a tensor that stands for others."""
    if type(module).__module__.partition(".")[0] in LINEAR_MAPS:
        return True
    if module._modules or is_plain(module._parameters.get("weight")):
        return False
    held = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and t.numel() > 1 and not is_plain(t) for t in held)


def computed(module: nn.Module, name: str) -> tuple[str, str] | None:
    """How a weight is computed from others at every call, and the call that ends it; None where it is not."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(made).__name__.strip("_") for made in module.parametrizations[name])  # type: ignore
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        return f"computed at every call by a parametrisation ({kinds})", remove
    for hook in module._forward_pre_hooks.values():
        kind = next((kind for kind in type(hook).__mro__ if kind in REMOVALS), None)
        if kind is not None and getattr(hook, REMOVALS[kind][0], name) == name:
            _, how, remove = REMOVALS[kind]
            return f"{how}: computed from other parameters at every call", f"{remove}(module, {name!r})"
    return None
