"""Trees: the truncated SVD of every tree diagram, leaf by leaf (TT-SVD, sequentially truncated HOSVD, and all others).

Invariant: every leaf is orthonormal when it is cut off, so the squared error is the sum of what the cuts discard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import Policy
from tensoradapt.linalg import LowRank, double, singular_values, truncated_svd

SIDE, MANY = 4096, 8  # up to this side the whole spectrum is computed from a rank of 1/MANY of the side on
WHOLE = 1024  # up to this side a matrix shows its whole spectrum, by its Gram matrix
FIRST = 16  # the rank that is tried first where the tensor decides: it is doubled until the policy is content
LINK = "__link"  # bonds of size one that join the pieces of a Kronecker product


@dataclass(frozen=True)
class TreeFit:
    """A tree's diagram with the ranks it got, its factors, the spectra across its bonds, and the discarded squares.

    `retried` lists the failures after which an SVD was done once more, on the CPU.
    """

    diagram: Diagram
    factors: Mapping[str, Tensor]
    spectra: Mapping[str, Tensor]
    discarded: Mapping[str, float]
    retried: tuple[str, ...] = ()

    @property
    def lost(self) -> float:
        """The squared error."""
        return sum(self.discarded.values())


@dataclass
class _State:
    """What is left of the tensor: its indices, and the nodes that are still to be cut off it."""

    tensor: Tensor
    indices: tuple[str, ...]
    nodes: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    factors: dict[str, Tensor] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    discarded: dict[str, float] = field(default_factory=dict)
    retried: list[str] = field(default_factory=list)


def linked(diagram: Diagram) -> Diagram | None:
    """The diagram as one tree, its pieces joined by bonds of size one; None where it is no tree."""
    pieces = _pieces(diagram)
    nodes = dict(diagram.nodes)
    sizes = dict(diagram.sizes)
    for number, (one, two) in enumerate(zip(pieces, pieces[1:], strict=False)):
        bond = f"{LINK}_{number}"
        sizes[bond] = 1
        nodes[one[-1]] = (*nodes[one[-1]], bond)
        nodes[two[0]] = (*nodes[two[0]], bond)
    joined = replace(diagram, nodes=nodes, sizes=sizes)
    return joined if joined.is_tree else None


def _pieces(diagram: Diagram) -> list[list[str]]:
    """The nodes in connected pieces."""
    left, pieces = list(diagram.nodes), []
    while left:
        piece = [left.pop(0)]
        for node in piece:
            bonds = set(diagram.nodes[node]) & set(diagram.bonds)
            near = [other for other in left if bonds & set(diagram.nodes[other])]
            piece += near
            left = [other for other in left if other not in near]
        pieces.append(piece)
    return pieces


def tree_svd(tensor: Tensor, diagram: Diagram, policy: Policy, *, seed: int = 0) -> TreeFit:
    """Factors of a tree from its tensor: leaf after leaf is cut off by a truncated SVD, the cheapest first.

    T[leaf's indices, rest] ~ sum_r U[leaf's indices, r] (s V)[r, rest].  Shape: the sizes of `diagram.open`.
    |T - T^|^2 = sum over bonds of the discarded squares <= (number of bonds) min |T - X|^2 over networks X of the same
    ranks. Source: Oseledets 2011; Vannieuwenhoven et al. 2012; Grasedyck 2010.
    """
    whole = linked(diagram)
    assert whole is not None
    batch = whole.batch
    front = tensor.permute(*[whole.open.index(a) for a in (*batch, *(a for a in whole.open if a not in batch))])
    count = math.prod(whole.sizes[a] for a in batch)
    state = _State(
        front.reshape(count, *front.shape[len(batch) :]),
        tuple(a for a in whole.open if a not in batch),
        {node: tuple(i for i in indices if i not in batch) for node, indices in whole.nodes.items()},
        dict(whole.sizes),
    )
    while len(state.nodes) > 1:
        _cut(state, policy, seed)
    root, indices = state.nodes.popitem()
    state.factors[root] = _ordered(state.tensor, state.indices, indices)
    _balance(state, whole)
    return _unlinked(state, diagram, whole, batch)


def _cut(state: _State, policy: Policy, seed: int) -> None:
    """Cut the cheapest leaf off."""
    node, bond = min(_leaves(state), key=lambda leaf: (_cost(state, *leaf), leaf))
    rows = [i for i in state.nodes[node] if i != bond]
    cols = [i for i in state.indices if i not in rows]
    matrix = state.tensor.permute(0, *[1 + state.indices.index(i) for i in (*rows, *cols)])
    height = math.prod(state.sizes[i] for i in rows)
    found, rank = _decompose(matrix.reshape(len(matrix), height, -1), bond, policy, seed)
    state.spectra[bond] = found.s
    state.retried += [found.retried] if found.retried else []
    kept = found.cut(rank)
    state.discarded[bond] = float(double(kept.residual).square().sum())
    state.sizes[bond] = rank
    u = kept.u.reshape(len(matrix), *[state.sizes[i] for i in rows], rank)
    state.factors[node] = _ordered(u, (*rows, bond), state.nodes.pop(node))
    state.tensor = (kept.s[..., None] * kept.v.mT).reshape(len(matrix), rank, *[state.sizes[i] for i in cols])
    state.indices = (bond, *cols)


def _decompose(matrix: Tensor, bond: str, policy: Policy, seed: int) -> tuple[LowRank, int]:
    """A truncated SVD with the terms that the policy keeps (at least one)."""
    limit = min(matrix.shape[-2:])
    most = 1 if bond.startswith(LINK) else policy.most(bond)
    if most is not None:
        tried = min(limit, most)
    elif limit <= WHOLE:
        tried = min(limit, max(1, policy.keep(bond, singular_values(matrix), 0.0)))
    else:
        tried = _explored(matrix, bond, policy, seed)
    found = truncated_svd(matrix, tried, seed=seed)
    rank = 1 if bond.startswith(LINK) else max(1, policy.keep(bond, found.s, double(found.residual).square()))
    return _padded(found, rank, matrix), rank


def _explored(matrix: Tensor, bond: str, policy: Policy, seed: int) -> int:
    """How many terms the policy keeps of a large matrix: twice as many are looked at until it is content.

    Where they become many, the whole spectrum costs less than further looks.
    """
    limit, tried = min(matrix.shape[-2:]), FIRST
    while True:
        found = truncated_svd(matrix, tried, seed=seed, tolerance=1e-2)
        rank = max(1, policy.keep(bond, found.s, double(found.residual).square()))
        if rank < tried or tried == limit:
            return rank
        if MANY * tried >= limit and limit <= SIDE:
            return min(limit, max(1, policy.keep(bond, singular_values(matrix), 0.0)))
        tried = min(limit, 2 * tried)


def _padded(found: LowRank, rank: int, matrix: Tensor) -> LowRank:
    """With terms of zero where a literal rank is above the matrix's limit."""
    short = rank - found.s.shape[-1]
    if short <= 0:
        return found
    pad = lambda t, n: torch.cat([t, t.new_zeros(*t.shape[:-1], n)], -1)  # noqa: E731
    return replace(found, u=pad(found.u, short), s=pad(found.s, short), v=pad(found.v, short))


