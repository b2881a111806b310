"""Tensor train: one core per axis, a bond between neighbours."""

from __future__ import annotations

from tensoradapt.diagram import Diagram
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


def tt(shape: Shape, rank: Ranks, excess: str) -> Diagram:
    """Tensor train: T[a1..an] = sum core_a1[a1, r_a1] core_a2[r_a1, a2, r_a2] ... core_an[r_.., an].

    Ranks by the axis left of the bond, or as a list. A bond's limit is the smaller side of its cut, given the bonds
    before it. Source: Oseledets 2011, SIAM J. Sci. Comput. 33(5).
    """
    axes = shape.axes
    asked = per_bond(rank, axes[:-1])
    bonds: dict[str, int] = {}
    left = 1
    for position, axis in enumerate(axes[:-1], start=1):
        left = min(left * shape.sizes[axis], 1 << 62)
        bonds[f"r_{axis}"] = limited(asked[axis], min(left, shape.numel(axes[position:])), excess, axis)
        left = bonds[f"r_{axis}"]
    names = list(bonds)
    nodes = {f"core_{axis}": (*names[max(k - 1, 0) : k], axis, *names[k : k + 1]) for k, axis in enumerate(axes)}
    return shape.diagram(nodes, bonds)
