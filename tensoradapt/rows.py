"""Groups as rows: of JSON, of a printed table; and their factors.

Invariant: `groups_from` of the rows that `group_dict` makes are the groups.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensoradapt.coordinates import unsure
from tensoradapt.grouping import Group, asked
from tensoradapt.layouts import AS_STORED, UNSURE
from tensoradapt.placing import Placement
from tensoradapt.sites import SiteMap

SURPLUS = 0.01  # the share of an adapter from which on entries that a weight would not need are spoken of
NOTED = 3  # so many paths of which the layer is not certain are named
RUNS = 3  # so many runs of layers are named


@dataclass(frozen=True)
class Factor:
    """One stored tensor: its key `group.node`, shape, dtype, whether it is trained, its law and the sizes it knows."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    law: str
    sizes: Mapping[str, int]
    bonds: tuple[str, ...]
    copied: bool  # a frozen copy of the initial value is stored too

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def factor_of(group: Group, node: str, key: str) -> Factor:
    """The stored tensor of one node of a group."""
    trainable = node not in group.rule.frozen
    copied = trainable and group.rule.start == "difference"
    return Factor(
        key,
        group.diagram.shape(node),
        group.rule.dtype,
        trainable,
        group.laws[node],
        group.diagram.measures,
        tuple(i for i in group.diagram.nodes[node] if i in group.diagram.bonds),
        copied,
    )


def enumerated(names: Sequence[str], limit: int = 4) -> str:
    """Names as a sentence has them; the first of them where they are many."""
    shown = [*names[:limit], *([f"{len(names) - limit} more"] if len(names) > limit else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def larger(one: Factor, two: Factor) -> Factor:
    """One factor that two groups use slices of."""
    shape = tuple(map(max, one.shape, two.shape))
    return replace(one, shape=shape, sizes={i: max(s, two.sizes.get(i, 0)) for i, s in one.sizes.items()})


def group_trainable(group: Group) -> int:
    """The trained entries that a group owns (a bank's are no single group's)."""
    own = (node for node in group.trainable if group.store[node] == f"{group.name}.{node}")
    return sum(map(group.diagram.numel, own))


def record_of(group: Group) -> dict[str, Any]:
    """A group as a row of numbers: of CSV, of a DataFrame."""
    own = [node for node, key in group.store.items() if key == f"{group.name}.{node}"]
    return {
        "group": group.name,
        "sites": len(group.placements),
        "roles": " ".join(dict.fromkeys(str(p.site.coordinates.get("role", "")) for p in group.placements)),
        "axes": " ".join(f"{axis}={group.diagram.sizes[axis]}" for axis in group.diagram.open),
        "rank": max(group.rank.values(), default=None),
        "ranks": " ".join(f"{bond}={size}" for bond, size in group.rank.items()),
        "num_trainable": group_trainable(group),
        "num_frozen": sum(group.diagram.numel(node) for node in own if node not in group.trainable),
        "flops_per_token": group.flops_per_token,
        "dense_flops_per_token": group.dense_flops_per_token,
    }


def group_dict(group: Group, rule: int) -> dict[str, Any]:
    """A group as plain JSON values; `rule` is the number of its rule in the spec."""
    return {
        "name": group.name,
        "rule": rule,
        "diagram": group.diagram.to_dict(),
        "scale": group.scale,
        "start": group.rule.start,
        "rank": group.rank,
        "num_trainable": group_trainable(group),
        "lowering": sorted(group.lowerings),
        "flops_per_token": group.flops_per_token,
        "dense_flops_per_token": group.dense_flops_per_token,
        "labels": {axis: list(values) for axis, values in group.labels.items()},
        "laws": dict(group.laws),
        "store": dict(group.store),
        "sites": [_site_dict(placement) for placement in group.placements],
    }


def _site_dict(placement: Placement) -> dict[str, Any]:
    """A site and its place as plain JSON values."""
    fields = {name: list(v) if type(v) is tuple else v for name, v in vars(placement.site).items()}
    coordinates = dict(placement.site.coordinates)
    return {**fields, "coordinates": coordinates, "place": dict(placement.index), "slots": list(placement.slots)}


def alike(groups: tuple[Group, ...], *, ranks: bool = True) -> dict[str, list[Group]]:
    """Groups in rows: those that differ in their sites alone are one; without `ranks`, also those of other ranks."""
    found: dict[Any, list[Group]] = {}
    for group in groups:
        places = [p.site.coordinates for p in group.placements]
        role = tuple(dict.fromkeys((place.get("stack"), place.get("role", "")) for place in places))
        shape = [(axis, group.diagram.sizes[axis]) for axis in group.diagram.open]
        kind = (group.diagram, group.scale) if ranks else (*group.diagram.nodes, *shape)
        found.setdefault((kind, role, group.rule.start), []).append(group)
    return {_spanned([group.name for group in members]): members for members in found.values()}


def _spanned(names: Sequence[str]) -> str:
    """One name for several groups: `layer0..2,4_query`, where one number tells them apart."""
    if len(names) == 1:
        return names[0]
    parts = [re.split(r"(\d+)", name) for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*parts, strict=False)]
    plain = len(set(map(len, parts))) == 1 and all(len(c) == 1 or all(map(str.isdecimal, c)) for c in columns)
    if not plain:
        return f"{names[0]} .. {names[-1]}"
    return "".join(column[0] if len(column) == 1 else _runs(sorted(map(int, column))) for column in columns)


def _runs(numbers: Sequence[int]) -> str:
    """Numbers in runs: `0..2,4`; of many runs the first two, and the last number."""
    held = set(numbers)
    starts = [n for n in numbers if n - 1 not in held]
    ends = [n for n in numbers if n + 1 not in held]
    runs = [str(a) if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True)]
    return ",".join(runs) if len(runs) <= RUNS else f"{runs[0]},{runs[1]},..,{numbers[-1]}"


