"""How much of the whole change an adapter holds.

Invariant: a tensor that differs is held, or listed with its share and the reason, or said to have no measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tensoradapt.extract.whole import Whole
from tensoradapt.fit.policy import squares
from tensoradapt.io.pairs import Deltas
from tensoradapt.layouts import crossed
from tensoradapt.sites import Site

UNTARGETED = "not among the targets"


@dataclass(frozen=True)
class Holding:
    """How much of the whole change an adapter holds.

    `held_share` is the share of the squared change that lies in the held tensors, whatever their error; `whole_error` =
    sqrt(sum_t |D_t - D^_t|^2 / sum_t |D_t|^2) over all tensors that differ. Both are None where none does.
    `dense_parameters` is the number of entries of the weights that the adapter changes, `model_parameters` that of all
    tensors of the tuned side. `not_held` has, by name, the `share` of the squared change and the `reason` of every
    tensor that the adapter leaves as it is; `unmeasured` those whose change is no number, `only_base` and `only_tuned`
    what one side lacks: these are in none of the numbers.
    """

    changed_tensors: int
    held_tensors: int
    held_share: float | None
    whole_error: float | None
    dense_parameters: int
    model_parameters: int
    not_held: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    only_base: tuple[str, ...] = ()
    only_tuned: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "only_base": list(self.only_base), "only_tuned": list(self.only_tuned)}


@dataclass(frozen=True)
class Fitted:
    """One site as it was fitted: the stored one that it is part of, its squared change and error, and if it is kept."""

    site: Site
    stored: Site
    square: float
    lost: float
    kept: bool


def holding(deltas: Deltas, whole: Whole, fitted: Iterable[Fitted], reasons: Mapping[str, str]) -> Holding:
    """The account of an adapter's sites; `reasons` says by name why a tensor that differs is none of them."""
    by_name: dict[str, list[Fitted]] = {}
    for row in fitted:
        by_name.setdefault(deltas.pair(row.stored.path).tuned_name, []).append(row)
    rests = {name: _rest(deltas, name, rows) for name, rows in by_name.items() if name in whole.squares}
    kept = {name: [row for row in rows if row.kept] for name, rows in by_name.items()}
    held = [name for name in rests if kept[name]]
    inside = math.fsum(_inside(whole.squares[name], by_name[name], rests[name]) for name in held)
    lost = math.fsum(rests[n] + math.fsum(row.lost for row in by_name[n]) for n in rests)
    lost += math.fsum(square for name, square in whole.squares.items() if name not in rests)
    missing = {name: square for name, square in whole.squares.items() if name not in held}
    total = whole.square
    return Holding(
        len(whole.squares),
        len(held),
        inside / total if total else None,
        math.sqrt(lost / total) if total else None,
        sum(row.site.numel for rows in kept.values() for row in rows),
        whole.num_parameters,
        {n: {"share": square / total, "reason": reasons.get(n, UNTARGETED)} for n, square in missing.items()},
        dict(whole.unmeasured),
        deltas.match.only_base,
        deltas.match.only_tuned,
    )


def _inside(square: float, rows: Iterable[Fitted], rest: float) -> float:
    """The squared change of the sites that are held of a tensor: all of it where nothing lies beside them."""
    beside = rest + math.fsum(row.square for row in rows if not row.kept)
    return square if beside == 0.0 else max(0.0, square - beside)


def _rest(deltas: Deltas, name: str, rows: Iterable[Fitted]) -> float:
    """The squared change of a tensor beside the sites that were fitted: other experts, other rows."""
    taken: dict[str, list[Fitted]] = {}
    for row in rows:
        taken.setdefault(row.stored.path, []).append(row)
    sites = [pair.site for pair in deltas.match.pairs if pair.tuned_name == name]
    return math.fsum(_uncovered(deltas, site, taken.get(site.path, ())) for site in sites)


def _uncovered(deltas: Deltas, site: Site, rows: Sequence[Fitted]) -> float:
    """The squared change of the rows of a stored site that no fitted one has."""
    ranges = [row.site.rows for row in rows]
    if None in ranges:
        return 0.0
    whole = deltas.delta(site.path).flatten(1)
    if any(crossed(row.site, site) for row in rows):  # stated by a rule
        whole = whole.mT
    return math.fsum(squares(whole[begin:end]) for begin, end in gaps([r for r in ranges if r], len(whole)))


def gaps(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What ranges that do not overlap leave of all rows."""
    last = 0
    for begin, end in sorted(ranges):
        if begin > last:
            yield last, begin
        last = max(last, end)
    if last < size:
        yield last, size
