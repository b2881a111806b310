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
from typing import Any

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.tree import Factors, inward, product, require_tree


class Metric:
    """The Gram matrices of a tree of which the nodes `trained` move, and the directions they give.

    The root is the trained node with most bonds, the last of several. `connected` says whether the trained nodes hang
    together, without which there is no gauge that makes the blocks orthogonal. Raises SpecError on what is no tree.
    """

    def __init__(self, diagram: Diagram, trained: Collection[str] | None = None) -> None:
        require_tree(diagram, "a metric of Gram matrices")
        self.nodes = [n for n in diagram.nodes if trained is None or n in trained]
        bonds = diagram.bonds
        self.root = max(reversed(self.nodes), key=lambda node: sum(i in bonds for i in diagram.nodes[node]))
        self.edges = inward(diagram, self.root)
        self.above = {edge.child: edge.bond for edge in self.edges}
        self.below = {n: [e.bond for e in self.edges if e.parent == n] for n in diagram.nodes}
        self.connected = all(edge.parent in self.nodes for edge in self.edges if edge.child in self.nodes)
        self._legs = {(node, bond): _leg(diagram, node, bond) for bond, ends in bonds.items() for node in ends}
        self.pair = len(diagram.nodes) == len(self.nodes) == 2
        entries = sum(map(diagram.numel, self.nodes))
        self.shares = {node: diagram.numel(node) / entries for node in self.nodes}
        self._around = {node: self._block(node) for node in diagram.nodes}
        self.blocks = {node: self._around[node] for node in self.nodes}
        self.alike: dict[int, list[tuple[str, bool]]] = {}
        for bond in bonds:
            self.alike.setdefault(diagram.sizes[bond], []).extend([(bond, True), (bond, False)])
        place = {key: k for k, key in enumerate(key for keys in self.alike.values() for key in keys)}
        spans = {node: [place[key] for key in block] for node, block in self.blocks.items()}
        self._traces = [(self.shares[node], span) for node, span in spans.items()]
        beside = {k: [other for other in span if other != k] for span in spans.values() for k in span}
        self._rest = [beside.get(k, []) for k in range(len(place))]  # what else is in a matrix's block

    def _block(self, node: str) -> list[tuple[str, bool]]:
        """The Gram matrices of a node's block: by bond, and whether of what lies behind it, seen from the root."""
        up = [(self.above[node], False)] if node in self.above else []
        return up + [(bond, True) for bond in self.below[node]]

    def grams(self, factors: Factors) -> dict[tuple[str, bool], Tensor]:
        """Every bond's Gram matrix of all behind it (True) and of all before it (False).  Shape: (batch.., r, r)."""
        found: dict[tuple[str, bool], Tensor] = {}
        for edge in self.edges:
            found[edge.bond, True] = self._gram(factors, edge.child, edge.bond, found)
        for edge in reversed(self.edges):
            found[edge.bond, False] = self._gram(factors, edge.parent, edge.bond, found)
        return found

    def _gram(self, factors: Factors, node: str, bond: str, found: dict[tuple[str, bool], Tensor]) -> Tensor:
        seen = factors[node]
        for other in self._around[node]:
            if other[0] != bond:
                seen = self._legs[node, other[0]].act(seen, found[other])
        return self._legs[node, bond].overlap(seen, factors[node])

    def inverses(self, factors: Factors, damping: float) -> dict[tuple[str, bool], Tensor]:
        """The inverse Gram matrices: pseudo-inverses without damping.

        With damping, delta = damping * tr(J^T J) / entries is the network's, the same for all blocks: a matrix alone in
        its block gets delta, one of several delta over the mean eigenvalues of the others.
        """
        grams = self.grams(factors)
        like = factors[self.root].dtype
        wide = {size: torch.stack([grams[key] for key in keys]).double() for size, keys in self.alike.items()}
        if damping:
            self._damp(wide, damping)
            made = {size: torch.linalg.inv_ex(stack).inverse.to(like) for size, stack in wide.items()}
        else:
            made = {size: _pinv(stack, like) for size, stack in wide.items()}
        return {
            key: one for size, keys in self.alike.items() for key, one in zip(keys, made[size].unbind(), strict=True)
        }

    def _damp(self, wide: dict[int, Tensor], damping: float) -> None:
        """Add to every matrix of the stacks, in place, what damps it."""
        diagonals = [stack.diagonal(dim1=-2, dim2=-1) for stack in wide.values()]
        means = [mean for diagonal in diagonals for mean in _numbers(diagonal.mean(-1))]
        delta = sum(math.prod([means[k] for k in spans], start=share) for share, spans in self._traces) * damping
        shifts = [delta / (math.prod([means[k] for k in rest]) + _TINY) if rest else delta for rest in self._rest]
        for diagonal in diagonals:
            mine, shifts = shifts[: len(diagonal)], shifts[len(diagonal) :]
            diagonal.add_(_tensor(mine, diagonal)[..., None])

    def directions(
        self, factors: Factors, grads: Factors, damping: float = 0.0, scale: float = 1.0, *, project: bool = True
    ) -> dict[str, Tensor]:
        """The direction of every trained node from its gradient, of `scale` times the network.

        With `project`, J d is the projection of g on the tangent space; without, every node's own share of it, what
        several nodes see counted several times.  Shapes: those of the factors.
        """
        inverse = self.inverses(factors, damping)
        found = {}
        for node in self.nodes:
            weights = {key: inverse[key] for key in self.blocks[node]}
            first = next(iter(weights), None)
            if first is not None and scale != 1:  # on the smallest of what is multiplied
                weights[first] = weights[first] * scale**-2
            found[node] = self._direction(node, factors[node], grads[node], weights)
            if project and node in self.above:
                bond = self.above[node]
                leg = self._legs[node, bond]
                turn = inverse[bond, True] @ leg.overlap(factors[node], grads[node]) @ weights[bond, False]
                found[node] = leg.less(found[node], factors[node], turn)
            elif first is None:
                found[node] = grads[node] * scale**-2
        return found

    def _direction(self, node: str, factor: Tensor, grad: Tensor, weights: dict[tuple[str, bool], Tensor]) -> Tensor:
        """A node's gradient times a matrix on each of its bonds."""
        for (bond, _), matrix in weights.items():
            grad = self._legs[node, bond].act(grad, matrix)
        return grad


