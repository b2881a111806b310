"""Targets of an extraction: where a rule names none, it takes every weight that differs and that its format can hold.

Invariant: a weight that differs is in a rule, or has the reason why no rule that is free to take it can hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tensoradapt.axes import COORDINATES, parse
from tensoradapt.errors import SiteError, SpecError, TensorAdaptError
from tensoradapt.grouping import Group, group_sites
from tensoradapt.plan import overlap
from tensoradapt.presets import expand
from tensoradapt.sets import names_of, resolve
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Rule, Spec
from tensoradapt.targets import all_parts, select

WASTE = 10  # times the entries of its weights: a network of more parameters is no adapter of them


@dataclass
class Taken:
    """The rules that are made of free ones, and why some weights are in none of them, by their paths."""

    rules: list[Rule] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    errors: list[TensorAdaptError] = field(default_factory=list)


def taken(spec: Spec, model: SiteMap, differing: Collection[str]) -> tuple[Spec, dict[str, str]]:
    """The spec with targets in every rule, and why weights of the paths that differ are in none of them.

    A rule without targets takes what differs and no other rule names. Of several such rules each takes the weights of
    its `default` set, the last one the rest. Weights outside the layers, and embeddings, get groups of their own in
    formats that share factors. Raises what stands in the way where a free rule can hold none of its weights.
    """
    spec = expand(spec)
    if all(rule.targets for rule in spec.rules):
        return spec, {}
    named = [s for rule in spec.rules if rule.targets for s in select(model.sites, resolve(rule, model)[0])]
    free = [s for s in model.sites if s.path in differing and not any(overlap(s, other) for other in named)]
    found = Taken()
    claims = _claims([rule for rule in spec.rules if not rule.targets], free, model)
    for rule in spec.rules:
        if rule.targets:
            found.rules.append(rule)
        else:
            _take(found, rule, claims.pop(0), model)
    if not any(rule.targets for rule in found.rules) and found.errors:
        raise found.errors[0]
    return Spec(rules=tuple(found.rules)), found.reasons


def _claims(rules: Sequence[Rule], free: Sequence[Site], model: SiteMap) -> list[list[Site]]:
    """The weights that every free rule is to take."""
    gone: set[str] = set()
    claims: list[list[Site]] = []
    for rule in rules[:-1]:
        try:
            own = {site.path for site in select(model.sites, resolve(rule, model)[0])}
        except SiteError:  # the model's names do not tell its set
            own = set()
        mine = [site for site in all_parts(free, rule) if site.path in own - gone]
        claims.append(mine)
        gone |= {site.path for site in mine}
    return [*claims, _left(rules[-1], [site for site in all_parts(free, rules[-1]) if site.path not in gone], model)]


def _left(rule: Rule, sites: list[Site], model: SiteMap) -> list[Site]:
    """The sites that a rule's excludes leave."""
    if not rule.exclude or not sites:
        return sites
    everything = rule.model_copy(update={"targets": tuple(site.path for site in sites)})
    kept = {site.path for site in select(model.sites, resolve(everything, model)[0])}
    return [site for site in sites if site.path in kept]


def _take(found: Taken, rule: Rule, sites: list[Site], model: SiteMap) -> None:
    """Rules for the weights of a claim: one for those that may share factors, one for each of the others."""
    layered = any("layer" in site.coordinates for site in sites)
    odd = [s for s in sites if _shares(rule) and (s.kind == "embedding" or layered and "layer" not in s.coordinates)]
    own = {site.path for site in odd}
    main = [site for site in sites if site.path not in own]
    for members in _together(found, rule, main, model) if main else []:
        _add(found, rule, members, model)
    for site in odd:
        _add(found, _alone(rule, site), [site], model)


def _shares(rule: Rule) -> bool:
    """Whether weights of a rule may have factors in common."""
    axes = parse(rule.network)[1] if rule.format == "network" else rule.axes
    return rule.shapes != "separate" or bool({*COORDINATES, "site", "slot"} & {*axes})


