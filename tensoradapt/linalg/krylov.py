"""Randomised block Krylov iteration (Musco and Musco, arXiv:1504.05477), every block kept.

Invariant: the singular values found never exceed the true ones, and the residual never undercuts the optimal one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensoradapt.linalg.parts import LowRank, Seed, leftover, orthonormal, signed, square

OVERSAMPLE = 10
STEPS = 6
# A step gains at least this share of what the one before it gained on the flattest spectra we measured; the first steps
# on a spectrum with a gap look far better than what follows.
SLOWEST, FASTEST = 0.7, 0.4
CANCELLED = 1e-5  # a squared residual below this share of the total is lost in the rounding of both


def krylov(
    a: Tensor,
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    tolerance: float = 1e-3,
    steps: int = STEPS,
    seed: Seed | None = None,
) -> tuple[LowRank, bool]:
    """The leading `rank` singular triplets of matrices, and whether the residual is estimated within `tolerance`.

    K = [Q1 .. Qk], Q1 = orth(A W), Q(i+1) = orth(A A^T Qi); A ~ K K^T A.  Shape: (.., m, n).  The estimate extrapolates
    what a further step would gain from what the last one gained.
    """
    width = min(rank + oversample, *a.shape[-2:])
    total = square(a)
    q = orthonormal(a @ (seed or Seed()).noise(a.shape[-1], width, like=a))
    basis, image = q, (q.mT @ a).mT  # image = A^T basis
    gram = _gram(image, image)
    held: list[Tensor] = []
    done, step = False, 0
    for step in range(1, steps + 1):
        held.append(leading(gram, rank))
        full = basis.shape[-1] + width > min(a.shape[-2:])
        done = converged(held, total, tolerance)
        if done or full or step == steps:
            break
        q = orthonormal(a @ image[..., -width:], basis)
        new = (q.mT @ a).mT
        cross = _gram(image, new)
        gram = torch.cat([torch.cat([gram, cross], -1), torch.cat([cross.mT, _gram(new, new)], -1)], -2)
        basis, image = torch.cat([basis, q], -1), torch.cat([image, new], -1)
    return _result(a, basis, image, gram, rank, step), done


def _gram(x: Tensor, y: Tensor) -> Tensor:
    return (x.mT @ y).double()


def leading(gram: Tensor, rank: int) -> Tensor:
    """The energy that the best `rank` directions of a basis hold.  Shape: (.., k, k) -> (..)."""
    return torch.linalg.eigvalsh(gram)[..., -rank:].clamp(min=0).sum(-1)


def converged(held: list[Tensor], total: Tensor, tolerance: float) -> bool:
    """Whether what further steps would gain leaves every residual within the tolerance of the optimal one."""
    residual = (total - held[-1]).clamp(min=0)
    rounding = CANCELLED * total
    if bool((residual <= rounding).all()):
        return True
    if len(held) < 2:
        return False
    gained = held[-1] - held[-2]
    before = held[-2] - held[-3] if len(held) > 2 else gained
    ratio = (gained / before.clamp(min=1e-300)).clamp(FASTEST, SLOWEST)
    return bool((gained * ratio / (1 - ratio) <= 2 * tolerance * residual.clamp(min=0) + rounding * tolerance).all())


def _result(a: Tensor, basis: Tensor, image: Tensor, gram: Tensor, rank: int, step: int) -> LowRank:
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(-1)[..., :rank].clamp(min=0), vectors.flip(-1)[..., :rank].to(a.dtype)
    s = values.sqrt().to(a.dtype)
    u, sv = basis @ vectors, image @ vectors
    total = square(a)
    v = sv / s.clamp(min=torch.finfo(a.dtype).tiny)[..., None, :]
    residual = (total - values.sum(-1)).clamp(min=0).sqrt()
    if bool((residual.square() <= 100 * CANCELLED * total).any()):
        residual = leftover(a, u, sv)
    u, v = signed(u, v)
    return LowRank(u, s, v, total, residual.to(a.dtype), "krylov", step)
