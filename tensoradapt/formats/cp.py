"""Canonical polyadic: a sum of rank-one tensors."""

from __future__ import annotations

from tensoradapt.diagram import Diagram
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


def cp(shape: Shape, rank: Ranks, excess: str) -> Diagram:
    """Canonical polyadic: T[a1..an] = sum_r prod_k factor_ak[ak, r].

    The weights are absorbed by the factors. The one bond joins all nodes. Its limit, above which every tensor is held
    exactly, is the number of entries over the longest axis. Source: Kolda and Bader 2009, SIAM Review 51(3).
    """
    asked = per_bond(rank, ("r",))["r"]
    limit = shape.numel(shape.axes) // max(shape.sizes[axis] for axis in shape.axes)
    bonds = {"r": limited(asked, limit, excess, "r")}
    return shape.diagram({f"factor_{axis}": (axis, "r") for axis in shape.axes}, bonds)
