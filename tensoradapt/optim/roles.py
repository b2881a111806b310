"""Parameter groups by what a factor does in its network, each with a learning rate of its own.

Invariant: every trained parameter of an adapter is in exactly one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from tensoradapt.adapter import Adapter
from tensoradapt.change.targets import attached
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError

ROLES = ("in", "out", "core", "extra")


def role_of(diagram: Diagram, node: str) -> str:
    """The side whose axis, or folds of it, a node carries: `in` or `out`; `core` where it carries neither or both."""
    carried = set(diagram.nodes[node])
    sides = [side for side in ("in", "out") if carried & set(diagram.fold(side))]
    return sides[0] if len(sides) == 1 else "core"


def parameter_groups(
    adapter: Adapter,
    lr: float,
    *,
    ratio: float = 16.0,
    multipliers: Mapping[str, float] | None = None,
    nodes: Mapping[str, float] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """An adapter's trained parameters for a `torch.optim` optimiser: lr(role) = multiplier(role) * lr.

    Roles are `in` and `out`, the nodes that carry an axis of that side or folds of it, `core`, those that carry neither
    or both, and `extra`, the modules that are trained whole. Multipliers are 1, and `ratio` for `out` (LoRA+, where B
    learns faster than A); `multipliers` replaces them by role, `nodes` by a node's name, whatever its role. Further
    keywords, such as `weight_decay`, go into every group. Groups are named by role, or by node, under `name`.
    Raises SpecError on roles and nodes that are not there, and on rates that are no finite positive numbers.
    Source: arXiv 2402.12354.
    """
    attached(adapter, "parameter_groups needs an attached adapter")
    given = {"lr": lr, "ratio": ratio, **(multipliers or {}), **(nodes or {})}
    for name, value in given.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise SpecError(f"the learning rate or multiplier {name!r} is a finite positive number", got=repr(value))
    _check_names("role", multipliers or {}, ROLES)
    _check_names("node", nodes or {}, list(dict.fromkeys(n for g in adapter.plan.groups for n in g.trainable)))
    factors = dict.fromkeys(ROLES, 1.0) | {"out": ratio} | dict(multipliers or {})
    found: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter, (role, node) in _roles(adapter).items():
        special = nodes is not None and node in nodes
        key = (node, nodes[node]) if nodes is not None and special else (role, factors[role])
        found.setdefault(key, []).append(parameter)
    return [{"name": name, "params": held, "lr": lr * by, **options} for (name, by), held in found.items()]


def _roles(adapter: Adapter) -> dict[nn.Parameter, tuple[str, str]]:
    """The role and the node of every trained parameter, each once however many groups store it; a group's in order."""
    found: dict[nn.Parameter, tuple[str, str]] = {}
    for group in adapter.plan.groups:
        for node in group.trainable:
            owner, _, leaf = group.store[node].rpartition(".")
            found.setdefault(adapter.stored[owner][leaf], (role_of(group.diagram, node), node))
    found |= {parameter: ("extra", "") for parameter in adapter.extra.parameters()}
    return {parameter: role for parameter, role in found.items() if parameter.requires_grad}


def _check_names(what: str, given: Mapping[str, float], known: tuple[str, ...] | list[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SpecError(f"no {what} {unknown[0]!r}", got=", ".join(given), expected=", ".join(known))
