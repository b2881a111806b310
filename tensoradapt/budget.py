"""Budgets: what specs cost over a range of ranks, and the largest ranks within a number of parameters.

Invariant: an answer never exceeds the budget, and where the groups' counts add up it is the best there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import Field

from tensoradapt.errors import RankError, SpecError
from tensoradapt.grouping import Group, Progress, resized
from tensoradapt.knapsack import cheapest, programme
from tensoradapt.plan import Plan, make_plan, resolved
from tensoradapt.presets import expand
from tensoradapt.records import Tabular
from tensoradapt.rows import group_trainable
from tensoradapt.sites import SiteMap
from tensoradapt.spec import Rule, Spec
from tensoradapt.tables import WIDTH, columns

FEW = 16  # so many ranks are all shown
RuleRank = int | list[int] | dict[str, int | str]


@dataclass(frozen=True)
class BudgetRow:
    """One spec at one rank (None where it has none): counts, bytes, FLOP per token, trainable shares by role."""

    spec: str
    rank: int | None
    num_trainable: int
    num_parameters: int
    num_bytes: int
    flops_per_token: int
    shares: Mapping[str, int]
    num_dense: int = 0  # entries of the adapted weights


@dataclass(frozen=True)
class BudgetTable(Tabular):
    """Specs against ranks."""

    rows: tuple[BudgetRow, ...]

    def to_json(self) -> str:
        """The table as one JSON object with a list of rows."""
        return json.dumps({"rows": [asdict(row) for row in self.rows]}, indent=2)

    def records(self) -> list[dict[str, Any]]:
        """One row for every spec and rank, shares left out."""
        names = [name for name in BudgetRow.__dataclass_fields__ if name != "shares"]
        return [{name: getattr(row, name) for name in names} for row in self.rows]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, wide: bool = False) -> str:
        """The trainable parameters: a line for a rank, a column for a spec, within 80 columns.

        Of many ranks those are shown that are powers of two, and the last. `wide` gives every rank of every spec in a
        line of its own, with parameters, bytes and FLOP per token.
        """
        if wide:
            head: tuple[str, ...] = ("spec", "rank", "trainable", "parameters", "bytes", "FLOP/token")
            return "\n".join([*columns(head, [_cells(row) for row in self.rows], text=head[:1]), *self._too_large()])
        names = list(dict.fromkeys(row.spec for row in self.rows))
        counts = {(row.spec, row.rank): f"{row.num_trainable:,}" for row in self.rows}
        asked = list(dict.fromkeys(row.rank for row in self.rows if row.rank is not None))
        ranks = _thinned(asked)
        lines = [
            f"trainable parameters by rank{'' if len(ranks) == len(asked) else f', {len(ranks)} of {len(asked)} ranks'}"
        ]
        for block in _blocks([name for name in names if (name, None) not in counts], counts):
            titles = ("rank", *block)
            rows = [(str(rank), *(counts.get((name, rank), "") for name in block)) for rank in ranks]
            lines += columns(titles, rows)
        fixed = [
            f"{name}: {counts[name, None]} trainable parameters; it has no rank"
            for name in names
            if (name, None) in counts
        ]
        return "\n".join([*(lines if asked else []), *fixed, *self._too_large()])

    def _too_large(self) -> list[str]:
        """What to say of specs that at some rank have more parameters than the weights that they adapt."""
        over: dict[str, list[BudgetRow]] = {}
        for row in self.rows:
            if row.num_trainable > row.num_dense:
                over.setdefault(row.spec, []).append(row)
        return [
            f"{name}{f' from rank {rows[0].rank}' if rows[0].rank else ''}: more parameters than the "
            f"{rows[0].num_dense:,} entries of the weights"
            for name, rows in over.items()
        ]


def _cells(row: BudgetRow) -> tuple[str, ...]:
    numbers = (row.num_trainable, row.num_parameters, row.num_bytes, row.flops_per_token)
    return (row.spec, "-" if row.rank is None else str(row.rank), *(f"{number:,}" for number in numbers))


def _thinned(ranks: Sequence[int]) -> list[int]:
    """All of a few ranks; of many the powers of two among them, and the last."""
    powers = [rank for rank in ranks if rank & (rank - 1) == 0 or rank == ranks[-1]]
    return list(ranks) if len(ranks) <= FEW or len(powers) < 3 else powers


def _blocks(names: Sequence[str], counts: Mapping[tuple[str, int | None], str]) -> list[list[str]]:
    """The specs in as many tables as are needed for 80 columns."""
    blocks: list[list[str]] = []
    left = 0
    for name in names:
        size = 2 + max(len(name), *(len(text) for (own, _), text in counts.items() if own == name))
        if size > left:
            blocks.append([])
            left = WIDTH - len("rank")
        blocks[-1].append(name)
        left -= size
    return blocks


class SolvedSpec(Spec):
    """A spec with the largest ranks that a budget allows: the `rank` that all groups can have, the `ranks` by group."""

    rank: int = Field(description="the largest rank that all groups can have")
    ranks: dict[str, int] = Field(description="the largest rank of each group, as a rule's `ranks` takes them")
    num_trainable: int = Field(description="the trained entries at these ranks")

    def __str__(self) -> str:
        spread = sorted(set(self.ranks.values()))
        groups = f"; by group {spread[0]} to {spread[-1]}" if len(spread) > 1 else ""
        return f"{super().__str__()}\nrank {self.rank}{groups}: {self.num_trainable:,} trainable"


def tabulate(
    specs: Spec | Mapping[str, Spec] | Sequence[Spec],
    model: SiteMap,
    ranks: Iterable[int],
    progress: Progress | None = None,
) -> BudgetTable:
    """Counts, bytes and FLOP of specs over ranks on one model. Raises RankError on ranks that are none."""
    given: Any = ranks
    asked = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not asked or any(type(rank) is not int or rank < 1 for rank in asked):
        got = asked[:8] or repr(ranks)[:40]
        raise RankError("ranks are positive integers", got=got, hint="write ranks=range(1, 65), or --ranks 1:64")
    named = {name: resolved(spec, model)[0] for name, spec in _named(specs).items()}  # once for all ranks
    wanted = [(name, rank) for name, spec in named.items() for rank in (asked if has_rank(spec) else [None])]
    rows: list[BudgetRow] = []
    for name, rank in wanted:
        if progress is not None:
            progress(name if rank is None else f"{name} at rank {rank}", len(rows), len(wanted))
        rows.append(_row(name, rank, make_plan(named[name] if rank is None else with_rank(named[name], rank), model)))
    return BudgetTable(tuple(rows))


def _named(specs: Spec | Mapping[str, Spec] | Sequence[Spec]) -> dict[str, Spec]:
    if isinstance(specs, Mapping):
        return dict(specs)
    named: dict[str, Spec] = {}
    for spec in [specs] if isinstance(specs, Spec) else specs:
        label = base = "+".join(
            dict.fromkeys(rule.family or rule.preset or rule.name or rule.format for rule in spec.rules)
        )
        number = 2
        while label in named:
            label, number = f"{base}_{number}", number + 1
        named[label] = spec
    return named


def _row(name: str, rank: int | None, plan: Plan) -> BudgetRow:
    shares: dict[str, int] = {}
    for group in plan.groups:
        label = "+".join(dict.fromkeys(str(p.site.coordinates.get("role", p.site.path)) for p in group.placements))
        shares[label] = shares.get(label, 0) + group_trainable(group)
    counts = (plan.num_trainable, plan.num_parameters, plan.num_bytes, plan.flops_per_token)
    return BudgetRow(name, rank, *counts, shares, plan.num_dense)


def has_rank(spec: Spec) -> bool:
    """Whether any rule has a rank that counts: a network may have no bond, or bonds of its axes' sizes."""
    return any(_ranked(rule) for rule in expand(spec).rules)


