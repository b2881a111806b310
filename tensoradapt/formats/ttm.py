"""TT-matrix (matrix product operator): cores that carry one fold of `out` and one of `in` each."""

from __future__ import annotations

from tensoradapt.diagram import Diagram
from tensoradapt.errors import ShapeError
from tensoradapt.formats.build import Ranks, Shape, limited, per_bond


def ttm(shape: Shape, rank: Ranks, excess: str) -> Diagram:
    """TT-matrix: T[o1..on, i1..in] = sum prod_k core_k[r_(k-1), o_k, i_k, r_k]; coordinates sit on every core.

    Ranks by the number of the core left of the bond, or as a list. Raises ShapeError where `out` and `in` have unequal
    numbers of folds. Source: Oseledets 2010, SIAM J. Matrix Anal. Appl. 31(4).
    """
    outs, ins = shape.folds.get("out", ("out",)), shape.folds.get("in", ("in",))
    if len(outs) != len(ins):
        raise ShapeError(
            "a TT-matrix pairs every fold of out with one of in",
            got=f"{len(outs)} and {len(ins)} folds",
            hint="give out and in as many folds each (1 is allowed)",
        )
    batch = tuple(axis for axis in shape.axes if axis not in (*outs, *ins))
    asked = per_bond(rank, [str(k) for k in range(len(outs) - 1)])
    bonds: dict[str, int] = {}
    left = 1
    for k in range(len(outs) - 1):
        left *= shape.numel((outs[k], ins[k]))
        limit = min(left, shape.numel((*outs[k + 1 :], *ins[k + 1 :])))
        bonds[f"r_{k}"] = left = limited(asked[str(k)], limit, excess, f"r_{k}")
    names = list(bonds)
    nodes = {
        f"core_{k}": (*batch, *names[max(k - 1, 0) : k], outs[k], ins[k], *names[k : k + 1]) for k in range(len(outs))
    }
    return shape.diagram(nodes, bonds)
