"""Layout: where the nodes of a diagram lie on paper, in millimetres. Chains in rows, everything else around a centre.

Invariant: the same diagram gives the same layout, and every vertex and every leg has a place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tensoradapt.diagram import Diagram

Point = tuple[float, float]
DOT = "."  # a dot's vertex is its index behind this sign, which no node's name begins with
RADIUS = 3.2  # of a node
LEG = 7.5  # the length of an open axis beyond its node
STEP = 15.5  # between a centre and what surrounds it
WIDE = 1.25  # text is wide: circles are laid out as ellipses


@dataclass(frozen=True)
class Graph:
    """What is drawn of a diagram: nodes and dots (an index of more or fewer than two ends), lines and legs.

    `edges` are (vertex, vertex, index), `legs` (vertex, open axis). An open axis on several nodes is a dot with a leg.
    """

    vertices: tuple[str, ...]
    edges: tuple[tuple[str, str, str], ...]
    legs: tuple[tuple[str, str], ...]

    def neighbours(self, vertex: str) -> list[str]:
        """The vertices that lines lead to, each once."""
        return list(dict.fromkeys(b if a == vertex else a for a, b, _ in self.edges if vertex in (a, b)))

    def legs_of(self, vertex: str) -> list[str]:
        """The open axes that end at a vertex."""
        return [axis for at, axis in self.legs if at == vertex]

    def part(self, vertices: Iterable[str]) -> Graph:
        """The graph of some vertices alone."""
        kept = set(vertices)
        return Graph(
            tuple(v for v in self.vertices if v in kept),
            tuple(e for e in self.edges if e[0] in kept and e[1] in kept),
            tuple(leg for leg in self.legs if leg[0] in kept),
        )

    @property
    def components(self) -> list[Graph]:
        """The connected parts, in the order of their first vertices."""
        parts: list[Graph] = []
        seen: set[str] = set()
        for vertex in self.vertices:
            if vertex not in seen:
                found = self.reached(vertex)
                seen |= set(found)
                parts.append(self.part(found))
        return parts

    def reached(self, start: str) -> list[str]:
        """The vertices connected to one, depth first."""
        order: list[str] = []
        waiting = [start]
        while waiting:
            vertex = waiting.pop()
            if vertex not in order:
                order.append(vertex)
                waiting += reversed(self.neighbours(vertex))
        return order


@dataclass
class Layout:
    """Positions of vertices, and the far ends of legs."""

    at: dict[str, Point] = field(default_factory=dict)
    ends: dict[tuple[str, str], Point] = field(default_factory=dict)

    def moved(self, dx: float, dy: float) -> Layout:
        """The same, elsewhere."""
        shift = lambda points: {key: (x + dx, y + dy) for key, (x, y) in points.items()}  # noqa: E731
        return Layout(shift(self.at), shift(self.ends))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The least and the largest coordinates: left, bottom, right, top."""
        xs, ys = zip(*self.at.values(), *self.ends.values(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def is_dot(vertex: str) -> bool:
    """Whether a vertex is an index, not a node."""
    return vertex.startswith(DOT)


def graph_of(diagram: Diagram) -> Graph:
    """The graph of a diagram's nodes, bonds and open axes."""
    carriers = {i: [n for n, indices in diagram.nodes.items() if i in indices] for i in diagram.sizes}
    dots, edges, legs = [], [], []
    for index in dict.fromkeys(i for indices in diagram.nodes.values() for i in indices):
        nodes, is_open = carriers[index], index in diagram.open
        single = len(nodes) == (1 if is_open else 2)
        if not single:
            dots.append(DOT + index)
            edges += [(node, DOT + index, index) for node in nodes]
        elif not is_open:
            edges.append((nodes[0], nodes[1], index))
        if is_open:
            legs.append((nodes[0] if single else DOT + index, index))
    return Graph((*diagram.nodes, *dots), tuple(edges), tuple(legs))


def lay_out(graph: Graph, sides: Mapping[str, str], spacing: float, step: float, width: float) -> Layout:
    """Places for a graph: rows where it is made of chains, else each connected part around its centre, stacked.

    `sides` names the side (`out`, `in`, ..) of every open axis; `spacing` is the distance of neighbours in a row,
    `step` that of a centre and what surrounds it; rows turn round at `width`.
    """
    chains = chains_of(graph)
    if chains:
        return _rows(graph, chains, sides, spacing, width)
    whole, below = Layout(), 0.0
    for part in graph.components:
        own = chains_of(part)
        made = _rows(part, own, sides, spacing, width) if own else _around(part, step)
        left, _, right, top = made.box
        made = made.moved(-(left + right) / 2, below - top)
        whole.at |= made.at
        whole.ends |= made.ends
        below = made.box[1] - step
    return whole


def chains_of(graph: Graph) -> list[list[str]]:
    """The nodes in chains, joined by at most one dot (several, where there is one chain); empty where they are none."""
    nodes = graph.part(v for v in graph.vertices if not is_dot(v))
    dots = [v for v in graph.vertices if is_dot(v)]
    chains = [_walk(part) for part in nodes.components]
    spanned = all(graph.legs_of(dot) for dot in dots) and (len(chains) == 1 or len(dots) <= 1)
    return chains if all(chains) and spanned else []


def _walk(graph: Graph) -> list[str]:
    """The vertices of a path from end to end; none where it is not a path."""
    degrees = {v: len(graph.neighbours(v)) for v in graph.vertices}
    ends = [v for v, degree in degrees.items() if degree < 2]
    return graph.reached(ends[0]) if ends and max(degrees.values()) <= 2 else []


def _rows(graph: Graph, chains: list[list[str]], sides: Mapping[str, str], spacing: float, width: float) -> Layout:
    """Chains one behind another, in rows that turn round where the width ends; dots above their nodes."""
    line = [vertex for chain in chains for vertex in chain]
    dots = [v for v in graph.vertices if is_dot(v)]
    count = 1 if dots else -(-len(line) // max(1, 1 + int((width - spacing) // spacing)))
    length = -(-len(line) // count)
    single = all(len(graph.legs_of(v)) <= 1 for v in line)
    height = 2 * RADIUS + 1.4 * LEG + (0 if single and count <= 2 else 1.6 * LEG)
    layout = Layout()
    for k, vertex in enumerate(line):
        row, column = divmod(k, length)
        outward = -1 if row % 2 else 1
        across = outward * (column - (length - 1) / 2)
        layout.at[vertex] = (across * spacing, -row * height)
        below = 1 if single and row == count - 1 else 0
        for axis, angle in _leg_angles(graph.legs_of(vertex), sides, single, below).items():
            turn = angle + 50 * outward * _blocked(angle, column, row, length, len(line))
            layout.ends[vertex, axis] = _beyond(layout.at[vertex], turn, RADIUS + LEG)
    for k, dot in enumerate(dots):  # between two nodes, so that its lines run along no leg
        xs = [layout.at[v][0] for v in graph.neighbours(dot)]
        middle = (min(xs) + max(xs)) / 2
        shift = spacing / 2 if any(abs(x - middle) < 1 for x in xs) else 0
        layout.at[dot] = (middle + shift, 3.2 * LEG + k * 1.2 * LEG)
        for axis in graph.legs_of(dot):
            layout.ends[dot, axis] = _beyond(layout.at[dot], 90, LEG)
    return layout


def _blocked(angle: float, column: int, row: int, length: int, total: int) -> int:
    """Which way a leg has to give way to the bond that leads to the next row, or comes from the last; 0 for none."""
    if angle < 0 and column == length - 1 and row * length + column + 1 < total:
        return 1
    return 1 if angle > 0 and column == 0 and row > 0 else 0


def _leg_angles(axes: Sequence[str], sides: Mapping[str, str], single: bool, below: int) -> dict[str, float]:
    """The directions of a node's legs in a row: `in` and `kernel` down, others up; all one way where single."""
    under = [a for a in axes if (below if single else sides[a] in ("in", "kernel"))]
    above = [a for a in axes if a not in under]
    fan = lambda group, middle: {a: middle + 44 * ((len(group) - 1) / 2 - k) for k, a in enumerate(group)}  # noqa: E731
    return fan(above, 90) | {a: -angle for a, angle in fan(under, 90).items()}


def _beyond(point: Point, degrees: float, distance: float) -> Point:
    angle = math.radians(degrees)
    return point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)


def _around(graph: Graph, step: float) -> Layout:
    """A ring of the cycles, or the vertex with most neighbours, in the centre; what hangs on it outside."""
    ring = _ring(graph)
    radius = max(0.85 * step, len(ring) * 0.8 * step / math.tau) if ring else 0.0
    ring = ring or [max(graph.vertices, key=lambda v: (len(graph.neighbours(v)), -graph.vertices.index(v)))]
    sector = 360 / len(ring)
    first = _turned(graph, ring)
    layout = Layout()
    for k, root in enumerate(ring):
        middle = first - k * sector
        _hang(graph, root, set(ring) | set(layout.at), layout, radius, (middle - sector / 2, middle + sector / 2), step)
    return layout


def _turned(graph: Graph, ring: Sequence[str]) -> float:
    """The direction of a ring's first vertex, in degrees, with which most of what hangs on it lies to the sides."""
    sector = 360 / len(ring)
    weights = [
        _leaves(graph, v, set(ring)) if graph.legs_of(v) or set(graph.neighbours(v)) - set(ring) else 0 for v in ring
    ]
    deep = [2 * bool(set(graph.neighbours(v)) - set(ring)) + w for v, w in zip(ring, weights, strict=True)]
    height = lambda first: sum(w * abs(math.sin(math.radians(first - k * sector))) for k, w in enumerate(deep))  # noqa: E731
    return min((180 - j * sector / 2 for j in range(2 * len(ring))), key=lambda first: round(height(first), 6))


def _ring(graph: Graph) -> list[str]:
    """The vertices on cycles, or between them, in the order of a walk."""
    left = graph
    while True:
        kept = [v for v in left.vertices if len(left.neighbours(v)) > 1]
        if len(kept) == len(left.vertices):
            return left.reached(kept[0]) if kept else []
        left = left.part(kept)


def _hang(
    graph: Graph, vertex: str, seen: set[str], layout: Layout, radius: float, sector: tuple[float, float], step: float
) -> None:
    """Place a vertex in the middle of its sector, and what hangs on it further out, in parts of the sector by size."""
    layout.at[vertex] = _polar(radius, sum(sector) / 2)
    seen.add(vertex)
    children = [v for v in graph.neighbours(vertex) if v not in seen]
    legs = graph.legs_of(vertex)
    shares = [_leaves(graph, child, seen) for child in children] + [1 for _ in legs]
    low, high = sector
    if radius == 0:  # around a centre the first comes to lie at the top, or beside it where the number is even
        turn = -180 / sum(shares) * shares[0] - (90 if len(shares) % 2 else 90 + 180 / len(shares))
        low, high = -turn, -turn + -360
    bounds = [low + (high - low) * sum(shares[:k]) / max(sum(shares), 1) for k in range(len(shares) + 1)]
    for child, part in zip(children, pairwise(bounds), strict=False):
        _hang(graph, child, seen, layout, radius + step, part, step)
    for axis, part in zip(legs, list(pairwise(bounds))[len(children) :], strict=True):
        towards = _polar(radius + step, sum(part) / 2)
        x, y = layout.at[vertex]
        angle = math.degrees(math.atan2(towards[1] - y, towards[0] - x))
        layout.ends[vertex, axis] = _beyond((x, y), angle, LEG + (0 if is_dot(vertex) else RADIUS))


def _leaves(graph: Graph, vertex: str, seen: set[str]) -> int:
    """The number of ends of what hangs on a vertex, legs included, at least one."""
    seen = seen | {vertex}
    below = [v for v in graph.neighbours(vertex) if v not in seen]
    return max(1, len(graph.legs_of(vertex)) + sum(_leaves(graph, v, seen) for v in below))


def _polar(radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return WIDE * radius * math.cos(angle), radius * math.sin(angle)
