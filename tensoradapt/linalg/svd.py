"""Truncated SVDs, by the cheapest method that serves; each says what it left out.

Invariant: `truncated_svd` returns residuals of what it returns, whatever the method, and the same bytes for one seed on
one machine and thread count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.errors import RankError, ShapeError, SpecError
from tensoradapt.linalg.home import double, home_of
from tensoradapt.linalg.krylov import OVERSAMPLE, STEPS, Operator, krylov, krylov_space
from tensoradapt.linalg.lapack import eigh, eigvalsh, qr, svd
from tensoradapt.linalg.level import level_of, norm_of
from tensoradapt.linalg.parts import LowRank, Seed, gram_matrix, leftover, signed, square
from tensoradapt.linalg.slices import Slice

METHODS = ("auto", "krylov", "gram", "exact")
SMALL = 96  # below this many rows or columns a full decomposition costs no more than the bookkeeping of the others
SQUARED = 2.0**40  # norms up to it, and down to one over it, may be squared: an iteration does, and no more
TALL = 4  # from this ratio of rows to columns on a Gram matrix is cheaper than a QR


def truncated_svd(
    a: Tensor,
    rank: int | None = None,
    *,
    method: str = "auto",
    oversample: int = OVERSAMPLE,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> LowRank:
    """The leading `rank` singular triplets of A, or of every matrix of a batch; all of them without a rank.

    A[.., i, j] ~ sum_r u[.., i, r] s[.., r] v[.., j, r].  Shape: (.., m, n); a rank above min(m, n) is that.
    `krylov` iterates until the residual is estimated within `tolerance` of the optimal one, and falls back to `exact`
    after six steps. What fails is tried once more on the CPU in float64. Raises RankError, ShapeError, SpecError.
    """
    limit = min(a.shape[-2:])
    if rank is not None and (type(rank) is not int or rank < 0):
        raise RankError("a rank is a number, and not negative", got=rank)
    wanted = limit if rank is None else min(rank, limit)
    chosen = choose((a.shape[-2], a.shape[-1]), wanted, oversample) if method == "auto" else method
    if chosen not in METHODS:
        raise SpecError(f"no method {method!r}", expected=", ".join(METHODS))
    a = a if a.dtype in (torch.float32, torch.float64) else a.float()
    if wanted == 0 or limit == 0:
        return _nothing(a)
    options = (oversample, tolerance, seed)
    try:
        found = _run(a, wanted, chosen, options)
    except RuntimeError as error:  # LinAlgError and OutOfMemoryError are such, cuSOLVER's failures are nothing more
        finite(a)
        level = level_of(norm_of(a), a.dtype, SQUARED)
        if level == 1.0:
            return _on_cpu(a, wanted, chosen, options, str(error))
        return _run(a * level, wanted, chosen, options).times(1 / level)
    total = float(found.total.sum())
    level = level_of(math.sqrt(total) if math.isfinite(total) else norm_of(a), a.dtype, SQUARED)
    if level != 1.0:
        return _run(a * level, wanted, chosen, options).times(1 / level)
    if not math.isfinite(total):
        finite(a)
    return found


def finite(a: Tensor) -> None:
    """Raise ShapeError where a matrix has entries that are NaN or infinite."""
    bad = int((~torch.isfinite(a)).sum())
    if bad:
        raise ShapeError("the matrix is not finite", got=f"{bad} of {a.numel()} entries are NaN or infinite")


def choose(shape: tuple[int, int], rank: int, oversample: int = OVERSAMPLE) -> str:
    """The cheapest method for a matrix of a shape: krylov, gram or exact."""
    short, long = sorted(shape)
    if short > SMALL and 4 * (rank + oversample) < short:
        return "krylov"
    return "gram" if long >= TALL * short else "exact"


def _run(a: Tensor, rank: int, method: str, options: tuple[int, float, int]) -> LowRank:
    oversample, tolerance, seed = options
    if method == "krylov":
        found, done = krylov(a, rank, oversample=oversample, tolerance=tolerance, seed=Seed(seed))
        if done:
            return found
        plain = choose((a.shape[-2], a.shape[-1]), min(a.shape[-2:]), oversample)
        return replace(_PLAIN[plain](a, rank), method=f"{plain} after krylov", steps=STEPS)
    return _PLAIN[method](a, rank)


def _on_cpu(a: Tensor, rank: int, method: str, options: tuple[int, float, int], reason: str) -> LowRank:
    """The same on the CPU in float64, brought back."""
    plain = "exact" if method == "krylov" else method
    found = _run(a.cpu().double(), rank, plain, options)
    back = {name: getattr(found, name).to(a) for name in ("u", "s", "v", "residual")}
    return replace(found, **back, total=found.total.to(home_of(a.device)), retried=reason.splitlines()[0])


def _exact(a: Tensor, rank: int) -> LowRank:
    u, s, vh = svd(a)
    dropped = double(s[..., rank:]).square().sum(-1).sqrt().to(a)
    u, v = signed(u[..., :rank], vh.mT[..., :rank])
    return LowRank(u, s[..., :rank], v, square(a), dropped, "exact")


def _gram(a: Tensor, rank: int) -> LowRank:
    """By the eigenvectors of the smaller Gram matrix, in float64."""
    if a.shape[-2] > a.shape[-1]:
        return _gram(a.mT, rank).turned()
    values, vectors = eigh(gram_matrix(a))
    u = vectors.flip(-1)[..., :rank].to(a)
    v, triangle = qr(a.mT @ u)  # its columns are all but orthogonal; those of zero norm get a basis
    s, sign = triangle.diagonal(dim1=-2, dim2=-1).abs(), triangle.diagonal(dim1=-2, dim2=-1).sign()
    u, v = signed(u, v * torch.where(sign < 0, -1.0, 1.0).to(a.dtype)[..., None, :])
    return LowRank(u, s, v, values.clamp(min=0).sum(-1), leftover(a, u, v * s[..., None, :]).to(a), "gram")


def singular_values(a: Tensor) -> Tensor:
    """All singular values, descending, by the smaller Gram matrix in float64; those below 1e-8 of the first are noise.

    Shape: (.., m, n) -> (.., min(m, n)).
    """
    side = a if a.shape[-2] <= a.shape[-1] else a.mT
    return eigvalsh(gram_matrix(side)).flip(-1).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Values:
    """Leading singular values, how they were found, and their directions along the shorter side where that shows them.

    Shapes: s (k), directions (min(m, n), k).
    """

    s: Tensor
    method: str
    directions: Tensor | None = None


def slice_values(
    part: Slice, count: int | None = None, *, tolerance: float = 1e-2, seed: int = 0, start: Tensor | None = None
) -> Values:
    """The leading `count` singular values of a slice; all of them without a count.

    By block Krylov iteration on the shorter side, from directions to `start` with if they are known, until the norm of
    what lies beyond the values is estimated within `tolerance`; where that does not settle, and for all of them, by the
    smaller Gram matrix in float64.
    """
    if count is not None and choose(part.shape, count) == "krylov":
        short = Operator.short(part)
        space = krylov_space(short, count, tolerance=tolerance, seed=Seed(seed), start=start)
        if space.done:
            values, vectors = space.directions(count)
            return Values(values.sqrt(), "krylov", space.basis @ vectors)
    return Values(eigvalsh(part.gram()).flip(-1)[:count].clamp(min=0).sqrt(), "gram")


def _nothing(a: Tensor) -> LowRank:
    empty = a.new_zeros(*a.shape[:-2], a.shape[-2], 0)
    total = square(a)
    other = a.new_zeros(*a.shape[:-2], a.shape[-1], 0)
    return LowRank(empty, a.new_zeros(*a.shape[:-2], 0), other, total, total.sqrt().to(a), "exact")


_PLAIN: dict[str, Callable[[Tensor, int], LowRank]] = {"exact": _exact, "gram": _gram}
