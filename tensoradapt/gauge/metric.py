"""The metric of a tree: Gram matrices on both sides of every bond, and the directions that their inverses give.

With N_b = <all behind bond b> and S_b = <all before it>, seen from a root, the block of node u in J^T J is
S_u (x) N_b (x) N_c .. over its bonds. One choice of gauge makes J^T J block diagonal: every node but the root moves
orthogonally to itself, so that the projected gradient needs inverses of matrices as wide as a bond, and no more:

    d_root = (N_b^-1 (x) N_c^-1 ..) g_root,    d_u = [(N_b^-1 (x) ..) g_u - u N_u^-1 (u^T g_u)] S_u^-1.

Without the second term these are the blocks of (J^T J)^-1 themselves (scaled gradient descent).
Invariant: everything that follows from the diagram alone is worked out once; a call only multiplies matrices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.closed import eigh
from tensoradapt.gauge.legs import Leg, leg
from tensoradapt.gauge.tree import Factors, inward, require_tree
from tensoradapt.linalg import double


class Metric:
    """The Gram matrices of a tree of which the nodes `trained` move, and the directions they give.

    The root is the trained node with most bonds, the last of several. `connected` says whether the trained nodes hang
    together, without which there is no gauge that makes the blocks orthogonal; `pair` whether they are all there
    is, and two. Raises SpecError on what is no tree.
    """

    def __init__(self, diagram: Diagram, trained: Collection[str] | None = None) -> None:
        require_tree(diagram, "a metric of Gram matrices")
        bonds = diagram.bonds
        self.nodes = [n for n in diagram.nodes if trained is None or n in trained]
        self.root = max(reversed(self.nodes), key=lambda node: sum(i in bonds for i in diagram.nodes[node]))
        edges = inward(diagram, self.root)
        self.connected = all(edge.parent in self.nodes for edge in edges if edge.child in self.nodes)
        self.pair = len(diagram.nodes) == len(self.nodes) == 2
        names = sorted(bonds, key=lambda bond: diagram.sizes[bond])
        keys = [
            (bond, behind) for bond in names for behind in (True, False)
        ]  # behind a bond, seen from the root, or not
        self.place = {key: k for k, key in enumerate(keys)}
        sizes = [diagram.sizes[bond] for bond, _ in keys]
        starts = [k for k, size in enumerate(sizes) if not k or size != sizes[k - 1]]
        self._runs = [slice(*run) for run in pairwise([*starts, len(keys)])]
        legs = {(node, bond): leg(diagram, node, bond) for bond, ends in bonds.items() for node in ends}
        above = {edge.child: edge.bond for edge in edges}

        def around(node: str, but: str = "") -> list[tuple[int, Leg]]:
            mine = [(bond, bond != above.get(node)) for bond, ends in bonds.items() if node in ends and bond != but]
            return [(self.place[key], legs[node, key[0]]) for key in sorted(mine, key=lambda key: key[1])]

        ways = [(e.child, e.bond, True) for e in edges] + [(e.parent, e.bond, False) for e in reversed(edges)]
        self._sweep = [(self.place[b, to], n, around(n, b), legs[n, b]) for n, b, to in ways]
        self._moves = [_Move(node, around(node), self.place.get((above.get(node, ""), True))) for node in self.nodes]
        self._damping = _Damping(diagram, self._moves, sizes)

    def grams(self, factors: Factors) -> list[Tensor]:
        """Every bond's Gram matrix of all behind it and of all before it, in the order of `place`.

        Shape: (batch.., r, r).
        """
        found: list[Any] = [None] * len(self.place)
        for k, node, others, end in self._sweep:
            seen = factor = factors[node]
            for other, its in others:
                seen = its.act(seen, found[other])
            found[k] = end.overlap(seen, factor)
        return found

    def inverses(self, factors: Factors, damping: float) -> list[Tensor]:
        """The inverse Gram matrices, in the order of `place`: pseudo-inverses without damping.

        With damping, delta = damping * tr(J^T J) / entries is the network's, the same for all blocks: a matrix alone in
        its block gets delta, one of several delta over the mean eigenvalues of the others.
        """
        grams, like = self.grams(factors), factors[self.root]
        stacks = [double(torch.stack(grams[run])) for run in self._runs]
        if damping:
            self._damping.add(stacks, damping, torch.finfo(like.dtype).eps)
        made = [_inverse(stack, like) if damping else pinv(stack, like) for stack in stacks]
        return [one for stack in made for one in stack.unbind()]

    def directions(
        self, factors: Factors, grads: Factors, damping: float = 0.0, scale: float = 1.0, *, project: bool = True
    ) -> dict[str, Tensor]:
        """The direction of every trained node from its gradient, of `scale` times the network.

        With `project`, J d is the projection of g on the tangent space; without, every node's own share of it, what
        several nodes see counted several times.  Shapes: those of the factors.
        """
        inverse, weight = self.inverses(factors, damping), scale**-2
        return {
            move.node: move.direction(factors[move.node], grads[move.node], inverse, weight, project)
            for move in self._moves
        }


@dataclass(frozen=True)
class _Move:
    """How one node's direction is made: its bonds, that towards the root first, and the Gram matrix of the node."""

    node: str
    bonds: list[tuple[int, Leg]]
    own: int | None

    def direction(
        self, factor: Tensor, grad: Tensor, inverse: Sequence[Tensor], weight: float, project: bool
    ) -> Tensor:
        """The node's direction: its gradient through the inverse of every bond, less what its neighbour can do."""
        if not self.bonds:
            return grad * weight
        made, (k, first) = grad, self.bonds[0]
        for other, its in self.bonds[1:]:
            made = its.act(made, inverse[other])
        if project and self.own is not None:
            made = first.less(made, factor, torch.matmul(inverse[self.own], first.overlap(factor, grad)))
        return first.act(made, inverse[k], weight)


