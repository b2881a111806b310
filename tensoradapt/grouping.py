"""Grouping: the sites a rule takes, put into groups that share one tensor, each with its diagram.

Invariant: every site of a rule is in exactly one group, and inside a group its coordinates are its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tensoradapt.axes import COORDINATES
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, SpecError
from tensoradapt.folds import fold
from tensoradapt.formats import FORMATS
from tensoradapt.formats.build import Ranks, Shape
from tensoradapt.formats.network import network
from tensoradapt.laws import laws_of, scale_of
from tensoradapt.placing import Placement, group_name, own_coordinates, place
from tensoradapt.recipe import Recipe, formed, recipe
from tensoradapt.roles import has_heads, holds
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Rule

KEYED = ("tt", "ttm", "tucker")  # formats whose ranks are named by what a bond's name has behind `r_`
_Known = dict[tuple[object, ...], tuple[Diagram, Mapping[str, str]]]  # diagrams of one rule, and their laws
Progress = Callable[[str, int, int], None]  # the group at work, how many are done, how many there are


@dataclass(frozen=True)
class Group:
    """The sites that share one tensor: its diagram, where each site lies in it, its scale and its laws.

    `store` names the stored tensor of every node, `group.node`; nodes of a bank (sites cut as slices of the largest)
    are stored once for several groups and used from their first entries on.
    """

    name: str
    rule: Rule
    diagram: Diagram
    placements: tuple[Placement, ...]
    labels: Mapping[str, tuple[int | str, ...]]
    scale: float
    laws: Mapping[str, str]
    store: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The sites' paths."""
        return tuple(p.site.path for p in self.placements)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The nodes that are trained."""
        return tuple(node for node in self.diagram.nodes if node not in self.rule.frozen)

    @property
    def rank(self) -> dict[str, int]:
        """What every bond got."""
        return {bond: self.diagram.sizes[bond] for bond in self.diagram.bonds}

    def recipe(self, placement: Placement) -> Recipe:
        """How a site of the group is lowered."""
        return recipe(self.diagram, placement.slots, placement.site.kind, code=self.drops_code)

    def lowering(self, placement: Placement) -> str:
        """The kind of a site's recipe; `dense` where its delta is formed, to be added to the weight at use."""
        return "dense" if placement.site.delivery == "weight" else self.recipe(placement).kind

    @property
    def drops_code(self) -> bool:
        """Whether dropout acts on the code, which a lowering then has to have."""
        return self.rule.dropout > 0 and self.rule.dropout_at == "code"

    @property
    def num_dense(self) -> int:
        """The number of entries of the sites' weights."""
        return sum(p.site.numel for p in self.placements)

    @cached_property
    def flops_per_token(self) -> int:
        """Floating-point operations that the group's deltas add to one token's forward pass."""
        passes = 3 if self.rule.start == "difference" else 1  # the start, and the two terms of the product rule
        return passes * sum(count * self._flops(p) for p, count in self._alike)

    def _flops(self, placement: Placement) -> int:
        """The work of one site, and of the modules that are tied to it and adapted with it."""
        if placement.site.delivery == "weight":  # formed, and then part of a weight that is multiplied anyway
            return formed(self.diagram, placement.slots)
        return sum(made.per_token for made in self._recipes(placement))

    def _recipes(self, placement: Placement) -> list[Recipe]:
        site = placement.site
        turned = [(kind, kind != site.kind) for kind in site.joined_kinds]
        twins = [recipe(self.diagram, placement.slots, kind, transpose=turn) for kind, turn in turned]
        return [self.recipe(placement), *twins]

    @cached_property
    def dense_flops_per_token(self) -> int:
        """The same with every delta formed, once in a step of 1024 tokens, and multiplied."""
        return sum(count * made.dense_flops for p, count in self._alike for made in self._recipes(p))

    @property
    def lowerings(self) -> list[str]:
        """The kinds of its sites' recipes, each once."""
        return list(dict.fromkeys(self.lowering(p) for p, _ in self._alike))

    @property
    def _alike(self) -> list[tuple[Placement, int]]:
        """One of all placements that are lowered alike, and how many they are."""
        found: dict[tuple[object, ...], list[Placement]] = {}
        for p in self.placements:
            found.setdefault((p.slots, p.site.kind, p.site.joined_kinds, p.site.delivery), []).append(p)
        return [(members[0], len(members)) for members in found.values()]


