"""Allocation: one budget shared out over groups whose loss is known at several numbers of parameters.

Invariant: the answer never exceeds the budget; where the exact search fits into memory no other choice loses less.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tensoradapt.errors import RankError
from tensoradapt.fit.curves import Point

CELLS = 200_000_000  # steps of the exact search that are worth their time


def allocate(
    curves: Mapping[str, Sequence[Point]], totals: Mapping[str, float], budget: int
) -> dict[str, Point | None]:
    """One point per group, or None for no adapter there, with the least loss within `budget` parameters.

    min sum_g lost_g(p_g) over sum_g p_g <= budget: a knapsack with one choice per group, solved exactly where its table
    is small enough, else greedily by the gain per parameter on the curves' lower hulls. `totals` is what a group loses
    without an adapter. Raises RankError where not even one group's smallest fits.
    """
    smallest = min((p.num_parameters for curve in curves.values() for p in curve), default=0)
    if smallest > budget:
        raise RankError(
            "the budget is below the smallest adapter", got=budget, expected=f"at least {smallest:,} parameters"
        )
    choices = {name: _choices(curve, totals[name], budget) for name, curve in curves.items()}
    unit = math.gcd(*(p.num_parameters for row in choices.values() for p in row if p is not None), 0) or 1
    room = budget // unit
    if sum(map(len, choices.values())) * (room + 1) <= CELLS:
        return _exact(choices, totals, room, unit)
    return _greedy(choices, totals, budget)


def _choices(curve: Sequence[Point], total: float, budget: int) -> list[Point | None]:
    """No adapter, and the points that pay: more parameters, less loss."""
    found: list[Point | None] = [None]
    best = total
    for point in sorted(curve, key=lambda p: (p.num_parameters, p.lost)):
        if point.num_parameters <= budget and point.lost < best:
            found.append(point)
            best = point.lost
    return found


def _cost(point: Point | None) -> int:
    return 0 if point is None else point.num_parameters


def _exact(
    choices: Mapping[str, list[Point | None]], totals: Mapping[str, float], room: int, unit: int
) -> dict[str, Point | None]:
    """Dynamic programming over the budget in units of the common divisor of all costs."""
    best = np.zeros(room + 1)
    taken: list[np.ndarray] = []
    for name, row in choices.items():
        after = np.full(room + 1, np.inf)
        which = np.zeros(room + 1, dtype=np.int16)
        for k, point in enumerate(row):
            cost = _cost(point) // unit
            lost = totals[name] if point is None else point.lost
            with_it = best[: room + 1 - cost] + lost
            better = with_it < after[cost:]
            after[cost:][better] = with_it[better]
            which[cost:][better] = k
        best, taken = after, [*taken, which]
    left, answer = int(np.argmin(best)), {}
    for (name, row), which in zip(reversed(list(choices.items())), reversed(taken), strict=True):
        answer[name] = row[which[left]]
        left -= _cost(answer[name]) // unit
    return {name: answer[name] for name in choices}


def _greedy(
    choices: Mapping[str, list[Point | None]], totals: Mapping[str, float], budget: int
) -> dict[str, Point | None]:
    """The step with the largest gain per parameter, again and again, along every curve's lower hull."""
    hulls = {name: _hull(row, totals[name]) for name, row in choices.items()}
    at = dict.fromkeys(hulls, 0)
    heap = [(-_gain(hulls[n], 0, totals[n]), n) for n in hulls if len(hulls[n]) > 1]
    heapq.heapify(heap)
    spent = 0
    while heap:
        _, name = heapq.heappop(heap)
        hull, k = hulls[name], at[name]
        step = _cost(hull[k + 1]) - _cost(hull[k])
        if spent + step > budget:
            continue
        spent, at[name] = spent + step, k + 1
        if k + 2 < len(hull):
            heapq.heappush(heap, (-_gain(hull, k + 1, totals[name]), name))
    return {name: hulls[name][at[name]] for name in hulls}


def _lost(point: Point | None, total: float) -> float:
    return total if point is None else point.lost


def _gain(hull: list[Point | None], k: int, total: float) -> float:
    return (_lost(hull[k], total) - _lost(hull[k + 1], total)) / (_cost(hull[k + 1]) - _cost(hull[k]))


def _hull(row: list[Point | None], total: float) -> list[Point | None]:
    """The points on the lower convex hull of loss over parameters."""
    hull: list[Point | None] = []
    for point in row:
        while len(hull) > 1 and _slope(hull[-2], hull[-1], total) <= _slope(hull[-1], point, total):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: Point | None, two: Point | None, total: float) -> float:
    return (_lost(one, total) - _lost(two, total)) / max(1, _cost(two) - _cost(one))
