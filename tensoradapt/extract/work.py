"""The work of an extraction: its deltas, its plan, its goal, and the fit of one group of it.

Invariant: everything that can be refused is refused here, before the first fit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.noise import noise_of
from tensoradapt.analysis.slices import Slices, empty, flat
from tensoradapt.analysis.source import open_source
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.extract.allocate import allocate
from tensoradapt.extract.goals import NOISE, Goal, fit_group, group_curve
from tensoradapt.fit.curves import Point
from tensoradapt.fit.policy import squares
from tensoradapt.fit.result import Fit
from tensoradapt.grouping import Group
from tensoradapt.init import WEIGHT, draw, from_weight
from tensoradapt.io.pairs import Deltas
from tensoradapt.linalg import SOLO, Dense, Product, Slice, Team
from tensoradapt.lower import lower
from tensoradapt.placing import Placement
from tensoradapt.plan import Plan, make_plan
from tensoradapt.sites import Site
from tensoradapt.spec import Spec

STRIP = 1 << 22  # entries of a delta that are compared at a time


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
        sites = self.record["sites"].values()
        total = math.fsum(row["norm"] ** 2 for row in sites)
        lost = math.fsum((row["relative_error"] * row["norm"]) ** 2 for row in sites)
        diagram = self.diagram
        trained = [n for n in diagram.nodes if n in work.group(self.name).trainable] if self.tensors else []
        return {
            "sites": len(sites),
            "rank": {b: diagram.sizes[b] for b in diagram.bonds} if self.tensors else {},
            "num_parameters": sum(diagram.numel(n) for n in trained),
            "norm": math.sqrt(total),
            "relative_error": math.sqrt(lost / total) if total else 0.0,
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

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        spec = json.dumps(self.plan.spec.to_dict(), sort_keys=True)
        return {
            "base": self.deltas.base.identity(),
            "tuned": self.deltas.tuned.identity(),
            "spec": hashlib.sha256(spec.encode()).hexdigest(),
            "sites": hashlib.sha256(json.dumps(sorted(self._paths)).encode()).hexdigest(),
            "goal": {"error": self.goal.error, "max_parameters": self.goal.max_parameters},
            "seed": self.seed,
        }

    @property
    def _paths(self) -> list[str]:
        return [path for group in self.plan.groups for path in group.paths]

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups' names in the plan's order."""
        return tuple(group.name for group in self.plan.groups)

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
        return Slices(self.group(name), self.fetch, self.like, self.team if self.shared(name) else SOLO)

    def fetch(self, site: Site) -> Slice:
        """One site's delta on the device.  Shape: (out, in), the kernel flattened into `in`."""
        return Dense(self._view(self.deltas.delta(self._path(site)), site).to(self.like.device))

    def _view(self, whole: Tensor, site: Site) -> Tensor:
        part = flat(whole)
        if site.rows is not None:
            part = part[site.rows[0] : site.rows[1]]
        return part if part.shape[0] == site.out else part.mT.contiguous()

    def _path(self, site: Site) -> str:
        known = {(s.owner, s.index): s.path for s in self.deltas.sites}
        return known[site.owner, site.index]

    def sigma(self, name: str) -> float:
        """The rounding noise of an entry of a group's tensor, a root mean square over its sites."""
        if self.goal.error != NOISE:
            return 0.0
        found = [noise_of(*self.deltas.weights(self._path(p.site))).variance for p in self.group(name).placements]
        return math.sqrt(sum(found) / len(found))

    def fixed(self, name: str) -> dict[str, Tensor]:
        """The nodes of a group that are not fitted: drawn by their laws, or taken from the base's weight."""
        group = self.group(name)
        nodes = group.rule.frozen
        found: dict[str, Tensor] = {}
        if any(group.laws[node] == WEIGHT for node in nodes):
            site = group.placements[0].site
            weight = self._view(self.deltas.weights(self._path(site))[0].float(), site)
            found |= {node: tensor for node, tensor in from_weight(group, weight).items() if node in nodes}
        for node in (n for n in nodes if n not in found):
            drawn = draw(self.plan.factors[group.store[node]], self.seed)
            found[node] = drawn[tuple(slice(0, n) for n in group.diagram.shape(node))]
        return {node: tensor.to(self.like) for node, tensor in found.items()}

    def fit(self, name: str) -> Done:
        """Fit one group, round its factors to their stored dtype, and measure what they leave."""
        group, slices = self.group(name), self.slices(name)
        point = None if self.chosen is None else self.chosen[name]
        if self.chosen is not None and point is None:
            return self._left_out(name, slices)
        goal = self.goal if point is None else Goal()
        if point is not None:
            group = replace(group, diagram=replace(group.diagram, sizes={**group.diagram.sizes, **point.ranks}))
        stream = slices.stream(self.seed)
        found = fit_group(group, stream, goal, sigma=self.sigma(name), fixed=self.fixed(name))
        if found.total == 0.0 or (goal.error == NOISE and not _rises(found, self.sigma(name), group)):
            return self._left_out(name, slices)
        stored = _stored(found, group)
        sites = self._measured(replace(group, diagram=found.diagram), stored, slices)
        return Done(name, stored, _record(found, sites), writes=self._writes(name))

    def _writes(self, name: str) -> bool:
        return not self.shared(name) or self.team.rank == 0

    def _left_out(self, name: str, slices: Slices) -> Done:
        """A group that gets no adapter: all of its norm is error."""
        rows = {p.site.path: _site_row(slices.slice(p).square, slices.slice(p).square) for p in slices.mine}
        sites = self._gathered(rows, slices.team)
        nothing = {"fitted_error": 1.0, "method": "left out", "converged": True, "bound": None}
        record = {"diagram": self.group(name).diagram.to_dict(), "sites": sites, **nothing}
        return Done(name, {}, record, writes=self._writes(name))

    def _measured(self, group: Group, stored: Mapping[str, Tensor], slices: Slices) -> dict[str, Any]:
        """Every site's error, of the factors as they are stored."""
        factors = {node: tensor.to(self.like) for node, tensor in stored.items()}
        rows = {p.site.path: _compared(group, p, factors, slices.slice(p)) for p in slices.mine}
        return self._gathered(rows, slices.team)

    def _gathered(self, rows: dict[str, Any], team: Team) -> dict[str, Any]:
        return {path: row for part in team.gather(rows) for path, row in part.items()}


