"""The table of an extraction or a conversion: its groups with their ranks, parameters and errors, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ROWS = 12
HEAD = ("role", "weights", "ranks", "parameters", "error")
Row = tuple[str, ...]


def table(groups: Mapping[str, Mapping[str, Any]], *, wide: bool = False) -> Iterator[str]:
    """One line for all groups whose sites play the same roles; with `wide` one for every group."""
    rows = [_row(name, [row]) for name, row in groups.items()] if wide else _by_role(groups)
    return _aligned([HEAD, *rows])


def _by_role(groups: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row for the groups whose sites play the same roles, the largest change first; the smallest ones together."""
    by_role: dict[str, list[Mapping[str, Any]]] = {}
    for row in groups.values():
        by_role.setdefault(row["label"], []).append(row)
    order = sorted(by_role, key=lambda label: -sum(row["norm"] ** 2 for row in by_role[label]))
    shown = order if len(order) <= ROWS else order[: ROWS - 1]
    rest = [row for label in order[len(shown) :] for row in by_role[label]]
    others = [_row(f"{len(order) - len(shown)} others", rest)] if rest else []
    return [*(_row(label, by_role[label]) for label in shown), *others]


def _row(label: str, rows: list[Mapping[str, Any]]) -> Row:
    ranks = [size for row in rows for size in row["rank"].values()]
    span = "left out" if not ranks else f"{min(ranks)}-{max(ranks)}" if min(ranks) < max(ranks) else f"{ranks[0]}"
    norm = sum(row["norm"] ** 2 for row in rows)
    error = (sum((row["relative_error"] * row["norm"]) ** 2 for row in rows) / norm) ** 0.5 if norm else 0.0
    number, parameters = (sum(row[key] for row in rows) for key in ("sites", "num_parameters"))
    return label, f"{number:,}", span, f"{parameters:,}", f"{error:.4g}"


def _aligned(rows: list[Row]) -> Iterator[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    for row in rows:
        cells = (c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()
