"""Sets of weights: `query-value`, `all-linear` and others, resolved to the names that a model's own modules have.

Invariant: a resolved rule names exactly the weights of its sets, in literal suffixes of paths; where nothing can be
told the error lists the model's roles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tensoradapt.errors import SiteError
from tensoradapt.roles import Roles
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import SETS, Rule
from tensoradapt.targets import all_parts, matches


def resolve(rule: Rule, model: SiteMap) -> tuple[Rule, tuple[str, ...]]:
    """The rule with literal targets where it names a set or gives none, and notes that say what they are.

    A word that is a weight's own name in the model means that weight. Raises SiteError where a set cannot be told.
    """
    sites = all_parts(model.sites, rule)
    targets = rule.targets or ((rule.default,) if rule.default else ())
    words = [t for t in targets if t in SETS and (not rule.targets or not _named(t, sites))]
    without = [t for t in rule.exclude if t in SETS and not _named(t, sites)]
    if not words and not without:
        return rule, ()
    roles = Roles(sites)
    literal, kept = [t for t in targets if t not in words], [t for t in rule.exclude if t not in without]
    left = {site.path for word in without for site in _told(word, roles, model)}
    chosen = {site.path: site for word in words for site in _told(word, roles, model)}
    mine = [site for path, site in chosen.items() if path not in left and not _any(kept, path)]
    if words and not mine:
        raise SiteError(f"exclude leaves nothing of {' and '.join(words)}", got=list(rule.exclude))
    others = [s.path for s in sites if s.path not in chosen and not _any(literal, s.path)]
    others = list(dict.fromkeys((*others, *model.refused, *left)))
    names, more = names_of(roles.ordered(mine), others)
    drop = [*kept, *more, *names_of([s for s in sites if s.path in left and _any(literal, s.path)], list(chosen))[0]]
    resolved = rule.model_copy(update={"targets": (*literal, *names), "exclude": tuple(dict.fromkeys(drop))})
    return resolved, _notes(words, mine, names, roles)


def _named(word: str, sites: Sequence[Site]) -> bool:
    return any(matches(word, site.path) for site in sites)


def _any(targets: Sequence[str], path: str) -> bool:
    return any(matches(target, path) for target in targets)


def _told(word: str, roles: Roles, model: SiteMap) -> list[Site]:
    """The weights of a set. Raises SiteError where the model's names tell none, with the roles that it has."""
    found = roles.of(word)
    if found:
        return found
    counts = Counter(_suffixes(s.path)[0] for s in sorted(model.sites, key=_rank_of(roles)) if s.kind != "embedding")
    rows = [f"{role} ({count})" for role, count in list(counts.items())[:12]]
    sets = " or ".join(name for name in ("all-linear", "convolutions") if name != word and roles.of(name))
    top = next(iter(counts), "")
    raise SiteError(
        f"the weights of {word!r} cannot be told by the names of {model.name or 'this model'}",
        got=f"{', '.join(rows)}{', ...' if len(counts) > 12 else ''}",
        hint=f"name the weights to adapt, as in targets=[{top!r}] (--target {top})" + (f"; or {sets}" if sets else ""),
    )


def _rank_of(roles: Roles) -> Callable[[Site], int]:
    """Weights of layers before the rest, linear ones before convolutions before other parameters."""
    linear, conv = {s.path for s in roles.all_linear()}, {s.path for s in roles.convolutions()}

    def order(site: Site) -> int:
        kind = 0 if site.path in linear else 1 if site.path in conv else 2
        return 3 * ("layer" not in site.coordinates) + kind

    return order


def names_of(sites: Sequence[Site], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Literal targets that match the sites, and the excludes that keep the other paths out."""
    targets: list[str] = []
    excludes: list[str] = []
    paths = [site.path for site in sites]
    for path in paths:
        if _any(targets, path) and not _any(excludes, path):
            continue
        name, more = _name_of(path, paths, others)
        targets.append(name)
        excludes += [target for target in more if target not in excludes]
    return targets, excludes


def _name_of(path: str, mine: Sequence[str], others: Sequence[str]) -> tuple[str, list[str]]:
    """The shortest suffix of a path that no other has; or the longest, with what others have to be left out by."""
    suffixes = _suffixes(path)
    for suffix in suffixes:
        if not any(matches(suffix, other) for other in others):
            return suffix, []
    excludes: list[str] = []
    for other in (other for other in others if matches(suffixes[-1], other)):
        if not _any(excludes, other):
            apart = next((s for s in _suffixes(other) if not any(matches(s, path) for path in mine)), None)
            if apart is None:
                return path, []
            excludes.append(apart)
    return suffixes[-1], excludes


def _suffixes(path: str) -> list[str]:
    """Suffixes of a path behind its last number, shortest first: `dense`, `output.dense`, `attention.output.dense`."""
    base, bracket, part = path.partition("[")
    part = "" if part[:-1].isdecimal() else bracket + part  # all experts of one tensor have its name
    names: list[str] = []
    found: list[str] = []
    for name in reversed(base.split(".")):
        if name.isdecimal() and found:
            break
        names.insert(0, name)
        if not name.isdecimal():
            found.append(".".join(names) + part)
    return found or [path]


def _notes(words: Sequence[str], sites: Sequence[Site], names: Sequence[str], roles: Roles) -> tuple[str, ...]:
    """What the sets came to: `64 sites: q_proj and v_proj of 32 layers`."""
    if not sites:
        return ()
    layers = {(s.coordinates.get("stack"), s.coordinates.get("layer")) for s in sites if "layer" in s.coordinates}
    experts = {s.coordinates["expert"] for s in sites if "expert" in s.coordinates}
    where = f" of {len(layers)} layer{'s' * (len(layers) > 1)}" if layers else ""
    where += f" with {len(experts)} experts" if experts else ""
    outside = sum("layer" not in site.coordinates for site in sites) if layers else 0
    where += f" and {outside} outside them" if outside else ""
    shown = [*names[:8], f"{len(names) - 8} more"] if len(names) > 8 else list(names)
    listed = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    found = [f"{len(sites)} site{'s' * (len(sites) > 1)}: {listed}{where} ({', '.join(words)})"]
    keys = [site for site in sites if "k" in roles.holds(site)] if list(words) == ["query-value"] else []
    fused = sorted({site.path.rpartition(".")[2] for site in keys})
    found += [f"{name} holds the key too, which is adapted with it: `parts` takes it apart" for name in fused]
    return tuple(found)
