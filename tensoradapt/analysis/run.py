"""`analyze`: two checkpoints -> the report of what their difference is made of.

Weights within the layers come first, the others (embeddings, heads, poolers) last, each on its own. Invariant: a few
deltas are in memory at a time, those of large weights never whole, and one stack's core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.account import accounted
from tensoradapt.analysis.candidates import RANKS, Stacked, Tried
from tensoradapt.analysis.choice import chosen
from tensoradapt.analysis.floors import floors_of
from tensoradapt.analysis.noise import Noise, noise_of
from tensoradapt.analysis.report import Report
from tensoradapt.analysis.sharing import alike, together
from tensoradapt.analysis.slices import Slices
from tensoradapt.analysis.source import READING, known, open_source
from tensoradapt.analysis.spectra import SiteReport, Source, site_report
from tensoradapt.analysis.stacks import BASIS, StackReport, alone_report, leading, stack_report, stacks_of
from tensoradapt.analysis.steps import Steps
from tensoradapt.analysis.trials import tried
from tensoradapt.errors import RankError, SpecError
from tensoradapt.fit.compress import Compressed, compress
from tensoradapt.grouping import Group, resized
from tensoradapt.io.pairs import Deltas
from tensoradapt.linalg import BLOCK, LARGE, SOLO, Dense, Slice, Strips, Team, each, empty, energy, level_of, mapped
from tensoradapt.sets import resolve
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Rule
from tensoradapt.targets import select

MEMORY = 1 << 28  # bytes of a stack that is kept whole instead of in shared bases
WIDE = 4096  # directions up to which a stack that is kept whole shows the spectra of its modes
OPTIONS = ("names", "values", "targets", "candidates", "seed", "team", "progress", "memory")


@dataclass(frozen=True)
class DeltaSource:
    """The deltas of two checkpoints, on a device."""

    deltas: Deltas
    like: Tensor
    targets: tuple[str, ...] = ()
    noises: dict[str, Noise] = field(default_factory=dict)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the targets match, all of them where there are none; those outside the layers last."""
        found = self.deltas.sites
        if self.targets:
            fields: dict[str, Any] = {"targets": self.targets}
            rule, _ = resolve(Rule(**fields), SiteMap(found))
            found = tuple(select(found, rule))
        return tuple(sorted(found, key=lambda site: "layer" not in site.coordinates))

    def slice(self, site: Site) -> Slice:
        """One delta, its kernel flattened into `in`; in strips where it is large."""
        if site.numel > LARGE:
            shape = site.out, site.numel // site.out
            width = max(1, BLOCK // min(shape))
            parts = tuple(slice(k, min(k + width, max(shape))) for k in range(0, max(shape), width))
            return Strips(shape, parts, partial(self.deltas.strip, site.path), self.like)
        return Dense(self.deltas.delta(site.path).flatten(1))

    def noise(self, site: Site) -> Noise:
        """The rounding noise of one delta, found once."""
        if site.path not in self.noises:
            self.noises[site.path] = noise_of(*self.deltas.weights(site.path), self.like.device)
        return self.noises[site.path]

    def described(self, site: Site) -> dict[str, Any]:
        """The dtypes of both sides, and the norm of the base's weight."""
        base, tuned = self.deltas.weights(site.path)
        rows = base.flatten(1) if base.stride(0) >= base.stride(-1) else base.mT  # as they lie in the file
        blocks = rows.split(max(1, BLOCK // max(1, rows.shape[1])))
        squares = torch.stack(list(mapped(lambda block: energy(block.float()), blocks)))
        norm = math.sqrt(math.fsum(squares.tolist()))
        return {"dtypes": (str(base.dtype)[6:], str(tuned.dtype)[6:]), "base_norm": norm}


def analyze(base: Any, tuned: Any, *, device: str | None = None, **options: Any) -> Report:
    """Ranks and spectra of tuned - base, by weight and over stacks of layers and roles, and the formats that hold it.

    Checkpoints are files, folders, hub ids, mappings, or iterables of (name, tensor). Options: `names` (what the report
    calls the two sides), `values` (singular values per weight, or as many as are cheap), `targets`, `candidates` (False
    leaves the comparison of formats out), `seed`, `memory` (bytes of a stack that is kept whole), `team`, `progress`,
    and those of reading: `rows`, `nonfinite`, `base_revision`, `tuned_revision`. Raises FileError.
    """
    known(options, (*OPTIONS, *READING))
    own = {key: options.pop(key) for key in OPTIONS if key in options}
    where, values, names = empty(device), own.get("values"), own.pop("names", None)
    if values is not None and (type(values) is not int or values < 1):
        raise RankError("values is a number of singular values", got=values, expected="a positive number, or None")
    with alike(own.get("team", SOLO), lambda: open_source(base, tuned, **options).on(where.device)) as deltas:
        source = DeltaSource(deltas, where, _several(own.pop("targets", None)))
        match = {**deltas.match.to_dict(), "matched": len(deltas.match.pairs)}
        named = ("checkpoints", *_labels(deltas, names))
        report = report_of(source, deltas.match.sites, named, match, **own)
        return replace(report, change=accounted(deltas, {p: row.norm for p, row in report.sites.items()}).to_dict())


def _labels(deltas: Deltas, names: Sequence[str] | None) -> tuple[str, str]:
    """What the report calls the two sides. Raises SpecError on names that are not two."""
    if names is None:
        base, tuned = deltas.base.label or "base", deltas.tuned.label or "tuned"
        return (base, tuned) if base != tuned else (f"{base} (base)", f"{tuned} (tuned)")
    if isinstance(names, str) or len(names) != 2 or not all(isinstance(name, str) and name for name in names):
        raise SpecError("names are what the report calls the two sides", got=names, expected='("base", "tuned")')
    return names[0], names[1]


def _several(targets: str | Iterable[str] | None) -> tuple[str, ...]:
    if not isinstance(targets, str | Iterable | None):
        raise SpecError("targets are names", got=repr(targets)[:40], expected="['query', 'value'], or 'all-linear'")
    return (targets,) if isinstance(targets, str) else tuple(targets or ())


def report_of(
    source: Source,
    model: SiteMap,
    names: tuple[str, str, str],
    match: dict[str, Any],
    *,
    like: Tensor | None = None,
    **options: Any,
) -> Report:
    """The report of a source of deltas; `names` are the kind, the base and the tuned side."""
    team: Team = options.get("team", SOLO)
    seed, values = options.get("seed", 0), options.get("values")
    steps = Steps(options.get("progress"), 2 * len(source.sites))
    sites = _sites(source, team, (values, seed), steps)
    work = _Stacks(source, model, sites, seed, options.get("memory", MEMORY), team, steps)
    groups, trials = work.all(candidates=options.get("candidates", True))
    found = chosen(sites, trials)
    choice = found.choice
    if names[0] == "adapters" and choice:  # a set's sites are no model's
        choice = {key: value for key, value in choice.items() if key != "spec"}
    settings = {"values": values, "seed": seed, "basis": BASIS, "candidate_ranks": list(RANKS)}
    named = {path: replace(row, group=work.group_of.get(path)) for path, row in sites.items()}
    return Report(
        *(*names, settings, match, named, groups, found.candidates, choice, found.comparisons), answer=found.answer
    )


def _sites(source: Source, team: Team, how: tuple[int | None, int], steps: Steps) -> dict[str, SiteReport]:
    """Every site's numbers, each member of a team a share of them: some small sites at a time, one per core."""
    mine = {site.path: site for site in source.sites[team.rank :: team.size]}
    found: dict[str, SiteReport] = {}

    def measure(path: str) -> None:
        found[path] = site_report(source, mine[path], *how)

    def all_of_mine() -> dict[str, SiteReport]:
        """What this process measures: small weights side by side, the others one after another."""
        small = [path for path, site in mine.items() if site.numel <= LARGE and source.like.device.type == "cpu"]
        for path in each(small, measure, steps.begin):
            steps.end(path, team.size)
        for path in (path for path in mine if path not in found):
            steps.begin(path)
            measure(path)
            steps.end(path, team.size)
        return found

    gathered = {path: row for part in together(team, all_of_mine) for path, row in part.items()}
    steps.reach(len(source.sites))
    return {site.path: gathered[site.path] for site in source.sites}


@dataclass(frozen=True)
class _Stacks:
    """The stacks of a source, one after the other."""

    source: Source
    model: SiteMap
    sites: dict[str, SiteReport]
    seed: int
    memory: int
    team: Team
    steps: Steps

    @cached_property
    def groups(self) -> list[Group]:
        """The sites that differ in stacks; all of them where none does."""
        differing = tuple(site for site in self.source.sites if self.sites[site.path].norm)
        return stacks_of(differing or self.source.sites, self.model)

    @cached_property
    def group_of(self) -> dict[str, str]:
        """The stack of every site."""
        return {path: group.name for group in self.groups for path in group.paths}

    def all(self, *, candidates: bool) -> tuple[dict[str, StackReport], list[Tried]]:
        """The reports of all stacks, and how the candidates do on those within the layers (on all, without layers)."""
        reports: dict[str, StackReport] = {}
        trials: list[Tried] = []
        layered = any("layer" in p.site.coordinates for group in self.groups for p in group.placements)
        self.steps.reach(self.steps.total - sum(len(group.placements) for group in self.groups))
        for group in self.groups:
            self.steps.begin(group.name)
            counts = not layered or "layer" in group.placements[0].site.coordinates
            reports[group.name], tried_here = self._one(group, candidates=candidates and counts)
            trials += tried_here
            self.steps.end(group.name, len(group.placements))
        return reports, trials

    def _one(self, group: Group, *, candidates: bool) -> tuple[StackReport, list[Tried]]:
        """A stack's report, and its candidates where they are asked for; a weight that stands alone has no stack."""
        single, norm = len(group.placements) == 1, math.hypot(*(self.sites[path].norm for path in group.paths))
        held = self._held(group, norm) if not single or (candidates and norm) else None
        level = level_of(norm, self.source.like.dtype)
        trials = []
        if held and candidates and norm:
            trials = [tried(self._stacked(group, held, level), tell=self.steps.tick).times(1 / level)]
        if single:
            return alone_report(group, self.sites[group.paths[0]]), trials
        assert held is not None
        floors = floors_of(group, self.source.noise, self._team(group)).at(level)
        spectra = [[s * level for s in self.sites[path].singular_values] for path in group.paths]
        return stack_report(group, held, floors, spectra, self.steps.tick).times(1 / level), trials

    def _held(self, group: Group, norm: float) -> Compressed:
        """The stack near 1, whole, or in shared bases where it is large."""
        slices = Slices(group, self.source.slice, self.source.like, self._team(group), tell=self.steps.tick)
        sizes = [group.diagram.sizes[a] for a in group.diagram.open]
        size = math.prod(sizes)
        widest = max(min(n, size // n) for n in sizes)
        whole = size * self.source.like.element_size() <= self.memory and widest <= WIDE
        return slices.stream(self.seed, norm).held(resized(group, BASIS), whole=whole)

    def _team(self, group: Group) -> Team:
        """Who reads a stack's sites: the team together, or each member all of a small one."""
        return self.team if len(group.placements) >= 2 * self.team.size else SOLO

    def _stacked(self, group: Group, held: Compressed, level: float) -> Stacked:
        axes = group.diagram.open
        order = sorted(group.placements, key=lambda p: [p.index[a] for a in group.diagram.coordinates])
        paths = tuple(p.site.path for p in order)
        core = held.core.permute([held.diagram.open.index(a) for a in axes])
        small = held if held.bases else compress(replace(held, diagram=resized(group, BASIS)), seed=self.seed)
        narrow = small.core.permute([small.diagram.open.index(a) for a in axes])
        norms = torch.tensor([(self.sites[path].norm * level) ** 2 for path in paths], dtype=torch.float64)
        listed = [[s * level for s in self.sites[path].singular_values] for path in paths]
        spectra = tuple(leading(narrow.reshape(-1, *narrow.shape[-2:]), listed, RANKS[-1]))
        deltas = None if held.bases else core.reshape(-1, *core.shape[-2:])
        return Stacked(group.name, axes, group.diagram.sizes, paths, narrow, norms, spectra, deltas)
