"""Which tensors of two checkpoints belong together, and which of them are sites.

Invariant: every tensor of both sides is in exactly one place of the report: a pair, `refused`, `only_base` or
`only_tuned`, tied ones under their first name. Only names, shapes and dtypes are looked at. Sites have the tuned side's
names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from typing import Any

from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import Checkpoint
from tensoradapt.io.names import as_others, not_merged, shift, unmerged
from tensoradapt.io.weights import Judged, Pair, Reshaped, is_packed, quantised
from tensoradapt.sites import Site, SiteMap, placed

SIDES = ("the base", "the tuned side")
ROWS = ("error", "truncate", "pad")
SAME_MODEL = 0.5  # below this share of the smaller side's weights, the two are of different models


@dataclass(frozen=True)
class Match:
    """What two checkpoints have in common, and what not.

    `refused` says why a tensor of both is no site; `names` has the base's name of every tensor of both; `lone` are the
    weights among what only the base, and only the tuned side, holds: of what changed there nothing is known.
    """

    pairs: tuple[Pair, ...]
    sites: SiteMap
    only_base: tuple[str, ...] = ()
    only_tuned: tuple[str, ...] = ()
    reshaped: tuple[Reshaped, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    lone: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: paths of the matched sites, and what was not matched."""
        return {
            "matched": [pair.site.path for pair in self.pairs],
            "only_base": list(self.only_base),
            "only_tuned": list(self.only_tuned),
            "reshaped": [{**r._asdict(), "base": list(r.base), "tuned": list(r.tuned)} for r in self.reshaped],
            "refused": dict(self.refused),
            "notes": list(self.notes),
        }


def match(
    base: Checkpoint, tuned: Checkpoint, *, rows: str = "error", prefix: str = "auto", model: SiteMap | None = None
) -> Match:
    """Pair the tensors of two checkpoints by name.

    `rows`: what becomes of matrices outside the layers whose number of rows differs (added tokens): `error`, `truncate`
    to the rows of both, or `pad` to those of the larger. `prefix`: what one side has before its names and the other has
    not; `auto` finds it, an empty one says there is none. `model` gives layouts, kinds and heads where it knows a
    tensor. Raises FileError where the two are of different models, differ in shape, or are quantised.
    """
    if rows not in ROWS:
        raise FileError(f"rows={rows!r} is no choice", expected=", ".join(ROWS))
    _check_merged(base, tuned)
    found, notes = _shared(base, tuned, prefix)
    _same_model(base, tuned, found)
    kept = _once(base, tuned, found)
    known = model or SiteMap(())
    judged = Judged(rows, known, shift(tuned.entries, known.parameters, prefix), (base.name, tuned.name))
    twins = _Twins(base, tuned, found)
    for name, other in kept.items():
        judged.take(tuned.entries[name], base.entries[other], *twins.of(name))
    judged.check()
    sites = placed([pair.site for pair in judged.pairs])
    left = _left(base, found.values()), _left(tuned, found)
    lone = _weights(base, left[0]), _weights(tuned, left[1])
    return Match(
        tuple(replace(pair, site=site) for pair, site in zip(judged.pairs, sites, strict=True)),
        _site_map(sites, base, tuned, known, lone),
        *left,
        tuple(judged.reshaped),
        judged.refused,
        (*base.notes, *tuned.notes, *notes, *judged.notes, *_tied_notes(base, tuned, judged.pairs)),
        found,
        lone,
    )


def named_like(tuned: Checkpoint, base: Checkpoint, model: SiteMap | None, prefix: str) -> Checkpoint:
    """The tuned side under the names of the model that is known, or else of the base where these are longer."""
    others, whose = (model.parameters, "model") if model is not None and model.parameters else (base.entries, "base")
    names = as_others(tuned.entries, others, prefix, only_longer=whose == "base")
    if not names:
        return tuned
    name, other = next(iter(names.items()))
    longer, shorter = ("the other", "the tuned side") if other.endswith(name) else ("the tuned side", "the other")
    more = other.removesuffix(name) if other.endswith(name) else name.removesuffix(other)
    note = f"{longer} has {more!r} before its names, and {shorter} not: names are the {whose}'s"
    return replace(tuned.under(names), notes=(*tuned.notes, note))


