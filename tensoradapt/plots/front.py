"""Error against parameters of all candidates: the Pareto front joined, the chosen one ringed and named.

Invariant: every point is a candidate of the report; what is on the front, and what is chosen, the report says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import extent
from tensoradapt.plots.page import INCH, POINT, Letters, ink, stroke
from tensoradapt.plots.panels import PAGE, key, key_columns, ruled
from tensoradapt.plots.shares import short
from tensoradapt.plots.sheet import Sheet, root
from tensoradapt.plots.words import brief_name, percent, proposed, some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^DvP<>X*h"  # as many as is prime to the number of colours, so that pairs recur late
HEIGHT = 84.0
LOG = 8.0  # the ratio of the largest to the smallest number from which an axis is logarithmic
FRONT = "Pareto front"
CARETDOWN = 7  # matplotlib's marker: a triangle above the point that points down to it
Box = tuple[float, float, float, float]
NEAR = 0.01  # the share by which numbers differ that are one place to the eye
DEEP = 1e-3  # errors are shown down to this share of the largest, and to the chosen one


def plot_front(report: Mapping[str, Any], page: Sheet) -> Figure:
    """Relative error against parameters, a marker per preset. Raises SpecError on a report without candidates."""
    points = _known(report)
    presets = list(dict.fromkeys(point["preset"] for point in points))
    page.known(presets, (point["label"] for point in points))
    colours = page.colours(presets)
    looks = {name: (colours[name], MARKERS[k % len(MARKERS)]) for k, name in enumerate(presets)}
    labels = _formats(page, points)
    width = page.width(PAGE)
    columns = key_columns([*labels.values(), FRONT], width, page.letters)
    lines = -(-(len(presets) + 1) // columns)
    height = page.height((HEIGHT * min(1.0, width / PAGE + 0.25) + 3.4 * lines) * page.letters.scale)
    figure = page.figure(width, height)
    (axes,) = page.given(1, "one panel") or page.dressed([figure.add_subplot()])
    front = sorted((p for p in points if p["front"]), key=lambda p: (p["num_parameters"], -p["relative_error"]))
    axes.plot(*_stairs(front), color=ink(), linewidth=stroke(0.8), linestyle=(0, (5, 2)), zorder=1, label="front")
    for point, depth in zip(points, _depths(points), strict=True):
        _point(axes, point, depth, *looks[point["preset"]])
    tall = height - 20 * page.letters.scale
    room = (width / page.letters.scale, tall / page.letters.scale)
    _scales(axes, points, _floor(points, _chosen(points, proposed(report))), room)
    axes.set(xlabel="parameters of the adapter")
    axes.set_ylabel(page.along("relative error of the change, % of its norm", tall))
    ruled(axes)
    key(page, [axes], _handles(looks, labels))
    figure.draw_without_rendering()
    _names(page, axes, points, front, proposed(report))
    return figure


def front_caption(report: Mapping[str, Any]) -> str:
    """What to read off the front: what is on it, and what was chosen."""
    points = _known(report)
    front = [point for point in points if point["front"]]
    said = [f"{some(len(points), 'candidate')}, a marker per preset; smaller and closer is lower left."]
    if len(points) > 1:
        said += [f"Filled, and joined: the {len(front):,} that no other beats in both."]
    chosen = _chosen(points, proposed(report))
    if chosen:
        size = f"{chosen['num_parameters']:,} parameters at an error of {percent(chosen['relative_error'])}"
        said += [f"Chosen: {brief_name(chosen['label'])}, {size}."]
        worst = chosen["worst_site"]
        if worst and worst["relative_error"]:
            said += [f"Its worst weight is {brief_name(worst['path'])}, at {percent(worst['relative_error'])}."]
    below = sum(point["relative_error"] < _floor(points, chosen) for point in points)
    if below:
        said += [f"Arrows at the lower edge: {some(below, 'candidate')} with smaller errors still."]
    lost = len(report["candidates"]) - len(points)
    return " ".join(said + ([f"{some(lost, 'candidate')} without an error are left out."] if lost else []))


def _known(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates that have an error."""
    found = [candidate for candidate in report["candidates"] if candidate["relative_error"] is not None]
    if not found:
        raise SpecError("the report has no candidates to draw", hint="analyse with candidates")
    return found


