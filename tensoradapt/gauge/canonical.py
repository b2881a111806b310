"""Canonical forms of a tree: what the network computes is kept, what its factors are is chosen.

For every bond, u[.., b] v[b, ..] = sum (u X)[.., c] (X^-1 v)[c, ..]: a form fixes these matrices X. All forms come from
QR and SVD of matrices as wide as a bond, in float64; none divides by a singular value that may be zero.
Invariant: the dense tensor before and after is the same, for the zero tensor and for rank-deficient factors too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge.cp import is_cp, normalised
from tensoradapt.gauge.tree import (
    TREE,
    Edge,
    Factors,
    Network,
    act,
    batch_of,
    fold,
    inward,
    measured,
    middle,
    obstacle,
    positive_qr,
    precise,
    require_tree,
    shared_axes,
    unfold,
)

FORMS = ("canonical", "hosvd", "symmetric", "left", "right")


@dataclass(frozen=True)
class Schmidt:
    """A tree in the form whose every bond is a basis of singular vectors, and the singular values of each bond.

    `values` maps a bond to the singular values of its cut, (batch.., size), the largest first, zeros behind the last.
    """

    diagram: Diagram
    edges: tuple[Edge, ...]
    factors: dict[str, Tensor]
    values: dict[str, Tensor]

    def cut(self, sizes: Mapping[str, int]) -> Schmidt:
        """The form with only the first values of every bond."""
        held = {
            node: self.factors[node][tuple(slice(sizes.get(i)) for i in indices)]
            for node, indices in self.diagram.nodes.items()
        }
        values = {bond: found[..., : sizes.get(bond)] for bond, found in self.values.items()}
        return replace(self, diagram=measured(self.diagram, held).diagram, factors=held, values=values)

    def balanced(self) -> dict[str, Tensor]:
        """The factors with the square roots of a bond's singular values at either end of it."""
        held, nodes = dict(self.factors), self.diagram.nodes
        for edge in self.edges:
            batch, root = batch_of(self.diagram, edge), _roots(self.values[edge.bond])
            for node, weights in ((edge.child, root), (edge.parent, 1 / root)):
                held[node] = act(held[node], nodes[node], batch, edge.bond, weights.diag_embed())
        return held


def orthogonalized(diagram: Diagram, factors: Factors, form: str = "canonical", center: str | None = None) -> Network:
    """The same tensor with factors in a form: canonical, hosvd, symmetric, left or right.

    A CP has no form but `canonical` (unit columns, the weights in `center`) and `symmetric` (equal norms), both sorted
    and with signs resolved. Raises SpecError on other networks than trees and CP, and on a centre that does not exist.
    """
    if form not in FORMS:
        raise SpecError(f"no form is called {form!r}", expected=", ".join(FORMS))
    if center is not None and center not in diagram.nodes:
        raise SpecError(f"the centre {center!r} is no node", expected=", ".join(diagram.nodes))
    if is_cp(diagram):
        if form not in ("canonical", "symmetric"):
            raise SpecError(
                f"a CP has no {form} form: one bond joins all of its nodes", expected="canonical, symmetric"
            )
        return normalised(diagram, factors, center, balance=form == "symmetric")
    return _FORMS[form](diagram, factors, center)


def canonical(diagram: Diagram, factors: Factors, center: str | None = None) -> Network:
    """The canonical form about a node: every other node is an isometry towards it, by one QR sweep.

    sum_rows Q[rows, b] Q[rows, c] = delta[b, c], for every value of a batch axis. A bond above the number of rows
    behind it shrinks to that number. A core that is shared across an axis is made an isometry towards the centre, which
    must carry the axis; what lies beyond such a core is an isometry over all values of the axis together.
    Source: Oseledets 2011, SIAM J. Sci. Comput. 33(5).
    """
    center = center or _default(diagram)
    _check_center(diagram, center)
    held = precise(diagram, factors)
    _sweep(diagram, held, inward(diagram, center))
    return measured(diagram, held, factors)


def _default(diagram: Diagram) -> str:
    """The node with most bonds, among those that carry what shared cores lack."""
    shared = set(shared_axes(diagram))
    carriers = {node: indices for node, indices in diagram.nodes.items() if shared <= set(indices)}
    bonds = diagram.bonds
    return max(carriers or diagram.nodes, key=lambda node: sum(i in bonds for i in diagram.nodes[node]))


def _check_center(diagram: Diagram, center: str) -> None:
    reason = obstacle(diagram)
    if reason:
        raise SpecError(f"a canonical form needs a tree, and here {reason}", got=str(diagram), expected=TREE)
    for axis in shared_axes(diagram):
        if axis not in diagram.nodes[center]:
            carriers = [node for node, indices in diagram.nodes.items() if axis in indices]
            raise SpecError(
                f"{center!r} cannot be the centre: it is shared across the axis {axis!r}, so it cannot take up what "
                f"the nodes that carry {axis!r} would each give it",
                expected=f"one of {', '.join(carriers)}",
            )


