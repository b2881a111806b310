"""Targets: which of a model's sites a rule means, and which parts of them.

Invariant: a name in a rule that means nothing in the model is an error that names what it may have meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import translate
from functools import lru_cache

from tensoradapt.errors import ShapeError, SiteError, SpecError
from tensoradapt.expressions import means
from tensoradapt.layouts import AS_STORED, IN_OUT, KNOWN
from tensoradapt.sites import Site, SiteMap, by_pattern
from tensoradapt.spec import SETS, Rule


def select(sites: Sequence[Site], rule: Rule) -> list[Site]:
    """The sites that a rule's targets match and its excludes do not, with the rule's pattern and parts applied.

    A name that no site has is that of a module tied to one. Raises SiteError where a target matches nothing: it names
    the nearest roles.
    """
    if not rule.targets:
        raise SiteError(
            "a rule has no targets", hint=f"write targets=['query', 'value'], or one of the sets {', '.join(SETS)}"
        )
    sites = all_parts(sites, rule)
    for target in rule.targets:
        _check_match("target", target, sites)
    wanted, left = _meant(rule.targets, sites), _meant(rule.exclude, sites)
    chosen = [s for s in sites if s.path in wanted and s.path not in left]
    if not chosen:
        raise SiteError(
            "exclude leaves none of the targets", got=list(rule.exclude), hint="remove an exclude, or the rule"
        )
    return [_relocate(delivered(site, rule), rule.pattern) for site in chosen]


def delivered(site: Site, rule: Rule) -> Site:
    """The site, delivered by weight where its rule asks for that."""
    return replace(site, delivery="weight") if asks_weight(rule, site.path) else site


def asks_weight(rule: Rule, path: str) -> bool:
    """Whether a rule asks that a site is delivered by weight."""
    return rule.delivery == "weight" or (bool(rule.delivery) and _any(tuple(rule.delivery), path))


def _turned(site: Site, layouts: Mapping[str, str]) -> Site:
    """The site in the layout that a rule states for it, where it is not known."""
    layout = next((value for target, value in layouts.items() if matches(target, site.path)), site.layout)
    if layout == site.layout:
        return site
    if site.layout in KNOWN:
        raise SpecError(
            f"{site.path} is a {site.kind}, whose layout is known",
            got=layout,
            expected=site.layout,
            hint="remove it from layout",
        )
    return replace(
        site, layout=layout, shape=site.shape[::-1] if (site.layout, layout) == (AS_STORED, IN_OUT) else site.shape
    )


def refuse(model: SiteMap, rule: Rule) -> None:
    """Raise SiteError where a rule's targets mean a module that cannot be adapted, or its other names mean nothing."""
    inside = _inside(model)
    literal = [target for target in rule.targets if not set(target) & set("*?:")]
    for path, reason in model.refused.items():
        if _any(rule.targets, path) and not _any(rule.exclude, path):
            raise SiteError(f"{path} cannot be adapted: {reason}", hint=f"exclude=[{path!r}]")
        meant = [target for target in literal if any(matches(target, name) for name in inside.get(path, ()))]
        if meant:
            raise SiteError(f"{meant[0]} cannot be adapted: {reason}", hint=f"leave {meant[0]!r} out of targets")
    for path, reason in model.packed.items() if rule.delivery else ():
        if asks_weight(rule, path) and _any(rule.targets, path) and not _any(rule.exclude, path):
            raise SiteError(f"{path} cannot be delivered by weight: {reason}", hint=f"leave {path!r} out of delivery")
    split = all_parts(model.sites, rule)
    refused = [Site(path, (1, 1)) for path in model.refused]
    asked = () if rule.delivery == "weight" else tuple(rule.delivery)
    named = (
        ("exclude", rule.exclude, [*split, *refused]),
        ("layout", rule.layout, model.sites),
        ("delivery", asked, split),
    )
    for field, names, sites in (*named, ("parts", rule.parts, model.sites)):
        for name in names:
            _check_match(field, name, sites)


def _inside(model: SiteMap) -> dict[str, list[str]]:
    """The parameters under every module that cannot be adapted."""
    found: dict[str, list[str]] = {}
    for name in model.parameters if model.refused else ():
        parts = name.split(".")
        for path in (".".join(parts[:k]) for k in range(1, len(parts))):
            if path in model.refused:
                found.setdefault(path, []).append(name)
    return found


