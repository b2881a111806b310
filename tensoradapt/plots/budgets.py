"""Pictures of budget tables: trainable parameters against rank, and how they are shared out among the roles.

Invariant: every number shown is a number of the table, or the sum of some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.budget import BudgetRow, BudgetTable
from tensoradapt.errors import RankError, SpecError
from tensoradapt.plots.ends import end_of, keep_apart, name_ends
from tensoradapt.plots.page import COLOURS, COLUMN, checked, ink, save, setting, stroke
from tensoradapt.plots.panels import ruled
from tensoradapt.plots.shares import BAR, Bar, Shares, draw_shares, key_above, shares_height, short, shortened
from tensoradapt.plots.sheet import Sheet, literal, root, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = "os^Dv<>P"
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))  # one set of colours after another
LOG = 8  # the ratio of the largest to the smallest number from which an axis is logarithmic
COUNTS, LEAST = 48.0, 34.0  # the height of the upper panel in millimetres, and the least beside the lower one
AXIS, NAME = 9.0, 3.1  # the heights of what is below a panel, and of a name at the end of a line
ABREAST = 125.0  # the width from which the two panels stand side by side
Specs = Mapping[str, Sequence[BudgetRow]]


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a table: its rows by spec, the rank of the shares, the budget's limit."""

    specs: Specs
    rank: int | None
    limit: int | None

    @property
    def shares(self) -> Shares:
        """The bars of the lower panel."""
        rows = [_at(rows, self.rank) for rows in self.specs.values()]
        return Shares([Bar(row.spec, row.shares, row.num_trainable, _other(row, self.rank)) for row in rows])


