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

from tensoradapt.analysis.candidates import Candidate
from tensoradapt.analysis.spectra import SiteReport
from tensoradapt.analysis.stacks import StackReport
from tensoradapt.io.atomic import atomic
from tensoradapt.paths import expand
from tensoradapt.plots.html import render_html

FORMAT, VERSION = "tensoradapt.report", 1


@dataclass(frozen=True)
class Report:
    """What a fine-tuning is made of.

    `sites[path]` has the numbers of one weight's delta, `groups[name]` those of a stack of them, `candidates` what
    every format would lose at which number of parameters, `choice` the one to take, with the reason; `change` counts
    the tensors of both sides by kind, with their shares of the squared change (None for a set of adapters).
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that are not finite as None."""
        return _finite(
            {
                "format": FORMAT,
                "version": VERSION,
                **{name: getattr(self, name) for name in ("kind", "base", "tuned", "settings", "match", "change")},
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
            with atomic(expand(path)) as temporary:
                temporary.write_text(text, "utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page with the figures, written to a path too where one is given. Raises FileError."""
        text = render_html(self.to_dict())
        if path is not None:
            with atomic(expand(path)) as temporary:
                temporary.write_text(text, "utf-8")
        return text

    @property
    def relative_change(self) -> float:
        """The norm of all deltas over that of the base's weights at the same sites."""
        bases = [row.norm / row.relative_change for row in self.sites.values() if row.relative_change]
        total = math.fsum(b * b for b in bases)
        return math.sqrt(math.fsum(row.norm**2 for row in self.sites.values()) / total) if total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.base} -> {self.tuned}: {len(self.sites)} weights, changed by {self.relative_change:.3g}"]
        lines += [*_table(_site_rows(self.sites)), ""] if self.sites else []
        lines += [] if any(row.norm for row in self.sites.values()) else ["no weight differs", ""]
        lines += _table(_group_rows(self.groups)) if self.groups else []
        lines += ["", *_table(_candidate_rows(self.candidates))] if self.candidates else []
        lines += ["", f"{self.choice['label']}: {self.choice['reason']}"] if self.choice else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.match.get("notes", ()))])


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
    return value


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _site_rows(sites: Mapping[str, SiteReport]) -> list[tuple[str, ...]]:
    head = ("weight", "shape", "norm", "change", "rank above noise", "energy .90", ".95", ".99", "effective", "stable")
    rows = []
    for path, row in sites.items():
        ranks = [_rank(row.ranks[key]) for key in ("noise", "energy_0.9", "energy_0.95", "energy_0.99")]
        shape = "x".join(map(str, row.shape))
        tail = (f"{row.effective_rank:.1f}", f"{row.stable_rank:.2f}")
        change = "" if row.relative_change is None else f"{row.relative_change:.2%}"
        rows.append((path, shape, f"{row.norm:.3g}", change, *ranks, *tail))
    return [head, *rows]


def _rank(rank: int | None) -> str:
    return "more" if rank is None else str(rank)


def _group_rows(groups: Mapping[str, StackReport]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("stack", "tensor", "ranks above noise", "ranks at energy .95", "shared r=8", "private r=8")
    ]
    for name, row in groups.items():
        tensor = " ".join(f"{a}={row.sizes[a]}" for a in row.axes)
        ranks = [" ".join(_rank(row.multilinear_rank[k][a]) for a in row.axes) for k in ("noise", "energy_0.95")]
        energy = [row.shared_energy[k] for k in ("shared", "private")]
        at = row.shared_energy["rank"].index(8) if 8 in row.shared_energy["rank"] else -1
        rows.append((name, tensor, *ranks, *(f"{e[at]:.1%}" if e else "" for e in energy)))
    return rows


def _candidate_rows(candidates: tuple[Candidate, ...]) -> list[tuple[str, ...]]:
    head = ("candidate", "parameters", "relative error", "worst site")
    front = [c for c in candidates if c.front]
    return [
        head,
        *(
            (c.label, f"{c.num_parameters:,}", f"{c.relative_error:.4f}", f"{c.worst_site['relative_error']:.3f}")
            for c in front
        ),
    ]