def _leaves(state: _State) -> list[tuple[str, str]]:
    """The nodes with one bond to others that are left, with that bond."""
    joins = {
        node: [b for b in indices if any(b in other for name, other in state.nodes.items() if name != node)]
        for node, indices in state.nodes.items()
    }
    return [(node, bonds[0]) for node, bonds in joins.items() if len(bonds) == 1]


def _cost(state: _State, node: str, bond: str) -> float:
    """Roughly the operations of the leaf's SVD: the tensor times the smaller of its rank and its sides."""
    rows = math.prod(state.sizes[i] for i in state.nodes[node] if i != bond)
    cols = state.tensor[0].numel() / max(1, rows)
    return min(rows, cols, state.sizes[bond])


def _ordered(tensor: Tensor, have: tuple[str, ...], want: tuple[str, ...]) -> Tensor:
    """A batch of node tensors with their indices in the diagram's order."""
    return tensor.permute(0, *[1 + have.index(i) for i in want])


def _balance(state: _State, whole: Diagram) -> None:
    """Share every bond's singular values between its two nodes, by square roots: half precision then holds both."""
    for bond, nodes in whole.bonds.items():
        s = state.spectra[bond][..., : state.sizes[bond]]
        s = torch.cat([s, s.new_zeros(*s.shape[:-1], state.sizes[bond] - s.shape[-1])], -1)
        root = torch.where(s > s[..., :1] * torch.finfo(s.dtype).eps, s, s[..., :1]).sqrt()
        root = torch.where(root > 0, root, torch.ones_like(root))
        leaf = next(n for n in state.factors if n in nodes)  # factors stand in the order in which they were cut off
        other = next(n for n in nodes if n != leaf)
        state.factors[leaf] = _scaled(state.factors[leaf], whole.nodes[leaf], whole, bond, root)
        state.factors[other] = _scaled(state.factors[other], whole.nodes[other], whole, bond, 1 / root)


