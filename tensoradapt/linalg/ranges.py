"""Streaming range finders: shared bases of the column and row spaces of a stack of slices, none of them kept.

For a stack D[l, out, in] the leading left singular spaces of [D_1 .. D_L] and of [D_1; ..; D_L]^T are found by block
Krylov iteration on sum_l D_l D_l^T and sum_l D_l^T D_l. Invariant: every slice is seen once per pass, by both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tensoradapt.linalg.home import double, home_of
from tensoradapt.linalg.krylov import OVERSAMPLE, STEPS, Held, Operator, krylov_space, worth
from tensoradapt.linalg.lapack import eigh, qr
from tensoradapt.linalg.parts import Seed, gram_matrix, orthonormal
from tensoradapt.linalg.pool import mapped
from tensoradapt.linalg.slices import Slice
from tensoradapt.linalg.team import SOLO, Team

T = TypeVar("T")

FULL = 2  # a basis of more than 1/FULL of a side is no saving: the side is kept as it is


@dataclass(frozen=True)
class Stack:
    """Slices D[l, out, in] that can be read again and again: `passes()` makes one pass over (position, slice).

    `count` is the number of all slices, whoever of a team reads them; `like` gives the dtype and the device. `reads`
    are what reads the slices of a pass one after the other, where they may be read some at a time. `level` is the power
    of two that the slices are multiplied by, which a fit takes out again.
    """

    passes: Callable[[], Iterable[tuple[int, Slice]]]
    count: int
    shape: tuple[int, int]
    like: Tensor
    reads: Sequence[Callable[[], Iterable[tuple[int, Slice]]]] = ()
    level: float = 1.0

    def at(self, level: float) -> Stack:
        """The stack with all of its slices multiplied by a level."""
        if level == 1.0:
            return self
        reads = [_scaled(read, level) for read in self.reads]
        return replace(self, passes=_scaled(self.passes, level), reads=reads, level=self.level * level)

    def each(self, function: Callable[[int, Slice], T]) -> Iterator[T]:
        """The function's values for every position and slice, in the order of a pass."""
        if not self.reads or self.like.device.type != "cpu":
            yield from (function(*found) for found in self.passes())
            return
        for values in mapped(lambda read: [function(*found) for found in read()], self.reads):
            yield from values


def _scaled(read: Callable[[], Iterable[tuple[int, Slice]]], level: float) -> Callable[[], Iterable[tuple[int, Slice]]]:
    return lambda: ((position, part.times(level)) for position, part in read())


@dataclass(frozen=True)
class Ranges:
    """Orthonormal bases Q_out (out, p) and Q_in (in, q) of a stack; None where a side is kept whole.

    `total` is the squared norm of the stack, `passes` how often it was read, `core` the slices Q_out^T D_l Q_in.
    """

    out: Tensor | None
    inp: Tensor | None
    total: float
    passes: int
    core: Tensor

    @property
    def lost(self) -> float:
        """The squared norm of what the bases do not hold; exact up to rounding, since they are orthonormal."""
        if self.out is None and self.inp is None:
            return 0.0
        return max(0.0, self.total - float(double(self.core).square().sum()))


@dataclass
class _Side:
    """The Krylov space of one side as it grows: its basis, its Rayleigh quotient, and what it held after every pass.

    `image` is what the next block is made of: the sketch, then M times the last block.
    """

    size: int
    rank: int
    width: int
    image: Tensor | None = None
    basis: Tensor | None = None
    quotient: Tensor | None = None
    held: Held | None = None

    @property
    def whole(self) -> bool:
        return FULL * self.width > self.size

    def block(self) -> Tensor:
        """The block that the next pass multiplies; the basis has it from now on."""
        assert self.image is not None
        new = orthonormal(self.image, self.basis)
        self.basis = new if self.basis is None else torch.cat([self.basis, new], 1)
        return new

    def grow(self, image: Tensor) -> None:
        """Take M times the last block."""
        assert self.basis is not None and self.held is not None
        cross = double(self.basis).mT @ double(image)
        old = 0 if self.quotient is None else len(self.quotient)
        grown = cross.new_zeros(len(cross), len(cross))
        grown[:, old:] = cross
        grown[old:, :old] = cross[:old].mT
        if self.quotient is not None:
            grown[:old, :old] = self.quotient
        self.quotient = (grown + grown.mT) / 2
        self.held.add(self.quotient)
        self.image = image

    def done(self, tolerance: float) -> bool:
        if self.whole or self.basis is None or self.held is None:
            return self.whole
        return self.basis.shape[1] + self.width > self.size or self.held.converged(tolerance)

    def kept(self) -> Tensor | None:
        """The leading directions of what was found, without those that hold next to nothing; None for a whole side."""
        if self.whole or self.basis is None or self.quotient is None or self.held is None:
            return None
        values, vectors = torch.linalg.eigh(self.quotient)
        count = worth(values.flip(0).clamp(min=0), self.rank, self.held.total)
        leading = double(self.basis) @ vectors.flip(1)[:, :count]
        return torch.linalg.qr(leading)[0].to(self.basis)  # in float64, so that the core's norm is what it holds


@dataclass(frozen=True)
class Range:
    """An orthonormal basis Q (m, k) of a matrix A, image = A^T Q (n, k), and why it was found on the CPU, if it was."""

    basis: Tensor
    image: Tensor
    retried: str = ""


