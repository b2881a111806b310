"""Sums of adapters: bonds in blocks, then rounded.

Invariant: before rounding, every delta is the weighted sum of the adapters' deltas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tensoradapt.change.install import Turn, in_saved
from tensoradapt.change.operations import truncate
from tensoradapt.change.ranks import Ranks
from tensoradapt.change.result import Change
from tensoradapt.change.targets import Source, changed, held_by, named, require_free, several, with_numbers
from tensoradapt.errors import AdapterError
from tensoradapt.gauge import Network, added, truncatable
from tensoradapt.grouping import Group
from tensoradapt.io.saved import Saved, as_saved
from tensoradapt.layouts import READ, turns
from tensoradapt.linalg import double

EXAMPLE = "write ta.combine([one, two], [0.5, 0.5])"


def combine(
    adapters: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    rank: Ranks | None = None,
    error: float | None = None,
) -> Change:
    """The weighted sum of adapters of one plan, whatever their ranks: delta = sum_k weights_k delta_k, then rounded.

    Without `rank` and `error` only what rounding to the factors' dtype hides is cut. Weights (1 each) may be negative.
    The result has no model: `load(change.adapter, model)` attaches it. Raises AdapterError on adapters of different
    plans and on what is no list of adapters or weights, SpecError on networks that have no sum or no truncation, frozen
    nodes and differences.
    """
    terms = [with_numbers(as_saved(adapter)) for adapter in several(adapters, "the adapters of a sum", EXAMPLE)]
    given = _weights(terms, weights)
    for term in terms[1:]:
        _check_same(terms[0], term)
    turns = [_summed(pairs, given) for pairs in zip(*map(held_by, terms), strict=True)]
    groups = tuple(turn.group for turn in turns)
    whole = in_saved(replace(terms[0], plan=replace(terms[0].plan, groups=groups), path=None), turns)
    if rank is None and error is None:
        if not all(map(truncatable, (turn.after.diagram for turn in turns))):
            return changed(whole, [Turn(group, n, n, n) for group, n in held_by(whole)], None)
        error = float(torch.finfo(next(iter(turns[0].after.factors.values())).dtype).eps)
    return truncate(whole, rank=rank, error=error)


def _weights(terms: Sequence[Saved], weights: Sequence[float] | None) -> list[float]:
    """A number for every term. Raises AdapterError where there are none, too few or too many, or one is no number."""
    held = [1.0] * len(terms) if weights is None else list(several(weights, "the weights of a sum", EXAMPLE))
    try:
        given = [float(weight) for weight in held]
    except (TypeError, ValueError):
        given = []
    if not terms or len(given) != len(terms) or not all(map(math.isfinite, given)):
        raise AdapterError(
            "a sum needs adapters, and a finite weight for each",
            got=f"{len(terms)} adapters, weights {held}",
            hint=EXAMPLE,
        )
    return given


def _summed(terms: Sequence[tuple[Group, Network]], weights: Sequence[float]) -> Turn:
    """One group's sum, with the scale of the first term that has one; the others' go into the weights."""
    group, before = terms[0]
    require_free(group, "cannot add up")
    scale = next((g.scale for g, _ in terms if g.scale), 1.0)
    first = before.factors
    networks = [Network(n.diagram, {node: t.to(first[node]) for node, t in n.factors.items()}) for _, n in terms]
    with named(group):
        made = added(networks, [w * g.scale / scale for w, (g, _) in zip(weights, terms, strict=True)])
    return Turn(replace(group, scale=scale), before, made, made)


def _check_same(one: Saved, two: Saved) -> None:
    """Raise AdapterError, with the first difference, on adapters whose plans differ in more than ranks and scales."""
    for what, left, right in (*_differences(one, two), ("extra parameters", _extras(one), _extras(two))):
        if left != right:
            raise AdapterError(
                f"adapters of different plans have no sum: they differ in {what}",
                got=right,
                expected=left,
                hint="convert one to the other's spec first",
            )
    _check_alike(one, two)


def _check_alike(one: Saved, two: Saved) -> None:
    """Raise AdapterError where the deltas of one weight lie the other way round; FileError as `turns`."""
    for path, (_, mine) in one.sites.items():
        if path in two.sites and turns(two.sites[path][1].site, mine.site, two.where):
            raise AdapterError(
                f"the deltas of {path} lie the other way round in one of the adapters: they have no sum",
                got=[READ[saved.sites[path][1].site.layout] for saved in (one, two)],
                hint="make both with what tells the layout: a module, a config or model=",
            )


def _differences(one: Saved, two: Saved) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = [("groups", sorted(one.groups), sorted(two.groups))]
    for name in one.groups:
        if name in two.groups:
            left, right = one.groups[name], two.groups[name]
            found.append((f"the sites of group {name!r}", _sites(left), _sites(right)))
            found.append((f"the network of group {name!r}", _shape(left), _shape(right)))
    return found


def _sites(group: Group) -> list[str]:
    return [f"{p.site.path} at {dict(p.index)}" for p in group.placements]


def _shape(group: Group) -> str:
    """A group's network without its ranks."""
    diagram = group.diagram
    return str(replace(diagram, sizes={i: 0 if i in diagram.bonds else n for i, n in diagram.sizes.items()}))


def _extras(saved: Saved) -> dict[str, list[float]]:
    """What identifies the parameters that are trained whole: copies that differ have no sum."""
    extras = {key: tensor for key, tensor in saved.tensors.items() if key.startswith("extra.")}
    return {key: _fingerprint(tensor) for key, tensor in extras.items()}


def _fingerprint(tensor: Tensor) -> list[float]:
    wide = double(tensor)
    found: list[float] = torch.stack([wide.sum(), wide.square().sum()]).tolist()
    return found
