"""Scanning: a live module (also on the meta device), a config, a model folder or a checkpoint -> its sites.

Invariant: a module that neither a hook on its output nor its weight at use can serve is in `refused`, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensoradapt.budget import BudgetTable, SolvedSpec, solve, tabulate
from tensoradapt.calls import computed, conv1d_class, holds_codes, is_plain_call
from tensoradapt.errors import FileError, SiteError
from tensoradapt.grouping import Progress
from tensoradapt.heads import heads_in
from tensoradapt.host import HOST
from tensoradapt.io.base import WEIGHTS, fingerprint
from tensoradapt.io.config import built, config_in
from tensoradapt.io.hub import cached
from tensoradapt.io.names import plain_names
from tensoradapt.io.wrapped import inside, own_modules
from tensoradapt.layouts import parameters_of
from tensoradapt.paths import expand, origin
from tensoradapt.plan import Plan, make_plan
from tensoradapt.presets import SpecLike, as_spec, as_specs
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.readers import readers_of
from tensoradapt.sites import Site, SiteMap, expert_sites, from_headers, from_mapping, placed
from tensoradapt.spec import Rule, Spec

SOURCES = "a module, a mapping {path: (out, in)}, a config.json, a model folder, a safetensors file, or a cached hub id"
Model = nn.Module | SiteMap | Mapping[str, Any] | str | Path


def scan(model: Model) -> SiteMap:
    """The sites of a module, a `{path: (out, in)}` mapping, a config.json, a model folder, safetensors files, a hub id.

    A hub id, `org/name` or `org/name@revision`, is looked for in the local cache. Raises FileError.
    """
    return told_by(model)[1]


def told_by(model: Model) -> tuple[nn.Module | None, SiteMap]:
    """The module that a model means, itself or what its config describes on the meta device, and its sites.

    No module where shapes alone are known: a mapping, or files without a config. Raises FileError.
    """
    if isinstance(model, nn.Module):
        return model, scan_module(model)
    if isinstance(model, SiteMap | Mapping):
        return None, model if isinstance(model, SiteMap) else from_mapping(model)
    given: Any = model
    if not isinstance(given, str | Path):
        swapped = "the spec comes first: ta.plan(spec, model)" if isinstance(given, Spec | Rule) else None
        raise FileError("this is no model", got=type(model).__name__, expected=SOURCES, hint=swapped)
    path = expand(model)
    config = config_in(path)
    if config is not None:
        return described_by(config)
    if path.exists():
        return None, from_headers(path, plain_names)
    folder, name, _ = cached(str(model), None, "model", SOURCES)
    module, found = told_by(folder)
    return module, replace(found, name=name)


def plan(spec: SpecLike, model: Model, *, progress: Progress | None = None) -> Plan:
    """The plan of a spec on a model: groups, diagrams, counts, bytes and FLOP per token, no tensor made.

    Raises SiteError, SpecError, ShapeError or FileError, each naming what is at fault and what to write instead.
    """
    return make_plan(as_spec(spec), scan(model), progress)


def budget(
    specs: SpecLike | Mapping[str, SpecLike] | Sequence[SpecLike],
    model: Model,
    ranks: Iterable[int],
    *,
    progress: Progress | None = None,
) -> BudgetTable:
    """Parameters, bytes and FLOP per token of specs over a range of ranks on one model.

    `specs` is one spec, a list, or a mapping from label to spec. Raises RankError, SiteError, SpecError or FileError.
    """
    return tabulate(as_specs(specs, "ta.budget(specs, model, ranks)"), scan(model), ranks, progress)


def solve_rank(spec: SpecLike, model: Model, *, max_parameters: int) -> SolvedSpec:
    """The largest rank, and the largest ranks by group, with at most `max_parameters` trainable entries.

    The answer is a spec with those ranks, and has `rank`, `ranks` (group -> rank) and `num_trainable` beside its rules.
    Extra trained modules do not count. Raises RankError where rank 1 is too much, SpecError where the spec has no rank.
    """
    spec = as_spec(spec, "ta.solve_rank(spec, model, max_parameters=30_000)")
    return solve(spec, scan(model), max_parameters)


def described_by(path: Path) -> tuple[nn.Module, SiteMap]:
    """The model that a Hugging Face config describes, on the meta device, and its sites. Raises FileError."""
    made: Any = built(path)
    return made, replace(scan_module(made), name=str(origin(path)))


def scan_module(model: nn.Module) -> SiteMap:
    """The sites of a live module: every adaptable weight, its layout, its delivery, and what it is tied to.

    Names are those inside wrappers (DataParallel, FSDP, torch.compile).
    """
    model = inside(model)
    modules = {path: module for path, module in own_modules(model) if HOST not in path.split(".")}
    parameters = {
        f"{path}.{name}" if path else name: parameter
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None and not is_lazy(parameter)
    }
    refused = {path: reason for path, module in modules.items() if (reason := _reason(module))}
    found = [s for path, m in modules.items() if path not in refused for s in _module_sites(path, m, modules)]
    unfit = {site.path: (site, why) for site in found if (why := _packed(site, modules, parameters))}
    refused |= {path: why for path, (site, why) in unfit.items() if site.delivery == "weight"}
    packed = {path: why for path, (site, why) in unfit.items() if site.delivery == "output"}
    readers = readers_of(modules)
    kept = [replace(s, delivery="weight") if s.tensor in readers and s.path not in packed else s for s in found]
    sites = placed([site for site in kept if site.path not in refused])
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    made = SiteMap(tuple(_tied(sites, parameters)), **heads_in(model, modules), parameters=shapes, refused=refused)
    made = replace(made, readers=readers, packed=packed)
    return replace(made, ties=_ties(model), num_parameters=_total(found, parameters))


def _ties(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter that has several, by the others: of modules that stand in two places too."""
    named = model.named_parameters(remove_duplicate=False)
    names = [(name, id(parameter)) for name, parameter in named if HOST not in name.split(".")]
    first = {held: name for name, held in reversed(names)}
    return {name: first[held] for name, held in names if name != first[held]}


