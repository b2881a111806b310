"""Attaching: a plan becomes factors and hooks on a live model, or nothing changes at all.

Invariant: everything that can fail is tried before the first hook is registered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter, Host, owner_of, parameter_of
from tensoradapt.errors import AdapterError, FileError, SiteError, SpecError
from tensoradapt.grouping import Group, Placement
from tensoradapt.hooks import OutputHook, WeightHook
from tensoradapt.hooks import Site as HookedSite
from tensoradapt.init import WEIGHT, draw, from_weight, parse_law
from tensoradapt.io.native import read
from tensoradapt.lower import line
from tensoradapt.merging import view
from tensoradapt.plan import START, Plan, make_plan
from tensoradapt.scan import HOST, scan_module
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Spec


def attach(model: nn.Module, spec: Spec, name: str = "default", seed: int = 0) -> Adapter:
    """Plan a spec on a model, make its factors, and hook them in; the base is frozen and keeps every name.

    Raises SiteError, SpecError or ShapeError where the spec does not fit, AdapterError where the name is in use or the
    model is compiled. The model is untouched then.
    """
    _check_model(model, name)
    found = scan_module(model)
    plan = make_plan(spec, found)
    adapter = _prepare(model, plan, found, name)
    _check_random(plan, seed)
    _fill(adapter, _initial(model, plan, adapter, seed))
    for note in plan.notes:
        if "tied" in note:
            warnings.warn(note, stacklevel=2)
    return _install(model, adapter)


def load(path: str | Path, model: nn.Module, name: str = "default") -> Adapter:
    """Read an adapter file and attach it to a model. Raises FileError naming the file and what does not fit."""
    _check_model(model, name)
    saved = read(path)
    found = scan_module(model)
    _check_fits(saved.plan, found, saved.path)
    adapter = _prepare(model, saved.plan, found, name)
    _fill(adapter, saved.tensors)
    return _install(model, adapter)


def _check_model(model: nn.Module, name: str) -> None:
    if not name.isidentifier():
        raise AdapterError(
            f"{name!r} is no adapter name", expected="letters, digits and underscores, not starting with a digit"
        )
    host = model._modules.get(HOST)
    if host is not None and name in host._modules:
        raise AdapterError(
            f"the model has an adapter {name!r} already",
            expected=f"a name other than {', '.join(host._modules)}",
            hint=f"attach(..., name='{name}_2'), or detach() the first",
        )
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise AdapterError(
            "the model is compiled: hooks added now would be ignored", hint="attach first, then torch.compile"
        )


def _check_random(plan: Plan, seed: int) -> None:
    if seed < 0:
        raise SpecError("a seed is not negative", got=seed)
    for factor in plan.factors.values():
        if factor.law != WEIGHT:
            parse_law(factor)


def _check_fits(plan: Plan, found: SiteMap, file: Path) -> None:
    """Every saved site and extra parameter is in the model, with its shape."""
    live = {site.owner: site for site in found.sites}
    for placement in (p for group in plan.groups for p in group.placements):
        site, mine = placement.site, live.get(placement.site.owner)
        if mine is None:
            raise FileError(
                f"{file} adapts {site.path}, which the model lacks",
                got=found.name,
                expected=plan.model or "the model it was made for",
                hint="load it onto the model it was trained on",
            )
        whole = site.kind == "parameter" and site.layout != mine.layout
        shape = mine.shape[::-1] if whole else mine.shape
        if (
            site.shape[1:] != shape[1:]
            or (site.rows is None and site.shape != shape)
            or (site.rows and site.rows[1] > shape[0])
        ):
            raise FileError(
                f"{site.path} has another shape than in {file}",
                got=shape,
                expected=site.shape,
                hint="load it onto the model it was trained on",
            )
    for path, extra in plan.extras.items():
        if found.parameters.get(path) != extra:
            raise FileError(
                f"{file} trains {path}, which the model lacks or has in another shape",
                got=found.parameters.get(path),
                expected=extra,
                hint="give the model the same head",
            )


def _prepare(model: nn.Module, plan: Plan, found: SiteMap, name: str) -> Adapter:
    """The adapter with the line of every site, and empty factors on the devices of their weights."""
    adapter = Adapter(plan, name, model)
    live = {(site.owner, site.index): site for site in found.sites}
    for group in plan.groups:
        for placement in group.placements:
            site = _live(placement.site, live)
            now = replace(placement, site=site)
            if site.kind == "linear" or site.rows is None or site.delivery == "weight":
                adapter._lines[site.path] = (group, site, line(group, now))
            for path in site.joined:
                adapter._lines[path] = _joined(group, now, live[path, None])
    _check_extras(model, plan)
    devices = {g.name: _device(model, g) for g in plan.groups}
    for key, factor in plan.factors.items():
        owner, _, leaf = key.rpartition(".")
        device = next(devices[g.name] for g in plan.groups if key in g.store.values())
        bank = adapter.stored[owner] if owner in adapter.stored else nn.ParameterDict()
        adapter.stored[owner] = bank
        for suffix, trained in (("", factor.trainable), *(((START, False),) if factor.copied else ())):
            empty = torch.empty(factor.shape, dtype=getattr(torch, factor.dtype), device=device)
            bank[leaf + suffix] = nn.Parameter(empty, requires_grad=trained)
    for path in plan.extras:
        owner_module, leaf = owner_of(model, path)
        adapter.extra[path.replace(".", "/")] = nn.Parameter(owner_module._parameters[leaf].detach().clone())  # type: ignore[union-attr]
    adapter.train(model.training)
    return adapter


def _live(saved: Site, live: Mapping[tuple[str, int | None], Site]) -> Site:
    """A planned site with what the live model says of its delivery: quantising a base, say, changes its modules."""
    mine = live[saved.owner, saved.index]
    layout = saved.layout if mine.kind == "parameter" else mine.layout
    return replace(
        saved, delivery=mine.delivery, kind=mine.kind, layout=layout, aliases=mine.aliases, tensor=mine.tensor
    )


def _joined(group: Group, placement: Placement, twin: Site) -> tuple[Group, Site, object]:
    """The line of a tied module: the same tensor, the other way round where the layouts differ."""
    transpose = twin.layout != placement.site.layout
    return group, twin, line(group, placement, twin.kind, transpose=transpose)


def _check_extras(model: nn.Module, plan: Plan) -> None:
    adapted = {parameter_of(model, p.site) for g in plan.groups for p in g.placements}
    host = model._modules.get(HOST)
    trained = {key.replace("/", "."): a.name for a in (host._modules.values() if host else ()) for key in a.extra}  # type: ignore[union-attr]
    for path in plan.extras:
        if path in adapted:
            raise SpecError(
                f"{path} is both adapted and trained whole", hint="exclude the site, or leave its module out of train"
            )
        if path in trained:
            raise AdapterError(
                f"{path} is trained by the adapter {trained[path]!r} already", hint="leave it out of train"
            )


def _device(model: nn.Module, group: Group) -> torch.device:
    owner, name = owner_of(model, parameter_of(model, group.placements[0].site))
    held = owner._parameters.get(name)
    held = held if held is not None else next(model.parameters(), None)
    return held.device if held is not None else torch.device("cpu")


def _initial(model: nn.Module, plan: Plan, adapter: Adapter, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every factor's initial value: drawn from its law, or taken from the weight."""
    taken: dict[str, Tensor] = {}
    for group in plan.groups:
        if WEIGHT in group.laws.values():
            site = adapter._lines[group.paths[0]][1]
            owner, name = owner_of(model, parameter_of(model, site))
            weight = view(owner._parameters[name].detach(), site)  # type: ignore[union-attr]
            taken |= {group.store[node]: tensor for node, tensor in from_weight(group, weight).items()}
    for key, factor in plan.factors.items():
        held = adapter.stored[key.rpartition(".")[0]][key.rpartition(".")[2]]
        yield key, taken[key] if key in taken else held.detach() if held.is_meta else draw(factor, seed)