def prepared(
    base: Any, tuned: Any, spec: Spec, goal: Goal, where: tuple[str | None, int], team: Team, source: Mapping[str, Any]
) -> Work:
    """Open the checkpoints and plan the spec on what they have in common. Raises what is wrong with either."""
    deltas = open_source(base, tuned, **source)
    plan = make_plan(spec, deltas.match.sites)
    for group in plan.groups:
        banked = [node for node, key in group.store.items() if key != f"{group.name}.{node}"]
        if set(banked) - set(group.rule.frozen):
            raise SpecError(
                f"group {group.name!r} shares trained factors with groups of other shapes",
                got=banked,
                hint="extract with shapes: separate",
            )
    extras = ("modules named in `train` are not extracted: they are no deltas",) if plan.extras else ()
    return Work(deltas, plan, goal, empty(where[0]), where[1], team, notes=(*deltas.match.notes, *plan.notes, *extras))


def allocated(work: Work) -> Work:
    """The same with the ranks of every group chosen, where one budget is to be shared out."""
    budget = work.goal.max_parameters
    if budget is None:
        return work
    curves, totals = {}, {}
    for name in work.groups:
        if not work.is_mine(name):
            continue
        stream = work.slices(name).stream(work.seed)
        curves[name] = group_curve(work.group(name), stream, budget, work.fixed(name))
        totals[name] = _total(stream.stack.passes(), stream.team)
    gathered = work.team.gather((curves, totals))
    curves = {name: row for part, _ in gathered for name, row in part.items()}
    totals = {name: value for _, part in gathered for name, value in part.items()}
    ordered = {name: curves[name] for name in work.groups}
    return replace(work, chosen=allocate(ordered, totals, budget))


def _total(passes: Any, team: Team) -> float:
    return float(team.add(torch.tensor(math.fsum(part.square for _, part in passes), dtype=torch.float64)))


def _rises(found: Fit, sigma: float, group: Group) -> bool:
    """Whether anything of a group rises above its noise."""
    largest = [float(s.max()) for s in found.spectra.values() if s.numel()]
    whole = math.sqrt(found.total)
    noise = sigma * math.sqrt(sum(p.site.numel for p in group.placements))
    return bool(largest) and whole > noise and min(largest) > 0


def _stored(found: Fit, group: Group) -> dict[str, Tensor]:
    """The factors with the group's scale taken out of the trained ones, in the stored dtype."""
    free = [node for node in found.diagram.nodes if node in group.trainable]
    by = abs(group.scale) ** (-1 / len(free))
    signs = {free[0]: math.copysign(1.0, group.scale)}
    dtype = getattr(torch, group.rule.dtype)
    return {
        node: (tensor * (by * signs.get(node, 1.0)) if node in free else tensor).to(dtype)
        for node, tensor in found.factors.items()
    }


def _record(found: Fit, sites: dict[str, Any]) -> dict[str, Any]:
    return {
        "diagram": found.diagram.to_dict(),
        "sites": sites,
        "fitted_error": found.relative_error,
        "bound": found.bound,
        "method": found.method,
        "converged": found.converged,
    }


def _site_row(lost: float, total: float) -> dict[str, float]:
    error = math.sqrt(lost / total) if total else (0.0 if lost == 0.0 else math.inf)
    return {"norm": math.sqrt(total), "relative_error": error}


def _compared(group: Group, placement: Placement, factors: Mapping[str, Tensor], found: Slice) -> dict[str, float]:
    """The error of one site's delta, a strip of rows at a time where the chain allows."""
    chain = lower(group, placement, factors)
    pair, lost = chain.low_rank, 0.0
    if pair is not None and isinstance(found, Product):  # through the factors alone: [B, -B^] [A; A^]
        left = Product(torch.cat([found.outer, -pair[0] * group.scale], 1), torch.cat([found.inner, pair[1]]))
        return _site_row(left.square, found.square)
    delta = found.dense()
    if pair is None:
        return _site_row(squares(delta - chain.dense().reshape(delta.shape) * group.scale), found.square)
    outer = pair[0] * group.scale
    height = max(1, STRIP // max(1, delta.shape[1]))
    for start in range(0, len(delta), height):
        rows = delta[start : start + height]
        lost += squares(rows - outer[start : start + height] @ pair[1])
    return _site_row(lost, found.square)