def range_of(a: Tensor, rank: int, seed: int = 0) -> Range:
    """A basis of a matrix that is in memory, with its leading `rank` directions.

    Shape: (m, n), k <= 2 (rank + 10). By block Krylov iteration; where that does not settle, by the eigenvectors of
    A A^T or A^T A, the smaller of them. What fails is tried once more on the CPU in float64.
    """
    try:
        return _range_of(a, rank, seed)
    except RuntimeError as error:
        if not a.isfinite().all():
            raise
        found = _range_of(a.cpu().double(), rank, seed)
        return Range(found.basis.to(a), found.image.to(a), str(error).splitlines()[0])


def _range_of(a: Tensor, rank: int, seed: int) -> Range:
    space = krylov_space(Operator.of(a), rank, seed=Seed(seed))
    if not space.done and space.basis.shape[1] < min(a.shape):
        basis = _eigenvectors(a, rank, space.total)
        return Range(basis, (basis.mT @ a).mT)
    values, vectors = torch.linalg.eigh(space.gram)
    leading = vectors.flip(1)[:, : worth(values.flip(0).clamp(min=0), rank, space.total)]
    wide = double(space.basis) @ leading
    triangle = torch.linalg.qr(wide)[1]  # next to the identity: what float32 lacks to orthonormal columns
    basis, image = (
        torch.linalg.solve_triangular(triangle, x, upper=True, left=False)
        for x in (wide, double(space.image) @ leading)
    )
    return Range(basis.to(a), image.to(a))


def _eigenvectors(a: Tensor, rank: int, total: Tensor) -> Tensor:
    """The leading left singular vectors, by the smaller Gram matrix."""
    tall = len(a) > a.shape[1]
    values, vectors = eigh(gram_matrix(a.mT if tall else a))
    kept = vectors.flip(1)[:, : worth(values.flip(0).clamp(min=0), rank, total)].to(a)
    return qr(a @ kept)[0] if tall else kept


def find_ranges(
    stack: Stack,
    rank: tuple[int, int],
    *,
    oversample: int = OVERSAMPLE,
    tolerance: float = 1e-3,
    steps: int = STEPS,
    seed: int = 0,
    team: Team = SOLO,
) -> Ranges:
    """Shared bases that hold the leading `rank` = (out, in) directions of a stack, and its core.

    Passes are made until each side's residual is estimated within `tolerance` of the optimal one, at most `steps`.
    Sides that a basis would not make smaller are kept whole.
    """
    sides = [_Side(size, r, min(r + oversample, size)) for size, r in zip(stack.shape, rank, strict=True)]
    total, passes = _sketch(stack, sides, Seed(seed), team), 1
    done = [side.done(tolerance) for side in sides]
    while passes <= steps and not all(done):
        _pass(stack, [None if ended else side for side, ended in zip(sides, done, strict=True)], team)
        passes += 1
        done = [side.done(tolerance) for side in sides]
    bases = [side.kept() for side in sides]
    sizes = [size if q is None else q.shape[1] for size, q in zip(stack.shape, bases, strict=True)]
    core = stack.like.new_zeros(stack.count, *sizes)
    for position, part in stack.each(lambda position, part: (position, _projected(part, bases[0], bases[1]))):
        core[position] = part
    return Ranges(bases[0], bases[1], float(total), passes + 1, team.add(core))


def _sketch(stack: Stack, sides: list[_Side], seed: Seed, team: Team) -> Tensor:
    """The first pass: the total, and random combinations of columns and of rows."""
    out, inp = sides
    sketches = [stack.like.new_zeros(side.size, 0 if side.whole else side.width) for side in sides]
    total = torch.zeros((), dtype=torch.float64, device=home_of(stack.like.device))

    def sketched(position: int, part: Slice) -> tuple[Tensor, list[Tensor | None]]:
        noise = partial(seed.noise, like=stack.like)
        rows = None if out.whole else part.right(noise(inp.size, out.width, salt=2 * position + 1))
        return part.energy, [rows, None if inp.whole else part.left(noise(out.size, inp.width, salt=2 * position + 2))]

    for energy, made in stack.each(sketched):
        total += energy
        _add(sketches, made)
    team.add(total)
    for side, sketch in zip(sides, sketches, strict=True):
        if not side.whole:
            side.image, side.held = team.add(sketch), Held(side.rank, total)
    return total


def _pass(stack: Stack, sides: list[_Side | None], team: Team) -> None:
    """One more pass: M times the last block of every side that still grows."""
    blocks = [None if side is None else side.block() for side in sides]
    images = [stack.like.new_zeros(n, 0 if b is None else b.shape[1]) for n, b in zip(stack.shape, blocks, strict=True)]

    def multiplied(_: int, part: Slice) -> list[Tensor | None]:
        rows = None if blocks[0] is None else part.right(part.left(blocks[0]))
        return [rows, None if blocks[1] is None else part.left(part.right(blocks[1]))]

    for made in stack.each(multiplied):
        _add(images, made)
    for side, image in zip(sides, images, strict=True):
        if side is not None:
            side.grow(team.add(image))


def _add(sums: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for whole, part in zip(sums, parts, strict=True):
        if part is not None:
            whole += part


def _projected(part: Slice, out: Tensor | None, inp: Tensor | None) -> Tensor:
    if out is None and inp is None:
        return part.dense()
    if out is None:
        assert inp is not None
        return part.right(inp)
    left = part.left(out).mT
    return left if inp is None else left @ inp
