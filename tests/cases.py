"""The table of cases that every law is held against, and the oracle: plain einsum over the nodes, gradients included.

A case is a rule on a small grid of sites: format x axis order x ranks 1-3 x holes in the grid, and networks that reach
every way of lowering. The oracle reads a diagram's nodes and a site's place, and shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np

from tensoradapt.diagram import Diagram
from tensoradapt.grouping import Group
from tensoradapt.placing import Placement
from tensoradapt.plan import Plan, make_plan
from tensoradapt.sites import from_mapping
from tensoradapt.spec import Rule, Spec

Arrays = dict[str, np.ndarray]
ROLES = ("q", "k", "v")
HOLES = {(1, "k"), (2, "q")}


def grid(shape: tuple[int, ...] = (6, 4), holes: bool = False) -> dict[str, tuple[int, ...]]:
    """Three layers of three roles, all there or some missing."""
    return {
        f"blocks.{layer}.attn.{role}": shape
        for layer in range(3)
        for role in ROLES
        if not (holes and (layer, role) in HOLES)
    }


@dataclass(frozen=True)
class Case:
    """A rule on some sites; `kind` is the module that the sites are taken for."""

    name: str
    rule: Mapping[str, Any]
    sites: Mapping[str, tuple[int, ...]] = field(default_factory=grid)
    kind: str = ""

    def plan(self) -> Plan:
        rule = Rule(**{"targets": ("re:.*",), "start": "nonzero", **self.rule})
        found = from_mapping(self.sites)
        kinds = tuple(replace(site, kind=self.kind or site.kind) for site in found.sites)
        return make_plan(Spec(rules=(rule,)), replace(found, sites=kinds))

    def groups(self) -> tuple[Group, ...]:
        return self.plan().groups


def _orders(form: str, **more: Any) -> Iterator[Case]:
    for axes in permutations(("out", "in", "layer", "role")):
        for rank in (1, 2, 3):
            for holes in (False, True):
                rule = {"format": form, "axes": axes, "rank": rank, **more}
                yield Case(f"{form}-{'-'.join(axes)}-r{rank}{'-holes' * holes}", rule, grid(holes=holes))


def _ranks(name: str, rule: Mapping[str, Any], shape: tuple[int, ...] = (6, 4), **more: Any) -> Iterator[Case]:
    for rank in (1, 2, 3):
        for holes in (False, True):
            yield Case(f"{name}-r{rank}{'-holes' * holes}", {"rank": rank, **rule}, grid(shape, holes), **more)


def _network(name: str, network: str, shape: tuple[int, ...] = (6, 4), **more: Any) -> Iterator[Case]:
    return _ranks(name, {"format": "network", "network": network, "excess": "keep", **more}, shape)


def _folded() -> Iterator[Case]:
    """Sides cut into folds, in several orders, and coordinates on either side of them."""
    two = {"out": [3, 2], "in": [2, 2]}
    yield from _ranks("tt-in-then-out", {"axes": ("in", "out"), "folds": {"in": [2, 3, 2], "out": [3, 2]}}, (6, 12))
    yield from _ranks("tt-interleaved", {"axes": ("out_0", "in_0", "layer", "out_1", "in_1"), "folds": two})
    yield from _ranks("tt-little-endian", {"axes": ("out_1", "out_0", "role", "in_1", "in_0"), "folds": two})
    heads = {"folds": {"out": ["head=3", "head_dim"]}}
    yield from _ranks("cp-heads", {"format": "cp", "axes": ("in", "head", "head_dim", "layer", "role"), **heads})
    yield from _ranks("tucker-heads", {"format": "tucker", "axes": ("in", "head_dim", "head", "role"), **heads})
    for count in (1, 2, 3):
        folds = {"out": f"auto:{count}", "in": f"auto:{count}"}
        for axes in (("out", "in"), ("layer", "out", "in"), ("role", "out", "in", "layer")):
            rule = {"format": "ttm", "axes": axes, "folds": folds}
            yield from _ranks(f"ttm{count}-{'-'.join(axes)}", rule, (12, 8))
    yield from _ranks(
        "ttm-prime", {"format": "ttm", "axes": ("out", "in"), "folds": {"out": [7, 1], "in": [1, 5]}}, (7, 5)
    )


def _tucker() -> Iterator[Case]:
    """Tucker with some axes left on the core, ranks per axis, and ranks above their limits."""
    axes = ("layer", "out", "in", "role")
    yield from _ranks("tucker-sides", {"format": "tucker", "axes": axes, "compress": ("out", "in")})
    yield from _ranks("tucker-one-side", {"format": "tucker", "axes": axes, "compress": ("out",)})
    yield from _ranks("tucker-coordinates", {"format": "tucker", "axes": axes, "compress": ("layer", "role")})
    yield Case(
        "tucker-per-axis", {"format": "tucker", "axes": axes, "rank": {"out": 3, "in": 2, "layer": 1, "role": 3}}
    )
    yield Case("tucker-keep", {"format": "tucker", "axes": axes, "rank": 5, "excess": "keep"})
    yield Case("tt-keep", {"axes": axes, "rank": 7, "excess": "keep"})
    yield Case("cp-keep", {"format": "cp", "axes": axes, "rank": 30, "excess": "keep"})


def _networks() -> Iterator[Case]:
    """Users' networks: hyperedges, rings, gates, products, diagonals, scalars, cores that join the sides twice."""
    two = {"out": "auto:2", "in": "auto:2"}
    three = {"out": "auto:3", "in": "auto:3"}
    yield from _network("hadamard", "out r, r in, out s, s in -> out in")
    yield from _network("kron", "out_0 in_0, out_1 in_1 -> out_0 out_1 in_0 in_1", (12, 8), folds=two)
    yield from _network("kron-low", "out_0 in_0, out_1 r, r in_1 -> out_0 out_1 in_0 in_1", (12, 8), folds=two)
    yield from _network(
        "kron-layers", "layer a, out_0 in_0 a, out_1 in_1 -> layer out_0 out_1 in_0 in_1", (12, 8), folds=two
    )
    gates = "w_0 w_1 in_1 in_2, out_2 w_2 w_0 in_0, out_1 out_0 w_1 w_2 -> out_0 out_1 out_2 in_0 in_1 in_2"
    yield from _network("gates", gates, (12, 8), folds=three)
    yield from _network("vera", "site out, out r, site r, r in -> site out in")
    yield from _network("ring", "a out b, b in c, c layer a -> layer out in")
    yield from _network("ring-of-four", "a out b, b role c, c in d, d layer a -> layer role out in")
    yield from _network("bridge", "out a c, layer a b, b c in -> layer out in")  # a core and a bond join the sides
    yield from _network("two-cores", "out a c, layer a b, role c d, b d in -> layer role out in")
    yield from _network("two-diagonals", "out r s, layer r, role s, r s in -> layer role out in")
    yield from _network("half-diagonal", "out r s, layer r, r s in -> layer out in")
    yield from _network("scalar", "layer, role, out r, r in -> layer role out in")
    yield from _network("outer-core", "out a, a b, layer b c, c in, c d, d -> layer out in", excess="cap")
    yield from _network("one-node", "layer out in a, a role -> layer role out in")
    yield from _network("no-bond", "layer out, role in -> layer role out in")
    yield from _network("kernelless", "out a b, a, b in -> out in")
    rolled = "made: out_1 out_0 a, last: a in_1 in_0 -> out_0 out_1 in_0 in_1"
    yield from _network("rolled", rolled, (12, 8), folds=two)
    swapped = "out_1 in_0, out_0 in_1 -> out_0 out_1 in_0 in_1"
    yield from _network("swapped", swapped, (12, 8), folds=two)


