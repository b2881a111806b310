"""Putting first factors into an attached adapter, under the start that goes with them.

Invariant: everything that can fail is tried before the first tensor is replaced; the base is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.attach import lines_of
from tensoradapt.errors import AdapterError, RankError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.interchange import rounded
from tensoradapt.laws import BALANCED
from tensoradapt.plan import START, Plan
from tensoradapt.spec import Rule

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Begun:
    """The first factors of every group, and their start; `zero` names the zero node of every group of a zero start."""

    factors: Mapping[str, Factors]
    start: str = "difference"
    zero: Mapping[str, str] = field(default_factory=dict)


def install(adapter: Adapter, begun: Begun) -> None:
    """Give an adapter its first factors, and its plan their start. Raises RankError, AdapterError; SpecError."""
    plan = restarted(adapter.plan, begun)
    live = {(site.owner, site.index): site for _, site, _ in adapter._lines.values()}
    lines = lines_of(plan, live)
    for group in plan.groups:
        _check(group, begun.factors[group.name])
    with adapter.alone("setting first factors"), adapter.kept(adapter.stored.parameters()):
        for name, factors in begun.factors.items():
            adapter.set_factors(name, rounded(adapter.factors(name), factors))
        for key, factor in plan.factors.items():
            _copy(adapter, key, copied=factor.copied)
        adapter.replan(plan, lines)


def _copy(adapter: Adapter, key: str, *, copied: bool) -> None:
    """The frozen copy of a stored tensor, anew; none where the start subtracts nothing."""
    owner, _, leaf = key.rpartition(".")
    held = adapter.stored[owner]._parameters
    held[leaf].grad = None  # it is the gradient of other factors
    held.pop(leaf + START, None)
    if copied:
        adapter.stored[owner][leaf + START] = nn.Parameter(held[leaf].detach().clone(), requires_grad=False)


def _check(group: Group, factors: Factors) -> None:
    for node, tensor in factors.items():
        if tuple(tensor.shape) != group.diagram.shape(node):
            raise RankError(
                f"node {node!r} of group {group.name!r} asks for a rank that there is not",
                got=group.diagram.shape(node),
                expected=tuple(tensor.shape),
                hint="use a smaller rank, or excess: cap",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"node {node!r} of group {group.name!r} would start with NaN or infinite entries")


def restarted(plan: Plan, begun: Begun) -> Plan:
    """The plan with another start of all its rules; laws that say zero elsewhere become `balanced`."""
    rules = {id(rule): _rule(plan, rule, begun) for rule in plan.spec.rules}
    found = [rules[id(r)] for r in plan.spec.rules]
    owner = {group.name: found[plan.spec.rules.index(group.rule)] for group in plan.groups}
    groups = tuple(replace(g, rule=owner[g.name], laws=_laws(g, begun)) for g in plan.groups)
    return replace(plan, spec=plan.spec.model_copy(update={"rules": tuple(found)}), groups=groups)


def _laws(group: Group, begun: Begun) -> dict[str, str]:
    zero = begun.zero.get(group.name)
    return {node: "zero" if node == zero else BALANCED if law == "zero" else law for node, law in group.laws.items()}


def _rule(plan: Plan, rule: Rule, begun: Begun) -> Rule:
    zeros = {begun.zero.get(group.name, "") for group in plan.groups if group.rule == rule}
    if len(zeros) > 1:
        raise SpecError("the groups of one rule would have different zero nodes", got=", ".join(sorted(zeros)))
    laws = {node: BALANCED if law == "zero" else law for node, law in rule.init.items()}
    given = rule.model_dump(exclude_defaults=True) | {"start": begun.start, "zero": next(iter(zeros), "")}
    return Rule(**(given | {"init": laws}))
