"""Goals: how the ranks of an extraction are chosen, and the fit of one group to each.

Invariant: a group's fit depends on its own deltas, the goal and the seed, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tensoradapt.analysis.floors import Floors, short_of
from tensoradapt.analysis.spectra import rank_above
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError
from tensoradapt.fit.curves import Point
from tensoradapt.fit.policy import Policy, relative
from tensoradapt.fit.reach import Reach, effort, reach_of
from tensoradapt.fit.result import Fit
from tensoradapt.fit.solve import LADDER, Options
from tensoradapt.fit.stream import Stream, curve_of, fit_stream, fit_stream_by
from tensoradapt.fit.tree import linked
from tensoradapt.grouping import Group, resized

NOISE = "noise"
NUMBER = "give error= as a number, or leave it out"
Fixed = Callable[[Diagram], dict[str, Tensor]]  # the nodes that are not fitted, for a diagram's ranks
UNBOUNDED = 1 << 30
STARTS, STRIDE = 4, 1009  # of alternating least squares, and how far their seeds are apart
CHEAP = 1 << 22  # entries of a group that is fitted several times
GOOD = 1e-3  # a relative error that no other start is tried to better


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
    group: Group,
    stream: Stream,
    goal: Goal,
    *,
    floors: Floors | None = None,
    fixed: Fixed | Mapping[str, Tensor] | None = None,
) -> Fit | None:
    """A group's factors under a goal; `floors` are its noise's, `fixed` the nodes that are not fitted, or gives them.

    A spec's ranks are no ceiling where the goal chooses them. None where all of it is noise. Raises RankError where
    nothing shows the ranks.
    """
    if isinstance(fixed, Mapping):
        fixed = (lambda _, found=dict(fixed): found) if fixed else None
    options = Options(grow=lambda rank: grown(group, rank), seed=stream.seed, format=group.rule.format)
    if goal.error is None:
        return _best(stream, group.diagram, _holding(options, fixed, group.diagram))
    if goal.error == NOISE:
        if fixed is not None or floors is None:
            raise RankError(
                f"the noise floor shows no rank of group {group.name!r}: it has frozen factors", hint=NUMBER
            )
        return _above(group, stream, floors, options)
    error = float(goal.error)
    if fixed is not None:
        return _climbed(group, stream, error, options, fixed)
    return fit_stream_by(stream, lambda rank: grown(group, rank), lambda total, d: _within(error, total, d), options)


def _above(group: Group, stream: Stream, floors: Floors, options: Options) -> Fit | None:
    """The fit of all that rises above the noise: of one whole weight by its own rank, as the analysis has it."""
    if not _is_matrix(group):
        fit = fit_stream_by(stream, lambda rank: grown(group, rank), lambda _, d: risen(d, floors), options)
        return None if fit.total and risen(fit.diagram, floors).nothing(fit.spectra) else fit
    ((_, part),) = stream.stack.passes()
    (noise,) = floors.noises.values()
    rank = rank_above(part, noise.at(stream.stack.level), stream.seed)
    return fit_stream(stream, grown(group, rank), options) if rank else None


def _is_matrix(group: Group) -> bool:
    """Whether a group is one weight that every bond divides into `out` and `in`."""
    whole = linked(group.diagram)
    if whole is None or len(group.placements) > 1 or group.placements[0].slots != (1, 1):
        return False
    sides = [{*whole.fold("out")}, {*whole.fold("in"), *whole.fold("kernel")}]
    matrix = [{axis for axis in side if whole.sizes.get(axis, 1) > 1} for side in sides]
    found = [{axis for axis in _side(whole, bond) if whole.sizes[axis] > 1} for bond in group.diagram.bonds]
    return all(side in matrix for side in found)


def _holding(options: Options, fixed: Fixed | None, diagram: Diagram) -> Options:
    return options if fixed is None else replace(options, fixed=fixed(diagram))


def _best(stream: Stream, diagram: Diagram, options: Options) -> Fit:
    """A fit; of alternating least squares, which may end in a poor place, the best of some starts if that is cheap."""
    fit = fit_stream(stream, diagram, options)
    starts = STARTS if stream.stack.count * math.prod(stream.stack.shape) <= CHEAP else 1
    for k in range(1, starts):
        if fit.method != "als" or fit.relative_error < GOOD or fit.agreed:
            break
        other = fit_stream(stream, diagram, replace(options, seed=options.seed + k * STRIDE))
        fit = min(fit, other, key=lambda found: found.relative_error)
    return fit


def _within(error: float, total: float, diagram: Diagram) -> Policy:
    return relative(error, total, len((linked(diagram) or diagram).bonds))


def _climbed(group: Group, stream: Stream, error: float, options: Options, fixed: Fixed) -> Fit:
    """The smallest rank of the ladder whose fit around the fixed nodes, drawn anew for each, is within the error."""
    reach, total = _reach(group, stream)
    fits = list(ladder(group))
    possible = [d for d in fits if reach.lost(d) <= error * error * total * (1 + 1e-9)] or fits[-1:]
    fit: Fit | None = None
    for diagram in possible:
        fit = _best(stream, diagram, _holding(options, fixed, diagram))
        if fit.relative_error <= error:
            return fit
    assert fit is not None
    return replace(fit, converged=False)


def _reach(group: Group, stream: Stream) -> tuple[Reach, float]:
    """What the ranks of a group cannot hold, and the squared norm of its deltas."""
    held = stream.held(group.diagram, whole=True)
    return reach_of(held.core, held.diagram), held.total


@dataclass(frozen=True)
class Climb:
    """What a group's ladder begins with under an error: the least error that any rank leaves, and the first fit."""

    error: float
    rank: int
    effort: float


