"""Scanning: a live module (also on the meta device), a config, a model folder or a checkpoint -> its sites.

Invariant: a module that neither a hook on its output nor its weight at use can serve is in `refused`, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensoradapt.budget import BudgetTable, RankSolution, solve, tabulate
from tensoradapt.errors import FileError, TensorAdaptError
from tensoradapt.plan import Plan, make_plan
from tensoradapt.sites import Site, SiteMap, from_headers, from_mapping, locate
from tensoradapt.spec import Spec

HOST = "tensoradapt"  # the name under which adapters register themselves on a model
Model = nn.Module | Mapping[str, Any] | str | Path


def scan(model: Model) -> SiteMap:
    """The sites of a module, a `{path: (out, in)}` mapping, a config.json, a model folder, or safetensors headers."""
    if isinstance(model, SiteMap):
        return model
    if isinstance(model, nn.Module):
        return scan_module(model)
    if isinstance(model, Mapping):
        return from_mapping(model)
    path = Path(model)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _scan_config(path if path.is_file() else path / "config.json")
    if path.exists():
        return from_headers(path)
    raise FileError(f"no model at {path}", hint="give a config.json, a model folder, or a safetensors file")


def plan(spec: Spec, model: Model) -> Plan:
    """The plan of a spec on a model: groups, diagrams, counts, bytes and FLOP per token, no tensor made.

    Raises SiteError, SpecError, ShapeError or FileError, each naming what is at fault and what to write instead.
    """
    return make_plan(spec, scan(model))


def budget(specs: Spec | Mapping[str, Spec] | Sequence[Spec], model: Model, ranks: Iterable[int]) -> BudgetTable:
    """Parameters, bytes and FLOP per token of specs over a range of ranks on one model.

    `specs` is one spec, a list, or a mapping from label to spec. Raises RankError, SiteError, SpecError or FileError.
    """
    return tabulate(specs, scan(model), ranks)


def solve_rank(spec: Spec, model: Model, *, max_parameters: int) -> RankSolution:
    """The largest rank, and the largest ranks by group, with at most `max_parameters` trainable entries.

    The answer has `rank`, `ranks` (group -> rank), and the `spec` and `plan` with those ranks. Extra trained modules do
    not count. Raises RankError where even rank 1 is too much, SpecError where the spec has no rank.
    """
    return solve(spec, scan(model), max_parameters)


def _scan_config(path: Path) -> SiteMap:
    """Build the model of a Hugging Face config on the meta device; a folder of weights without a class is read by its headers."""
    try:
        import transformers
    except ImportError:
        raise FileError(
            "reading a config needs transformers", hint='pip install "tensoradapt[hf]", or give the safetensors file'
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else path)
        names = [name for name in (config.architectures or []) if hasattr(transformers, name)]
        with torch.device("meta"):
            made = getattr(transformers, names[0])(config) if names else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if isinstance(error, TensorAdaptError):
            raise
        raise FileError(
            f"{path} is no config of a model that transformers knows", got=str(error).splitlines()[0]
        ) from None
    return replace(scan_module(made), name=config._name_or_path or path.parent.name)


def scan_module(model: nn.Module) -> SiteMap:
    """The sites of a live module: every adaptable weight, its layout, its delivery, and what it is tied to."""
    modules = {path: module for path, module in model.named_modules() if not f"{path}.".startswith(f"{HOST}.")}
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(f"{HOST}.")}
    found: list[Site] = []
    refused: dict[str, str] = {}
    for path, module in modules.items():
        reason = _reason(module)
        if reason:
            refused[path] = reason
        else:
            found += _module_sites(path, module, modules)
    located = locate([site.owner for site in found])
    found = [
        replace(s, coordinates={**located[s.owner], **({"expert": s.index} if s.index is not None else {})})
        for s in found
    ]
    heads = _heads(model)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return SiteMap(tuple(_tied(found, parameters)), **heads, parameters=shapes, refused=refused)


def _reason(module: nn.Module) -> str:
    """Why a module cannot be adapted; empty where it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule runs compiled code that no hook reaches"
    if isinstance(module, nn.RNNBase):
        return f"{type(module).__name__} hands its weights to a fused kernel as a flat list"
    if isinstance(module, nn.Bilinear | nn.modules.conv._ConvTransposeNd | nn.Conv3d):
        return f"{type(module).__name__} has a weight that is no (out, in) or (out, in, kh, kw)"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "max_norm rescales the rows in place at every look-up"
    return ""


