"""Gradients and moments carried over from one set of factors to another of (nearly) the same tensor.

Where u'[.., c] = sum_b u[.., b] X[b, c] on each bond, gradients change by the other side's matrices: with
V' = V Y of all that lies across the bond, dL/du' = dL/du Y, Y = V^+ V'. Both are least squares from Gram matrices of
the subtrees, so it does not matter by which way the new factors were found.
Invariant: gradients of a function of the tensor alone are carried exactly where the tensor is kept and has full rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.cp import Columns, is_cp, matching
from tensoradapt.gauge.tree import Edge, Factors, Network, act, batch_of, fold, inward, middle, precise, product, unfold
from tensoradapt.linalg import double

CUTOFF = 1e-10  # of the eigenvalues of Gram matrices: directions below it carry nothing over


@dataclass(frozen=True)
class Carry:
    """From the moments of one network's factors to those of another's, which has the same tensor or a part of it.

    Serves trees and CP, and moments of some nodes as well as of all.
    """

    before: Network
    after: Network

    def __call__(self, moments: Factors, *, squared: bool = False) -> dict[str, Tensor]:
        """First moments as gradients change; with `squared`, second moments through the squares of the same matrices.

        The latter is exact where the entries of a gradient are uncorrelated; second moments cannot be rotated
        otherwise.  Shapes: those of the factors, before -> after.
        """
        held = {node: double(moment) for node, moment in moments.items()}
        made = (self._columns if is_cp(self.before.diagram) else self._turned)(held, squared)
        return {node: moment.to(moments[node]).contiguous() for node, moment in made.items()}

    def _turned(self, held: dict[str, Tensor], squared: bool) -> dict[str, Tensor]:
        diagram = self.before.diagram
        for edge in (edge for edge in self._bases if edge.parent in held):
            matrix = self._bases[edge].square() if squared else self._bases[edge]
            indices = diagram.nodes[edge.parent]
            held[edge.parent] = act(held[edge.parent], indices, batch_of(diagram, edge), edge.bond, matrix)
        return held

    @cached_property
    def _bases(self) -> dict[Edge, Tensor]:
        """For every bond and either direction, the matrix from the old to the new basis of what lies behind it."""
        diagram = self.before.diagram
        old, new = (precise(diagram, network.factors) for network in (self.before, self.after))
        own, mixed = _grams(diagram, old, old), _grams(diagram, old, new)
        return {e: torch.linalg.pinv(own[e], rtol=CUTOFF, hermitian=True) @ mixed[e] for e in own}

    def _columns(self, held: dict[str, Tensor], squared: bool) -> dict[str, Tensor]:
        """Components of a CP go to those that they have become, divided by what their columns were multiplied by."""
        diagram = self.before.diagram
        (bond,) = diagram.bonds
        index, scales = self._matching
        for node, moment in held.items():
            indices, scale = diagram.nodes[node], scales[node]
            matrix = unfold(moment, indices, diagram.batch, bond)
            picked = matrix.gather(-1, index[..., None, :].expand(*matrix.shape[:-1], index.shape[-1]))
            made = picked * (scale.square() if squared else scale)[..., None, :]
            held[node] = fold(made, self.after.factors[node], indices, diagram.batch, bond)
        return held

    @cached_property
    def _matching(self) -> tuple[Tensor, dict[str, Tensor]]:
        return matching(*(Columns.of(network.diagram, network.factors) for network in (self.before, self.after)))


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