def climb_of(group: Group, stream: Stream, error: float) -> Climb | None:
    """What is known of a group whose ranks no spectrum shows, before it is fitted; None for all others."""
    if linked(grown(group, 1)) is not None and not group.rule.frozen:
        return None
    reach, total = _reach(group, stream)
    if not total:
        return None
    fits = list(ladder(group))
    least = [math.sqrt(reach.lost(diagram) / total) for diagram in fits]
    first = next((d for d, left in zip(fits, least, strict=True) if left <= error), fits[-1])
    rank = max((first.sizes[bond] for bond in first.bonds), default=1)
    return Climb(min(least), rank, 0.0 if group.rule.frozen else effort(first))


def ladder(group: Group) -> Iterator[Diagram]:
    """The group's diagram at growing ranks, as long as they make it larger."""
    before: Diagram | None = None
    for rank in LADDER:
        diagram = grown(group, rank)
        if before is not None and diagram.sizes == before.sizes:
            return
        yield diagram
        before = diagram


@dataclass(frozen=True)
class Risen:
    """The policy that keeps what rises above the noise of a bond's unfolding, and above the rounding of its sums."""

    edges: Mapping[str, float]
    shares: Mapping[str, float]

    def most(self, bond: str) -> int | None:
        """None: the tensor alone limits it."""
        return None

    def keep(self, bond: str, s: Tensor, beyond: Tensor | float) -> int:
        """The number of values above the edge, the most of a batch."""
        if not s.numel() or bond not in self.edges:
            return 0
        floor = (s[..., :1] * self.shares[bond]).clamp(min=self.edges[bond])
        return int((s > floor).sum(-1).max())

    def at(self, level: float) -> Risen:
        """The policy for a tensor that is multiplied by a level."""
        return replace(self, edges={bond: edge * level for bond, edge in self.edges.items()})

    def nothing(self, spectra: Mapping[str, Tensor]) -> bool:
        """Whether at some bond nothing rises: all of a tensor is noise then."""
        return any(self.keep(bond, s, 0.0) == 0 for bond, s in spectra.items() if bond in self.edges)


def risen(diagram: Diagram, floors: Floors) -> Risen:
    """The policy of the noise floor for a tree. Raises RankError on another network."""
    whole = linked(diagram)
    if whole is None:
        raise RankError("the noise floor is a rule for trees", got=str(diagram), hint=NUMBER)
    sides = {bond: _side(whole, bond) for bond in diagram.bonds}
    batch = whole.batch
    sizes = {axis: whole.sizes[axis] for axis in whole.open if axis not in batch}
    edges = {bond: floors.edge(rows, batch) for bond, rows in sides.items()}
    return Risen(edges, {bond: short_of(sizes, rows) for bond, rows in sides.items()})


def _side(whole: Diagram, bond: str) -> list[str]:
    """The axes on one side of a bond."""
    side = {whole.bonds[bond][0]}
    for _ in whole.nodes:
        side |= {n for b, pair in whole.bonds.items() if b != bond and side & set(pair) for n in pair}
    return [a for a in whole.open if a not in whole.batch and any(a in whole.nodes[n] for n in side)]


def group_curve(group: Group, stream: Stream, most: int, fixed: Fixed | None) -> list[Point]:
    """What the group loses at which number of trained parameters: by a tree's spectra, by fits of any other network.

    The first point costs all that is useful within `most` parameters; the last, no rank at all, keeps nothing.
    """
    if linked(grown(group, 1)) is not None and fixed is None:
        return curve_of(stream, lambda rank: grown(group, rank), most)
    return list(reversed(list(_fitted(group, stream, most, fixed))))


def _fitted(group: Group, stream: Stream, most: int, fixed: Fixed | None) -> Iterator[Point]:
    options = Options(seed=stream.seed, format=group.rule.format)
    for number, diagram in enumerate(ladder(group)):
        count = sum(diagram.numel(node) for node in group.trainable)
        if number and count > most:
            return
        fit = fit_stream(stream, diagram, _holding(options, fixed, diagram))
        yield Point(_ranks(diagram), count, fit.relative_error**2 * fit.total)


def _ranks(diagram: Diagram) -> dict[str, int]:
    return {bond: diagram.sizes[bond] for bond in diagram.bonds}
