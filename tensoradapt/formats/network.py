"""Users' own networks, written like an einsum with names: `"out a, layer a b, b in -> layer out in"`.

A node may be named: `"B: out r, d: site r, A: r in -> site out in"`; unnamed nodes are `node_0`, `node_1`, ...
"""

from __future__ import annotations

import math

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


def parse(text: str) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Split a network string into nodes (name to indices) and the tensor's axes. Raises SpecError."""
    left, arrow, right = text.partition("->")
    if not arrow or not right.split() or not left.strip():
        raise SpecError("a network reads 'nodes -> axes'", got=text, hint="write for example 'out a, a in -> out in'")
    nodes: dict[str, tuple[str, ...]] = {}
    for position, part in enumerate(left.split(",")):
        name, colon, indices = part.partition(":")
        key = name.strip() if colon else f"node_{position}"
        if key in nodes or not key.isidentifier():
            raise SpecError(
                f"node name {key!r} is given twice or is no identifier", got=text, hint="write for example 'B: out r'"
            )
        nodes[key] = tuple((indices if colon else name).split())
        if not nodes[key] or len(set(nodes[key])) < len(nodes[key]):
            raise SpecError(f"node {key!r} needs indices, each once", got=text, hint="write for example 'out a'")
    return nodes, tuple(right.split())


def network(text: str, shape: Shape, rank: Ranks, excess: str) -> Diagram:
    """The diagram of a network string: T[axes] = sum over the other indices of the product of the nodes.

    One rank for all bonds, or one per bond by name. A bond between two nodes is limited by the other indices of each;
    a bond that joins more (a hyperedge) has no limit.
    """
    nodes, axes = parse(text)
    names = list(dict.fromkeys(i for indices in nodes.values() for i in indices if i not in axes))
    asked = per_bond(rank, names)
    sizes = {axis: shape.sizes[axis] for axis in axes} | asked
    ends = {bond: [indices for indices in nodes.values() if bond in indices] for bond in names}
    for bond in (bond for bond in names if len(ends[bond]) == 1):
        raise SpecError(
            f"bond {bond!r} ends nowhere: it is on one node and not among the axes",
            got=text,
            hint=f"put {bond!r} on another node, or after '->'",
        )
    before: dict[str, int] = {}
    while sizes != before:  # a bond that is capped lowers the limits of its neighbours
        before = dict(sizes)
        for bond in (bond for bond in names if len(ends[bond]) == 2):
            limit = min(math.prod(sizes[i] for i in indices if i != bond) for indices in ends[bond])
            sizes[bond] = limited(asked[bond], limit, excess, bond)
    return shape.diagram(nodes, {bond: sizes[bond] for bond in names})
