"""Starts from the weights themselves, and from nothing but a seed.

Invariant: `weighting` C of the inputs enters as W C = U S V^T and leaves as V^T C^-1; without one C is the identity.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tensoradapt.errors import RankError
from tensoradapt.fit.stream import Stream
from tensoradapt.init import WEIGHT, draw
from tensoradapt.laws import BALANCED
from tensoradapt.linalg import double, home_of
from tensoradapt.linalg.lapack import qr, svd
from tensoradapt.rows import Factor, factor_of
from tensoradapt.start.install import Factors
from tensoradapt.start.sides import is_matrix
from tensoradapt.start.targets import Job, turned

TWINS = 0.1  # the size of the entries of an orthogonal start, as published


def principal(job: Job, weighting: Tensor | None = None) -> Factors:
    """The networks closest to the weights: scale N_s ~ W_s.  One matrix: B = U_r (S_r/s)^1/2, A = (S_r/s)^1/2 V_r^T.

    Source: PiSSA, arXiv 2404.02948.
    """
    turn = None if weighting is None else (lambda w: w @ weighting)
    return job.fit(job.stream(job.weight, turn), 1 / job.group.scale)


def minor(job: Job, weighting: Tensor | None = None) -> Factors:
    """The networks closest to the trailing part of the weights, P W_s Q: scale N_s ~ P W_s Q.

    P and Q project on the last r left and right singular directions of the group's stacked weights; of one matrix that
    is its last r singular triplets. Source: MiLoRA, arXiv 2406.09044.
    """
    weights = job.stream(job.weight, None if weighting is None else (lambda w: w @ weighting))
    if is_matrix(job.group):
        rank = _width(job, "out")
        return job.fit(turned(weights, lambda w: _last(w, rank)), 1 / job.group.scale)
    left, right = _trailing(job, weights)
    return job.fit(turned(weights, lambda w: left @ (left.mT @ w @ right) @ right.mT), 1 / job.group.scale)


def _last(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = svd(matrix)
    return (u[:, -rank:] * s[-rank:]) @ vh[-rank:]


def _width(job: Job, axis: str) -> int:
    """The largest bond at the nodes that carry a side, or a fold of it."""
    diagram = job.group.diagram
    near = {i for indices in diagram.nodes.values() if set(diagram.fold(axis)) & set(indices) for i in indices}
    return max((diagram.sizes[i] for i in near if i in diagram.bonds), default=1)


def _trailing(job: Job, weights: Stream) -> tuple[Tensor, Tensor]:
    """The last directions, of those that can be more than nothing, of all weights of a group on either side."""
    out, inp = weights.stack.shape
    grams = [torch.zeros(side, side, dtype=torch.float64, device=home_of(job.like.device)) for side in (out, inp)]
    for _, part in weights.stack.passes():
        w = double(part.dense())
        grams[0].add_(w @ w.mT)
        grams[1].add_(w.mT @ w)
    bases = []
    for gram, other, axis in zip(grams, (inp, out), ("out", "in"), strict=True):
        vectors = torch.linalg.eigh(gram)[1]
        null = max(0, len(gram) - weights.stack.count * other)
        bases.append(vectors[:, null : null + _width(job, axis)].to(job.like))
    return bases[0], bases[1]


def olora(job: Job) -> Factors:
    """Orthonormal columns: B = Q_r, A = R_r of the weight's W = Q R.

    Groups: N_s closest to Q_r Q_r^T W_s, with Q of the mean weight, in the canonical form. Factors are not divided by
    the scale, as published. Source: OLoRA, arXiv 2406.01775.
    """
    site = job.single
    rank = _width(job, "out")
    if site is not None:
        q, r = qr(job.weight(site).dense())
        return {
            n: _laid(job, n, q[:, :rank] if "out" in i else r[:rank].mT) for n, i in job.group.diagram.nodes.items()
        }
    weights = job.stream(job.weight)
    mean = torch.zeros(weights.stack.shape).to(job.like)
    for _, part in weights.stack.passes():
        mean += part.dense() / weights.stack.count
    basis = qr(mean)[0][:, :rank]
    return job.fit(turned(weights, lambda w: basis @ (basis.mT @ w)), 1.0, form="canonical")


def _laid(job: Job, node: str, columns: Tensor) -> Tensor:
    """A matrix (side, rank) in the order of a node of two indices."""
    first = job.group.diagram.nodes[node][0]
    return (columns if first in job.group.diagram.open else columns.mT).contiguous()


def orthogonal(job: Job) -> Factors:
    """Factors that are not zero, of a network that is: sum_b X[.., b] Y[b, ..] = 0 across one bond of even size.

    With an orthogonal matrix H, X = X' H_even and Y = H_odd Y', entries of X' and Y' of deviation 0.1. Where one bond
    joins all nodes (CP) its halves are twins of opposite sign. Other nodes have their laws, `balanced` in zero's place.
    Raises RankError where no bond is even. Source: PEFT, `init_lora_weights="orthogonal"`.
    """
    diagram, held = job.group.diagram, drawn(job, BALANCED)
    free = set(job.group.trainable)
    even = {b: nodes for b, nodes in diagram.bonds.items() if diagram.sizes[b] % 2 == 0}
    pairs = {b: nodes for b, nodes in even.items() if len(nodes) == 2 and set(nodes) <= free}
    whole = {b: nodes for b, nodes in even.items() if len(nodes) > 2 and set(nodes) <= free}
    if not pairs and not whole:
        raise RankError(
            f"an orthogonal start needs a bond of even size between trained nodes; group {job.group.name!r} has none",
            got=dict(job.group.rank),
            hint="use an even rank, or start: zero",
        )
    bond, nodes = next(iter((pairs or whole).items()))
    if not pairs:
        return _twins(job, held, bond, nodes)
    turn = qr(_noise(job, "turn", (diagram.sizes[bond],) * 2))[0]
    for node, rows in zip(nodes, (turn[0::2], turn[1::2]), strict=True):
        dim = diagram.nodes[node].index(bond)
        shape = [*diagram.shape(node)]
        shape[dim] //= 2
        fresh = TWINS * _noise(job, node, tuple(shape))
        held[node] = torch.tensordot(fresh, rows, dims=([dim], [0])).movedim(-1, dim).to(job.like)
    return held


def _twins(job: Job, held: dict[str, Tensor], bond: str, nodes: tuple[str, ...]) -> dict[str, Tensor]:
    """Equal halves along a bond at all of its nodes, of opposite sign at one."""
    for node in nodes:
        dim = job.group.diagram.nodes[node].index(bond)
        half = held[node].narrow(dim, 0, held[node].shape[dim] // 2)
        held[node] = torch.cat([half, -half if node == nodes[0] else half], dim)
    return held


def drawn(job: Job, law: str) -> dict[str, Tensor]:
    """The factors under their own laws, the zero ones under another; frozen and weight-born ones as they are."""
    held = {n: t.detach().to(job.like) for n, t in job.adapter.factors(job.group.name).items()}
    for node in (n for n in held if n in job.group.trainable and job.group.laws[n] != WEIGHT):
        made = factor_of(job.group, node, job.group.store[node])
        made = replace(made, law=law if made.law == "zero" else made.law)
        held[node] = draw(made, job.seed).to(job.like)
    return held


def _noise(job: Job, node: str, shape: tuple[int, ...]) -> Tensor:
    """Normal entries, of the seed, the group and the node alone."""
    key = f"{job.group.name}.{node}.start"
    return draw(Factor(key, shape, "float64", True, "normal(1)", {}, (), copied=False), job.seed).to(job.like)
