"""Pictures of diagrams: nodes as circles, bonds as lines, open axes as legs, hyperedges as dots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensoradapt.diagram import WEIGHT_AXES, Diagram
from tensoradapt.errors import SpecError
from tensoradapt.plots.labels import Label, Segment, around, behind, beside, extent, place
from tensoradapt.plots.layout import DOT, RADIUS, STEP, WIDE, Graph, Layout, Point, graph_of, is_dot, lay_out
from tensoradapt.plots.page import (
    BLUE,
    COLUMN,
    DARKER,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILION,
    checked,
    new_figure,
    save,
)
from tensoradapt.plots.sheet import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

SIDES = {"coordinate": GREEN, "out": BLUE, "in": VERMILION, "kernel": PURPLE}
NAME, SMALL, TITLE = 6.5, 6.0, 8.0  # points
DOT_RADIUS = 0.75
MARGIN = 2.0
ROW = 3.6  # the height of a line of the key
STRETCHES = (1.0, 1.15, 1.3, 1.5, 1.75, 2.0)


@dataclass(frozen=True)
class Line:
    """One bond, or part of an open axis: its index, the points it runs through, its colour."""

    index: str
    points: tuple[Point, ...]
    colour: str

    @property
    def segments(self) -> list[Segment]:
        """The straight pieces."""
        return list(zip(self.points, self.points[1:], strict=False))

    @property
    def middle(self) -> Segment:
        """The piece that a label stands beside."""
        return self.segments[len(self.segments) // 2]


@dataclass(frozen=True)
class Picture:
    """All that is drawn, in millimetres: places, lines, and labels with theirs."""

    layout: Layout
    lines: tuple[Line, ...]
    labels: tuple[tuple[Label, Point], ...]
    overlap: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The least and the largest coordinates of circles and texts."""
        boxes = [label.box(point) for label, point in self.labels]
        spans = [(b.x, b.y, b.width / 2, b.height / 2) for b in boxes]
        spans += [(x, y, RADIUS, RADIUS) for x, y in self.layout.at.values()]
        spans += [(x, y, 0.0, 0.0) for x, y in self.layout.ends.values()]
        return (
            min(x - w for x, _, w, _ in spans),
            min(y - h for _, y, _, h in spans),
            max(x + w for x, _, w, _ in spans),
            max(y + h for _, y, _, h in spans),
        )


def draw_diagram(
    diagram: Diagram,
    path: str | Path | None = None,
    title: str = "",
    *,
    frozen: Iterable[str] = (),
    zero: str = "",
) -> Figure:
    """A tensor network as a picture: T[open] = sum over bonds of prod_n node_n[indices_n], one circle per node.

    Bonds are lines and open axes legs, coloured by what they are (coordinates, folds of `out`, of `in`, of `kernel`),
    with names and sizes; an index on more than two nodes is a dot. `frozen` nodes are hatched, the `zero` one is empty.
    Saved to a .png, .svg, .pdf or .pgf `path`. Raises SpecError on nodes that the diagram lacks, FileError on a suffix.
    """
    target = checked(path)
    states = _states(diagram, tuple(frozen), zero)
    figure = _drawn(_picture(diagram, states), diagram, states, title)
    save(figure, target)
    return figure


def _states(diagram: Diagram, frozen: Sequence[str], zero: str) -> dict[str, str]:
    """What is said of nodes: `frozen` or `zero`."""
    if not diagram.nodes:
        raise SpecError("the diagram has no nodes to draw")
    states = dict.fromkeys(frozen, "frozen") | ({zero: "zero"} if zero else {})
    unknown = sorted(set(states) - set(diagram.nodes))
    if unknown:
        raise SpecError(f"the diagram has no node {unknown[0]!r}", expected=", ".join(diagram.nodes))
    return states


def _sides(diagram: Diagram) -> dict[str, str]:
    """What every open axis is: a coordinate, or a fold of `out`, `in` or `kernel`."""
    folds = {part: axis for axis in WEIGHT_AXES for part in diagram.fold(axis)}
    return {axis: folds.get(axis, "coordinate") for axis in diagram.open}


