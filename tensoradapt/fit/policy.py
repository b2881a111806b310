"""Rank policies: how many singular values a bond keeps.

Invariant: a policy sees a spectrum and what lies beyond it, never the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tensoradapt.errors import RankError
from tensoradapt.linalg import double, energy


class Policy(Protocol):
    """Says how many values of a spectrum a bond keeps."""

    def most(self, bond: str) -> int | None:
        """A bond's largest rank; None where the tensor alone limits it."""

    def keep(self, bond: str, s: Tensor, beyond: Tensor | float) -> int:
        """The rank of a bond, given its leading singular values (.., k) and the squared norm beyond them (..)."""

    def at(self, level: float) -> Policy:
        """The policy for a tensor that is multiplied by a level."""


@dataclass(frozen=True)
class Given:
    """Ranks as a diagram has them."""

    sizes: Mapping[str, int]

    def most(self, bond: str) -> int | None:
        """The diagram's size."""
        return self.sizes[bond]

    def keep(self, bond: str, s: Tensor, beyond: Tensor | float) -> int:
        """The diagram's size."""
        return self.sizes[bond]

    def at(self, level: float) -> Given:
        """The same: ranks have no units."""
        return self


@dataclass(frozen=True)
class Within:
    """The smallest ranks whose discarded squares are at most `allowed` per bond."""

    allowed: float
    ceiling: int | None = None

    def most(self, bond: str) -> int | None:
        """The ceiling."""
        return self.ceiling

    def keep(self, bond: str, s: Tensor, beyond: Tensor | float) -> int:
        """The first r with sum_(k >= r) s[k]^2 + beyond <= allowed."""
        squares = double(s).square().sum(tuple(range(s.dim() - 1)))
        tails = squares.flip(0).cumsum(0).flip(0) + double(torch.as_tensor(beyond)).sum()  # [r]: what rank r leaves out
        return int((~(tails <= self.allowed)).sum())  # they fall from rank to rank

    def at(self, level: float) -> Within:
        """The policy for a tensor that is multiplied by a level."""
        return self if level == 1.0 else replace(self, allowed=self.allowed * level**2)


@dataclass(frozen=True)
class Above:
    """The values above a bond's edge: those that rounding noise does not explain."""

    edges: Mapping[str, float]
    ceiling: int | None = None
    default: float = 0.0

    def most(self, bond: str) -> int | None:
        """The ceiling."""
        return self.ceiling

    def keep(self, bond: str, s: Tensor, beyond: Tensor | float) -> int:
        """The number of values above the edge, the most of a batch."""
        return int((s > self.edges.get(bond, self.default)).sum(-1).max()) if s.numel() else 0

    def at(self, level: float) -> Above:
        """The policy for a tensor that is multiplied by a level."""
        edges = {bond: edge * level for bond, edge in self.edges.items()}
        return replace(self, edges=edges, default=self.default * level)


def relative(error: float, total: float, bonds: int) -> Within:
    """The policy of a relative error: every bond may discard an equal share of its square. Raises RankError."""
    if not isinstance(error, int | float) or not 0 <= error < 1 or isinstance(error, bool):
        raise RankError("a relative error is a number of at least 0 and below 1", got=error, hint="write 0.1 for 10 %")
    return Within((error * error) * total / max(1, bonds) + 1e-13 * total)


def squares(tensor: Tensor) -> float:
    """The squared norm, accumulated in float64."""
    return float(energy(tensor))