def _slots() -> Iterator[Case]:
    """Sites of unequal shape cut into slots of one shape, and as slices of the largest."""
    mixed = {
        "block.0.q": (4, 4),
        "block.0.up": (8, 4),
        "block.1.q": (4, 4),
        "block.1.up": (8, 4),
        "block.1.down": (4, 12),
    }
    sides = {"format": "tucker", "axes": ("site", "out", "in"), "shapes": "slots"}
    for rank in (1, 2, 3):
        yield Case(f"slots-core-r{rank}", {**sides, "compress": ("out", "in"), "rank": rank}, mixed)
        yield Case(f"slots-tucker-r{rank}", {**sides, "rank": rank}, mixed)
        yield Case(f"slots-cp-r{rank}", {**sides, "format": "cp", "rank": rank}, mixed)
        yield Case(
            f"slots-axis-r{rank}",
            {**sides, "format": "tt", "axes": ("in", "layer", "role", "slot", "out"), "rank": rank},
            mixed,
        )
        yield Case(f"slots-ends-r{rank}", {**sides, "format": "tt", "axes": ("slot", "out", "in"), "rank": rank}, mixed)
        bridge = "out a c, site a b, b c in -> site out in"
        yield Case(
            f"slots-bridge-r{rank}", {"format": "network", "network": bridge, "shapes": "slots", "rank": rank}, mixed
        )
        on_out = "site out a, a b, b in -> site out in"
        yield Case(
            f"slots-on-out-r{rank}", {"format": "network", "network": on_out, "shapes": "slots", "rank": rank}, mixed
        )
        wide = {"format": "network", "network": "site out, out r, site r, r in -> site out in", "shapes": "slices"}
        yield Case(f"slices-r{rank}", {**wide, "rank": rank, "excess": "keep"}, mixed)
    smaller = {**sides, "compress": ("out", "in"), "rank": 2, "slot": (2, 2)}
    yield Case("slots-smaller", smaller, mixed)
    yield Case("slots-embedding", {**sides, "compress": ("out", "in"), "rank": 2}, mixed, kind="embedding")
    yield Case("slots-embedding-cp", {**sides, "format": "cp", "rank": 2}, mixed, kind="embedding")