def _total(sites: Sequence[Site], parameters: Mapping[str, nn.Parameter]) -> int:
    """The entries of all parameters: tied ones once, and quantised ones as many as the weight has that they hold."""
    once = {id(parameter): name for name, parameter in parameters.items()}
    whole = {s.tensor: s.numel for s in sites if s.kind == "linear" and s.index is None and s.rows is None}
    return sum(whole.get(name, parameters[name].numel()) for name in once.values())


def _reason(module: nn.Module) -> str:
    """Why a module cannot be adapted; empty where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule runs compiled code that no hook reaches"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its shape is not known before its first call"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} hands its weights to a fused kernel as a flat list"
    if isinstance(module, nn.Bilinear | nn.modules.conv._ConvTransposeNd | nn.Conv3d):
        return f"{type(module).__name__} has a weight that is no (out, in) or (out, in, kh, kw)"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm rescales the rows in place at every look-up"
    return ""


def _module_sites(path: str, module: Any, modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    """The site of a module whose class is known, or those of the parameters of any other."""
    by_hook: dict[str, Any] = {"owner": path, "tensor": f"{path}.weight".removeprefix(".")}
    by_weight = {**by_hook, "delivery": "weight", "kind": "parameter"}
    turned = conv1d_class(module)
    if turned is not None:
        how = "output" if is_plain_call(module, turned) else "weight"
        yield Site(path, tuple(module.weight.shape[::-1]), layout="in out", **{**by_hook, "delivery": how})
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        plain = is_plain_call(module, nn.Embedding)
        shape: tuple[int, ...] = (module.embedding_dim, module.num_embeddings)
        yield Site(path, shape, layout="in out", **({**by_hook, "kind": "embedding"} if plain else by_weight))
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        called = is_plain_call(module, nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d)
        dims = len(module.kernel_size) if called and module.groups == 1 else 0
        kernel = (1, *module.kernel_size)[-2:]
        shape = (module.out_channels, module.in_channels // module.groups, *kernel)
        yield Site(path, shape, dims=dims, **({**by_hook, "kind": "conv"} if dims == 2 else by_weight))
    elif all(type(getattr(module, name, None)) is int for name in ("in_features", "out_features")):
        shape = (module.out_features, module.in_features)
        weight = module._parameters.get("weight")
        # nn.MultiheadAttention uses its out_proj's weight and never calls it
        called = not isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        if (called and is_plain_call(module, nn.Linear)) or holds_codes(module):
            yield Site(path, shape, **by_hook)
        elif computed(module, "weight") or (is_plain(weight) and weight.shape in (shape, shape[::-1])):
            kind = "linear" if isinstance(module, nn.Linear) and called else "parameter"
            layout = "out in" if weight is None or weight.shape == shape else "in out"
            yield Site(path, shape, layout=layout, **{**by_weight, "kind": kind})
        else:
            yield from _parameter_sites(path, module)
    else:
        yield from _parameter_sites(path, module)


def _packed(site: Site, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> str:
    """Why nothing can be put in the place of a module's weight; empty where it can."""
    held = parameters.get(site.tensor)
    if held is None:
        return _computed(modules[site.owner])
    return "" if is_plain(held) else f"its weight is quantised or sharded: {kind_of(held)}"


