"""The account of a comparison: every tensor of both sides in one kind, with its share of the squared change.

Invariant: the kinds' tensors add up to those that both sides hold, tied ones counted once; the shares add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tensoradapt.io.checkpoint import Entry
from tensoradapt.io.pairs import Deltas
from tensoradapt.sites import Site

# Weights in the layers, tables of rows, other weights; vectors; the rest of those that are no weights; not looked at.
KINDS = ("layers", "embeddings", "outside", "vectors", "other", "untargeted")


@dataclass
class Tally:
    """Tensors of one kind: how many, how many of them differ, the weights they hold, and their squared change."""

    tensors: int = 0
    differing: int = 0
    weights: int = 0
    square: float = 0.0


@dataclass(frozen=True)
class Account:
    """What became of the tensors that both sides hold."""

    kinds: Mapping[str, Tally] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: counts, and by kind the share of the whole squared change (None where nothing differs)."""
        total = math.fsum(row.square for row in self.kinds.values())
        rows = {
            kind: {
                **{key: getattr(row, key) for key in ("tensors", "differing", "weights")},
                "share": row.square / total if total else None,
            }
            for kind, row in self.kinds.items()
        }
        counts = {key: sum(row[key] for row in rows.values()) for key in ("tensors", "differing")}
        return {**counts, "norm": math.sqrt(total), "kinds": rows}


def accounted(deltas: Deltas, compared: Mapping[str, float]) -> Account:
    """The tensors of two checkpoints by kind; `compared` has the norm of every delta that was looked at, by path.

    What was not looked at (vectors, weights beside the targets) is read here, some rows at a time. Raises FileError.
    """
    held: dict[str, list[Site]] = {}
    for pair in deltas.match.pairs:
        held.setdefault(pair.tuned_name, []).append(pair.site)
    rows = {kind: Tally() for kind in KINDS}
    for name in tensors_of(deltas):
        sites = held.get(name, [])
        norms = [compared[site.path] for site in sites if site.path in compared]
        square = math.fsum(norm**2 for norm in norms)
        differs, square = (square > 0, square) if norms and len(norms) == len(sites) else deltas.change(name)
        row = rows[_kind(sites, deltas.tuned.entries[name], known=bool(norms))]
        row.tensors += 1
        row.differing += differs
        row.weights += len(norms)
        row.square += square if math.isfinite(square) else 0.0
    return Account({kind: row for kind, row in rows.items() if row.tensors})


def tensors_of(deltas: Deltas) -> Iterator[str]:
    """The names of the tensors of both sides, of tied ones the first."""
    seen = set()
    for name, other in deltas.match.names.items():
        key = deltas.tuned.first(name), deltas.base.first(other)
        if key not in seen:
            seen.add(key)
            yield name


def _kind(sites: list[Site], entry: Entry, *, known: bool) -> str:
    if not sites:
        return "vectors" if len(entry.shape) < 2 and entry.dtype.is_floating_point else "other"
    if not known:
        return "untargeted"
    if "layer" in sites[0].coordinates:
        return "layers"
    return "embeddings" if sites[0].kind == "embedding" else "outside"