def _sweep(diagram: Diagram, held: dict[str, Tensor], edges: list[Edge]) -> None:
    for edge in edges:
        batch, indices = batch_of(diagram, edge), diagram.nodes[edge.child]
        q, r = positive_qr(unfold(held[edge.child], indices, batch, edge.bond))
        held[edge.child] = fold(q, held[edge.child], indices, batch, edge.bond)
        held[edge.parent] = act(held[edge.parent], diagram.nodes[edge.parent], batch, edge.bond, r.mT)


def schmidt(diagram: Diagram, factors: Factors, center: str | None = None) -> Schmidt:
    """The canonical form about a node in which every bond is a basis of singular vectors, with the singular values.

    Raises SpecError where the diagram is no tree.
    """
    require_tree(diagram, "a basis of singular vectors")
    center = center or middle(diagram)
    held = precise(diagram, factors)
    edges = inward(diagram, center)
    _sweep(diagram, held, edges)
    values: dict[str, Tensor] = {}
    above: dict[str, tuple[str, Tensor]] = {}  # by node: the bond towards the centre, and its singular values
    for edge in edges[::-1]:
        batch, indices = batch_of(diagram, edge), diagram.nodes[edge.parent]
        seen = held[edge.parent]
        if edge.parent in above:
            bond, weights = above[edge.parent]
            seen = act(seen, indices, batch, bond, weights.diag_embed())
        values[edge.bond], basis = _right_vectors(unfold(seen, indices, batch, edge.bond))
        held[edge.parent] = act(held[edge.parent], indices, batch, edge.bond, basis)
        held[edge.child] = act(held[edge.child], diagram.nodes[edge.child], batch, edge.bond, basis)
        above[edge.child] = (edge.bond, values[edge.bond])
    return Schmidt(measured(diagram, held).diagram, tuple(edges), held, values)


def _right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All right singular vectors of a tall or wide matrix as columns, and as many singular values."""
    r = torch.linalg.qr(matrix, mode="r").R
    _, found, vh = torch.linalg.svd(r, full_matrices=True)
    return torch.nn.functional.pad(found, (0, vh.shape[-1] - found.shape[-1])), vh.mT


def hosvd(diagram: Diagram, factors: Factors, center: str | None = None) -> Network:
    """The all-orthogonal form: isometries towards the centre, whose slices are orthogonal on each of its bonds.

    sum C[.., b] C[.., c] = sigma_b^2 delta[b, c] for every bond of the centre C, the largest first; further out the
    same holds of all that lies on the centre's side of a bond.

    Source: De Lathauwer et al. 2000, SIAM J. Matrix Anal. 21(4).
    """
    return measured(diagram, schmidt(diagram, factors, center).factors, factors)


def symmetric(diagram: Diagram, factors: Factors, center: str | None = None) -> Network:
    """The Vidal-like form: on every bond, each end holds the square roots of the singular values.

    With Gamma and lambda of Vidal's form a core is lambda^1/2 Gamma lambda^1/2, whatever the centre. Directions whose
    singular value is zero are not scaled: one end is zero there, the other has unit norm and can be trained.
    Source: Vidal 2003, PRL 91; Gao et al. 2020, PRR 2 (MPO).
    """
    return measured(diagram, schmidt(diagram, factors, center).balanced(), factors)


def _roots(values: Tensor) -> Tensor:
    """Square roots of singular values; one where a value is zero but for rounding."""
    floor = values[..., :1] * values.shape[-1] * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, 1.0).sqrt()


def left(diagram: Diagram, factors: Factors, center: str | None = None) -> Network:
    """The left form of a train: every node but the last is an isometry towards its right."""
    return canonical(diagram, factors, _end(diagram, center, -1))


def right(diagram: Diagram, factors: Factors, center: str | None = None) -> Network:
    """The right form of a train: every node but the first is an isometry towards its left."""
    return canonical(diagram, factors, _end(diagram, center, 0))


def _end(diagram: Diagram, center: str | None, position: int) -> str:
    """The first or last node of a train. Raises SpecError where the nodes form no line, or a centre is given too."""
    require_tree(diagram, "a left or right form")
    if center is not None:
        raise SpecError("a left or right form has its centre at an end", got=center, hint="leave the centre out")
    bonds = diagram.bonds
    degrees = {node: sum(i in bonds for i in indices) for node, indices in diagram.nodes.items()}
    if max(degrees.values()) > 2:
        branch = max(degrees, key=lambda node: degrees[node])
        raise SpecError(
            f"a left or right form needs nodes in a line, and {branch!r} has {degrees[branch]} bonds",
            hint=f"use form='canonical', center='{branch}'",
        )
    ends = [node for node, degree in degrees.items() if degree < 2]
    return ends[position]


_Form = Callable[[Diagram, Factors, "str | None"], Network]
_FORMS: dict[str, _Form] = {
    "canonical": canonical,
    "hosvd": hosvd,
    "symmetric": symmetric,
    "left": left,
    "right": right,
}