def _computed(module: nn.Module) -> str:
    """Why a weight that is computed at every call is refused, and what makes a parameter of it."""
    how, remove = computed(module, "weight") or ("computed from other parameters at every call", "")
    return f"its weight is {how}" + (f"; {remove} makes a parameter of it" if remove else "")


def _parameter_sites(path: str, module: nn.Module) -> Iterator[Site]:
    """Matrices that a module holds as parameters, and the experts of a 3-D one; biases are no weights."""
    layout = parameters_of(module)
    for name, parameter in module._parameters.items():
        full = f"{path}.{name}" if path else name
        shape = () if parameter is None or name.endswith("bias") else tuple(parameter.shape)
        if len(shape) == 2 and min(shape) > 0:
            own, turned = full.removesuffix(".weight"), shape[::-1] if layout == "in out" else shape
            yield Site(own, turned, layout=layout, delivery="weight", owner=own, tensor=full, kind="parameter")
        elif len(shape) == 3 and min(shape) > 0 and "expert" in full:
            yield from expert_sites(full, shape, layout)


def _tied(sites: Sequence[Site], parameters: Mapping[str, nn.Parameter]) -> list[Site]:
    """The sites with the first name of their tensor, and the other modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    first = {name: names for names in owners.values() for name in names}
    result = []
    for site in sites:
        names = first.get(site.tensor, [site.tensor])
        others = tuple(name.removesuffix(".weight") for name in names if name != site.tensor)
        result.append(replace(site, tensor=names[0], aliases=others) if others else site)
    return result


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    owner, _, name = path.rpartition(".")
    return module_at(model, owner), name


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, inside wrappers, also where a part of it has the name of a method (`train`, `type`)."""
    model = inside(model)
    for name in path.split(".") if path else ():
        found = model._modules.get(name)
        if found is None:
            raise SiteError(f"the model has no module {path!r}", got=name, expected=", ".join(model._modules))
        model = inside(found)
    return model


def parameter_of(model: nn.Module, site: Site) -> str:
    """The path of the parameter that holds a site's weight."""
    owner, name = owner_of(model, site.owner)
    return site.owner if name in owner._parameters else f"{site.owner}.weight"


def held_weight(model: nn.Module, site: Site) -> Tensor | None:
    """The parameter that holds a site's weight, or the one expert of it; None where its entries are not at hand."""
    owner, name = owner_of(model, parameter_of(model, site))
    held = owner._parameters.get(name)
    if held is None or held.is_meta or not is_plain(held):
        return None
    return held if site.index is None else held[site.index]


def known_base(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """What is known of a model as an adapter's base: where it is from, as its config says, and a fingerprint."""
    config = getattr(model, "config", None)
    said = getattr(config, "_name_or_path", None)
    weights = fingerprint(plan, partial(held_weight, model))
    found = origin(said) if isinstance(said, str) and said else None
    revision = getattr(config, "_commit_hash", None) or (found.revision if found else "")
    named = {"name": found.name, "hub": found.hub, "revision": revision} if found else {}
    return {**named, **({WEIGHTS: weights} if weights else {})}
