"""The work of an extraction: its deltas, its plan, its goal, and the fit of one group of it.

Invariant: what a group becomes depends on its own deltas, the goal and the seed alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.floors import Floors, floors_of
from tensoradapt.analysis.naming import label_of
from tensoradapt.analysis.noise import Noise, noise_of
from tensoradapt.analysis.slices import Slices, flat
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, ShapeError
from tensoradapt.extract.goals import NOISE, Fixed, Goal, fit_group, group_curve
from tensoradapt.extract.measure import compared, overall, site_row
from tensoradapt.extract.whole import Whole
from tensoradapt.fit.curves import Point
from tensoradapt.fit.result import Fit
from tensoradapt.fit.stream import Stream
from tensoradapt.grouping import Group
from tensoradapt.init import WEIGHT, draw, from_weight
from tensoradapt.io.pairs import Deltas
from tensoradapt.layouts import crossed
from tensoradapt.linalg import SOLO, Dense, Slice, Team, first_not_finite
from tensoradapt.plan import Plan
from tensoradapt.rows import Factor, factor_of
from tensoradapt.sites import Site
from tensoradapt.version import VERSION

DEFAULTS = {"rows": "error", "nonfinite": "error", "prefix": "auto"}  # of reading


@dataclass(frozen=True)
class Done:
    """A finished group: its factors as they are stored (none where it was left out), and what is known of them."""

    name: str
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    writes: bool = True

    @property
    def diagram(self) -> Diagram:
        """The diagram with the ranks that the group got."""
        return Diagram.from_dict(self.record["diagram"])

    def row(self, work: Work) -> dict[str, Any]:
        """The group's row in the report."""
        norm, error = overall(self.record["sites"].values())
        diagram, kept = self.diagram, bool(self.tensors)
        trained = [n for n in diagram.nodes if n in work.group(self.name).trainable] if kept else []
        return {
            "label": label_of([p.site for p in work.group(self.name).placements]),
            "sites": len(self.record["sites"]),
            "kept": kept,
            "rank": {b: diagram.sizes[b] for b in diagram.bonds} if kept else {},
            "num_parameters": sum(diagram.numel(n) for n in trained),
            "norm": norm,
            "requested_error": work.goal.error,
            "relative_error": error,
            **{key: self.record[key] for key in ("fitted_error", "method", "converged", "bound")},
        }