def _together(found: Taken, rule: Rule, sites: list[Site], model: SiteMap) -> list[list[Site]]:
    """The weights that the format can hold: all in one rule; where they do not go together, those of a role in each."""
    if _refusal(rule, sites, model) is None and not _narrow(rule, sites):
        return [sites]
    roles: dict[object, list[Site]] = {}
    for site in sites:
        roles.setdefault((site.coordinates.get("role", site.path), site.shape), []).append(site)
    kept = [members for members in roles.values() if _holds(found, rule, members, model)]
    wide = [site for members in kept if not _narrow(rule, members) for site in members]
    if wide and _refusal(rule, wide, model) is None:
        return [wide, *(members for members in kept if _narrow(rule, members))]
    return kept


def _narrow(rule: Rule, sites: Sequence[Site]) -> bool:
    """Whether one of the sites would make slots so narrow that they share nothing: narrower than the rank."""
    rank = rule.rank if isinstance(rule.rank, int) else 1
    return rule.shapes == "slots" and rule.slot is None and min(min(s.out, s.inp) for s in sites) <= rank


def _holds(found: Taken, rule: Rule, sites: Sequence[Site], model: SiteMap) -> bool:
    """Whether a rule can hold some sites; if not, the reason is kept."""
    error = _refusal(rule, sites, model)
    if error is None:
        return True
    found.errors.append(error)
    reason = str(error).partition("\n")[0].removeprefix("group ")
    found.reasons |= dict.fromkeys((site.path for site in sites), f"the format cannot hold it: {reason}")
    return False


def _refusal(rule: Rule, sites: Sequence[Site], model: SiteMap) -> TensorAdaptError | None:
    """Why a rule cannot hold some sites together; None where it can."""
    paths = tuple(site.path for site in sites)
    try:
        taken = select(sites, rule.model_copy(update={"targets": paths, "exclude": (), "parts": {}}))
        groups = group_sites(rule, taken, model)
    except TensorAdaptError as error:
        return error
    return next(filter(None, map(_waste, groups)), None)


def _waste(group: Group) -> SpecError | None:
    """What to say of a group with far more trained parameters than entries: a side of its weights has no even folds."""
    trained = sum(map(group.diagram.numel, group.trainable))
    if trained <= WASTE * group.num_dense:
        return None
    return SpecError(f"{trained:,} parameters for {group.num_dense:,} entries")


def _add(found: Taken, rule: Rule, sites: Sequence[Site], model: SiteMap) -> None:
    """A rule with literal targets for some sites, if it can hold them."""
    if not _holds(found, rule, sites, model):
        return
    mine = {site.path for site in sites}
    others = [site.path for site in all_parts(model.sites, rule) if site.path not in mine]
    targets, exclude = names_of(sites, [*others, *model.refused])
    fields = {"targets": tuple(targets), "exclude": tuple(exclude), "train": () if found.rules else rule.train}
    found.rules.append(rule.model_copy(update=fields))


def _alone(rule: Rule, site: Site) -> Rule:
    """The rule for one weight that shares nothing: its network without the axes that number weights."""
    name = f"{rule.name}_{site.coordinates.get('role', site.path)}" if rule.name else ""
    if rule.format != "network":
        gone = [axis for axis in rule.axes if axis in COORDINATES]
        nodes = [f"{kind}_{axis}" for kind in ("core", "factor") for axis in gone]
        fields = {"axes": tuple(a for a in rule.axes if a not in gone), **_without(rule, nodes, gone)}
        return rule.model_copy(update={"name": name, **fields})
    parsed, axes = parse(rule.network)
    gone = [axis for axis in axes if axis in COORDINATES]
    left = {node: [i for i in indices if i not in gone] for node, indices in parsed.items()}
    text = ", ".join(f"{node}: {' '.join(indices)}" for node, indices in left.items() if indices)
    nodes = [node for node, indices in left.items() if not indices]
    fields = {"network": f"{text} -> {' '.join(a for a in axes if a not in gone)}", **_without(rule, nodes, gone)}
    return rule.model_copy(update={"name": name, **fields})


def _without(rule: Rule, nodes: Collection[str], axes: Collection[str]) -> dict[str, object]:
    """The fields of a rule that speak of nodes and axes, without some of them."""
    init = {node: law for node, law in rule.init.items() if node not in nodes}
    ranks = (
        {key: size for key, size in rule.rank.items() if key not in axes} if isinstance(rule.rank, dict) else rule.rank
    )
    return {
        "init": init,
        "rank": ranks,
        "compress": tuple(axis for axis in rule.compress if axis not in axes),
        "frozen": tuple(node for node in rule.frozen if node not in nodes),
    }
