"""The metric of networks that are no trees: every node's block of J^T J as matrices over its bonds."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.metric import pinv
from tensoradapt.gauge.tree import Factors, product
from tensoradapt.linalg import double


class Blocks:
    """The blocks of J^T J of the nodes `trained` of any network: what `Metric` is for trees, without the projection."""

    connected = pair = False

    def __init__(self, diagram: Diagram, trained: Collection[str] | None = None) -> None:
        self.nodes = [n for n in diagram.nodes if trained is None or n in trained]
        self.terms = {node: _Environment(diagram, node) for node in self.nodes}
        entries = sum(map(diagram.numel, self.nodes))
        self.shares = {node: diagram.numel(node) / entries for node in self.nodes}

    def directions(
        self, factors: Factors, grads: Factors, damping: float = 0.0, scale: float = 1.0, *, project: bool = False
    ) -> dict[str, Tensor]:
        """The direction of every trained node from its gradient, its own share of J^+ g.  Shapes: the factors'."""
        blocks = {node: double(term.gram(factors)) for node, term in self.terms.items()}
        if damping:
            diagonals = {node: block.diagonal(dim1=-2, dim2=-1) for node, block in blocks.items()}
            means = [self.shares[n] * self.terms[n].mean(d) for n, d in diagonals.items()]
            delta = sum(means[1:], means[0]) * damping
            for node, diagonal in diagonals.items():
                shift = self.terms[node].spread(delta)
                diagonal.add_(torch.where(shift > 0, shift, 1.0)[..., None])
        found = {}
        for node, block in blocks.items():
            like = factors[node]
            inverse = torch.linalg.inv_ex(block).inverse.to(like) if damping else pinv(block, like)
            found[node] = self.terms[node].apply(grads[node], inverse * scale**-2)
        return found


class _Environment:
    """A node's block of J^T J: for every value of the axes that others carry too, a matrix over its bonds."""

    def __init__(self, diagram: Diagram, node: str) -> None:
        self.nodes, indices, bonds = diagram.nodes, diagram.nodes[node], diagram.bonds
        self.others = [n for n in diagram.nodes if n != node]
        carried = {i for n in self.others for i in diagram.nodes[n]}
        self.axes = [i for i in indices if i not in bonds and i in carried]
        self.ends = [i for i in indices if i in bonds]
        self.renamed = {bond: f"{bond} ket" for bond in bonds}
        order = [*self.axes, *(i for i in indices if i not in self.axes and i not in self.ends), *self.ends]
        self.order, self.back = [indices.index(i) for i in order], [order.index(i) for i in indices]
        self.sizes = [diagram.sizes[i] for i in order]
        self.width = math.prod(diagram.sizes[i] for i in self.ends)
        self.batch = diagram.batch

    def gram(self, factors: Factors) -> Tensor:
        """Shape: (axes.., bonds, bonds)."""
        bra = [(factors[n], self.nodes[n]) for n in self.others]
        ket = [(factors[n], tuple(self.renamed.get(i, i) for i in self.nodes[n])) for n in self.others]
        made = product(bra + ket, [*self.axes, *self.ends, *(self.renamed[i] for i in self.ends)])
        return made.reshape(*self.sizes[: len(self.axes)], self.width, self.width)

    def mean(self, diagonal: Tensor) -> Tensor:
        """The mean of a block's diagonal for each value of the batch.  Shape: (batch..)."""
        made = diagonal.mean(-1)
        lone = [k for k, axis in enumerate(self.axes) if axis not in self.batch]
        made = made.mean(lone) if lone else made
        kept = [axis for axis in self.axes if axis in self.batch]
        return made.permute([kept.index(axis) for axis in self.batch])

    def spread(self, values: Tensor) -> Tensor:
        """Values for each value of the batch, for every value of the axes.  Shape: (axes..)."""
        kept = [axis for axis in self.axes if axis in self.batch]
        ordered = values.permute([self.batch.index(axis) for axis in kept])
        sizes = self.sizes[: len(self.axes)]
        return ordered.reshape([n if a in self.batch else 1 for a, n in zip(self.axes, sizes, strict=True)])

    def apply(self, grad: Tensor, matrix: Tensor) -> Tensor:
        """A node's gradient times a matrix over its bonds.  Shape: the node's."""
        rows = grad.permute(self.order).reshape(*self.sizes[: len(self.axes)], -1, self.width)
        return (rows @ matrix).reshape(self.sizes).permute(self.back)
