"""Merging: deltas written into stored weights and taken out again.

Invariant: a merge that is refused changes nothing; an unmerge restores the kept original bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensoradapt.calls import computed
from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError
from tensoradapt.offload import said
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.scan import owner_of, parameter_of
from tensoradapt.sites import Site

BLOCK = 1 << 18  # entries of float32 arithmetic at a time: a block and its copies stay in the cache
Rows = Callable[[int, Tensor], Tensor]  # from a first row and the rows from there on, to their sum with the delta's
Place = tuple[nn.Module, str]  # the module that holds a parameter, and the parameter's name in it


@dataclass(frozen=True)
class Target:
    """A parameter that a merge changes: where it stands, the copy that replaces it, and the deltas of its sites."""

    name: str
    places: tuple[Place, ...]
    parts: tuple[tuple[Site, Callable[[], Rows]], ...] = ()
    trained: Tensor | None = None

    @property
    def parameter(self) -> Tensor | None:
        """The parameter as it is now; None where the module has none of that name."""
        return _held(*self.places[0])


def targets_of(
    model: nn.Module, sites: Sequence[Site], live: Mapping[str, Site], rows: Callable[[str], Callable[[], Rows]]
) -> list[Target]:
    """The parameters that sites change, each with all of its deltas; `live` has sites by path, tied modules too.

    Modules that are tied have one parameter; where a model holds them apart each of them has the delta.
    """
    parts: dict[str, list[Site]] = {}
    places: dict[str, list[Place]] = {}
    for site in sites:
        name = parameter_of(model, site)
        owner, leaf = owner_of(model, name)
        for one in (site, *(live[twin] for twin in site.joined)):
            other = parameter_of(model, one)
            place = owner_of(model, other)
            if one is site or place[0]._parameters[place[1]] is not owner._parameters[leaf]:
                parts.setdefault(other, []).append(one)
                places.setdefault(other, []).append(place)
            else:
                places[name].append(place)
    return [
        Target(name, tuple(dict.fromkeys(places[name])), tuple((one, rows(one.path)) for one in mine))
        for name, mine in parts.items()
    ]


def with_copies(targets: Sequence[Target], copies: Mapping[str, tuple[Place, Tensor]]) -> list[Target]:
    """The targets, with the copies of their parameters that were trained whole, and those of other parameters."""
    of = lambda target: [path for path, (place, _) in copies.items() if place in target.places]  # noqa: E731
    adapted = [replace(target, trained=next((copies[path][1] for path in of(target)), None)) for target in targets]
    apart = copies.keys() - {path for target in targets for path in of(target)}
    return adapted + [Target(path, (place,), trained=copy) for path, (place, copy) in copies.items() if path in apart]


@dataclass
class Merged:
    """One parameter that a merge changed: where it stands, and what stood there."""

    places: tuple[Place, ...]
    original: Tensor | None
    tied: nn.Parameter | None = None

    def restore(self) -> None:
        """Put the original back, or the parameter that others hold too."""
        for owner, leaf in self.places:
            if self.tied is not None:
                owner._parameters[leaf] = self.tied
            elif self.original is not None:
                _held(owner, leaf).copy_(self.original)  # type: ignore[union-attr]


def _held(owner: nn.Module, leaf: str) -> Tensor | None:
    """A weight that a module holds: a parameter, or the buffer that PyTorch makes of a frozen parametrised one."""
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers.get(leaf)


def view(parameter: Tensor, site: Site) -> Tensor:
    """A site's part of a stored parameter, `out` first; it shares the parameter's memory."""
    part = parameter if site.index is None else parameter[site.index]
    part = part.mT if site.layout == "in out" else part
    return part if site.rows is None else part[site.rows[0] : site.rows[1]]


def plain_weight(model: nn.Module, site: Site) -> Tensor:
    """A site's part of the base's weight, to start from.  Shape: (out, in kernel).

    Raises AdapterError on the meta device, and on weights that are quantised, sharded or computed from others.
    """
    owner, name = owner_of(model, parameter_of(model, site))
    held = owner._parameters.get(name)
    absent = said(model, parameter_of(model, site), held)
    if absent is not None:
        raise AdapterError(f"{site.path} has no weight to start from: it is {absent[0]}", hint=absent[1])
    made = computed(owner, name)
    if made is not None:
        raise AdapterError(f"{site.path} has no parameter to start from: it is {made[0]}", hint=f"call {made[1]} first")
    found = view(held.detach(), site).flatten(1) if is_plain(held) else None  # type: ignore[union-attr]
    if found is None or tuple(found.shape) != (site.out, site.inp * site.kernel):
        raise AdapterError(
            f"{site.path} has no plain weight to start from: it is quantised or sharded",
            got=kind_of(held),
            hint="start from the model in half precision, save the adapter, and load it onto the quantised one",
        )
    return found


def laid_out(deltas: Sequence[tuple[Site, Tensor]], like: Tensor) -> Tensor:
    """The deltas of one parameter's sites in a tensor of its shape and dtype; zero where no site lies."""
    stored: dict[int | None, Tensor] = {}
    shape = like.shape if deltas[0][0].index is None else like.shape[1:]
    for site, delta in deltas:
        piece = _stored(site, delta.to(device=like.device, dtype=like.dtype), shape)
        stored[site.index] = stored[site.index] + piece if site.index in stored else piece
    if None in stored:
        return stored[None]
    blank = torch.zeros(shape, device=like.device, dtype=like.dtype)
    return torch.stack([stored.get(k, blank) for k in range(like.shape[0])])


