"""Groups from their rows, and whether what a plan says twice is said alike.

A plan in a file repeats what follows from the rest: a diagram from its rule, its sizes and ranks; laws from the rule; a
site's place from its coordinates; counts from all of them. Invariant: what is read could have been planned, or edited,
by this library, so that whatever it does with a plan of its own it can do with one that was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from tensoradapt.axes import SIDES
from tensoradapt.diagram import Diagram
from tensoradapt.errors import FileError, TensorAdaptError
from tensoradapt.folds import names_of
from tensoradapt.grouping import Group, rebuilt
from tensoradapt.laws import laws_of
from tensoradapt.layouts import STATED, formerly
from tensoradapt.placing import Placement
from tensoradapt.rows import group_trainable
from tensoradapt.schema import DiagramRow, GroupRow, PlanRow, SiteRow, group_row, site_row
from tensoradapt.sites import Site
from tensoradapt.spec import Rule, Spec

HINT = "save the adapter again: the file was changed after it was saved"
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and half characters
SIDED = {"linear": (2,), "embedding": (2,), "conv": (4,), "parameter": (2, 4)}  # the sides of a kind's shape


def _wrong(what: str, got: object, expected: object) -> FileError:
    return FileError(what, got=str(got)[:300], expected=str(expected)[:300], hint=HINT)


def spec_from(data: Mapping[str, Any]) -> Spec:
    """The spec of a plan, whose rules are written out. Raises FileError."""
    odd = next((text for text in _texts(data) if not text.isprintable() and UNFIT.search(text)), None)
    if odd is not None:
        raise _wrong("the spec in the plan has characters that no name has", repr(odd), "printable text")
    try:
        spec = Spec.from_dict(data)
    except TensorAdaptError as error:
        raise FileError(f"the spec in the plan is damaged: {error}") from None
    given = next((rule.preset for rule in spec.rules if rule.preset), None)
    if given is not None:
        raise _wrong("a rule in the plan is not written out", f"preset: {given}", "its fields")
    return spec


def _texts(value: Any) -> Iterator[str]:
    """Every text in plain JSON values."""
    if type(value) is str:
        yield value
    elif type(value) is dict or type(value) is list:
        for inner in (*value, *(value.values() if type(value) is dict else ())):
            yield from _texts(inner)


def groups_from(row: PlanRow, spec: Spec) -> tuple[Group, ...]:
    """The groups of a plan. Raises FileError where they cannot be what the rest of the plan says."""
    rows = _Rows(spec.rules, formerly if row.layouts != STATED else lambda site: site)
    groups = tuple(rows.group(group_row(one)) for one in row.groups)
    _check_names(groups)
    _check_apart(groups)
    return groups


def check_counts(row: PlanRow, counts: Mapping[str, int]) -> None:
    """Raise FileError where a plan states another count than it has."""
    for name, count in counts.items():
        if getattr(row, name) not in (None, count):
            raise _wrong(f"{name} in the plan is not what its groups have", getattr(row, name), count)


@dataclass(frozen=True)
class _Kind:
    """What groups of one rule and one diagram have in common."""

    rule: Rule
    diagram: Diagram
    laws: Mapping[str, str]

    @cached_property
    def rank(self) -> dict[str, int]:
        return {bond: self.diagram.sizes[bond] for bond in self.diagram.bonds}

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes that pick a site."""
        return frozenset(self.diagram.coordinates)

    @cached_property
    def sides(self) -> tuple[int, int, int]:
        """The sizes of `out`, `in` and `kernel`."""
        out, inp, kernel = map(self.diagram.extent, SIDES)
        return out, inp, kernel

    @cached_property
    def split(self) -> bool:
        """Whether the kernel is an axis of its own, and not a part of `in`."""
        return "kernel" in self.rule.tensor_axes


