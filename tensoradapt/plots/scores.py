"""Scores against parameters: a line for each method over its sizes, its name at its end, levels of others across.

Invariant: every point is the mean of the scores given, and its bar runs from the least to the largest of them. Methods
are drawn side by side, points apart, so that no bar hides another: on paper, not in the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.budgets import LOG, MARKERS
from tensoradapt.plots.ends import end_of, keep_apart, name_ends
from tensoradapt.plots.page import COLUMN, checked, ink, save, setting, stroke
from tensoradapt.plots.panels import decimal_ticks, ruled
from tensoradapt.plots.shares import key_above, short, shortened
from tensoradapt.plots.sheet import Sheet, root, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 60.0
STEP = 1.8  # points between neighbours
ACROSS = ((0, (6, 2)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))  # the dashes of levels


@dataclass(frozen=True)
class Scored:
    """A method at one size: what it trains, and its scores, one for each seed."""

    method: str
    num_parameters: int
    scores: Sequence[float]


def plot_scores(
    points: Iterable[Scored],
    path: str | Path | None = None,
    *,
    levels: Mapping[str, Sequence[float]] | None = None,
    names: tuple[str, str] = ("trained parameters", "score"),
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    labels: Mapping[str, str] | None = None,
    colors: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Figure:
    """Mean scores against parameters, a line per method; `levels` are scores of what has no sizes, drawn across.

    `names` are those of the two axes; `ax`, `figsize`, `labels`, `colors` and `path` are as those of `plot_budget`.
    Raises SpecError where there is no point and on choices that the figure cannot have, FileError on another suffix.
    """
    target = checked(path)
    methods: dict[str, list[Scored]] = {}
    for point in points:
        if point.scores:
            methods.setdefault(point.method, []).append(point)
    if not methods:
        raise SpecError("there are no scores to draw", expected="points with at least one score each")
    page = sheet(ax, figsize, labels, colors)
    page.known(methods, levels or {})
    figure = page.figure(page.width(COLUMN), page.height(HEIGHT * page.letters.scale))
    (axes,) = page.given(1, "one panel") or page.dressed([figure.add_subplot()])
    tall = (page.size[1] or HEIGHT * page.letters.scale) - 14.0 * page.letters.scale
    axes.set(xlabel=page.along(names[0], page.width(COLUMN)), ylabel=page.along(names[1], tall))
    _draw(page, axes, methods, levels or {})
    save(figure, target)
    return figure


def _draw(
    page: Sheet, axes: Axes, methods: Mapping[str, Sequence[Scored]], levels: Mapping[str, Sequence[float]]
) -> None:
    """The lines with their bars, the levels, the axes and the names, in this order."""
    colours = page.colours(list(methods))
    lines = []
    for number, (method, points) in enumerate(methods.items()):
        look = {"color": colours[method], "marker": MARKERS[number % len(MARKERS)], "label": shortened(page, method)}
        look["transform"] = _beside(axes, number - (len(methods) - 1) / 2)
        lines.append(_line(axes, sorted(points, key=lambda point: point.num_parameters), look))
    sizes = [point.num_parameters for points in methods.values() for point in points]
    if min(sizes) > 0 and max(sizes) >= LOG * min(sizes):
        axes.set_xscale("log")
        decimal_ticks(axes, min(sizes), max(sizes))
    axes.xaxis.set_major_formatter(short)
    for number, (name, scores) in enumerate(levels.items()):
        look = {"color": ink(), "linewidth": stroke(0.8), "linestyle": ACROSS[number % len(ACROSS)]}
        lines += axes.plot([min(sizes), max(sizes)], 2 * [mean(scores)], label=shortened(page, name), **look)
    axes.autoscale_view()
    ruled(axes)
    if not name_ends(axes, [end_of(line) for line in lines], page.letters):
        key_above(page, axes)
    keep_apart(axes, lines[: len(methods)])


def _beside(axes: Axes, steps: float) -> Any:
    """The axes' transform, shifted sideways by steps of some points."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(STEP * steps / 72, 0, root(axes).dpi_scale_trans)


def _line(axes: Axes, points: Sequence[Scored], look: Mapping[str, Any]) -> Any:
    """The line through a method's means, with a bar over its scores."""
    means = [mean(point.scores) for point in points]
    below = [m - min(point.scores) for m, point in zip(means, points, strict=True)]
    above = [max(point.scores) - m for m, point in zip(means, points, strict=True)]
    xs = [point.num_parameters for point in points]
    bars = {"elinewidth": stroke(0.7), "capsize": 1.8, "capthick": stroke(0.7), "ecolor": look["color"]}
    axes.errorbar(xs, means, [below, above], fmt="none", transform=look["transform"], **bars)
    axes.update_datalim([(x, score) for x, point in zip(xs, points, strict=True) for score in point.scores])
    size = setting("lines.markersize", 3.0)
    return axes.plot(xs, means, linewidth=stroke(1.2), markersize=size, **look)[0]
