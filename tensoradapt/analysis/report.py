"""The report of an analysis: numbers by site and by stack, candidates, and the choice; as text, JSON and HTML.

Invariant: `to_dict` is what `report.json` holds, all of it numbers, names and None; figures are drawn from that alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensoradapt.analysis.answer import Answer
from tensoradapt.analysis.candidates import Candidate
from tensoradapt.analysis.spectra import SiteReport
from tensoradapt.analysis.stacks import StackReport
from tensoradapt.analysis.text import render_text
from tensoradapt.plots.html import render_html
from tensoradapt.records import Tabular, flattened
from tensoradapt.textfiles import write_text

FORMAT, VERSION = "tensoradapt.report", 1


@dataclass(frozen=True)
class Report(Tabular):
    """What a fine-tuning is made of.

    `sites[path]` has the numbers of one weight's delta, `groups[name]` those of a stack of them, `candidates` what
    every format would lose at which number of parameters, `choice` the one to take, with the reason; `change` counts
    the tensors of both sides by kind, with their shares of the squared change (None for a set of adapters); `answer`
    says what rank the change has, and which adapter an error takes (None where no weight differs).
    """

    kind: str
    base: str
    tuned: str
    settings: Mapping[str, Any]
    match: Mapping[str, Any]
    sites: Mapping[str, SiteReport]
    groups: Mapping[str, StackReport]
    candidates: tuple[Candidate, ...] = ()
    choice: Mapping[str, Any] | None = None
    comparisons: Mapping[str, Any] = field(default_factory=dict)
    change: Mapping[str, Any] | None = None
    answer: Answer | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite as None."""
        return _finite(
            {
                "format": FORMAT,
                "version": VERSION,
                **{name: getattr(self, name) for name in ("kind", "base", "tuned", "settings", "match", "change")},
                "answer": self.answer.to_dict() if self.answer else None,
                "sites": {path: row.to_dict() for path, row in self.sites.items()},
                "groups": {name: row.to_dict() for name, row in self.groups.items()},
                "candidates": [c.to_dict() for c in self.candidates],
                "choice": self.choice,
                "comparisons": self.comparisons,
            }
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON, written to a path too where one is given. Raises FileError."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            write_text(path, text)
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page with the figures, written to a path too where one is given. Raises FileError."""
        text = render_html(self.to_dict())
        if path is not None:
            write_text(path, text)
        return text

    def records(self) -> list[dict[str, Any]]:
        """One row for every weight: its numbers, the ranks by every rule as `rank.noise`, `rank.energy_0.95`, ..."""
        return [_record(path, row) for path, row in self.sites.items()]

    @property
    def relative_change(self) -> float:
        """The norm of all deltas over that of the base's weights at the same sites."""
        bases = [row.norm / row.relative_change for row in self.sites.values() if row.relative_change]
        total = math.fsum(b * b for b in bases)
        return math.sqrt(math.fsum(row.norm**2 for row in self.sites.values()) / total) if total else 0.0

    def text(self, *, wide: bool = False) -> str:
        """The answer, what was compared, tables and the proposal, in 80 columns; every number by weight if `wide`."""
        return render_text(self.to_dict(), wide=wide)

    def __str__(self) -> str:
        return self.text()


def _record(path: str, row: SiteReport) -> dict[str, Any]:
    numbers = ("norm", "relative_change", "spectral_norm", "stable_rank", "effective_rank", "participation_ratio")
    where = {axis: row.coordinates.get(axis) for axis in ("stack", "layer", "role", "expert")}
    sizes = {"weight": path, **where, "out": row.shape[0], "in": row.shape[1], "group": row.group}
    return {**sizes, **{name: getattr(row, name) for name in numbers}, **flattened("rank", row.ranks)}


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
    return value
