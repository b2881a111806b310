"""Panels: several small plots over the width of a page, with one key, and ramps of colour that stay ramps in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import INCH, Letters, setting
from tensoradapt.plots.sheet import Sheet, literal, root

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

PAGE = 170.0  # two printed columns with the space between them, in millimetres
ACROSS, HEIGHT, HEAD = 3, 44.0, 8.0
NARROW, LOW = 38.0, 26.0  # the least width and height of a panel
CORNERS = ("lower left", "upper right", "lower right", "upper left")  # where a key within axes may stand
ROOM = (0.25, 0.5, 0.75, 1.0, 1.5)  # by which part an axis is made longer for it
HANDLE = 10.0  # what an entry of a key needs beside its label
MOST = 12  # panels of one figure
DECADES, BELOW = 1e5, 20.0  # how far below the largest value, and below the noise, a logarithmic axis reaches
FINE = 200  # the longest axis of indices with ticks at 2 and 5
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PALE = "#DDDDDD"


def capacity(page: Sheet, most: int = MOST) -> int:
    """How many panels there is room for: one for each of the caller's axes, or as many as the size holds."""
    if page.ax:
        return len(page.ax)
    width, height = page.size
    if height is None:
        return most
    scale = page.letters.scale
    rows = max(1, int((height / scale - HEAD - 4.0) / LOW))
    return min(most, rows * _across(page, most, width or PAGE))


