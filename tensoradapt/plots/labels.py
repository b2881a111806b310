"""Labels: texts placed so that none covers another, a node, or (where it can be helped) a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from tensoradapt.plots.layout import Point
from tensoradapt.plots.page import POINT

GAP = 0.6  # between a text and what it names, in millimetres
SWEEPS = 3
# What it costs to cover a square millimetre of text or margin, a millimetre of a disc or a line; and a later place.
TEXT, OUTSIDE, DISC, LINE, ORDER = 1000.0, 20.0, 300.0, 20.0, 0.2
Segment = tuple[Point, Point]


@dataclass(frozen=True)
class Box:
    """An axis-parallel rectangle: its centre and its size."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that two boxes share."""
        across = (self.width + other.width) / 2 - abs(self.x - other.x)
        along = (self.height + other.height) / 2 - abs(self.y - other.y)
        return max(across, 0) * max(along, 0)

    def depth(self, disc: tuple[Point, float]) -> float:
        """How far the box reaches into a disc."""
        (x, y), radius = disc
        return max(
            0.0,
            radius - math.hypot(max(abs(x - self.x) - self.width / 2, 0), max(abs(y - self.y) - self.height / 2, 0)),
        )

    def covered(self, segment: Segment) -> float:
        """The length of a segment within the box."""
        (x0, y0), (x1, y1) = segment
        enter, leave = 0.0, 1.0
        for start, delta, centre, size in ((x0, x1 - x0, self.x, self.width), (y0, y1 - y0, self.y, self.height)):
            if abs(delta) < 1e-9:
                if abs(start - centre) > size / 2:
                    return 0.0
                continue
            near, far = sorted(((centre - size / 2 - start) / delta, (centre + size / 2 - start) / delta))
            enter, leave = max(enter, near), min(leave, far)
        return max(leave - enter, 0) * math.dist(*segment)


@dataclass(frozen=True)
class Label:
    """A text of some size (points), its colour, and the centres where it may lie, best first."""

    text: str
    size: float
    colour: str
    places: tuple[Point, ...]

    def box(self, place: Point) -> Box:
        """The box that the text fills at a place."""
        return Box(*place, *extent(self.text, self.size))


def extent(text: str, size: float, markup: bool = False) -> tuple[float, float]:
    """The width and the height of one line of text in the user's font, in millimetres; `markup` may be mathematics."""
    from matplotlib.font_manager import FontProperties, findfont

    return _extent(text, size, markup, str(findfont(FontProperties())))


@lru_cache(maxsize=4096)
def _extent(text: str, size: float, markup: bool, font: str) -> tuple[float, float]:
    from matplotlib.cbook import is_math_text
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    math = markup and bool(is_math_text(text))
    shown = text.replace(r"\$", "$") if markup and not math else text
    prop = FontProperties(fname=font, size=size)
    width, height, _ = text_to_path.get_text_width_height_descent(shown, prop, math)
    return width * POINT + 0.3, max(1.25 * size, height if math else 0.0) * POINT


def around(point: Point, radius: float, text: str, size: float) -> tuple[Point, ...]:
    """Places around a disc: within it where the text fits, then above, below, beside and between, then further out."""
    x, y = point
    width, _ = extent(text, size)
    inside = [(x, y)] if width < 1.75 * radius else []
    angles = [90, -90, 0, 180, *(s * a for a in (45, 135, 67.5, 112.5, 22.5, 157.5) for s in (1, -1))]
    spots = [_touching(point, radius + far, math.radians(angle), text, size) for far in (GAP, 1.8) for angle in angles]
    return (*inside, *spots)


def _touching(point: Point, radius: float, angle: float, text: str, size: float) -> Point:
    """The centre of a text in a direction, as near as it can be without reaching into the disc."""
    width, height = extent(text, size)
    dx, dy = math.cos(angle), math.sin(angle)
    at = lambda far: Box(point[0] + far * dx, point[1] + far * dy, width, height)  # noqa: E731
    low, high = 0.0, radius + width + height
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle).depth((point, radius)) else (low, middle)
    return at(high).x, at(high).y


