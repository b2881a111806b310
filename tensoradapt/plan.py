"""Plans: spec + sites -> groups, counts, bytes and FLOP, before any tensor exists.

Invariant: a plan's counts are those of the tensors that `attach` makes and `save` stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any

from tensoradapt.derived import check_counts, groups_from, spec_from
from tensoradapt.errors import SiteError
from tensoradapt.grouping import Group, Progress, group_sites
from tensoradapt.layouts import STATED
from tensoradapt.presets import expand
from tensoradapt.records import Tabular
from tensoradapt.rows import (
    Factor,
    alike,
    enumerated,
    factor_of,
    group_dict,
    group_notes,
    larger,
    record_of,
    row_of,
    size_notes,
)
from tensoradapt.schema import plan_row
from tensoradapt.sets import resolve
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Rule, Spec
from tensoradapt.tables import columns, dropped, wrapped
from tensoradapt.targets import refuse, select

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Counts that follow from shapes alone; FLOP depend on how a version lowers.
FACTS = (
    *("num_trainable", "num_frozen", "num_parameters", "num_extra", "num_total", "num_dense", "num_bytes"),
    "num_sites",
)
START = "__start"  # the suffix of the frozen copy that a `difference` start subtracts


@dataclass(frozen=True)
class Plan(Tabular):
    """Every group, factor and count of a spec on a model."""

    spec: Spec
    groups: tuple[Group, ...]
    model: str = ""
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # trained parameters of other modules
    notes: tuple[str, ...] = ()
    num_model: int = 0  # entries of the model's parameters; 0 where they are not known

    @cached_property
    def factors(self) -> dict[str, Factor]:
        """Every stored tensor by its key; a bank's node has the size of its largest user."""
        found: dict[str, Factor] = {}
        for group in self.groups:
            for node, key in group.store.items():
                made = factor_of(group, node, key)
                if key in found:
                    made = larger(found[key], made)
                found[key] = made
        return found

    @property
    def num_trainable(self) -> int:
        """The number of trained entries of the adapter's factors (extra trained modules apart: `num_extra`)."""
        return sum(f.numel for f in self.factors.values() if f.trainable)

    @property
    def num_frozen(self) -> int:
        """The number of frozen entries: frozen nodes, and the copies that a `difference` start subtracts."""
        return sum(f.numel * (f.copied + (not f.trainable)) for f in self.factors.values())

    @property
    def num_parameters(self) -> int:
        """The number of entries stored: trained and frozen factors."""
        return self.num_trainable + self.num_frozen

    @property
    def num_extra(self) -> int:
        """The number of entries of extra trained modules, such as a classifier."""
        return sum(math.prod(shape) for shape in self.extras.values())

    @property
    def num_total(self) -> int:
        """The number of trained entries in all: the adapter's factors and extra modules."""
        return self.num_trainable + self.num_extra

    @property
    def trained(self) -> str:
        """What is trained, in words: the factors, extra modules by name, their sum and its share of the model."""
        heads = list(dict.fromkeys(path.rpartition(".")[0] or path for path in self.extras))
        parts = f"{self.num_trainable:,} + {self.num_extra:,} of {enumerated(heads)} = " if heads else ""
        share = (
            f", {100 * self.num_total / self.num_model:.3g} % of the model's {self.num_model:,}"
            if self.num_model
            else ""
        )
        return f"trained parameters: {parts}{self.num_total:,}{share}"

    @property
    def in_words(self) -> str:
        """The plan in words: how many sites and groups it has, and the first of its rules."""
        rules = [*map(self._in_words, self.spec.rules[:4]), *(["..."] if len(self.spec.rules) > 4 else [])]
        return "\n".join(line for text in (f"{self._sites}: {rules[0]}", *rules[1:]) for line in wrapped(text))

    def _in_words(self, rule: Rule) -> str:
        """A rule with the ranks that its groups have, where an error or a budget chose others than its own."""
        ranks = sorted({size for group in self.groups if group.rule == rule for size in group.rank.values()})
        if not ranks or not isinstance(rule.rank, int) or max(ranks) == rule.rank:
            return str(rule)
        said = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        scales = {group.scale for group in self.groups if group.rule == rule}
        stored = {"scale": f"{scales.pop():g}"} if len(scales) == 1 else {}
        return str(rule.model_copy(update={"rank": said, "ranks": {}, **stored}))

    @property
    def _sites(self) -> str:
        sites, groups = self.num_sites, len(self.groups)
        return f"{sites} site{'s' * (sites != 1)} in {groups} group{'s' * (groups != 1)}"

    @property
    def num_dense(self) -> int:
        """The number of entries of the adapted weights: what the deltas would take, stored whole."""
        return sum(group.num_dense for group in self.groups)

    @property
    def num_bytes(self) -> int:
        """The bytes of all factors as they are stored."""
        return sum(f.numel * (1 + f.copied) * BYTES[f.dtype] for f in self.factors.values())

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations that the adapter adds to one token's forward pass."""
        return sum(group.flops_per_token for group in self.groups)

    @property
    def dense_flops_per_token(self) -> int:
        """The same if every delta were formed and multiplied."""
        return sum(group.dense_flops_per_token for group in self.groups)

    @property
    def num_sites(self) -> int:
        """The number of adapted weights."""
        return sum(len(group.placements) for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values: its counts, and all that `from_dict` needs."""
        counts = (*FACTS, "num_model", "flops_per_token", "dense_flops_per_token")
        rules = self.spec.rules
        at = {id(rule): k for k, rule in enumerate(rules)}  # which are not compared, field by field, but where copied
        return {
            "model": self.model,
            "layouts": STATED,
            **{name: getattr(self, name) for name in counts},
            "notes": list(self.notes),
            "spec": self.spec.to_dict(),
            "extras": {path: list(shape) for path, shape in self.extras.items()},
            "groups": [group_dict(g, at[id(g.rule)] if id(g.rule) in at else rules.index(g.rule)) for g in self.groups],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`. Raises FileError on damaged data."""
        row = plan_row(data)
        spec = spec_from(row.spec)
        extras = {path: tuple(shape) for path, shape in row.extras.items()}
        plan = cls(spec, groups_from(row, spec), row.model, extras, tuple(row.notes), row.num_model)
        check_counts(row, {name: getattr(plan, name) for name in FACTS})
        return plan

    def records(self) -> list[dict[str, Any]]:
        """One row for every group: sites, sizes of its tensor, ranks, counts (those of a bank are no group's)."""
        return [record_of(group) for group in self.groups]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, wide: bool = False) -> str:
        """The plan in words: a line for groups that differ in their layer alone, then the totals and the notes.

        Within 80 columns; `wide` gives every column: shapes, the ranks of every bond, the lowering and its FLOP.
        """
        head = tuple("group sites tensor ranks trainable frozen lowering FLOP/token dense".split())
        found = alike(self.groups, ranks=wide)
        rows = [row_of(name, members, self.factors, wide=wide) for name, members in found.items()]
        empty = ("frozen",) if not self.num_frozen else ()
        shown = [k for k, name in enumerate(head) if wide or name not in ("dense", "lowering", *empty)]
        head, rows = tuple(head[k] for k in shown), [tuple(row[k] for k in shown) for row in rows]
        drop = () if wide else tuple(name for name in ("FLOP/token", "frozen", "tensor", "ranks") if name in head)
        lines = columns(head, rows, text=("group", "tensor", "ranks"), drop=drop)
        gone = dropped(head, rows, drop)
        left = [f"no room for {enumerated(gone)}: in wide form (--wide)"] if gone else []
        total = f"{self._sites}: {self.num_trainable:,} trainable, {self.num_frozen:,} frozen"
        flops = f"{self.flops_per_token:,} FLOP per token ({self.dense_flops_per_token:,} with every delta formed)"
        notes = [line for note in self.notes for line in wrapped(f"note: {note}")]
        totals = (*left, total, f"{self.num_bytes:,} bytes; {flops}", self.trained)
        return "\n".join([*lines, *(line for text in totals for line in wrapped(text)), *notes])