class _Damping:
    """What is added to Gram matrices: from the mean of their diagonals, by the blocks they are in."""

    def __init__(self, diagram: Diagram, moves: Sequence[_Move], sizes: Sequence[int]) -> None:
        entries = sum(diagram.numel(move.node) for move in moves)
        spans = [[k for k, _ in move.bonds] for move in moves]
        self.shares = [(diagram.numel(m.node) / entries, span) for m, span in zip(moves, spans, strict=True)]
        beside = {k: [other for other in span if other != k] for span in spans for k in span}
        self.beside = [(beside.get(k, []), size) for k, size in enumerate(sizes)]

    def add(self, stacks: Sequence[Tensor], damping: float, rounding: float) -> None:
        """Damp every matrix of the stacks, in place: by no less than its rounding, which makes it indefinite."""
        diagonals = [stack.diagonal(0, -2, -1) for stack in stacks]
        means = [mean for diagonal in diagonals for mean in _means(diagonal)]
        delta = sum([math.prod([means[k] for k in span], start=share) for share, span in self.shares]) * damping
        shifts = [
            (delta / (math.prod([means[k] for k in rest]) + _TINY) if rest else delta) + rounding * size * mean
            for (rest, size), mean in zip(self.beside, means, strict=True)
        ]
        for diagonal in diagonals:
            diagonal.add_(_column(shifts[: len(diagonal)], diagonal))
            shifts = shifts[len(diagonal) :]


_TINY = 1e-100


def _means(diagonal: Tensor) -> Sequence[Any]:
    """The mean of every matrix's diagonal: as numbers on a CPU, where these are cheaper than tensors of one entry."""
    if diagonal.ndim > 2 or diagonal.device.type != "cpu":
        return diagonal.mean(-1).unbind()
    return [sum(entries) / len(entries) for entries in diagonal.tolist()]


def _column(shifts: Sequence[Any], like: Tensor) -> Tensor:
    """Shifts of matrices, 1 where all that there is is zero: the inverse of a zero matrix meets zeros alone."""
    if isinstance(shifts[0], float):
        return torch.tensor([[shift or 1.0] for shift in shifts], dtype=like.dtype)
    made = torch.stack(list(shifts))
    return torch.where(made > 0, made, 1.0).unsqueeze(-1)


def _inverse(gram: Tensor, like: Tensor) -> Tensor:
    """Inverses of damped Gram matrices; of others NaN, and no error: a gradient scaler may have met an overflow."""
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L).to(like)


def pinv(gram: Tensor, like: Tensor) -> Tensor:
    """Pseudo-inverses: what is rounding of the dtype that a Gram matrix was computed in counts as zero."""
    values, vectors = eigh(gram)
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(like.dtype).eps
    kept = torch.where(values > floor, 1 / values.clamp(min=_TINY), 0.0)
    return (vectors * kept[..., None, :] @ vectors.mT).to(like)
