"""Conversion: an adapter of one format as an adapter of another, through its factors.

Invariant: where a site's delta is a product of two factors no (out, in) matrix is formed of it, unless the target folds
its sides; the error stated is that of the factors as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tensoradapt.analysis.slices import flat
from tensoradapt.diagram import Diagram
from tensoradapt.errors import AdapterError, FileError, SiteError, SpecError
from tensoradapt.extract.goals import Goal
from tensoradapt.extract.measure import overall, site_row
from tensoradapt.extract.output import Output
from tensoradapt.extract.planning import allocated, plan_of
from tensoradapt.extract.run import assembled
from tensoradapt.extract.table import table
from tensoradapt.extract.words import counted, few, little, wrapped
from tensoradapt.extract.work import Done, Work
from tensoradapt.init import WEIGHT
from tensoradapt.io.native import file_of
from tensoradapt.io.saved import Savable, Saved, filled
from tensoradapt.layouts import crossed
from tensoradapt.linalg import Dense, Product, Slice, empty
from tensoradapt.peft import open_adapter
from tensoradapt.plan import Plan
from tensoradapt.presets import SpecLike, as_spec
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Spec
from tensoradapt.writing.folder import claimed

Progress = Callable[[str, int, int], None]  # the group at work, how many are done, how many there are


@dataclass(frozen=True)
class Converted:
    """An adapter in its new format: what it holds, its file (None where it was not saved), and what was lost.

    `relative_error` = sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2) over the sites of the old adapter that the spec
    targets, all of them where it names none; `sites` has the same by path, `groups` by group with ranks and parameters.
    `not_held` says why weights of the old adapter are not in the new one: all of their change is lost.
    """

    saved: Saved = field(repr=False)
    relative_error: float
    sites: Mapping[str, float] = field(repr=False)
    path: Path | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    not_held: Mapping[str, str] = field(default_factory=dict)
    before: int = 0  # the trained entries of the old adapter

    @property
    def plan(self) -> Plan:
        """The plan of the new adapter."""
        return self.saved.plan

    @property
    def num_parameters(self) -> int:
        """The number of trained entries."""
        return self.plan.num_trainable

    def delta(self, path: str) -> Tensor:
        """What the new adapter adds to one site.  Shape: (out, in)."""
        return self.saved.delta(path)

    def as_saved(self) -> Saved:
        """The adapter without a model, as `load`, `export_peft` and all others take it."""
        return self.saved

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        path = None if self.path is None else str(self.path)
        found = {"path": path, "relative_error": self.relative_error, "num_parameters": self.num_parameters}
        return {**found, "sites": dict(self.sites), "groups": dict(self.groups), "not_held": dict(self.not_held)}

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for path, reason in self.not_held.items():
            reasons.setdefault(reason, []).append(path)
        worst = max(self.sites, key=lambda p: self.sites[p], default="")
        lines = [f"not held: {counted(len(paths), 'weight')}, {why}{few(paths)}" for why, paths in reasons.items()]
        lines += [f"note: {note}" for note in self.plan.notes]
        lines += [f"worst weight: {worst}, relative error {self.sites[worst]:.3g}"] if worst else []
        lines += [f"relative error {self.relative_error:.3g} over {counted(len(self.sites), 'weight')}"]
        lines += little(self.relative_error)
        lines += [f"{self.num_parameters:,} parameters; the adapter before had {self.before:,}"]
        written = [f"written to {self.path}"] if self.path else []
        return "\n".join([*table(self.groups), *wrapped(lines), *written])


def convert(
    adapter: Savable | str | Path,
    spec: SpecLike,
    out: str | Path | None = None,
    *,
    error: float | None = None,
    max_parameters: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """An adapter as the closest one of a spec: min sum_s |D_s - scale N_s|^2, exact where the spec can hold D_s.

    `adapter` is an Adapter, what `import_peft` or `convert` returned, or the path of a native or a PEFT adapter. Ranks
    are the spec's; or those that leave at most a relative `error` in every group; or the best within `max_parameters`.
    A rule without targets takes every weight of the adapter that its format can hold. Saved to `out` where one is
    given, over an adapter that is there with `overwrite`. Raises SiteError where the spec targets what the adapter
    lacks, AdapterError where it adds nothing, SpecError, RankError, FileError.
    """
    spec = as_spec(spec, "ta.convert(adapter, spec, out)")
    goal = Goal(error, max_parameters)
    with nullcontext() if out is None else claimed(Output.of(out).claim):
        if out is not None and not overwrite and file_of(out).exists():
            raise FileError(f"{file_of(out)} exists", hint="choose another output, or overwrite=True (--overwrite)")
        return _converted(filled(open_adapter(adapter), "convert"), spec, out, goal, seed, progress)


def _converted(
    source: Saved, spec: Spec, out: str | Path | None, goal: Goal, seed: int, progress: Progress | None
) -> Converted:
    plan, reasons = plan_of(spec, _site_map(source), source.sites, goal)
    conversion = _Conversion(None, plan, goal, empty(None), seed, reasons=reasons, source=source)  # type: ignore[arg-type]
    work = allocated(conversion, progress)
    done: list[Done] = []
    for name in work.groups:
        if progress is not None:
            progress(name, len(done), len(work.groups))
        done.append(work.fit(name))
    made = _with_extras(replace(assembled(work, done), base=source.base), source)
    rows = {path: row for d in done for path, row in d.record["sites"].items()} | _unheld(conversion, source)
    norm, lost = overall(rows.values())
    if not norm:
        raise AdapterError("every delta is zero: there is nothing to convert", got=source.where)
    file = made.save(out, made="ta.convert(adapter, spec, out)") if out is not None and made.plan.groups else None
    errors = {path: row["relative_error"] or 0.0 for path, row in rows.items()}
    groups = {d.name: d.row(work) for d in done}
    return Converted(made, lost, errors, file, groups, reasons, source.plan.num_trainable)


def _with_extras(made: Saved, source: Saved) -> Saved:
    """The new adapter with the modules that were trained beside the old one."""
    extras = {f"extra.{path}": source.tensors[f"extra.{path}"] for path in source.plan.extras}
    return replace(made, plan=replace(made.plan, extras=source.plan.extras), tensors={**made.tensors, **extras})


def _unheld(work: _Conversion, source: Saved) -> dict[str, dict[str, float | None]]:
    """The errors of the sites that no rule can hold: all of their deltas."""
    squares = {path: work.fetch(source.sites[path][1].site).square for path in work.reasons}
    return {path: site_row(square, square) for path, square in squares.items()}


def _site_map(source: Saved) -> SiteMap:
    """The sites of an adapter, as a model of nothing else."""
    sites = tuple(placement.site for _, placement in source.sites.values())
    shapes = {site.tensor: site.shape for site in sites}
    return SiteMap(sites, name=source.plan.model, parameters=shapes, num_parameters=source.plan.num_model)


@dataclass(frozen=True)
class _Conversion(Work):
    """The work of an extraction whose deltas are those of an adapter."""

    source: Saved | None = None

    def fetch(self, site: Site) -> Slice:
        """One site's delta: as its two factors, where its chain is a product."""
        assert self.source is not None
        if site.path not in self.source.sites:
            raise SiteError(f"{site.path} is no site of the adapter", hint="convert keeps sites as they are: no parts")
        group, placement = self.source.sites[site.path]
        pair = self.source.chain(site.path).low_rank
        turned = crossed(site, placement.site)  # stated by a rule
        if pair is None:
            delta = flat(self.source.delta(site.path)).to(self.like)
            return Dense(delta.mT.contiguous() if turned else delta)
        b, a = (pair[0] * group.scale).to(self.like), pair[1].to(self.like).contiguous()
        return Product(a.mT.contiguous(), b.mT.contiguous()) if turned else Product(b, a)

    def fixed(self, name: str, diagram: Diagram) -> dict[str, Tensor]:
        """The nodes that are not fitted, drawn by their laws. Raises SpecError where they come from the weights."""
        if WEIGHT in self.group(name).laws.values() and self.group(name).rule.frozen:
            raise SpecError(
                f"group {name!r} takes nodes from the base's weights, which an adapter does not hold",
                hint="extract it from the two checkpoints",
            )
        return super().fixed(name, diagram)
