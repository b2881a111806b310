"""Pictures of budget tables: trained parameters against rank, and how they are shared out among the roles.

Invariant: every number shown is a number of the table, or the sum of some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.budget import BudgetRow, BudgetTable
from tensoradapt.errors import RankError, SpecError
from tensoradapt.plots.page import COLOURS, COLUMN, INCH, INK, checked, save, styled
from tensoradapt.plots.shares import (
    BAR,
    ENTRY,
    Bar,
    columns_of,
    draw_shares,
    key_above,
    named,
    parts,
    short,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>P"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))
LOG = 8  # the ratio of the largest to the smallest number from which an axis is logarithmic
COUNTS = 48.0  # the height of the upper panel in millimetres; the lower has BAR for every spec


@dataclass(frozen=True)
class Look:
    """How one spec's line is drawn, so that two differ in more than their colours."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[float, ...]]


def plot_budget(
    table: BudgetTable, path: str | Path | None = None, *, max_parameters: int | None = None, rank: int | None = None
) -> Figure:
    """Two panels: trained parameters of every spec against rank, and the shares of the roles at one `rank`.

    A spec without a rank is a horizontal line. `max_parameters` draws the budget. The shares are those at `rank`, or at
    the largest rank that the specs have in common. Saved to a .png, .svg or .pdf `path`. Raises SpecError on an empty
    table, RankError on a rank that it lacks, FileError on other suffixes.
    """
    target = checked(path)
    if not table.rows:
        raise SpecError("the budget table has no rows", hint="give ta.budget at least one spec and one rank")
    specs: dict[str, list[BudgetRow]] = {}
    for row in table.rows:
        specs.setdefault(row.spec, []).append(row)
    chosen = _common_rank(specs, rank)
    bars = [_at(rows, chosen) for rows in specs.values()]
    with styled():
        figure = _two_panels(specs, bars, chosen, max_parameters)
    save(figure, target)
    return figure


def _common_rank(specs: Mapping[str, Sequence[BudgetRow]], rank: int | None) -> int | None:
    """The rank that the shares are shown at; None where no spec has a rank."""
    ranks = [{row.rank for row in rows} - {None} for rows in specs.values()]
    ranked = [found for found in ranks if found]
    if rank is not None and rank not in set().union(*ranked):
        known = sorted(r for r in set().union(*ranked) if r is not None)
        raise RankError(f"the table has no rank {rank}", expected=f"one of {known}" if known else "a spec with a rank")
    if not ranked or rank is not None:
        return rank
    return max((r for r in set.intersection(*ranked) or ranked[0] if r is not None), default=None)


def _at(rows: Sequence[BudgetRow], rank: int | None) -> BudgetRow:
    """A spec's row at a rank; its largest, where it has not that one."""
    return next((row for row in rows if row.rank == rank), max(rows, key=lambda row: row.rank or 0))


def _two_panels(
    specs: Mapping[str, Sequence[BudgetRow]], bars: Sequence[BudgetRow], rank: int | None, limit: int | None
) -> Figure:
    from matplotlib.figure import Figure

    cut = parts([Bar(_bar_label(row, rank), row.shares, row.num_trainable) for row in bars])
    names = named(cut)
    entries = (len(specs) + (limit is not None), len(names))
    columns = (columns_of([*specs, f"budget {limit:,}" if limit else ""]), columns_of(names))
    keys = ENTRY * sum(-(-count // across) for count, across in zip(entries, columns, strict=True))
    heights = (COUNTS, 10.0 + BAR * len(bars))
    size = (COLUMN / INCH, (sum(heights) + keys + 14.0) / INCH)
    figure = Figure(figsize=size, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    _draw_counts(upper, specs, limit)
    key_above(upper, columns[0])
    draw_shares(lower, [_bar_label(row, rank) for row in bars], cut, names)
    lower.set_xlabel("share of the trained parameters, %" + (f", at rank {rank}" if rank else ""))
    key_above(lower, columns[1])
    return figure


def _draw_counts(axes: Axes, specs: Mapping[str, Sequence[BudgetRow]], limit: int | None) -> None:
    """Trained parameters against rank."""
    counts = [row.num_trainable for rows in specs.values() for row in rows] + ([limit] if limit else [])
    ranks = sorted({row.rank for rows in specs.values() for row in rows if row.rank is not None})
    for number, (spec, rows) in enumerate(specs.items()):
        look = _look(number)
        points = [(row.rank, row.num_trainable) for row in rows if row.rank is not None]
        style: dict[str, Any] = {
            "color": look.color,
            "linestyle": look.linestyle,
            "linewidth": 1.2,
            "label": shortened(spec),
        }
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker=look.marker, markersize=3, markevery=max(1, len(xs) // 8), **style)
        else:
            axes.axhline(rows[0].num_trainable, **style)
    if limit is not None:
        axes.axhline(limit, color=INK, linewidth=0.8, linestyle=(0, (6, 3)), label=f"budget {limit:,}")
    if min(counts) > 0 and max(counts) >= LOG * min(counts):
        axes.set_yscale("log")
    _rank_axis(axes, ranks)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.grid(True, linewidth=0.3, color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.set(ylabel="trained parameters")


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    """Ticks at ranks that were counted: all of them, or about eight."""
    if not ranks:
        axes.set_xticks([])
        return
    axes.set_xlabel("rank")
    if ranks[-1] >= LOG * ranks[0]:
        axes.set_xscale("log", base=2)
        doubled = [r for r in ranks if (r & (r - 1)) == 0]
        ticks = ranks if len(ranks) <= 8 else doubled if len(doubled) > 2 else [ranks[0], ranks[-1]]
    else:
        ticks = ranks[:: -(-len(ranks) // 8)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _bar_label(row: BudgetRow, rank: int | None) -> str:
    """A spec and its count; and its rank, where that is not the one under the axis."""
    other = "" if row.rank in (None, rank) else f", rank {row.rank}"
    return f"{shortened(row.spec)}{other}\n{row.num_trainable:,}"


def _look(number: int) -> Look:
    """The look of the n-th spec: colours first, then other dashes."""
    return Look(
        COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], DASHES[number // len(COLOURS) % len(DASHES)]
    )
