"""Trees of nodes: bonds with a direction, nodes as matrices, and what stands in the way where a diagram is no tree.

Invariant: `fold` undoes `unfold`, whatever the order of a node's indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from opt_einsum import contract
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.linalg import double

Factors = Mapping[str, Tensor]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """A diagram and a tensor for each of its nodes."""

    diagram: Diagram
    factors: dict[str, Tensor]


@dataclass(frozen=True)
class Edge:
    """A bond with a direction: from the node `child` to the node `parent`, which is nearer to the centre."""

    child: str
    parent: str
    bond: str


def measured(diagram: Diagram, factors: Factors, like: Factors | None = None) -> Network:
    """Factors with a diagram of the bonds' sizes that they have, in the dtypes and on the devices of `like`."""
    found = {i: n for node, indices in diagram.nodes.items() for i, n in zip(indices, factors[node].shape, strict=True)}
    cast = {node: factors[node].to((like or factors)[node]).contiguous() for node in diagram.nodes}
    return Network(replace(diagram, sizes={i: found[i] for i in diagram.sizes if i in found}), cast)


def precise(diagram: Diagram, factors: Factors) -> dict[str, Tensor]:
    """The factors detached and in float64, all where that is: the matrices of a gauge are small."""
    return {node: double(factors[node].detach()) for node in diagram.nodes}


# -- structure ----------------------------------------------------------------------------------------------------


def obstacle(diagram: Diagram) -> str:
    """Why the bonds of a diagram form no tree; empty where they do. Axes on several nodes are no obstacle here."""
    pairs = diagram.bonds
    for bond, nodes in pairs.items():
        if len(nodes) != 2:
            return f"bond {bond!r} is on {len(nodes)} nodes"
    reached = set(list(diagram.nodes)[:1])
    for _ in pairs:
        reached |= {node for pair in pairs.values() if reached & set(pair) for node in pair}
    if reached != set(diagram.nodes):
        return f"no bond joins {min(set(diagram.nodes) - reached)!r} to {min(reached)!r}"
    return "its bonds close a cycle" if len(pairs) >= len(diagram.nodes) else ""


def shared_axes(diagram: Diagram) -> list[str]:
    """The open axes that several nodes carry, but not all: a core without such an axis is shared across it."""
    counts = {axis: sum(axis in indices for indices in diagram.nodes.values()) for axis in diagram.open}
    return [axis for axis, count in counts.items() if 1 < count < len(diagram.nodes)]


def require_tree(diagram: Diagram, what: str) -> None:
    """Raise SpecError, with the reason, where a diagram is no tree."""
    reason = obstacle(diagram)
    shared = shared_axes(diagram)
    if not reason and shared:
        lacking = [node for node, indices in diagram.nodes.items() if shared[0] not in indices]
        reason = f"{lacking[0]!r} is shared across the axis {shared[0]!r}, which several other nodes carry"
    if reason:
        raise SpecError(f"{what} needs a tree, and here {reason}", got=str(diagram), expected=TREE)


TREE = "bonds between two nodes each and no cycle, every axis on one node or on all"


def inward(diagram: Diagram, center: str) -> list[Edge]:
    """The bonds of a tree directed towards a node, the outermost first."""
    found: list[Edge] = []
    reached = [center]
    for parent in reached:
        for bond, nodes in diagram.bonds.items():
            child = next((node for node in nodes if node not in reached), None)
            if parent in nodes and child is not None:
                reached.append(child)
                found.append(Edge(child, parent, bond))
    return found[::-1]


def middle(diagram: Diagram) -> str:
    """The node with most bonds, the first of several."""
    bonds = diagram.bonds
    return max(diagram.nodes, key=lambda node: sum(i in bonds for i in diagram.nodes[node]))


def batch_of(diagram: Diagram, edge: Edge) -> Names:
    """The open axes that both ends of a bond carry: each of their values has a matrix of its own."""
    return tuple(a for a in diagram.open if a in diagram.nodes[edge.child] and a in diagram.nodes[edge.parent])


# -- nodes as matrices --------------------------------------------------------------------------------------------


def unfold(tensor: Tensor, indices: Names, batch: Names, bond: str) -> Tensor:
    """A node as matrices from a bond to all else.  Shape: (batch.., rows, bond)."""
    rows = [i for i in indices if i != bond and i not in batch]
    moved = tensor.permute([indices.index(i) for i in (*batch, *rows, bond)])
    return moved.reshape(*moved.shape[: len(batch)], -1, moved.shape[-1])


def fold(matrix: Tensor, like: Tensor, indices: Names, batch: Names, bond: str) -> Tensor:
    """The node of matrices (batch.., rows, bond), with its other sizes as in `like`."""
    order = [*batch, *(i for i in indices if i != bond and i not in batch), bond]
    sizes = [like.shape[indices.index(i)] for i in order[:-1]]
    return matrix.reshape(*sizes, matrix.shape[-1]).permute([order.index(i) for i in indices])


def act(tensor: Tensor, indices: Names, batch: Names, bond: str, matrix: Tensor) -> Tensor:
    """A node times a matrix on one bond: new[.., b'] = sum_b old[.., b] matrix[batch, b, b']."""
    return fold(unfold(tensor, indices, batch, bond) @ matrix, tensor, indices, batch, bond)


def product(operands: Sequence[tuple[Tensor, Names]], result: Sequence[str]) -> Tensor:
    """The einsum of tensors with named indices, in pairs along a cheap path."""
    arguments = [part for tensor, indices in operands for part in (tensor, indices)]
    made: Tensor = contract(*arguments, tuple(result))
    return made


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The QR decomposition with a diagonal of R that is not negative: the same on every machine for full rank."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs[..., None, :], r * signs[..., :, None]
