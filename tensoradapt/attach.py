"""Attaching: a plan becomes factors and hooks on a live model, or nothing changes at all.

Invariant: everything that can fail is tried before the first hook is registered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.callers import callers_of, held_by
from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.handover import stand_in
from tensoradapt.hooks import OutputHook, WeightHook, hooking
from tensoradapt.hooks import Site as HookedSite
from tensoradapt.host import HOST, Bank, Host, home_of, host_of, slashed
from tensoradapt.init import WEIGHT, draw, from_weight, parse_law, require_seed
from tensoradapt.io.base import check_base
from tensoradapt.io.conversion import conversion_of, named_as
from tensoradapt.io.renamed import fitted
from tensoradapt.io.saved import Savable, as_saved
from tensoradapt.layouts import KNOWN, crossed, turns, viewed
from tensoradapt.lower import Line, line
from tensoradapt.offload import Within, loader_of
from tensoradapt.parts import plain_weight
from tensoradapt.passes import PassHook
from tensoradapt.placing import Placement
from tensoradapt.plan import START, Plan, make_plan
from tensoradapt.presets import SpecLike, as_spec
from tensoradapt.quantised import admit_training, is_plain, kind_of, untrainable
from tensoradapt.replicas import Known
from tensoradapt.scan import held_weight, known_base, module_at, owner_of, parameter_of, scan_module
from tensoradapt.sharded import check_site, sharded_by
from tensoradapt.sites import Site, SiteMap
from tensoradapt.standins import table_of
from tensoradapt.targets import delivered


def attach(model: nn.Module, spec: SpecLike, name: str = "default", seed: int = 0) -> Adapter:
    """Plan a spec on a model, make its factors, and hook them in; the base is frozen and keeps every name.

    Raises SiteError, SpecError or ShapeError where the spec does not fit, AdapterError where the name is in use or the
    model is compiled. The model is untouched then.
    """
    _check_model(model, name, "ta.attach(model, spec)")
    found = scan_module(model)
    plan = make_plan(as_spec(spec, "ta.attach(model, spec)"), found)
    _check_apart(model, plan)
    adapter = _prepare(model, plan, found, name)
    _check_random(plan, seed)
    adapter._seed = seed
    _fill(adapter, _initial(model, plan, adapter, seed))
    tied = (note for note in plan.notes if "tied" in note)
    for note in filter(None, (*tied, *_without_dropout(adapter), untrainable(model))):
        warnings.warn(note, stacklevel=2)
    adapter.base = known_base(model, plan)
    return _install(model, adapter)


def load(path: Savable | str | Path, model: nn.Module, name: str = "default") -> Adapter:
    """Attach an adapter file, or an adapter in memory, to a model, whose names may have one prefix more or less.

    Warns where the model's weights are not those that the adapter was made on, as far as its file tells: a cast is
    none of that. Raises FileError naming what does not fit.
    """
    _check_model(model, name, "ta.load(path, model)")
    found = scan_module(model)
    saved = fitted(named_as(as_saved(path), conversion_of(model)), found, type(model).__name__)
    adapter = _prepare(model, saved.plan, found, name)
    _fill(adapter, saved.tensors)
    check_base(saved.base, saved.plan, partial(held_weight, model), saved.where)
    now = known_base(model, saved.plan)
    adapter.base = now if "name" in now else {**saved.base, **now}
    return _install(model, adapter)


def _check_model(model: nn.Module, name: str, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise AdapterError(
            "this is no model", got=type(model).__name__, expected="an nn.Module", hint=f"the order is {call}"
        )
    host = host_of(model)
    if not isinstance(name, str) or not name.isidentifier() or hasattr(Host({}), name):
        raise AdapterError(
            f"{name!r} is no adapter name", expected="letters, digits and underscores, and no name of a module's method"
        )
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
    how = sharded_by(model)
    if how:
        raise AdapterError(
            f"the model is wrapped by {how}, which would not know of the factors: every process would train its own",
            hint="attach first, then wrap or shard the model",
        )
    others = {adapter.name for adapter in hooking(model) if adapter._model[0] is not model}
    if others:
        raise AdapterError(
            "a module of this model carries an adapter that was attached to a part of it, or to a larger model",
            got=", ".join(sorted(others)),
            hint="attach both to the same module, or detach() the first",
        )


def _check_random(plan: Plan, seed: int) -> None:
    require_seed(seed)
    for factor in plan.factors.values():
        if factor.law != WEIGHT:
            parse_law(factor)


def _prepare(model: nn.Module, plan: Plan, found: SiteMap, name: str) -> Adapter:
    """The adapter with the line of every site, and empty factors on the devices of their weights."""
    adapter = Adapter(plan, name, model)
    live = {(site.owner, site.index): site for site in found.sites}
    adapter.replan(plan, lines_of(plan, live))
    _check_extras(model, plan)
    for path, (_, site, _) in adapter._lines.items():
        check_site(path, *owner_of(model, parameter_of(model, site)))
        if site.delivery == "weight":
            adapter._weighted.setdefault(parameter_of(model, site), []).append(path)
    adapter._callers = {key: callers_of(model, key, adapter, found) for key in (*adapter._weighted, *plan.extras)}
    adapter.passes.held = held_by(model, adapter)
    adapter.passes.fused = any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    _make_tensors(model, plan, adapter)
    adapter.train(model.training)
    return adapter


def lines_of(plan: Plan, live: Mapping[tuple[str, int | None], Site]) -> dict[str, tuple[Group, Site, Line]]:
    """The group, the live site and the line of every path that a plan adapts; `live` holds sites by owner and index."""
    lines = {}
    for group in plan.groups:
        for placement in group.placements:
            mine = live[placement.site.owner, placement.site.index]
            turned = mine.layout in KNOWN and turns(placement.site, mine)
            site = delivered(_live(placement.site, mine, turned=turned), group.rule)
            now = replace(placement, site=site)
            lines[site.path] = (group, site, line(group, now, transpose=turned))
            for path in site.joined:
                lines[path] = _joined(group, now, delivered(live[path, None], group.rule), turned=turned)
    return lines


def _make_tensors(model: nn.Module, plan: Plan, adapter: Adapter) -> None:
    """Empty factors, and copies of the parameters that are trained whole."""
    devices = {key: device for g in reversed(plan.groups) for device in [_device(model, g)] for key in g.store.values()}
    for key, factor in plan.factors.items():
        owner, _, leaf = key.rpartition(".")
        if owner not in adapter.stored._modules:
            adapter.stored[owner] = Bank()
        for suffix, trained in (("", factor.trainable), *(((START, False),) if factor.copied else ())):
            empty = torch.empty(factor.shape, dtype=getattr(torch, factor.dtype), device=devices[key])
            adapter.stored[owner][leaf + suffix] = nn.Parameter(empty, requires_grad=trained)
    for path in plan.extras:
        owner_module, leaf = owner_of(model, path)
        adapter.extra[slashed(path)] = nn.Parameter(owner_module._parameters[leaf].detach().clone())  # type: ignore[union-attr]


def _live(saved: Site, mine: Site, *, turned: bool) -> Site:
    """A planned site with what the live model says of its delivery: quantising a base, say, changes its modules.

    Where the module does not tell its layout, the site's own says how the delta lies in the parameter.
    """
    stated = replace(mine, shape=saved.shape[::-1] if turned else saved.shape)
    stated = stated if mine.layout in KNOWN else viewed(saved, mine)
    return replace(
        saved,
        **{name: getattr(stated, name) for name in ("shape", "layout")},
        **{name: getattr(mine, name) for name in ("delivery", "kind", "aliases", "tensor")},
    )


def _joined(group: Group, placement: Placement, twin: Site, *, turned: bool) -> tuple[Group, Site, Line]:
    """The line of a tied module: the same tensor, the other way round where the layouts differ."""
    return group, twin, line(group, placement, twin.kind, transpose=crossed(twin, placement.site) != turned)


def _check_apart(model: nn.Module, plan: Plan) -> None:
    """Nothing is both adapted and trained whole, as it may be in an adapter of PEFT's that is loaded."""
    adapted = {parameter_of(model, p.site) for g in plan.groups for p in g.placements}
    both = next((path for path in plan.extras if path in adapted), None)
    if both is not None:
        raise SpecError(
            f"{both} is both adapted and trained whole", hint="exclude the site, or leave its module out of train"
        )