@dataclass(frozen=True)
class Work:
    """What is extracted: from which deltas, into which plan, to which goal, on which device and by whom."""

    deltas: Deltas
    plan: Plan
    goal: Goal
    like: Tensor
    seed: int = 0
    team: Team = SOLO
    chosen: Mapping[str, Point | None] | None = None
    notes: tuple[str, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)
    whole: Whole = field(default_factory=Whole)
    reasons: Mapping[str, str] = field(default_factory=dict)  # path -> why a weight that differs is in no rule

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        sites = [
            [g.name, p.site.path, list(p.site.shape), p.site.layout] for g in self.plan.groups for p in g.placements
        ]
        goal = {"error": self.goal.error, "max_parameters": self.goal.max_parameters}
        return {
            **{name: side.identity() for name, side in (("base", self.deltas.base), ("tuned", self.deltas.tuned))},
            "revisions": [self.deltas.base.revision, self.deltas.tuned.revision],
            "spec": _digest(self.plan.spec.to_dict()),
            "sites": _digest(sites),
            "goal": goal,
            "seed": self.seed,
            "options": {key: self.reading.get(key, value) for key, value in DEFAULTS.items()},
            "device": self.like.device.type,
            "processes": self.team.size,
            "versions": {"tensoradapt": VERSION, "torch": torch.__version__},
        }

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups' names in the plan's order."""
        return tuple(group.name for group in self.plan.groups)

    @property
    def left_out(self) -> str:
        """Why a group whose deltas are not zero gets no adapter."""
        return "no more than rounding noise" if self.chosen is None else "not worth their parameters"

    def group(self, name: str) -> Group:
        """A group by its name."""
        return self.plan.groups[self.groups.index(name)]

    def shared(self, name: str) -> bool:
        """Whether the members of the team read a group's sites together."""
        return self.team.size > 1 and len(self.group(name).placements) >= 2 * self.team.size

    def is_mine(self, name: str) -> bool:
        """Whether this member of the team takes part in a group's fit."""
        return self.shared(name) or self.groups.index(name) % self.team.size == self.team.rank

    def slices(self, name: str) -> Slices:
        """The deltas of a group, as this member of the team reads them."""
        return Slices(self.group(name), self.fetch, self.like, self._team(name))

    def stream(self, slices: Slices) -> Stream:
        """The deltas of a group as a fit reads them, near 1."""
        return slices.stream(self.seed, math.sqrt(self._square(slices)))

    def _known_squares(self, group: Group) -> list[float] | None:
        """The squared norms of a group's deltas, where all of them are whole tensors that were read before."""
        found = self.whole.squares
        if not found or any(p.site.index is not None or p.site.rows is not None for p in group.placements):
            return None
        names = [self.deltas.pair(self.stored(p.site).path).tuned_name for p in group.placements]
        return [found.get(name, 0.0) for name in names] if any(name in found for name in names) else None

    def _square(self, slices: Slices) -> float:
        """The squared norm of a group's deltas, measured where it is not known."""
        known = self._known_squares(slices.group)
        if known is not None:
            return math.fsum(known)
        mine = math.fsum(slices.slice(placement).square for placement in slices.mine)
        return float(slices.team.add(torch.tensor(mine, dtype=torch.float64)))

    def _team(self, name: str) -> Team:
        return self.team if self.shared(name) else SOLO

    def fetch(self, site: Site) -> Slice:
        """One site's delta on the device.  Shape: (out, in), the kernel flattened into `in`."""
        return Dense(self._view(self.deltas.delta(self.stored(site).path), site))

    def noise(self, site: Site) -> Noise:
        """The rounding noise of one site's delta."""
        base, tuned = (self._view(side, site) for side in self.deltas.weights(self.stored(site).path))
        return noise_of(base, tuned, self.like.device)

    def _view(self, whole: Tensor, site: Site) -> Tensor:
        """What a site of the plan is of a stored one: its rows, in its layout."""
        part = flat(whole)
        if crossed(site, self.stored(site)):  # stated by a rule
            part = part.mT.contiguous()
        return part if site.rows is None else part[site.rows[0] : site.rows[1]]

    def stored(self, site: Site) -> Site:
        """The site of both checkpoints that one of the plan is, or is a part of."""
        return self._known[site.owner, site.index]

    @cached_property
    def _known(self) -> dict[tuple[str, int | None], Site]:
        return {(s.owner, s.index): s for s in self.deltas.sites}

    def floors(self, name: str) -> Floors | None:
        """The rounding noise of a group, that of float32 in it, where the goal asks for it."""
        if self.goal.error != NOISE:
            return None
        return floors_of(self.group(name), self.noise, self._team(name)).whole

    def fixed(self, name: str, diagram: Diagram) -> dict[str, Tensor]:
        """The nodes of a group that are not fitted, for a diagram's ranks: drawn by their laws, or from the weight."""
        group = replace(self.group(name), diagram=diagram)
        nodes = group.rule.frozen
        found: dict[str, Tensor] = {}
        if any(group.laws[node] == WEIGHT for node in nodes):
            site = group.placements[0].site
            weight = self._view(self.deltas.weights(self.stored(site).path)[0].float(), site)
            found |= {node: tensor for node, tensor in from_weight(group, weight).items() if node in nodes}
        for node in (n for n in nodes if n not in found):
            drawn = draw(self._factor(group, node), self.seed)
            found[node] = drawn[tuple(slice(0, n) for n in diagram.shape(node))]
        return {node: tensor.to(self.like) for node, tensor in found.items()}

    def _factor(self, group: Group, node: str) -> Factor:
        """A frozen factor as it is stored: as the plan has it, or of another rank."""
        key = group.store[node]
        if group.diagram.sizes == self.group(group.name).diagram.sizes:
            return self.plan.factors[key]
        if sum(key in other.store.values() for other in self.plan.groups) > 1:
            raise RankError(f"the rank of {key}, which groups share, is not chosen by the deltas", hint="give rank=")
        return factor_of(group, node, key)

    def _fixed(self, name: str) -> Fixed | None:
        return (lambda diagram: self.fixed(name, diagram)) if self.group(name).rule.frozen else None

    def curve(self, name: str) -> tuple[list[Point], float]:
        """What a group loses at which number of parameters within the budget, and what it loses without an adapter."""
        slices, budget = self.slices(name), self.goal.max_parameters or 0
        curve = group_curve(self.group(name), self.stream(slices), budget, self._fixed(name))
        return curve, self._square(slices)

    def fit(self, name: str) -> Done:
        """Fit one group, round its factors to their stored dtype, and measure what they leave."""
        group, slices = self.group(name), self.slices(name)
        point = None if self.chosen is None else self.chosen[name]
        if self.chosen is not None and point is None:
            return self._left_out(name, slices)
        goal = self.goal if point is None else Goal()
        if point is not None:
            group = replace(group, diagram=replace(group.diagram, sizes={**group.diagram.sizes, **point.ranks}))
        stream, floors = self.stream(slices), self.floors(name)
        found = fit_group(group, stream, goal, floors=floors, fixed=self._fixed(name))
        if found is None or found.total == 0.0:
            return self._left_out(name, slices)
        stored = _stored(found, group)
        sites = self._measured(replace(group, diagram=found.diagram), stored, slices)
        return Done(name, stored, _record(found, sites), writes=self._writes(name))

    def _writes(self, name: str) -> bool:
        return not self.shared(name) or self.team.rank == 0

    def _left_out(self, name: str, slices: Slices) -> Done:
        """A group that gets no adapter: all of its norm is error."""
        rows = {p.site.path: site_row(slices.slice(p).square, slices.slice(p).square) for p in slices.mine}
        sites = self._gathered(rows, slices.team)
        nothing = {"fitted_error": overall(sites.values())[1], "method": "left out", "converged": True, "bound": None}
        record = {"diagram": self.group(name).diagram.to_dict(), "sites": sites, **nothing}
        return Done(name, {}, record, writes=self._writes(name))

    def _measured(self, group: Group, stored: Mapping[str, Tensor], slices: Slices) -> dict[str, Any]:
        """Every site's error, of the factors as they are stored."""
        factors = {node: tensor.to(self.like) for node, tensor in stored.items()}
        rows = {p.site.path: compared(group, p, factors, slices.slice(p)) for p in slices.mine}
        return self._gathered(rows, slices.team)

    def _gathered(self, rows: dict[str, Any], team: Team) -> dict[str, Any]:
        return {path: row for part in team.gather(rows) for path, row in part.items()}


