"""CP: one bond on all nodes. Its only freedom is the scale and the order of the components.

T[a1..an] = sum_r prod_k F_k[ak, r]. Invariant: normalising multiplies the columns of a component by numbers whose
product is one; of a component that a cut leaves without weight one column is zero, the others are not, so it can be
trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.tree import Factors, Network, fold, measured, precise, unfold

SWEEPS = 30
CUTOFF = 1e-12  # of the eigenvalues of a Gram matrix in float64, and of the largest weight of a component
RIDGE = 4e-15  # on the unit diagonal of one: components that repeat each other cost next to nothing


def is_cp(diagram: Diagram) -> bool:
    """Whether one bond joins all nodes, three or more, and every axis sits on one node or on all."""
    joined = list(diagram.bonds.values())
    once = all(
        sum(axis in i for i in diagram.nodes.values()) == 1 for axis in diagram.open if axis not in diagram.batch
    )
    return once and len(joined) == 1 and len(joined[0]) == len(diagram.nodes) > 2


@dataclass(frozen=True)
class Columns:
    """A CP as matrices, one for every node: (batch.., rows, r), in float64."""

    diagram: Diagram
    held: dict[str, Tensor]

    @classmethod
    def of(cls, diagram: Diagram, factors: Factors) -> Columns:
        """The columns of a CP's nodes."""
        (bond,) = diagram.bonds
        held = precise(diagram, factors)
        return cls(diagram, {n: unfold(t, diagram.nodes[n], diagram.batch, bond) for n, t in held.items()})

    def network(self, factors: Factors) -> Network:
        """The CP of these columns, in the dtypes of `factors`."""
        (bond,) = self.diagram.bonds
        nodes, batch = self.diagram.nodes, self.diagram.batch
        made = {n: fold(m, factors[n], nodes[n], batch, bond) for n, m in self.held.items()}
        return measured(self.diagram, made, factors)

    def taken(self, index: Tensor) -> Columns:
        """Some of the components, in this order; for each value of a batch its own.  Shape of index: (batch.., r)."""
        picked = {
            n: m.gather(-1, index[..., None, :].expand(*m.shape[:-1], index.shape[-1])) for n, m in self.held.items()
        }
        return replace(self, held=picked)

    @property
    def norms(self) -> dict[str, Tensor]:
        """The norms of all columns by node.  Shape: (batch.., r)."""
        return {node: matrix.norm(dim=-2) for node, matrix in self.held.items()}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The matrix of every node and the norms of its columns."""
        return [(self.held[node], norm) for node, norm in self.norms.items()]

    @property
    def units(self) -> dict[str, Tensor]:
        """The columns at unit norm, by node; in the place of a column of zeros one of the identity."""
        found = {}
        for node, (matrix, norm) in zip(self.held, self.pairs, strict=True):
            rows, size = matrix.shape[-2:]
            place = torch.arange(size, device=matrix.device) % rows
            spare = (torch.arange(rows, device=matrix.device)[:, None] == place).to(matrix)
            alive = (norm > 0)[..., None, :]
            found[node] = torch.where(alive, matrix / torch.where(norm > 0, norm, 1.0)[..., None, :], spare)
        return found

    @property
    def weights(self) -> Tensor:
        """The norms of the components: the products of those of their columns.  Shape: (batch.., r)."""
        return _times(self.norms.values())


def _times(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.mul, tensors)


def normalised(diagram: Diagram, factors: Factors, center: str | None = None, *, balance: bool = False) -> Network:
    """A CP with unit columns and the weights in one node (`balance`: in all nodes alike), sorted by weight.

    Every column's largest entry is positive but in the centre, which takes the signs. A column of zeros stays; where
    there is one, the others of its component have unit norm. The centre is the node of weights alone, else the first.
    """
    nodes = diagram.nodes
    center = center or next(
        (n for n, i in nodes.items() if set(i) <= {*diagram.batch, *diagram.bonds}), next(iter(nodes))
    )
    columns = Columns.of(diagram, factors)
    columns = columns.taken(columns.weights.sort(dim=-1, descending=True, stable=True).indices)
    total = columns.weights
    signs = {node: _signs(matrix) for node, matrix in columns.held.items() if node != center}
    signs[center] = _times(signs.values())
    held = {}
    for node, matrix in columns.held.items():
        norm = columns.norms[node]
        share = total ** (1 / len(nodes)) if balance else total
        size = share if balance or node == center else torch.ones_like(norm)
        size = torch.where(total > 0, size, torch.ones_like(norm))
        held[node] = matrix * (signs[node] * size / torch.where(norm > 0, norm, 1.0))[..., None, :]
    return Columns(diagram, held).network(factors)


def _signs(matrix: Tensor) -> Tensor:
    """The sign of every column's largest entry; one for a column of zeros.  Shape: (.., rows, r) -> (.., r)."""
    largest = matrix.gather(-2, matrix.abs().argmax(-2, keepdim=True)).squeeze(-2)
    return torch.where(largest < 0, -1.0, 1.0).to(matrix.dtype)


@dataclass(frozen=True)
class Elimination:
    """Components left out one by one, the others' weights fitted again each time.

    `kept` lists, for 1, 2, .. components left, which those are; `costs` the squared error that each one adds when it is
    left out as the last of so many.  Shapes: (batch.., components left); (r).
    """

    kept: list[Tensor]
    costs: Tensor


