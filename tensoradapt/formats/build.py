"""What the builders share: ranks given in several ways, and what a rank above its bond's limit means.

Invariant: a builder returns names and integers; under `cap` no bond is larger than the limit of its cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError

Ranks = int | Sequence[int] | Mapping[str, int]


@dataclass(frozen=True)
class Shape:
    """What a builder works from: the tensor's axes in order, their sizes, the folds of `out`, `in` and `kernel`."""

    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    folds: Mapping[str, tuple[str, ...]]
    compress: tuple[str, ...] = ()

    def diagram(self, nodes: Mapping[str, tuple[str, ...]], bonds: Mapping[str, int]) -> Diagram:
        """The diagram of these nodes, with the sizes of axes and bonds put together."""
        sizes = {axis: self.sizes[axis] for axis in self.axes}
        return Diagram({**sizes, **bonds}, dict(nodes), self.axes, dict(self.folds))

    def numel(self, axes: Sequence[str]) -> int:
        """The product of the sizes of some axes."""
        return math.prod(self.sizes[axis] for axis in axes)


Builder = Callable[[Shape, Ranks, str], Diagram]


def per_bond(rank: Ranks, bonds: Sequence[str]) -> dict[str, int]:
    """Spell a rank out per bond: one number for all, a list in order, or a mapping. Raises RankError."""
    if isinstance(rank, int):
        return dict.fromkeys(bonds, rank)
    if isinstance(rank, Mapping):
        wrong = sorted(set(rank) ^ set(bonds))
        if wrong:
            raise RankError(
                f"ranks do not fit the bonds at {wrong[0]!r}",
                got=dict(rank),
                expected=f"one rank for each of {list(bonds)}",
            )
        return {bond: rank[bond] for bond in bonds}
    if len(rank) != len(bonds):
        raise RankError(
            "the list of ranks does not fit the bonds",
            got=list(rank),
            expected=f"{len(bonds)} numbers, for {list(bonds)}",
        )
    return dict(zip(bonds, rank, strict=True))


def limited(rank: int, limit: int, excess: str, bond: str) -> int:
    """A bond's size for a rank asked for and the bond's limit: the rank, or the limit under `cap`. Raises RankError."""
    if rank <= limit or excess == "keep":
        return rank
    if excess == "cap":
        return limit
    raise RankError(
        f"rank {rank} of bond {bond!r} is above its limit",
        got=rank,
        expected=f"at most {limit}, the smaller side of its cut",
        hint=f"use rank <= {limit}, or excess: cap to take the limit, or excess: keep to keep {rank}",
    )
