"""A node of a tree as matrices from one of its bonds to all else, without copies where its indices lie well.

Invariant: all kinds of legs give the same; they differ in what they cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram


class Leg:
    """A node as matrices from one of its bonds to all else, and back.  Shape: (batch.., rows, bond)."""

    def __init__(self, diagram: Diagram, node: str, bond: str) -> None:
        indices, batch = diagram.nodes[node], diagram.batch
        order = [*batch, *(i for i in indices if i != bond and i not in batch), bond]
        self.order = [indices.index(i) for i in order]
        self.back = [order.index(i) for i in indices]
        self.sizes = [diagram.sizes[i] for i in order]
        self.shape = (*self.sizes[: len(batch)], -1, self.sizes[-1])

    def unfold(self, tensor: Tensor) -> Tensor:
        """The node as matrices."""
        return tensor.permute(self.order).reshape(self.shape)

    def fold(self, matrix: Tensor) -> Tensor:
        """The node of these matrices."""
        return matrix.reshape(self.sizes).permute(self.back)

    def act(self, tensor: Tensor, matrix: Tensor, weight: float = 1.0) -> Tensor:
        """The node times a matrix on the bond: new[.., c] = weight sum_b old[.., b] matrix[b, c]."""
        return self.fold(self.unfold(tensor) @ _weighted(matrix, weight))

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        """Both contracted over all but the bond.  Shape: (batch.., bond, bond)."""
        return self.unfold(one).mT @ self.unfold(two)

    def less(self, made: Tensor, tensor: Tensor, matrix: Tensor) -> Tensor:
        """`made` less the node times a matrix on the bond."""
        return made - self.act(tensor, matrix)


class _Last(Leg):
    """The bond is the last index, behind the batch: the node is these matrices already."""

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.sizes)


class _Columns(Leg):
    """The bond is the last index and there is no batch."""

    def act(self, tensor: Tensor, matrix: Tensor, weight: float = 1.0) -> Tensor:
        return torch.matmul(tensor, _weighted(matrix, weight))

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        return torch.mm(one.flatten(0, -2).t(), two.flatten(0, -2))


class _Rows(Leg):
    """The bond is the last index but one and there is no batch: rows of matrices, which need not be copied."""

    def act(self, tensor: Tensor, matrix: Tensor, weight: float = 1.0) -> Tensor:
        rows = tensor.flatten(0, -3)
        each = matrix.t().expand(len(rows), -1, -1)
        return torch.baddbmm(rows, each, rows, beta=0, alpha=weight).view_as(tensor)

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        return torch.bmm(one.flatten(0, -3), two.flatten(0, -3).mT).sum(0)


class _Matrix(Leg):
    """The node is one matrix with the bond last."""

    def act(self, tensor: Tensor, matrix: Tensor, weight: float = 1.0) -> Tensor:
        return torch.addmm(tensor, tensor, matrix, beta=0, alpha=weight)

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        return torch.mm(one.t(), two)

    def less(self, made: Tensor, tensor: Tensor, matrix: Tensor) -> Tensor:
        return torch.addmm(made, tensor, matrix, alpha=-1)


class _First(Leg):
    """The bond is the first index and there is no batch: the node is one matrix too, if all else is one index."""

    def act(self, tensor: Tensor, matrix: Tensor, weight: float = 1.0) -> Tensor:
        flat = tensor.flatten(1)
        return torch.addmm(flat, matrix.t(), flat, beta=0, alpha=weight).view_as(tensor)

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        return torch.mm(one.flatten(1), two.flatten(1).t())

    def less(self, made: Tensor, tensor: Tensor, matrix: Tensor) -> Tensor:
        return torch.addmm(made.flatten(1), matrix.t(), tensor.flatten(1), alpha=-1).view_as(tensor)


def _weighted(matrix: Tensor, weight: float) -> Tensor:
    """Here because the matrix is smaller than what it is multiplied with."""
    return matrix if weight == 1 else matrix * weight


def leg(diagram: Diagram, node: str, bond: str) -> Leg:
    """The cheapest way to see a node from one of its bonds."""
    indices, batch = diagram.nodes[node], diagram.batch
    if batch or len(indices) == 1:
        return (_Last if indices[-1] == bond and indices[: len(batch)] == batch else Leg)(diagram, node, bond)
    last = _Matrix if len(indices) == 2 else _Columns
    return {indices[-2]: _Rows, indices[0]: _First, indices[-1]: last}.get(bond, Leg)(diagram, node, bond)
