"""The whole change: every tensor that differs between two checkpoints, whether it is a weight or not.

Invariant: a tensor that differs has a squared change, or a reason why there is no such number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tensoradapt.analysis.account import tensors_of
from tensoradapt.analysis.sharing import together
from tensoradapt.fit.policy import squares
from tensoradapt.io.pairs import Deltas
from tensoradapt.linalg import SOLO, Team

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Whole:
    """The tensors of both sides that differ, by the tuned side's names.

    `squares` has |tuned - base|^2 of each, `unmeasured` the reason where there is no such number; `num_parameters` is
    the number of entries of the tuned model.
    """

    squares: Mapping[str, float] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    num_parameters: int = 0

    @property
    def square(self) -> float:
        """|tuned - base|^2 over all tensors that have it."""
        return math.fsum(self.squares.values())

    @property
    def names(self) -> frozenset[str]:
        """All that differ."""
        return frozenset((*self.squares, *self.unmeasured))


def whole_change(deltas: Deltas, team: Team = SOLO, tell: Tell | None = None) -> Whole:
    """The change of every tensor, each member of a team reading a share of them. Raises FileError."""
    names = list(tensors_of(deltas))

    def mine() -> dict[str, tuple[float, str] | None]:
        found = {}
        for number, name in enumerate(names):
            if tell is not None:
                tell(f"reading {name}", number, len(names))
            if number % team.size == team.rank:
                found[name] = change_of(deltas, name)
        return found

    gathered = {name: row for part in together(team, mine) for name, row in part.items()}
    rows = {name: row for name in names if (row := gathered[name]) is not None}
    entries = deltas.tuned.entries
    return Whole(
        {name: square for name, (square, reason) in rows.items() if not reason},
        {name: reason for name, (_, reason) in rows.items() if reason},
        sum(
            math.prod(e.shape)
            for n, e in entries.items()
            if n not in deltas.tuned.aliases and e.dtype.is_floating_point
        ),
    )


def change_of(deltas: Deltas, name: str) -> tuple[float, str] | None:
    """The squared change of a tensor of both sides, or why it has none; None where nothing differs."""
    differs, square = deltas.change(name)
    if not differs:
        return None
    if math.isfinite(square):
        return square, ""
    sites = [pair.site.path for pair in deltas.match.pairs if pair.tuned_name == name]
    sides = deltas.base.entries[deltas.match.names[name]], deltas.tuned.entries[name]
    if sites and sides[0].shape != sides[1].shape:  # rows were added, and the user said what becomes of them
        return math.fsum(squares(deltas.delta(path)) for path in sites), ""
    if sides[0].shape != sides[1].shape:
        return math.nan, f"{list(sides[0].shape)} in the base and {list(sides[1].shape)} in the tuned side"
    integers = next((e.dtype for e in sides if not e.dtype.is_floating_point), None)
    return math.nan, f"holds {str(integers)[6:]}" if integers else "not finite"
