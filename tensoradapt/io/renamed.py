"""Adapters under other names: the same factors, for a model whose modules have a prefix more, or less.

Invariant: groups keep their names, their order and their tensors; only paths of sites and of trained modules change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from tensoradapt.errors import FileError
from tensoradapt.io.base import WEIGHTS, recorded
from tensoradapt.io.names import plain, sole
from tensoradapt.io.saved import Saved
from tensoradapt.layouts import KNOWN, check_rows, turns
from tensoradapt.sites import Site, SiteMap

Names = Callable[[str], str]
TELLS = "model= tells"  # how a note ends of what an import took a shape to be


def renamed(saved: Saved, by: Names, trained: Names) -> Saved:
    """The adapter with every site under the name that `by` gives it, and every parameter trained whole by `trained`."""
    plan = saved.plan
    extras = {trained(name): shape for name, shape in plan.extras.items()}
    tensors = {
        f"extra.{trained(key.removeprefix('extra.'))}" if key.startswith("extra.") else key: tensor
        for key, tensor in saved.tensors.items()
    }
    weights = {WEIGHTS: {by(path): row for path, row in recorded(saved.base).items()}}
    base = {**saved.base, **weights} if WEIGHTS in saved.base else saved.base
    moved = replace(saved, plan=replace(plan, extras=extras), tensors=tensors, base=base)
    return _with_sites(moved, lambda site: _site(site, by, trained))


def plainly(saved: Saved) -> Saved:
    """The adapter without wrappers' parts in its names, as one made on a compiled or sharded model may have them."""
    names = [*saved.sites, *saved.plan.extras]
    return renamed(saved, plain, plain) if any(plain(name) != name for name in names) else saved


def where_known(by: Names, parameters: Collection[str]) -> Names:
    """The same names for what then is one of a model's parameters; what is not, a head beside it, keeps its own."""
    return lambda name: other if (other := by(name)) in parameters else name


def _with_sites(saved: Saved, by: Callable[[Site], Site]) -> Saved:
    """The adapter with every site as a function gives it."""
    groups = [
        replace(group, placements=tuple(replace(p, site=by(p.site)) for p in group.placements))
        for group in saved.plan.groups
    ]
    return replace(saved, plan=replace(saved.plan, groups=tuple(groups)))


def _site(site: Site, by: Names, trained: Names) -> Site:
    names = {field: by(getattr(site, field)) for field in ("path", "owner", "tensor")}
    twin = lambda name: trained(f"{name}.weight").removesuffix(".weight")  # noqa: E731  # a head has no prefix, say
    lists = {field: tuple(map(twin, getattr(site, field))) for field in ("aliases", "joined")}
    return replace(site, **names, **lists)  # type: ignore[arg-type]


def fitted(saved: Saved, model: SiteMap, kind: str) -> Saved:
    """The adapter under a model's names: `bert.encoder...` on the bare encoder, and the other way round.

    Raises FileError where a site or a trained module is not in the model, with its shape; `kind` names its class.
    """
    saved = plainly(saved)
    sites = [placement.site for group in saved.plan.groups for placement in group.placements]
    live = {site.owner for site in model.sites}
    strange = {site.owner for site in sites} - live  # a head may have its name while all else has a prefix more
    by = sole(strange, live) if strange else None
    if by is not None and by.prefix:
        beside = lambda name: name if name in live or _owner(name) in live else by(name)  # noqa: E731
        saved = renamed(saved, beside, where_known(by, model.parameters))
    saved = with_twins(saved, model)
    _check_sites(saved, model, kind)
    saved = _replaced_where_tied(saved, model)
    _check_trained(saved, model, kind)
    return _stated(saved, model)


def _replaced_where_tied(saved: Saved, model: SiteMap) -> Saved:
    """The adapter with a weight that it both replaces and adapts replaced in every module that is tied to it.

    PEFT, whose adapters alone do both, restores such a weight in place.
    """
    adapted = {placement.site.tensor for group in saved.plan.groups for placement in group.placements}
    twins = {
        f"{twin}.weight": path
        for site in model.sites
        for path in (f"{site.owner}.weight",)
        if path in saved.plan.extras and path in adapted
        for twin in site.aliases
    }
    extras = {twin: saved.plan.extras[path] for twin, path in twins.items()} | dict(saved.plan.extras)
    tensors = {f"extra.{twin}": saved.tensors[f"extra.{path}"] for twin, path in twins.items()} | dict(saved.tensors)
    return replace(saved, plan=replace(saved.plan, extras=extras), tensors=tensors) if twins else saved


def _owner(path: str) -> str:
    """The module of a path: without the number of an expert, and the name of its weight."""
    return path.partition("[")[0].removesuffix(".weight")


