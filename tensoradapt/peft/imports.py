"""PEFT folders in: a plan over presets that has PEFT's deltas, and the parameters that were trained whole.

Invariant: what is imported is all there is in the folder, or the folder is refused by file and key.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.renamed import TELLS
from tensoradapt.io.saved import Saved
from tensoradapt.io.shards import open_shard
from tensoradapt.layouts import EITHER, IN_OUT, OUT_IN
from tensoradapt.paths import expand, origin
from tensoradapt.peft.attention import INNER, NOTE, as_added, is_parameter, weights_of
from tensoradapt.peft.config import CONFIG, FROM_PEFT, WEIGHTS, Config, read_config
from tensoradapt.peft.families import FAMILIES, Found, projections
from tensoradapt.peft.keys import EMBEDDINGS, HEADS, Keys, sort_keys
from tensoradapt.peft.patterns import ends, targeted
from tensoradapt.peft.restored import kept
from tensoradapt.plan import Plan, make_plan
from tensoradapt.presets import preset
from tensoradapt.scan import Model, scan
from tensoradapt.sites import PICKLES, Site, SiteMap, placed
from tensoradapt.spec import Rule, Spec


def import_peft(path: str | Path, *, out: str | Path | None = None, model: Model | None = None) -> Saved:
    """A PEFT folder (LoRA, LoHa, LoKr or VeRA) as an adapter with PEFT's own deltas, written to `out` where given.

    `model` gives shapes that the folder lacks (the inputs of VeRA's modules, kernels of flattened convolutions), and
    is checked against it. Factors are float32, as PEFT loads them. Raises FileError naming the file and the key: on
    keys that are missing, unexpected or mis-prefixed, and on options whose delta is not that of their family.
    """
    path = expand(path)
    folder = path.parent if path.name in (CONFIG, WEIGHTS) else path
    config = read_config(folder)
    tensors = _read(folder)
    keys = sort_keys(str(folder / WEIGHTS), config, tensors)
    config.check_soon(len(keys.modules))
    live = {site.owner: site for site in scan(model).sites if site.index is None} if model is not None else None
    notes = _check_targets(config, keys, live)
    paths = {name: weights_of(name, keys.modules) for name in keys.modules}
    found = {paths[name]: _module(config, name, paths[name], keys, tensors, live) for name in keys.modules}
    found = _joined(found) if config.values.get("ensure_weight_tying") else found
    shared = {part: tensors[key] for part, key in keys.shared.items()}
    found, guessed = _with_inputs(config, found, shared, live)
    restored, compared = kept({name: tensors[key] for name, key in keys.restored.items()}, model)
    whole = {name: tensors[key] for name, key in keys.extras.items()} | restored
    extras = {f"extra.{name}": tensor for name, tensor in whole.items()}
    plan = _plan(config, found, extras)
    plan = replace(plan, notes=(*plan.notes, FROM_PEFT, *config.notes, *compared, *notes, *guessed))
    for note in (*config.notes, *compared, *notes, *guessed):
        warnings.warn(note, stacklevel=2)
    of = origin(plan.model)
    base = {"name": of.name, "hub": of.hub, "revision": str(config.values.get("revision") or of.revision)}
    plan = replace(plan, model=of.name)
    saved = Saved.of(plan, _stored(config, plan, found, shared) | extras, base)
    return saved if out is None else replace(saved, path=saved.save(out))


def _read(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors, factors in float32. Raises FileError on damage, and on pickles unopened."""
    file = folder / WEIGHTS
    if not file.exists():
        pickles = [found.name for found in sorted(folder.iterdir()) if found.suffix in PICKLES]
        raise FileError(
            f"no {WEIGHTS} in {folder}",
            got=f"{', '.join(pickles)}, which can run code when it is opened: not opened" if pickles else None,
            hint="load it where you trust it, and save it again, as safetensors" if pickles else None,
        )
    shard = open_shard(file)
    found = {key: shard.read(key).clone() for key in shard.header}
    for key, tensor in found.items():
        if not tensor.is_floating_point() or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
            raise FileError(
                f"{key!r} in {file} holds no finite numbers",
                got=f"{tuple(tensor.shape)} of {str(tensor.dtype)[6:]}",
                hint="save it again; sharded parameters are gathered first",
            )
    return found


def _check_targets(config: Config, keys: Keys, live: Mapping[str, Site] | None) -> tuple[str, ...]:
    """Notes on targets without factors. Raises FileError on factors that PEFT would drop, or not find."""
    values, file = config.values, config.file
    tied = (*EMBEDDINGS, *HEADS) if values.get("ensure_weight_tying") else ()
    own = [path for path in keys.modules if path.rpartition(".")[2] not in tied]
    stray = [path for path in own if not _targeted(config, path.partition(".base_layer")[0])]
    if stray:
        raise FileError(
            f"target_modules in {file} does not name {stray[0]}: PEFT would drop its factors without a word",
            got=str(values.get("target_modules"))[:200],
            hint="add it to target_modules, or remove its keys",
        )
    modules = [path for path, site in (live or {}).items() if site.tensor != path]  # a bare parameter is no target
    absent = [path for path in modules if path not in keys.modules and _targeted(config, path)]
    if absent and values.get("target_modules") not in (None, [], "all-linear"):
        raise FileError(f"target_modules in {file} names {absent[0]}, and the folder has no factors of it")
    names = values.get("target_modules")
    bare = [n for n in names if not any(ends(n, path) for path in keys.modules)] if isinstance(names, list) else []
    twice = (NOTE,) if any(path.endswith(INNER) for path in keys.modules) else ()
    return (*twice, *([f"target_modules names {', '.join(sorted(bare))}, and no factors are there"] if bare else []))


def _targeted(config: Config, path: str) -> bool:
    try:
        return targeted(config.values, path)
    except ValueError as error:  # SpecError, from an expression in the file
        raise FileError(f"target_modules or exclude_modules in {config.file}: {error}") from None


def _module(
    config: Config, name: str, path: str, keys: Keys, tensors: Mapping[str, Tensor], live: Mapping[str, Site] | None
) -> Found:
    """The factors of one of PEFT's modules in float32, with the shape and kind that the model has for its weight."""
    held = keys.modules[name]
    parts = {part: tensors[key].float() for part, key in held.items()}
    least = 1 if config.family == "VERA" else 2
    flat = next((part for part, tensor in parts.items() if tensor.dim() < least), None)
    if flat is not None:
        raise FileError(f"{held[flat]!r} beside {config.file} is no matrix", got=tuple(parts[flat].shape))
    found = as_added(name, FAMILIES[config.family](config, name, parts))
    if live is None:
        return replace(found, kind="parameter") if is_parameter(path) else found
    if path not in live:
        raise FileError(f"{config.file.parent} adapts {path}, which the model lacks", hint="give the model it is for")
    site = live[path]
    unlike = math.prod(site.shape) != math.prod(found.shape) and config.family != "VERA"
    if unlike or site.out != found.shape[0]:
        raise FileError(f"{path} has another shape than in {config.file.parent}", got=site.shape, expected=found.shape)
    return replace(found, shape=site.shape, kind=site.kind, layout=site.layout, dims=site.dims)


def _joined(found: dict[str, Found]) -> dict[str, Found]:
    """Modules with every head joined to the embedding whose factors it has, turned: PEFT tied the two."""
    tables = {path: module for path, module in found.items() if module.kind == "embedding"}
    result = dict(found)
    for path, module in found.items():
        ours = module.factors
        for other, table in tables.items():
            a, b = table.factors["core_in"], table.factors["core_out"]
            if path != other and torch.equal(ours["core_out"], a.mT) and torch.equal(ours["core_in"], b.mT):
                result[other] = replace(result[other], joined=(*result[other].joined, path))
                result.pop(path, None)
    return result


def _with_inputs(
    config: Config, found: dict[str, Found], shared: Mapping[str, Tensor], live: Mapping[str, Site] | None
) -> tuple[dict[str, Found], tuple[str, ...]]:
    """VeRA's modules with their number of inputs: of the model, or all of them as wide as the shared A."""
    if config.family != "VERA" or live is not None:
        return found, ()
    if "vera_A" not in shared:
        raise FileError(
            f"{config.file.parent} has neither vera_A nor the shapes to draw it for",
            hint="give model=, or the projections",
        )
    width = shared["vera_A"].shape[-1]
    note = f"every module of the VeRA is taken to have {width} inputs, as its file does not say: {TELLS}"
    return {path: replace(f, shape=(f.shape[0], width)) for path, f in found.items()}, (note,)


def _plan(config: Config, found: Mapping[str, Found], extras: Mapping[str, Tensor]) -> Plan:
    """The plan of a rule for every variation among the modules."""
    rules: dict[str, list[str]] = {}
    for path, module in found.items():
        variation = json.dumps([module.preset, module.parameters, module.fields], sort_keys=True)
        rules.setdefault(variation, []).append(path)
    sites = [
        Site(
            path,
            f.shape,
            layout=_layout(config, f),
            owner=path,
            tensor=path if is_parameter(path) else f"{path}.weight",
            kind=f.kind,
            dims=f.dims,
            delivery="weight" if f.kind == "parameter" else "output",
            aliases=f.joined,
            joined=f.joined,
            joined_kinds=tuple("linear" for _ in f.joined),
        )
        for path, f in found.items()
    ]
    name = config.values.get("base_model_name_or_path")
    shapes = {key.removeprefix("extra."): tuple(tensor.shape) for key, tensor in extras.items()}
    train = tuple(shapes)
    made = [
        _rule(found[paths[0]], paths, list(found), train if k == 0 else ()) for k, paths in enumerate(rules.values())
    ]
    return make_plan(
        Spec(rules=tuple(made)), SiteMap(placed(sites), name=name if isinstance(name, str) else "", parameters=shapes)
    )


def _layout(config: Config, module: Found) -> str:
    """How the module's weight is stored, which a folder does not say: PEFT turns a Conv1D's delta when it loads it."""
    if module.layout:
        return module.layout
    turned = IN_OUT if config.values.get("fan_in_fan_out") is True else EITHER
    return {"embedding": IN_OUT, "conv": OUT_IN}.get(module.kind, turned)


def _rule(module: Found, paths: list[str], others: list[str], train: tuple[str, ...]) -> Rule:
    """The preset's rule for some modules, named by their paths, and by an expression where a path is another's end."""
    ambiguous = {path for path in paths if any(ends(path, other) and other != path for other in others)}
    targets = tuple(f"re:{re.escape(path)}" if path in ambiguous else path for path in paths)
    fields = {key: value for key, value in module.fields.items() if key != "folds"}
    rule = preset(module.preset, **module.parameters, **fields, excess="keep", targets=targets, train=train).rules[0]
    given: dict[str, Any] = rule.model_dump(exclude_defaults=True)
    return Rule(**(given | ({"folds": module.fields["folds"]} if "folds" in module.fields else {})))


def _stored(config: Config, plan: Plan, found: Mapping[str, Found], shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every stored tensor of the plan: factors by group and node, stacked where a node has the axis `site`."""
    held: dict[str, Tensor] = {}
    for group in plan.groups:
        for node, indices in group.diagram.nodes.items():
            if node in found[group.paths[0]].factors:
                mine = [found[path].factors[node] for path in group.paths]
                held[group.store[node]] = torch.stack(mine) if "site" in indices else mine[0].contiguous()
    if config.family == "VERA":
        out, inp = (max(f.shape[side] for f in found.values()) for side in (0, 1))
        banks = {node: key for group in plan.groups for node, key in group.store.items()}
        held |= {banks[name]: t.float().contiguous() for name, t in projections(config, shared, out, inp).items()}
    return held
