"""One budget for many groups: against every possible choice, and never above it."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensoradapt.errors import RankError
from tensoradapt.extract import allocate as module
from tensoradapt.extract.allocate import allocate
from tensoradapt.fit.curves import Point


def curve(steps: list[tuple[int, float]], total: float) -> list[Point]:
    """Parameters that grow and losses that fall from the total; given as the fits give them, largest first."""
    points, cost, lost = [], 0, total
    for more, share in steps:
        cost, lost = cost + more, lost * share
        points.append(Point({"r": len(points) + 1}, cost, lost))
    return points[::-1]


STEPS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 1.0)), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(STEPS, st.floats(0.0, 100.0)), min_size=1, max_size=4)


def every_choice(curves, totals, budget: int) -> float:
    """The least loss of all combinations that fit."""
    rows = [[None, *points] for points in curves.values()]
    best = math.inf
    for choice in itertools.product(*rows):
        if sum(p.num_parameters for p in choice if p) <= budget:
            lost = [totals[n] if p is None else p.lost for n, p in zip(curves, choice, strict=True)]
            best = min(best, math.fsum(lost))
    return best


def lost(found, totals) -> float:
    return math.fsum(totals[name] if p is None else p.lost for name, p in found.items())


def spent(found) -> int:
    return sum(p.num_parameters for p in found.values() if p is not None)


@settings(max_examples=150)
@given(GROUPS, st.integers(1, 150))
def test_the_exact_search_finds_the_best_of_all_choices(groups, budget):
    curves = {f"g{k}": curve(steps, total) for k, (steps, total) in enumerate(groups)}
    totals = {f"g{k}": total for k, (_, total) in enumerate(groups)}
    if budget < min(p.num_parameters for points in curves.values() for p in points):
        with pytest.raises(RankError, match="at least"):
            allocate(curves, totals, budget)
        return
    found = allocate(curves, totals, budget)
    assert list(found) == list(curves) and spent(found) <= budget
    assert lost(found, totals) == pytest.approx(every_choice(curves, totals, budget), rel=1e-9, abs=1e-12)
    assert all(p is None or p in curves[name] for name, p in found.items())


@settings(max_examples=150)
@given(GROUPS, st.integers(1, 150))
def test_the_greedy_search_keeps_the_budget_and_is_close(groups, budget):
    curves = {f"g{k}": curve(steps, total) for k, (steps, total) in enumerate(groups)}
    totals = {f"g{k}": total for k, (_, total) in enumerate(groups)}
    budget = max(budget, min(p.num_parameters for points in curves.values() for p in points))
    cells, module.CELLS = module.CELLS, 0
    try:
        found = allocate(curves, totals, budget)
    finally:
        module.CELLS = cells
    assert spent(found) <= budget
    assert lost(found, totals) >= every_choice(curves, totals, budget) - 1e-9
    # one step of a hull more than fits would be optimal: the loss is at most that of the best without its largest step
    gains = [totals[n] - p.lost for n, points in curves.items() for p in points]
    assert lost(found, totals) <= every_choice(curves, totals, budget) + max(gains) + 1e-9


@pytest.mark.parametrize("cells", [module.CELLS, 0], ids=["exact", "greedy"])
@pytest.mark.parametrize("budget", range(10, 200, 10))
def test_equal_steps_go_to_the_largest_values(cells, budget, monkeypatch):
    """Matrices of one shape: the optimum is the largest singular values of all of them, whatever the search."""
    monkeypatch.setattr(module, "CELLS", cells)
    squares = {"a": [50.0, 9.0, 1.0], "b": [30.0, 28.0, 2.0], "c": [4.0, 3.5, 3.0]}
    totals = {name: sum(values) for name, values in squares.items()}
    curves = {
        name: [Point({"r": r}, 10 * r, sum(values[r:])) for r in range(len(values), 0, -1)]
        for name, values in squares.items()
    }
    found = allocate(curves, totals, budget)
    best = sorted((v for values in squares.values() for v in values), reverse=True)[: budget // 10]
    assert lost(found, totals) == pytest.approx(sum(totals.values()) - sum(best))


def test_groups_of_zero_get_nothing():
    curves = {"zero": [Point({"r": 1}, 5, 0.0)], "one": [Point({"r": 1}, 5, 1.0)]}
    found = allocate(curves, {"zero": 0.0, "one": 4.0}, 100)
    assert found["zero"] is None and found["one"] is not None


def test_points_that_do_not_pay_are_passed_over():
    """A larger rank that loses more, as alternating least squares may give."""
    curves = {"a": [Point({"r": 3}, 30, 2.0), Point({"r": 2}, 20, 5.0), Point({"r": 1}, 10, 3.0)]}
    assert allocate(curves, {"a": 9.0}, 25)["a"].ranks == {"r": 1}
    assert allocate(curves, {"a": 9.0}, 30)["a"].ranks == {"r": 3}


def test_large_budgets_are_searched_greedily():
    curves = {f"g{k}": [Point({"r": r}, 1_000_003 * r, 1.0 / r) for r in range(50, 0, -1)] for k in range(40)}
    found = allocate(curves, dict.fromkeys(curves, 2.0), 1_000_000_007)
    assert 0.9e9 < spent(found) <= 1_000_000_007