def _convolutions() -> Iterator[Case]:
    """Deltas of convolutions: the kernel as an axis, in folds, or flattened into `in`."""
    shape = (6, 4, 3, 2)
    for rank in (1, 2, 3):
        for form in ("tt", "tucker", "cp"):
            for axes in permutations(("out", "in", "kernel")):
                rule = {"format": form, "axes": axes, "rank": rank}
                yield Case(f"conv-{form}-{'-'.join(axes)}-r{rank}", rule, grid(shape, holes=True))
        yield Case(
            f"conv-folds-r{rank}",
            {"axes": ("in", "kernel", "out"), "folds": {"kernel": [3, 2]}, "rank": rank},
            grid(shape),
        )
        turned = {"axes": ("in", "out", "kernel"), "folds": {"out": [2, 3], "in": [2, 2]}, "rank": rank}
        yield Case(f"conv-turned-r{rank}", turned, grid(shape))
        locon = {"format": "tucker", "axes": ("layer", "out", "in", "kernel"), "compress": ("out", "in"), "rank": rank}
        yield Case(f"conv-locon-r{rank}", locon, grid(shape, holes=True))
        yield Case(f"conv-flat-r{rank}", {"axes": ("out", "in"), "rank": rank}, grid(shape))
        yield Case(f"conv-sites-r{rank}", {"format": "cp", "axes": ("site", "in", "out"), "rank": rank}, grid(shape))


def _coordinates() -> Iterator[Case]:
    """Stacks and experts as axes, and sites of one group that lie in several of them."""
    paths = {f"{s}.block.{n}.mlp.experts.{e}.up": (6, 4) for s in ("enc", "dec") for n in (0, 2) for e in (0, 1)}
    axes = ("stack", "out", "layer", "in", "expert")
    for rank in (1, 2, 3):
        for form in ("tt", "tucker", "cp"):
            yield Case(f"{form}-stack-expert-r{rank}", {"format": form, "axes": axes, "rank": rank}, paths)
        yield Case(f"embedding-r{rank}", {"axes": ("in", "out"), "rank": rank}, {"embed": (6, 9)}, kind="embedding")
    heads = {"format": "cp", "axes": ("in", "head", "head_dim"), "folds": {"out": ["head=3", "head_dim"]}, "rank": 2}
    yield Case("embedding-heads", heads, {"embed": (6, 9)}, kind="embedding")
    yield Case(
        "embedding-kron",
        {"format": "ttm", "axes": ("out", "in"), "folds": {"out": [3, 2], "in": [3, 3]}, "rank": 2},
        {"embed": (6, 9)},
        kind="embedding",
    )


def _wide() -> Iterator[Case]:
    """Sites wide enough for each lowering to win over the dense one."""
    site = {"block.0.q": (24, 36)}
    two, three = {"out": "auto:2", "in": "auto:2"}, {"out": "auto:3", "in": "auto:3"}
    diagonal = {"format": "cp", "axes": ("in", "layer", "out"), "rank": 3}
    yield Case("wide-sandwich", {"axes": ("out", "in"), "rank": 2}, site)
    yield Case("wide-middle", {"axes": ("out", "layer", "in"), "rank": 2}, site)
    yield Case("wide-diagonal", diagonal, site)
    yield Case(
        "wide-absorbed", {"format": "network", "network": "out a c, layer a b, b c in -> layer out in", "rank": 2}, site
    )
    yield Case("wide-stages", {"format": "ttm", "axes": ("out", "in"), "folds": two, "rank": 1}, site)
    swapped = "out_1 in_0, out_0 in_1 -> out_0 out_1 in_0 in_1"
    yield Case("wide-order", {"format": "network", "network": swapped, "folds": two}, site)
    yield Case(
        "wide-einsum",
        {
            "format": "network",
            "network": "out_0 r in_0, out_1 r in_1, r -> out_0 out_1 in_0 in_1",
            "folds": two,
            "rank": 2,
        },
        site,
    )
    yield Case("wide-dense", {"format": "ttm", "axes": ("out", "in"), "folds": three, "rank": 9}, site)
    yield Case(
        "wide-kernel",
        {"format": "tucker", "axes": ("out", "in", "kernel"), "compress": ("out", "in"), "rank": 2},
        {"c": (24, 36, 3, 3)},
    )