def group_sites(rule: Rule, sites: Sequence[Site], model: SiteMap, tell: Progress = lambda *_: None) -> list[Group]:
    """The groups of one rule, with their diagrams. Raises SiteError on colliding coordinates, SpecError on the rule."""
    axes = rule.tensor_axes
    multiple = {c for c in COORDINATES if len({s.coordinates.get(c) for s in sites}) > 1}
    several = len({stack for s in sites if (stack := s.coordinates.get("stack"))}) > 1
    multiple -= set() if several else {"stack"}  # sites outside the layers have none, and need no name for it
    buckets: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        buckets.setdefault((*own_coordinates(site, axes), *_shape_key(rule, site, axes, model)), []).append(site)
    plain = [group_name(rule, members, axes, multiple) for members in buckets.values()]
    counts = Counter(plain)
    groups: list[Group] = []
    known: _Known = {}
    for done, (members, name) in enumerate(zip(buckets.values(), plain, strict=True)):
        full = f"{name}_{'x'.join(map(str, members[0].shape))}" if counts[name] > 1 else name
        tell(full, done, len(plain))
        groups += (
            _slices(rule, axes, members, model, full, known)
            if rule.shapes == "slices"
            else [_group(rule, axes, members, model, full, known)]
        )
    return groups


def _shape_key(rule: Rule, site: Site, axes: tuple[str, ...], model: SiteMap) -> tuple[object, ...]:
    return (site.shape, _heads(rule, site, model), site.kind == "conv") if rule.shapes == "separate" else ()


def _heads(rule: Rule, site: Site, model: SiteMap) -> int | None:
    """The number of heads on a site's `out`: of keys and values where its name says so. None where no fold asks."""
    if not any("head" in how for how in rule.folds.values() if not isinstance(how, str)):
        return None
    if not has_heads(site):
        name = site.path.rpartition(".")[2]
        raise SpecError(
            f"the rows of {site.path} are not its heads one after the other, so that they cannot be folded into heads",
            hint=f"where its parts lie one after the other, parts={{{name!r}: ['q', 'k', 'v']}} takes it apart and "
            f"targets=['{name}[q]', '{name}[v]'] names them; or choose a format without heads",
        )
    count, kv, size = model.heads_at.get(site.owner or site.path, (None, None, None))
    if count is None and size is None:
        count, kv, size = model.heads, model.kv_heads, model.head_dim
    heads = rule.heads or count
    # heads that are not the model's say nothing of its keys and values
    kv_heads = rule.kv_heads or (kv if heads == count else None)
    letter = holds(site.path)
    found = kv_heads if kv_heads and letter in ("k", "v", "kv") else heads
    measured = size and letter in ("q", "k", "v") and site.out % size == 0 and not rule.heads
    return site.out // size if size and measured and (found is None or site.out % found) else found


def _group(rule: Rule, axes: tuple[str, ...], sites: Sequence[Site], model: SiteMap, name: str, known: _Known) -> Group:
    extent = _extent(rule, axes, sites)
    placements, labels = place(rule, axes, sites, extent[:2])
    heads = _heads_of(rule, sites, model, name)
    key = (extent, heads, *map(len, labels.values()), name if name in rule.ranks else "")
    if key not in known:
        diagram = _diagram(rule, _shape(rule, axes, extent, heads, labels, name), name)
        known[key] = diagram, laws_of(rule, diagram, name)
    diagram, laws = known[key]
    store = {node: f"{name}.{node}" for node in diagram.nodes}
    return Group(name, rule, diagram, tuple(placements), labels, scale_of(rule, name), laws, store)


def _heads_of(rule: Rule, sites: Sequence[Site], model: SiteMap, name: str) -> int | None:
    """The number of heads of a group's sites. Raises SpecError where they have unlike ones."""
    counts = {_heads(rule, site, model): site.path for site in sites}
    if len(counts) > 1:
        raise SpecError(
            f"the sites of group {name!r} have unlike numbers of heads",
            got=", ".join(f"{count} on {path}" for count, path in list(counts.items())[:4]),
            hint="write a rule for each, with heads= and targets of its own",
        )
    return next(iter(counts))


def _shape(
    rule: Rule,
    axes: tuple[str, ...],
    extent: tuple[int, int, int],
    heads: int | None,
    labels: Mapping[str, Sequence[int | str]],
    name: str,
) -> Shape:
    """The axes of a group's tensor, cut as the rule says, and their sizes. Raises SpecError, ShapeError."""
    out, inp, kernel = extent
    folds = {
        axis: fold(axis, size, rule.folds[axis], {"head": heads} if heads else {})
        for axis, size in (("out", out), ("in", inp), ("kernel", kernel))
        if axis in rule.folds
    }
    sizes = {"out": out, "in": inp, "kernel": kernel} | {a: s for parts in folds.values() for a, s in parts.items()}
    sizes |= {axis: len(values) for axis, values in labels.items()}
    spread = tuple(part for axis in axes for part in (folds[axis] if axis in folds else (axis,)))
    if absent := [axis for axis in spread if axis not in sizes]:
        raise SpecError(
            f"group {name!r} has no axis {absent[0]!r}",
            expected=", ".join(sizes),
            hint="write the side that is cut, 'in', and its parts under folds",
        )
    return Shape(spread, sizes, {axis: tuple(parts) for axis, parts in folds.items()}, rule.compress)


