"""Slices: the deltas of a stack, dense or as a product of two factors, behind what a range finder asks of them.

Invariant: no method of a product forms its (out, in) matrix but `dense`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tensoradapt.linalg.parts import square


class Slice(Protocol):
    """One delta D[out, in] of a stack."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def square(self) -> float:
        """The squared norm."""

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""

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

    @cached_property
    def square(self) -> float:
        """The squared norm."""
        return float(square(self.matrix))

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""
        return self.matrix @ x

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""
        return self.matrix.mT @ y

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

    @cached_property
    def square(self) -> float:
        """The squared norm, sum_rs (B^T B)[r, s] (A A^T)[r, s]."""
        outer, inner = torch.linalg.qr(self.outer.double())[1], torch.linalg.qr(self.inner.double().mT)[1]
        return float(square(outer @ inner.mT))

    def right(self, x: Tensor) -> Tensor:
        """D x.  Shape: (in, k) -> (out, k)."""
        return self.outer @ (self.inner @ x)

    def left(self, y: Tensor) -> Tensor:
        """D^T y.  Shape: (out, k) -> (in, k)."""
        return self.inner.mT @ (self.outer.mT @ y)

    def dense(self) -> Tensor:
        """D itself.  Shape: (out, in)."""
        return self.outer @ self.inner