CASES = (
    *_orders("tt"),
    *_orders("tucker"),
    *_orders("cp"),
    *_folded(),
    *_tucker(),
    *_networks(),
    *_slots(),
    *_convolutions(),
    *_coordinates(),
    *_wide(),
)
BY_NAME = {case.name: case for case in CASES}


def draw(diagram: Diagram, seed: int = 0) -> Arrays:
    """Factors of a diagram, every entry of each its own."""
    rng = np.random.default_rng(seed)
    return {node: rng.standard_normal([diagram.sizes[i] for i in indices]) for node, indices in diagram.nodes.items()}


def dense(group: Group, factors: Mapping[str, np.ndarray], placement: Placement) -> np.ndarray:
    """The delta of one site: one einsum over all nodes for every slot.  Shape: (out, in * kernel)."""
    rows = []
    for row in range(placement.slots[0]):
        blocks = []
        for column in range(placement.slots[1]):
            where = _where(placement, row, column)
            arguments: list[Any] = []
            for node, indices in group.diagram.nodes.items():
                arguments += [
                    factors[node][_at(indices, where)],
                    _numbers(group, [i for i in indices if i not in where]),
                ]
            block = np.einsum(*arguments, _numbers(group, _sides(group)), optimize=True)
            blocks.append(block.reshape(_product(group, _outs(group)), -1))
        rows.append(np.concatenate(blocks, axis=1))
    return np.concatenate(rows, axis=0)


def pullback(group: Group, factors: Mapping[str, np.ndarray], placement: Placement, cotangent: np.ndarray) -> Arrays:
    """The gradient of <cotangent, dense> in every factor: the einsum of all others with the cotangent."""
    found = {node: np.zeros_like(value) for node, value in factors.items()}
    out, inp = _product(group, _outs(group)), cotangent.shape[1] // placement.slots[1]
    for row in range(placement.slots[0]):
        for column in range(placement.slots[1]):
            where = _where(placement, row, column)
            block = cotangent[row * out : (row + 1) * out, column * inp : (column + 1) * inp]
            block = block.reshape([group.diagram.sizes[i] for i in _sides(group)])
            for node, indices in group.diagram.nodes.items():
                arguments: list[Any] = [block, _numbers(group, _sides(group))]
                for other, held in group.diagram.nodes.items():
                    if other != node:
                        left = [i for i in held if i not in where]
                        arguments += [factors[other][_at(held, where)], _numbers(group, left)]
                left = [i for i in indices if i not in where]
                found[node][_at(indices, where)] += np.einsum(*arguments, _numbers(group, left), optimize=True)
    return found


def _where(placement: Placement, row: int, column: int) -> dict[str, int]:
    """The position of one slot on every coordinate axis: slots follow each other row by row."""
    where = dict(placement.index)
    if placement.slots != (1, 1):
        axis = "slot" if "slot" in where else "site"
        where[axis] += row * placement.slots[1] + column
    return where


def _at(indices: tuple[str, ...], where: Mapping[str, int]) -> tuple[Any, ...]:
    return tuple(where.get(i, slice(None)) for i in indices)


def _numbers(group: Group, indices: Any) -> list[int]:
    names = list(group.diagram.sizes)
    return [names.index(i) for i in indices]


def _outs(group: Group) -> tuple[str, ...]:
    return tuple(group.diagram.folds.get("out", ("out",)))


def _sides(group: Group) -> tuple[str, ...]:
    """The indices of a weight, big-endian: out, then in, then kernel."""
    diagram = group.diagram
    kernel = diagram.folds.get("kernel", ("kernel",) if "kernel" in diagram.open else ())
    return (*_outs(group), *diagram.folds.get("in", ("in",)), *kernel)


def _product(group: Group, indices: tuple[str, ...]) -> int:
    size = 1
    for index in indices:
        size *= group.diagram.sizes[index]
    return size