def eliminated(columns: Columns) -> Elimination:
    """Leave out the component that costs least, again and again, from the components' Gram matrix K alone.

    The weights of those left solve K w = K_all 1, and leaving out s adds w_s^2 / (K^-1)[s, s] to the squared error.
    """
    size, batch = columns.weights.shape[-1], columns.weights.shape[:-1]
    norms = columns.weights.reshape(-1, size)
    unit = [matrix / torch.where(norm > 0, norm, 1.0)[..., None, :] for matrix, norm in columns.pairs]
    gram = _times(m.mT @ m for m in unit).reshape(-1, size, size)
    left = torch.arange(size, device=gram.device).expand(len(gram), size)
    kept, costs = [], []
    for rank in range(size, 0, -1):
        rows = gram.gather(1, left[:, :, None].expand(-1, -1, size))
        inner = rows.gather(2, left[:, None, :].expand(-1, rank, -1))
        inverse = torch.linalg.inv(inner + RIDGE * torch.eye(rank, dtype=gram.dtype, device=gram.device))
        weights = (inverse @ rows @ norms[..., None]).squeeze(-1)
        added = weights.square() / inverse.diagonal(dim1=-2, dim2=-1)
        kept.append(left.reshape(*batch, rank))
        least = added.argmin(-1, keepdim=True)
        costs.append(added.gather(1, least).sum())
        stays = torch.ones_like(left, dtype=torch.bool).scatter(1, least, False)
        left = left[stays].reshape(len(left), rank - 1)
    return Elimination(kept[::-1], torch.stack(costs[::-1]))


def shrunk(diagram: Diagram, factors: Factors, rank: int) -> Network:
    """A CP of fewer components near to this one: those that `eliminated` keeps, then alternating least squares.

    Every sweep solves min_F ||T - sum_s F_k[ak, s] prod_(j!=k) F_j[aj, s]|| for one node after the other, from the
    Gram matrices of columns alone. There is no closed form of the best one. Source: Kolda and Bader 2009, section 3.4.
    """
    whole = Columns.of(diagram, factors)
    if whole.weights.shape[-1] <= rank:
        return measured(diagram, dict(factors))
    kept = whole.taken(eliminated(whole).kept[rank - 1])
    return _spread(kept, *_fitted(whole, kept)).network(factors)


def _fitted(whole: Columns, kept: Columns) -> tuple[dict[str, Tensor], Tensor]:
    """Alternating least squares from some components to the whole: unit columns by node, and weights (batch.., r).

    A component that comes out as nothing keeps its column with the weight 0, or it would be nothing in every node.
    """
    units, weights = kept.units, kept.weights
    floor = CUTOFF * whole.weights.amax(-1, keepdim=True)
    for _ in range(SWEEPS):
        for node in units:
            others = [n for n in units if n != node]
            inner = _times(units[n].mT @ units[n] for n in others)
            outer = _times(whole.held[n].mT @ units[n] for n in others)
            best = whole.held[node] @ outer @ torch.linalg.pinv(inner, rtol=CUTOFF, hermitian=True)
            found = best.norm(dim=-2)
            weights = torch.where(found > floor, found, 0.0)
            scaled = best / torch.where(weights > 0, weights, 1.0)[..., None, :]
            units[node] = torch.where((weights > 0)[..., None, :], scaled, units[node])
    return units, weights


def _spread(kept: Columns, units: Mapping[str, Tensor], weights: Tensor) -> Columns:
    """Columns of these weights, which go to the nodes in the ratios of the norms that they had.

    A component of weight 0 keeps its norms, but at one node: its first of zeros, or else the first of all.
    """
    norms = torch.stack(list(kept.norms.values()))
    total = kept.weights
    share = torch.where(total > 0, norms / torch.where(total > 0, total, 1.0) ** (1 / len(norms)), 1.0)
    nodes = torch.arange(len(norms), device=norms.device).reshape(-1, *[1] * weights.dim())
    idle = torch.where(norms > 0, norms, 1.0) * ((norms == 0).int().argmax(0) != nodes)
    sizes = torch.where(weights > 0, share * weights ** (1 / len(norms)), idle)
    held = {node: matrix * size[..., None, :] for (node, matrix), size in zip(units.items(), sizes, strict=True)}
    return replace(kept, held=held)


def matching(old: Columns, new: Columns) -> tuple[Tensor, dict[str, Tensor]]:
    """For every new component the old one that is most alike, and what its gradients are multiplied by, by node.

    That is prod_(j!=k) s_j where the column of node j became s_j times itself.  Shape of either: (batch.., r).
    """
    tiny = torch.finfo(torch.float64).tiny
    cosines = [
        (old.held[node].mT @ new.held[node]).abs()
        / (norm[..., :, None] * new.norms[node][..., None, :]).clamp(min=tiny)
        for node, norm in old.norms.items()
    ]
    index = torch.stack(cosines).sum(0).argmax(-2)
    grown = {}
    for node, column in old.taken(index).held.items():
        size = column.square().sum(-2)
        grown[node] = torch.where(size > 0, (column * new.held[node]).sum(-2) / size.clamp(min=tiny), 1.0)
    return index, {node: _times(s for other, s in grown.items() if other != node) for node in grown}