def _across(page: Sheet, count: int, width: float) -> int:
    """Panels side by side: as many as have room, the rows filled evenly."""
    across = max(1, min(count, ACROSS, int(width / (NARROW * page.letters.scale))))
    return -(-count // -(-count // across))


def panel_width(page: Sheet, count: int) -> float:
    """The width of a panel's frame, in millimetres, about."""
    if page.ax:
        return (page.size[0] or PAGE) / len(page.ax)
    width = page.width(PAGE if count > 1 else 0.62 * PAGE)
    return (width - 10.0 * page.letters.scale) / _across(page, count, width) - 5.0 * page.letters.scale


def grid(page: Sheet, count: int, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels that share both axes, filled row by row; or the caller's axes."""
    if page.ax:
        return root(page.ax[0]), list(page.given(count, f"{count} panels"))
    width = page.width(PAGE if count > 1 else 0.62 * PAGE)
    across = _across(page, count, width)
    rows = -(-count // across)
    figure = page.figure(width, page.height((rows * height + HEAD) * page.letters.scale))
    axes = page.dressed(figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False).ravel())
    for spare in axes[count:]:
        spare.set_axis_off()
    for panel in axes[:count]:
        panel.tick_params(labelbottom=True)
    return figure, axes[:count]


def name_axes(page: Sheet, panels: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Name the axes of all panels once, below and beside them; the caller's each."""
    if page.ax:
        for panel in panels:
            panel.set(xlabel=xlabel, ylabel=ylabel)
        return
    root(panels[0]).supxlabel(xlabel, fontsize=page.letters.label)
    root(panels[0]).supylabel(ylabel, fontsize=page.letters.label)


def key(page: Sheet, panels: Sequence[Axes], handles: Sequence[Any]) -> None:
    """The key of a whole figure, above its panels, in as few rows as its width allows; in the caller's first axes."""
    look = {"frameon": False, "fontsize": page.letters.key, "handlelength": 2.4, "handletextpad": 0.5}
    if page.ax:
        _key_within(panels[0], handles, look)
        return
    figure = root(panels[0])
    figure.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=key_columns([handle.get_label() for handle in handles], figure.get_figwidth() * INCH, page.letters),
        columnspacing=1.4,
        labelspacing=0.3,
        borderaxespad=0.1,
        **look,
    )


def _key_within(axes: Axes, handles: Sequence[Any], look: Mapping[str, Any]) -> None:
    """A key in the first corner where it covers nothing; where there is none, a logarithmic axis makes room below."""
    for corner in CORNERS:
        if not _covers(axes, _placed(axes, handles, corner, look)):
            return
    below = _placed(axes, handles, CORNERS[0], look)
    low, high = axes.get_ylim()
    for longer in ROOM if axes.get_yscale() == "log" else ():
        axes.set_ylim(low * (low / high) ** longer, high)
        if not _covers(axes, below):
            return
    axes.set_ylim(low, high)
    _placed(axes, handles, "best", look)


def _placed(axes: Axes, handles: Sequence[Any], where: Any, look: Mapping[str, Any]) -> Legend:
    made = axes.legend(handles=list(handles), loc=where, **look)
    made.set_in_layout(False)  # a wide key would make the axes narrow
    return made


def _covers(axes: Axes, made: Legend) -> bool:
    """Whether the key of some axes lies over a line or a text."""
    root(axes).draw_without_rendering()
    box = made.get_window_extent()
    lines = (line.get_path().transformed(line.get_transform()) for line in axes.lines)
    return any(path.intersects_bbox(box, filled=False) for path in lines) or any(
        text.get_window_extent().overlaps(box) for text in axes.texts
    )


def key_columns(labels: Sequence[str], width: float, sizes: Letters) -> int:
    """The largest number of columns in which the entries of a key fit side by side."""
    wide = [1.04 * extent(label, sizes.key, markup=True)[0] + HANDLE * sizes.scale for label in labels]
    for columns in range(len(labels), 1, -1):
        size, more = divmod(len(labels), columns)
        ends = [k * size + min(k, more) for k in range(columns + 1)]  # as numpy's array_split, and matplotlib's legend
        if sum(max(wide[a:b]) for a, b in pairwise(ends)) < width - 2:
            return columns
    return 1


def falling(axes: Axes, longest: int, values: Sequence[float], floors: Sequence[float], wide: bool = True) -> None:
    """Both axes logarithmic, for values that fall: five decades at most, floors in sight; more ticks if `wide`."""
    top = max((value for value in (*values, *floors) if value > 0), default=1.0)
    floor = min((edge for edge in floors if edge > 0), default=0.0)
    least = min((value for value in (*values, *floors) if value > 0), default=top / 10)
    low, high = max(least, top / DECADES, min(floor, top) / BELOW) / 1.5, top * 2.5
    axes.set(xscale="log", yscale="log", xlim=(0.9, max(2, longest) * 1.12), ylim=(low, high))
    steps = (1, 2, 5) if longest <= FINE and wide else (1,)
    ticks = [step * 10**n for n in range(7) for step in steps if step * 10**n <= max(2, longest)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    _decades(axes, low, high)


def ruled(axes: Axes) -> None:
    """Thin lines at the ticks, behind what is drawn."""
    axes.grid(True, linewidth=setting("grid.linewidth", 0.3), color=setting("grid.color", PALE))
    axes.set_axisbelow(True)


def _decades(axes: Axes, low: float, high: float) -> None:
    """Ticks at powers of ten; where fewer than two are in sight, at 1, 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**n for n in powers if low <= 10.0**n <= high]
    if len(ticks) < 2:
        ticks = [m * 10.0**n for n in powers for m in (1, 2, 5) if low <= m * 10.0**n <= high]
    axes.set_yticks(ticks, [literal(_power(tick)) for tick in ticks])
    axes.set_yticks([], minor=True)


def _power(number: float) -> str:
    """`10⁻³`, `2·10⁻³`; numbers near one as they are."""
    digit, exponent = f"{number:.0e}".split("e")
    if -2 <= int(exponent) <= 2:
        return f"{number:g}"
    power = "10" + str(int(exponent)).translate(RAISED)
    return power if digit == "1" else f"{digit}·{power}"


def decimal_ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten between two numbers, or at these alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 200 * low else (1,)
    inside = [step * 10.0**n for n in powers for step in steps if low / 1.3 <= step * 10.0**n <= high * 1.05]
    axes.set_xticks(inside)
    axes.set_xticks([], minor=True)


def thinned(count: int) -> list[int]:
    """Positions from 0 below `count`: all of the first, then about ten in every doubling; the last is among them."""
    steps = {round(2 ** (k / 10)) - 1 for k in range(10 * max(1, count).bit_length() + 1)}
    return sorted({*range(min(count, 16)), *(k for k in steps if k < count), *([count - 1] if count else [])})


def shades(page: Sheet, count: int) -> list[Any]:
    """Colours from dark to light for lines in an order (cividis: the same to colour-blind readers, a ramp in grey)."""
    return [page.ramp("cividis")(0.78 * k / max(1, count - 1)) for k in range(count)]


def blues(page: Sheet) -> Colormap:
    """Light for little, dark for much: one hue, so that it is the same ramp in grey."""
    return page.ramp("Blues")


def letters_on(colour: Sequence[float]) -> str:
    """White or black, whichever is legible on a colour."""
    red, green, blue = colour[:3]
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"


def largest_groups(report: Mapping[str, Any], wanted: Sequence[str] | None, limit: int) -> list[str]:
    """The groups to draw: those asked for, else at most `limit`, the largest changes first. Raises SpecError."""
    groups = report["groups"]
    unknown = [name for name in wanted or () if name not in groups]
    if unknown or not groups:
        raise SpecError(
            f"the report has no group {unknown[0]!r}" if unknown else "the report has no groups to draw",
            expected=", ".join(groups) or None,
        )
    return list(wanted) if wanted else sorted(groups, key=lambda name: -groups[name]["norm"])[:limit]