def _fill(adapter: Adapter, values: Iterator[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
    """Copy values into the stored tensors; the frozen start of a difference is the value too, unless it is given."""
    held = adapter.tensors()
    given = dict(values.items() if hasattr(values, "items") else values)
    with torch.no_grad():
        for key, tensor in held.items():
            value = given.get(key, given.get(key.removesuffix(START)))
            if value is not None and not tensor.is_meta:
                if value.dtype != tensor.dtype and not key.startswith("extra."):
                    tensor.data = tensor.data.to(value.dtype) if key in given else tensor.data
                tensor.copy_(value)


def _install(model: nn.Module, adapter: Adapter) -> Adapter:
    """Freeze the base, register the adapter, and hook every site."""
    host = model._modules.get(HOST)
    if host is None:
        host = Host({name: p.requires_grad for name, p in model.named_parameters()})
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.add_module(HOST, host)
    host.add_module(adapter.name, adapter)
    for path, (group, site, _) in adapter._lines.items():
        if site.delivery == "output":
            hook = OutputHook(
                adapter, HookedSite(path, site.kind, group.scale, group.rule.dropout, group.rule.dropout_at, site.rows)
            )
            adapter._handles.append(model.get_submodule(site.owner).register_forward_hook(hook, with_kwargs=True))
        else:
            adapter._addends.setdefault(parameter_of(model, site), []).append(path)
    for key in adapter._addends:
        _shadow(model, adapter, key, key, copy=False)
    for key in adapter.extra:
        _shadow(model, adapter, key.replace("/", "."), f"extra:{key}", copy=True)
    return adapter


def _shadow(model: nn.Module, adapter: Adapter, parameter: str, key: str, *, copy: bool) -> None:
    """Hook the call during which a parameter is used: of its own module, or of the nearest above that is called."""
    owner, name = owner_of(model, parameter)
    hook = WeightHook(adapter, key, owner, name, copy=copy)
    caller = caller_of(model, parameter)
    adapter._handles.append(caller.register_forward_pre_hook(hook.before))
    adapter._handles.append(caller.register_forward_hook(hook.after, always_call=True, prepend=True))


def caller_of(model: nn.Module, parameter: str) -> nn.Module:
    """The module whose call uses a parameter: its owner, unless that has no forward or its parent bypasses it."""
    path = parameter.rpartition(".")[0]
    while True:
        module = model.get_submodule(path)
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        bypassed = isinstance(parent, nn.MultiheadAttention) and parent is not module
        if type(module).forward is not nn.Module.forward and not bypassed:
            return module
        if not path:
            raise SiteError(f"no module whose call uses {parameter} was found", hint="exclude it")
        path = path.rpartition(".")[0]
