"""Randomised block Krylov iteration (Musco and Musco, arXiv:1504.05477), every block kept.

Invariant: the singular values found never exceed the true ones, and the residual never undercuts the optimal one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensoradapt.linalg.home import double
from tensoradapt.linalg.parts import BLOCK, LowRank, Seed, leftover, orthonormal, signed, square
from tensoradapt.linalg.slices import Slice

OVERSAMPLE = 10
LANES = 16  # sketches are as wide as a multiple of it: the products with further columns cost nothing
STEPS = 6
LOOK = 3  # steps between two questions to an accelerator
# A step gains at least this share of what the one before it gained on the flattest spectra we measured; the first steps
# on a spectrum with a gap look far better than what follows.
SLOWEST, FASTEST = 0.7, 0.4
WARY = 4.0  # how much smaller than it is the value behind the last one wanted may look
CANCELLED = 1e-5  # a squared residual below this share of the total is lost in the rounding of both
WIDER = 2  # a basis has at most WIDER times the directions that were sketched
NEGLIGIBLE = 1e-4  # the share of the squared residual that directions left out of a basis may hold


@dataclass
class Held:
    """What the leading `rank` directions of a growing basis hold of matrices of squared norm `total` (..)."""

    rank: int
    total: Tensor
    energies: list[Tensor] = field(default_factory=list)
    ratio: Tensor | None = None  # the value behind the last one wanted, as a share of that one, both squared

    def add(self, gram: Tensor) -> None:
        """The basis has grown: its Gram matrix on the other side, or its Rayleigh quotient.  Shape: (.., k, k)."""
        values = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)
        self.energies.append(values[..., : self.rank].sum(-1))
        if values.shape[-1] > self.rank:
            self.ratio = values[..., self.rank] / values[..., self.rank - 1].clamp(min=1e-300)

    def asked(self, step: int) -> bool:
        """Whether to ask after a step if it was the last: an accelerator, whose answer has to be waited for, seldom."""
        return self.total.device.type == "cpu" or step % LOOK == 0

    def converged(self, tolerance: float) -> bool:
        """Whether what further steps would gain leaves every residual within the tolerance of the optimal one.

        A step multiplies what is still missing by at most the squared ratio of the values on either side of the rank;
        where that says little, a further step is taken to gain what the last one gained of the one before.
        """
        held, total = self.energies, self.total
        residual = (total - held[-1]).clamp(min=0)
        rounding = CANCELLED * total
        whole = (residual <= rounding).all()
        if len(held) < 2:
            return bool(whole)
        gained = held[-1] - held[-2]
        before = held[-2] - held[-3] if len(held) > 2 else gained
        ratio = (gained / before.clamp(min=1e-300)).clamp(FASTEST, SLOWEST)
        if self.ratio is not None:
            ratio = torch.minimum(ratio, WARY * self.ratio.square())
        return bool(whole | (gained * ratio / (1 - ratio) <= 2 * tolerance * residual + rounding * tolerance).all())


@dataclass(frozen=True)
class Operator:
    """A matrix A (m, n), or a batch of them, as what multiplies thin ones: right(x) = A x, left(y) = A^T y."""

    shape: tuple[int, int]
    like: Tensor
    total: Tensor
    right: Callable[[Tensor], Tensor]
    left: Callable[[Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The entries' dtype."""
        return self.like.dtype

    @classmethod
    def of(cls, a: Tensor) -> Operator:
        """A matrix in memory, or a batch."""
        return cls((a.shape[-2], a.shape[-1]), a, square(a), lambda x: _times(a, x), lambda y: (y.mT @ a).mT)

    @classmethod
    def short(cls, part: Slice) -> Operator:
        """A slice, turned so that it has no more rows than columns."""
        total = part.energy
        if part.shape[0] <= part.shape[1]:
            return cls(part.shape, part.like, total, part.right, part.left)
        return cls((part.shape[1], part.shape[0]), part.like, total, part.left, part.right)