def _extent(rule: Rule, axes: tuple[str, ...], sites: Sequence[Site]) -> tuple[int, int, int]:
    """The sizes of `out`, `in` and `kernel` of a group's tensor; without an axis `kernel` it is flattened into `in`."""
    split = "kernel" in axes
    inputs = [s.inp if split else s.inp * s.kernel for s in sites]
    kernels = {s.kernel if split else 1 for s in sites}
    if len(kernels) > 1 or (rule.shapes == "slots" and any(s.kind == "conv" for s in sites)):
        raise SpecError(
            "convolutions are neither cut into slots nor stacked over unequal kernels",
            got=sorted(kernels),
            hint="use shapes: separate",
        )
    gather = math.gcd if rule.shapes == "slots" else max  # a group of separate shapes has but one
    out, inp = rule.slot or (gather(*(s.out for s in sites), sites[0].out), gather(*inputs, inputs[0]))
    return out, inp, kernels.pop()


def _diagram(rule: Rule, shape: Shape, name: str) -> Diagram:
    rank: Ranks = _sized(rule.ranks.get(name, rule.rank), shape)
    excess = rule.excess or (
        "cap" if isinstance(rank, int) or rule.format in ("tt", "ttm") and not isinstance(rank, dict) else "error"
    )
    try:
        return (
            network(rule.network, shape, rank, excess)
            if rule.format == "network"
            else FORMATS[rule.format](shape, rank, excess)
        )
    except RankError as error:
        raise RankError(f"group {name!r}: {error}") from None


def asked(group: Group) -> Mapping[str, int]:
    """The rank that the rule asks for at every bond, whatever its limit."""
    rank = group.rule.ranks.get(group.name, group.rule.rank)
    if isinstance(rank, int):
        return dict.fromkeys(group.diagram.bonds, rank)
    shape = Shape(group.diagram.open, group.diagram.sizes, group.diagram.folds, group.rule.compress)
    return _diagram(group.rule.model_copy(update={"excess": "keep"}), shape, group.name).sizes


def resized(group: Group, rank: int | list[int] | dict[str, int | str]) -> Diagram:
    """The diagram of a group with another rank."""
    diagram = group.diagram
    shape = Shape(diagram.open, diagram.sizes, diagram.folds, group.rule.compress)
    rule = group.rule.model_copy(update={"rank": rank, "ranks": {}})
    return _diagram(rule, shape, group.name)


def rebuilt(group: Group) -> Diagram:
    """The diagram that a group's rule gives at the ranks, the sizes and the folds that the group has."""
    cut = "r_" if group.rule.format in KEYED else ""
    rule = group.rule.model_copy(update={"excess": "keep"})
    rank: dict[str, int | str] = {bond.removeprefix(cut): size for bond, size in group.rank.items()}
    return resized(replace(group, rule=rule), rank)


def _sized(rank: int | list[int] | dict[str, int | str], shape: Shape) -> Ranks:
    if not isinstance(rank, dict):
        return rank
    unknown = [v for v in rank.values() if isinstance(v, str) and v not in shape.sizes]
    if unknown:
        raise RankError(
            f"a rank names the axis {unknown[0]!r}, which the tensor lacks",
            expected=f"a number, or one of {sorted(shape.sizes)}",
        )
    return {bond: shape.sizes[value] if isinstance(value, str) else value for bond, value in rank.items()}


def _slices(
    rule: Rule, axes: tuple[str, ...], sites: Sequence[Site], model: SiteMap, name: str, known: _Known
) -> list[Group]:
    """Groups by shape whose nodes without the axis `site` are slices of one bank of the largest size."""
    if rule.folds:
        raise SpecError(
            "slices of the largest cannot be folded", got=rule.folds, hint="use shapes: separate, or no folds"
        )
    whole = _group(rule, axes, sites, model, name, known)
    bank = f"{name}_bank"
    groups = []
    shapes: dict[tuple[int, ...], list[Site]] = {}
    for site in sites:
        shapes.setdefault(site.shape, []).append(site)
    for shape, members in shapes.items():
        own = name if shape == whole.placements[0].site.shape else f"{name}_{shape[0]}x{shape[1]}"
        part = _group(rule, axes, members, model, own, known)
        private = [node for node, indices in part.diagram.nodes.items() if "site" in indices]
        shared = {node: f"{bank}.{node}" for node in part.diagram.nodes if node not in private}
        kept = {i: whole.diagram.sizes[i] for i in part.diagram.sizes if i not in ("out", "in", "site")}
        placements = part.placements if "site" in axes else tuple(p for p in whole.placements if p.site.shape == shape)
        diagram = replace(part.diagram, sizes={**part.diagram.sizes, **kept})
        labels = part.labels if "site" in axes else whole.labels
        groups.append(
            replace(part, diagram=diagram, placements=placements, labels=labels, store={**part.store, **shared})
        )
    return groups