def make_plan(spec: Spec, model: SiteMap, progress: Progress | None = None) -> Plan:
    """The plan of a spec on a model's sites: the first rule that matches a site takes it.

    Raises SiteError on targets that match nothing and rules left without a site, SpecError on rules that do not fit.
    """
    spec, notes = resolved(spec, model)
    taken: dict[str, list[Site]] = {}
    groups: list[Group] = []
    for number, rule in enumerate(spec.rules):
        refuse(model, rule)
        free = [s for s in select(model.sites, rule) if not any(overlap(s, t) for t in taken.get(s.tensor, ()))]
        mine = _joined(free)
        if not mine:
            raise SiteError(
                f"rule {number + 1} is left without a site: earlier rules take all of its targets",
                got=list(rule.targets),
                hint="put the more special rule first",
            )
        for site in mine:
            taken.setdefault(site.tensor, []).append(site)
        notes += [
            f"{s.path} is tied to {', '.join(s.aliases)}: merging needs untie=True"
            for s in mine
            if set(s.aliases) - set(s.joined)
        ]
        groups += _unique(group_sites(rule, mine, model, progress or (lambda *_: None)), groups)
    _check_ranks(spec, groups)
    notes += group_notes(groups, model)
    made = Plan(spec, tuple(groups), model.name, _extras(spec, model), tuple(notes), model.num_parameters)
    return replace(made, notes=(*notes, *size_notes(made.groups, made.num_trainable)))


