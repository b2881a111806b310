"""Offloaded weights: parameters that accelerate loads for the length of a call, and keeps elsewhere between calls.

Invariant: whatever is asked of such a parameter outside that call is refused in these words, or follows the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.errors import AdapterError
from tensoradapt.io.wrapped import inside


@dataclass(frozen=True)
class Loader:
    """Who loads a parameter: the module around whose forward that happens, by path, and the device where it runs."""

    path: str
    device: torch.device


def loader_of(model: nn.Module, parameter: str, held: Tensor | None) -> Loader | None:
    """Who loads a parameter that is on the meta device between calls; None where it is on a device, or nobody does."""
    if held is None or not held.is_meta:
        return None
    parts = parameter.split(".")[:-1]
    module = inside(model)
    found = None
    for k in range(len(parts) + 1):
        for hook in _hooks(module):
            loads = getattr(hook, "offload", False) and (k == len(parts) or getattr(hook, "place_submodules", False))
            if loads and hook.execution_device is not None:
                found = Loader(".".join(parts[:k]), torch.device(hook.execution_device))
        module = inside(module._modules[parts[k]]) if k < len(parts) else module  # type: ignore[arg-type]
    return found


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def said(model: nn.Module, parameter: str, held: Tensor | None) -> tuple[str, str] | None:
    """What to say of a parameter that is on the meta device now, and what to do; None where it is on another."""
    if held is None or not held.is_meta:
        return None
    if loader_of(model, parameter, held) is None:
        return "on the meta device: it has no values", "load the weights first"
    return (
        "offloaded by accelerate: its values are on the CPU or on disk but while its module runs",
        "load the model where all of it fits (without device_map, or on the CPU), and the adapter onto that",
    )


def check_here(parameter: str, factor: Tensor) -> None:
    """Raise AdapterError on a parameter of the meta device that factors elsewhere are to be added to."""
    if not factor.is_meta:
        raise AdapterError(
            f"{parameter} is on the meta device, and the factors are not",
            got="a weight that is delivered by itself, not by its module's output",
            expected="a weight that was offloaded before the adapter was attached, or has its values",
            hint="offload the model (dispatch_model, cpu_offload, disk_offload) first, then attach or load",
        )


class Within:
    """A module's own forward with something done before and after it, between accelerate's loading and its unloading.

    It has the `remove` of a hook's handle.
    """

    def __init__(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        self.module = [module]  # in a list: no registered reference
        self.forward: Any = module._old_forward
        self.before, self.after = before, after
        module._old_forward = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        self.before(self.module[0], args)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.after(self.module[0], args, None)

    def remove(self) -> None:
        """Put the forward back."""
        holder: Any = self.module[0]
        if holder._old_forward is self:
            holder._old_forward = self.forward
            return
        outer = holder._old_forward
        while isinstance(outer, Within) and outer.forward is not self:
            outer = outer.forward
        if isinstance(outer, Within):
            outer.forward = self.forward
