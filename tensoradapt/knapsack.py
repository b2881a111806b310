"""What a budget buys: the most ranks for the entries that are left, given what each further rank of a group costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cheapest(tables: Sequence[Sequence[int]], spare: int) -> list[int]:
    """Increments in order of cost while they fit: the largest sum where costs are convex."""
    steps = sorted((table[k + 1] - table[k], k, n) for n, table in enumerate(tables) for k in range(len(table) - 1))
    taken = [0] * len(tables)
    for cost, _, n in steps:
        if cost > spare:
            break
        spare -= cost
        taken[n] += 1
    return taken


def programme(tables: Sequence[Sequence[int]], spare: int) -> list[int]:
    """The largest sum of increments within the budget, by the least cost of every sum, group after group."""
    least = np.zeros(1)
    choices: list[np.ndarray] = []
    for table in tables:
        wide = np.full((len(table), len(least) + len(table) - 1), np.inf)
        for k, cost in enumerate(table):
            wide[k, k : k + len(least)] = least + cost
        choices.append(wide.argmin(0))
        least = wide.min(0)
    total = int(np.flatnonzero(least <= spare).max())
    taken: list[int] = []
    for choice in reversed(choices):
        taken.append(int(choice[total]))
        total -= taken[-1]
    return taken[::-1]
