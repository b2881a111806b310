"""Axes and networks as the user writes them: all that can be checked before any size is known.

A network is an einsum with names, `"out a, layer a b, b in -> layer out in"`. A node may be named, as in
`"B: out r, A: r in -> out in"`; unnamed nodes are `node_0`, `node_1`, ...
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tensoradapt.errors import SpecError

COORDINATES = ("stack", "layer", "role", "expert", "task")
SIDES = ("out", "in", "kernel")
TAKEN = {*SIDES, *COORDINATES, "site", "slot"}  # what a fold cannot be named
Nodes = dict[str, tuple[str, ...]]


def parse(text: str) -> tuple[Nodes, tuple[str, ...]]:
    """Split a network string into nodes (name to indices) and the tensor's axes. Raises SpecError where it has none."""
    left, arrow, right = text.partition("->")
    if not arrow or not right.split() or not left.strip():
        raise SpecError("a network reads 'nodes -> axes'", got=text, hint="write for example 'out a, a in -> out in'")
    nodes: Nodes = {}
    for position, part in enumerate(left.split(",")):
        name, colon, indices = part.partition(":")
        key = name.strip() if colon else f"node_{position}"
        if key in nodes or not key.isidentifier():
            raise SpecError(
                f"node name {key!r} is given twice or is no identifier", got=text, hint="write for example 'B: out r'"
            )
        nodes[key] = tuple((indices if colon else name).split())
        if not nodes[key] or len(set(nodes[key])) < len(nodes[key]):
            raise SpecError(f"node {key!r} needs indices, each once", got=text, hint="write for example 'out a'")
    axes = tuple(right.split())
    _check(nodes, axes, text)
    return nodes, axes


def _check(nodes: Nodes, axes: tuple[str, ...], text: str) -> None:
    """Refuse a network in which an index leads nowhere, or a node to no axis."""
    carried = [index for indices in nodes.values() for index in indices]
    wrong = next((i for i in dict.fromkeys((*carried, *axes)) if not i.isidentifier()), None)
    if wrong is not None:
        raise SpecError(f"{wrong!r} is no index", got=text, expected="names of letters, digits and underscores")
    if len(set(axes)) < len(axes):
        raise SpecError("axes are given twice behind '->'", got=" ".join(axes), expected="each once")
    for axis in (axis for axis in axes if axis not in carried):
        raise SpecError(
            f"axis {axis!r} sits on no node", got=text, hint=f"add {axis!r} to a node; names are parted by spaces"
        )
    times = Counter(carried)
    for bond in (i for i in carried if i not in axes and times[i] == 1):
        raise SpecError(
            f"bond {bond!r} ends nowhere: it is on one node and not among the axes",
            got=text,
            hint=f"put {bond!r} on another node, or after '->'",
        )
    loose = _loose(nodes, axes)
    if loose:
        raise SpecError(
            f"{', '.join(loose)} is joined to no axis: it would be no more than a number",
            got=text,
            hint="join it to the others by a bond, or leave it out",
        )


def _loose(nodes: Nodes, axes: tuple[str, ...]) -> list[str]:
    """The nodes that no chain of bonds joins to an axis."""
    at: dict[str, list[str]] = {}
    for name, indices in nodes.items():
        for index in indices:
            at.setdefault(index, []).append(name)
    reached, waiting = set(axes), list(axes)
    while waiting:
        new = {i for name in at.pop(waiting.pop(), ()) for i in nodes[name]} - reached
        reached |= new
        waiting += new
    return [name for name, indices in nodes.items() if not reached & set(indices)]


def check_axes(axes: Sequence[str], folds: Mapping[str, Any], shapes: str) -> None:
    """Refuse axes of a rule that name no coordinate and no side, or lack a side. Raises SpecError."""
    named = {name for how in folds.values() if not isinstance(how, str) for name in map(_plain, how) if name}
    fixed = {*COORDINATES, "site", "slot", *SIDES, *named}
    unknown = [a for a in axes if a not in fixed and not re.fullmatch(r"(out|in|kernel)_\d+", a)]
    if unknown:
        raise SpecError(
            f"unknown axis {unknown[0]!r}",
            got=list(axes),
            expected=f"coordinates ({', '.join(COORDINATES)}, site, slot), out, in, kernel, or folds of them",
        )
    for side in ("out", "in"):
        cut = folds.get(side, ())
        parts = {side, *(f"{side}_{k}" for k in range(16)), *(() if isinstance(cut, str) else map(_plain, cut))}
        if not parts & set(axes):
            raise SpecError(f"the tensor lacks the axis {side!r}", got=list(axes), hint=f"add {side!r} to the axes")
    if len(set(axes)) < len(axes) or ("site" in axes and set(axes) & {*COORDINATES, "slot"}):
        raise SpecError(
            "axes are given twice", got=list(axes), expected="each once; `site` is all coordinates flattened"
        )
    if shapes == "slots" and not {"site", "slot"} & set(axes):
        raise SpecError("slots need an axis to lie on", got=list(axes), hint="add 'slot' or 'site' to the axes")


def _plain(part: int | str) -> str:
    return part.partition("=")[0] if isinstance(part, str) else ""