def _stored(found: Fit, group: Group) -> dict[str, Tensor]:
    """The factors with the group's scale taken out of the trained ones, in the stored dtype."""
    free = [node for node in found.diagram.nodes if node in group.trainable]
    by = abs(group.scale) ** (-1 / len(free))
    signs = {free[0]: math.copysign(1.0, group.scale)}
    dtype = getattr(torch, group.rule.dtype)
    made = {
        node: (tensor * (by * signs.get(node, 1.0)) if node in free else tensor).to(dtype)
        for node, tensor in found.factors.items()
    }
    bad = first_not_finite(made)
    if bad is not None:
        raise ShapeError(
            f"node {bad!r} of group {group.name!r} has entries beyond {group.rule.dtype}",
            got=f"deltas of norm {math.sqrt(found.total):.3g} at {', '.join(group.paths[:3])}",
            expected=f"entries of at most {torch.finfo(dtype).max:.3g}",
            hint="write dtype: float32 in its rule, or leave these sites out",
        )
    return made


def _record(found: Fit, sites: dict[str, Any]) -> dict[str, Any]:
    return {
        "diagram": found.diagram.to_dict(),
        "sites": sites,
        "fitted_error": found.relative_error,
        "bound": found.bound,
        "method": found.method,
        "converged": found.converged,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
