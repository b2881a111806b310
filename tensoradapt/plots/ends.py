"""Lines that say their names at their ends, and that stay apart where they lie on each other.

Invariant: no line is moved off its numbers: lines that coincide take turns along the way, and their markers nest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import INCH, Letters, ink, stroke
from tensoradapt.plots.sheet import root

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

NEAR = 0.6  # millimetres: lines this near are one line to the eye
SHARE, SAMPLES = 0.5, 33  # the share of their common way from which two lines take turns
TURN = 4.0  # the length of a turn, in widths of a line
GROWTH = 1.6  # how much larger the outermost of several nested markers is, at most
LEAD, MARGIN = 5.0, 1.0  # millimetres between a line's end and its name, and behind the name
LEAST = 0.4  # the share of the axes that names must leave to the lines


@dataclass(frozen=True)
class End:
    """The end of a line in the numbers of the axes, its name, and its colour."""

    x: float
    y: float
    text: str
    colour: Any


def end_of(line: Line2D) -> End:
    """The last point of a line, with the line's label and colour."""
    (x, y), label = np.asarray(line.get_xydata(), dtype=float)[-1], str(line.get_label())
    return End(float(x), float(y), label, line.get_color())


def keep_apart(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Let lines that lie on each other take turns: each shows on its own dashes, and the markers nest."""
    for crowd in _crowds(axes, lines):
        count = len(crowd)
        for k, line in enumerate(crowd):
            line.set_linestyle(((count - k) * TURN % (count * TURN), (TURN, (count - 1) * TURN)))
            line.set_markersize(
                line.get_markersize() * (1 + GROWTH * (1 - k / (count - 1)) * min(1.0, (count - 1) / 2))
            )
            if k < count - 1:
                line.set(markerfacecolor="none", clip_on=False)


def _crowds(axes: Axes, lines: Sequence[Line2D]) -> list[list[Line2D]]:
    """Sets of lines that lie on each other, each line with at least one other of its set."""
    scale = INCH / root(axes).dpi
    paths = [line.get_transform().transform(line.get_xydata()) * scale for line in lines]
    crowds: list[list[int]] = []
    for k, path in enumerate(paths):
        met = [crowd for crowd in crowds if any(_meet(path, paths[other]) for other in crowd)]
        crowds = [crowd for crowd in crowds if crowd not in met] + [[*(n for crowd in met for n in crowd), k]]
    return [[lines[k] for k in sorted(crowd)] for crowd in crowds if len(crowd) > 1]


def _meet(one: Any, other: Any) -> bool:
    """Whether two paths over the same stretch are one line to the eye for most of it."""
    one, other = one[np.argsort(one[:, 0], kind="stable")], other[np.argsort(other[:, 0], kind="stable")]
    low, high = max(one[0, 0], other[0, 0]), min(one[-1, 0], other[-1, 0])
    if low > high + NEAR:
        return False
    at = np.linspace(low, max(low, high), SAMPLES)
    apart = np.abs(np.interp(at, *one.T) - np.interp(at, *other.T))
    return bool(np.isfinite(apart).all() and (apart < NEAR).mean() >= SHARE)


def name_ends(axes: Axes, ends: Sequence[End], sizes: Letters) -> bool:
    """Write the names beside the ends, none over another, in room made at the right. False where there is none."""
    figure = root(axes)
    figure.draw_without_rendering()
    box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    wide, tall = box.width * INCH, box.height * INCH
    extents = [extent(end.text, sizes.key, markup=True) for end in ends]
    longest, height = (max(lengths) for lengths in zip(*extents, strict=True))
    share = 1 - (LEAD + longest + MARGIN) / max(wide, 1e-6)
    if share < LEAST or len(ends) * height > tall:
        return False
    _make_room(axes, max(end.x for end in ends), share)
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [to_axes.transform((end.x, end.y))[1] * tall for end in ends]
    for end, place in zip(ends, spread(wanted, height, 0.0, tall), strict=True):
        spot = (share + LEAD / wide, place / tall)
        text = axes.text(*spot, end.text, transform=axes.transAxes, fontsize=sizes.key, color=ink(), va="center")
        text.set_in_layout(False)  # it stands within the axes
        _lead(axes, end, (spot[0] - 0.6 / wide, spot[1]))
    return True


def _lead(axes: Axes, end: End, spot: tuple[float, float]) -> None:
    """A thin line from the end to its name, not one of the axes' lines of data."""
    from matplotlib.patches import ConnectionPatch

    lead = ConnectionPatch(
        (end.x, end.y), spot, axes.transData, axes.transAxes, shrinkA=0.5, color=end.colour, linewidth=stroke(0.6)
    )
    lead.set_in_layout(False)
    axes.add_artist(lead)


def _make_room(axes: Axes, last: float, share: float) -> None:
    """Widen the axes to the right, so that the last end stands at a share of their width."""
    scale = axes.xaxis.get_transform()
    low, end = (float(scale.transform(np.array([x]))[0]) for x in (axes.get_xlim()[0], last))
    high = low + (end - low) / share
    axes.set_xlim(right=float(scale.inverted().transform(np.array([high]))[0]))


def spread(wanted: Sequence[float], height: float, low: float, high: float) -> list[float]:
    """Places in the order of the wanted ones and as near to them as may be, a height apart, between two bounds."""
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    runs: list[tuple[float, int]] = []  # sums and counts of those that touch, each less the height of those below it
    for number, k in enumerate(order):
        runs.append((wanted[k] - number * height, 1))
        while len(runs) > 1 and runs[-2][0] / runs[-2][1] > runs[-1][0] / runs[-1][1]:
            (a, m), (b, n) = runs.pop(), runs.pop()
            runs.append((a + b, m + n))
    least, most = low + height / 2, high + height / 2 - len(order) * height
    levels = [min(max(total / count, least), most) for total, count in runs for _ in range(count)]
    places = {k: level + number * height for number, (k, level) in enumerate(zip(order, levels, strict=True))}
    return [places[k] for k in range(len(wanted))]
