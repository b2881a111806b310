"""The result of an extraction: its numbers, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensoradapt.plan import Plan


@dataclass(frozen=True)
class Extraction:
    """What was extracted: the adapter's file (None where there was nothing), its plan, and the errors.

    `relative_error` = sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2) over all targeted sites, after rounding to the stored
    dtype; `report` has the same by site and by group: what was requested, what the fit left before rounding
    (`fitted_error`, at most `bound` where a bound is known), and what the stored factors leave (`relative_error`).
    """

    path: Path | None
    relative_error: float
    num_parameters: int
    plan: Plan
    report: Mapping[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "path": None if self.path is None else str(self.path),
            "relative_error": self.relative_error,
            "num_parameters": self.num_parameters,
            **self.report,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("group", "sites", "ranks", "parameters", "relative error"), *map(_row, self.report["groups"].items())]
        widths = [max(len(row[k]) for row in rows) for k in range(5)]
        lines = [
            "  ".join(c.ljust(w) if k in (0, 2) else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True)))
            for r in rows
        ]
        worst = self.report["worst_site"]
        total = f"{self.num_parameters:,} parameters, relative error {self.relative_error:.4g}"
        lines.append(f"{total}; worst site {worst['path']} at {worst['relative_error']:.4g}" if worst else total)
        lines.append("nothing to extract" if self.path is None else f"written to {self.path}")
        return "\n".join([line.rstrip() for line in lines] + [f"note: {note}" for note in self.notes])


def _row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, ...]:
    name, row = item
    ranks = " ".join(f"{bond}={size}" for bond, size in row["rank"].items()) or ("-" if row["kept"] else "left out")
    return name, str(row["sites"]), ranks, f"{row['num_parameters']:,}", f"{row['relative_error']:.4g}"