@dataclass
class _Rows:
    """The groups of one plan; equal diagrams under one rule are one, and judged once."""

    rules: Sequence[Rule]
    stated: Callable[[Site], Site]
    kinds: dict[tuple[int, Diagram], _Kind] = field(default_factory=dict)

    def group(self, row: GroupRow) -> Group:
        """One group."""
        if row.rule >= len(self.rules):
            raise _wrong(f"the rule of group {row.name!r} is not there", row.rule, f"a number below {len(self.rules)}")
        try:
            diagram = diagram_from(row.diagram)
            kind = self.kinds.get((row.rule, diagram)) or self._kind(row, diagram)
        except TensorAdaptError as error:
            raise FileError(f"group {row.name!r} in the plan cannot be: {error}") from None
        placements = tuple(self._placement(site_row(site), kind) for site in row.sites)
        labels = {axis: tuple(values) for axis, values in row.labels.items()}
        group = Group(row.name, kind.rule, kind.diagram, placements, labels, float(row.scale), kind.laws, row.store)
        _check_row(group, row, kind)
        _check_labels(group, kind)
        _check_places(group, kind)
        return group

    def _kind(self, row: GroupRow, diagram: Diagram) -> _Kind:
        """The kind of a group, whose diagram has to be its rule's at some ranks."""
        rule = self.rules[row.rule]
        _check_axes(rule, diagram)
        kind = _Kind(rule, diagram, laws_of(rule, diagram, row.name))
        made = rebuilt(Group(row.name, rule, diagram, (), {}, 1.0, kind.laws))
        if made != diagram:
            raise _wrong(f"the diagram of group {row.name!r} is not its rule's", diagram, made)
        return self.kinds.setdefault((row.rule, diagram), kind)

    def _placement(self, row: SiteRow, kind: _Kind) -> Placement:
        values: dict[str, Any] = {name: tuple(v) if type(v) is list else v for name, v in vars(row).items()}
        place, slots = values.pop("place"), values.pop("slots")
        if row.joined and not row.joined_kinds:  # older files do not say: a head has the tensor of an embedding
            values["joined_kinds"] = ("embedding" if row.kind == "linear" else "linear",) * len(row.joined)
        site = self.stated(Site(**values))
        _check_site(site)
        _check_shape(site, slots, kind)
        return Placement(site, place, slots)


def diagram_from(row: DiagramRow) -> Diagram:
    """The inverse of `Diagram.to_dict`."""
    nodes, folds = ({name: tuple(i) for name, i in of.items()} for of in (row.nodes, row.folds))
    return Diagram(row.sizes, nodes, tuple(row.open), folds)


def _check_axes(rule: Rule, diagram: Diagram) -> None:
    """The axes of a diagram are the rule's, cut as the rule says."""
    if set(diagram.folds) != set(rule.folds):
        raise _wrong("other axes are cut than the rule cuts", [*diagram.folds], [*rule.folds])
    for axis, parts in diagram.folds.items():
        wanted = names_of(axis, rule.folds[axis], len(parts))
        if wanted != parts:
            raise _wrong(f"the folds of {axis} are not the rule's", parts, rule.folds[axis])
    axes = tuple(part for axis in rule.tensor_axes for part in diagram.folds.get(axis, (axis,)))
    if diagram.open != axes:
        raise _wrong("the axes of a diagram are not its rule's", diagram.open, axes)


def _check_row(group: Group, row: GroupRow, kind: _Kind) -> None:
    """What a row repeats is said alike."""
    if [*row.store] != [*group.diagram.nodes]:
        raise _wrong(f"the stored nodes of group {group.name!r}", [*row.store], [*group.diagram.nodes])
    said = (("start", row.start, group.rule.start), ("rank", row.rank, kind.rank))
    for name, got, wanted in (*said, ("num_trainable", row.num_trainable, group_trainable(group))):
        if got is not None and got != wanted:
            raise _wrong(
                f"{name} of group {group.name!r} is not what follows from its diagram and its rule", got, wanted
            )
    if row.laws != kind.laws:
        raise _wrong(f"the laws of group {group.name!r} are not its rule's", row.laws, kind.laws)
    for node, key in row.store.items():
        if key != f"{group.name}.{node}" and not _is_banked(key, node, group.rule):
            raise _wrong(f"node {node!r} of group {group.name!r} is stored elsewhere", key, f"{group.name}.{node}")


def _is_banked(key: str, node: str, rule: Rule) -> bool:
    """Whether a key is that of a node which groups of several shapes have slices of."""
    return rule.shapes == "slices" and re.fullmatch(rf"\w+_bank\.{node}", key) is not None


def _check_labels(group: Group, kind: _Kind) -> None:
    """Every coordinate axis has a label of its own for each of its positions."""
    if group.labels.keys() != kind.axes:
        raise _wrong(f"the labelled axes of group {group.name!r}", [*group.labels], group.diagram.coordinates)
    for axis, values in group.labels.items():
        size = group.diagram.sizes[axis]
        if not len(values) == len(set(values)) == size:
            raise _wrong(f"the labels of {axis} of group {group.name!r}", values[:8], f"{size}, each once")