def _relocate(site: Site, pattern: str) -> Site:
    if not pattern:
        return site
    found = by_pattern(pattern, site.path)
    if found is None:
        raise SiteError(
            f"the pattern does not match {site.path}", got=pattern, hint="mend the pattern, or exclude the site"
        )
    return replace(site, coordinates=found)


def _meant(names: Sequence[str], sites: Sequence[Site]) -> set[str]:
    """The paths of the sites that names match; a name of none is that of a module that is tied to one."""
    direct = {name: {site.path for site in sites if matches(name, site.path)} for name in names}
    tied = {name: {s.path for s in sites if _any_of(name, s.aliases)} for name, found in direct.items() if not found}
    return set().union(*direct.values(), *tied.values())


def _any_of(name: str, paths: Sequence[str]) -> bool:
    return any(matches(name, path) for path in paths)


def _any(patterns: Sequence[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    """A glob. Brackets are part of a path, `c_attn[q]`; `[0-5]` is a range."""
    return re.compile(translate(re.sub(r"\[(?!\d-\d\])", "[[]", pattern)))


def matches(target: str, path: str) -> bool:
    """Whether a target means a path: equal, a suffix of whole components, a glob (`*`, `?`), or a `re:` expression."""
    if target.startswith("re:"):
        return means(target[3:], path)
    if "*" in target or "?" in target:
        return bool(_glob(target).match(path) or _glob(f"*.{target}").match(path))
    base = path.partition("[")[0]
    return target in (path, base) or path.endswith(f".{target}") or base.endswith(f".{target}")


def _check_match(field: str, name: str, sites: Sequence[Site]) -> None:
    """Raise SiteError where a name of a rule's field matches no site: with the nearest roles."""
    if any(matches(name, site.path) or _any_of(name, site.aliases) for site in sites):
        return
    names = sorted(
        {str(site.coordinates.get("role", site.path)) for site in sites} | {s.path.rpartition(".")[2] for s in sites}
    )
    close = get_close_matches(name, [*names, *SETS], n=3)
    raise SiteError(
        f"{field} {name!r} matches no site",
        expected=f"one of the roles {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}",
        hint=f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else "names are paths, suffixes, globs or 're:' expressions",
    )


def all_parts(sites: Sequence[Site], rule: Rule) -> list[Site]:
    """Sites, and row ranges of those that a rule's `parts` names, in the layouts that the rule states."""
    if not rule.parts and not rule.layout:
        return [*sites]
    return [part for site in sites for part in parts_of(site, rule)]


def parts_of(site: Site, rule: Rule) -> list[Site]:
    """The site, or its row ranges, in the layout that a rule states for it."""
    return split_rows(_turned(site, rule.layout), rule.parts)


def split_rows(site: Site, parts: Mapping[str, list[str] | dict[str, int]]) -> list[Site]:
    """The site, or its row ranges where a rule's `parts` names it: `c_attn` becomes `c_attn[q]`, `c_attn[k]`, ..."""
    found = next((value for target, value in parts.items() if matches(target, site.path)), None)
    if found is None or site.rows is not None:
        return [site]
    sizes = _part_sizes(site, found)
    if sum(sizes.values()) != site.out or min(sizes.values()) <= 0:
        raise ShapeError(
            f"the parts of {site.path} do not add up to its rows",
            got=sizes,
            expected=f"positive numbers with the sum {site.out}",
        )
    result, start = [], 0
    for name, size in sizes.items():
        coords = {**site.coordinates, "role": f"{site.coordinates.get('role', '')}[{name}]"}
        rows = (start, start + size)
        result.append(
            replace(site, path=f"{site.path}[{name}]", shape=(size, *site.shape[1:]), rows=rows, coordinates=coords)
        )
        start += size
    return result


def _part_sizes(site: Site, parts: list[str] | dict[str, int]) -> dict[str, int]:
    if isinstance(parts, list):
        if not parts or site.out % len(parts):
            raise ShapeError(
                f"{site.path} has {site.out} rows, not {len(parts)} equal parts", hint="give sizes: {'q': 64, 'k': 16}"
            )
        return dict.fromkeys(parts, site.out // len(parts))
    return dict(parts)