def _picture(diagram: Diagram, states: Mapping[str, str]) -> Picture:
    """The layout and its labels: the tightest at which no two texts overlap, else the one with the least overlap."""
    graph, sides = graph_of(diagram), _sides(diagram)
    bonds = [extent(_sized(diagram, bond), SMALL)[0] for bond in diagram.bonds]
    legs = [extent(_sized(diagram, axis), SMALL)[0] - 2 * RADIUS for axis in diagram.open]
    names = [extent(node, NAME)[0] - 2 * RADIUS for node in diagram.nodes]
    spacing = 2 * RADIUS + 1.2 + max([8.0, *bonds, *legs, *names])
    step = max(STEP, (2 * RADIUS + 0.8 + max([0.0, *bonds])) / WIDE)
    tried = []
    for stretch in STRETCHES:
        layout = lay_out(graph, sides, spacing * stretch, step * stretch, COLUMN - 2 * MARGIN)
        lines = _lines(graph, layout, sides)
        labels = _labels(diagram, graph, layout, lines, states)
        discs = [(point, DOT_RADIUS if is_dot(v) else RADIUS) for v, point in layout.at.items()]
        segments = [segment for line in lines for segment in line.segments]
        points, overlap = place(labels, discs, segments, _bounds(layout))
        tried.append(Picture(layout, tuple(lines), tuple(zip(labels, points, strict=True)), overlap))
        if overlap == 0:
            break
    return min(tried, key=lambda picture: picture.overlap)


def _bounds(layout: Layout) -> tuple[float, float]:
    """The margins of the column; none where the layout is too wide for it."""
    left, _, right, _ = layout.box
    half = COLUMN / 2 - MARGIN if right - left < COLUMN - 2 * MARGIN else math.inf
    return (left + right) / 2 - half, (left + right) / 2 + half


def _sized(diagram: Diagram, index: str) -> str:
    return f"{index}={diagram.sizes[index]}"


def _lines(graph: Graph, layout: Layout, sides: Mapping[str, str]) -> list[Line]:
    """The lines of bonds, bent where several join the same two vertices, and of legs."""
    lines = []
    for a, b, index in graph.edges:
        twins = [other for other in graph.edges if {*other[:2]} == {a, b}]
        bend = 6.0 * (twins.index((a, b, index)) - (len(twins) - 1) / 2)
        colour = SIDES[sides[index]] if index in sides else INK
        lines.append(Line(index, _bent(layout.at[a], layout.at[b], bend), colour))
    for (vertex, axis), end in layout.ends.items():
        lines.append(Line(axis, (layout.at[vertex], end), SIDES[sides[axis]]))
    return lines


def _bent(start: Point, end: Point, bend: float) -> tuple[Point, ...]:
    """A line between two points, or an arc with the given rise."""
    if bend == 0:
        return start, end
    (x0, y0), (x1, y1) = start, end
    length = math.dist(start, end)
    nx, ny = -(y1 - y0) / length, (x1 - x0) / length
    steps = [k / 12 for k in range(13)]
    rise = [4 * bend * t * (1 - t) for t in steps]
    return tuple((x0 + t * (x1 - x0) + r * nx, y0 + t * (y1 - y0) + r * ny) for t, r in zip(steps, rise, strict=True))


def _labels(
    diagram: Diagram, graph: Graph, layout: Layout, lines: Sequence[Line], states: Mapping[str, str]
) -> list[Label]:
    """All texts: what has the fewest places to go comes first."""
    labels = []
    for line in (line for line in lines if line.points[-1] in layout.ends.values()):
        text = _sized(diagram, line.index)
        labels.append(Label(text, SMALL, DARKER[line.colour], behind((line.points[0], line.points[1]), text, SMALL)))
    for vertex, point in layout.at.items():
        if not is_dot(vertex):
            places = around(point, RADIUS, vertex, NAME)
            hatched = states.get(vertex) == "frozen"  # a name within would not be legible
            labels.append(Label(vertex, NAME, INK, tuple(p for p in places if not hatched or p != point)))
        elif not graph.legs_of(vertex):
            text = _sized(diagram, vertex[1:])
            labels.append(Label(text, SMALL, INK, around(point, DOT_RADIUS, text, SMALL)))
    for line in lines:
        if line.index in diagram.bonds and DOT + line.index not in layout.at:
            text = _sized(diagram, line.index)
            labels.append(Label(text, SMALL, INK, beside(line.middle, text, SMALL)))
    return labels