def _stored(site: Site, delta: Tensor, shape: torch.Size) -> Tensor:
    """A delta (out, in) or (out, in, kh, kw) as its parameter stores it, rows of other sites filled with zeros."""
    turned = site.layout == "in out"
    if site.rows is not None:
        below = shape[-1 if turned else 0] - site.rows[1]
        delta = F.pad(delta, (0, 0) * (delta.dim() - 1) + (site.rows[0], below))
    return (delta.mT if turned else delta).reshape(shape)


def rows_of(chain: Chain, scale: float) -> Rows:
    """A function that adds scale * delta to a block of rows, the delta formed there and then where the chain allows."""
    pair = chain.low_rank
    if pair is not None:
        outer, inner = pair[0] * scale, pair[1].contiguous()
        return lambda start, block: torch.addmm(block, outer[start : start + len(block)].to(block), inner.to(block))
    dense = chain.dense() * scale
    return lambda start, block: block + dense[start : start + len(block)].to(block)


@dataclass
class Untied:
    """A config of transformers' that said that embeddings are tied, which loaders would make of them again."""

    config: Any

    def restore(self) -> None:
        """Let it say so again."""
        self.config.tie_word_embeddings = True


def merge(model: nn.Module, targets: Sequence[Target], keep: str | None, *, untie: bool) -> list[Merged | Untied]:
    """Write every target's deltas into its parameter; what changed is returned, and undone where anything fails.

    Raises AdapterError before anything is changed where a parameter cannot take a delta, or is tied and not to be
    untied. Without kept originals a merge could not be undone, so it is tried in full first.
    """
    keep_original(torch.empty(0), keep)
    for target in targets:
        absent = said(model, target.name, target.parameter)
        if absent is not None:
            raise AdapterError(f"{target.name} has nothing to merge into: it is {absent[0]}", hint=absent[1])
    holders = _holders(model)
    apart = {target.name: _tied(target, holders, untie) for target in targets}
    parted = [id(target.parameter) for target in targets if apart[target.name]]
    words = any(isinstance(module, nn.Embedding) for key in parted for _, (module, _) in holders.get(key, ()))
    for target in targets if keep is None else ():
        _write(target, write=False)
    records: list[Merged | Untied] = []
    try:
        for target in targets:
            records.append(_take(target, keep, apart=apart[target.name]))
            _write(target)
        records += _untied(model) if words else []
    except BaseException:
        restore_all(records)
        raise
    return records


def _untied(model: nn.Module) -> list[Untied]:
    """Clear `tie_word_embeddings` in the configs of a model: loaders tie what was parted, where it says so.

    Not where other modules are still tied by it (the embeddings of an encoder and a decoder): loaders part what a file
    has under two names with other values, and do not find what it has under one.
    """
    if any(len({id(module) for _, (module, _) in places}) > 1 for places in _holders(model).values()):
        return []
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    records = [Untied(config) for config in configs.values() if getattr(config, "tie_word_embeddings", None) is True]
    for record in records:
        record.config.tie_word_embeddings = False
    return records


