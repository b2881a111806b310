"""Curves: what a diagram loses at which number of parameters, from the spectra across its bonds.

Invariant: along a curve the parameters fall and the loss grows; every point's ranks are within their bonds' limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.linalg import double

THINNED = 0.8  # of the parameters from point to point of a thinned curve


@dataclass(frozen=True)
class Point:
    """Ranks, the parameters they cost, and the squared error they are expected to leave."""

    ranks: Mapping[str, int]
    num_parameters: int
    lost: float


def limits(diagram: Diagram, sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes with every bond of two nodes at most the product of either node's other indices."""
    sizes = dict(sizes)
    changed = True
    while changed:
        changed = False
        for bond, nodes in diagram.bonds.items():
            if len(nodes) != 2:
                continue
            limit = min(math.prod(sizes[i] for i in diagram.nodes[n] if i != bond) for n in nodes)
            if sizes[bond] > limit:
                sizes[bond], changed = limit, True
    return sizes


def squeeze(diagram: Diagram, spectra: Mapping[str, Tensor], beyond: Mapping[str, float] | None = None) -> list[Point]:
    """The curve of a tree: from all that its spectra show, the bond that costs least per parameter gives way next.

    lost / total = 1 - prod over bonds of (1 - the share discarded there), at most the bound of a tree's truncation, the
    sum of what is discarded, and below the total. `beyond` is the squared norm that lies beyond a spectrum's end.
    """
    squares = {b: _squares(s) for b, s in spectra.items()}
    tails = {
        b: [*(q.flip(0).cumsum(0).flip(0) + float((beyond or {}).get(b, 0.0))).tolist()] for b, q in squares.items()
    }
    for bond, tail in tails.items():
        tail.append(float((beyond or {}).get(bond, 0.0)))
    sizes = limits(diagram, {**diagram.sizes, **{b: max(1, _significant(q)) for b, q in squares.items()}})
    points = [_point(diagram, sizes, tails)]
    while any(sizes[b] > 1 for b in squares):
        options = [limits(diagram, {**sizes, b: sizes[b] - _step(sizes[b])}) for b in squares if sizes[b] > 1]
        here = points[-1]
        found = [_point(diagram, option, tails) for option in options]
        best = min(range(len(found)), key=lambda k: _price(here, found[k]))
        sizes = options[best]
        points.append(found[best])
    return points


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Some of a curve's points: the first within `most` parameters, then each with a fifth less; else the smallest."""
    chosen: list[Point] = []
    for point in points:
        if point.num_parameters <= (THINNED * chosen[-1].num_parameters if chosen else most):
            chosen.append(point)
    return chosen or [points[-1]]


def _step(size: int) -> int:
    return max(1, size // 32)


def _price(here: Point, there: Point) -> float:
    return (there.lost - here.lost) / max(1, here.num_parameters - there.num_parameters)


def _squares(s: Tensor) -> Tensor:
    return double(s).square().sum(tuple(range(s.dim() - 1))).cpu()


def _significant(squares: Tensor) -> int:
    """How many values rise above float32 rounding."""
    return int((squares > squares.max() * torch.finfo(torch.float32).eps ** 2).sum()) if len(squares) else 0


def _point(diagram: Diagram, sizes: Mapping[str, int], tails: Mapping[str, list[float]]) -> Point:
    ranks = {b: sizes[b] for b in diagram.bonds}
    total = max((tail[0] for tail in tails.values()), default=0.0)
    shares = [tail[min(sizes[b], len(tail) - 1)] / total for b, tail in tails.items() if total]
    lost = total * -math.expm1(math.fsum(math.log1p(-share) if share < 1 else -math.inf for share in shares))
    return Point(ranks, replace(diagram, sizes=dict(sizes)).num_parameters, lost)
