"""Laws of a group: its scale, evaluated once to a number, and the initial law of every node.

Invariant: at a `zero` start exactly one node is zero, and it is trained.
"""

from __future__ import annotations

import math

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.spec import Rule

BALANCED = "balanced"


def scale_of(rule: Rule, name: str) -> float:
    """The scale rule, evaluated once to a number."""
    if isinstance(rule.scale, float):
        return rule.scale
    if rule.scale in ("one", "alpha"):
        return 1.0 if rule.scale == "one" else rule.alpha
    rank = rule.ranks.get(name, rule.rank)
    if not isinstance(rank, int):
        raise SpecError(
            f"scale {rule.scale!r} needs one rank, and group {name!r} has one per bond",
            got=rank,
            hint="give the scale as a number",
        )
    return rule.alpha / (rank if rule.scale == "alpha/rank" else math.sqrt(rank))


def laws_of(rule: Rule, diagram: Diagram, name: str) -> dict[str, str]:
    """The initial law of every node, and the check of the start: exactly one zero node, trained, for a `zero` start."""
    nodes = tuple(diagram.nodes)
    for field_name, given in (
        ("init", set(rule.init) - {"*"}),
        ("frozen", set(rule.frozen)),
        ("zero", {rule.zero} - {""}),
    ):
        if given - set(nodes):
            raise SpecError(
                f"{field_name} names the node {min(given - set(nodes))!r}, which the network lacks",
                expected=", ".join(nodes),
            )
    laws = {node: rule.init.get(node, rule.init.get("*", BALANCED)) for node in nodes} | (
        {rule.zero: "zero"} if rule.zero else {}
    )
    zeros = [node for node in nodes if laws[node] == "zero"]
    if rule.start == "zero" and (len(zeros) != 1 or zeros[0] in rule.frozen):
        got = (
            f"{len(zeros)} zero nodes{f' ({chr(44).join(zeros)})' if zeros else ''}"
            if len(zeros) != 1
            else f"{zeros[0]} is zero and frozen"
        )
        raise SpecError(
            f"a zero start of {name!r} needs exactly one zero node, and a trained one",
            got=got,
            expected=f"one of {', '.join(n for n in nodes if n not in rule.frozen)}",
            hint=f"write zero: {rule.zero or nodes[0]}, or start: nonzero, or start: difference",
        )
    if rule.start != "zero" and zeros:
        raise SpecError(
            f"node {zeros[0]!r} is zero, but the start is {rule.start!r}", hint="use start: zero, or another law"
        )
    return laws