def resolved(spec: Spec, model: SiteMap) -> tuple[Spec, list[str]]:
    """The spec with presets expanded and sets of weights replaced by a model's own names, and notes that say which."""
    spec = expand(spec)
    if not spec.rules:
        raise SiteError("the spec has no rules", hint="write ta.preset('lotr_by_role')")
    rows = [resolve(rule, model) for rule in spec.rules]
    return Spec(rules=tuple(rule for rule, _ in rows)), [note for _, notes in rows for note in notes]


def overlap(one: Site, two: Site) -> bool:
    """Whether two sites share entries of one stored tensor (tied modules hold the same one)."""
    if one.tensor != two.tensor or one.index != two.index:
        return False
    return one.rows is None or two.rows is None or (one.rows[0] < two.rows[1] and two.rows[0] < one.rows[1])


def _joined(sites: list[Site]) -> list[Site]:
    """Tied modules that a rule takes together, as one site."""
    kept: list[Site] = []
    places: dict[tuple[str, str], int] = {}  # by the names of a tied module and of its tensor, the first that shares it
    for site in sites:
        twin = places.get((site.owner, site.tensor))
        if twin is None:
            for alias in site.aliases:
                places.setdefault((alias, site.tensor), len(kept))
            kept.append(site)
        else:
            one = kept[twin]
            kinds = (*one.joined_kinds, site.kind)
            kept[twin] = replace(one, joined=(*one.joined, site.path), joined_kinds=kinds)
    return kept


def _unique(new: list[Group], old: list[Group]) -> list[Group]:
    """Groups with names of their own: a number is put behind one that is in use."""
    used = {group.name for group in old}
    numbers: dict[str, Iterator[int]] = {}
    result = []
    for group in new:
        name = group.name
        while name in used:
            name = f"{group.name}_{next(numbers.setdefault(group.name, count(2)))}"
        used.add(name)
        result.append(group if name == group.name else _renamed(group, name))
    return result


def _renamed(group: Group, name: str) -> Group:
    own = f"{group.name}."
    store = {node: f"{name}.{node}" if key.startswith(own) else key for node, key in group.store.items()}
    return replace(group, name=name, store=store)


def _check_ranks(spec: Spec, groups: list[Group]) -> None:
    names = {group.name for group in groups}
    for rule in spec.rules:
        unknown = sorted(set(rule.ranks) - names)
        if unknown:
            raise SiteError(
                f"ranks names the group {unknown[0]!r}, which the plan lacks", expected=", ".join(sorted(names)[:20])
            )


def _extras(spec: Spec, model: SiteMap) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(name for rule in spec.rules for name in rule.train):
        mine = {
            p: s
            for p, s in model.parameters.items()
            if f".{p}".startswith(f".{name}.") or f".{name}." in f".{p}." or p == name
        }
        if not mine:
            raise SiteError(
                f"train names {name!r}, and no parameter lies under it",
                got=name,
                hint="name a module of the model, such as 'classifier'",
            )
        found |= mine
    return found