@dataclass(frozen=True)
class Space:
    """A Krylov space of matrices A: an orthonormal basis (.., m, k), image = A^T basis (.., n, k), and its Gram matrix.

    `images` are the image's blocks of columns. `done` says whether the residual of the leading directions is estimated
    within the tolerance of the optimal one.
    """

    basis: Tensor
    images: tuple[Tensor, ...]
    gram: Tensor
    total: Tensor
    steps: int
    done: bool

    @property
    def image(self) -> Tensor:
        """A^T basis."""
        return torch.cat(self.images, -1) if len(self.images) > 1 else self.images[0]

    def directions(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The squared singular values in the space, descending, and their directions, the first `count`."""
        values, vectors = torch.linalg.eigh(self.gram)
        return values.flip(-1)[..., :count].clamp(min=0), vectors.flip(-1)[..., :count].to(self.basis)


def krylov_space(
    a: Operator,
    rank: int,
    *,
    oversample: int = OVERSAMPLE,
    tolerance: float = 1e-3,
    steps: int = STEPS,
    seed: Seed | None = None,
    start: Tensor | None = None,
) -> Space:
    """A space that holds the leading `rank` left singular vectors of matrices.  Shape: (.., m, n).

    K = [Q1 .. Qk], Q1 = orth(A W), Q(i+1) = orth(A A^T Qi); with a `start` (m, j) near those vectors, Q1 = orth(start)
    with some random columns beside it.
    """
    width = min(rank + oversample, *a.shape)
    random, like = seed or Seed(), a.like
    if start is None:
        q = orthonormal(a.right(random.noise(a.shape[1], width, like=like)))
    else:
        near = start[:, : width - oversample] / torch.linalg.vector_norm(start, dim=0)[: width - oversample]
        q = orthonormal(torch.cat([near, random.noise(a.shape[0], width - near.shape[1], like=like)], 1))
    basis = q
    images: tuple[Tensor, ...] = (a.left(q),)
    gram = _gram(images[0], images[0])
    held = Held(rank, a.total)
    for step in range(1, steps + 1):
        held.add(gram)
        last = step == steps or basis.shape[-1] + width > min(a.shape)
        done = (last or held.asked(step)) and held.converged(tolerance)
        if done or last:
            break
        q = orthonormal(a.right(images[-1]), basis)
        new = a.left(q)
        cross = torch.cat([_gram(image, new) for image in images], -2)
        gram = torch.cat([torch.cat([gram, cross], -1), torch.cat([cross.mT, _gram(new, new)], -1)], -2)
        basis, images = torch.cat([basis, q], -1), (*images, new)
    return Space(basis, images, gram, held.total, step, done)


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

    A ~ K K^T A with the basis K of a Krylov space.  Shape: (.., m, n).
    """
    wide = LANES * -(-(rank + oversample) // LANES) - rank
    space = krylov_space(Operator.of(a), rank, oversample=wide, tolerance=tolerance, steps=steps, seed=seed)
    values, vectors = space.directions(rank)
    s = values.sqrt().to(a)
    u, sv = space.basis @ vectors, space.image @ vectors
    v = sv / s.clamp(min=torch.finfo(a.dtype).tiny)[..., None, :]
    residual = (space.total - values.sum(-1)).clamp(min=0).sqrt()
    if bool((residual.square() <= 100 * CANCELLED * space.total).any()):
        residual = leftover(a, u, sv)
    u, v = signed(u, v)
    return LowRank(u, s, v, space.total, residual.to(a), "krylov", space.steps), space.done


def _times(a: Tensor, x: Tensor) -> Tensor:
    """A X as (X^T A^T)^T: with few columns the product is a quarter faster this way round."""
    return (x.mT @ a.mT).mT


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """X^T Y in float64: the eigenvalues are squares, so that float32 would end at 3e-4 of the largest singular value.

    Some rows at a time.  Shape: (.., n, k), (.., n, l) -> (.., k, l).
    """
    height = max(1, BLOCK * x.shape[-2] // max(x.numel(), 1))
    parts = (slice(start, start + height) for start in range(0, x.shape[-2], height))
    first = next(parts, slice(0))
    found = double(x[..., first, :]).mT @ double(y[..., first, :])
    for rows in parts:
        found += double(x[..., rows, :]).mT @ double(y[..., rows, :])
    return found


def worth(values: Tensor, rank: int, total: Tensor) -> int:
    """How many directions of a basis to keep, by their squared values: all but those that hold next to nothing.

    At most twice as many as were sketched for the rank: the best shared bases of a fit lie near the leading directions,
    but not among the first `rank` of them.
    """
    beyond = NEGLIGIBLE * (total - values[:rank].sum()).clamp(min=0) + 1e-13 * total
    tails = values.flip(0).cumsum(0).flip(0)
    return min(WIDER * (rank + OVERSAMPLE), max(rank, int((tails > beyond).sum())))