def _module_sites(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    weight = getattr(module, "weight", None)
    parent = modules.get(path.rpartition(".")[0])
    hooked = not isinstance(parent, nn.MultiheadAttention)  # it uses its out_proj's weight and never calls it
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        yield Site(path, (weight.shape[1], weight.shape[0]), layout="in out", owner=path, tensor=f"{path}.weight")
    elif isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward
        delivery, kind = ("output", "embedding") if plain else ("weight", "parameter")
        yield Site(
            path,
            (module.embedding_dim, module.num_embeddings),
            layout="in out",
            delivery=delivery,
            owner=path,
            tensor=f"{path}.weight",
            kind=kind,
        )
    elif isinstance(module, nn.Conv1d | nn.Conv2d) and weight is not None:
        shape = tuple(weight.shape) if weight.dim() == 4 else (*weight.shape[:2], 1, weight.shape[2])
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        yield Site(
            path,
            shape,
            delivery="output" if plain else "weight",
            owner=path,
            tensor=f"{path}.weight",
            kind="conv" if plain else "parameter",
        )
    elif isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        kind = "linear" if hooked else "parameter"
        yield Site(
            path,
            (module.out_features, module.in_features),
            delivery="output" if hooked else "weight",
            owner=path,
            tensor=f"{path}.weight",
            kind=kind,
        )
    else:
        yield from _parameter_sites(path, module)


def _parameter_sites(path: str, module: nn.Module) -> Iterator[Site]:
    """Matrices that a module holds as parameters, and the experts of a 3-D one."""
    turned = bool(getattr(module, "is_transposed", False))
    for name, parameter in module._parameters.items():
        full = f"{path}.{name}" if path else name
        if parameter is None or min(parameter.shape, default=0) == 0:
            continue
        layout = "in out" if turned else "out in"
        shape = tuple(parameter.shape[::-1] if turned else parameter.shape)
        common = {"layout": layout, "delivery": "weight", "owner": full, "tensor": full, "kind": "parameter"}
        if parameter.dim() == 2 and min(shape) > 0:
            yield Site(full, shape, **common)
        elif parameter.dim() == 3 and "expert" in full:
            rest = (shape[0], shape[1]) if turned else (shape[1], shape[2])
            for k in range(parameter.shape[0]):
                yield Site(f"{full}[{k}]", rest, index=k, **common)


def _tied(sites: list[Site], parameters: Mapping[str, nn.Parameter]) -> list[Site]:
    """The sites with the first name of their tensor, and the other modules that hold it."""
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    first = {name: names for names in owners.values() for name in names}
    result = []
    for site in sites:
        names = first.get(site.tensor, [site.tensor])
        others = tuple(name.removesuffix(".weight") for name in names if name != site.tensor)
        result.append(replace(site, tensor=names[0], aliases=others))
    return result


def _heads(model: nn.Module) -> dict[str, Any]:
    """What a model's config says of heads, and its name."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    get = lambda *names: next((v for v in (getattr(config, n, None) for n in names) if isinstance(v, int)), None)  # noqa: E731
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    return {
        "heads": get("num_attention_heads", "n_head", "num_heads", "n_heads"),
        "kv_heads": get("num_key_value_heads"),
        "head_dim": get("head_dim"),
        "name": name if isinstance(name, str) else "",
    }