def _check_places(group: Group, kind: _Kind) -> None:
    """Every site lies on the axes, where its coordinates say, and no two lie in one place."""
    taken: dict[tuple[object, ...], str] = {}
    for placement in group.placements:
        path, index = placement.site.path, placement.index
        if index.keys() != kind.axes:
            raise _wrong(f"the place of {path}", dict(index), group.diagram.coordinates)
        for axis, position in index.items():
            values, own = group.labels[axis], placement.site.coordinates.get(axis)
            found = values[position] if position < len(values) else None
            if found is None or (axis not in ("site", "slot") and found != own):
                raise _wrong(f"the place of {path} on {axis}", f"{position}: {found}", f"that of {own}")
        for place in _cells(placement, group):
            if taken.setdefault(place, path) != path:
                raise _wrong("two sites lie in one place of their group", path, f"{taken[place]} alone")


def _cells(placement: Placement, group: Group) -> Iterator[tuple[object, ...]]:
    """The places that a site takes: on the axis `site` one for each of its slots."""
    index, (rows, cols) = placement.index, placement.slots
    axis = "slot" if "slot" in index else "site"
    if axis in index and index[axis] + rows * cols > len(group.labels[axis]):
        raise _wrong(f"the slots of {placement.site.path}", f"{rows} x {cols}", f"within {len(group.labels[axis])}")
    if axis == "site" and axis in index:
        yield from ((index["site"] + k,) for k in range(rows * cols))
    else:
        yield tuple(index[name] for name in sorted(index))


def _check_site(site: Site) -> None:
    """What a site says of itself is said alike."""
    path, shape = site.path, site.shape
    if len(shape) not in SIDED[site.kind] or (site.dims == 1 and shape[2:3] != (1,)):
        raise _wrong(f"the shape of {path}", shape, f"that of a {site.kind}")
    if site.owner and path != site.owner and not path.startswith(f"{site.owner}["):
        raise _wrong("a site has the name of another module", path, site.owner)
    if site.rows is not None and site.rows[1] - site.rows[0] != shape[0]:
        raise _wrong(f"the rows of {path}", site.rows, f"{shape[0]} of them")
    if len(site.joined_kinds) != len(site.joined):
        raise _wrong(f"the kinds of what is joined to {path}", site.joined_kinds, f"one for each of {site.joined}")


def _check_shape(site: Site, slots: tuple[int, int], kind: _Kind) -> None:
    """A site has the size of its group's tensor, or of as many slots as it says."""
    if slots != (1, 1) and kind.rule.shapes != "slots":
        raise _wrong(f"{site.path} is cut into slots", slots, "shapes: slots in its rule")
    found = (site.out, site.inp, site.kernel) if kind.split else (site.out, site.inp * site.kernel, 1)
    out, inp, kernel = kind.sides
    wanted = (out * slots[0], inp * slots[1], kernel if kind.split else 1)
    if found != wanted:
        raise _wrong(f"{site.path} has another shape than its group's tensor", site.shape, wanted)


def _check_names(groups: Sequence[Group]) -> None:
    """No two groups have one name, and a bank is of one rule's groups, and no group's own."""
    names: set[str] = set()
    banks: dict[str, Rule] = {}
    for group in groups:
        if group.name in names:
            raise _wrong("two groups have one name", group.name, "names of their own")
        names.add(group.name)
        for bank in {key.partition(".")[0] for key in group.store.values()} - {group.name}:
            if banks.setdefault(bank, group.rule) is not group.rule:
                raise _wrong(f"groups of several rules are stored in {bank}", group.name, "groups of one")
    if not names.isdisjoint(banks):
        raise _wrong("a group has the name of a bank", ", ".join(names & banks.keys()), "names of their own")


def _check_apart(groups: Sequence[Group]) -> None:
    """No path and no entry of a tensor is adapted twice."""
    paths: set[str] = set()
    rows: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
    for group in groups:
        for site in (placement.site for placement in group.placements):
            own = (site.path, *site.joined)
            if not paths.isdisjoint(own) or len(set(own)) < len(own):
                raise _wrong("a weight is adapted twice", ", ".join(own), "every weight once")
            paths.update(own)
            rows.setdefault((site.tensor or site.path, site.index), []).append(site.rows or (0, 1 << 62))
    for (tensor, _), ranges in rows.items():
        ranges.sort()
        if any(one[1] > two[0] for one, two in pairwise(ranges)):
            raise _wrong(f"rows of {tensor} are adapted twice", ranges[:8], "ranges that lie apart")
