"""A heat map of ranks: a row per role, a column per layer (or task, or expert), numbers in cells that have room.

Invariant: a cell shows the rank that the report gives; where it gives none, the cell is hatched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import INCH, POINT, Letters, ink
from tensoradapt.plots.panels import PAGE, blues, letters_on
from tensoradapt.plots.places import Table, tabulated
from tensoradapt.plots.sheet import Sheet, literal
from tensoradapt.plots.words import brief_name, fitted, has_noise, listed, plain, rule_label, rule_words, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS, TALL, WIDE = 40, 4.6, 11.0  # rows at most; a cell's height, and its largest width, in millimetres
LEFT, BAR, TOP, FOOT, KEY = 52.0, 19.0, 6.0, 10.0, 24.0
NAMES = 0.4  # the share of a figure's width that the names of rows take at most
TICK, ROOM = 5.0, 24.0  # millimetres between the middles of columns' labels: at least, and for long ones


Block = tuple[tuple[Any, ...], int, int]  # coordinates, the first column, how many


@dataclass(frozen=True)
class Frame:
    """The sizes on the page, in millimetres: of what the names take, of the map, and of a cell; those of letters."""

    left: float
    width: float
    height: float
    cell: float
    row: float
    letters: Letters


def plot_ranks(report: Mapping[str, Any], page: Sheet, rule: str | None = None) -> Figure:
    """Ranks by role and layer, by a rule (`noise`, `energy_0.95`, ...). Raises SpecError on a rule the report lacks."""
    rule = _rule(report, rule)
    table, rows = _rows(report, _capacity(page))
    page.known(table.rows)
    frame = _frame(page, table, rows)
    if page.ax:
        (axes,) = page.given(1, "one panel")
        figure = page.figure(frame.width, frame.height)
    else:
        figure, axes, bar = _placed(page, table, frame)
    _fill(axes, report, page, table, rows, rule, frame)
    step = -(-len(rows) * 1.25 * page.letters.tick * POINT // frame.height)
    kept = range(0, len(rows), max(1, int(step)))
    names = [page.said(rows[k], (frame.left - 3) / 1.04, page.letters.tick) for k in kept]
    axes.set_yticks(list(kept), names, fontsize=page.letters.tick)
    _columns(axes, table, frame)
    if page.ax:
        bar = figure.colorbar(axes.collections[0], ax=axes, fraction=0.06, pad=0.03).ax
    _scale(figure, axes, bar, rule, page.letters)
    return figure


def _capacity(page: Sheet) -> int:
    """How many rows there is room for."""
    height = page.size[1]
    scale = page.letters.scale
    room = ROWS if height is None else int((height - (0 if page.ax else TOP + FOOT) * scale) / (2.8 * scale))
    return max(1, min(ROWS, room))


def _frame(page: Sheet, table: Table, rows: Sequence[str]) -> Frame:
    """The sizes of the map: within the caller's axes or size, else as large as the cells ask for."""
    scale, (wide, tall) = page.letters.scale, page.size
    if page.ax and wide and tall:
        return Frame(NAMES * wide, wide, tall, wide / len(table.columns), tall / len(rows), page.letters)
    longest = max(extent(page.said(row), page.letters.tick, markup=True)[0] for row in rows)
    width = page.width(PAGE)
    left = min(LEFT * scale, NAMES * width, 1.04 * longest + 3.2)
    cell = min(math.inf if page.figsize else WIDE * scale, (width - left - BAR * scale) / len(table.columns))
    row = max(TALL, min(8.0, KEY / len(rows))) * scale
    if tall:
        row = (tall - (_top(table) + FOOT) * scale) / len(rows)
    return Frame(left, cell * len(table.columns), row * len(rows), cell, row, page.letters)


def _top(table: Table) -> float:
    return TOP if len(table.names) > 1 else 2.0


def _placed(page: Sheet, table: Table, frame: Frame) -> tuple[Figure, Axes, Axes]:
    """A figure around the map and the key to its colours, all of it placed by size."""
    scale = page.letters.scale
    top = _top(table) * scale
    key = min(max(frame.height, KEY * scale), 2 * KEY * scale)
    width = page.size[0] or max(frame.left + frame.width + BAR * scale, 80.0 * scale)
    height = page.height(max(frame.height + FOOT * scale, key + 2) + top)
    key = min(key, height - top - 2)
    figure = page.figure(width, height, layout=None)
    place = lambda x, wide, tall: (x / width, 1 - (top + tall) / height, wide / width, tall / height)  # noqa: E731
    axes = figure.add_axes(place(frame.left, frame.width, frame.height))
    bar = figure.add_axes(place(frame.left + frame.width + 3, 3, key))
    page.dressed([axes, bar])
    return figure, axes, bar


