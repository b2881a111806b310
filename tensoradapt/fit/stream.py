"""Streams: stacks of slices that are read in passes and never kept, fitted through the small core between shared bases.

Invariant: memory is that of one slice, the bases and the core; where no basis helps, the core is the stack itself.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tensoradapt.diagram import Diagram
from tensoradapt.fit.compress import Compressed, basis_size, compress
from tensoradapt.fit.curves import Point, limits, squeeze, thinned
from tensoradapt.fit.policy import Given, Policy, Within, squares
from tensoradapt.fit.result import Fit
from tensoradapt.fit.solve import LADDER, Options, enough, fit_compressed
from tensoradapt.fit.tree import bond_spectra, linked, tree_svd
from tensoradapt.linalg import SOLO, Dense, Stack, Team, find_ranges, settled

Grow = Callable[[int | None], Diagram]  # the diagram at a rank for every bond, or at its limits
BASES = tuple(8 << 2 * k for k in range(7))  # ranks that bases are found for: each costs several passes
MEASURED = 1 << 22  # entries of a core up to which a tree is cut at points of its curve to see what it loses
SPARE = 0.05  # the share of the allowed squared error that the bases may take


@dataclass(frozen=True)
class Stream:
    """A stack D[lead.., rows.., cols..] with named axes: `lead` number the slices, `rows` and `cols` are the sides."""

    stack: Stack
    lead: dict[str, int]
    rows: dict[str, int]
    cols: dict[str, int]
    team: Team = SOLO
    seed: int = 0

    def held(self, diagram: Diagram, *, whole: bool = False) -> Compressed:
        """The stack in bases of the axes that a diagram cannot use in full; in none where `whole`."""
        sides = [None if whole or len(side) > 1 else next(iter(side)) for side in (self.rows, self.cols)]
        ranks = [None if side is None else basis_size(diagram, side) for side in sides]
        full = self.stack.shape
        asked = (full[0] if ranks[0] is None else ranks[0], full[1] if ranks[1] is None else ranks[1])
        found = find_ranges(self.stack, asked, seed=self.seed, team=self.team)
        core, named = settled(found.core), zip(sides, (found.out, found.inp), strict=True)
        bases = {side: basis for side, basis in named if side is not None and basis is not None}
        sizes = {**diagram.sizes, **{axis: basis.shape[1] for axis, basis in bases.items()}}
        order = [*self.lead, *self.rows, *self.cols]
        core = core.reshape([sizes[axis] for axis in order]).permute([order.index(axis) for axis in diagram.open])
        lost = max(0.0, found.total - squares(core)) if bases else 0.0
        held = Compressed(core.contiguous(), replace(diagram, sizes=sizes), found.total, lost, bases)
        return held if whole else compress(held, seed=self.seed)

    def alone(self, diagram: Diagram) -> Compressed | None:
        """The one slice of a stack as it is, where it is dense: one SVD of it costs less than bases of both sides."""
        if self.stack.count > 1 or self.team.size > 1:
            return None
        ((_, part),) = self.stack.passes()
        if not isinstance(part, Dense):
            return None
        order, near = [*self.lead, *self.rows, *self.cols], Dense(settled(part.matrix))
        shaped = near.matrix.reshape([diagram.sizes[axis] for axis in order])
        return Compressed(shaped.permute([order.index(axis) for axis in diagram.open]), diagram, near.square)


def fit_stream(stream: Stream, diagram: Diagram, options: Options) -> Fit:
    """A diagram of given ranks fitted to a stream."""
    found = _fitted(stream, diagram, options).to(stream.stack.like.device)
    return found.times(1 / stream.stack.level, options.fixed or ())


def _fitted(stream: Stream, diagram: Diagram, options: Options) -> Fit:
    alone = stream.alone(diagram)
    if alone is not None and linked(diagram) is not None:
        return fit_compressed(alone, diagram, options)
    return fit_compressed(stream.held(diagram, whole=bool(options.fixed)), diagram, options)


def fit_stream_by(stream: Stream, grow: Grow, policy: Callable[[float, Diagram], Policy], options: Options) -> Fit:
    """A fit whose ranks a policy chooses, given the squared norm: bases grow until they hold all that it keeps."""
    level = stream.stack.level
    leveled = lambda total, diagram: policy(total / level**2, diagram).at(level)  # noqa: E731
    return _chosen(stream, grow, leveled, options).to(stream.stack.like.device).times(1 / level, options.fixed or ())


def _chosen(stream: Stream, grow: Grow, policy: Callable[[float, Diagram], Policy], options: Options) -> Fit:
    limit = grow(None)
    alone = stream.alone(limit) if linked(limit) is not None and not options.fixed else None
    if alone is not None:
        return fit_compressed(alone, limit, replace(options, policy=policy(alone.total, limit), grow=grow))
    for rank in BASES:
        small = grow(rank)
        held = stream.held(small, whole=bool(options.fixed))
        chosen = policy(held.total, small)
        if not held.bases or held.total == 0.0:
            break
        if isinstance(chosen, Within):
            if held.lost <= SPARE * chosen.allowed:
                break
        elif _content(held, small, chosen):
            break
    widest = grow(None) if linked(small) is not None else small
    open_sizes = {a: held.diagram.sizes[a] for a in widest.open}
    core = replace(widest, sizes=limits(widest, {**widest.sizes, **open_sizes}))
    if isinstance(chosen, Within):
        chosen = replace(chosen, allowed=max(0.0, chosen.allowed - held.lost / max(1, len(core.bonds))))
    return fit_compressed(replace(held, diagram=core), widest, replace(options, policy=chosen, grow=grow))


def _content(held: Compressed, diagram: Diagram, policy: Policy) -> bool:
    """Whether a policy keeps fewer values at every bond than the diagram has."""
    spectra = bond_spectra(held.core, held.diagram)
    return all(policy.keep(bond, s, 0.0) < diagram.sizes[bond] for bond, s in spectra.items())


def curve_of(stream: Stream, grow: Grow, most: int) -> list[Point]:
    """The squared error of a tree at numbers of parameters up to about `most`, from the spectra of its bonds.

    Across several bonds the spectra give an estimate alone, which is far off where much is lost: a tree that is not too
    large is cut at some points of the curve and at even ranks, and what it loses there is measured.
    """
    return [replace(point, lost=point.lost / stream.stack.level**2) for point in _curve(stream, grow, most)]


def _curve(stream: Stream, grow: Grow, most: int) -> list[Point]:
    small = grow(1)
    for rank in LADDER:
        small = grow(rank)
        if small.num_parameters >= most or small.sizes == grow(rank + 1).sizes:
            break
    held = stream.held(small)
    core = replace(held.diagram, sizes=limits(held.diagram, {**grow(None).sizes, **_open(held.diagram)}))
    spectra = bond_spectra(held.core, core)
    full = grow(None)
    lost = dict.fromkeys(spectra, held.lost / max(1, len(spectra)))
    points = squeeze(full, spectra, lost)
    if len(spectra) < 2 or held.core.numel() > MEASURED:
        return points
    even = (diagram for rank in LADDER if (diagram := grow(rank)).num_parameters <= most)
    sizes = [*({**full.sizes, **point.ranks} for point in thinned(points, most)), *(d.sizes for d in even)]
    return sorted((_measured(held, full, each) for each in sizes), key=lambda point: -point.num_parameters)


def _measured(held: Compressed, full: Diagram, sizes: Mapping[str, int]) -> Point:
    """What the stack loses at these ranks, cut leaf by leaf."""
    sizes = limits(full, sizes)
    inner = replace(full, sizes=limits(full, {**sizes, **_open(held.diagram)}))
    lost = held.lost + tree_svd(held.core, inner, Given(inner.sizes)).lost
    ranks = {bond: sizes[bond] for bond in full.bonds}
    return Point(ranks, replace(full, sizes=sizes).num_parameters, lost)


def _open(diagram: Diagram) -> dict[str, int]:
    return {axis: diagram.sizes[axis] for axis in diagram.open}


def fit_stream_within(stream: Stream, grow: Grow, budget: int, options: Options) -> Fit:
    """The best ranks of a tree, or the largest even rank of any other network, with at most `budget` parameters."""
    if linked(grow(1)) is None:
        return fit_stream(stream, grow(widest_rank(grow, budget)), options)
    points = curve_of(stream, grow, budget)
    point = next((p for p in points if p.num_parameters <= budget), points[-1])
    full = grow(None)
    diagram = replace(full, sizes={**full.sizes, **point.ranks})
    return fit_stream(stream, diagram, replace(options, policy=Given(diagram.sizes)))


def widest_rank(grow: Grow, budget: int) -> int:
    """The largest rank for all bonds with at most `budget` parameters; 1 where none has so few."""
    ranks = range(1, enough(grow(1)) + 1)
    return max(1, bisect_right(ranks, budget, key=lambda rank: grow(rank).num_parameters))


def axes_of(diagram: Diagram) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """The coordinates, the folds of `out`, and those of `in` with the kernel, of a group's diagram: axis -> size."""
    sides = [(*diagram.fold("out"),), (*diagram.fold("in"), *diagram.fold("kernel"))]
    named = [{a: diagram.sizes[a] for a in axes} for axes in (diagram.coordinates, *sides)]
    return named[0], named[1], named[2]


def count_of(lead: dict[str, int]) -> int:
    """The number of slices of a grid of coordinates."""
    return math.prod(lead.values())
