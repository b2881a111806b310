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
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import COLOURS, COLUMN, GREY, INCH, INK, checked, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>P"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))
PARTS = 7  # as many named parts of a bar as there are colours
OTHERS, BANK = "others", "shared by groups"
LABEL = 26  # the longest label, in letters
LOG = 8  # the ratio of the largest to the smallest number from which an axis is logarithmic
COUNTS = 48.0  # the height of the upper panel in millimetres; the lower has BAR for every spec
BAR = 6.0
ENTRY = 3.4  # the height of a line of a key
KEY, KEY_WIDTH, HANDLE = 6.5, 66.0, 9.0  # its letters in points, its width, and what an entry needs beside its label


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

    parts = _parts(bars)
    found = dict.fromkeys(name for shares in parts for name in shares)
    names = [*(n for n in found if n not in (OTHERS, BANK)), *(n for n in (BANK, OTHERS) if n in found)]
    entries = (len(specs) + (limit is not None), len(names))
    columns = (_columns([*specs, f"budget {limit:,}" if limit else ""]), _columns(names))
    keys = ENTRY * sum(-(-count // across) for count, across in zip(entries, columns, strict=True))
    heights = (COUNTS, 10.0 + BAR * len(bars))
    size = (COLUMN / INCH, (sum(heights) + keys + 14.0) / INCH)
    figure = Figure(figsize=size, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    _draw_counts(upper, specs, limit)
    _key(upper, columns[0])
    _draw_shares(lower, bars, parts, names, rank)
    lower.set_xlabel("share of the trained parameters, %" + (f", at rank {rank}" if rank else ""))
    _key(lower, columns[1])
    return figure


def _columns(labels: Sequence[str]) -> int:
    """The number of columns in which labels fit side by side in a key."""
    longest = max(extent(shortened(label), KEY)[0] for label in labels)
    return max(1, int(KEY_WIDTH / (longest + HANDLE)))


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


def _draw_shares(
    axes: Axes,
    bars: Sequence[BudgetRow],
    parts: Sequence[Mapping[str, int]],
    names: Sequence[str],
    rank: int | None,
) -> None:
    """One bar of 100 % for every spec, cut by role."""
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(n for n in names if n not in (OTHERS, BANK))}
    colours |= {OTHERS: GREY, BANK: "#DDDDDD"}
    left = [0.0 for _ in bars]
    for name in names:
        widths = [100 * shares.get(name, 0) / max(sum(shares.values()), 1) for shares in parts]
        axes.barh(
            range(len(bars)),
            widths,
            left=left,
            height=0.7,
            color=colours[name],
            edgecolor="white",
            linewidth=0.6,
            label=shortened(name),
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [_bar_label(row, rank) for row in bars], linespacing=1.05)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bar_label(row: BudgetRow, rank: int | None) -> str:
    """A spec and its count; and its rank, where that is not the one under the axis."""
    other = "" if row.rank in (None, rank) else f", rank {row.rank}"
    return f"{shortened(row.spec)}{other}\n{row.num_trainable:,}"


def _parts(bars: Sequence[BudgetRow]) -> list[dict[str, int]]:
    """Every bar's parts: the largest roles over all bars, what several groups share, and the others together."""
    totals: dict[str, float] = {}
    for row in bars:
        for role, count in row.shares.items():
            totals[role] = totals.get(role, 0.0) + count / max(row.num_trainable, 1)
    named = sorted(totals, key=lambda role: -totals[role])
    kept = [role for role in totals if role in named[: PARTS if len(named) <= PARTS else PARTS - 1]]
    result = []
    for row in bars:
        parts = {role: row.shares[role] for role in kept if row.shares.get(role)}
        rest = sum(count for role, count in row.shares.items() if role not in kept)
        bank = row.num_trainable - sum(row.shares.values())
        result.append(parts | ({BANK: bank} if bank > 0 else {}) | ({OTHERS: rest} if rest else {}))
    return result


def _key(axes: Axes, columns: int) -> None:
    """The key above a panel."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.2,
        handletextpad=0.5,
        labelspacing=0.3,
        borderaxespad=0.2,
    )


def _look(number: int) -> Look:
    """The look of the n-th spec: colours first, then other dashes."""
    return Look(
        COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], DASHES[number // len(COLOURS) % len(DASHES)]
    )


def shortened(label: str) -> str:
    """A label that fits a key: of many joined by + the first and a number, of a long one the two ends."""
    first, *more = label.split("+")
    if len(label) > LABEL and more:
        return f"{shortened(first)} + {len(more)} more"
    return label if len(label) <= LABEL else f"{label[: LABEL - 12]}…{label[-11:]}"


def short(value: float) -> str:
    """A count on an axis: 300, 20k, 1.5M, 2B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
