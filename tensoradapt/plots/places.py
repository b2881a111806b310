"""Where sites stand in a table of weights: a row per role, a column for every combination of the other coordinates.

Invariant: no two sites stand in one cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Column = tuple[Any, ...]
OUTER = ("stack", "task", "layer", "expert")  # the outermost first


@dataclass(frozen=True)
class Table:
    """Roles against the coordinates `names`, and the path in every occupied cell."""

    rows: tuple[str, ...]
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    at: Mapping[tuple[str, Column], str]

    def blocks(self, depth: int) -> list[tuple[Column, int, int]]:
        """Runs of columns that agree in their first `depth` coordinates: these, the first column, and how many."""
        found = []
        for head, run in groupby(range(len(self.columns)), key=lambda k: self.columns[k][:depth]):
            members = list(run)
            found.append((head, members[0], len(members)))
        return found


def role_of(path: str, site: Mapping[str, Any]) -> str:
    """The name of a site's row: its role, its path where it has none."""
    return str(site["coordinates"].get("role", path))


def tabulated(sites: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table of some sites: rows in the order of the report, columns by number or, for names, in that order too."""
    varying = _varying(sites)
    at: dict[tuple[str, Column], str] = {}
    for path, site in sites.items():
        column = tuple(site["coordinates"].get(name) for name in varying)
        row = role_of(path, site)
        at[(row, column) if (row, column) not in at else (path, column)] = path
    rows = tuple(dict.fromkeys(row for row, _ in at))
    return Table(rows, varying, _ordered([column for _, column in at]), at)


def _varying(sites: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The coordinates other than the role that have several values, the outermost first."""
    values: dict[str, dict[Any, None]] = {}
    for site in sites.values():
        for name in {*OUTER, *site["coordinates"]} - {"role"}:
            values.setdefault(name, {})[site["coordinates"].get(name)] = None
    found = sorted(name for name, seen in values.items() if len(set(seen) - {None}) > 1)
    return tuple(sorted(found, key=lambda name: OUTER.index(name) if name in OUTER else len(OUTER)))


def _ordered(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Columns once each, by their coordinates: none first, then numbers, then names in the order of the report."""
    seen: dict[Any, int] = {}
    for column in columns:
        for value in column:
            seen.setdefault(value, len(seen))
    kinds = {"NoneType": 0, "int": 1}
    rank = lambda v: (kinds.get(type(v).__name__, 2), v if type(v).__name__ == "int" else seen[v])  # noqa: E731
    return tuple(sorted(dict.fromkeys(columns), key=lambda column: tuple(map(rank, column))))
