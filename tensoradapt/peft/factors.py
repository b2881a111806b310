"""A site's delta as two factors, from the factors it has: B (out, r) and A (r, in), the scale in them.

Invariant: nothing of out x in entries is formed, and the two factors carry the delta's norm in equal parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.chain import Chain
from tensoradapt.errors import SpecError
from tensoradapt.io.saved import Saved
from tensoradapt.linalg.parts import signed
from tensoradapt.lower import chain, line
from tensoradapt.recipe import Stage, recipe

Pair = tuple[Tensor, Tensor]
EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Factored:
    """delta ~ B A, singular values in equal parts on both; `left` is what truncation left out, relative to the norm."""

    b: Tensor
    a: Tensor
    left: float = 0.0

    @property
    def rank(self) -> int:
        """The number of columns of B."""
        return self.b.shape[1]


def factors_of(saved: Saved, path: str) -> Pair | None:
    """A site's delta as B, A with the scale in B; None where `out` and `in` meet in a node, so that none exist.

    A difference is N(x) - N(x0) = (B - B0) A + B0 (A - A0).  Shapes: (out, r), (r, in * kernel).
    """
    group, placement = saved.sites[path]
    try:
        made = recipe(group.diagram, placement.slots, code=True)
    except SpecError:
        return None
    chosen = replace(line(group, placement), recipe=made)
    b, a = _sides(chain(chosen, saved.factors(group.name)))
    starts = saved.starts(group.name)
    if starts is not None:
        b0, a0 = _sides(chain(chosen, starts))
        b, a = torch.cat([b - b0, b0], 1), torch.cat([a, a - a0])
    return b * group.scale, a


def _sides(made: Chain) -> Pair:
    """The last stage, and all before it, as matrices."""
    matrices = [_matrix(stage, weight) for stage, weight in zip(made.recipe.stages, made.weights, strict=True)]
    code = matrices[0]
    for matrix in matrices[1:-1]:
        code = matrix @ code
    return matrices[-1], code


def _matrix(stage: Stage, weight: Tensor) -> Tensor:
    """I_before (x) W (x) I_after as a matrix."""
    weight = torch.diag(weight) if stage.diagonal else weight.contiguous()
    for size, left in ((stage.before, True), (stage.after, False)):
        if size > 1:
            eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
            weight = torch.kron(eye, weight) if left else torch.kron(weight, eye)
    return weight


def balanced(pair: Pair, rank: int | None = None) -> Factored:
    """The same product by QR and SVD, of its own rank or at most `rank`: B = U sqrt(S), A = sqrt(S) V^T."""
    (q_out, r_out), (q_in, r_in) = torch.linalg.qr(pair[0]), torch.linalg.qr(pair[1].mT)
    u, s, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False)
    return _kept(q_out @ u, s, q_in @ vh.mT, rank)


def nothing(out: int, inp: int) -> Factored:
    """The factors of no change at all, of rank 0."""
    return Factored(torch.zeros(out, 0), torch.zeros(0, inp))


def unchanged(pair: Pair, scale: float) -> Factored:
    """The factors as they are, the scale in equal parts on both, as PEFT has it when it adds adapters up (linear)."""
    root = abs(scale) ** 0.5
    return Factored(pair[0] / root, pair[1] * root)


def truncated(delta: Tensor, rank: int) -> Factored:
    """The best B A of a rank for a delta that has no factors.  Shape: (out, in)."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return _kept(u, s, vh.mT, rank)


def _kept(u: Tensor, s: Tensor, v: Tensor, rank: int | None) -> Factored:
    own = int((s > s.max() * EPSILON * max(len(u), len(v))).sum())
    kept = own if rank is None else min(rank, own)
    root = s[:kept].sqrt()
    u, v = signed(u[:, :kept], v[:, :kept])
    left = float(s[kept:own].norm() / s.norm()) if kept < own else 0.0
    return Factored(u * root, (v * root).mT.contiguous(), left)