_TINY = 1e-100


class _Leg:
    """A node as matrices from one of its bonds to all else, and back.  Shape: (batch.., rows, bond)."""

    def __init__(self, diagram: Diagram, node: str, bond: str) -> None:
        indices, batch = diagram.nodes[node], diagram.batch
        order = [*batch, *(i for i in indices if i != bond and i not in batch), bond]
        self.order = [indices.index(i) for i in order]
        self.back = [order.index(i) for i in indices]
        self.sizes = [diagram.sizes[i] for i in order]
        self.shape = (*self.sizes[: len(batch)], -1, self.sizes[-1])

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order).reshape(self.shape)

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.sizes).permute(self.back)

    def act(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        """The node times a matrix on the bond: new[.., c] = sum_b old[.., b] matrix[b, c]."""
        return self.fold(self.unfold(tensor) @ matrix)

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        """Both contracted over all but the bond.  Shape: (batch.., bond, bond)."""
        return self.unfold(one).mT @ self.unfold(two)

    def less(self, made: Tensor, tensor: Tensor, matrix: Tensor) -> Tensor:
        """`made` less the node times a matrix on the bond."""
        return made - self.act(tensor, matrix)


class _Last(_Leg):
    """The bond is the last index, behind the batch: the node is these matrices already."""

    def unfold(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)

    def fold(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.sizes)

    def less(self, made: Tensor, tensor: Tensor, matrix: Tensor) -> Tensor:
        if len(self.sizes) > 2:
            return super().less(made, tensor, matrix)
        return torch.addmm(made, tensor, matrix, alpha=-1)


class _Rows(_Leg):
    """The bond is the last index but one and there is no batch: rows of matrices, which need not be copied."""

    def act(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        return matrix.mT @ tensor

    def overlap(self, one: Tensor, two: Tensor) -> Tensor:
        made = one @ two.mT
        return made.sum(tuple(range(made.ndim - 2))) if made.ndim > 2 else made


def _leg(diagram: Diagram, node: str, bond: str) -> _Leg:
    indices, batch = diagram.nodes[node], diagram.batch
    if indices[-1] == bond and indices[: len(batch)] == batch:
        return _Last(diagram, node, bond)
    return (_Rows if indices[-2] == bond and not batch else _Leg)(diagram, node, bond)


def _numbers(means: Tensor) -> Sequence[Any]:
    """The entries of a first axis: as numbers where there is no other, which are cheaper than tensors on a CPU."""
    return means.tolist() if means.ndim == 1 and means.device.type == "cpu" else means.unbind()


def _tensor(shifts: Sequence[Any], like: Tensor) -> Tensor:
    """Shifts of matrices, 1 where all that there is is zero: the inverse of a zero matrix meets zeros alone."""
    if isinstance(shifts[0], float):
        return like.new_tensor([shift or 1.0 for shift in shifts])
    made = torch.stack(list(shifts))
    return torch.where(made > 0, made, 1.0)


def _pinv(gram: Tensor, like: torch.dtype) -> Tensor:
    """Pseudo-inverses: what is rounding of the dtype that a Gram matrix was computed in counts as zero."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:] * values.shape[-1] * torch.finfo(like).eps
    kept = torch.where(values > floor, 1 / values.clamp(min=_TINY), 0.0)
    return (vectors * kept[..., None, :] @ vectors.mT).to(like)


class Blocks:
    """The same for networks that are no trees, without the projection: every block of J^T J as a matrix over bonds."""

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
        blocks = {node: term.gram(factors).double() for node, term in self.terms.items()}
        if damping:
            diagonals = {node: block.diagonal(dim1=-2, dim2=-1) for node, block in blocks.items()}
            means = [self.shares[n] * self.terms[n].mean(d) for n, d in diagonals.items()]
            delta = sum(means[1:], means[0]) * damping
            for node, diagonal in diagonals.items():
                shift = self.terms[node].spread(delta)
                diagonal.add_(torch.where(shift > 0, shift, 1.0)[..., None])
        found = {}
        for node, block in blocks.items():
            like = factors[node].dtype
            inverse = torch.linalg.inv_ex(block).inverse.to(like) if damping else _pinv(block, like)
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