def _holders(model: nn.Module) -> dict[int, list[tuple[str, Place]]]:
    """Every module that holds a parameter, by the parameter's identity."""
    found: dict[int, list[tuple[str, Place]]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append((path, (module, leaf)))
    return found


def _tied(target: Target, holders: Mapping[int, list[tuple[str, Place]]], untie: bool) -> bool:
    """Whether modules outside the target hold its parameter too. Raises AdapterError where it cannot be merged into."""
    parameter: Tensor = target.parameter  # type: ignore[assignment]
    made = computed(*target.places[0])
    if made is not None:
        raise AdapterError(
            f"{target.name} is {made[0]}, so a merge has no parameter to write into",
            hint=f"{made[1]} makes a parameter of it, then merge again; or serve the adapter unmerged",
        )
    if not is_plain(parameter):
        raise AdapterError(
            f"{target.name} is no plain weight to merge into: it is quantised or sharded",
            got=f"{kind_of(parameter)}, in a {type(target.places[0][0]).__name__}",
            hint="dequantise the base first, or serve the adapter unmerged",
        )
    others = [path for path, place in holders.get(id(parameter), ()) if place not in target.places]
    if others and not untie:
        raise AdapterError(
            f"{target.name} is tied to {', '.join(others)}: merging would change both",
            hint="merge(untie=True) gives this module a weight of its own",
        )
    return bool(others)


def _take(target: Target, keep: str | None, *, apart: bool) -> Merged:
    """Record a parameter before it is changed; a tied one is replaced by a copy of its own."""
    parameter: Tensor = target.parameter  # type: ignore[assignment]
    if not apart:
        return Merged(target.places, keep_original(parameter, keep))
    own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for owner, leaf in target.places:
        owner._parameters[leaf] = own
    return Merged(target.places, None, tied=parameter)  # type: ignore[arg-type]


def _write(target: Target, *, write: bool = True) -> None:
    parameter: Tensor = target.parameter  # type: ignore[assignment]
    if target.trained is not None:
        _check_finite(target.trained, target.name)
        if write:
            parameter.copy_(target.trained)
    for site, rows in target.parts:
        add_rows(view(parameter, site), rows(), site.path, write=write)


def add_rows(part: Tensor, rows: Rows, path: str, *, write: bool = True) -> None:
    """Add a delta to a part of a weight, in float32 at least, block by block.

    Raises AdapterError at the first block that is not finite.
    """
    height = max(1, BLOCK * part.shape[0] // max(part.numel(), 1))
    precise = torch.promote_types(part.dtype, torch.float32)
    for start in range(0, part.shape[0], height):
        block = part[start : start + height]
        result = rows(start, block.to(precise).flatten(1)).to(part.dtype)
        _check_finite(result, path)
        if write:
            block.copy_(result.view_as(block))


def _check_finite(values: Tensor, path: str) -> None:
    low, high = torch.aminmax(values)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        dtype = str(values.dtype).removeprefix("torch.")
        raise AdapterError(
            f"merging {path} would give values that are not finite",
            got=f"sums that are NaN, or beyond {torch.finfo(values.dtype).max:.3g}, the largest number of {dtype}",
            hint="look for NaN in the adapter and the base; a base of a wider dtype holds larger sums",
        )


def keep_original(parameter: Tensor, keep: str | None) -> Tensor | None:
    """A copy of a parameter to restore it from: on the CPU, on its own device, or none."""
    if keep not in ("cpu", "same", None):
        raise AdapterError(f"keep={keep!r} is no place", expected="'cpu', 'same' or None")
    return None if keep is None else parameter.detach().to("cpu" if keep == "cpu" else parameter.device, copy=True)


@torch.no_grad()
def restore_all(merged: Sequence[Merged | Untied]) -> None:
    """Undo a merge, the last parameter first."""
    for record in reversed(merged):
        record.restore()


def check_last(name: str, kept: str | None, last: str) -> None:
    """Raise AdapterError where a merge cannot be undone: no original was kept, or another came after it."""
    if kept is None:
        raise AdapterError(
            "the original weights were not kept",
            got="merge(keep=None)",
            hint="merge with keep='cpu', or load the base again",
        )
    if last != name:
        raise AdapterError(f"{last!r} was merged after {name!r}", hint=f"unmerge {last!r} first")