def beside(segment: Segment, text: str, size: float) -> tuple[Point, ...]:
    """Places on both sides of a line, about its middle."""
    (x0, y0), (x1, y1) = segment
    length = math.dist(*segment) or 1.0
    nx, ny = -(y1 - y0) / length, (x1 - x0) / length
    nx, ny = (nx, ny) if (ny, nx) > (0, 0) else (-nx, -ny)
    width, height = extent(text, size)
    far = abs(nx) * width / 2 + abs(ny) * height / 2 + GAP / 2
    return tuple(
        (x0 + t * (x1 - x0) + side * nx * far, y0 + t * (y1 - y0) + side * ny * far)
        for t in (0.5, 0.42, 0.58, 0.34, 0.66)
        for side in (1, -1)
    )


def behind(segment: Segment, text: str, size: float) -> tuple[Point, ...]:
    """Places past a leg's end: in its direction, then to both sides of the end."""
    (x0, y0), (x1, y1) = segment
    length = math.dist(*segment) or 1.0
    dx, dy = (x1 - x0) / length, (y1 - y0) / length
    width, height = extent(text, size)
    # the nearest centre in a direction at which the box does not reach the end
    reach = lambda ux, uy: min(width / 2 / max(abs(ux), 1e-9), height / 2 / max(abs(uy), 1e-9)) + GAP / 2  # noqa: E731
    turned = [
        (math.cos(a) * dx - math.sin(a) * dy, math.sin(a) * dx + math.cos(a) * dy) for a in (0, 0.6, -0.6, 1.2, -1.2)
    ]
    return (*((x1 + ux * reach(ux, uy), y1 + uy * reach(ux, uy)) for ux, uy in turned), *beside(segment, text, size))


def place(
    labels: Sequence[Label], discs: Sequence[tuple[Point, float]], lines: Sequence[Segment], bounds: tuple[float, float]
) -> tuple[list[Point], float]:
    """The place of every label; and how badly they lie: 0 where no text covers another one or a disc.

    `bounds` are the left and right margins that texts should keep to. Labels are placed one after another, from either
    end of the list, and then moved again with all others placed; the better of the two stands.
    """
    fixed = [
        [_cost(label.box(p), p, discs, lines, bounds) + ORDER * k for k, p in enumerate(label.places)]
        for label in labels
    ]
    orders = [range(len(labels)), range(len(labels) - 1, -1, -1)]
    chosen = min((_settled(labels, fixed, order) for order in orders), key=lambda found: found[1])[0]
    boxes = [label.box(label.places[k]) for label, k in zip(labels, chosen, strict=True)]
    hidden = sum(box.depth(disc) for box in boxes for disc in discs if (box.x, box.y) != disc[0])
    return [(box.x, box.y) for box in boxes], _covered(boxes) + hidden


def _settled(
    labels: Sequence[Label], fixed: Sequence[Sequence[float]], order: Sequence[int]
) -> tuple[list[int], float]:
    """The number of every label's place, and what all places cost together."""
    chosen: dict[int, Box] = {}
    numbers = [0 for _ in labels]
    for n in [n for _ in range(SWEEPS) for n in order]:
        boxes = [labels[n].box(p) for p in labels[n].places]
        others = [box for m, box in chosen.items() if m != n]
        costs = [cost + TEXT * sum(map(box.overlap, others)) for cost, box in zip(fixed[n], boxes, strict=True)]
        numbers[n] = costs.index(min(costs))
        chosen[n] = boxes[numbers[n]]
    return numbers, sum(fixed[n][k] for n, k in enumerate(numbers)) + TEXT * _covered(list(chosen.values()))


def _covered(boxes: Sequence[Box]) -> float:
    """The area that lies under more than one box."""
    return sum(a.overlap(b) for n, a in enumerate(boxes) for b in boxes[:n])


def _cost(
    box: Box, place: Point, discs: Sequence[tuple[Point, float]], lines: Sequence[Segment], bounds: tuple[float, float]
) -> float:
    """What covering discs, lines and the margins costs; the middle of a disc is free: there its own name stands."""
    if any(centre == place for centre, _ in discs):
        return 0.0
    left, right = bounds
    outside = max(left - (box.x - box.width / 2), 0) + max(box.x + box.width / 2 - right, 0)
    hidden = sum(box.depth(disc) for disc in discs)
    return DISC * hidden + LINE * sum(box.covered(line) for line in lines) + OUTSIDE * outside * box.height
