"""Ranks that a user asks for, as a size for every bond of a group, and the plan that has them.

Invariant: a plan's spec gives its diagrams and scales again where its groups can be written as ranks of its rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError
from tensoradapt.grouping import KEYED, Group, resized
from tensoradapt.plan import Plan
from tensoradapt.spec import Rule, Spec

Ranks = int | list[int] | Mapping[str, int]


def by_bond(group: Group, rank: Ranks) -> dict[str, int]:
    """A size for every bond: one number for all, a list in order, or a mapping from bonds or axes, the rest as it was.

    Raises RankError on what is no positive integer, and on names and lists that do not fit the group's bonds.
    """
    bonds = list(group.diagram.bonds)
    if isinstance(rank, Mapping):
        given = _named(group, dict(rank))
    elif isinstance(rank, list | tuple):
        given = dict(zip(bonds, rank, strict=False))
        if len(rank) != len(bonds):
            raise RankError(
                f"the list of ranks does not fit group {group.name!r}",
                got=list(rank),
                expected=f"one for each of {bonds}",
            )
    else:
        given = dict.fromkeys(bonds, rank)
    for bond, size in given.items():
        if type(size) is not int or size < 1:
            raise RankError(
                f"bond {bond!r} of group {group.name!r} cannot have rank {size!r}",
                got=repr(rank),
                expected="positive integers",
                hint="detach() takes an adapter off, rank 1 is the smallest there is",
            )
    return {**group.rank, **given}


def _named(group: Group, rank: dict[str, int]) -> dict[str, int]:
    names = {key: bond for bond, key in _keys(group).items()} | {bond: bond for bond in group.diagram.bonds}
    unknown = [key for key in rank if key not in names]
    if unknown:
        raise RankError(
            f"group {group.name!r} has no bond {unknown[0]!r}", got=rank, expected=", ".join(group.diagram.bonds)
        )
    return {names[key]: size for key, size in rank.items()}


def _keys(group: Group) -> dict[str, str]:
    """What a rule's ranks call every bond."""
    cut = "r_" if group.rule.format in KEYED else ""
    return {bond: bond.removeprefix(cut) for bond in group.diagram.bonds}


def wider(group: Group, rank: Ranks) -> Diagram:
    """The group's diagram at other ranks. Raises RankError on ranks per bond above a limit; one number is a ceiling."""
    asked = by_bond(group, rank)
    excess = "keep" if group.rule.excess == "keep" else "cap"
    like = replace(group, rule=group.rule.model_copy(update={"excess": excess}))
    found = resized(like, {key: asked[bond] for bond, key in _keys(group).items()})
    ceiling = type(rank) is int and group.rule.excess != "error"
    above = [bond for bond, size in asked.items() if size > found.sizes[bond]]
    if above and not ceiling:
        _refuse(group, asked, {bond: found.sizes[bond] for bond in asked}, above[0])
    return found


def _refuse(group: Group, asked: Mapping[str, int], limits: Mapping[str, int], bond: str) -> NoReturn:
    """Raise RankError, with the ranks that the group can have."""
    single = "" if group.rule.excess == "error" else ", or one number for all bonds, which each takes up to its limit"
    raise RankError(
        f"rank {asked[bond]} of bond {bond!r} of group {group.name!r} is above its limit",
        got=dict(asked),
        expected=f"at most {limits[bond]}, the smaller side of its cut",
        hint=f"use rank={dict(limits)}{single}",
    )


def replanned(plan: Plan, diagrams: Mapping[str, Diagram]) -> Plan:
    """The plan with other diagrams of some groups; every group keeps its scale, which becomes a number in its rule."""
    rules = list(plan.spec.rules)
    made = [_ranked(rule, [group for group in plan.groups if group.rule == rule], diagrams) for rule in rules]
    groups = [replace(g, rule=made[rules.index(g.rule)], diagram=diagrams.get(g.name, g.diagram)) for g in plan.groups]
    notes = tuple(note for note in plan.notes if not note.startswith("rank "))  # those say what was capped before
    return replace(plan, spec=Spec(rules=tuple(made)), groups=tuple(groups), notes=notes)


def _ranked(rule: Rule, groups: list[Group], diagrams: Mapping[str, Diagram]) -> Rule:
    """The rule with the ranks of its groups by name; as it was where they differ in scale, which no rule can say."""
    changed = {
        group.name: {key: diagrams[group.name].sizes[bond] for bond, key in _keys(group).items()}
        for group in groups
        if diagrams.get(group.name, group.diagram) != group.diagram
    }
    scales = {group.scale for group in groups}
    if not changed or len(scales) > 1:
        return rule
    return rule.model_copy(update={"ranks": {**rule.ranks, **changed}, "scale": scales.pop(), "alpha": 1.0})
