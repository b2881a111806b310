"""Teams: several processes that share one computation; alone, a team of one.

Invariant: every member calls the same methods in the same order, and gets the same results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Team:
    """One process, and how it adds and gathers with the others. This one has no others."""

    rank: int = 0
    size: int = 1

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every member's tensor, in place."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every member's value, in the order of their ranks."""
        return [value]

    def wait(self) -> None:
        """Return once every member has come here."""


SOLO = Team()