def row_of(name: str, members: Sequence[Group], factors: Mapping[str, Factor], *, wide: bool) -> tuple[str, ...]:
    """The cells of one line of a plan's table: groups that differ in nothing but their sites.

    Ranks that are all the same are one number, unless the line is `wide`.
    """
    group = members[0]
    owned = {key for m in members for key in m.store.values()}
    trained = sum(factors[k].numel for k in owned if factors[k].trainable)
    frozen = sum(factors[k].numel * (factors[k].copied + (not factors[k].trainable)) for k in owned)
    kinds = dict.fromkeys(kind for m in members for kind in m.lowerings)
    tensor = " ".join(f"{a}={group.diagram.sizes[a]}" for a in group.diagram.open)
    sizes = sorted({size for m in members for size in m.rank.values()})
    rank = " ".join(f"{bond}={size}" for bond, size in group.rank.items())
    if not wide and (len(sizes) == 1 or any(m.rank != group.rank for m in members)):
        rank = "-".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))) if sizes else ""
    flops = (sum(m.flops_per_token for m in members), sum(m.dense_flops_per_token for m in members))
    sites = str(sum(len(m.placements) for m in members))
    return (name, sites, tensor, rank, f"{trained:,}", f"{frozen:,}", "/".join(kinds), f"{flops[0]:,}", f"{flops[1]:,}")


def rank_notes(groups: Sequence[Group]) -> list[str]:
    """One note for each rank that was capped."""
    capped: Counter[str] = Counter()
    for group in groups:
        wanted = asked(group)
        capped.update(
            f"rank {wanted[bond]} of bond {bond} is capped at {size}, its limit"
            for bond, size in group.rank.items()
            if size < wanted[bond]
        )
    return [f"{text} (in {count} groups)" if count > 1 else text for text, count in capped.items()]


def group_notes(groups: Sequence[Group], model: SiteMap) -> list[str]:
    """What to say of the ranks of groups, and of the layers of their sites."""
    return [*rank_notes(groups), *_layer_notes(groups, model), *_side_notes(groups)]


def _side_notes(groups: Sequence[Group]) -> list[str]:
    """One note on weights whose sides are told apart by folds or parts, though no layout tells them."""
    cut = [p.site.path for g in groups for p in g.placements if g.diagram.folds or p.site.rows is not None]
    paths = {p.site.path for g in groups for p in g.placements if p.site.layout in (AS_STORED, UNSURE)}
    mine = [path for path in cut if path in paths]
    hint = "a module, model= or the rule's layout tells"
    return [f"taken to be stored (out, in), as nothing tells: {enumerated(mine)}; {hint}"] if mine else []


def _layer_notes(groups: Sequence[Group], model: SiteMap) -> list[str]:
    """What to say of paths with several numbers that may each be the layer."""
    paths = [p.site.owner for group in groups if not group.rule.pattern for p in group.placements]
    shapes = {site.owner: site.shape for site in model.sites}
    found = unsure(shapes, (path for path in paths if path in shapes))
    return [
        f"which number of {path} is the layer is not certain, that behind {' or '.join(behind)}: "
        f"pattern='{behind[-1].replace('*', '{stack}', 1)}.{{layer}}.{{role}}' would say so"
        for path, behind in found.items()
    ][:NOTED]


def size_notes(groups: Sequence[Group], trainable: int) -> list[str]:
    """What to say of factors, `trainable` entries in all, that have more than the weights that they change."""
    dense = sum(group.num_dense for group in groups)
    over = {group.name: more for group in groups if (more := group_trainable(group) - group.num_dense) > 0}
    text = enumerated(list(over)) if sum(over.values()) > SURPLUS * trainable else ""
    if trainable > dense:
        text = f"{trainable:,} for {dense:,} entries"
    hint = "take a smaller rank, or train the weights themselves"
    return [f"more parameters than the weights that they adapt: {text}; {hint}"] if text else []