def _check_merged(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise FileError where one side alone has the names of adapters that PEFT has not merged."""
    inside = [(side, unmerged(side.entries)) for side in (base, tuned)]
    for side, name in inside:
        if name and not all(found for _, found in inside):
            raise not_merged(side.name, name)


def _shared(base: Checkpoint, tuned: Checkpoint, prefix: str) -> tuple[dict[str, str], list[str]]:
    """Tuned name -> base name of what both sides hold, in the tuned side's order, and how the names differ."""
    by = shift(tuned.entries, base.entries, prefix, tell=True)
    found = {name: other for name in tuned.entries if (other := by(name)) in base.entries}
    taken = set(found.values())
    found |= {name: name for name in tuned.entries if name in base.entries and name not in found and name not in taken}
    note = f"{'the tuned side' if by.strip else 'the base'} has {by.prefix!r} before its names, and the other not"
    return {name: found[name] for name in tuned.entries if name in found}, [note] if by.prefix else []


def _once(base: Checkpoint, tuned: Checkpoint, found: Mapping[str, str]) -> dict[str, str]:
    """The pairs without those whose tensors are both tied to those of an earlier one."""
    firsts: dict[tuple[str, str], str] = {}
    for name, other in found.items():
        firsts.setdefault((tuned.first(name), base.first(other)), name)
    return {name: found[name] for name in firsts.values()}


@dataclass(frozen=True)
class _Twins:
    """The further names of the tensors of both sides, in the tuned side's names."""

    base: Checkpoint
    tuned: Checkpoint
    found: Mapping[str, str]

    @cached_property
    def _shared(self) -> dict[str, list[str]]:
        """Names by the base's tensor."""
        rows: dict[str, list[str]] = {}
        for name, other in self.found.items():
            rows.setdefault(self.base.first(other), []).append(name)
        return rows

    @cached_property
    def _unknown(self) -> dict[str, list[str]]:
        """Tied names of the tuned side that the base lacks, by their first name."""
        rows: dict[str, list[str]] = {}
        for name in dict.fromkeys((*self.tuned.aliases.values(), *self.tuned.aliases)):
            if name not in self.found:
                rows.setdefault(self.tuned.first(name), []).append(name)
        return rows

    def of(self, name: str) -> tuple[list[str], list[str]]:
        """The other names of the base's tensor, and those of them that are the tuned side's tensor too."""
        first = self.tuned.first(name)
        tied = [n for n in self._shared[self.base.first(self.found[name])] if n != name]
        return [*tied, *self._unknown.get(first, ())], [n for n in tied if self.tuned.first(n) == first]


def _tied_notes(base: Checkpoint, tuned: Checkpoint, pairs: Iterable[Pair]) -> Iterator[str]:
    """What to know of weights that are tied on both sides, or on one of them."""
    sides: dict[str, dict[str, dict[str, str]]] = {"base": {}, "tuned side": {}}
    for pair in pairs:
        site = pair.site
        if site.joined:
            yield f"{site.path} is tied to {', '.join(site.joined)}: one weight, counted as {site.path}"
        for side, first in (("base", base.first(pair.base_name)), ("tuned side", tuned.first(pair.tuned_name))):
            sides[side].setdefault(first, {})[pair.tuned_name] = site.owner
    for (side, rows), (other, _) in permutations(sides.items()):
        for owners in (row.values() for row in rows.values() if len(row) > 1):
            yield f"{' and '.join(owners)} are tied in the {side} and not in the {other}: each has a delta of its own"


def _left(side: Checkpoint, found: Iterable[str]) -> tuple[str, ...]:
    """What a side holds and the other does not, tied tensors under their first name."""
    taken = {side.first(name) for name in found}
    return tuple(name for name in side.entries if name not in side.aliases and name not in taken)


def _weights(side: Checkpoint, names: Iterable[str]) -> tuple[str, ...]:
    """The weights among some tensors."""
    entries = [side.entries[name] for name in names]
    return tuple(e.name for e in entries if len(e.shape) > 1 and e.dtype.is_floating_point)


def _same_model(base: Checkpoint, tuned: Checkpoint, found: Mapping[str, str]) -> None:
    """Raise FileError where too few weights have a counterpart."""
    ours, theirs = ({n: e for n, e in side.entries.items() if len(e.shape) > 1} for side in (tuned, base))
    together = sum(name in ours for name in found)
    if found and together >= SAME_MODEL * min(len(ours), len(theirs)):
        return
    for side, entries in ((base, theirs), (tuned, ours)):
        packed = next(filter(is_packed, entries.values()), None)
        if packed is not None:
            raise quantised(packed, side.name)
    examples = " against ".join(", ".join(list(names)[:3]) for names in (theirs or base.entries, ours or tuned.entries))
    raise FileError(
        f"{base.name} and {tuned.name} are checkpoints of different models",
        got=f"{together} weights in both, of {len(theirs)} and {len(ours)}: {examples or 'nothing'}",
        hint="give the base that the tuned model was made from; prefix= where its names have another beginning",
    )


def _site_map(
    sites: tuple[Site, ...], base: Checkpoint, tuned: Checkpoint, known: SiteMap, lone: Sequence[Sequence[str]]
) -> SiteMap:
    """The sites with what is known of the model; weights of one side alone are not to be adapted."""
    alone = {n.removesuffix(".weight"): f"only {s} has it" for s, ns in zip(SIDES, lone, strict=True) for n in ns}
    name = known.name or base.label
    shapes = {entry.name: entry.shape for entry in tuned.entries.values()}
    total = sum(math.prod(entry.shape) for entry in tuned.entries.values() if tuned.first(entry.name) == entry.name)
    refused = {**known.refused, **alone}
    return replace(known, sites=sites, name=name, parameters=shapes, refused=refused, num_parameters=total)