def _check_extras(model: nn.Module, plan: Plan) -> None:
    trained = {path: other.name for other in hooking(model) for path in other.plan.extras}
    for path in plan.extras:
        owner, name = owner_of(model, path)
        if not is_plain(owner._parameters[name]):
            raise AdapterError(
                f"{path} cannot be trained whole: it is quantised or sharded",
                got=kind_of(owner._parameters[name]),
                hint="keep its module out of the quantisation (transformers: llm_int8_skip_modules, "
                "modules_to_not_convert), or leave it out of train",
            )
        if loader_of(model, path, owner._parameters[name]) is not None:
            raise AdapterError(
                f"{path} cannot be trained whole: it is offloaded by accelerate, and loaded anew at every call",
                hint="keep its module on a device in the device_map, or leave it out of train",
            )
        if path in trained:
            raise AdapterError(
                f"{path} is trained by the adapter {trained[path]!r} already", hint="leave it out of train"
            )


def _device(model: nn.Module, group: Group) -> torch.device:
    key = parameter_of(model, group.placements[0].site)
    owner, name = owner_of(model, key)
    held = owner._parameters.get(name)
    held = held if held is not None else next(model.parameters(), None)
    loader = loader_of(model, key, held)
    return loader.device if loader else held.device if held is not None else torch.device("cpu")


