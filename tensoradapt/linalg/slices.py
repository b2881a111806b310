"""Slices: the deltas of a stack, dense, as a product of two factors or in strips, behind what a range finder asks.

Invariant: no method of a product, or of strips, forms its (out, in) matrix but `dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tensoradapt.linalg.home import double
from tensoradapt.linalg.parts import gram_matrix, square
from tensoradapt.linalg.pool import mapped

T = TypeVar("T")


class Slice(Protocol):
    """One delta D[out, in] of a stack."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def like(self) -> Tensor:
        """What gives the dtype and the device."""

    @property
    def energy(self) -> Tensor:
        """The squared norm in float64, on its device if that has float64: no step waits for it."""

    @property
    def square(self) -> float:
        """The squared norm."""

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""

    def gram(self) -> Tensor:
        """D^T D or D D^T, the smaller of them, in float64."""

    def scaled(self, rows: Tensor, cols: Tensor) -> Slice:
        """rows[i] D[i, j] cols[j].  Shapes: (out), (in)."""

    def times(self, level: float) -> Slice:
        """The delta multiplied by a level."""

    def dense(self) -> Tensor:
        """D itself.  Shape: (out, in)."""


@dataclass(frozen=True)
class Dense:
    """A delta that is there as a matrix."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def like(self) -> Tensor:
        """What gives the dtype and the device."""
        return self.matrix

    @cached_property
    def energy(self) -> Tensor:
        """The squared norm in float64."""
        return square(self.matrix)

    @cached_property
    def square(self) -> float:
        """The squared norm."""
        return float(self.energy)

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""
        return self.matrix @ x

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""
        return self.matrix.mT @ y

    def gram(self) -> Tensor:
        """D^T D or D D^T, the smaller of them, in float64."""
        return gram_matrix(self.matrix if self.shape[0] <= self.shape[1] else self.matrix.mT)

    def scaled(self, rows: Tensor, cols: Tensor) -> Slice:
        """rows[i] D[i, j] cols[j].  Shapes: (out), (in)."""
        return Dense((self.matrix * rows[:, None]).mul_(cols))

    def times(self, level: float) -> Slice:
        """The delta multiplied by a level."""
        return Dense(self.matrix * level)

    def dense(self) -> Tensor:
        """D itself.  Shape: (out, in)."""
        return self.matrix


@dataclass(frozen=True)
class Product:
    """A delta D = B A that is there as two factors, B (out, r) and A (r, in)."""

    outer: Tensor
    inner: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.outer.shape[0], self.inner.shape[1]

    @property
    def like(self) -> Tensor:
        """What gives the dtype and the device."""
        return self.outer

    @cached_property
    def energy(self) -> Tensor:
        """The squared norm in float64, sum_rs (B^T B)[r, s] (A A^T)[r, s]."""
        outer, inner = torch.linalg.qr(double(self.outer))[1], torch.linalg.qr(double(self.inner).mT)[1]
        return square(outer @ inner.mT)

    @cached_property
    def square(self) -> float:
        """The squared norm."""
        return float(self.energy)

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""
        return self.outer @ (self.inner @ x)

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""
        return self.inner.mT @ (self.outer.mT @ y)

    def gram(self) -> Tensor:
        """D^T D or D D^T, the smaller of them, in float64."""
        return gram_matrix(self.dense() if self.shape[0] <= self.shape[1] else self.dense().mT)

    def scaled(self, rows: Tensor, cols: Tensor) -> Slice:
        """rows[i] D[i, j] cols[j].  Shapes: (out), (in)."""
        return Product(self.outer * rows[:, None], self.inner * cols)

    def times(self, level: float) -> Slice:
        """The delta multiplied by a level."""
        return Product(self.outer * level, self.inner)

    def dense(self) -> Tensor:
        """D itself.  Shape: (out, in)."""
        return self.outer @ self.inner


@dataclass(frozen=True)
class Strips:
    """A delta that is too large to be formed: strips of it are read again whenever they are needed, one per core.

    `parts` are ranges along the longer side, in order, and `read` gives the strip of one. Shape of a strip: (range, in)
    where out > in, else (out, range).
    """

    shape: tuple[int, int]
    parts: tuple[slice, ...]
    read: Callable[[slice], Tensor]
    like: Tensor

    @cached_property
    def energy(self) -> Tensor:
        """The squared norm in float64."""
        return torch.stack(list(self._each(lambda at: square(self.read(at))))).sum()

    @cached_property
    def square(self) -> float:
        """The squared norm."""
        return float(self.energy)

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""
        if self._tall:
            return torch.cat(list(self._each(lambda at: self.read(at) @ x)))
        return _summed(self._each(lambda at: self.read(at) @ x[at]))

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""
        if not self._tall:
            return torch.cat(list(self._each(lambda at: self.read(at).mT @ y)))
        return _summed(self._each(lambda at: self.read(at).mT @ y[at]))

    def gram(self) -> Tensor:
        """D^T D or D D^T, the smaller of them, in float64."""
        return _summed(self._each(lambda at: gram_matrix(self.read(at).mT if self._tall else self.read(at))))

    def dense(self) -> Tensor:
        """D itself.  Shape: (out, in)."""
        return torch.cat(list(self._each(self.read)), 0 if self._tall else 1)

    def scaled(self, rows: Tensor, cols: Tensor) -> Strips:
        """rows[i] D[i, j] cols[j], in strips too.  Shapes: (out), (in)."""

        def read(at: slice) -> Tensor:
            left, right = (rows[at], cols) if self._tall else (rows, cols[at])
            return (self.read(at) * left[:, None]).mul_(right)

        return Strips(self.shape, self.parts, read, self.like)

    def times(self, level: float) -> Strips:
        """The delta multiplied by a level, in strips too."""
        return Strips(self.shape, self.parts, lambda at: self.read(at) * level, self.like)

    @property
    def _tall(self) -> bool:
        return self.shape[0] > self.shape[1]

    def _each(self, function: Callable[[slice], T]) -> Iterator[T]:
        on_cpu = self.like.device.type == "cpu"
        return mapped(function, self.parts) if on_cpu else map(function, self.parts)


def _summed(parts: Iterator[Tensor]) -> Tensor:
    first = next(parts)
    for part in parts:
        first += part
    return first
