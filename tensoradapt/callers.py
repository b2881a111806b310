"""Callers: around which modules' calls an adapted parameter is replaced, and under which names its tensor stands.

Invariant: whoever reads a parameter that is delivered by weight does so within a call of one of its callers.
"""

from __future__ import annotations

from torch import nn

from tensoradapt.adapter import Adapter
from tensoradapt.errors import SiteError
from tensoradapt.io.names import upwards
from tensoradapt.passes import Held
from tensoradapt.scan import module_at, owner_of, parameter_of
from tensoradapt.sites import SiteMap
from tensoradapt.targets import asks_weight


def callers_of(model: nn.Module, parameter: str, adapter: Adapter, found: SiteMap) -> list[str]:
    """The modules around whose calls a parameter is replaced: its own, and those that read it from outside.

    Where the spec asks for it and no reader is known, all that it lies in: whoever reads it runs within one of them.
    """
    readers = found.readers.get(parameter, ())
    paths = adapter._weighted.get(parameter, ())
    asked = any(asks_weight(group.rule, path) for path in paths for group, _, _ in [adapter._lines[path]])
    around = _above(parameter) if asked and not readers else []
    around = [path for path in around if type(module_at(model, path)).forward is not nn.Module.forward]
    return list(dict.fromkeys([*_own_caller(model, parameter, needed=not readers), *readers, *around]))


def _own_caller(model: nn.Module, parameter: str, *, needed: bool) -> list[str]:
    """The module whose call uses a parameter: its owner, unless that has no forward or its parent bypasses it."""
    for path in _above(parameter):
        module = module_at(model, path)
        parent = module_at(model, path.rpartition(".")[0]) if path else None
        bypassed = isinstance(parent, nn.MultiheadAttention) and parent is not module
        if type(module).forward is not nn.Module.forward and not bypassed:
            return [path]
    if needed:
        raise SiteError(f"no module whose call uses {parameter} was found", hint="exclude it")
    return []


def _above(path: str) -> list[str]:
    """The modules that a parameter lies in, by path, its owner first and the model last."""
    return [*upwards(path)][1:]


def held_by(model: nn.Module, adapter: Adapter) -> tuple[Held, ...]:
    """The adapted tensors, with the sites on them by the names that they have."""
    named: dict[str, list[str]] = {}
    others: dict[str, set[str]] = {}
    for path, (_, site, _) in adapter._lines.items():
        key = parameter_of(model, site)
        named.setdefault(key, []).append(path)
        others.setdefault(key, set()).update(site.aliases)
    tensors: dict[int, list[str]] = {}
    for key in named:
        owner, leaf = owner_of(model, key)
        tensors.setdefault(id(owner._parameters.get(leaf, key)), []).append(key)
    adapted = {key.removesuffix(".weight") for key in named}
    return tuple(
        Held(
            {key: named[key] for key in keys},
            frozenset(keys) & adapter._weighted.keys(),
            alone=all(others[key] <= adapted for key in keys),
        )
        for keys in tensors.values()
    )