def ranks_caption(report: Mapping[str, Any], rule: str | None = None) -> str:
    """What to read off the map: where ranks are large, and where they are not known."""
    rule = _rule(report, rule)
    table, rows = _rows(report, ROWS)
    ranks = {path: report["sites"][path]["ranks"].get(rule) for path in table.at.values()}
    words = rule_words(rule)
    said = [f"{words[0].upper()}{words[1:]} in every weight's change, by {listed(['role', *table.names])}."]
    said += _spread({path: rank for path, rank in ranks.items() if rank is not None})
    still = [path for path in ranks if report["sites"][path]["norm"] == 0]
    if still:
        said += [f"{some(len(still), 'weight')} did not change: {listed(still, 3)}."]
    unknown = sum(rank is None for rank in ranks.values())
    if unknown:
        said += [f"Hatched: more than the values that were computed ({unknown:,} of {len(ranks):,})."]
    if len(table.at) < len(table.rows) * len(table.columns):
        said += ["Crosses: no such weight."]
    if len(rows) < len(table.rows):
        said += [f"The {len(rows)} roles that changed most of {len(table.rows):,} are drawn."]
    return " ".join(said)


def _spread(ranks: Mapping[str, int]) -> list[str]:
    """The least, the middle and the largest rank."""
    known = sorted((rank, path) for path, rank in ranks.items())
    if len(known) < 2:
        return []
    least, middle, most = (known[k][0] for k in (0, (len(known) - 1) // 2, -1))
    if least == most:
        return [f"All that are known are {most:,}."]
    span = f"They run from {least:,} to {most:,}, half of them are at most {middle:,};"
    return [f"{span} the largest is in {brief_name(known[-1][1])}."]


def _rule(report: Mapping[str, Any], rule: str | None) -> str:
    """The rule asked for; else the noise, where there is any, and the energy where there is none."""
    if not report["sites"]:
        raise SpecError("the report has no weights to draw")
    known = list(dict.fromkeys(name for site in report["sites"].values() for name in site["ranks"]))
    wanted = rule or ("noise" if has_noise(report) else "energy_0.95")
    if wanted not in known and (rule is not None or not known):
        raise SpecError(f"the report has no ranks by the rule {wanted!r}", expected=", ".join(known) or None)
    return wanted if wanted in known else known[0]


def _rows(report: Mapping[str, Any], most: int) -> tuple[Table, list[str]]:
    """All sites by role and column, and the roles that are drawn."""
    table = tabulated(report["sites"])
    energy = dict.fromkeys(table.rows, 0.0)
    for (row, _), path in table.at.items():
        energy[row] += report["sites"][path]["norm"] ** 2
    kept = set(sorted(table.rows, key=lambda row: -energy[row])[:most])
    return table, [row for row in table.rows if row in kept]


def _fill(
    axes: Axes,
    report: Mapping[str, Any],
    page: Sheet,
    table: Table,
    rows: Sequence[str],
    rule: str,
    frame: Frame,
) -> None:
    """The cells: coloured by rank, hatched where it is not known, crossed out where there is no weight."""
    place = {column: k for k, column in enumerate(table.columns)}
    at = {(rows.index(row), place[column]): path for (row, column), path in table.at.items() if row in rows}
    ranks = {cell: report["sites"][path]["ranks"].get(rule) for cell, path in at.items()}
    shown = np.full((len(rows), len(place)), np.nan)
    for cell, rank in ranks.items():
        shown[cell] = len(report["sites"][at[cell]]["singular_values"]) if rank is None else rank
    mesh: Any = axes.pcolormesh(
        np.arange(len(place) + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        shown,
        cmap=blues(page),
        norm=_norm(max(1.0, np.nanmax(shown))),
        edgecolors="white",
        linewidth=0.5 if frame.cell > 1.5 else 0.0,
        rasterized=shown.size > 6000,
    )
    axes.set(xlim=(-0.5, len(place) - 0.5), ylim=(len(rows) - 0.5, -0.5), facecolor="white")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    unknown = [cell for cell, rank in ranks.items() if rank is None]
    _mark(axes, unknown, "//////", "#7FA8D0")
    _mark(axes, [(r, c) for r in range(len(rows)) for c in range(len(place)) if (r, c) not in ranks], "xxxx", "#CCCCCC")
    texts = {cell: f"{int(shown[cell]):,}" for cell, rank in ranks.items() if rank is not None}
    size = frame.letters.note
    fits = frame.row > 1.3 * size * POINT
    if texts and fits and max(extent(text, size)[0] for text in texts.values()) < frame.cell - 0.4:
        for (row, column), text in texts.items():
            ink = letters_on(mesh.cmap(mesh.norm(shown[row, column])))
            axes.text(column, row, text, fontsize=size, ha="center", va="center_baseline", color=ink)


def _mark(axes: Axes, cells: Sequence[tuple[int, int]], hatch: str, colour: str) -> None:
    """Hatch some cells."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in cells]
    axes.add_collection(PatchCollection(patches, facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0.3))


def _norm(most: float) -> Any:
    """Ranks on a scale of log(1 + rank) where they are far apart: small ones differ more in what they say."""
    from matplotlib.colors import FuncNorm, Normalize

    return Normalize(0, most) if most <= 16 else FuncNorm((np.log1p, np.expm1), 0, most)


def _columns(axes: Axes, table: Table, frame: Frame) -> None:
    """Names below the columns, of the finest coordinate that has room, and of the outermost above."""
    depth = _finest(table, frame)
    blocks = table.blocks(depth)
    runs = [[b for b in blocks if b[0][:-1] == head] for head in dict.fromkeys(b[0][:-1] for b in blocks)]
    kept = [block for run in runs for block in _thinned(run, frame)]
    labels = [_said(head[-1] if head else "", frame, count) for head, _, count in kept]
    axes.set_xticks([first + (count - 1) / 2 for _, first, count in kept], labels)
    finer = f" (within each: {listed(table.names[depth:])})" if depth < len(table.names) else ""
    axes.set_xlabel(literal((table.names[depth - 1] if depth else "") + finer))
    if len(table.names) > 1:
        for _, first, count in table.blocks(1)[1:]:
            axes.axvline(first - 0.5, color=ink(), linewidth=0.8 if count * frame.cell > 8 else 0.4)
    if depth > 1:
        _above(axes, table, frame)


def _above(axes: Axes, table: Table, frame: Frame) -> None:
    """The outermost coordinate of every run of columns, above it; with its name where that has room."""
    blocks, size = table.blocks(1), frame.letters.tick
    said = ["–" if head[0] is None else plain(head[0]) for head, _, _ in blocks]
    full = [f"{table.names[0]} {text}" for text in said]
    rooms = [count * frame.cell - 1 for _, _, count in blocks]
    fits = all(extent(text, size)[0] < room for text, room in zip(full, rooms, strict=True))
    for text, room, (_, first, count) in zip(full if fits else said, rooms, blocks, strict=True):
        at = (first + (count - 1) / 2, -0.5 - 0.6 / frame.row)
        axes.text(*at, literal(fitted(text, room, size)), ha="center", va="bottom", fontsize=size)


def _finest(table: Table, frame: Frame) -> int:
    """How many coordinates have room: the runs of the last one must be wide enough for two labels."""
    for depth in range(len(table.names), 1, -1):
        narrowest = min(count for _, _, count in table.blocks(depth - 1)) * frame.cell
        if narrowest >= 2 * TICK or all(count == 1 for _, _, count in table.blocks(depth - 1)):
            return depth
    return min(1, len(table.names))


def _thinned(run: Sequence[Block], frame: Frame) -> list[Block]:
    """The blocks of a run whose labels have room, the first and every n-th after it."""
    widest = max(extent(plain(head[-1] if head else ""), frame.letters.tick)[0] for head, _, _ in run)
    room = min(max(TICK, widest + 1.5), ROOM)
    step = max(1, math.ceil(room / (run[0][2] * frame.cell) - 1e-9))
    end = run[-1][1] + run[-1][2]
    fits = lambda block: (end - block[1] - block[2] / 2) * frame.cell > room / 2 - 0.6  # noqa: E731
    return [block for k, block in enumerate(run[::step]) if not k or fits(block)]


def _said(value: Any, frame: Frame, count: int) -> str:
    """A coordinate's value in the room of `count` columns, or in that of a label that was left alone."""
    text = fitted("–" if value is None else value, max(ROOM - 2, count * frame.cell - 1), frame.letters.tick)
    return literal(text)


def _scale(figure: Figure, axes: Axes, bar: Axes, rule: str, sizes: Letters) -> None:
    """The key to the colours."""
    mesh: Any = axes.collections[0]
    most = mesh.norm.vmax
    if not bar.collections:
        figure.colorbar(mesh, cax=bar)
    ticks = [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if n <= most]
    if most <= 16:
        ticks = list(range(0, int(most) + 1, max(1, int(most) // 4)))
    height = bar.get_position().height * figure.get_size_inches()[1] * INCH
    kept: list[int] = []
    for tick in reversed(ticks):
        if not kept or (mesh.norm(kept[-1]) - mesh.norm(tick)) * height > 3.2 * sizes.scale:
            kept.append(tick)
    bar.set_yticks(kept, [f"{tick:,}" for tick in kept], fontsize=sizes.tick)
    bar.set_yticks([], minor=True)
    bar.tick_params(length=2, width=0.5)
    bar.spines[:].set_visible(False)
    label = "rank above noise" if rule == "noise" else rule_label(rule)
    bar.set_ylabel(literal(fitted(label, height, sizes.label)), fontsize=sizes.label)