def with_twins(saved: Saved, model: SiteMap) -> Saved:
    """The adapter with the tied modules that a model has: not with a head that a bare encoder lacks.

    Where the adapter is of tensors of no known model, all modules that hold one here have its delta.
    """
    there = {*model.parameters, *model.refused}
    live = {site.owner: site for site in model.sites if site.index is None}
    own = {site.owner for group in saved.plan.groups for site in (p.site for p in group.placements)}

    def kinds(site: Site) -> dict[str, str]:
        """The modules that have the delta too, with their kinds."""
        rows = dict(zip(site.joined, site.joined_kinds, strict=False))
        rows = {twin: kind for twin, kind in rows.items() if any(f"{name}.".startswith(f"{twin}.") for name in there)}
        held = live[site.owner].aliases if site.everywhere and site.owner in live else ()
        return rows | {twin: live[twin].kind for twin in held if twin in live and twin not in own}

    def kept(site: Site) -> Site:
        rows = kinds(site)
        same = [*rows] == [*site.joined]
        return site if same else replace(site, joined=tuple(rows), joined_kinds=tuple(rows.values()))

    return _with_sites(saved, kept)


def _check_sites(saved: Saved, model: SiteMap, kind: str) -> None:
    """Every saved site is in the model."""
    live = {(site.owner, site.index): site for site in model.sites}
    sites = [placement.site for group in saved.plan.groups for placement in group.placements]
    twins = [(twin, None, twin) for site in sites for twin in site.joined]
    for owner, index, path in [*((s.owner, s.index, s.path) for s in sites), *twins]:
        refused = next((model.refused[p] for p in (owner, owner.rpartition(".")[0]) if p in model.refused), None)
        if (owner, index) not in live and refused is not None:
            raise FileError(
                f"{saved.where} adapts {path}, which no adapter can change in this model",
                got=refused,
                hint="exclude it where the adapter is made; train= trains a module whole",
            )
        if (owner, index) not in live:
            raise FileError(
                f"{saved.where} adapts {path}, which the model lacks",
                got=f"a {kind}, with {next(iter(site.path for site in model.sites), 'no weight to adapt')}",
                expected=f"a model of the kind that it was made for{_named(saved)}",
                hint="load it onto the model it was trained on: its class, layers and sizes",
            )


def _stated(saved: Saved, model: SiteMap) -> Saved:
    """The adapter with the model's layouts where its own were not known. Raises FileError where a delta cannot lie so.

    Deltas that lie as the stored tensor does, the other way round than in the model, stay as they are.
    """
    live = {(site.owner, site.index): site for site in model.sites}
    guessed = next((note for note in saved.plan.notes if note.endswith(TELLS)), None)

    def stated(site: Site) -> Site:
        """The site with the model's layout where its own was not known."""
        here = live[site.owner, site.index]
        if _is_flat_kernel(site, here):
            return replace(site, shape=here.shape, kind=here.kind, dims=here.dims, layout=here.layout)
        if guessed and site.shape != here.shape:
            raise FileError(
                f"{site.path} has another shape than in {saved.where}",
                got=here.shape,
                expected=site.shape,
                hint=f"import_peft(folder, model=...) first, as {guessed}",
            )
        turned = turns(site, here, saved.where)
        check_rows(site, here, turned=turned)
        known = here.layout in KNOWN and site.layout not in KNOWN and not turned
        return replace(site, layout=here.layout, kind=here.kind) if known else site

    return _with_sites(saved, stated)


def _is_flat_kernel(site: Site, here: Site) -> bool:
    """Whether a saved delta has the kernel of a convolution here among its inputs, or along other axes."""
    flat = math.prod(site.shape[1:]) == math.prod(here.shape[1:])
    return len(here.shape) == 4 and site.shape != here.shape and site.out == here.out and flat and site.rows is None


def _check_trained(saved: Saved, model: SiteMap, kind: str) -> None:
    """Every parameter that was trained whole is in the model, with its shape."""
    for path, shape in saved.plan.extras.items():
        if model.parameters.get(path) == shape:
            continue
        if path in model.parameters:
            hint = f"give the model the same head; from_pretrained(..., num_labels={shape[0]}), say"
        else:
            hint = (
                "every weight that it adapts is in this model: load it onto the class that has "
                f"{path.partition('.')[0]!r} too, such as AutoModelForSequenceClassification for a classifier"
            )
        raise FileError(
            f"{saved.where} trains {path}, which the model lacks or has in another shape",
            got=f"a {kind}: {model.parameters.get(path, 'no such parameter')}",
            expected=shape,
            hint=hint,
        )


def _named(saved: Saved) -> str:
    return f", {saved.plan.model}" if saved.plan.model else ""