def _chosen(points: Sequence[Mapping[str, Any]], choice: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return next((point for point in points if choice and point["label"] == choice["label"]), None)


def _stairs(front: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The front as steps: an error holds until a larger adapter has a smaller one."""
    xs: list[float] = []
    ys: list[float] = []
    for point in front:
        xs += [point["num_parameters"]] * (2 if ys else 1)
        ys += [*ys[-1:], 100 * point["relative_error"]]
    return xs, ys


def _depths(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many of the points before each stand in the same place, so that its marker goes around theirs."""
    places = [(p["num_parameters"], p["relative_error"]) for p in points]
    same = lambda a, b: all(math.isclose(x, y, rel_tol=NEAR) for x, y in zip(a, b, strict=True))  # noqa: E731
    return [sum(same(place, other) for other in places[:k]) for k, place in enumerate(places)]


def _point(axes: Axes, point: Mapping[str, Any], depth: int, colour: str, marker: str) -> None:
    """A candidate: filled where on the front, open elsewhere, and around those in the same place."""
    face = colour if point["front"] and not depth else "none" if depth else axes.get_facecolor()
    axes.plot([point["num_parameters"]], [100 * point["relative_error"]], linestyle="none", marker=marker,
              markersize=4.2 * (1 + 0.6 * depth), markeredgecolor=colour, markeredgewidth=0.9, markerfacecolor=face,
              zorder=3 if point["front"] else 2, label=point["preset"])  # fmt: skip


def _floor(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> float:
    """The least error of a logarithmic axis; zero where a linear one does."""
    errors = [point["relative_error"] for point in points]
    least = min(max(errors) * DEEP, chosen["relative_error"] / 2 if chosen else 1.0)
    shown = [error for error in errors if error >= least]
    return least if least > 0 and max(shown) >= LOG * min(shown) else 0.0


def _scales(axes: Axes, points: Sequence[Mapping[str, Any]], floor: float, room: tuple[float, float]) -> None:
    """Logarithmic where the numbers are far apart; errors from the floor on, what is below it marked at the edge."""
    counts, errors = [p["num_parameters"] for p in points], [100 * p["relative_error"] for p in points]
    if min(counts) > 0 and max(counts) >= LOG * min(counts):
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks(_rounded(low, high, room[0] / 8.0))
        axes.set_xlim(low, high)
        axes.set_xticks([], minor=True)
    else:
        axes.set_xlim(0, 1.08 * max(*counts, 1))
    axes.xaxis.set_major_formatter(short)
    if not floor:
        axes.set_ylim(-0.03 * (max(errors) or 100), 1.06 * (max(errors) or 100))
        return
    low, high = min(error for error in errors if error >= 100 * floor) / 1.4, max(errors) * 1.4
    axes.set(yscale="log", ylim=(low, high))
    axes.set_yticks(_rounded(low, high, room[1] / 3.2))
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
    lower = [point["num_parameters"] for point in points if point["relative_error"] < floor]
    if lower:
        axes.plot(lower, [0] * len(lower), transform=axes.get_xaxis_transform(), linestyle="none", marker=CARETDOWN,
                  color=ink(), markersize=5, clip_on=False, zorder=4, label="below")  # fmt: skip


def _rounded(low: float, high: float, most: float) -> list[float]:
    """Round numbers within a range: three in every power of ten if so many have room, else one, or one in several."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [step * 10.0**n for n in powers for step in (1, 2, 5) if low <= step * 10.0**n <= high]
    coarse = [10.0**n for n in powers if low <= 10.0**n <= high]
    return fine if len(fine) <= most or len(coarse) < 2 else coarse[:: max(1, -int(-len(coarse) // most))]


def _formats(page: Sheet, points: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The name of every preset's format in the key, as in the names of its points: `LoRA` of `LoRA r=8`."""
    named = {point["preset"]: point["label"].partition(" r=")[0] for point in points}
    width = 40 * page.letters.scale
    return {name: page.labels.get(name) or page.said(text, width) for name, text in named.items()}


def _handles(looks: Mapping[str, tuple[str, str]], labels: Mapping[str, str]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=4.2, label=labels[name])
        for name, (colour, marker) in looks.items()
    ]
    return [*handles, Line2D([], [], color=ink(), linewidth=stroke(0.8), linestyle=(0, (5, 2)), label=FRONT)]


def _names(
    page: Sheet,
    axes: Axes,
    points: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]],
    choice: Mapping[str, Any] | None,
) -> None:
    """Names beside the chosen point, and beside those of the front that have room, in that order."""
    inches, size = root(axes).dpi / INCH, page.letters.note
    at = lambda p: axes.transData.transform((p["num_parameters"], 100 * p["relative_error"])) / inches  # noqa: E731
    places = {id(point): tuple(at(point)) for point in points}
    taken = [(x - 1, y - 1, x + 1, y + 1) for x, y in places.values()]
    corners = [tuple(axes.transData.transform(corner) / inches) for corner in zip(*_stairs(front), strict=True)]
    taken += [(min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in pairwise(corners)]
    taken += [_in_millimetres(axes.get_legend(), inches)] if axes.get_legend() else []
    frame = _in_millimetres(axes, inches)
    chosen = _chosen(points, choice)
    for point in [*([chosen] if chosen else []), *(p for p in front if p is not chosen)]:
        text = page.said(point["label"], min(36 * page.letters.scale, 0.6 * (frame[2] - frame[0])), size)
        text = f"chosen: {text}" if point is chosen else text
        spot = _spot(places[id(point)], extent(text, size, markup=True), taken, frame, must=point is chosen)
        if spot:
            taken.append(spot)
            _name(axes, point, text, places[id(point)], spot, page.letters, point is chosen)


def _in_millimetres(artist: Any, inches: float) -> Box:
    box = artist.get_window_extent()
    return box.x0 / inches, box.y0 / inches, box.x1 / inches, box.y1 / inches


def _name(
    axes: Axes, point: Mapping[str, Any], text: str, place: tuple[float, float], spot: Box, sizes: Letters, bold: bool
) -> None:
    """A name at its spot; that of the chosen point bold, and the point ringed."""
    xy = (point["num_parameters"], 100 * point["relative_error"])
    left, bottom, _, top = spot
    if bold:
        axes.plot(*zip(xy, strict=True), linestyle="none", marker="o", markersize=9, markerfacecolor="none",
                  markeredgecolor=ink(), markeredgewidth=1.2, zorder=4, label="chosen")  # fmt: skip
    offset = ((left - place[0]) / POINT, ((bottom + top) / 2 - place[1]) / POINT)
    axes.annotate(text, xy, xytext=offset, textcoords="offset points", fontsize=sizes.note, va="center", color=ink(),
                  fontweight="bold" if bold else "normal")  # fmt: skip


def _spot(
    point: tuple[float, float], size: tuple[float, float], taken: Sequence[Box], frame: Box, must: bool
) -> Box | None:
    """The first free place beside a point, below left first: a front leaves room there. None, unless it `must` be."""
    (x, y), (width, height) = point, size
    width *= 1.2 if must else 1.0  # bold
    gap = 2.2 if must else 1.4
    spots = [
        (x + dx * far * gap + (dx - 1) * width / 2, y + dy * far * gap - height / 2)
        for far in ((1, 2, 3, 4, 5, 6) if must else (1, 1.6))
        for dx, dy in ((-1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (-1, 1), (1, -1), (0, 1))
    ]
    boxes = [(left, bottom, left + width, bottom + height) for left, bottom in spots]
    inside = [b for b in boxes if b[0] > frame[0] and b[1] > frame[1] and b[2] < frame[2] and b[3] < frame[3]]
    free = [b for b in inside if not any(_meet(b, other) for other in taken)]
    return next(iter(free or (inside + boxes if must else [])), None)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
