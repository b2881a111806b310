"""What stacks are called: by the roles that their weights play, and by no more than tells two of them apart.

Invariant: every stack has a name of its own, made of the model's own words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tensoradapt.sites import Site

LONGEST = 28  # letters of joined roles
SEVERAL = 2


def stack_names(stacks: Sequence[Sequence[Site]]) -> list[str]:
    """A name for every stack of sites: `query`, `q_proj+o_proj`, `encoder q+k+v+o`; with shapes where two are alike."""
    towers = _towers({str(s.coordinates["stack"]) for sites in stacks for s in sites if "stack" in s.coordinates})
    ends = Counter(s.path.rpartition(".")[2] for sites in stacks for s in sites)
    plain = [_plain(sites, towers, ends) for sites in stacks]
    shaped = [
        f"{name} {'x'.join(map(str, sites[0].shape))}" if plain.count(name) > 1 else name
        for name, sites in zip(plain, stacks, strict=True)
    ]
    return list(_distinct(shaped))


def _distinct(names: Iterable[str]) -> Iterable[str]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield f"{name} ({seen[name]})" if seen[name] > 1 else name


def _plain(sites: Sequence[Site], towers: dict[str, str], ends: Counter[str]) -> str:
    place = sites[0].coordinates
    if "layer" not in place and len(sites) == 1:
        return _outside(sites[0], ends)
    tower = towers.get(str(place.get("stack", "")), "")
    roles = list(dict.fromkeys(str(role) for s in sites if (role := s.coordinates.get("role"))))
    name = joined(roles) if roles else _numbered(sites)
    return f"{tower} {name}" if tower and tower not in name else name


def _outside(site: Site, ends: Counter[str]) -> str:
    """The role of a weight outside the layers, with what is before it where others end alike: `pooler.dense`."""
    parts, role = site.path.split("."), str(site.coordinates.get("role") or site.path)
    alone = ends[parts[-1]] == 1 or "." in role
    return role if alone else ".".join(parts[-2:])


def label_of(sites: Sequence[Site]) -> str:
    """What the roles of some sites are called together; outside the layers with what is before it: `pooler.dense`."""
    return joined(list(dict.fromkeys(_labelled(site) for site in sites)))


def _labelled(site: Site) -> str:
    role = str(site.coordinates.get("role") or site.path)
    return role if "layer" in site.coordinates or "." in role else ".".join(site.path.split(".")[-2:])


def _numbered(sites: Sequence[Site]) -> str:
    """A name for modules that have numbers alone: `net`, `net.0` for one of them; `layers` where no path is before."""
    stack, layer = sites[0].coordinates.get("stack"), sites[0].coordinates.get("layer")
    if len({s.coordinates.get("layer") for s in sites}) >= SEVERAL:
        return str(stack or "layers")
    return f"{stack}.{layer}" if stack else f"layer {layer}"


def joined(roles: Sequence[str]) -> str:
    """Roles in one name; of many, the shortest ones, and how many more."""
    whole = "+".join(roles)
    if len(whole) <= LONGEST or len(roles) == 1:
        return whole
    shown: list[str] = []
    for role in sorted(roles, key=len):
        if shown and len("+".join([*shown, role])) > LONGEST:
            break
        shown.append(role)
    rest = len(roles) - len(shown)
    return f"{'+'.join(shown)}+{rest} more" if rest else "+".join(shown)


def _towers(stacks: set[str]) -> dict[str, str]:
    """What tells several stacks of layers apart: `encoder` and `decoder`. Empty for one of them."""
    if len(stacks) < SEVERAL:
        return {}
    parts = {stack: stack.split(".") for stack in stacks}
    for length in range(1, max(map(len, parts.values())) + 1):
        found = {stack: _telling(own, list(parts.values()), length) for stack, own in parts.items()}
        if len(set(found.values())) == len(found):
            return found
    return {stack: stack for stack in stacks}


def _telling(own: Sequence[str], all_of_them: Sequence[Sequence[str]], length: int) -> str:
    """The first parts of a path at which some of the others differ from it."""
    at = next((k for k, part in enumerate(own) if any(o[k : k + 1] != [part] for o in all_of_them)), 0)
    return ".".join(own[at : at + length])
