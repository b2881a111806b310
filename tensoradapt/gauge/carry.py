"""Gradients and moments carried over from one set of factors to another of (nearly) the same tensor.

Where u'[.., c] = sum_b u[.., b] X[b, c] on each bond, gradients change by the other side's matrices: with
V' = V Y of all that lies across the bond, dL/du' = dL/du Y, Y = V^+ V'. Both are least squares from Gram matrices of
the subtrees, so it does not matter by which way the new factors were found.
Invariant: gradients of a function of the tensor alone are carried exactly where the tensor is kept and has full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.cp import Columns, is_cp, matching
from tensoradapt.gauge.tree import Edge, Factors, Network, act, batch_of, fold, inward, middle, precise, product, unfold

CUTOFF = 1e-10  # of the eigenvalues of Gram matrices: directions below it carry nothing over


def carried(before: Network, after: Network, moments: Factors, *, squared: bool = False) -> dict[str, Tensor]:
    """First moments as gradients change; with `squared`, second moments through the squares of the same matrices.

    The latter is exact where the entries of a gradient are uncorrelated; second moments cannot be rotated otherwise.
    Serves trees and CP, and moments of some nodes as well as of all.  Shapes: those of the factors, before -> after.
    """
    if is_cp(before.diagram):
        return _carried_cp(before, after, moments, squared)
    diagram = before.diagram
    held = {node: moment.to(torch.float64) for node, moment in moments.items()}
    for edge, matrix in _bases(before, after).items():
        if edge.parent not in held:
            continue
        matrix = matrix.square() if squared else matrix
        indices = diagram.nodes[edge.parent]
        held[edge.parent] = act(held[edge.parent], indices, batch_of(diagram, edge), edge.bond, matrix)
    return {node: moment.to(moments[node].dtype).contiguous() for node, moment in held.items()}


def _bases(before: Network, after: Network) -> dict[Edge, Tensor]:
    """For every bond and either direction, the matrix from the old to the new basis of what lies behind it."""
    diagram = before.diagram
    old, new = precise(diagram, before.factors), precise(diagram, after.factors)
    own, mixed = _grams(diagram, old, old), _grams(diagram, old, new)
    return {e: torch.linalg.pinv(own[e], rtol=CUTOFF, hermitian=True) @ mixed[e] for e in own}


def _grams(diagram: Diagram, bra: Factors, ket: Factors) -> dict[Edge, Tensor]:
    """G[b, c] = sum over all that lies behind a bond of bra[.., b] ket[.., c], for every bond and either direction."""
    bonds = diagram.bonds
    edges = inward(diagram, middle(diagram))
    found: dict[Edge, Tensor] = {}
    for edge in [*edges, *(Edge(e.parent, e.child, e.bond) for e in edges[::-1])]:
        indices = diagram.nodes[edge.child]
        primed = tuple(f"{i} ket" if i in bonds else i for i in indices)
        behind = [e for e in found if e.parent == edge.child and e.bond != edge.bond]
        operands = [(bra[edge.child], indices), (ket[edge.child], primed)]
        operands += [(found[e], (*batch_of(diagram, e), e.bond, f"{e.bond} ket")) for e in behind]
        found[edge] = product(operands, [*batch_of(diagram, edge), edge.bond, f"{edge.bond} ket"])
    return found


def _carried_cp(before: Network, after: Network, moments: Factors, squared: bool) -> dict[str, Tensor]:
    """Components of a CP go to those that they have become, divided by what their columns were multiplied by."""
    diagram = before.diagram
    (bond,) = diagram.bonds
    old, new = Columns.of(diagram, before.factors), Columns.of(after.diagram, after.factors)
    index, scales = matching(old, new)
    found = {}
    for node in moments:
        indices, scale = diagram.nodes[node], scales[node]
        matrix = unfold(moments[node].to(torch.float64), indices, diagram.batch, bond)
        picked = matrix.gather(-1, index[..., None, :].expand(*matrix.shape[:-1], index.shape[-1]))
        made = picked * (scale.square() if squared else scale)[..., None, :]
        found[node] = fold(made, after.factors[node], indices, diagram.batch, bond).to(moments[node].dtype).contiguous()
    return found