def plot_budget(
    table: BudgetTable,
    path: str | Path | None = None,
    *,
    max_parameters: int | None = None,
    rank: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    labels: Mapping[str, str] | None = None,
    colors: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Figure:
    """Two panels: trainable parameters of every spec against rank, and the shares of the roles at one `rank`.

    A spec without a rank is a horizontal line. `max_parameters` draws the budget. The shares are those at `rank`, or at
    the largest rank that the specs have in common; a `figsize` (inches) without room for them leaves them out. `ax` is
    axes for the first panel, or two. `labels` are texts, and `colors` colours, by spec or role. Fonts, sizes and widths
    are those of matplotlib's settings. Saved to a .png, .svg, .pdf or .pgf `path`. Raises SpecError on an empty table
    and on such choices as the figure cannot have, RankError on a rank that it lacks, FileError on other suffixes.
    """
    target = checked(path)
    if not table.rows:
        raise SpecError("the budget table has no rows", hint="give ta.budget at least one spec and one rank")
    specs: dict[str, list[BudgetRow]] = {}
    for row in table.rows:
        specs.setdefault(row.spec, []).append(row)
    drawing = Drawing(specs, _common_rank(specs, rank), max_parameters)
    page = sheet(ax, figsize, labels, colors)
    page.known(specs, *(row.shares for row in table.rows))
    figure = _on_axes(page, drawing) if page.ax else _on_page(page, drawing)
    save(figure, target)
    return figure


def _common_rank(specs: Specs, rank: int | None) -> int | None:
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


def _other(row: BudgetRow, rank: int | None) -> str:
    """A row's rank, where that is not the one under the axis."""
    return "" if row.rank in (None, rank) else f", rank {row.rank}"


def _on_axes(page: Sheet, drawing: Drawing) -> Figure:
    """Into the caller's axes: the counts in the first, the shares in the second if there is one."""
    if len(page.ax) > 2:
        page.given(2, "two panels")
    _draw_counts(page, page.ax[0], drawing)
    for axes in page.ax[1:]:
        _draw_shares(page, axes, drawing, page.width(COLUMN) / 2)
    return root(page.ax[0])


def _on_page(page: Sheet, drawing: Drawing) -> Figure:
    """A figure of its own: panels one above the other, side by side on a wide page, the counts alone on a small one."""
    scale, shares = page.letters.scale, drawing.shares
    width = page.width(COLUMN)
    beside = bool(page.figsize) and width >= ABREAST * scale
    lower = shares_height(page, shares, width / 2 if beside else width)
    upper = max(COUNTS, AXIS + NAME * (len(drawing.specs) + 1)) * scale
    height = page.height(upper + lower)
    figure = page.figure(width, height)
    if lower > height - (0.0 if beside else LEAST * scale):
        (counts,) = page.dressed([figure.add_subplot()])
        _draw_counts(page, counts, drawing)
        return figure
    inner = (height - lower - AXIS * scale, BAR * scale * len(shares.bars))
    grid: dict[str, Any] = {"width_ratios": (1.2, 1.0)} if beside else {"height_ratios": inner}
    rows, columns = (1, 2) if beside else (2, 1)
    counts, below = page.dressed(figure.subplots(rows, columns, **grid))
    _draw_shares(page, below, drawing, 0.75 * (width / 2 if beside else width))
    _draw_counts(page, counts, drawing)
    return figure


def _draw_shares(page: Sheet, axes: Axes, drawing: Drawing, width: float) -> None:
    draw_shares(page, axes, drawing.shares)
    at = f", at rank {drawing.rank}" if drawing.rank else ""
    axes.set_xlabel(page.along(f"share of the trainable parameters, %{at}", width))


def _draw_counts(page: Sheet, axes: Axes, drawing: Drawing) -> None:
    """Trainable parameters against rank, every line with its name at its end."""
    specs, limit = drawing.specs, drawing.limit
    counts = [row.num_trainable for rows in specs.values() for row in rows] + ([limit] if limit else [])
    ranks = sorted({row.rank for rows in specs.values() for row in rows if row.rank is not None}) or [0, 1]
    ticks = _rank_axis(axes, ranks) if any(row.rank for rows in specs.values() for row in rows) else _no_ranks(axes)
    colours = page.colours(list(specs))
    lines = []
    for number, (spec, rows) in enumerate(specs.items()):
        points = [(row.rank, row.num_trainable) for row in rows if row.rank is not None]
        marked = {"marker": MARKERS[number % len(MARKERS)], "markevery": _at_ticks(points, ticks)} if points else {}
        points = points or [(at, rows[0].num_trainable) for at in (ranks[0], ranks[-1])]
        dashes = DASHES[number // len(COLOURS) % len(DASHES)]
        lines += _line(axes, points, shortened(page, spec), colours[spec], linestyle=dashes, **marked)
    if min(counts) > 0 and max(counts) >= LOG * min(counts):
        axes.set_yscale("log")
    else:
        axes.locator_params(axis="y", integer=True)
    axes.yaxis.set_major_formatter(short)
    axes.set_ylabel(literal("trainable parameters"))
    if limit is not None:
        limits = [(ranks[0], limit), (ranks[-1], limit)]
        lines += _line(axes, limits, f"budget {limit:,}", ink(), linewidth=stroke(0.8), linestyle=(0, (6, 3)))
    ruled(axes)
    _name(page, axes, lines)
    keep_apart(axes, lines[: len(specs)])


def _line(axes: Axes, points: Sequence[tuple[Any, int]], label: str, colour: Any, **look: Any) -> list[Line2D]:
    xs, ys = zip(*points, strict=True)
    size = setting("lines.markersize", 3.0)
    return axes.plot(xs, ys, **{"color": colour, "linewidth": stroke(1.2), "markersize": size, "label": label} | look)


def _name(page: Sheet, axes: Axes, lines: Sequence[Line2D]) -> None:
    """Names at the ends of lines; a key where these have no room."""
    if not name_ends(axes, [end_of(line) for line in lines], page.letters):
        key_above(page, axes)


def _no_ranks(axes: Axes) -> Sequence[int]:
    axes.set_xticks([])
    return []


def _at_ticks(points: Sequence[tuple[int, int]], ticks: Sequence[int]) -> list[int]:
    """Which points of a line have a marker: those over a tick; all, where a spec has none of these ranks."""
    return [k for k, (rank, _) in enumerate(points) if rank in ticks] or list(range(len(points)))


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> Sequence[int]:
    """Ticks at ranks that were counted: all of them, or about eight."""
    axes.set_xlabel("rank")
    if ranks[-1] >= LOG * ranks[0]:
        axes.set_xscale("log", base=2)
        doubled = [r for r in ranks if (r & (r - 1)) == 0]
        ticks = ranks if len(ranks) <= 8 else doubled if len(doubled) > 2 else [ranks[0], ranks[-1]]
    else:
        ticks = ranks[:: -(-len(ranks) // 8)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    return ticks