def _ranked(rule: Rule) -> bool:
    if isinstance(rule.rank, dict):
        return any(isinstance(value, int) for value in rule.rank.values())
    return rule.family not in ("krona",)


def with_rank(spec: Spec, rank: int) -> Spec:
    """The spec with another rank in every rule; of ranks per bond the largest becomes `rank`, others in proportion."""
    return Spec(rules=tuple(_with_rank(rule, rank) for rule in expand(spec).rules))


def _with_rank(rule: Rule, rank: int) -> Rule:
    return Rule(**{**rule.model_dump(exclude_defaults=True), "rank": _scaled(rule.rank, rank), "ranks": {}})


def _scaled(old: RuleRank, rank: int) -> RuleRank:
    """A rule's rank with its largest number at `rank`, and the others in proportion."""
    if isinstance(old, int):
        return rank
    pairs = list(old.items()) if isinstance(old, dict) else list(enumerate(old))
    top = max(value for _, value in pairs if isinstance(value, int))
    new = [(key, max(1, v * rank // top) if isinstance(v, int) else v) for key, v in pairs]
    return dict(new) if isinstance(old, dict) else [v for _, v in new]  # type: ignore[arg-type, misc]


def solve(spec: Spec, model: SiteMap, max_parameters: int) -> SolvedSpec:
    """The largest rank, and the largest ranks by group, with at most `max_parameters` trainable entries.

    `rank` is the largest that all groups can have. What is left of the budget then raises single groups, so that the
    sum of ranks is the largest possible: the cheapest increments first where counts are convex in the rank (exact), a
    dynamic programme over the sum of ranks where they are not (exact too). Raises RankError where rank 1 is too much.
    """
    if type(max_parameters) is not int or max_parameters < 1:
        raise RankError(
            "max_parameters is a positive whole number",
            got=repr(max_parameters)[:40],
            hint="write max_parameters=30_000",
        )
    if not has_rank(spec):
        raise SpecError(
            "the spec has no rank to solve for",
            got=[rule.family or rule.format for rule in spec.rules],
            hint="its size follows from its folds",
        )
    spec, _ = resolved(spec, model)
    plans = cache(lambda rank: make_plan(with_rank(spec, rank), model))
    if plans(1).num_trainable > max_parameters:
        raise RankError(
            "the budget is below the smallest adapter",
            got=f"max_parameters={max_parameters:,}",
            expected=f"at least {plans(1).num_trainable:,} (rank 1)",
            hint="adapt fewer sites, or use a format that shares factors",
        )
    rank = _largest(plans, max_parameters)
    ranks = _by_group(plans, rank, max_parameters)
    rules = tuple(
        Rule(**{**r.model_dump(exclude_defaults=True), "ranks": _own(plans(rank), r, ranks)})
        for r in plans(rank).spec.rules
    )
    count = make_plan(Spec(rules=rules), model).num_trainable
    return SolvedSpec(rules=rules, rank=rank, ranks=ranks, num_trainable=count)


def _own(plan: Plan, rule: Rule, ranks: Mapping[str, int]) -> dict[str, RuleRank]:
    mine = {group.name for group in plan.groups if group.rule is rule}
    return {name: _with_rank(rule, rank).rank for name, rank in ranks.items() if name in mine}


def _largest(plans: Callable[[int], Plan], limit: int) -> int:
    """The largest rank within the limit, by doubling and halving; a rank above every bond's limit is not looked for."""
    low, high = 1, 2
    while plans(high).num_trainable <= limit and plans(high).num_trainable > plans(low).num_trainable:
        low, high = high, high * 2
    if plans(high).num_trainable == plans(low).num_trainable:
        high, target = low, plans(low).num_trainable
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if plans(middle).num_trainable == target else (middle, high)
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plans(middle).num_trainable <= limit else (low, middle)
    return low


def _by_group(plans: Callable[[int], Plan], rank: int, limit: int) -> dict[str, int]:
    """The ranks by group that use the rest of the budget; those of the common rank where a bank ties the groups."""
    names = [group.name for group in plans(rank).groups]
    banks = any(key != f"{group.name}.{node}" for group in plans(rank).groups for node, key in group.store.items())
    if banks or sum(map(group_trainable, plans(rank).groups)) != plans(rank).num_trainable:
        return dict.fromkeys(names, rank)
    spare = limit - plans(rank).num_trainable
    found: dict[object, list[int]] = {}
    tables = []
    for group in plans(rank).groups:
        key = (group.diagram, group.rule.format, group.rule.network, group.trainable)
        if key not in found:
            found[key] = _increments(group, rank, spare)
        tables.append(found[key])
    convex = all(b - a <= c - b for t in tables for a, b, c in zip(t, t[1:], t[2:], strict=False))
    extras = cheapest(tables, spare) if convex else programme(tables, spare)
    return {name: rank + extra for name, extra in zip(names, extras, strict=True)}


def _increments(group: Group, rank: int, spare: int) -> list[int]:
    """The extra cost of 0, 1, 2, .. ranks more for one group, while it grows and fits."""
    table = [0]
    while True:
        larger = resized(group, _with_rank(group.rule, rank + len(table)).rank)
        extra = sum(map(larger.numel, group.trainable)) - group_trainable(group)
        if extra > spare or extra == table[-1]:
            return table
        table.append(extra)
