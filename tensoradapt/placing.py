"""Placing: where the sites of a group lie on its coordinate axes, and what the group is called.

Invariant: inside a group the coordinates of a site are its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tensoradapt.axes import COORDINATES
from tensoradapt.errors import SiteError, SpecError
from tensoradapt.sites import Site
from tensoradapt.spec import Rule


@dataclass(frozen=True)
class Placement:
    """One site in its group: its position on every coordinate axis (of its first slot), and its grid of slots."""

    site: Site
    index: Mapping[str, int]
    slots: tuple[int, int] = (1, 1)


def own_coordinates(site: Site, axes: tuple[str, ...]) -> tuple[object, ...]:
    """The coordinates that are no axis: sites that differ in one of them have tensors of their own."""
    missing = [a for a in axes if a in COORDINATES and a not in site.coordinates]
    if missing:
        raise SiteError(
            f"{site.path} has no {missing[0]}, an axis of the tensor",
            got=dict(site.coordinates),
            hint="exclude the site, or use the axis 'site', which all sites have",
        )
    return () if "site" in axes else tuple(site.coordinates.get(c) for c in COORDINATES if c not in axes)


def place(
    rule: Rule, axes: tuple[str, ...], sites: Sequence[Site], slot: tuple[int, int]
) -> tuple[list[Placement], dict[str, tuple[int | str, ...]]]:
    """Every site's position on the coordinate axes, and the labels of their positions."""
    grids = [_grid(site, slot) if rule.shapes == "slots" else (1, 1) for site in sites]
    labels: dict[str, tuple[int | str, ...]] = {}
    for axis in (a for a in axes if a in COORDINATES):
        values = dict.fromkeys(site.coordinates[axis] for site in sites)
        labels[axis] = tuple(
            sorted(values, key=lambda v: (0, v, "") if isinstance(v, int) else (1, 0, v))
            if axis in ("layer", "expert")
            else values
        )
    places = {axis: {value: k for k, value in enumerate(values)} for axis, values in labels.items()}
    index = [{axis: at[site.coordinates[axis]] for axis, at in places.items()} for site in sites]
    counts = [rows * cols for rows, cols in grids]
    if "site" in axes:
        labels["site"] = tuple(
            s.path if c == 1 else f"{s.path}#{k}" for s, c in zip(sites, counts, strict=True) for k in range(c)
        )
        index = [{"site": first} for first in accumulate(counts[:-1], initial=0)]
    if "slot" in axes:
        labels["slot"] = tuple(range(max(counts)))
        index = [{**i, "slot": 0} for i in index]
    _check_collisions(sites, index)
    return [Placement(s, i, g) for s, i, g in zip(sites, index, grids, strict=True)], labels


def _grid(site: Site, slot: tuple[int, int]) -> tuple[int, int]:
    if site.out % slot[0] or site.inp % slot[1]:
        raise SpecError(
            f"{site.path} cannot be cut into slots",
            got=f"{site.shape}",
            expected=f"multiples of {slot}",
            hint="give slot=(out, in), or exclude the site",
        )
    return site.out // slot[0], site.inp // slot[1]


def _check_collisions(sites: Sequence[Site], index: Sequence[Mapping[str, int]]) -> None:
    seen: dict[tuple[tuple[str, int], ...], str] = {}
    for site, where in zip(sites, index, strict=True):
        key = tuple(sorted(where.items()))
        if key in seen:
            raise SiteError(
                f"{seen[key]} and {site.path} have equal coordinates",
                got=dict(site.coordinates),
                hint="use the axis 'site', a pattern with named fields, or rules of their own",
            )
        seen[key] = site.path


def group_name(rule: Rule, sites: Sequence[Site], axes: tuple[str, ...], multiple: set[str]) -> str:
    """A readable name: the rule's, what the sites have in common and others not."""
    common = {c: own.pop() for c in multiple if len(own := {s.coordinates.get(c) for s in sites}) == 1}
    common = {c: value for c, value in common.items() if value is not None}
    pieces = [rule.name] if rule.name else []
    pieces += [str(common["stack"])] if "stack" in common and "site" not in axes else []
    before = "" if common.get("stack") else "layer"  # decoder_block_3, and layer3 in the only stack
    pieces += [f"{before}{common['layer']}"] if "layer" in common and "site" not in axes else []
    roles = list(dict.fromkeys(str(s.coordinates.get("role", "")) for s in sites))
    pieces += (
        ["_".join(roles) if len(roles) <= 4 else f"{len(roles)}_roles"] if not rule.name or "role" in common else []
    )
    pieces += [f"expert{common['expert']}"] if "expert" in common and "site" not in axes else []
    return re.sub(r"\W+", "_", "_".join(p for p in pieces if p)).strip("_") or "group"