def _drawn(picture: Picture, diagram: Diagram, states: Mapping[str, str], title: str) -> Figure:
    from matplotlib.legend_handler import HandlerPatch
    from matplotlib.patches import Circle

    key = _key(diagram, states)
    columns = len(key) if len(key) <= 4 else 3
    left, bottom, right, top = picture.box
    head = 5.0 if title else 0.0
    foot = ROW * -(-len(key) // max(columns, 1)) + 1.0
    width = max(COLUMN, max(right - left, extent(title, TITLE)[0]) + 2 * MARGIN)
    height = top - bottom + 2 * MARGIN + head + foot
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    middle = (left + right) / 2
    axes.set(xlim=(middle - width / 2, middle + width / 2), ylim=(bottom - MARGIN - foot, top + MARGIN + head))
    axes.set_axis_off()
    _draw(axes, picture, states)
    axes.text(middle, top + MARGIN + head / 2, literal(title), fontsize=TITLE, ha="center", va="center")
    axes.legend(
        handles=key,
        handler_map={Circle: HandlerPatch(patch_func=_small_circle)},
        ncols=columns,
        loc="lower center",
        frameon=False,
        fontsize=SMALL,
        handlelength=1.6,
        columnspacing=1.4,
        handletextpad=0.5,
        labelspacing=0.4,
        borderaxespad=0.3,
    )
    return figure


def _draw(axes: Axes, picture: Picture, states: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    for line in picture.lines:
        xs, ys = zip(*line.points, strict=True)
        axes.add_line(Line2D(xs, ys, color=line.colour, linewidth=1.2, solid_capstyle="round", zorder=1))
    for vertex, point in picture.layout.at.items():
        if is_dot(vertex):
            axes.add_patch(Circle(point, DOT_RADIUS, facecolor=INK, edgecolor=INK, linewidth=0, zorder=3))
        else:
            axes.add_patch(Circle(point, RADIUS, zorder=2, hatch_linewidth=0.5, **_look(states.get(vertex, ""))))
    for label, (x, y) in picture.labels:
        text = literal(label.text)
        axes.text(x, y, text, fontsize=label.size, color=label.colour, ha="center", va="center", zorder=4)


def _look(state: str) -> dict[str, Any]:
    """How a node's circle is drawn: filled; hatched where frozen; empty and dashed where zero."""
    look: dict[str, Any] = {"facecolor": "#D6E6F2", "edgecolor": INK, "linewidth": 0.9}
    marked: dict[str, dict[str, Any]] = {
        "frozen": {"facecolor": "#E4E4E4", "edgecolor": GREY, "hatch": "//////"},
        "zero": {"facecolor": "white", "linestyle": (0, (2.5, 1.5))},
    }
    return look | marked.get(state, {})


def _key(diagram: Diagram, states: Mapping[str, str]) -> list[object]:
    """The handles of the key, with their labels: the kinds of axes and nodes that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    sides = set(_sides(diagram).values())
    handles: list[object] = [Line2D([], [], color=c, linewidth=1.2, label=s) for s, c in SIDES.items() if s in sides]
    said = {"frozen": "frozen", "zero": "zero at the start"}
    handles += [Circle((0, 0), label=said[s], **_look(s)) for s in said if s in states.values()]
    return handles


def _small_circle(*, width: float, height: float, **_: object) -> Patch:
    """A node as it stands in the key."""
    from matplotlib.patches import Circle

    return Circle((width / 2, height / 2), 0.75 * height)
