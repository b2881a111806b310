"""Users' own networks, written like an einsum with names: `"out a, layer a b, b in -> layer out in"`."""

from __future__ import annotations

import math

from tensoradapt.axes import parse
from tensoradapt.diagram import Diagram
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


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
    before: dict[str, int] = {}
    while sizes != before:  # a bond that is capped lowers the limits of its neighbours
        before = dict(sizes)
        for bond in (bond for bond in names if len(ends[bond]) == 2):
            limit = min(math.prod(sizes[i] for i in indices if i != bond) for indices in ends[bond])
            sizes[bond] = limited(asked[bond], limit, excess, bond)
    return shape.diagram(nodes, {bond: sizes[bond] for bond in names})
