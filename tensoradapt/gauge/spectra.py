"""Singular values across bonds and norms of slices, from messages: what lies behind a bond, as one small matrix.

The message of a bond is R of a QR decomposition of all that lies behind it, computed from the messages of the bonds
behind that. Invariant: no message has more rows than its bond has values, so nothing dense is formed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge.tree import TREE, Edge, Factors, Names, inward, middle, obstacle, precise, product


@dataclass(frozen=True)
class _Message:
    """R of all that lies behind a bond, for each value of some axes.  Shape: (axes.., row, bond)."""

    axes: Names
    bond: str
    tensor: Tensor

    @property
    def row(self) -> str:
        return f"{self.bond} behind"

    @property
    def indices(self) -> Names:
        return (*self.axes, self.row, self.bond)


def spectra(diagram: Diagram, factors: Factors) -> dict[str, Tensor]:
    """The singular values across every bond, the largest first, without the dense tensor.

    sigma(R_u R_v^T), with R_u and R_v of what lies on either side. Axes that are carried on both sides (a batch, or
    what a shared core lacks) stay apart.  Shape by bond: (axes on both sides.., values).
    Raises SpecError where the bonds form no tree.
    """
    reason = obstacle(diagram)
    if reason:
        raise SpecError(f"a spectrum across a bond needs a tree, and here {reason}", got=str(diagram), expected=TREE)
    held = precise(diagram, factors)
    edges = inward(diagram, middle(diagram))
    outward = [Edge(edge.parent, edge.child, edge.bond) for edge in edges[::-1]]
    found = _messages(diagram, held, [*edges, *outward], ())
    pairs = {edge.bond: (found[edge.child, edge.bond], found[edge.parent, edge.bond]) for edge in edges}
    return {bond: torch.linalg.svdvals(one.tensor @ two.tensor.mT) for bond, (one, two) in pairs.items()}


def norms(diagram: Diagram, factors: Factors, keep: Sequence[str] = ()) -> Tensor:
    """The Frobenius norms of a network's slices at every value of some axes; of the whole where none is kept.

    N[k] = sqrt(sum over all other axes of T^2): exact to rounding for trees, and from Gram matrices (to the square root
    of rounding) for others.  Shape: the sizes of the axes `keep`, in their order.
    """
    held = precise(diagram, factors)
    if obstacle(diagram):
        return overlap(diagram, held, held, keep).clamp(min=0).sqrt()
    center = middle(diagram)
    found = _messages(diagram, held, inward(diagram, center), keep)
    operands = [(held[center], diagram.nodes[center]), *((m.tensor, m.indices) for m in _into(diagram, center, found))]
    names = dict.fromkeys(name for _, indices in operands for name in indices if name not in diagram.bonds)
    rest = [name for name in names if name not in keep]
    whole = product(operands, [*keep, *rest])
    return whole.flatten(len(keep)).norm(dim=-1) if rest else whole.abs()


def overlap(diagram: Diagram, bra: Factors, ket: Factors, keep: Sequence[str] = ()) -> Tensor:
    """<T(bra), T(ket)> at every value of some axes, contracted in the factors' space: O[k] = sum T(bra) T(ket).

    Bonds may differ in size between the two.  Shape: the sizes of the axes `keep`, in their order.
    """
    bonds = diagram.bonds
    primed = {n: tuple(f"{i} ket" if i in bonds else i for i in indices) for n, indices in diagram.nodes.items()}
    operands = [(bra[n], diagram.nodes[n]) for n in diagram.nodes] + [(ket[n], primed[n]) for n in diagram.nodes]
    return product(operands, keep)


def _messages(
    diagram: Diagram, held: Factors, edges: Sequence[Edge], keep: Collection[str]
) -> dict[tuple[str, str], _Message]:
    """The messages of some directed bonds, each after those behind it, by the node they come from and the bond."""
    found: dict[tuple[str, str], _Message] = {}
    for edge in edges:
        behind = _into(diagram, edge.child, found, but=edge.bond)
        operands = [(held[edge.child], diagram.nodes[edge.child]), *((m.tensor, m.indices) for m in behind)]
        names = dict.fromkeys(n for _, indices in operands for n in indices if n not in diagram.bonds)
        both = _both_sides(diagram, edge)
        axes = tuple(axis for axis in diagram.open if axis in names and (axis in keep or axis in both))
        rows = [name for name in names if name not in axes]
        matrix = product(operands, [*axes, *rows, edge.bond])
        matrix = matrix.reshape(*matrix.shape[: len(axes)], -1, matrix.shape[-1])
        found[edge.child, edge.bond] = _Message(axes, edge.bond, torch.linalg.qr(matrix, mode="r").R)
    return found


def _into(diagram: Diagram, node: str, found: dict[tuple[str, str], _Message], but: str = "") -> list[_Message]:
    """The messages that come to a node over its bonds but one."""
    return [
        found[end, b] for b, ends in diagram.bonds.items() if node in ends and b != but for end in ends if end != node
    ]


def _both_sides(diagram: Diagram, edge: Edge) -> set[str]:
    """The open axes that are carried behind a bond and beyond it too."""
    behind = {edge.child}
    for _ in diagram.nodes:
        behind |= {n for b, ends in diagram.bonds.items() if b != edge.bond and behind & set(ends) for n in ends}
    carried = [{i for n in nodes for i in diagram.nodes[n]} for nodes in (behind, set(diagram.nodes) - behind)]
    return carried[0] & carried[1] & set(diagram.open)
