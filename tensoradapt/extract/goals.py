"""Goals: how the ranks of an extraction are chosen, and the fit of one group to each.

Invariant: a group's fit depends on its own deltas, the goal and the seed, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tensoradapt.analysis.noise import edge
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError
from tensoradapt.fit.curves import Point
from tensoradapt.fit.policy import Above, Policy, relative
from tensoradapt.fit.result import Fit
from tensoradapt.fit.solve import LADDER, Options
from tensoradapt.fit.stream import Stream, curve_of, fit_stream, fit_stream_by
from tensoradapt.fit.tree import linked
from tensoradapt.grouping import Group, resized

NOISE = "noise"
UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Goal:
    """The spec's own ranks, a relative error, the noise floor, or a budget: at most one of the three."""

    error: float | str | None = None
    max_parameters: int | None = None

    def __post_init__(self) -> None:
        if self.error is not None and self.max_parameters is not None:
            raise RankError("give error or max_parameters, not both", hint="each alone chooses the ranks")
        if isinstance(self.error, str) and self.error != NOISE:
            raise RankError("error is a number or 'noise'", got=self.error, expected="0.1 for 10 %, or noise")
        if not isinstance(self.error, str | None):
            relative(self.error, 1.0, 1)
        if self.max_parameters is not None and (type(self.max_parameters) is not int or self.max_parameters < 1):
            raise RankError("max_parameters is a positive number", got=self.max_parameters)

    @property
    def chooses(self) -> bool:
        """Whether ranks are chosen by the deltas."""
        return self.error is not None or self.max_parameters is not None


def grown(group: Group, rank: int | None) -> Diagram:
    """The group's diagram with a rank at every bond; at the bonds' limits for None. Raises RankError."""
    open_group = replace(group, rule=group.rule.model_copy(update={"excess": "cap"}))
    diagram = resized(open_group, UNBOUNDED if rank is None else rank)
    if (
        diagram.bonds
        and isinstance(group.rule.rank, dict)
        and any(isinstance(v, str) for v in group.rule.rank.values())
    ):
        raise RankError(
            f"the ranks of group {group.name!r} are sizes of axes: there is none to choose", hint="leave error out"
        )
    return diagram


def fit_group(
    group: Group, stream: Stream, goal: Goal, *, sigma: float = 0.0, fixed: Mapping[str, Tensor] | None = None
) -> Fit:
    """A group's factors under a goal; `sigma` is the noise of an entry, `fixed` holds nodes that are not fitted."""
    options = Options(fixed=fixed or None, grow=lambda rank: grown(group, rank), seed=stream.seed)
    options = replace(options, format=group.rule.format)
    if goal.error is None:
        return fit_stream(stream, group.diagram, options)
    if goal.error == NOISE:
        return fit_stream_by(stream, lambda rank: grown(group, rank), lambda _, d: above(d, sigma), options)
    error = float(goal.error)
    return fit_stream_by(stream, lambda rank: grown(group, rank), lambda total, d: _within(error, total, d), options)


def _within(error: float, total: float, diagram: Diagram) -> Policy:
    return relative(error, total, len((linked(diagram) or diagram).bonds))


def above(diagram: Diagram, sigma: float) -> Above:
    """The policy that keeps what rises above the noise of every bond's unfolding."""
    whole = linked(diagram)
    if whole is None:
        raise RankError("the noise floor is a rule for trees", got=str(diagram), hint="give error= as a number")
    return Above({bond: edge(sigma, *_sides(whole, bond)) for bond in whole.bonds})


def _sides(whole: Diagram, bond: str) -> tuple[int, int]:
    """The sizes of what lies on the two sides of a bond."""
    side = {whole.bonds[bond][0]}
    for _ in whole.nodes:
        side |= {n for b, pair in whole.bonds.items() if b != bond and side & set(pair) for n in pair}
    rows = cols = 1
    for axis in (a for a in whole.open if a not in whole.batch):
        if any(axis in whole.nodes[n] for n in side):
            rows *= whole.sizes[axis]
        else:
            cols *= whole.sizes[axis]
    return rows, cols


def group_curve(group: Group, stream: Stream, most: int, fixed: Mapping[str, Tensor] | None) -> list[Point]:
    """What the group loses at which number of parameters: by the spectra of a tree, by fits of any other network.

    The first point costs all that is useful within `most` parameters; the last, no rank at all, keeps nothing.
    """
    smallest = grown(group, 1)
    frozen = sum(smallest.numel(n) for n in smallest.nodes if n not in group.trainable)
    if linked(smallest) is not None and not fixed:
        points = curve_of(stream, lambda rank: grown(group, rank), most)
    else:
        points = list(reversed(list(_fitted(group, stream, most, fixed))))
    return [replace(p, num_parameters=p.num_parameters - frozen) for p in points]


def _fitted(group: Group, stream: Stream, most: int, fixed: Mapping[str, Tensor] | None) -> list[Point]:
    found: list[Point] = []
    for rank in LADDER:
        diagram = grown(group, rank)
        if (found and diagram.num_parameters > most) or (found and found[-1].ranks == _ranks(diagram)):
            break
        fit = fit_stream(stream, diagram, Options(fixed=fixed or None, seed=stream.seed, format=group.rule.format))
        found.append(Point(_ranks(diagram), diagram.num_parameters, fit.relative_error**2 * fit.total))
    return found


def _ranks(diagram: Diagram) -> dict[str, int]:
    return {bond: diagram.sizes[bond] for bond in diagram.bonds}