def _initial(model: nn.Module, plan: Plan, adapter: Adapter, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every factor's initial value: drawn from its law, or taken from the weight."""
    taken: dict[str, Tensor] = {}
    for group in plan.groups:
        if WEIGHT in group.laws.values():
            site = adapter._lines[group.paths[0]][1]
            taken |= {group.store[n]: tensor for n, tensor in from_weight(group, plain_weight(model, site)).items()}
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
    """Freeze the base, register the adapter, and hook every site; all of it, or nothing where an interrupt comes."""
    host = host_of(model)
    if host is None:
        host = Host({name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)})
    with host.alone("attaching"):
        try:
            _register(model, adapter, host)
            _hook(model, adapter, host)
        except BaseException:  # Ctrl-C too
            adapter.leave(host)
            raise
    return adapter


def _register(model: nn.Module, adapter: Adapter, host: Host) -> None:
    if not len(host):
        home_of(model).add_module(HOST, host)
        host.quantised = admit_training(model)
        for parameter in model.parameters():
            parameter.requires_grad = False
    host.add_module(adapter.name, adapter)
    stand_in(model, host)


def _hook(model: nn.Module, adapter: Adapter, host: Host) -> None:
    for path, (group, site, _) in adapter._lines.items():
        if site.delivery == "output":
            hook = OutputHook(
                adapter, HookedSite(path, site.kind, group.scale, group.rule.dropout, group.rule.dropout_at, site.rows)
            )
            adapter._handles.append(module_at(model, site.owner).register_forward_hook(hook, with_kwargs=True))
    for key in dict.fromkeys((*adapter._weighted, *adapter.plan.extras)):
        owner, leaf = owner_of(model, key)
        loader = loader_of(model, key, owner._parameters.get(leaf))
        table_of(owner).users.append(adapter)
        shadow = WeightHook(adapter, key, owner, leaf, loaded=loader is not None)
        for path in adapter._callers[key]:
            caller = module_at(model, path)
            if loader is not None and loader.path == path:
                adapter._handles.append(Within(caller, shadow.before, shadow.after))
                continue
            adapter._handles.append(caller.register_forward_pre_hook(shadow.before))
            adapter._handles.append(caller.register_forward_hook(shadow.after, always_call=True, prepend=True))
    watching = PassHook(adapter, host.lock)
    adapter._handles.append(model.register_forward_pre_hook(watching.before, prepend=True))
    adapter._handles.append(model.register_forward_hook(watching.stop, always_call=True, prepend=True))
    adapter._handles.append(model.register_forward_hook(watching.after, with_kwargs=True))
    adapter._handles.append(model.register_forward_pre_hook(Known(adapter)))


def _without_dropout(adapter: Adapter) -> list[str]:
    """What to say of sites whose rule has a dropout that their delivery cannot apply."""
    deaf = [
        path
        for path, (group, site, _) in adapter._lines.items()
        if group.rule.dropout
        and (site.delivery == "weight" or (site.kind, group.rule.dropout_at) == ("embedding", "in"))
    ]
    return [f"dropout has no effect on {', '.join(deaf[:4])}{' ...' if len(deaf) > 4 else ''}"] if deaf else []
