"""Live models inside wrappers: torch.compile, DataParallel, FSDP, activation checkpointing, Lightning, DeepSpeed.

Invariant: the names of a wrapped model are those of the model inside; a module of the model's own that is called
`module` keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

from torch import nn

from tensoradapt.io.names import AROUND, PARTS, plain

# Classes that hold the model as `module` and call it; by name, as most of them are imported by none but their users.
HOLDERS = frozenset(("DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "AveragedModel"))


def inside(module: nn.Module) -> nn.Module:
    """The module that a wrapper stands around; the module itself where it is no wrapper."""
    while (name := _held(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _held(module: nn.Module) -> str | None:
    """The name under which a wrapper holds what it wraps; None where it is no wrapper."""
    children = module._modules
    if not len(children):
        return None
    if not PARTS.isdisjoint(children.keys()):
        return next(name for name, _ in children.items() if name in PARTS)
    return "module" if "module" in children and _holds(type(module)) else None  # type: ignore[arg-type]  # classes are hashable


@lru_cache(maxsize=4096)
def _holds(kind: type) -> bool:
    return any(above.__name__ in HOLDERS for above in kind.__mro__)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The paths and modules of a model, as `named_modules` gives them, without wrappers and under their own names."""
    by = own_names(model)
    return ((by(path), module) for path, module in model.named_modules() if inside(module) is module)


def own_names(model: nn.Module) -> Callable[[str], str]:
    """A function from names in a wrapped model to those in the model inside."""
    holders = [plain(path) for path, module in model.named_modules() if _held(module) == "module"]
    around = sorted((f"{path}.{AROUND}" if path else AROUND for path in holders), key=len, reverse=True)

    def own(name: str) -> str:
        name = plain(name)
        for prefix in around:
            if f"{name}.".startswith(prefix):
                name = (prefix.removesuffix(AROUND) + f"{name}.".removeprefix(prefix)).removesuffix(".")
        return name

    return own