def _scaled(tensor: Tensor, indices: tuple[str, ...], whole: Diagram, bond: str, by: Tensor) -> Tensor:
    own = [i for i in indices if i not in whole.batch]
    shape = [len(tensor)] + [by.shape[-1] if i == bond else 1 for i in own]
    return tensor * by.reshape(shape)


def _unlinked(state: _State, diagram: Diagram, whole: Diagram, batch: tuple[str, ...]) -> TreeFit:
    """The factors of the diagram itself: batch axes in their places, links gone."""
    factors = {}
    for node, indices in diagram.nodes.items():
        own = [i for i in whole.nodes[node] if i not in batch]
        kept = state.factors[node]
        for dim in reversed([1 + k for k, i in enumerate(own) if i.startswith(LINK)]):
            kept = kept.squeeze(dim)
        have = (*batch, *(i for i in own if not i.startswith(LINK)))
        kept = kept.reshape(*[state.sizes[a] for a in batch], *kept.shape[1:])
        factors[node] = kept.permute(*[have.index(i) for i in indices]).contiguous()
    sizes = {i: state.sizes[i] for i in diagram.sizes}
    return TreeFit(replace(diagram, sizes=sizes), factors, state.spectra, state.discarded, tuple(state.retried))


def bond_spectra(tensor: Tensor, diagram: Diagram) -> dict[str, Tensor]:
    """The singular values across every bond of a tree, of the tensor's own unfoldings.  Shape: (batch, k) each.

    No network of the diagram with rank r at a bond is closer to the tensor than sum_(k > r) s[k]^2.
    """
    whole = linked(diagram)
    assert whole is not None
    return {bond: singular_values(_cut_at(tensor, whole, bond)) for bond in diagram.bonds}


def _cut_at(tensor: Tensor, whole: Diagram, bond: str) -> Tensor:
    """The tensor unfolded into what lies on the two sides of a bond.  Shape: (batch, one side, other side)."""
    side = {whole.bonds[bond][0]}
    for _ in whole.nodes:
        near = {n for b, pair in whole.bonds.items() if b != bond and side & set(pair) for n in pair}
        side |= near
    batch = whole.batch
    rows = [a for a in whole.open if a not in batch and any(a in whole.nodes[n] for n in side)]
    cols = [a for a in whole.open if a not in (*batch, *rows)]
    front = tensor.permute([whole.open.index(a) for a in (*batch, *rows, *cols)])
    count = math.prod(whole.sizes[a] for a in batch)
    return front.reshape(count, math.prod(whole.sizes[a] for a in rows), -1)
