"""Merging: which stored weights a merge changes, whether they can be, and the sums that it writes into them.

Invariant: nothing here changes a weight but `add_rows`, which is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tensoradapt.calls import computed
from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError
from tensoradapt.offload import said
from tensoradapt.parts import view
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.scan import owner_of, parameter_of
from tensoradapt.sharded import gathered, is_absent, is_sharded, local, part_of
from tensoradapt.sites import Site

BLOCK = 1 << 18  # entries of float32 arithmetic at a time: a block and its copies stay in the cache
Rows = Callable[[int, Tensor], Tensor]  # from a first row and the rows from there on, to their sum with the delta's
Place = tuple[nn.Module, str]  # the module that holds a parameter, and the parameter's name in it
Sums = Iterator[tuple[int, Tensor, Tensor]]  # blocks of rows: where the next one begins, the block, and what it becomes


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
        return held_at(*self.places[0])

    @property
    def steps(self) -> Iterator[tuple[Tensor, Callable[[int], Sums]]]:
        """What is written, in order: a part of the parameter, and from a first row on its sums."""
        parameter: Tensor = self.parameter  # type: ignore[assignment]
        if is_sharded(parameter):
            yield local(parameter), partial(_part, parameter, self)
            return
        if self.trained is not None:
            yield parameter, partial(_copies, parameter, self.trained, self.name)
        for site, rows in self.parts:
            part = view(parameter, site)
            yield part, partial(_sums, part, rows, site.path)

    def check(self) -> None:
        """Raise AdapterError where a sum is not finite; nothing is written."""
        for _, sums in self.steps:
            for _ in sums(0):
                pass


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


def held_at(owner: nn.Module, leaf: str) -> Tensor | None:
    """A weight that a module holds: a parameter, or the buffer that PyTorch makes of a frozen parametrised one."""
    return owner._parameters[leaf] if leaf in owner._parameters else owner._buffers.get(leaf)


def rows_of(chain: Chain, scale: float) -> Rows:
    """A function that adds scale * delta to a block of rows, the delta formed there and then where the chain allows."""
    pair = chain.low_rank
    if pair is not None:
        outer, inner = pair[0] * scale, pair[1].contiguous()
        return lambda start, block: torch.addmm(block, outer[start : start + len(block)].to(block), inner.to(block))
    dense = chain.dense() * scale
    return lambda start, block: block + dense[start : start + len(block)].to(block)


def admit(model: nn.Module, targets: Sequence[Target], *, untie: bool) -> dict[str, bool]:
    """Whether each target's parameter is held by other modules too, by name.

    Raises AdapterError where one cannot take a delta, or is tied and not to be untied.
    """
    for target in targets:
        absent = said(model, target.name, target.parameter)
        if absent is not None:
            raise AdapterError(f"{target.name} has nothing to merge into: it is {absent[0]}", hint=absent[1])
        if is_absent(target.parameter):
            gathered(target.parameter, target.name)  # type: ignore[arg-type]
    holders = holders_of(model)
    return {target.name: _tied(target, holders, untie) for target in targets}


def holders_of(model: nn.Module) -> dict[int, list[tuple[str, Place]]]:
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
    if parameter is None or not is_plain(local(parameter)):
        raise AdapterError(
            f"{target.name} is no plain weight to merge into: it is quantised",
            got=f"{kind_of(parameter)}, in a {type(target.places[0][0]).__name__}",
            hint="dequantise the base first, or serve the adapter unmerged",
        )
    others = [path for path, place in holders.get(id(parameter), ()) if place not in target.places]
    if others and not untie:
        raise AdapterError(
            f"{target.name} is tied to {', '.join(others)}: merging would change both",
            hint="merge(untie=True) gives this module a weight of its own",
        )
    if others and is_sharded(parameter):
        raise AdapterError(
            f"{target.name} is tied to {', '.join(others)}, and sharded: it cannot be given a weight of its own",
            hint="save the adapter, and merge it into a model that is not sharded",
        )
    return bool(others)


def add_rows(part: Tensor, rows: Rows, path: str, *, write: bool = True) -> None:
    """Add a delta to a part of a weight, in float32 at least, block by block.

    Raises AdapterError, at the end, where sums are not finite.
    """
    for _, block, result in _sums(part, lambda: rows, path, 0):
        if write:
            block.copy_(result.view_as(block))


def _sums(part: Tensor, rows: Callable[[], Rows], path: str, first: int) -> Sums:
    height = max(1, BLOCK * part.shape[0] // max(part.numel(), 1))
    precise = torch.promote_types(part.dtype, torch.float32)
    made, finite = rows(), torch.ones((), dtype=torch.bool, device=part.device)
    for start in range(first, part.shape[0], height):
        block = part[start : start + height]
        result = made(start, block.to(precise).flatten(1)).to(part.dtype)
        finite = finite & _finite(result)
        yield start + len(block), block, result
    _check(finite, part.dtype, path)


def _copies(parameter: Tensor, trained: Tensor, name: str, first: int) -> Sums:
    _check(_finite(trained), trained.dtype, name)
    yield 0, parameter, trained


def _part(parameter: Tensor, target: Target, first: int) -> Sums:
    """This process's part of a sharded parameter: the whole is gathered, and summed by every process alike."""
    if first:
        return
    whole = gathered(parameter if target.trained is None else target.trained).to(parameter.dtype, copy=True)
    for site, rows in target.parts:
        add_rows(view(whole, site), rows(), site.path)
    _check(_finite(whole), whole.dtype, target.name)
    held = local(parameter)
    yield max(1, len(held)), held, part_of(whole, parameter)


def _finite(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)
    return torch.isfinite(low) & torch.isfinite(high)


def _check(finite: Tensor, dtype: torch.dtype, path: str) -> None:
    """One answer for a whole weight: every question makes a device wait."""
    if not bool(finite):
        raise AdapterError(
            f"merging {path} would give values that are not finite",
            got=f"sums that are NaN, or beyond {torch.finfo(dtype).max:.3g}, the largest number of "
            f"{str(dtype).removeprefix('torch.')}",
            hint="look for NaN in the adapter and the base; a base of a wider dtype holds larger sums",
        )
